"""Where pictures come from: a folder tree, or zip and tar archives read in place, never copied.

A source is a folder or an archive. Archives that lie directly in a source folder count as the folders
that they would unpack to. Nothing is ever written under a name that an archive gives; names that would
lead out of it, links, bombs and broken archives are refused before anything is read.
"""

from __future__ import annotations

import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ucir.data.catalogue import Entry
from ucir.errors import UserError, nearest

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz")
MAX_MEMBERS = 5_000_000
MAX_MEMBER_BYTES = 2**30
MAX_ARCHIVE_BYTES = 2**40
NO_PICTURES = (
    ".txt",
    ".md",
    ".csv",
    ".tsv",
    ".json",
    ".xml",
    ".yaml",
    ".yml",
    ".html",
    ".pdf",
    ".log",
    ".py",
)
"""Files that people keep beside pictures: passed over."""
PASSED_LEVELS = ("images", "train")
"""Office-31 and the official UCDIR code put such a folder between domain and classes."""

Reader = Callable[[], bytes]


@dataclass(frozen=True)
class Located:
    """A file that should be a picture."""

    path: str
    """Below the source, with '/'; inside an archive, its member's name."""
    domain: str
    label: str
    """Class; empty where the domain has no class folders."""


@dataclass(frozen=True)
class Survey:
    """What a source holds, by name alone."""

    domains: dict[str, list[Located]]
    """By our name of the domain, sorted by path."""
    strays: list[Located]
    """Files beside class folders, which belong to no class."""
    unknown: list[str]
    """Folders that are no domain of the catalogue's entry."""
    empty: list[str]
    """Class folders without a file."""
    dangling: list[str]
    """Links that lead nowhere."""
    passed_over: int
    """Files of classes that the data set does not take, or that its lists do not name."""


def is_archive(path: Path) -> bool:
    """By its name."""
    return path.name.lower().endswith(ENDINGS)


@dataclass
class Source:
    """The files of a source, to be listed and read.

    Args:
        root: the folder or archive.

    Raises:
        UserError: nothing there, or an archive that is broken or hostile; names archive and member.
    """

    root: Path
    archives: list[Path] = field(init=False)
    empty: list[str] = field(init=False, default_factory=list)
    """Folders of a tree that hold no file at any depth."""
    dangling: list[str] = field(init=False, default_factory=list)
    """Links of a tree that lead nowhere; DVC cannot read a folder with one."""
    tree: list[str] = field(init=False, default_factory=list)
    members: dict[Path, list[str]] = field(init=False)

    def __post_init__(self) -> None:
        if self.root.is_dir():
            self.archives = sorted(p for p in self.root.iterdir() if p.is_file() and is_archive(p))
            self._walk("", set())
        elif self.root.is_file() and is_archive(self.root):
            self.archives = [self.root]
        elif self.root.is_file():
            raise UserError(f"{self.root}: neither a folder nor one of {', '.join(ENDINGS)}")
        else:
            raise UserError(
                f"{self.root}: no such folder; put the data set there as <domain>/<class>/<file>, or an "
                "archive of it, or change the data set's 'source' in params.yaml"
            )
        self.members = {}
        known = set(self.tree)  # an archive may lie beside the folders that it was unpacked to
        for archive in self.archives:
            self.members[archive] = [name for name in _checked_members(archive) if name not in known]
            known.update(self.members[archive])

    @property
    def names(self) -> list[str]:
        """All files, less hidden ones and what desktops leave behind."""
        inside = [name for members in self.members.values() for name in members]
        return [*self.tree, *inside]

    def read(self, wanted: Collection[str]) -> Iterator[tuple[str, Reader]]:
        """Each wanted file once: its name, and a function that reads it and may run in any thread.

        Only the members of a compressed tar are read here and now, in its own order: it knows no other.
        """
        wanted = set(wanted)
        for name in self.tree:
            if name in wanted:
                yield name, (self.root / name).read_bytes
        for archive, members in self.members.items():
            chosen = [name for name in members if name in wanted]
            if not chosen:
                continue
            if _is_zip(archive):
                opened = zipfile.ZipFile(archive)  # closed with the last reader, which may outlive this loop
                for name in chosen:
                    yield name, _member_reader(opened, name)
            else:
                yield from _read_tar(archive, set(chosen))

    def _walk(self, folder: str, above: set[str]) -> bool:
        """Collect a folder's files; False when there is none at any depth. Links may not lead round."""
        real = os.path.realpath(self.root / folder)
        if real in above:
            return False
        any_file = False
        for item in sorted(os.scandir(self.root / folder), key=lambda item: item.name):
            name = f"{folder}/{item.name}" if folder else item.name
            if _hidden(item.name):
                continue
            if item.is_dir():
                if self._walk(name, {*above, real}):
                    any_file = True
                else:
                    self.empty.append(name)
            elif item.is_file() and (folder or not is_archive(Path(item.name))):
                self.tree.append(name)
                any_file = True
            elif item.is_symlink() and not item.is_file():
                self.dangling.append(name)
        return any_file


