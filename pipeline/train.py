"""DVC stage `train@<dataset>-<setting>-<method>`: all pairs and seeds, here or on a cluster."""

from __future__ import annotations

from ucir.cluster.launch import train_all
from ucir.errors import listed, run_main, stage_item
from ucir.paths import RESULTS, check_writable, unshare
from ucir.runs.process import track_model
from ucir.runs.run import materialise, plan_runs
from ucir.runs.study import load_study
from ucir.tracking import tracking_uri


def main() -> None:
    params = load_study()
    part = params.study.runs[stage_item(params.study.runs)]
    out = RESULTS / part.dataset / part.setting / part.method / "train"
    check_writable(out)
    unshare(out)
    runs = plan_runs(params, part.dataset, part.setting, part.method, part.pairs)
    train_all(runs, params.cluster)
    for run in runs:
        materialise(run, out)
        if run.seed == params.study.seeds[0]:  # as in the report's figures: a model of each pair is enough
            track_model(run, tracking_uri())
    print(f"train: {listed([run.slug for run in runs], 6)} in {out}")


if __name__ == "__main__":
    run_main(main)
