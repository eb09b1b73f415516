"""Where pictures come from: a folder tree, or zip and tar archives read in place, never copied.

A source is a folder or an archive. Archives that lie directly in a source folder count as the folders
that they would unpack to. Nothing is ever written under a name that an archive gives; names that would
lead out of it, links, bombs and broken archives are refused before anything is read.
"""

from __future__ import annotations

import os
import re
import tarfile
import unicodedata
import zipfile
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from ucir.data.catalogue import Entry
from ucir.errors import UserError, nearest

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
UNREAD = (
    ".7z",
    ".rar",
    ".zst",
    ".tzst",
    ".lz4",
    ".lzma",
    ".gz",
    ".bz2",
    ".xz",
    ".cab",
    ".iso",
    ".dmg",
    ".001",
    ".z01",
)
"""Endings of archives that are not read."""
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
    ".ini",
    ".db",
    ".xmp",
    ".aae",
    ".thm",
    ".lnk",
    ".url",
)
"""Files that people keep beside pictures: passed over."""
LITTER = {
    *("thumbs.db", "ehthumbs.db", "ehthumbs_vista.db", "desktop.ini", "$recycle.bin", "recycler"),  # Windows
    *("system volume information", "found.000"),
    *("__macosx", "icon\r", "network trash folder", "temporary items"),  # macOS
    *("@eadir", "@tmp", "#recycle", "#snapshot", "@sharebin"),  # Synology
    *("@recycle", "@recently-snapshot", "@transcode"),  # QNAP
    *("thumbnails", "thumbs", "_thumbs", "_thumb", "wpthumb"),
    *("lost+found", "__pycache__", "picasa.ini", "zbthumbnail.info", "_gsdata_", "sync.ffs_db"),
}
"""What systems and programs leave in folders, in lower case."""
LITTER_ENDINGS = (":zone.identifier", "@synoeastream", "@synoresource", ".lrdata", ".index")
"""The last is our own index of pictures beside it."""
SPLIT = re.compile(
    r"(images?|imgs?|data|dataset|pictures|train(ing)?|test(ing)?|val(id(ation)?)?|dev|eval|query|gallery|probe"
    r"|fold|split)[-_ ]?(set|images|\d{0,4})"
)
"""Folders between domain and classes that are no classes: Office-31 has one, and people split their data."""
LONGEST_NAME = 80
"""Bytes of a domain's name: two of them and more stand in the name of a run's folder."""

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
    notes: list[str]
    """What is doubtful, one line each."""


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
    closed: list[str] = field(init=False, default_factory=list)
    """Folders of a tree that may not be read."""
    notes: list[str] = field(init=False, default_factory=list)
    """What is left out or doubtful, one line each."""
    tree: list[str] = field(init=False, default_factory=list)
    members: dict[Path, dict[str, int]] = field(init=False)
    """By archive: a member's name with '/', and its number; of several the last, as in unpacking."""

    def __post_init__(self) -> None:
        if self.root.is_dir():
            self.archives = sorted(p for p in self.root.iterdir() if p.is_file() and is_archive(p))
            self._walk("", set())
            self.notes += [
                f"{self.root / name}: an archive of a kind that is not read: unpack it, or make it a .zip"
                for name in self.tree
                if "/" not in name and name.lower().endswith(UNREAD)
            ]
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
            there = _checked_members(archive, self.notes)
            self.members[archive] = {name: number for name, number in there.items() if name not in known}
            if again := len(known & there.keys() - set(self.tree)):
                self.notes.append(
                    f"{archive}: {again} name(s) stand in an earlier archive, too, which counts"
                )
            known.update(there)

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
            chosen = {number: name for name, number in members.items() if name in wanted}
            if not chosen:
                continue
            if _is_zip(archive):
                opened = zipfile.ZipFile(archive)  # closed with the last reader, which may outlive this loop
                infos = opened.infolist()
                for number, name in chosen.items():
                    yield name, _member_reader(opened, infos[number])
            else:
                yield from _read_tar(archive, chosen)

    def _walk(self, folder: str, above: set[str]) -> bool:
        """Collect a folder's files; False when there is none at any depth. Links may not lead round."""
        real = os.path.realpath(self.root / folder)
        if real in above:
            return False
        any_file = False
        try:
            items = sorted(os.scandir(self.root / folder), key=lambda item: item.name)
        except PermissionError:
            self.closed.append(folder or ".")
            return True
        for item in items:
            name = f"{folder}/{item.name}" if folder else item.name
            if _hidden(item.name):
                continue
            if not _is_text(item.name):
                self.notes.append(f"{self.root}: left out {name!a}: its name is no Unicode; rename it")
                continue
            try:
                is_folder = item.is_dir()
            except OSError:  # a link that leads to itself
                self.dangling.append(name)
                continue
            if is_folder:
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


