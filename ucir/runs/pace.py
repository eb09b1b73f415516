"""How long trainings and feature passes take on this machine: measured, on pictures of noise."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ucir.config.data import DatasetParams
from ucir.config.model import EncoderParams
from ucir.data.batches import seeded
from ucir.data.feature_pack import DomainFeatures
from ucir.data.pack import DomainImages
from ucir.data.views import PictureViews
from ucir.devices import machine_name
from ucir.errors import UserError
from ucir.methods.base import MethodParams
from ucir.methods.registry import METHODS
from ucir.models.checkpoints import save_encoder
from ucir.models.embedding import CHUNK as EMBEDDED_AT_ONCE
from ucir.models.embedding import one_thread_a_core, pooled_features
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.runtime import compiled
from ucir.models.trunk import trunk_module
from ucir.paths import PACES, write_atomically
from ucir.runs.dependencies import code_version, training_modules
from ucir.runs.run import content_key
from ucir.training.diagnosis import NotFiniteError
from ucir.training.training import Training

STEPS = 3
PROBE_BATCH = 8
"""Images that a network is timed with."""
SMALL = EncoderParams(trunk={"convnet": {"width": 4}})
"""A network that costs next to nothing, on pictures of :data:`SMALL_SIDE`."""
SMALL_SIDE = 16
RESNET50_FLOPS = 8.2e9
"""Of a picture of 224 px, forward."""
PUBLISHED = {"H100": 7006, "A100": 3399}
"""Pictures of 224 px a second that a GPU trains a ResNet-50 on: MLPerf training v3.0 and v2.0, of eight."""
LONG = 1.0
"""Seconds of what is measured only once."""
SHORT = 0.5
"""Seconds of a step's gradients: where they take no longer, the whole is measured."""


@dataclass(frozen=True)
class NetworkPace:
    """Seconds that an image takes through a network."""

    trained: float
    """With its gradient."""
    constant: float
    flops: float

    def on(self, gpu: str) -> float:
        """How much of this device's time a GPU would take, at the rate that is published for it."""
        return self.flops / RESNET50_FLOPS / PUBLISHED[gpu] / self.trained


