"""A method's terms are its losses, which have references of their own, of its clusters, banks and params."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from tests.steps import AnyBatch, N, batch, features, make
from ucir.losses.assignment import distance_of_distance, self_entropy
from ucir.losses.cluster import confident
from ucir.losses.matched import matched_distance, soft_assignment, soft_centroids
from ucir.losses.prototype import classifier_gap, prototype_contrast, self_matching
from ucir.losses.transported import against_unmatched
from ucir.losses.universal import structure_change
from ucir.methods.base import Method
from ucir.prototypes.clustering import Clusters, concentration, kmeans
from ucir.prototypes.merging import unify_domains
from ucir.prototypes.transport import match_prototypes, plan_rows, transport

A, B = features(0), features(1, N - 5)
"""The domains as :func:`tests.steps.make` has them."""


def parts_of(key: bool) -> tuple[AnyBatch, AnyBatch]:
    return batch(2, key), batch(4, key)


def values(method: Method[Any], epoch: int, parts: tuple[AnyBatch, AnyBatch]) -> dict[str, Tensor]:
    return {name: term.value for name, term in method.losses(epoch, parts).items()}


def clusters(x: Tensor, k: int = 4) -> Clusters:
    """As UCDIR's methods cluster."""
    return kmeans(x, k, iterations=20, restarts=5, seed=0, max_points=2000)


def written(x: Tensor, part: AnyBatch) -> Tensor:
    """A bank once a step's keys are in it."""
    rows = x.clone()
    for slot, key in zip(part.slot_B.tolist(), part.k_BD, strict=True):
        rows[slot] = key
    return rows


def test_ucdir_crosses_both_domains_clusters_at_its_temperatures() -> None:
    method = make("ucdir", entropy_temperature=0.07, distance_temperature=0.03)
    method.start_epoch(9, (A, B))
    parts = parts_of(key=True)
    terms = values(method, 9, parts)
    centroids = [clusters(x).centroid_KD for x in (A, B)]
    entropy = [self_entropy(part.q_BD, c, 0.07) for part in parts for c in centroids]
    assert torch.allclose(terms["self_entropy"], torch.stack(entropy).mean())
    distance = [distance_of_distance(part.q_BD, *centroids, 0.03) for part in parts]
    assert torch.allclose(terms["distance"], torch.stack(distance).mean())


def test_ucdir_drops_keys_that_are_not_clear_of_their_cluster() -> None:
    parts, of_a = parts_of(key=True), clusters(A)
    label_B = of_a.label_N[parts[0].slot_B]
    share_B = torch.softmax(parts[0].k_BD @ of_a.centroid_KD.T / 0.2, dim=1).gather(1, label_B[:, None])[:, 0]
    half = float(share_B.median())
    terms = []
    for threshold, kept in ((0.0, 6), (half, 3), (1.0, 0)):
        assert int(confident(parts[0].k_BD, label_B, of_a.centroid_KD, 0.2, threshold).sum()) == kept
        method = make("ucdir", confidence=threshold)
        method.start_epoch(9, (A, B))
        terms.append(float(values(method, 9, parts)["cluster_a"]))
    assert len(set(terms)) == 3


def test_ucdir_ot_matches_the_soft_centroids_of_both_domains() -> None:
    method = make("ucdir-ot", entropy_temperature=0.07)
    method.start_epoch(9, (A, B))
    parts = parts_of(key=True)
    terms = values(method, 9, parts)
    centroids = [clusters(x).centroid_KD for x in (A, B)]
    soft = [
        soft_centroids(part.q_BD, soft_assignment(part.q_BD, c, 0.1))
        for part, c in zip(parts, centroids, strict=True)
    ]
    assert torch.allclose(terms["distance"], matched_distance(soft[0], soft[1], match_prototypes(*soft)))
    entropy = [self_entropy(part.q_BD, c, 0.07) for part in parts for c in centroids]
    assert torch.allclose(terms["self_entropy"], torch.stack(entropy).mean())
    for side, part, c in zip("ab", parts, centroids, strict=True):
        nearest = (part.q_BD @ c.T).argmax(dim=1)
        assert torch.allclose(terms[f"cluster_{side}"], prototype_contrast(part.q_BD, nearest, c, 0.1))


