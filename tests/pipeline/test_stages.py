"""Mistakes stop a stage at once, with one line that names the fault and the remedy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import ROOT, tiny_params, write_params


def stage(folder: Path, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"pipeline.{name}", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def refused(folder: Path, name: str, *arguments: str) -> str:
    done = stage(folder, name, *arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert not (folder / "runs").exists()
    return done.stderr


def test_a_typo_in_a_method_stops_the_first_stage(project: Path) -> None:
    params = tiny_params("images")
    params["methods"]["ucdir"]["shapes"]["lrr"] = 1
    write_params(project, params)
    told = refused(project, "prepare", "shapes")
    assert "params.yaml: methods.ucdir.shapes.lrr: unknown key; did you mean 'lr'?" in told


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("no folder", "images: no such folder"),
        ("one domain", "1 domain folder(s) (art); cross-domain retrieval needs at least two"),
        ("no domain", "pair 'art-photo' is not two domains joined by '-'"),
        ("empty class", "art/cross: empty class folder"),
        (
            "broken file",
            "1 of 23 files are bad, more than max_bad_share = 0.01 (art/cross/x.png: not an image)",
        ),
        ("read-only", "data/packs/shapes: cannot be written to"),
    ],
)
def test_bad_data_stops_prepare(project: Path, fault: str, told: str) -> None:
    images = project / "images"
    if fault == "no folder":
        shutil.rmtree(images)
    elif fault == "one domain":
        shutil.rmtree(images / "photo")
        shutil.rmtree(images / "real-life")
    elif fault == "no domain":
        shutil.rmtree(images / "photo")
    elif fault == "empty class":
        shutil.rmtree(images / "art/cross")
        (images / "art/cross").mkdir()
    elif fault == "broken file":
        (images / "art/cross/x.png").write_bytes(b"no image")
    else:  # the tests may run as root, whom no mode stops
        (project / "data").write_text("a file where a folder should be")
    assert told in refused(project, "prepare", "shapes")
    assert not (project / "data/packs/shapes/pack.json").exists()


def test_stages_in_the_wrong_order_name_the_right_one(project: Path) -> None:
    assert "no finished pack; run `dvc repro prepare` first" in refused(project, "pretrain", "shapes")
    done = stage(project, "prepare", "shapes")
    assert done.returncode == 0, done.stderr
    assert "22 art, 28 photo" in done.stdout or "22 art" in done.stdout
    assert "no start weights" in refused(project, "train", "shapes", "closed", "ucdir")
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["datasets"]["shapes"]["start"] = {
        "encoder": {"backbone": "convnet", "width": 4},
        "checkpoint": "moco.pt",
    }
    write_params(project, params)
    assert "moco.pt: no such checkpoint" in refused(project, "pretrain", "shapes")
