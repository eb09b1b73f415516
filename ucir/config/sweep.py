"""Blocks of sweeps."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from ucir.config.base import Block, Count, Positive, Seeds, Setting
from ucir.config.study import SettingParams

PRODUCT = ("silhouette", "stability", "cluster_cycle", "rank")
"""Each is low for another kind of failure, so that the product misleads least: ucir/runs/README.md."""


class Dimension(Block):
    """What a sweep tries for one key. Written as a list, it is ``choice``."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[Positive, Positive] | None = None
    integer: tuple[int, int] | None = None
    """Both ends included."""

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_a_choice(cls, given: Any) -> Any:
        if isinstance(given, (int, float, str)):
            raise ValueError(f"{given!r} is one value: write a list of values to try, as [{given}, ...]")
        return {"choice": given} if isinstance(given, (list, tuple)) else given

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give a list of values, or one of uniform: [low, high], loguniform: [low, high] and "
                "integer: [low, high]"
            )
        if given[0] != "choice":
            low, high = getattr(self, given[0])
            if low >= high:
                raise ValueError(f"{given[0]}: the first value must be below the second")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values of a choice, the lowest and the highest of a range."""
        return self.choice or self.uniform or self.loguniform or self.integer or ()


class SweepParams(SettingParams):
    """``sweeps.<name>``: what `ucir tune` searches."""

    setting: Setting = "closed"
    method: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    seeds: Seeds = (0,)
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Key of params.yaml by its path, ``methods.<method>.<dataset>.lr``, or just ``lr``: what is tried."""
    epochs: Count | None = None
    """Of every trial; None = the method's. The order of settings shows early."""
    trials: Count = 20
    """Settings to try; a grid tries all."""
    search: Literal["random", "grid", "tpe"] = "random"
    """tpe = Optuna's tree-structured Parzen estimator."""
    scheduler: Literal["fifo", "asha", "median"] = "asha"
    """When a trial is given up: never; among the worse of those that came as far; below their median."""
    grace: Count = 4
    """Epochs that every trial has."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """asha: one in so many goes on at each rung."""
    objective: Annotated[tuple[str, ...], Field(min_length=1)] = PRODUCT
    """Label-free criteria of :mod:`ucir.retrieval.criteria`, or ``oracle``: P@K, which reads labels. A
    trial's score is their product, each at least 0."""
    scope: Literal["shared", "per_pair"] = "shared"
    """One setting for all pairs, scored by the mean over them; or a search for each."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the search."""

    @field_validator("objective", mode="before")
    @classmethod
    def _one_is_a_list_of_one(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @property
    def candidates(self) -> int:
        """How many settings are tried, of all pairs or of each."""
        if self.search == "grid":
            return math.prod(len(dimension.ends) for dimension in self.space.values())
        return self.trials

    @model_validator(mode="after")
    def _a_grid_has_values(self) -> Self:
        ranges = [key for key, dimension in self.space.items() if dimension.choice is None]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"search: a grid needs lists of values, but {', '.join(ranges)} has a range: give a list, as "
                "lr: [0.01, 0.1], or take search: random"
            )
        return self
