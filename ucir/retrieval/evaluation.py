"""Scores of trained encoders, both directions of each pair; the place where labels are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ucir import tracking
from ucir.config.data import DatasetParams, SplitParams
from ucir.config.load import Params
from ucir.data.pack import DomainImages, open_domain, read_index, read_info, split_pair
from ucir.data.splits import LabelSpaces, directions, label_spaces, trainings
from ucir.devices import choose_device
from ucir.errors import UserError
from ucir.models.checkpoints import load_encoder
from ucir.models.encoder import new_encoder
from ucir.models.features import extract_features
from ucir.paths import PACKS, STARTS
from ucir.prototypes.clustering import kmeans
from ucir.retrieval.gate import GateChoice, fit_gate
from ucir.retrieval.metrics import Decisions, metric_values
from ucir.retrieval.ranking import rank

UNTRAINED = "untrained"
PRETRAINED = "pretrained"
LAST = "last"
BEST = "best_by_labels"
"""The papers report the epoch with the best P@K on the test labels; nobody without labels can."""


@dataclass(frozen=True)
class DirectionScore:
    """One direction, seed and choice of epoch."""

    query: str
    gallery: str
    seed: int
    epoch_choice: str
    scores: dict[str, float]
    """Metric identifier to percent."""


def encoder_features(
    checkpoint: Path, block: DatasetParams, images: Sequence[DomainImages], device: torch.device
) -> dict[str, Tensor]:
    """Unit features of each domain by the encoder of a checkpoint, on the CPU."""
    encoder = new_encoder(block.start.encoder, 0)
    load_encoder(encoder, checkpoint)
    pooled = block.evaluate.features == "pooled"
    features = extract_features(encoder.to(device), tuple(images), block.view, device, pooled)
    return {domain.name: x.own_ND.cpu() for domain, x in zip(images, features, strict=True)}


def score_direction(
    features: Mapping[str, Tensor],
    labels: Mapping[str, list[str]],
    direction: tuple[str, str],
    seed: int,
    epoch_choice: str,
    cutoffs: tuple[int, ...],
    gate: GateChoice,
) -> list[DirectionScore]:
    """One direction's scores; nothing when one of the domains has no labels.

    The gate is fitted to the features alone. NMI and ARI are those of the query domain in as many clusters
    as it has classes, whatever K a method was trained with.
    """
    query, gallery = direction
    if not any(labels[query]) or not any(labels[gallery]):
        return []
    ranking = rank(features[query], features[gallery], labels[query], labels[gallery])
    fitted = fit_gate(gate.kind, features[query], features[gallery], gate.clusters, seed)
    beyond_Q = fitted.scores(features[query], features[gallery]).numpy()
    named = metric_values(ranking, cutoffs, Decisions(beyond_Q))
    named |= cluster_agreement(features[query], labels[query], len(set(labels[query])))
    return [DirectionScore(query, gallery, seed, epoch_choice, named)]


def cluster_agreement(features_ND: Tensor, labels: Sequence[str], k: int) -> dict[str, float]:
    """NMI and ARI of K-means clusters against the classes, in percent."""
    from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

    k = min(k, len(features_ND))
    clusters = kmeans(features_ND, k, iterations=20, restarts=5, seed=0, max_points=2000).label_N.numpy()
    return {
        "NMI": 100 * float(normalized_mutual_info_score(labels, clusters)),
        "ARI": 100 * float(adjusted_rand_score(labels, clusters)),
    }


def write_scores(path: Path, scores: list[DirectionScore]) -> None:
    """``metrics.json``: the mean over directions and seeds, then each of them; for DVC and the report."""
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
        run_scores = []
        for choice, name in ((LAST, "last.pt"), (BEST, "best.pt")):
            if not (path.parent / name).exists():
                continue
            features, labels = pair_features(path.parent / name, block, PACKS / dataset, pair, spaces, device)
            for direction in directions(setting, pair):
                seed, cutoffs = int(run["seed"]), block.evaluate.cutoffs
                run_scores += score_direction(features, labels, direction, seed, choice, cutoffs, gate)
            if choice == LAST:
                save_features(folder / "evaluate" / f"{path.parent.name}.npz", features)
        _log(tracker, run["run_key"], run_scores)
        scores += run_scores
    write_scores(folder / "metrics.json", scores)


def evaluate_start(params: Params, key: str, gate: GateChoice, results: Path) -> None:
    """Score the random network and the start in every direction of ``study.settings.<key>``.

    Writes what :func:`evaluate_method` writes, and the setting's label spaces as ``label_spaces.json``.
    """
    part = params.study.settings[key]
    block = params.datasets[part.dataset]
    pack = PACKS / part.dataset
    info = read_info(pack)
    spaces = label_spaces(part.setting, info.classes, block.split)
    every_class = tuple(info.classes)
    named_spaces = replace(spaces, query=spaces.query or every_class, gallery=spaces.gallery or every_class)
    write_label_spaces(results / part.dataset / part.setting / "label_spaces.json", named_spaces, block.split)
    every = {domain: read_index(pack, domain) for domain in info.counts}
    kept = {
        (domain, role): spaces.scored(pictures, role) for domain, pictures in every.items() for role in (0, 1)
    }
    images = [open_domain(pack, domain) for domain in every]
    device = choose_device(params.cluster)
    for method, name in ((UNTRAINED, "untrained.pt"), (PRETRAINED, "start.pt")):
        checkpoint = STARTS / part.dataset / name
        features = encoder_features(checkpoint, block, images, device)
        folder = results / part.dataset / part.setting / method
        save_features(folder / "evaluate" / "all.npz", features)
        run_key = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12]
        tracker = _tracker(part.dataset, part.setting, method, block)
        scores = []
        for pair in trainings(part.setting, part.pairs or block.pairs, list(every)):
            for query, gallery in directions(part.setting, pair):
                rows = {query: kept[query, 0], gallery: kept[gallery, 1]}
                direction_scores = score_direction(
                    {
                        domain: features[domain][[p.slot for p in pictures]]
                        for domain, pictures in rows.items()
                    },
                    {domain: [p.label for p in pictures] for domain, pictures in rows.items()},
                    (query, gallery),
                    block.start.pretrain.seed if block.start.pretrain else 0,
                    LAST,
                    block.evaluate.cutoffs,
                    gate,
                )
                _log(tracker, run_key, direction_scores)
                scores += direction_scores
        write_scores(folder / "metrics.json", scores)


def write_label_spaces(path: Path, spaces: LabelSpaces, split: SplitParams) -> None:
    """Who has which classes, so that anybody can repeat it."""
    content = {**asdict(spaces), "seed": None if split.shared else split.seed}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def pair_features(
    checkpoint: Path,
    block: DatasetParams,
    pack: Path,
    pair: tuple[str, str],
    spaces: LabelSpaces,
    device: torch.device,
) -> tuple[dict[str, Tensor], dict[str, list[str]]]:
    """Features and class names of the pictures that a training is scored on, by domain."""
    images, labels = scored_images(pack, pair, spaces)
    return encoder_features(checkpoint, block, list(images.values()), device), labels


def scored_images(
    pack: Path, pair: tuple[str, str], spaces: LabelSpaces
) -> tuple[dict[str, DomainImages], dict[str, list[str]]]:
    """Pictures that query and gallery consist of, and their class names, by domain."""
    index = {domain: spaces.scored(read_index(pack, domain), role) for role, domain in enumerate(pair)}
    images = {domain: open_domain(pack, domain, pictures) for domain, pictures in index.items()}
    return images, {domain: [p.label for p in pictures] for domain, pictures in index.items()}


def _tracker(dataset: str, setting: str, method: str, block: DatasetParams) -> tracking.ScoreTracker:
    params = {"trunk": block.start.encoder.trunk_name, "side": block.view.side}
    return tracking.ScoreTracker(dataset, setting, method, params)


def _log(tracker: tracking.ScoreTracker, run_key: str, scores: list[DirectionScore]) -> None:
    """The final scores of each direction and seed; those of another choice of epoch by a prefix."""
    by_direction: dict[tuple[str, str, int], dict[str, float]] = {}
    for s in scores:
        values = by_direction.setdefault((s.query, s.gallery, s.seed), {})
        prefix = "" if s.epoch_choice == LAST else "best/"
        values |= {prefix + name: value for name, value in s.scores.items()}
    for (query, gallery, seed), values in by_direction.items():
        tracker.log(run_key, query, gallery, seed, values)
