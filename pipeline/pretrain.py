"""DVC stage `pretrain@<dataset>`: the start of all trainings on a data set."""

from __future__ import annotations

import sys

from ucir.data.fetch import local_start
from ucir.data.pack import open_domain, read_info
from ucir.devices import choose_device
from ucir.errors import run_main
from ucir.paths import PACKS, STARTS, check_writable
from ucir.progress import Progress
from ucir.study import load_study
from ucir.training.pretrain import make_start


def main() -> None:
    dataset = sys.argv[1]
    params = load_study()
    block = params.datasets[dataset]
    pack, out = PACKS / dataset, STARTS / dataset
    check_writable(out)
    start = local_start(block.start)
    domains = [open_domain(pack, domain) for domain in read_info(pack).counts]
    steps = start.pretrain.steps if start.pretrain else 0
    with Progress("pretrain", steps, "step") as progress:
        make_start(
            domains,
            block.view,
            start,
            out,
            choose_device(params.cluster),
            lambda step, total, loss: progress.advance(1, f"loss {loss:.3f}"),
        )
    print(f"pretrain: start weights in {out / 'start.pt'}")


if __name__ == "__main__":
    run_main(main)
