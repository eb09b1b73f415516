"""What other programs get of a model computes what the model computes, and comes back as the same model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData

from tests.conftest import ucir
from ucir.config.data import PackParams, ViewParams
from ucir.config.model import EncoderParams
from ucir.errors import UserError
from ucir.models import export
from ucir.models.card import model_card
from ucir.models.encoder import new_encoder
from ucir.models.export import read_folder, write_folder, write_onnx
from ucir.models.head import ResidualHead
from ucir.models.model import Model, load_model, save_model

FACTS = {
    "dataset": "pacs",
    "setting": "closed",
    "method": "uem",
    "pair": "sketch-photo",
    "seed": "0",
    "run_key": "0123456789ab",
    "epoch": 7,
    "epoch_choice": "last",
    "scores": {"P@50": 51.25},
    "params": {"epochs": 7, "temperature": 0.2},
    "catalogue": "pacs",
    "pictures": {"sketch": 3929, "photo": 1670},
    "weights": {"weights": "w.pth", "sha256": "ab" * 32, "licence": "cc-by-nc-4.0", "note": ""},
}


@pytest.fixture
def model() -> Model:
    """With a head that has a centre for each domain, both far from zero."""
    encoder = new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8, head="residual"), 0)
    head = encoder.head
    assert isinstance(head, ResidualHead)
    generator = torch.Generator().manual_seed(0)
    head.centre_2P.copy_(torch.nn.functional.normalize(torch.rand(2, 32, generator=generator), dim=1))
    samples = {"sketch": torch.rand(5, 8, generator=generator).half()}
    view, pack = ViewParams(side=16, eval_crop=1.0), PackParams(side=16)
    return Model(encoder.eval(), view, pack, FACTS, ("sketch", "photo"), samples=samples)


@pytest.mark.parametrize("domain", [None, "photo"])
def test_onnx_runtime_ranks_as_torch_does(model: Model, domain: str | None, tmp_path: Path) -> None:
    file = tmp_path / "new/model.onnx"
    assert write_onnx(model, file, domain) < 1e-5
    rng = np.random.default_rng(0)
    pictures = (rng.random((40, 1, 1, 3)) * rng.integers(0, 256, (40, 16, 16, 3))).astype(np.uint8)
    session = onnxruntime.InferenceSession(str(file))
    (features,) = session.run(None, {"pictures": pictures})
    expected = torch.cat(list(model.features(iter(pictures), domain=domain))).numpy()
    assert np.abs(features - expected).max() < 1e-5
    ours, theirs = ((-(x[:10] @ x[10:].T)).argsort(axis=1)[:, :10] for x in (features, expected))
    assert (ours == theirs).all()
    described = {entry.key: entry.value for entry in onnx.load(file).metadata_props}
    assert json.loads(described["preprocessing"])["side"] == 16
    assert json.loads(described["domains"]) == ["sketch", "photo"]


def test_a_graph_that_computes_something_else_is_not_written(
    model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = export.FromPixels.forward
    monkeypatch.setattr(export.FromPixels, "forward", lambda self, x: real(self, x) + 1e-3)
    with pytest.raises(UserError, match=r"differ by 1\.0e-03 from torch"):
        write_onnx(model, tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    with pytest.raises(UserError, match="did you mean 'photo'"):
        write_onnx(model, tmp_path / "model.onnx", "photos")


def test_a_folder_comes_back_as_the_same_model(model: Model, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    for _ in range(2):  # a second time over the first
        write_folder(model, folder)
    again = read_folder(folder)
    assert again.digest() == model.digest()
    assert (again.facts, again.domains, again.used) == (model.facts, model.domains, model.used)
    assert torch.equal(again.samples["sketch"], model.samples["sketch"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    with pytest.raises(UserError, match="holds other files already"):
        write_folder(model, tmp_path / "other")


def edited(**changes: object) -> Callable[[Path], object]:
    def edit(folder: Path) -> object:
        block = json.loads((folder / "config.json").read_text("utf-8"))
        return (folder / "config.json").write_text(json.dumps({**block, **changes}), encoding="utf-8")

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: (f / "config.json").unlink(), "no config.json in it"),
        (lambda f: (f / "config.json").write_text("{"), "config.json: not a model of ucir"),
        (lambda f: (f / "config.json").write_text("[1]"), "config.json: not a model of ucir"),
        (lambda f: (f / "model.safetensors").write_bytes(b"0" * 99), "unreadable as safetensors"),
        (edited(model_type="bert"), "a model of bert, not of ucir"),
        (edited(format=2), "of format 2, this version reads 1: update"),
        (edited(encoder={"trunk": {"convnet": {"width": 8}}}), "does not fit config.json"),
        (edited(view={"sides": 16}), "view.sides: unknown key; did you mean 'side'"),
        (edited(domains=3), "domains = 3: "),
        (edited(used="tail"), "used = .tail.: "),
    ],
)
def test_what_is_no_such_folder_is_told(
    model: Model, damage: Callable[[Path], object], message: str, tmp_path: Path
) -> None:
    write_folder(model, tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError, match=message):
        read_folder(tmp_path)


def test_a_card_says_what_the_model_was_made_of_and_how_well_it_does(model: Model) -> None:
    card = ModelCard(str(model_card(model)))
    assert isinstance(card.data, ModelCardData)
    assert card.data.license == "other"
    assert card.data.license_name == "cc-by-nc-4.0"
    assert card.data.eval_results
    (score,) = card.data.eval_results
    assert (score.metric_type, score.metric_value, score.dataset_name) == ("P@50", 51.25, "pacs sketch-photo")
    for said in (
        "- sketch: 3929\n- photo: 1670",
        "PACS; licence of the data: for research",
        "| temperature | 0.2 |",
        "epoch 7 of 7, seed 0",
        "The last epoch: nothing was chosen.",
        "| P@50 | 51.2 |",
        "labels were read for these numbers alone",
    ):
        assert said in card.text
    chosen = Model(model.encoder, model.view, model.pack, {**FACTS, "epoch_choice": "best_by_labels"})
    assert "was chosen with labels" in str(model_card(chosen))
    unlabelled = Model(model.encoder, model.view, model.pack, {**FACTS, "scores": {}, "catalogue": "folder"})
    assert "have no labels" in str(model_card(unlabelled))
    assert "PACS" not in str(model_card(unlabelled))


def test_models_go_to_another_project_and_back(
    model: Model, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(model, Path("models/mine/model.pt"))
    assert "README.md" in ucir("export", "mine", "hub")
    assert "--model theirs" in ucir("import", "hub", "theirs")
    assert load_model("models/theirs/model.pt").digest() == model.digest()
    assert "from torch's" in ucir("export", "theirs", "model.onnx", "--domain", "sketch")
    for arguments, message in (
        (("import", "hub", "theirs"), "there is a model of this name"),
        (("import", "hub", "../up"), "letters, digits"),
        (("import", "nowhere", "new"), r"nowhere: no config\.json in it"),
        (("export", "mien", "out"), "did you mean 'mine'"),
        (("export", "mine", "out.pb"), r"ending with \.onnx"),
        (("export", "mine", "out", "--domain", "photo"), "goes with an"),
    ):
        with pytest.raises(UserError, match=message):
            ucir(*arguments)


def test_other_peoples_files_and_hostile_folders(model: Model, tmp_path: Path) -> None:
    theirs = tmp_path / "bert"
    theirs.mkdir()
    (theirs / "config.json").write_text('{"model_type": "bert"}')
    for target in (theirs, theirs / "config.json"):
        with pytest.raises(UserError, match="already: give a new folder"):
            write_folder(model, target)
    assert [file.name for file in theirs.iterdir()] == ["config.json"]
    write_folder(model, tmp_path / "hub")
    (tmp_path / "hub/config.json").write_text("[" * 200_000)
    with pytest.raises(UserError, match="not a model of ucir"):
        read_folder(tmp_path / "hub")
    for changes, message in (
        ({"domains": ["a", "a"]}, "two different ones"),
        ({"domains": ["a", "b"]}, "samples of 'sketch'"),
        ({"facts": {"method": ["x"], "scores": "a"}}, "not those of a training"),
    ):
        (tmp_path / "hub/config.json").unlink()
        (tmp_path / "hub/model.safetensors").unlink()
        (tmp_path / "hub/README.md").unlink()
        write_folder(model, tmp_path / "hub")
        edited(**changes)(tmp_path / "hub")
        with pytest.raises(UserError, match=message):
            read_folder(tmp_path / "hub")
