"""What the server's decoding processes run: nothing that a network needs is imported here."""

from __future__ import annotations

import resource

import numpy as np

from ucir.config.data import PackParams
from ucir.data.decode import decode_image, fitted

FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
"""What is decoded, by content."""


def restrict(memory: int) -> None:
    """Bound this process: bytes of address space; no core dumps."""
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def decode(data: bytes, pack: PackParams, max_pixels: int) -> tuple[np.ndarray, tuple[int, int]]:
    """A picture's stored square, uint8 (side, side, 3), and its size. Raises ValueError: it is none."""
    image = decode_image(data, max_pixels, FORMATS, animated=False)
    return fitted(image, pack), image.size
