"""DVC stage `evaluate@<dataset>-<setting>-<method>`: both directions, last and best-by-labels epoch."""

from __future__ import annotations

import sys

from ucir.config import load_params
from ucir.errors import run_main
from ucir.evaluation import evaluate_method
from ucir.paths import RESULTS


def main() -> None:
    dataset, setting, method = sys.argv[1:4]
    evaluate_method(load_params(), dataset, setting, method, RESULTS)


if __name__ == "__main__":
    run_main(main)
