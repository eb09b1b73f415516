"""params.yaml: what is accepted, what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.conftest import ROOT, tiny_params, write_params
from ucir.config.load import load_params
from ucir.errors import UserError
from ucir.methods.registry import METHODS
from ucir.methods.ucdir import UcdirParams
from ucir.models.encoder import new_encoder
from ucir.runs.params import method_params
from ucir.runs.study import StudyFile, activate, study_block


def load(folder: Path, change: dict[str, Any]) -> None:
    """Load tiny params with some keys, named by path, set to other values."""
    params = tiny_params("images")
    for path, value in change.items():
        block = params
        *blocks, last = path.split(".")
        for name in blocks:
            block = block.setdefault(name, {})
        block[last] = value
    write_params(folder, params)
    loaded = load_params(folder / "params.yaml")
    method_params(loaded, "ucdir", "shapes")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"datasets.shapes.veiw": {}}, "datasets.shapes.veiw: unknown key; did you mean 'view'?"),
        ({"datasets.shapes.view.augment.gray_share": 1}, "did you mean 'grey_share'?"),
        ({"datasets.shapes.start.pretrain.step": 1}, "did you mean 'steps'?"),
        ({"methods.ucdir.shapes.temprature": 1}, "did you mean 'temperature'?"),
        ({"methods.ucdir.shapes.temperature": 0}, "shapes.temperature = 0: input should be greater than 0"),
        (
            {"methods.ucdir.shapes.clusters": 1},
            "clusters: 1 is not a number of at least 2, a list of them",
        ),
        ({"methods.ucdir.shapes.lr": "fast"}, "lr = 'fast': input should be a valid number"),
        ({"methods.ucdir.shapes.ramp_end": 1}, "ramp_end 1 must come after ramp_start 1"),
        ({"datasets.shapes.start.checkpoint": "x.pt"}, "give one of 'checkpoint' (a file"),
        ({"methods.ucdir.shapes.cross_domain_start": 9}, "lies beyond the last of 4 epochs"),
        ({"datasets.shapes.pairs": []}, "datasets.shapes: pairs: missing"),
        ({"datasets.shapes.evaluate.cutoffs": 5}, "input should be a list, e.g. [1, 2]"),
        ({"datasets.shapes.source": "elsewhere"}, "run `uv run ucir study tiny` to renew the study block"),
        ({"study.seeds": [0, 1, 0]}, "0 stands there 2 times"),
        ({"study.seeds": [-1]}, "study.seeds.0 = -1"),
        ({"cluster.num_workers": -2}, "cluster.num_workers = -2"),
        ({"cluster.max_workers": 4}, "num_workers (0) is the fewest that a training goes on with"),
    ],
)
def test_faults_are_named_with_their_field(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(tmp_path, change)
    assert message in str(caught.value)
    assert "params.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_or_broken_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_params(tmp_path / "params.yaml")
    for broken, message in (
        ("study: [", "not readable as YAML"),
        ("study: 1\nstudy: 2", "duplicate key"),
        ("", "no blocks in it"),
        ("[1]", "no blocks in it"),
    ):
        (tmp_path / "params.yaml").write_text(broken)
        with pytest.raises(UserError, match=message):
            load_params(tmp_path / "params.yaml")


def test_an_unknown_method_and_a_missing_block_are_named(tmp_path: Path) -> None:
    write_params(tmp_path, tiny_params("images"))
    params = load_params(tmp_path / "params.yaml")
    with pytest.raises(UserError, match="did you mean 'ucdir'"):
        method_params(params, "ucdri", "shapes")
    with pytest.raises(UserError, match="has no block 'office'"):
        method_params(params, "ucdir", "office")


def test_overrides_take_the_place_of_the_file(tmp_path: Path) -> None:
    write_params(tmp_path, tiny_params("images"))
    params = load_params(tmp_path / "params.yaml", ["methods.ucdir.shapes.lr=0.5", "cluster.num_workers=2"])
    assert method_params(params, "ucdir", "shapes").lr == 0.5
    assert params.cluster.num_workers == 2
    both = tiny_params("images")
    both["datasets"]["others"] = both["datasets"]["shapes"]
    write_params(tmp_path, both)
    assert "*id" in (tmp_path / "params.yaml").read_text(), "the two share one block"
    set_one = load_params(tmp_path / "params.yaml", ["datasets.shapes.view.side=64"])
    assert [set_one.datasets[name].view.side for name in ("shapes", "others")] == [64, 16]
    wrong = load_params(tmp_path / "params.yaml", ["methods.ucdri.shapes.lr=0.5"])
    with pytest.raises(UserError, match="did you mean 'ucdir'"):
        method_params(wrong, "ucdir", "shapes")
    with pytest.raises(UserError, match="'lr' is a value"):
        load_params(tmp_path / "params.yaml", ["methods.ucdir.shapes.lr.x=0.5"])
    for wrong_set in ("study", "=3", "a..b=3"):
        with pytest.raises(UserError, match="expected KEY=VALUE"):
            load_params(tmp_path / "params.yaml", [wrong_set])
    with pytest.raises(UserError, match="not readable as YAML"):
        load_params(tmp_path / "params.yaml", ["methods.ucdir.shapes.lr=[1"])


def test_the_shipped_params_are_good_and_their_study_is_current() -> None:
    params = load_params(ROOT / "params.yaml")
    for method, blocks in params.methods.items():
        assert method in METHODS
        for dataset in blocks:
            method_params(params, method, dataset)
    shipped = yaml.safe_load((ROOT / "params.yaml").read_text())
    assert shipped["study"] == study_block(params, "sample")
    for name in params.studies:
        study_block(params, name)


def test_both_published_columns_of_ucdir_are_shipped_and_its_ablation_reads_them() -> None:
    params = load_params(ROOT / "params.yaml")

    def shipped(method: str, dataset: str) -> tuple[object, ...]:
        p = method_params(params, method, dataset)
        assert isinstance(p, UcdirParams)
        weights = (p.cluster_weight, p.distance_weight, p.entropy_weight, p.entropy_temperature)
        return (*weights, p.distance_temperature, p.cross_domain_start, p.clusters)

    assert shipped("ucdir", "domainnet") == (1.0, 0.1, 0.5, 0.1, 0.01, 100, (7,))
    assert shipped("ucdir", "office_home") == (0.5, 0.5, 1.0, 0.01, 0.01, 100, (65,))
    assert shipped("ucdir-v1", "domainnet")[:3] == (0, 0, 0)
    assert shipped("ucdir-v2", "domainnet")[:3] == (1.0, 0, 0)
    assert shipped("ucdir-v3", "domainnet")[:3] == (1.0, 0, 0.5)
    view = params.datasets["office_home"].view
    assert (view.side, view.eval_crop, view.augment.crop_area) == (None, 224 / 256, (0.2, 1.0))
    assert new_encoder(params.datasets["office_home"].start.encoder, 0).form.side == 224
    assert view.augment.jitter == (0.4, 0.4, 0.4, 0.1)


def test_a_block_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"methods\.ucdir-v2: ucdir-v2 is methods\.ucdir with some keys fixed"
    ):
        load(tmp_path, {"methods.ucdir-v2": {"shapes": {"lr": 0.1}}})


def test_choosing_a_study_rewrites_its_block_alone(tmp_path: Path) -> None:
    text = (ROOT / "params.yaml").read_text()
    text = text.replace(
        "studies:\n",
        "studies:\n  two: {datasets: [digits], settings: [closed], methods: [ucdir], seeds: [3, 4]}\n",
        1,
    )
    path = tmp_path / "params.yaml"
    path.write_text(text)
    assert activate(path, "two") == ("two", [])
    changed = load_params(path)
    assert changed.study.name == "two"
    assert changed.study.seeds == (3, 4)
    activate(path, "sample")
    assert path.read_text() == text
    path.write_text(
        text.replace("  two: {datasets: [digits],", "  two: {datasets: [digits], pairs: [printed-foo],")
    )
    with pytest.raises(UserError, match=r"studies\.two: pair 'printed-foo': no domain 'foo'"):
        activate(path, "two")
    path.write_text(text)
    comments = [line.split("#")[1] for line in text.splitlines() if "#" in line]
    for lr in (0.1, 0.2):  # added, then replaced: the comments behind the last blocks stay
        own = {"source": "x", "pairs": ["a-b"], "start": {"pretrain": {"steps": round(100 * lr)}}}
        study = {"datasets": ["digits"], "settings": ["closed"], "methods": ["ucdir"], "seeds": [1]}
        blocks = StudyFile(
            datasets={"own": own}, methods={"ucdir": {"own": {"lr": lr}}}, studies={"own": study}
        )
        _, replaced = activate(path, "own", blocks)
        again = ["datasets.own: replaced", "methods.ucdir.own: replaced"]
        assert replaced == (again if lr == 0.2 else [])
        now = path.read_text()
        assert [line.split("#")[1] for line in now.splitlines() if "#" in line] == comments
        assert f"    own: {{lr: {lr}}}\n" in now
    blocks = StudyFile(methods={"id": {"digits": {"epochs": 3}}}, studies={"sample": study})
    assert activate(path, "sample", blocks)[1] == ["methods.id.digits: replaced", "studies.sample: replaced"]
    blocks = StudyFile(methods={"ucdir": {"digits": {"epochs": 3}}}, studies={"own": study})
    (line,) = activate(path, "own", blocks)[1]
    assert line.startswith("methods.ucdir.digits: replaced, lr, key_momentum, clusters, ")
    # what the command itself writes, such as the pairs of the catalogue, is not reported as lost
    plain = {"source": "x", "catalogue": "office31", "sample": {"per_class": 2}, "start": {"pretrain": {}}}
    blocks = StudyFile(
        datasets={"more": plain},
        methods={"ucdir": {"more": {}}},
        studies={"more": {**study, "datasets": ["more"]}},
    )
    for _ in range(2):
        assert activate(path, "more", blocks)[1] == []
