"""The `ucir` command. Heavy imports wait until a command needs them."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ucir import keep_bytecode
from ucir.config.base import PARAMS_FILE
from ucir.config.data import DatasetParams
from ucir.config.load import Params, load_params, parse_yaml, without_study
from ucir.errors import UserError, nearest, run_main
from ucir.paths import REPORTS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Unsupervised cross-domain image retrieval.\n\n"
    "`uv run dvc repro` runs the whole active study; the commands here choose the study, train single runs "
    "and check the machine. All settings stand in params.yaml.",
)

MOST_IN_GRID = 50

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
    keep_bytecode()
    run_main(app)


@app.command()
def study(
    name: Annotated[
        str | None,
        typer.Argument(help="A study under `studies`, or a small file with one; none = list them."),
    ] = None,
) -> None:
    """Choose what `uv run dvc repro` runs.

    Writes the `study` block of params.yaml from the lists that stand under `studies.NAME`. The shipped
    ones: `sample` (embedded, minutes), `pacs` (a real benchmark at a size for CPUs), `paper` (every table
    of the three papers; look at `uv run ucir plan paper` first).

    Two folders of your own pictures: `uv run ucir adapt`. More of your own than that: write a file mine.yaml,

    \b
      datasets:
        mine:
          source: <folder>   # with <domain>/<class>/<file>, or <domain>/<file> without labels
          pairs: [sketches-photos, paintings-photos]
          pack: {side: 128}
          view: {side: 128, eval_crop: 1.0}
          start:
            encoder: {trunk: {timm: tf_efficientnet_lite0}, head: residual}
            weights: embedded
            trained: head
      methods:
        ucdir: {mine: {clusters: 20, epochs: 20, lr: 0.002, key_momentum: by-epochs}}
      studies:
        mine: {datasets: [mine], settings: [closed], methods: [ucdir], seeds: [0]}

    then `uv run ucir study mine.yaml` and `uv run dvc repro`. It may hold `sweeps`, too. A block that
    params.yaml has already is replaced as a whole, and you are told.
    """
    from ucir.runs.study import activate, describe_recipes

    if name is None:
        typer.echo(describe_recipes())
        typer.echo("Next: `uv run ucir plan NAME` tells what it costs, `uv run ucir study NAME` chooses it")
        return
    chosen, replaced = activate(Path(PARAMS_FILE), name)
    for line in replaced:
        typer.echo(f"{PARAMS_FILE}: {line}")
    typer.echo(f"{PARAMS_FILE}: `uv run dvc repro` now runs the study {chosen!r}")
    typer.echo("Next: `uv run ucir plan` tells what it costs, `uv run dvc repro` runs it")


@app.command()
def adapt(
    first: Annotated[Path, typer.Argument(help="A folder of pictures, with class folders in it or not.")],
    second: Annotated[Path, typer.Argument(help="A folder of the same kinds of things in another style.")],
    name: Annotated[
        str | None, typer.Option(help="Of the model. Default: the names of the two folders.")
    ] = None,
    method: Annotated[str | None, typer.Option(help="Default: consensus.")] = None,
    trunk: Annotated[
        str | None,
        typer.Option(
            help="Any network of timm by its name, e.g. vit_small_patch14_dinov2.lvd142m. Default: "
            "tf_efficientnet_lite0, which is on this machine."
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            help="Of another network than the default: hub (default), or a file or folder of weights."
        ),
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(help="head (default; minutes on a CPU), last (the network's last stage, too), or all."),
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(min=2, help="A guess at the number of kinds. Default: looked for.")
    ] = None,
    epochs: Annotated[int | None, typer.Option(min=1, help="Default: those of the study `pacs`.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be done, and how long it takes.")
    ] = False,
) -> None:
    """Adapt a network to two folders of pictures in different styles; classes are not needed.

    \b
      uv run ucir adapt sketches/ photos/

    Writes the folders as a data set and a study into params.yaml, runs it with `dvc repro` and saves the
    model as models/NAME/model.pt. The same command goes on where a killed one stopped, takes up pictures
    that were added, changed or removed, and otherwise does nothing. Labels (class folders) serve the scores
    alone. `uv run ucir study sample` makes `dvc repro` run the sample again.
    """
    from ucir.runs.adapt import Options, describe_adaptation, plan_adaptation
    from ucir.runs.study import activate, with_blocks

    adaptation = plan_adaptation(
        first, second, name, Options(method, trunk, weights, trained, clusters, epochs)
    )
    params = with_blocks(adaptation.blocks)
    if adaptation.is_done(params):
        typer.echo(f"{adaptation.model_file} is up to date")
    else:
        typer.echo(describe_adaptation(params, adaptation))
    if dry_run:
        return
    activate(Path(PARAMS_FILE), adaptation.name, adaptation.blocks)
    from dvc.cli import main as dvc

    # the stages' `python` is this one, also where its folder is not on the path
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    if status := dvc(["repro"]):
        typer.echo("not finished: what is done is kept, the same command goes on from there", err=True)
        raise typer.Exit(status)
    typer.echo(f"model: {adaptation.save()}")
    typer.echo(f"Next: open {REPORTS / 'report.html'} and look at what is retrieved")


@app.command()
def plan(
    name: Annotated[str | None, typer.Argument(help="A study; default: the active one.")] = None,
    overrides: Overrides = None,
) -> None:
    """How much work a study is: runs for each table, what is done, disk, hours on this machine.

    Measures this machine with a few steps on noise, for which it needs no pictures; without a GPU it also
    tells how long one would take at least. Says which pictures and weights are not there yet.
    """
    from ucir.runs.cost import describe_hours, describe_runs, plan_study
    from ucir.runs.params import check_methods
    from ucir.runs.study import study_faults, unwritten

    params = load_params(overrides=list(overrides or []))
    check_methods(params)
    study_name = name or params.study.name
    chosen = plan_study(params, study_name)
    typer.echo(describe_runs(params, chosen))
    typer.echo(describe_hours(params, chosen))
    for fault in (*study_faults(params, study_name), *([] if name else unwritten(params))):
        typer.echo(f"Before it can run: {fault}")
    typer.echo("Next: `uv run ucir study NAME` chooses a study, `uv run dvc repro` runs it")


@app.command()
def check(
    dataset: Annotated[str, typer.Argument(help="A data set of params.yaml.")], overrides: Overrides = None
) -> None:
    """Look whether a data set is right: reads and decodes every picture, writes nothing.

    \b
      uv run ucir check pacs --set datasets.pacs.source=/data/PACS.zip

    Compares what is there with what the papers' authors had, by domain and class; names missing classes,
    misspelt folders, broken files, and the same picture in two domains. Exit status 1 when anything differs.
    """
    from ucir.data.checks import table
    from ucir.data.prepare import check_source
    from ucir.progress import by_domain

    result = check_source(_dataset_block(dataset, overrides or []), by_domain("check"))
    typer.echo(table(result))
    odd = len(result.faults) + len(result.bad)
    typer.echo(f"{dataset}: {f'{odd} to LOOK at' if odd else 'as expected'}")
    raise typer.Exit(1 if odd else 0)


@app.command()
def fetch(
    dataset: Annotated[
        str | None, typer.Argument(help="A data set of params.yaml; none = list the catalogue.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option("--unpack", help="Also unpack the archives into this folder, for other programs."),
    ] = None,
) -> None:
    """Download a data set and its start weights, or say which file to put where.

    Goes on where an earlier attempt stopped and verifies what has a published digest. Archives are read
    in place: nothing needs to be unpacked.
    """
    from ucir.data.catalogue import entry, names
    from ucir.data.fetch import fetch as fetch_files
    from ucir.data.fetch import local_start, unpack
    from ucir.data.source import is_archive
    from ucir.progress import Progress, by_bytes

    if dataset is None:
        for name in names():
            known = entry(name)
            typer.echo(f"{name}: {known.title}; {known.about}\n    {known.licence}\n    {known.ask}")
            if known.citation:
                typer.echo(f"    cite: {known.citation}")
        return
    block = _dataset_block(dataset)
    files = fetch_files(block, by_bytes)
    for file in files:
        typer.echo(f"there: {file}")
    if not files:
        typer.echo(f"{dataset}: {block.entry.ask}")
    if target:
        for file in filter(is_archive, files):
            with Progress(f"unpack {file.name}", 1, "file") as bar:
                count = unpack(file, target, bar.reach)
            typer.echo(f"unpacked: {count} files in {target}")
    start = local_start(block.start)
    if start.checkpoint:
        typer.echo(f"there: {start.checkpoint}")
    typer.echo(f"Next: `uv run ucir check {dataset}`")


@app.command()
def train(
    dataset: Annotated[str, typer.Option(help="A data set of params.yaml (`datasets.<name>`).")],
    pair: Annotated[
        list[str] | None,
        typer.Option(
            help="Two domains, e.g. Art-Real; may be repeated. In partial and open, Art>Real is one "
            "direction. Default: `datasets.<name>.pairs`."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="A method of params.yaml (`methods.<name>`).")] = "ucdir",
    setting: Annotated[
        str, typer.Option(help="closed, partial, open, or tailed-10: class sizes up to 10 : 1.")
    ] = "closed",
    seed: Annotated[
        list[int] | None, typer.Option(min=0, help="May be repeated. Default: `study.seeds`.")
    ] = None,
    num_workers: Annotated[
        int | None, typer.Option(help="Workers per training. Default: `cluster.num_workers`.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only tell what would be done and how long it takes.")
    ] = False,
) -> None:
    """Train one method on one or more pairs, in this process or on Ray workers.

    The data set must have been prepared once: `uv run dvc repro embed` does all of it. The
    same command goes on where a killed one stopped, and does nothing for runs that are done.
    """
    from ucir.runs.run import plan_runs

    changes = list(overrides or [])
    if num_workers is not None:
        changes.append(f"cluster.num_workers={num_workers}")
    params = _params_to_train_with(changes)
    runs = plan_runs(
        params,
        dataset,
        setting,
        method,
        tuple(pair) if pair else None,
        tuple(seed) if seed else None,
    )
    _check_read(params, changes, method, dataset)
    if dry_run:
        from ucir.runs.cost import describe

        typer.echo(describe(runs, params))
        return
    from ucir.cluster.launch import train_all
    from ucir.reports.table import direction_table, lead_metrics, plain
    from ucir.runs.scores import last_scores

    train_all(runs, params.cluster)
    if scores := last_scores(params, runs):
        for metric in lead_metrics(setting, f"P@{params.datasets[dataset].evaluate.cutoffs[0]}"):
            typer.echo("\n" + plain(direction_table(dataset, setting, {method: scores}, metric)))
    else:
        typer.echo("no labels, so no scores: look at what is retrieved in the report of `uv run dvc repro`")
    for run in runs:
        typer.echo(f"weights: {run.folder / 'last.pt'}")
    typer.echo("Next: `uv run dvc repro` for the whole study with its report")


@app.command()
def tune(
    name: Annotated[
        str | None, typer.Argument(help="A sweep under `sweeps` of params.yaml; none = list them.")
    ] = None,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check the sweep and tell how much work it is; start nothing.")
    ] = False,
) -> None:
    """Search a method's params on Ray Tune: temperatures, K, loss weights, any key of its block.

    \b
      sweeps:
        mine:
          dataset: digits
          method: ucdir
          trials: 20
          search: random            # grid, tpe
          scheduler: asha           # fifo, median
          grace: 4                  # epochs that every trial has
          epochs: 10                # of a trial, instead of the method's
          pairs: [printed-street]   # instead of the data set's
          objective: transport      # or a list of criteria, or oracle
          scope: shared             # or per_pair
          space:
            temperature: {loguniform: [0.05, 0.5]}
            cluster_weight: {uniform: [0, 2]}
            batch_size: {integer: [32, 64]}
            clusters: [10, 20, 40]

    Criteria: transport, mixing, mutual_neighbours, rank, cluster_cycle, silhouette, stability, density.

    A trial trains all pairs with one candidate; its score is the mean of the objective over them, of a list
    the product; default: silhouette, stability, cluster_cycle, rank. No objective needs labels but `oracle`
    (P@K). The same command goes on where a killed one stopped; trials are runs like any other and never
    repeated. What was found lies in results/sweeps/NAME: best.yaml (look at it, then copy it into
    params.yaml), trials.csv, criteria.csv.
    """
    params = _params_to_train_with(overrides or [])
    if name is None:
        for title, block in params.sweeps.items():
            keys = ", ".join(block.space)
            typer.echo(f"{title}: {block.method} on {block.dataset}, {block.candidates} candidates of {keys}")
        typer.echo("Next: `uv run ucir tune NAME`, or write your own under `sweeps` (`ucir tune --help`)")
        return
    if name in params.sweeps:
        sweep = params.sweeps[name]
        _check_read(params, overrides or [], sweep.method, sweep.dataset)
    if dry_run:
        from ucir.runs.sweep import describe_sweep

        typer.echo(describe_sweep(params, name))
        return
    from ucir.cluster.tune import run_sweep

    out = run_sweep(params, name)
    typer.echo(f"Next: look at {out}/best.yaml, put its block into params.yaml, then `uv run dvc repro`")


@app.command()
def index(
    source: Annotated[Path, typer.Argument(help="A folder of pictures, an archive (zip, tar), or a pack.")],
    model: Annotated[
        str | None,
        typer.Option(
            help="A name under models/, or a file, e.g. last.pt of a training. Default: that of the index, "
            "or for a new one the network that came with the installation (`embedded`)."
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the index. Default: <source>.index, beside the pictures.")
    ] = None,
    domain: Annotated[
        str | None,
        typer.Option(
            help="See the pictures as of this domain of the model. Default: the folder's name if the "
            "model knows it, else of each picture the nearest."
        ),
    ] = None,
    queries: Annotated[
        Path | None,
        typer.Option(
            help="Pictures like those that will be asked with: the limit beyond which nothing is like "
            "a query is learnt from them. Default: from the pictures that the model was trained on."
        ),
    ] = None,
    false_rejections: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            max=0.999,
            help="Share of pictures like these that the limit rejects. Default: the index's, or 0.05.",
        ),
    ] = None,
    workers: Annotated[
        int,
        typer.Option(help="Embed on so many workers of a Ray cluster (RAY_ADDRESS, or one started here)."),
    ] = 0,
    thumbnails: Annotated[
        bool,
        typer.Option(help="Keep a small form of each new picture, some 8 kB: pages and grids show these."),
    ] = True,
    rebuild: Annotated[
        bool,
        typer.Option(
            "--rebuild", help="Make it anew, e.g. with another model; the old one stays until then."
        ),
    ] = False,
) -> None:
    """Make a collection searchable, or bring its index up to date.

    \b
      uv run ucir index photos/ --model sketches_photos

    Give the same command again after pictures were added, changed or removed, or after a kill: only what is
    new is read. Files that are no pictures, or broken, are left out and named.
    """
    from ucir.config.cluster import ClusterParams
    from ucir.data.source import domain_of_folder
    from ucir.devices import choose_device
    from ucir.models.model import find_model, load_model
    from ucir.models.pretrained import EMBEDDED
    from ucir.progress import Progress
    from ucir.retrieval import index as build

    build.check_collection(source)
    folder = out or build.default_folder(source)
    build.check_folder(folder)
    cluster = ClusterParams(num_workers=workers)
    device = choose_device(cluster)
    there = folder / build.MODEL_FILE
    chosen = (
        load_model(there, device)
        if model is None and there.exists()
        else find_model(model or EMBEDDED, device)
    )
    if domain is None and (named := domain_of_folder(source.resolve().name)) in chosen.domains:
        domain = named
    chosen.check_domain(domain)
    samples = {queries.resolve().name: build.sample_features(chosen, queries)} if queries else None

    def compute(embedder: build.FileEmbedder) -> build.Compute:
        if not workers:
            return build.embed_files(embedder)
        from ucir.cluster.index import embed_on_ray

        return embed_on_ray(embedder, cluster)

    with Progress(f"index {source}", 0, "file") as bar:
        info = build.update_index(
            source,
            folder,
            chosen,
            domain,
            compute,
            bar.reach,
            thumbnails,
            samples,
            false_rejections,
            rebuild,
        )
    typer.echo(build.describe_index(folder, info))
    given = quote(str(folder))
    typer.echo(f"Next: `uv run ucir search --index {given} <picture>`, `uv run ucir serve {given}`")


@app.command()
def search(
    query: Annotated[list[Path] | None, typer.Argument(help="Pictures to search with.")] = None,
    index: Annotated[
        Path | None,
        typer.Option(help="The index, or the collection beside which it lies. Default: the only one here."),
    ] = None,
    top: Annotated[int, typer.Option(help="Hits of each query.", min=1)] = 10,
    like: Annotated[
        str | None, typer.Option(help="Search with a picture of the index, by its path in the collection.")
    ] = None,
    folder: Annotated[
        str | None,
        typer.Option(help="Only pictures in this folder of the collection."),
    ] = None,
    query_domain: Annotated[
        str | None,
        typer.Option(
            help="Which of the model's domains the queries are of, whose limit counts. Default: of each the "
            "one whose centre is the nearest."
        ),
    ] = None,
    hide_duplicates: Annotated[
        bool, typer.Option("--hide-duplicates", help="Of near duplicates show the most similar one.")
    ] = False,
    limit: Annotated[
        float | None,
        typer.Option(help="1 - cosine beyond which nothing is like a query. Default: the index's own."),
    ] = None,
    anyway: Annotated[
        bool, typer.Option("--anyway", help="List the nearest also where nothing is like the query.")
    ] = False,
    expand: Annotated[
        int, typer.Option(help="Search once more with the mean of the query and so many hits.", min=0)
    ] = 0,
    json: Annotated[bool, typer.Option("--json", help="One JSON object a query, on a line.")] = False,
    grid: Annotated[Path | None, typer.Option(help="Write a picture of queries and hits, PNG.")] = None,
) -> None:
    """Find the most similar pictures of an index.

    \b
      uv run ucir search --index photos sketch.png --top 5

    Scores are cosines, distances 1 - cosine. Where the nearest picture lies beyond the index's limit,
    nothing is listed but the reason.
    """
    from json import dumps

    from ucir.models.model import BATCH
    from ucir.retrieval.search import Searcher, only_index, open_query

    if bool(query) == bool(like):
        raise UserError("give pictures to search with, or --like a picture of the index")
    if like and (query_domain or limit is not None or expand):
        raise UserError(
            "--query-domain, --limit and --expand go with pictures to search with, not with --like"
        )
    if grid and (grid.suffix.lower() != ".png" or not grid.parent.is_dir()):
        raise UserError(f"--grid {grid}: a file ending with .png in a folder that is there")
    if grid and top > MOST_IN_GRID:
        raise UserError(f"--top {top} with --grid: a picture shows at most {MOST_IN_GRID} hits of a query")
    searcher = Searcher.load(index or only_index())
    answers = [searcher.like(like, top, below=folder, hide_duplicates=hide_duplicates)] if like else []
    names = [like] if like else []
    pictures = [searcher.picture(like)] if like and grid else []
    unreadable = []
    queries = query or []
    for first in range(0, len(queries), BATCH):
        opened = {}
        for path in queries[first : first + BATCH]:
            try:
                opened[path] = open_query(path, searcher.model.pack.max_pixels)
            except UserError as error:  # the others are answered all the same
                unreadable.append(str(error))
        if opened:
            answers += searcher.search(
                [*opened.values()],
                top,
                below=folder,
                hide_duplicates=hide_duplicates,
                domain=query_domain,
                limit=limit,
                expand=expand,
            )
        names += map(str, opened)
        pictures += opened.values() if grid else ()
    for name, answer in zip(names, answers, strict=True):
        shown = answer.hits if anyway or answer.accepted is not False else ()
        if json:
            hits = [{**asdict(hit), "score": round(hit.score, 6)} for hit in shown]
            line = {"query": name, "accepted": answer.accepted, "reason": answer.reason, "hits": hits}
            typer.echo(dumps(line, ensure_ascii=False))
            continue
        typer.echo(f"{name}: {answer.reason}")
        for hit in shown:
            more = f"  and {len(hit.duplicates)} near duplicate(s)" if hit.duplicates else ""
            typer.echo(f"{hit.rank:5}  {hit.score:6.3f}  {hit.path}{more}")
    if any(answer.accepted is False for answer in answers) and not anyway and not json:
        typer.echo("`--anyway` lists the nearest all the same")
    if grid and answers:
        from ucir.reports.figures import hit_grid

        found = [[searcher.picture(hit.id) for hit in answer.hits] for answer in answers]
        grid.write_bytes(hit_grid(pictures, found))
        typer.echo(f"grid: {grid}", err=json)
    if unreadable:
        raise UserError("; ".join(unreadable))


@app.command()
def serve(
    index: Annotated[
        list[Path] | None,
        typer.Argument(help="Indexes, or the collections beside which they lie. Default: the only one here."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 = for others, too, who then need the token.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535)] = 8000,
    token: Annotated[
        str | None,
        typer.Option(
            envvar="UCIR_TOKEN",
            help="What every request but for /health must bring. Default: none on this machine, a new one "
            "for others.",
        ),
    ] = None,
    name: Annotated[
        list[str] | None, typer.Option(help="A name that others call this machine by; may be repeated.")
    ] = None,
    rate: Annotated[
        str, typer.Option(help="Searches of each client; behind a proxy all clients count as one.")
    ] = "240/minute",
) -> None:
    """Serve a page on which a drawing or a picture finds pictures, and its API (/openapi.json).

    \b
      uv run ucir serve photos
      curl -F picture=@sketch.png 'http://127.0.0.1:8000/api/search?index=photos&k=5'

    It answers this machine alone, unless --host says otherwise. An index that is brought up to date meanwhile
    is taken up. /health and /metrics (Prometheus) tell how it does. Ctrl+C ends it.
    """
    from ucir.retrieval.search import index_folder, only_index
    from ucir.serve.run import run_server

    folders = [index_folder(path) for path in index or [only_index()]]
    run_server(folders, host, port, token, list(name or []), rate)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="A name under models/, a file, or `embedded`.")],
    out: Annotated[Path, typer.Argument(help="A file NAME.onnx, or a folder in the layout of Hugging Face.")],
    domain: Annotated[
        str | None,
        typer.Option(help="ONNX: which of the model's domains the pictures are of. Default: the nearest."),
    ] = None,
) -> None:
    """Write a model for other programs.

    \b
      uv run ucir export sketches_photos model.onnx     # for ONNX Runtime, browsers, phones
      uv run ucir export sketches_photos for-the-hub/   # model.safetensors, config.json, its card
      uv run hf upload me/sketches-photos for-the-hub/  # give it away

    The ONNX file takes uint8 pictures (batch, side, side, 3), RGB, and gives unit features; before it is
    written they were found equal to torch's to 1e-4. How a picture becomes such a square stands in the file's
    metadata, and in config.json.
    """
    from ucir.models.export import write_folder, write_onnx
    from ucir.models.model import find_model

    chosen = find_model(model)
    if out.suffix == ".onnx":
        difference = write_onnx(chosen, out, domain)
        typer.echo(f"{out}: features differ by at most {difference:.1e} from torch's")
        return
    if out.suffix:
        raise UserError(f"{out}: name a file ending with .onnx, or a folder without an ending")
    if domain:
        raise UserError("--domain goes with an .onnx file: a folder holds both domains")
    write_folder(chosen, out)
    typer.echo(f"{out}: look at its README.md before you give it away")
    given = quote(str(out))
    typer.echo(
        f"Next: `uv run ucir import {given} <name>` elsewhere, or `uv run hf upload <you>/<name> {given}`"
    )


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(help="What `ucir export` wrote.")],
    name: Annotated[str, typer.Argument(help="What the model is to be called here.")],
) -> None:
    """Take up a model that somebody exported, as models/NAME/model.pt.

    \b
      uv run hf download me/sketches-photos --local-dir sketches-photos
      uv run ucir import sketches-photos sketches_photos
    """
    from ucir.models.export import read_folder
    from ucir.models.model import model_file, save_model

    path = model_file(name)
    if path.exists():
        raise UserError(f"{path}: there is a model of this name: give another, or delete that")
    save_model(read_folder(folder), path)
    typer.echo(f"model: {path}")
    typer.echo(f"Next: `uv run ucir index photos/ --model {name}`")


def _params_to_train_with(overrides: Sequence[str]) -> Params:
    """The params, with overrides that trainings feel: earlier stages, which make pictures, read the file.

    Raises:
        UserError: an override would change nothing.
    """
    raw = parse_yaml(Path(PARAMS_FILE))
    made = load_params(raw=without_study(raw)).datasets
    for name, block in load_params(overrides=overrides, raw=without_study(raw)).datasets.items():
        for field in ("source", "sample", "catalogue"):
            if name not in made or getattr(block, field) != getattr(made[name], field):
                raise UserError(
                    f"--set datasets.{name}: {field} says which pictures there are, and earlier stages "
                    f"make these: write it into {PARAMS_FILE} and run `uv run dvc repro prepare`"
                )
    return load_params(overrides=overrides, raw=raw)  # the blocks are shared: overridden once more


def _check_read(params: Params, overrides: Sequence[str], method: str, dataset: str) -> None:
    """Raises UserError: a method's block is wrong; a training of this method does not read an override."""
    from ucir.methods.registry import fixed_keys, params_block
    from ucir.runs.params import check_methods

    check_methods(params)
    block = f"methods.{params_block(method)}.{dataset}."
    fixed = fixed_keys(method)
    reads = {"methods": block, "datasets": f"datasets.{dataset}."}
    for override in overrides:
        key = override.partition("=")[0] + "."
        read = reads.get(key.partition(".")[0], key)
        if not key.startswith(read) and not read.startswith(key):
            raise UserError(f"--set {override}: {method} on {dataset} reads {read[:-1]}")
        field = key.removeprefix(block)[:-1]
        if field in fixed:
            raise UserError(f"--set {override}: {method} has {field} {fixed[field]} for good")


def _dataset_block(dataset: str, overrides: Sequence[str] = ()) -> DatasetParams:
    params = load_params(overrides=overrides, raw=without_study())
    if dataset not in params.datasets:
        raise UserError(f"data set {dataset!r} is unknown; {nearest(dataset, params.datasets)}")
    return params.datasets[dataset]


@app.command()
def doctor() -> None:
    """Check this machine (packages, GPU, disk, memory, cluster, tracking server) and params.yaml."""
    from ucir.doctor import examine

    findings = examine()
    for finding in findings:
        typer.echo(f"{'ok  ' if finding.good else 'LOOK'}  {finding.text}")
    typer.echo("Next: `uv run dvc repro`" if all(f.good for f in findings) else "See the lines marked LOOK")
    raise typer.Exit(0 if all(f.good for f in findings) else 1)
