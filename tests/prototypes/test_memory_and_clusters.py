"""The bank and K-means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import faiss
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import normalize

from tests.workers import run_workers
from ucir.distributed import all_reduce_sum, world_size
from ucir.errors import UserError
from ucir.memory import Bank, Features, JointFeatures
from ucir.prototypes import clustering
from ucir.prototypes.clustering import (
    Clusters,
    choose_clusters,
    cluster_means,
    concentration,
    kmeans,
    raw_centroids,
)


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
    clusters = run(blobs(4, 25), 4)
    assert sorted(clusters.size_K.tolist()) == [25] * 4
    labels = clusters.label_N.reshape(4, 25)
    assert (labels == labels[:, :1]).all()
    assert torch.allclose(clusters.centroid_KD.norm(dim=1), torch.ones(4), atol=1e-6)
    nearest = (blobs(4, 25) @ clusters.centroid_KD.T).argmax(dim=1)
    assert torch.equal(nearest, clusters.label_N)


def test_kmeans_repeats_itself() -> None:
    x = normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert torch.equal(run(x, 7, seed=3).label_N, run(x, 7, seed=3).label_N)


def test_empty_clusters_keep_their_place() -> None:
    same = normalize(torch.ones(30, 8), dim=1)
    clusters = run(same, 5)
    assert len(clusters.size_K) == len(clusters.centroid_KD) == 5
    assert clusters.size_K.sum() == 30
    assert torch.isfinite(clusters.centroid_KD).all()


def test_more_clusters_than_images_are_refused() -> None:
    with pytest.raises(UserError, match="9 clusters for 8 images"):
        run(blobs(4, 2), 9)


@pytest.mark.parametrize("temperature", [0.2, 0.01])
@pytest.mark.parametrize("barred", [False, True])
def test_a_total_over_many_rows_is_logsumexp_and_so_is_its_gradient(temperature: float, barred: bool) -> None:
    """More rows than are compared at once, against all logits in float64."""
    generator = torch.Generator().manual_seed(1)
    rows = normalize(torch.randn(1000, 6, generator=generator), dim=1)
    q = normalize(torch.randn(2048, 6, generator=generator), dim=1).requires_grad_(True)
    slot = torch.randint(1000, (2048,), generator=generator)
    weight = torch.randn(2048, generator=generator)
    ours = Bank(rows).log_total(q, temperature, without_B=slot if barred else None)
    (slope,) = torch.autograd.grad((weight * ours).sum(), q)
    q64 = q.detach().double().requires_grad_(True)
    logits = q64 @ rows.double().T / temperature
    if barred:
        logits = logits.scatter(1, slot[:, None], float("-inf"))
    expected = logits.logsumexp(dim=1)
    (wanted,) = torch.autograd.grad((weight.double() * expected).sum(), q64)
    assert torch.allclose(ours.double(), expected, rtol=1e-6, atol=1e-5)
    assert torch.allclose(slope.double(), wanted, rtol=1e-4, atol=1e-5 / temperature)


def test_sums_of_clusters_follow_what_is_written() -> None:
    generator = torch.Generator().manual_seed(2)
    bank = Bank(normalize(torch.randn(20, 6, generator=generator), dim=1))
    label = torch.arange(20) % 3
    sum_KD = bank.sums(label, 3)
    for _ in range(5):
        slot = torch.randint(20, (7,), generator=generator)  # some come twice
        k = normalize(torch.randn(7, 6, generator=generator), dim=1)
        sum_KD.index_add_(0, label[slot], bank.change(slot, k))
        bank.write(slot, k)
    assert torch.allclose(sum_KD, bank.sums(label, 3), atol=1e-5)


def _shares(rank: int, out: Path) -> None:
    torch.save(_answers(), out / f"{rank}.pt")


def _answers() -> dict[str, torch.Tensor]:
    """What a worker's bank answers, and how many rows it holds."""
    generator = torch.Generator().manual_seed(5)
    bank = Bank(normalize(torch.randn(23, 6, generator=generator), dim=1))
    q = normalize(torch.randn(7, 6, generator=generator), dim=1).requires_grad_(True)
    slot = torch.tensor([0, 5, 5, 11, 12, 17, 22])
    label = torch.arange(23) % 4
    bank.write(slot[2:4], q.detach()[2:4])
    bank.blend(slot[4:6], q.detach()[4:6], 0.3)
    total = bank.log_total(q, 0.01, without_B=slot) + bank.log_total(q, 0.2)
    largest = bank.largest(q, 20)
    (total.sum() + largest.square().sum()).backward()
    assert q.grad is not None
    return {
        "rows held": torch.tensor(len(bank.own_ND)),
        "bank": bank.features_ND,
        "rows": bank.rows(slot),
        "sums": bank.sums(label, 4),
        "nearest": bank.nearest(q.detach(), slot),
        "total": total.detach(),
        "largest": largest.detach(),
        "clustered": _clustered(bank),
        # every worker's loss is the whole one: their gradients add up to as many times it
        "gradient": all_reduce_sum(q.grad) / world_size(),
    }


