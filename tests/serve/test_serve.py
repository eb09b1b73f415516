"""The server answers as the search does, and whatever it is sent it answers, within its bounds."""

from __future__ import annotations

import io
import random
import shutil
import socket
import struct
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import schemathesis
import uvicorn
from fastapi import FastAPI
from PIL import Image
from schemathesis.specs.openapi.checks import negative_data_rejection, positive_data_acceptance
from starlette.testclient import TestClient

from tests.conftest import draw, make_images
from tests.retrieval.test_search import index, tiny_model
from ucir.errors import UserError
from ucir.retrieval import index as build
from ucir.retrieval.search import Searcher
from ucir.serve.app import create_app
from ucir.serve.limits import Bounds
from ucir.serve.run import TimedProtocol, run_server

BOUNDS = Bounds(
    max_bytes=2**20, max_pixels=2_000_000, body_seconds=1.0, decode_seconds=5.0, rate="100000/minute"
)
SEARCH = "/api/search?index=photos"
Form = dict[str, tuple[str, bytes, str]]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    make_images(folder, domains=("photos",))
    model = tiny_model()
    update = {"drawn": build.sample_features(model, folder / "photos")}
    build.update_index(folder / "photos", folder / "photos.index", model, query_features=update)
    return folder / "photos"


@pytest.fixture(scope="module")
def app(photos: Path) -> FastAPI:
    return create_app({"photos": build.default_folder(photos)}, BOUNDS, hosts=("testserver", "127.0.0.1"))


@pytest.fixture(scope="module")
def client(app: FastAPI) -> Iterator[TestClient]:
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


class Quick(TimedProtocol):
    request_seconds = 1.0


