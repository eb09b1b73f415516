"""Blocks of the network and of the weights that training starts from."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from ucir.config.base import Block, Count, Positive

DIGEST = r"^(md5|sha256):[0-9a-f]{6,64}$"


class EncoderParams(Block):
    """The network: trunk, two-layer head as in MoCo v2, L2-normalised output."""

    trunk: dict[str, Any] = Field(
        default_factory=lambda: {"torchvision": "resnet50"}, min_length=1, max_length=1
    )
    """Its kind, one of :mod:`ucir.models.trunks`, with the kind's options."""
    feature_dim: Annotated[int, Field(ge=2, le=2048)] = 128

    @property
    def trunk_name(self) -> str:
        """For people: ``resnet50``, ``convnet``."""
        ((kind, options),) = self.trunk.items()
        return options if isinstance(options, str) else kind


class PretrainParams(Block):
    """Label-free start on the union of the domains: in-batch contrast of two views (SimCLR's loss)."""

    steps: Count = 400
    batch_size: Annotated[int, Field(ge=2)] = 128
    lr: Positive = 1e-3
    weight_decay: Annotated[float, Field(ge=0)] = 1e-2
    temperature: Positive = 0.2
    seed: Annotated[int, Field(ge=0)] = 0


class StartParams(Block):
    """Where training starts, in one of three ways."""

    encoder: EncoderParams = EncoderParams()
    checkpoint: str | None = None
    """A file in MoCo v2's published layout, or its http(s) address."""
    digest: Annotated[str | None, Field(pattern=DIGEST)] = None
    """Of the checkpoint, whole or its beginning: ``md5:a04e12f8``."""
    torchvision: str | None = None
    """torchvision's weights for the trunk by name, e.g. IMAGENET1K_V2: learnt *with* ImageNet's labels."""
    pretrain: PretrainParams | None = None
    """A label-free pretraining of our own."""

    @model_validator(mode="after")
    def _one_way_in(self) -> Self:
        if sum(way is not None for way in (self.checkpoint, self.torchvision, self.pretrain)) != 1:
            raise ValueError(
                "give one of 'checkpoint' (a file or an address), 'torchvision' (a name) and 'pretrain' "
                "(a block)"
            )
        if self.digest and not self.checkpoint:
            raise ValueError("digest: belongs to 'checkpoint'")
        return self
