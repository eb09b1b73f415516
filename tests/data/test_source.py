"""Folders and archives read in place; hostile and broken archives."""

from __future__ import annotations

import gzip
import io
import os
import shutil
import tarfile
import warnings
import zipfile
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from PIL import Image

from tests.conftest import DOMAINS, make_images
from ucir.config.data import DatasetParams, PackParams
from ucir.data import source as source_module
from ucir.data.catalogue import entry, names
from ucir.data.prepare import survey_source, write_pack
from ucir.data.source import Source, survey, unusable_names
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


def pictures(root: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        picture = Image.new("RGB", (24, 24), (number, 0, 0))
        picture.putpixel((0, 0), (255, 255, 255))
        picture.save(root / name, "png")
    return root


def found(root: Path, name: str = "folder") -> dict[str, list[str]]:
    """Labels by domain."""
    files = survey(Source(root), entry(name))
    return {domain: sorted(file.label for file in of_domain) for domain, of_domain in files.domains.items()}


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        ("{domain}/{split}/{label}/{split}{n}.png", ["cat", "cat", "dog", "dog"]),
        ("{split}/{domain}/{label}/{split}{n}.png", ["cat", "cat", "dog", "dog"]),
        ("{domain}/{split}/{label}{n}.png", ["", "", "", ""]),
    ],
)
@pytest.mark.parametrize("splits", [("train", "test"), ("Training", "VAL")])
def test_splits_are_no_classes(
    tmp_path: Path, layout: str, expected: list[str], splits: tuple[str, str]
) -> None:
    names = [
        layout.format(domain=domain, split=split, label=label, n=n)
        for n, (domain, split, label) in enumerate(product(("art", "photo"), splits, ("cat", "dog")))
    ]
    pictures(tmp_path, *names)
    assert found(tmp_path) == {"art": expected, "photo": expected}
    assert any("taken together: splits" in note for note in survey(Source(tmp_path), entry("folder")).notes)


def test_what_may_be_a_split_is_asked_about(tmp_path: Path) -> None:
    pictures(tmp_path / "a", "train/cat/0.png", "test/cat/1.png")
    notes = survey(Source(tmp_path / "a"), entry("folder")).notes
    assert notes == ["the domains are called test and train: is this one collection, split?"]
    names = [f"{domain}/{label}/{domain}{label}.png" for domain in "ab" for label in ("train", "bus")]
    pictures(tmp_path / "vehicles", *names)
    assert found(tmp_path / "vehicles") == {"a": ["bus", "train"], "b": ["bus", "train"]}
    pictures(tmp_path / "mixed", "a/train/cat/0.png", "a/dog/1.png", "b/dog/2.png")
    notes = survey(Source(tmp_path / "mixed"), entry("folder")).notes
    assert notes == ["domain a: train taken for a class: is it a split with classes below it?"]


def test_what_systems_leave_in_folders_is_no_picture(tmp_path: Path) -> None:
    pictures(
        tmp_path,
        *("a/cat/0.png", "b/cat/1.png"),
        *(
            "a/cat/@eaDir/0.png/SYNOFILE_THUMB_M.png",
            "a/@EADIR/x.png",
            "#recycle/a/2.png",
            "$RECYCLE.BIN/a/3.png",
        ),
        *(
            "a/cat/THUMBS.DB",
            "a/cat/0.png:Zone.Identifier",
            "__MacOSX/a/cat/4.png",
            "a/cat/Icon\r",
            "a/~$cat.png",
        ),
        *(
            "a/cat/._0.png",
            "b/.thumbnails/5.png",
            "@Recycle/b/6.png",
            "lost+found/7.png",
            "b/cat/Desktop.INI",
        ),
    )
    assert found(tmp_path) == {"a": ["cat"], "b": ["cat"]}


@pytest.mark.parametrize("name", ["mine.7z", "mine.RAR", "mine.tar.zst", "mine.zip.001", "mine.z01"])
def test_an_archive_that_is_not_read_is_mentioned(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, "a/0.png", "b/1.png")
    (tmp_path / name).write_bytes(b"x")
    assert (
        f"{name}: an archive of a kind that is not read" in survey(Source(tmp_path), entry("folder")).notes[0]
    )
    for folder in "ab":
        shutil.rmtree(tmp_path / folder)
    with pytest.raises(UserError, match=r"0 domain folder.*an archive of a kind that is not read"):
        write_pack(tmp_path, ["a", "b"], tmp_path / "pack", PARAMS)


