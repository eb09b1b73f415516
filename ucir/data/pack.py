"""Decode once: a folder of pictures becomes one uint8 array per domain plus an index table.

Layout of a pack, ``data/packs/<dataset>/``:

- ``<domain>.u8``   the pictures, uint8 of shape (N, side, side, 3), each squashed to a square
- ``<domain>.csv``  one line a picture: slot, path, class, width, height, sha256 of the file
- ``quarantine.csv`` files left out, with the reason
- ``pack.json``     side, domains, counts, classes, fingerprint

The slots are sorted by content hash, so that neither the order of files nor the names of classes can
reach training: methods that look at slot numbers would otherwise see class after class.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from ucir.config import PackParams
from ucir.errors import UserError, nearest

INDEX_COLUMNS = ("slot", "path", "class", "width", "height", "sha256")


@dataclass(frozen=True)
class Picture:
    """One line of a domain's index."""

    slot: int
    path: str
    label: str
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class BadFile:
    """A file that was left out."""

    path: str
    reason: str


@dataclass(frozen=True)
class DomainImages:
    """What training may see of a domain: pixels and original sizes, no names and no classes."""

    name: str
    pixels_NSS3: np.ndarray
    size_N2: np.ndarray

    def __len__(self) -> int:
        return len(self.pixels_NSS3)


@dataclass(frozen=True)
class PackInfo:
    """``pack.json``."""

    side: int
    counts: dict[str, int]
    classes: list[str]
    fingerprints: dict[str, str]


def write_pack(
    source: Path,
    domains: Iterable[str],
    out: Path,
    params: PackParams,
    progress: Callable[[str, int, int], None] = lambda domain, done, total: None,
) -> tuple[PackInfo, list[BadFile]]:
    """Scan, verify and decode ``<source>/<domain>/<class>/<file>`` into ``out``.

    Args:
        source: folder with one folder per domain.
        domains: the domains to pack.
        out: folder of the pack, made when missing.
        params: the data set's ``pack`` block.
        progress: called with domain, files done, files in all.

    Returns:
        The pack's summary and the files left out.

    Raises:
        UserError: a folder is missing or empty, or a domain has too many bad files. Nothing that
            looks like a finished pack is left behind.
    """
    folders = {domain: domain_classes(source, domain) for domain in domains}
    out.mkdir(parents=True, exist_ok=True)
    (out / "pack.json").unlink(missing_ok=True)
    bad: list[BadFile] = []
    counts: dict[str, int] = {}
    fingerprints: dict[str, str] = {}
    for domain, classes in folders.items():
        files = [(path, label) for label, paths in classes.items() for path in paths]
        pictures, faults = _pack_domain(source, domain, files, out, params, partial(progress, domain))
        faults += [
            BadFile(p.relative_to(source).as_posix(), "lies beside the class folders")
            for p in sorted((source / domain).iterdir())
            if p.is_file() and not _passed_over(p)
        ]
        bad += faults
        _write_rows(out / "quarantine.csv", ("path", "reason"), [asdict(fault) for fault in bad])
        _check_share(domain, faults, len(pictures) + len(faults), params.max_bad_share, out)
        _check_classes(source / domain, classes, pictures)
        counts[domain] = len(pictures)
        fingerprints[domain] = _fingerprint(pictures, params.side)
    labels = sorted({label for classes in folders.values() for label in classes})
    info = PackInfo(params.side, counts, labels, fingerprints)
    (out / "pack.json").write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")
    return info, bad


def domain_folders(source: Path) -> list[str]:
    """Names of the domains, sorted.

    Raises:
        UserError: no such folder, or fewer than two domains.
    """
    if not source.is_dir():
        raise UserError(
            f"{source}: no such folder; put the data set there as <domain>/<class>/<file> "
            "or change the data set's 'source' in params.yaml"
        )
    found = sorted(p.name for p in source.iterdir() if p.is_dir() and not p.name.startswith("."))
    if len(found) < 2:
        raise UserError(
            f"{source}: {len(found)} domain folder(s) ({', '.join(found) or 'none'}); "
            "cross-domain retrieval needs at least two, as <domain>/<class>/<file>"
        )
    return found


def domain_classes(source: Path, domain: str) -> dict[str, list[Path]]:
    """Files of a domain by class folder, both sorted; hidden files are passed over.

    Raises:
        UserError: a folder is missing, or a class folder has no file.
    """
    folder = source / domain
    found = domain_folders(source)
    if domain not in found:
        raise UserError(f"{folder}: no such domain folder; {nearest(domain, found)}")
    classes = {
        entry.name: sorted(p for p in entry.rglob("*") if p.is_file() and not _passed_over(p))
        for entry in sorted(folder.iterdir())
        if entry.is_dir() and not entry.name.startswith(".")
    }
    if not classes:
        raise UserError(f"{folder}: no class folders; pictures are expected as <class>/<file>")
    for label, files in classes.items():
        if not files:
            raise UserError(f"{folder / label}: empty class folder; fill it or remove it")
    return classes


def _passed_over(path: Path) -> bool:
    """Hidden files and what desktops leave in folders."""
    return path.name.startswith(".") or path.name in ("Thumbs.db", "desktop.ini")


