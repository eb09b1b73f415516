"""DVC stage `evaluate@<dataset>-<setting>-<method>`: both directions, last and best-by-labels epoch."""

from __future__ import annotations

import sys

from ucir.errors import run_main
from ucir.evaluation import evaluate_method
from ucir.paths import RESULTS
from ucir.study import load_study


def main() -> None:
    params = load_study()
    part = params.study.runs[sys.argv[1]]
    evaluate_method(params, part.dataset, part.setting, part.method, RESULTS)


if __name__ == "__main__":
    run_main(main)
