"""Runs: what they are made of, their keys, their folders, and what is already done.

A run is one training: data set, setting, method, pair, seed. Its key is a hash of all that its result
depends on (resolved config, data, start, code); its folder is ``runs/<slug>-<key>/``:

- ``state.pt``  all that resuming needs, with the history of epochs; renewed at each epoch's end, gone
  after the last
- ``last.pt``   the retrieval encoder of the last epoch, in MoCo v2's layout
- ``best.pt``   that of the epoch with the best first P@K, *chosen with labels*, as the papers do
- ``done.json`` written when the last epoch is through
- ``fault.json`` where a loss became NaN: step, terms, statistics of features and weights
"""

from __future__ import annotations

import ast
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

import numpy as np
from torch import Tensor

import ucir
from ucir.config import EncoderParams, Params, ViewParams
from ucir.data.pack import Picture, open_domain, read_index, read_info
from ucir.data.splits import LabelSpaces, both_ways, directions, label_spaces, training_order, trainings
from ucir.distributed import any_worker
from ucir.errors import UserError, nearest
from ucir.methods import METHODS, method_params
from ucir.methods.base import MethodParams
from ucir.models.checkpoints import load_encoder, load_state, save_atomically, save_encoder
from ucir.models.encoder import new_encoder
from ucir.paths import PACKS, RUNS, STARTS, check_writable, write_atomically
from ucir.retrieval.criteria import criteria
from ucir.retrieval.metrics import retrieval_scores
from ucir.training.loop import EpochReport

LOOK_SECONDS = 10.0
"""How often workers ask whether one of their machines is leaving; while one is, a state is kept as often."""
KEEP_SECONDS = 300.0
"""A state is kept in the middle of an epoch when the last one is as old."""


@dataclass(frozen=True)
class Run:
    """One training and where it lies; picklable, all paths absolute."""

    dataset: str
    setting: str
    method: str
    pair: tuple[str, str]
    """Query and gallery; where one training serves both directions both are both."""
    seed: int
    view: ViewParams
    encoder: EncoderParams
    params: MethodParams
    cutoffs: tuple[int, ...]
    spaces: LabelSpaces
    counts: tuple[int, int]
    """Pictures of the two domains."""
    pack: Path
    start: Path
    key: str
    folder: Path

    @property
    def name(self) -> str:
        """For people: ``ucdir Art-Real s0``."""
        return f"{self.method} {'-'.join(self.pair)} s{self.seed}"

    @property
    def slug(self) -> str:
        """For file names: ``Art-Real-s0``."""
        return f"{'-'.join(self.pair)}-s{self.seed}"

    @property
    def done(self) -> bool:
        return (self.folder / "done.json").exists()

    @property
    def trained(self) -> list[tuple[str, list[Picture]]]:
        """The two domains in the order that training has them, each with the pictures that take part."""
        found = [
            (domain, self.spaces.trained(read_index(self.pack, domain), role))
            for role, domain in enumerate(self.pair)
        ]
        return found[:: training_order(self.setting)]

    @property
    def directions(self) -> list[tuple[str, str]]:
        """(query, gallery) that this training is scored in."""
        return directions(self.setting, self.pair)

    def tags(self) -> dict[str, str]:
        """MLflow tags."""
        return {
            "dataset": self.dataset,
            "setting": self.setting,
            "method": self.method,
            "pair": "-".join(self.pair),
            "seed": str(self.seed),
        }

    def history(self) -> list[dict[str, float]]:
        """Metrics of the finished epochs."""
        return self.kept()[0]

    def kept(self) -> tuple[list[dict[str, float]], int]:
        """The history, and the steps of the next epoch where a state from the middle of it is kept."""
        if self.done:
            return json.loads((self.folder / "done.json").read_text("utf-8"))["history"], 0
        if not (self.folder / "state.pt").exists():
            return [], 0
        state = load_state(self.folder / "state.pt")
        return state["history"], state["midway"]["step"] if "midway" in state else 0


