"""MLflow: nothing is logged twice, nothing is lost."""

from __future__ import annotations

import base64
import json
import math
import subprocess
import sys
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from ucir import tracking
from ucir.config.data import PackParams, ViewParams
from ucir.config.load import load_params
from ucir.config.model import EncoderParams
from ucir.data.decode import decode_image
from ucir.data.pack import read_info
from ucir.errors import UserError
from ucir.models.encoder import new_encoder
from ucir.models.model import Model, save_model
from ucir.runs.process import tracked_run_of
from ucir.runs.run import plan_runs


def a_run(uri: str, key: str = "k1") -> tracking.TrackedRun:
    return tracking.tracked_run(uri, "ucir/x", "ucdir a-b s0", key, {"method": "ucdir"}, {"lr": 0.1})


def test_a_run_is_found_again_by_its_key(store: str) -> None:
    first, again, other = a_run(store), a_run(store), a_run(store, "k2")
    assert first.run_id == again.run_id != other.run_id
    run = MlflowClient(store).get_run(first.run_id)
    assert run.info.run_name == "ucdir a-b s0"
    assert run.data.params == {"lr": "0.1"}
    assert run.data.tags["method"] == "ucdir"
    assert run.data.tags["git_sha"]


def test_points_are_logged_once_and_gaps_are_filled(store: str) -> None:
    run = a_run(store)
    history = [{"epoch": float(e), "val/P_at_50": 10.0 * e, "ot/gap": math.nan} for e in range(4)]
    run.log_history(history[:2])
    run.log_history(history)
    a_run(store).log_history(history)
    points = MlflowClient(store).get_metric_history(run.run_id, "val/P_at_50")
    assert [(p.step, p.value) for p in points] == [(0, 0.0), (1, 10.0), (2, 20.0), (3, 30.0)]
    for _ in range(2):
        run.log_scores({"P_at_50": 42.0})
    assert len(MlflowClient(store).get_metric_history(run.run_id, "P_at_50")) == 1


