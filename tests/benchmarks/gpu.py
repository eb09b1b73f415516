"""What a GPU does with a training: `uv run python -m tests.benchmarks.gpu`, on the first GPU.

    supervised   images a second of the plain network, forward, backward, update, on one constant batch
    step         images a second of UCDIR's step on constant views, beside the most that it could be: a query
                 encoder's step and a key encoder's forward pass cost 4/3 of a supervised image
    stall        a step's time with views from the store over its time with constant ones
    epochs       minutes of 200 epochs of a pair of Office-Home's size
    K-means, transport   70,000 features and 65 prototypes: there, and on the processor

`--device cpu` with a small network tries the script itself; its figures say nothing.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.benchmarks import argument_parser
from ucir.config.data import ViewParams
from ucir.config.model import EncoderParams
from ucir.data.pack import DomainImages
from ucir.errors import run_main
from ucir.methods.registry import METHODS
from ucir.models.encoder import as_stepped, new_encoder
from ucir.prototypes.clustering import kmeans
from ucir.prototypes.transport import transport
from ucir.training.training import Training, total_loss

LARGER_DOMAIN = 4439
"""Pictures of Office-Home's Product."""


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--network", default="resnet50", help="torchvision's")
    parser.add_argument("--side", type=int, default=224)
    parser.add_argument("--batch", type=int, default=64, help="pictures of each domain in a step")
    parser.add_argument("--pictures", type=int, default=2048, help="of each domain")
    parser.add_argument("--steps", type=int, default=30, help="that are timed")
    parser.add_argument("--features", type=int, default=70_000, help="to cluster and to transport")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("torch finds no GPU here; `--device cpu` with a small network tries the script itself")
    device = torch.device(given.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "the processor"
    print(f"{name}: {given.network}, {given.side} px, 2 x {given.batch} pictures a step")
    for precision, compiled in (("float32", False), ("bfloat16", False), ("bfloat16", True)):
        network = {"trunk": {"torchvision": given.network}, "precision": precision, "compiled": compiled}
        rates(given, device, EncoderParams.model_validate(network))
    growth(given, device)


def rates(given: argparse.Namespace, device: torch.device, params: EncoderParams) -> None:
    """Supervised, step, stall and epochs."""
    images = 2 * given.batch
    x = torch.randn(images, 3, given.side, given.side, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    encoder = new_encoder(params, 0).to(device)
    plain = as_stepped(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), 1e-3, momentum=0.9)

    def supervised() -> None:
        loss = F.cross_entropy(plain(x), torch.zeros(images, dtype=torch.long, device=device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    alone = images / timed(supervised, device, given.steps)
    training = made_training(given, device, params)
    views = training.step.render(0, next(enumerate(training.batches.epoch(0))))

    def constant() -> None:
        batch = training.step.forward(views)
        total = total_loss(training.method.losses(0, batch))
        training.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        training.optimizer.step()
        training.method.after_step(batch)

    seconds = timed(constant, device, given.steps)
    training.train_epoch(0, max_steps=3)
    steps = len(training.batches)
    real = timed(lambda: training.train_epoch(0), device, 1, warm_up=1) / steps
    bound = 0.75 * alone
    minutes = 200 * (LARGER_DOMAIN // given.batch) * real / 60
    kind = f"{params.precision}{', compiled' if params.compiled else ''}"
    print(
        f"  {kind:<19} supervised {alone:8.0f} images/s   step {images / seconds:8.0f}, "
        f"{images / seconds / bound:.2f} of what is possible   stall {real / seconds:.2f}   "
        f"200 epochs {minutes:.1f} min",
        flush=True,
    )


def made_training(given: argparse.Namespace, device: torch.device, params: EncoderParams) -> Training:
    rng, store = np.random.default_rng(0), round(given.side * 320 / 224)
    domains = [
        DomainImages(
            domain,
            rng.integers(0, 256, (given.pictures, store, store, 3), np.uint8),
            np.arange(given.pictures),
            np.full((given.pictures, 2), 500),
        )
        for domain in "ab"
    ]
    method_type = METHODS["ucdir"]
    block: dict[str, Any] = {"clusters": 65, "batch_size": given.batch}
    method = method_type(method_type.params_type(**block), 0)
    view = ViewParams(side=given.side)
    training = Training((domains[0], domains[1]), view, params, None, method, device)
    training.begin()
    training.method.start(training.features())
    training.step.train_mode()
    return training


def growth(given: argparse.Namespace, device: torch.device) -> None:
    """K-means and transport, there and on the processor."""
    generator = torch.Generator().manual_seed(0)
    x_ND = F.normalize(torch.randn(given.features, 128, generator=generator), dim=1)
    prototype_KD = F.normalize(torch.randn(65, 128, generator=generator), dim=1)
    marginal_K = torch.full((65,), 1 / 65)

    def clustered(x: Tensor) -> Any:
        return kmeans(x, 65, iterations=20, restarts=5, seed=0, max_points=2000)

    def transported(x: Tensor) -> Any:
        return transport(x, prototype_KD.to(x.device), marginal_K.to(x.device), 0.05, 3)

    for name, work in (("K-means", clustered), ("transport", transported)):
        there, here = (
            timed(lambda x=x, work=work: work(x), where, 3, warm_up=1)  # type: ignore[misc]
            for x, where in ((x_ND.to(device), device), (x_ND, torch.device("cpu")))
        )
        print(f"  {name:<9} {1000 * there:.0f} ms there, {1000 * here:.0f} ms on the processor", flush=True)


def timed(work: Callable[[], Any], device: torch.device, times: int, warm_up: int = 3) -> float:
    """Seconds of one, the device waited for."""
    for _ in range(warm_up):
        work()
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    _wait(device)
    return (time.perf_counter() - began) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    run_main(main)
