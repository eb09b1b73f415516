"""Models for other programs: ONNX, and a folder as Hugging Face's hub has them.

The folder holds ``config.json`` (how to build the encoder, how pictures are stored and seen, facts of its
training), ``model.safetensors`` and the model's card; :func:`read_folder` makes the same model of it again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ucir.config.base import Block, checked
from ucir.config.data import PackParams, ViewParams
from ucir.config.model import EncoderParams
from ucir.data.augment import normalised
from ucir.errors import UserError
from ucir.models.card import model_card
from ucir.models.checkpoints import load_tensors
from ucir.models.encoder import new_encoder
from ucir.models.head import ResidualHead
from ucir.models.model import Model
from ucir.paths import check_writable, write_atomically

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
FORMAT = 1
SAMPLES = "samples."
"""Before a domain's name: unit features of its pictures, among the tensors."""
TOLERANCE = 1e-4
"""Of ONNX Runtime's features against torch's."""
INPUT, OUTPUT = "pictures", "features"


class FolderConfig(Block):
    """``config.json``."""

    model_type: Literal["ucir"]
    format: int
    encoder: EncoderParams
    view: ViewParams
    pack: PackParams
    domains: tuple[str, ...]
    used: Literal["head", "pooled"]
    facts: dict[str, Any]
    preprocessing: dict[str, Any]
    """For programs that make the pictures themselves."""
    output: str


class FromPixels(nn.Module):
    """A model as one graph: uint8 (B, S, S, 3), RGB, to unit features (B, D)."""

    def __init__(self, model: Model, domain: str | None) -> None:
        super().__init__()
        self.encoder, self.form = model.encoder, model.encoder.form
        self.pooled = model.used == "pooled"
        self.number = None if domain is None else model.domains.index(domain)

    def forward(self, pictures: Tensor) -> Tensor:
        before = self.encoder.trunk(normalised(pictures.permute(0, 3, 1, 2).float() / 255, self.form))
        unit = F.normalize(before.float(), dim=1)
        if self.pooled:
            return unit
        head, domain_B = self.encoder.head, None
        if self.number is not None:
            domain_B = torch.full((pictures.shape[0],), self.number)
        elif isinstance(head, ResidualHead):
            # what the head does itself; but ONNX has no form of torch.cdist
            domain_B = (unit[:, None] - head.centre_2P).square().sum(dim=2).argmin(dim=1)
        return F.normalize(head(before, domain_B).float(), dim=1)


def write_onnx(model: Model, path: Path, domain: str | None = None) -> float:
    """Write a model as ONNX, once ONNX Runtime was found to compute with it what torch does.

    Its input ``pictures`` is uint8 (B, S, S, 3), RGB: the centre squares of the pictures, S px a side, as the
    metadata beside the graph say; its output ``features`` float32 (B, D) of unit length.

    Args:
        model: on the CPU.
        path: of the file.
        domain: of all pictures that it will see; None = of each the nearest.

    Returns:
        The largest difference, over noise and a gradient.

    Raises:
        UserError: the model knows no such domain; the network has no form in ONNX, or computes something
            else in it.
    """
    import onnx
    import onnxruntime

    model.check_domain(domain)
    check_writable(path.parent)
    graph = FromPixels(model, domain).eval()
    side = model.view.side or model.encoder.form.side
    pictures = torch.randint(256, (3, side, side, 3), generator=torch.Generator().manual_seed(0))
    pictures[0] = torch.linspace(0, 255, side)[:, None, None]
    pictures = pictures.to(torch.uint8)
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        with torch.no_grad():
            expected = _features(model, pictures, domain)
            program = torch.onnx.export(
                graph,
                (pictures,),
                dynamo=True,
                input_names=[INPUT],
                output_names=[OUTPUT],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                verbose=False,
            )
        assert program is not None
        proto = program.model_proto
        onnx.helper.set_model_props(proto, {key: _text(value) for key, value in _description(model).items()})
        onnx.save(proto, unfinished)
        session = onnxruntime.InferenceSession(str(unfinished), providers=["CPUExecutionProvider"])
        # another batch size than that which it was made with, too
        computed = [session.run(None, {INPUT: part.numpy()})[0] for part in (pictures, pictures[:1])]
        difference = max(float((torch.from_numpy(x) - expected[: len(x)]).abs().max()) for x in computed)
        if not difference <= TOLERANCE:
            raise UserError(f"{path}: ONNX Runtime's features differ by {difference:.1e} from torch's")
        unfinished.replace(path)
    except torch.onnx.errors.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{path}: {model.encoder.params.trunk_name} has no form in ONNX: {reason}") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return difference


