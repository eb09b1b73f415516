"""The code that a training, or a stage of dvc.yaml, runs through: found by following its imports.

Run keys hold the code of a training, and dvc.yaml's stages depend on the files that `pipeline.code` writes
from :func:`stage_modules`. A file counts if it is imported, directly or not, by what is run; comments,
docstrings and layout do not count, nor do the modules of :data:`WITHOUT_RESULTS`.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from pkgutil import iter_modules

import ucir

ROOT = Path(ucir.__file__).parent.parent

WITHOUT_RESULTS = (
    "ucir.config",  # what is configured is in the key, or among a stage's params, by its value
    "ucir.cluster",
    "ucir.errors",
    "ucir.methods.registry",  # names; the values that an ablation fixes are in the key
    "ucir.paths",
    "ucir.progress",
    "ucir.runs.params",
    "ucir.runs.process",
    "ucir.runs.run",
    "ucir.runs.dependencies",
    "ucir.runs.study",
    "ucir.tracking",
)
"""Modules, with all below them, that spread, show, name or check what others compute; not followed either."""

TRAINING = ("ucir.training.epochs", "ucir.data.pack", "ucir.data.splits")
"""What every training runs through, whatever its method."""

START = ("ucir.training.start", "ucir.training.epochs", "ucir.data.pack")
"""What the label-free start runs through."""

EMBEDDING = ("ucir.models.embedding",)
"""What a frozen trunk's features run through."""

STAGES = {
    "sample": ("pipeline.sample",),
    "prepare": ("pipeline.prepare",),
    "pretrain": ("pipeline.pretrain", *START),
    "embed": ("pipeline.embed", *EMBEDDING),
    "evaluate_start": ("pipeline.evaluate_start",),
    "evaluate": ("pipeline.evaluate",),
    "report": ("pipeline.report",),
}
"""Stage of dvc.yaml to where it begins; `train` and `tune` depend on their method's training as well."""


ENCODING = ("pretrain", "embed", "evaluate_start", "evaluate")
"""Those of them that compute with an encoder."""


def training_modules(method: str) -> tuple[str, ...]:
    """Where a training of a method begins."""
    from ucir.methods.registry import METHODS

    return (*TRAINING, METHODS[method].__module__)


def stage_modules() -> dict[str, tuple[str, ...]]:
    """Every stage by its name, ``train-<block>`` and ``tune-<block>`` for each method's block.

    They depend on all kinds of trunks, of which a run's key holds its own.
    """
    from ucir.methods.registry import METHODS, VARIANTS
    from ucir.models import trunks

    kinds = tuple(f"{trunks.__name__}.{name}" for _, name, _ in iter_modules(trunks.__path__))
    blocks = [name for name in METHODS if name not in VARIANTS]
    return {
        **{name: (*begin, *(kinds if name in ENCODING else ())) for name, begin in STAGES.items()},
        **{f"train-{block}": (*training_modules(block), *kinds) for block in blocks},
        **{f"tune-{block}": (*training_modules(block), *kinds, "ucir.runs.sweep") for block in blocks},
    }


def code_hashes(modules: Iterable[str], root: Path = ROOT) -> dict[str, str]:
    """File (relative to ``root``) to the hash of its code, for all that these modules import."""
    hashes: dict[str, str] = {}
    waiting, seen = list(modules), set()
    while waiting:
        module = waiting.pop()
        if module in seen or _without_results(module):
            continue
        seen.add(module)
        file = _file(root, module)
        if file is None:
            continue
        waiting += _parents(module)
        imported, digest = _read(file, module, root)
        waiting += imported
        if digest:
            hashes[file.relative_to(root).as_posix()] = digest
    return dict(sorted(hashes.items()))


def code_version(modules: Iterable[str]) -> str:
    """Hash of the code of all that these modules import, hex."""
    hashes = code_hashes(modules)
    return hashlib.sha256(
        "".join(f"{file} {digest}\n" for file, digest in hashes.items()).encode()
    ).hexdigest()


def _without_results(module: str) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in WITHOUT_RESULTS)


def _file(root: Path, module: str) -> Path | None:
    path = root.joinpath(*module.split("."))
    for file in (path / "__init__.py", path.with_suffix(".py")):
        if file.exists():
            return file
    return None


def _parents(module: str) -> list[str]:
    parts = module.split(".")
    return [".".join(parts[:length]) for length in range(2, len(parts))]


@cache
def _read(file: Path, module: str, root: Path) -> tuple[tuple[str, ...], str]:
    """What a file imports of ours, wherever in it, and its hash; no hash where nothing but words is in it."""
    tree = ast.parse(file.read_bytes())
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            imported += [node.module, *(name for name in names if _file(root, name))]
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [part for part in node.body if not _is_text(part)]
    ours = tuple(name for name in imported if name.split(".")[0] in ("ucir", "pipeline"))
    return ours, hashlib.sha256(ast.dump(tree).encode()).hexdigest()[:16] if tree.body else ""


def _is_text(node: ast.stmt) -> bool:
    """Docstrings, and those of attributes."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
