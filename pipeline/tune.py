"""DVC stage `tune@<sweep>`: a search over a method's params."""

from __future__ import annotations

import sys

from ucir.cluster.tune import run_sweep
from ucir.errors import run_main
from ucir.runs.study import load_study


def main() -> None:
    out = run_sweep(load_study(), sys.argv[1])
    print(f"tune: {out}/best.yaml holds the block to look at and to put into params.yaml")


if __name__ == "__main__":
    run_main(main)
