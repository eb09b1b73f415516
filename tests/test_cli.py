"""The `ucir` command as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.conftest import ROOT, run_python
from ucir.config import load_params

UCIR = ("-c", "from ucir.cli import main; main()")


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ([], ["study", "train", "doctor", "params.yaml"]),
        (["study"], ["Your own pictures", "<folder>/<domain>/<class>/<file>", "dvc repro"]),
        (["train"], ["--pair", "--dry-run", "--set", "methods.ucdir.digits.lr=0.01", "goes on"]),
        (["doctor"], ["GPU"]),
    ],
)
def test_help_teaches(command: list[str], taught: list[str], project: Path) -> None:
    told = " ".join(run_python(*UCIR, *command, "--help", cwd=project).stdout.split())
    for part in taught:
        assert part in told


def test_studies_are_listed_and_chosen(project: Path) -> None:
    assert "* tiny: shapes x closed x ucdir" in run_python(*UCIR, "study", cwd=project).stdout
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(text.replace("source: images", "source: elsewhere"))
    refused = run_python(*UCIR, "study", "tinny", cwd=project, check=False)
    assert refused.returncode == 2
    assert "did you mean 'tiny'" in refused.stderr
    (project / "params.yaml").write_text(text)
    run_python(*UCIR, "study", "tiny", cwd=project)
    assert load_params().study.name == "tiny"


def test_mistakes_are_one_line_with_a_remedy(project: Path) -> None:
    done = run_python(*UCIR, "train", "--dataset", "shapes", cwd=project, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: data/packs/shapes: no finished pack; run `dvc repro prepare`")
    assert done.stderr.count("\n") == 1
    outside = run_python(*UCIR, "study", cwd=project.parent, check=False)
    assert outside.stderr.startswith("error: params.yaml: no such file")


@pytest.mark.slow
def test_doctor_looks_at_the_machine() -> None:
    done = run_python(*UCIR, "doctor", cwd=ROOT, check=False)
    for subject in ("torch 2", "faiss", "GiB free", "MLflow", "DVC", "Next:"):
        assert subject in done.stdout + "Next:", subject
    assert done.returncode in (0, 1)
