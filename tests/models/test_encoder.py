"""Encoder, its moving average, batch statistics, checkpoints."""

from __future__ import annotations

import argparse
import os
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from ucir.config.model import EncoderParams
from ucir.errors import UserError
from ucir.models import trunks
from ucir.models.checkpoints import (
    load_encoder,
    load_state,
    load_torchvision,
    save_atomically,
    save_encoder,
)
from ucir.models.encoder import Encoder, key_encoder_of, new_encoder, update_key_encoder
from ucir.models.norm import GroupedBatchNorm2d
from ucir.models.trunk import StoredTrunk, check_trunk
from ucir.models.trunks.torchvision import NAMES

TINY = EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8)
IMAGES = torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("trunk", "side", "positions"),
    [
        ({"convnet": {"width": 4}}, 16, 2 * 2),
        ({"torchvision": "resnet18"}, 32, 1),
        ({"torchvision": "resnet18"}, 64, 2 * 2),
        ({"timm": "tf_efficientnet_lite0"}, 64, 2 * 2),
        ({"timm": "vit_pwee_patch16_reg1_gap_256"}, 64, 4 * 4),
        ({"timm": "swin_tiny_patch4_window7_224"}, 224, 7 * 7),
    ],
)
def test_features_at_positions_are_what_is_pooled(trunk: dict[str, Any], side: int, positions: int) -> None:
    encoder = new_encoder(EncoderParams(trunk=trunk, feature_dim=8), 0).eval()
    x = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(0))
    out, pooled, grid = encoder(x, "grid")
    assert torch.equal(torch.cat([out, pooled], dim=1), encoder(x, "both"))
    assert grid.shape == (2, positions, encoder.pooled_dim)
    assert torch.allclose(grid.norm(dim=2), torch.ones(2, positions), atol=1e-5)
    before, raw = encoder.trunk.grid(x)
    if "vit" not in str(trunk):  # which normalises after pooling
        assert torch.allclose(raw.mean(dim=1), before, atol=1e-4)
    assert before.shape[1] == encoder.pooled_dim


def test_a_trunk_without_features_at_positions_says_so() -> None:
    for trunk, fault in (
        ({"timm": "mobilenetv3_small_050"}, "MobileNetV3 has 288 features at a position and 1024 pooled"),
        (None, "Identity has no features at positions"),
    ):
        given = {"trunk": StoredTrunk(8)} if trunk is None else {}
        encoder = new_encoder(EncoderParams(trunk=trunk or {"convnet": {"width": 4}}), 0, **given).eval()
        with pytest.raises(UserError, match=fault):
            encoder(torch.randn(2, 3, 64, 64), "grid")


@pytest.mark.parametrize(
    "trunk", [{"convnet": {"width": 8}}, {"torchvision": "resnet18"}, {"torchvision": "resnet50"}]
)
def test_features_are_unit_vectors(trunk: dict[str, Any]) -> None:
    params = EncoderParams(trunk=trunk, feature_dim=16)
    features = new_encoder(params, 0)(torch.randn(2, 3, 32, 32))
    assert features.shape == (2, 16)
    assert torch.allclose(features.norm(dim=1), torch.ones(2), atol=1e-6)


def test_bfloat16_is_near_and_its_features_and_gradients_are_single_precision() -> None:
    x = torch.randn(8, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    exact, coarse = (
        new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8, precision=precision), 0)
        for precision in ("float32", "bfloat16")
    )
    assert coarse(x).dtype == torch.float32
    assert coarse(x, pooled="both").shape == exact(x, pooled="both").shape
    assert torch.nn.functional.cosine_similarity(coarse(x), exact(x)).min() > 0.99
    assert not torch.equal(coarse(x), exact(x))
    coarse(x).sum().backward()
    assert {p.grad.dtype for p in coarse.parameters() if p.grad is not None} == {torch.float32}


