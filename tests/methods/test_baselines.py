"""The baselines and variants: what they put together, keep and change."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from tests.losses.reference import instance_value
from tests.steps import N, batch, features, make
from ucir.config.base import checked
from ucir.config.data import ViewParams
from ucir.config.model import EncoderParams
from ucir.data.augment import InputFormat
from ucir.data.pack import open_domain, read_index
from ucir.data.views import PictureViews
from ucir.errors import UserError
from ucir.losses.instance import mixed_contrast
from ucir.losses.prototype import bank_discrimination, neighbour_entropy, prototype_contrast
from ucir.memory import Bank
from ucir.methods.coda import Coda, CodaParams
from ucir.methods.dgdir import DgdirParams
from ucir.methods.dn2a import Dn2a, locked_neighbours, stronger
from ucir.methods.registry import METHODS
from ucir.models.encoder import new_encoder
from ucir.prototypes.clustering import choose_clusters, concentration, kmeans, raw_centroids


def terms_at(name: str, epoch: int, **changes: Any) -> dict[str, tuple[float, Tensor]]:
    method = make(name, **changes)
    method.start_epoch(epoch, (features(0), features(1, N - 5)))
    both = (batch(2, method.keyed is not None), batch(4, method.keyed is not None))
    return {key: (term.weight, term.value) for key, term in method.losses(epoch, both).items()}


IW = {"instance_a", "instance_b"}
CW = {"cluster_a", "cluster_b"}
BRAD = {f"{n}_{s}" for n in ("picture_to_edges", "edges_to_picture") for s in "ab"} | {
    "adversary_pooled",
    "adversary_grid",
}
DGDIR = {f"{n}_{s}" for n in ("phase", "mixed", "phase_to_mixed", "mixed_to_phase") for s in "ab"}


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("id", IW, IW),
        ("protonce", IW, IW | {"prototype_a", "prototype_b"}),
        ("cds", IW | {"matching_a", "matching_b"}, IW | {"matching_a", "matching_b"}),
        ("pcs", {"prototype_a", "prototype_b", "matching_a", "matching_b"}, None),
        ("coda", {f"{n}_{s}" for n in ("self_matching", "alignment") for s in "ab"}, None),
        ("dgdir", DGDIR, DGDIR | CW),
        ("darl", IW | {"classifier_a", "classifier_b"}, None),
        ("brad", BRAD, None),
        ("dn2a", IW | {f"{n}_domain_{s}" for n in ("in", "cross") for s in "ab"}, None),
        ("ucdir-v1", IW, IW),
        ("ucdir-v2", IW, IW | CW),
        ("ucdir-v3", IW, IW | CW | {"self_entropy"}),
        ("ucdir", IW, IW | CW | {"self_entropy", "distance"}),
        ("ucdir-ot", IW, IW | CW | {"self_entropy", "distance"}),
    ],
)
def test_what_each_method_is_made_of(name: str, first: set[str], last: set[str] | None) -> None:
    assert set(terms_at(name, 0)) == first
    for term, (weight, value) in terms_at(name, 9).items():
        assert term in (last or first)
        assert weight > 0
        assert value.isfinite()
    assert set(terms_at(name, 9)) == (last or first)


def test_the_published_constants() -> None:
    def defaults(name: str) -> dict[str, Any]:
        kind = METHODS[name].params_type
        return kind(**({"clusters": 7} if "clusters" in kind.model_fields else {})).model_dump()

    assert {k: defaults("id")[k] for k in ("lr", "temperature", "bank_momentum", "weight_decay")} == {
        "lr": 0.03,
        "temperature": 0.07,
        "bank_momentum": 0.5,
        "weight_decay": 1e-4,
    }
    assert (defaults("protonce")["lr"], defaults("protonce")["temperature"]) == (0.03, 0.2)
    cds = defaults("cds")
    ours = [cds[name] for name in ("lr", "temperature", "nearest", "weight_decay", "epochs")]
    assert ours == [0.003, 0.1, 700, 5e-4, 7]
    pcs = defaults("pcs")
    assert (pcs["lr"], pcs["repeats"], pcs["kmeans_iterations"], pcs["cross_temperature"]) == (
        0.01,
        15,
        40,
        0.1,
    )
    variant = defaults("ucdir-ot")
    assert (variant["entropy_weight"], variant["distance_weight"]) == (0.01, 0.1)


def test_codas_constants_and_where_its_classifiers_begin() -> None:
    published = CodaParams()
    assert (published.lr, published.epochs, published.batch_size, published.bank_momentum) == (
        0.003,
        20,
        16,
        0.95,
    )
    assert (published.clusters, published.alignment_weight) == ((100, 200, 300, 400), 0.01)
    method = make("coda")
    assert isinstance(method, Coda)
    x = features(0), features(1, N - 5)
    options: dict[str, Any] = {"iterations": 20, "restarts": 1, "seed": 0, "max_points": 2000}
    common = kmeans(torch.cat(x), 8, **options).centroid_KD
    for classifiers, domain in zip(method.classifiers, x, strict=True):
        expected = kmeans(domain, 8, **options, initial_KD=common).centroid_KD
        assert torch.equal(classifiers[1], expected)  # type: ignore[index]
    # from the same beginning, and no iteration, both domains' would be equal: they name the same things
    still = [kmeans(d, 8, **{**options, "iterations": 0}, initial_KD=common).centroid_KD for d in x]
    assert torch.allclose(still[0], still[1], atol=1e-6)
    encoder = new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8), 0)
    method.build(encoder)
    groups = method.optimizer(encoder).param_groups
    assert groups[1]["lr_scale"] * method.lr_at(5, 0) == pytest.approx(1e-4)
    assert [group["weight_decay"] for group in groups] == [1e-5, 0]


def test_dgdirs_terms() -> None:
    published = DgdirParams(clusters=7)
    assert (published.lr, published.batch_size, published.temperature, published.cluster_weight) == (
        2e-4,
        32,
        0.2,
        0.1,
    )
    part = batch(2, True)
    terms = terms_at("dgdir", 9)
    banks = {"mixed": features(0), "phase": features(7)}
    for name, q, k, bank in (
        ("mixed", part.q_BD, part.k_BD, "mixed"),
        ("phase", part.phase_q_BD, part.phase_k_BD, "phase"),
        ("phase_to_mixed", part.phase_q_BD, part.k_BD, "phase"),
        ("mixed_to_phase", part.q_BD, part.phase_k_BD, "mixed"),
    ):
        weight, value = terms[f"{name}_a"]
        assert weight == 0.25
        assert torch.allclose(value, instance_value(q, k, part.slot_B, banks[bank], 0.2))
    both = torch.cat([features(9), features(10, N - 5)])
    clusters = kmeans(both, 4, iterations=20, restarts=5, seed=0, max_points=2000)
    label_B = clusters.label_N[part.slot_B]
    seen = [part.phase_pooled_BP, part.pooled_BP]
    expected = [prototype_contrast(x, label_B, clusters.centroid_KD, 1.0) for x in seen]
    weight, value = terms["cluster_a"]
    assert weight == pytest.approx(0.05)
    assert torch.allclose(value, torch.stack(expected).mean())
    method = make("dgdir")
    method.after_step((part, batch(4, True)))
    assert torch.equal(method.phase_banks[0].features_ND[0], part.phase_k_BD[4])  # type: ignore[attr-defined]
    assert torch.equal(method.banks[0].features_ND[0], part.k_BD[4])  # type: ignore[attr-defined]


def test_darl_mixes_its_domains_as_a_classifier_says() -> None:
    method = make("darl")
    part, other = batch(2, True), batch(4, True)
    terms = method.losses(0, (part, other))
    banks = [features(0), features(1, N - 5)]
    for bank, written in zip(banks, (part, other), strict=True):
        for place, slot in enumerate(written.slot_B.tolist()):
            bank[slot] = written.k_BD[place]
    share = method.classifier(part.q_BD).softmax(dim=1).detach()  # type: ignore[attr-defined]
    totals = Bank(banks[0]).log_total(part.q_BD, 0.2, part.slot_B), Bank(banks[1]).log_total(part.q_BD, 0.2)
    expected = mixed_contrast(part.q_BD, part.k_BD, torch.stack(totals, dim=1), share, 0.2)
    assert torch.allclose(terms["instance_a"].value, expected)
    # the classifier learns which domain is which, and moves no features
    weight = method.classifier.weight  # type: ignore[attr-defined]
    for value, unmoved in ((terms["classifier_a"].value, part.q_BD), (terms["instance_a"].value, weight)):
        (gradient,) = torch.autograd.grad(value, unmoved, retain_graph=True, allow_unused=True)
        assert gradient is None
    for value in (terms["classifier_a"].value, terms["classifier_b"].value):
        assert float(torch.autograd.grad(value, weight)[0].abs().sum()) > 0
    encoder = new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8), 0)
    trained = [p for group in method.optimizer(encoder).param_groups for p in group["params"]]
    assert any(p is weight for p in trained)


@pytest.mark.parametrize("among", [1, 3, 50])
def test_dn2a_trusts_neighbours_that_lead_back(among: int) -> None:
    first, second = Bank(features(0)), Bank(features(1, N - 5))
    slots = torch.arange(N)
    for bank in (first, second):
        near, trusted = locked_neighbours(slots, first, bank, among)
        there = bank.features_ND.double()
        for slot in range(N):
            x = first.features_ND[slot].double()
            similar = there @ x
            if bank is first:
                similar[slot] = -2
            assert int(near[slot]) == int(similar.argmax())
            back = first.features_ND.double() @ there[near[slot]]
            if bank is first:
                back[near[slot]] = -2
            closer = sum(float(s) > float(back[slot]) for s in back)
            assert bool(trusted[slot]) == (closer < among)
    if among == 50:
        assert trusted.all()


def test_dn2a_values() -> None:
    method = make("dn2a", neighbours=2, in_domain_weight=0.5)
    assert isinstance(method, Dn2a)
    part = batch(2, True)
    terms = method.losses(0, (part, batch(4, True)))
    assert [terms[f"{n}_a"].weight for n in ("instance", "in_domain", "cross_domain")] == [0.5, 0.25, 0.5]
    own, other = method.banks
    for name, bank in (("in_domain_a", own), ("cross_domain_a", other)):
        near, trusted = locked_neighbours(part.slot_B, own, bank, 2)
        values = [
            bank_discrimination(part.q_BD[i : i + 1], near[i : i + 1], bank, 0.2)
            for i in trusted.nonzero().flatten().tolist()
        ]
        assert len(values) > 0
        assert torch.allclose(terms[name].value, torch.stack(values).sum() / len(near))
    assert set(make("dn2a", neighbour_start=3).losses(2, (part, batch(4, True)))) == IW


def test_dn2a_sees_strongly_augmented_queries(pack: Path) -> None:
    """Its query's draws are stronger, its key's are those of every other method."""
    view = ViewParams(side=16)
    index = read_index(pack, "art")
    form = InputFormat(16)
    views = PictureViews([open_domain(pack, "art", index)] * 2, view, form, torch.device("cpu"))
    encoder = new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8), 0)
    slots = torch.arange(8), torch.arange(8)
    strong, plain = (
        METHODS[name].step_type(make(name), views, encoder, torch.device("cpu")).render(0, (0, slots))
        for name in ("dn2a", "darl")
    )
    assert not torch.allclose(strong.query, plain.query)
    assert strong.key is not None
    assert plain.key is not None
    assert torch.equal(strong.key, plain.key)
    spread = [
        (x.query.flatten(2).amax(dim=1) - x.query.flatten(2).amin(dim=1)).mean() for x in (strong, plain)
    ]
    assert float(spread[0]) < float(spread[1])  # half of them are grey
    assert stronger(view.augment).jitter == (0.8, 0.8, 0.8, 0.2)
    assert stronger(view.augment).blur_sigma == view.augment.blur_sigma


def test_id_and_cds_values() -> None:
    part = batch(2, False)
    terms = terms_at("id", 0)
    assert terms["instance_a"][0] == 0.5
    expected = bank_discrimination(part.q_BD, part.slot_B, Bank(features(0)), 0.07)
    assert torch.allclose(terms["instance_a"][1], expected)
    terms = terms_at("cds", 0)
    assert (terms["instance_b"][0], terms["matching_b"][0]) == (0.5, 1.0)
    expected = neighbour_entropy(part.q_BD, Bank(features(1, N - 5)), 0.1, 700)
    assert torch.allclose(terms["matching_a"][1], expected)


def test_protonce_writes_keys_and_uses_its_concentrations() -> None:
    method = make("protonce", clusters=[3, 5])
    both = (features(0), features(1, N - 5))
    method.start_epoch(5, both)
    part = batch(2, True)
    terms = method.losses(5, (part, batch(4, True)))
    bank = features(0)
    bank[part.slot_B] = part.k_BD
    bank[5] = part.k_BD[2]
    assert torch.allclose(
        terms["instance_a"].value, instance_value(part.q_BD, part.k_BD, part.slot_B, bank, 0.2)
    )
    values = []
    for number, k in enumerate((3, 5)):
        c = kmeans(both[0], k, iterations=20, restarts=5, seed=number, max_points=1000)
        phi = concentration(both[0], c.label_N, raw_centroids(both[0], c))
        phi = torch.where(phi > 0, phi, phi.max())
        low, high = phi.quantile(0.1), phi.quantile(0.9)
        phi = phi.clamp(float(low), float(high))
        phi = 0.2 * phi / phi.mean()
        values.append(prototype_contrast(part.q_BD, c.label_N[part.slot_B], c.centroid_KD, phi))
    assert torch.allclose(terms["prototype_a"].value, torch.stack(values).mean())


def test_concentration_is_mean_distance_over_log_size() -> None:
    x = features(0)
    clusters = kmeans(x, 4, iterations=5, restarts=1, seed=0, max_points=100)
    raw = raw_centroids(x, clusters)
    for centre in (clusters.centroid_KD, raw):
        phi = concentration(x, clusters.label_N, centre)
        for label in range(4):
            members = x[clusters.label_N == label]
            if len(members) > 1:
                distance = [float((m - centre[label]).norm()) for m in members]
                expected = sum(distance) / len(members) / math.log(len(members) + 10)
                assert float(phi[label]) == pytest.approx(expected, rel=1e-5)
    assert torch.allclose(raw[0], x[clusters.label_N == 0].mean(dim=0), atol=1e-6)


def test_clusters_of_one_are_the_loosest_for_pcl_and_the_tightest_for_pcs() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    x = features(0, 4)
    centre = torch.stack([x[:3].mean(dim=0), x[3]])
    phi = concentration(x, labels, centre)
    assert phi[1] == 0
    for name in ("protonce", "pcs"):
        method = make(name, clusters=N - 5, repeats=1) if name == "pcs" else make(name, clusters=N - 5)
        method.start_epoch(5, (features(0), features(1, N - 5)))
        alone = method.clusters[1][0].size_K == 1  # type: ignore[attr-defined]
        temperature = method.temperatures[1][0][alone]  # type: ignore[attr-defined]
        assert len(temperature)
        assert (temperature > 0).all()
        if name == "pcs":
            assert (temperature == 0.05).all()


@pytest.mark.parametrize("name", ["id", "cds", "pcs"])
def test_single_encoders_change_their_bank_after_the_step_alone(name: str) -> None:
    method = make(name)
    assert method.keyed is None
    before = features(0)
    method.start_epoch(0, (before, features(1, N - 5)))
    both = (batch(2, False), batch(4, False))
    method.losses(0, both)
    bank = method.banks[0].features_ND  # type: ignore[attr-defined]
    assert torch.equal(bank, before)
    method.after_step(both)
    for place, slot in enumerate(both[0].slot_B.tolist()):
        if slot != 5:  # twice in the batch: its last feature stays
            expected = normalize(0.5 * before[slot] + 0.5 * both[0].q_BD[place].detach(), dim=0)
            assert torch.allclose(bank[slot], expected)
    assert torch.allclose(bank[5], normalize(0.5 * before[5] + 0.5 * both[0].q_BD[2].detach(), dim=0))


def test_learning_rates() -> None:
    method = make("id", epochs=200, lr=1.0)
    assert [method.lr_at(e, 0) for e in (0, 119, 120, 159, 160)] == pytest.approx([1, 1, 0.1, 0.1, 0.01])
    assert make("cds", lr=0.3).lr_at(7, 70) == 0.3
    assert make("pcs", lr=1.0).lr_at(0, 5000) == pytest.approx(2**-0.75)
    assert make("protonce", lr=1.0, epochs=200).lr_at(100, 0) == pytest.approx(0.5)


def test_pcs_trains_the_head_faster_and_leaves_batch_norm_undecayed() -> None:
    encoder = new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8), 0)
    groups = make("pcs").optimizer(encoder).param_groups
    where = {id(p): group for group in groups for p in group["params"]}
    assert len(where) == len(list(encoder.parameters()))
    for name, parameter in encoder.named_parameters():
        group = where[id(parameter)]
        assert group["lr_scale"] == (1.0 if name.startswith("head.") else 0.1)
        norm = parameter.ndim == 1 and not name.startswith("head.")
        assert group["weight_decay"] == (0.0 if norm else 5e-4)
        assert group["nesterov"]


@pytest.mark.parametrize("name", sorted(METHODS))
def test_state_comes_back(name: str) -> None:
    method, batches = make(name), (batch(2, True), batch(4, True))
    method.start_epoch(9, (features(0), features(1, N - 5)))
    method.losses(9, batches)
    method.after_step(batches)
    other = make(name)
    before = other.state_dict()
    assert not same(method.state_dict()["banks"], before["banks"]), "or nothing is shown"
    other.load_state_dict(method.state_dict())
    assert same(other.state_dict(), method.state_dict())


def same(one: Any, other: Any) -> bool:
    """Whether two states hold the same numbers."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("how", ["elbow", "silhouette"])
