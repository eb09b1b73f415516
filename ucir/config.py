"""Typed params: one frozen model per block of params.yaml.

Every block refuses unknown keys (naming the nearest known one) and values out of range, so that a
mistake costs a second and not a night. What a method may be given stands in the method's own file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ucir.catalogue import FOLDER, Entry
from ucir.catalogue import entry as catalogue_entry
from ucir.errors import UserError, nearest

PARAMS_FILE = "params.yaml"

Share = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[float, Field(gt=0)]
Count = Annotated[int, Field(ge=1)]
Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
DIGEST = r"^(md5|sha256):[0-9a-f]{6,64}$"
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.]+$")]


def known_setting(name: str) -> str:
    """The name, if it is one of :mod:`ucir.data.splits`.

    Raises:
        ValueError: it is not.
    """
    if not re.fullmatch(r"closed|partial|open|tailed-[1-9][0-9]{0,3}", name):
        raise ValueError(
            f"setting {name[:40]!r} is unknown: closed, partial, open, or tailed-10 for class sizes up to "
            "10 : 1 (at most tailed-9999)"
        )
    return name


Setting = Annotated[str, AfterValidator(known_setting)]


class Block(BaseModel):
    """A block of params.yaml: immutable, no unknown keys."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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

    side: Annotated[int, Field(ge=16, le=1024)] = 224
    """Pixels per side of the network's input."""
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


class EncoderParams(Block):
    """The network: backbone, two-layer head as in MoCo v2, L2-normalised output."""

    backbone: Literal[
        "convnet",
        "resnet18",
        "resnet34",
        "resnet50",
        "resnet101",
        "resnet152",
        "resnext50_32x4d",
        "resnext101_32x8d",
        "wide_resnet50_2",
    ] = "resnet50"
    """torchvision's ResNets by their names there, or our small ``convnet``."""
    width: Annotated[int, Field(ge=4, le=512)] = 64
    """Channels of the first block; the ResNets are built for 64."""
    feature_dim: Annotated[int, Field(ge=2, le=2048)] = 128

    @model_validator(mode="after")
    def _resnet_width(self) -> Self:
        if self.backbone != "convnet" and self.width != 64:
            raise ValueError(f"width: {self.backbone} has width 64; only 'convnet' takes another")
        return self


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
    """torchvision's weights for the backbone by name, e.g. IMAGENET1K_V2: learnt *with* ImageNet's labels."""
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


class EvaluateParams(Block):
    """Retrieval metrics and figures."""

    cutoffs: Annotated[tuple[Count, ...], Field(min_length=1)] = (50, 100, 200)
    """The K of P@K; the first one selects the best epoch, as in the papers."""
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
    shared: tuple[str, ...] | None = None
    """Those classes by name, instead of a draw."""


class DatasetParams(Block):
    """One data set."""

    source: str
    """A folder or an archive (zip, tar, tar.gz); archives in the folder are read in place."""
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


class SettingParams(Block):
    """A data set in a setting."""

    dataset: Name
    setting: Setting
    pairs: tuple[str, ...] | None = None
    """None = the data set's."""


class RunParams(SettingParams):
    """One line of the active study: a data set, a setting, a method."""

    method: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    block: str
    """The block under ``methods`` that it reads: an ablation reads its method's."""


class SourceParams(Block):
    """What the prepare stage depends on: a copy of the data set's ``source`` for dvc.yaml."""

    source: str


class SweepStage(Block):
    """What the tune stage depends on: the data set and the methods block of a sweep."""

    dataset: Name
    block: str


class StudyParams(Block):
    """What `uv run dvc repro` runs; written by `uv run ucir study NAME`."""

    name: str
    seeds: Seeds
    datasets: dict[Name, SourceParams]
    samples: dict[Name, SourceParams]
    """Those of ``datasets`` that are drawn here."""
    settings: dict[str, SettingParams]
    runs: dict[str, RunParams]
    sweeps: dict[str, SweepStage] = Field(default_factory=dict)


