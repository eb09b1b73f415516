"""The `ucir` command as a user meets it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.conftest import ROOT, run_python, tiny_params, ucir, write_params
from ucir.cli import app
from ucir.config.load import load_params, parse_yaml
from ucir.errors import UserError

UCIR = ("-c", "from ucir.cli import main; main()")


@pytest.mark.parametrize(
    ("command", "taught"),
    [
        ([], ["study", "train", "doctor", "params.yaml"]),
        (["study"], ["ucir adapt", "<domain>/<class>/<file>", "dvc repro"]),
        (["adapt"], ["sketches/ photos/", "--trunk", "--weights", "--dry-run", "models/NAME/model.pt"]),
        (["train"], ["--pair", "--dry-run", "--set", "methods.ucdir.digits.lr=0.01", "goes on"]),
        (["doctor"], ["GPU"]),
    ],
)
def test_help_teaches(command: list[str], taught: list[str], project: Path) -> None:
    text = " ".join(ucir(*command, "--help").split())
    for part in taught:
        assert part in text


def test_studies_are_listed_and_chosen(project: Path) -> None:
    assert "* tiny: shapes x closed x ucdir" in ucir("study")
    with pytest.raises(UserError, match="did you mean 'tiny'"):
        ucir("study", "tinny")
    text = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(
        text.replace("  tiny:\n    datasets:\n    - shapes", "  tiny:\n    datasets:\n    - shape")
    )
    assert "cannot run: studies.tiny: no data set 'shape'" in ucir("study")
    (project / "params.yaml").write_text(text.replace("name: tiny", "name: other"))
    ucir("study", "tiny")
    assert load_params().study.name == "tiny"
    chosen = parse_yaml(project / "params.yaml")
    write_params(project, {key: block for key, block in chosen.items() if key != "study"})
    with pytest.raises(UserError, match=r"params\.yaml: study: missing: `uv run ucir study NAME` writes it"):
        load_params()
    assert "  tiny: shapes" in ucir("study")
    ucir("study", "tiny")
    assert parse_yaml(project / "params.yaml") == chosen
    shutil.rmtree(project / "images")
    with pytest.raises(UserError, match="images: no such folder"):
        ucir("study", "tiny")


def test_mistakes_are_one_line_with_a_remedy(project: Path) -> None:
    with pytest.raises(
        UserError, match="data/packs/shapes: no finished pack; run `uv run dvc repro prepare`"
    ):
        ucir("train", "--dataset", "shapes")
    with pytest.raises(UserError, match="did you mean 'shapes'"):
        ucir("train", "--dataset", "shape")
    elsewhere = json.dumps({**parse_yaml(project / "params.yaml")["datasets"]["shapes"], "source": "x"})
    for override in ("datasets.shapes.source=x", f"datasets.shapes={elsewhere}", f"datasets.new={elsewhere}"):
        with pytest.raises(UserError, match=r"--set datasets.\w+: source .* write it into params.yaml"):
            ucir("train", "--dataset", "shapes", "--set", override)
    warm = "methods.pcs.shapes={clusters: 3, kmeans_warm: 5}"
    with pytest.raises(UserError, match=r"methods.pcs.shapes.kmeans_warm: 5 is refused: this method starts"):
        ucir("train", "--dataset", "shapes", "--method", "pcs", "--set", warm)
    with pytest.raises(UserError, match="sweep 'nosuch' is unknown"):
        ucir("tune", "nosuch")
    assert not Path("results").exists()
    outside = run_python(*UCIR, "study", cwd=project.parent, check=False)
    assert outside.returncode == 2
    assert outside.stderr.startswith("error: params.yaml: no such file")
    assert outside.stderr.count("\n") == 1


def test_a_study_that_its_files_cannot_serve_is_refused_by_their_number(project: Path) -> None:
    params = tiny_params("images")
    params["methods"]["ucdir"]["shapes"]["batch_size"] = 64
    params["studies"]["halves"] = {**params["studies"]["tiny"], "settings": ["open"]}
    write_params(project, params)
    with pytest.raises(UserError, match="batch_size = 64 exceeds the 28 images of the larger"):
        ucir("study", "tiny")
    for domain in ("art", "photo", "real-life"):
        (project / "images" / domain / "circle").rename(project / "images" / domain / f"{domain}-circle")
        (project / "images" / domain / "cross").rename(project / "images" / domain / f"{domain}-cross")
    params["methods"]["ucdir"]["shapes"] |= {"batch_size": 4, "clusters": 10}
    write_params(project, params)
    ucir("study", "tiny")
    with pytest.raises(UserError, match=r"clusters = 10 exceeds the . images .* 'open' leaves"):
        ucir("study", "halves")
    for domain in ("art", "photo"):
        (project / "images" / domain / "square").rename(project / "images" / domain / f"{domain}-square")
    with pytest.raises(UserError, match="setting 'open' needs classes that every domain has"):
        ucir("study", "halves")


def test_a_study_is_not_changed_under_a_running_repro(project: Path) -> None:
    lock = project / ".dvc/tmp/rwlock"
    lock.parent.mkdir(parents=True)
    before = (project / "params.yaml").read_bytes()
    with subprocess.Popen([sys.executable, "-c", "input()", "repro"], stdin=subprocess.PIPE) as running:
        lock.write_text(json.dumps({"read": {"params.yaml": [{"pid": running.pid, "cmd": "dvc repro"}]}}))
        with pytest.raises(UserError, match=rf"`dvc repro` runs here \(process {running.pid}\)"):
            ucir("study", "tiny")
        assert (project / "params.yaml").read_bytes() == before
        running.kill()
    ucir("study", "tiny")


@pytest.mark.slow
def test_doctor_looks_at_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    done = CliRunner().invoke(app, ["doctor"], catch_exceptions=False)
    for subject in ("torch 2", "faiss", "GiB free", "MLflow", "DVC"):
        assert subject in done.stdout, subject
    looks = "LOOK" in done.stdout
    last = done.stdout.strip().splitlines()[-1]
    assert last == ("See the lines marked LOOK" if looks else "Next: `uv run dvc repro`")
    assert done.exit_code == int(looks)
