"""`ucir doctor`: what usually goes wrong on a machine, looked at beforehand."""

from __future__ import annotations

import importlib.metadata as metadata
import os
import shutil
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from ucir import tracking
from ucir.paths import RUNS


@dataclass(frozen=True)
class Finding:
    """One line of the examination; a bad one tells the remedy."""

    good: bool
    text: str


def examine() -> list[Finding]:
    """Look at packages, devices, disk, memory, cluster and tracking server."""
    return [_torch(), _faiss(), _disk(), _shared_memory(), _ray(), _mlflow(), _dvc()]


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


def _ray() -> Finding:
    address = os.environ.get("RAY_ADDRESS")
    if not address:
        return Finding(True, "RAY_ADDRESS is not set: trainings run on this machine")
    from ucir.cluster.launch import resources_at

    try:
        resources = resources_at(address)
    except (ConnectionError, RuntimeError, ValueError) as error:
        return Finding(False, f"Ray at {address} does not answer ({error}): start it or unset RAY_ADDRESS")
    return Finding(
        True,
        f"Ray at {address}: {resources.get('CPU', 0):.0f} CPUs, {resources.get('GPU', 0):.0f} GPUs, "
        f"runs in {RUNS.resolve()} (must be shared by all nodes)",
    )


def _mlflow() -> Finding:
    uri = tracking.tracking_uri()
    if not uri.startswith("http"):
        return Finding(True, f"MLflow store {uri}")
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=10):
            return Finding(True, f"MLflow server {uri}")
    except urllib.error.HTTPError as error:
        remedy = ": start it with --allowed-hosts naming this address" if error.code == 403 else ""
        return Finding(False, f"MLflow server {uri} answers {error.code}{remedy}")
    except OSError as error:
        return Finding(
            False, f"MLflow server {uri} does not answer ({error}): start it or unset the variable"
        )


def _dvc() -> Finding:
    if not Path(".dvc").is_dir():
        return Finding(False, "no .dvc folder here: run in the project's folder")
    return Finding(True, f"DVC {metadata.version('dvc')}, git {tracking.git_sha()}")


def _installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
