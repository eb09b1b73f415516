"""DVC stage `evaluate_start@<dataset>-<setting>`: the random network and the start, untrained on pairs."""

from __future__ import annotations

import sys

from ucir.errors import run_main
from ucir.evaluation import evaluate_start
from ucir.paths import RESULTS
from ucir.study import load_study


def main() -> None:
    evaluate_start(load_study(), sys.argv[1], RESULTS)


if __name__ == "__main__":
    run_main(main)
