"""The `ucir` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ucir.config import PARAMS_FILE, load_params
from ucir.errors import UserError, nearest, run_main

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Unsupervised cross-domain image retrieval.\n\n"
    "`uv run dvc repro` runs the whole active study; the commands here choose the study, train single runs "
    "and check the machine. All settings stand in params.yaml.",
)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Another value for a key of params.yaml, by its path; may be repeated. "
        "Example: --set methods.ucdir.digits.lr=0.01",
    ),
]


def main() -> None:
    """Entry point of the console script."""
    run_main(app)


@app.command()
def study(
    name: Annotated[str | None, typer.Argument(help="A study under `studies`; none = list them.")] = None,
) -> None:
    """Choose what `uv run dvc repro` runs.

    Writes the `study` block of params.yaml from the lists that stand under `studies.NAME`.

    Your own pictures: put them as <folder>/<domain>/<class>/<file>. In params.yaml add a block under
    `datasets` with their `source`, `pairs` and start, one under `methods.ucdir` with the number of
    `clusters`, and a line under `studies`; README.md, "Your own pictures", has all three to copy. Then
    `uv run ucir study NAME` and `uv run dvc repro`.
    """
    from ucir.data.pack import domain_folders
    from ucir.study import activate, study_block

    params = load_params()
    if name is None:
        for known, recipe in params.studies.items():
            mark = "*" if known == params.study.name else " "
            typer.echo(
                f"{mark} {known}: {', '.join(recipe.datasets)} x {', '.join(recipe.settings)} x "
                f"{', '.join(recipe.methods)}, seeds {', '.join(map(str, recipe.seeds))}"
            )
            try:
                study_block(params, known)
            except UserError as error:
                typer.echo(f"    cannot run: {error}")
        typer.echo("Next: `uv run ucir study NAME`, then `uv run dvc repro`")
        return
    if name not in params.studies:
        raise UserError(f"study {name!r} is unknown; {nearest(name, params.studies)}")
    for dataset in params.studies[name].datasets:
        block = params.datasets.get(dataset)
        if block and not block.sample:
            domain_folders(Path(block.source))
    activate(Path(PARAMS_FILE), params, name)
    typer.echo(f"{PARAMS_FILE}: `uv run dvc repro` now runs the study {name!r}")


@app.command()
def train(
    dataset: Annotated[str, typer.Option(help="A data set of params.yaml (`datasets.<name>`).")],
    pair: Annotated[
        list[str] | None,
        typer.Option(help="Two domains, e.g. Art-Real; may be repeated. Default: `datasets.<name>.pairs`."),
    ] = None,
    method: Annotated[str, typer.Option(help="A method of params.yaml (`methods.<name>`).")] = "ucdir",
    setting: Annotated[str, typer.Option(help="Label spaces of the two domains: closed.")] = "closed",
    seed: Annotated[list[int] | None, typer.Option(help="May be repeated. Default: `study.seeds`.")] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Workers per training. Default: `cluster.num_workers`.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be done and how long it takes.")
    ] = False,
) -> None:
    """Train one method on one or more pairs, in this process or on Ray workers.

    The data set must have been prepared once: `uv run dvc repro prepare pretrain` does it. The
    same command goes on where a killed one stopped, and does nothing for runs that are done.
    """
    from ucir.cluster.runs import plan_runs

    changes = list(overrides or [])
    if num_workers is not None:
        changes.append(f"cluster.num_workers={num_workers}")
    params = load_params(overrides=changes)
    runs = plan_runs(
        params,
        dataset,
        setting,
        method,
        tuple(pair) if pair else None,
        tuple(seed) if seed else None,
    )
    if dry_run:
        from ucir.cluster.plan import describe

        typer.echo(describe(runs, params))
        return
    from ucir.cluster.launch import train_all
    from ucir.evaluation import last_scores
    from ucir.reports.table import direction_table, display_name, plain, score_rows

    train_all(runs, params.cluster)
    block = params.datasets[dataset]
    rows = score_rows(dataset, setting, method, last_scores(params, runs))
    typer.echo("\n" + plain(direction_table(rows, display_name(f"P_at_{block.evaluate.cutoffs[0]}"))))
    for run in runs:
        typer.echo(f"weights: {run.folder / 'last.pt'}")
    typer.echo("Next: `uv run dvc repro` for the whole study with its report")


@app.command()
def doctor() -> None:
    """Check this machine: packages, GPU, disk, memory, cluster and tracking server."""
    from ucir.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.good else 'LOOK'}  {finding.text}")
    typer.echo("Next: `uv run dvc repro`" if all(f.good for f in findings) else "See the lines marked LOOK")
    raise typer.Exit(0 if all(f.good for f in findings) else 1)