class StudyPart(Block):
    """A product of lists; for a paper's table, its rows and columns."""

    datasets: Annotated[tuple[Name, ...], Field(min_length=1)]
    settings: Annotated[tuple[Setting, ...], Field(min_length=1)]
    methods: Annotated[tuple[str, ...], Field(min_length=1)]
    pairs: tuple[str, ...] | None = None
    """None = those of the data sets."""


ONE_PART = "all"
"""The part of a study that is not divided."""


class StudyRecipe(Block):
    """A study to choose from: one part, or several by name."""

    seeds: Seeds
    sweeps: tuple[str, ...] = ()
    """Those of ``sweeps`` that `dvc repro` runs as well."""
    parts: Annotated[dict[str, StudyPart], Field(min_length=1)]

    @model_validator(mode="before")
    @classmethod
    def _one_part_needs_no_name(cls, given: Any) -> Any:
        if not isinstance(given, dict) or "parts" in given:
            return given
        return {
            **{key: value for key, value in given.items() if key not in StudyPart.model_fields},
            "parts": {ONE_PART: {k: v for k, v in given.items() if k in StudyPart.model_fields}},
        }


class Dimension(Block):
    """What a sweep tries for one key. Written as a list, it is ``choice``."""

    choice: Annotated[tuple[Any, ...], Field(min_length=1)] | None = None
    uniform: tuple[float, float] | None = None
    loguniform: tuple[Positive, Positive] | None = None
    integer: tuple[int, int] | None = None
    """Both ends included."""

    @model_validator(mode="before")
    @classmethod
    def _a_list_is_a_choice(cls, given: Any) -> Any:
        if isinstance(given, (int, float, str)):
            raise ValueError(f"{given!r} is one value: write a list of values to try, as [{given}, ...]")
        return {"choice": given} if isinstance(given, (list, tuple)) else given

    @model_validator(mode="after")
    def _one_kind(self) -> Self:
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "give a list of values, or one of uniform: [low, high], loguniform: [low, high] and "
                "integer: [low, high]"
            )
        if given[0] != "choice":
            low, high = getattr(self, given[0])
            if low >= high:
                raise ValueError(f"{given[0]}: the first value must be below the second")
        return self

    @property
    def ends(self) -> tuple[Any, ...]:
        """All values of a choice, the lowest and the highest of a range."""
        return self.choice or self.uniform or self.loguniform or self.integer or ()


class SweepParams(SettingParams):
    """``sweeps.<name>``: what `ucir tune` searches."""

    setting: Setting = "closed"
    method: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    seeds: Seeds = (0,)
    space: Annotated[dict[str, Dimension], Field(min_length=1)]
    """Key of params.yaml by its path, ``methods.<method>.<dataset>.lr``, or just ``lr``: what is tried."""
    epochs: Count | None = None
    """Of every trial; None = the method's. The order of settings shows early."""
    trials: Count = 20
    """Settings to try; a grid tries all."""
    search: Literal["random", "grid", "tpe"] = "random"
    """tpe = Optuna's tree-structured Parzen estimator."""
    scheduler: Literal["fifo", "asha", "median"] = "asha"
    """When a trial is given up: never; among the worse of those that came as far; below their median."""
    grace: Count = 4
    """Epochs that every trial has."""
    reduction: Annotated[int, Field(ge=2)] = 3
    """asha: one in so many goes on at each rung."""
    objective: str = "mixing"
    """A label-free criterion of :mod:`ucir.retrieval.criteria`, or ``oracle``: P@K, which reads labels."""
    scope: Literal["shared", "per_pair"] = "shared"
    """One setting for all pairs, scored by the mean over them; or a search for each."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Of the search."""

    @model_validator(mode="after")
    def _a_grid_has_values(self) -> Self:
        ranges = [key for key, dimension in self.space.items() if dimension.choice is None]
        if self.search == "grid" and ranges:
            raise ValueError(
                f"search: a grid needs lists of values, but {', '.join(ranges)} has a range: give a list, as "
                "lr: [0.01, 0.1], or take search: random"
            )
        return self


