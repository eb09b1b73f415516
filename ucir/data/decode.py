"""An image file's bytes to the stored square."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ucir.config.data import PackParams

DECODER = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
"""Version of this file: pictures that another one decoded are decoded again."""

Image.MAX_IMAGE_PIXELS = None  # max_pixels is our own limit, and Pillow's warning is not safe in threads


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """An image file's bytes as upright RGB: EXIF turned, transparency on white, first frame.

    Raises:
        ValueError: not an image, broken, or too large; the message is the reason.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if width * height > max_pixels:
            raise ValueError(f"{width} x {height} pixels, more than max_pixels = {max_pixels}")
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":  # 16 bit and more: to 8 by range
            values = np.asarray(image, np.float64)
            top = 255 / (65535 if values.max() > 255 else 255)
            image = Image.fromarray((values * top).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            ground = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(ground, image)
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise ValueError("not an image" if data else "empty file") from None
    except (OSError, SyntaxError, EOFError, TypeError) as error:  # what Pillow's readers raise
        raise ValueError(f"broken image: {error}") from None


def fitted(image: Image.Image, params: PackParams) -> np.ndarray:
    """The stored square of an RGB picture by ``params.fit``, uint8 (side, side, 3), bicubic."""
    square = (params.side, params.side)
    if params.fit == "crop":
        image = ImageOps.fit(image, square, Image.Resampling.BICUBIC)
    elif params.fit == "letterbox":
        image = ImageOps.pad(image, square, Image.Resampling.BICUBIC, color="white")
    else:
        image = image.resize(square, Image.Resampling.BICUBIC)
    return np.asarray(image)