@pytest.mark.parametrize("kind", ["tar.xz", "txz", "tar.bz2"])
def test_other_tars_are_read(tree: Path, tmp_path: Path, kind: str) -> None:
    with tarfile.open(tmp_path / f"x.{kind}", "w:bz2" if "bz" in kind else "w:xz") as opened:
        opened.add(tree, "")
    assert found(tmp_path / f"x.{kind}") == found(tree)
    broken = tmp_path / f"broken.{kind}"
    broken.write_bytes((tmp_path / f"x.{kind}").read_bytes()[:-200])
    with pytest.raises(UserError, match="not a complete archive"):
        Source(broken)


def patched(archive: Path, method: int = 0, flags: int = 0) -> Path:
    """The archive with another method or flags in all its headers."""
    data = bytearray(archive.read_bytes())
    for signature, place in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        start = data.find(signature)
        while start >= 0:
            data[start + place] |= flags
            data[start + place + 2] = method or data[start + place + 2]
            start = data.find(signature, start + 4)
    archive.write_bytes(data)
    return archive


def test_zips_that_cannot_be_read_are_refused_at_once(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is packed by deflate64, which Python does not read"):
        Source(patched(zipped(tree, tmp_path / "a.zip"), method=9))
    with pytest.raises(UserError, match="is packed by wavpack"):
        Source(patched(zipped(tree, tmp_path / "b.zip"), method=97))
    with pytest.raises(UserError, match="is encrypted"):
        Source(patched(zipped(tree, tmp_path / "c.zip"), flags=1))
    last = bytearray(zipped(tree, tmp_path / "d.zip").read_bytes())
    last[last.rfind(b"PK\x01\x02") + 34] = 1  # the number of the part that it begins in
    (tmp_path / "d.zip").write_bytes(last)
    with pytest.raises(UserError, match=r"d\.zip: one part of several: join them with"):
        Source(tmp_path / "d.zip")


def test_names_in_a_zip(tmp_path: Path) -> None:
    """Backslashes of Windows, UTF-8 that does not say so, a code page, a name twice."""

    def png(colour: int) -> bytes:
        buffer = io.BytesIO()
        Image.new("RGB", (24, 24), (colour, 0, 255)).save(buffer, "png")
        return buffer.getvalue()

    archive = tmp_path / "windows.zip"
    with zipfile.ZipFile(archive, "w") as opened, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number, name in enumerate(("a\\cat\\0.png", "a\\cat\\1.png", "b\\cat\\2.png", "a\\cat\\1.png")):
            info = zipfile.ZipInfo()
            info.filename = name
            opened.writestr(info, png(number))
    source = Source(archive)
    assert found(archive) == {"a": ["cat", "cat"], "b": ["cat"]}
    assert dict(source.read(source.names))["a/cat/1.png"]() == png(3), "the last of a name, as in unpacking"
    assert source.notes == [f"{archive}: 1 name(s) stand in it more than once: the last of each counts"]

    archive = tmp_path / "plain.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for number, name in enumerate(("a/K?che/0.png", "b/K?che/1.png")):
            opened.writestr(name, png(number))
    data = archive.read_bytes()
    archive.write_bytes(data.replace(b"/K?che/", b"/K\x81che/"))  # of code page 850
    assert "1 name(s) are in an unknown code page" not in Source(archive).notes
    assert "2 name(s) are in an unknown code page" in Source(archive).notes[0]
    archive.write_bytes(data.replace(b"K?che", "Kü".encode() + b"he"))
    assert found(archive) == {"a": ["Kühe"], "b": ["Kühe"]}


def test_names_that_cannot_be_worked_with_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path / "x", "photo/cat/0.png", "sketch > line/cat/1.png")
    with pytest.raises(UserError, match=r"domain 'sketch > line': '>' stands between query and gallery"):
        write_pack(tmp_path / "x", ["photo", "sketch > line"], tmp_path / "pack", PARAMS)
    block = DatasetParams(
        source=str(tmp_path / "x"),
        catalogue="folder",
        start={"checkpoint": "x"},
        pairs=["photo-sketch > line"],
    )
    assert any("'sketch > line'" in fault for fault in survey_source(block)[0])
    pictures(tmp_path / "y", "photo/big\ncat/0.png", "sketch/cat/1.png", f"{'long' * 25}/cat/2.png")
    faults = unusable_names(survey(Source(tmp_path / "y"), entry("folder")))
    assert [fault.split(": ")[1] for fault in faults] == [
        "a name of more than 80 bytes",
        "a control character in its name",
    ]
    pictures(tmp_path / "z", "a/0.png", "b/1.png")
    os.rename(tmp_path / "z/a/0.png", os.fsencode(tmp_path / "z/a") + b"/caf\xe9.png")
    pictures(tmp_path / "z", "a/2.png")
    _, check = write_pack(tmp_path / "z", ["a", "b"], tmp_path / "pack", PARAMS)
    assert any("its name is no Unicode" in fault for fault in check.faults)
    with tarfile.open(tmp_path / "z.tar", "w") as opened:
        opened.add(tmp_path / "z", "")
    assert "its name is no Unicode" in Source(tmp_path / "z.tar").notes[0]