def domain_of_folder(name: str) -> str:
    """What a folder of pictures is called as a domain: letters of any script and digits; a pair's name joins
    two by "-"."""
    return re.sub(r"[^\w.]+", "_", unicodedata.normalize("NFC", name)).strip("._") or "pictures"


def survey(source: Source, entry: Entry) -> Survey:
    """Sort a source's files into domains and classes, by their names.

    Known data sets may be wrapped in one more folder, and their folders spelt in any of the ways of the
    catalogue; in all others the first folder is the domain and the second, if there is one, the class.
    """
    # macOS writes an accent as a letter of its own, others do not
    split = [(name, PurePosixPath(unicodedata.normalize("NFC", name)).parts) for name in source.names]
    notes = list(source.notes)
    wrapped = bool(entry.domains) or source.root.is_file()
    while wrapped and (top := {parts[0] for _, parts in split if len(parts) > 1}) and len(top) == 1:
        (folder,) = top
        deep = max(len(parts) for _, parts in split)
        if entry.domain_of(folder) or deep < (3 if entry.domains else 4):
            break
        split = [(name, parts[1:]) for name, parts in split if len(parts) > 1]
    split = _less_splits_of_all(split, entry, notes)
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
        files = _less_a_split(files, domain, entry, notes)
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
        notes,
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


Files = list[tuple[str, tuple[str, ...]]]
"""A file's name, and the folders below which it lies, with its own name last."""


def _less_splits_of_all(files: Files, entry: Entry, notes: list[str]) -> Files:
    """Drop folders like ``train`` and ``test`` that stand above the domains."""
    folders = {parts[0] for _, parts in files if len(parts) > 1}
    if len(folders) < 2 or not _are_splits(folders):
        return files
    named = " and ".join(sorted(folders))
    below = {parts[1] for _, parts in files if len(parts) > 2}
    deep = all(len(parts) != 3 for _, parts in files)
    if any(map(entry.domain_of, below)) if entry.domains else deep:
        notes.append(f"the folders {named} are taken together: splits, not domains")
        return [(name, parts[1:]) for name, parts in files if len(parts) > 1]
    if not entry.domains:
        notes.append(f"the domains are called {named}: is this one collection, split?")
    return files


def _less_a_split(files: Files, domain: str, entry: Entry, notes: list[str]) -> Files:
    """Drop folders like ``train`` that stand between a domain and its classes."""
    folders = {parts[0] for _, parts in files if len(parts) > 1}
    splits = {folder for folder in folders if _are_splits([folder]) and not entry.class_of(folder)}
    below = all(len(parts) != 2 for _, parts in files)
    if splits and splits == folders and (below or len(splits) > 1):
        if len(splits) > 1:
            named = " and ".join(sorted(splits))
            notes.append(f"domain {domain}: the folders {named} are taken together: splits, not classes")
        files = [(name, parts[1:]) for name, parts in files if len(parts) > 1]
        return _less_a_split(files, domain, entry, notes)
    doubtful = sorted(f for f in splits if any(parts[0] == f and len(parts) > 2 for _, parts in files))
    if doubtful and not entry.counts:
        named = " and ".join(doubtful)
        notes.append(f"domain {domain}: {named} taken for a class: is it a split with classes below it?")
    return files


def _are_splits(folders: Collection[str]) -> bool:
    return all(SPLIT.fullmatch(folder.casefold()) for folder in folders)


def unusable_names(files: Survey) -> list[str]:
    """One line for each name of a domain or class that cannot be worked with."""
    faults = []
    for domain, of_domain in files.domains.items():
        if ">" in domain:
            faults.append(f"domain {domain!r}: '>' stands between query and gallery: rename the folder")
        if len(domain.encode()) > LONGEST_NAME:
            faults.append(f"domain {domain!r}: a name of more than {LONGEST_NAME} bytes: rename the folder")
        faults += [
            f"{kind} {name!r}: a control character in its name: rename the folder"
            for kind, names in (("domain", [domain]), ("class", sorted({file.label for file in of_domain})))
            for name in names
            if any(unicodedata.category(character) == "Cc" for character in name)
        ]
    return list(dict.fromkeys(faults))


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
    """Hidden files and what systems and programs leave in folders."""
    plain = name.casefold()
    return plain.startswith((".", "~$")) or plain in LITTER or plain.endswith(LITTER_ENDINGS)


def _is_text(name: str) -> bool:
    """Whether a name can be written into a file of text: bytes of another encoding cannot."""
    return not any(unicodedata.category(character) == "Cs" for character in name)


