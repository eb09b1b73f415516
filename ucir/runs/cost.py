"""What a study or a set of runs will cost: how many runs, what is done, disk, hours on this machine."""

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

from ucir.config.base import ONE_PART
from ucir.config.data import DatasetParams
from ucir.config.load import Params
from ucir.config.model import EncoderParams
from ucir.data.batches import seeded
from ucir.data.feature_pack import DomainFeatures
from ucir.data.pack import DomainImages, read_info
from ucir.data.splits import both_ways, label_spaces, training_order, trainings
from ucir.data.views import PictureViews
from ucir.devices import choose_device, machine_name
from ucir.errors import UserError
from ucir.methods.base import MethodParams
from ucir.methods.registry import METHODS
from ucir.models.checkpoints import save_encoder
from ucir.models.embedding import CHUNK as EMBEDDED_AT_ONCE
from ucir.models.embedding import one_thread_a_core, pooled_features
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.runtime import compiled
from ucir.models.trunk import StoredTrunk, trunk_module
from ucir.paths import PACES, PACKS, write_atomically
from ucir.progress import Progress, clock, counted
from ucir.runs.dependencies import code_version, training_modules
from ucir.runs.params import method_params
from ucir.runs.run import PairRun, content_key, plan_runs
from ucir.runs.study import known_domains, study_runs
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


@dataclass(frozen=True)
class PlannedTraining:
    """One training of a study."""

    part: str
    dataset: str
    setting: str
    method: str
    pair: tuple[str, str]
    seed: int


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


def planned_trainings(params: Params, name: str) -> list[PlannedTraining]:
    """Every training of a study; one that stands in two parts is listed in both.

    Needs no pictures where the catalogue or the pairs' spelling tell the domains.

    Raises:
        UserError: as :func:`ucir.runs.study.study_runs`; a pair of unknown domains.
    """
    planned = []
    for part, run in study_runs(params, name):
        block = params.datasets[run["dataset"]]
        for pair in trainings(
            run["setting"], run["pairs"] or block.pairs, known_domains(block, run["dataset"])
        ):
            for seed in params.studies[name].seeds:
                planned.append(
                    PlannedTraining(part, run["dataset"], run["setting"], run["method"], pair, seed)
                )
    return planned


@dataclass(frozen=True)
class StudyPlan:
    """The trainings of a study, and which are done."""

    name: str
    planned: list[PlannedTraining]
    done: set[tuple[object, ...]]

    @property
    def once(self) -> list[PlannedTraining]:
        """Trainings of methods that are built; one that several parts share is there once."""
        return list({_identity(t): t for t in self.planned}.values())

    @property
    def left(self) -> list[PlannedTraining]:
        """Those of :attr:`once` that are not done."""
        return [t for t in self.once if _identity(t) not in self.done]


def plan_study(params: Params, name: str) -> StudyPlan:
    """All trainings of a study. Raises as :func:`planned_trainings`."""
    planned = planned_trainings(params, name)
    return StudyPlan(name, planned, _finished(params, planned))


def describe_runs(params: Params, plan: StudyPlan) -> str:
    """What there is to run: a line for each part, data set and setting, and for each of its methods; disk."""
    groups: dict[tuple[str, str, str], list[PlannedTraining]] = {}
    for training in plan.planned:
        groups.setdefault((training.part, training.dataset, training.setting), []).append(training)
    lines = [f"study {plan.name}:"]
    for (part, dataset, setting), group in groups.items():
        methods = list(dict.fromkeys(t.method for t in group))
        pairs = list(dict.fromkeys(t.pair for t in group))
        label = "" if part == ONE_PART else f"{part}: "
        seeds = params.studies[plan.name].seeds
        factors = ((methods, "method"), (pairs, "training"), (seeds, "seed"))
        product = " x ".join(counted(len(things), name) for things, name in factors)
        lines.append(f"  {label}{dataset}, {setting}: {product} = {counted(len(group), 'run')}")
        for method in methods:
            trainings = [t for t in group if t.method == method]
            done = sum(_identity(t) in plan.done for t in trainings)
            lines.append(f"    {method:<16}{counted(len(trainings), 'run'):>10}, {done} done")
    lines.append(
        f"in all: {counted(len(plan.once), 'different run')}, {len(plan.once) - len(plan.left)} done"
    )
    disk = _size(_disk(params, plan.once))
    lines.append(f"disk: about {disk}; DVC's cache, on the same file system, takes none (links)")
    return "\n".join(lines)


def describe_hours(params: Params, plan: StudyPlan) -> str:
    """How long the rest takes on this machine, which is measured for each encoder and method."""
    device = choose_device(params.cluster)
    groups: dict[tuple[str, str], list[PlannedTraining]] = {}
    for training in plan.left:
        groups.setdefault((training.dataset, training.method), []).append(training)
    if not groups:
        return "left: nothing"
    lines = []
    total = 0.0
    unknown = set()
    machine = Machine(device)
    on_gpu = dict.fromkeys(PUBLISHED, 0.0)
    with Progress("measuring this machine", len(groups), "combination") as progress:
        for (dataset, method), trainings in groups.items():
            wanted = method_params(params, method, dataset)
            pace = machine.pace(params.datasets[dataset], wanted, method)
            counts = [_counts(params, t) for t in trainings]
            seconds = sum(wanted.epochs * pace.epoch(wanted, count) for count in counts if count)
            unknown |= {dataset} if None in counts else set()
            total += seconds
            for gpu in on_gpu:
                on_gpu[gpu] += seconds * pace.network.on(gpu) if pace.network else 0.0
            lines.append(f"  {method} on {dataset}: {counted(len(trainings), 'run')}, {_duration(seconds)}")
            progress.advance(1, f"{method} on {dataset}")
    if machine.taken:
        lines.append(f"{machine.taken} of {len(groups)} were measured before: delete {PACES} to measure anew")
    for gpu, seconds in on_gpu.items():
        if seconds and device.type == "cpu":
            lines.append(
                f"on one {gpu} at least {_duration(seconds)}, by what is published of its training rate"
            )
    kind = "GPU" if device.type == "cuda" else "machine"
    without = f" (without {', '.join(sorted(unknown))}: not prepared, so of unknown size)" if unknown else ""
    lines.append(
        f"left: about {_duration(total)} of training on one {kind} ({device}), one run at a time{without}; "
        "`uv run dvc repro` also prepares, embeds, scores and reports"
    )
    return "\n".join(lines)


