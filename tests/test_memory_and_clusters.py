"""The bank and K-means."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from ucir.clustering import kmeans
from ucir.errors import UserError
from ucir.memory import Bank


@given(slots=st.lists(st.integers(0, 9), min_size=1, max_size=12))
def test_the_last_feature_of_a_slot_stays(slots: list[int]) -> None:
    start = torch.zeros(10, 3)
    bank = Bank(start)
    features = torch.arange(1, len(slots) + 1)[:, None].expand(-1, 3).float()
    bank.write(torch.tensor(slots), features.requires_grad_(True))
    expected = [max((i + 1 for i, s in enumerate(slots) if s == slot), default=0) for slot in range(10)]
    assert bank.features_ND[:, 0].tolist() == expected
    assert not bank.features_ND.requires_grad
    assert start.sum() == 0  # the bank is a copy


def blobs(centres: int, each: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    centre = torch.eye(8)[:centres].repeat_interleave(each, 0)
    return normalize(centre + 0.05 * torch.randn(len(centre), 8, generator=generator), dim=1)


def run(x: torch.Tensor, k: int, seed: int = 0):  # type: ignore[no-untyped-def]
    return kmeans(x, k, iterations=20, restarts=5, seed=seed, max_points=2000)


def test_kmeans_finds_what_is_there() -> None:
    found = run(blobs(4, 25), 4)
    assert sorted(found.size_K.tolist()) == [25] * 4
    labels = found.label_N.reshape(4, 25)
    assert (labels == labels[:, :1]).all()
    assert torch.allclose(found.centroid_KD.norm(dim=1), torch.ones(4), atol=1e-6)
    nearest = (blobs(4, 25) @ found.centroid_KD.T).argmax(dim=1)
    assert torch.equal(nearest, found.label_N)


def test_kmeans_repeats_itself() -> None:
    x = normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.equal(run(x, 7, seed=3).label_N, run(x, 7, seed=3).label_N)


def test_empty_clusters_keep_their_place() -> None:
    same = normalize(torch.ones(30, 8), dim=1)
    found = run(same, 5)
    assert len(found.size_K) == len(found.centroid_KD) == 5
    assert found.size_K.sum() == 30
    assert torch.isfinite(found.centroid_KD).all()


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="9 clusters for 8 images"):
        run(blobs(4, 2), 9)