def test_a_run_ends_as_what_it_came_to(store: str) -> None:
    run = a_run(store)
    for error, status in ((ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")):
        with pytest.raises(error), tracking.status_of(run):
            raise error
        assert MlflowClient(store).get_run(run.run_id).info.status == status
    with tracking.status_of(run):
        assert MlflowClient(store).get_run(run.run_id).info.status == "RUNNING"
    first = MlflowClient(store).get_run(run.run_id).info
    assert first.status == "FINISHED"
    with tracking.status_of(a_run(store)):  # looked at again: its duration stays
        pass
    assert MlflowClient(store).get_run(run.run_id).info.end_time == first.end_time


def test_addresses_are_absolute(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert unquote(tracking.tracking_uri()) == f"sqlite:///{project / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///other.db")
    assert unquote(tracking.tracking_uri()) == f"sqlite:///{project / 'other.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking.tracking_uri() == "http://mlflow:5000"


@pytest.mark.slow
def test_processes_may_meet_at_a_fresh_store(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    command = [sys.executable, "-c", f"from ucir import tracking; tracking.init_store({uri!r})"]
    running = [subprocess.Popen(command) for _ in range(2)]
    assert [process.wait() for process in running] == [0, 0]
    assert MlflowClient(uri).search_experiments()


def test_a_store_that_is_away_costs_nothing_and_misses_nothing(
    store: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.exceptions import MlflowException

    real = tracking._client

    def away(uri: str) -> None:
        raise MlflowException("API request failed: connection refused")

    history = [{"epoch": float(e), "val/P_at_50": 10.0 * e} for e in range(4)]
    early = a_run(store, "early")
    early.log_history(history[:1])
    monkeypatch.setattr(tracking, "_client", away)
    monkeypatch.setattr(tracking, "_silent_until", {})
    late = a_run(store, "late")
    for run in (early, late):
        with tracking.status_of(run):
            run.log_history(history[:2])
            run.log_history(history)
            run.log_scores({"P_at_50": 30.0})
    assert capsys.readouterr().out.count("does not answer") == 1

    monkeypatch.setattr(tracking, "_client", real)
    tracking.init_store(store)  # still silent: nothing is sent, nothing lost
    assert len(list((project / "runs/mlflow-unsent").glob("*.json"))) == 2
    monkeypatch.setattr(tracking, "_silent_until", {})
    tracking.init_store(store)
    tracking.init_store(store)
    assert not list((project / "runs/mlflow-unsent").iterdir())
    client = MlflowClient(store)
    for run in (early, a_run(store, "late")):
        assert run.run_id is not None
        points = client.get_metric_history(run.run_id, "val/P_at_50")
        assert [(p.step, p.value) for p in points] == [(0, 0.0), (1, 10.0), (2, 20.0), (3, 30.0)]
        assert client.get_run(run.run_id).data.metrics["P_at_50"] == 30.0
        assert client.get_run(run.run_id).info.status == "FINISHED"
    (experiment,) = client.search_experiments(filter_string="name = 'ucir/x'")
    assert len(client.search_runs([experiment.experiment_id])) == 2


def test_what_we_say_wrongly_is_an_error(store: str) -> None:
    with pytest.raises(Exception, match="Invalid value"):
        a_run(store).log_scores({"P@50": 1.0})


def test_a_run_names_its_pictures_and_what_makes_it_again(store: str, prepared: Path) -> None:
    params = load_params()
    (run,) = plan_runs(params, "shapes", "closed", "ucdir", ("art-photo",))
    tracked = tracked_run_of(run, store)
    tracking.ScoreTracker(run.pack, run.source, "closed", "ucdir", {}).log(
        "k", "art", "photo", 0, {"NMI": 1.0}
    )
    client = MlflowClient(store)
    found = client.get_run(tracked.run_id)
    inputs = {i.dataset.name: i for i in found.inputs.dataset_inputs}
    prints = read_info(run.pack).fingerprints
    assert {name: i.dataset.digest for name, i in inputs.items()} == {
        "shapes/art": prints["art"],
        "shapes/photo": prints["photo"],
    }
    art = inputs["shapes/art"].dataset
    assert json.loads(art.source) == {"uri": str(prepared / "images")}
    assert json.loads(art.profile) == {"pictures": 22}
    tags = found.data.tags
    assert tags["mlflow.source.name"]
    assert (
        "uv run ucir train --dataset shapes --setting closed --method ucdir --pair 'art-photo' --seed 0"
        in (tags[tracking.NOTE_TAG])
    )
    experiment = client.get_experiment_by_name("ucir/shapes")
    assert experiment.tags["mlflow.experimentKind"] == "custom_model_development"
    assert f"#/experiments/{experiment.experiment_id}/runs?workflowType" in experiment.tags[tracking.NOTE_TAG]
    (scored,) = client.search_runs([experiment.experiment_id], "tags.stage = 'evaluate'")
    contexts = {i.dataset.name: i.tags[0].value for i in scored.inputs.dataset_inputs}
    assert contexts == {"shapes/art": "query", "shapes/photo": "gallery"}


def test_a_model_is_logged_once_can_be_registered_and_answers(
    store: str, project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow
    from fastapi.testclient import TestClient
    from mlflow.pyfunc import scoring_server

    params = EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8, head="residual")
    encoder = new_encoder(params, 0).eval()
    encoder.load_state_dict({"head.centre_2P": torch.rand(2, encoder.pooled_dim)}, strict=False)
    facts = {"method": "uem", "dataset": "x", "pair": "a-b", "epoch": 3}
    model = Model(encoder, ViewParams(side=16), PackParams(side=20), facts, ("a", "b"))
    save_model(model, Path("last.pt"))
    run = a_run(store)
    for _ in range(2):
        run.log_model(Path("last.pt"))
    a_run(store).log_model(Path("last.pt"))
    client = MlflowClient(store)
    (output,) = client.get_run(run.run_id).outputs.model_outputs
    assert output.step == 3
    logged = client.get_logged_model(output.model_id)
    assert str(logged.status) == "READY"
    assert "## Limits" in logged.tags[tracking.NOTE_TAG]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)  # set_tracking_uri would set it for all later tests
    version = mlflow.register_model(f"models:/{output.model_id}", "drawings")
    served = mlflow.pyfunc.load_model(f"models:/drawings/{version.version}")
    signature = served.metadata.signature
    assert [column.name for column in signature.inputs] == ["image"]
    assert signature.outputs.inputs[0].shape == (-1, 8)
    assert served.input_example["image"].iloc[0].startswith(b"\x89PNG")
    picture = (project / "images/art/circle/0.png").read_bytes()
    page = TestClient(scoring_server.init(served))
    record = {"image": base64.b64encode(picture).decode()}
    for given, domain in (({}, None), ({"params": {"domain": "a"}}, "a"), ({"params": {"domain": "b"}}, "b")):
        answer = page.post("/invocations", json={"dataframe_records": [record] * 2, **given})
        pixels = np.asarray(decode_image(picture, 10**6))
        expected = torch.cat(list(model.features([pixels], domain=domain))).numpy()
        assert np.allclose(answer.json()["predictions"], np.repeat(expected, 2, axis=0), atol=1e-6)
    late = a_run(store, "late")
    with monkeypatch.context() as patch:  # what the store misses is sent later, once
        patch.setattr(tracking, "_silent_until", {store: math.inf})
        late.log_model(Path("last.pt"))
    assert not client.get_run(late.run_id).outputs.model_outputs
    for _ in range(2):
        tracking.init_store(store)
    assert len(client.get_run(late.run_id).outputs.model_outputs) == 1
    for wrong in ({"dataframe_records": [{"image": "aGVsbG8="}]}, {"inputs": [1]}):
        assert page.post("/invocations", json=wrong).status_code == 400


def test_a_deleted_experiment_is_told_with_what_brings_it_back(store: str) -> None:
    run = a_run(store)
    assert run.experiment_id
    MlflowClient(store).delete_experiment(run.experiment_id)
    with pytest.raises(UserError, match=f"restore --experiment-id {run.experiment_id}"):
        a_run(store, "k2")
