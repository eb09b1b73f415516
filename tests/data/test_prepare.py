"""Scan, verify, decode once."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import DOMAINS, make_images
from ucir.config.data import DatasetParams, PackParams
from ucir.data import prepare
from ucir.data.catalogue import entry
from ucir.data.checks import table
from ucir.data.decode import decode_image
from ucir.data.pack import open_domain, read_index, read_info, split_pair
from ucir.data.prepare import check_source, write_pack
from ucir.errors import UserError

LENIENT = PackParams(side=20, max_bad_share=0.5)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", per_class=4)


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_every_image_is_in_the_pack_as_it_looks(images: Path, pack: Path) -> None:
    info = read_info(pack)
    assert info.classes == ["circle", "cross", "square"]
    for domain in DOMAINS:
        index = read_index(pack, domain)
        files = {p.relative_to(images).as_posix() for p in (images / domain).rglob("*.png")}
        assert {picture.path for picture in index} == files
        assert info.counts[domain] == len(files)
        pixels = open_domain(pack, domain).pixels(slice(None))
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
    bad = {
        "truncated.jpg": encoded(Image.effect_noise((64, 64), 50), "jpeg")[:600],
        "text.png": b"no image at all",
        "empty.png": b"",
    }
    for name, data in bad.items():
        (source / "art/circle" / name).write_bytes(data)
    (source / "art/circle/.DS_Store").write_bytes(b"hidden files are nobody's business")
    (source / "art/circle/Thumbs.db").write_bytes(b"nor what a desktop leaves")
    (source / "art/stray.png").write_bytes(b"neither here nor there")
    (source / "art/circle/notes.txt").write_bytes(b"people keep such files")
    info, check = write_pack(source, ["art", "photo"], tmp_path / "pack", LENIENT)
    assert {Path(fault.path).name for fault in check.bad} == {*bad, "stray.png"}
    reasons = {Path(fault.path).name: fault.reason for fault in check.bad}
    assert "truncated" in reasons["truncated.jpg"]
    assert reasons["text.png"] == "not an image"
    assert reasons["empty.png"] == "empty file"
    assert (tmp_path / "pack/check/quarantine.csv").read_text().count("\n") == 5
    assert info.counts["art"] == len(read_index(tmp_path / "pack", "art")) == 10


def test_a_decompression_bomb_is_not_decoded(source: Path, tmp_path: Path) -> None:
    bomb = encoded(Image.new("1", (4000, 4000)))
    assert len(bomb) < 10_000
    (source / "art/circle/bomb.png").write_bytes(bomb)
    params = PackParams(side=20, max_bad_share=0.5, max_pixels=1_000_000)
    _, check = write_pack(source, ["art"], tmp_path / "pack", params)
    assert [fault.reason for fault in check.bad] == ["4000 x 4000 pixels, more than max_pixels = 1000000"]


def test_too_many_bad_files_stop_the_stage(source: Path, tmp_path: Path) -> None:
    (source / "art/circle/text.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"1 of 11 files are bad.*art/circle/text\.png: not an image.*repair or remove"
    ):
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
    assert split_pair("real-life>art", list(DOMAINS)) == ("real-life", "art")
    for wrong in ("art", "art-art", "film-shop", "photo-"):
        with pytest.raises(UserError, match="is not two different domains joined"):
            split_pair(wrong, list(DOMAINS))
    with pytest.raises(UserError, match=r"pair 'art-photos': no domain 'photos'; did you mean 'photo'\?"):
        split_pair("art-photos", list(DOMAINS))


def test_flat_folders_are_pictures_without_labels(tmp_path: Path) -> None:
    for domain in ("sketches", "photos"):
        (tmp_path / "mine" / domain).mkdir(parents=True)
        for number in range(3):
            Image.effect_noise((9, 9), 50).save(tmp_path / "mine" / domain / f"{number}.png")
    info, check = write_pack(tmp_path / "mine", ["sketches", "photos"], tmp_path / "pack", LENIENT)
    assert info.classes == []
    assert info.counts == {"sketches": 3, "photos": 3}
    assert {p.label for p in read_index(tmp_path / "pack", "photos")} == {""}
    assert "3 pictures, no labels" in table(check)


def test_duplicates_are_told_and_across_domains_they_are_a_fault(source: Path, tmp_path: Path) -> None:
    shutil.copyfile(source / "art/circle/0.png", source / "art/cross/copy.png")
    shutil.copyfile(source / "art/circle/1.png", source / "photo/circle/leak.png")
    info, check = write_pack(source, ["art", "photo"], tmp_path / "pack", LENIENT)
    assert info.counts["art"] == 11
    assert sorted([file.path for file in same] for same in check.duplicates) == [
        ["art/circle/0.png", "art/cross/copy.png"],
        ["art/circle/1.png", "photo/circle/leak.png"],
    ]
    assert sorted(check.faults) == [
        "the same picture in two classes: art/circle/0.png = art/cross/copy.png",
        "the same picture in two domains, which makes retrieval too easy: "
        "art/circle/1.png = photo/circle/leak.png",
    ]
    assert (tmp_path / "pack/check/duplicates.csv").read_text().count("\n") == 5


def test_a_class_that_a_domain_lacks_is_named(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "photo/cross")
    _, check = write_pack(source, ["art", "photo"], tmp_path / "pack", LENIENT)
    assert check.faults == ["domain photo: no picture of class cross"]


def contents(pack: Path) -> dict[str, bytes]:
    return {p.relative_to(pack).as_posix(): p.read_bytes() for p in pack.rglob("*") if p.is_file()}


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each picture that is decoded."""
    calls: list[int] = []

    def counted(data: bytes, max_pixels: int) -> Image.Image:
        calls.append(1)
        return decode_image(data, max_pixels)

    monkeypatch.setattr(prepare, "decode_image", counted)
    return calls


