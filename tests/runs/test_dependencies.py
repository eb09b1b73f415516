"""What a run key and a DVC stage depend on is what really runs: no more and no less."""

from __future__ import annotations

import importlib
import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, run_python, ucir, write_params
from ucir.config.data import DatasetParams
from ucir.errors import UserError
from ucir.methods.registry import METHODS, VARIANTS
from ucir.runs.dependencies import START, WITHOUT_RESULTS, code_hashes, stage_modules, training_modules

STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
BLOCKS = [name for name in METHODS if name not in VARIANTS]
SCORES = {"evaluate", "evaluate_start", "report", *(f"tune-{block}" for block in BLOCKS)}
"""What reads labels; a sweep tells its oracle beside the criteria."""


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for folder in ("ucir", "pipeline"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def _hashes(root: Path) -> dict[str, dict[str, str]]:
    from ucir.runs import dependencies

    dependencies._read.cache_clear()
    return {stage: code_hashes(modules, root) for stage, modules in stage_modules().items()}


@cache
def _before() -> dict[str, dict[str, str]]:
    return _hashes(ROOT)


def _changed(root: Path, file: str, old: str, new: str) -> set[str]:
    before = _before()
    text = (root / file).read_text(encoding="utf-8") if (root / file).exists() else ""
    assert old in text, f"{file} has no {old!r}: the test changes nothing"
    (root / file).write_text(text.replace(old, new, 1) if old else text + new, encoding="utf-8")
    after = _hashes(root)
    return {stage for stage in before if before[stage] != after[stage]}


def trainings(*blocks: str) -> set[str]:
    return {f"{stage}-{block}" for stage in ("train", "tune") for block in blocks}


@pytest.mark.parametrize(
    ("file", "old", "new", "stages"),
    [
        ("ucir/methods/cds.py", "0.5, within", "0.6, within", trainings("cds")),
        ("ucir/methods/ucdir.py", "0.5 * weight", "0.4 * weight", trainings("ucdir", "ucdir-ot")),
        ("ucir/prototypes/transport.py", "1e-", "2e-", None),
        (
            "ucir/retrieval/ranking.py",
            "np.float32(2)",
            "np.float32(3)",
            SCORES,
        ),
        ("ucir/retrieval/metrics.py", "100 * hits", "101 * hits", SCORES),
        ("ucir/reports/figures.py", "import", "import os\nimport", {"report"}),
        ("ucir/data/digits.py", "SIDE = 40", "SIDE = 41", {"sample"}),
        ("ucir/methods/base.py", "math.pi", "3.14", {"pretrain", *trainings(*BLOCKS)}),
        ("ucir/cluster/launch.py", "max_retries", "most_retries", set()),
        ("ucir/losses/cluster.py", "q = full", "# a comment\n    q = full", set()),
        ("ucir/losses/cluster.py", "Cluster-wise contrast", "Contrast by clusters", set()),
        ("ucir/losses/new.py", "", "VALUE = 1\n", set()),
        ("ucir/models/new.py", "", "VALUE = 1\n", set()),
    ],
)
def test_an_edit_starts_what_runs_through_it_and_nothing_else(
    copy: Path, file: str, old: str, new: str, stages: set[str] | None
) -> None:
    changed = _changed(copy, file, old, new)
    if stages is None:  # transport serves these trainings, and one criterion of every sweep
        stages = {f"train-{block}" for block in ("protoot", "ucdir-ot", "consensus")} | {
            f"tune-{b}" for b in BLOCKS
        }
    assert changed == stages


IMPORTED = """
import importlib, json, os, sys
import faiss, ot, pydantic, scipy.optimize, sklearn.metrics, torch  # slow, and the same for all
for modules in json.loads(sys.argv[1]):
    if not os.fork():
        for module in modules:
            importlib.import_module(module)
        print(json.dumps([m for m in sys.modules if m.split(".")[0] in ("ucir", "pipeline")]), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""


def test_all_that_python_imports_is_among_the_files() -> None:
    """The closure is read from the text; this is what the interpreter makes of it."""
    begins = [training_modules(name) for name in ("uem", "dgdir", "ucdir-ot")]
    begins += [("ucir.retrieval.evaluation",), START]
    lines = run_python("-c", IMPORTED, json.dumps(begins), cwd=ROOT).stdout.splitlines()
    for modules, line in zip(begins, lines, strict=True):
        files = code_hashes(modules)
        for module in json.loads(line):
            if "." not in module or any(
                module == name or module.startswith(f"{name}.") for name in WITHOUT_RESULTS
            ):
                continue
            path = "/".join(module.split("."))
            source = ROOT / f"{path}.py"
            assert f"{path}.py" in files or not source.exists() or not _has_code(source), module


def _has_code(file: Path) -> bool:
    import ast

    return any(not isinstance(node, ast.Expr) for node in ast.parse(file.read_bytes()).body)


def test_every_stage_of_dvc_depends_on_its_code() -> None:
    known = stage_modules()
    for name, stage in STAGES.items():
        if name == "code":
            assert stage["deps"] == ["ucir", "pipeline", "params.yaml"]
            continue
        deps = stage.get("do", stage)["deps"]
        (code,) = [Path(dep).name.removesuffix(".json") for dep in deps if dep.startswith("data/code/")]
        wanted = [code] if "$" not in code else [code.replace("${item.block}", block) for block in BLOCKS]
        assert set(wanted) <= set(known), name
        here = [ROOT / dep for dep in deps if dep.startswith(("ucir", "pipeline"))]
        assert not [path for path in here if path.suffix == ".py" or list(path.glob("*.py"))], name


def test_pipeline_code_writes_a_file_for_each(project: Path) -> None:
    importlib.import_module("pipeline.code").main()
    written = {file.name.removesuffix(".json") for file in Path("data/code").iterdir()}
    assert written == set(stage_modules())
    params = yaml.safe_load(Path("params.yaml").read_text())
    del params["datasets"]["shapes"]["catalogue"]
    write_params(project, params)
    with pytest.raises(
        UserError, match=r"datasets\.shapes\.catalogue: must stand there .*`uv run ucir study"
    ):
        importlib.import_module("pipeline.code").main()
    assert "Before it can run: params.yaml: datasets.shapes.catalogue: must stand there" in ucir("plan")
    hashes = json.loads(Path("data/code/train-uem.json").read_text())
    assert "ucir/prototypes/merging.py" in hashes


@contextmanager
def _recorded(monkeypatch: pytest.MonkeyPatch, module: Any) -> Iterator[set[str]]:
    """The blocks of a data set that are read once params.yaml has been checked."""
    read: set[str] = set()
    plain = DatasetParams.__getattribute__
    loader = "load_study" if hasattr(module, "load_study") else "load_params"
    load = getattr(module, loader)
    checked = False

    def loaded(**options: Any) -> Any:
        nonlocal checked
        params = load(**options)
        checked = True
        return params

    def recorded(self: DatasetParams, name: str) -> Any:
        if checked and name in DatasetParams.model_fields:
            read.add(name)
        return plain(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(module, loader, loaded)
        patch.setattr(DatasetParams, "__getattribute__", recorded)
        yield read


def test_every_block_that_a_stage_reads_is_among_its_params(
    prepared: Path, store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`source` is a dependency, as pictures; of the catalogue `pretrain` tells MLflow the entry's name."""
    run, setting = "shapes-closed-ucdir", "shapes-closed"
    for stage, key in (
        ("prepare", "shapes"),
        ("pretrain", "shapes"),
        ("evaluate_start", setting),
        ("train", run),
        ("evaluate", run),
    ):
        module = importlib.import_module(f"pipeline.{stage}")
        monkeypatch.setattr(sys, "argv", [stage, key])
        with _recorded(monkeypatch, module) as read:
            module.main()
        params = STAGES[stage]["do"]["params"]
        declared = {param.split(".")[-1] for param in params if param.startswith("datasets.")}
        produced_by_earlier_stages = {"train": {"evaluate", "pack"}, "pretrain": {"pack", "catalogue"}}
        allowed = {"source"} | produced_by_earlier_stages.get(stage, set())
        assert read - allowed <= declared, stage
