"""Embedding: a frozen trunk's features of a pack's pictures, computed once for a feature pack.

A picture's random views depend on its content and the view's number alone, so that pictures which come or go
change nothing for the others, and any process computes the same.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ucir.config.data import ViewParams
from ucir.config.model import EncoderParams
from ucir.data.augment import ViewDraw, draw_view
from ucir.data.batches import seeded
from ucir.data.feature_pack import KINDS, FeaturePackInfo, map_features, read_feature_info, read_hashes
from ucir.data.pack import Picture, open_domain, read_index, read_info
from ucir.data.views import PictureViews
from ucir.devices import usable_cores
from ucir.errors import UserError
from ucir.models.checkpoints import load_encoder
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.runtime import compiled

CHUNK = 32
"""Pictures that pass through the trunk at once; which these are does not depend on where an attempt began."""

Chunk = tuple[str, int]
"""A domain and the number of its chunk."""
Computed = tuple[np.ndarray, np.ndarray]
"""Features of a chunk's plain pictures (B, P) and of their random views (B, V, P), float16."""


@dataclass(frozen=True)
class Embedder:
    """What a process needs to embed; picklable, all paths absolute."""

    pack: Path
    start: Path
    encoder: EncoderParams = field(hash=False)
    view: ViewParams = field(hash=False)
    views: int
    device: str = "cpu"

    def __call__(self, chunk: Chunk) -> Computed:
        """The features of a chunk.

        Raises:
            UserError: they are not finite.
        """
        domain, number = chunk
        encoder, index, views = _opened(self, domain)
        pictures = index[number * CHUNK : (number + 1) * CHUNK]
        slot_B = torch.tensor([picture.slot for picture in pictures])
        first = views.plain(0, slice(int(slot_B[0]), int(slot_B[-1]) + 1))
        slot_BV = slot_B.repeat_interleave(self.views)
        draw = self._draw(views, pictures)
        random = views.random(torch.zeros_like(slot_BV), slot_BV, draw)
        parts = [pooled_features(encoder, x) for x in (first, *random.split(CHUNK))]  # type: ignore[no-untyped-call]
        features = torch.cat(parts).half().numpy()
        if not np.isfinite(features).all():
            raise UserError(
                f"{self.start}: the trunk's features are not finite in float16: take another side"
            )
        plain, others = features[: len(pictures)], features[len(pictures) :]
        return plain, others.reshape(len(pictures), self.views, -1)

    def _draw(self, views: PictureViews, pictures: list[Picture]) -> ViewDraw:
        draws = [
            draw_view(
                self.view.augment,
                views.size_N2[picture.slot : picture.slot + 1],
                seeded(int(picture.sha256[:15], 16), view),
            )
            for picture in pictures
            for view in range(self.views)
        ]
        return ViewDraw(torch.cat([draw.values_BX for draw in draws]))


@cache
def _opened(embedder: Embedder, domain: str) -> tuple[Encoder, list[Picture], PictureViews]:
    encoder = _encoder(embedder)
    images = open_domain(embedder.pack, domain)
    return (
        encoder,
        read_index(embedder.pack, domain),
        PictureViews([images], embedder.view, encoder.form, torch.device(embedder.device)),
    )


@cache
def _encoder(embedder: Embedder) -> Encoder:
    encoder = new_encoder(embedder.encoder, 0)
    load_encoder(encoder, embedder.start)
    side = embedder.view.side or encoder.form.side
    encoder, reason = compiled(encoder.to(embedder.device).eval(), side)
    if reason:
        print(f"embed: torch computes the features: {reason}", flush=True)
    return encoder


@torch.inference_mode()
def pooled_features(encoder: Encoder, x: Tensor) -> Tensor:
    """What the trunk makes of views, (B, P) float32 on the CPU."""
    pooled: Tensor = encoder.trunk(x.to(encoder.device, memory_format=torch.channels_last))
    return pooled.float().cpu()


def one_thread_a_core(device: str) -> tuple[ThreadPoolExecutor, int]:
    """A pool and its size: many small operations gain nothing by spreading. On a GPU one thread in all."""
    threads = usable_cores() if device == "cpu" else 1
    return ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)), threads


def embed_here(embedder: Embedder, chunks: list[Chunk]) -> Iterator[tuple[Chunk, Computed]]:
    """Chunk by chunk in this process, one on each core."""
    for domain in dict.fromkeys(domain for domain, _ in chunks):
        _opened(embedder, domain)  # once, before threads ask for it side by side
    pool, _ = one_thread_a_core(embedder.device)
    with pool:
        try:
            yield from zip(chunks, pool.map(embedder, chunks), strict=True)
        finally:
            pool.shutdown(cancel_futures=True)


