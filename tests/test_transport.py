"""Matching prototypes by optimal transport."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import normalize

from ucir.transport import match_prototypes


@pytest.mark.parametrize("count", [1, 2, 10, 65])
def test_permuted_prototypes_find_their_own(count: int) -> None:
    generator = torch.Generator().manual_seed(count)
    own = normalize(torch.randn(count, 32, generator=generator), dim=1)
    order = torch.randperm(count, generator=generator)
    noisy = normalize(own[order] + 0.05 * torch.randn(count, 32, generator=generator), dim=1)
    assert torch.equal(order[match_prototypes(own, noisy)], torch.arange(count))


def test_other_numbers_and_coinciding_prototypes_are_matched_to_something() -> None:
    own = normalize(torch.ones(3, 4), dim=1)
    match = match_prototypes(own, torch.eye(4)[:2])
    assert match.shape == (3,)
    assert set(match.tolist()) <= {0, 1}
