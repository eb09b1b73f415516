"""MLflow: where runs can be compared.

One experiment per data set. A training is one run (curves by epoch); each direction of an evaluation is
another (final scores). A run names the pictures that it saw as its inputs, and what makes it again as its
note. Runs are found again by their key, so that a resumed or repeated command adds neither runs nor points.
Store: ``MLFLOW_TRACKING_URI``, else ``sqlite:///mlflow.db`` in the project.
"""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
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
# it would keep the project's lock file with each model, which names the addresses of package registries
os.environ.setdefault("MLFLOW_UV_AUTO_DETECT", "false")
os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
# its own patience is minutes; ours is `TrackedRun.unsent`
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

SCHEMES = ("http", "https", "sqlite", "postgresql", "mysql", "mssql", "databricks")
"""Of MLflow's servers and databases."""
KEY_TAG = "run_key"
NOTE_TAG = "mlflow.note.content"
"""What MLflow's page shows as a description."""
DIGEST = 36
"""Characters of a digest that MLflow takes."""
UNSENT = RUNS / "mlflow-unsent"
SILENCE = 60.0
"""Seconds for which a store that did not answer is left alone: asking takes time that training has not."""
_silent_until: dict[str, float] = {}
MODEL_TRAINING = "workflowType=machine_learning"
"""Without it a browser that is new to MLflow opens an experiment as one of generative AI."""
SCORES = f"runs?{MODEL_TRAINING}&searchFilter=tags.stage%3D%27evaluate%27&compareRunsMode=CHART"
SUMMARIES = f"runs?{MODEL_TRAINING}&searchFilter=tags.stage%3D%27report%27"
"""Pages of an experiment."""
EXPERIMENT_NOTE = """\
Runs with `stage` = `train` hold curves by epoch, those with `evaluate` the final scores of one direction and
seed, those with `report` the tables of a study.

- [All final scores, pairs x methods](#/experiments/{id}/{scores}): group them by the tag `method`.
- [The tables of all studies](#/experiments/{id}/{summaries}): `report.html` is among the artifacts of each.
- One pair: `tags.stage = 'evaluate' and tags.pair = 'A-B'`; what improved on a number:
  `metrics.P_at_50 > 60`.
"""


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
        raise UserError(masked(f"MLFLOW_TRACKING_URI={uri}: {fault}"))
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        uri = _address_of(Path(uri.removeprefix("sqlite:///")))
    return uri


def _address_of(database: Path) -> str:
    """A file as a database's address, in which '?' and '%' mean something else."""
    path = quote(str(database.resolve()), safe="/ #!$&'()*+,;=:@[]")
    return f"sqlite:///{path}"


def masked(text: str) -> str:
    """Text with no passwords in its addresses."""
    return re.sub(r"(://[^:/@\s]*):[^@\s]+@", r"\1:***@", text)


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


@dataclass(frozen=True)
class DataInput:
    """Pictures of a domain that a run saw."""

    name: str
    """``<data set>/<domain>``."""
    digest: str
    """The fingerprint of their content."""
    source: str
    """Folder or archive."""
    context: str
    """``training``, ``query`` or ``gallery``."""
    pictures: int


