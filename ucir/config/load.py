"""The whole of params.yaml: reading and checking it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ucir.config.base import PARAMS_FILE, Block, Name, checked
from ucir.config.cluster import ClusterParams
from ucir.config.data import DatasetParams
from ucir.config.study import StudyParams, StudyRecipe
from ucir.config.sweep import SweepParams
from ucir.errors import UserError


class Params(Block):
    """The whole of params.yaml."""

    study: StudyParams
    studies: dict[str, StudyRecipe]
    datasets: dict[Name, DatasetParams]
    methods: dict[str, dict[Name, dict[str, Any]]]
    """Method, then data set; validated by the method's own params class."""
    sweeps: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], SweepParams] = Field(
        default_factory=dict
    )
    cluster: ClusterParams = ClusterParams()

    @model_validator(mode="after")
    def _study_is_current(self) -> Self:
        for name, copy in self.study.datasets.items():
            if name not in self.datasets:
                raise ValueError(f"study.datasets.{name}: no such block under 'datasets'")
            if copy.source != self.datasets[name].source:
                raise ValueError(
                    f"study.datasets.{name}.source differs from datasets.{name}.source: "
                    f"run `uv run ucir study {self.study.name}` to renew the study block"
                )
        for key, run in self.study.runs.items():
            if run.dataset not in self.study.datasets:
                raise ValueError(
                    f"study.runs.{key}: data set {run.dataset!r} is not in study.datasets: "
                    f"run `uv run ucir study {self.study.name}` to renew the study block"
                )
        return self


def parse_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with blocks, as DVC reads it: a key given twice is an error.

    Raises:
        UserError: no such file, not YAML, no blocks.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "; run the command in the project's folder" if path.name == PARAMS_FILE else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {_first_words(error)}") from None
    if not isinstance(raw, dict):
        hint = f"; restore it with `git checkout {path}`" if path.name == PARAMS_FILE else ""
        raise UserError(f"{path}: no blocks in it{hint}")
    return raw


def without_study(raw: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """params.yaml with no active study, which may be out of date and about to be renewed.

    Args:
        raw: the blocks; None = read them.
    """
    raw = parse_yaml(Path(PARAMS_FILE)) if raw is None else raw
    none = {"name": "none", "seeds": [0], "datasets": {}, "samples": {}, "settings": {}, "runs": {}}
    return {**raw, "study": none}


def load_params(
    path: Path | str = PARAMS_FILE, overrides: Sequence[str] = (), raw: dict[str, Any] | None = None
) -> Params:
    """Read and check params.yaml.

    Args:
        path: the file.
        overrides: ``key.path=value`` each, as if they stood in the file.
        raw: what stands in the file, where that is at hand.

    Raises:
        UserError: no such file, not YAML, an unknown key, a value out of range; names file and field.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = Path(path)
    yaml = YAML(typ="safe", pure=True)
    raw = parse_yaml(path) if raw is None else raw
    if overrides:  # blocks that share an anchor become each its own
        raw = _unshared(raw)
    for override in overrides:
        key, equals, value = override.partition("=")
        *blocks, last = key.split(".")
        if not equals or not all((*blocks, last)):
            raise UserError(f"--set {override}: expected KEY=VALUE")
        block = raw
        for name in blocks:
            block = block.setdefault(name, {})  # a block that the file leaves to its defaults
            if not isinstance(block, dict):
                raise UserError(f"--set {override}: {name!r} is a value in {path}, not a block")
        try:
            block[last] = yaml.load(value)
        except YAMLError as error:
            raise UserError(f"--set {override}: not readable as YAML: {_first_words(error)}") from None
    return checked(Params, raw, str(path))


def _unshared(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _unshared(part) for key, part in value.items()}
    return [_unshared(part) for part in value] if isinstance(value, list) else value


def _first_words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if len(words) < 200 else f"{words[:200]} …"
