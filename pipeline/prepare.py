"""DVC stage `prepare@<dataset>`: scan, verify, decode once."""

from __future__ import annotations

import sys
from pathlib import Path

from ucir.data.pack import domain_folders, read_index, split_pair, write_pack
from ucir.errors import run_main
from ucir.paths import PACKS, check_writable
from ucir.progress import Progress
from ucir.study import load_study


def main() -> None:
    dataset = sys.argv[1]
    block = load_study().datasets[dataset]
    found = domain_folders(Path(block.source))
    domains = list(dict.fromkeys(d for pair in block.pairs for d in split_pair(pair, found)))
    check_writable(PACKS / dataset)
    bars: dict[str, Progress] = {}

    def show(domain: str, done: int, total: int) -> None:
        bar = bars.get(domain)
        if bar is None:
            bar = bars[domain] = Progress(f"prepare {domain}", total, "file").__enter__()
        bar.advance(done - bar.done)
        if done == total:
            bar.__exit__(None, None, None)

    info, bad = write_pack(Path(block.source), domains, PACKS / dataset, block.pack, show)
    told = ", ".join(f"{count} {domain}" for domain, count in info.counts.items())
    print(f"prepare: {told} images in {len(info.classes)} classes at {info.side} px")
    for domain in info.counts:
        missing = sorted(
            set(info.classes) - {picture.label for picture in read_index(PACKS / dataset, domain)}
        )
        if missing:
            print(f"prepare: domain {domain} has no class {', '.join(missing)}: nothing to find there")
    for fault in bad:
        print(f"prepare: left out {fault.path}: {fault.reason}")


if __name__ == "__main__":
    run_main(main)
