"""Launch runs: one after the other in this process, or on a cluster, each on one worker or with DDP.

The loop is the same everywhere, and so is what it keeps: `Run.folder`, which every machine must see under
the same path.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

# before ray is imported. uv: workers use this interpreter as it is. Paths: ours are absolute.
# The health check's period bounds how fast a worker's report passes through.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled" if "RAY_ADDRESS" not in os.environ else "")
os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # of Tune: with it, silence is not silent
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")
os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "300")  # 60 is little for a busy machine

import torch

from ucir import tracking
from ucir.cluster.runs import Run, RunReporter, open_pair
from ucir.config import ClusterParams
from ucir.devices import choose_device, wants_gpu
from ucir.errors import UserError
from ucir.methods import METHODS
from ucir.progress import Progress
from ucir.training.loop import PairTraining, train


def train_all(runs: list[Run], cluster: ClusterParams) -> None:
    """Train what is not yet done; one run that fails does not stop the others.

    Every run is tracked in MLflow, resumes from its folder, and leaves ``last.pt`` and ``best.pt`` there.
    With ``num_workers`` 0 they train one after the other in this process; else on the cluster, as many at
    once as it holds.

    Raises:
        UserError: one run does not fit the cluster; some runs failed: names each with its reason and the
            command that goes on.
    """
    uri = tracking.tracking_uri()
    tracking.init_store(uri)
    open_runs = [run for run in runs if not run.done]
    for run in runs:
        if run.done:
            print(f"{run.name}: finished before ({run.folder.name})")
            _track(run, uri)
    if not open_runs:
        return
    concurrent = 0
    if cluster.num_workers:
        connect(cluster, uri)
        concurrent = at_once(cluster, "a training")
    with Progress("train", sum(run.params.epochs for run in open_runs), "epoch") as progress:
        for run in open_runs:
            history, steps = run.kept()
            if (resumed := len(history)) or steps:
                within = f" and step {steps} of the next" if steps else ""
                progress.message(f"{run.name}: resumes after epoch {resumed} of {run.params.epochs}{within}")
                progress.skip(resumed)
        try:
            if concurrent:
                with _answering(_interrupt, signal.SIGTERM):  # Ray's own answer is a stack of C++
                    failed = _fan_out(open_runs, cluster, uri, concurrent, progress)
            else:
                failed = _one_by_one(open_runs, cluster, uri, progress)
        except KeyboardInterrupt:
            progress.message("stopped: the same command goes on from there")
            raise
    if failed:
        told = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {told}. Finished runs and epochs are kept: "
            "the same command goes on with these alone"
        )


def _one_by_one(runs: list[Run], cluster: ClusterParams, uri: str, progress: Progress) -> dict[str, str]:
    """In this process. Returns what failed, and why."""
    failed: dict[str, str] = {}
    with _stoppable() as stop:
        for run in runs:
            try:
                _train_here(run, _tracked_run(run, uri), choose_device(cluster), progress.advance, stop)
            except Exception as error:
                failed[run.name] = _reason(run, error)
                progress.message(f"{run.name} failed: {failed[run.name]}")
    return failed


def _fan_out(
    runs: list[Run], cluster: ClusterParams, uri: str, concurrent: int, progress: Progress
) -> dict[str, str]:
    """On the cluster. Returns what failed, and why."""
    import ray
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    # what holds runs together lives beside this process: it must not go down with a worker's machine
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    lines = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    alone = not cluster.together
    # a task whose machine dies is started again, and goes on from the run's folder
    asked = _per_worker(cluster) if alone else {"CPU": 0}  # Ray Train asks for its workers itself
    task = ray.remote(_train_alone if alone else _train_on_workers).options(
        max_retries=cluster.max_failures,
        num_cpus=asked["CPU"],
        num_gpus=asked.get("GPU", 0),
        scheduling_strategy="DEFAULT" if alone else here,
    )
    # one-worker tasks queue in Ray, where an autoscaler sees them; trainings of several would each hold a
    # part of what they need
    most = len(runs) if alone and not cluster.at_once else concurrent
    waiting = list(runs)
    active: dict[Any, Run] = {}
    failed: dict[str, str] = {}

    def show() -> None:
        while not lines.empty():
            progress.advance(*lines.get())

    try:
        while waiting or active:
            while waiting and len(active) < most:
                run = waiting.pop(0)
                active[task.remote(run, cluster, _tracked_run(run, uri), lines)] = run
            ready, _ = ray.wait(list(active), timeout=1)
            show()
            for reference in ready:
                run = active.pop(reference)
                try:
                    ray.get(reference)
                except Exception as error:
                    cause = getattr(error, "cause", None)
                    failed[run.name] = _reason(run, cause if isinstance(cause, Exception) else error)
                    progress.message(f"{run.name} failed: {failed[run.name]}")
    finally:
        for reference in active:
            ray.cancel(reference, force=alone)
    show()
    return failed


def _train_here(
    run: Run,
    tracked: tracking.TrackedRun,
    device: torch.device,
    advance: Callable[[int, str], None],
    stop: threading.Event,
) -> None:
    """Train one run in this process."""

    def after_epoch(history: list[dict[str, float]]) -> None:
        tracked.log_history(history)
        advance(1, _told(run, history[-1]))

    with lock_run(run), tracking.status_of(tracked):
        advance(0, f"{run.name} begins")
        train(new_training(run, device), RunReporter(run, True, after_epoch, stop))


@contextlib.contextmanager
def _stoppable() -> Iterator[threading.Event]:
    """An event that the first Ctrl+C or SIGTERM sets; the second is a KeyboardInterrupt."""
    stop = threading.Event()

    def asked() -> None:
        if stop.is_set():
            _interrupt()
        stop.set()
        os.write(2, b"\nstopping after this step; once more to stop at once\n")  # print may be at work

    with _answering(asked, signal.SIGINT, signal.SIGTERM):
        yield stop


def _interrupt() -> None:
    raise KeyboardInterrupt


@contextlib.contextmanager
def _answering(asked: Callable[[], None], *numbers: int) -> Iterator[None]:
    """Call ``asked`` on these signals; off the main thread they do not come."""
    here = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, lambda *_: asked()) for number in numbers if here}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _train_alone(run: Run, cluster: ClusterParams, tracked: tracking.TrackedRun, lines: Any) -> None:
    """A task of the cluster: one run on one worker."""

    def advance(steps: int, note: str) -> None:
        lines.put((steps, note))

    _train_here(run, tracked, choose_device(cluster), advance, threading.Event())


def _train_on_workers(run: Run, cluster: ClusterParams, tracked: tracking.TrackedRun, lines: Any) -> None:
    """A task of the cluster: one run on several workers, which Ray Train holds together."""
    # a name of its own each time: Ray takes a finished run's name for nothing to do, and resuming is the run
    # folder's business
    name = f"ray-{time.time_ns()}"
    config = {"run": run, "tracked": tracked, "lines": lines}
    trainer = workers(_worker_main, config, cluster, name, run.folder)
    with lock_run(run), tracking.status_of(tracked):
        trainer.fit()


def _worker_main(config: dict[str, Any]) -> None:
    """What each worker runs; Ray has set up the process group and the device."""
    from ray import train as ray_train
    from ray.train.torch import get_device

    run: Run = config["run"]
    tracked: tracking.TrackedRun = config["tracked"]

    def after_epoch(history: list[dict[str, float]]) -> None:
        tracked.log_history(history)
        config["lines"].put((1, _told(run, history[-1])))

    def leaving() -> bool:
        return ray_train.get_preemption_info() is not None

    first = ray_train.get_context().get_world_rank() == 0
    train(new_training(run, get_device()), RunReporter(run, first, after_epoch, leaving=leaving))


def new_training(run: Run, device: torch.device) -> PairTraining:
    """Everything that changes while a run is trained, as at its start."""
    method = METHODS[run.method](run.params, run.seed)
    return PairTraining(open_pair(run), run.view, run.encoder, run.start, method, device)


@contextlib.contextmanager
def lock_run(run: Run, wait: bool = False) -> Iterator[None]:
    """Hold the run's folder for this process; a kill gives it back, too.

    Raises:
        UserError: another process holds it, and we do not ``wait``.
    """
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise UserError(f"{run.name}: another process is training it in {run.folder}") from None
        yield


def connect(cluster: ClusterParams, uri: str) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine that holds the workers.

    Prints where to look meanwhile.
    """
    import ray

    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _check_answers(address)
        context = ray.init()
    else:
        needed = (cluster.max_workers or cluster.num_workers) * cluster.cpus_per_worker
        context = ray.init(
            "local",  # not whatever else may run here
            num_cpus=max(int(needed) + 1, os.cpu_count() or 1),  # and room for who waits for them
            object_store_memory=200 * 1024**2,
            include_dashboard=True,
        )
    there = ray.cluster_resources()
    held = ", ".join(f"{there[name]:g} {name}" for name in ("CPU", "GPU") if name in there)
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else "off"
    print(f"cluster: {held}; dashboard: {dashboard}; runs: {tracking.experiment_url(uri)}", flush=True)


