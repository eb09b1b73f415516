"""The search server: a page, and the API behind it.

Pictures that people send are decoded in processes of their own, which a time limit or a crash ends. What one
batch of queries does not take, the next does: clients that ask together share a pass through the network.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, Response
from fastapi.responses import JSONResponse, RedirectResponse
from pebble import ProcessExpired, ProcessPool
from PIL import Image
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from pydantic import BaseModel
from starlette.datastructures import UploadFile
from starlette.formparsers import MultiPartException

from ucir.data.pack import stored_size
from ucir.errors import UserError
from ucir.models.model import Stored
from ucir.retrieval.search import Answer, Searcher
from ucir.serve.decoding import decode, restrict
from ucir.serve.limits import COOKIE, Bounds, Guard

MOST_HITS = 200
BATCH = 16
"""Queries that pass through the network together at most."""
DECODERS = 2
"""Processes."""
LOOK_EVERY = 2.0
"""Seconds between looks whether an index was brought up to date."""
PAGE = {"page.js": "text/javascript", "page.css": "text/css", "page.svg": "image/svg+xml"}

log = logging.getLogger("ucir.serve")


class HitOut(BaseModel):
    """A picture of the index."""

    rank: int
    score: float
    """Cosine."""
    id: str
    name: str
    """In the collection."""
    duplicates: int
    """Near duplicates hidden behind it."""


class AnswerOut(BaseModel):
    """What a query found."""

    accepted: bool | None
    """Whether anything is like it; null where the index knows no limit."""
    reason: str
    hits: list[HitOut]
    milliseconds: float


class IndexOut(BaseModel):
    """An index that is served."""

    name: str
    pictures: int
    model: str
    folders: list[str]
    has_limit: bool


Name = Annotated[
    str | None,
    Query(alias="index", max_length=200, description="One of /api/indexes. Default: the only one."),
]
Top = Annotated[int, Query(ge=1, le=MOST_HITS, description="Hits.")]
Folder = Annotated[
    str | None, Query(max_length=1000, description="Only pictures in this folder of the collection.")
]
Hide = Annotated[bool, Query(description="Of near duplicates show the most similar one.")]

FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["picture"],
                    "properties": {"picture": {"type": "string", "format": "binary"}},
                }
            }
        },
    }
}
REFUSALS: dict[int | str, dict[str, Any]] = {
    code: {"description": text}
    for code, text in {
        400: "Not a form with one picture.",
        401: "The token is missing.",
        404: "No such index, folder or picture.",
        408: "Sent too slowly.",
        413: "Too large.",
        415: "No picture of a kind that is read.",
        429: "Too many searches.",
    }.items()
}


@dataclass
class _Question:
    """A query that waits for its turn."""

    searcher: Searcher
    stored: Stored
    answer: asyncio.Future[tuple[np.ndarray, list[float | None]]]


class Engine:
    """Open indexes, the processes that decode, and the queue to the network."""

    def __init__(self, folders: Mapping[str, Path], bounds: Bounds) -> None:
        self.bounds = bounds
        self.searchers = {name: Searcher.load(folder) for name, folder in folders.items()}
        self.network = ThreadPoolExecutor(1, "network")
        self.waiting: asyncio.Queue[_Question] = asyncio.Queue()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start what works in the background, and end it."""
        self.decoders = ProcessPool(
            DECODERS,
            max_tasks=1000,
            initializer=restrict,
            initargs=(self.bounds.decode_memory,),
            context=_spawn(),
        )
        workers = asyncio.create_task(self._answer_batches()), asyncio.create_task(self._renew())
        try:
            await self._warm_up()
            yield
        finally:
            for worker in workers:
                worker.cancel()
            self.decoders.stop()  # type: ignore[no-untyped-call]
            self.decoders.join(5)
            self.network.shutdown(cancel_futures=True)

    async def _warm_up(self) -> None:
        """The first query of people is then as fast as any other."""
        for searcher in self.searchers.values():
            side = searcher.model.pack.side
            stored = (np.full((side, side, 3), 255, np.uint8), (side, side))
            seen = await self.embed(searcher, stored)
            await asyncio.to_thread(searcher.search_features, *seen, 10, hide_duplicates=True)
        dot = io.BytesIO()
        Image.new("L", (1, 1)).save(dot, "png")
        first = next(iter(self.searchers.values()))
        await asyncio.gather(*(self.decode(dot.getvalue(), first, 60.0) for _ in range(DECODERS)))

    def searcher(self, name: str | None) -> Searcher:
        """An index by its name, as it is now. Raises HTTPException: there is none, or none is named."""
        if name not in self.searchers:
            named = "" if name is None else f"no index {name[:80]!r} here; "
            raise HTTPException(404, f"{named}index= one of {', '.join(self.searchers)}")
        return self.searchers[name]

    async def _renew(self) -> None:
        """Take up indexes that were brought up to date."""
        while True:
            await asyncio.sleep(LOOK_EVERY)
            for name, searcher in list(self.searchers.items()):
                try:
                    self.searchers[name] = await asyncio.to_thread(searcher.renewed)
                except Exception as error:  # whatever it is, the next look may succeed
                    log.warning("%s: goes on with what it has: %s", name, error)

    async def decode(self, data: bytes, searcher: Searcher, seconds: float | None = None) -> Stored:
        """A picture that somebody sent, as the model takes it.

        Args:
            data: the file's bytes.
            searcher: whose model.
            seconds: that it may take, if not the bounds'.

        Raises:
            HTTPException: it is none, or takes too long.
        """
        seconds = seconds or self.bounds.decode_seconds
        arguments = (data, searcher.model.pack, self.bounds.max_pixels)
        try:
            future = self.decoders.schedule(decode, args=arguments, timeout=seconds)
            square, size = await asyncio.wrap_future(future)
            return square, stored_size(size, searcher.model.pack.fit)
        except ValueError as error:
            raise HTTPException(415, str(error)) from None
        except TimeoutError:
            raise HTTPException(415, f"takes more than {seconds:g} s to decode") from None
        except (ProcessExpired, MemoryError):
            raise HTTPException(415, "takes too much memory to decode") from None

    async def embed(self, searcher: Searcher, stored: Stored) -> tuple[np.ndarray, list[float | None]]:
        """Through the network, together with whoever else waits."""
        question = _Question(searcher, stored, asyncio.get_running_loop().create_future())
        await self.waiting.put(question)
        return await question.answer

    async def _answer_batches(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            batch = [await self.waiting.get()]
            while len(batch) < BATCH and not self.waiting.empty():
                batch.append(self.waiting.get_nowait())
            by_searcher: dict[int, list[_Question]] = {}
            for question in batch:
                by_searcher.setdefault(id(question.searcher), []).append(question)
            for together in by_searcher.values():
                stored = [question.stored for question in together]
                try:
                    seen, limits = await loop.run_in_executor(
                        self.network, together[0].searcher.embed, stored
                    )
                except Exception as error:
                    for question in together:
                        if not question.answer.done():
                            question.answer.set_exception(error)
                    continue
                for row, question in enumerate(together):
                    if not question.answer.done():  # its client may have gone
                        question.answer.set_result((seen[row : row + 1], limits[row : row + 1]))


def create_app(
    indexes: Mapping[str, Path],
    bounds: Bounds | None = None,
    hosts: Sequence[str] = ("localhost", "127.0.0.1", "[::1]"),
    token: str | None = None,
) -> FastAPI:
    """The application.

    Args:
        indexes: folders by the name that people choose among.
        bounds: of what may be sent.
        hosts: names that the server is called by.
        token: that every request must bring.

    Raises:
        UserError: an index that is not there or not whole.
    """
    bounds = bounds or Bounds()
    engine = Engine(indexes, bounds)
    only = next(iter(indexes)) if len(indexes) == 1 else None
    metrics = CollectorRegistry()
    requests = Counter(
        "ucir_requests", "Requests by address and status.", ("address", "status"), registry=metrics
    )
    seconds = Histogram("ucir_search_seconds", "Of a search, with its decoding.", registry=metrics)
    pictures = Gauge("ucir_pictures", "Pictures by index.", ("index",), registry=metrics)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with engine.running():
            yield

    app = FastAPI(
        title="ucir search",
        description="Finds the pictures of a collection that are most similar to a given one.",
        lifespan=lifespan,
        docs_url=None,  # it would come from elsewhere
        redoc_url=None,
    )

    def count(address: str, status: int) -> None:
        requests.labels(address, str(status)).inc()

    app.add_middleware(Guard, bounds=bounds, hosts=hosts, token=token, count=count)

    @app.exception_handler(UserError)
    async def told(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse({"detail": str(error)}, 404)

    @app.get("/health")
    async def health() -> dict[str, str]:
        """Whether the server is up."""
        return {"status": "ok"}

    @app.get("/metrics", response_class=Response)
    async def prometheus() -> Response:
        """For Prometheus."""
        for name, searcher in engine.searchers.items():
            pictures.labels(name).set(searcher.info.count)
        return Response(generate_latest(metrics), media_type=CONTENT_TYPE_LATEST)

    @app.get("/api/indexes")
    async def list_indexes() -> list[IndexOut]:
        """What can be searched."""
        return [
            IndexOut(
                name=name,
                pictures=searcher.info.count,
                model=searcher.info.model,
                folders=await asyncio.to_thread(searcher.folders),
                has_limit=bool(searcher.info.limits),
            )
            for name in engine.searchers
            for searcher in [engine.searcher(name)]
        ]

    @app.post("/api/search", openapi_extra=FORM, responses=REFUSALS)
    async def search(
        request: Request, name: Name = only, k: Top = 40, folder: Folder = None, hide_duplicates: Hide = True
    ) -> AnswerOut:
        """Pictures like the one that is sent."""
        began = time.perf_counter()
        searcher = engine.searcher(name)
        data = await _picture_of(request)
        stored = await engine.decode(data, searcher)
        seen = await engine.embed(searcher, stored)
        (answer,) = await asyncio.to_thread(
            searcher.search_features, *seen, k, below=folder, hide_duplicates=hide_duplicates
        )
        taken = time.perf_counter() - began
        seconds.observe(taken)
        digest = hashlib.sha256(data).hexdigest()[:12]
        log.info("searched %s with %s, %d bytes, %.0f ms", name, digest, len(data), 1000 * taken)
        return _answer(answer, taken)

    @app.get("/api/like", responses={404: REFUSALS[404], 429: REFUSALS[429]})
    async def like(
        picture: Annotated[str, Query(alias="id", pattern="^[0-9a-f]{64}$", description="Of a hit.")],
        name: Name = only,
        k: Top = 40,
        folder: Folder = None,
        hide_duplicates: Hide = True,
    ) -> AnswerOut:
        """Pictures like one of the index."""
        began = time.perf_counter()
        searcher = engine.searcher(name)
        answer = await asyncio.to_thread(
            searcher.like, picture, k, below=folder, hide_duplicates=hide_duplicates
        )
        return _answer(answer, time.perf_counter() - began)

    @app.get("/api/picture", response_class=Response, responses={404: REFUSALS[404]})
    async def picture(
        picture: Annotated[str, Query(alias="id", pattern="^[0-9a-f]{64}$")], name: Name = only
    ) -> Response:
        """A picture's small form."""
        data = await asyncio.to_thread(engine.searcher(name).thumbnail, picture)
        headers = {"Cache-Control": "private, max-age=86400, immutable"}
        return Response(data, media_type="image/jpeg", headers=headers)

    @app.get("/", include_in_schema=False)
    async def page(request: Request) -> Response:
        if token and "token" in request.query_params:  # from here on a cookie holds it, no address
            response: Response = RedirectResponse("/", 303)
            response.set_cookie(COOKIE, token, httponly=True, samesite="strict")
            return response
        return Response(_file("page.html"), media_type="text/html")

    @app.get("/{name}", include_in_schema=False)
    async def part_of_page(name: str) -> Response:
        if name not in PAGE:
            raise HTTPException(404, "nothing here")
        return Response(_file(name), media_type=PAGE[name])

    return app


def _answer(answer: Answer, taken: float) -> AnswerOut:
    hits = [
        HitOut(rank=h.rank, score=round(h.score, 6), id=h.id, name=h.path, duplicates=len(h.duplicates))
        for h in answer.hits
    ]
    return AnswerOut(
        accepted=answer.accepted, reason=answer.reason, hits=hits, milliseconds=round(1000 * taken, 1)
    )


async def _picture_of(request: Request) -> bytes:
    """The one file of a form."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise HTTPException(415, "send a form (multipart/form-data) with one file, 'picture'")
    try:
        async with request.form(max_files=1, max_fields=0) as form:
            file = form.get("picture")
            if not isinstance(file, UploadFile):
                raise HTTPException(400, "the form has no file 'picture'")
            data = await file.read()
    except MultiPartException as error:
        raise HTTPException(400, f"not a form with one picture: {error.message}") from None
    if not data:
        raise HTTPException(415, "an empty file")
    return data


def _spawn() -> Any:
    """A fork would copy the network's threads in the middle of what they do."""
    import multiprocessing

    return multiprocessing.get_context("spawn")


def _file(name: str) -> bytes:
    return (files(__package__) / name).read_bytes()
