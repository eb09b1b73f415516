"""ProtoOT as a method: neighbours, marginals, prototypes, phases."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.steps import batch, features
from ucir.config.model import EncoderParams
from ucir.memory import Bank
from ucir.methods.protoot import ProtoOt, ProtoOtParams
from ucir.methods.registry import METHODS, fixed_keys
from ucir.models.encoder import new_encoder
from ucir.prototypes.clustering import aligned_order, kmeans
from ucir.prototypes.transport import plan_rows, similarity, transport

N, B = 40, 6


def make(name: str = "protoot", **changes: Any) -> ProtoOt:
    params = {"clusters": 4, "epochs": 10, **changes, **fixed_keys(name)}
    method = METHODS[name](ProtoOtParams(**params), 0)
    assert isinstance(method, ProtoOt)
    method.start((features(0), features(1, N - 5)))
    return method


def terms_at(epoch: int, name: str = "protoot", **changes: Any) -> dict[str, tuple[float, Tensor]]:
    method = make(name, **changes)
    method.start_epoch(epoch, (features(0), features(1, N - 5)))
    terms = method.losses(epoch, (batch(2, True), batch(4, True)))
    return {key: (term.weight, term.value) for key, term in terms.items()}


def test_the_neighbour_is_the_true_one_and_never_oneself() -> None:
    """The first release took the argmax of a row without its own column as an index of the whole row."""
    bank = Bank(normalize(torch.randn(30, 8, generator=torch.Generator().manual_seed(3)), dim=1))
    slots = torch.tensor([0, 7, 7, 29, 15])
    nearest_B = bank.nearest(bank.features_ND[slots], slots)
    for place, slot in enumerate(slots.tolist()):
        similar = [
            float(bank.features_ND[slot] @ row) if i != slot else -9.0
            for i, row in enumerate(bank.features_ND)
        ]
        assert torch.equal(nearest_B[place], bank.features_ND[similar.index(max(similar))])


def test_phases_weights_and_ablations() -> None:
    inside = {f"{name}_{side}" for name in ("key", "neighbour", "prototype") for side in "ab"}
    cross = {"cross_a", "cross_b"}
    assert set(terms_at(4)) == inside
    assert set(terms_at(5)) == inside | cross
    assert {key: weight for key, (weight, _) in terms_at(9).items()} == {
        **{f"key_{s}": 1.0 for s in "ab"},
        **{f"neighbour_{s}": 0.5 for s in "ab"},
        **{f"prototype_{s}": 0.1 for s in "ab"},
        **{f"cross_{s}": 0.01 for s in "ab"},
    }
    assert set(terms_at(9, "protoot-no-cross")) == inside
    assert set(terms_at(9, "protoot-no-neighbour")) == {t for t in inside | cross if "neighbour" not in t}
    part = batch(2, True)
    pulled = -(part.q_BD * part.k_BD).sum(dim=1).mean() / 0.2
    assert torch.allclose(terms_at(9, "protoot-no-push")["key_a"][1], pulled)


def test_matched_prototypes_are_those_of_the_plan_and_are_renewed_by_it() -> None:
    method = make()
    both = (features(0), features(1, N - 5))
    method.start_epoch(0, both)
    before, marginal = method.prototypes[0], method.marginals[0]
    part = batch(2, True)
    terms = method.losses(0, (part, batch(4, True)))
    bank = features(0)
    bank[part.slot_B] = part.k_BD
    bank[5] = part.k_BD[2]
    plan = transport(bank, before, marginal, 0.05, 3)
    assert torch.allclose(method.prototypes[0], plan.mean_KD, atol=1e-6)
    label_B = plan_rows(bank[part.slot_B], before, plan.potential_K, 0.05).argmax(dim=1)
    logits = part.q_BD @ before.T
    positive = (part.q_BD * before[label_B]).sum(dim=1, keepdim=True)
    logits = logits.scatter(1, label_B[:, None], positive) / 0.2
    assert torch.allclose(terms["prototype_a"].value, torch.nn.functional.cross_entropy(logits, label_B))


def test_marginals_are_cluster_sizes_in_the_order_of_the_prototypes() -> None:
    centres = torch.eye(8)[:3]
    noise = torch.randn(35, 8, generator=torch.Generator().manual_seed(0))
    x = normalize(centres.repeat_interleave(torch.tensor([20, 10, 5]), dim=0) + 0.01 * noise, dim=1)
    clusters = kmeans(x, 3, iterations=50, restarts=20, seed=0, max_points=2000)
    share_K = clusters.size_K / 35
    assert sorted(share_K.tolist()) == pytest.approx([5 / 35, 10 / 35, 20 / 35])
    for order, expected in (("aligned", share_K.flip(0)), ("as-released", share_K)):
        method = make(clusters=3, marginal_order=order)
        method.banks = (Bank(x), Bank(x))
        method.start_epoch(0, (x, x))
        method.prototypes = [clusters.centroid_KD.flip(0)] * 2  # they have moved on
        method.start_epoch(1, (x, x))
        assert method.marginals[0].tolist() == pytest.approx(expected.tolist())
    uniform = make("protoot-uniform", clusters=3)
    uniform.start_epoch(0, (x, x))
    assert uniform.marginals[0].tolist() == pytest.approx([1 / 3] * 3)


def test_an_empty_cluster_keeps_its_place_among_the_marginals() -> None:
    x = normalize(torch.eye(8)[torch.arange(N) % 2], dim=1)
    method = make()
    method.start((x, x))
    figures = method.start_epoch(0, (x, x))
    assert figures["cluster/empty_a"] >= 1
    assert len(method.marginals[0]) == 4
    terms = method.losses(9, (batch(2, True), batch(4, True)))
    assert all(term.value.isfinite() for term in terms.values())
    assert all(p.isfinite().all() for p in method.prototypes)


def test_the_other_domains_prototypes_take_their_own_shares() -> None:
    for choice in ("other", "as-released"):
        method = make(cross_marginal=choice)
        method.start_epoch(9, (features(0), features(1, N - 5)))
        seen: list[list[float]] = []

        class Watched(ProtoOt):
            def _match(
                self, bank: Bank, p_KD: Tensor, b_K: Tensor, slots: Tensor, renew: bool
            ) -> tuple[Tensor, Tensor]:
                seen.append(b_K.tolist())  # noqa: B023
                return super()._match(bank, p_KD, b_K, slots, renew)

        method.__class__ = Watched
        method.losses(9, (batch(2, True), batch(4, True)))
        shares = [m.tolist() for m in method.marginals]
        assert seen[:2] == shares
        assert seen[2:] == (shares[::-1] if choice == "other" else shares)


def test_keys_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match="'as-released', which gives one domain's shares"):
        ProtoOtParams(clusters="elbow", cross_marginal="as-released")
    with pytest.raises(ValueError, match="cross_domain_start 11 lies beyond the last of 10 epochs"):
        ProtoOtParams(clusters=4, epochs=10, cross_domain_start=11)


def test_an_image_that_no_mass_is_moved_from_belongs_to_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    method = make(assignment="partial", relaxation=0.5)
    bank, prototype = method.banks[0], method.prototypes
    method.start_epoch(0, (features(0), features(1, N - 5)))
    plan = torch.zeros(N, 4)
    plan[7, 2] = 1.0
    monkeypatch.setattr("ucir.methods.protoot.relaxed_plan", lambda *given: plan)
    slots = torch.tensor([7, 8, 9])
    prototype_KD = method.prototypes[0]
    label_B, renewed_KD = method._match(bank, prototype_KD, method.marginals[0], slots, True)
    nearest_B = similarity(bank.features_ND[slots], prototype_KD).argmax(dim=1)
    assert label_B.tolist() == [2, *nearest_B[1:].tolist()]
    assert torch.equal(renewed_KD[0], prototype_KD[0])
    assert prototype == []


def test_file_order_does_not_matter() -> None:
    x = (features(0), features(1, N))
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    place = order.argsort()
    losses = []
    for moved in (False, True):
        method = make(kmeans_restarts=1)
        method.start(tuple(f[order] if moved else f for f in x))  # type: ignore[arg-type]
        method.prototypes = [features(8, 4), features(9, 4)]
        method.marginals = [torch.full((4,), 0.25)] * 2
        parts = [batch(2, True), batch(4, True)]
        if moved:
            parts = [replace(p, slot_B=place[p.slot_B]) for p in parts]
        losses.append(method.losses(9, (parts[0], parts[1])))
    for name, term in losses[0].items():
        assert torch.allclose(term.value, losses[1][name].value, atol=1e-5), name


@pytest.mark.parametrize("assignment", ["kmeans", "unbalanced", "partial"])
def test_other_assignments(assignment: str) -> None:
    method = make(assignment=assignment, relaxation=0.9)
    method.start_epoch(0, (features(0), features(1, N - 5)))
    before = method.prototypes[0]
    terms = method.losses(9, (batch(2, True), batch(4, True)))
    assert all(term.value.isfinite() for term in terms.values())
    assert torch.allclose(method.prototypes[0].norm(dim=1), torch.ones(4), atol=1e-5)
    if assignment == "kmeans":
        bank = method.banks[0].features_ND
        label = similarity(bank, before).argmax(dim=1)
        for k in range(4):
            if (label == k).any():
                expected = normalize(bank[label == k].sum(dim=0), dim=0)
                assert torch.allclose(method.prototypes[0][k], expected, atol=1e-5)


def test_adam_as_released_and_one_k_alone() -> None:
    encoder = new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8), 0)
    (group,) = make().optimizer(encoder).param_groups
    assert (group["lr"], group["weight_decay"], group["amsgrad"]) == (2.5e-4, 5e-4, True)
    assert make().lr_at(7, 70) == 2.5e-4
    with pytest.raises(ValueError, match="ProtoOT has one set of prototypes"):
        ProtoOtParams(clusters=(3, 4))
    with pytest.raises(ValueError, match="moves a share of at most 1"):
        ProtoOtParams(clusters=3, assignment="partial", relaxation=1.5)


def test_alignment_pairs_one_to_one() -> None:
    x = features(0, 7)
    order = torch.randperm(7)
    assert torch.equal(order[aligned_order(x, x[order])], torch.arange(7))
