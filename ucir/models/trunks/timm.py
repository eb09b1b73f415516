"""Any of timm's networks by its name there: ``trunk: {timm: vit_small_patch14_dinov2.lvd142m}``.

``trunk: {timm: {name: …, pool: token}}`` pools otherwise than timm would. DINOv3 is pooled by its class
token, as its authors do, where timm takes the average. CLIP's image towers end before the projection into
CLIP's space.
"""

from __future__ import annotations

from contextlib import suppress
from functools import cache, partial
from typing import Any

from pydantic import model_validator
from torch import Tensor

from ucir.config.base import PARAMS_FILE, Block, checked
from ucir.data.augment import InputFormat
from ucir.errors import UserError, nearest
from ucir.models.norm import GroupedBatchNorm2d, group_batch_norms
from ucir.models.trunk import Trunk

LAYER_DECAY = 0.75
"""Of transformers, as timm and BEiT fine-tune them."""


class Options(Block):
    """``trunk.timm``."""

    name: str
    """timm's, with the tag of its weights after a dot."""
    pool: str | None = None
    """timm's ``global_pool``: avg, token, map …; None = as the authors of the weights do."""

    @model_validator(mode="before")
    @classmethod
    def _a_name_alone(cls, given: Any) -> Any:
        return {"name": given} if isinstance(given, str) else given


def options(given: Any, where: str) -> Options:
    """The checked block.

    Raises:
        UserError: timm has no such network, or no weights of such a tag; an unknown key.
    """
    import timm

    block = checked(Options, given, PARAMS_FILE, where)
    architecture, _, tag = block.name.partition(".")
    if not timm.is_model(architecture):
        raise UserError(
            f"{where} = {block.name!r}: timm has no such network; {nearest(architecture, timm.list_models())}"
        )
    tags = _tags(architecture)
    if tag and tag not in tags:
        raise UserError(
            f"{where} = {block.name!r}: timm knows no weights {tag!r} of {architecture}; {nearest(tag, tags)}"
        )
    return block


@cache  # a tenth of a second, and asked for at every turn
def _tags(architecture: str) -> list[str]:
    import timm

    return [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]


def build(options: Options, norm: partial[GroupedBatchNorm2d]) -> Trunk:
    """The network, randomly initialised, without its classifier.

    Raises:
        UserError: it cannot be pooled so.
    """
    import timm
    from timm.models import group_parameters

    pool = options.pool or ("token" if "dinov3" in options.name and options.name.startswith("vit") else None)
    given: dict[str, Any] = {"pretrained": False, "num_classes": 0}
    if pool:
        given["global_pool"] = pool
    try:
        net = timm.create_model(options.name, **given)
        if net.pretrained_cfg.get("fixed_input_size"):
            # its weights are for one size: positions are interpolated for others
            with suppress(TypeError):  # of a family that cannot
                net = timm.create_model(options.name, **given, dynamic_img_size=True, dynamic_img_pad=True)
    except (AssertionError, RuntimeError, ValueError, KeyError) as error:
        raise UserError(f"trunk.timm: {options.name} with pool: {pool}: {error}") from None
    config = timm.data.resolve_model_data_config(net)
    form = InputFormat(
        side=config["input_size"][1],
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
        interpolation="bilinear" if config["interpolation"] == "bilinear" else "bicubic",
    )
    group_batch_norms(net, norm.keywords.get("groups", 1))
    groups = group_parameters(net, net.group_matcher(coarse=True))
    stages = {name: number for number, names in groups.items() for name in names}
    has_batch_norm = any(isinstance(module, GroupedBatchNorm2d) for module in net.modules())
    is_transformer = hasattr(net, "blocks") and not has_batch_norm
    layer_decay = LAYER_DECAY if is_transformer else 1.0
    return Trunk(net, net.head_hidden_size, form, stages, layer_decay, at_positions)


def at_positions(net: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pooled features, and (B, P, h, w), or tokens (B, L, P) without the class token and registers."""
    grid = net.forward_features(x)
    pooled_BP = net.forward_head(grid)
    if grid.ndim == 3:
        return pooled_BP, grid[:, getattr(net, "num_prefix_tokens", 0) :]
    return pooled_BP, grid.permute(0, 3, 1, 2) if getattr(net, "output_fmt", "") == "NHWC" else grid