@dataclass(frozen=True)
class Pace:
    """Measured on this machine with pictures of noise: seconds."""

    step: float
    """One training step of the dearest phase."""
    image: float
    """One image of a feature pass."""

    network: NetworkPace | None = None
    """Where nearly all of it is the network's."""

    def epoch(self, params: MethodParams, counts: tuple[int, int]) -> float:
        """One epoch of a pair with that many pictures."""
        return self.step * (max(counts) // params.batch_size) + self.image * sum(counts)


@dataclass
class Passes:
    """Images that encoders were given."""

    trained: int = 0
    """With gradient."""
    constant: int = 0

    def count(self, encoder: nn.Module, given: tuple[Tensor, ...]) -> None:
        """A hook that runs before an encoder's own work."""
        if torch.is_grad_enabled() and any(p.requires_grad for p in encoder.parameters()):
            self.trained += len(given[0])
        else:
            self.constant += len(given[0])


class Machine:
    """Measures what trainings cost on a device, with noise: needs no data and no start weights.

    A network that takes long is timed once, and each method with a small one in its place, which counts what
    goes through: seconds where the whole would take minutes. What differs in nothing that costs time is
    measured once, and remembered in :data:`ucir.paths.PACES` by machine and code.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.name = f"{machine_name(device)}, {torch.get_num_threads()} threads"
        self.remembered: dict[str, Any] = json.loads(PACES.read_text("utf-8")) if PACES.exists() else {}
        self.before = frozenset(self.remembered)
        self.taken = 0
        """Paces that another process had measured."""
        self.networks: dict[str, NetworkPace] = {}

    def pace(self, block: DatasetParams, params: MethodParams, method: str) -> Pace:
        """Of a method's training on a data set."""
        costs = [block.pack, block.view, block.start, params.model_copy(update={"epochs": 0})]
        modules = (__name__, *training_modules(method), trunk_module(block.start.encoder.trunk))
        key = content_key(
            {
                "machine": self.name,
                "code": code_version(modules),
                "method": method,
                "costs": [part.model_dump(mode="json") for part in costs],
            }
        )
        if key not in self.remembered:
            try:
                self.remembered[key] = asdict(self._measured(block, params, method))
            except NotFiniteError as error:
                raise UserError(f"{method} with these settings, on noise: {error}") from None
            with suppress(OSError):  # a folder that may only be read: the next plan measures again
                PACES.parent.mkdir(exist_ok=True)
                write_atomically(json.dumps(self.remembered, indent=1) + "\n", PACES)
        self.taken += key in self.before
        pace = self.remembered[key]
        return Pace(**{**pace, "network": pace["network"] and NetworkPace(**pace["network"])})

    def _measured(self, block: DatasetParams, params: MethodParams, method: str) -> Pace:
        # to compile a network for a few steps takes longer than they tell
        encoder = block.start.encoder.model_copy(update={"compiled": False})
        start = block.start.model_copy(update={"encoder": encoder})
        block = block.model_copy(update={"start": start})
        if start.trained == "head":
            return Pace(*_timed(block, params, method, self.device)[:2])
        side = block.view.side or new_encoder(block.start.encoder, 0).form.side
        network = json.dumps([block.start.model_dump(mode="json"), side])
        if network not in self.networks:
            self.networks[network] = _network_pace(block, side, self.device)
        pace = self.networks[network]
        if 2 * params.batch_size * pace.trained < SHORT:
            return Pace(*_timed(block, params, method, self.device)[:2])
        small = SMALL.model_copy(update={"feature_dim": block.start.encoder.feature_dim})
        changes = {
            "start": block.start.model_copy(update={"encoder": small, "trained": "all"}),
            "pack": block.pack.model_copy(update={"side": SMALL_SIDE}),
            "view": block.view.model_copy(update={"side": SMALL_SIDE}),
        }
        rest, _, passes = _timed(block.model_copy(update=changes), params, method, self.device)
        # views are rendered meanwhile, which takes less
        step = rest + passes.trained * pace.trained + passes.constant * pace.constant
        return Pace(step, pace.constant, pace)


def _timed(
    block: DatasetParams, params: MethodParams, method: str, device: torch.device
) -> tuple[float, float, Passes]:
    """Seconds of a step and of an image of a feature pass, and the passes of a step."""
    side = block.pack.side
    noise = np.random.default_rng(0).integers(0, 256, (2 * params.batch_size, side, side, 3), np.uint8)
    encoder = new_encoder(block.start.encoder, 0)
    drawn = np.random.default_rng(0).normal(size=(len(noise), encoder.pooled_dim)).astype(np.float16)
    rows = np.arange(max(2 * params.batch_size, params.most_clusters, 8)) % len(noise)

    def domain(name: str) -> DomainImages | DomainFeatures:
        if block.start.trained == "head":
            return DomainFeatures(name, drawn, drawn[:, None], rows)
        return DomainImages(name, noise, rows, np.full((len(rows), 2), side))

    with tempfile.TemporaryDirectory() as folder:
        start = Path(folder) / "start.pt"
        save_encoder(encoder, start)
        run = Training(
            (domain("a"), domain("b")),  # type: ignore[arg-type]
            block.view,
            block.start.encoder,
            start,
            METHODS[method](params, 0),
            device,
            block.start.trained,
        )
    run.begin()
    features = run.features()
    run.method.start(features)
    last = params.epochs - 1
    run.start_epoch(last, features)
    passes = Passes()
    encoders = [module for module in run.networks.modules() if isinstance(module, Encoder)]
    hooks = [encoder.register_forward_pre_hook(passes.count) for encoder in encoders]
    run.train_epoch(last, max_steps=1)  # warm-up
    for hook in hooks:
        hook.remove()
    steps = min(STEPS, len(run.batches))
    step = _least_seconds(lambda: run.train_epoch(last, max_steps=steps)) / steps
    images = 2 * len(rows)
    image = _least_seconds(run.features) / images
    return step, image, passes


def _network_pace(block: DatasetParams, side: int, device: torch.device) -> NetworkPace:
    encoder = new_encoder(block.start.encoder, 0).to(device)
    encoder.trunk.train_only(block.start.trained)
    encoder.train()
    x = torch.randn(PROBE_BATCH, 3, side, side, device=device).contiguous(memory_format=torch.channels_last)

    def constant() -> None:
        with torch.no_grad():
            encoder(x)

    works = (lambda: encoder(x).sum().backward(), constant)
    with FlopCounterMode(display=False) as counter:
        constant()
    works[0]()  # warm-up
    trained, passed = (_least_seconds(work) / PROBE_BATCH for work in works)
    return NetworkPace(trained, passed, counter.get_total_flops() / PROBE_BATCH)


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _least_seconds(work: Callable[[], Any]) -> float:
    """Of up to three times, as something else may be at work on the machine; of one that takes long alone."""
    taken = [_seconds(work)]
    while len(taken) < 3 and taken[-1] < LONG:
        taken.append(_seconds(work))
    return min(taken)


def embedding_pace(block: DatasetParams, device: torch.device) -> float:
    """Seconds that a view takes to be made and to pass the frozen trunk: of noise, on all cores."""
    side = block.pack.side
    noise = np.random.default_rng(0).integers(0, 256, (EMBEDDED_AT_ONCE, side, side, 3), np.uint8)
    images = DomainImages("a", noise, np.arange(len(noise)), np.full((len(noise), 2), side))
    encoder = new_encoder(block.start.encoder, 0).to(device).eval()
    encoder, _ = compiled(encoder, block.view.side or encoder.form.side)
    views = PictureViews([images], block.view, encoder.form, device)
    slot_B = torch.arange(len(noise))
    pool, threads = one_thread_a_core(device.type)

    def work(seed: int) -> None:
        draw = views.draw(torch.zeros_like(slot_B), slot_B, seeded(seed))
        pooled_features(encoder, views.random(torch.zeros_like(slot_B), slot_B, draw))

    with pool:
        list(pool.map(work, range(threads)))  # warm-up
        began = time.perf_counter()
        list(pool.map(work, range(2 * threads)))
    return (time.perf_counter() - began) / (2 * threads * len(noise))
