"""DVC stage `pretrain@<dataset>`: the start of all trainings on a data set."""

from __future__ import annotations

from dataclasses import asdict

from ucir.cluster.launch import train_all
from ucir.data.fetch import local_start
from ucir.errors import run_main, stage_item
from ucir.models.checkpoints import save_encoder
from ucir.models.encoder import new_encoder
from ucir.paths import STARTS, check_writable, link_or_copy, unshare
from ucir.runs.run import PRETRAIN, plan_start, record_start_source
from ucir.runs.study import load_study
from ucir.training.start import given_start


def main() -> None:
    params = load_study(encoders=True)
    dataset = stage_item(params.datasets)
    block = params.datasets[dataset]
    out = STARTS / dataset
    check_writable(out)
    unshare(out)
    start = local_start(block.start)
    if start.pretrain:
        run = plan_start(block, dataset)
        train_all([run], params.cluster, PRETRAIN)
        link_or_copy(run.folder / "last.pt", out / "start.pt")
    else:
        encoder, origin = given_start(start, block.view.side)
        save_encoder(encoder, out / "start.pt", **({"weights": asdict(origin)} if origin else {}))
        if origin:
            print(f"pretrain: {origin.line()}")
    if start.encoder.head == "moco":  # else the frozen trunk is what results are held against
        seed = start.pretrain.seed if start.pretrain else 0
        save_encoder(new_encoder(start.encoder, seed), out / "untrained.pt")
    record_start_source(block, dataset)
    print(f"pretrain: start weights in {out / 'start.pt'}")


if __name__ == "__main__":
    run_main(main)
