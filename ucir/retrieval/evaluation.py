"""Scores of trained encoders, both directions of each pair; the place where labels are read."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ucir import tracking
from ucir.config.data import DatasetParams, SplitParams
from ucir.config.load import Params
from ucir.config.model import EncoderParams
from ucir.data.feature_pack import DomainFeatures, open_features
from ucir.data.pack import DomainImages, Picture, open_domain, read_index, read_info, split_pair
from ucir.data.splits import LabelSpaces, directions, pack_spaces, trainings
from ucir.data.views import views_of
from ucir.devices import choose_device
from ucir.errors import UserError
from ucir.memory import Features
from ucir.methods import RECONSTRUCTED
from ucir.models.checkpoints import load_encoder, load_state
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.features import extract_features
from ucir.models.head import ResidualHead
from ucir.models.trunk import StoredTrunk
from ucir.paths import FEATURES, PACKS, STARTS, file_sha256
from ucir.prototypes.clustering import kmeans
from ucir.retrieval.gate import (
    GateChoice,
    calibrated_limit,
    cluster_for_gate,
    fewest_queries,
    fit_gate,
    nearest_distances,
)
from ucir.retrieval.metrics import Decisions, metric_values
from ucir.retrieval.ranking import rank

Domain = DomainImages | DomainFeatures

UNTRAINED = "untrained"
FROZEN = "frozen"
CENTRED = "centred"
PCA = "pca"
PRETRAINED = "pretrained"
LAST = "last"
BEST = "best_by_labels"
"""The papers report the epoch with the best P@K on the test labels; nobody without labels can."""
CHECKPOINTS = {LAST: "last.pt", BEST: "best.pt"}
"""A run's file of each choice of epoch."""


@dataclass(frozen=True)
class DirectionScore:
    """One direction, seed and choice of epoch."""

    query: str
    gallery: str
    seed: int
    epoch_choice: str
    scores: dict[str, float]
    """Metric identifier to percent."""


def checkpoint_features(
    checkpoint: Path, block: DatasetParams, images: Mapping[str, Domain], device: torch.device
) -> dict[str, Tensor]:
    """Unit features of each domain by the encoder of a run's checkpoint, on the CPU."""
    order = load_state(checkpoint).get("model", {}).get("domains") or list(images)
    pooled = block.evaluate.features == "pooled"
    return _features(checkpoint, block, [images[name] for name in order], device, pooled)


def checkpoint_encoder(checkpoint: Path, block: DatasetParams, domain: Domain) -> Encoder:
    """The encoder of a checkpoint, on the CPU, for what is known of a domain: pictures or stored features."""
    trunk = StoredTrunk(domain.pooled_dim) if isinstance(domain, DomainFeatures) else None
    encoder = new_encoder(block.start.encoder, 0, trunk=trunk)
    load_encoder(encoder, checkpoint)
    return encoder


def _features(
    checkpoint: Path,
    block: DatasetParams,
    domains: Sequence[Domain],
    device: torch.device,
    pooled: bool | Literal["both"],
) -> dict[str, Tensor]:
    encoder = checkpoint_encoder(checkpoint, block, domains[0]).to(device)
    features = extract_features(encoder, views_of(domains, block.view, encoder.form, device), device, pooled)  # type: ignore[arg-type]
    return {domain.name: x.own_ND.cpu() for domain, x in zip(domains, features, strict=True)}


def score_directions(
    features: Mapping[str, Tensor],
    labels: Mapping[str, list[str]],
    directions: Sequence[tuple[str, str]],
    seed: int,
    epoch_choice: str,
    cutoffs: tuple[int, ...],
    gate: GateChoice,
) -> list[DirectionScore]:
    """Scores of each direction; nothing when one of the domains has no labels.

    The gates are fitted to the features alone. NMI and ARI are those of the query domain in as many clusters
    as it has classes, whatever K a method was trained with.

    Args:
        features, labels: of two domains, by their names.
        directions: query's domain and gallery's, of these two.
        seed: of the training and of K-means.
        epoch_choice: a name of :data:`CHECKPOINTS`.
        cutoffs: K of P@K.
        gate: the method's.
    """
    if not all(any(of_domain) for of_domain in labels.values()):
        return []
    clusterings = {domain: cluster_for_gate(x, gate.clusters, seed) for domain, x in features.items()}
    scores = []
    for query, gallery in directions:
        domains = features[query], features[gallery]
        fitted = fit_gate(gate.kind, *domains, (clusterings[query], clusterings[gallery]), gate.merging_limit)
        nearest_Q = nearest_distances(*domains)
        limit = calibrated_limit(nearest_Q, gate.false_rejections)
        decisions = Decisions(fitted.scores(*domains).numpy(), (nearest_Q - limit).numpy())
        named = metric_values(rank(*domains, labels[query], labels[gallery]), cutoffs, decisions)
        named |= cluster_agreement(features[query], labels[query], len(set(labels[query])))
        scores.append(DirectionScore(query, gallery, seed, epoch_choice, named))
    return scores


