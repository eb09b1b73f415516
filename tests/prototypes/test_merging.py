"""UEM's translation and merge condition on prototypes made by hand, and where nothing or all merges."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from ucir.prototypes.clustering import Clusters
from ucir.prototypes.merging import centres, unify, unify_domains

ZERO: Tensor = torch.zeros(2)


def test_prototypes_are_moved_and_merge_where_they_fit() -> None:
    one = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 4.0]])
    shift = torch.tensor([10.0, -3.0])
    other = torch.tensor([[4.5, 0.0], [9.0, 9.0]]) - shift
    unified = unify(one, other, shift, ZERO)
    assert unified.merged_K.tolist() == [False, True, False]
    assert unified.other_L.tolist() == [1, 3]
    assert torch.allclose(unified.prototype_CD, torch.tensor([[0, 0], [4.25, 0], [0, 4], [9, 9]]))
    back = unify(other, one, ZERO, shift)
    assert back.merged_K.tolist() == [True, False]
    assert back.other_L.tolist() == [2, 0, 3]
    assert torch.allclose(back.prototype_CD + shift, torch.tensor([[4.25, 0], [9, 9], [0, 0], [0, 4]]))


@pytest.mark.parametrize("gap", [0.99, 1.01])
def test_a_pair_merges_only_below_the_least_distance_within_a_domain(gap: float) -> None:
    """Eq. 9: the other domain's two prototypes are 1 apart."""
    one = torch.tensor([[0.0, 0.0], [50.0, 0.0]])
    other = torch.tensor([[0.0, gap], [0.0, gap + 1]])
    assert unify(one, other, ZERO, ZERO).merged_K.tolist() == [gap < 1, False]


def test_a_limit_of_its_own_lets_a_pair_merge_beside_clusters_that_lie_close() -> None:
    one = torch.tensor([[0.0, 0.0], [50.0, 0.0], [50.0, 1.0]])
    other = torch.tensor([[0.0, 3.0], [50.0, 0.4], [80.0, 0.0]])
    assert unify(one, other, ZERO, ZERO).merged_K.tolist() == [False, True, False]
    first, second = unify(one, other, ZERO, ZERO, limit="pair"), unify(other, one, ZERO, ZERO, limit="pair")
    assert first.merged_K.tolist() == [True, True, False]
    assert second.merged_K.tolist() == [True, True, False]
    near = torch.tensor([[0.0, 3.0], [0.0, 5.0]])  # 2 from another of its own domain
    assert not unify(one, near, ZERO, ZERO, limit="pair").merged_K[0]


def test_degenerate_structures() -> None:
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    same = unify(points, points, ZERO, ZERO)  # everything merges
    assert same.merged_K.all()
    assert same.other_L.tolist() == [0, 1, 2]
    assert torch.equal(same.prototype_CD, points)
    apart = unify(points, points, ZERO, ZERO, merging=False)  # nothing does
    assert not apart.merged_K.any()
    assert apart.other_L.tolist() == [3, 4, 5]
    assert len(apart.prototype_CD) == 6
    far = unify(points, points + 100, ZERO, ZERO)
    assert not far.merged_K.any()
    one = unify(points[:1], points[:1] + 5, ZERO, ZERO)  # one cluster each: no distance limits them
    assert one.merged_K.all()
    twins = unify(points[[0, 0]], points[[0, 1]], ZERO, ZERO)  # two that coincide let nothing merge
    assert not twins.merged_K.any()


@given(k=st.integers(1, 6), other=st.integers(1, 6), seed=st.integers(0, 10**6))
def test_sizes_add_up_and_both_sides_agree(k: int, other: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    own_KD, other_LD = torch.randn(k, 3, generator=generator), torch.randn(other, 3, generator=generator)
    means = torch.randn(2, 3, generator=generator)
    first = unify(own_KD, other_LD, means[0], means[1])
    second = unify(other_LD, own_KD, means[1], means[0])
    merged = int(first.merged_K.sum())
    assert merged == int(second.merged_K.sum())
    assert len(first.prototype_CD) == len(second.prototype_CD) == k + other - merged
    for j, row in enumerate(first.other_L.tolist()):
        assert (row < k) == bool(second.merged_K[j])
        if row < k:
            assert second.other_L[row] == j


def test_empty_clusters_take_no_part() -> None:
    x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])

    def clusters(label: list[int], k: int) -> Clusters:
        label_N = torch.tensor(label)
        return Clusters(label_N, torch.zeros(k, 2), torch.bincount(label_N, minlength=k))

    centre_KD, label_N = centres(x, clusters([0, 2, 2], 4))
    assert torch.equal(centre_KD, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert label_N.tolist() == [0, 1, 1]
    first, second = unify_domains((x, x), (clusters([0, 2, 2], 4), clusters([0, 1, 1], 2)))
    assert first.merged_K.tolist() == second.merged_K.tolist() == [True, True]
    assert first.prototype_CD.isfinite().all()
