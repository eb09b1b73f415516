"""Image files of every kind to upright RGB."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ucir.config.data import PackParams
from ucir.data.decode import decode_image
from ucir.data.pack import read_index
from ucir.data.prepare import write_pack


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette() -> Image.Image:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("L", (4, 2), 77), {}, (77, 77, 77)),
        (Image.new("RGBA", (4, 2), (10, 20, 30, 0)), {}, (255, 255, 255)),
        (Image.new("LA", (4, 2), (10, 0)), {}, (255, 255, 255)),
        (palette(), {}, (10, 20, 30)),
        (palette(), {"transparency": 1}, (255, 255, 255)),
        (Image.new("I;16", (4, 2), 65535), {}, (255, 255, 255)),
        (Image.new("1", (4, 2), 1), {}, (255, 255, 255)),
    ],
)
def test_every_mode_becomes_upright_rgb(
    image: Image.Image, options: dict[str, int], expected: tuple[int, int, int]
) -> None:
    decoded = decode_image(encoded(image, "png", **options), 10**6)
    assert decoded.mode == "RGB"
    assert decoded.size == (4, 2)
    assert decoded.getpixel((0, 0)) == expected


def test_cmyk_and_exif_orientation() -> None:
    assert decode_image(encoded(Image.new("CMYK", (4, 2)), "jpeg"), 10**6).getpixel((0, 0)) == (255,) * 3
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    turned = decode_image(encoded(Image.new("RGB", (40, 20)), "jpeg", exif=exif), 10**6)
    assert turned.size == (20, 40)


def test_sixteen_bits_keep_their_range() -> None:
    ramp = Image.fromarray(np.array([[0, 32768, 65535]], np.uint16))
    decoded = np.asarray(decode_image(encoded(ramp, "png"), 10**6))
    assert decoded[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("kind", ["gif", "webp", "png", "tiff"])
def test_an_animation_gives_its_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:])
    red, _, blue = decode_image(data, 10**6).getpixel((1, 1))  # type: ignore[misc]
    assert red > 200
    assert blue < 50


def test_odd_names_and_wrong_suffixes_are_no_obstacle(tmp_path: Path) -> None:
    names = ["Grüße 漢字 🐘.png", "a" * 240 + ".png", "jpeg inside.png", "no suffix"]
    for domain in "ab":
        folder = tmp_path / "images" / domain / "Tür ü"
        folder.mkdir(parents=True)
        for number, name in enumerate(names):
            kind = "jpeg" if "inside" in name else "png"
            (folder / name).write_bytes(encoded(Image.new("RGB", (4, 4), (number * 9, 0, ord(domain))), kind))
    _, check = write_pack(tmp_path / "images", ["a", "b"], tmp_path / "pack", PackParams(side=16))
    assert not check.bad
    index = read_index(tmp_path / "pack", "a")
    assert {Path(picture.path).name for picture in index} == set(names)
    assert {picture.label for picture in index} == {"Tür ü"}