def cluster_agreement(features_ND: Tensor, labels: Sequence[str], k: int) -> dict[str, float]:
    """NMI and ARI of K-means clusters against the classes, in percent."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    k = min(k, len(features_ND))
    clusters = kmeans(features_ND, k, iterations=20, restarts=5, seed=0, max_points=2000).label_N.numpy()
    return {
        "NMI": 100 * float(normalized_mutual_info_score(labels, clusters)),
        "ARI": 100 * float(adjusted_rand_score(labels, clusters)),
    }


def write_scores(path: Path, scores: list[DirectionScore]) -> dict[str, dict[str, float]]:
    """``metrics.json``: the mean over directions and seeds, then each of them; for DVC and the report.

    Returns the mean, by choice of epoch.
    """
    directions: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for s in scores:
        seeds = directions.setdefault(f"{s.query}>{s.gallery}", {})
        seeds.setdefault(f"seed_{s.seed}", {})[s.epoch_choice] = s.scores
    mean = {}
    for choice in dict.fromkeys(s.epoch_choice for s in scores):
        chosen = [s.scores for s in scores if s.epoch_choice == choice]
        names = [name for name in chosen[0] if all(name in c for c in chosen)]
        mean[choice] = {name: float(np.mean([c[name] for c in chosen])) for name in names}
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"mean": mean, "directions": directions}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return mean


def read_scores(path: Path) -> list[DirectionScore]:
    """What :func:`write_scores` wrote."""
    directions = json.loads(path.read_text("utf-8"))["directions"]
    return [
        DirectionScore(query, gallery, int(seed.removeprefix("seed_")), choice, scores)
        for direction, seeds in directions.items()
        for query, gallery in [direction.split(">")]
        for seed, choices in seeds.items()
        for choice, scores in choices.items()
    ]


def save_features(path: Path, features: Mapping[str, Tensor]) -> None:
    """Features by domain, float16: half the space, more digits than a ranking figure can show."""
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {d: x.numpy().astype(np.float16) for d, x in features.items()}
    np.savez(path, **arrays)


def load_features(path: Path) -> dict[str, Tensor]:
    """What :func:`save_features` wrote, float32."""
    with np.load(path) as stored:
        return {domain: torch.from_numpy(stored[domain].astype(np.float32)) for domain in stored}


def evaluate_method(
    params: Params, dataset: str, setting: str, method: str, gate: GateChoice, results: Path
) -> None:
    """Score every trained run under ``<results>/<dataset>/<setting>/<method>/train``.

    Writes ``metrics.json`` and the last epoch's features beside it, and the scores to MLflow. Without
    labels there are features and no scores.

    Raises:
        UserError: nothing is trained, or a checkpoint does not fit.
    """
    block = params.datasets[dataset]
    folder = results / dataset / setting / method
    trained = sorted((folder / "train").glob("*/run.json"))
    if not trained:
        raise UserError(f"{folder / 'train'}: nothing trained; run `uv run dvc repro train` first")
    device = choose_device(params.cluster)
    scores: list[DirectionScore] = []
    tracker = _tracker(dataset, setting, method, block)
    for path in trained:
        run = json.loads(path.read_text("utf-8"))
        spaces = LabelSpaces(**run["label_spaces"])
        pair = split_pair(run["pair"], list(read_info(PACKS / dataset).counts))
        images, labels = scored_domains(dataset, block, pair, spaces)
        run_scores = []
        for choice, name in CHECKPOINTS.items():
            if not (path.parent / name).exists():
                continue
            features = checkpoint_features(path.parent / name, block, images, device)
            seed, cutoffs = int(run["seed"]), block.evaluate.cutoffs
            wanted = directions(setting, pair)
            run_scores += score_directions(features, labels, wanted, seed, choice, cutoffs, gate)
            if choice == LAST:
                save_features(folder / "evaluate" / f"{path.parent.name}.npz", features)
        _log(tracker, run["run_key"], run_scores)
        scores += run_scores
    write_scores(folder / "metrics.json", scores)


def evaluate_start(params: Params, key: str, gate: GateChoice, results: Path) -> None:
    """Score what trainings begin with, in every direction of ``study.settings.<key>``: :func:`start_rows`.

    Writes what :func:`evaluate_method` writes, for each row below ``start/``; the rows' means by their names,
    in their order, as ``start.json``; and the setting's label spaces as ``label_spaces.json``.
    """
    part = params.study.settings[key]
    block = params.datasets[part.dataset]
    pack = PACKS / part.dataset
    info = read_info(pack)
    spaces = pack_spaces(part.setting, pack, block.split)
    every_class = tuple(info.classes)
    named_spaces = replace(spaces, query=spaces.query or every_class, gallery=spaces.gallery or every_class)
    folder = results / part.dataset / part.setting
    write_label_spaces(folder / "label_spaces.json", named_spaces, block.split)
    every = {domain: read_index(pack, domain) for domain in info.counts}
    device = choose_device(params.cluster)
    scored = {
        pair: {domain: spaces.scored(every[domain], role) for role, domain in enumerate(pair)}
        for pair in trainings(part.setting, part.pairs or block.pairs, list(every))
    }

    @lru_cache(maxsize=1)  # rows of one checkpoint follow each other
    def of_all(checkpoint: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        domains = [_open(part.dataset, block, domain, pictures) for domain, pictures in every.items()]
        encoder = block.start.encoder
        dim = 0 if encoder.head == "residual" else encoder.feature_dim  # such a head belongs to a pair
        both = _features(checkpoint, block, domains, device, "both" if dim else True)
        return {d: x[:, :dim] for d, x in both.items()}, {d: x[:, dim:] for d, x in both.items()}

    means = {}
    for row in start_rows(block):
        checkpoint = STARTS / part.dataset / row.checkpoint
        of_head, pooled = of_all(checkpoint)
        unfitted = of_head if row.features == "head" else pooled
        if row.name == PCA and block.start.encoder.feature_dim >= next(iter(pooled.values())).shape[1]:
            continue  # it keeps all, and with it all distances
        run_key = file_sha256(checkpoint)[:12]
        tracker = _tracker(part.dataset, part.setting, row.name, block)
        scores: list[DirectionScore] = []
        for pair, index in scored.items():
            features = {d: unfitted[d][[p.slot for p in pictures]] for d, pictures in index.items()}
            if row.features in ("centred", "pca"):
                seen = [
                    Features(pooled[domain][[p.slot for p in spaces.trained(every[domain], role)]])
                    for role, domain in enumerate(pair)
                ]
                features = _fitted(block.start.encoder, seen, features, row.features)
            save_features(folder / "start" / row.name / "evaluate" / f"{'-'.join(pair)}.npz", features)
            seed, cutoffs = block.start.pretrain.seed if block.start.pretrain else 0, block.evaluate.cutoffs
            wanted = directions(part.setting, pair)
            pair_scores = score_directions(features, labels_of(index), wanted, seed, LAST, cutoffs, gate)
            _log(tracker, run_key, pair_scores)
            scores += pair_scores
        means[row.name] = write_scores(folder / "start" / row.name / "metrics.json", scores)
    (folder / "start.json").write_text(json.dumps(means, indent=1) + "\n", encoding="utf-8")
    least = fewest_queries(gate.false_rejections)
    few = {d: len(x) for index in scored.values() for d, x in index.items() if len(x) < least}
    for domain, count in few.items():
        print(
            f"calibrated gate: the {count} pictures of {domain} are too few for a limit that rejects "
            f"{100 * gate.false_rejections:g} % of them ({least} are needed): it rejects none"
        )


@dataclass(frozen=True)
class StartRow:
    """What trainings begin with, or a part of it."""

    name: str
    checkpoint: str
    """The network's, of the stage ``pretrain``."""
    features: Literal["head", "pooled", "centred", "pca"]
    """The head's; what goes into it; that with each domain's mean taken off; and of this the main directions,
    as a residual head begins."""


