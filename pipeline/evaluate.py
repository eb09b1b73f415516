"""DVC stage `evaluate@<dataset>-<setting>-<method>`: both directions, last and best-by-labels epoch."""

from __future__ import annotations

import sys

from ucir.errors import run_main
from ucir.evaluation import evaluate_method
from ucir.paths import RESULTS
from ucir.study import load_study


def main() -> None:
    dataset, setting, method = sys.argv[1:4]
    evaluate_method(load_study(), dataset, setting, method, RESULTS)


if __name__ == "__main__":
    run_main(main)
