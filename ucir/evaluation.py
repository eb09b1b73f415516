"""Scores of trained encoders, both directions of each pair; the place where labels are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ucir import tracking
from ucir.cluster.runs import Run
from ucir.config import DatasetParams, Params
from ucir.data.pack import open_domain, read_index, read_info, split_pair
from ucir.devices import choose_device
from ucir.errors import UserError
from ucir.models.checkpoints import load_encoder
from ucir.models.encoder import new_encoder
from ucir.paths import PACKS, STARTS
from ucir.retrieval.metrics import retrieval_scores
from ucir.training.features import extract_features

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
    checkpoint: Path, block: DatasetParams, pack: Path, domains: list[str], device: torch.device
) -> dict[str, Tensor]:
    """Unit features of each domain by the encoder of a checkpoint, on the CPU."""
    encoder = new_encoder(block.start.encoder, 0)
    load_encoder(encoder, checkpoint)
    images = tuple(open_domain(pack, domain) for domain in domains)
    found = extract_features(encoder.to(device), images, block.view, device)
    return {domain: x.cpu() for domain, x in zip(domains, found, strict=True)}


def pair_labels(pack: Path) -> dict[str, list[str]]:
    """Class names of all images, by domain."""
    return {domain: [p.label for p in read_index(pack, domain)] for domain in read_info(pack).counts}


def score_pair(
    features: Mapping[str, Tensor],
    labels: Mapping[str, list[str]],
    pair: tuple[str, str],
    seed: int,
    epoch_choice: str,
    cutoffs: tuple[int, ...],
) -> list[DirectionScore]:
    """Both directions of a pair."""
    return [
        DirectionScore(
            query,
            gallery,
            seed,
            epoch_choice,
            retrieval_scores(
                features[query], features[gallery], labels[query], labels[gallery], cutoffs
            ).named(),
        )
        for query, gallery in (pair, pair[::-1])
    ]


def write_scores(path: Path, scores: list[DirectionScore]) -> None:
    """``metrics.json``: the mean over directions and seeds, then each of them; for DVC and the report."""
    directions: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    for s in scores:
        seeds = directions.setdefault(f"{s.query}>{s.gallery}", {})
        seeds.setdefault(f"seed_{s.seed}", {})[s.epoch_choice] = s.scores
    mean = {}
    for choice in dict.fromkeys(s.epoch_choice for s in scores):
        chosen = [s.scores for s in scores if s.epoch_choice == choice]
        mean[choice] = {name: float(np.mean([c[name] for c in chosen])) for name in chosen[0]}
    path.parent.mkdir(parents=True, exist_ok=True)
    told = {"mean": mean, "directions": directions}
    path.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


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


def evaluate_method(params: Params, dataset: str, setting: str, method: str, results: Path) -> None:
    """Score every trained run under ``<results>/<dataset>/<setting>/<method>/train``.

    Writes ``metrics.json`` and the last epoch's features beside it, and the scores to MLflow.

    Raises:
        UserError: nothing is trained, or a checkpoint does not fit.
    """
    block = params.datasets[dataset]
    folder = results / dataset / setting / method
    trained = sorted((folder / "train").glob("*/run.json"))
    if not trained:
        raise UserError(f"{folder / 'train'}: nothing trained; run `uv run dvc repro train` first")
    labels = pair_labels(PACKS / dataset)
    device = choose_device(params.cluster)
    scores: list[DirectionScore] = []
    tracker = _Tracker(dataset, setting, method, block)
    for path in trained:
        run = json.loads(path.read_text("utf-8"))
        pair = split_pair(run["pair"], list(labels))
        own = []
        for choice, name in ((LAST, "last.pt"), (BEST, "best.pt")):
            features = encoder_features(path.parent / name, block, PACKS / dataset, list(pair), device)
            own += score_pair(features, labels, pair, int(run["seed"]), choice, block.evaluate.cutoffs)
            if choice == LAST:
                save_features(folder / "evaluate" / f"{path.parent.name}.npz", features)
        tracker.log(run["run_key"], own)
        scores += own
    write_scores(folder / "metrics.json", scores)


def evaluate_start(params: Params, dataset: str, setting: str, results: Path) -> None:
    """Score the random network and the start on every pair, as :func:`evaluate_method` does."""
    block = params.datasets[dataset]
    labels = pair_labels(PACKS / dataset)
    device = choose_device(params.cluster)
    for method, name in ((UNTRAINED, "untrained.pt"), (PRETRAINED, "start.pt")):
        checkpoint = STARTS / dataset / name
        features = encoder_features(checkpoint, block, PACKS / dataset, list(labels), device)
        folder = results / dataset / setting / method
        save_features(folder / "evaluate" / "all.npz", features)
        key = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:12]
        tracker = _Tracker(dataset, setting, method, block)
        scores = []
        for pair in block.pairs:
            own = score_pair(
                features,
                labels,
                split_pair(pair, list(labels)),
                block.start.pretrain.seed if block.start.pretrain else 0,
                LAST,
                block.evaluate.cutoffs,
            )
            tracker.log(key, own)
            scores += own
        write_scores(folder / "metrics.json", scores)


def last_scores(params: Params, runs: list[Run]) -> list[DirectionScore]:
    """Scores of finished runs' last epoch, straight from their folders."""
    scores = []
    labels = pair_labels(runs[0].pack)  # the runs of a plan share their pack
    device = choose_device(params.cluster)
    for run in runs:
        features = encoder_features(
            run.folder / "last.pt",
            params.datasets[run.dataset],
            run.pack,
            list(run.pair),
            device,
        )
        scores += score_pair(features, labels, run.pair, run.seed, LAST, run.cutoffs)
    return scores


class _Tracker:
    """One flat MLflow run for each direction and seed, holding its final scores."""

    def __init__(self, dataset: str, setting: str, method: str, block: DatasetParams) -> None:
        self.uri = tracking.tracking_uri()
        tracking.init_store(self.uri)
        self.dataset, self.setting, self.method = dataset, setting, method
        self.block = block

    def log(self, run_key: str, scores: list[DirectionScore]) -> None:
        by_direction: dict[tuple[str, str, int], list[DirectionScore]] = {}
        for s in scores:
            by_direction.setdefault((s.query, s.gallery, s.seed), []).append(s)
        for (query, gallery, seed), own in by_direction.items():
            values: dict[str, float] = {}
            for s in own:
                prefix = "" if s.epoch_choice == LAST else "best/"
                values |= {prefix + name: value for name, value in s.scores.items()}
            # other scores of the same weights (another view, other cutoffs) are another run
            told = [run_key, query, gallery, self.setting, values]
            key = hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]
            run = tracking.tracked_run(
                self.uri,
                f"ucir/{self.dataset}",
                f"{self.method} {query}→{gallery} s{seed}",
                key,
                {
                    "dataset": self.dataset,
                    "setting": self.setting,
                    "method": self.method,
                    "query": query,
                    "gallery": gallery,
                    "pair": "-".join(sorted((query, gallery))),
                    "seed": str(seed),
                    "stage": "evaluate",
                    "trained_run_key": run_key,
                },
                {"backbone": self.block.start.encoder.backbone, "side": self.block.view.side},
            )
            with tracking.status_of(run):
                run.log_scores(values)
