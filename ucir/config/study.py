"""Blocks of studies: what is run."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ucir.config.base import ONE_PART, Block, Distinct, Name, Seeds, Setting


class SettingParams(Block):
    """A data set in a setting."""

    dataset: Name
    setting: Setting
    pairs: tuple[str, ...] | None = None
    """None = the data set's."""


class RunParams(SettingParams):
    """One line of the active study: a data set, a setting, a method."""

    method: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    block: str
    """The block under ``methods`` that it reads: an ablation reads its method's."""


class SourceParams(Block):
    """What the prepare stage depends on: a copy of the data set's ``source`` for dvc.yaml."""

    source: str


class SweepStage(Block):
    """What the tune stage depends on: the data set and the methods block of a sweep."""

    dataset: Name
    block: str


class StudyParams(Block):
    """What `uv run dvc repro` runs; written by `uv run ucir study NAME`."""

    name: str
    seeds: Seeds
    datasets: dict[Name, SourceParams]
    samples: dict[Name, SourceParams]
    """Those of ``datasets`` that are drawn here."""
    settings: dict[str, SettingParams]
    runs: dict[str, RunParams]
    sweeps: dict[str, SweepStage] = Field(default_factory=dict)


class StudyPart(Block):
    """A product of lists; for a paper's table, its rows and columns."""

    datasets: Annotated[tuple[Name, ...], Field(min_length=1), Distinct]
    settings: Annotated[tuple[Setting, ...], Field(min_length=1), Distinct]
    methods: Annotated[tuple[str, ...], Field(min_length=1), Distinct]
    pairs: Annotated[tuple[str, ...], Distinct] | None = None
    """None = those of the data sets."""


class StudyRecipe(Block):
    """A study to choose from: one part, or several by name."""

    seeds: Seeds
    sweeps: tuple[str, ...] = ()
    """Those of ``sweeps`` that `dvc repro` runs as well."""
    parts: Annotated[dict[str, StudyPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _one_part_needs_no_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "parts" in given:
            return given
        return {
            **{key: value for key, value in given.items() if key not in StudyPart.model_fields},
            "parts": {ONE_PART: {k: v for k, v in given.items() if k in StudyPart.model_fields}},
        }