def describe(runs: list[PairRun], params: Params) -> str:
    """Resolved config, number of runs, device and estimated time of one plan, as text."""
    first = runs[0]
    device = choose_device(params.cluster)
    left = [run for run in runs if not run.done]
    block = params.datasets[first.dataset]
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
        pace = Machine(device).pace(block, first.params, first.method)
        epochs = {run: first.params.epochs - len(run.history()) for run in left}
        seconds = sum(count * pace.epoch(first.params, run.counts) for run, count in epochs.items())
        lines.append(f"left: {sum(epochs.values())} epochs, about {clock(seconds)} here on one worker")
    return "\n".join(lines)


def _identity(t: PlannedTraining | PairRun) -> tuple[object, ...]:
    """A training serves every part that names it, both orders of its pair where label spaces are the same,
    and else ``partial`` and ``open``."""
    if both_ways(t.setting):
        return (t.dataset, t.setting, t.method, frozenset(t.pair), t.seed)
    return (t.dataset, t.method, t.pair[:: training_order(t.setting)], t.seed)


def _finished(params: Params, planned: list[PlannedTraining]) -> set[tuple[object, ...]]:
    """Identities of the trainings that are done, by their run keys."""
    done: set[tuple[object, ...]] = set()
    for dataset, setting, method in {(t.dataset, t.setting, t.method) for t in planned}:
        trainings = [t for t in planned if (t.dataset, t.setting, t.method) == (dataset, setting, method)]
        pairs = tuple(dict.fromkeys(">".join(t.pair) for t in trainings))
        seeds = tuple(dict.fromkeys(t.seed for t in trainings))
        try:
            runs = plan_runs(params, dataset, setting, method, pairs, seeds)
        except UserError:  # not prepared yet: nothing can be done
            continue
        done |= {_identity(run) for run in runs if run.done}
    return done


def _counts(params: Params, t: PlannedTraining) -> tuple[int, int] | None:
    """Pictures of query and gallery domain: of the pack, else as published, else not known."""
    block = params.datasets[t.dataset]
    try:
        counts = {domain: float(count) for domain, count in read_info(PACKS / t.dataset).counts.items()}
    except UserError:
        # where a class is not known, 500 is what the largest domain has
        published = block.entry.counts.items()
        counts = {
            d: float(sum(500 if c is None else c for c in counts_of_classes.values()))
            for d, counts_of_classes in published
        }
        if block.sample:
            counts = dict.fromkeys(t.pair, 10.0 * block.sample.per_class)
    if not set(t.pair) <= set(counts):
        return None
    classes = block.entry.class_names()
    share = [1.0, 1.0]
    if classes:
        spaces = label_spaces(t.setting, classes, block.split)
        share = [spaces.share(role, len(classes)) for role in (0, 1)]
    first, second = (round(counts[d] * s) for d, s in zip(t.pair, share, strict=True))
    return first, second


def _duration(seconds: float) -> str:
    hours = seconds / 3600
    if hours < 1:
        return f"{seconds / 60:.0f} min"
    return f"{hours:,.0f} h" if hours >= 100 else f"{hours:.1f} h"


def _size(count: float) -> str:
    """Of bytes."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _disk(params: Params, built: list[PlannedTraining]) -> float:
    """Bytes of packs, starts, stored features, one or two checkpoints of each run, and features of the last
    epoch; DVC's cache links them."""
    total = 0.0
    for dataset in {t.dataset for t in built}:
        block = params.datasets[dataset]
        counts = [(t.pair, _counts(params, t) or (0, 0)) for t in built if t.dataset == dataset]
        domains = dict(item for pair, count in counts for item in zip(pair, count, strict=True))
        encoder = new_encoder(block.start.encoder, 0)
        total += _saved(encoder) + sum(stored_bytes(block, sum(domains.values()), encoder.pooled_dim))
        if block.start.trained == "head":
            encoder = new_encoder(block.start.encoder, 0, trunk=StoredTrunk(encoder.pooled_dim))
        run = (1 + block.evaluate.keep_best) * _saved(encoder)
        total += sum(run + 2 * block.start.encoder.feature_dim * sum(count) for _, count in counts)
    return total


def stored_bytes(block: DatasetParams, pictures: int, pooled_dim: int) -> tuple[int, int]:
    """What ``prepare`` stores of so many pictures, and what ``embed`` does: nothing but for heads."""
    features = 2 * pooled_dim * (1 + block.start.views) if block.start.trained == "head" else 0
    return pictures * 3 * block.pack.side**2, pictures * features


def _saved(encoder: Encoder) -> float:
    """Bytes of a checkpoint."""
    return 4.0 * sum(tensor.numel() for tensor in encoder.moco_state().values())
