"""Start the server and say where it is."""

from __future__ import annotations

import logging
import secrets
import socket
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from ucir.errors import UserError
from ucir.serve.app import create_app
from ucir.serve.limits import Bounds, check_rate

LOCAL = ("127.0.0.1", "localhost", "::1")
CONNECTIONS = 200
"""At a time; further ones are refused with 503."""


def run_server(
    folders: Sequence[Path],
    host: str,
    port: int,
    token: str | None = None,
    names: Sequence[str] = (),
    rate: str = Bounds.rate,
) -> None:
    """Serve until Ctrl+C or SIGTERM; requests that are being answered are finished.

    Args:
        folders: of the indexes.
        host, port: to listen at; port 0 = a free one.
        token: that requests must bring; None = none on this machine, a new one where others can reach it.
        names: that the machine is called by, beside its address.
        rate: searches of each client, ``240/minute``.

    Raises:
        UserError: an index that is not there; the port is taken; an empty token.
    """
    by_name = {folder.resolve().name.removesuffix(".index"): folder for folder in folders}
    if len(by_name) < len(folders):
        raise UserError("two indexes of one name: rename one of their folders")
    if token == "":
        raise UserError("--token: is empty, and would let everybody in: give one, or leave the option out")
    if token is None and host not in LOCAL:
        token = secrets.token_urlsafe(24)
    everywhere = host in ("0.0.0.0", "::")
    own = {socket.gethostname(), *names, *LOCAL, *(_addresses() if everywhere else [host])}
    hosts = {_in_address(name).lower() for name in own}
    check_rate(rate)
    app = create_app(by_name, Bounds(rate=rate), sorted(hosts), token)
    listening = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen()  # who opens the address at once waits, and is not refused
    except OSError as error:
        raise UserError(f"--port {port} at {host}: {error.strerror}: give another one") from None
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.INFO)
    shown = socket.gethostname() if everywhere else _in_address(host)
    address = f"http://{shown}:{listening.getsockname()[1]}/" + (
        f"?token={quote(token, safe='')}" if token else ""
    )
    print(f"open {address}   (Ctrl+C ends it)", flush=True)
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=10,
    )
    uvicorn.Server(config).run(sockets=[listening])


def _in_address(host: str) -> str:
    """A host as it stands in an address: IPv6 in brackets."""
    return f"[{host}]" if ":" in host else host


def _addresses() -> set[str]:
    """Of this machine: what its name stands for, and what it reaches others from."""
    found = set()
    with suppress(OSError):  # it has no name
        found |= {str(info[4][0]) for info in socket.getaddrinfo(socket.gethostname(), None)}
    with suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as outwards:  # or no network
        outwards.connect(("192.0.2.1", 9))  # of a range for documentation; nothing is sent
        found.add(outwards.getsockname()[0])
    return found


class TimedProtocol(H11Protocol):
    """Closes connections on which no request comes: uvicorn waits for ever for one that has begun."""

    request_seconds = 20.0
    """In which the lines before a request's body must have arrived."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.loop.call_later(self.request_seconds, self._close_if_still, self.cycle)

    def _close_if_still(self, before: Any) -> None:
        if self.transport.is_closing():
            return
        if self.cycle is before and (self.cycle is None or self.cycle.response_complete):
            self.transport.close()
        else:
            self.loop.call_later(self.request_seconds, self._close_if_still, self.cycle)