def test_the_seed_alone_decides_the_weights() -> None:
    torch.manual_seed(7)
    one = new_encoder(TINY, 0).state_dict()
    torch.manual_seed(8)
    two, three = new_encoder(TINY, 0).state_dict(), new_encoder(TINY, 1).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert not torch.equal(one["head.0.weight"], three["head.0.weight"])


def test_the_key_encoder_moves_its_parameters_and_keeps_its_own_statistics() -> None:
    query = new_encoder(TINY, 0)
    key = key_encoder_of(query)
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(1)
    for buffer in query.buffers():
        buffer += 5
    before = [p.clone() for p in key.parameters()]
    update_key_encoder(key, query, 0.9)
    for old, new, target in zip(before, key.parameters(), query.parameters(), strict=True):
        assert torch.allclose(new, 0.9 * old + 0.1 * target, atol=1e-6)
        assert not new.requires_grad
    for old_buffer, buffer in zip(new_encoder(TINY, 0).buffers(), key.buffers(), strict=True):
        assert torch.equal(old_buffer, buffer)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_groups_of_the_batch_have_their_own_statistics(memory_format: torch.memory_format) -> None:
    x = torch.randn(6, 5, 3, 3).contiguous(memory_format=memory_format)
    ours, halves = GroupedBatchNorm2d(5, groups=2), [nn.BatchNorm2d(5) for _ in range(2)]
    out = ours(x)
    expected = torch.cat([norm(part) for norm, part in zip(halves, x.chunk(2), strict=True)])
    assert torch.allclose(out, expected, atol=1e-5)
    for buffer in ("running_mean", "running_var"):
        mean = (getattr(halves[0], buffer) + getattr(halves[1], buffer)) / 2
        assert torch.allclose(getattr(ours, buffer), mean, atol=1e-6)
    ours.eval()
    plain = nn.BatchNorm2d(5)
    plain.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), plain.eval()(x))


@pytest.mark.parametrize("prefix", ["module.encoder_q.", "encoder_q."])
def test_a_checkpoint_comes_back_whole_whatever_its_prefix(tmp_path: Path, prefix: str) -> None:
    encoder = new_encoder(TINY, 0)
    encoder(IMAGES)  # moves the batch statistics
    save_encoder(encoder, tmp_path / "a.pt")
    state = torch.load(tmp_path / "a.pt")["state_dict"]
    state = {prefix + key.removeprefix("module.encoder_q."): value for key, value in state.items()}
    state["module.queue"] = torch.zeros(3)  # what MoCo's file holds besides is passed over
    torch.save({"state_dict": state, "epoch": 800}, tmp_path / "b.pt")
    other = new_encoder(TINY, 1)
    load_encoder(other, tmp_path / "b.pt")
    assert torch.equal(other.eval()(IMAGES), encoder.eval()(IMAGES))


def test_the_checkpoint_has_moco_v2s_names(tmp_path: Path) -> None:
    save_encoder(new_encoder(EncoderParams(), 0), tmp_path / "moco.pt")
    state = torch.load(tmp_path / "moco.pt")["state_dict"]
    shapes = {key: tuple(value.shape) for key, value in state.items()}
    assert shapes["module.encoder_q.conv1.weight"] == (64, 3, 7, 7)
    assert shapes["module.encoder_q.layer4.2.bn3.running_var"] == (2048,)
    assert shapes["module.encoder_q.fc.0.weight"] == (2048, 2048)
    assert shapes["module.encoder_q.fc.2.bias"] == (128,)


