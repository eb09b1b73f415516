"""MLflow's own server with passwords, on PostgreSQL: a training goes on while it is away."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import requests
from mlflow import MlflowClient

from ucir import tracking
from ucir.cluster.launch import train_all
from ucir.config.cluster import ClusterParams
from ucir.config.load import load_params
from ucir.doctor import examine
from ucir.runs.reporter import RunReporter
from ucir.runs.run import PairRun, plan_runs
from ucir.training.epochs import EpochReport

pytestmark = pytest.mark.slow
PASSWORD = "a-password-of-twelve"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def postgres_programs() -> Path | None:
    """Where Debian or the PATH has them."""
    folders = [Path(path).resolve().parent for path in [shutil.which("initdb")] if path]
    folders += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    return folders[0] if folders else None


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a fresh PostgreSQL database."""
    programs = postgres_programs()
    if programs is None:
        pytest.skip("NOT RUN: PostgreSQL is not installed (Debian: apt-get install postgresql)")
    folder = tmp_path_factory.mktemp("postgres")
    port = free_port()
    as_user = []
    if os.geteuid() == 0:  # it refuses root
        try:
            pwd.getpwnam("postgres")
        except KeyError:
            pytest.skip("NOT RUN: PostgreSQL refuses root, and there is no user postgres")
        shutil.chown(folder, "postgres")
        for parent in folder.parents:
            if parent.stat().st_uid == 0 and parent != Path("/tmp"):
                parent.chmod(parent.stat().st_mode | 0o011)
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
    data, host = str(folder / "data"), "-c unix_socket_directories= -c listen_addresses=127.0.0.1"
    subprocess.run(
        [*as_user, programs / "initdb", "-D", data, "-U", "mlflow", "--auth=trust", "-N"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    server = subprocess.Popen(
        [*as_user, programs / "postgres", "-D", data, "-p", str(port), *host.split()],
        stderr=subprocess.DEVNULL,
        cwd="/",
    )
    try:
        for _ in range(100):
            ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
            if subprocess.run(ready, capture_output=True, check=False).returncode == 0:
                break
            time.sleep(0.2)
        yield f"postgresql://mlflow@127.0.0.1:{port}/postgres"
    finally:
        server.terminate()
        server.wait()


@dataclass
class Server:
    """MLflow's server as infra/ starts it."""

    database: str
    folder: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host=127.0.0.1", f"--port={self.port}"]
        command += [f"--backend-store-uri={self.database}", "--app-name=basic-auth", "--workers=1"]
        command += [f"--artifacts-destination={self.folder}/artifacts"]
        command += ["--allowed-hosts=ucir-mlflow:*,127.0.0.1:*"]
        environment = {
            **os.environ,
            "MLFLOW_AUTH_ADMIN_USERNAME": "admin",
            "MLFLOW_AUTH_ADMIN_PASSWORD": PASSWORD,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": "k" * 32,
            "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        }
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=log, start_new_session=True
            )
        for _ in range(180):
            try:
                requests.get(f"{self.uri}/health", timeout=1)
                return
            except requests.RequestException:
                assert self.process.poll() is None, (self.folder / "server.log").read_text()[-3000:]
                time.sleep(1)
        raise AssertionError((self.folder / "server.log").read_text()[-3000:])

    def stop(self) -> None:
        if self.process:
            os.killpg(self.process.pid, 9)
            self.process.wait()


@pytest.fixture
def server(database: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    folder = tmp_path / "server"
    folder.mkdir()
    made = Server(database, folder)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", made.uri)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    made.start()
    yield made
    made.stop()


def test_a_training_goes_on_while_the_server_is_away(
    server: Server, prepared: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert requests.get(f"{server.uri}/api/2.0/mlflow/experiments/get", timeout=5).status_code == 401
    named = {"Host": "ucir-mlflow:5000"}
    assert requests.get(server.uri, headers=named, auth=("admin", PASSWORD), timeout=5).status_code == 200
    other = {"Host": "elsewhere:5000"}
    assert requests.get(server.uri, headers=other, auth=("admin", PASSWORD), timeout=5).status_code == 403
    assert any("MLflow" in finding.text and finding.good for finding in examine())

    original = RunReporter.end_epoch

    def server_dies(self: RunReporter, report: EpochReport) -> None:
        assert isinstance(self.run, PairRun)
        if (self.run.pair[1], report.epoch) == ("photo", 2):
            server.stop()
        original(self, report)

    monkeypatch.setattr(RunReporter, "end_epoch", server_dies)
    runs = plan_runs(load_params(), "shapes", "closed", "ucdir")
    train_all(runs, ClusterParams())  # the second pair begins when there is no server
    assert all(run.done for run in runs)
    assert "does not answer" in capsys.readouterr().out
    assert list(Path("runs/mlflow-unsent").glob("*.json"))

    server.start()
    monkeypatch.setattr(tracking, "_silent_until", {})
    train_all(runs, ClusterParams())
    assert not list(Path("runs/mlflow-unsent").glob("*.json"))
    client = MlflowClient(server.uri)
    (experiment,) = client.search_experiments(filter_string="name = 'ucir/shapes'")
    tracked = client.search_runs([experiment.experiment_id])
    assert sorted(run.data.tags["pair"] for run in tracked) == ["art-photo", "art-real-life"]
    for run in tracked:
        assert run.info.status == "FINISHED"
        points = client.get_metric_history(run.info.run_id, "val/P_at_2")
        assert [point.step for point in points] == [0, 1, 2, 3]