class ClusterParams(Block):
    """How runs are spread; changes speed, never results, so that no stage depends on it."""

    num_workers: Annotated[int, Field(ge=0)] = 0
    """Workers of one training. 0 = in this process, without a cluster; 1 = each training on one worker of
    the cluster, as many at once as it holds; 2 or more train with DDP."""
    max_workers: Count | None = None
    """Elastic: ``num_workers`` is the fewest, and a training takes as many up to this as there is room for;
    it goes on with more or fewer when machines come and go. Not in sweeps."""
    use_gpu: bool | None = None
    """None = when there is one."""
    cpus_per_worker: Positive = 1
    gpus_per_worker: Positive = 1
    """Where GPUs are used. Below 1, several trainings share one: with ``num_workers`` 1 and in sweeps."""
    at_once: Count | None = None
    """Trainings at a time. None = as many as the cluster holds now; to be set where it grows on demand."""
    max_failures: Annotated[int, Field(ge=0)] = 2
    """Restarts of a training whose worker died."""

    @property
    def together(self) -> bool:
        """Whether a training may have several workers."""
        return self.num_workers > 1 or self.max_workers is not None

    @model_validator(mode="after")
    def _elastic_between_two_numbers(self) -> Self:
        if self.max_workers is not None and not 1 <= self.num_workers <= self.max_workers:
            raise ValueError(
                f"max_workers {self.max_workers}: num_workers ({self.num_workers}) is the fewest that a "
                "training goes on with: it must lie between 1 and max_workers"
            )
        return self

    @model_validator(mode="after")
    def _a_gpu_has_one_worker_of_a_training(self) -> Self:
        if self.together and self.gpus_per_worker % 1:
            raise ValueError(
                "gpus_per_worker: two workers of one training cannot share a GPU (NCCL refuses it): set "
                "num_workers to 1 without max_workers, and trainings share GPUs"
            )
        return self


class Params(Block):
    """The whole of params.yaml."""

    study: StudyParams
    studies: dict[str, StudyRecipe]
    datasets: dict[Name, DatasetParams]
    methods: dict[str, dict[Name, dict[str, Any]]]
    """Method, then data set; validated by the method's own params class."""
    sweeps: dict[Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")], SweepParams] = Field(
        default_factory=dict
    )
    cluster: ClusterParams = ClusterParams()

    @model_validator(mode="after")
    def _study_is_current(self) -> Self:
        for name, copy in self.study.datasets.items():
            if name not in self.datasets:
                raise ValueError(f"study.datasets.{name}: no such block under 'datasets'")
            if copy.source != self.datasets[name].source:
                raise ValueError(
                    f"study.datasets.{name}.source differs from datasets.{name}.source: "
                    f"run `uv run ucir study {self.study.name}` to renew the study block"
                )
        for key, run in self.study.runs.items():
            if run.dataset not in self.study.datasets:
                raise ValueError(
                    f"study.runs.{key}: data set {run.dataset!r} is not in study.datasets: "
                    f"run `uv run ucir study {self.study.name}` to renew the study block"
                )
        return self


