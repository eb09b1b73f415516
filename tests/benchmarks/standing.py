"""Rank and mean of finished methods, without the pair that settings were chosen on, and a paired test.

Reads `results/`, which `uv run dvc repro` leaves of a study; its report has the same table of all pairs
against the start. The tables and comparisons of `ucir/reports/README.md` are these:

    uv run python -m tests.benchmarks.standing pacs closed P@50 --without photo-cartoon
    uv run python -m tests.benchmarks.standing pacs closed P@50 --without photo-cartoon --against protonce
"""

from __future__ import annotations

from tests.benchmarks import REMEDY, argument_parser
from ucir.errors import UserError, listed, nearest, run_main
from ucir.paths import RESULTS
from ucir.reports.table import markdown, read_results, scored_directions, standing_table
from ucir.retrieval.evaluation import PRETRAINED


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("dataset")
    parser.add_argument("setting")
    parser.add_argument("metric", help="as the report names it: P@50, mAP@All, 'gate AUROC' ...")
    parser.add_argument("--without", nargs="+", metavar="PAIR", default=[], help="pairs that do not count")
    parser.add_argument("--seed", type=int, help="of the methods; default: the mean over all there are")
    parser.add_argument("--against", metavar="METHOD", default=PRETRAINED, help="default: the start")
    given = parser.parse_args()
    folder = RESULTS / given.dataset / given.setting
    found = sorted(str(path.parent.relative_to(folder)) for path in folder.glob("**/metrics.json"))
    scores = read_results(RESULTS, given.dataset, given.setting, found)
    if given.against not in scores:
        there = listed(list(scores), 8) or f"nothing: {REMEDY}"
        raise UserError(f"{given.against}: not in {folder}, which has {there}")
    pairs = {f"{one}-{other}": {(one, other), (other, one)} for one, other in scored_directions(scores)}
    if unknown := [pair for pair in given.without if pair not in pairs]:
        raise UserError(f"--without {unknown[0]}: no pair of {folder}; {nearest(unknown[0], pairs)}")
    left = {direction for pair in given.without for direction in pairs[pair]}
    kept = {
        method: [
            s
            for s in rows
            if (s.query, s.gallery) not in left
            and (given.seed in (None, s.seed) or f"start/{method}" in found)
        ]
        for method, rows in scores.items()
    }
    table = standing_table(given.dataset, given.setting, kept, given.metric, given.against)
    if table is None:
        raise UserError(
            f"{given.metric}: {given.against} has no such score of two trainings or more in {folder}"
        )
    print(markdown(table))


if __name__ == "__main__":
    run_main(main)