def plan_runs(
    params: Params,
    dataset: str,
    setting: str,
    method: str,
    pairs: tuple[str, ...] | None = None,
    seeds: tuple[int, ...] | None = None,
) -> list[Run]:
    """All runs of a data set x setting x method, checked before any of them starts.

    Args:
        params: params.yaml.
        dataset, setting, method: names.
        pairs, seeds: instead of the data set's pairs and the study's seeds; pairs as in its block.

    Raises:
        UserError: an unknown name; no pack or start; more clusters than images; a batch larger than
            the domains; a start checkpoint that does not fit; a runs folder that cannot be written.
    """
    if dataset not in params.datasets:
        raise UserError(f"data set {dataset!r} is unknown; {nearest(dataset, params.datasets)}")
    block = params.datasets[dataset]
    wanted = method_params(params, method, dataset)
    info = read_info(PACKS / dataset)
    if (info.side, info.fit) != (block.pack.side, block.pack.fit):
        raise UserError(
            f"{PACKS / dataset} holds pictures of {info.side} px ({info.fit}), but datasets.{dataset}.pack "
            f"says {block.pack.side} px ({block.pack.fit}): run `uv run dvc repro prepare` first"
        )
    spaces = label_spaces(setting, info.classes, block.split)
    start = (STARTS / dataset / "start.pt").resolve()
    if not start.exists():
        raise UserError(f"{start}: no start weights; run `uv run dvc repro pretrain` first")
    load_encoder(new_encoder(block.start.encoder, 0), start)
    check_writable(RUNS)
    shared = {
        "method": method,
        "params": wanted.model_dump(mode="json"),
        "view": block.view.model_dump(mode="json"),
        "encoder": block.start.encoder.model_dump(mode="json"),
        "start": hashlib.sha256(start.read_bytes()).hexdigest(),
        "code": _code_version(method),
    }
    runs = []
    known = trainings(setting, block.pairs, list(info.counts))
    for pair in trainings(setting, pairs or block.pairs, list(info.counts)):
        if both_ways(setting) and pair[::-1] in known:  # one training serves both directions: the same run
            pair = pair[::-1]
        kept = [
            [p.slot for p in spaces.trained(read_index(PACKS / dataset, domain), role)]
            for role, domain in enumerate(pair)
        ]
        counts = (len(kept[0]), len(kept[1]))
        _check_sizes(wanted, setting, pair, counts)
        for seed in params.study.seeds if seeds is None else seeds:
            order = pair[:: training_order(setting)]
            slots = dict(zip(pair, kept, strict=True))
            data = [(domain, info.fingerprints[domain], slots[domain]) for domain in order]
            own = {"seed": seed, "data": data}
            key = hashlib.sha256(json.dumps({**shared, **own}, sort_keys=True).encode()).hexdigest()[:12]
            slug = f"{dataset}-{method}-{'-'.join(order)}-s{seed}-{key}"
            runs.append(
                Run(
                    dataset,
                    setting,
                    method,
                    pair,
                    seed,
                    block.view,
                    block.start.encoder,
                    wanted,
                    block.evaluate.cutoffs,
                    spaces,
                    counts,
                    (PACKS / dataset).resolve(),
                    start,
                    key,
                    (RUNS / slug).resolve(),
                )
            )
    return runs


@dataclass
class RunReporter:
    """Keeps a run's folder; the only place in training's reach that knows labels, which it gives no one.

    Args:
        run: the run.
        writes: only one worker writes; the others resume from its files.
        on_epoch: called by the writer with the history after each epoch.
        stop: set when the run shall stop after the step at hand, with its state kept.
        leaving: asked now and then, on all workers at once: whether one of their machines is about to go.
    """

    run: Run
    writes: bool = True
    on_epoch: Callable[[list[dict[str, float]]], None] = lambda history: None
    stop: Event = field(default_factory=Event)
    leaving: Callable[[], bool] = lambda: False
    history: list[dict[str, float]] = field(default_factory=list)
    kept: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    labels: dict[str, list[str]] | None = None

    def load_state(self) -> dict[str, Any] | None:
        if self.writes:
            (self.run.folder / "fault.json").unlink(missing_ok=True)  # of an earlier attempt
        path = self.run.folder / "state.pt"
        if not path.exists():
            return None
        state: dict[str, Any] = load_state(path)
        self.history = state.pop("history")
        return state

    def wants_state(self) -> bool:
        """When asked to stop, when a machine leaves, and every few minutes of a long epoch."""
        now = time.monotonic()
        look, due, stop = any_worker(
            [
                self.writes and now - self.looked > LOOK_SECONDS,
                self.writes and now - self.kept > KEEP_SECONDS,
                self.stop.is_set(),
            ]
        )
        if look:
            self.looked = now
        return (look and self.leaving()) or due or stop

    def keep(self, state: dict[str, Any]) -> None:
        if self.writes:
            save_atomically({**state, "history": self.history}, self.run.folder / "state.pt")
        self.kept = time.monotonic()
        if self.stop.is_set():
            raise KeyboardInterrupt

    def end_epoch(self, report: EpochReport) -> None:
        first, second = (x.on_first() for x in report.features)
        if not self.writes:
            return
        quality = {f"quality/{name}": value for name, value in criteria(first, second).items()}
        scores = self._scores(first, second)
        entry = {"epoch": float(report.epoch), **report.metrics, **quality, **scores}
        selector = f"val/P_at_{self.run.cutoffs[0]}"
        if selector in entry and all(entry[selector] > earlier[selector] for earlier in self.history):
            save_encoder(report.encoder, self.run.folder / "best.pt")
        self.history.append(entry)
        last = report.epoch + 1 == self.run.params.epochs
        state = self.run.folder / "state.pt"
        if not last:
            save_atomically({**report.state, "history": self.history}, state)
            self.kept = time.monotonic()
        self.on_epoch(self.history)
        if last:
            save_encoder(report.encoder, self.run.folder / "last.pt")
            spaces = asdict(self.run.spaces)
            own = {"run_key": self.run.key, "label_spaces": spaces, "history": self.history}
            told = {**self.run.tags(), **own}
            write_atomically(json.dumps(told, indent=1) + "\n", self.run.folder / "done.json")
            state.unlink(missing_ok=True)

    def fault(self, details: dict[str, Any]) -> None:
        if self.writes:
            self.run.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(_plain(details), indent=1, allow_nan=False)
            (self.run.folder / "fault.json").write_text(text + "\n", encoding="utf-8")

    def _scores(self, *features_ND: Tensor) -> dict[str, float]:
        """P@K and mAP, mean of both directions: a curve to look at, and the choice of the best epoch.

        Nothing for pictures without labels.
        """
        run = self.run
        if self.labels is None:
            self.labels = {domain: [p.label for p in index] for domain, index in run.trained}
        if not all(any(labels) for labels in self.labels.values()):
            return {}
        features = dict(zip(self.labels, features_ND, strict=True))
        scores = [
            retrieval_scores(features[q], features[g], self.labels[q], self.labels[g], run.cutoffs).named()
            for q, g in (run.pair, run.pair[::-1])
        ]
        return {f"val/{name}": float(np.mean([s[name] for s in scores])) for name in scores[0]}


