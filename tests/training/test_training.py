"""The epoch loop: exact resume, invisible labels, equal results on any number of workers."""

from __future__ import annotations

import re
from copy import deepcopy
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

from tests.conftest import CLASSES, make_images
from tests.trainings import CPU, ENCODER, Keep, assert_equal, training, weights
from tests.workers import run_workers
from ucir.config.data import AugmentParams, PackParams, ViewParams
from ucir.config.model import PretrainParams, StartParams
from ucir.data.pack import open_domain
from ucir.data.prepare import write_pack
from ucir.errors import UserError
from ucir.methods.base import Term
from ucir.methods.registry import METHODS, VARIANTS
from ucir.models.checkpoints import load_state, save_encoder
from ucir.models.encoder import Encoder, new_encoder
from ucir.runs.run import PRETRAIN
from ucir.training.epochs import epochs, train
from ucir.training.start import ViewContrast, ViewContrastParams, given_start
from ucir.training.training import Training


@pytest.fixture
def start(tmp_path: Path) -> Path:
    save_encoder(new_encoder(ENCODER, 3), tmp_path / "start.pt")
    return tmp_path / "start.pt"


@pytest.mark.parametrize("name", [name for name in METHODS if name not in VARIANTS])
def test_a_run_killed_at_any_time_and_resumed_ends_as_an_undisturbed_one(
    pack: Path, start: Path, tmp_path: Path, name: str
) -> None:
    whole = training(pack, start, name=name)
    reporter = Keep()
    kept = [(epoch + 1, deepcopy(reporter.state)) for epoch in epochs(whole, reporter)]
    assert [report.epoch for report in reporter.reports] == [0, 1, 2, 3]
    for stopped_in in ((0, 1), (3, 2)):
        first = Keep(stopped_in=stopped_in)
        with pytest.raises(KeyboardInterrupt):
            train(training(pack, start, name=name), first)
        kept.append((len(first.reports), first.state))
    for done, state in (kept[0], kept[2], *kept[4:]):
        torch.save(state, tmp_path / "state.pt")
        second = training(pack, start, name=name)
        rest = Keep(load_state(tmp_path / "state.pt"))
        train(second, rest)
        assert [report.epoch for report in rest.reports] == list(range(done, 4))
        assert_equal(weights(whole), weights(second))
        for one, two in zip(reporter.reports[done:], rest.reports, strict=True):
            assert torch.equal(one.features[0].own_ND, two.features[0].own_ND)
            losses = {k: v for k, v in one.metrics.items() if k.startswith("train/")}
            assert losses == {k: v for k, v in two.metrics.items() if k.startswith("train/")}


@pytest.mark.parametrize("distances", ["unit", "raw"])
def test_the_frozen_copy_stays_and_a_kill_at_the_border_changes_nothing(
    pack: Path, start: Path, distances: str
) -> None:
    options: dict[str, Any] = {"epochs": 3, "matching_epochs": 2, "clusters": (3,), "distances": distances}
    run = training(pack, start, name="uem", **options)
    train(run, Keep())
    frozen = run.networks.frozen
    assert frozen is not None
    at_border = Keep(killed_after=0)
    with pytest.raises(KeyboardInterrupt):
        train(training(pack, start, name="uem", **options), at_border)
    assert at_border.state is not None
    border = {
        k.removeprefix("query."): v for k, v in at_border.state["networks"].items() if k.startswith("query.")
    }
    for name, value in frozen.state_dict().items():
        assert torch.equal(value, border[name]), name
    assert not frozen.training
    assert any(not torch.equal(value, border[name]) for name, value in run.query.state_dict().items())
    for killed_after in (0, 1):
        first = Keep(killed_after=killed_after)
        with pytest.raises(KeyboardInterrupt):
            train(training(pack, start, name="uem", **options), first)
        second = training(pack, start, name="uem", **options)
        train(second, Keep(first.state))
        assert all(
            torch.equal(a, b) for a, b in zip(weights(run).values(), weights(second).values(), strict=True)
        )


