"""Downloads against a server on this machine that breaks off, errs and changes its mind."""

from __future__ import annotations

import hashlib
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from ucir.config.data import DatasetParams
from ucir.config.model import StartParams
from ucir.data import catalogue, fetch
from ucir.data.fetch import PART, download, unpack
from ucir.errors import UserError

CONTENT = bytes(range(256)) * 2000


class Server(ThreadingHTTPServer):
    """Serves ``files``; the first ``breaks`` answers end after half of what they promise."""

    files: dict[str, bytes]
    breaks = 0
    ranges = True
    stamp = '"one"'
    asked: list[str]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        data = self.server.files.get(self.path)
        if data is None:
            self.send_error(404)
            return
        wanted = self.headers.get("Range", "")
        self.server.asked.append(wanted)
        first = 0
        if wanted and self.server.ranges and self.headers.get("If-Range") == self.server.stamp:
            first = int(wanted.removeprefix("bytes=").rstrip("-"))
            if first >= len(data):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(data)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        self.send_response(206 if first else 200)
        self.send_header("ETag", self.server.stamp)
        self.send_header("Content-Length", str(len(data) - first))
        self.end_headers()
        body = data[first:]
        if self.server.breaks:
            self.server.breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)
        self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    running = Server(("127.0.0.1", 0), Handler)
    running.files, running.asked = {"/x.zip": CONTENT}, []
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield running
    running.shutdown()
    running.server_close()


def address(server: Server, path: str = "/x.zip") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}{path}"


def digest(data: bytes = CONTENT, kind: str = "sha256") -> str:
    return f"{kind}:{hashlib.new(kind, data).hexdigest()}"


def test_a_file_comes_whole_and_once(server: Server, tmp_path: Path) -> None:
    progress: list[tuple[int, int | None]] = []
    target = tmp_path / "deep/x.zip"
    download(address(server), target, digest(), lambda done, total: progress.append((done, total)))
    assert target.read_bytes() == CONTENT
    assert progress[-1] == (len(CONTENT), len(CONTENT))
    assert [p.name for p in target.parent.iterdir()] == ["x.zip"]
    download(address(server), target, digest()[:20])
    assert len(server.asked) == 1


def test_broken_connections_are_resumed(server: Server, tmp_path: Path) -> None:
    server.breaks = 2
    download(address(server), tmp_path / "x.zip", digest())
    first = len(CONTENT) // 2 // PART * PART
    second = first + (len(CONTENT) - first) // 2 // PART * PART
    assert server.asked == ["", f"bytes={first}-", f"bytes={second}-"]
    assert (tmp_path / "x.zip").read_bytes() == CONTENT


def test_what_has_come_is_kept_for_the_next_command(server: Server, tmp_path: Path) -> None:
    server.breaks = 3
    with pytest.raises(
        UserError, match=r"x\.zip: .*bytes are kept in .*x\.zip\.part and the same command goes on"
    ):
        download(address(server), tmp_path / "x.zip", digest())
    assert not (tmp_path / "x.zip").exists()
    kept = (tmp_path / "x.zip.part").stat().st_size
    assert 0 < kept < len(CONTENT)
    download(address(server), tmp_path / "x.zip", digest())
    assert server.asked[-1] == f"bytes={kept}-"
    assert (tmp_path / "x.zip").read_bytes() == CONTENT


@pytest.mark.parametrize("why", ["no ranges", "changed"])
def test_a_rest_that_does_not_fit_is_not_appended(server: Server, tmp_path: Path, why: str) -> None:
    server.breaks = 3
    with pytest.raises(UserError):
        download(address(server), tmp_path / "x.zip")
    if why == "changed":
        server.files["/x.zip"], server.stamp = CONTENT[::-1], '"two"'
    else:
        server.ranges = False
    download(address(server), tmp_path / "x.zip")
    assert (tmp_path / "x.zip").read_bytes() == server.files["/x.zip"]