def _plain(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value


def materialise(run: Run, out: Path) -> None:
    """Copy what later stages need of a finished run from its folder to ``out/<slug>/``.

    ``run.json`` is its ``done.json`` with the setting and the pair that it is scored in here.
    """
    target = out / run.slug
    target.mkdir(parents=True, exist_ok=True)
    for name in ("last.pt", "best.pt"):
        if (run.folder / name).exists():  # without labels there is no best epoch
            shutil.copyfile(run.folder / name, target / name)
    done = json.loads((run.folder / "done.json").read_text("utf-8"))
    told = {**done, **run.tags(), "label_spaces": asdict(run.spaces)}
    (target / "run.json").write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


def open_pair(run: Run) -> tuple[Any, Any]:
    """What training sees of the run's two domains."""
    first, second = (open_domain(run.pack, domain, index) for domain, index in run.trained)
    return first, second


def _check_sizes(params: MethodParams, setting: str, pair: tuple[str, str], counts: tuple[int, ...]) -> None:
    left = "" if setting == "closed" else f" that the setting {setting!r} leaves"
    for domain, count in zip(pair, counts, strict=True):
        if params.most_clusters > count:
            raise UserError(
                f"clusters = {params.most_clusters} exceeds the {count} images of domain "
                f"{domain}{left}: set fewer clusters in params.yaml"
            )
    larger = max(counts)
    if params.batch_size > larger:
        raise UserError(
            f"batch_size = {params.batch_size} exceeds the {larger} images of the larger domain of "
            f"{'-'.join(pair)}{left}: set a smaller batch_size in params.yaml"
        )


def code_files(method: str) -> list[Path]:
    """The code that a training of this method runs through."""
    root = Path(ucir.__file__).parent
    modules = {c.__module__ for c in METHODS[method].__mro__ if c.__module__.startswith("ucir.methods.")}
    own = sorted(module.rsplit(".", 1)[-1] for module in modules)
    return [
        *(
            root / f"{name}.py"
            for name in ("memory", "clustering", "distributed", *METHODS[method].also_runs)
        ),
        *(root / "data" / f"{name}.py" for name in ("augment", "batches", "spectrum")),
        *(root / "methods" / f"{name}.py" for name in own),
        *sorted((root / "losses").glob("*.py")),
        *sorted((root / "models").glob("*.py")),
        *(root / "training" / f"{name}.py" for name in ("loop", "features", "views")),
    ]


def _code_version(method: str) -> str:
    """Hash of that code; comments and layout do not count."""
    digest = hashlib.sha256()
    for file in code_files(method):
        digest.update(ast.dump(ast.parse(file.read_bytes())).encode())
    return digest.hexdigest()
