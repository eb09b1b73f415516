"""Folders and archives read in place; hostile and broken archives."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import DOMAINS, make_images
from ucir.config.data import PackParams
from ucir.data import source as source_module
from ucir.data.catalogue import entry, names
from ucir.data.prepare import write_pack
from ucir.data.source import Source, survey
from ucir.errors import UserError

PARAMS = PackParams(side=20, max_bad_share=0.5)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return make_images(tmp_path / "images", per_class=4)


def zipped(tree: Path, archive: Path, top: str = "") -> Path:
    with zipfile.ZipFile(archive, "w") as opened:
        for path in sorted(tree.rglob("*.png")):
            opened.write(path, top + path.relative_to(tree).as_posix())
    return archive


def tarred(tree: Path, archive: Path, top: str = "") -> Path:
    with tarfile.open(archive, "w:gz" if archive.name.endswith("gz") else "w") as opened:
        for path in sorted(tree.rglob("*.png"), reverse=True):
            opened.add(path, top + path.relative_to(tree).as_posix())
    return archive


@pytest.mark.parametrize("kind", ["pictures.zip", "pictures.tar", "pictures.tar.gz"])
@pytest.mark.parametrize("top", ["", "wrapped/"])
def test_an_archive_gives_the_pack_of_its_folder(tree: Path, tmp_path: Path, kind: str, top: str) -> None:
    make = zipped if kind.endswith("zip") else tarred
    archive = make(tree, tmp_path / kind, top)
    info, _ = write_pack(tree, DOMAINS, tmp_path / "one", PARAMS)
    same, _ = write_pack(archive, DOMAINS, tmp_path / "two", PARAMS)
    assert same == info
    for domain in DOMAINS:
        one, two = (tmp_path / name / f"{domain}.u8" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert {p.name for p in tmp_path.iterdir()} == {"images", kind, "one", "two"}, "nothing was unpacked"


def test_archives_in_a_folder_count_as_what_they_hold_and_not_twice(tree: Path, tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    for domain in DOMAINS:
        zipped(tree / domain, folder / f"{domain}.zip", f"{domain}/")
    (tree / "art").rename(folder / "art")  # and one of them unpacked
    (folder / "README.txt").write_text("beside the domains: nobody's business")
    contents = survey(Source(folder), entry("folder"))
    assert {domain: len(files) for domain, files in contents.domains.items()} == {
        "art": 10,
        "photo": 16,
        "real-life": 22,
    }
    assert not contents.strays


def bomb(opened: zipfile.ZipFile) -> None:
    opened.writestr("art/c/huge.png", b"\0" * 5000, zipfile.ZIP_DEFLATED)


def link(opened: zipfile.ZipFile) -> None:
    info = zipfile.ZipInfo("art/c/link.png")
    info.external_attr = 0o120777 << 16
    opened.writestr(info, "/etc/passwd")


def many(opened: zipfile.ZipFile) -> None:
    for number in range(60):
        opened.writestr(f"art/c/{number}.png", b"x")


@pytest.mark.parametrize(
    ("fill", "message"),
    [
        (lambda z: z.writestr("../../evil.png", b"x"), "member '../../evil.png' leads out"),
        (lambda z: z.writestr("/etc/evil.png", b"x"), "member '/etc/evil.png' leads out"),
        (lambda z: z.writestr("art\\..\\..\\evil.png", b"x"), "leads out"),
        (link, "member 'art/c/link.png' is a link"),
        (bomb, "member 'art/c/huge.png' unpacks to 5000 bytes"),
        (many, "more than 50 files"),
    ],
)
def test_hostile_zips_are_refused_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fill: Callable[[zipfile.ZipFile], None], message: str
) -> None:
    monkeypatch.setattr(source_module, "MAX_MEMBER_BYTES", 4000)
    monkeypatch.setattr(source_module, "MAX_MEMBERS", 50)
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        opened.writestr("art/c/good.png", b"x")
        fill(opened)
    with pytest.raises(UserError) as caught:
        Source(tmp_path / "x.zip")
    assert "x.zip: refused: " in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_tars_with_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    member = tarfile.TarInfo("art/c/odd.png")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "x.tar", "w") as opened:
        opened.addfile(member)
    with pytest.raises(UserError, match=r"refused: member 'art/c/odd\.png' is a link or a device"):
        Source(tmp_path / "x.tar")


def test_tars_that_lead_out_are_refused(tmp_path: Path) -> None:
    member = tarfile.TarInfo("art/../../odd.png")
    member.size = 1
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as opened:
        opened.addfile(member, io.BytesIO(b"x"))
    with pytest.raises(UserError, match="leads out of the archive"):
        Source(tmp_path / "x.tar.gz")


@pytest.mark.parametrize("kind", ["x.zip", "x.tar", "x.tar.gz"])
@pytest.mark.parametrize("share", [0.0, 0.5])
def test_truncated_archives_are_told_apart_from_whole_ones(
    tree: Path, tmp_path: Path, kind: str, share: float
) -> None:
    archive = (zipped if kind.endswith("zip") else tarred)(tree, tmp_path / kind)
    data = archive.read_bytes()
    archive.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match=f"{kind}: not a complete archive"):
        Source(archive)


def test_a_damaged_member_is_one_bad_file(tree: Path, tmp_path: Path) -> None:
    archive = zipped(tree, tmp_path / "x.zip")
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as opened:
        info = opened.getinfo("art/circle/0.png")
    data[info.header_offset + 60] ^= 0xFF
    archive.write_bytes(data)
    pack, check = write_pack(archive, DOMAINS, tmp_path / "pack", PARAMS)
    assert pack.counts["art"] == 9
    assert [file.path for file in check.bad] == ["art/circle/0.png"]
    assert "broken in its archive" in check.bad[0].reason


def test_links_in_a_tree_are_followed_but_not_round(tree: Path, tmp_path: Path) -> None:
    (tree / "art/circle/round").symlink_to(tree / "art", target_is_directory=True)
    outside = tmp_path / "elsewhere"
    outside.mkdir()
    Image.new("RGB", (4, 4)).save(outside / "x.png")
    (tree / "photo/linked").symlink_to(outside, target_is_directory=True)
    files = survey(Source(tree), entry("folder"))
    assert "linked" in {file.label for file in files.domains["photo"]}
    assert len(files.domains["art"]) == 10


def test_spellings_of_known_data_sets(tmp_path: Path) -> None:
    for top in ("OfficeHomeDataset_10072016/", ""):
        for real in ("Real World", "Real_World", "RealWorld", "real"):
            root = tmp_path / f"{top}{real}".replace("/", "_")
            for domain in ("Art", "clipart", "Product", real):
                folder = root / f"{top}{domain}" / "alarm clock"
                folder.mkdir(parents=True)
                (folder / "1.jpg").touch()
            contents = survey(Source(root), entry("office_home"))
            assert list(contents.domains) == ["Art", "Clipart", "Product", "Real"]
            assert {f.label for files in contents.domains.values() for f in files} == {"Alarm_Clock"}
            assert contents.unknown == []


def test_office31_keeps_its_pictures_one_folder_deeper(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "domain_adaptation_images.tar.gz", "w:gz") as opened:
        for domain in ("amazon", "dslr", "webcam"):
            member = tarfile.TarInfo(f"domain_adaptation_images/{domain}/images/back_pack/frame_0001.jpg")
            opened.addfile(member, io.BytesIO(b""))
    contents = survey(Source(tmp_path), entry("office31"))
    assert {domain: [f.label for f in files] for domain, files in contents.domains.items()} == {
        domain: ["back_pack"] for domain in ("amazon", "dslr", "webcam")
    }


def test_domainnet_takes_the_seven_classes_and_what_the_lists_name(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "clipart.zip", "w") as opened:
        for label in ("bird", "zebra", "aircraft_carrier"):
            for number in range(3):
                opened.writestr(f"clipart/{label}/clipart_{number}.jpg", b"x")
    files = survey(Source(tmp_path), entry("domainnet"))
    assert sorted(f.label for f in files.domains["clipart"]) == ["bird"] * 3 + ["zebra"] * 3
    assert files.passed_over == 3
    for part, number in (("train", 0), ("test", 2)):
        lines = [f"clipart/{label}/clipart_{number}.jpg 31" for label in ("bird", "zebra")]
        (tmp_path / f"clipart_{part}.txt").write_text("\n".join(lines) + "\n")
    files = survey(Source(tmp_path), entry("domainnet"))
    assert len(files.domains["clipart"]) == 4
    assert "clipart/bird/clipart_1.jpg" not in {f.path for f in files.domains["clipart"]}


def test_every_entry_of_the_catalogue_is_whole() -> None:
    totals = {
        "office_home": [2427, 4365, 4439, 4357],
        "office31": [2817, 498, 795],
        "pacs": [2048, 2344, 1670, 3929],
        "office_caltech": [958, 1123, 157, 295],
        "domainnet": [1959, 2121, 2415, 3500, None, 2091],
    }
    for name in names():
        known = entry(name)
        assert known.ask
        assert known.licence
        if known.counts:
            assert set(known.counts) == set(known.domains)
            assert len(known.class_names()) == known.classes
        if name in totals:
            counts = [known.counts[domain].values() for domain in known.domains]
            assert [None if None in by_class else sum(by_class) for by_class in counts] == totals[name]  # type: ignore[arg-type]
    with pytest.raises(UserError, match="did you mean 'office_home'"):
        entry("office-home")


def test_a_source_that_is_no_source(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; put the data set there"):
        Source(tmp_path / "nowhere")
    (tmp_path / "x.rar").touch()
    with pytest.raises(UserError, match=r"neither a folder nor one of \.zip"):
        Source(tmp_path / "x.rar")
    if os.geteuid():  # root may read everything
        (tmp_path / "x.zip").touch(mode=0)
        with pytest.raises(UserError, match="not a complete archive"):
            Source(tmp_path / "x.zip")
