"""UCDIR as a method: schedules, phases, what it puts together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.losses.reference import cluster_values, instance_value
from ucir.config.base import checked
from ucir.errors import UserError
from ucir.losses.cluster import confident, mean_of_kept
from ucir.methods.registry import METHODS
from ucir.methods.step import DomainBatch
from ucir.methods.ucdir import Ucdir, UcdirParams
from ucir.prototypes.clustering import kmeans

OFFICE_HOME = UcdirParams(clusters=65)
N, D, B = 40, 8, 6


def features(seed: int, count: int = N) -> Tensor:
    return normalize(torch.randn(count, D, generator=torch.Generator().manual_seed(seed)), dim=1)


def small(**changes: Any) -> Ucdir:
    params = {"clusters": 4, "epochs": 10, "ramp_start": 2, "ramp_end": 6, "cross_domain_start": 5}
    return Ucdir(UcdirParams(**{**params, **changes}), seed=0)


def batch(seed: int) -> DomainBatch:
    slots = torch.tensor([1, 5, 5, 9, 0, 30])
    return DomainBatch(slots, features(seed, B).requires_grad_(True), features(seed + 1, B))


@pytest.mark.parametrize(
    ("epoch", "weight"),
    [(0, 0), (20, 0), (21, 0.5 / 80), (60, 0.25), (99, 0.5 * 79 / 80), (100, 0.5), (199, 0.5)],
)
def test_the_ramp_of_cluster_contrast(epoch: int, weight: float) -> None:
    """Eq. 4 with T1 = 20, T2 = 100 and Office-Home's alpha."""
    assert Ucdir(OFFICE_HOME, 0).cluster_weight_at(epoch) == pytest.approx(weight)


@pytest.mark.parametrize(("epoch", "share"), [(0, 1), (50, 0.853553), (100, 0.5), (199, 6.17e-5)])
def test_the_learning_rate_is_half_a_cosine(epoch: int, share: float) -> None:
    assert Ucdir(OFFICE_HOME, 0).lr_at(epoch, 0) == pytest.approx(2e-4 * share, rel=1e-3)


def test_the_defaults_are_the_official_office_home_run() -> None:
    p = OFFICE_HOME
    assert (p.epochs, p.batch_size, p.lr, p.momentum, p.weight_decay) == (200, 64, 2e-4, 0.9, 1e-4)
    assert (p.temperature, p.key_momentum, p.confidence) == (0.2, 0.999, 0.2)
    assert (p.cluster_weight, p.distance_weight, p.entropy_weight) == (0.5, 0.5, 1.0)
    assert (p.entropy_temperature, p.distance_temperature, p.cross_domain_start) == (0.01, 0.01, 100)
    assert (p.kmeans_iterations, p.kmeans_restarts, p.kmeans_max_points) == (20, 5, 2000)


def test_terms_enter_with_their_phases() -> None:
    method = small()
    both = (features(0), features(1, N - 5))
    method.start(both)
    instance = {"instance_a", "instance_b"}
    cluster = {"cluster_a", "cluster_b"}
    cross = {"self_entropy", "distance"}
    for epoch, expected in (
        (0, instance),
        (2, instance),
        (3, instance | cluster),
        (5, instance | cluster | cross),
    ):
        method.start_epoch(epoch, both)
        assert set(method.losses(epoch, (batch(2), batch(4)))) == expected
    method = small(entropy_weight=0, distance_weight=0, cluster_weight=0)
    method.start(both)
    method.start_epoch(9, both)
    assert set(method.losses(9, (batch(2), batch(4)))) == instance


def test_weights_are_alpha_gamma_and_beta() -> None:
    method = small(cluster_weight=0.8, entropy_weight=0.3, distance_weight=0.7)
    method.start((features(0), features(1)))
    method.start_epoch(9, (features(0), features(1)))
    terms = method.losses(9, (batch(2), batch(4)))
    assert {name: term.weight for name, term in terms.items()} == {
        "instance_a": 0.5,
        "instance_b": 0.5,
        "cluster_a": 0.4,
        "cluster_b": 0.4,
        "self_entropy": 0.3,
        "distance": 0.7,
    }


def test_the_bank_takes_the_keys_before_the_losses() -> None:
    method = small()
    method.start((features(0), features(1)))
    part = batch(2)
    terms = method.losses(0, (part, batch(4)))
    bank = features(0)
    bank[part.slot_B] = part.k_BD
    bank[5] = part.k_BD[2]  # slot 5 came twice: its last key stays
    expected = instance_value(part.q_BD, part.k_BD, part.slot_B, bank, 0.2)
    assert torch.allclose(terms["instance_a"].value, expected)


def test_a_phase_that_needs_clusters_too_early_is_refused() -> None:
    with pytest.raises(UserError, match="need the clusters that begin there"):
        checked(UcdirParams, {"clusters": 3, "cross_domain_start": 5}, "params.yaml")


@pytest.mark.parametrize(("epochs", "schedule"), [(200, (20, 100, 100)), (20, (2, 10, 10)), (1, (0, 1, 0))])
def test_the_schedule_follows_the_epochs(epochs: int, schedule: tuple[int, int, int]) -> None:
    p = UcdirParams(clusters=3, epochs=epochs)
    assert (p.ramp_start, p.ramp_end, p.cross_domain_start) == schedule


def test_phases_follow_a_given_start() -> None:
    p = UcdirParams(clusters=3, epochs=200, ramp_start=150)
    assert (p.ramp_end, p.cross_domain_start) == (151, 150)


def test_several_k_are_averaged_not_multiplied() -> None:
    both = (features(0), features(1))
    method = small(clusters=[3, 5])
    method.start(both)
    method.start_epoch(9, both)
    terms = method.losses(9, (batch(2), batch(4)))
    alone: list[Tensor] = []
    for number, k in enumerate((3, 5)):
        part, bank = batch(2), method.banks[0].features_ND
        c = kmeans(both[0], k, iterations=20, restarts=5, seed=number, max_points=2000)
        label_B = c.label_N[part.slot_B]
        value_B = cluster_values(part.q_BD, part.slot_B, bank, c.label_N, 0.2)
        alone.append(mean_of_kept(value_B, confident(part.k_BD, label_B, c.centroid_KD, 0.2, 0.2)))
    assert torch.allclose(terms["cluster_a"].value, torch.stack(alone).mean(), atol=1e-6)


@pytest.mark.parametrize("name", ["ucdir", "ucdir-ot", "protonce", "pcs"])
def test_empty_clusters_keep_their_place(name: str) -> None:
    """Two distinct features cannot fill four clusters."""
    x = normalize(torch.eye(D)[torch.arange(N) % 2], dim=1)
    kind = METHODS[name]
    method = kind(kind.params_type(clusters=4, epochs=10), 0)
    method.start((x, x))
    figures = method.start_epoch(9, (x, x))
    assert figures["cluster/empty_a"] >= 1
    terms = method.losses(9, (batch(2), batch(4)))
    total = sum(term.weight * term.value for term in terms.values())
    assert isinstance(total, Tensor)
    assert total.isfinite()
    parts = [batch(2), batch(4)]
    terms = method.losses(9, (parts[0], parts[1]))
    sum(term.weight * term.value for term in terms.values()).backward()  # type: ignore[union-attr]
    assert all(part.q_BD.grad is not None and part.q_BD.grad.isfinite().all() for part in parts)
