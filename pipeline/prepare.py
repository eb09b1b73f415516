"""DVC stage `prepare@<dataset>`: scan, verify, decode once."""

from __future__ import annotations

import time
from pathlib import Path

from ucir.data.checks import table
from ucir.data.pack import read_index
from ucir.data.prepare import prepared_domains, write_pack
from ucir.errors import run_main, stage_item
from ucir.paths import PACKS, check_writable, unshare
from ucir.progress import by_domain
from ucir.runs.study import load_study


def main() -> None:
    params = load_study(encoders=True)
    dataset = stage_item(params.datasets)
    block = params.datasets[dataset]
    domains = prepared_domains(block)
    out = PACKS / dataset
    check_writable(out)
    unshare(out)
    began = time.monotonic()
    info, check = write_pack(Path(block.source), domains, out, block.pack, by_domain("prepare"), block.entry)
    for domain, count in info.counts.items():
        if small := sum(min(p.width, p.height) < info.side for p in read_index(out, domain)):
            print(f"  {domain}: {small} of {count} pictures are below {info.side} px and were scaled up")
    size = sum(path.stat().st_size for path in out.glob("*.u8")) / 2**20
    print(table(check))
    print(
        f"prepare: {sum(info.counts.values())} pictures of {len(info.counts)} domains at {info.side} px "
        f"({check.decoded} decoded now), {size:.0f} MiB in {out}, {time.monotonic() - began:.0f} s; "
        f"all counts in {out / 'check'}"
    )


if __name__ == "__main__":
    run_main(main)
