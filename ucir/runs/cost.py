"""What a study or a set of runs will cost: how many runs, what is done, disk, hours on this machine."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from ucir.config.base import ONE_PART
from ucir.config.data import DatasetParams
from ucir.config.load import Params
from ucir.data.pack import read_info
from ucir.data.prepare import survey_source
from ucir.data.splits import both_ways, label_spaces, training_order, trainings
from ucir.devices import choose_device
from ucir.errors import UserError
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.trunk import StoredTrunk
from ucir.paths import PACES, PACKS
from ucir.progress import Progress, clock, counted
from ucir.runs.pace import PUBLISHED, Machine
from ucir.runs.params import method_params
from ucir.runs.run import PairRun, plan_runs
from ucir.runs.study import known_domains, study_runs


@dataclass(frozen=True)
class PlannedTraining:
    """One training of a study."""

    part: str
    dataset: str
    setting: str
    method: str
    pair: tuple[str, str]
    seed: int


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
        """All trainings; one that several parts share is there once."""
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
    sizes = {dataset: _sizes(params.datasets[dataset], dataset) for dataset, _ in groups}
    on_gpu = dict.fromkeys(PUBLISHED, 0.0)
    with Progress("measuring this machine", len(groups), "combination") as progress:
        for (dataset, method), trainings in groups.items():
            wanted = method_params(params, method, dataset)
            pace = machine.pace(params.datasets[dataset], wanted, method)
            counts = [_counts(params, t, sizes[dataset]) for t in trainings]
            seconds = sum(wanted.epochs * pace.epoch(wanted, count) for count in counts if count)
            known = None not in counts
            unknown |= set() if known else {dataset}
            total += seconds
            for gpu in on_gpu:
                on_gpu[gpu] += seconds * pace.network.on(gpu) if pace.network else 0.0
            lines.append(
                f"  {method} on {dataset}: {counted(len(trainings), 'run')}, "
                + (_duration(seconds) if known else "not known")
            )
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


def _sizes(block: DatasetParams, dataset: str) -> dict[str, float]:
    """Pictures of each domain: of the pack, else as published, else of the source; none if there is none."""
    with contextlib.suppress(UserError):
        return {domain: float(count) for domain, count in read_info(PACKS / dataset).counts.items()}
    if block.sample:
        return dict.fromkeys(block.entry.domains, 10.0 * block.sample.per_class)
    if block.entry.counts:
        # where a class is not known, 500 is what the largest domain has
        return {
            domain: float(sum(500 if count is None else count for count in of_classes.values()))
            for domain, of_classes in block.entry.counts.items()
        }
    with contextlib.suppress(UserError):
        return {domain: float(files.total()) for domain, files in survey_source(block)[1].items()}
    return {}


def _counts(params: Params, t: PlannedTraining, sizes: Mapping[str, float]) -> tuple[int, int] | None:
    """Pictures of query and gallery domain that take part; None where they are not known."""
    if not set(t.pair) <= set(sizes):
        return None
    block = params.datasets[t.dataset]
    classes = block.entry.class_names()
    share = [1.0, 1.0]
    if classes:
        spaces = label_spaces(t.setting, [classes], block.split)
        share = [spaces.share(role, len(classes)) for role in (0, 1)]
    first, second = (round(sizes[d] * s) for d, s in zip(t.pair, share, strict=True))
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
        sizes = _sizes(block, dataset)
        counts = [_counts(params, t, sizes) or (0, 0) for t in built if t.dataset == dataset]
        used = {domain for t in built if t.dataset == dataset for domain in t.pair}
        pictures = round(sum(sizes.get(domain, 0) for domain in used))
        encoder = new_encoder(block.start.encoder, 0)
        total += _saved(encoder) + sum(stored_bytes(block, pictures, encoder.pooled_dim))
        if block.start.trained == "head":
            encoder = new_encoder(block.start.encoder, 0, trunk=StoredTrunk(encoder.pooled_dim))
        run = (1 + block.evaluate.keep_best) * _saved(encoder)
        total += sum(run + 2 * block.start.encoder.feature_dim * sum(count) for count in counts)
    return total


def stored_bytes(block: DatasetParams, pictures: int, pooled_dim: int) -> tuple[int, int]:
    """What ``prepare`` stores of so many pictures, and what ``embed`` does: nothing but for heads."""
    features = 2 * pooled_dim * (1 + block.start.views) if block.start.trained == "head" else 0
    return pictures * 3 * block.pack.side**2, pictures * features


def _saved(encoder: Encoder) -> float:
    """Bytes of a checkpoint."""
    return 4.0 * sum(tensor.numel() for tensor in encoder.moco_state().values())