def parse_yaml(path: Path) -> dict[str, Any]:
    """A YAML file with blocks, as DVC reads it: a key given twice is an error.

    Raises:
        UserError: no such file, not YAML, no blocks.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        raw = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        hint = "; run the command in the project's folder" if path.name == PARAMS_FILE else ""
        raise UserError(f"{path}: no such file{hint}") from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML: {_first_words(error)}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: no blocks in it; restore it with `git checkout {path}`")
    return raw


def without_study(raw: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """params.yaml with no active study, which may be out of date and about to be renewed.

    Args:
        raw: the blocks; None = read them.
    """
    raw = parse_yaml(Path(PARAMS_FILE)) if raw is None else raw
    none = {"name": "none", "seeds": [0], "datasets": {}, "samples": {}, "settings": {}, "runs": {}}
    return {**raw, "study": none}


def load_params(
    path: Path | str = PARAMS_FILE, overrides: Sequence[str] = (), raw: dict[str, Any] | None = None
) -> Params:
    """Read and check params.yaml.

    Args:
        path: the file.
        overrides: ``key.path=value`` each, as if they stood in the file.
        raw: what stands in the file, where that is at hand.

    Raises:
        UserError: no such file, not YAML, an unknown key, a value out of range; names file and field.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    path = Path(path)
    yaml = YAML(typ="safe", pure=True)
    raw = parse_yaml(path) if raw is None else raw
    for override in overrides:
        key, equals, value = override.partition("=")
        *blocks, last = key.split(".")
        if not equals or not all((*blocks, last)):
            raise UserError(f"--set {override}: expected KEY=VALUE")
        block = raw
        for name in blocks:
            block = block.setdefault(name, {})  # a block that the file leaves to its defaults
            if not isinstance(block, dict):
                raise UserError(f"--set {override}: {name!r} is a value in {path}, not a block")
        try:
            block[last] = yaml.load(value)
        except YAMLError as error:
            raise UserError(f"--set {override}: not readable as YAML: {_first_words(error)}") from None
    return checked(Params, raw, str(path))


def _first_words(error: Exception) -> str:
    words = " ".join(str(error).split())
    return words if len(words) < 200 else f"{words[:200]} …"


B = TypeVar("B", bound=BaseModel)


def checked(model: type[B], raw: object, file: str, block: str = "") -> B:
    """``model`` from plain data; every fault named by file, block and field in one line.

    Raises:
        UserError: one clause for each unknown key, missing key or value out of range.
    """
    try:
        return model.model_validate(raw)
    except ValidationError as error:
        entries = error.errors()
        # a list whose only item is refused is empty for pydantic, which would say so as well
        empty = {e["loc"] for e in entries if e["type"] == "too_short"} & {e["loc"][:-1] for e in entries}
        told = [e for e in entries if e["type"] != "too_short" or e["loc"] not in empty]
        faults = "; ".join(_fault(model, entry, block) for entry in told)
        raise UserError(f"{file}: {faults}") from None


def _fault(model: type[BaseModel], entry: Any, block: str) -> str:
    location = [str(part) for part in entry["loc"]]
    if location[:1] == ["studies"] and location[2:4] == ["parts", ONE_PART]:
        del location[2:4]  # which the file does not have
    field = ".".join([*([block] if block else []), *location])
    if entry["type"] == "extra_forbidden":
        known = _known_keys(model, entry["loc"][:-1])
        return f"{field}: unknown key; {nearest(location[-1], known)}"
    if entry["type"] == "missing":
        return f"{field}: missing"
    message = entry["msg"].removeprefix("Value error, ").replace("valid tuple", "list, e.g. [1, 2]")
    if entry["type"] == "value_error":  # our own checks name the field and the remedy themselves
        return f"{field}: {message}" if field else message
    return f"{field} = {entry['input']!r}: {message[0].lower()}{message[1:]}"


def _known_keys(model: Any, location: tuple[int | str, ...]) -> list[str]:
    """Keys of the block at ``location``: walks through models, dicts and optional blocks."""
    from typing import get_args

    for part in location:
        if isinstance(model, type) and issubclass(model, BaseModel):
            field = model.model_fields.get(str(part))
            model = field.annotation if field else None
        else:  # dict[key, block], Annotated or block | None
            model = get_args(model)[-1] if get_args(model) else None
        blocks = [a for a in get_args(model) if isinstance(a, type) and issubclass(a, BaseModel)]
        if blocks and not (isinstance(model, type) and issubclass(model, BaseModel)):
            origin_is_dict = getattr(model, "__origin__", None) is dict
            model = model if origin_is_dict else blocks[0]
    if isinstance(model, type) and issubclass(model, BaseModel):
        return list(model.model_fields)
    return []
