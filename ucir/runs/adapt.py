"""Adapt a network to two folders of pictures: the study that does it, what it costs, and the model it leaves.

The folders become a data set of params.yaml and a study of one training, so that the same stages do the work
as for every other study. ``data/sources/<name>/`` holds a link to each folder and, because DVC does not look
behind links, a list of what lies there.
"""

from __future__ import annotations

import csv
import io
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ucir.config.base import PARAMS_FILE
from ucir.config.load import Params, load_params, parse_yaml, without_study
from ucir.config.model import EncoderParams
from ucir.data.catalogue import FOLDER
from ucir.data.catalogue import entry as catalogue_entry
from ucir.data.prepare import decoding_pace, name_faults
from ucir.data.source import Source, domain_of_folder, survey, unusable_names
from ucir.devices import choose_device
from ucir.errors import UserError, nearest
from ucir.methods.base import ClusteredParams
from ucir.methods.registry import METHODS, params_block
from ucir.models.card import model_card
from ucir.models.encoder import new_encoder
from ucir.models.model import load_model, model_file, save_model
from ucir.models.pretrained import EMBEDDED, EMBEDDED_SIDE, EMBEDDED_TRUNK, HUB
from ucir.models.trunks.timm import options as check_timm
from ucir.paths import PACKS, RESULTS, SOURCES, write_atomically
from ucir.progress import clock
from ucir.retrieval.evaluation import checkpoint_features
from ucir.retrieval.index import SAMPLES
from ucir.runs.cost import stored_bytes
from ucir.runs.pace import Machine, embedding_pace
from ucir.runs.params import method_params
from ucir.runs.run import PairRun, plan_runs
from ucir.runs.study import StudyFile, with_blocks
from ucir.training.start import given_start

TEMPLATE = "pacs"
"""The data set whose settings are taken."""
FEATURE_DIM = 128
VIEWS = 3
"""Random views of each picture where the head alone is trained: half of the benchmarks' six, as embedding is
most of the time. It costs 0.2 points of P@50 on PACS."""
CONTENTS = ".contents.csv"
FEWEST = 8
"""Pictures of a folder: fewer cannot be clustered."""
BAD_SHARE = 0.2
"""What is bad in people's folders is left out by name; benchmarks are stricter."""
STARTS = 22
"""Starts of a process like this one that it takes DVC's stages to start, score and report."""
STARTED = time.process_time()
"""Seconds that this process took to start."""
BASE_MEMORY = 1.2 * 2**30
"""Bytes of a process that trains a small head."""


@dataclass(frozen=True)
class Options:
    """What may be said beside the folders; None = as it stands in params.yaml, or the default."""

    method: str | None = None
    trunk: str | None = None
    """timm's name; the embedded network by default."""
    weights: str | None = None
    trained: str | None = None
    """all, last or head."""
    clusters: int | None = None
    """A guess at the number of kinds; by default it is looked for."""
    epochs: int | None = None


@dataclass(frozen=True)
class Adaptation:
    """A data set of two folders, and the study that adapts a network to it."""

    name: str
    folders: dict[str, Path]
    """By domain."""
    counts: dict[str, int]
    """Files of each domain that should be pictures."""
    strays: dict[str, int]
    """Files that lie beside class folders and are left out, by domain; none where there are none."""
    method: str
    blocks: StudyFile

    @property
    def pair(self) -> str:
        return "-".join(self.folders)

    @property
    def model_file(self) -> Path:
        return model_file(self.name)

    def is_done(self, params: Params) -> bool:
        """Whether nothing is left to do."""
        listed, pack = SOURCES / self.name / CONTENTS, PACKS / self.name / "pack.json"
        if not self.model_file.exists() or not pack.exists():
            return False
        if listed.stat().st_mtime_ns > pack.stat().st_mtime_ns:  # pictures have changed since
            return False
        try:
            run = self._run(params)
        except UserError:  # it has not been prepared with these settings
            return False
        return run.done and load_model(self.model_file).facts["run_key"] == run.key

    def _run(self, params: Params) -> PairRun:
        (run,) = plan_runs(params, self.name, "closed", self.method, (self.pair,), (0,))
        return run

    def save(self) -> Path:
        """Write the trained model as one file, which needs nothing beside it."""
        slug = f"{self.pair}-s0"
        trained = RESULTS / self.name / "closed" / self.method / "train" / slug / "last.pt"
        model = load_model(trained)
        if self.model_file.exists() and load_model(self.model_file).facts == model.facts:
            return self.model_file
        params = load_params()
        domains = {domain.name: domain for domain in self._run(params).images()}
        block, device = params.datasets[self.name], choose_device(params.cluster)
        features = checkpoint_features(trained, block, domains, device)
        # slots are in no meaningful order, so that the first ones are as good as any
        model = replace(model, samples={name: x[:SAMPLES].half() for name, x in features.items()})
        self.model_file.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.model_file.with_suffix(".unfinished")
        save_model(model.whole(), unfinished)
        unfinished.replace(self.model_file)
        write_atomically(f"{model_card(model)}\n", self.model_file.with_name("README.md"))
        return self.model_file