def test_an_accent_is_the_same_however_it_is_written(tmp_path: Path) -> None:
    pictures(tmp_path, "e\u0301te\u0301/pe\u0301/0.png", "b/p\xe9/1.png")
    assert found(tmp_path) == {"\xe9t\xe9": ["p\xe9"], "b": ["p\xe9"]}
    start = {"checkpoint": "x"}
    block = DatasetParams(source=str(tmp_path), start=start, pairs=["b-e\u0301te\u0301"])  # type: ignore[arg-type]
    assert survey_source(block)[0] == []


def test_a_folder_that_may_not_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path, "a/cat/0.png", "b/cat/1.png", "b/dog/2.png")

    def scandir(path: Path) -> object:
        if Path(path).name == "dog":
            raise PermissionError(13, "Permission denied")
        return original(path)

    original = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"b/dog: this user may not read it"):
        write_pack(tmp_path, ["a", "b"], tmp_path / "pack", PARAMS)


def test_domains_that_show_next_to_nothing_are_told(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / "b").mkdir(exist_ok=True)
        Image.new("L", (24, 24), number).save(tmp_path / f"b/{number}.png")
    pictures(tmp_path, "a/0.png", "a/1.png")
    _, check = write_pack(tmp_path, ["a", "b"], tmp_path / "pack", PARAMS)
    (fault,) = check.faults
    assert "domain b: 4 of 4 pictures are of nearly one colour, such as b/0.png" in fault


def test_a_damaged_header_in_a_tar_is_not_its_end(tree: Path, tmp_path: Path) -> None:
    for name in ("x.tar", "x.tar.gz"):
        archive = tarred(tree, tmp_path / "whole.tar")
        with tarfile.open(archive) as opened:
            place = opened.getmembers()[5].offset
        data = bytearray(archive.read_bytes())
        data[place] ^= 1
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
        with pytest.raises(UserError, match=r"not a complete archive .*a header is damaged"):
            Source(tmp_path / name)


def test_names_with_a_dot_before_them_and_in_two_archives(tree: Path, tmp_path: Path) -> None:
    tarred(tree, tree / "x.tar", "./")
    assert all(not members for members in Source(tree).members.values()), "they are in the folders beside it"
    folder = tmp_path / "two"
    folder.mkdir()
    zipped(tree, folder / "a.zip")
    zipped(tree, folder / "b.zip")
    assert "stand in an earlier archive, too" in Source(folder).notes[0]


def test_wrapped_splits_and_other_words_for_them(tmp_path: Path) -> None:
    for number, layout in enumerate(
        (
            "{d}/images/{s}/cat/{s}.png",
            "{d}/{s}/images/cat/{s}.png",
            "{d}/{s}_set/cat/{s}.png",
            "{d}/{s}2017/cat/{s}.png",
        )
    ):
        root = tmp_path / str(number)
        pictures(root, *(layout.format(d=d, s=s) for d in "ab" for s in ("train", "val")))
        assert found(root) == {"a": ["cat", "cat"], "b": ["cat", "cat"]}, layout


def test_a_link_that_leads_to_itself_is_named(tmp_path: Path) -> None:
    pictures(tmp_path, "a/cat/0.png", "b/cat/1.png")
    (tmp_path / "a/cat/round").symlink_to("round")
    with pytest.raises(UserError, match="a/cat/round: a link that leads nowhere"):
        write_pack(tmp_path, ["a", "b"], tmp_path / "pack", PARAMS)