def data_inputs(pack: Path, source: str, contexts: Mapping[str, str]) -> list[DataInput]:
    """Domains of a pack as a run's inputs.

    Args:
        pack: its folder, named like the data set.
        source: where its pictures come from.
        contexts: by domain.
    """
    from ucir.data.pack import read_info  # with torch

    info = read_info(pack)
    return [
        DataInput(
            f"{pack.name}/{domain}",
            info.fingerprints[domain][:DIGEST],
            str(Path(source).resolve()),
            context,
            info.counts[domain],
        )
        for domain, context in contexts.items()
    ]


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
    note: str = ""
    data: Sequence[DataInput] = ()
    experiment_id: str | None = None
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

    def log_model(self, path: Path) -> None:
        """Add the model that a run's file holds, so that it can be registered and served; once."""
        self._send({"model": str(path.resolve())})

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
                reason = masked(str(error)).splitlines()[0][:200]
                print(
                    f"MLflow at {masked(self.uri)} does not answer ({reason}): work goes on, and what "
                    f"belongs there is kept in {self.unsent}; the next training or `uv run ucir doctor` "
                    "sends it",
                    flush=True,
                )
            else:
                kept.unlink(missing_ok=True)
                return True
        if any(message.values()):
            self.unsent.mkdir(parents=True, exist_ok=True)
            description = {**asdict(self), "unsent": str(self.unsent), "run_id": None, "experiment_id": None}
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
        if message.get("model") and Path(message["model"]).exists():
            self._deliver_model(client, Path(message["model"]))
        status = message.get("status")
        if status == "RUNNING":
            client.update_run(self.run_id, status=status)
        elif status and not self.finished:
            client.set_terminated(self.run_id, status)

    def _find_or_create(self, client: Any) -> None:
        from mlflow.entities import Param

        self.experiment_id = _find_or_create_experiment(client, self.experiment)
        runs = client.search_runs([self.experiment_id], f"tags.{KEY_TAG} = '{self.key}'", max_results=1)
        if runs:
            self.run_id, self.finished = runs[0].info.run_id, runs[0].info.status == "FINISHED"
            return
        # tags at once: a run that is cut off before it has its key would never be found again
        tags = {
            **self.tags,
            KEY_TAG: self.key,
            "git_sha": git_sha(),
            **_origin(),
            NOTE_TAG: self.note,
        }
        run = client.create_run(self.experiment_id, run_name=self.name, tags=tags)
        params = [Param(name, str(value)) for name, value in self.params.items()]
        client.log_batch(run.info.run_id, params=params)
        if self.data:
            client.log_inputs(run.info.run_id, [_dataset_input(data) for data in self.data])
        self.run_id = run.info.run_id

    def _deliver_model(self, client: Any, path: Path) -> None:
        from mlflow.entities import LoggedModelOutput

        from ucir.models.card import model_card
        from ucir.models.model import load_model
        from ucir.pyfunc import save_pyfunc

        run = client.get_run(self.run_id)
        if run.outputs and run.outputs.model_outputs:
            return
        model = load_model(path)
        epoch = int(model.facts["epoch"])
        logged = client.create_logged_model(
            run.info.experiment_id,
            re.sub(r"[^\w-]+", "-", self.name),
            self.run_id,
            {**self.tags, **_origin(), NOTE_TAG: model_card(model).text},
            {"epoch": str(epoch)},
        )
        with tempfile.TemporaryDirectory() as folder:
            saved = Path(folder) / "model"
            save_pyfunc(model, saved, logged.model_id, self.run_id)
            client.log_model_artifacts(logged.model_id, str(saved))
        client.finalize_logged_model(logged.model_id, "READY")
        # the last: what was cut off before is not one of the run's, and is done anew
        client.log_outputs(self.run_id, [LoggedModelOutput(logged.model_id, epoch)])

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
    note: str = "",
    data: Sequence[DataInput] = (),
) -> TrackedRun:
    """The store's run with this key, made when there is none.

    Args:
        uri: tracking address.
        experiment: ``ucir/<dataset>``.
        name: what the UI shows.
        key: identifies the run for good; see :mod:`ucir.runs.run`.
        tags: to filter and group by.
        params: what one would put on an axis; written once.
        note: Markdown, shown with the run.
        data: the pictures that it sees.
    """
    run = TrackedRun(uri, experiment, name, key, dict(tags), dict(params), UNSENT.resolve(), note, data)
    run.find()
    return run


class ScoreTracker:
    """One flat run for each direction and seed, holding its final scores.

    Args:
        pack: of the data set; its name is a tag, and the experiment's.
        source: where the pictures come from.
        setting, method: tags.
        params: of the network, to filter by.
    """

    def __init__(self, pack: Path, source: str, setting: str, method: str, params: Mapping[str, Any]) -> None:
        self.uri = tracking_uri()
        init_store(self.uri)
        self.pack, self.source = pack, source
        self.dataset, self.setting, self.method = pack.name, setting, method
        self.params = params

    def log(
        self, trained_run_key: str, query: str, gallery: str, seed: int, values: Mapping[str, float]
    ) -> None:
        """Other scores of the same weights (another view, other cutoffs) are another run."""
        content = [trained_run_key, query, gallery, self.setting, values]
        run = tracked_run(
            self.uri,
            f"ucir/{self.dataset}",
            named(f"{self.method} {query}→{gallery} s{seed}", self.setting),
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
            f"Scores of the training with `run_key` = `{trained_run_key}`; made by `uv run dvc repro`.",
            data_inputs(self.pack, self.source, {query: "query", gallery: "gallery"}),
        )
        with status_of(run):
            run.log_scores(values)


