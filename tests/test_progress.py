"""Progress where there is no terminal."""

from __future__ import annotations

import pytest

from ucir.progress import Progress, clock


def test_lines_tell_how_far_and_how_long(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    with Progress("train", 10, "epoch") as progress:
        progress.skip(4)  # done by an earlier process
        for _ in range(6):
            now[0] += 30  # slow enough for a line each
            progress.advance(1, "loss 1")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "train: 5/10 epochs, ETA ?  loss 1"
    assert lines[1] == "train: 6/10 epochs, ETA 2:00  loss 1"
    assert lines[-1] == "train: 10/10 epochs, ETA 0:00  loss 1"


def test_clock() -> None:
    assert [clock(s) for s in (5, 75, 3700)] == ["0:05", "1:15", "1:01:40"]
