"""Trainings of seconds in this process, and a reporter that keeps what they report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ucir.config.data import ViewParams
from ucir.config.model import EncoderParams
from ucir.data.pack import open_domain
from ucir.methods.registry import METHODS, fixed_keys
from ucir.training.epochs import EpochReport
from ucir.training.training import Training

ENCODER = EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8)


VIEW = ViewParams(side=16, eval_crop=1.0)


PARAMS = {
    "clusters": 3,
    "epochs": 4,
    "batch_size": 8,
    "lr": 0.01,
    "key_momentum": 0.9,
    "ramp_start": 1,
    "ramp_end": 2,
    "cross_domain_start": 2,
    "warmup": 1,
    "repeats": 2,
}


CPU = torch.device("cpu")


class Keep:
    """A reporter that keeps everything; may act as if killed after an epoch."""

    def __init__(
        self,
        state: dict[str, Any] | None = None,
        killed_after: int | None = None,
        stopped_in: tuple[int, int] | None = None,
    ) -> None:
        self.state, self.killed_after = state, killed_after
        self.stopped_in = stopped_in
        """After so many epochs and, of the next one, so many steps."""
        self.steps = 0
        self.reports: list[EpochReport] = []

    def load_state(self) -> dict[str, Any] | None:
        return self.state

    def wants_state(self) -> bool:
        self.steps += 1
        return (len(self.reports), self.steps) == self.stopped_in

    def keep(self, state: dict[str, Any]) -> None:
        self.state = _copied(state)
        raise KeyboardInterrupt

    def fault(self, details: dict[str, Any]) -> None:
        self.details = details

    def end_epoch(self, report: EpochReport) -> None:
        self.steps = 0
        self.reports.append(report)
        self.state = _copied(report.state)
        if report.epoch == self.killed_after:
            raise KeyboardInterrupt


def _copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


def training(
    pack: Path,
    start: Path,
    seed: int = 0,
    name: str = "ucdir",
    encoder: EncoderParams = ENCODER,
    **changes: Any,
) -> Training:
    images = open_domain(pack, "art"), open_domain(pack, "photo")
    kind = METHODS[name]
    known = {key: value for key, value in PARAMS.items() if key in kind.params_type.model_fields}
    fixed = fixed_keys(name)
    method = kind(kind.params_type(**{**known, **fixed, **changes}), seed)
    return Training(images, VIEW, encoder, start, method, CPU)


def weights(training: Training) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value.clone()
        for name, part in (("query", training.query), ("key", training.key))
        if part
        for key, value in part.state_dict().items()
    }


def assert_equal(one: dict[str, Tensor], two: dict[str, Tensor]) -> None:
    different = [key for key in one if not torch.equal(one[key], two[key])]
    assert not different
