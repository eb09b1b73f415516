"""Image files of every kind to upright RGB."""

from __future__ import annotations

import contextlib
import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

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


def odd_exif(tag: int, kind: int, count: int, value: bytes) -> bytes:
    """EXIF of orientation 6 and one more tag that Pillow reads and cannot write again."""
    entries = [
        (0x0112, 3, 1, struct.pack("<HH", 6, 0)),
        (tag, kind, count, value),
    ]
    body = b"".join(struct.pack("<HHI", *entry[:3]) + entry[3] for entry in sorted(entries))
    extra = struct.pack("<ii", -72, 1)
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + body + struct.pack("<I", 0) + extra


@pytest.mark.filterwarnings("ignore:Truncated File Read")
@pytest.mark.parametrize(
    ("tag", "kind", "count", "value"),
    [
        (0x0100, 2, 4, b"abc\0"),  # a width in letters
        (0x011A, 10, 1, struct.pack("<I", 38)),  # a resolution below 0
        (0x9000, 4, 1, struct.pack("<I", 7)),  # a version that is a number
        (0x010E, 2, 20, struct.pack("<I", 0xFFFFFFF0)),  # a description that lies nowhere
        (0x010F, 5, 1, struct.pack("<I", 99999)),
    ],
)
def test_an_odd_tag_beside_it_does_not_hide_the_orientation(
    tag: int, kind: int, count: int, value: bytes
) -> None:
    data = encoded(Image.new("RGB", (40, 20)), "jpeg", exif=odd_exif(tag, kind, count, value))
    assert decode_image(data, 10**6).size == (20, 40)


def test_exif_that_cannot_be_read_costs_the_orientation_alone() -> None:
    data = encoded(Image.new("RGB", (40, 20)), "jpeg", exif=b"Exif\0\0MM\0*\xff\xff")
    assert decode_image(data, 10**6).size == (40, 20)


@pytest.mark.parametrize("compressed", [False, True])
def test_text_of_any_length_in_a_png_costs_nothing(compressed: bool) -> None:
    text = PngInfo()
    text.add_text("parameters", "a" * (2 * 2**20), zip=compressed)
    assert decode_image(encoded(Image.new("RGB", (4, 2), "red"), "png", pnginfo=text), 10**6).size == (4, 2)


RAMP = np.linspace(0, 1, 64 * 64, dtype=np.float32).reshape(64, 64)


@pytest.mark.parametrize(
    "values",
    [
        RAMP,
        RAMP * 255,
        RAMP * 65535,
        RAMP * 0.01,
        RAMP * 3e7,
        RAMP * 7,  # high dynamic range
        RAMP * 2 - 1,
        1000 + RAMP,
        RAMP * 1.04 - 0.02,  # overshoot of a resize
        np.where(RAMP == 1, np.inf, RAMP),
        np.where(RAMP == 0, -np.inf, RAMP),
        np.where(RAMP > 0.99, np.nan, RAMP),
        np.where(RAMP == 1, 1e9, RAMP),  # one hot pixel
        np.where(RAMP > 0.99, 1e6, RAMP),
        np.where(RAMP > 0.95, -9999, RAMP * 300),  # no data
        np.where(RAMP > 0.95, -3.4e38, RAMP),
        np.where(RAMP > 0.95, 65535, RAMP * 4095).astype(np.uint16),
        (RAMP * 4095).astype(np.uint16),  # 12 bits in 16
        (RAMP * 1023).astype(np.uint16),
        (RAMP * 255).astype(np.uint16),
        (RAMP * 65535).astype(np.uint16),
        (RAMP * 2**30).astype(np.int32),
        (RAMP * 9).astype(np.int32),
    ],
    ids=str,
)
def test_values_of_any_range_keep_their_contrast(values: np.ndarray) -> None:
    decoded = np.asarray(decode_image(encoded(Image.fromarray(values), "tiff"), 10**6))[..., 0]
    kept = np.isfinite(values) & (RAMP < 0.95)
    order = np.corrcoef(values[kept].astype(float), decoded[kept])[0, 1]
    assert order > 0.98
    assert decoded.max() - decoded.min() > 200


@pytest.mark.parametrize("top", [255, 4095, 65535])
def test_colours_of_sixteen_bits_are_seen_or_left_out(top: int) -> None:
    """Written by hand, as Pillow writes none."""
    values = (RAMP[:8, :8, None] * [[[1, 0.5, 1]]] / RAMP[7, 7] * top).astype(">u2")

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 8, 8, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows))
    data += chunk(b"IEND", b"")
    if top == 65535:
        assert decode_image(data, 10**6).getextrema()[0][1] > 250  # type: ignore[index]
    else:
        with pytest.raises(ValueError, match="colours of 16 bits that use less than a quarter"):
            decode_image(data, 10**6)


def test_a_picture_of_no_numbers_is_left_out_and_one_grey_stays_one() -> None:
    with pytest.raises(ValueError, match="most of its values are no numbers"):
        decode_image(encoded(Image.fromarray(np.where(RAMP > 0.3, np.nan, RAMP)), "tiff"), 10**6)
    grey = decode_image(encoded(Image.fromarray(RAMP * 0 + 0.5), "tiff"), 10**6)
    assert grey.getextrema() == ((127, 127),) * 3


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (bytes(5000), "nothing but zeros"),
        (b"\0\0\0\x18ftypheic" + bytes(50), "HEIC picture: convert"),
        (b"\0\0\0\x18ftypisom" + bytes(50), "a film"),
        (b"\xff\x0a" + bytes(50), "JPEG XL"),
        (b'<?xml version="1.0"?>\n<svg xmlns="x"/>', "an SVG drawing"),
        (b"<!DOCTYPE html><html>404", "a web page"),
        (b"%PDF-1.4 ", "a PDF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "a PostScript"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS"),
        (b"hello", "not an image"),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(data: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        decode_image(data, 10**6)


@pytest.mark.filterwarnings("ignore:IM image format")
def test_whatever_a_decoder_raises_costs_that_picture_alone() -> None:
    """Mutations of every format that Pillow can write: a picture or a reason, nothing else."""
    Image.init()
    rng = random.Random(0)
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 53, 3)).astype(np.uint8))
    kinds = outcomes = 0
    for kind in sorted(Image.SAVE):
        data = b""
        for mode in ("RGB", "P", "L", "1", "RGBA", "F"):
            with contextlib.suppress(Exception):
                data = encoded(noise.convert(mode), kind)
                break
        kinds += bool(data)
        for _ in range(10 if data else 0):
            mutated = bytearray(data)
            place = rng.randrange(len(mutated))
            match rng.randrange(4):
                case 0:
                    mutated = mutated[:place]
                case 1:
                    mutated[place : place + 300] = bytes(len(mutated[place : place + 300]))
                case 2:
                    mutated[place:place] = rng.randbytes(30)
                case _:
                    for _ in range(6):
                        mutated[rng.randrange(len(mutated))] = rng.randrange(256)
            with contextlib.suppress(ValueError):
                decode_image(bytes(mutated), 10**6)
                outcomes += 1
    assert kinds > 20
    assert outcomes > 50


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
