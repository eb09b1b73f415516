"""A frozen network on ONNX Runtime: on processors faster than torch, see `tests.benchmarks`."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import warnings
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from ucir.data.augment import InputFormat
from ucir.models.encoder import Encoder, new_encoder
from ucir.models.trunk import Trunk

TOLERANCE = 1e-4
"""Of features against torch's, as a share of their largest value."""
BATCH, CHECKED = 2, 3
"""Pictures of noise that the graph is made with, and another number that it is checked with."""


class CompiledTrunk(Trunk):
    """Stands for a trunk; threads may call it side by side, each computes on one core.

    Args:
        trunk: in evaluation mode, on the CPU.
        graph: of it, ONNX.
    """

    def __init__(self, trunk: Trunk, graph: bytes) -> None:
        import onnxruntime

        super().__init__(nn.Identity(), trunk.pooled_dim, trunk.form)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def forward(self, x: Tensor) -> Tensor:
        (pooled,) = self.session.run(None, {"x": x.contiguous().numpy()})
        return torch.from_numpy(pooled)


@torch.no_grad()
def compiled(encoder: Encoder, side: int) -> tuple[Encoder, str]:
    """The same encoder with its trunk on ONNX Runtime.

    On another device than the CPU, and where the network has no such form or computes something else in it,
    the encoder itself.

    Args:
        encoder: in evaluation mode.
        side: of its pictures, in pixels.

    Returns:
        The encoder, and why it is not compiled; empty if it is.
    """
    if encoder.device.type != "cpu":
        return encoder, ""
    try:
        trunk = CompiledTrunk(encoder.trunk, _graph(encoder.trunk, side))
        noise = _noise(encoder.form, CHECKED, side)
        expected = encoder.trunk(noise).float()
        difference = float((trunk(noise) - expected).abs().max() / expected.abs().max().clamp(min=1e-12))
    except Exception as error:  # an exporter of hundreds of operations may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
        return encoder, f"{encoder.params.trunk_name} has no form for ONNX Runtime ({reason})"
    if not difference <= TOLERANCE:
        return encoder, f"{encoder.params.trunk_name} differs by {difference:.0e} on ONNX Runtime"
    fast = new_encoder(encoder.params, 0, trunk=trunk)
    fast.head.load_state_dict(encoder.head.state_dict())
    return fast.eval(), ""


def _graph(trunk: Trunk, side: int) -> bytes:
    """By torch's older exporter: it takes 2 s where the new one, which ``ucir export`` uses, takes 17."""
    buffer = io.BytesIO()
    # it warns of its age and of what it traces as constants
    with warnings.catch_warnings(), _silent():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            trunk,
            (_noise(trunk.form, BATCH, side),),
            buffer,  # type: ignore[arg-type]  # the older one takes it
            dynamo=False,
            input_names=["x"],
            dynamic_axes={"x": {0: "batch"}},
        )
    return buffer.getvalue()


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without standard output: where the exporter fails, its C++ part prints the whole graph."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)


def _noise(form: InputFormat, count: int, side: int) -> Tensor:
    shape = (count, 3, side, side)
    return torch.randn(shape, generator=torch.Generator().manual_seed(count))
