"""A model knows what it needs: no params.yaml, and the features that its training had."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ucir.cluster.launch import train_all
from ucir.config.load import load_params
from ucir.data.pack import open_domain, read_index
from ucir.data.views import PictureViews
from ucir.errors import UserError
from ucir.models.card import model_card
from ucir.models.checkpoints import load_encoder, save_encoder
from ucir.models.encoder import new_encoder
from ucir.models.features import extract_features
from ucir.models.model import load_model
from ucir.runs.run import plan_runs, plan_start


def test_a_trained_model_is_used_without_params(
    prepared: Path, store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params(overrides=["methods.ucdir.shapes.epochs=2"])
    (run,) = plan_runs(params, "shapes", "closed", "ucdir", ("art-photo",))
    train_all([run], params.cluster)
    images = open_domain(run.pack, "art")
    files = [
        prepared / "images/art" / picture.path.removeprefix("art/") for picture in read_index(run.pack, "art")
    ]
    pictures = [np.asarray(Image.open(file).convert("RGB")) for file in files]
    monkeypatch.chdir(tmp_path)  # where there is no params.yaml
    for name in ("last.pt", "best.pt"):
        model = load_model(run.folder / name)
        assert model.facts["pair"] == "art-photo"
        assert model.facts["epoch"] in (1, 2)
        for features in ("head", "pooled"):
            stream = torch.cat(list(model.features(iter(pictures), features)))
            views = PictureViews([images], run.view, model.encoder.form, torch.device("cpu"))
            (packed,) = extract_features(model.encoder, views, torch.device("cpu"), features == "pooled")
            assert torch.allclose(stream, packed.own_ND, atol=1e-6)
    encoder = new_encoder(run.encoder, 1)
    load_encoder(encoder, run.folder / "last.pt")  # the file is a MoCo checkpoint, too
    last = load_model(run.folder / "last.pt").encoder
    assert all(torch.equal(x, y) for x, y in zip(encoder.parameters(), last.parameters(), strict=True))
    save_encoder(encoder, tmp_path / "moco.pt")
    with pytest.raises(UserError, match=r"moco\.pt: a checkpoint without a description"):
        load_model(tmp_path / "moco.pt")


def test_a_label_free_start_is_a_model_like_others(prepared: Path, store: str) -> None:
    params = load_params()
    run = plan_start(params.datasets["shapes"], "shapes")
    train_all([run], params.cluster)
    model = load_model(run.folder / "last.pt")
    assert model.name == "pretrain on shapes"
    card = str(model_card(model))
    assert "- art: 22\n- photo: 28\n- real-life: 34" in card
    assert "It began with random weights." in card
    assert "None: it is what trainings begin from." in card
