"""What a machine needs for a training, measured without the data."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ucir.config.load import load_params
from ucir.methods.registry import METHODS
from ucir.runs.cost import describe_hours, plan_study
from ucir.runs.pace import RESNET50_FLOPS, Machine, NetworkPace
from ucir.runs.params import method_params


@pytest.mark.parametrize("method", ["ucdir", "uem"])  # one phase, two phases
def test_a_machine_is_measured_without_any_picture_and_once(
    prepared: Path, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load_params()
    wanted = METHODS[method].params_type(**{"epochs": 4, "batch_size": 8, "clusters": 3})
    pace = Machine(torch.device("cpu")).pace(params.datasets["shapes"], wanted, method)
    assert 0 < pace.image < pace.step
    assert pace.epoch(wanted, (80, 40)) == pytest.approx(10 * pace.step + 120 * pace.image)
    monkeypatch.setattr("ucir.runs.pace._timed", None)
    again = Machine(torch.device("cpu"))
    assert again.pace(params.datasets["shapes"], wanted, method) == pace
    assert again.taken == 1


def test_a_machine_is_measured_where_nothing_may_be_written(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("data").touch()  # nobody can make a file in there, root neither
    monkeypatch.setattr("ucir.runs.pace._timed", lambda *given: (1.0, 0.01, None))
    params = load_params()
    machine = Machine(torch.device("cpu"))
    pace = machine.pace(params.datasets["shapes"], method_params(params, "ucdir", "shapes"), "ucdir")
    assert (pace.step, pace.image) == (1.0, 0.01)


def test_a_network_that_takes_long_is_timed_apart(prepared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method then counts what goes through it."""
    monkeypatch.setattr("ucir.runs.pace.SHORT", 0.0)
    monkeypatch.setattr(
        "ucir.runs.pace._network_pace", lambda *arguments: NetworkPace(100.0, 10.0, 0.5 * RESNET50_FLOPS)
    )
    params = load_params()
    machine = Machine(torch.device("cpu"))
    for method, passes in (("ucdir", 16 * 110), ("id", 16 * 100)):
        given = {"epochs": 4, "batch_size": 8, "clusters": 3}
        kind = METHODS[method].params_type
        wanted = kind(**{key: value for key, value in given.items() if key in kind.model_fields})
        pace = machine.pace(params.datasets["shapes"], wanted, method)
        assert passes < pace.step < passes + 9, method
        assert pace.image == 10
        assert pace.network is not None
        assert pace.network.on("H100") == pytest.approx(0.5 / 7006 / 100)
    text = describe_hours(params, plan_study(params, "tiny"))
    assert "on one H100 at least" in text