def test_a_wrong_digest_is_never_left_as_a_finished_file(server: Server, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"md5 is [0-9a-f]{32}, not 00000000…: damaged or another file"):
        download(address(server), tmp_path / "x.zip", "md5:00000000")
    assert not (tmp_path / "x.zip").exists()
    assert not (tmp_path / "x.zip.part").exists()
    (tmp_path / "x.zip").write_bytes(b"something else")
    with pytest.raises(UserError, match="put the right one there"):
        download(address(server), tmp_path / "x.zip", digest())


def test_refusals_and_silence(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"nothing\.zip: the server refuses: 404"):
        download(address(server, "/nothing.zip"), tmp_path / "x.zip")
    usage = fetch.shutil.disk_usage(tmp_path)._replace(free=10)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch:
        patch.setattr(fetch.shutil, "disk_usage", lambda path: usage)  # type: ignore[attr-defined]
        with pytest.raises(UserError, match="10 are free: make room"):
            download(address(server), tmp_path / "x.zip")
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="ConnectionError; or put the file there yourself"):
        download(address(server), tmp_path / "x.zip")


def entry_of(server: Server, monkeypatch: pytest.MonkeyPatch, **changes: object) -> None:
    """Let the catalogue have one data set, ``pictures``, on the server."""
    known = catalogue.entry("pacs").model_copy(
        update={
            "address": address(server, "/"),
            "files": (catalogue.RemoteFile(name="x.zip", digest=digest()),),
            **changes,
        }
    )
    monkeypatch.setattr("ucir.config.data.catalogue_entry", lambda name: known)


def test_a_data_set_is_fetched_or_its_place_is_told(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry_of(server, monkeypatch)
    block = DatasetParams(
        source=str(tmp_path / "pictures"), catalogue="pacs", pairs=("a-b",), start=StartParams(checkpoint="x")
    )
    assert fetch.fetch(block, lambda name: lambda done, total: None) == [tmp_path / "pictures/x.zip"]
    entry_of(server, monkeypatch, address=None)
    assert fetch.fetch(block, lambda name: lambda done, total: None) == [tmp_path / "pictures/x.zip"]
    (tmp_path / "pictures/x.zip").unlink()
    with pytest.raises(UserError) as caught:
        fetch.fetch(block, lambda name: lambda done, total: None)
    assert "Google Drive" in str(caught.value)
    assert f"Put it into {tmp_path / 'pictures'} as it is, or unpacked" in str(caught.value)


def test_unpacking_writes_below_its_folder_and_goes_on(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as opened:
        for number in range(3):
            opened.writestr(f"a/c/{number}.png", bytes([number]))
    assert unpack(tmp_path / "x.zip", tmp_path / "out", lambda done, total: None) == 3
    (tmp_path / "out/a/c/1.png").unlink()
    unpack(tmp_path / "x.zip", tmp_path / "out", lambda done, total: None)
    assert [p.read_bytes() for p in sorted((tmp_path / "out/a/c").iterdir())] == [b"\0", b"\1", b"\2"]
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as opened:
        opened.writestr("../evil.png", b"x")
    with pytest.raises(UserError, match="refused"):
        unpack(tmp_path / "evil.zip", tmp_path / "out", lambda done, total: None)
    assert not (tmp_path / "evil.png").exists()


def test_start_weights_by_address_by_path_and_by_digest(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetch, "WEIGHTS", tmp_path / "weights")
    start = StartParams(checkpoint=address(server), digest=digest(kind="md5")[:12])
    assert fetch.local_start(start).checkpoint == str(tmp_path / "weights/x.zip")
    kept = StartParams(checkpoint=str(tmp_path / "weights/x.zip"), digest="md5:00000000")
    with pytest.raises(UserError, match="put the right one there"):
        fetch.local_start(kept)
    with pytest.raises(UserError, match="no such checkpoint"):
        fetch.local_start(StartParams(checkpoint=str(tmp_path / "none")))