def survey(source: Source, entry: Entry) -> Survey:
    """Sort a source's files into domains and classes, by their names.

    Known data sets may be wrapped in one more folder, and their folders spelt in any of the ways of the
    catalogue; in all others the first folder is the domain and the second, if there is one, the class.
    """
    split = [(name, tuple(PurePosixPath(name).parts)) for name in source.names]
    wrapped = bool(entry.domains) or source.root.is_file()
    while wrapped and (top := {parts[0] for _, parts in split if len(parts) > 1}) and len(top) == 1:
        (folder,) = top
        deep = max(len(parts) for _, parts in split)
        if entry.domain_of(folder) or deep < (3 if entry.domains else 4):
            break
        split = [(name, parts[1:]) for name, parts in split if len(parts) > 1]
    by_domain: dict[str, list[tuple[str, tuple[str, ...]]]] = {}
    unknown: list[str] = []
    for name, parts in split:
        if len(parts) < 2:
            continue  # beside the domains: read-me files, lists
        domain = entry.domain_of(parts[0]) if entry.domains else parts[0]
        if domain is None:
            unknown.append(parts[0])
        else:
            by_domain.setdefault(domain, []).append((name, parts[1:]))
    listed = _listed(source, entry)
    domains: dict[str, list[Located]] = {}
    strays: list[Located] = []
    passed_over = 0
    for domain, files in by_domain.items():
        files = _less_a_passed_level(files)
        flat = all(len(parts) == 1 for _, parts in files)
        kept = domains.setdefault(domain, [])
        for name, parts in sorted(files):
            if parts[-1].lower().endswith(NO_PICTURES):
                passed_over += 1
            elif flat:
                kept.append(Located(name, domain, ""))
            elif len(parts) == 1:
                strays.append(Located(name, domain, ""))
            else:
                label = entry.class_of(parts[0])
                foreign = label is None and entry.subset
                if foreign or (domain in listed and "/".join(parts[-2:]) not in listed[domain]):
                    passed_over += 1
                else:
                    kept.append(Located(name, domain, label or parts[0]))
    empty = [name for name in source.empty if name.count("/") == 1]
    order = list(entry.domains) or sorted(domains)
    return Survey(
        {domain: domains[domain] for domain in order if domain in domains},
        strays,
        sorted(set(unknown)),
        empty,
        source.dangling,
        passed_over,
    )


def missing_domains(files: Survey, wanted: Collection[str], entry: Entry, root: Path) -> list[str]:
    """One line for each wanted domain that is not there, with the folder that may be meant."""
    faults = []
    for domain in wanted:
        if domain not in files.domains:
            others = files.unknown if entry.domains else files.domains
            spelt = " or ".join(entry.domains.get(domain, (domain,)))
            hint = nearest(domain, others) if others else "there is none"
            faults.append(f"{root}: no folder of domain {domain} ({spelt}); {hint}")
    return faults


