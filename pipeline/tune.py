"""DVC stage `tune@<sweep>`: a search over a method's params."""

from __future__ import annotations

from ucir.cluster.tune import run_sweep
from ucir.errors import run_main, stage_item
from ucir.paths import RESULTS, unshare
from ucir.runs.study import load_study


def main() -> None:
    params = load_study()
    name = stage_item(params.study.sweeps)
    unshare(RESULTS / "sweeps" / name)
    out = run_sweep(params, name)
    print(f"tune: {out}/best.yaml holds the block to look at and to put into params.yaml")


if __name__ == "__main__":
    run_main(main)
