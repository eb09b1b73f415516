"""Float64 arithmetic over scalars, as equations write it, and the comparison with a loss."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from ucir.losses.cluster import cluster_contrast
from ucir.losses.instance import instance_contrast
from ucir.memory import Bank

B, N, D = 5, 9, 4


SLOT = [3, 0, 8, 3, 5]  # one image twice


def unit(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def dot(x: Tensor, y: Tensor) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for a, b in zip(x, y, strict=True):
        total = total + a * b
    return total


def log_softmax(logits: list[Tensor]) -> list[Tensor]:
    top = max(float(x.detach()) for x in logits)
    total = sum(((x - top).exp() for x in logits), torch.zeros((), dtype=torch.float64))
    return [x - top - total.log() for x in logits]


def mean(values: list[Tensor]) -> Tensor:
    return sum(values, torch.zeros((), dtype=torch.float64)) / max(1, len(values))


def agree(fast: Callable[[Tensor], Tensor], slow: Callable[[Tensor], Tensor]) -> None:
    results = []
    for loss in (fast, slow):
        q = unit(B, D, seed=0).requires_grad_(True)
        value = loss(q)
        (gradient,) = torch.autograd.grad(value, q)
        assert value.isfinite()
        assert gradient.isfinite().all()
        results.append((value.detach(), gradient))
    (value, gradient), (expected, slope) = results
    assert float(value) == pytest.approx(float(expected), rel=1e-6, abs=1e-9)
    assert torch.allclose(gradient, slope, rtol=1e-6, atol=1e-6 * float(slope.abs().max()) + 1e-9)


def instance_value(q: Tensor, k: Tensor, slot_B: Tensor, row_ND: Tensor, t: float) -> Tensor:
    """Instance-wise contrast, of a bank of these rows."""
    return instance_contrast(q, k, Bank(row_ND).log_total(q, t, without_B=slot_B), t)


def cluster_values(q: Tensor, slot_B: Tensor, row_ND: Tensor, label_N: Tensor, t: float) -> Tensor:
    """Cluster-wise contrast of each image, of a bank of these rows."""
    bank, clusters = Bank(row_ND), int(label_N.max()) + 1
    mean_KD = bank.sums(label_N, clusters) / label_N.bincount()[:, None]
    others_B = bank.log_total(q, t, without_B=slot_B)
    return cluster_contrast(q, bank.rows(slot_B), mean_KD[label_N[slot_B]], others_B, t)
