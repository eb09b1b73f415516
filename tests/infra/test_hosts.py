"""Two hosts on one machine: each in a network namespace with an address of its own.

DDP crosses them; one is cut off and gone for good, and the training ends with the worker that is left.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import tiny_params, write_params
from ucir.cluster.launch import train_all
from ucir.config.cluster import ClusterParams
from ucir.config.load import load_params
from ucir.runs.run import PairRun, plan_runs

pytestmark = pytest.mark.slow
EPOCHS = 20
WORKERS = 2
RAY = str(Path(sys.executable).with_name("ray"))


def may_make_namespaces() -> bool:
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip"):
        return False
    made = subprocess.run(["ip", "netns", "add", "ucir-probe"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", "ucir-probe"], capture_output=True, check=False)
    return made.returncode == 0


class Hosts:
    """A bridge and hosts on it; host 0 is Ray's head and works, too."""

    def __init__(self, folder: Path, ray_folder: Path) -> None:
        self.folder = folder
        self.environment = {
            **os.environ,
            "RAY_TMPDIR": str(ray_folder),  # or `ray start` makes this the cluster of every `ray.init` here
            "RAY_health_check_initial_delay_ms": "2000",
            "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_failure_threshold": "4",
            "RAY_ADDRESS": "10.77.0.1:6379",
            "RAY_DEDUP_LOGS": "0",  # the log is read
            "GLOO_SOCKET_IFNAME": "eth0",  # the hosts' common name is no address of theirs
        }

    def ip(self, *arguments: str, check: bool = True) -> str:
        done = subprocess.run(["ip", *arguments], check=False, capture_output=True, text=True)
        assert not (check and done.returncode), (arguments, done.stderr)
        return done.stdout

    def start(self, *command: str, host: int, out: str) -> subprocess.Popen[bytes]:
        with (self.folder / out).open("w") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", f"ucir{host}", *command],
                env=self.environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
            )

    def up(self) -> None:
        self.down()  # what a killed test left
        self.ip("link", "add", "ucir-br", "type", "bridge")
        self.ip("link", "set", "ucir-br", "up")
        for host in range(WORKERS):
            self.ip("netns", "add", f"ucir{host}")
            self.ip(
                "link", "add", f"ucir-v{host}", "type", "veth", "peer", "name", "eth0", "netns", f"ucir{host}"
            )
            self.ip("link", "set", f"ucir-v{host}", "master", "ucir-br", "up")
            self.ip("-n", f"ucir{host}", "addr", "add", f"10.77.0.{host + 1}/24", "dev", "eth0")
            self.ip("-n", f"ucir{host}", "link", "set", "eth0", "up")
            self.ip("-n", f"ucir{host}", "link", "set", "lo", "up")
        memory = "--object-store-memory=100000000"
        head = self.start(
            *(RAY, "start", "--head", "--port=6379", "--num-cpus=1", memory, "--node-ip-address=10.77.0.1"),
            "--include-dashboard=false",
            host=0,
            out="head.log",
        )
        assert head.wait() == 0, (self.folder / "head.log").read_text()
        for host in range(1, WORKERS):  # one by one: they share /tmp, which hosts do not
            process = self.start(
                *(RAY, "start", "--address=10.77.0.1:6379", "--num-cpus=1", memory),
                f"--node-ip-address=10.77.0.{host + 1}",
                host=host,
                out=f"host{host}.log",
            )
            assert process.wait() == 0, (self.folder / f"host{host}.log").read_text()

    def cut_off(self, host: int) -> None:
        self.ip("link", "set", f"ucir-v{host}", "down")

    def kill(self, host: int) -> None:
        for pid in self.ip("netns", "pids", f"ucir{host}", check=False).split():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)

    def down(self) -> None:
        for host in range(WORKERS):
            self.kill(host)
            self.ip("link", "del", f"ucir-v{host}", check=False)
            self.ip("netns", "del", f"ucir{host}", check=False)
        self.ip("link", "del", "ucir-br", check=False)


@pytest.fixture
def hosts(prepared: Path) -> Iterator[Hosts]:
    if not may_make_namespaces():
        pytest.skip("NOT RUN: hosts in network namespaces need root, iproute2 and the right to make them")
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as ray_folder:  # sockets want short paths
        made = Hosts(prepared, Path(ray_folder))
        try:
            made.up()
            yield made
        finally:
            made.down()


def test_a_training_over_hosts_outlives_one_of_them(hosts: Hosts, prepared: Path, store: str) -> None:
    params = tiny_params("images")
    params["methods"]["ucdir"]["shapes"]["epochs"] = EPOCHS
    write_params(prepared, params)
    (run,) = plan_runs(load_params(), "shapes", "closed", "ucdir", ("art-photo",))
    train = [
        *(sys.executable, "-c", "from ucir.cli import main; main()", "train", "--dataset", "shapes"),
        *("--pair", "art-photo", "--num-workers", "1", "--set", "cluster.max_workers=2"),
    ]
    log = prepared / "train.log"

    def at_work() -> list[int]:
        """The hosts of two workers, once they have trained an epoch."""
        give_up = time.monotonic() + 300
        while time.monotonic() < give_up:
            groups = log.read_text().split("worker group of size 2:")[1:]
            lines = re.findall(r"\(ip=10\.77\.0\.(\d+), pid=\d+\) world_rank", "".join(groups[-1:]))
            if len(lines) == 2 and any(entry["time/workers"] == 2 for entry in run.history()):
                return [int(host) - 1 for host in lines]
            time.sleep(0.5)
        raise AssertionError(log.read_text()[-5000:])

    training = hosts.start(*train, host=0, out="train.log")
    assert sorted(at_work()) == [0, 1], "the workers are on different hosts"
    hosts.cut_off(1)
    cut = len(run.history())
    assert training.wait(timeout=400) == 0, log.read_text()[-5000:]
    assert 0 < cut < EPOCHS
    workers = [int(entry["time/workers"]) for entry in run.history()]
    assert len(workers) == EPOCHS
    assert 2 in workers[:cut]
    assert workers[-1] == 1

    alone = PairRun(**{**run.__dict__, "folder": prepared / "runs/alone", "key": "alone"})
    train_all([alone], ClusterParams())
    for one, many in zip(alone.history()[:4], run.history(), strict=False):  # rounding, amplified, later
        assert many["train/loss_total"] == pytest.approx(one["train/loss_total"], rel=1e-3)