def named(name: str, setting: str | None) -> str:
    """A run's name with its setting, where that is not the usual one."""
    return name if setting in (None, "closed") else f"{name} {setting}"


def send_unsent(uri: str) -> None:
    """Send what earlier commands could not, if the store answers now."""
    for kept in sorted(UNSENT.resolve().glob("*.json")):
        run = json.loads(kept.read_text("utf-8"))["run"]
        data = [DataInput(**entry) for entry in run.get("data", ())]
        if (
            run["uri"] == uri
            and not TrackedRun(**{**run, "unsent": Path(run["unsent"]), "data": data}).find()
        ):
            return


def unsent() -> Counter[str]:
    """How many runs wait for each address, in this folder."""
    return Counter(json.loads(kept.read_text("utf-8"))["run"]["uri"] for kept in UNSENT.glob("*.json"))


def _is_down(error: Exception) -> bool:
    """Whether it is the store's fault: unreachable, refusing, failing; not a mistake in what we say."""
    from mlflow.exceptions import MlflowException
    from requests import RequestException

    if isinstance(error, MlflowException):
        return str(error.error_code) != "INVALID_PARAMETER_VALUE"
    return isinstance(error, (RequestException, OSError))


def _find_or_create_experiment(client: Any, name: str) -> str:
    """Its id; marked as model training, which MLflow's page would else ask about."""
    experiment = client.get_experiment_by_name(name)
    if experiment and experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow's experiment {name!r} was deleted: `uv run mlflow experiments restore --experiment-id "
            f"{experiment.experiment_id}`, or `uv run mlflow gc --experiment-ids {experiment.experiment_id}` "
            "forgets it for good"
        )
    number: str = experiment.experiment_id if experiment else client.create_experiment(name)
    known = experiment.tags if experiment else {}
    tags = {
        "mlflow.experimentKind": "custom_model_development",
        NOTE_TAG: EXPERIMENT_NOTE.format(id=number, scores=SCORES, summaries=SUMMARIES),
    }
    for tag, value in tags.items():
        if tag not in known:  # people may have changed them
            client.set_experiment_tag(number, tag, value)
    return number


def _origin() -> dict[str, str]:
    """Who ran what: the columns User and Source."""
    program = Path(sys.argv[0])
    name = program.name if program.stem != "__main__" else program.parent.name
    origin = {"mlflow.source.name": name, "mlflow.source.type": "LOCAL"}
    with contextlib.suppress(OSError, KeyError, ImportError):  # a container's user may have no name
        origin["mlflow.user"] = getpass.getuser()
    return origin


def _dataset_input(data: DataInput) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    profile = json.dumps({"pictures": data.pictures})
    source = json.dumps({"uri": data.source})
    dataset = Dataset(data.name, data.digest, "local", source, profile=profile)
    return DatasetInput(dataset, [InputTag("mlflow.data.context", data.context)])


def experiment_url(uri: str) -> str:
    """How to look at the store; a browser asks for the password, a shell has it."""
    if uri.startswith("http"):
        return _page(uri)
    store = shlex.quote(uri) if masked(uri) == uri else '"$MLFLOW_TRACKING_URI"'
    return f"uv run mlflow ui --backend-store-uri {store}"


def scores_url(uri: str, experiment_id: str) -> str:
    """Where all final scores of an experiment are compared, pairs x methods, once the page is there."""
    base = _page(uri) if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{base.rstrip('/')}/#/experiments/{experiment_id}/{SCORES}"


def _page(uri: str) -> str:
    """A server's address without user and password."""
    return re.sub(r"://[^/@]*@", "://", uri)


def git_sha() -> str:
    """The commit at hand, with ``-dirty`` when the tree differs; ``unknown`` outside a checkout."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    return "unknown"


def _client(uri: str) -> Any:
    _quiet_loggers()
    from mlflow import MlflowClient

    return MlflowClient(uri)


def _quiet_loggers() -> None:
    """The schema's migrations and saved models log lines that mean nothing to our users."""
    import logging

    for name in ("alembic", "mlflow.store.db.utils", "mlflow.pyfunc"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.utils.environment").setLevel(logging.ERROR)  # uv's environments have no pip


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
