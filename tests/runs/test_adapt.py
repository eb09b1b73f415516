"""`ucir adapt`: two folders become a study, and a model in one file."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import yaml
from PIL import Image

from tests.conftest import draw, run_stage, tiny_params, write_params
from tests.runs.test_settings import run_study
from ucir.cli import adapt
from ucir.config.load import load_params
from ucir.errors import UserError
from ucir.models.model import load_model
from ucir.retrieval.evaluation import load_features
from ucir.runs.adapt import Options, plan_adaptation
from ucir.runs.pace import embedding_pace

Command = Callable[..., None]
MEASURED: list[float] = []


def pace_measured_once(*given: Any) -> float:
    """Of embedding, which takes seconds to measure."""
    if not MEASURED:
        MEASURED.append(embedding_pace(*given))
    return MEASURED[0]


def fill(folder: Path, per_class: int = 8, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for label in ("circle", "cross", "square"):
        for number in range(per_class):
            draw(label, rng, 40).save(folder / f"{label}{number}.png")
    return folder


@pytest.fixture
def command(project: Path, store: str, monkeypatch: pytest.MonkeyPatch) -> Command:
    """The command on a project whose settings are small, with the stages run in this process."""
    params = tiny_params("images")
    params["datasets"]["pacs"] = params["datasets"]["shapes"]
    params["methods"]["consensus"] = {"pacs": {"epochs": 2, "clusters": 3}}
    params["methods"]["ucdir"]["pacs"] = {"epochs": 2, "clusters": 4}
    write_params(project, params)

    def repro(arguments: list[str]) -> int:
        (name,) = load_params().study.datasets
        for stage in ("prepare", "pretrain", "embed"):
            run_stage(monkeypatch, stage, name)
        run_study()
        return 0

    monkeypatch.setattr("dvc.cli.main", repro)
    monkeypatch.setattr("ucir.runs.adapt.embedding_pace", pace_measured_once)

    def call(first: Path, second: Path, dry_run: bool = False, **options: object) -> None:
        names = ("name", "method", "trunk", "weights", "trained", "clusters", "epochs")
        adapt(first, second, dry_run=dry_run, **{name: options.get(name) for name in names})

    return call


def test_two_folders_become_a_model_in_one_file(
    command: Command, tmp_path: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sketches, photos = fill(tmp_path / "my sketches"), fill(tmp_path / "photos", seed=1)
    command(sketches, fill(tmp_path / "others"), dry_run=True, name="my_sketches_photos")
    capsys.readouterr()
    command(sketches, photos, dry_run=True)
    told = capsys.readouterr().out
    links = {path.name for path in Path("data/sources/my_sketches_photos").iterdir() if path.is_symlink()}
    assert links == {"my_sketches", "photos"}, "not of the folders that were tried before"
    assert "24 files of my_sketches and 24 files of photos" in told
    assert "learnt with ImageNet's labels" in told
    assert "apache-2.0" in told
    assert all(f"{word}: " in told for word in ("network", "trained", "time", "memory", "disk"))
    assert not Path("data/packs/my_sketches_photos").exists()
    command(sketches, photos)
    file = Path("models/my_sketches_photos/model.pt")
    assert f"model: {file}" in capsys.readouterr().out
    shutil.rmtree("data/start")  # the file needs nothing beside it
    model = load_model(file)
    assert model.domains == ("my_sketches", "photos")
    assert model.facts["weights"]["licence"] == "apache-2.0"
    picture = np.asarray(Image.open(photos / "circle0.png"))
    (features,) = model.features([picture], domain="photos")
    results = Path("results/my_sketches_photos/closed/consensus/evaluate/my_sketches-photos-s0.npz")
    stored = load_features(results)["photos"]
    assert (features.numpy() @ stored.float().numpy().T).max() > 0.999
    assert {name: tuple(x.shape) for name, x in model.samples.items()} == {
        "my_sketches": (24, 128),
        "photos": (24, 128),
    }
    scores = json.loads((results.parent.parent / "metrics.json").read_text())
    assert scores == {"mean": {}, "directions": {}}, "no labels, so no scores"


def test_a_second_call_does_nothing_and_new_pictures_are_taken_up(
    command: Command, tmp_path: Path, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sketches, photos = fill(tmp_path / "sketches"), fill(tmp_path / "photos", seed=1)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "small.pth")
    small = {"trunk": "test_resnet", "weights": str(tmp_path / "small.pth")}
    command(sketches, photos, name="mine", method="ucdir", clusters=3, **small)
    file, params = Path("models/mine/model.pt"), Path("params.yaml")
    before = file.stat().st_mtime_ns, params.read_text()
    capsys.readouterr()
    command(sketches, photos, name="mine")
    assert "models/mine/model.pt is up to date" in capsys.readouterr().out
    assert (file.stat().st_mtime_ns, params.read_text()) == before
    listed = Path("data/sources/mine/.contents.csv").read_text()
    draw("circle", np.random.default_rng(9), 40).save(photos / "new.png")
    command(sketches, photos, name="mine", dry_run=True)
    assert "up to date" not in capsys.readouterr().out
    command(sketches, photos, name="mine")
    told = capsys.readouterr().out
    assert "time: " in told
    assert "25 files of photos" in told
    assert Path("data/sources/mine/.contents.csv").read_text() != listed, "or DVC would not see it"
    assert file.stat().st_mtime_ns != before[0]
    with pytest.raises(UserError, match="--method protoot: the model 'mine' was made with 'ucdir'"):
        command(sketches, photos, name="mine", method="protoot")
    with pytest.raises(UserError, match=r"'mine' is adapted to .*sketches and .*photos already"):
        command(photos, fill(tmp_path / "others"), name="mine")
    with pytest.raises(UserError, match="'shapes' is another data set already"):
        command(sketches, photos, name="shapes")


def test_mistakes_are_one_line_before_any_work(command: Command, tmp_path: Path, project: Path) -> None:
    sketches, photos = fill(tmp_path / "sketches"), fill(tmp_path / "photos", seed=1)
    (tmp_path / "empty").mkdir()
    (tmp_path / "weights.pth").write_bytes(b"no weights")
    before = Path("params.yaml").read_text()
    for first, second, options, message in (
        (sketches, tmp_path / "nowhere", {}, "nowhere: no such folder"),
        (sketches, tmp_path / "empty", {}, "empty: no picture in it: give a folder of picture files"),
        (sketches, photos / "cross0.png", {}, "is no folder"),
        (sketches, sketches, {}, "the same folder twice"),
        (tmp_path, photos, {}, "photos lies in "),
        (project, photos, {}, "holds this project"),
        (sketches, photos, {"name": "a/b"}, "--name 'a/b': give one of letters"),
        (sketches, photos, {"name": "embedded"}, "the name of the network that came with the installation"),
        (sketches, photos, {"name": "tiny"}, "'tiny' is another study already: give a --name"),
        (sketches, photos, {"method": "dgdir"}, "--method dgdir: no settings under methods.dgdir.pacs"),
        (
            sketches,
            photos,
            {"trunk": "resnet10tt"},
            "--trunk = 'resnet10tt': timm has no such network; did you mean 'resnet10t'",
        ),
        (sketches, photos, {"trunk": "#"}, "--trunk = '#': timm has no such network; there is: .* more$"),
        (sketches, photos, {"weights": "no/weights.pt"}, "--weights no/weights.pt: no such file"),
        (sketches, photos, {"weights": str(tmp_path / "weights.pth")}, "weights.pth: "),
        (sketches, photos, {"trained": "tail"}, "--trained tail: give head, last or all"),
        (sketches, photos, {"epochs": 0}, "epochs"),
        (sketches, photos, {"clusters": 1000}, "--clusters 1000: more than the 24 pictures"),
        (sketches, fill(tmp_path / "few", per_class=1), {}, r"few: 3 picture\(s\): too few"),
    ):
        with pytest.raises(UserError, match=message) as error:
            command(first, second, **options)
        assert "\n" not in str(error.value)
        assert Path("params.yaml").read_text() == before


def test_what_is_left_out_and_what_cannot_be_read_is_told_by_the_given_folders(
    command: Command,
    tmp_path: Path,
    project: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sketches, photos = fill(tmp_path / "sketches"), fill(tmp_path / "photos", seed=1)
    (photos / "more").mkdir()
    for name in photos.glob("cross*.png"):
        name.rename(photos / "more" / name.name)
    command(sketches, photos, dry_run=True)
    told = capsys.readouterr().out
    assert "24 files of sketches and 8 files of photos" in told
    assert "left out: 16 files of photos that lie beside its class folders" in told
    assert "files of sketches that" not in told
    (photos / "gone").symlink_to("nowhere")
    with pytest.raises(UserError, match=f"^{photos}/gone: a link that leads nowhere; remove it$"):
        command(sketches, photos, dry_run=True)
    (photos / "gone").unlink()
    scan = os.scandir

    def refuse(folder: Any) -> Any:
        if Path(folder).name == "more":
            raise PermissionError(13, "Permission denied")
        return scan(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=f"^{photos}/more: this user may not read it: `chmod"):
        command(sketches, photos, dry_run=True)


def test_folders_of_the_same_name_are_told_apart(command: Command, tmp_path: Path, project: Path) -> None:
    one, other = fill(tmp_path / "a/pictures"), fill(tmp_path / "b/pictures", seed=1)
    made = plan_adaptation(one, other, None, Options())
    assert list(made.folders) == ["a_pictures", "b_pictures"]
    one, other = fill(tmp_path / "スケッチ"), fill(tmp_path / "my-photos", seed=1)
    made = plan_adaptation(one, other, None, Options())
    assert (list(made.folders), made.name) == (["スケッチ", "my_photos"], "my_photos")
    with pytest.raises(UserError, match="--name '': give one of letters A to Z"):
        plan_adaptation(one, fill(tmp_path / "写真"), None, Options())
    assert yaml.safe_load(Path("params.yaml").read_text())["datasets"].keys() >= {"shapes", "pacs"}
