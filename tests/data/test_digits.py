"""The embedded sample."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ucir.data.digits import make_digits


def digest(root: Path) -> str:
    files = sorted(root.rglob("*.png"))
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def test_the_sample_is_always_the_same_and_a_kill_costs_one_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = make_digits(tmp_path / "whole", per_class=3)
    assert whole == {"handwritten": 1797, "printed": 30, "street": 30}
    classes = {p.name for p in (tmp_path / "whole/street").iterdir()}
    assert classes == set("0123456789")
    saved: list[Path] = []
    save = Image.Image.save

    def killed(self: Image.Image, path: Path, **options: Any) -> None:
        saved.append(path)
        if len(saved) == 1810:
            path.write_bytes(b"half of it")
            raise KeyboardInterrupt
        save(self, path, **options)

    monkeypatch.setattr(Image.Image, "save", killed)
    with pytest.raises(KeyboardInterrupt):
        make_digits(tmp_path / "killed", per_class=3)
    assert make_digits(tmp_path / "killed", per_class=3) == whole
    assert len(saved) == sum(whole.values()) + 1, "the picture of the kill, and no other, is drawn twice"
    assert digest(tmp_path / "killed") == digest(tmp_path / "whole")
    assert not list(tmp_path.rglob("*unfinished*"))
    make_digits(tmp_path / "killed", per_class=3, seed=1)  # replaces what is there
    assert digest(tmp_path / "killed") != digest(tmp_path / "whole")
