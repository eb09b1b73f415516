"""DVC stage `tune@<sweep>`: a search over a method's params."""

from __future__ import annotations

from ucir.cluster.tune import run_sweep
from ucir.errors import run_main, stage_item
from ucir.runs.study import load_study


def main() -> None:
    params = load_study()
    out = run_sweep(params, stage_item(params.study.sweeps))
    print(f"tune: {out}/best.yaml holds the block to look at and to put into params.yaml")


if __name__ == "__main__":
    run_main(main)