def by_faiss(x: torch.Tensor, k: int, spherical: bool = False, **options: Any) -> Any:
    """Centroids that faiss itself finds."""
    clustering = faiss.Clustering(x.shape[1], k)
    clustering.spherical = spherical
    clustering.min_points_per_centroid = 1
    for name, value in options.items():
        setattr(clustering, name, value)
    clustering.train(x.numpy(), faiss.IndexFlatL2(x.shape[1]))
    return torch.from_numpy(faiss.vector_float_to_array(clustering.centroids).reshape(k, -1).copy())


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize(
    ("count", "k", "most", "iterations"),
    [(300, 7, 2000, 3), (300, 7, 2000, 100), (300, 7, 10, 20), (40, 38, 9, 2)],
)
def test_kmeans_is_that_of_faiss(count: int, k: int, most: int, iterations: int, spherical: bool) -> None:
    """With its draws: first centroids, samples of the points, restarts, halves for empty clusters."""
    for seed in range(4):
        x = normalize(torch.randn(count, 5, generator=torch.Generator().manual_seed(seed)), dim=1)
        if k == 38:
            x = x[torch.arange(count) % 30].contiguous()  # fewer places than clusters
        restarts = 1 if k == 38 else 3  # there all cost nothing, and rounding chooses
        options = {"seed": seed, "nredo": restarts, "niter": iterations, "max_points_per_centroid": most}
        expected = by_faiss(x, k, spherical, **options)
        ours = kmeans(
            x, k, iterations=iterations, restarts=restarts, seed=seed, max_points=most, spherical=spherical
        )
        assert torch.allclose(ours.centroid_KD, normalize(expected, dim=1), atol=1e-5)
        assert torch.equal(ours.label_N, torch.cdist(x, expected).argmin(dim=1)) or k == 38


def inertia(x: torch.Tensor, found: Clusters) -> float:
    """Of the labels, to their own means."""
    return float((x - raw_centroids(x, found)[found.label_N]).square().sum())


def test_restarts_on_a_sample_and_warm_ones_are_as_good() -> None:
    """More clusters than K, so that restarts differ; on many points the sample is enough to choose one."""
    generator = torch.Generator().manual_seed(3)
    centre = normalize(torch.randn(30, 16, generator=generator), dim=1)
    x = centre[torch.randint(30, (9000,), generator=generator)]
    x = normalize(x + 0.1 * torch.randn(x.shape, generator=generator), dim=1)
    options: dict[str, Any] = {"iterations": 20, "restarts": 5, "seed": 0, "max_points": 2000}
    exact = kmeans(x, 12, **options)
    sampled = kmeans(x, 12, **options, sample=128, settled=1e-3)
    assert inertia(x, sampled) < 1.02 * inertia(x, exact)
    moved = normalize(x + 0.02 * torch.randn(x.shape, generator=generator), dim=1)
    warm = kmeans(moved, 12, **options, initial_KD=cluster_means(moved, exact.label_N, 12), settled=1e-3)
    assert inertia(moved, warm) < 1.02 * inertia(moved, kmeans(moved, 12, **options))
    # the same names as before for nearly all
    assert float((warm.label_N == exact.label_N).float().mean()) > 0.95
    # labels are those of the centroids, also where it ends early
    raw = raw_centroids(moved, warm)
    assert float((torch.cdist(moved, raw).argmin(dim=1) == warm.label_N).float().mean()) > 0.95
    # few points: nothing is left out, and it is faiss's algorithm to the last bit
    assert torch.equal(
        kmeans(x[:1000], 12, **options, sample=128, settled=1e-3).centroid_KD,
        kmeans(x[:1000], 12, **options).centroid_KD,
    )


def test_a_gpus_way_of_assigning_gives_the_same_clusters(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(4)
    x = normalize(torch.randn(9000, 8, generator=generator), dim=1)
    by_index = run(x, 9)
    monkeypatch.setattr(clustering, "_nearest", clustering._nearest_on_device)
    on_device = run(x, 9)
    assert float((on_device.label_N == by_index.label_N).float().mean()) > 0.999
    assert inertia(x, on_device) == pytest.approx(inertia(x, by_index), rel=1e-4)


def _clustered(bank: Bank) -> torch.Tensor:
    """K-means in all its variants, and what is made of it: labels, centroids, K, concentration, means."""
    options: dict[str, Any] = {"iterations": 6, "restarts": 3, "seed": 2, "max_points": 2000}
    other = Features(torch.flip(bank.own_ND, (1,)), bank.count)
    clusterings = [
        kmeans(bank, 4, **options),
        kmeans(bank, 4, **options, spherical=True),
        kmeans(bank, 4, **options, initial_KD=torch.eye(6)[:4]),
        kmeans(bank, 4, **options, sample=3, settled=1e-3),
        kmeans(bank, 4, **{**options, "max_points": 3}),
        kmeans(bank, 23, **options),
        kmeans(JointFeatures(bank, other), 5, **options),
        kmeans(Features(bank.own_ND[:, :1].ceil(), bank.count), 5, **options),  # two places: empty clusters
    ]
    chosen = [float(choose_clusters(bank, how, 0)) for how in ("elbow", "silhouette")]
    first, last = clusterings[0], clusterings[0].centroid_KD
    parts = [x.flatten().float() for c in clusterings for x in (c.label_N, c.size_K, c.centroid_KD)]
    parts += [concentration(bank, first.label_N, last), raw_centroids(bank, first).flatten(), bank.mean()]
    return torch.cat([*parts, torch.tensor(chosen)])


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_a_bank_that_workers_share_answers_like_a_whole_one(tmp_path: Path) -> None:
    world = 3
    run_workers(world, _shares, tmp_path)
    alone = _answers()
    answers = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    assert sum(int(one.pop("rows held")) for one in answers) == int(alone.pop("rows held")) == 23
    for one in answers:
        for name, value in alone.items():
            assert torch.allclose(one[name], value, atol=2e-6, rtol=2e-5), name