def _checked_members(archive: Path, notes: list[str]) -> dict[str, int]:
    """Names of an archive's files, with their numbers.

    Args:
        archive: the archive.
        notes: gets a line for what is left out or doubtful.

    Raises:
        UserError: not a complete archive, or a method of packing that is not read; a name that leads out of
            it, a link, too many or too large members.
    """
    names: dict[str, int] = {}
    total = 0
    guessed = twice = 0
    unread = [""]
    try:
        for number, (name, size, kind, sure) in enumerate(_listing(archive)):
            path = PurePosixPath(name)
            if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
                raise UserError(f"{archive}: refused: member {name!r} leads out of the archive")
            if kind == "other":
                raise UserError(f"{archive}: refused: member {name!r} is a link or a device")
            if kind == "folder" or any(map(_hidden, path.parts)):
                continue
            if not _is_text(name):
                notes.append(f"{archive}: left out {name!a}: its name is no Unicode; rename it")
                continue
            name = str(path)  # without './'
            total += size
            twice += name in names
            guessed += not sure
            names[name] = number
            if len(path.parts) == 1 and name.lower().endswith((*ENDINGS, *UNREAD)):
                unread.append(name)
            if size > MAX_MEMBER_BYTES:
                raise UserError(f"{archive}: refused: member {name!r} unpacks to {size} bytes")
            if len(names) > MAX_MEMBERS or total > MAX_ARCHIVE_BYTES:
                raise UserError(
                    f"{archive}: refused: more than {MAX_MEMBERS} files or {MAX_ARCHIVE_BYTES} bytes"
                )
    except UserError:
        raise
    except Exception as error:  # what readers of damaged archives raise
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(f"{archive}: not a complete archive ({reason}): delete it and get it again") from None
    notes += [f"{archive}: {name} is an archive in an archive, which is not read" for name in unread[1:]]
    if twice:
        notes.append(f"{archive}: {twice} name(s) stand in it more than once: the last of each counts")
    if guessed:
        notes.append(f"{archive}: {guessed} name(s) are in an unknown code page and may look odd")
    return names


def _listing(archive: Path) -> Iterator[tuple[str, int, str, bool]]:
    """Each member's name with '/', unpacked size, kind, and whether its name's encoding is known."""
    if _is_zip(archive):
        with zipfile.ZipFile(archive) as opened:
            for info in opened.infolist():
                name, sure = _zip_name(info)
                mode = info.external_attr >> 28  # the file type of Unix, 0 where another system packed
                kind = "folder" if name.endswith("/") else "file" if mode in (0, 8) else "other"
                if info.volume:
                    raise UserError(
                        f"{archive}: one part of several: join them with "
                        f"`zip -s 0 {archive.name} --out whole.zip`"
                    )
                if info.flag_bits & 1:
                    raise UserError(f"{archive}: refused: member {name!r} is encrypted: unpack it yourself")
                if kind == "file" and info.compress_type not in ZIP_METHODS:
                    known: dict[int, str] = getattr(zipfile, "compressor_names", {})
                    method = known.get(info.compress_type, f"method {info.compress_type}")
                    raise UserError(
                        f"{archive}: refused: member {name!r} is packed by {method}, which Python does not "
                        "read: unpack it, or pack it anew as .zip with another program or as .tar"
                    )
                yield name, info.file_size, kind, sure
    else:
        with tarfile.open(archive) as opened_tar:
            for member in opened_tar:
                kind = "folder" if member.isdir() else "file" if member.isreg() else "other"
                yield member.name, member.size, kind, True
            assert opened_tar.fileobj is not None
            opened_tar.fileobj.seek(opened_tar.offset)
            if opened_tar.fileobj.read(512) != bytes(512):  # tarfile takes a damaged header for the end
                raise tarfile.ReadError("its end mark is missing, or a header is damaged")


ZIP_METHODS = {zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA}
UNICODE_PATH = 0x7075
"""The extra field in which some programs keep a member's name in UTF-8."""


def _zip_name(info: zipfile.ZipInfo) -> tuple[str, bool]:
    r"""A member's name with '/', and whether its encoding is known.

    Windows has written '\' and the code page at hand; others UTF-8 without saying so.
    """
    name, sure = info.filename, True
    if not (name.isascii() or info.flag_bits & 0x800):
        raw, extra = name.encode("cp437"), info.extra
        while len(extra) >= 4:
            kind, size = int.from_bytes(extra[:2], "little"), int.from_bytes(extra[2:4], "little")
            if kind == UNICODE_PATH:
                raw = extra[9 : 4 + size]
            extra = extra[4 + size :]
        try:
            name = raw.decode("utf-8")
        except UnicodeDecodeError:
            sure = False
    return name.replace("\\", "/"), sure


def _member_reader(opened: zipfile.ZipFile, info: zipfile.ZipInfo) -> Reader:
    def read() -> bytes:
        try:
            return opened.read(info)
        except Exception as error:  # of several decompressors
            raise OSError(f"broken in its archive: {error}") from None

    return read


def _read_tar(archive: Path, wanted: Mapping[int, str]) -> Iterator[tuple[str, Reader]]:
    with tarfile.open(archive) as opened:
        for number, member in enumerate(opened):
            if number in wanted:
                file = opened.extractfile(member)
                assert file is not None
                data = file.read()
                yield wanted[number], lambda data=data: data  # type: ignore[misc]
