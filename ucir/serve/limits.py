"""What a server asks of those who send to it: size, time, rate, a token; and headers that browsers heed."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from limits import parse
from limits.storage import MemoryStorage
from limits.strategies import MovingWindowRateLimiter
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ucir.errors import UserError

COOKIE = "ucir_token"
OPEN = ("/health",)
"""Addresses that need no token."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; img-src 'self' blob:; script-src 'self'; "
    "style-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


@dataclass(frozen=True)
class Bounds:
    """Of what may be sent."""

    max_bytes: int = 20 * 2**20
    """Of a request's body."""
    max_pixels: int = 50_000_000
    body_seconds: float = 20.0
    """In which a body must have arrived."""
    decode_seconds: float = 5.0
    decode_memory: int = 3 * 2**30
    """Bytes of address space of the process that decodes."""
    rate: str = "240/minute"
    """Of each client's searches."""


def check_rate(rate: str) -> None:
    """Raises UserError: no rate."""
    try:
        parse(rate)
    except ValueError:
        raise UserError(f"--rate {rate!r}: a number and second, minute or hour, e.g. 240/minute") from None


class Guard:
    """Goes before the application: refuses what is too large, too slow, or not allowed; adds the headers.

    Starlette bounds the fields of a form, not its files; so bytes are counted here, while they arrive.

    Args:
        app: what is guarded.
        bounds: of what may be sent.
        hosts: names that the server may be called by: a web page elsewhere cannot reach it under its own.
        token: that every request must bring; None = none is asked for.
        count: called with the address and the status of each answer.
    """

    def __init__(
        self,
        app: ASGIApp,
        bounds: Bounds,
        hosts: Sequence[str],
        token: str | None,
        count: Callable[[str, int], None],
    ) -> None:
        self.app, self.bounds, self.hosts, self.token = app, bounds, set(hosts), token
        self.count = count
        self.limiter = MovingWindowRateLimiter(MemoryStorage())
        self.rate = parse(bounds.rate)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.count(getattr(scope.get("route"), "path", "other"), message["status"])
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        if refusal := self._refusal(scope):
            await refusal(scope, receive, send_with_headers)
            return
        await self.app(scope, self._counted(receive), send_with_headers)

    def _refusal(self, scope: Scope) -> JSONResponse | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "").rpartition("@")[2]
        name = host.partition("]")[0] + "]" if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in self.hosts:
            return _refused(400, f"this server is not called {name!r}: start it with --name {name}")
        if self.token and scope["path"] not in OPEN and not self._knows_token(scope, headers):
            return _refused(401, "a token is needed: open the address that the server printed")
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()):
            return _refused(400, "Content-Length is no number")
        if int(length) > self.bounds.max_bytes:
            return _refused(413, self._too_large())
        client = scope["client"][0] if scope.get("client") else "?"
        if scope["path"] in LIMITED and not self.limiter.hit(self.rate, client):
            return _refused(
                429, f"more than {self.bounds.rate} searches: wait a little", {"Retry-After": "10"}
            )
        return None

    def _knows_token(self, scope: Scope, headers: Headers) -> bool:
        request = Request(scope)
        given = (
            headers.get("authorization", "").removeprefix("Bearer "),
            request.cookies.get(COOKIE, ""),
            request.query_params.get("token", ""),
        )
        assert self.token
        return any(hmac.compare_digest(text.encode(), self.token.encode()) for text in given)

    def _counted(self, receive: Receive) -> Receive:
        clock = asyncio.get_running_loop().time
        end, there, complete = clock() + self.bounds.body_seconds, 0, False

        async def counted() -> Message:
            nonlocal there, complete
            if complete:
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - clock()))
            except TimeoutError:
                raise HTTPException(408, f"not sent within {self.bounds.body_seconds:g} s") from None
            there += len(message.get("body", b""))
            complete = message["type"] != "http.request" or not message.get("more_body", False)
            if there > self.bounds.max_bytes:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"more than {self.bounds.max_bytes / 2**20:g} MiB: send a smaller picture"


LIMITED = ("/api/search", "/api/like")
"""Addresses whose rate is limited."""


def _refused(status: int, detail: str, headers: dict[str, str] | None = None) -> JSONResponse:
    return JSONResponse({"detail": detail}, status, {"Connection": "close", **(headers or {})})
