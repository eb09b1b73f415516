"""Make a study the active one: write the `study` block of params.yaml and leave the rest as it stands."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

from ucir.config import Params, load_params
from ucir.errors import UserError
from ucir.methods import method_params


def load_study() -> Params:
    """params.yaml with every method block of the active study checked: a typo must not wait for its stage.

    Raises:
        UserError: as :func:`ucir.config.load_params` and :func:`ucir.methods.method_params`.
    """
    params = load_params()
    for run in params.study.runs.values():
        method_params(params, run.method, run.dataset)
    return params


def study_block(params: Params, name: str) -> dict[str, Any]:
    """The `study` block of ``params.studies[name]``, every part checked.

    Raises:
        UserError: the study names a data set or method that params.yaml does not have, or whose block
            has a fault.
    """
    recipe = params.studies[name]
    for dataset in recipe.datasets:
        if dataset not in params.datasets:
            raise UserError(f"studies.{name}: no data set {dataset!r} under 'datasets'")
        for method in recipe.methods:
            method_params(params, method, dataset)
    sources = {dataset: {"source": params.datasets[dataset].source} for dataset in recipe.datasets}
    settings = [
        {"dataset": dataset, "setting": setting}
        for dataset, setting in product(recipe.datasets, recipe.settings)
    ]
    runs = [{**part, "method": method} for part, method in product(settings, recipe.methods)]
    return {
        "name": name,
        "seeds": list(recipe.seeds),
        "datasets": sources,
        "samples": {d: source for d, source in sources.items() if params.datasets[d].sample},
        "settings": {"-".join(part.values()): part for part in settings},
        "runs": {"-".join(run.values()): run for run in runs},
    }


def activate(path: Path, params: Params, name: str) -> None:
    """Write the block into params.yaml; comments and all other blocks stay."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    def flow(value: Any, depth: int) -> Any:
        """Short lines: the innermost maps and lists on one line each."""
        if isinstance(value, dict):
            node = CommentedMap({key: flow(part, depth + 1) for key, part in value.items()})
            if depth >= 2 or not value:
                node.fa.set_flow_style()
            return node
        if isinstance(value, list):
            line = CommentedSeq(value)
            line.fa.set_flow_style()
            return line
        return value

    block = study_block(params, name)
    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 200
    document = yaml.load(path.read_text(encoding="utf-8"))
    for key, value in block.items():
        old = document["study"].ca.items.get(key)
        document["study"][key] = flow(value, 1)
        if old:  # what ruamel keeps behind a key: the comment before the next block
            document["study"].ca.items[key] = old
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)
    unfinished.replace(path)
