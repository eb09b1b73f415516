"""An image file's bytes to the stored square."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from ucir.config.data import PackParams

DECODER = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:8]
"""Version of this file: pictures that another one decoded are decoded again."""

Image.MAX_IMAGE_PIXELS = None  # max_pixels is our own limit, and Pillow's warning is not safe in threads


UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes a picture of an EXIF orientation upright."""
FULL_SCALES = (1, 255, 1023, 4095, 16383, 65535)
"""White, where values are not 8 bit: of floats, and of the bit depths of cameras and scanners."""
FOREIGN = (
    (rb"\x89PNG\r\n\x1a\n|\xff\xd8\xff|GIF8", ""),  # ours, so broken
    (rb"(?s).{4}ftyp(heic|heix|hevc|heim|heis|mif1|msf1)", "a HEIC picture: convert it to JPEG first"),
    (rb"(?s).{4}ftyp(crx |qt  |isom|mp4|M4V|3gp|avc1)", "a film or a camera's raw file, no picture"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "a JPEG XL picture: convert it to JPEG or PNG first"),
    (rb"(?s)\s*(<\?xml.{0,500})?<svg", "an SVG drawing: convert it to PNG first"),
    (rb"(?is)\s*(<!doctype html|<html|<head)", "a web page: what was to be downloaded was not there"),
    (rb"%PDF", "a PDF document"),
    (rb"%!PS|\xc5\xd0\xd3\xc6", "a PostScript drawing: convert it to PNG first"),
    (rb"version https://git-lfs", "a pointer of Git LFS: fetch the file itself with `git lfs pull`"),
    (rb"PK\x03\x04|Rar!|7z\xbc\xaf|\xfd7zXZ|BZh|\x1f\x8b", "an archive, no picture"),
)
"""What files begin with that are taken for pictures by their name, and what they are."""
NO_IMAGE = "not an image"


class _BrokenError(Exception):
    """Why a picture is left out."""


def decode_image(
    data: bytes, max_pixels: int, formats: Sequence[str] | None = None, animated: bool = True
) -> Image.Image:
    """An image file's bytes as upright RGB: EXIF turned, transparency on white, first frame.

    Values of more than 8 bits and floats are brought to 8 so that the picture keeps its contrast.

    Args:
        data: the file's bytes.
        max_pixels: of larger ones nothing is decoded.
        formats: those of Pillow that are read; None: all but PostScript.
        animated: whether of several frames the first is taken, or the picture refused.

    Raises:
        ValueError: not an image, broken, or too large; the message is the reason.
    """
    try:
        try:
            return _decoded(data, max_pixels, formats, animated)
        except ValueError:
            if (without := _without_text(data)) == data:
                raise
            # Pillow refuses text of more than a mebibyte
            return _decoded(without, max_pixels, formats, animated)
    except _BrokenError as error:
        raise ValueError(str(error)) from None
    except UnidentifiedImageError:
        raise ValueError(_what_it_is(data)) from None
    except Exception as error:  # a decoder may raise anything, and it costs this picture alone
        words = str(error) or type(error).__name__
        raise ValueError(f"broken image: {words.splitlines()[0][:200]}") from None


def _decoded(data: bytes, max_pixels: int, formats: Sequence[str] | None, animated: bool) -> Image.Image:
    image: Image.Image = Image.open(
        io.BytesIO(data), formats=[name for name in _formats() if formats is None or name in formats]
    )
    if not animated and image.format in ("GIF", "PNG", "WEBP") and getattr(image, "is_animated", False):
        raise _BrokenError("an animation: send one of its pictures")
    width, height = image.size
    if width * height > max_pixels:
        raise _BrokenError(f"{width} x {height} pixels, more than max_pixels = {max_pixels}")
    if not width * height:
        raise _BrokenError("an image without a pixel")
    image.load()
    orientation = _orientation(image)
    _check_depth(image, data)
    if image.mode.startswith("I") or image.mode == "F":
        with np.errstate(invalid="ignore"):  # what is no number
            image = Image.fromarray(_to_8_bits(np.asarray(image, np.float64)))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(ground, image)
    image = image.convert("RGB")
    return image.transpose(UPRIGHT[orientation]) if orientation in UPRIGHT else image