def plan_adaptation(first: Path, second: Path, name: str | None, options: Options) -> Adaptation:
    """Check what is wanted, and put it into blocks of params.yaml.

    Args:
        first, second: folders of pictures, with class folders in them or not.
        name: of the data set, the study and the model; None = ``<first>_<second>``.
        options: what else was said.

    Raises:
        UserError: no such folder, or no picture in it; an unknown method or trunk; a name that stands for
            something else already.
    """
    folders = _named((first, second))
    if name is None:
        name = re.sub(r"[^A-Za-z0-9_.]+", "_", "_".join(folders)).strip("._")
    if not re.fullmatch(r"[A-Za-z0-9_.]+", name):
        raise UserError(f"--name {name!r}: give one of letters A to Z, digits, '_' and '.' alone")
    model_file(name)  # which refuses a name that stands for another model
    params = load_params(raw=without_study())
    there = params.datasets.get(name)
    if there and there.source != str(SOURCES / name):
        raise UserError(f"{PARAMS_FILE}: {name!r} is another data set already: give a --name")
    if not there and name in params.studies:
        raise UserError(f"{PARAMS_FILE}: {name!r} is another study already: give a --name")
    if there and (SOURCES / name).exists():
        known = {link.name: link.readlink() for link in SOURCES.joinpath(name).iterdir() if link.is_symlink()}
        if known and known != folders:
            was = " and ".join(str(folder) for folder in known.values())
            raise UserError(f"{name!r} is adapted to {was} already: give another --name")
    _link(SOURCES / name, folders)
    counts, strays = _counts(SOURCES / name, folders)
    for domain, count in counts.items():
        if not count:
            raise UserError(f"{folders[domain]}: no picture in it: give a folder of picture files")
        if count < FEWEST:
            raise UserError(
                f"{folders[domain]}: {count} picture(s): too few to learn from, {FEWEST} at least"
            )
    if there and (before := _as_before(name, options)):
        return Adaptation(name, folders, counts, strays, *before)
    method = options.method or "consensus"
    if method not in METHODS or TEMPLATE not in params.methods.get(params_block(method), {}):
        usable = [m for m in METHODS if TEMPLATE in params.methods.get(params_block(m), {})]
        if method in METHODS:
            raise UserError(
                f"--method {method}: no settings under methods.{params_block(method)}.{TEMPLATE} of "
                f"{PARAMS_FILE}, which two folders take; there are some for {', '.join(usable)}"
            )
        raise UserError(f"--method {method!r}: no such method here; {nearest(method, usable)}")
    _check_network(options)
    dataset = _dataset_block(name, folders, options)
    settings = dict(params.methods[params_block(method)][TEMPLATE])
    kind = METHODS[method].params_type
    if options.clusters is not None:
        settings["clusters"] = options.clusters
    elif issubclass(kind, ClusteredParams) and "clusters" not in settings:
        settings["clusters"] = "elbow"
    if options.epochs is not None:
        settings["epochs"] = options.epochs
    largest = max(counts.values())
    usual = kind.model_fields["batch_size"].default
    if largest < usual:
        settings["batch_size"] = max(2, largest // 2 * 2)
    study = {"datasets": [name], "settings": ["closed"], "methods": [method], "seeds": [0]}
    blocks = _blocks(name, method, dataset, settings, study)
    most = method_params(with_blocks(blocks), method, name).most_clusters
    if most > min(counts.values()):
        raise UserError(f"--clusters {most}: more than the {min(counts.values())} pictures of a folder")
    return Adaptation(name, folders, counts, strays, method, blocks)


def _check_network(options: Options) -> None:
    """Raises UserError: what was said of the network cannot be, by the option's name."""
    if options.trunk:
        check_timm(options.trunk, "--trunk")
    if options.weights not in (None, EMBEDDED, HUB) and not Path(str(options.weights)).exists():
        raise UserError(f"--weights {options.weights}: no such file; give hub, or a file or folder")
    if options.trained not in (None, "all", "last", "head"):
        raise UserError(f"--trained {options.trained}: give head, last or all")


def _dataset_block(name: str, folders: dict[str, Path], options: Options) -> dict[str, Any]:
    trunk = options.trunk or EMBEDDED_TRUNK
    embedded = trunk.partition(".")[0] == EMBEDDED_TRUNK and options.weights in (None, EMBEDDED)
    encoder: dict[str, Any] = {"trunk": {"timm": trunk}, "feature_dim": 2, "head": "residual"}
    built = new_encoder(EncoderParams(**encoder), 0)
    encoder["feature_dim"] = min(FEATURE_DIM, built.pooled_dim)  # the head begins as PCA of the pooled
    side = EMBEDDED_SIDE if embedded else built.form.side
    return {
        "source": str(SOURCES / name),
        "pairs": ["-".join(folders)],
        "pack": {"side": side, "max_bad_share": BAD_SHARE},
        "view": {"side": side, "eval_crop": 1.0, "augment": {"blur_sigma": [0.1, round(side * 0.01, 1)]}},
        "start": {
            "encoder": encoder,
            "weights": options.weights or (EMBEDDED if embedded else HUB),
            "trained": options.trained or "head",
            "views": VIEWS,
        },
        "evaluate": {"cutoffs": [1, 5, 15]},
    }


def _as_before(name: str, options: Options) -> tuple[str, StudyFile] | None:
    """The method and the blocks that an earlier call wrote, which people may have edited since.

    None where there is no model yet and other options are given: it begins anew.
    """
    raw = parse_yaml(Path(PARAMS_FILE))
    study = raw["studies"].get(name)
    if not study or len(study["methods"]) != 1:
        raise UserError(f"{PARAMS_FILE}: studies.{name} is not one of this command: give another --name")
    (method,) = study["methods"]
    dataset = raw["datasets"][name]
    settings = raw["methods"][params_block(method)][name]
    start = dataset["start"]
    stands = Options(
        method,
        start["encoder"]["trunk"].get("timm"),
        start.get("weights"),
        start.get("trained", "all"),
        settings.get("clusters"),
        settings.get("epochs"),
    )
    for key, wanted in asdict(options).items():
        if wanted is not None and wanted != getattr(stands, key):
            if not model_file(name).exists():
                return None
            raise UserError(
                f"--{key} {wanted}: the model {name!r} was made with {getattr(stands, key)!r}: give another "
                f"--name, or change it in {PARAMS_FILE}"
            )
    return method, _blocks(name, method, dataset, settings, study)


def _blocks(
    name: str, method: str, dataset: dict[str, Any], settings: dict[str, Any], study: dict[str, Any]
) -> StudyFile:
    return StudyFile(
        datasets={name: dataset}, methods={params_block(method): {name: settings}}, studies={name: study}
    )


def _named(folders: tuple[Path, Path]) -> dict[str, Path]:
    """Folders by the domain's name, which is the folder's."""
    for folder in folders:
        if not folder.is_dir():
            kind = "is no folder (unpack it)" if folder.exists() else "no such folder"
            raise UserError(f"{folder}: {kind}")
    whole = [folder.resolve() for folder in folders]
    if whole[0] == whole[1]:
        raise UserError(f"{folders[0]}: the same folder twice; give one of each style")
    for one, other in (whole, whole[::-1]):
        if one.is_relative_to(other):
            raise UserError(f"{one} lies in {other}: give two folders beside each other")
    for folder in whole:
        if Path.cwd().is_relative_to(folder):
            raise UserError(f"{folder}: holds this project, and so its own copies: give folders of pictures")
    names = [domain_of_folder(folder.name) for folder in whole]
    if names[0] == names[1]:
        names = [domain_of_folder(f"{folder.parent.name}_{folder.name}") for folder in whole]
    if names[0] == names[1]:
        names = [f"{names[0]}_1", f"{names[1]}_2"]
    return dict(zip(names, whole, strict=True))


def _link(source: Path, folders: dict[str, Path]) -> None:
    """Make the links, and a list of what lies behind them: DVC sees by it that pictures have changed."""
    source.mkdir(parents=True, exist_ok=True)
    for link in source.iterdir():
        if link.is_symlink() and link.name not in folders:  # of an earlier try with other folders
            link.unlink()
    for domain, folder in folders.items():
        link = source / domain
        if not link.is_symlink() or link.readlink() != folder:
            link.unlink(missing_ok=True)
            link.symlink_to(folder, target_is_directory=True)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("file", "bytes", "modified"))
    for name in Source(source).tree:
        status = (source / name).stat()
        writer.writerow((name, status.st_size, status.st_mtime_ns))
    listed = source / CONTENTS
    if not listed.exists() or listed.read_text("utf-8") != text.getvalue():
        write_atomically(text.getvalue(), listed)


