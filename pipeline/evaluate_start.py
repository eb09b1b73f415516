"""DVC stage `evaluate_start@<dataset>-<setting>`: the random network and the start, untrained on pairs."""

from __future__ import annotations

import sys

from ucir.errors import run_main
from ucir.paths import RESULTS
from ucir.retrieval.evaluation import evaluate_start
from ucir.runs.params import gate_choice
from ucir.runs.study import load_study


def main() -> None:
    params, key = load_study(), sys.argv[1]
    gate = gate_choice(params, params.study.settings[key].dataset, None)
    evaluate_start(params, key, gate, RESULTS)


if __name__ == "__main__":
    run_main(main)
