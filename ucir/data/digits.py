"""The sample data set ``digits``: three domains of the ten digits, made locally and deterministically.

``handwritten``  the 1,797 real UCI scans that ship with scikit-learn, enlarged, bright ink on black
``printed``      glyphs of the TrueType fonts that ship with matplotlib, black on white, small pose changes
``street``       the same glyphs in random colours on coloured, unevenly lit, noisy, slightly blurred ground
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter, ImageFont

SIDE = 40
"""Pixels per side of every image written."""
SCAN = 30
"""Pixels per side of an enlarged 8 x 8 scan, which has no margin of its own."""

FONTS = (
    *(f"DejaVuSans{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSansMono{style}.ttf" for style in ("", "-Bold", "-Oblique", "-BoldOblique")),
    *(f"DejaVuSerif{style}.ttf" for style in ("", "-Bold", "-Italic", "-BoldItalic")),
    *(f"STIXGeneral{style}.ttf" for style in ("", "Bol", "Italic", "BolIta")),
    *(f"{name}.ttf" for name in ("cmr10", "cmb10", "cmss10", "cmtt10")),
)


def make_digits(root: Path, *, per_class: int = 150, seed: int = 0) -> dict[str, int]:
    """Write the sample as ``<root>/<domain>/<class>/<name>.png``.

    Args:
        root: folder to (re)create; what an earlier call drew before it was killed, with the same code and
            arguments, is kept beside it and not drawn again.
        per_class: images per class of the two drawn domains; the scans are always all 1,797.
        seed: every drawn image depends on (seed, domain, class, number) alone.

    Returns:
        Number of images per domain.
    """
    recipe = hashlib.sha256(Path(__file__).read_bytes() + f"{per_class} {seed}".encode()).hexdigest()[:12]
    unfinished = root.with_name(f"{root.name}.unfinished-{recipe}")
    for other in root.parent.glob(f"{root.name}.unfinished-*"):
        if other != unfinished:
            shutil.rmtree(other)
    counts = {
        "handwritten": _write_scans(unfinished / "handwritten"),
        "printed": _write_drawn(unfinished / "printed", per_class, seed, street=False),
        "street": _write_drawn(unfinished / "street", per_class, seed, street=True),
    }
    shutil.rmtree(root, ignore_errors=True)
    unfinished.rename(root)
    return counts


def _write_scans(folder: Path) -> int:
    from sklearn.datasets import load_digits

    scans = load_digits()
    for number, (image, digit) in enumerate(zip(scans.images, scans.target, strict=True)):
        path = _path(folder, int(digit), number)
        if path.exists():
            continue
        # 8 x 8 counts of 0..16 ink pixels per cell
        small = Image.fromarray((image * (255 / 16)).astype(np.uint8))
        framed = Image.new("L", (SIDE, SIDE))
        framed.paste(small.resize((SCAN, SCAN), Image.Resampling.BICUBIC), ((SIDE - SCAN) // 2,) * 2)
        _save(framed, path)
    return len(scans.target)


def _write_drawn(folder: Path, per_class: int, seed: int, *, street: bool) -> int:
    from matplotlib import get_data_path

    fonts = Path(get_data_path()) / "fonts" / "ttf"
    for digit in range(10):
        for number in range(per_class):
            path = _path(folder, digit, number)
            if path.exists():
                continue
            rng = np.random.default_rng([seed, int(street), digit, number])
            mask = _glyph(str(digit), fonts / FONTS[rng.integers(len(FONTS))], rng)
            image = _street(mask, rng) if street else Image.eval(mask, lambda ink: 255 - ink)
            _save(image, path)
    return 10 * per_class


def _glyph(text: str, font: Path, rng: np.random.Generator) -> Image.Image:
    """Ink mask (0..255) of one character, centred up to a small random turn, scale and shift."""
    scale = 2  # drawn large, then reduced: smooth edges at any angle
    side = SIDE * scale
    pen = ImageFont.truetype(str(font), int(side * rng.uniform(0.8, 1.05)))
    mask = Image.new("L", (side, side))
    shift = rng.uniform(-0.06, 0.06, 2) * side
    left, top, right, bottom = pen.getbbox(text)
    corner = ((side - left - right) / 2 + shift[0], (side - top - bottom) / 2 + shift[1])
    ImageDraw.Draw(mask).text(corner, text, fill=255, font=pen)
    mask = mask.rotate(rng.uniform(-10, 10), Image.Resampling.BICUBIC)
    return mask.resize((SIDE, SIDE), Image.Resampling.LANCZOS)


def _street(mask: Image.Image, rng: np.random.Generator) -> Image.Image:
    ground = rng.uniform(0.1, 0.9, 3)
    ink = rng.uniform(0.0, 1.0, 3)
    while abs(float(np.mean(ink - ground))) < 0.25:  # keep the digit legible
        ink = rng.uniform(0.0, 1.0, 3)
    alpha = np.asarray(mask, np.float64)[..., None] / 255
    picture = alpha * ink + (1 - alpha) * ground
    across = np.linspace(-0.5, 0.5, SIDE)
    angle = rng.uniform(0, 2 * np.pi)
    light = np.cos(angle) * across[None, :] + np.sin(angle) * across[:, None]
    picture *= 1 + rng.uniform(0.2, 0.7) * light[..., None]
    picture += rng.normal(0, rng.uniform(0.01, 0.06), picture.shape)
    pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    return Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(rng.uniform(0.2, 0.8)))


def _path(folder: Path, digit: int, number: int) -> Path:
    return folder / str(digit) / f"{number:04d}.png"


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".unfinished")
    image.save(unfinished, format="PNG")
    unfinished.replace(path)