@pytest.mark.parametrize("negatives", ["plain", "as-released"])
def test_protoot_pulls_to_neighbours_of_the_key_and_to_the_other_domains_prototypes(negatives: str) -> None:
    method: Any = make("protoot", cross_negatives=negatives)
    method.start_epoch(9, (A, B))
    before, shares = list(method.prototypes), list(method.marginals)
    parts = parts_of(key=True)
    terms = values(method, 9, parts)
    banks = [written(x, part) for x, part in zip((A, B), parts, strict=True)]
    after = [
        transport(x, prototypes, b, 0.05, 3).mean_KD
        for x, prototypes, b in zip(banks, before, shares, strict=True)
    ]

    def matched(bank: Tensor, part: AnyBatch, prototypes: Tensor, b: Tensor) -> Tensor:
        potential_K = transport(bank, prototypes, b, 0.05, 3).potential_K
        return plan_rows(bank[part.slot_B], prototypes, potential_K, 0.05).argmax(dim=1)

    for number, (side, part, bank) in enumerate(zip("ab", parts, banks, strict=True)):
        own_B = matched(bank, part, before[number], shares[number])
        similarity = part.k_BD @ bank.T
        similarity[torch.arange(len(similarity)), part.slot_B] = -math.inf
        near_BD = bank[similarity.argmax(dim=1)]
        for name, target_BD in (("key", part.k_BD), ("neighbour", near_BD)):
            expected = against_unmatched(part.q_BD, target_BD, before[number], own_B, 0.2)
            assert torch.allclose(terms[f"{name}_{side}"], expected), name
        other = after[1 - number]
        other_B = matched(bank, part, other, shares[1 - number])
        expected = against_unmatched(
            part.q_BD, other[other_B], other, other_B, 0.2, normalised=negatives == "as-released"
        )
        assert torch.allclose(terms[f"cross_{side}"], expected, atol=1e-5)


def test_pcs_averages_repeats_and_two_sizes_within_and_across() -> None:
    method = make("pcs", repeats=2)
    method.start_epoch(3, (A, B))
    parts = parts_of(key=False)
    terms = values(method, 3, parts)
    of_domain = [
        [
            kmeans(x, k, iterations=40, restarts=1, seed=1234 + 4 * r, max_points=10000, spherical=True)
            for r in range(2)
            for k in (4, 8)
        ]
        for x in (A, B)
    ]
    for number, (side, part) in enumerate(zip("ab", parts, strict=True)):
        x = (A, B)[number]
        within = [
            prototype_contrast(
                part.q_BD,
                c.label_N[part.slot_B],
                c.centroid_KD,
                concentration(x, c.label_N, c.centroid_KD).clamp(min=0.05),
            )
            for c in of_domain[number]
        ]
        across = [self_entropy(part.q_BD, c.centroid_KD, 0.1) for c in of_domain[1 - number]]
        assert torch.allclose(terms[f"prototype_{side}"], torch.stack(within).mean())
        assert torch.allclose(terms[f"matching_{side}"], torch.stack(across).mean())


def test_coda_matches_within_and_aligns_with_the_other_domains_classifiers() -> None:
    method: Any = make("coda")
    method.start_epoch(0, (A, B))
    generator = torch.Generator().manual_seed(0)
    for weight in method.classifiers.parameters():  # they begin as centres, and would differ by little
        weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
    parts = parts_of(key=False)
    terms = values(method, 0, parts)
    for number, (side, part) in enumerate(zip("ab", parts, strict=True)):
        own, other = method.classifiers[number], method.classifiers[1 - number]
        row_BD = (A, B)[number][part.slot_B]
        matching = [self_matching(part.q_BD, row_BD, weight, 0.01) for weight in own]
        gaps = [classifier_gap(part.q_BD, *both) for both in zip(own, other, strict=True)]
        assert torch.allclose(terms[f"self_matching_{side}"], torch.stack(matching).mean())
        assert torch.allclose(terms[f"alignment_{side}"], torch.stack(gaps).mean())


def test_dn2a_looks_at_as_many_neighbours_as_it_is_told() -> None:
    found = []
    for neighbours in (1, 5):
        method = make("dn2a", neighbours=neighbours, neighbour_start=0)
        method.start_epoch(9, (A, B))
        found.append(values(method, 9, parts_of(key=True))["cross_domain_a"])
    assert not torch.allclose(*found)


def test_protonce_warms_up_for_a_tenth_of_its_epochs() -> None:
    method = make("protonce")
    names = []
    for epoch in (0, 1):
        method.start_epoch(epoch, (A, B))
        names.append(set(values(method, epoch, parts_of(key=True))))
    assert names[0] < names[1]


