"""Blocks of the network and of the weights that training starts from."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from ucir.config.base import Block, Count, Positive

DIGEST = r"^(md5|sha256):[0-9a-f]{6,64}$"


class EncoderParams(Block):
    """The network: trunk, head, L2-normalised output."""

    trunk: dict[str, Any] = Field(
        default_factory=lambda: {"torchvision": "resnet50"}, min_length=1, max_length=1
    )
    """Its kind, one of :mod:`ucir.models.trunks`, with the kind's options."""
    feature_dim: Annotated[int, Field(ge=2, le=2048)] = 128
    head: Literal["moco", "residual"] = "moco"
    """``moco``: two random layers, as MoCo v2; ``residual``: the PCA of features centred by domain, and a
    trained part beside it, for trunks whose features are good already."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """What convolutions and products are computed in. ``bfloat16``: by torch's autocast, with weights, losses
    and features in float32; two to three times faster on a GPU or a processor that has it (``lscpu`` lists
    avx512_bf16 or amx_bf16), ten times slower on another."""
    compiled: bool = False
    """Whether ``torch.compile`` fuses what a training's steps compute: for GPUs. It takes a C++ compiler and
    a minute at first, and on a processor gains nothing. Results differ by rounding."""

    @property
    def trunk_name(self) -> str:
        """For people: ``resnet50``, ``convnet``."""
        ((kind, options),) = self.trunk.items()
        if isinstance(options, dict):
            options = options.get("name", kind)
        return str(options)


class PretrainParams(Block):
    """Label-free start on the union of the domains: in-batch contrast of two views (SimCLR's loss)."""

    steps: Count = 400
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    temperature: Positive = 0.2
    seed: Annotated[int, Field(ge=0)] = 0


class StartParams(Block):
    """Where training starts, in one of four ways; and what is trained."""

    encoder: EncoderParams = EncoderParams()
    checkpoint: str | None = None
    """A file in MoCo v2's published layout, or its http(s) address."""
    weights: str | None = None
    """Of a ``timm`` trunk: ``embedded`` (tf_efficientnet_lite0's, learnt *with* ImageNet's labels, on this
    machine already), ``hub`` (timm's, fetched once), or a safetensors or torch file, or a folder with one."""
    digest: Annotated[str | None, Field(pattern=DIGEST)] = None
    """Of the checkpoint or the weights' file, whole or its beginning: ``md5:a04e12f8``."""
    torchvision: str | None = None
    """torchvision's weights for the trunk by name, e.g. IMAGENET1K_V2: learnt *with* ImageNet's labels."""
    pretrain: PretrainParams | None = None
    """A label-free pretraining of our own."""
    trained: Literal["all", "last", "head"] = "all"
    """Everything; the trunk's last stage and the head; or the head on stored features of the trunk."""
    views: Annotated[int, Field(ge=1, le=64)] = 6
    """Random views of each picture whose features are stored, where the head alone is trained."""

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        ways = (self.checkpoint, self.weights, self.torchvision, self.pretrain)
        if sum(way is not None for way in ways) != 1:
            raise ValueError(
                "give one of 'checkpoint' (a file or an address), 'weights' (embedded, hub or a file), "
                "'torchvision' (a name) and 'pretrain' (a block)"
            )
        if self.digest and not (self.checkpoint or self.weights):
            raise ValueError("digest: belongs to 'checkpoint' or 'weights'")
        if self.weights and "timm" not in self.encoder.trunk:
            raise ValueError("weights: belong to a timm trunk, e.g. trunk: {timm: tf_efficientnet_lite0}")
        if self.pretrain and (self.trained != "all" or self.encoder.head != "moco"):
            raise ValueError(
                "pretrain: trains all of the trunk and a moco head: leave out 'trained' and 'head'"
            )
        return self