def _check_answers(address: str) -> None:
    """Ray itself tries for minutes.

    Raises:
        UserError: nothing listens at a ``host:port``.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdigit()) or "/" in host:
        return
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except OSError as error:
        raise UserError(
            f"RAY_ADDRESS={address}: no Ray cluster answers there ({error}): start one with `ray start "
            "--head`, correct the variable, or unset it to use this machine alone"
        ) from None


def per_run(cluster: ClusterParams) -> dict[str, float]:
    """What one training takes of the cluster, at least."""
    workers = max(1, cluster.num_workers)
    return {name: workers * count for name, count in _per_worker(cluster).items()}


def workers(
    loop: Callable[[dict[str, Any]], None],
    config: dict[str, Any],
    cluster: ClusterParams,
    name: str,
    storage: Path,
    callbacks: Sequence[Any] = (),
) -> Any:
    """Ray Train's trainer of several workers, each with ``loop(config)``; not started yet.

    A machine that dies, also while the workers find each other, starts all of them anew.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    asked, most = _per_worker(cluster), cluster.max_failures
    fewest = cluster.num_workers
    return TorchTrainer(
        loop,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=(fewest, cluster.max_workers) if cluster.max_workers else fewest,
            use_gpu="GPU" in asked,
            resources_per_worker=asked,
        ),
        run_config=RunConfig(
            name=name,
            storage_path=str(storage),
            callbacks=list(callbacks),
            failure_config=FailureConfig(max_failures=most, controller_failure_limit=most),
        ),
    )