MATCHING = 20
"""An epoch of UEM's second phase, of 30."""


def apart(part: AnyBatch, seed: int) -> AnyBatch:
    """With features before they have unit length that are not those after."""
    return replace(
        part, raw_BD=3 * features(seed, len(part.q_BD)), raw_frozen_BD=2 * features(seed + 5, len(part.q_BD))
    )


def test_uem_preserves_the_structure_of_both_kinds_of_features() -> None:
    method = make("uem", epochs=30)
    method.start_epoch(MATCHING, (A, B))
    parts = tuple(apart(part, 80 + number) for number, part in enumerate(parts_of(key=False)))
    terms = values(method, MATCHING, parts)  # type: ignore[arg-type]
    for side, part in zip("ab", parts, strict=True):
        expected = structure_change(part.q_BD, part.frozen_BD, part.raw_BD, part.raw_frozen_BD)
        assert expected > 0
        assert torch.allclose(terms[f"structure_{side}"], expected)


def test_uem_treats_the_domains_alike() -> None:
    """What is of one domain is of the other once they are swapped: no structure or bank of the wrong one."""
    straight, swapped = make("uem", epochs=30), make("uem", epochs=30)
    swapped.start((B, A))
    parts = parts_of(key=False)
    for epoch, names in (
        (MATCHING - 1, ("prototype", "semantic", "instance")),
        (MATCHING, ("matching", "structure")),
    ):
        straight.start_epoch(epoch, (A, B))
        swapped.start_epoch(epoch, (B, A))
        one, other = values(straight, epoch, parts), values(swapped, epoch, parts[::-1])
        for name in names:
            assert not torch.allclose(one[f"{name}_a"], one[f"{name}_b"])
            for side, mirrored in ("ab", "ba"):
                assert torch.allclose(one[f"{name}_{side}"], other[f"{name}_{mirrored}"], atol=1e-5), name


def test_uems_weights_reach_what_they_weigh() -> None:
    def gradient(**params: Any) -> Tensor:
        """Of the adversary's terms alone."""
        torch.manual_seed(0)
        method = make("uem", epochs=30, **params)
        method.start_epoch(MATCHING, (A, B))
        parts = parts_of(key=False)
        terms = method.losses(MATCHING, parts)
        wanted = [term.weight * term.value for name, term in terms.items() if name.startswith("adversary")]
        assert wanted, list(terms)
        torch.stack(wanted).sum().backward()  # type: ignore[no-untyped-call]
        assert parts[0].q_BD.grad is not None
        return parts[0].q_BD.grad

    assert torch.allclose(gradient(adversary_weight=0.5), 0.5 * gradient(adversary_weight=1.0))
    weights = {}
    for reduction in ("mean", "sum"):
        method = make("uem", epochs=30, reduction=reduction)
        method.start_epoch(10, (A, B))
        weights[reduction] = {
            name: term.weight for name, term in method.losses(10, parts_of(key=False)).items()
        }
    for name in ("instance_a", "prototype_a", "instance_b", "prototype_b"):
        assert weights["sum"][name] == pytest.approx(6 * weights["mean"][name])


def test_uem_merges_by_the_limit_it_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    given = []

    def watched(*arguments: Any, **options: Any) -> Any:
        given.append((*arguments, *options.values()))
        return unify_domains(*arguments, **options)

    monkeypatch.setattr("ucir.methods.uem.unify_domains", watched)
    for limit in ("domain", "pair"):
        method = make("uem", epochs=30, merging_limit=limit)
        given.clear()
        for epoch in (MATCHING - 1, MATCHING):
            method.start_epoch(epoch, (A, B))
        assert any(limit in arguments for arguments in given)


def test_brad_meets_the_edges_of_its_own_domain() -> None:
    method = make("brad")
    method.start_epoch(0, (A, B))
    parts = parts_of(key=True)
    terms = values(method, 0, parts)
    for number, (side, part) in enumerate(zip("ab", parts, strict=True)):
        x, edges = (A, B)[number], (features(7), features(8, N - 5))[number]
        rows = torch.cat([x, edges])
        own = torch.arange(len(rows)) % len(x) == part.slot_B[:, None]
        others = (part.q_BD @ rows.T / 0.2).masked_fill(own, -math.inf)
        positive = (part.q_BD * part.edge_k_BD).sum(dim=1, keepdim=True) / 0.2
        logits = torch.cat([positive, others], dim=1)
        expected = cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))
        assert torch.allclose(terms[f"picture_to_edges_{side}"], expected)
