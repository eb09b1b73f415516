"""`ucir doctor` and what it looks at: addresses, folders, limits."""

from __future__ import annotations

import base64
import resource
import tempfile
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.conftest import tiny_params, write_params
from ucir import doctor, tracking
from ucir.cluster import launch
from ucir.errors import UserError


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("file:./mlruns", "a folder of files"),
        ("./mlruns", "a folder of files"),
        ("/data/mlruns", "a folder of files"),
        ("mlruns", "a folder of files"),
        ("localhost:5000", "no scheme: say http://localhost:5000"),
        ("htp://x", "unknown scheme 'htp'; did you mean 'http'"),
        ("http://", "names no host"),
        ("sqlite:///", "names no host and no file"),
    ],
)
def test_an_address_that_is_none_is_told_before_any_work(
    uri: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match=f"MLFLOW_TRACKING_URI={uri}: .*{message}"):
        tracking.tracking_uri()
    (finding,) = [f for f in doctor.examine() if "MLFLOW_TRACKING_URI" in f.text]
    assert not finding.good


@pytest.mark.parametrize("uri", ["https://x:5000/base", "postgresql+psycopg://u:p@h/db", "sqlite:////a/b.db"])
def test_addresses_of_servers_and_databases_are_taken_as_they_are(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    assert tracking.tracking_uri() == uri


class Page(BaseHTTPRequestHandler):
    body = b"<html>welcome</html>"
    status = 200
    login: str | None = None

    def do_GET(self) -> None:
        type(self).login = self.headers.get("Authorization")
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.body)

    def log_message(self, *given: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a page, which is the tracking server of a project where nothing was run."""
    running = HTTPServer(("127.0.0.1", 0), Page)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    uri = f"http://127.0.0.1:{running.server_port}"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    yield uri
    running.shutdown()


def test_a_page_that_answers_is_no_mlflow(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "answers, but is no MLflow server" in doctor._mlflow().text
    monkeypatch.setattr(Page, "body", b"OK")
    assert doctor._mlflow().good


def test_the_tracking_server_is_asked_as_trainings_ask_it_and_no_password_is_shown(
    server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Page, "body", b"OK")
    named = server.replace("//", "//ada:secret@")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named)
    assert doctor._mlflow() == doctor.Finding(True, f"MLflow server {server.replace('//', '//ada:***@')}")
    assert Page.login == f"Basic {base64.b64encode(b'ada:secret').decode()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "ada")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "secret")
    Page.login = None
    assert doctor._mlflow().good
    assert Page.login == f"Basic {base64.b64encode(b'ada:secret').decode()}"
    monkeypatch.setattr(Page, "status", 401)
    assert "answers 401: set MLFLOW_TRACKING_USERNAME" in doctor._mlflow().text
    gone = "http://ada:secret@127.0.0.1:1"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", gone)
    assert "does not answer" in doctor._mlflow().text
    assert "secret" not in doctor._mlflow().text
    tracking.tracked_run(gone, "ucir/x", "ucdir a-b s0", "key", {}, {})
    said = capsys.readouterr().out
    assert "does not answer" in said
    assert "secret" not in said
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "htp://ada:secret@x")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI=htp://ada:\*\*\*@x: unknown scheme"):
        tracking.tracking_uri()
    assert tracking.experiment_url(named) == server
    assert tracking.scores_url(named, "1").startswith(f"{server}/#/")
    assert tracking.experiment_url("postgresql://ada:secret@h/db").endswith(' "$MLFLOW_TRACKING_URI"')


def test_runs_that_wait_for_another_address_are_named_and_are_no_fault_of_this_one(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Page, "body", b"OK")
    elsewhere = "http://ada:secret@127.0.0.1:1"
    for uri in (elsewhere, server):
        tracking.tracked_run(uri, "ucir/x", "ucdir a-b s0", uri[-2:], {}, {}).log_scores({"mAP": 1.0})
    waits = "1 run waits in runs/mlflow-unsent for"
    found = doctor._mlflow()  # the page is no store: what is said to it stays unsent
    assert not found.good
    assert f"{waits} http://ada:***@127.0.0.1:1" in found.text
    assert f"{waits} {server}" in found.text
    (tmp_path / f"runs/mlflow-unsent/{server[-2:]}.json").unlink()
    found = doctor._mlflow()
    assert found.good
    assert "for http://ada:***@127.0.0.1:1" in found.text
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert "for http://ada:***@127.0.0.1:1" in doctor._mlflow().text


def test_what_would_stop_repro_is_told(project: Path) -> None:
    said = doctor.examine()[-1]
    assert said == doctor.Finding(True, "params.yaml: `uv run dvc repro` runs the study 'tiny'")
    params = tiny_params("nowhere")
    write_params(project, params)
    said = doctor.examine()[-1]
    assert not said.good
    assert "nowhere: no such folder" in said.text
    del params["datasets"]["shapes"]["pack"]
    params["datasets"]["shapes"]["source"] = params["study"]["datasets"]["shapes"]["source"] = "images"
    write_params(project, params)
    assert "datasets.shapes.pack: must stand there for DVC" in doctor.examine()[-1].text
    params["methods"]["ucdir"]["shapes"]["lr"] = "fast"
    write_params(project, params)
    assert "lr = 'fast'" in doctor.examine()[-1].text


def test_an_address_without_a_cluster_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    found = doctor._ray()
    assert not found.good
    assert "RAY_ADDRESS=127.0.0.1:9: no Ray cluster answers there" in found.text


def test_rays_folder_is_short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", "/tmp")
    assert launch.ray_folder() is None
    monkeypatch.setattr(tempfile, "tempdir", "/tmp/" + "t" * 90)
    assert launch.ray_folder() == "/tmp"
    monkeypatch.setenv("RAY_TMPDIR", "/scratch/" + "t" * 90)
    with pytest.raises(UserError, match=r"RAY_TMPDIR=.*too long for the paths of Ray's sockets"):
        launch.ray_folder()


def test_the_limit_of_open_files_is_raised_as_far_as_one_may() -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, before[1]))
        launch._raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE)[0] >= min(launch.OPEN_FILES, before[1])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
