"""Scan, verify, decode once."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import DOMAINS, make_images
from ucir.config import PackParams
from ucir.data.pack import (
    decode_image,
    open_domain,
    read_index,
    read_info,
    split_pair,
    write_pack,
)
from ucir.errors import UserError

LENIENT = PackParams(side=20, max_bad_share=0.5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", per_class=4)


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def palette() -> Image.Image:
    image = Image.new("P", (4, 2), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    return image


def test_every_image_is_in_the_pack_as_it_looks(images: Path, pack: Path) -> None:
    info = read_info(pack)
    assert info.classes == ["circle", "cross", "square"]
    for domain in DOMAINS:
        index = read_index(pack, domain)
        files = {p.relative_to(images).as_posix() for p in (images / domain).rglob("*.png")}
        assert {picture.path for picture in index} == files
        assert info.counts[domain] == len(files)
        pixels = open_domain(pack, domain).pixels_NSS3
        for picture in index:
            with Image.open(images / picture.path) as image:
                assert np.array_equal(pixels[picture.slot], np.asarray(image))
            assert picture.label == picture.path.split("/")[1]


def test_slots_do_not_follow_classes_and_class_names_do_not_move_them(source: Path, tmp_path: Path) -> None:
    write_pack(source, ["art"], tmp_path / "one", LENIENT)
    for old, new in (("circle", "z"), ("cross", "a")):
        (source / "art" / old).rename(source / "art" / new)
    write_pack(source, ["art"], tmp_path / "two", LENIENT)
    one, two = (read_index(tmp_path / name, "art") for name in ("one", "two"))
    assert [p.sha256 for p in one] == [p.sha256 for p in two]
    assert (tmp_path / "one/art.u8").read_bytes() == (tmp_path / "two/art.u8").read_bytes()
    assert [p.label for p in one] != sorted(p.label for p in one)


def test_bad_files_are_quarantined_by_name_with_their_reason(source: Path, tmp_path: Path) -> None:
    good = (source / "art/circle/0.png").read_bytes()
    bad = {
        "truncated.jpg": encoded(Image.effect_noise((64, 64), 50), "jpeg")[:600],
        "text.png": b"no image at all",
        "empty.png": b"",
    }
    for name, data in bad.items():
        (source / "art/circle" / name).write_bytes(data)
    (source / "art/circle/.DS_Store").write_bytes(b"hidden files are nobody's business")
    (source / "art/circle/Thumbs.db").write_bytes(b"nor what a desktop leaves")
    (source / "art/stray.txt").write_bytes(b"neither here nor there")
    info, faults = write_pack(source, ["art", "photo"], tmp_path / "pack", LENIENT)
    assert {Path(fault.path).name for fault in faults} == {*bad, "stray.txt"}
    reasons = {Path(fault.path).name: fault.reason for fault in faults}
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["text.png"] == "not an image"
    assert reasons["empty.png"] == "empty file"
    assert (tmp_path / "pack/quarantine.csv").read_text().count("\n") == 5
    assert good
    assert info.counts["art"] == len(read_index(tmp_path / "pack", "art")) == 10


def test_a_decompression_bomb_is_not_decoded(source: Path, tmp_path: Path) -> None:
    bomb = encoded(Image.new("1", (4000, 4000)))
    assert len(bomb) < 10_000
    (source / "art/circle/bomb.png").write_bytes(bomb)
    params = PackParams(side=20, max_bad_share=0.5, max_pixels=1_000_000)
    _, faults = write_pack(source, ["art"], tmp_path / "pack", params)
    assert [fault.reason for fault in faults] == ["4000 x 4000 pixels, more than max_pixels = 1000000"]


def test_too_many_bad_files_stop_the_stage(source: Path, tmp_path: Path) -> None:
    (source / "art/circle/text.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"1 of 11 files are bad.*art/circle/text.png: not an image"):
        write_pack(source, ["art"], tmp_path / "pack", PackParams(side=20, max_bad_share=0.01))
    with pytest.raises(UserError, match="no finished pack"):
        read_info(tmp_path / "pack")


def test_missing_and_empty_folders_are_named(source: Path, tmp_path: Path) -> None:
    def told(domains: list[str]) -> str:
        with pytest.raises(UserError) as caught:
            write_pack(source, domains, tmp_path / "pack", LENIENT)
        return str(caught.value)

    assert "did you mean 'photo'" in told(["art", "phote"])
    shutil.rmtree(source / "art/cross")
    (source / "art/cross").mkdir()
    assert "art/cross: empty class folder" in told(["art", "photo"])
    (source / "art/cross/x.png").write_bytes(b"no image")
    assert "art/cross: no readable picture is left" in told(["art", "photo"])
    shutil.rmtree(source / "art")
    shutil.rmtree(source / "photo")
    assert "1 domain folder(s)" in told(["real-life"])
    shutil.rmtree(source)
    assert "no such folder" in told(["art"])


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


def test_a_pack_that_lost_a_file_is_no_pack(source: Path, tmp_path: Path) -> None:
    pack = tmp_path / "pack"
    for lost in ("art.csv", "photo.u8"):
        write_pack(source, ["art", "photo"], pack, LENIENT)
        (pack / lost).unlink()
        with pytest.raises(UserError, match="incomplete: the files of domain"):
            open_domain(pack, "art")
    write_pack(source, ["art", "photo"], pack, LENIENT)
    (pack / "art.u8").write_bytes(b"short")
    with pytest.raises(UserError, match="incomplete: the files of domain art"):
        read_info(pack)


def test_pairs_split_at_the_hyphen_between_domains() -> None:
    assert split_pair("art-real-life", list(DOMAINS)) == ("art", "real-life")
    assert split_pair("real-life-art", list(DOMAINS)) == ("real-life", "art")
    for wrong in ("art", "art-art", "art-film", "photo-"):
        with pytest.raises(UserError, match="is not two different domains joined"):
            split_pair(wrong, list(DOMAINS))
