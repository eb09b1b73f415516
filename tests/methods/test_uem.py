"""UEM as a method: phases, schedules, structure, what is frozen, which ablation leaves what out."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.steps import B, D, N, batch, features, make
from ucir.config.model import EncoderParams
from ucir.losses.prototype import bank_discrimination, prototype_contrast
from ucir.losses.universal import batch_contrast, product_dissimilarity, semantic_pull, switchable_match
from ucir.memory import Bank
from ucir.methods.uem import Uem, UemParams
from ucir.models.encoder import new_encoder

SEMANTIC = {"instance", "prototype", "semantic"}
MATCHED = {"structure", "matching"}


def uem(name: str = "uem", **changes: Any) -> Uem:
    method = make(name, **{"epochs": 30, **changes})
    assert isinstance(method, Uem)
    return method


def terms_at(epoch: int, name: str = "uem", **changes: Any) -> dict[str, tuple[float, Tensor]]:
    method = uem(name, **changes)
    method.start_epoch(epoch, (features(0), features(1, N - 5)))
    return {
        k: (t.weight, t.value) for k, t in method.losses(epoch, (batch(2, False), batch(4, False))).items()
    }


def sides(names: set[str]) -> set[str]:
    return {f"{name}_{side}" for name in names for side in "ab"}


def test_phases_and_ablations() -> None:
    assert set(terms_at(19)) == sides(SEMANTIC)
    assert set(terms_at(20)) == sides(MATCHED) | {"adversary"}
    assert set(terms_at(19, "uem-no-sel")) == sides({"instance", "prototype"})
    assert set(terms_at(29, "uem-dann")) == sides({"matching"}) | {"adversary"}
    assert set(terms_at(5, matching_epochs=29)) == sides(MATCHED) | {"adversary"}
    assert {weight for weight, _ in terms_at(29).values()} == {1}
    summed = terms_at(29, reduction="sum")
    assert {name: weight for name, (weight, _) in summed.items()} == {
        **dict.fromkeys(sides({"structure"}), 1),
        **dict.fromkeys(sides({"matching"}), B),
        "adversary": 2 * B,
    }


def test_alpha_is_a_step_around_the_middle_of_the_first_phase() -> None:
    """Eq. 10 with E = 100, as on Office-Home."""
    method = uem(epochs=150)
    assert method.border == 100
    alphas = {e: method.alpha(e) for e in (0, 40, 45, 50, 55, 60, 99)}
    expected = {40: 4.5398e-5, 45: 0.0066929, 50: 0.5, 55: 0.9933071, 60: 0.9999546, 99: 1.0}
    assert {e: alphas[e] for e in expected} == pytest.approx(expected, rel=1e-4)
    assert alphas[0] < 1e-21
    assert uem(epochs=3000).alpha(0) >= 0  # no overflow
    assert (
        terms_at(19)["prototype_a"][0]
        == terms_at(19)["semantic_b"][0]
        == pytest.approx(1 / (1 + math.exp(-9)))
    )


def test_learning_rate_starts_anew_in_the_second_phase() -> None:
    method = uem(epochs=150, lr=2e-4)
    rates = [method.lr_at(e, 0) / 2e-4 for e in (0, 50, 99, 100, 125, 149)]
    assert rates == pytest.approx([1, 0.5, 0.000247, 1, 0.5, 0.000987], abs=1e-5)
    encoder = new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8), 0)
    method.build(encoder)
    groups = method.optimizer(encoder).param_groups
    assert [group.get("lr_scale", 1.0) for group in groups] == [1.0, 10.0]
    whole = uem(epochs=150, lr=2e-4, schedule="whole")
    assert [whole.lr_at(e, 0) / 2e-4 for e in (0, 75, 149)] == pytest.approx([1, 0.5, 0.000110], abs=1e-5)
    first = [p.clone() for p in groups[1]["params"]]
    method.build(encoder)
    again = method.optimizer(encoder).param_groups[1]["params"]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_first_phases_terms() -> None:
    method = uem()
    x = (features(0), features(1, N - 5))
    method.start_epoch(19, x)
    assert method.structures is not None
    part = batch(2, False)
    terms = method.losses(19, (part, batch(4, False)))
    structure = normalize(method.structures[0].prototype_CD, dim=1)
    assert torch.allclose(terms["instance_a"].value, batch_contrast(part.q_BD, x[0][part.slot_B], 0.07))
    label_B = torch.cdist(x[0][part.slot_B], method.centres[0]).argmin(dim=1)
    assert torch.allclose(terms["prototype_a"].value, prototype_contrast(part.q_BD, label_B, structure, 0.07))
    assert torch.allclose(terms["semantic_a"].value, semantic_pull(part.q_BD, structure, 0.07))
    whole = terms_at(19, instance_negatives="bank")["instance_a"][1]
    assert torch.allclose(whole, bank_discrimination(part.q_BD, part.slot_B, Bank(x[0]), 0.07))


@pytest.mark.parametrize("distances", ["unit", "raw"])
def test_the_second_phases_match_is_switched_by_the_structure(distances: str) -> None:
    method = uem(clusters=3, distances=distances)
    x = (features(0), features(1, N - 5))
    parts = batch(2, False), batch(4, False)
    far = x[1]
    if distances == "raw":
        first, far = (x_ND * torch.linspace(0.2, 5, len(x_ND))[:, None] for x_ND in x)
        method.raw_banks = Bank(first), Bank(far)
        parts = replace(parts[0], raw_BD=3 * parts[0].q_BD), parts[1]
    method.start_epoch(20, x)
    assert method.structures is not None
    terms = method.losses(20, parts)
    other = method.structures[1]
    target, near, reliable = [], [], []
    for q in parts[0].raw_BD.detach():
        cluster = int(product_dissimilarity(q[None], method.centres[0]).argmin())
        target.append(int(other.other_L[cluster]))
        near.append(int(product_dissimilarity(q[None], far).argmin()))
        closest = int(product_dissimilarity(far[near[-1]][None], other.prototype_CD).argmin())
        reliable.append(closest == target[-1])
    expected = switchable_match(
        parts[0].q_BD,
        torch.tensor(target),
        x[1][near],
        torch.tensor(reliable),
        normalize(other.prototype_CD, dim=1),
        Bank(x[1]),
        0.07,
    )
    assert torch.allclose(terms["matching_a"].value, expected)
    if method.raw_banks:
        assert near != [int(product_dissimilarity(q[None], x[1]).argmin()) for q in parts[0].q_BD.detach()]
        slot_B, before = parts[0].slot_B, Bank(method.raw_banks[0])
        method.after_step(parts)
        blended = 0.99 * before.rows(slot_B) + 0.01 * parts[0].raw_BD.detach()
        assert torch.allclose(method.raw_banks[0].rows(slot_B[[0, 3]]), blended[[0, 3]])
    plain = uem("uem-no-sn2m")
    plain.start_epoch(20, x)
    nearest_B = (parts[0].q_BD.detach() @ x[1].T).argmax(dim=1)
    nearest = plain.losses(20, parts)["matching_a"].value
    assert torch.allclose(nearest, bank_discrimination(parts[0].q_BD, nearest_B, Bank(x[1]), 0.07))


def test_identical_domains_merge_wholly_and_without_merging_not_at_all() -> None:
    x = (features(0), features(0))
    for name, merged in (("uem", 4), ("uem-no-merging", 0)):
        method = uem(name)
        method.start(x)
        figures = method.start_epoch(20, x)
        assert figures["prototypes/merged"] == merged
        terms = method.losses(20, (batch(2, False), batch(4, False)))
        assert all(term.value.isfinite() for term in terms.values())


def test_the_adversary_pulls_the_encoder_the_other_way() -> None:
    """The classifier descends its loss, the features ascend it."""
    method = uem()
    method.start_epoch(20, (features(0), features(1, N - 5)))
    parts = batch(2, False), batch(4, False)
    value = method.losses(20, parts)["adversary"].value
    weight = next(method.discriminator.parameters())
    to_q, to_g = torch.autograd.grad(value, [parts[0].q_BD, weight])

    def loss(q: Tensor) -> Tensor:
        logits = [method.discriminator(x)[:, 0] for x in (q, parts[1].q_BD)]
        value: Tensor = -(logits[0].sigmoid().log().mean() + (-logits[1]).sigmoid().log().mean()) / 2
        return value

    down_q, down_g = torch.autograd.grad(loss(parts[0].q_BD), [parts[0].q_BD, weight])
    assert torch.allclose(to_q, -down_q, atol=1e-7)
    assert torch.allclose(to_g, down_g, atol=1e-7)


def test_params() -> None:
    published = UemParams()
    ours = (published.epochs, published.matching_epochs, published.temperature, published.bank_momentum)
    assert ours == (150, 50, 0.07, 0.99)
    assert (published.lr, published.momentum, published.batch_size) == (2e-4, 0.9, 64)
    assert published.clusters == "elbow"
    with pytest.raises(ValueError, match=r"epochs 3: the second phase takes 3 of them .* leaves none"):
        UemParams(epochs=3, matching_epochs=3)
    with pytest.raises(ValueError, match="give one number"):
        UemParams(clusters=(3, 4))
    only = uem(matching_epochs=0, epochs=4)
    assert only.lr_at(3, 0) > 0


def test_k_is_chosen_again_where_that_is_asked_for() -> None:
    """After so many epochs, from the bank as it is then."""
    once, again = uem(clusters="elbow"), uem(clusters="elbow", clusters_every=2)
    x = (features(0), features(1, N - 5))
    apart = torch.eye(D)[torch.arange(N) % 3] + 1e-3 * features(0)
    for method in (once, again):
        method.start_epoch(0, x)
        first = list(method.chosen)
        for bank in method.banks:  # three tight clusters now
            bank.write(torch.arange(len(bank)), normalize(apart[: len(bank)], dim=1))
        method.start_epoch(1, x)
        assert method.chosen == first
    once.start_epoch(2, x)
    again.start_epoch(2, x)
    assert once.chosen == first
    assert again.chosen == [(3,), (3,)] != first
    with pytest.raises(ValueError, match="clusters_every: K is given"):
        UemParams(clusters=4, clusters_every=2)


def test_prototypes_are_cluster_means_not_directions() -> None:
    method = uem()
    x = (features(0), features(1, N - 5))
    method.start_epoch(0, x)
    assert float(method.centres[0].norm(dim=1).max()) < 1
    assert not torch.allclose(normalize(method.centres[0], dim=1), method.centres[0])
