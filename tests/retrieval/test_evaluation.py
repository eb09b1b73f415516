"""Scores that read labels: clusters against classes, pooled features, either encoder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch.nn.functional import normalize

from tests.conftest import write_start
from ucir.cluster.launch import train_all
from ucir.config.load import load_params
from ucir.models.checkpoints import load_state
from ucir.paths import RESULTS
from ucir.retrieval.evaluation import cluster_agreement, evaluate_start, load_features, score_directions
from ucir.retrieval.gate import GateChoice
from ucir.runs.params import gate_choice
from ucir.runs.run import plan_runs
from ucir.runs.scores import last_scores


def test_clusters_that_are_the_classes_agree_wholly_and_random_ones_not_at_all() -> None:
    labels = [label for label in "abc" for _ in range(40)]
    clear = normalize(torch.eye(8)[:3].repeat_interleave(40, dim=0) + 0.01 * torch.randn(120, 8), dim=1)
    assert cluster_agreement(clear, labels, 3) == {"NMI": pytest.approx(100), "ARI": pytest.approx(100)}
    noise = normalize(torch.randn(120, 8), dim=1)
    agreement = cluster_agreement(noise, labels, 3)
    assert abs(agreement["ARI"]) < 10
    assert agreement["NMI"] < 15
    features, names = {"x": clear, "y": noise}, {"x": labels, "y": labels}
    (score,) = score_directions(features, names, [("x", "y")], 0, "last", (5,), GateChoice("spread", 3))
    assert score.scores["NMI"] == pytest.approx(100), "of the query domain"


def test_the_calibrated_gate_rejects_as_many_as_params_ask(project: Path) -> None:
    labels = [str(i) for i in range(100)]
    features = {"x": normalize(torch.randn(100, 8), dim=1), "y": normalize(torch.randn(100, 8), dim=1)}
    names = {"x": labels, "y": labels}
    for rate in (0.05, 0.3):
        params = load_params(overrides=[f"datasets.shapes.evaluate.false_rejections={rate}"])
        choice = gate_choice(params, "shapes", None)
        (score,) = score_directions(features, names, [("x", "y")], 0, "last", (5,), choice)
        assert score.scores["calibrated_shared"] == pytest.approx(100 * rate, abs=1.5)


def test_rows_before_training_are_the_trunk_centred_by_domain_and_its_pca(prepared: Path, store: str) -> None:
    def scored(*overrides: str) -> list[str]:
        params = load_params(overrides=overrides)
        evaluate_start(params, "shapes-closed", gate_choice(params, "shapes", None), RESULTS)
        return list(json.loads((RESULTS / "shapes/closed/start.json").read_text()))

    rows = ["untrained", "frozen", "centred", "pca", "pretrained"]
    assert scored() == rows
    kept = RESULTS / "shapes/closed/start"
    features = {row: load_features(kept / row / "evaluate/art-photo.npz") for row in rows}
    similarity = {row: of_row["art"] @ of_row["photo"].T for row, of_row in features.items()}
    centred = {domain: x.double() - x.double().mean(dim=0) for domain, x in features["frozen"].items()}
    directions = torch.linalg.svd(torch.cat([*centred.values()]), full_matrices=False).Vh[:8].T
    for row, expected in (("centred", centred), ("pca", {d: x @ directions for d, x in centred.items()})):
        query, gallery = (normalize(expected[domain], dim=1).float() for domain in ("art", "photo"))
        assert torch.allclose(similarity[row], query @ gallery.T, atol=0.02), "stored as float16"
        assert not torch.allclose(similarity[row], similarity["frozen"], atol=0.1)
    wide = "datasets.shapes.start.encoder.feature_dim=32"
    write_start(load_params(overrides=[wide]).datasets["shapes"], "shapes")
    assert scored(wide) == ["untrained", "frozen", "centred", "pretrained"], "a PCA that keeps everything"
    no_head = "datasets.shapes.evaluate.features=pooled"
    assert scored(wide, no_head) == ["untrained", "centred", "pretrained"], "the start is the frozen trunk"


def test_a_limit_that_so_few_pictures_cannot_give_is_told(
    prepared: Path, store: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for rate, told in (("0.05", False), ("0.04", True)):
        params = load_params(overrides=[f"datasets.shapes.evaluate.false_rejections={rate}"])
        evaluate_start(params, "shapes-closed", gate_choice(params, "shapes", None), RESULTS)
        out = capsys.readouterr().out
        assert ("the 22 pictures of art are too few for a limit that rejects 4 % of them (24" in out) == told


def test_pooled_features_and_either_encoder_give_other_scores(prepared: Path, store: str) -> None:
    def scored(*overrides: str) -> list[float]:
        params = load_params(overrides=["methods.ucdir.shapes.epochs=2", *overrides])
        runs = plan_runs(params, "shapes", "closed", "ucdir", ("art-photo",))
        train_all(runs, params.cluster)
        weights.append(load_state(runs[0].folder / "last.pt")["state_dict"])
        return [s.scores["mAP_at_All"] for s in last_scores(params, runs)]

    weights: list[dict[str, torch.Tensor]] = []
    head = scored()
    pooled = scored("datasets.shapes.evaluate.features=pooled")
    assert head != pooled
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0]), "the same run"
    scored("methods.ucdir.shapes.retrieve_with=query")
    key = "module.encoder_q.fc.2.weight"
    assert not torch.equal(weights[0][key], weights[2][key])
