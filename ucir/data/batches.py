"""Which images of the two domains meet in a step.

As the official loader (UCDIR ``loader.py``): an epoch visits the larger domain once in random order,
the smaller one joins with the image of the same number and, past its end, with a random one. The slots
of a pack are in an order that knows nothing of the classes, so that equal numbers mean nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from ucir.errors import UserError


def seeded(*numbers: int) -> torch.Generator:
    """A CPU generator that depends on the numbers alone, e.g. (seed, epoch, step).

    Nothing else in training draws at random, so that a resumed run draws what an undisturbed one would.
    """
    state = 0x9E3779B97F4A7C15
    for number in numbers:  # splitmix64: neighbouring numbers give unrelated streams
        state = (state + number + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return torch.Generator().manual_seed(state & (2**63 - 1))


class Batches(Protocol):
    """Which pictures meet in the steps of an epoch."""

    @property
    def images(self) -> int:
        """Pictures in a step, of all domains."""

    def __len__(self) -> int:
        """Steps of an epoch."""

    def epoch(self, epoch: int) -> Iterator[Any]:
        """What :meth:`ucir.methods.step.Step.render` is given for each step."""


class PairBatches:
    """Batches of slot numbers, B of each domain.

    Args:
        count_a, count_b: images of the two domains.
        batch_size: B; an epoch has ``max(count_a, count_b) // B`` steps, the rest is dropped.
        seed: the run's seed.

    Raises:
        UserError: not even one full batch.
    """

    def __init__(self, count_a: int, count_b: int, batch_size: int, seed: int) -> None:
        if max(count_a, count_b) < batch_size:
            raise UserError(
                f"batch_size {batch_size} exceeds the larger domain ({max(count_a, count_b)} images): "
                "no full batch; set a smaller batch_size"
            )
        self.counts = (count_a, count_b)
        self.batch_size = batch_size
        self.images = 2 * batch_size
        self.seed = seed

    def __len__(self) -> int:
        """Steps of an epoch."""
        return max(self.counts) // self.batch_size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Pairs of slot numbers, int64 of shape (B,)."""
        generator = seeded(self.seed, epoch)
        order = torch.randperm(max(self.counts), generator=generator)
        slots = []
        for count in self.counts:
            refill = torch.randint(count, order.shape, generator=generator)
            slots.append(torch.where(order < count, order, refill))
        steps = range(0, len(self) * self.batch_size, self.batch_size)
        for first in steps:
            yield (
                slots[0][first : first + self.batch_size],
                slots[1][first : first + self.batch_size],
            )
