"""What there is to say of a source of pictures: found against expected, duplicates, files left out."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ucir.data.catalogue import Entry
from ucir.data.source import Located, Survey

BESIDE = "lies beside the class folders"
FLAT_SHARE = 0.2
"""Of a domain's pictures may be of one colour before it is worth a line."""
SHOWN = 20
"""Lines of a kind that are printed; the files have them all."""


@dataclass(frozen=True)
class BadFile:
    """A file that was left out."""

    domain: str
    path: str
    reason: str


@dataclass(frozen=True)
class ClassCount:
    """One line of ``counts.csv``."""

    domain: str
    label: str
    found: int
    """Good pictures."""
    left_out: int
    expected: int | None
    """As published; None = not known."""


@dataclass(frozen=True)
class Check:
    """What there is to say of a source."""

    counts: list[ClassCount]
    bad: list[BadFile]
    duplicates: list[tuple[Located, ...]]
    """Files with the same content."""
    faults: list[str]
    """What differs from the catalogue, is missing or doubtful; one line each."""
    decoded: int
    """Pictures that no earlier pack or attempt had."""


@dataclass(frozen=True)
class DomainFiles:
    """A domain's files, read and decoded."""

    good: list[tuple[Located, str, int, int]]
    """File, content hash, width, height."""
    bad: list[BadFile]
    bad_labels: Counter[str]
    decoded: int
    """Pictures that no earlier pack or attempt had."""
    flat: list[str]
    """Those of them that show next to nothing."""


def compare(files: Survey, results: Mapping[str, DomainFiles], domains: list[str], entry: Entry) -> Check:
    """Compare what was found and read with the catalogue.

    Args:
        files: the source's files by name.
        results: the domains that were read.
        domains: their names, in order.
        entry: the data set's entry.
    """
    counts: list[ClassCount] = []
    faults: list[str] = []
    bad = [BadFile(stray.domain, stray.path, BESIDE) for stray in files.strays if stray.domain in domains]
    all_labels = {file.label for domain in domains for file in files.domains[domain]} - {""}
    all_labels |= set(entry.class_names())
    for domain in domains:
        result = results[domain]
        bad += result.bad
        good = Counter(file.label for file, *_ in result.good)
        labels = sorted(all_labels) if set(good) - {""} else [""]
        for label in labels:
            counts.append(
                ClassCount(
                    domain, label, good[label], result.bad_labels[label], entry.expected(domain, label)
                )
            )
            line = counts[-1]
            if label and not line.found:
                printed = f" ({line.expected} expected)" if line.expected else ""
                faults.append(f"domain {domain}: no picture of class {label}{printed}")
            elif line.expected is not None and line.found != line.expected:
                faults.append(
                    f"domain {domain}: class {label} has {line.found} pictures, {line.expected} expected"
                )
            if entry.counts and label and label not in entry.class_names():
                faults.append(f"domain {domain}: class {label} is not one of {entry.title}'s")
        if len(flat := result.flat) > FLAT_SHARE * len(result.good):
            faults.append(
                f"domain {domain}: {len(flat)} of {len(result.good)} pictures are of nearly one colour, "
                f"such as {flat[0]}: are their values what they seem?"
            )
    faults += [f"folder {name} is no domain of {entry.title}: left out" for name in files.unknown]
    faults += files.notes
    by_content: dict[str, list[Located]] = {}
    for domain in domains:
        for file, sha, *_ in results[domain].good:
            by_content.setdefault(sha, []).append(file)
    duplicates = [tuple(same) for same in by_content.values() if len(same) > 1]
    for same in duplicates:
        paths = " = ".join(file.path for file in same)
        if len({file.domain for file in same}) > 1:
            faults.append(f"the same picture in two domains, which makes retrieval too easy: {paths}")
        elif len({file.label for file in same}) > 1:
            faults.append(f"the same picture in two classes: {paths}")
    return Check(counts, bad, duplicates, faults, sum(results[domain].decoded for domain in domains))


def table(check: Check) -> str:
    """For a terminal: a line a domain, then everything that differs or is doubtful."""
    lines = []
    for domain in dict.fromkeys(line.domain for line in check.counts):
        of_domain = [line for line in check.counts if line.domain == domain]
        classes = sum(1 for line in of_domain if line.label and line.found)
        known = [line.expected for line in of_domain if line.expected is not None]
        text = f"{sum(line.found for line in of_domain):>8} pictures"
        text += f", {classes} classes" if classes else ", no labels"
        text += f", {sum(known)} expected" if len(known) == len(of_domain) else ""
        left_out = sum(line.left_out for line in of_domain)
        text += f", {left_out} left out" if left_out else ""
        lines.append(f"  {domain:<16}{text}")
    lines += _some([f"  LOOK  {fault}" for fault in check.faults], "check/counts.csv")
    lines += _some(
        [f"  LOOK  left out {bad.path}: {bad.reason}" for bad in check.bad], "check/quarantine.csv"
    )
    twins = [same for same in check.duplicates if len({(file.domain, file.label) for file in same}) == 1]
    same = [f"  same content: {' = '.join(file.path for file in files)}" for files in twins]
    lines += _some(same, "check/duplicates.csv")
    return "\n".join(lines)


def _some(lines: Sequence[str], file: str) -> list[str]:
    more = len(lines) - SHOWN
    return [*lines[:SHOWN], *([f"        … and {more} more, see {file}"] if more > 0 else [])]


def write_check(check: Check, out: Path) -> None:
    """``counts.csv``, ``duplicates.csv`` and ``quarantine.csv`` in ``out``."""
    out.mkdir(exist_ok=True)
    lines = [{**asdict(line), "class": line.label} for line in check.counts]
    write_rows(out / "counts.csv", ("domain", "class", "found", "left_out", "expected"), lines)
    write_rows(out / "quarantine.csv", ("domain", "path", "reason"), [asdict(fault) for fault in check.bad])
    rows = [
        {"group": number, "domain": file.domain, "path": file.path}
        for number, same in enumerate(check.duplicates)
        for file in same
    ]
    write_rows(out / "duplicates.csv", ("group", "domain", "path"), rows)


def write_rows(path: Path, columns: tuple[str, ...], rows: list[dict[str, Any]]) -> None:
    """A CSV file with a header; keys that are not among the columns are left out."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