@pytest.mark.parametrize("name", ["ucdir", "brad"])
def test_a_compiled_training_takes_the_same_course(
    pack: Path, start: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # its graphs, made of torch's own operations: the default asks for a C++ compiler and a minute
    monkeypatch.setattr("ucir.models.encoder.COMPILER", "aot_eager")
    graphs = torch._dynamo.utils.counters["stats"]
    courses, made = [], []
    for compiled in (False, True):
        run = training(pack, start, name=name, encoder=ENCODER.model_copy(update={"compiled": compiled}))
        before = graphs["unique_graphs"]
        reporter = Keep()
        train(run, reporter)
        made.append(graphs["unique_graphs"] - before)
        reports = [report.metrics for report in reporter.reports]
        courses.append([{k: v for k, v in m.items() if k.startswith("train/")} for m in reports])
        assert all(name.startswith(("trunk.", "head.")) for name in run.query.state_dict())
    assert made == [0, 2]  # the query encoder's and the key encoder's, once
    assert courses[1] == [pytest.approx(losses, rel=1e-4) for losses in courses[0]]


def test_training_moves_the_encoder_and_the_seed_matters(pack: Path, start: Path) -> None:
    ends = []
    for seed in (0, 1):
        run = training(pack, start, seed=seed)
        before = weights(run)
        train(run, Keep())
        assert not torch.equal(before["query.head.2.weight"], weights(run)["query.head.2.weight"])
        assert not torch.equal(before["key.head.2.weight"], weights(run)["key.head.2.weight"])
        ends.append(weights(run)["query.head.2.weight"])
    assert not torch.equal(*ends)


def test_permuted_class_names_give_the_same_weights(tmp_path: Path, start: Path) -> None:
    """Labels are invisible to training."""
    ends = []
    for number, names in enumerate((CLASSES, ("square", "circle", "cross"), ("x", "x2", "a"))):
        source = make_images(tmp_path / str(number) / "images")
        for domain in ("art", "photo"):
            for old, new in zip(CLASSES, names, strict=True):
                (source / domain / old).rename(source / domain / f"{new}.new")
        pack = tmp_path / str(number) / "pack"
        write_pack(source, ["art", "photo"], pack, PackParams(side=20))
        run = training(pack, start)
        train(run, Keep())
        ends.append(weights(run))
    assert_equal(ends[0], ends[1])
    assert_equal(ends[0], ends[2])


def test_a_loss_that_is_not_finite_stops_the_run_and_is_named(
    pack: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(pack, start)
    terms = {"fine": Term(1.0, torch.tensor(1.0)), "broken": Term(1.0, torch.tensor(float("nan")))}
    monkeypatch.setattr(run.method, "losses", lambda epoch, batch: terms)
    reporter = Keep()
    with pytest.raises(FloatingPointError, match=r"epoch 0, step 0.*fine = 1, broken = nan"):
        train(run, reporter)
    details = reporter.details
    assert (details["epoch"], details["step"]) == (0, 0)
    assert set(details["inputs"]) == {"query_a", "key_a", "query_b", "key_b"}
    assert details["inputs"]["query_a"]["not_finite"] == 0
    assert len(details["slots"][0]) == 8
    assert "head.2.weight" in details["weights"]


@pytest.mark.parametrize("networks", [("query",), ("query", "key")])
def test_weights_that_the_last_step_spoilt_are_not_reported_as_finished(
    networks: tuple[str, ...], pack: Path, start: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = training(pack, start)
    original = Training.train_epoch

    def spoils(self: Training, epoch: int, **options: Any) -> dict[str, float]:
        losses = original(self, epoch, **options)
        with torch.no_grad():
            for network in networks:
                next(getattr(self, network).parameters()).fill_(float("nan"))
        return losses

    monkeypatch.setattr(Training, "train_epoch", spoils)
    reporter = Keep()
    with pytest.raises(
        FloatingPointError, match="epoch 0: weights or features are not finite after its last step"
    ):
        train(run, reporter)
    assert not reporter.reports
    spoilt = reporter.details["inputs"]["features_a"]["not_finite"] > 0
    assert spoilt == ("key" in networks), "the key encoder follows with the next step"
    assert sum(weight["not_finite"] for weight in reporter.details["weights"].values()) > 0


def test_the_query_encoder_is_ranked_without_changing_the_training(pack: Path, start: Path) -> None:
    kept = {}
    for which in ("key", "query"):
        run = training(pack, start, retrieve_with=which)
        reporter = Keep()
        train(run, reporter)
        assert reporter.reports[-1].encoder is (run.key if which == "key" else run.query)
        kept[which] = (weights(run), reporter.reports[-1].features[0].own_ND)
    assert_equal(kept["key"][0], kept["query"][0])
    assert not torch.equal(kept["key"][1], kept["query"][1])


def start_training(pack: Path, **changes: Any) -> Training:
    images = tuple(open_domain(pack, domain) for domain in ("art", "photo", "real-life"))
    given = PretrainParams(**{"steps": 80, "batch_size": 32, "lr": 0.02, **changes})
    params = ViewContrastParams.of(given, [len(domain) for domain in images])
    view = ViewParams(side=16, eval_crop=1.0, augment=AugmentParams(crop_area=(0.8, 1.0)))
    return Training(images, view, ENCODER, None, ViewContrast(params, 0), CPU)


def test_the_start_is_learnt_and_a_kill_changes_nothing(pack: Path, tmp_path: Path) -> None:
    whole, reporter = start_training(pack), Keep()
    train(whole, reporter)
    losses = [report.metrics["train/loss_contrast"] for report in reporter.reports]
    assert list(whole.batches.epoch(0)) == [0, 1]
    assert len(losses) == 40
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])
    for first in (Keep(killed_after=11), Keep(stopped_in=(7, 1))):
        with pytest.raises(KeyboardInterrupt):
            train(start_training(pack), first)
        torch.save(first.state, tmp_path / "state.pt")
        second = start_training(pack)
        train(second, Keep(load_state(tmp_path / "state.pt")))
        assert_equal(weights(whole), weights(second))


@pytest.mark.parametrize("steps", [3, 7, 10, 80])
def test_the_starts_rates_are_torchs_one_cycle(pack: Path, steps: int) -> None:
    run = start_training(pack, steps=steps)
    other = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 0.02)
    if steps == 10:  # torch divides by zero here
        run.method.set_rates(run.optimizer, 0, 0)
        assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.02)
        return
    cycle = torch.optim.lr_scheduler.OneCycleLR(other, 0.02, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        run.method.set_rates(run.optimizer, 0, step)
        for key in ("lr", "betas"):
            assert run.optimizer.param_groups[0][key] == other.param_groups[0][key], (step, key)
        other.step()
        if step + 1 < steps:
            cycle.step()


def test_a_batch_larger_than_all_domains_is_refused() -> None:
    with pytest.raises(UserError, match="pretrain batch_size 128 exceeds all 70 images"):
        ViewContrastParams.of(PretrainParams(batch_size=128), [30, 40])


def test_given_weights_are_taken(start: Path) -> None:
    given, _ = given_start(StartParams(encoder=ENCODER, checkpoint=str(start)), 16)
    assert_equal(new_encoder(ENCODER, 3).state_dict(), given.state_dict())


PATHS = [name for name in METHODS if not re.search(r"-no-|-v\d", name)]
"""All but the ablations that leave terms out."""


class Float64Encoder(Encoder):
    """Of float64 weights; in float32 rounding turns rectifiers, and gradients of large losses with them."""

    def to(self, *args: Any, **kwargs: Any) -> Any:
        return super().to(*args, **kwargs).double()

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(x.double(), *args, **kwargs)


@patch("ucir.models.encoder.Encoder", Float64Encoder)
def _steps(pack: Path, start: Path, names: list[str]) -> list[dict[str, Any]]:
    """A step of the first and of the last phase of each method: losses, gradients, features afterwards."""
    steps = []
    for name, epoch in product(names, (0, 3)):
        run = start_training(pack) if name == PRETRAIN else training(pack, start, name=name)
        assert next(run.query.parameters()).dtype == torch.float64
        features = run.features()
        run.method.start(features)
        run.start_epoch(epoch, features)
        losses = run.train_epoch(epoch, max_steps=1)
        gradients = {name: p.grad for name, p in run.query.named_parameters()}
        features = [x.features_ND for x in run.features()]
        steps.append({"losses": losses, "gradients": gradients, "features": features})
    return steps


def _worker(rank: int, pack: Path, start: Path, names: list[str], out: Path) -> None:
    torch.save(_steps(pack, start, names), out / f"{rank}.pt")


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
@pytest.mark.parametrize(("world", "names"), [(2, [*PATHS, PRETRAIN]), (3, ["ucdir", "protoot", "uem"])])
def test_workers_change_speed_and_never_results(
    pack: Path, start: Path, tmp_path: Path, world: int, names: list[str]
) -> None:
    """Losses, gradients and features of 1 and of several gloo workers on the same global batch."""
    alone = _steps(pack, start, names)
    run_workers(world, _worker, pack, start, names, tmp_path)
    for rank in range(world):
        together = torch.load(tmp_path / f"{rank}.pt")
        for (name, _), one, many in zip(product(names, (0, 3)), alone, together, strict=True):
            assert many["losses"] == pytest.approx(one["losses"], rel=1e-5, abs=1e-5)
            # CoDA's gradient on the tiny network is as small as float32's noise beside the others
            scale = max(0.01, *(float(gradient.norm()) for gradient in one["gradients"].values()))
            for layer, gradient in one["gradients"].items():
                assert float((many["gradients"][layer] - gradient).norm()) < 2e-5 * scale, (name, layer)
            for x, y in zip(one["features"], many["features"], strict=True):
                assert torch.allclose(x, y, atol=1e-5)