def split_pair(pair: str, domains: list[str]) -> tuple[str, str]:
    """``Art-Real`` to its two domains, which may themselves hold hyphens.

    Raises:
        UserError: not two different known domains joined by a hyphen.
    """
    for first in domains:
        second = pair.removeprefix(f"{first}-")
        if second != pair and second in domains and second != first:
            return first, second
    raise UserError(
        f"pair {pair!r} is not two different domains joined by '-'; the domains are {', '.join(domains)}"
    )


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """An image file's bytes as upright RGB: EXIF turned, transparency on white, first frame.

    Raises:
        ValueError: not an image, broken, or too large; the message is the reason.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # we have our own limit
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
    except Image.DecompressionBombError:
        raise ValueError(f"a decompression bomb: more than max_pixels = {max_pixels}") from None
    except (OSError, SyntaxError, EOFError, TypeError) as error:  # what Pillow's readers raise
        raise ValueError(f"broken image: {error}") from None


def read_info(pack: Path) -> PackInfo:
    """``pack.json`` of a finished pack.

    Raises:
        UserError: there is none, or a file of it is missing or cut off.
    """
    try:
        info = PackInfo(**json.loads((pack / "pack.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{pack}: no finished pack; run `uv run dvc repro prepare` first") from None
    for domain, count in info.counts.items():
        pixels, index = pack / f"{domain}.u8", pack / f"{domain}.csv"
        if not index.exists() or not pixels.exists() or pixels.stat().st_size != count * info.side**2 * 3:
            raise UserError(
                f"{pack}: incomplete: the files of domain {domain} are missing or cut off; "
                "run `uv run dvc repro prepare`"
            )
    return info


def open_domain(pack: Path, domain: str) -> DomainImages:
    """Memory-map a domain's pictures for training: no class reaches the caller."""
    info = read_info(pack)
    shape = (info.counts[domain], info.side, info.side, 3)
    pixels = np.memmap(pack / f"{domain}.u8", np.uint8, "r", shape=shape)
    sizes = [(picture.width, picture.height) for picture in read_index(pack, domain)]
    return DomainImages(domain, pixels, np.array(sizes, np.int64))


def read_index(pack: Path, domain: str) -> list[Picture]:
    """A domain's index, in slot order; for splits, evaluation and reports."""
    with (pack / f"{domain}.csv").open(newline="", encoding="utf-8") as file:
        return [
            Picture(
                int(row["slot"]),
                row["path"],
                row["class"],
                int(row["width"]),
                int(row["height"]),
                row["sha256"],
            )
            for row in csv.DictReader(file)
        ]


def _pack_domain(
    source: Path,
    domain: str,
    files: list[tuple[Path, str]],
    out: Path,
    params: PackParams,
    progress: Callable[[int, int], None],
) -> tuple[list[Picture], list[BadFile]]:
    def squashed(path: Path) -> tuple[np.ndarray, int, int] | str:
        try:
            image = decode_image(path.read_bytes(), params.max_pixels)
        except (ValueError, OSError) as error:
            return str(error)
        square = image.resize((params.side, params.side), Image.Resampling.BICUBIC)
        return np.asarray(square), image.width, image.height

    pictures: list[Picture] = []
    bad: list[BadFile] = []
    chunk = 256  # bounds what waits in memory
    with ThreadPoolExecutor() as pool, (out / f"{domain}.u8").open("wb") as pixels:
        hashes = list(pool.map(lambda entry: _sha256(entry[0]), files))
        ordered = sorted(zip(hashes, files, strict=True))
        for first in range(0, len(ordered), chunk):
            part = ordered[first : first + chunk]
            decoded = pool.map(squashed, [path for _, (path, _) in part])
            for (sha, (path, label)), result in zip(part, decoded, strict=True):
                name = path.relative_to(source).as_posix()
                if isinstance(result, str):
                    bad.append(BadFile(name, result))
                    continue
                array, width, height = result
                pixels.write(array.tobytes())
                pictures.append(Picture(len(pictures), name, label, width, height, sha))
            progress(min(first + chunk, len(ordered)), len(ordered))
    rows = [{**asdict(p), "class": p.label} for p in pictures]
    _write_rows(out / f"{domain}.csv", INDEX_COLUMNS, rows)
    return pictures, bad


def _check_share(domain: str, bad: list[BadFile], total: int, limit: float, out: Path) -> None:
    if len(bad) > limit * total:
        first = "; ".join(f"{fault.path}: {fault.reason}" for fault in bad[:3])
        raise UserError(
            f"domain {domain}: {len(bad)} of {total} files are bad, more than max_bad_share = {limit} "
            f"({first}{' …' if len(bad) > 3 else ''}); all are listed in {out / 'quarantine.csv'}"
        )


def _check_classes(folder: Path, classes: dict[str, list[Path]], pictures: list[Picture]) -> None:
    left = {picture.label for picture in pictures}
    for label in classes:
        if label not in left:
            raise UserError(f"{folder / label}: no readable picture is left in this class")


def _fingerprint(pictures: list[Picture], side: int) -> str:
    text = "\n".join(f"{p.sha256} {p.label}" for p in pictures)
    return hashlib.sha256(f"{side}\n{text}".encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_rows(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
