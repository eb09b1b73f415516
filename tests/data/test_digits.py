"""The embedded sample."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ucir.data.digits import make_digits


def digest(root: Path) -> str:
    files = sorted(root.rglob("*.png"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def test_the_sample_is_ordinary_files_and_always_the_same(tmp_path: Path) -> None:
    counts = make_digits(tmp_path / "one", per_class=2)
    assert counts == {"handwritten": 1797, "printed": 20, "street": 20}
    make_digits(tmp_path / "two", per_class=2)
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    classes = {p.name for p in (tmp_path / "one/street").iterdir()}
    assert classes == set("0123456789")
    make_digits(tmp_path / "two", per_class=2, seed=1)  # replaces what is there
    assert digest(tmp_path / "one") != digest(tmp_path / "two")
