"""What is known of the papers' data sets: one YAML file each beside this module.

Adding a data set is adding a file. ``folder`` is the entry of everything else.
"""

from __future__ import annotations

from functools import cache, cached_property
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, BaseModel, ConfigDict, Field

from ucir.errors import UserError, nearest

FOLDER = "folder"


class RemoteFile(BaseModel):
    """A file of a data set as its makers give it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """In the data set's source folder."""
    path: Annotated[str | None, Field(validation_alias=AliasChoices("from", "path"))] = None
    """Below the entry's ``address``; None = the same as ``name``."""
    digest: str | None = None
    """``md5:…`` or ``sha256:…``, whole or its beginning."""


class Entry(BaseModel):
    """One data set of the catalogue."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str
    about: str
    classes: int | None
    """How many; None = whatever there is."""
    subset: bool = False
    """The archives hold more classes than ``counts``: those are passed over."""
    domains: dict[str, tuple[str, ...]]
    """Our name of a domain, then the spellings of its folder, less case, spaces, ``_`` and ``-``."""
    pairs: dict[str, tuple[str, ...]]
    """By paper: ``A-B`` both directions, ``A>B`` one."""
    cutoffs: tuple[int, ...]
    address: str | None = None
    """Where ``files`` can be downloaded without a person; None = see ``ask``."""
    files: tuple[RemoteFile, ...]
    ask: str
    licence: str
    citation: str
    counts: dict[str, dict[str, int | None]]
    """Pictures by domain and class, as published; None = not known."""

    def domain_of(self, folder: str) -> str | None:
        """Our name of the domain that a folder of this name holds."""
        for domain, spellings in self.domains.items():
            if plain(folder) in {plain(domain), *map(plain, spellings)}:
                return domain
        return None

    def class_of(self, folder: str) -> str | None:
        """Our name of the class that a folder of this name holds; None = not of this data set."""
        return self._class_names.get(plain(folder))

    def class_names(self) -> list[str]:
        """All classes, sorted; none for ``folder`` and other sets that are not counted."""
        return sorted(set(self._class_names.values()))

    @cached_property
    def _class_names(self) -> dict[str, str]:
        return {plain(label): label for classes in self.counts.values() for label in classes}

    def expected(self, domain: str, label: str) -> int | None:
        """Published number of pictures; None = not known."""
        return self.counts.get(domain, {}).get(label)


def plain(name: str) -> str:
    """A folder's name less case, spaces, underscores and hyphens."""
    return "".join(c for c in name.casefold() if c not in " _-")


def names() -> list[str]:
    """All entries, sorted."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.yaml"))


@cache
def entry(name: str) -> Entry:
    """A data set by its name in the catalogue.

    Raises:
        UserError: there is none of this name.
    """
    from ruamel.yaml import YAML

    path = Path(__file__).parent / f"{name}.yaml"
    if name not in names():
        raise UserError(f"the catalogue has no data set {name!r}; {nearest(name, names())}")
    raw: Any = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    return Entry.model_validate(raw)
