"""Embedding a collection on a Ray cluster, for an index of many millions of pictures."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ucir.cluster.launch import connect
from ucir.config.cluster import ClusterParams
from ucir.devices import wants_gpu
from ucir.errors import UserError
from ucir.retrieval.index import BATCH, Compute, Embedded, File, FileEmbedder, Outcome


def embed_on_ray(embedder: FileEmbedder, cluster: ClusterParams) -> Compute:
    """Files of a folder that all machines see, on ``cluster.num_workers`` workers; only results come back."""

    def compute(files: Iterator[File], known: Collection[bytes]) -> Iterator[list[tuple[str, Outcome]]]:
        import ray

        rows = []
        for path, read in files:
            file = getattr(read, "__self__", None)
            if not isinstance(file, Path):
                raise UserError(
                    "workers read folders alone: unpack the archive into one that all machines see"
                )
            rows.append({"path": path, "file": str(file.absolute())})  # workers run in another folder
        if not rows:
            return
        connect(cluster, "")
        gpu = wants_gpu(cluster)
        ray.data.DataContext.get_current().enable_progress_bars = False
        paths = ray.data.from_items(rows)
        results = paths.map_batches(
            _Worker,
            batch_size=BATCH,
            compute=ray.data.ActorPoolStrategy(size=cluster.num_workers),
            num_cpus=cluster.cpus_per_worker,
            num_gpus=cluster.gpus_per_worker if gpu else None,
            fn_constructor_args=(embedder, ray.put(frozenset(known)), gpu),
        )
        for batch in results.iter_batches(batch_size=BATCH, batch_format="numpy"):
            columns = zip(*(batch[name] for name in COLUMNS), strict=True)
            yield [(str(path), _outcome(*values)) for path, *values in columns]

    return compute


COLUMNS = ("path", "fault", "sha256", "width", "height", "feature", "thumbnail", "look")


class _Worker:
    """One process of the cluster."""

    def __init__(self, embedder: FileEmbedder, known: Any, gpu: bool) -> None:
        import ray

        device = torch.device("cuda" if gpu else "cpu")
        self.embedder = replace(embedder, model=embedder.model.on(device))
        self.known = ray.get(known)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        files = [(str(p), Path(f).read_bytes) for p, f in zip(batch["path"], batch["file"], strict=True)]
        out: dict[str, list[Any]] = {name: [] for name in COLUMNS}
        for path, outcome in self.embedder(files, self.known):
            picture = outcome if isinstance(outcome, Embedded) else Embedded(b"", 0, 0, b"", b"", b"")
            if isinstance(outcome, bytes):
                picture = replace(picture, sha256=outcome)
            out["path"].append(path)
            out["fault"].append(outcome if isinstance(outcome, str) else "")
            for name in COLUMNS[2:]:
                out[name].append(getattr(picture, name))
        return out


def _outcome(fault: str, sha256: bytes, *rest: Any) -> Outcome:
    if fault:
        return str(fault)
    width, height, *blobs = rest
    return Embedded(sha256, int(width), int(height), *blobs) if width else sha256