def start_rows(block: DatasetParams) -> list[StartRow]:
    """What is scored before any training, the start itself last.

    With a moco head the random network first; the PCA has as many directions as the head's output, and is
    left out where that is all of them.
    """
    start, of_start = "start.pt", block.evaluate.features
    frozen = [StartRow(FROZEN, start, "pooled"), StartRow(CENTRED, start, "centred")]
    if block.start.encoder.head == "residual":
        return [*frozen, StartRow(PRETRAINED, start, "pca")]
    return [
        StartRow(UNTRAINED, "untrained.pt", of_start),
        *(row for row in frozen if row.features != of_start),  # it would be the start itself
        StartRow(PCA, start, "pca"),
        StartRow(PRETRAINED, start, of_start),
    ]


def _fitted(
    params: EncoderParams, seen: Sequence[Features], pooled: Mapping[str, Tensor], kind: str
) -> dict[str, Tensor]:
    """A pair's pooled features, centred, or as a residual head begins.

    Args:
        params: of the encoder.
        seen: pooled features of the pictures that training sees, of each domain.
        pooled: of the pictures that are scored.
        kind: ``centred`` or ``pca``.
    """
    if kind == "centred":
        by_domain = zip(pooled.items(), seen, strict=True)
        return {domain: F.normalize(x - trained.mean(), dim=1) for (domain, x), trained in by_domain}
    head = ResidualHead(seen[0].own_ND.shape[1], params.feature_dim)
    head.fit(seen)
    with torch.no_grad():
        return {
            domain: F.normalize(head(x, torch.full((len(x),), number)), dim=1)
            for number, (domain, x) in enumerate(pooled.items())
        }


