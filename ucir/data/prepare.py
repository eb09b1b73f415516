"""Decode once: a source of pictures becomes a pack, see :mod:`ucir.data.pack`; and what there is to check.

Files are known by their content: what an earlier pack or a killed attempt has decoded is not decoded again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path

import numpy as np

from ucir.config.data import DatasetParams, PackParams
from ucir.data.catalogue import FOLDER, Entry
from ucir.data.catalogue import entry as catalogue_entry
from ucir.data.checks import BadFile, Check, DomainFiles, compare, write_check, write_rows
from ucir.data.decode import DECODER, decode_image, fitted, is_flat
from ucir.data.pack import INDEX_COLUMNS, PackInfo, Picture, map_rows, read_index, read_info, split_pair
from ucir.data.source import Located, Reader, Source, Survey, missing_domains, survey, unusable_names
from ucir.data.splits import label_spaces
from ucir.devices import usable_cores
from ucir.errors import UserError

CHUNK = 256
"""Files in work at a time: bounds what waits in memory."""
EARLIER = "unfinished/earlier.json"
"""Where a finished pack's ``pack.json`` waits while it is renewed."""


def write_pack(
    source: Path,
    domains: Iterable[str],
    out: Path,
    params: PackParams,
    progress: Callable[[str, int, int], None] = lambda domain, done, total: None,
    entry: Entry | None = None,
) -> tuple[PackInfo, Check]:
    """Scan, verify and decode a source into ``out``.

    What an earlier pack in ``out`` or a killed attempt has decoded is not decoded again: files are known
    by their content.

    Args:
        source: folder or archive, see :mod:`ucir.data.source`.
        domains: the domains to pack.
        out: folder of the pack, made when missing.
        params: the data set's ``pack`` block.
        progress: called with domain, files done, files in all.
        entry: the data set's entry in the catalogue; None = ``folder``.

    Returns:
        The pack's summary and the result of the checks.

    Raises:
        UserError: a domain is missing, a class folder is empty or holds no readable picture, a domain has
            too many bad files, or the disk is too full. Nothing that looks like a finished pack is left
            behind, and nothing that was decoded is lost.
    """
    entry = entry or catalogue_entry(FOLDER)
    opened = Source(source)
    files = survey(opened, entry)
    domains = list(domains)
    if faults := unusable_names(files):
        raise UserError("; ".join(faults))
    _check_two(opened.root, files)
    if faults := name_faults(opened, files, domains, entry):
        raise UserError("; ".join(faults))
    out.mkdir(parents=True, exist_ok=True)
    _check_disk(out, sum(len(files.domains[domain]) for domain in domains), params)
    old = _earlier(out, params)
    (out / "unfinished").mkdir(exist_ok=True)
    if (out / "pack.json").exists():  # from here on no finished pack is there, but what it holds is of use
        (out / "pack.json").replace(out / EARLIER)
    stores = {}
    results = {}
    for domain in domains:
        stores[domain] = _Store(out, domain, params, old)
        results[domain] = _read_domain(opened, files.domains[domain], params, stores[domain], progress)
    check = compare(files, results, domains, entry)
    write_check(check, out / "check")
    for domain in domains:
        bad = _bad_of(check, domain)
        total = len(bad) + len(results[domain].good)
        if len(bad) > params.max_bad_share * total:
            fault = _too_many_bad(domain, bad, total, params.max_bad_share)
            raise UserError(f"{fault}; all are listed in {out / 'check/quarantine.csv'}")
    _check_classes(check, opened.root)
    pictures = {domain: _in_slots(results[domain]) for domain in domains}
    finished = [path for domain in domains for path in stores[domain].write_out(pictures[domain])]
    (out / EARLIER).unlink(missing_ok=True)
    for path in finished:
        path.replace(path.with_suffix(""))
    labels = sorted({p.label for of_domain in pictures.values() for p in of_domain} - {""})
    info = PackInfo(
        params.side,
        params.fit,
        DECODER,
        {domain: len(of_domain) for domain, of_domain in pictures.items()},
        labels,
        {domain: _fingerprint(of_domain, params) for domain, of_domain in pictures.items()},
    )
    (out / "pack.json").write_text(json.dumps(asdict(info), indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(out / "unfinished", ignore_errors=True)
    wanted = {f"{domain}{ending}" for domain in domains for ending in (".u8", ".csv")}
    for path in (*out.glob("*.u8"), *out.glob("*.csv")):  # of domains that are no longer wanted
        if path.name not in wanted:
            path.unlink()
    return info, check


def prepared_domains(block: DatasetParams) -> list[str]:
    """The domains that a data set's pairs name.

    Raises:
        UserError: no source, or a pair of domains that the data set does not have.
    """
    opened = Source(Path(block.source))
    return _wanted(block, survey(opened, block.entry), opened.root)


def survey_source(block: DatasetParams) -> tuple[list[str], dict[str, Counter[str]]]:
    """What keeps a data set from being prepared and trained, told by names alone, without reading pictures;
    and files of each domain by class folder: those in none have an empty name.

    Raises:
        UserError: there is no source, or its archives are broken or hostile.
    """
    opened = Source(Path(block.source))
    files = survey(opened, block.entry)
    faults = _source_faults(block, opened, files)
    try:
        return faults, _counts(files, _wanted(block, files, opened.root))
    except UserError:  # it is among the faults
        return faults, {}


def name_faults(source: Source, files: Survey, domains: list[str], entry: Entry) -> list[str]:
    """What keeps these domains from being prepared, told by names alone, one line each.

    Args:
        source, files: where the pictures are, and what lies there.
        domains: our names of the wanted ones.
        entry: the data set's entry in the catalogue.
    """
    root = source.root
    faults = missing_domains(files, domains, entry, root)
    faults += [f"{root / name}: empty class folder; fill it or remove it" for name in files.empty]
    faults += [f"{root / name}: this user may not read it: `chmod +rx` or move it" for name in source.closed]
    faults += [f"{root / name}: a link that leads nowhere; remove it" for name in files.dangling]
    faults += [
        f"{root}: domain {domain}: no picture"
        for domain in domains
        if domain in files.domains and not files.domains[domain]
    ]
    return faults


def _counts(files: Survey, domains: list[str]) -> dict[str, Counter[str]]:
    return {domain: Counter(file.label for file in files.domains.get(domain, [])) for domain in domains}


def decoding_pace(block: DatasetParams, sample: int = 24) -> float:
    """Seconds that reading and decoding a picture takes here, measured on some of them, on all cores.

    Raises:
        UserError: there is no source, or its archives are broken or hostile.
    """
    opened = Source(Path(block.source))
    files = [file for of_domain in survey(opened, block.entry).domains.values() for file in of_domain]
    chosen = files[:: max(1, len(files) // sample)]
    began = time.perf_counter()
    _read_domain(opened, chosen, block.pack, None, lambda domain, done, total: None)
    return (time.perf_counter() - began) / max(1, len(chosen))


def check_source(
    block: DatasetParams,
    progress: Callable[[str, int, int], None] = lambda domain, done, total: None,
) -> Check:
    """Read and decode every picture as :func:`write_pack` would, and write nothing.

    What would stop prepare is among the faults; all else is checked all the same.

    Raises:
        UserError: there is no source, or its archives are broken or hostile.
    """
    opened = Source(Path(block.source))
    files = survey(opened, block.entry)
    wanted = list(block.entry.domains) or list(files.domains)
    there = [domain for domain in wanted if files.domains.get(domain)]
    results = {
        domain: _read_domain(opened, files.domains[domain], block.pack, None, progress) for domain in there
    }
    check = compare(files, results, there, block.entry)
    faults = [*_source_faults(block, opened, files), *check.faults]
    for domain in there:
        bad, total = _bad_of(check, domain), len(files.domains[domain])
        if len(bad) > block.pack.max_bad_share * total:
            faults.append(_too_many_bad(domain, bad, total, block.pack.max_bad_share))
    return replace(check, faults=list(dict.fromkeys(faults)))


def _source_faults(block: DatasetParams, opened: Source, files: Survey) -> list[str]:
    if faults := unusable_names(files):
        return faults
    wanted = list(block.entry.domains)
    try:
        wanted = _wanted(block, files, opened.root)
        if block.split.shared:
            label_spaces("partial", [*_counts(files, wanted).values()], block.split)
    except UserError as error:
        faults.append(str(error))
    return [*faults, *name_faults(opened, files, wanted, block.entry)]


def _wanted(block: DatasetParams, files: Survey, root: Path) -> list[str]:
    known = list(block.entry.domains)
    if not known:
        _check_two(root, files)
        known = list(files.domains)
    return list(dict.fromkeys(d for pair in block.pairs for d in split_pair(pair, known)))


class _Store:
    """The decoded pictures of a domain: those of an earlier pack, and the journal of this attempt.

    The journal outlives a kill: pixels are appended first, then their line, and on reopening whatever has
    no whole line is cut off.
    """

    def __init__(self, out: Path, domain: str, params: PackParams, old: PackInfo | None) -> None:
        self.out, self.domain, self.side = out, domain, params.side
        self.row_bytes = params.side**2 * 3
        folder = out / "unfinished"
        base = f"{domain}-{params.side}-{params.fit}-{DECODER}"
        self.known: dict[str, tuple[bool, int, int, int]] = {}  # in the earlier pack? row, width, height
        self.old_rows: np.ndarray | None = None
        if old is not None and domain in old.counts:
            self.old_rows = map_rows(out / f"{domain}.u8", old.counts[domain], params.side)
            for p in read_index(out, domain):
                self.known[p.sha256] = (True, p.slot, p.width, p.height)
        self.lines_path, pixels_path = folder / f"{base}.csv", folder / f"{base}.u8"
        lines = self._whole_lines(pixels_path)
        for row, (sha, width, height) in enumerate(lines):
            self.known[sha] = (False, row, width, height)
        self.count = len(lines)
        self.lines_path.write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
        self.pixels_path = pixels_path
        self.pixels = pixels_path.open("ab")
        self.pixels.truncate(self.count * self.row_bytes)
        self.lines = self.lines_path.open("a")

    def _whole_lines(self, pixels: Path) -> list[tuple[str, int, int]]:
        if not self.lines_path.exists() or not pixels.exists():
            return []
        whole = self.lines_path.read_text().rpartition("\n")[0].splitlines()
        whole = whole[: pixels.stat().st_size // self.row_bytes]
        parts = [line.split(",") for line in whole]
        return [(sha, int(width), int(height)) for sha, width, height in parts]

    def add(self, new: list[tuple[str, np.ndarray, int, int]]) -> None:
        """Append decoded pictures: content hash, pixels, width, height."""
        for _, square, _, _ in new:
            self.pixels.write(square.tobytes())
        self.pixels.flush()
        for sha, _, width, height in new:
            self.known[sha] = (False, self.count, width, height)
            self.count += 1
            self.lines.write(f"{sha},{width},{height}\n")
        self.lines.flush()

    def write_out(self, pictures: list[Picture]) -> list[Path]:
        """Write the domain's files of the pack beside their places; what is there in this order stays."""
        self.pixels.close()
        self.lines.close()
        index = self.out / f"{self.domain}.csv.unfinished"
        lines = [{**asdict(p), "class": p.label} for p in pictures]
        write_rows(index, INDEX_COLUMNS, lines)
        rows = [self.known[p.sha256][:2] for p in pictures]
        if self.old_rows is not None and rows == [(True, row) for row in range(len(self.old_rows))]:
            return [index]
        new_rows = map_rows(self.pixels_path, self.count, self.side)
        pixels = self.out / f"{self.domain}.u8.unfinished"
        with pixels.open("wb") as file:
            for earlier, row in rows:
                held = self.old_rows if earlier else new_rows
                assert held is not None
                file.write(held[row].tobytes())
        return [pixels, index]


def _earlier(out: Path, params: PackParams) -> PackInfo | None:
    """A finished pack of the same size that lies there."""
    for name in ("pack.json", EARLIER):
        with contextlib.suppress(UserError):
            info = read_info(out, name)
            if (info.side, info.fit, info.decoder) == (params.side, params.fit, DECODER):
                return info
    return None


def _read_domain(
    source: Source,
    files: list[Located],
    params: PackParams,
    store: _Store | None,
    progress: Callable[[str, int, int], None],
) -> DomainFiles:
    """Read, hash and, where its content is new, decode each file, on all cores."""
    by_path = {file.path: file for file in files}
    good: list[tuple[Located, str, int, int]] = []
    bad: list[BadFile] = []
    bad_labels: Counter[str] = Counter()
    flat: list[str] = []
    known: Mapping[str, tuple[bool, int, int, int]] = store.known if store else {}

    def work(item: tuple[str, Reader]) -> tuple[str, str, tuple[np.ndarray | None, int, int] | str]:
        """Name, content hash, and pixels, width and height; or why the file is left out."""
        name, read = item
        try:
            data = read()
        except OSError as error:
            return name, "", error.strerror or str(error)
        sha = hashlib.sha256(data).hexdigest()
        if sha in known:
            return name, sha, (None, *known[sha][2:])
        try:
            image = decode_image(data, params.max_pixels)
        except ValueError as error:
            return name, sha, str(error)
        if is_flat(image):
            flat.append(name)
        square = fitted(image, params) if store else None
        return name, sha, (square, image.width, image.height)

    done = decoded = 0
    with ThreadPoolExecutor(usable_cores()) as pool:  # Pillow works outside the interpreter's lock
        items = source.read(by_path)
        while chunk := list(islice(items, CHUNK)):
            new: dict[str, tuple[str, np.ndarray, int, int]] = {}
            for name, sha, result in pool.map(work, chunk):
                file = by_path[name]
                if isinstance(result, str):
                    bad.append(BadFile(file.domain, name, result))
                    bad_labels[file.label] += 1
                    continue
                square, width, height = result
                good.append((file, sha, width, height))
                if square is not None:
                    new.setdefault(sha, (sha, square, width, height))
            if store:
                store.add(list(new.values()))
            decoded += len(new)
            done += len(chunk)
            progress(files[0].domain, done, len(files))
    return DomainFiles(good, bad, bad_labels, decoded, sorted(flat))


def _in_slots(result: DomainFiles) -> list[Picture]:
    ordered = sorted(result.good, key=lambda entry: (entry[1], entry[0].path))
    return [
        Picture(slot, file.path, file.label, width, height, sha)
        for slot, (file, sha, width, height) in enumerate(ordered)
    ]


def _check_two(root: Path, files: Survey) -> None:
    if len(files.domains) < 2:
        there = ", ".join(files.domains) or "none"
        raise UserError(
            f"{root}: {len(files.domains)} domain folder(s) ({there}); cross-domain retrieval needs "
            "at least two, as <domain>/<class>/<file> or <domain>/<file>"
            + "".join(f"; {note}" for note in files.notes[:3])
        )


def _check_disk(out: Path, files: int, params: PackParams) -> None:
    """The journal and the finished pack stand side by side for a moment."""
    needed = 2 * files * params.side**2 * 3
    there = sum(path.stat().st_size for path in out.rglob("*.u8"))
    free = shutil.disk_usage(out).free
    if needed - there > free:
        raise UserError(
            f"{out}: {files} pictures at {params.side} px need up to {needed / 2**30:.1f} GiB while they are "
            f"packed, but {free / 2**30:.1f} GiB are free: make room, or set a smaller pack.side"
        )


def _bad_of(check: Check, domain: str) -> list[BadFile]:
    return [file for file in check.bad if file.domain == domain]


def _too_many_bad(domain: str, bad: list[BadFile], total: int, limit: float) -> str:
    first = "; ".join(f"{fault.path}: {fault.reason}" for fault in bad[:3])
    return (
        f"domain {domain}: {len(bad)} of {total} files are bad, more than pack.max_bad_share = {limit} "
        f"({first}{' …' if len(bad) > 3 else ''}): repair or remove them, or allow more"
    )


def _check_classes(check: Check, root: Path) -> None:
    for line in check.counts:
        if line.label and line.left_out and not line.found:
            raise UserError(f"{root}: {line.domain}/{line.label}: no readable picture is left in this class")


def _fingerprint(pictures: list[Picture], params: PackParams) -> str:
    text = "\n".join(f"{p.sha256} {p.label}" for p in pictures)
    return hashlib.sha256(f"{params.side} {params.fit}\n{text}".encode()).hexdigest()[:16]