def test_only_new_content_is_decoded_and_the_pack_is_the_same_as_from_scratch(
    source: Path, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = tmp_path / "pack"
    write_pack(source, ["art", "photo"], pack, LENIENT)
    assert len(decoded) == 26
    before = contents(pack)
    write_pack(source, ["art", "photo"], pack, LENIENT)
    assert len(decoded) == 26
    assert contents(pack) == before
    # one new, one changed, one gone, one renamed
    Image.effect_noise((9, 9), 50).save(source / "art/circle/new.png")
    Image.effect_noise((9, 9), 60).save(source / "art/circle/0.png")
    (source / "photo/cross/0.png").unlink()
    (source / "photo/circle/0.png").rename(source / "photo/circle/renamed.png")
    _, check = write_pack(source, ["art", "photo"], pack, LENIENT)
    assert len(decoded) == 28
    assert check.decoded == 2
    write_pack(source, ["art", "photo"], tmp_path / "scratch", LENIENT)
    assert contents(pack) == contents(tmp_path / "scratch")
    write_pack(source, ["art"], pack, LENIENT)
    assert not (pack / "photo.u8").exists()
    monkeypatch.setattr(prepare, "DECODER", "another")
    decoded.clear()
    write_pack(source, ["art"], pack, LENIENT)
    assert len(decoded) == 11, "what other code decoded is decoded again"


@pytest.mark.parametrize("cut", [0, 7, 100])
def test_a_killed_attempt_goes_on(
    source: Path, tmp_path: Path, decoded: list[int], monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    write_pack(source, ["art", "photo"], tmp_path / "whole", LENIENT)
    decoded.clear()
    monkeypatch.setattr(prepare, "CHUNK", 5)

    def stop(domain: str, done: int, total: int) -> None:
        if domain == "photo" and done >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_pack(source, ["art", "photo"], tmp_path / "pack", LENIENT, stop)
    assert len(decoded) == 20
    with pytest.raises(UserError, match="no finished pack"):
        read_info(tmp_path / "pack")
    (journal,) = (tmp_path / "pack/unfinished").glob("photo-20-squash-*.csv")
    if cut:  # the kill came while a line was being written, or before its pixels reached the disk
        journal.write_text(journal.read_text()[:-cut])
    decoded.clear()
    write_pack(source, ["art", "photo"], tmp_path / "pack", LENIENT)
    assert len(decoded) == 6 + {0: 0, 7: 1, 100: 2}[cut]
    assert contents(tmp_path / "pack") == contents(tmp_path / "whole")


def test_a_kill_while_a_pack_is_renewed_loses_nothing(
    source: Path, tmp_path: Path, decoded: list[int]
) -> None:
    pack = tmp_path / "pack"
    write_pack(source, ["art", "photo"], pack, LENIENT)
    before = contents(pack)
    decoded.clear()
    with pytest.raises(ZeroDivisionError):
        write_pack(source, ["art", "photo"], pack, LENIENT, lambda domain, done, total: 1 // 0)  # type: ignore[arg-type,return-value]
    with pytest.raises(UserError, match="no finished pack"):
        read_info(pack)
    write_pack(source, ["art", "photo"], pack, LENIENT)
    assert not decoded
    assert contents(pack) == before


def test_a_full_disk_is_told_before_any_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decoded: list[int]
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"26 pictures at 20 px need up to .* GiB .* free: make room"):
        write_pack(source, ["art", "photo"], tmp_path / "pack", LENIENT)
    assert not decoded


def test_the_ways_to_fit_a_picture_into_a_square(tmp_path: Path) -> None:
    picture = Image.new("RGB", (60, 20), "red")
    picture.paste("blue", (20, 0, 40, 20))  # its centre square
    for domain in "ab":
        (tmp_path / "images" / domain / "c").mkdir(parents=True)
        picture.save(tmp_path / "images" / domain / "c/x.png")

    def packed(fit: str) -> tuple[np.ndarray, list[int]]:
        params = PackParams(side=20, fit=fit)  # type: ignore[arg-type]
        write_pack(tmp_path / "images", ["a", "b"], tmp_path / fit, params)
        images = open_domain(tmp_path / fit, "a")
        return images.pixels(np.array([0]))[0], images.size_N2[0].tolist()

    squash, size = packed("squash")
    assert size == [60, 20]
    assert squash[10, 1].tolist() == [255, 0, 0]
    assert squash[10, 10].tolist() == [0, 0, 255]
    crop, size = packed("crop")
    assert size == [20, 20]
    assert (crop == (0, 0, 255)).all()
    letterbox, size = packed("letterbox")
    assert size == [60, 60]
    assert letterbox[0, 0].tolist() == [255, 255, 255]
    assert letterbox[10, 10].tolist() == [0, 0, 255]


def office_home(root: Path, side: int = 16) -> Path:
    """A tree with Office-Home's domains, classes and numbers; every picture is another."""
    number = 0
    for domain, classes in entry("office_home").counts.items():
        for label, count in classes.items():
            folder = root / ("Real World" if domain == "Real" else domain) / label
            folder.mkdir(parents=True)
            for i in range(count or 0):
                number += 1
                picture = Image.new("RGB", (side, side), (number % 256, number // 256, 77))
                picture.putpixel((0, 0), (255, 255, 255))
                picture.save(folder / f"{i:05}.jpg", comment=str(number))
    return root


def test_office_home_is_as_expected_and_every_damage_is_named(tmp_path: Path) -> None:
    source = office_home(tmp_path / "office")
    start = {"checkpoint": "x"}
    block = DatasetParams(source=str(source), catalogue="office_home", start=start)  # type: ignore[arg-type]
    check = check_source(block)
    assert check.faults == []
    assert [line.found for line in check.counts] == [line.expected for line in check.counts]
    assert sum(line.found for line in check.counts) == 2427 + 4365 + 4439 + 4357
    assert "4357 pictures, 65 classes, 4357 expected" in table(check)

    shutil.rmtree(source / "Art/Drill")
    (source / "Product").rename(source / "Prodcut")
    cut = sorted((source / "Clipart/Bed").iterdir())[:10]
    for file in cut:
        file.write_bytes(file.read_bytes()[:-40])
    check = check_source(block)
    text = table(check)
    assert "no folder of domain Product (Product); did you mean 'Prodcut'?" in text
    assert "folder Prodcut is no domain of Office-Home: left out" in text
    assert "domain Art: no picture of class Drill (15 expected)" in text
    assert "domain Clipart: class Bed has 88 pictures, 98 expected" in text
    assert {file.path for file in check.bad} == {f.relative_to(source).as_posix() for f in cut}
    for file in cut:
        assert f"left out {file.relative_to(source).as_posix()}: broken image: " in text
    with pytest.raises(UserError, match="no folder of domain Product"):
        write_pack(source, list(block.entry.domains), tmp_path / "pack", LENIENT, entry=block.entry)
