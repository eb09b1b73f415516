"""DVC stage `evaluate_start@<dataset>-<setting>`: the random network and the start, untrained on pairs."""

from __future__ import annotations

import sys

from ucir.errors import run_main
from ucir.evaluation import evaluate_start
from ucir.paths import RESULTS
from ucir.study import load_study


def main() -> None:
    dataset, setting = sys.argv[1:3]
    evaluate_start(load_study(), dataset, setting, RESULTS)


if __name__ == "__main__":
    run_main(main)
