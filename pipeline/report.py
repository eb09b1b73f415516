"""DVC stage `report`: tables, figures, one HTML page, and what to do next."""

from __future__ import annotations

from ucir import tracking
from ucir.errors import run_main
from ucir.paths import PACKS, REPORTS, RESULTS, unshare
from ucir.reports.table import plain
from ucir.reports.write import log_summaries, write_report
from ucir.runs.study import load_study


def main() -> None:
    params = load_study()
    unshare(REPORTS)
    written = write_report(params, PACKS, RESULTS, REPORTS)
    pages = log_summaries(params, written)
    for table in written.headline:
        print(f"\n{plain(table)}")
    for line in written.silent:
        print(f"\n{line}")
    print(
        "\nNext:\n"
        f"  open the report       {written.page}\n"
        f"  compare the runs      {tracking.experiment_url(tracking.tracking_uri())}\n"
        + "".join(f"                        {page}\n" for page in pages)
        + "  your own pictures     uv run ucir adapt --help"
    )


if __name__ == "__main__":
    run_main(main)