def _per_worker(cluster: ClusterParams) -> dict[str, float]:
    gpus = {"GPU": cluster.gpus_per_worker} if wants_gpu(cluster) else {}
    return {"CPU": cluster.cpus_per_worker, **gpus}


def at_once(cluster: ClusterParams, what: str, beside: float = 0.0) -> int:
    """How many trainings the cluster holds at once, or ``at_once``: more machines may come.

    Args:
        cluster: what each asks for.
        what: for messages.
        beside: CPUs of whoever waits for a training's workers.

    Raises:
        UserError: not one; says what is asked for and what there is.
    """
    import ray

    if cluster.at_once:
        return cluster.at_once
    there = ray.cluster_resources()
    asked = per_run(cluster)
    asked["CPU"] += beside
    short = [
        f"{count:g} {name} where it has {there.get(name, 0):g}"
        for name, count in asked.items()
        if count > there.get(name, 0)
    ]
    if short:
        raise UserError(
            f"{what} asks the cluster for {' and '.join(short)} ({max(1, cluster.num_workers)} workers x "
            f"{cluster.cpus_per_worker:g} CPU): set cluster.num_workers, cpus_per_worker or gpus_per_worker "
            "in params.yaml, or start more machines; on a cluster that grows when work waits, set at_once"
        )
    return min(int(there[name] / count + 1e-9) for name, count in asked.items())


def _reason(run: Run, error: Exception) -> str:
    kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
    told = f"{kind}{error}".strip().splitlines()[0]
    if (fault := run.folder / "fault.json").exists():
        told += f"; its inputs are described in {fault}"
    return told


def _tracked_run(run: Run, uri: str) -> tracking.TrackedRun:
    params = {**run.params.model_dump(), "backbone": run.encoder.backbone, "side": run.view.side}
    return tracking.tracked_run(
        uri,
        f"ucir/{run.dataset}",
        run.name,
        run.key,
        {**run.tags(), "stage": "train"},
        params,
    )


def _track(run: Run, uri: str) -> None:
    """Bring the store up to date with a finished run: it may be new, or have been down."""
    tracked = _tracked_run(run, uri)
    with tracking.status_of(tracked):
        tracked.log_history(run.history())


def _told(run: Run, entry: dict[str, float]) -> str:
    cutoff = run.cutoffs[0]
    score = entry.get(f"val/P_at_{cutoff}")
    chosen = isinstance(getattr(run.params, "clusters", None), str) and "cluster/count_a" in entry
    counts = f" K {entry['cluster/count_a']:.0f} and {entry['cluster/count_b']:.0f}" if chosen else ""
    found = "" if score is None else f" P@{cutoff} {score:.1f}"
    return (
        f"{run.name} epoch {int(entry['epoch']) + 1}/{run.params.epochs} "
        f"loss {entry['train/loss_total']:.3f}{found}{counts}"
    )
