"""infra/: what can be checked without a cluster. What was never run is said in the README."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from tests.conftest import ROOT
from ucir.config.cluster import ClusterParams

INFRA = ROOT / "infra"
KUBERAY = sorted((INFRA / "kuberay").glob("*.yaml"))
VERSION = "1.32"
# https://ray-project.github.io/kuberay/reference/api/
CLUSTER_KEYS = {
    "rayVersion",
    "authOptions",
    "enableInTreeAutoscaling",
    "autoscalerOptions",
    "headGroupSpec",
    "workerGroupSpecs",
}
JOB_KEYS = {
    "entrypoint",
    "submissionMode",
    "shutdownAfterJobFinishes",
    "ttlSecondsAfterFinished",
    "backoffLimit",
    "rayClusterSpec",
}
GROUP_KEYS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def documents(file: Path) -> list[dict[str, Any]]:
    return [document for document in yaml.safe_load_all(file.read_text()) if document]


def check(document: dict[str, Any]) -> None:
    kubernetes_validate.validate(document, VERSION, strict=True)


@pytest.mark.parametrize("file", KUBERAY, ids=lambda file: file.name)
def test_kubernetes_takes_it(file: Path) -> None:
    for document in documents(file):
        if not document["apiVersion"].startswith("ray.io/"):
            check(document)
            continue
        spec = document["spec"]
        if document["kind"] == "RayJob":
            assert set(spec) <= JOB_KEYS
            assert spec["entrypoint"].startswith("/ucir/infra/enter.sh ")
            spec = spec["rayClusterSpec"]
        assert set(spec) <= CLUSTER_KEYS
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        for number, group in enumerate(groups):
            assert set(group) <= GROUP_KEYS
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())
            check(
                {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"g{number}"}, **group["template"]}
            )
            mounts = {
                mount["mountPath"] for mount in group["template"]["spec"]["containers"][0]["volumeMounts"]
            }
            assert {"/project", "/dev/shm"} <= mounts
        assert spec["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert all(group["minReplicas"] >= 1 for group in groups[1:]), "a run must fit what is there at first"


def test_a_misspelt_key_does_not_pass() -> None:
    document = documents(INFRA / "kuberay/storage.yaml")[0]
    document["spec"]["accesModes"] = document["spec"].pop("accessModes")
    with pytest.raises(kubernetes_validate.ValidationError):
        check(document)


def test_names_that_one_file_uses_and_another_makes_agree() -> None:
    kinds: dict[str, set[str]] = {}
    for file in KUBERAY:
        for document in documents(file):
            kinds.setdefault(document["kind"], set()).add(document["metadata"]["name"])
    text = "".join(file.read_text() for file in KUBERAY)
    assert set(re.findall(r"claimName: ([\w-]+)", text)) == kinds["PersistentVolumeClaim"]
    hosts = set(re.findall(r"http://([\w-]+):5000", text))
    assert hosts == kinds["Service"]
    (allowed,) = re.findall(r"--allowed-hosts=(\S+)", (INFRA / "kuberay/mlflow.yaml").read_text())
    assert {f"{host}:*" for host in hosts} <= set(allowed.split(","))


def test_versions_are_those_of_the_project() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    (ray,) = re.findall(r'"ray\[.*\]==([\d.]+)"', project)
    (mlflow,) = re.findall(r'"mlflow==([\d.]+)"', project)
    for file in KUBERAY:
        assert set(re.findall(r"rayVersion: ([\d.]+)", file.read_text())) <= {ray}
    assert re.findall(r"mlflow\[auth,db\]==([\d.]+)", (INFRA / "Dockerfile").read_text()) == [mlflow]


def test_compose_services_fit_together() -> None:
    compose = yaml.safe_load((INFRA / "compose.yaml").read_text())
    services, text = compose["services"], (INFRA / "compose.yaml").read_text()
    for name, service in services.items():
        assert set(service.get("depends_on", {})) <= set(services), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert source in compose["volumes"] or (INFRA / source).exists(), name
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), f"{name} would be open to the network"
    asked = set(re.findall(r"\$\{(\w+)", text))
    assert asked == set(re.findall(r"^(\w+)=$", (INFRA / "example.env").read_text(), re.MULTILINE))
    targets = set(re.findall(r"^FROM \S+ AS (\w+)", (INFRA / "Dockerfile").read_text(), re.MULTILINE))
    built = {service["build"]["target"] for service in services.values() if "build" in service}
    assert built <= targets
    assert "--allowed-hosts=mlflow:*" in text


def test_ray_up_takes_it() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = prepare_config(yaml.safe_load((INFRA / "ray-up/aws.yaml").read_text()))
    validate_config(config)
    config["idle_timeout_minutess"] = 1
    with pytest.raises(Exception, match="idle_timeout_minutess"):
        validate_config(config)


@pytest.mark.parametrize("file", ["enter.sh", "slurm/repro.sbatch"])
def test_scripts_are_bash(file: str) -> None:
    subprocess.run(["bash", "-n", INFRA / file], check=True)


def test_slurm_starts_ray_on_all_machines_and_the_command_once(tmp_path: Path) -> None:
    """With a Slurm that writes down what it is asked."""
    fakes = {
        "scontrol": "echo host-1; echo host-2",
        "srun": 'printf "%s\\n" "$@" > asked; env | grep RAY_ > environment',
        "uv": "true",
        "ray": 'mkdir -p "$HOME/.ray"; echo token > "$HOME/.ray/auth_token"',
    }
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_JOB_ID": "1234567",
        "SLURM_JOB_NODELIST": "host-[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_CPUS_ON_NODE": "16",
        "SLURM_GPUS_ON_NODE": "4",
    }
    script = INFRA / "slurm/repro.sbatch"
    subprocess.run(["bash", script, "ucir", "tune", "sample"], env=environment, check=True, cwd=tmp_path)
    asked = (tmp_path / "asked").read_text().split()
    address = asked[asked.index("--address") + 1]
    assert address == "host-1:24567"
    assert asked[asked.index("--min-nodes") + 1] == "2"
    assert asked[asked.index("--num-gpus") + 1] == "4"
    assert asked[asked.index("--") :] == ["--", "ucir", "tune", "sample"]
    variables = (tmp_path / "environment").read_text()
    assert f"RAY_ADDRESS={address}" in variables
    assert "RAY_AUTH_MODE=token" in variables


def test_settings_that_the_comments_name_exist() -> None:
    for file in [*KUBERAY, INFRA / "slurm/repro.sbatch"]:
        for block in re.findall(r"cluster: \{(.*?)\}", file.read_text()):
            given = yaml.safe_load("{" + block + "}")
            assert ClusterParams(**given)
