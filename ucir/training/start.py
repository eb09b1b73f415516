"""The label-free start where no weights are given: in-batch contrast on the union of the domains.

It is trained like everything else, see :class:`ucir.training.training.Training`: it resumes, and any number
of workers shares its batches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ucir.config.base import Positive
from ucir.config.model import PretrainParams, StartParams
from ucir.data.batches import Batches, seeded
from ucir.distributed import own_rows
from ucir.errors import UserError
from ucir.losses.instance import view_contrast
from ucir.memory import Features
from ucir.methods.base import Method, MethodParams, Term
from ucir.methods.step import Rendered, Step
from ucir.models.checkpoints import load_encoder, load_torchvision
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.pretrained import Origin, load_weights

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises."""


class ViewContrastParams(MethodParams):
    """``start.pretrain`` of a data set; an epoch is one pass over the pictures of all domains."""

    steps: int
    temperature: Positive

    @classmethod
    def of(cls, params: PretrainParams, counts: Sequence[int]) -> ViewContrastParams:
        """Params of the block.

        Args:
            params: the block.
            counts: pictures of the domains.

        Raises:
            UserError: fewer pictures than a batch.
        """
        steps = sum(counts) // params.batch_size
        if not steps:
            raise UserError(
                f"pretrain batch_size {params.batch_size} exceeds all {sum(counts)} images: set a smaller one"
            )
        return cls(epochs=-(-params.steps // steps), **params.model_dump(exclude={"seed"}))


@dataclass(frozen=True)
class UnionBatches:
    """Steps of an epoch, by their number in the whole training."""

    steps: int
    last: int
    images: int

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[int]:
        first = epoch * self.steps
        yield from range(first, min(first + self.steps, self.last))


@dataclass(frozen=True)
class ContrastBatch:
    """A step's features, with gradient, and where they come from."""

    first_BD: Tensor
    second_BD: Tensor
    domain_B: Tensor  # int64


class UnionStep(Step):
    """Two views of pictures of all domains; nothing is clustered, so that there are no features between."""

    method: ViewContrast

    def features(self, encoder: Encoder | None = None) -> tuple[Features, ...]:
        return ()

    def render(self, epoch: int, item: tuple[int, Any]) -> Rendered:
        """Draws are by the step's number in the whole training."""
        _, step = item
        generator = seeded(self.method.seed, step)
        first_row = torch.tensor(np.cumsum([0, *self.views.counts]))
        batch_size = self.method.params.batch_size
        row_B = torch.randperm(int(first_row[-1]), generator=generator)[:batch_size]
        domain_B = torch.searchsorted(first_row, row_B, right=True) - 1
        slot_B = row_B - first_row[domain_B]
        draws = [self.views.draw(domain_B, slot_B, generator) for _ in range(2)]
        count = 2 * len(row_B)
        mine = torch.arange(count)[own_rows(count)]
        parts = []
        for number, draw in enumerate(draws):
            place = mine[mine // len(row_B) == number] % len(row_B)
            if len(place):
                parts.append(self.views.random(domain_B[place], slot_B[place], draw[place]))
        domain = domain_B[mine % len(row_B)]
        return Rendered((row_B, domain_B), torch.cat(parts), domain, None, domain, torch.arange(count))

    def forward(self, views: Rendered) -> ContrastBatch:
        first, second = self.queries(self.model, views).chunk(2)
        return ContrastBatch(first, second, views.slots[1].to(self.device))

    def inputs(self, batch: ContrastBatch) -> dict[str, Tensor]:
        return {"first": batch.first_BD, "second": batch.second_BD}


class ViewContrast(Method[ViewContrastParams]):
    """SimCLR's loss between two views, among pictures of the same domain alone."""

    params_type = ViewContrastParams
    step_type = UnionStep

    def batches(self, counts: Sequence[int]) -> Batches:
        p = self.params
        return UnionBatches(sum(counts) // p.batch_size, p.steps, 2 * p.batch_size)

    def start(self, features: Any) -> None:
        """Nothing to prepare."""

    def start_epoch(self, epoch: int, features: Any) -> dict[str, float]:
        return {}

    def losses(self, epoch: int, batch: Any) -> dict[str, Term]:
        b: ContrastBatch = batch
        return {
            "contrast": Term(1.0, view_contrast(b.first_BD, b.second_BD, b.domain_B, self.params.temperature))
        }

    def optimizer(self, encoder: Encoder) -> torch.optim.Optimizer:
        """AdamW."""
        p = self.params
        return torch.optim.AdamW(encoder.parameters(), p.lr, weight_decay=p.weight_decay)

    def set_rates(self, optimizer: torch.optim.Optimizer, epoch: int, steps: int) -> None:
        """One cycle (Smith & Topin 2018): up to ``lr`` and down again, beta1 the other way."""
        for group in optimizer.param_groups:
            group["lr"] = self.lr_at(epoch, steps)
            group["betas"] = (self._cycle(steps, 0.95, 0.85, 0.95), *group["betas"][1:])

    def lr_at(self, epoch: int, steps: int) -> float:
        low = self.params.lr / 25
        return self._cycle(steps, low, self.params.lr, low / 1e4)

    def _cycle(self, step: int, first: float, middle: float, last: float) -> float:
        """Half a cosine to ``middle``, another to ``last``, as torch's ``OneCycleLR``."""
        turn, end = WARM_UP * self.params.steps - 1, self.params.steps - 1
        if step <= turn:
            return _half_cosine(first, middle, step / turn if turn else 1.0)
        return _half_cosine(middle, last, (step - turn) / (end - turn) if end > turn else 1.0)


def _half_cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) / 2.0 * (math.cos(math.pi * share) + 1)


def given_start(start: StartParams, side: int | None) -> tuple[Encoder, Origin | None]:
    """The encoder with the weights that a block names, and where published ones come from.

    Args:
        start: the block.
        side: of its pictures in pixels; None = what its trunk is made for.

    Raises:
        UserError: they are unreadable or do not fit; the trunk does not take pictures of this side.
    """
    encoder, origin = new_encoder(start.encoder, 0), None
    side = side or encoder.form.side
    try:
        with torch.inference_mode():
            encoder.eval()(torch.zeros(1, 3, side, side))
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"params.yaml: view.side = {side}: {start.encoder.trunk_name} does not take pictures of this "
            f"side: {reason}; it is made for {encoder.form.side} px"
        ) from None
    if start.checkpoint is not None:
        if not load_encoder(encoder, Path(start.checkpoint), head_optional=True):
            print(f"{start.checkpoint}: has no head: it begins at random")
    elif start.torchvision is not None:
        load_torchvision(encoder, start.torchvision)
    elif start.weights is not None:
        origin = load_weights(encoder.trunk, start.encoder.trunk_name, start.weights, start.digest)
    return encoder, origin