@pytest.mark.parametrize("k", [3, 6, 12])
def test_the_number_of_clusters_is_found_where_they_are_clear(how: str, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    centres = torch.eye(16)[:k]
    points = centres.repeat_interleave(30, dim=0)
    points = normalize(points + 0.05 * torch.randn(points.shape, generator=generator), dim=1)
    chosen = choose_clusters(points, how, seed=0)
    assert abs(chosen - k) <= max(1, k // 5)


def test_a_chosen_k_is_kept_and_may_differ_between_domains() -> None:
    method = make("ucdir", clusters="elbow")
    figures = method.start_epoch(9, (features(0), features(1, N - 5)))
    chosen = list(method.chosen)  # type: ignore[attr-defined]
    assert [figures["cluster/count_a"], figures["cluster/count_b"]] == [float(counts[0]) for counts in chosen]
    method.start_epoch(9, (features(5), features(6, N - 5)))
    assert method.chosen == chosen  # type: ignore[attr-defined]
    terms = method.losses(9, (batch(2, True), batch(4, True)))
    assert all(term.value.isfinite() for term in terms.values())


@pytest.mark.parametrize("name", ["ucdir", "protoot", "protonce", "uem"])
def test_warm_clusters_go_on_and_come_back_after_a_kill(name: str) -> None:
    """Between restarts the last epoch's clusters, with the features as they are now."""
    both = [(features(i), features(i + 1, N - 5)) for i in (0, 10, 20)]
    options = {"kmeans_warm": 2, "kmeans_iterations": 1}

    def labels(method: Any) -> Tensor:
        return torch.cat([label_N for side in method.labels_before for label_N in side])

    undisturbed, killed = make(name, **options), make(name, **options)
    undisturbed.start_epoch(8, both[0])
    killed.start_epoch(8, both[0])
    resumed = make(name, **options)
    resumed.load_state_dict(killed.state_dict())
    figures = [method.start_epoch(9, both[1]) for method in (undisturbed, resumed)]
    assert figures[0] == figures[1]
    assert torch.equal(labels(undisturbed), labels(resumed))
    # without what was before it would have begun anew
    fresh = make(name, **options)
    if name in ("uem", "protoot"):  # they cluster their banks, which are alike here
        fresh.load_state_dict({"banks": killed.state_dict()["banks"]})
    fresh.start_epoch(9, both[1])
    assert not torch.equal(labels(fresh), labels(undisturbed))
    undisturbed.start_epoch(10, both[2])
    fresh.start_epoch(10, both[2])
    assert torch.equal(labels(fresh), labels(undisturbed))


def test_keys_without_effect_are_refused() -> None:
    for name in ("pcs", "dgdir"):
        with pytest.raises(ValueError, match="kmeans_warm"):
            make(name, kmeans_warm=2)
    for name, key in (("id", "key_momentum"), ("cds", "retrieve_with"), ("pcs", "key_norm_groups")):
        with pytest.raises(ValueError, match=key):
            make(name, **{key: 0.5})
    for key in ("confidence", "distance_temperature"):
        with pytest.raises(ValueError, match=key):
            make("ucdir-ot", **{key: 0.5})
    with pytest.raises(ValueError, match="warmup 10 leaves none of 10 epochs"):
        make("protonce", warmup=10)


def test_a_momentum_by_epochs_moves_as_far_as_the_published_one() -> None:
    """m^(epochs) is what a moving average keeps of its beginning, whatever the steps of an epoch."""
    for name, key, published, of_epochs in (
        ("ucdir", "key_momentum", 0.999, 200),
        ("protoot", "key_momentum", 0.999, 200),
        ("uem", "bank_momentum", 0.99, 150),
        ("cds", "bank_momentum", 0.5, 7),
        ("coda", "bank_momentum", 0.95, 20),
    ):
        kind = METHODS[name].params_type
        more = {"clusters": 4} if "clusters" in kind.model_fields else {}
        for epochs in (5, of_epochs, 400):
            params = checked(kind, {"epochs": epochs, key: "by-epochs", **more}, "params.yaml")
            assert getattr(params, key) ** epochs == pytest.approx(published**of_epochs)
        for fault, named in (({"epochs": 0, key: "by-epochs"}, "epochs"), ({key: "by-steps"}, key)):
            with pytest.raises(UserError, match=named):
                checked(kind, {**more, **fault}, "params.yaml")
