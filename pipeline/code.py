"""DVC stage `code`: checks params.yaml, and writes which code each stage runs through, so that
no other code starts it again."""

from __future__ import annotations

import json

from ucir.errors import UserError, run_main
from ucir.paths import CODE, check_writable
from ucir.runs.dependencies import code_hashes, stage_modules
from ucir.runs.study import load_study, unwritten


def main() -> None:
    if faults := unwritten(load_study()):  # all of it, before any work: other stages depend on parts
        raise UserError("; ".join(faults))
    check_writable(CODE)
    for stage, modules in stage_modules().items():
        text = json.dumps(code_hashes(modules), indent=1)
        (CODE / f"{stage}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