def test_unfit_checkpoints_are_named_with_what_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"

    def told(content: object) -> str:
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif content is not None:
            torch.save(content, path)
        with pytest.raises(UserError) as caught:
            load_encoder(new_encoder(TINY, 0), path)
        assert str(path) in str(caught.value)
        return str(caught.value)

    assert "no such checkpoint" in told(None)
    assert "unreadable" in told(b"garbage")
    assert "unreadable" in told(b"")
    assert "holds no tensors by name" in told({"model": {}})
    assert "no key begins with" in told({"state_dict": {"backbone.conv1.weight": torch.zeros(1)}})
    state = {f"encoder_q.{k}": v for k, v in new_encoder(TINY, 0).moco_state().items()}
    del state["encoder_q.fc.2.bias"]
    assert "fc.2.bias is missing" in told({"state_dict": state})
    state["encoder_q.fc.2.bias"] = torch.zeros(3)
    assert "fc.2.bias has shape (3,), not (8,)" in told({"state_dict": state})
    state["encoder_q.fc.2.bias"] = torch.full((8,), torch.nan)
    assert "fc.2.bias holds values that are not finite" in told({"state_dict": state})
    assert "fc.2.bias is missing" in told({"state_dict": {**state, "encoder_q.fc.2.bias": [0.0] * 8}})


def test_writing_is_all_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    save_atomically({"x": 1}, path)
    with pytest.raises(AttributeError):
        save_atomically({"x": lambda: 0}, path)
    assert torch.load(path) == {"x": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_torchvisions_weights_fill_the_trunk_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.models import ResNet18_Weights, resnet18

    params = EncoderParams(trunk={"torchvision": "resnet18"})
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))  # torch's cache, where the file would be kept
    url = ResNet18_Weights.IMAGENET1K_V1.url
    cached = tmp_path / "hub/checkpoints" / url.rpartition("/")[2]
    cached.parent.mkdir(parents=True)
    torch.save(resnet18().state_dict(), cached)
    encoder = new_encoder(params, 0)
    before = encoder.moco_state()["fc.0.weight"].clone()
    load_torchvision(encoder, "IMAGENET1K_V1")
    given = torch.load(cached)
    for key, value in encoder.moco_state().items():
        assert torch.equal(value, before if key == "fc.0.weight" else given.get(key, value))
    with pytest.raises(UserError, match="resnet18 has no weights 'IMAGENET1K_V9'; did you mean"):
        load_torchvision(encoder, "IMAGENET1K_V9")
    with pytest.raises(UserError, match="convnet has no weights 'IMAGENET1K_V1'; there is none"):
        load_torchvision(new_encoder(TINY, 0), "IMAGENET1K_V1")
    cached.unlink()

    def offline(*arguments: object, **options: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr("torch.hub.download_url_to_file", offline)
    with pytest.raises(UserError, match=r"no route; or put the file into .*checkpoints yourself"):
        load_torchvision(encoder, "IMAGENET1K_V1")


@pytest.mark.parametrize("name", NAMES)
def test_every_network_that_may_be_named_is_there(name: str) -> None:
    with torch.device("meta"):  # shapes alone
        encoder = Encoder(EncoderParams(trunk={"torchvision": name}))
    assert encoder.head(torch.zeros(1, encoder.pooled_dim, device="meta")).shape == (1, 128)


def test_pooled_features_are_what_goes_into_the_head() -> None:
    encoder = new_encoder(TINY, 0).eval()
    pooled, both = encoder(IMAGES, pooled=True), encoder(IMAGES, pooled="both")
    assert torch.allclose(pooled.norm(dim=1), torch.ones(len(IMAGES)))
    assert pooled.shape[1] == encoder.pooled_dim
    plain = encoder.trunk(IMAGES)
    assert torch.allclose(pooled, torch.nn.functional.normalize(plain, dim=1), atol=1e-6)
    head = torch.nn.functional.normalize(encoder.head(plain), dim=1)
    assert torch.equal(both, torch.cat([head, pooled], dim=1))


@pytest.mark.parametrize(
    ("trunk", "fault"),
    [
        ({"convnett": {}}, "t: no trunk of kind 'convnett'; did you mean 'convnet'?"),
        ({"torchvision": "resnet5"}, "t.torchvision = 'resnet5': did you mean 'resnet50'?"),
        ({"convnet": {"wide": 4}}, "params.yaml: t.convnet.wide: unknown key; did you mean 'width'?"),
    ],
)
def test_a_wrong_trunk_is_named(trunk: dict[str, Any], fault: str) -> None:
    with pytest.raises(UserError) as caught:
        check_trunk(trunk, "t")
    assert str(caught.value) == fault


def test_a_kind_of_trunk_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "toy.py").write_text(
        "from torch import nn\n"
        "from ucir.data.augment import InputFormat\n"
        "from ucir.models.trunk import Trunk\n"
        "def options(given, where):\n"
        "    return int(given)\n"
        "def build(side, norm):\n"
        "    net = nn.Sequential(nn.AdaptiveAvgPool2d(side), nn.Flatten())\n"
        "    return Trunk(net, 3 * side * side, InputFormat(16, (0.5,) * 3, (0.5,) * 3, 'bicubic'))\n"
    )
    monkeypatch.setattr(trunks, "__path__", [*trunks.__path__, str(tmp_path)])
    encoder = new_encoder(EncoderParams(trunk={"toy": 2}, feature_dim=8), 0)
    assert encoder(IMAGES).shape == (6, 8)
    assert encoder.form.mean == (0.5, 0.5, 0.5)
    save_encoder(encoder, tmp_path / "toy.pt")
    load_encoder(new_encoder(encoder.params, 1), tmp_path / "toy.pt")


