"""`trained: head`: a frozen trunk's features are stored once, and the rest is the same training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tests.conftest import draw, run_stage, tiny_params, write_params
from tests.runs.test_settings import run_study
from ucir.config.load import load_params
from ucir.data.augment import ViewDraw, draw_view
from ucir.data.batches import seeded
from ucir.data.feature_pack import open_features, read_feature_info
from ucir.data.pack import open_domain, read_index
from ucir.data.prepare import write_pack
from ucir.data.views import PictureViews
from ucir.errors import UserError
from ucir.methods.registry import METHODS
from ucir.models import embedding
from ucir.models.encoder import new_encoder
from ucir.models.model import load_model
from ucir.paths import FEATURES, PACKS, REPORTS, RESULTS
from ucir.retrieval.evaluation import read_scores
from ucir.runs.run import plan_runs
from ucir.runs.study import activate
from ucir.training.training import Training

HEAD = {"head": "residual", "feature_dim": 8}


def stage(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run_stage(monkeypatch, name, "shapes")


def choose(project: Path, trunk: str, **start: Any) -> None:
    params = tiny_params("images")
    block = params["datasets"]["shapes"]
    block["view"] = {"side": 32, "eval_crop": 1.0}
    block["pairs"] = ["art-photo"]
    block["start"] = {
        "encoder": {"trunk": {"timm": trunk}, **HEAD},
        "weights": "weights.pth",
        "trained": "head",
        "views": 2,
        **start,
    }
    params["methods"]["ucdir"]["shapes"] |= {"epochs": 2, "ramp_start": 0, "ramp_end": 1}
    params["methods"]["ucdir"]["shapes"] |= {"cross_domain_start": 1}
    write_params(project, params)
    given = load_params().datasets["shapes"]
    torch.save(new_encoder(given.start.encoder, 5).trunk.net.state_dict(), "weights.pth")
    activate(project / "params.yaml", "tiny")
    write_pack(Path("images"), ["art", "photo"], PACKS / "shapes", given.pack)


@pytest.mark.parametrize(
    "trunk",
    ["resnet10t.c3_in1k", "vit_pwee_patch16_reg1_gap_256", "convnext_atto", "vit_xsmall_patch16_clip_224"],
)
def test_trunks_of_four_families_go_all_the_way(
    trunk: str, project: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(project, trunk)
    stage("pretrain", monkeypatch)
    stage("embed", monkeypatch)
    run_study()
    rows = {
        row: read_scores(RESULTS / "shapes/closed" / row / "metrics.json")
        for row in ("start/frozen", "start/centred", "start/pretrained", "ucdir")
    }
    assert all(len({(s.query, s.gallery) for s in scores}) == 2 for scores in rows.values())
    page = (REPORTS / "report.html").read_text()
    assert all(f">{row}<" in page for row in ("frozen", "centred", "pretrained"))
    # the run's file holds the head and names the trunk's; together they are a model for any picture
    (run,) = plan_runs(load_params(), "shapes", "closed", "ucdir")
    assert (run.folder / "last.pt").stat().st_size < 0.5 * Path("data/start/shapes/start.pt").stat().st_size
    model = load_model(run.folder / "last.pt")
    index = read_index(run.pack, "art")
    pictures = list(open_domain(run.pack, "art").pixels(slice(None)))
    known = torch.cat(list(model.features(pictures, domain="art")))
    with np.load(RESULTS / "shapes/closed/ucdir/evaluate/art-photo-s0.npz") as stored:
        assert np.allclose(known.numpy(), stored["art"], atol=2e-2)  # float16 twice, and squashed pictures
    assert len(torch.cat(list(model.features(pictures)))) == len(index)
    with pytest.raises(UserError, match="domain 'arts' is unknown to this model; did you mean 'art'"):
        next(model.features(pictures, domain="arts"))


class ReplayedViews(PictureViews):
    """The very views whose features are stored, rendered from pixels."""

    def __init__(self, embedder: embedding.Embedder, *given: Any) -> None:
        super().__init__(*given)
        self.embedder = embedder
        self.indices = [read_index(embedder.pack, domain.name) for domain in self.images]

    def draw(self, domain_B: Tensor, slot_B: Tensor, generator: torch.Generator, augment: Any = None) -> Any:
        return torch.randint(self.embedder.views, slot_B.shape, generator=generator)

    def random(self, domain_B: Tensor, slot_B: Tensor, draw: Any) -> Tensor:
        parts = []
        for domain, slot, view in zip(domain_B.tolist(), slot_B.tolist(), draw.tolist(), strict=True):
            generator = seeded(int(self.indices[domain][slot].sha256[:15], 16), view)
            size = torch.from_numpy(self.images[domain].size_N2[slot : slot + 1])
            one: ViewDraw = draw_view(self.view.augment, size, generator)
            parts.append(super().random(torch.tensor([domain]), torch.tensor([slot]), one))
        return torch.cat(parts)


@pytest.mark.parametrize("name", ["ucdir", "protoot", "uem", "pcs"])
def test_it_is_the_training_of_a_frozen_trunk_with_the_same_views(
    name: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(project, "resnet10t.c3_in1k")
    stage("pretrain", monkeypatch)
    monkeypatch.setattr(np, "float16", np.float32)
    monkeypatch.setattr(torch.Tensor, "half", torch.Tensor.float)
    stage("embed", monkeypatch)
    params = load_params(overrides=[f"methods.{name}.shapes={{epochs: 2, batch_size: 8, clusters: 3}}"])
    (run,) = plan_runs(params, "shapes", "closed", name)
    with monkeypatch.context() as patch:
        patch.chdir("/")  # as workers of a cluster may
        assert [len(images) for images in run.images()] == list(run.counts)
    cpu = torch.device("cpu")
    stored = run.new_training(cpu)
    domains = [open_domain(run.pack, domain) for domain in ("art", "photo")]
    pixels = Training(
        tuple(domains), run.view, run.encoder, run.start, METHODS[name](run.params, 0), cpu, "head"
    )
    embedder = embedding.Embedder(run.pack, run.start, run.encoder, run.view, 2)
    pixels.step.views = ReplayedViews(embedder, domains, run.view, pixels.query.form, cpu)
    losses = []
    for training in (stored, pixels):
        training.begin()
        features = training.features()
        training.method.start(features)
        training.start_epoch(0, features)
        losses.append(training.train_epoch(0))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_embedding_is_incremental_and_a_kill_costs_a_chunk(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(embedding, "CHUNK", 4)
    choose(project, "test_resnet")
    stage("pretrain", monkeypatch)
    computed: list[Any] = []
    original = embedding.Embedder.__call__

    def counted(self: embedding.Embedder, chunk: Any) -> Any:
        if killed and len(computed) == 4:
            raise KeyboardInterrupt  # of the pool's further chunks too, which it may reach before it is told
        computed.append(chunk)
        return original(self, chunk)

    killed = True
    monkeypatch.setattr(embedding, "usable_cores", lambda: 1)
    monkeypatch.setattr(embedding.Embedder, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        stage("embed", monkeypatch)
    killed = False
    with pytest.raises(UserError, match="no finished features; run `uv run dvc repro embed`"):
        plan_runs(load_params(), "shapes", "closed", "ucdir")
    stage("embed", monkeypatch)
    assert len(computed) == len(set(computed)), "a chunk that was kept is computed again"
    first = len(computed)
    indices = {domain: read_index(PACKS / "shapes", domain) for domain in ("art", "photo")}
    whole = {d: np.array(open_features(FEATURES / "shapes", d, x).views_MVP) for d, x in indices.items()}
    stage("embed", monkeypatch)
    assert len(computed) == first, "a finished pack is embedded again"
    # undisturbed, the same
    FEATURES.joinpath("shapes").rename("elsewhere")
    computed[:] = [None] * 9
    stage("embed", monkeypatch)
    for domain, views in whole.items():
        again = open_features(FEATURES / "shapes", domain, indices[domain])
        assert np.array_equal(again.views_MVP, views)
    # a picture more, one less: the others are taken over by content
    draw("circle", np.random.default_rng(9)).save("images/art/circle/new.png")
    Path("images/photo/cross/0.png").unlink()
    given = load_params().datasets["shapes"]
    write_pack(Path("images"), ["art", "photo"], PACKS / "shapes", given.pack)
    with pytest.raises(UserError, match="are of other pictures"):
        open_features(FEATURES / "shapes", "art", read_index(PACKS / "shapes", "art"))
    before = len(computed)
    stage("embed", monkeypatch)
    assert len(computed) - before == 1, "only the new picture's chunk"
    info = read_feature_info(FEATURES / "shapes")
    assert info.counts == {"art": 23, "photo": 27}
    index = read_index(PACKS / "shapes", "photo")
    assert np.isfinite(open_features(FEATURES / "shapes", "photo", index).plain_MP).all()
    # other views: nothing of the old ones is of use, and trainings say so
    write_params(project, _with_views(3))
    with pytest.raises(UserError, match="other weights, views or code"):
        plan_runs(load_params(), "shapes", "closed", "ucdir")


def _with_views(views: int) -> dict[str, Any]:
    params: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    params["datasets"]["shapes"]["start"]["views"] = views
    return params


def test_methods_that_need_pixels_say_so_before_anything_else(project: Path) -> None:
    choose(project, "test_resnet")
    for name in ("dgdir", "brad"):
        with pytest.raises(UserError, match=rf"{name} .*shapes\.start\.trained must be last or all"):
            plan_runs(load_params(), "shapes", "closed", name)


@pytest.mark.parametrize("trained", ["last", "all"])
def test_more_of_the_trunk_can_be_trained(
    trained: str, project: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    choose(project, "test_resnet", trained=trained)
    stage("pretrain", monkeypatch)
    stage("embed", monkeypatch)
    run_study()
    (run,) = plan_runs(load_params(), "shapes", "closed", "ucdir")
    start = torch.load("data/start/shapes/start.pt")["state_dict"]
    end = torch.load(run.folder / "last.pt")["state_dict"]
    trunk = [n for n in start if ".fc." not in n and "num_batches" not in n]
    same = [n for n in trunk if torch.equal(start[n], end[n])]
    assert bool(same) == (trained == "last")
    assert len(same) < len(trunk)