@pytest.fixture(scope="module")
def address(app: FastAPI) -> Iterator[tuple[str, int]]:
    """A real server."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, http=Quick, log_level="error", timeout_keep_alive=5))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    while not server.started:
        time.sleep(0.05)
    yield listening.getsockname()
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive(), "it stops when asked"


def form(data: bytes, name: str = "query.png", kind: str = "image/png") -> Form:
    return {"picture": (name, data, kind)}


def encoded(image: Image.Image, kind: str = "png", **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_it_answers_as_the_search_does(client: TestClient, photos: Path) -> None:
    query = photos / "circle/1.png"
    (expected,) = Searcher.load(photos).search(query, 5, hide_duplicates=True)
    answer = client.post(SEARCH + "&k=5", files=form(query.read_bytes())).json()
    assert [hit["name"] for hit in answer["hits"]] == [hit.path for hit in expected.hits]
    assert [hit["score"] for hit in answer["hits"]] == pytest.approx(
        [hit.score for hit in expected.hits], abs=1e-5
    )
    assert answer["accepted"]
    assert answer["reason"] == expected.reason
    first = answer["hits"][0]
    alone = client.post("/api/search?k=5", files=form(query.read_bytes())).json()
    assert alone["hits"] == answer["hits"], "the only index needs no name"
    like = client.get(f"/api/like?index=photos&id={first['id']}&k=3").json()
    assert first["name"] not in [hit["name"] for hit in like["hits"]]
    small = client.get(f"/api/picture?index=photos&id={first['id']}")
    assert Image.open(io.BytesIO(small.content)).size == (20, 20)
    assert client.get("/api/indexes").json() == [
        {
            "name": "photos",
            "pictures": 22,
            "model": "convnet",
            "folders": ["circle", "cross", "square"],
            "has_limit": True,
        }
    ]
    for kind in ("jpeg", "webp", "gif", "bmp", "tiff", "avif"):
        assert client.post(SEARCH, files=form(encoded(Image.open(query), kind))).status_code == 200


def test_of_several_indexes_one_is_named(photos: Path) -> None:
    folder = build.default_folder(photos)
    query = (photos / "circle/1.png").read_bytes()
    app = create_app({"photos": folder, "again": folder}, BOUNDS, hosts=("testserver",))
    with TestClient(app) as client:
        answer = client.post("/api/search", files=form(query))
        assert (answer.status_code, answer.json()["detail"]) == (404, "index= one of photos, again")
        assert client.post("/api/search?index=again", files=form(query)).json()["hits"]


def test_the_page_needs_nothing_from_elsewhere(client: TestClient) -> None:
    page = client.get("/")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    assert "//" not in page.text.replace("<!doctype html>", "")
    for name in ("page.js", "page.css", "page.svg"):
        assert name in page.text
        part = client.get("/" + name)
        assert part.status_code == 200
        assert part.headers["x-content-type-options"] == "nosniff"
    assert client.get("/health").json() == {"status": "ok"}
    assert 'ucir_pictures{index="photos"} 22.0' in client.get("/metrics").text


def test_queries_that_come_together_are_answered_each_its_own(client: TestClient, photos: Path) -> None:
    files = sorted(photos.rglob("*.png"))
    with ThreadPoolExecutor(12) as pool:
        answers = list(
            pool.map(lambda f: client.post(SEARCH + "&k=1", files=form(f.read_bytes())), files * 2)
        )
    for file, answer in zip(files * 2, answers, strict=True):
        assert answer.json()["hits"][0]["name"] == file.relative_to(photos).as_posix()


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb() -> bytes:
    """A PNG of 40,000 x 40,000 pixels in few bytes."""
    header = struct.pack(">IIBBBBB", 40000, 40000, 8, 0, 0, 0, 0)
    body = zlib.compress(bytes(2**20), 9)
    return (
        b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + png_chunk(b"IDAT", body) + png_chunk(b"IEND", b"")
    )


def hostile() -> Iterator[tuple[str, bytes]]:
    rng = random.Random(0)
    picture = draw("cross", np.random.default_rng(0), 64)
    yield "nothing", b""
    yield "zeros", bytes(5000)
    yield "bomb", bomb()
    yield "svg", b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    yield "html", b"\x89PNG\r\n\x1a\n<html><script>alert(1)</script></html>"
    yield "postscript", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) (r) file\n"
    yield "pdf", b"%PDF-1.7\n1 0 obj\n"
    yield "zip", b"PK\x03\x04" + bytes(200)
    frames = [Image.new("L", (8, 8), i % 256) for i in range(1000)]
    yield "animation", encoded(frames[0], "gif", save_all=True, append_images=frames[1:])
    for kind in ("png", "jpeg", "gif", "webp", "bmp", "tiff"):
        whole = encoded(picture, kind)
        for share in (0.02, 0.1, 0.3):
            yield f"{kind} cut at {share}", whole[: int(share * len(whole))]
        for number in range(40):
            data = bytearray(whole)
            for _ in range(rng.choice((1, 8, 60))):
                data[rng.randrange(len(data))] = rng.randrange(256)
            yield f"{kind} damaged {number}", bytes(data)


def test_hostile_pictures_are_refused_in_words(client: TestClient) -> None:
    sent = list(hostile())
    assert len(sent) > 260

    def send(one: tuple[str, bytes]) -> tuple[str, int, str]:
        answer = client.post(SEARCH, files=form(one[1]))
        return one[0], answer.status_code, answer.text

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(send, sent))
    for name, status, text in results:
        wanted = {200, 415} if "damaged" in name or "cut" in name else {415}
        assert status in wanted, (name, status, text)
        assert "/" not in text or status == 200, "no path of ours in a message"
    said = {name: text for name, _, text in results}
    assert "more than max_pixels" in said["bomb"]
    assert "an animation" in said["animation"]
    assert "an SVG drawing" in said["svg"]
    assert "an empty file" in said["nothing"]
    assert client.get("/health").status_code == 200


def test_odd_forms_and_addresses_are_refused(client: TestClient, photos: Path) -> None:
    good = (photos / "circle/1.png").read_bytes()
    boundary = {"content-type": "multipart/form-data; boundary=b"}
    part = b'--b\r\nContent-Disposition: form-data; name="picture"; filename="%s"\r\n\r\n%s\r\n'
    assert client.post(
        SEARCH, content=part % (b"../../../etc/passwd", good) + b"--b--\r\n", headers=boundary
    ).is_success
    for content, headers in (
        (good, {"content-type": "image/png"}),
        (b"", {"content-type": "multipart/form-data"}),
        (b"--b--\r\n", boundary),
        (b"nonsense", boundary),
        (part % (b"a", good) + part % (b"b", good) + b"--b--\r\n", boundary),
        (part.replace(b"picture", b"other") % (b"a", good) + b"--b--\r\n", boundary),
        (b'--b\r\nContent-Disposition: form-data; name="picture"\r\n\r\ntext\r\n--b--\r\n', boundary),
        (b"--b\r\n" + b"X-Header: y\r\n" * 5000 + b"\r\n--b--\r\n", boundary),
    ):
        answer = client.post(SEARCH, content=content, headers=headers)
        assert answer.status_code in (400, 415), (content[:60], answer.text)
        assert answer.json()["detail"]
    large = client.post(SEARCH, files=form(bytes(2 * 2**20)))
    assert (large.status_code, large.json()["detail"]) == (413, "more than 1 MiB: send a smaller picture")
    for address, status in (
        ("/api/search?index=none", 404),
        (SEARCH + "&k=0", 422),
        (SEARCH + "&k=100000", 422),
        (SEARCH + "&folder=../..", 404),
    ):
        assert client.post(address, files=form(good)).status_code == status
    digest = "0" * 64
    for address in (
        "/../pyproject.toml",
        "/..%2f..%2fetc%2fpasswd",
        "/page.html",
        "/app.py",
        f"/api/picture?index=photos&id={digest}",
        f"/api/like?index=photos&id={digest}",
        "/api/picture?index=photos&id=../../etc/passwd",
        "/api/picture?index=../photos&id=" + digest,
        "/docs",
    ):
        assert client.get(address).status_code in (404, 422), address
    assert client.get("/", headers={"host": "evil.example"}).status_code == 400


def test_what_has_no_end_or_no_hurry_is_cut_off(address: tuple[str, int]) -> None:
    head = (
        f"POST {SEARCH} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: multipart/form-data; boundary=b\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    ).encode()
    opening = b'--b\r\nContent-Disposition: form-data; name="picture"; filename="x"\r\n\r\n'

    def send(chunks: Iterator[bytes]) -> bytes:
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(head)
            try:
                for chunk in chunks:
                    connection.sendall(b"%x\r\n%s\r\n" % (len(chunk), chunk))
                return connection.recv(4096)
            except (BrokenPipeError, ConnectionResetError):
                return connection.recv(4096)

    def endless() -> Iterator[bytes]:
        yield opening
        for _ in range(30):
            yield bytes(65536)

    def slow() -> Iterator[bytes]:
        yield opening
        for _ in range(4):
            time.sleep(0.5)
            yield b"x"

    assert b" 413 " in send(endless())
    assert b" 408 " in send(slow())
    whole = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    for sent in (b"", b"GET /health HT", whole, whole + b"GET /hea"):
        with socket.create_connection(address, timeout=10) as connection:
            connection.sendall(sent)
            while connection.recv(4096):  # it ends, or the test times out
                pass


def test_a_token_opens_the_door_and_a_rate_is_kept(photos: Path) -> None:
    bounds = Bounds(rate="3/minute")
    guarded = create_app(
        {"photos": build.default_folder(photos)}, bounds, hosts=("testserver",), token="a secret"
    )
    picture = form((photos / "circle/1.png").read_bytes())
    with TestClient(guarded) as client:
        assert client.get("/health").status_code == 200
        for address in ("/", "/page.js", "/api/indexes", "/metrics", "/openapi.json"):
            assert client.get(address).status_code == 401
        assert (
            client.post(SEARCH, files=picture, headers={"Authorization": "Bearer wrong"}).status_code == 401
        )
        right = {"Authorization": "Bearer a secret"}
        codes = [client.post(SEARCH, files=picture, headers=right).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        page = client.get("/?token=a secret")
        assert page.url.path == "/"
        assert not page.url.query, "the token does not stay in the address"
        assert client.get("/api/indexes").status_code == 200, "a cookie holds it"
    with pytest.raises(UserError, match="--token: is empty"):
        run_server([build.default_folder(photos)], "0.0.0.0", 0, token="")


def test_an_index_brought_up_to_date_is_taken_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ucir.serve.app.LOOK_EVERY", 0.05)
    make_images(tmp_path, domains=("photos",))
    index(tmp_path / "photos")
    new = encoded(Image.effect_noise((64, 64), 80).convert("RGB"))
    with TestClient(
        create_app({"photos": tmp_path / "photos.index"}, BOUNDS, hosts=("testserver",))
    ) as client:
        assert client.post(SEARCH + "&k=1", files=form(new)).json()["hits"][0]["name"] != "cross/new.png"
        (tmp_path / "photos/cross/new.png").write_bytes(new)
        shutil.rmtree(tmp_path / "photos/square")
        index(tmp_path / "photos")
        until = time.monotonic() + 20
        while client.get("/api/indexes").json()[0]["pictures"] != 17:
            assert time.monotonic() < until
            time.sleep(0.05)
        assert client.post(SEARCH + "&k=1", files=form(new)).json()["hits"][0]["name"] == "cross/new.png"
        assert client.post(SEARCH, files=form(new)).json()["accepted"] is None
        model = tiny_model()
        queries = {"drawn": build.sample_features(model, tmp_path / "photos")}
        build.update_index(
            tmp_path / "photos",
            tmp_path / "photos.index",
            model,
            query_features=queries,
            false_rejections=0.2,
        )
        while client.post(SEARCH, files=form(new)).json()["accepted"] is None:
            assert time.monotonic() < until, "limits are taken up, too"
            time.sleep(0.05)


def test_the_description_is_kept_to(photos: Path) -> None:
    """Requests that schemathesis draws from /openapi.json: no crash, no answer that it does not describe."""
    # an app of its own: reading the description starts and ends the app's lifespan
    app = create_app({"photos": build.default_folder(photos)}, BOUNDS, hosts=("testserver",))
    schema = schemathesis.openapi.from_asgi("/openapi.json", app)
    tried = 0
    with TestClient(app, raise_server_exceptions=False) as client:
        for operation in schema.get_all_operations():
            cases = operation.ok().as_strategy()  # type: ignore[union-attr]
            for case in draw_cases(cases, 20):
                case.call_and_validate(  # no schema can say which bytes are a picture
                    session=client,
                    headers={"host": "testserver"},
                    excluded_checks=[negative_data_rejection, positive_data_acceptance],
                )
                tried += 1
    assert tried > 50


def draw_cases(strategy: Any, count: int) -> list[Any]:
    from hypothesis import HealthCheck, Phase, given, seed, settings

    cases: list[Any] = []

    @seed(0)
    @settings(
        max_examples=count, phases=[Phase.generate], database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def collect(case: Any) -> None:
        cases.append(case)

    collect()
    return cases


@pytest.mark.slow
def test_a_browser_draws_and_finds(address: tuple[str, int], photos: Path) -> None:
    """Without chromium it is not run, and says so: `.ci/run` installs it."""
    if not shutil.which("chromium") or not shutil.which("chromedriver"):
        pytest.skip("chromium and chromedriver are not installed")
    from selenium import webdriver
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    for argument in (
        "headless",
        "no-sandbox",
        "disable-gpu",
        "disable-background-networking",
        "disable-sync",
    ):
        options.add_argument(f"--{argument}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    browser = webdriver.Chrome(options, service)
    try:
        wait = WebDriverWait(browser, 20)

        def hits() -> list[str]:
            titles = "return [...document.querySelectorAll('.hit')].map(hit => hit.title)"
            return list(browser.execute_script(titles))

        browser.get("http://{}:{}/".format(*address))
        wait.until(lambda _: browser.find_element(By.ID, "index").text)
        canvas = browser.find_element(By.ID, "canvas")
        ActionChains(browser).move_to_element_with_offset(canvas, -60, 0).click_and_hold().move_by_offset(
            120, 40
        ).release().perform()
        wait.until(lambda _: hits())
        assert "pictures; nearest" in browser.find_element(By.ID, "verdict").text
        drawn = hits()
        browser.find_element(By.CLASS_NAME, "hit").click()
        wait.until(lambda _: "like this one" in browser.find_element(By.ID, "verdict").text)
        assert drawn[0] not in hits()
        browser.back()
        wait.until(lambda _: hits() == drawn)
        browser.find_element(By.ID, "tab-file").click()
        browser.find_element(By.ID, "choose").send_keys(str(photos / "cross/2.png"))
        wait.until(lambda _: hits()[:1] == ["cross/2.png"])
        browser.find_element(By.ID, "choose").send_keys(__file__)
        wait.until(lambda _: browser.find_element(By.ID, "verdict").text == "not an image")
        serious = [line["message"] for line in browser.get_log("browser") if " 415 " not in line["message"]]
        assert serious == []
    finally:
        browser.quit()