class Settings:
    """Of somebody's training script; to be unpickled it would have to be imported."""

    def __init__(self) -> None:
        self.lr = 0.03


class Hostile:
    def __reduce__(self) -> Any:
        return os.mkdir, ("hacked",)


@pytest.mark.parametrize("prefix", ["encoder_q.", "model.module.encoder_q.", "module.encoder_q._orig_mod."])
@pytest.mark.parametrize("zipped", [True, False])
def test_a_training_scripts_objects_beside_the_weights_are_passed_over(
    tmp_path: Path, prefix: str, zipped: bool
) -> None:
    encoder = new_encoder(TINY, 0)
    state = {prefix + k: v for k, v in encoder.moco_state().items() if "num_batches" not in k}
    tensors: dict[Any, Any] = {**state, "queue_ptr": torch.zeros(1), 7: torch.zeros(1)}
    content = {
        "state_dict": tensors,
        "args": argparse.Namespace(lr=0.03, betas=(0.9, 0.99)),
        "settings": Settings(),
        "best": np.float64(0.7),
        "when": datetime(2024, 1, 1),
        "where": Path("x"),
    }
    torch.save(content, tmp_path / "x.pth", _use_new_zipfile_serialization=zipped)
    other = new_encoder(TINY, 1)
    assert load_encoder(other, tmp_path / "x.pth")
    assert torch.equal(other.eval()(IMAGES), encoder.eval()(IMAGES))


def test_safetensors_and_checkpoints_without_a_head(tmp_path: Path) -> None:
    encoder, other = new_encoder(TINY, 0), new_encoder(TINY, 1)
    state = {f"encoder_q.{k}": v for k, v in encoder.moco_state().items() if not k.startswith("fc.")}
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"fc.0.weight is missing"):
        load_encoder(other, tmp_path / "x.safetensors")
    assert not load_encoder(other, tmp_path / "x.safetensors", head_optional=True)
    mixed = other.moco_state()
    assert torch.equal(mixed["blocks.0.weight"], encoder.moco_state()["blocks.0.weight"])
    assert not torch.equal(mixed["fc.0.weight"], encoder.moco_state()["fc.0.weight"])


def test_code_in_a_checkpoint_is_never_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {}, "x": Hostile()}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"holds more than weights \(\w+.mkdir\), which is not read"):
        load_state(tmp_path / "x.pth")
    assert not (tmp_path / "hacked").exists()
