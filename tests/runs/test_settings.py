"""Label spaces through the pipeline: what is trained on, scored and told; and no labels at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import make_images, tiny_params, ucir, write_params, write_start
from ucir.cluster.launch import train_all
from ucir.config.load import load_params
from ucir.data.pack import DomainImages, read_index
from ucir.data.prepare import prepared_domains, write_pack
from ucir.errors import UserError
from ucir.paths import PACKS, REPORTS, RESULTS
from ucir.reports.write import write_report
from ucir.retrieval.evaluation import evaluate_method, evaluate_start, load_features, read_scores
from ucir.runs.params import gate_choice
from ucir.runs.run import materialise, plan_runs
from ucir.runs.study import activate


def run_study() -> None:
    """The stages of the active study, in this process."""
    params = load_params()
    for key, part in params.study.settings.items():
        gate = gate_choice(params, params.study.settings[key].dataset, None)
        evaluate_start(params, key, gate, RESULTS)
        for run in params.study.runs.values():
            if (run.dataset, run.setting) != (part.dataset, part.setting):
                continue
            runs = plan_runs(params, run.dataset, run.setting, run.method, run.pairs)
            train_all(runs, params.cluster)
            for one in runs:
                materialise(one, RESULTS / run.dataset / run.setting / run.method / "train")
            gate = gate_choice(params, run.dataset, run.method)
            evaluate_method(params, run.dataset, run.setting, run.method, gate, RESULTS)
    write_report(params, PACKS, RESULTS, REPORTS)


def choose(project: Path, settings: list[str], pairs: list[str] | None = None) -> None:
    params = tiny_params("images")
    params["datasets"]["shapes"]["split"] = {"shared": ["circle"]}
    params["methods"]["ucdir"]["shapes"] |= {"epochs": 1, "ramp_start": 0, "ramp_end": 1, "batch_size": 4}
    params["methods"]["ucdir"]["shapes"] |= {"cross_domain_start": 0}
    params["studies"]["tiny"]["settings"] = settings
    if pairs:
        params["studies"]["tiny"]["pairs"] = pairs
    write_params(project, params)
    activate(project / "params.yaml", "tiny")


def test_partial_and_open_train_each_direction_on_its_label_spaces(prepared: Path, store: str) -> None:
    choose(prepared, ["partial", "open"], ["art>photo", "art-real-life"])
    params = load_params()
    for setting, kept in (("partial", 0), ("open", 1)):
        runs = plan_runs(
            params, "shapes", setting, "ucdir", params.study.runs[f"shapes-{setting}-ucdir"].pairs
        )
        assert [run.pair for run in runs] == [("art", "photo"), ("art", "real-life"), ("real-life", "art")]
        for run in runs:
            opened = {images.name: images for images in run.images()}
            for role, (domain, images) in enumerate((domain, opened[domain]) for domain in run.pair):
                assert isinstance(images, DomainImages)
                index = read_index(run.pack, domain)
                labels = {index[row].label for row in images.row_N}
                assert labels == ({"circle"} if role == kept else {"circle", "cross", "square"})
                expected = [picture.slot for picture in index if picture.label in labels]
                assert images.row_N.tolist() == expected
                assert np.array_equal(images.pixels(slice(None)), images.stored_MSS3[expected])
                assert images.size_N2.tolist() == [[index[i].width, index[i].height] for i in expected]
            assert run.counts == tuple(len(opened[domain]) for domain in run.pair)
    run_study()
    for setting in ("partial", "open"):
        folder = RESULTS / "shapes" / setting
        spaces = json.loads((folder / "label_spaces.json").read_text())
        assert spaces == {
            "query": ["circle"] if setting == "partial" else ["circle", "cross", "square"],
            "gallery": ["circle"] if setting == "open" else ["circle", "cross", "square"],
            "tail": None,
            "ratio": 1,
            "seed": None,
        }
        wanted = [("art", "photo"), ("art", "real-life"), ("real-life", "art")]
        for method in ("start/untrained", "start/frozen", "start/centred", "start/pretrained", "ucdir"):
            scores = read_scores(folder / method / "metrics.json")
            assert list(dict.fromkeys((s.query, s.gallery) for s in scores)) == wanted
        facts = json.loads((folder / "ucdir/train/art-photo-s0/run.json").read_text())
        assert facts["label_spaces"] == {k: v for k, v in spaces.items() if k != "seed"}
        features = load_features(folder / "ucdir/evaluate/art-photo-s0.npz")
        circles = sum(p.label == "circle" for p in read_index(PACKS / "shapes", "art"))
        assert len(features["art"]) == (circles if setting == "partial" else 22)
    # with one class in the gallery, every shared query finds nothing else, and private ones do not count
    assert {s.scores["P_at_2"] for s in read_scores(RESULTS / "shapes/open/ucdir/metrics.json")} == {100.0}
    page = (REPORTS / "report.html").read_text()
    assert "Classes of the queries: circle." in page
    assert "shapes, open" in page


def test_long_tailed_trainings_are_scored_on_all_pictures(prepared: Path, store: str) -> None:
    choose(prepared, ["tailed-1", "tailed-6"], ["art-photo"])
    run_study()
    for setting, sizes in (("tailed-1", [6, 6, 6]), ("tailed-6", [1, 3, 8])):
        (run,) = plan_runs(load_params(), "shapes", setting, "ucdir")[:1]
        index = read_index(run.pack, "art")
        labels = [index[row].label for row in run.images()[0].row_N]
        assert sorted(map(labels.count, set(labels))) == sizes
        assert run.counts[0] == sum(sizes)
        features = load_features(RESULTS / "shapes" / setting / "ucdir/evaluate/art-photo-s0.npz")
        assert len(features["art"]) == len(index)
        scores = read_scores(RESULTS / "shapes" / setting / "ucdir/metrics.json")
        assert {(s.query, s.gallery) for s in scores} == {("art", "photo"), ("photo", "art")}
    page = (REPORTS / "report.html").read_text()
    assert "shapes: P@2 in percent by imbalance" in page
    assert "6 : 1 from the first to the last" in page
    assert "| method | 1 : 1 | 6 : 1 |" in (REPORTS / "results.md").read_text()


def test_a_training_of_other_label_spaces_is_another_run(prepared: Path) -> None:
    choose(prepared, ["open"])
    keys = {run.key for run in plan_runs(load_params(), "shapes", "open", "ucdir")}
    other = load_params(overrides=["datasets.shapes.split.shared=[cross]"])
    assert not keys & {run.key for run in plan_runs(other, "shapes", "open", "ucdir")}
    closed = {run.key for run in plan_runs(other, "shapes", "closed", "ucdir")}
    assert closed == {run.key for run in plan_runs(load_params(), "shapes", "closed", "ucdir")}


def flat(root: Path) -> None:
    """Two folders of pictures, no classes."""
    rng = np.random.default_rng(0)
    for domain in ("sketches", "photos"):
        (root / domain).mkdir(parents=True)
        for number in range(12):
            pixels = rng.integers(0, 255, (20, 20, 3), np.uint8)
            Image.fromarray(pixels).save(root / domain / f"{number}.png")


def test_the_best_epoch_is_kept_only_where_asked(prepared: Path, store: str) -> None:
    choose(prepared, ["closed"], ["art-photo"])
    text = (prepared / "params.yaml").read_text()
    assert "    evaluate:\n" in text
    changed = text.replace("    evaluate:\n", "    evaluate:\n      keep_best: false\n")
    (prepared / "params.yaml").write_text(changed)
    run_study()
    folder = RESULTS / "shapes/closed/ucdir"
    assert {s.epoch_choice for s in read_scores(folder / "metrics.json")} == {"last"}
    assert [file.name for file in folder.glob("train/*/*.pt")] == ["last.pt"]
    assert "best" not in (REPORTS / "results.csv").read_text()
    assert "best" not in (REPORTS / "results.md").read_text()


def test_two_folders_without_labels_go_all_the_way(
    project: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    flat(project / "mine")
    study = tiny_params("images")
    block = study["datasets"]["shapes"] | {"source": "mine", "pairs": ["sketches-photos"]}
    mine = {
        "datasets": {"mine": block},
        "methods": {"ucdir": {"mine": study["methods"]["ucdir"]["shapes"]}},
        "sweeps": {"rates": {"dataset": "mine", "method": "ucdir", "trials": 2, "space": {"lr": [0.1, 0.2]}}},
        "studies": {"mine": study["studies"]["tiny"] | {"datasets": ["mine"]}},
    }
    (project / "mine.yaml").write_text(json.dumps(mine))
    text = ucir("study", "mine.yaml")
    assert "`uv run dvc repro` now runs the study 'mine'" in text
    assert "rates: ucdir on mine, 2 candidates of lr" in ucir("tune")
    params = load_params()
    pack_block = params.datasets["mine"]
    write_pack(Path("mine"), prepared_domains(pack_block), PACKS / "mine", pack_block.pack)
    write_start(pack_block, "mine")
    run_study()
    assert read_scores(RESULTS / "mine/closed/ucdir/metrics.json") == []
    assert not (RESULTS / "mine/closed/ucdir/train/sketches-photos-s0/best.pt").exists()
    page = (REPORTS / "report.html").read_text()
    assert "No labels: the pictures are not in class folders, so there are no scores" in page
    assert "sketches → photos" in page
    assert "loss term" in page
    assert (REPORTS / "results.csv").read_text().count("\n") == 1
    assert "mine, closed: no labels" in (REPORTS / "results.md").read_text()
    with pytest.raises(UserError, match="needs class folders"):
        plan_runs(params, "mine", "open", "ucdir")
    capsys.readouterr()
    assert "no labels, so no scores" in ucir("train", "--dataset", "mine")


def test_check_and_fetch_at_the_command_line(project: Path) -> None:
    from typer.testing import CliRunner

    from ucir.cli import app

    assert "shapes: as expected" in ucir("check", "shapes")
    with pytest.raises(UserError, match="elsewhere"):
        ucir("check", "shapes", "--set", "datasets.shapes.source=elsewhere")
    (project / "images/art/circle/broken.png").write_bytes(b"no image")
    done = CliRunner().invoke(app, ["check", "shapes"])
    assert done.exit_code == 1
    assert "left out art/circle/broken.png: not an image" in done.stdout
    with pytest.raises(UserError, match="data set 'shape' is unknown; did you mean 'shapes'"):
        ucir("check", "shape")
    text = ucir("fetch")
    for part in ("office_home: Office-Home", "OfficeHomeDataset_10072016.zip", "cite: Peng et al."):
        assert part in text
    assert "nothing to fetch" in text
    make_images(project / "more")
    assert "there: images" in ucir("fetch", "shapes")


def test_check_and_study_tell_what_would_stop_the_stages(project: Path) -> None:
    from typer.testing import CliRunner

    from ucir.cli import app

    before = (project / "params.yaml").read_text()
    changed = tiny_params("images")
    block = changed["datasets"]["shapes"]

    def told(changes: dict[str, object], settings: list[str] | None = None) -> tuple[str, str]:
        """What `study` refuses and what `check` looks at, for the same data set."""
        studies = {
            "mine": changed["studies"]["tiny"] | {"datasets": ["mine"], "settings": settings or ["closed"]}
        }
        mine = {"datasets": {"mine": {**block, **changes}}, "studies": studies}
        mine["methods"] = {"ucdir": {"mine": changed["methods"]["ucdir"]["shapes"]}}
        (project / "mine.yaml").write_text(json.dumps(mine))
        with pytest.raises(UserError) as caught:
            ucir("study", "mine.yaml")
        assert (project / "params.yaml").read_text() == before, "a study that cannot run is not chosen"
        there = tiny_params("images")
        there["datasets"]["shapes"] |= changes
        there["study"]["datasets"]["shapes"]["source"] = there["datasets"]["shapes"]["source"]
        write_params(project, there)
        done = CliRunner().invoke(app, ["check", "shapes"])
        (project / "params.yaml").write_text(before)
        return str(caught.value), done.stdout if done.exit_code == 1 else "as expected"

    (project / "empty").mkdir()
    for answer in told({"source": "empty"}):
        assert "0 domain folder(s)" in answer
    make_images(project / "one", domains=("art",))
    for answer in told({"source": "one"}):
        assert "1 domain folder(s) (art)" in answer
    for answer in told({"pairs": ["art-phote"]}):
        assert "no domain 'phote'; did you mean 'photo'?" in answer
    for answer in told({"split": {"shared": ["circel"]}}, ["partial"]):
        assert "class 'circel' is unknown; did you mean 'circle'?" in answer
    make_images(project / "linked")
    (project / "linked/art/circle/gone.png").symlink_to("nowhere.png")
    for answer in told({"source": "linked"}):
        assert "linked/art/circle/gone.png: a link that leads nowhere; remove it" in answer
    make_images(project / "bad")
    (project / "bad/art/circle/bad.png").write_bytes(b"no image")
    write_params(project, tiny_params("bad"))
    done = CliRunner().invoke(app, ["check", "shapes"])
    assert "1 of 23 files are bad, more than pack.max_bad_share = 0.01" in done.stdout
    (project / "params.yaml").write_text(before)
    flat(project / "flat")
    study, _ = told({"source": "flat", "pairs": ["sketches-photos"]}, ["closed", "open"])
    assert "setting 'open' needs class folders" in study
    start = {"encoder": block["start"]["encoder"], "checkpoint": "moco.pt"}
    study, _ = told({"start": start, "source": "one"})
    assert "moco.pt: no such checkpoint; put it there, or let start.checkpoint be an address" in study
    assert "moco_v2_800ep_pretrain.pth.tar" in study


def test_a_study_file_with_a_fault_leaves_params_as_they_were(project: Path) -> None:
    before = (project / "params.yaml").read_text()
    one = "studies: {mine: {datasets: [shapes], settings: [closed], methods: [ucdir], seeds: [0]}}"
    faults = {
        "datasets: {mine: {sorce: mine}}\nstudies: {mine: {}}": "did you mean 'source'",
        "studies: {}": "'studies' must hold one study, found none",
        "study: {}": "study: unknown key; did you mean 'studies'",
        one.replace("shapes", "shapse"): "did you mean 'shapes'",
        one.replace("ucdir", "dalr"): "did you mean 'darl'",
        one.replace("closed", "close"): "setting 'close' is unknown",
        "studies: [": "mine.yaml: not readable as YAML",
    }
    for text, message in faults.items():
        (project / "mine.yaml").write_text(text)
        with pytest.raises(UserError) as caught:
            ucir("study", "mine.yaml")
        assert message in str(caught.value)
        assert (project / "params.yaml").read_text() == before
