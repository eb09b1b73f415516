"""Studies: what `dvc repro` runs. Choosing one rewrites the `study` block of params.yaml; the rest stays."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain, product
from pathlib import Path
from typing import Any

import psutil
from pydantic import Field

from ucir.config.base import PARAMS_FILE, Block, checked
from ucir.config.data import DatasetParams
from ucir.config.load import Params, load_params, parse_yaml, without_study
from ucir.data.fetch import check_checkpoint
from ucir.data.pack import read_info
from ucir.data.prepare import survey_source
from ucir.data.splits import label_spaces, trainings
from ucir.errors import UserError, nearest
from ucir.methods.registry import METHODS, params_block
from ucir.models.pretrained import EMBEDDED_TRUNK, check_weights
from ucir.models.trunk import check_trunk
from ucir.paths import PACKS
from ucir.runs.params import check_methods, check_sizes, method_params


class StudyFile(Block):
    """A small file for `ucir study FILE`: blocks to add to params.yaml, and one study."""

    datasets: dict[str, dict[str, Any]] = Field(default_factory=dict)
    methods: dict[str, dict[str, dict[str, Any]]] = Field(default_factory=dict)
    sweeps: dict[str, dict[str, Any]] = Field(default_factory=dict)
    studies: dict[str, dict[str, Any]]


def load_study(encoders: bool = False) -> Params:
    """params.yaml with every method block checked: a typo must not wait for its stage.

    Args:
        encoders: check the data sets' trunks, too, as the first stages do: timm, which knows its networks'
            names, takes seconds to import.

    Raises:
        UserError: as :func:`ucir.config.load.load_params`, :func:`ucir.runs.params.method_params` and
            :func:`ucir.models.trunk.check_trunk`.
    """
    params = load_params()
    check_methods(params)
    for run in params.study.runs.values():
        method_params(params, run.method, run.dataset)
    if encoders:
        for dataset in params.study.datasets:
            _check_encoder(params, dataset)
    return params


def _defaults(block: DatasetParams) -> dict[str, Any]:
    """What a data set may leave out, but stages of `dvc.yaml` depend on by name: DVC knows no defaults."""
    blocks: dict[str, Any] = {part: {} for part in ("pack", "view", "evaluate", "split")}
    return {**blocks, "pairs": list(block.pairs), "catalogue": block.catalogue}


def unwritten(params: Params) -> list[str]:
    """A line for each of :func:`_defaults` that params.yaml lacks for the active study, with the remedy."""
    datasets = parse_yaml(Path(PARAMS_FILE))["datasets"]
    return [
        f"{PARAMS_FILE}: datasets.{dataset}.{part}: must stand there for DVC: "
        f"`uv run ucir study {params.study.name}` writes its default"
        for dataset in params.study.datasets
        for part in _defaults(params.datasets[dataset])
        if part not in datasets[dataset]
    ]


def _check_encoder(params: Params, dataset: str) -> None:
    trunk = params.datasets[dataset].start.encoder.trunk
    if trunk == {"timm": EMBEDDED_TRUNK}:  # it came with the installation
        return
    check_trunk(trunk, f"{PARAMS_FILE}: datasets.{dataset}.start.encoder.trunk")


def study_runs(params: Params, name: str) -> list[tuple[str, dict[str, Any]]]:
    """All runs of ``params.studies[name]`` by part: data set, setting, method, pairs (None = the data set's).

    Raises:
        UserError: an unknown study, data set or method.
    """
    if name not in params.studies:
        raise UserError(f"study {name!r} is unknown; {nearest(name, params.studies)}")
    runs = []
    for part, block in params.studies[name].parts.items():
        for dataset, setting, method in product(block.datasets, block.settings, block.methods):
            if dataset not in params.datasets:
                raise UserError(
                    f"studies.{name}: no data set {dataset!r} under 'datasets'; "
                    f"{nearest(dataset, params.datasets)}"
                )
            if method not in METHODS:
                raise UserError(f"studies.{name}: method {method!r} is unknown; {nearest(method, METHODS)}")
            pairs = list(block.pairs) if block.pairs else None
            runs.append((part, {"dataset": dataset, "setting": setting, "method": method, "pairs": pairs}))
    return runs


def study_block(params: Params, name: str) -> dict[str, Any]:
    """The `study` block of ``params.studies[name]``, every part checked.

    Raises:
        UserError: as :func:`study_runs`; a method block has a fault.
    """
    runs: dict[str, dict[str, Any]] = {}
    settings: dict[str, dict[str, Any]] = {}
    for _, run in study_runs(params, name):
        method_params(params, run["method"], run["dataset"])
        _check_encoder(params, run["dataset"])
        setting = {key: run[key] for key in ("dataset", "setting", "pairs")}
        entry = {**run, "block": params_block(run["method"])}
        _join(runs, f"{run['dataset']}-{run['setting']}-{run['method']}", entry)
        _join(settings, f"{run['dataset']}-{run['setting']}", setting)
    sweeps = {}
    for sweep_name in params.studies[name].sweeps:
        if sweep_name not in params.sweeps:
            raise UserError(
                f"studies.{name}: sweep {sweep_name!r} is unknown; {nearest(sweep_name, params.sweeps)}"
            )
        sweep = params.sweeps[sweep_name]
        method_params(params, sweep.method, sweep.dataset)
        sweeps[sweep_name] = {"dataset": sweep.dataset, "block": params_block(sweep.method)}
    used = dict.fromkeys(part["dataset"] for part in (*runs.values(), *sweeps.values()))
    sources = {dataset: {"source": params.datasets[dataset].source} for dataset in used}
    return {
        "name": name,
        "seeds": list(params.studies[name].seeds),
        "datasets": sources,
        "samples": {d: source for d, source in sources.items() if params.datasets[d].sample},
        "settings": {key: _given(setting) for key, setting in settings.items()},
        "runs": {key: _given(run) for key, run in runs.items()},
        "sweeps": sweeps,
    }


def describe_recipes() -> str:
    """A line for each study of params.yaml, the active one starred, and what keeps it from running."""
    raw = parse_yaml(Path(PARAMS_FILE))
    params = load_params(raw=without_study(raw))
    active = (raw.get("study") or {}).get("name")
    lines = []
    for name, recipe in params.studies.items():
        parts = recipe.parts.values()
        factors = " x ".join(
            ", ".join(dict.fromkeys(item for part in parts for item in getattr(part, field)))
            for field in ("datasets", "settings", "methods")
        )
        mark = "*" if name == active else " "
        lines.append(f"{mark} {name}: {factors}, seeds {', '.join(map(str, recipe.seeds))}")
        try:
            study_block(params, name)
        except UserError as error:
            lines.append(f"    cannot run: {error}")
    return "\n".join(lines)


def known_domains(block: DatasetParams, dataset: str) -> list[str]:
    """Domains by the catalogue, else of the pack and as the pairs spell them: a pack may be older."""
    if block.entry.domains:
        return list(block.entry.domains)
    try:
        packed = list(read_info(PACKS / dataset).counts)
    except UserError:
        packed = []
    cuts = [(p[:i], p[i + 1 :]) for p in block.pairs for i, c in enumerate(p) if c in "->"]
    return list(dict.fromkeys([*packed, *(name for cut in cuts for name in cut if name)]))


def study_faults(params: Params, name: str) -> list[str]:
    """Which pictures and start weights of a study are not there, what cannot be run, and how to mend it."""
    faults = []
    block = study_block(params, name)
    for dataset in block["datasets"]:
        given = params.datasets[dataset]
        parts = [part for part in block["settings"].values() if part["dataset"] == dataset]
        try:
            for part in parts:
                trainings(part["setting"], part.get("pairs", ()), known_domains(given, dataset))
        except UserError as error:
            faults.append(f"studies.{name}: {error}")
        if given.sample:
            continue
        try:
            source_errors, counts = survey_source(given)
        except UserError as error:
            source_errors = [str(error)]
        if source_errors and given.entry.files:
            source_errors[-1] += f"; `uv run ucir fetch {dataset}` gets the data set or says how"
        faults += source_errors
        if not source_errors:
            faults += _size_faults(params, dataset, counts, block["runs"].values())
        try:
            check_checkpoint(given.start)
            if given.start.weights:
                check_weights(given.start.weights)
        except UserError as error:
            faults.append(str(error))
    return list(dict.fromkeys(faults))


def _size_faults(
    params: Params, dataset: str, counts: Mapping[str, Counter[str]], runs: Iterable[Mapping[str, Any]]
) -> list[str]:
    """Label spaces that cannot be drawn, and batches and clusters for which there are too few files."""
    block = params.datasets[dataset]
    faults = []
    for run in runs:
        if run["dataset"] != dataset:
            continue
        where = f"{PARAMS_FILE}: methods.{params_block(run['method'])}.{dataset}"
        try:
            spaces = label_spaces(run["setting"], [*counts.values()], block.split)
            given = method_params(params, run["method"], dataset)
            for pair in trainings(run["setting"], run.get("pairs") or block.pairs, [*counts]):
                left = {}
                for role, domain in enumerate(pair):
                    space = spaces.of(role)
                    left[domain] = sum(
                        counts[domain][x] for x in (counts[domain] if space is None else space)
                    )
                check_sizes(given, where, run["setting"], left)
        except UserError as error:
            faults.append(str(error))
    return faults


def check_no_repro() -> None:
    """Raises UserError: `dvc repro` runs here, and would look for the old study's stages in the new file."""
    try:
        lock = json.loads(Path(".dvc/tmp/rwlock").read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return
    holders = [*lock.get("write", {}).values(), *chain.from_iterable(lock.get("read", {}).values())]
    for number in {holder["pid"] for holder in holders}:
        with contextlib.suppress(psutil.Error):  # entries of a killed one stay, and its number is given anew
            if "repro" in psutil.Process(number).cmdline():
                raise UserError(
                    f"`dvc repro` runs here (process {number}) and reads {PARAMS_FILE}: wait for its end, or "
                    "stop it: it goes on where it was"
                )


def activate(path: Path, name: str, blocks: StudyFile | None = None) -> tuple[str, list[str]]:
    """Write the study's block into params.yaml; comments and all other blocks stay.

    Args:
        path: params.yaml.
        name: a study there, or a small file with one (see :class:`StudyFile`), whose blocks are added.
        blocks: those of such a file, where there is no file.

    Returns:
        The study's name, and a line for each block of params.yaml that others took the place of.

    Raises:
        UserError: `dvc repro` is at work; an unknown study, a fault in it or in its file; no such data;
            params.yaml is as it was.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap

    check_no_repro()

    yaml = YAML()
    yaml.preserve_quotes = True
    yaml.width = 4096  # or it would wrap lines that are long already
    before = parse_yaml(path)
    document = yaml.load(path.read_text(encoding="utf-8"))
    study_file = Path(name) if name.endswith((".yaml", ".yml")) else None
    if study_file:
        blocks = read_study_file(study_file)
        (name,) = blocks.studies
    if blocks:
        _add_blocks(document, blocks)
    params = load_params(study_file or path, raw=without_study(document))
    if faults := study_faults(params, name):
        raise UserError("; ".join(faults))
    block = study_block(params, name)
    for dataset in block["datasets"]:
        for part, default in _defaults(params.datasets[dataset]).items():
            document["datasets"][dataset].setdefault(part, default)
    replaced = _replaced(before, document, blocks) if blocks else []
    if not document.get("study"):  # taken out by hand
        document.insert(0, "study", CommentedMap())
    for key, value in block.items():
        old = document["study"].ca.items.get(key)
        document["study"][key] = _flow(value, 1)
        if old:  # what ruamel keeps behind a key: the comment before the next block
            document["study"].ca.items[key] = old
    unfinished = path.with_suffix(".unfinished")
    with unfinished.open("w", encoding="utf-8") as file:
        yaml.dump(document, file)
    load_params(unfinished)
    unfinished.replace(path)
    return name, replaced


def read_study_file(file: Path) -> StudyFile:
    """A small file with one study. Raises UserError: it has a fault, or not one study."""
    blocks = checked(StudyFile, parse_yaml(file), str(file))
    if len(blocks.studies) != 1:
        raise UserError(f"{file}: 'studies' must hold one study, found {', '.join(blocks.studies) or 'none'}")
    return blocks


def with_blocks(blocks: StudyFile) -> Params:
    """params.yaml with these blocks, and without a study that runs. Raises as :func:`load_params`."""
    document = without_study()
    _add_blocks(document, blocks)
    return load_params(raw=document)


def _add_blocks(document: Any, blocks: StudyFile) -> None:
    """Add a study file's blocks to params.yaml's."""
    for (*above, name), block in _placed(blocks):
        place = document
        for key in above:
            place = place.setdefault(key, {})
        if place.get(name) != block:  # else the comments behind its lines stay
            place[name] = _flow(block, 1 if above[0] in ("datasets", "sweeps") else 2)


def _replaced(before: Any, document: Any, blocks: StudyFile) -> list[str]:
    """A line for each block of a study file in whose place params.yaml held something else."""
    lines = []
    for keys, _ in _placed(blocks):
        old, new = before, document
        for key in keys:
            old, new = (old or {}).get(key), new[key]
        old = old or {}
        lost = [key for key, value in old.items() if value and key not in new]
        if lost or any(old[key] != value for key, value in new.items() if key in old):
            dropped = f", {', '.join(lost)} dropped" if lost else ""
            lines.append(f"{'.'.join(keys)}: replaced{dropped}")
    return lines


def _placed(blocks: StudyFile) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """The blocks of a study file, each with the keys that lead to it."""
    for kind in ("datasets", "methods", "sweeps", "studies"):
        for name, block in getattr(blocks, kind).items():
            if kind == "methods":
                yield from (((kind, name, dataset), settings) for dataset, settings in block.items())
            else:
                yield (kind, name), block


def _given(block: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in block.items() if value is not None}


def _join(blocks: dict[str, dict[str, Any]], key: str, new: dict[str, Any]) -> None:
    """Two parts with the same data set, setting and method become one with the pairs of both."""
    old = blocks.setdefault(key, {**new, "pairs": new["pairs"] and []})
    if old["pairs"] is not None:
        old["pairs"] = list(dict.fromkeys([*old["pairs"], *new["pairs"]])) if new["pairs"] else None


def _flow(value: Any, depth: int) -> Any:
    """Short lines: the innermost maps and lists on one line each."""
    from ruamel.yaml.comments import CommentedMap, CommentedSeq

    if isinstance(value, dict):
        parts = {k: _flow(part, depth + 1) for k, part in value.items()}
        node = CommentedMap(parts)
        if depth >= 2 or not value:
            node.fa.set_flow_style()
        return node
    if isinstance(value, list):
        line = CommentedSeq(value)
        line.fa.set_flow_style()
        return line
    return value
