"""Clients that search all the time: errors, seconds of an answer, and memory of the server's processes.

python -m tests.benchmarks.serving photos.index sketches/ --clients 32 --seconds 60
"""

from __future__ import annotations

import http.client
import itertools
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil

from tests.benchmarks import argument_parser
from ucir.errors import run_main


def request(port: int, name: str, data: bytes) -> int:
    """Search once; the answer's status."""
    body = (
        b'--b\r\nContent-Disposition: form-data; name="picture"; filename="q"\r\n\r\n'
        + data
        + b"\r\n--b--\r\n"
    )
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    connection.request("POST", f"/api/search?index={name}&k=40", body, kind)
    answer = connection.getresponse()
    answer.read()
    connection.close()
    return answer.status


def memory(process: psutil.Process) -> float:
    """MiB of a process and its children."""
    return float(sum(p.memory_info().rss for p in (process, *process.children(recursive=True)))) / 2**20


def main() -> None:
    parser = argument_parser(__doc__)
    parser.add_argument("index", type=Path)
    parser.add_argument("queries", type=Path, help="a folder of pictures")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--port", type=int, default=8765)
    arguments = parser.parse_args()
    for there in (arguments.index, arguments.queries):
        if not there.is_dir():
            parser.error(f"{there}: no such folder")
    pictures = [file.read_bytes() for file in itertools.islice(arguments.queries.rglob("*.*"), 500)]
    name = arguments.index.resolve().name.removesuffix(".index")
    command = ("serve", str(arguments.index), "--port", str(arguments.port), "--rate", "1000000/minute")
    main = "from ucir.cli import main; main()"
    quiet = subprocess.DEVNULL
    server = subprocess.Popen([sys.executable, "-c", main, *command], stderr=quiet, stdout=quiet)
    process = psutil.Process(server.pid)
    began = time.perf_counter()
    while True:
        try:
            request(arguments.port, name, pictures[0])
            break
        except OSError:
            time.sleep(0.1)
    print(f"first answer {time.perf_counter() - began:.1f} s after the start")
    taken: list[float] = []
    statuses: list[int] = []
    end = time.perf_counter() + arguments.seconds
    chosen = itertools.cycle(pictures)

    def client() -> None:
        while time.perf_counter() < end:
            first = time.perf_counter()
            statuses.append(request(arguments.port, name, next(chosen)))
            taken.append(time.perf_counter() - first)

    threads = [threading.Thread(target=client) for _ in range(arguments.clients)]
    for thread in threads:
        thread.start()
    held = []
    while time.perf_counter() < end:
        held.append(memory(process))
        time.sleep(arguments.seconds / 6)
    for thread in threads:
        thread.join()
    p50, p99 = np.percentile(taken, (50, 99))
    wrong = sum(status != 200 for status in statuses)
    print(
        f"{os.cpu_count()} cores, {arguments.clients} clients: {len(taken)} answers in "
        f"{arguments.seconds:g} s, {wrong} errors; p50 {p50 * 1000:.0f} ms, p99 {p99 * 1000:.0f} ms"
    )
    print(f"MiB of the server over time: {', '.join(f'{x:.0f}' for x in held)}")
    server.terminate()
    print(f"stopped with status {server.wait(20)}")


if __name__ == "__main__":
    run_main(main)