def write_label_spaces(path: Path, spaces: LabelSpaces, split: SplitParams) -> None:
    """Who has which classes, so that anybody can repeat it."""
    content = {**asdict(spaces), "seed": None if split.shared else split.seed}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def scored_index(pack: Path, pair: tuple[str, str], spaces: LabelSpaces) -> dict[str, list[Picture]]:
    """Pictures that query and gallery consist of, by domain."""
    return {domain: spaces.scored(read_index(pack, domain), role) for role, domain in enumerate(pair)}


def labels_of(index: Mapping[str, Sequence[Picture]]) -> dict[str, list[str]]:
    """Their class names."""
    return {domain: [picture.label for picture in pictures] for domain, pictures in index.items()}


def scored_domains(
    dataset: str, block: DatasetParams, pair: tuple[str, str], spaces: LabelSpaces
) -> tuple[dict[str, Domain], dict[str, list[str]]]:
    """What a training is scored on, and its class names, by domain."""
    index = scored_index(PACKS / dataset, pair, spaces)
    images = {domain: _open(dataset, block, domain, pictures) for domain, pictures in index.items()}
    return images, labels_of(index)


def _open(dataset: str, block: DatasetParams, domain: str, pictures: Sequence[Picture]) -> Domain:
    """What is evaluated: a frozen trunk's stored features, or pictures."""
    if block.start.trained == "head":
        return open_features(FEATURES / dataset, domain, pictures)
    return open_domain(PACKS / dataset, domain, pictures)


def _tracker(dataset: str, setting: str, method: str, block: DatasetParams) -> tracking.ScoreTracker:
    params = {
        "trunk": block.start.encoder.trunk_name,
        "side": block.view.side,
        "reconstructed": method in RECONSTRUCTED,
    }
    return tracking.ScoreTracker(PACKS / dataset, block.source, setting, method, params)


def _log(tracker: tracking.ScoreTracker, run_key: str, scores: list[DirectionScore]) -> None:
    """The final scores of each direction and seed; those of another choice of epoch by a prefix."""
    by_direction: dict[tuple[str, str, int], dict[str, float]] = {}
    for s in scores:
        values = by_direction.setdefault((s.query, s.gallery, s.seed), {})
        prefix = "" if s.epoch_choice == LAST else "best/"
        values |= {prefix + name: value for name, value in s.scores.items()}
    for (query, gallery, seed), values in by_direction.items():
        tracker.log(run_key, query, gallery, seed, values)
