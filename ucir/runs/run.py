"""Runs: what they are made of, their keys, their folders, and what is already done.

A run is one training: data set, setting, method, pair, seed; or the label-free start of a data set. Its key
is a hash of all that its result depends on (resolved config, data, start, code); its folder is
``runs/<slug>-<key>/``:

- ``state.pt``  all that resuming needs, with the history of epochs; renewed at each epoch's end, gone
  after the last
- ``last.pt``   the retrieval encoder of the last epoch, in MoCo v2's layout
- ``best.pt``   that of the epoch with the best first P@K, *chosen with labels*, as the papers do, where
                asked (``evaluate.keep_best``)
- ``done.json`` written when the last epoch is through
- ``fault.json`` where a loss became NaN: step, terms, statistics of features and weights
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ucir.config.base import PARAMS_FILE, distinct
from ucir.config.data import DatasetParams, PackParams, ViewParams
from ucir.config.load import Params
from ucir.config.model import EncoderParams
from ucir.data.feature_pack import DomainFeatures, open_features, read_feature_info
from ucir.data.pack import DomainImages, Picture, open_domain, read_index, read_info
from ucir.data.splits import (
    LabelSpaces,
    both_ways,
    check_setting,
    directions,
    pack_spaces,
    training_order,
    trainings,
)
from ucir.errors import UserError, nearest
from ucir.methods.base import MethodParams
from ucir.methods.registry import METHODS, params_block
from ucir.models.checkpoints import load_encoder, load_state
from ucir.models.embedding import Embedder
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.model import Model
from ucir.models.trunk import trunk_module
from ucir.paths import (
    FEATURES,
    PACKS,
    RUNS,
    STARTS,
    check_writable,
    file_sha256,
    link_or_copy,
    write_atomically,
)
from ucir.retrieval.evaluation import CHECKPOINTS
from ucir.runs.dependencies import EMBEDDING, START, code_version, training_modules
from ucir.runs.params import check_sizes, method_params
from ucir.training.start import ViewContrast, ViewContrastParams
from ucir.training.training import Training

PRETRAIN = "pretrain"
"""What a start's training is called where a method is named."""
START_SOURCE = "source.json"
"""Beside start weights: what they come from."""


@dataclass(frozen=True)
class Run(ABC):
    """One training and where it lies; picklable, all paths absolute."""

    dataset: str
    method: str
    seed: int
    view: ViewParams
    encoder: EncoderParams = field(hash=False)  # of dicts; the key holds it
    params: MethodParams
    source: str
    """Where its pictures come from."""
    catalogue: str
    """The data set's entry there."""
    pack: Path
    stored: PackParams
    """How its pictures are stored."""
    key: str
    folder: Path

    @property
    @abstractmethod
    def name(self) -> str:
        """For people: ``ucdir Art-Real s0``."""

    @property
    @abstractmethod
    def contexts(self) -> dict[str, str]:
        """What its domains are to it, for MLflow."""

    @abstractmethod
    def again(self) -> str:
        """The command that makes it."""

    @abstractmethod
    def tags(self) -> dict[str, str]:
        """MLflow tags."""

    @abstractmethod
    def facts(self) -> dict[str, Any]:
        """What ``done.json`` says beside the tags and the history."""

    @abstractmethod
    def new_training(self, device: torch.device) -> Training:
        """Everything that changes while it is trained, as at its start."""

    @abstractmethod
    def model(self, encoder: Encoder, epoch: int, choice: str, scores: dict[str, float]) -> Model:
        """An encoder of it, with what using it needs.

        Args:
            encoder: its weights.
            epoch: after how many.
            choice: of the epoch: ``last`` or ``best_by_labels``.
            scores: of these weights by metric, in percent; none without labels.
        """

    def _facts_of_model(self, epoch: int, choice: str, scores: dict[str, float]) -> dict[str, Any]:
        return {
            **self.tags(),
            "run_key": self.key,
            "epoch": epoch,
            "epoch_choice": choice,
            "scores": scores,
            "params": self.params.model_dump(mode="json"),
            "catalogue": self.catalogue,
        }

    @property
    def done(self) -> bool:
        return (self.folder / "done.json").exists()

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


