"""MLflow: where runs can be compared.

One experiment per data set. A training is one run (curves by epoch); each direction of an evaluation is
another (final scores). Runs are found again by their key, so that a resumed or repeated command adds
neither runs nor points. Store: ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the project.
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# before mlflow is imported: it reports usage to its makers and warns of a missing git otherwise
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")

KEY_TAG = "run_key"


def tracking_uri() -> str:
    """The configured server or store; the default is a local file, as an absolute address."""
    default = f"sqlite:///{Path('mlflow.db').resolve()}"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or default
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).resolve()}"
    return uri


def init_store(uri: str) -> None:
    """Create a local store once, before any worker: parallel first contact would corrupt it."""
    if not uri.startswith("sqlite:///"):
        return
    import fcntl

    database = Path(uri.removeprefix("sqlite:///"))
    database.parent.mkdir(parents=True, exist_ok=True)
    with database.with_name(database.name + ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not database.exists():
            _client(uri).search_experiments(max_results=1)


@dataclass(frozen=True)
class TrackedRun:
    """A run of the store, to be written by one process at a time."""

    uri: str
    run_id: str
    finished: bool = False
    """It was, when it was found: its times are left as they are."""

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Add the epochs that the store does not have yet. Each entry has ``epoch`` and its metrics."""
        from mlflow.entities import Metric

        client = _client(self.uri)
        logged = client.get_metric_history(self.run_id, "epoch")
        last = max((point.step for point in logged), default=-1)
        now = int(time.time() * 1000)
        for entry in history:
            step = int(entry["epoch"])
            if step > last:
                points = [
                    Metric(name, value, now, step) for name, value in entry.items() if math.isfinite(value)
                ]
                client.log_batch(self.run_id, metrics=points)

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Final scores, one value each; logged once even when the command is repeated."""
        from mlflow.entities import Metric

        client = _client(self.uri)
        known = client.get_run(self.run_id).data.metrics
        now = int(time.time() * 1000)
        points = [
            Metric(name, value, now, 0)
            for name, value in scores.items()
            if math.isfinite(value) and known.get(name) != value
        ]
        if points:
            client.log_batch(self.run_id, metrics=points)

    def log_artifact(self, path: Path) -> None:
        _client(self.uri).log_artifact(self.run_id, str(path))


def tracked_run(
    uri: str,
    experiment: str,
    name: str,
    key: str,
    tags: Mapping[str, str],
    params: Mapping[str, Any],
) -> TrackedRun:
    """The store's run with this key, made when there is none.

    Args:
        uri: tracking address.
        experiment: ``ucir/<dataset>``.
        name: what the UI shows.
        key: identifies the run for good; see :mod:`ucir.cluster.runs`.
        tags: to filter and group by.
        params: what one would put on an axis; written once.
    """
    from mlflow.entities import Param, RunTag

    client = _client(uri)
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    runs = client.search_runs([experiment_id], f"tags.{KEY_TAG} = '{key}'", max_results=1)
    if runs:
        return TrackedRun(uri, runs[0].info.run_id, runs[0].info.status == "FINISHED")
    run = client.create_run(experiment_id, run_name=name)
    client.log_batch(
        run.info.run_id,
        params=[Param(key, str(value)) for key, value in params.items()],
        tags=[RunTag(k, v) for k, v in {**tags, KEY_TAG: key, "git_sha": git_sha()}.items()],
    )
    return TrackedRun(uri, run.info.run_id)


def experiment_url(uri: str) -> str:
    """How to look at the store."""
    return uri if uri.startswith("http") else f"uv run mlflow ui --backend-store-uri {uri}"


def git_sha() -> str:
    """The commit at hand, with ``-dirty`` when the tree differs; ``unknown`` outside a checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _client(uri: str) -> Any:
    _quiet_alembic()
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _quiet_alembic() -> None:
    """The schema's migrations log dozens of lines that mean nothing to our users."""
    import logging

    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)


@contextlib.contextmanager
def status_of(run: TrackedRun) -> Iterator[None]:
    """Keep a run's status: running, then finished, failed or killed."""
    if run.finished:
        yield
        return
    _client(run.uri).update_run(run.run_id, status="RUNNING")
    try:
        yield
    except KeyboardInterrupt:
        _client(run.uri).set_terminated(run.run_id, "KILLED")
        raise
    except BaseException:
        _client(run.uri).set_terminated(run.run_id, "FAILED")
        raise
    _client(run.uri).set_terminated(run.run_id, "FINISHED")
