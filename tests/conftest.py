"""Shared fixtures: a tiny data set, its params, projects to run commands in."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from ucir import keep_bytecode

keep_bytecode()
# before torch and ray are imported anywhere
os.environ.update(
    OMP_NUM_THREADS="1",
    RAY_AUTH_MODE="disabled",
    RAY_USAGE_STATS_ENABLED="0",
    RAY_worker_niceness="0",  # 15 else: beside another test that computes, a worker gets next to nothing
    RAY_prestart_worker_first_driver="0",  # a worker for each core, of which few are used
    RAY_TRAIN_HEALTH_CHECK_INTERVAL_S="0.2",
    RAY_TRAIN_ENABLE_PREEMPTION_WATCHER="0",
    RAY_TRAIN_METRICS_ENABLED="0",
    RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
)
for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS"):
    os.environ.pop(name, None)

import numpy as np
import pytest
import torch
import yaml
from hypothesis import settings
from PIL import Image
from typer.testing import CliRunner

from ucir.config.data import DatasetParams, PackParams
from ucir.config.load import load_params
from ucir.data.prepare import write_pack
from ucir.models.checkpoints import save_encoder
from ucir.models.encoder import new_encoder
from ucir.paths import STARTS
from ucir.runs.run import record_start_source

settings.register_profile("ucir", deadline=None, max_examples=25)
settings.load_profile("ucir")
torch.set_num_threads(1)

ROOT = Path(__file__).parent.parent
DOMAINS = ("art", "photo", "real-life")
CLASSES = ("circle", "cross", "square")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Fast tests first, what is wrong shows within seconds; then the longest."""

    def order(item: pytest.Item) -> tuple[bool, bool]:
        return item.get_closest_marker("slow") is not None, "test_hosts" not in item.nodeid

    items.sort(key=order)


def draw(label: str, rng: np.random.Generator, side: int = 20) -> Image.Image:
    """A shape in random colours: something that a tiny network can learn."""
    ground, ink = rng.integers(0, 120, 3), rng.integers(140, 255, 3)
    pixels = np.tile(ground.astype(np.uint8), (side, side, 1))
    y, x = np.mgrid[:side, :side] - side / 2 + rng.uniform(-2, 2, (2, 1, 1))
    shape = {
        "circle": np.hypot(x, y) < side / 3,
        "cross": (abs(x) < side / 8) | (abs(y) < side / 8),
        "square": np.maximum(abs(x), abs(y)) < side / 3,
    }[label]
    pixels[shape] = ink
    return Image.fromarray(pixels)


def make_images(root: Path, per_class: int = 8, domains: tuple[str, ...] = DOMAINS) -> Path:
    """``<root>/<domain>/<class>/<number>.png``; the domains differ in size, the last class is rarer."""
    rng = np.random.default_rng(0)
    for number, domain in enumerate(domains):
        for label in CLASSES:
            folder = root / domain / label
            folder.mkdir(parents=True)
            for image in range(per_class + 2 * number - 2 * (label == "square")):
                draw(label, rng).save(folder / f"{image}.png")
    return root


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set of three domains; not to be written to."""
    return make_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="session")
def pack(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pack at 20 px."""
    out = tmp_path_factory.mktemp("pack")
    write_pack(images, DOMAINS, out, PackParams(side=20))
    return out


SHAPES = {"dataset": "shapes", "setting": "closed"}


def tiny_params(source: str) -> dict[str, Any]:
    """A params.yaml whose whole study runs in seconds."""
    return {
        "study": {
            "name": "tiny",
            "seeds": [0],
            "datasets": {"shapes": {"source": source}},
            "samples": {},
            "settings": {"shapes-closed": SHAPES},
            "runs": {"shapes-closed-ucdir": {**SHAPES, "method": "ucdir", "block": "ucdir"}},
            "sweeps": {},
        },
        "studies": {
            "tiny": {"datasets": ["shapes"], "settings": ["closed"], "methods": ["ucdir"], "seeds": [0]}
        },
        "datasets": {
            "shapes": {
                "source": source,
                "catalogue": "folder",
                "pairs": ["art-photo", "art-real-life"],
                "pack": {"side": 20},
                "view": {"side": 16, "eval_crop": 1.0},
                "start": {
                    "encoder": {"trunk": {"convnet": {"width": 4}}, "feature_dim": 8},
                    "pretrain": {"steps": 3, "batch_size": 16},
                },
                "evaluate": {"cutoffs": [2, 5], "grid_queries": 3},
                "split": {},
            }
        },
        "methods": {
            "ucdir": {
                "shapes": {
                    "epochs": 4,
                    "batch_size": 8,
                    "lr": 0.01,
                    "clusters": 3,
                    "key_momentum": 0.9,
                    "ramp_start": 1,
                    "ramp_end": 2,
                    "cross_domain_start": 2,
                }
            }
        },
    }


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project's folder with a tiny study, as the working directory; nothing is run yet."""
    folder = tmp_path / "my project #1 (100%?)"
    folder.mkdir()
    make_images(folder / "images")
    write_params(folder, tiny_params("images"))
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def prepared(project: Path) -> Path:
    """The project with pack and start weights."""
    params = load_params()
    block = params.datasets["shapes"]
    domains = ["art", "photo", "real-life"]
    write_pack(Path(block.source), domains, Path("data/packs/shapes"), block.pack)
    write_start(block, "shapes")
    return project


def write_start(block: DatasetParams, dataset: str) -> None:
    """Random weights where those of the block's start belong."""
    for name in ("untrained.pt", "start.pt"):
        save_encoder(new_encoder(block.start.encoder, 0), STARTS / dataset / name)
    record_start_source(block, dataset)


@pytest.fixture(scope="session")
def ray_cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A cluster on this machine that holds a training of two workers and who waits for them; its address.

    Begun where few files may be open and TMPDIR is too long for the path of a socket, as on clusters.
    """
    import ray

    from ucir.cluster.launch import connect
    from ucir.config.cluster import ClusterParams

    resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(tmp_path_factory.mktemp("t" * 90)))
        patch.setattr(tempfile, "tempdir", None)
        connect(ClusterParams(num_workers=2), "")
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def run_stage(monkeypatch: pytest.MonkeyPatch, name: str, *arguments: str) -> None:
    """What DVC's command of a stage does, in this process."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    import_module(f"pipeline.{name}").main()


def write_params(folder: Path, params: dict[str, Any]) -> None:
    (folder / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False), encoding="utf-8")


@pytest.fixture(scope="session")
def empty_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow store with its tables: making one takes many seconds, copying it none."""
    from ucir import tracking

    own = tmp_path_factory.getbasetemp()
    shared = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own  # the first process makes it for all
    database = shared / "mlflow.db"
    tracking.init_store(f"sqlite:///{database}")
    return database


@pytest.fixture
def store(empty_store: Path, project: Path) -> str:
    """The project's own MLflow store; returns its address."""
    from ucir import tracking

    shutil.copyfile(empty_store, project / "mlflow.db")
    return tracking.tracking_uri()


def run_python(*arguments: str, cwd: Path, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in a folder, output captured."""
    done = subprocess.run([sys.executable, *arguments], cwd=cwd, capture_output=True, text=True, check=False)
    if check and done.returncode:
        raise AssertionError(f"{arguments} failed:\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}")
    return done


def ucir(*arguments: str) -> str:
    """Run the command in this process; its mistakes come as they are raised."""
    from ucir.cli import app

    done = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert done.exit_code == 0
    return done.stdout