@dataclass(frozen=True)
class PairRun(Run):
    """A method on a pair of domains."""

    setting: str
    pair: tuple[str, str]
    """Query and gallery; where one training serves both directions both are both."""
    cutoffs: tuple[int, ...]
    curve_queries: int | None
    """Queries of a direction in an epoch's scores; None: all."""
    keep_best: bool
    """Whether the best epoch by labels is kept."""
    spaces: LabelSpaces
    counts: tuple[int, int]
    """Pictures of the two domains."""
    start: Path
    start_digest: str
    """sha256."""
    features: Path
    """What ``embed`` stored of the pictures, where a head is trained."""
    part: Literal["all", "last", "head"]
    """What is trained."""
    weights: dict[str, str] = field(hash=False)
    """Where the start's weights come from, with their licence; empty where they are our own."""

    @property
    def name(self) -> str:
        return f"{self.method} {self._between} s{self.seed}"

    @property
    def _between(self) -> str:
        """The pair as ``--pair`` takes it: ``Art-Real``, or ``Art>Real`` where it is one direction."""
        return ("-" if both_ways(self.setting) else ">").join(self.pair)

    @property
    def slug(self) -> str:
        """For file names: ``Art-Real-s0``."""
        return f"{'-'.join(self.pair)}-s{self.seed}"

    @property
    def trained(self) -> list[tuple[str, list[Picture]]]:
        """The two domains in the order that training has them, each with the pictures that take part."""
        domains = [
            (domain, self.spaces.trained(read_index(self.pack, domain), role))
            for role, domain in enumerate(self.pair)
        ]
        return domains[:: training_order(self.setting)]

    @property
    def directions(self) -> list[tuple[str, str]]:
        """(query, gallery) that this training is scored in."""
        return directions(self.setting, self.pair)

    @property
    def contexts(self) -> dict[str, str]:
        return {domain: "training" for domain, _ in self.trained}

    def again(self) -> str:
        return (
            f"uv run ucir train --dataset {self.dataset} --setting {self.setting} --method {self.method} "
            f"--pair '{self._between}' --seed {self.seed}"
        )

    def images(self) -> tuple[DomainImages, ...] | tuple[DomainFeatures, ...]:
        """What training sees of the two domains."""
        if self.part == "head":
            return tuple(open_features(self.features, domain, index) for domain, index in self.trained)
        return tuple(open_domain(self.pack, domain, index) for domain, index in self.trained)

    def model(self, encoder: Encoder, epoch: int, choice: str, scores: dict[str, float]) -> Model:
        facts = self._facts_of_model(epoch, choice, scores)
        facts |= {"weights": self.weights, "pictures": dict(zip(self.pair, self.counts, strict=True))}
        path = str(STARTS / self.dataset / "start.pt")
        trunk = {"path": path, "sha256": self.start_digest} if self.part == "head" else {}
        domains = tuple(domain for domain, _ in self.trained)
        return Model(encoder, self.view, self.stored, facts, domains, trunk)

    def tags(self) -> dict[str, str]:
        return {
            "dataset": self.dataset,
            "setting": self.setting,
            "method": self.method,
            "pair": "-".join(self.pair),
            "seed": str(self.seed),
        }

    def facts(self) -> dict[str, Any]:
        return {"run_key": self.key, "label_spaces": asdict(self.spaces)}

    def new_training(self, device: torch.device) -> Training:
        method = METHODS[self.method](self.params, self.seed)
        return Training(self.images(), self.view, self.encoder, self.start, method, device, self.part)


@dataclass(frozen=True)
class StartRun(Run):
    """The label-free start of a data set, learnt on all its domains."""

    domains: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.method} {self.dataset}"

    @property
    def contexts(self) -> dict[str, str]:
        return dict.fromkeys(self.domains, "training")

    def again(self) -> str:
        return "uv run dvc repro pretrain"

    def tags(self) -> dict[str, str]:
        return {"dataset": self.dataset, "method": self.method, "seed": str(self.seed)}

    def facts(self) -> dict[str, Any]:
        return {"run_key": self.key}

    def model(self, encoder: Encoder, epoch: int, choice: str, scores: dict[str, float]) -> Model:
        facts = self._facts_of_model(epoch, choice, scores) | {"pictures": read_info(self.pack).counts}
        return Model(encoder, self.view, self.stored, facts)

    def new_training(self, device: torch.device) -> Training:
        images = tuple(open_domain(self.pack, domain) for domain in self.domains)
        assert isinstance(self.params, ViewContrastParams)
        return Training(images, self.view, self.encoder, None, ViewContrast(self.params, self.seed), device)