def embed(
    embedder: Embedder,
    out: Path,
    key: str,
    compute: Callable[[Embedder, list[Chunk]], Iterator[tuple[Chunk, Computed]]],
    progress: Callable[[int, int], None],
) -> FeaturePackInfo:
    """Embed a pack: what an earlier attempt or an earlier state of the pack has in common is not repeated.

    Args:
        embedder: of the pack.
        out: folder of the feature pack.
        key: hash of all that features depend on but the pictures.
        compute: where chunks are computed, in any order.
        progress: called with pictures done, and pictures in all.

    Raises:
        UserError: the disk is too full; features that are not finite. What was computed is kept.
    """
    indices = {domain: read_index(embedder.pack, domain) for domain in read_info(embedder.pack).counts}
    pooled_dim = _encoder(embedder).pooled_dim
    info = FeaturePackInfo(key, pooled_dim, embedder.views, {d: len(index) for d, index in indices.items()})
    wanted = {domain: [picture.sha256 for picture in index] for domain, index in indices.items()}
    with suppress(UserError):
        if _holds(out, info, wanted):
            return info
    _check_disk(out, info)
    new = _begin(out, info, wanted)
    done = {domain: np.memmap(new / f"{domain}.done", np.uint8, "r+") for domain in indices}
    arrays = {
        (domain, kind): map_features(new, domain, kind, info, "r+") for domain in indices for kind in KINDS
    }
    chunks = [
        (domain, number)
        for domain, index in indices.items()
        for number in range(-(-len(index) // CHUNK))
        if not done[domain][number * CHUNK : (number + 1) * CHUNK].all()
    ]
    total = sum(info.counts.values())
    finished = sum(int(x.sum()) for x in done.values())
    for (domain, number), computed in compute(embedder, chunks):
        rows = slice(number * CHUNK, number * CHUNK + len(computed[0]))
        for kind, values in zip(KINDS, computed, strict=True):
            arrays[domain, kind][rows] = values
        finished += int((done[domain][rows] == 0).sum())
        done[domain][rows] = 1
        progress(finished, total)
    before = _beside(out, "before")
    shutil.rmtree(before, ignore_errors=True)
    out.rename(before)  # a kill here leaves an unfinished pack that lacks nothing
    new.rename(out)
    shutil.rmtree(before)
    for domain in indices:
        (out / f"{domain}.done").unlink()
    return info


def _beside(out: Path, ending: str) -> Path:
    return out.with_name(f"{out.name}.{ending}")


def _holds(folder: Path, info: FeaturePackInfo, wanted: dict[str, list[str]]) -> bool:
    """Whether a pack, finished or not, is of this kind and these pictures; UserError: there is none."""
    return read_feature_info(folder) == info and all(
        read_hashes(folder, domain) == hashes for domain, hashes in wanted.items()
    )


def _begin(out: Path, info: FeaturePackInfo, wanted: dict[str, list[str]]) -> Path:
    """The folder of the unfinished pack, with all that is known already."""
    new, before = _beside(out, "unfinished"), _beside(out, "before")
    with suppress(UserError):
        if _holds(new, info, wanted):
            return new  # it goes on
    if new.exists() and not before.exists():  # the pictures have changed since: it is a source now
        new.rename(before)
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    for domain, hashes in wanted.items():
        (new / f"{domain}.sha256").write_text("\n".join(hashes) + "\n")
        np.zeros(max(1, len(hashes)), np.uint8).tofile(new / f"{domain}.done")
        for kind in KINDS:
            map_features(new, domain, kind, info, "w+")
    for source in (out, before):
        _take_over(source, new, info, wanted)
    info.write(new)
    shutil.rmtree(before, ignore_errors=True)
    return new


def _take_over(source: Path, new: Path, info: FeaturePackInfo, wanted: dict[str, list[str]]) -> None:
    """Copy features of the same pictures."""
    try:
        old = read_feature_info(source)
    except UserError:
        return
    if (old.key, old.pooled_dim, old.views) != (info.key, info.pooled_dim, info.views):
        return
    for domain, hashes in wanted.items():
        if not old.counts.get(domain):
            continue
        known = source / f"{domain}.done"
        is_done = np.fromfile(known, np.uint8) if known.exists() else np.ones(old.counts[domain], np.uint8)
        places = {digest: row for row, digest in enumerate(read_hashes(source, domain)) if is_done[row]}
        rows = [(row, places[digest]) for row, digest in enumerate(hashes) if digest in places]
        if not rows:
            continue
        to, of = (list(part) for part in zip(*rows, strict=True))
        for kind in KINDS:
            earlier = map_features(source, domain, kind, old, "r")
            map_features(new, domain, kind, info, "r+")[to] = earlier[of]
        np.memmap(new / f"{domain}.done", np.uint8, "r+")[to] = 1


def _check_disk(out: Path, info: FeaturePackInfo) -> None:
    wanted = 2 * info.pooled_dim * (1 + info.views) * sum(info.counts.values())
    out.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(out).free
    if free < wanted:
        raise UserError(
            f"{out}: {wanted / 2**30:.1f} GiB are needed and {free / 2**30:.1f} GiB are free: make room, or "
            "store fewer views (start.views)"
        )
