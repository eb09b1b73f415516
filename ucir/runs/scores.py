"""Scores of finished runs, straight from their folders."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from ucir.config.load import Params
from ucir.devices import choose_device
from ucir.retrieval.evaluation import (
    LAST,
    DirectionScore,
    checkpoint_features,
    score_directions,
    scored_domains,
)
from ucir.runs.params import gate_choice
from ucir.runs.run import PairRun


def run_features(
    params: Params, run: PairRun, checkpoint: Path, device: torch.device
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """What a checkpoint makes of the pictures that a run is scored on, and their class names, by domain."""
    block = params.datasets[run.dataset]
    images, labels = scored_domains(run.dataset, block, run.pair, run.spaces)
    return checkpoint_features(checkpoint, block, images, device), labels


def last_scores(params: Params, runs: list[PairRun]) -> list[DirectionScore]:
    """Of the last epoch, in every direction that a run is scored in."""
    scores = []
    device = choose_device(params.cluster)
    for run in runs:
        features, labels = run_features(params, run, run.folder / "last.pt", device)
        gate = gate_choice(params, run.dataset, run.method)
        scores += score_directions(features, labels, run.directions, run.seed, LAST, run.cutoffs, gate)
    return scores
