"""What a set of runs will cost, from a few steps on this machine."""

from __future__ import annotations

import json
import time

import torch

from ucir.cluster.runs import Run, open_pair
from ucir.config import Params
from ucir.devices import choose_device
from ucir.methods import METHODS
from ucir.progress import clock
from ucir.training.loop import PairTraining

STEPS = 5


def describe(runs: list[Run], params: Params) -> str:
    """Resolved config, number of runs, device and estimated time, as text."""
    first = runs[0]
    device = choose_device(params.cluster)
    left = [run for run in runs if not run.done]
    epochs = sum(run.params.epochs - len(run.history()) for run in left)
    config = {
        "view": first.view.model_dump(),
        "encoder": first.encoder.model_dump(),
        f"methods.{first.method}.{first.dataset}": first.params.model_dump(),
        "cluster": params.cluster.model_dump(),
    }
    lines = [
        json.dumps(config, indent=1),
        f"runs: {len(runs)} ({', '.join(run.name for run in runs)}), {len(runs) - len(left)} done",
        f"device: {device}, workers: {params.cluster.num_workers or 'in this process'}",
    ]
    if left:
        seconds = sum(
            seconds_per_epoch(run, device) * (run.params.epochs - len(run.history())) for run in left
        )
        lines.append(f"left: {epochs} epochs, about {clock(seconds)} here on one worker")
    return "\n".join(lines)


def seconds_per_epoch(run: Run, device: torch.device) -> float:
    """Measured on a few steps of the dearest phase and a part of the feature pass."""
    images = open_pair(run)
    training = PairTraining(
        images, run.view, run.encoder, run.start, METHODS[run.method](run.params, run.seed), device
    )
    last = run.params.epochs - 1
    began = time.perf_counter()
    features = training.features()
    feature_seconds = time.perf_counter() - began
    training.method.start(features)
    training.method.start_epoch(last, features)
    training.train_epoch(last, max_steps=1)  # warm-up
    began = time.perf_counter()
    training.train_epoch(last, max_steps=STEPS)
    step_seconds = (time.perf_counter() - began) / min(STEPS, len(training.batches))
    return feature_seconds + step_seconds * len(training.batches)
