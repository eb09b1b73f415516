"""Decode once against decode every epoch: `uv run python -m tests.benchmarks.packing [--source ZIP]`.

Both arms make the two training views of the same pictures, alternately, on one thread. The slow arm is what
the official UCDIR loader does for each image and epoch: Pillow decodes, torchvision's transforms make each
view. Ours decodes into the pack once and renders views of whole batches from it.
"""

from __future__ import annotations

import argparse
import io
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageFilter
from torchvision import transforms as T

from ucir.config.data import AugmentParams, PackParams, ViewParams
from ucir.data.augment import InputFormat, draw_view, render_views
from ucir.data.batches import seeded
from ucir.data.decode import decode_image, fitted
from ucir.data.source import Source

BATCH = 64
DECODE, RESIZE = "decode", "resize into the pack"
OFFICIAL, OURS = "official augmentation, two views", "our augmentation, two views"


def photos(count: int) -> list[bytes]:
    """Pictures of 500 x 375 px with structure at every scale, as JPEG of quality 90."""
    rng = np.random.default_rng(0)
    pictures = []
    for _ in range(count):
        layers = [
            Image.fromarray(rng.integers(0, 256, (375 // cell + 1, 500 // cell + 1, 3), np.uint8))
            for cell in (4, 16, 60)
        ]
        scaled = [
            np.asarray(layer.resize((500, 375), Image.Resampling.BICUBIC), np.float32) for layer in layers
        ]
        buffer = io.BytesIO()
        Image.fromarray(np.mean(scaled, axis=0).astype(np.uint8)).save(buffer, "jpeg", quality=90)
        pictures.append(buffer.getvalue())
    return pictures


def official(side: int) -> T.Compose:
    """MoCo v2's aug-plus as UCDIR's loader composes it."""
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    blur = T.RandomApply(
        [T.Lambda(lambda p: p.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2))))], p=0.5
    )
    crop = T.RandomResizedCrop(side, (0.2, 1.0))
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    last = [T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(mean, std)]
    return T.Compose([crop, jitter, T.RandomGrayscale(0.2), blur, *last])


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", type=Path, help="an archive or folder of pictures; default: made ones")
    parser.add_argument("--side", type=int, default=224, help="of a view")
    parser.add_argument("--store", type=int, default=320, help="of the packed square")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    files = some_of(given.source, given.images) if given.source else photos(given.images)
    rounds = [one_round(files, given.side, given.store, number) for number in range(given.rounds)]
    each = {name: 1000 * statistics.median(r[name] for r in rounds) for name in rounds[0]}
    print(f"{len(files)} pictures; views {given.side} px, pack {given.store} px")
    for name, value in each.items():
        print(f"  {name:<34}{value:8.2f} ms an image")
    epochs = [(r[DECODE] + r[OFFICIAL]) / r[OURS] for r in rounds]
    print(
        f"an epoch, official / ours: {statistics.median(epochs):.2f} ({min(epochs):.2f} to {max(epochs):.2f})"
    )
    once = each[DECODE] + each[RESIZE]
    print(f"decoding, in each of 200 epochs / once with its resize: {200 * each[DECODE] / once:.0f}")
    whole = 200 * (each[DECODE] + each[OFFICIAL]) / (once + 200 * each[OURS])
    print(f"200 epochs with their packing, official / ours: {whole:.2f}")


def one_round(files: list[bytes], side: int, store: int, number: int) -> dict[str, float]:
    """Seconds an image of each part, both arms on the same pictures."""
    params = PackParams(side=store)
    transform = official(side)
    decode, pictures = timed(lambda: [decode_image(data, 10**8) for data in files])
    augment, _ = timed(lambda: [transform(p) for p in pictures for _ in range(2)])
    resize, stored = timed(lambda: torch.from_numpy(np.stack([fitted(p, params) for p in pictures])))
    sizes = torch.tensor([p.size for p in pictures])

    def ours() -> None:
        for first in range(0, len(stored), BATCH):
            rows = slice(first, first + BATCH)
            generator = seeded(number, first)
            for _ in range(2):
                draw = draw_view(AugmentParams(), sizes[rows], generator)
                render_views(stored[rows], draw, ViewParams(), InputFormat(side))

    parts = {DECODE: decode, OFFICIAL: augment, RESIZE: resize, OURS: timed(ours)[0]}
    return {name: seconds / len(files) for name, seconds in parts.items()}


def some_of(path: Path, count: int) -> list[bytes]:
    """Pictures from all over a source."""
    source = Source(path)
    names = sorted(source.names)
    return [read() for _, read in source.read(names[:: max(1, len(names) // count)][:count])]


if __name__ == "__main__":
    main()