def _counts(source: Path, folders: dict[str, Path]) -> tuple[dict[str, int], dict[str, int]]:
    """Files of each domain that should be pictures, and those beside class folders.

    Raises:
        UserError: what would stop the first stage, by the folders' own names.
    """
    opened, entry = Source(source), catalogue_entry(FOLDER)
    files = survey(opened, entry)
    there = [domain for domain in folders if files.domains.get(domain)]
    if faults := unusable_names(files) + name_faults(opened, files, there, entry):
        text = "; ".join(faults)
        for domain, folder in folders.items():
            link = source / domain
            text = text.replace(f"{link}/", f"{folder}/").replace(f"{link}:", f"{folder}:")
        raise UserError(text)
    counts = {domain: len(files.domains.get(domain, ())) for domain in folders}
    return counts, Counter(file.domain for file in files.strays)


def describe_adaptation(params: Params, adaptation: Adaptation) -> str:
    """What will be done, with which weights, for how long on this machine, and what it will need.

    Args:
        params: with the blocks of the adaptation.
        adaptation: it.

    Raises:
        UserError: the network's weights cannot be had or do not fit.
    """
    block = params.datasets[adaptation.name]
    wanted = method_params(params, adaptation.method, adaptation.name)
    device = choose_device(params.cluster)
    encoder, origin = given_start(block.start, block.view.side)
    assert origin is not None
    counts = adaptation.counts
    total, views = sum(counts.values()), block.start.views + 1
    pace = Machine(device).pace(block, wanted, adaptation.method)
    seconds = {"prepare": total * decoding_pace(block), "embed": 0.0}
    if block.start.trained == "head":
        seconds["embed"] = total * views * embedding_pace(block, device)
    first, second = counts.values()
    seconds["train"] = wanted.epochs * pace.epoch(wanted, (first, second))
    pack, features = stored_bytes(block, total, encoder.pooled_dim)
    trunk = block.start.encoder.trunk_name
    part = {"head": "a head on the frozen network", "last": "its last stage and a head", "all": "all of it"}
    seconds["starting, scores, report"] = STARTS * STARTED
    steps = ", ".join(f"{step} {clock(time)}" for step, time in seconds.items() if time)
    left_out = [
        f"left out: {count} files of {domain} that lie beside its class folders: a domain has class folders "
        "for all of its pictures, or none"
        for domain, count in adaptation.strays.items()
    ]
    lines = [
        f"{adaptation.name}: {' and '.join(f'{n} files of {d}' for d, n in counts.items())}",
        *left_out,
        f"network: {trunk} at {block.view.side} px, {origin.line()}",
        f"trained: {part[block.start.trained]}, by {adaptation.method}, {wanted.epochs} epochs",
        f"time: about {clock(sum(seconds.values()))} on {device} ({steps})",
        f"memory: about {(BASE_MEMORY + features / views * 4) / 2**30:.1f} GiB; "
        f"disk: {(pack + features) / 2**30:.2f} GiB",
    ]
    return "\n".join(lines)
