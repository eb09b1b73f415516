"""Launch runs through Ray Train: in this process, or on workers with DDP; the same loop either way."""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections.abc import Callable
from typing import IO, Any

# before ray is imported. uv: workers use this interpreter as it is. Paths: ours are absolute.
# The health check's period bounds how fast a worker's report passes through.
os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled" if "RAY_ADDRESS" not in os.environ else "")
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "1")

from ucir import tracking
from ucir.cluster.runs import Run, RunReporter, open_pair
from ucir.config import ClusterParams
from ucir.devices import wants_gpu
from ucir.errors import UserError
from ucir.methods import METHODS
from ucir.progress import Progress
from ucir.training.loop import PairTraining, train


def train_all(runs: list[Run], cluster: ClusterParams) -> None:
    """Train what is not yet done, run after run; one that fails does not stop the others.

    Every run is tracked in MLflow, resumes from its folder, and leaves ``last.pt`` and ``best.pt`` there.

    Raises:
        UserError: some runs failed; names each with its reason and the command that goes on.
    """
    uri = tracking.tracking_uri()
    tracking.init_store(uri)
    failed: dict[str, str] = {}
    open_runs = [run for run in runs if not run.done]
    for run in runs:
        if run.done:
            print(f"{run.name}: finished before ({run.folder.name})")
            _track(run, uri)
    epochs = sum(run.params.epochs for run in open_runs)
    with Progress("train", epochs, "epoch") as progress:
        for run in open_runs:
            try:
                with _lock(run):
                    _train_one(run, cluster, uri, progress)
            except UserError:
                raise
            except KeyboardInterrupt:
                progress.message("stopped: the same command goes on after the last finished epoch")
                raise
            except Exception as error:
                failed[run.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                if (fault := run.folder / "fault.json").exists():
                    failed[run.name] += f"; its inputs are described in {fault}"
                progress.message(f"{run.name} failed: {failed[run.name]}")
    if failed:
        told = "; ".join(f"{name} ({reason})" for name, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(runs)} runs failed: {told}. Finished runs and epochs are kept: "
            "the same command goes on with these alone"
        )


def _train_one(run: Run, cluster: ClusterParams, uri: str, progress: Progress) -> None:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    resumed = len(run.history())
    if resumed:
        progress.message(f"{run.name}: resumes after epoch {resumed} of {run.params.epochs}")
        progress.skip(resumed)
    tracked = _tracked_run(run, uri)
    in_process = cluster.num_workers == 0
    config: dict[str, Any] = {"run": run, "tracked": tracked}
    if in_process:
        logging.getLogger("ray.train").setLevel(logging.WARNING)  # it announces local mode every time
        config["on_epoch"] = lambda history: progress.advance(1, _told(run, history[-1]))
    else:
        _connect(cluster)
    trainer = TorchTrainer(
        worker_main,
        train_loop_config=config,
        scaling_config=ScalingConfig(
            num_workers=cluster.num_workers,
            use_gpu=wants_gpu(cluster),
            resources_per_worker={"CPU": cluster.cpus_per_worker},
        ),
        run_config=RunConfig(
            # a name of its own each time: Ray takes a finished run's name for nothing to do, and
            # resuming is the run folder's business
            name=f"ray-{time.time_ns()}",
            storage_path=str(run.folder),
            failure_config=FailureConfig(max_failures=cluster.max_failures),
        ),
    )
    with tracking.status_of(tracked):
        trainer.fit()
    if not in_process:
        progress.advance(run.params.epochs - resumed, _told(run, run.history()[-1]))


def _lock(run: Run) -> IO[str]:
    """Hold the run's folder for this process; closing the file gives it back, and so does a kill."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lock = (run.folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(f"{run.name}: another process is training it in {run.folder}") from None
    return lock


def worker_main(config: dict[str, Any]) -> None:
    """What each worker runs; Ray has set up the process group and the device."""
    from ray import train as ray_train
    from ray.train.torch import get_device

    run: Run = config["run"]
    context = ray_train.get_context()
    tracked: tracking.TrackedRun = config["tracked"]
    on_epoch: Callable[[list[dict[str, float]]], None] | None = config.get("on_epoch")

    def after_epoch(history: list[dict[str, float]]) -> None:
        tracked.log_history(history)
        if on_epoch is not None:
            on_epoch(history)
        else:
            print(_told(run, history[-1]), flush=True)

    method = METHODS[run.method](run.params, run.seed)
    training = PairTraining(open_pair(run), run.view, run.encoder, run.start, method, get_device())
    train(training, RunReporter(run, context.get_world_rank() == 0, after_epoch))


def _connect(cluster: ClusterParams) -> None:
    """Join the cluster at RAY_ADDRESS, or start one on this machine that holds the workers."""
    import ray

    if ray.is_initialized():
        return
    if "RAY_ADDRESS" in os.environ:
        ray.init()
        return
    needed = cluster.num_workers * cluster.cpus_per_worker
    ray.init(
        num_cpus=max(int(needed + 0.999), os.cpu_count() or 1),
        object_store_memory=200 * 1024**2,
        include_dashboard=True,
    )


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
