"""The block ``cluster``: how runs are spread."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import Field, model_validator

from ucir.config.base import Block, Count, Positive


class ClusterParams(Block):
    """How runs are spread; changes speed, and results by rounding alone, so that no stage depends on it."""

    num_workers: Annotated[int, Field(ge=0)] = 0
    """Workers of one training. 0 = in this process, without a cluster; 1 = each training on one worker of
    the cluster, as many at once as it holds; 2 or more train with DDP."""
    max_workers: Count | None = None
    """Elastic: ``num_workers`` is the fewest, and a training takes as many up to this as there is room for;
    it goes on with more or fewer when machines come and go. Not in sweeps."""
    use_gpu: bool | None = None
    """None = when there is one."""
    cpus_per_worker: Positive = 1
    gpus_per_worker: Positive = 1
    """Where GPUs are used. Below 1, several trainings share one: with ``num_workers`` 1 and in sweeps."""
    at_once: Count | None = None
    """Trainings at a time. None = as many as the cluster holds now; to be set where it grows on demand."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of a training whose worker died."""

    @property
    def together(self) -> bool:
        """Whether a training may have several workers."""
        return self.num_workers > 1 or self.max_workers is not None

    @model_validator(mode="after")
    def _elastic_between_two_numbers(self) -> Self:
        if self.max_workers is not None and not 1 <= self.num_workers <= self.max_workers:
            raise ValueError(
                f"max_workers {self.max_workers}: num_workers ({self.num_workers}) is the fewest that a "
                "training goes on with: it must lie between 1 and max_workers"
            )
        return self

    @model_validator(mode="after")
    def _a_gpu_has_one_worker_of_a_training(self) -> Self:
        if self.together and self.gpus_per_worker % 1:
            raise ValueError(
                "gpus_per_worker: two workers of one training cannot share a GPU (NCCL refuses it): set "
                "num_workers to 1 without max_workers, and trainings share GPUs"
            )
        return self
