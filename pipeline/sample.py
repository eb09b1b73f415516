"""DVC stage `sample@<dataset>`: draw the embedded sample data set."""

from __future__ import annotations

from pathlib import Path

from ucir.config.load import load_params
from ucir.data.digits import make_digits
from ucir.errors import UserError, run_main, stage_item
from ucir.paths import unshare


def main() -> None:
    datasets = load_params().datasets
    dataset = stage_item(datasets)
    block = datasets[dataset]
    if block.sample is None:
        raise UserError(f"params.yaml: datasets.{dataset} has no 'sample' block")
    unshare(Path(block.source))
    counts = make_digits(Path(block.source), per_class=block.sample.per_class, seed=block.sample.seed)
    drawn = ", ".join(f"{count} {domain}" for domain, count in counts.items())
    print(f"sample: drew {drawn} images into {block.source}")


if __name__ == "__main__":
    run_main(main)
