"""DVC stage `evaluate_start@<dataset>-<setting>`: the random network and the start, untrained on pairs."""

from __future__ import annotations

import sys

from ucir.config import load_params
from ucir.errors import run_main
from ucir.evaluation import evaluate_start
from ucir.paths import RESULTS


def main() -> None:
    dataset, setting = sys.argv[1:3]
    evaluate_start(load_params(), dataset, setting, RESULTS)


if __name__ == "__main__":
    run_main(main)
