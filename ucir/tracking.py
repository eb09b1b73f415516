"""MLflow: where runs can be compared.

One experiment per data set. A training is one run (curves by epoch); each direction of an evaluation is
another (final scores). Runs are found again by their key, so that a resumed or repeated command adds
neither runs nor points. Store: ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the project.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shlex
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from ucir.errors import UserError, nearest
from ucir.paths import RUNS, locked, write_atomically

# before mlflow is imported: it reports usage to its makers and warns of a missing git otherwise
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
# its own patience is minutes; ours is `TrackedRun.unsent`
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""Of MLflow's servers and databases."""
KEY_TAG = "run_key"
UNSENT = RUNS / "mlflow-unsent"
SILENCE = 60.0
"""Seconds for which a store that did not answer is left alone: asking takes time that training has not."""
_silent_until: dict[str, float] = {}


def tracking_uri() -> str:
    """The configured server or store; the default is a local file, as an absolute address.

    Raises:
        UserError: MLFLOW_TRACKING_URI is no address of a server or a database.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        return _address_of(Path("mlflow.db"))
    scheme, there, rest = uri.partition("://")
    scheme, fault = scheme.lower(), ""
    if uri == "databricks":
        return uri
    if scheme.split("+")[0] not in SCHEMES:
        if uri.startswith(("file:", "./", "/")) or not (there or ":" in uri):
            fault = "a folder of files, which MLflow gives up: say sqlite:///mlflow.db"
        elif not there:
            fault = f"no scheme: say http://{uri}"
        else:
            fault = f"unknown scheme {scheme!r}; {nearest(scheme, SCHEMES)}"
    elif not there or not rest.strip("/"):
        fault = "it names no host and no file"
    if fault:
        raise UserError(f"MLFLOW_TRACKING_URI={uri}: {fault}")
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = _address_of(Path(uri.removeprefix("sqlite:///")))
    return uri


def _address_of(database: Path) -> str:
    """A file as a database's address, in which '?' and '%' mean something else."""
    path = quote(str(database.resolve()), safe="/ #!$&'()*+,;=:@[]")
    return f"sqlite:///{path}"


def init_store(uri: str) -> None:
    """Create a local store once, before any worker: parallel first contact would corrupt it.

    And send it what could not be sent before.
    """
    if not uri.startswith("sqlite:///"):
        send_unsent(uri)
        return
    database = Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0]))
    database.parent.mkdir(parents=True, exist_ok=True)
    with locked(database.with_name(database.name + ".lock")):
        if not database.exists():
            _client(uri).search_experiments(max_results=1)
    send_unsent(uri)


