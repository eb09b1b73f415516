"""DVC stage `evaluate_start@<dataset>-<setting>`: the random network, the start, and what it is made of."""

from __future__ import annotations

from ucir.errors import run_main, stage_item
from ucir.paths import RESULTS, unshare
from ucir.retrieval.evaluation import evaluate_start
from ucir.runs.params import gate_choice
from ucir.runs.study import load_study


def main() -> None:
    params = load_study()
    key = stage_item(params.study.settings)
    part = params.study.settings[key]
    folder = RESULTS / part.dataset / part.setting
    unshare(folder / "start", folder / "start.json", folder / "label_spaces.json")
    gate = gate_choice(params, part.dataset, None)
    evaluate_start(params, key, gate, RESULTS)


if __name__ == "__main__":
    run_main(main)