def plan_start(block: DatasetParams, dataset: str) -> StartRun:
    """The training of a data set's start.

    Raises:
        UserError: no pack; fewer pictures than a batch; a runs folder that cannot be written.
    """
    pretrain = block.start.pretrain
    assert pretrain is not None
    info = read_info(PACKS / dataset)
    params = ViewContrastParams.of(pretrain, list(info.counts.values()))
    check_writable(RUNS)
    content = {
        "params": params.model_dump(mode="json"),
        "seed": pretrain.seed,
        "view": block.view.model_dump(mode="json"),
        "encoder": block.start.encoder.model_dump(mode="json"),
        "data": list(info.fingerprints.items()),
        "code": code_version((*START, trunk_module(block.start.encoder.trunk))),
    }
    key = content_key(content)
    return StartRun(
        method=PRETRAIN,
        seed=pretrain.seed,
        **_common(block, dataset),
        params=params,
        key=key,
        folder=(RUNS / f"{dataset}-{PRETRAIN}-{key}").resolve(),
        domains=tuple(info.counts),
    )


def start_file(dataset: str) -> Path:
    """Where a data set's start weights lie, absolute.

    Raises:
        UserError: there are none.
    """
    start = (STARTS / dataset / "start.pt").resolve()
    if not start.exists():
        raise UserError(f"{start}: no start weights; run `uv run dvc repro pretrain` first")
    return start


def embedder_of(block: DatasetParams, dataset: str, device: torch.device) -> Embedder:
    """What embeds a data set's pictures. Raises UserError: there are no start weights."""
    return Embedder(
        (PACKS / dataset).resolve(),
        start_file(dataset),
        block.start.encoder,
        block.view,
        block.start.views,
        device.type,
    )


def embedding_key(block: DatasetParams, start_digest: str) -> str:
    """Hash of all that stored features depend on but the pictures' content.

    Args:
        block: of the data set.
        start_digest: sha256 of the start weights.
    """
    content = {
        "start": start_digest,
        "encoder": block.start.encoder.model_dump(mode="json"),
        "view": block.view.model_dump(mode="json"),
        "stored": block.pack.model_dump(mode="json", include={"side", "fit"}),
        "views": block.start.views,
        "code": code_version((*EMBEDDING, trunk_module(block.start.encoder.trunk))),
    }
    return content_key(content)


def _features_key(block: DatasetParams, dataset: str, start_digest: str) -> str:
    """The key of the stored features. Raises UserError: there are none, or they are of something else."""
    key = read_feature_info(FEATURES / dataset).key
    if key != embedding_key(block, start_digest):
        raise UserError(
            f"{FEATURES / dataset}: features of other weights, views or code than params.yaml names now: run "
            "`uv run dvc repro embed` first"
        )
    return key


def start_source(block: DatasetParams, dataset: str) -> dict[str, str]:
    """What a data set's start weights come from: the key of their training, or the block's words."""
    if block.start.pretrain:
        return {"pretrain": plan_start(block, dataset).key}
    given = {"checkpoint", "weights", "torchvision", "digest"}
    return block.start.model_dump(mode="json", include=given, exclude_none=True)


def record_start_source(block: DatasetParams, dataset: str) -> None:
    """Write it beside the start weights; :func:`plan_runs` reads it."""
    write_atomically(json.dumps(start_source(block, dataset)) + "\n", STARTS / dataset / START_SOURCE)


def _check_start_source(block: DatasetParams, dataset: str) -> None:
    """Raises UserError: the start weights come from something else than params.yaml says now."""
    record = STARTS / dataset / START_SOURCE
    if not record.exists() or json.loads(record.read_text("utf-8")) != start_source(block, dataset):
        raise UserError(
            f"{STARTS / dataset}: a start of other weights, settings, pictures or code than "
            f"params.yaml (datasets.{dataset}.start) names now: run `uv run dvc repro pretrain` first"
        )