@dataclass
class TrackedRun:
    """A run of the store, to be written by one process at a time.

    Where the store cannot be reached, training goes on: what is to be said is kept in ``unsent`` and sent by
    the next contact, of this process or of a later command (:func:`send_unsent`).
    """

    uri: str
    experiment: str
    name: str
    key: str
    tags: dict[str, str]
    params: dict[str, Any]
    unsent: Path
    """Folder; absolute, since workers run elsewhere."""
    run_id: str | None = None
    """None until the store has been reached."""
    finished: bool = False
    """It was, when it was found: its times are left as they are."""

    def log_history(self, history: Sequence[Mapping[str, float]]) -> None:
        """Add the epochs that the store does not have yet. Each entry has ``epoch`` and its metrics."""
        self._send({"history": [dict(entry) for entry in history]})

    def log_scores(self, scores: Mapping[str, float]) -> None:
        """Final scores, one value each; logged once even when the command is repeated."""
        self._send({"scores": dict(scores)})

    def log_artifact(self, path: Path) -> None:
        """Add a file."""
        self._send({"artifacts": [str(path.resolve())]})

    def set_status(self, status: str) -> None:
        """RUNNING, or how it ended."""
        self._send({"status": status})

    def find(self) -> bool:
        """Find the run by its key, or make it; whether the store could be reached."""
        return self._send({})

    def _send(self, message: dict[str, Any]) -> bool:
        """Deliver, with what was kept before; or keep."""
        kept = self.unsent / f"{self.key}.json"
        if kept.exists():
            before = json.loads(kept.read_text("utf-8"))["told"]
            message = {
                **before,
                **message,
                "artifacts": [*before.get("artifacts", []), *message.get("artifacts", [])],
            }
        if time.monotonic() >= _silent_until.get(self.uri, 0.0):
            try:
                self._deliver(message)
            except Exception as error:
                if not _is_down(error):
                    raise
                _silent_until[self.uri] = time.monotonic() + SILENCE
                reason = str(error).splitlines()[0][:200]
                print(
                    f"MLflow at {self.uri} does not answer ({reason}): work goes on, and what belongs there "
                    f"is kept in {self.unsent} and sent later",
                    flush=True,
                )
            else:
                kept.unlink(missing_ok=True)
                return True
        if any(message.values()):
            self.unsent.mkdir(parents=True, exist_ok=True)
            description = {**asdict(self), "unsent": str(self.unsent), "run_id": None}
            write_atomically(json.dumps({"run": description, "told": message}), kept)
        return False

    def _deliver(self, message: Mapping[str, Any]) -> None:
        client = _client(self.uri)
        if self.run_id is None:
            self._find_or_create(client)
        if message.get("history"):
            self._deliver_history(client, message["history"])
        if message.get("scores"):
            self._deliver_scores(client, message["scores"])
        for artifact in dict.fromkeys(message.get("artifacts", [])):
            if Path(artifact).exists():  # by now it may have been written anew elsewhere
                client.log_artifact(self.run_id, artifact)
        status = message.get("status")
        if status == "RUNNING":
            client.update_run(self.run_id, status=status)
        elif status and not self.finished:
            client.set_terminated(self.run_id, status)

    def _find_or_create(self, client: Any) -> None:
        from mlflow.entities import Param

        experiment = client.get_experiment_by_name(self.experiment)
        experiment_id = experiment.experiment_id if experiment else client.create_experiment(self.experiment)
        runs = client.search_runs([experiment_id], f"tags.{KEY_TAG} = '{self.key}'", max_results=1)
        if runs:
            self.run_id, self.finished = runs[0].info.run_id, runs[0].info.status == "FINISHED"
            return
        # tags at once: a run that is cut off before it has its key would never be found again
        tags = {**self.tags, KEY_TAG: self.key, "git_sha": git_sha()}
        run = client.create_run(experiment_id, run_name=self.name, tags=tags)
        params = [Param(name, str(value)) for name, value in self.params.items()]
        client.log_batch(run.info.run_id, params=params)
        self.run_id = run.info.run_id

    def _deliver_history(self, client: Any, history: Sequence[Mapping[str, float]]) -> None:
        from mlflow.entities import Metric

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

    def _deliver_scores(self, client: Any, scores: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        known = client.get_run(self.run_id).data.metrics
        now = int(time.time() * 1000)
        points = [
            Metric(name, value, now, 0)
            for name, value in scores.items()
            if math.isfinite(value) and known.get(name) != value
        ]
        if points:
            client.log_batch(self.run_id, metrics=points)


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
        key: identifies the run for good; see :mod:`ucir.runs.run`.
        tags: to filter and group by.
        params: what one would put on an axis; written once.
    """
    run = TrackedRun(uri, experiment, name, key, dict(tags), dict(params), UNSENT.resolve())
    run.find()
    return run


class ScoreTracker:
    """One flat run for each direction and seed, holding its final scores.

    Args:
        dataset, setting, method: tags, and the experiment's name.
        params: of the network, to filter by.
    """

    def __init__(self, dataset: str, setting: str, method: str, params: Mapping[str, Any]) -> None:
        self.uri = tracking_uri()
        init_store(self.uri)
        self.dataset, self.setting, self.method = dataset, setting, method
        self.params = params

    def log(
        self, trained_run_key: str, query: str, gallery: str, seed: int, values: Mapping[str, float]
    ) -> None:
        """Other scores of the same weights (another view, other cutoffs) are another run."""
        content = [trained_run_key, query, gallery, self.setting, values]
        run = tracked_run(
            self.uri,
            f"ucir/{self.dataset}",
            f"{self.method} {query}→{gallery} s{seed}",
            hashlib.sha256(json.dumps(content).encode()).hexdigest()[:12],
            {
                "dataset": self.dataset,
                "setting": self.setting,
                "method": self.method,
                "query": query,
                "gallery": gallery,
                "pair": "-".join(sorted((query, gallery))),
                "seed": str(seed),
                "stage": "evaluate",
                "trained_run_key": trained_run_key,
            },
            self.params,
        )
        with status_of(run):
            run.log_scores(values)


def send_unsent(uri: str) -> None:
    """Send what earlier commands could not, if the store answers now."""
    for kept in sorted(UNSENT.resolve().glob("*.json")):
        run = json.loads(kept.read_text("utf-8"))["run"]
        if run["uri"] == uri and not TrackedRun(**{**run, "unsent": Path(run["unsent"])}).find():
            return


def _is_down(error: Exception) -> bool:
    """Whether it is the store's fault: unreachable, refusing, failing; not a mistake in what we say."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return str(error.error_code) != "INVALID_PARAMETER_VALUE"
    return isinstance(error, (RequestException, OSError))


def experiment_url(uri: str) -> str:
    """How to look at the store."""
    return uri if uri.startswith("http") else f"uv run mlflow ui --backend-store-uri {shlex.quote(uri)}"


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
    run.set_status("RUNNING")
    try:
        yield
    except KeyboardInterrupt:
        run.set_status("KILLED")
        raise
    except BaseException:
        run.set_status("FAILED")
        raise
    run.set_status("FINISHED")