def _less_a_passed_level(files: list[tuple[str, tuple[str, ...]]]) -> list[tuple[str, tuple[str, ...]]]:
    """Drop a folder that stands between the domain and its classes."""
    folders = {parts[0] for _, parts in files if len(parts) > 1}
    deep = [parts for _, parts in files if len(parts) > 1]
    if len(folders) == 1 and folders <= set(PASSED_LEVELS) and all(len(parts) > 2 for parts in deep):
        return [(name, parts[1:]) for name, parts in files if len(parts) > 1]
    return files


def _listed(source: Source, entry: Entry) -> dict[str, set[str]]:
    """``<class>/<file>`` of the official train and test lists by domain, where both lie in the source."""
    listed: dict[str, set[str]] = {}
    for domain in entry.domains:
        lists = [f"{domain}_{part}.txt" for part in ("train", "test")]
        if all(name in {file.name for file in entry.files} and name in source.tree for name in lists):
            lines = [line for name in lists for line in (source.root / name).read_text("utf-8").splitlines()]
            listed[domain] = {
                "/".join(line.rsplit(" ", 1)[0].split("/")[-2:]) for line in lines if line.strip()
            }
    return listed


def _is_zip(archive: Path) -> bool:
    return archive.name.lower().endswith(".zip")


def _hidden(name: str) -> bool:
    """Hidden files and what desktops leave in folders."""
    return name.startswith(".") or name in ("Thumbs.db", "desktop.ini", "__MACOSX")


def _checked_members(archive: Path) -> list[str]:
    """Names of an archive's files.

    Raises:
        UserError: not a complete archive; a name that leads out of it, a link, too many or too large
            members.
    """
    names: list[str] = []
    total = 0
    try:
        for name, size, kind in _listing(archive):
            path = PurePosixPath(name.replace("\\", "/"))
            if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
                raise UserError(f"{archive}: refused: member {name!r} leads out of the archive")
            if kind == "other":
                raise UserError(f"{archive}: refused: member {name!r} is a link or a device")
            if kind == "folder" or any(map(_hidden, path.parts)):
                continue
            total += size
            names.append(name)
            if size > MAX_MEMBER_BYTES:
                raise UserError(f"{archive}: refused: member {name!r} unpacks to {size} bytes")
            if len(names) > MAX_MEMBERS or total > MAX_ARCHIVE_BYTES:
                raise UserError(
                    f"{archive}: refused: more than {MAX_MEMBERS} files or {MAX_ARCHIVE_BYTES} bytes"
                )
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, OSError) as error:
        raise UserError(f"{archive}: not a complete archive ({error}): delete it and get it again") from None
    return names


def _listing(archive: Path) -> Iterator[tuple[str, int, str]]:
    """Name, unpacked size and kind of each member."""
    if _is_zip(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                mode = info.external_attr >> 28  # the file type of Unix, 0 where another system packed
                kind = "folder" if info.is_dir() else "file" if mode in (0, 8) else "other"
                if info.flag_bits & 1:
                    raise UserError(f"{archive}: refused: member {info.filename!r} is encrypted")
                yield info.filename, info.file_size, kind
    else:
        with tarfile.open(archive) as opened_tar:
            for member in opened_tar:
                kind = "folder" if member.isdir() else "file" if member.isreg() else "other"
                yield member.name, member.size, kind
            whole = archive.name.lower().endswith("gz") or archive.stat().st_size >= opened_tar.offset + 512
        if not whole:  # tarfile takes the end of the file for the end of the archive
            raise tarfile.ReadError("its end mark is missing")


def _member_reader(opened: zipfile.ZipFile, name: str) -> Reader:
    def read() -> bytes:
        try:
            return opened.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise OSError(f"broken in its archive: {error}") from None

    return read


def _read_tar(archive: Path, wanted: set[str]) -> Iterator[tuple[str, Reader]]:
    with tarfile.open(archive) as opened:
        for member in opened:
            if member.name in wanted and member.isreg():
                file = opened.extractfile(member)
                assert file is not None
                data = file.read()
                yield member.name, lambda data=data: data  # type: ignore[misc]
