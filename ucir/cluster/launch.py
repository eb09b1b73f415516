"""Launch runs: one after the other in this process, or on a cluster, each on one worker or with DDP.

The loop is the same everywhere, and so is what it keeps: `Run.folder`, which every machine must see under
the same path.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import tempfile
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


from ucir import tracking
from ucir.config.cluster import ClusterParams
from ucir.devices import choose_device, set_threads, wants_gpu
from ucir.errors import UserError, listed
from ucir.models.embedding import Chunk, Computed, Embedder
from ucir.progress import Progress
from ucir.runs.process import (
    answering,
    epoch_line,
    interrupt,
    lock_run,
    reason,
    track_finished,
    tracked_run_of,
    train_here,
    train_one_by_one,
)
from ucir.runs.reporter import RunReporter
from ucir.runs.run import Run
from ucir.training.epochs import train

STARTS_WITHIN = 300
"""Seconds for a training's workers to start: Ray's 60 are little on a busy machine."""
STARTS_WITHIN_ELASTIC = 90
"""The same where fewer workers would do: so long it waits for a machine that has died unnoticed."""
LONGEST_FOLDER = 40
"""Characters of the folder in which Ray makes its sockets, whose paths may have 107."""
OPEN_FILES = 4096
"""That Ray wants to hold at once."""
CHUNKS_A_TASK = 8
"""Of pictures to embed: enough for a task's own cost not to count."""


def train_all(runs: Sequence[Run], cluster: ClusterParams, title: str = "train") -> None:
    """Train what is not yet done; one run that fails does not stop the others.

    Every run is tracked in MLflow, resumes from its folder, and leaves ``last.pt`` and ``best.pt`` there.
    With ``num_workers`` 0 they train one after the other in this process; else on the cluster, as many at
    once as it holds.

    Args:
        runs: what to train.
        cluster: where.
        title: of the progress.

    Raises:
        UserError: one run does not fit the cluster; some runs failed: names each with its reason and the
            command that goes on.
    """
    uri = tracking.tracking_uri()
    tracking.init_store(uri)
    open_runs = [run for run in runs if not run.done]
    done = [run for run in runs if run.done]
    for run in done:
        track_finished(run, uri)
    if done:
        print(f"finished before: {listed([f'{run.name} ({run.folder.name})' for run in done], 3)}")
    if not open_runs:
        return
    concurrent = 0
    if cluster.num_workers:
        connect(cluster, uri)
        concurrent = at_once(cluster, "a training")
    with Progress(title, sum(run.params.epochs for run in open_runs), "epoch") as progress:
        for run in filter(lambda run: (run.folder / "state.pt").exists(), open_runs):
            # one that another process trains is refused when its turn comes
            with contextlib.suppress(UserError), lock_run(run):
                history, steps = run.kept()
                resumed, within = len(history), f" and step {steps} of the next" if steps else ""
                progress.message(f"{run.name}: resumes after epoch {resumed} of {run.params.epochs}{within}")
                progress.skip(resumed)
        try:
            if concurrent:
                with answering(interrupt, signal.SIGTERM):  # Ray's own answer is a stack of C++
                    failed = _fan_out(open_runs, cluster, uri, concurrent, progress)
            else:
                failed = train_one_by_one(open_runs, cluster, uri, progress)
        except KeyboardInterrupt:
            progress.message("stopped: the same command goes on from there")
            raise
    if failed:
        reasons = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {reasons}. Finished runs and epochs are kept: "
            "the same command goes on with these alone"
        )


def embed_on_cluster(
    cluster: ClusterParams,
) -> Callable[[Embedder, list[Chunk]], Iterator[tuple[Chunk, Computed]]]:
    """What :func:`ucir.models.embedding.embed` computes with: chunks as tasks of a Ray cluster, in any order.

    Every machine must see the project's folder under the same path. A task whose machine dies is repeated.
    """

    def compute(embedder: Embedder, chunks: list[Chunk]) -> Iterator[tuple[Chunk, Computed]]:
        import ray

        connect(cluster, tracking.tracking_uri())
        asked = _per_worker(cluster)
        task = ray.remote(_embed_chunks).options(
            max_retries=cluster.max_failures, num_cpus=asked["CPU"], num_gpus=asked.get("GPU", 0)
        )
        groups = [chunks[first : first + CHUNKS_A_TASK] for first in range(0, len(chunks), CHUNKS_A_TASK)]
        most = 2 * at_once(cluster.model_copy(update={"num_workers": 1}), "embedding")
        active: dict[Any, list[Chunk]] = {}
        try:
            while groups or active:
                while groups and len(active) < most:
                    group = groups.pop(0)
                    active[task.remote(embedder, group)] = group
                (ready,), _ = ray.wait(list(active))
                yield from zip(active.pop(ready), ray.get(ready), strict=True)
        finally:
            for reference in active:
                ray.cancel(reference, force=True)

    return compute


