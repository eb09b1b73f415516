"""`ucir doctor`: what usually goes wrong on a machine, looked at beforehand."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import shutil
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ucir import tracking
from ucir.cluster.launch import OPEN_FILES, ray_folder, resources_at
from ucir.config.base import PARAMS_FILE
from ucir.errors import UserError
from ucir.paths import RUNS
from ucir.runs.study import load_study, study_faults, unwritten


@dataclass(frozen=True)
class Finding:
    """One line of the examination; a bad one tells the remedy."""

    good: bool
    text: str


def examine() -> list[Finding]:
    """Look at packages, devices, disk, memory, cluster, tracking server and params.yaml."""
    machine = [_disk(), _shared_memory(), _temporary(), _open_files()]
    return [_torch(), _faiss(), *machine, _ray(), _mlflow(), _dvc(), *_params()]


def _torch() -> Finding:
    try:
        import torch
        import torchvision
    except (ImportError, RuntimeError) as error:
        return Finding(False, f"torch and torchvision do not fit each other ({error}): run `uv sync`")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU: CPU"
    return Finding(
        True,
        f"torch {torch.__version__}, torchvision {torchvision.__version__}, {device}, "
        f"{torch.get_num_threads()} threads",
    )


def _faiss() -> Finding:
    owners = [name for name in ("faiss-gpu", "faiss-cpu") if _installed(name)]
    if len(owners) != 1:
        return Finding(False, f"exactly one of faiss-gpu and faiss-cpu may be installed, found {owners}")
    import faiss

    return Finding(True, f"{owners[0]} {faiss.__version__}, {faiss.get_num_gpus()} GPUs")


def _disk() -> Finding:
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    return Finding(free > 5, f"{free:.0f} GiB free in {Path.cwd()}" + ("" if free > 5 else ": make room"))


def _shared_memory() -> Finding:
    folder = Path("/dev/shm")
    if not folder.exists():
        return Finding(True, "no /dev/shm on this system")
    free = shutil.disk_usage(folder).free / 2**30
    remedy = ": Ray's object store falls back to disk; in a container give --shm-size=2g"
    return Finding(free > 1, f"{free:.1f} GiB free in {folder}" + ("" if free > 1 else remedy))


def _temporary() -> Finding:
    folder = Path(tempfile.gettempdir())
    free = shutil.disk_usage(folder).free / 2**30
    if free < 1:
        return Finding(False, f"{free:.1f} GiB free in {folder}: make room, or set TMPDIR to another folder")
    try:
        ray = ray_folder()
    except UserError as error:
        return Finding(False, str(error))
    beside = f"; Ray's files in {ray}, as sockets want short paths" if ray else ""
    return Finding(True, f"{free:.0f} GiB free in {folder}{beside}")


def _open_files() -> Finding:
    """Ray holds many sockets; this program raises its own limit as far as it may."""
    if sys.platform == "win32":
        return Finding(True, "no limit of open files on this system")
    import resource

    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if 0 <= most < OPEN_FILES:
        return Finding(
            False, f"{most} open files at most: Ray wants {OPEN_FILES}; raise the hard limit (ulimit -Hn)"
        )
    return Finding(True, f"{most if most >= 0 else 'any number of'} open files")


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding(True, "RAY_ADDRESS is not set: trainings run on this machine")
    try:
        resources = resources_at(address)
    except UserError as error:
        return Finding(False, str(error))
    except (ConnectionError, RuntimeError, ValueError) as error:
        return Finding(False, f"Ray at {address} does not answer ({error}): start it or unset RAY_ADDRESS")
    return Finding(
        True,
        f"Ray at {address}: {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs, "
        f"runs in {RUNS.resolve()} (must be shared by all nodes)",
    )


def _mlflow() -> Finding:
    try:
        uri = tracking.tracking_uri()
    except UserError as error:
        return Finding(False, str(error))
    shown = tracking.masked(uri)
    if not uri.startswith("http"):
        return Finding(True, f"MLflow store {shown}{_waiting(tracking.unsent())}")
    from mlflow.exceptions import MlflowException
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    try:  # MLflow's own request: it logs in as a training will
        answer = http_request(
            get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=10, raise_on_status=False
        )
    except MlflowException as error:
        reason = tracking.masked(str(error))
        return Finding(
            False, f"MLflow server {shown} does not answer ({reason}): start it or unset the variable"
        )
    if not answer.ok:
        remedy = {
            401: ": set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN",
            403: ": start it with --allowed-hosts naming this address",
        }.get(answer.status_code, "")
        return Finding(False, f"MLflow server {shown} answers {answer.status_code}{remedy}")
    if answer.content.strip() != b"OK":
        return Finding(False, f"{shown} answers, but is no MLflow server: correct MLFLOW_TRACKING_URI")
    tracking.send_unsent(uri)
    unsent = tracking.unsent()
    return Finding(uri not in unsent, f"MLflow server {shown}{_waiting(unsent)}")


def _waiting(unsent: Mapping[str, int]) -> str:
    """What waits for which address."""
    return "".join(
        f"; {count} {'run waits' if count == 1 else 'runs wait'} in {tracking.UNSENT} "
        f"for {tracking.masked(uri)}"
        for uri, count in unsent.items()
    )


def _dvc() -> Finding:
    if not Path(".dvc").is_dir():
        return Finding(False, "no .dvc folder here: run in the project's folder")
    return Finding(True, f"DVC {metadata.version('dvc')}, git {tracking.git_sha()}")


def _params() -> list[Finding]:
    """What `uv run dvc repro` would refuse, and which pictures and weights it lacks."""
    try:
        params = load_study(encoders=True)
        study = params.study.name
        faults = unwritten(params) + (study_faults(params, study) if study in params.studies else [])
    except UserError as error:
        faults = [str(error)]
    if faults:
        return [Finding(False, fault) for fault in faults]
    return [Finding(True, f"{PARAMS_FILE}: `uv run dvc repro` runs the study {study!r}")]


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
