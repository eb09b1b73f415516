"""Blocks of a data set: where its pictures are, how they are stored, seen, scored and split."""

from __future__ import annotations

import os
import re
import unicodedata
from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from ucir.config.base import Block, Count, Positive, Share
from ucir.config.model import StartParams
from ucir.data.catalogue import FOLDER, Entry
from ucir.data.catalogue import entry as catalogue_entry


class AugmentParams(Block):
    """Random views. The defaults are the MoCo v2 "aug-plus" recipe of UCDIR and ProtoOT at 224 px."""

    crop_area: tuple[Positive, Positive] = (0.2, 1.0)
    """Share of the picture that a crop covers."""
    crop_aspect: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    crop_pad: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Widens the picture on every side by this share of it (edges repeated) before cropping."""
    jitter: tuple[Share, Share, Share, Annotated[float, Field(ge=0, le=0.5)]] = (0.4, 0.4, 0.4, 0.1)
    """Strength of brightness, contrast, saturation, hue."""
    jitter_share: Share = 0.8
    colour: Literal["affine", "steps"] = "affine"
    """How jitter and grey are computed: ``affine``, as one affine map of a view's colours, clamped once, hue
    turned in YIQ; ``steps``, one after the other, each clamped, hue in HSV, as torchvision does."""
    grey_share: Share = 0.2
    blur_share: Share = 0.5
    blur_sigma: tuple[Positive, Positive] = (0.1, 2.0)
    """Pixels of the view."""
    flip_share: Share = 0.5
    turn: Annotated[float, Field(ge=0, le=180)] = 0.0
    """Rotate by up to this many degrees, either way."""
    slant: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Lean by up to this much: shift across per unit of height, either way."""
    invert_share: Share = 0.0

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for name in ("crop_area", "crop_aspect", "blur_sigma"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name}: the first value must not exceed the second")
        if self.crop_area[1] > 1:
            raise ValueError("crop_area: a crop covers at most the whole picture (1.0)")
        return self


class ViewParams(Block):
    """How stored pictures become the network's input; shared by all methods of a data set."""

    side: Annotated[int, Field(ge=16, le=1024)] | None = None
    """Pixels per side of the network's input; None = what its trunk is made for."""
    eval_crop: Annotated[float, Field(gt=0, le=1)] = 224 / 256
    """Centre square that features are taken from, as a share of the shorter side."""
    augment: AugmentParams = AugmentParams()


class PackParams(Block):
    """prepare: decode once."""

    side: Annotated[int, Field(ge=16, le=1024)] = 256
    """Pixels per side of the stored square."""
    fit: Literal["squash", "crop", "letterbox"] = "squash"
    """How a picture becomes a square: squash keeps all of it and views undo the distortion; crop keeps the
    centre square of the shorter side; letterbox pads the shorter side with white."""
    max_bad_share: Share = 0.01
    """More bad files than this share of a domain stop the stage."""
    max_pixels: Count = 100_000_000
    """A picture with more pixels is taken for a decompression bomb."""


class EvaluateParams(Block):
    """Retrieval metrics and figures."""

    cutoffs: Annotated[tuple[Count, ...], Field(min_length=1)] = (50, 100, 200)
    """The K of P@K; the first one selects the best epoch, as in the papers."""
    curve_queries: Count | None = None
    """Queries of a direction, evenly spread over the domain, that a training's curves are made of, and with
    them the choice of the best epoch; the last epoch's and all final scores are of all. None: all, always."""
    keep_best: bool = True
    """Whether the weights of the epoch with the best P@K by labels are kept and scored, as the papers do,
    beside the last epoch's: half of a study's disk."""
    false_rejections: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Share of the queries that the calibrated gate rejects, with a counterpart or without."""
    features: Literal["head", "pooled"] = "head"
    """What final scores are taken from: the head's output, as in the papers, or what goes into it."""
    grid_queries: Count = 8
    """Queries shown in the retrieval grid of a direction."""


class SampleParams(Block):
    """The embedded sample ``digits``, made by :mod:`ucir.data.digits`."""

    per_class: Count = 150
    seed: Annotated[int, Field(ge=0)] = 0


class SplitParams(Block):
    """Label spaces of the settings ``partial`` and ``open``; see :mod:`ucir.data.splits`."""

    seed: Annotated[int, Field(ge=0)] = 0
    """Draws the classes that both domains have: half of all, rounded down."""
    shared: Annotated[tuple[str, ...], Field(min_length=1)] | None = None
    """Those classes by name, instead of a draw."""


class DatasetParams(Block):
    """One data set."""

    source: str
    """A folder or an archive (zip, tar); archives in the folder are read in place. ``~`` and ``$HOME`` stand
    for what they stand for in a shell."""
    catalogue: str = FOLDER
    """The data set's entry in the catalogue (``ucir fetch`` lists them): names, counts, printed tables."""
    pairs: tuple[Annotated[str, Field(pattern=r"^[^/]+[->][^/]+$")], ...] = ()
    """``A-B``: two domains, both directions; ``A>B``: query A, gallery B alone. Default: the catalogue's."""
    sample: SampleParams | None = None
    """Only for the sample: it is drawn into ``source`` instead of being looked for there."""
    pack: PackParams = PackParams()
    view: ViewParams = ViewParams()
    start: StartParams
    evaluate: EvaluateParams = EvaluateParams()
    split: SplitParams = SplitParams()

    @field_validator("source")
    @classmethod
    def _as_a_shell_reads_it(cls, source: str) -> str:
        expanded = os.path.expandvars(os.path.expanduser(source))
        if unknown := re.findall(r"\$\{?(\w+)", expanded):
            raise ValueError(f"{source!r}: the environment has no {unknown[0]}")
        return expanded

    @field_validator("pairs")
    @classmethod
    def _as_domains_are_spelt(cls, pairs: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(unicodedata.normalize("NFC", pair) for pair in pairs)

    @model_validator(mode="after")
    def _pairs_are_known(self) -> Self:
        known = self.entry.pairs
        if not self.pairs:
            if not known:
                raise ValueError("pairs: missing; two domains joined by '-', e.g. [sketches-photos]")
            pairs = dict.fromkeys(pair for paper in known.values() for pair in paper)
            object.__setattr__(self, "pairs", tuple(pairs))
        return self

    @property
    def entry(self) -> Entry:
        """The data set's entry in the catalogue."""
        return catalogue_entry(self.catalogue)