def _embed_chunks(embedder: Embedder, chunks: list[Chunk]) -> list[Computed]:
    set_threads()
    return [embedder(chunk) for chunk in chunks]


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
                active[task.remote(run, cluster, tracked_run_of(run, uri), lines)] = run
            ready, _ = ray.wait(list(active), timeout=1)
            show()
            for reference in ready:
                run = active.pop(reference)
                try:
                    ray.get(reference)
                except Exception as error:
                    cause = getattr(error, "cause", None)
                    failed[run.name] = reason(run, cause if isinstance(cause, Exception) else error)
                    progress.message(f"{run.name} failed: {failed[run.name]}")
    finally:
        for reference in active:
            ray.cancel(reference, force=alone)
    show()
    return failed


def _train_alone(run: Run, cluster: ClusterParams, tracked: tracking.TrackedRun, lines: Any) -> None:
    """A task of the cluster: one run on one worker."""

    def advance(steps: int, note: str) -> None:
        lines.put((steps, note))

    train_here(run, tracked, choose_device(cluster), advance, threading.Event())


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
        config["lines"].put((1, epoch_line(run, history[-1])))

    def leaving() -> bool:
        return ray_train.get_preemption_info() is not None

    first = ray_train.get_context().get_world_rank() == 0
    train(run.new_training(get_device()), RunReporter(run, first, after_epoch, leaving=leaving))


def connect(cluster: ClusterParams, uri: str) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine that holds the workers.

    Prints where to look meanwhile; ``uri`` is that of the tracking store, empty where nothing is tracked.
    """
    import ray

    if ray.is_initialized():
        return
    if address := os.environ.get("RAY_ADDRESS"):
        _check_answers(address)
        context = ray.init()
    else:
        needed = (cluster.max_workers or cluster.num_workers) * cluster.cpus_per_worker
        _raise_open_files()
        if folder := ray_folder():
            os.environ["TMPDIR"] = folder  # of Ray's processes
        context = ray.init(
            "local",  # not whatever else may run here
            num_cpus=max(int(needed) + 1, os.cpu_count() or 1),  # and room for who waits for them
            object_store_memory=200 * 1024**2,
            include_dashboard=True,
        )
    there = ray.cluster_resources()
    held = ", ".join(f"{there[name]:g} {name}" for name in ("CPU", "GPU") if name in there)
    dashboard = f"http://{context.dashboard_url}" if context.dashboard_url else "off"
    runs = f"; runs: {tracking.experiment_url(uri)}" if uri else ""
    print(f"cluster: {held}; dashboard: {dashboard}{runs}", flush=True)


def ray_folder() -> str | None:
    """Where Ray and what it starts are to make their sockets; None = where they would by themselves.

    Raises:
        UserError: no folder is short enough.
    """
    asked = os.environ.get("RAY_TMPDIR")
    folder = asked or tempfile.gettempdir()
    if len(os.fsencode(folder)) <= LONGEST_FOLDER:
        return None
    if not asked and os.access("/tmp", os.W_OK):
        return "/tmp"
    raise UserError(
        f"{'RAY_TMPDIR' if asked else 'TMPDIR'}={folder}: too long for the paths of Ray's sockets: set "
        f"RAY_TMPDIR to a folder of at most {LONGEST_FOLDER} characters"
    )


def _raise_open_files() -> None:
    """The soft limit of open files, as far as one may."""
    import resource

    now, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if most < 0 else min(OPEN_FILES, most)
    if 0 <= now < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))


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


def resources_at(address: str) -> dict[str, float]:
    """What the cluster at an address has in all, by name.

    Raises:
        UserError: nothing listens there; Ray's own errors where something else does.
    """
    import ray

    _check_answers(address)
    ray.init(address, log_to_driver=False)
    try:
        resources: dict[str, float] = ray.cluster_resources()
    finally:
        ray.shutdown()
    return resources


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

    within = STARTS_WITHIN_ELASTIC if cluster.max_workers else STARTS_WITHIN
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", str(within))
    asked, most = _per_worker(cluster), cluster.max_failures
    fewest = cluster.num_workers
    elastic = [_recount_machines()] if cluster.max_workers else []
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
            callbacks=[*callbacks, *elastic],
            failure_config=FailureConfig(max_failures=most, controller_failure_limit=most),
        ),
    )


def _recount_machines() -> Any:
    """A callback of Ray Train: after a fault, count the machines before the workers start again.

    Ray counts every 20 s. Until then it asks for workers on the machine that has died, and waits
    :data:`STARTS_WITHIN_ELASTIC` for them.
    """
    import ray
    from ray.data._internal.cluster_autoscaler import default_autoscaling_coordinator as coordinator
    from ray.train import UserCallback

    class Recount(UserCallback):  # type: ignore[misc]
        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            with contextlib.suppress(ray.exceptions.RayError):  # else it waits as long as Ray does
                counts = coordinator.get_or_create_autoscaling_coordinator().get_reserved_resources
                ray.get(counts.remote("nobody", recompute=True), timeout=10)

    return Recount()


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
