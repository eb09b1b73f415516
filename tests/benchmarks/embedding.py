"""A frozen trunk by torch and by ONNX Runtime, one thread each, alternately: pictures a second, ratio.

python -m tests.benchmarks.embedding [--trunk tf_efficientnet_lite0] [--side 128]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from ucir.config.model import EncoderParams
from ucir.models.embedding import CHUNK, pooled_features
from ucir.models.encoder import new_encoder
from ucir.models.runtime import compiled


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trunk", default="tf_efficientnet_lite0", help="timm's name")
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    params = EncoderParams(trunk={"timm": arguments.trunk}, feature_dim=16, head="residual")
    encoder = new_encoder(params, 0).eval()
    began = time.process_time()
    fast, reason = compiled(encoder, arguments.side)
    taken = time.process_time() - began
    assert not reason, reason
    x = torch.randn(CHUNK, 3, arguments.side, arguments.side)
    arms = {"torch, channels last": encoder, "ONNX Runtime": fast}
    one, other = (pooled_features(arm, x) for arm in arms.values())  # type: ignore[no-untyped-call]
    assert float((one - other).abs().max() / one.abs().max()) < 1e-4, "they compute different things"
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(arguments.rounds):
        for name, arm in arms.items():
            began = time.process_time()
            pooled_features(arm, x)  # type: ignore[no-untyped-call]
            seconds[name].append(time.process_time() - began)
    first, second = (statistics.median(values) for values in seconds.values())
    for name, values in seconds.items():
        print(f"{name}: {CHUNK / statistics.median(values):.0f} pictures per CPU second")
    print(f"{arguments.trunk} at {arguments.side} px: ratio {first / second:.2f}; compiled in {taken:.1f} s")


if __name__ == "__main__":
    main()