def plan_runs(
    params: Params,
    dataset: str,
    setting: str,
    method: str,
    pairs: tuple[str, ...] | None = None,
    seeds: tuple[int, ...] | None = None,
) -> list[PairRun]:
    """All runs of a data set x setting x method, checked before any of them starts.

    Args:
        params: params.yaml.
        dataset, setting, method: names.
        pairs, seeds: instead of the data set's pairs and the study's seeds; pairs as in its block.

    Raises:
        UserError: an unknown name; no pack or start; more clusters than images; a batch larger than
            the domains; start weights that do not fit, or come from something else; a seed or
            pair given twice; a runs folder that cannot be written.
    """
    if dataset not in params.datasets:
        raise UserError(f"data set {dataset!r} is unknown; {nearest(dataset, params.datasets)}")
    block = params.datasets[dataset]
    seeds = params.study.seeds if seeds is None else seeds
    for what, given in (("seeds", seeds), ("pairs", pairs or ())):
        try:
            distinct(given)
        except ValueError as error:
            raise UserError(f"{what}: {error}: give each once") from None
    check_setting(setting)
    wanted = method_params(params, method, dataset)
    info = read_info(PACKS / dataset)
    if (info.side, info.fit) != (block.pack.side, block.pack.fit):
        raise UserError(
            f"{PACKS / dataset} holds pictures of {info.side} px ({info.fit}), but datasets.{dataset}.pack "
            f"says {block.pack.side} px ({block.pack.fit}): run `uv run dvc repro prepare` first"
        )
    spaces = pack_spaces(setting, PACKS / dataset, block.split)
    start = start_file(dataset)
    check_writable(RUNS)
    start_digest, features, start_state = file_sha256(start), "", load_state(start)
    _check_start_source(block, dataset)
    if block.start.trained == "head":
        features = _features_key(block, dataset, start_digest)  # made by these weights: they fit
    else:
        load_encoder(new_encoder(block.start.encoder, 0), start)
    shared = {
        "method": method,
        "params": wanted.model_dump(mode="json"),
        "view": block.view.model_dump(mode="json"),
        "encoder": block.start.encoder.model_dump(mode="json"),
        "start": start_digest,
        "trained": block.start.trained,
        "features": features,
        "code": code_version((*training_modules(method), trunk_module(block.start.encoder.trunk))),
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
        where = f"{PARAMS_FILE}: methods.{params_block(method)}.{dataset}"
        check_sizes(wanted, where, setting, dict(zip(pair, counts, strict=True)))
        for seed in seeds:
            order = pair[:: training_order(setting)]
            slots = dict(zip(pair, kept, strict=True))
            data = [(domain, info.fingerprints[domain], slots[domain]) for domain in order]
            key = content_key({**shared, "seed": seed, "data": data})
            slug = f"{dataset}-{method}-{'-'.join(order)}-s{seed}-{key}"
            runs.append(
                PairRun(
                    method=method,
                    seed=seed,
                    **_common(block, dataset),
                    params=wanted,
                    key=key,
                    folder=(RUNS / slug).resolve(),
                    setting=setting,
                    pair=pair,
                    cutoffs=block.evaluate.cutoffs,
                    curve_queries=block.evaluate.curve_queries,
                    keep_best=block.evaluate.keep_best,
                    spaces=spaces,
                    counts=counts,
                    start=start,
                    start_digest=start_digest,
                    features=(FEATURES / dataset).resolve(),
                    part=block.start.trained,
                    weights=start_state.get("weights", {}),
                )
            )
    return runs


def materialise(run: PairRun, out: Path) -> None:
    """What later stages need of a finished run, from its folder to ``out/<slug>/``.

    ``run.json`` is its ``done.json`` with the setting and the pair that it is scored in here.
    """
    target = out / run.slug
    target.mkdir(parents=True, exist_ok=True)
    for name in CHECKPOINTS.values():
        if (run.folder / name).exists():  # without labels there is no best epoch
            link_or_copy(run.folder / name, target / name)
    done = json.loads((run.folder / "done.json").read_text("utf-8"))
    content = {**done, **run.tags(), "label_spaces": asdict(run.spaces)}
    (target / "run.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def content_key(content: Mapping[str, Any]) -> str:
    """Hash of plain data, 12 hex digits; the order of keys does not count."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:12]


def _common(block: DatasetParams, dataset: str) -> dict[str, Any]:
    """What all runs on a data set have."""
    return {
        "dataset": dataset,
        "view": block.view,
        "encoder": block.start.encoder,
        "source": block.source,
        "catalogue": block.catalogue,
        "pack": (PACKS / dataset).resolve(),
        "stored": block.pack,
    }
