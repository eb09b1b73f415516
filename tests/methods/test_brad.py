"""BrAD: pictures and drawings of their edges."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.steps import B, N, batch, features, make
from tests.trainings import ENCODER, training
from ucir.data.augment import normalised
from ucir.data.batches import seeded
from ucir.data.edges import edge_views
from ucir.methods.brad import Brad, BradParams
from ucir.models.encoder import new_encoder


def test_brads_terms() -> None:
    published = BradParams()
    ours = [
        getattr(published, name) for name in ("epochs", "batch_size", "lr", "temperature", "key_momentum")
    ]
    assert ours == [300, 144, 0.03, 0.2, 0.999]
    method = make("brad")
    assert isinstance(method, Brad)
    method.start_epoch(0, (features(0), features(1, N - 5)))
    both = part, other = batch(2, True), batch(4, True)
    terms = method.losses(0, both)
    rows = torch.cat([features(0), features(7)]).double()
    for name, q, k in (
        ("picture_to_edges", part.q_BD, part.edge_k_BD),
        ("edges_to_picture", part.edge_q_BD, part.k_BD),
    ):
        expected = 0.0
        for i, slot in enumerate(part.slot_B.tolist()):
            negatives = [row for n, row in enumerate(rows) if n % N != slot]
            positive = float(torch.exp(q[i].detach().double() @ k[i].double() / 0.2))
            total = positive + sum(float(torch.exp(q[i].detach().double() @ row / 0.2)) for row in negatives)
            expected -= math.log(positive / total) / len(part.slot_B)
        assert terms[f"{name}_a"].weight == 0.25
        assert terms[f"{name}_a"].value.item() == pytest.approx(expected, rel=1e-5)

    # the discriminator learns which domain edges are of, and the encoder the opposite: plain gradients
    # of the same dropout
    kept = seeded(0, 0, 0)
    x = torch.cat([part.edge_pooled_BP, other.edge_pooled_BP]).detach().double().requires_grad_(True)
    domain = torch.tensor([0] * B + [1] * B)
    h, layers = x, copy.deepcopy(method.discriminator).double()
    for layer in layers:
        if isinstance(layer, nn.Dropout):
            h = h * (torch.rand(h.shape, generator=kept) >= 0.25) / 0.75
        else:
            h = layer(h)
    plain = F.cross_entropy(h, domain)
    value = terms["adversary_pooled"].value
    assert value.item() == pytest.approx(plain.item(), rel=1e-5)
    gradient = torch.autograd.grad(plain, [x, *layers.parameters()])
    trained = [part.edge_pooled_BP, other.edge_pooled_BP, *method.discriminator.parameters()]
    first, second, *weights = torch.autograd.grad(value, trained)
    assert torch.allclose(torch.cat([first, second]), -gradient[0].float(), atol=1e-7)
    for ours_, expected_ in zip(weights, gradient[1:], strict=True):
        assert torch.allclose(ours_, expected_.float(), atol=1e-6)
    grid = terms["adversary_grid"].value
    assert float(torch.autograd.grad(grid, part.edge_grid_BLP)[0].abs().sum()) > 0

    # one that is hardly ever right is not worked against
    never = make("brad", adversary_from=1.0)
    never.start_epoch(0, (features(0), features(1, N - 5)))
    value = never.losses(0, both)["adversary_pooled"].value
    assert not torch.autograd.grad(value, part.edge_pooled_BP)[0].any()

    method.after_step(both)
    assert method.edge_banks is not None
    assert torch.equal(method.edge_banks[0].features_ND[0], part.edge_k_BD[4])
    assert torch.equal(method.banks[1].features_ND[30], other.k_BD[5])
    encoder = new_encoder(ENCODER, 0)
    groups = method.optimizer(encoder).param_groups
    assert len(groups[1]["params"]) == 8


def test_brad_sees_pictures_and_the_edges_of_other_crops(pack: Path) -> None:
    run = training(pack, None, name="brad")
    step = run.step
    rendered = step.render(0, (0, (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]))))
    form = run.query.form
    for views in (rendered.query, rendered.key):
        assert views is not None
        assert views.shape[0] == 12
    pictures, edges = rendered.query[:6], rendered.query[6:]
    std = torch.tensor(form.std)[:, None, None]
    drawn = edges * std + 0.5
    assert torch.allclose(drawn, drawn.round(), atol=1e-6), "white or black"
    assert torch.allclose(drawn, drawn[:, :1].expand(-1, 3, -1, -1), atol=1e-6)
    assert not torch.allclose(edges, edge_views(pictures, form, 1.0)), "of another crop"
    assert pictures.unique().numel() > 100
    assert rendered.key is not None
    keys = torch.empty_like(rendered.key)
    keys[rendered.shuffle] = rendered.key
    assert torch.allclose((keys[6:] * std).abs(), torch.tensor(0.5), atol=1e-6)
    batches = step.forward(rendered)
    assert [part.edge_grid_BLP.shape[1:] for part in batches] == [torch.Size([4, 32])] * 2
    for part in batches:
        assert torch.allclose(part.edge_pooled_BP.norm(dim=1), torch.ones(3), atol=1e-5)


def test_edges_are_where_a_picture_changes() -> None:
    form = new_encoder(ENCODER, 0).form
    pixels = torch.zeros(2, 3, 16, 16)
    pixels[0, :, :, 8:] = 1
    edges = edge_views(normalised(pixels, form), form, 1.0)
    drawn = edges * torch.tensor(form.std)[:, None, None] + 0.5
    assert drawn[0, 0, 8].round().nonzero().flatten().tolist() == [7, 8], "either side of the border"
    assert not drawn[1].round().any()
