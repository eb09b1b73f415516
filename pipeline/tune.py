"""DVC stage `tune@<sweep>`: a search over a method's params."""

from __future__ import annotations

import sys

from ucir.cluster.sweep import describe_result, tune_all, write_result
from ucir.errors import run_main
from ucir.paths import RESULTS, check_writable
from ucir.study import load_study


def main() -> None:
    name = sys.argv[1]
    params = load_study()
    out = RESULTS / "sweeps" / name
    check_writable(out)
    found = tune_all(params, name)
    write_result(found, params, name, out)
    for one in found:
        print(describe_result(one))
    print(f"tune: {out}/best.yaml holds the block to look at and to put into params.yaml")


if __name__ == "__main__":
    run_main(main)
