"""DVC stage `evaluate@<dataset>-<setting>-<method>`: both directions, last and best-by-labels epoch."""

from __future__ import annotations

from ucir.errors import run_main, stage_item
from ucir.paths import RESULTS, unshare
from ucir.retrieval.evaluation import evaluate_method
from ucir.runs.params import gate_choice
from ucir.runs.study import load_study


def main() -> None:
    params = load_study()
    part = params.study.runs[stage_item(params.study.runs)]
    folder = RESULTS / part.dataset / part.setting / part.method
    unshare(folder / "evaluate", folder / "metrics.json")
    gate = gate_choice(params, part.dataset, part.method)
    evaluate_method(params, part.dataset, part.setting, part.method, gate, RESULTS)


if __name__ == "__main__":
    run_main(main)
