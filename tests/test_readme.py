"""What the READMEs say is so: commands run, code works, links lead somewhere."""

from __future__ import annotations

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch

from tests.conftest import ROOT
from tests.trainings import CPU, ENCODER, VIEW, Keep
from ucir.cli import main
from ucir.data.pack import open_domain
from ucir.training.epochs import train
from ucir.training.training import Training

READMES = sorted(
    file
    for folder in (".", ".github", "infra", "tests/benchmarks", "ucir")
    for file in (ROOT / folder).glob("*.md" if folder != "ucir" else "*/*.md")
)
ELSEWHERE = {
    "pip install uv && uv run dvc repro": "tests/pipeline/test_repro.py, and CI's own set-up",
    "uv run pytest": "this",
    "uv run mlflow ui --backend-store-uri sqlite:///mlflow.db": "a server, which stays",
    "uv run ucir adapt sketches/ photos/": "tests/runs/test_adapt.py",
    "uv run ucir index photos/ --model sketches_photos": "tests/retrieval/test_search.py",
    "uv run ucir search --index photos/ sketch.png": "tests/retrieval/test_search.py",
    "uv run ucir serve photos/": "tests/serve",
}


def blocks(file: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", file.read_text(encoding="utf-8"), re.M | re.S)


def commands() -> list[str]:
    lines = [
        line.split(" #")[0].strip() for block in blocks(ROOT / "README.md", "") for line in block.splitlines()
    ]
    return [line for line in lines if line.startswith(("pip ", "uv "))]


def test_the_readme_is_short_and_names_every_command_that_is_not_run_here() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160
    assert set(ELSEWHERE) <= set(commands())


def test_the_readmes_commands_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copyfile(ROOT / name, tmp_path / name)
    (tmp_path / ".dvc").mkdir()
    monkeypatch.chdir(tmp_path)
    for command in commands():
        if command in ELSEWHERE:
            continue
        words = shlex.split(command.removeprefix("uv run "))
        assert words[0] == "ucir", f"{command}: say in ELSEWHERE why it is not run here"
        monkeypatch.setattr(sys, "argv", words)
        code: str | int | None = 0
        try:
            main()
        except SystemExit as end:
            code = end.code
        error = capsys.readouterr().err
        unprepared = "no finished pack; run `uv run dvc repro prepare` first" in error
        assert code in (0, None) or unprepared or words[1] == "doctor", f"{command}: {error}"


@pytest.mark.parametrize("file", READMES, ids=lambda file: str(file.relative_to(ROOT)))
def test_links_lead_somewhere(file: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", file.read_text(encoding="utf-8")):
        assert (file.parent / target).exists(), target


def test_ucirs_subcommands_are_those_that_the_readmes_name() -> None:
    from ucir.cli import app

    known = {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    for file in READMES:
        for name in re.findall(r"ucir (\w+)", " ".join(re.findall(r"`([^`]+)`", file.read_text("utf-8")))):
            assert name in known, f"{file.name}: ucir {name}"


def test_the_method_that_methods_readme_adds_can_be_trained(pack: Path, tmp_path: Path) -> None:
    (code,) = blocks(ROOT / "ucir/methods/README.md", "python")
    names: dict[str, object] = {"__name__": "mine"}
    sys.modules["mine"] = type(sys)("mine")
    exec(compile("from __future__ import annotations\n" + code, "mine.py", "exec"), names)
    sys.modules["mine"].__dict__.update(names)
    params, method = names["MineParams"], names["Mine"]
    images = open_domain(pack, "art"), open_domain(pack, "photo")
    given = params(epochs=2, batch_size=8, lr=0.01)  # type: ignore[operator]
    run = Training(images, VIEW, ENCODER, None, method(given, 0), CPU)  # type: ignore[operator]
    reporter = Keep()
    train(run, reporter)
    assert len(reporter.reports) == 2
    assert torch.isfinite(torch.tensor(reporter.reports[-1].metrics["train/loss_total"]))
