"""Which images meet in a step."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ucir.data.batches import PairBatches, seeded
from ucir.data.prefetch import prefetch
from ucir.errors import UserError


@given(a=st.integers(1, 60), b=st.integers(1, 60), size=st.integers(1, 16), epoch=st.integers(0, 5))
def test_an_epoch_visits_the_larger_domain_once(a: int, b: int, size: int, epoch: int) -> None:
    if max(a, b) < size:
        with pytest.raises(UserError, match="no full batch"):
            PairBatches(a, b, size, 0)
        return
    batches = PairBatches(a, b, size, 0)
    steps = list(batches.epoch(epoch))
    assert len(steps) == len(batches) == max(a, b) // size
    for count, slots in ((a, [s[0] for s in steps]), (b, [s[1] for s in steps])):
        drawn = torch.cat(slots).tolist()
        assert all(len(slot) == size for slot in slots)
        assert all(0 <= slot < count for slot in drawn)
        if count == max(a, b):
            assert len(set(drawn)) == len(drawn)


def test_epochs_and_seeds_differ_and_repeat() -> None:
    def first(seed: int, epoch: int) -> list[int]:
        return next(PairBatches(50, 40, 8, seed).epoch(epoch))[0].tolist()

    assert first(0, 0) == first(0, 0)
    assert first(0, 0) != first(0, 1) != first(1, 1) != first(1, 0)


def test_seeds_of_neighbours_are_unrelated() -> None:
    draws = {float(torch.rand(1, generator=seeded(a, b))) for a in range(20) for b in range(20)}
    assert len(draws) == 400


def test_prefetching_keeps_the_order_and_passes_errors_on() -> None:
    assert list(prefetch(lambda x: x * x, range(50))) == [x * x for x in range(50)]
    with pytest.raises(ZeroDivisionError):
        list(prefetch(lambda x: 1 // x, [1, 0, 1]))
