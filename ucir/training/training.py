"""One training: its networks, its optimizer, its method, and an epoch's steps. Knows no Ray and no labels.

Everything random is drawn from (seed, epoch, step), so that a run that was killed and resumed, and a run
on any number of workers, take the same course. A step, as ``train_epoch`` takes it:

    views = step.render(epoch, item)      in the background, some steps ahead
    method.set_rates(optimizer, ...)
    batch = step.forward(views)           the key encoder follows first
    terms = method.losses(epoch, batch)
    total.backward(); optimizer.step()
    method.after_step(batch)
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ucir.config.data import ViewParams
from ucir.config.model import EncoderParams
from ucir.data.feature_pack import DomainFeatures
from ucir.data.pack import DomainImages
from ucir.data.prefetch import prefetch
from ucir.data.views import views_of
from ucir.devices import set_threads
from ucir.distributed import world_size
from ucir.errors import UserError
from ucir.memory import Features
from ucir.methods.base import Method, Term
from ucir.models.checkpoints import load_encoder
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.trunk import StoredTrunk
from ucir.training.diagnosis import feature_fault, loss_fault


@dataclass
class EpochStart:
    """How far an epoch is: what its steps begin from, beside the state of the training."""

    step: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    """Of the loss terms, over the steps done."""


class Training:
    """Everything that changes while a method is trained.

    Args:
        images: the domains, two for all methods of a pair; with a frozen trunk its features of them.
        view: size and augmentation.
        encoder_params: must fit the checkpoint.
        start_checkpoint: encoder in MoCo v2's layout; None = random, by the method's seed.
        method: holds its params and the run's seed.
        device: where this worker computes.
        trained: what is trained: all, or the trunk's last stage and the head; where the images are a frozen
            trunk's features, it is the head.

    Raises:
        UserError: no full batch, an unreadable checkpoint, more workers than images in a batch.
    """

    def __init__(
        self,
        images: tuple[DomainImages, ...] | tuple[DomainFeatures, ...],
        view: ViewParams,
        encoder_params: EncoderParams,
        start_checkpoint: Path | None,
        method: Method[Any],
        device: torch.device,
        trained: Literal["all", "last", "head"] = "all",
    ) -> None:
        set_threads()
        self.method, self.device = method, device
        self.batches = method.batches([len(domain) for domain in images])
        if self.batches.images < world_size():
            raise UserError(
                f"batch_size: the {self.batches.images} images of a step are fewer than {world_size()} "
                "workers: set cluster.num_workers to less"
            )
        keyed = method.keyed
        if keyed and self.batches.images % keyed.key_norm_groups:
            raise UserError(
                f"2 x batch_size = {self.batches.images} images cannot be divided into key_norm_groups = "
                f"{keyed.key_norm_groups} equal parts"
            )
        domain = images[0]
        trunk = StoredTrunk(domain.pooled_dim) if isinstance(domain, DomainFeatures) else None
        query = new_encoder(encoder_params, 0 if start_checkpoint else method.seed, trunk=trunk)
        if start_checkpoint:
            load_encoder(query, start_checkpoint)
        if trunk is None:
            query.trunk.train_only(trained)
        self.step = method.step_type(
            method, views_of(images, view, query.form, device), query.to(device), device
        )
        self.networks = self.step.networks
        self.optimizer = method.optimizer(self.networks.query)

    @property
    def query(self) -> Encoder:
        """The encoder that is trained."""
        return self.networks.query

    @property
    def key(self) -> Encoder | None:
        """Its moving average, if the method has one."""
        return self.networks.key

    def begin(self) -> None:
        """Once, before anything is trained; a training that is resumed has it in its state."""
        self.step.fit_head()

    def features(self, encoder: Encoder | None = None) -> Any:
        """Features of each domain, a tuple of :class:`ucir.memory.Features`: what the method's step makes
        for it, or those of another encoder."""
        return self.step.features(encoder)

    def start_epoch(self, epoch: int, features: Any) -> dict[str, float]:
        """What comes before an epoch's first step; returns the method's figures."""
        self.step.begin_epoch(epoch)
        return self.method.start_epoch(epoch, features)

    def check_finite(self, epoch: int, features: tuple[Features, ...]) -> None:
        """An epoch's last step may have spoilt the weights without a loss to show it.

        Raises:
            NotFiniteError: a feature, whichever worker's, or a weight is not finite: features may be the key
                encoder's, which the last step has not reached yet.
        """
        spoilt = any(bool(x.total((~x.own_ND.isfinite()).sum())) for x in features)
        # one wait for the device, not one for each weight
        whole = torch.stack([weight.isfinite().all() for weight in self.query.parameters()]).all()
        if spoilt or not whole:
            raise feature_fault(epoch, features, self.query)

    def state_dict(self, within_epoch: bool = False) -> dict[str, Any]:
        """All that resuming needs; whole on the first worker alone.

        Args:
            within_epoch: it is not the end of an epoch.
        """
        return {
            "networks": self.networks.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "method": self.method.state_dict(within_epoch),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up :meth:`state_dict`'s value."""
        self.networks.take_up(state["networks"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.method.load_state_dict(_to(state["method"], self.device))

    def train_epoch(
        self,
        epoch: int,
        max_steps: int | None = None,
        begin: EpochStart | None = None,
        after_step: Callable[[EpochStart], None] | None = None,
    ) -> dict[str, float]:
        """One pass over the pictures; returns the mean of each loss term.

        Args:
            epoch: its number.
            max_steps: stop after so many.
            begin: go on from here.
            after_step: told after each step but the last how far the epoch is.

        Raises:
            NotFiniteError: a loss is not finite.
        """
        self.step.train_mode()
        method = self.method
        now = begin or EpochStart()
        items = islice(enumerate(self.batches.epoch(epoch)), now.step, max_steps)
        for step, views in enumerate(prefetch(partial(self.step.render, epoch), items), now.step):
            method.set_rates(self.optimizer, epoch, epoch * len(self.batches) + step)
            batch = self.step.forward(views)
            terms = method.losses(epoch, batch)
            total = total_loss(terms)
            # one wait for the device, not one for each term
            figures = torch.stack([*(term.value.detach() for term in terms.values()), total.detach()])
            values = dict(zip((*terms, "total"), figures.tolist(), strict=True))
            if not math.isfinite(values["total"]):
                inputs = self.step.inputs(batch)
                raise loss_fault(epoch, step, values, inputs, views.slots, self.query)
            self.optimizer.zero_grad(set_to_none=True)
            total.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            method.after_step(batch)
            now.step = step + 1
            for name, value in values.items():
                now.sums[name] = now.sums.get(name, 0.0) + value
            if after_step and now.step < len(self.batches):
                after_step(now)
        return {f"train/loss_{name}": value / now.step for name, value in now.sums.items()}


def total_loss(terms: dict[str, Term]) -> Tensor:
    """Weighted sum of the terms."""
    return torch.stack([term.weight * term.value for term in terms.values()]).sum()


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: _to(part, device) for key, part in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _to(getattr(value, f.name), device) for f in fields(value)})
    return type(value)(_to(part, device) for part in value) if isinstance(value, (list, tuple)) else value