def _features(model: Model, pictures: Tensor, domain: str | None) -> Tensor:
    """By the encoder itself."""
    x = normalised(pictures.permute(0, 3, 1, 2).float() / 255, model.encoder.form)
    domain_B = None if domain is None else torch.full((len(x),), model.domains.index(domain))
    out: Tensor = model.encoder(x, model.used == "pooled", domain_B)
    return out


def write_folder(model: Model, folder: Path) -> None:
    """Write a model as a folder for Hugging Face's hub.

    Raises:
        UserError: the folder holds something else already.
    """
    from safetensors.torch import save

    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file already: give a new folder")
    if folder.exists() and any(folder.iterdir()):
        try:
            _read_config(folder / CONFIG)
        except UserError:
            raise UserError(f"{folder}: holds other files already: give a new folder") from None
    check_writable(folder)
    tensors = {name: x.cpu().contiguous() for name, x in model.encoder.state_dict().items()}
    tensors |= {SAMPLES + domain: x.contiguous() for domain, x in model.samples.items()}
    unfinished = folder / f"{WEIGHTS}.unfinished"
    unfinished.write_bytes(save(tensors))
    unfinished.replace(folder / WEIGHTS)
    write_atomically(json.dumps(_description(model), indent=1) + "\n", folder / CONFIG)
    write_atomically(f"{model_card(model)}\n", folder / CARD)


def read_folder(folder: Path) -> Model:
    """Make a model of what :func:`write_folder` wrote.

    Raises:
        UserError: no such folder; files missing, damaged, of a later format, or that do not go together.
    """
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(f"{folder}: no {name} in it: not a folder of `uv run ucir export`")
    config = _read_config(folder / CONFIG)
    tensors = load_tensors(folder / WEIGHTS)
    samples = {name.removeprefix(SAMPLES): x for name, x in tensors.items() if name.startswith(SAMPLES)}
    encoder = new_encoder(config.encoder, 0)
    state = {name: x for name, x in tensors.items() if not name.startswith(SAMPLES)}
    try:
        encoder.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"{folder / WEIGHTS}: does not fit {CONFIG}: {reason}") from None
    view, pack, facts, where = config.view, config.pack, config.facts, folder / CONFIG
    model = Model(encoder.eval(), view, pack, facts, config.domains, {}, config.used, samples)
    if infinite := [name for name, x in tensors.items() if not torch.isfinite(x).all()]:
        raise UserError(f"{folder / WEIGHTS}: damaged: {infinite[0]} holds values that are not finite")
    if len(config.domains) not in (0, 2) or len(set(config.domains)) < len(config.domains):
        raise UserError(f"{where}: domains = {list(config.domains)}: two different ones, or none")
    if wrong := [d for d, x in samples.items() if d not in config.domains or x.shape[1:] != (model.dim,)]:
        raise UserError(f"{folder / WEIGHTS}: samples of {wrong[0]!r} are not of this model")
    try:
        model_card(model)
    except Exception:  # whatever stands where a training's facts should
        raise UserError(f"{where}: facts: not those of a training") from None
    return model


def _read_config(where: Path) -> FolderConfig:
    """Raises UserError: not there, or not of a model of ours."""
    try:
        block: dict[str, Any] = json.loads(where.read_text("utf-8"))
        kind, number = block["model_type"], block["format"] if block["model_type"] == "ucir" else None
    except (OSError, ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{where}: not a model of ucir") from None
    if kind != "ucir":
        raise UserError(f"{where}: a model of {kind}, not of ucir; a network of timm is a start's trunk")
    if number != FORMAT:
        raise UserError(f"{where}: of format {number}, this version reads {FORMAT}: update ucir")
    return checked(FolderConfig, block, str(where))


def _description(model: Model) -> dict[str, Any]:
    """What a program needs to know beside the weights."""
    form, side = model.encoder.form, model.view.side or model.encoder.form.side
    config = FolderConfig(
        model_type="ucir",
        format=FORMAT,
        encoder=model.encoder.params,
        view=model.view,
        pack=model.pack,
        domains=model.domains,
        used=model.used,
        facts=model.facts,
        preprocessing={
            "input": "uint8, RGB, (batch, side, side, 3)",
            "side": side,
            "centre_square": f"{model.view.eval_crop} of the shorter side",
            "interpolation": f"{form.interpolation}, antialiased",
            "mean": list(form.mean),
            "std": list(form.std),
        },
        output=f"float32, (batch, {model.dim}), unit length",
    )
    return config.model_dump(mode="json")


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
