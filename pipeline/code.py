"""DVC stage `code`: which code each stage runs through, so that another one does not start it."""

from __future__ import annotations

import json

from ucir.errors import run_main
from ucir.paths import CODE, check_writable
from ucir.runs.dependencies import code_hashes, stage_modules


def main() -> None:
    check_writable(CODE)
    for stage, modules in stage_modules().items():
        text = json.dumps(code_hashes(modules), indent=1)
        (CODE / f"{stage}.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_main(main)
