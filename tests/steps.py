"""A method, and the batch of a step, without a trainer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ucir.config.model import EncoderParams
from ucir.memory import Bank
from ucir.methods.base import Method
from ucir.methods.brad import BridgeBatch
from ucir.methods.dgdir import PhaseFeatures, SpectralBatch
from ucir.methods.registry import METHODS, fixed_keys
from ucir.methods.uem import FrozenBatch
from ucir.models.encoder import new_encoder

N, D, B = 40, 8, 6
P, L = 32, 9
"""Of a trunk of width 4: features before the head, and positions."""


def features(seed: int, count: int = N) -> Tensor:
    return normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def make(name: str, **changes: Any) -> Method[Any]:
    kind = METHODS[name]
    params = {"epochs": 10, **changes, **fixed_keys(name)}
    if name == "coda":
        params.setdefault("clusters", [4, 8])
    if "clusters" in kind.params_type.model_fields:
        params.setdefault("clusters", 4)
    method = kind(kind.params_type(**params), seed=0)
    method.build(new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=D), 0))
    if name == "dgdir":
        method.phase = PhaseFeatures(  # type: ignore[attr-defined]
            (features(7), features(8, N - 5)), (features(9), features(10, N - 5))
        )
    if name == "brad":
        method.edge_banks = Bank(features(7)), Bank(features(8, N - 5))  # type: ignore[attr-defined]
    method.start((features(0), features(1, N - 5)))
    return method


@dataclass(frozen=True)
class AnyBatch(BridgeBatch, SpectralBatch, FrozenBatch):
    """A domain's part of a step of whatever method."""


def batch(seed: int, key: bool) -> AnyBatch:
    slots = torch.tensor([1, 5, 5, 9, 0, 30])
    q = features(seed, B).requires_grad_(True)
    k = features(seed + 1, B) if key else q.detach()
    phase_q, phase_k, phase_pooled, pooled = (features(seed + i, B) for i in (20, 30, 40, 50))
    edge_q, edge_k = features(seed + 60, B).requires_grad_(True), features(seed + 70, B)
    shape = torch.Generator().manual_seed(seed)
    edge_pooled, edge_grid = (
        normalize(torch.randn(B, *length, generator=shape), dim=-1).requires_grad_(True)
        for length in ((P,), (L, P))
    )
    return AnyBatch(
        slot_B=slots,
        q_BD=q,
        k_BD=k,
        raw_BD=q,
        frozen_BD=features(seed + 2, B),
        raw_frozen_BD=features(seed + 2, B),
        pooled_BP=pooled,
        phase_q_BD=phase_q,
        phase_k_BD=phase_k,
        phase_pooled_BP=phase_pooled,
        edge_q_BD=edge_q,
        edge_k_BD=edge_k,
        edge_pooled_BP=edge_pooled,
        edge_grid_BLP=edge_grid,
    )