@cache
def _formats() -> list[str]:
    """All that Pillow reads by itself: PostScript would be run, by a program of its own."""
    Image.init()
    return [name for name in Image.ID if name != "EPS"]


def _orientation(image: Image.Image) -> int:
    """Of EXIF or XMP; 1 where they cannot be read, as the pixels can.

    Not by ``ImageOps.exif_transpose``: it writes all other tags anew, and fails where one is odd.
    """
    if found := _exif_orientation(image.info.get("exif") or b""):
        return found
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:
        return 1


def _exif_orientation(exif: bytes) -> int:
    """The tag in its first directory; 0 = there is none. Pillow stops at an odd tag before it."""
    start = exif[:16].find(b"II*\0")
    order: Literal["little", "big"] = "little"
    if start < 0:
        start, order = exif[:16].find(b"MM\0*"), "big"
    if start < 0:
        return 0
    body = exif[start:]
    place = int.from_bytes(body[4:8], order)
    for number in range(int.from_bytes(body[place : place + 2], order)):
        entry = body[place + 2 + 12 * number : place + 14 + 12 * number]
        if int.from_bytes(entry[:2], order) == ExifTags.Base.Orientation:
            size = {1: 1, 3: 2, 4: 4}.get(int.from_bytes(entry[2:4], order), 0)
            return int.from_bytes(entry[8 : 8 + size], order)
    return 0


def _check_depth(image: Image.Image, data: bytes) -> None:
    """Of colours of 16 bits Pillow keeps the upper 8.

    Raises:
        _BrokenError: these are next to black.
    """
    bits = data[24] if data.startswith(b"\x89PNG") else max(getattr(image, "tag_v2", {}).get(258, (8,)))
    if bits <= 8 or image.mode not in ("RGB", "RGBA", "LA"):
        return
    colours = image.split()[: 1 if image.mode == "LA" else 3]
    if max(np.asarray(band).max() for band in colours) < 64:
        raise _BrokenError("colours of 16 bits that use less than a quarter of them: scale them first")


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    """Grey values of any range as uint8.

    0 is black and white is the full scale that the brightest thousandth comes near to. Where there is none,
    or the values lie so close together that all would become one grey, they are stretched from the darkest to
    the brightest.
    """
    finite = values[np.isfinite(values)]
    if 2 * finite.size < values.size:
        raise _BrokenError("most of its values are no numbers")
    low, high = np.percentile(_less_outliers(finite), (0.1, 99.9))
    white = next((scale for scale in FULL_SCALES if scale / 2 < high <= 1.05 * scale), 0)
    black = 0.0
    if low < 0 or not white or high - low < white / 32:
        low, high = (low, high) if high > low else (finite.min(), finite.max())
        if high > low:
            black, white = low, high - low
    values = np.nan_to_num(values, nan=black, posinf=black + white, neginf=black)
    return ((values - black) * (255 / (white or 1))).clip(0, 255).astype(np.uint8)


def _less_outliers(values: np.ndarray) -> np.ndarray:
    """Values less those far from all others that are few, or all the same: "no data"."""
    low, high = np.percentile(values, (10, 90))
    reach = 4 * (high - low)
    far = (values < low - reach) | (values > high + reach)
    few = np.count_nonzero(far) < 0.02 * values.size
    return values[~far] if reach and (few or len(np.unique(values[far])) <= 2) else values


def _without_text(data: bytes) -> bytes:
    """A PNG less its chunks of text and its colour profile; anything else as it is."""
    signature = b"\x89PNG\r\n\x1a\n"
    if not data.startswith(signature):
        return data
    kept, place = [signature], len(signature)
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt", b"iCCP"):
            kept.append(data[place:end])
        place = end
    return b"".join(kept)


def _what_it_is(data: bytes) -> str:
    """In words, of a file that no reader knows."""
    if not data.strip(b"\0"):
        return "empty file" if not data else "nothing but zeros: its copying was cut off"
    return next((words or NO_IMAGE for begin, words in FOREIGN if re.match(begin, data[:600])), NO_IMAGE)


def is_flat(image: Image.Image) -> bool:
    """Whether an RGB picture shows next to nothing: grey values within four of each other."""
    return all(high - low < 4 for low, high in image.getextrema())  # type: ignore[misc]


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
