"""A trunk on ONNX Runtime computes what torch computes, or torch does."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ucir.config.model import EncoderParams
from ucir.models import runtime
from ucir.models.embedding import pooled_features
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.runtime import CompiledTrunk, compiled


def encoder_of(trunk: dict[str, object]) -> Encoder:
    encoder = new_encoder(EncoderParams(trunk=trunk, feature_dim=8, head="residual"), 0).eval()
    with torch.no_grad():
        for buffer in encoder.trunk.buffers():  # batch statistics that do something
            if buffer.is_floating_point():
                buffer.add_(0.1)
    return encoder


@pytest.mark.parametrize(
    ("trunk", "side"),
    [
        ({"convnet": {"width": 4}}, 16),
        ({"timm": "resnet10t"}, 32),
        ({"timm": "test_vit"}, 160),
        ({"timm": "test_convnext"}, 64),
    ],
)
def test_features_are_those_of_torch(trunk: dict[str, object], side: int) -> None:
    encoder = encoder_of(trunk)
    fast, reason = compiled(encoder, side)
    assert reason == ""
    assert isinstance(fast.trunk, CompiledTrunk)
    assert (fast.pooled_dim, fast.form) == (encoder.pooled_dim, encoder.form)
    parts = torch.randn(40, 3, side, side).split(8)
    with torch.no_grad(), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda x: pooled_features(fast, x), parts))  # type: ignore[no-untyped-call]
        for x, pooled in zip(parts, found, strict=True):
            expected = encoder.trunk(x)
            assert (pooled - expected).abs().max() < 1e-5 * expected.abs().max().clamp(min=1)
            for domain_B in (None, torch.ones(8, dtype=torch.int64)):
                assert torch.allclose(fast(x, False, domain_B), encoder(x, False, domain_B), atol=1e-5)


def test_where_it_cannot_torch_computes_and_the_reason_is_told(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    # its positions are interpolated by an operation that the exporter does not know
    vit = encoder_of({"timm": {"name": "vit_tiny_patch16_224.augreg_in21k_ft_in1k"}})
    monkeypatch.setattr(vit.trunk, "forward", lambda x: torch.linalg.eigvals(x[:, 0]).real)
    same, reason = compiled(vit, 16)
    assert same is vit
    assert "has no form for ONNX Runtime" in reason
    assert "\n" not in reason
    assert "graph(" not in capfd.readouterr().out, "the exporter prints whole graphs"
    encoder = encoder_of({"convnet": {"width": 4}})
    other = runtime._graph(encoder_of({"convnet": {"width": 4}}).trunk, 16)
    with torch.no_grad():
        next(encoder.trunk.parameters()).mul_(1.01)
    monkeypatch.setattr(runtime, "_graph", lambda trunk, side: other)
    same, reason = compiled(encoder, 16)
    assert same is encoder
    assert "differs by" in reason
