"""An index is what one built anew would be, whatever happened to it; a search of it is exact, and says no."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from tests.conftest import draw, make_images, ucir
from tests.workers import start_process
from ucir.cli import app
from ucir.config.data import PackParams, ViewParams
from ucir.config.model import EncoderParams
from ucir.data.prepare import write_pack
from ucir.errors import UserError
from ucir.models.encoder import new_encoder
from ucir.models.head import ResidualHead
from ucir.models.model import Model, save_model, stored_picture
from ucir.retrieval import index as build
from ucir.retrieval import knn
from ucir.retrieval.gate import calibrated_limit
from ucir.retrieval.index import File, FileEmbedder, IndexInfo, Outcome, embed_files, update_index
from ucir.retrieval.search import Searcher


def tiny_model(seed: int = 0) -> Model:
    encoder = new_encoder(EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8), seed).eval()
    return Model(encoder, ViewParams(side=16, eval_crop=1.0), PackParams(side=20), {}, ("drawn", "photo"))


def index(source: Path, model: Model | None = None, out: Path | None = None) -> IndexInfo:
    return update_index(source, out or build.default_folder(source), model or tiny_model())


def rows(folder: Path) -> dict[str, bytes]:
    """Features by path."""
    searcher = Searcher.load(folder)
    files = searcher._files(np.arange(len(searcher.id_N)))
    return {file[0]: x.tobytes() for file, x in zip(files, searcher.rows_ND, strict=True) if file}


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    make_images(tmp_path / "all", domains=("photos",))
    (tmp_path / "all/photos").rename(tmp_path / "photos")
    return tmp_path / "photos"


def test_hits_are_those_of_the_models_features(photos: Path) -> None:
    model = tiny_model()
    index(photos, model)
    files = sorted(photos.rglob("*.png"))
    features = torch.cat(list(model.features(np.asarray(Image.open(f).convert("RGB")) for f in files)))
    similarity = features @ features.T
    for query in (0, 9):
        (answer,) = Searcher.load(photos).search(files[query], 5)
        values, places = similarity[query].topk(5)
        assert [hit.path for hit in answer.hits] == [str(files[i].relative_to(photos)) for i in places]
        assert [hit.score for hit in answer.hits] == pytest.approx(values.tolist(), abs=1e-5)
        assert [hit.rank for hit in answer.hits] == [1, 2, 3, 4, 5]
        assert answer.accepted is None
        pixels = np.asarray(Image.open(files[query]).convert("RGB"))
        for other in Searcher.load(photos).search([pixels, Image.fromarray(pixels)], 5):
            assert [hit.path for hit in other.hits] == [hit.path for hit in answer.hits]


def test_an_index_brought_up_to_date_is_one_built_anew(photos: Path, tmp_path: Path) -> None:
    index(photos)
    rng = np.random.default_rng(1)
    for number in range(3):
        draw("cross", rng).save(photos / f"cross/new{number}.png")
        draw("square", rng).save(photos / f"circle/{number}.png")  # another picture under an old name
        (photos / f"square/{number}.png").unlink()
    shutil.copy(photos / "cross/0.png", photos / "cross/same.png")
    (photos / "cross/5.png").rename(photos / "square/moved.png")
    (photos / "cross/broken.png").write_bytes((photos / "cross/0.png").read_bytes()[:40])
    read: list[str] = []

    def watched(embedder: FileEmbedder) -> build.Compute:
        def compute(files: Iterator[File], known: Collection[bytes]) -> Iterator[list[tuple[str, Outcome]]]:
            for outcomes in embed_files(embedder)(files, known):
                read.extend(path for path, _ in outcomes)
                yield outcomes

        return compute

    folder = build.default_folder(photos)
    info = update_index(photos, folder, tiny_model(), compute=watched)
    assert len(read) == 9, "files that did not change are not read"
    anew = index(photos, out=tmp_path / "anew")
    assert rows(folder) == rows(tmp_path / "anew")
    assert (info.state, info.count, info.bad) == (anew.state, anew.count, 1)
    ((path, fault),) = build.left_out(folder)
    assert path == "cross/broken.png"
    assert "not an image" in fault
    assert len(list(folder.glob("rows-*"))) == 1
    update_index(photos, folder, tiny_model(), compute=watched)
    assert read[9:] == ["cross/broken.png"], "what was left out is looked at again"


def test_a_file_that_could_not_be_read_is_taken_up_later(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Path.read_bytes

    def refused(path: Path) -> bytes:
        if path.name == "1.png":
            raise OSError(5, "Input/output error", str(path))
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", refused)
        assert (index(photos).count, index(photos).bad) == (19, 3)
    assert (index(photos).count, index(photos).bad) == (22, 0)


def test_what_could_not_be_seen_is_told(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "cross/link.png").symlink_to("nowhere")
    (photos / "old.rar").write_bytes(b"x")
    info = index(photos)
    told = build.describe_index(build.default_folder(photos), info)
    assert "left out: cross/link.png: a link that leads nowhere" in told
    assert "old.rar: an archive of a kind that is not read" in told
    scan = os.scandir

    def closed(folder: Path) -> Any:
        if Path(folder).name == "cross":
            raise PermissionError
        return scan(folder)

    monkeypatch.setattr("ucir.data.source.os.scandir", closed)
    with pytest.raises(UserError, match="cross: may not be read"):
        index(photos)
    assert Searcher.load(photos).info == info, "its pictures are still there"


def test_a_file_that_went_and_came_back_is_found(photos: Path) -> None:
    index(photos)
    gone = photos / "cross/1.png"
    kept = gone.read_bytes()
    gone.unlink()

    def killed(embedder: FileEmbedder) -> build.Compute:
        def compute(files: Iterator[File], known: Collection[bytes]) -> Iterator[list[tuple[str, Outcome]]]:
            yield from embed_files(embedder)(files, known)
            raise KeyboardInterrupt

        return compute

    with pytest.raises(KeyboardInterrupt):  # it has taken the file out, and no new state is written
        update_index(photos, build.default_folder(photos), tiny_model(), compute=killed)
    gone.write_bytes(kept)
    index(photos)
    (answer,) = Searcher.load(photos).search(gone, 22)
    assert len(answer.hits) == 22
    assert answer.hits[0].path == "cross/1.png"


def _index_slowly(source: Path) -> None:
    torch.set_num_threads(1)
    plain = FileEmbedder._features

    def slowly(self: FileEmbedder, *given: Any) -> Any:
        time.sleep(0.2)
        return plain(self, *given)

    FileEmbedder._features = slowly  # type: ignore[method-assign, assignment]
    index(source)


@pytest.mark.slow
@pytest.mark.xdist_group("workers")
def test_a_killed_indexing_goes_on_and_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    source = make_images(tmp_path / "many", per_class=60)
    kept = []
    for _ in range(3):
        process = start_process(_index_slowly, source)
        database = tmp_path / "many.index/pictures.sqlite"
        before = _pictures(database)
        while process.is_alive() and _pictures(database) < before + 64:
            time.sleep(0.05)
        process.kill()
        process.join()
        kept.append(_pictures(database))
    assert kept == sorted(set(kept)), "what was done is kept"
    with pytest.raises(UserError, match=r"many\.index: an unfinished index"):
        Searcher.load(tmp_path / "many")
    index(source)
    index(source, out=tmp_path / "undisturbed")
    assert rows(tmp_path / "many.index") == rows(tmp_path / "undisturbed")


def _pictures(database: Path) -> int:
    import sqlite3

    if not database.exists():
        return 0
    opened = sqlite3.connect(database, timeout=60)
    try:
        return int(opened.execute("SELECT count(*) FROM picture").fetchone()[0])
    except sqlite3.OperationalError:  # it has no tables yet
        return 0
    finally:
        opened.close()


def test_a_full_disk_is_told_and_nothing_is_lost(photos: Path) -> None:
    info = index(photos)
    folder = build.default_folder(photos)
    before = (folder / f"rows-{info.state}.npy").read_bytes()
    for name in ("rows", "ids"):
        (folder / f"{name}-{info.state}.npy").unlink()
        (folder / f"{name}-{info.state}.unfinished").symlink_to("/dev/full")
        with pytest.raises(UserError, match="the disk is full: make room"):
            index(photos)
        assert not list(folder.glob("*.unfinished"))
        index(photos)
        assert (folder / f"rows-{info.state}.npy").read_bytes() == before


def test_a_damaged_index_is_told_with_what_mends_it(photos: Path) -> None:
    info = index(photos)
    folder = build.default_folder(photos)

    def cut(name: str, length: int) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:length])

    cut(f"rows-{info.state}.npy", 200)
    with pytest.raises(UserError, match=r"damaged .*--rebuild"):
        Searcher.load(folder)
    index(photos)  # the rows are written anew
    assert Searcher.load(folder).search([photos / "cross/1.png"], 1)[0].hits[0].path == "cross/1.png"
    cut("pictures.sqlite", 3000)
    for attempt in (lambda: Searcher.load(folder), lambda: index(photos)):
        with pytest.raises(UserError, match=r"damaged .*--rebuild"):
            attempt()
    (folder / "index.json").write_text("x")
    with pytest.raises(UserError, match=r"index\.json: damaged: .*--rebuild"):
        Searcher.load(folder)
    with pytest.raises(UserError, match="lies in the collection"):
        index(photos, out=photos / "inside")


def test_archives_and_packs_are_indexed_too(photos: Path, tmp_path: Path) -> None:
    index(photos)
    archive = Path(shutil.make_archive(str(tmp_path / "zipped"), "zip", photos))
    index(archive)
    assert rows(tmp_path / "zipped.zip.index") == rows(build.default_folder(photos))
    (tmp_path / "two/photos").parent.mkdir()
    shutil.copytree(photos, tmp_path / "two/photos")
    shutil.copytree(photos, tmp_path / "two/others")
    write_pack(tmp_path / "two", ["photos"], tmp_path / "pack", PackParams(side=20))
    index(tmp_path / "pack")
    packed = {path.removeprefix("photos/"): x for path, x in rows(tmp_path / "pack.index").items()}
    assert packed == rows(build.default_folder(photos))
    with pytest.raises(UserError, match=r"stored at 20 px .*, the model takes 24 px"):
        index(tmp_path / "pack", replace(tiny_model(), pack=PackParams(side=24)), tmp_path / "other")


def test_models_are_never_mixed(photos: Path) -> None:
    index(photos)
    with pytest.raises(UserError, match="by another model: give another --out"):
        index(photos, tiny_model(seed=1))
    with pytest.raises(UserError, match="of pictures seen as any domain"):
        update_index(photos, build.default_folder(photos), tiny_model(), "drawn")
    others = photos.with_name("others")
    shutil.copytree(photos / "cross", others)
    for rebuild in (False, True):
        with pytest.raises(UserError, match=r"others: no index: it holds 0\.png"):
            update_index(photos, others, tiny_model(), rebuild=rebuild)
    assert len(list(others.iterdir())) == 8
    index_json = build.default_folder(photos) / "index.json"
    index_json.write_text(json.dumps({**json.loads(index_json.read_text()), "format": 99}))
    with pytest.raises(UserError, match="format 99, this version reads 1"):
        Searcher.load(photos)


def test_near_duplicates_are_folded_and_others_are_not(photos: Path) -> None:
    original = Image.effect_mandelbrot((96, 96), (-2, -1.2, 0.8, 1.2), 60).convert("RGB")
    original.save(photos / "circle/fractal.png")
    original.resize((161, 161), Image.Resampling.BICUBIC).save(photos / "circle/large.jpg", quality=70)
    shutil.copy(photos / "circle/fractal.png", photos / "square/copy.png")
    original.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "circle/turned.png")
    index(photos)
    searcher = Searcher.load(photos)
    (plain,) = searcher.search(original, 26)
    (folded,) = searcher.search(original, 26, hide_duplicates=True)
    assert len(plain.hits) == 26
    first, *others = folded.hits
    assert {first.path, *first.duplicates} == {"circle/fractal.png", "circle/large.jpg", "square/copy.png"}
    assert [hit.path for hit in others if not hit.duplicates].count("circle/turned.png") == 1
    assert sum(1 + len(hit.duplicates) for hit in folded.hits) == 26, "none is lost"
    assert [len(a.hits) for a in searcher.search([original] * 2, 20, hide_duplicates=True)] == [20, 20]


def test_an_index_stays_until_the_one_made_anew_is_there(photos: Path) -> None:
    folder, model = build.default_folder(photos), tiny_model()
    queries = {"drawn": build.sample_features(model, photos)}
    update_index(photos, folder, model, query_features=queries, false_rejections=0.2)
    before = rows(folder)

    def dies(embedder: FileEmbedder) -> build.Compute:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        update_index(photos, folder, model, compute=dies, rebuild=True)
    assert rows(folder) == before
    info = update_index(photos, folder, model, rebuild=True)
    assert (list(info.limits), info.false_rejections) == (["drawn"], 0.2)
    assert rows(folder) == before
    other = update_index(photos, folder, tiny_model(seed=1), rebuild=True)
    assert (other.limits, other.false_rejections) == ({}, 0.2), "features of queries are of one model"
    assert rows(folder) != before
    assert not list(photos.parent.glob("*.new"))


@pytest.mark.parametrize("kept", ["model.pt", "rows", "pictures.sqlite", "index.json"])
def test_an_index_whose_place_is_taken_goes_on_after_a_kill(
    photos: Path, monkeypatch: pytest.MonkeyPatch, kept: str
) -> None:
    folder, other = build.default_folder(photos), tiny_model(seed=1)
    index(photos)
    move, embed = Path.replace, FileEmbedder.__call__

    def killed(path: Path, target: Path) -> Path:
        if path.parent.name.endswith(".new") and target.parent == folder and path.name.startswith(kept):
            raise KeyboardInterrupt
        return move(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            update_index(photos, folder, other, rebuild=True)
    with pytest.raises(UserError, match="an unfinished index"):
        Searcher.load(folder)
    assert (folder / "model.pt").exists(), "or the command would take another model"
    asked: list[str] = []

    def counting(embedder: FileEmbedder, batch: Any, known: Any) -> Any:
        asked.extend(path for path, _ in batch)
        return embed(embedder, batch, known)

    monkeypatch.setattr(FileEmbedder, "__call__", counting)
    update_index(photos, folder, other, rebuild=kept != "index.json")
    assert not asked, "what was embedded is not embedded again"
    index(photos, other, photos.parent / "undisturbed")
    assert rows(folder) == rows(photos.parent / "undisturbed")


def test_folders_likes_and_mistakes(photos: Path) -> None:
    index(photos)
    index(photos / "cross")
    assert index(photos).count == 22, "an index beside its pictures is no picture"
    (empty := photos.with_name("empty")).mkdir()
    with pytest.raises(UserError, match="empty: no picture in it"):
        index(empty)
    assert not build.default_folder(empty).exists()
    searcher = Searcher.load(photos)
    query = photos / "circle/1.png"
    (answer,) = searcher.search(query, 100, below="cross")
    assert len(answer.hits) == 8
    assert all(hit.path.startswith("cross/") for hit in answer.hits)
    (same,) = searcher.search(query, 100)
    like = searcher.like("circle/1.png", 4)
    assert [hit.path for hit in like.hits] == [hit.path for hit in same.hits[1:5]]
    assert searcher.like(same.hits[0].id, 4).hits == like.hits
    for number in range(3):  # its copies are itself
        shutil.copy(photos / "circle/1.png", photos / f"cross/copy{number}.png")
    index(photos)
    assert Searcher.load(photos).like("circle/1.png", 4).hits == like.hits
    folded = Searcher.load(photos).like("circle/1.png", 22, hide_duplicates=True)
    assert sum(1 + len(hit.duplicates) for hit in folded.hits) == 21
    assert Image.open(build_thumbnail(searcher, like.hits[0].id)).size == (20, 20)
    for call, message in (
        (lambda: searcher.search(query, below="crss"), "did you mean 'cross'"),
        (lambda: searcher.search(query, domain="foto"), "did you mean 'photo'"),
        (lambda: searcher.search(query, 0), "k = 0: at least 1"),
        (lambda: searcher.search(photos / "none.png"), "none.png: No such file"),
        (lambda: searcher.search(Path(__file__)), "not an image"),
        (lambda: searcher.like("circle/none.png"), "no such picture"),
        (lambda: searcher.thumbnail("../../etc/passwd"), "no thumbnail"),
        (lambda: Searcher.load(photos / "square"), "no index: `uv run ucir index <pictures>` makes it"),
        (lambda: index(photos / "cross/nothing"), "no such folder or archive"),
    ):
        with pytest.raises(UserError, match=message) as error:
            call()
        assert "\n" not in str(error.value)


def test_an_expanded_query_is_the_mean_of_it_and_its_nearest(photos: Path) -> None:
    index(photos)
    searcher = Searcher.load(photos)
    (query,), _ = searcher.embed([stored_picture(Image.open(photos / "circle/1.png"), searcher.model.pack)])
    nearest = np.argsort(-(searcher.rows_ND @ query))[:3]
    mean = (query + searcher.rows_ND[nearest].sum(axis=0)).astype(np.float64)
    scores = searcher.rows_ND @ (mean / np.linalg.norm(mean))
    (answer,) = searcher.search(photos / "circle/1.png", 5, expand=3, limit=0.5)
    assert [hit.score for hit in answer.hits] == pytest.approx(np.sort(scores)[::-1][:5], abs=1e-5)
    assert "nearest at distance 0.00" in answer.reason, "of the query itself, not of the mean"


def build_thumbnail(searcher: Searcher, id: str) -> object:
    import io

    return io.BytesIO(searcher.thumbnail(id))


def test_the_limit_rejects_as_many_as_it_says_and_what_is_unlike_all() -> None:
    rng = torch.Generator().manual_seed(0)
    known, new = torch.rand(400, generator=rng), torch.rand(4000, generator=rng)
    limit = calibrated_limit(known, 0.1)
    assert limit == float(known.sort().values[360])  # the 361st of 400: ceil(401 * 0.9)
    assert 0.07 < float((new > limit).float().mean()) < 0.13
    assert calibrated_limit(torch.rand(8), 0.05) == 2.0, "too few to tell"


def test_queries_beyond_the_limit_are_told(photos: Path) -> None:
    model = tiny_model()
    plain = index(photos, model)
    assert plain.limits == {}
    sample = build.sample_features(model, photos)
    assert len(sample) == 22
    info = update_index(photos, build.default_folder(photos), model, query_features={"drawn": sample})
    (limit,) = info.limits.values()
    lax = update_index(photos, build.default_folder(photos), model, false_rejections=0.2)
    assert lax.limits["drawn"] < limit
    assert index(photos, model) == lax, "the rate is kept"
    assert update_index(photos, build.default_folder(photos), model, false_rejections=0.05) == info
    searcher = Searcher.load(photos)
    scores = searcher.rows_ND @ searcher.rows_ND.T - 2 * np.eye(22, dtype=np.float32)
    nearest = np.sort(1 - scores.max(axis=1))
    assert limit == pytest.approx(nearest[21], abs=1e-4), "a picture is not its own counterpart"
    (answer,) = searcher.search(photos / "cross/1.png", 3)
    assert answer.accepted
    (answer,) = searcher.search(photos / "cross/1.png", 3, limit=-1)
    assert answer.accepted is False
    assert answer.reason == "nothing like it here: nearest at distance 0.00, beyond the limit -1.00"
    assert len(answer.hits) == 3, "who wants them all the same has them"
    searcher.info = replace(info, limits={"drawn": 0.5, "photo": -1.0})
    found = [searcher.search(photos / "cross/1.png", domain=of)[0] for of in (None, "drawn", "photo")]
    assert [answer.accepted for answer in found] == [True, True, False], "the widest, or the domain's own"
    (photos / "cross/1.png").unlink()
    again = index(photos, model)
    assert again.limits.keys() == {"drawn"}, "bringing it up to date learns from the same queries"
    (answer,) = searcher.search(photos / "cross/2.png", 22)
    assert len(answer.hits) == 21, "who opened it before finds what is still there"


def test_a_query_is_judged_by_the_limit_of_the_domain_that_it_is_taken_for(photos: Path) -> None:
    params = EncoderParams(trunk={"convnet": {"width": 4}}, feature_dim=8, head="residual")
    model = replace(tiny_model(), encoder=new_encoder(params, 0).eval())
    head = model.encoder.head
    assert isinstance(head, ResidualHead)
    drawn, photo = photos / "circle/1.png", photos / "cross/1.png"
    stored = [stored_picture(Image.open(path), model.pack) for path in (drawn, photo)]
    head.centre_2P.copy_(model.embed(stored, features="pooled"))
    index(photos, model)
    searcher = Searcher.load(photos)

    def accepted(limits: dict[str, float], domain: str | None = None) -> list[bool | None]:
        searcher.info = replace(searcher.info, limits=limits)
        return [answer.accepted for answer in searcher.search([drawn, photo], domain=domain)]

    assert accepted({"drawn": 2.0, "photo": -1.0}) == [True, False]
    assert accepted({"drawn": 2.0, "photo": -1.0}, "drawn") == [True, True]
    assert accepted({"drawn": -1.0, "asked with": 2.0}) == [False, True], "the widest, where it has none"
    assert accepted({}) == [None, None]


def test_an_inverted_file_is_used_where_it_recalls_and_can_forget(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "EXACT_UP_TO", 100)
    monkeypatch.setattr(knn, "POINTS_A_CELL", 8)
    monkeypatch.setattr(knn, "RECALL_DEPTHS", (5,))
    model, many = tiny_model(), make_images(tmp_path / "many", per_class=40)
    info = index(many, model)
    assert info.kind == "ivf"
    assert info.recall["5"] >= 0.99
    assert info.probes <= info.cells // 2
    exact = Searcher.load(many)
    inverted, exact.inverted = exact.inverted, None
    queries = sorted(photos.rglob("*.png"))
    wanted = exact.search(queries, 5)
    exact.inverted = inverted
    found = exact.search(queries, 5)
    same = [a.hits[i].path == b.hits[i].path for a, b in zip(found, wanted, strict=True) for i in range(5)]
    assert np.mean(same) > 0.9
    (below,) = exact.search(queries[0], 5, below="photo/cross")
    assert all(hit.path.startswith("photo/cross/") for hit in below.hits)
    for file in sorted(many.rglob("1*.png")):
        file.unlink()
    draw("cross", np.random.default_rng(5)).save(many / "photo/cross/new.png")
    later = index(many, model)
    assert later.kind == "ivf"
    assert later.learnt_from == info.count, "it forgets and learns without being built anew"
    searcher = Searcher.load(many)
    assert sorted(knn.held_ids(searcher.inverted)) == sorted(searcher.id_N)
    (new,) = searcher.search(many / "photo/cross/new.png", 1)
    assert new.hits[0].path == "photo/cross/new.png"
    monkeypatch.setattr(knn, "RECALL", 2.0)  # which nothing reaches
    assert update_index(many, build.default_folder(many), model, rebuild=True).kind == "exact"


def test_recall_counts_hits_as_near_as_the_true_ones() -> None:
    true = np.array([[0.9, 0.8, 0.7], [0.5, 0.5, 0.5]], np.float32)
    found = np.array([[0.9, 0.7, 0.6], [0.5, 0.5, 0.5]], np.float32)
    assert knn.recall_at(1, found, true) == 1
    assert knn.recall_at(2, found, true) == 0.75
    assert knn.recall_at(3, found, true) == pytest.approx(5 / 6)


def test_the_commands_teach_and_print(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_model(tiny_model(), tmp_path / "model.pt")
    (photos / "cross/notes.jpg").write_text("no picture")
    few = ("index", "photos", "--model", "model.pt", "--queries", "photos/cross", "--out", "few one")
    text = ucir(*few)
    assert "limit: not known, so every query finds something: give 19 pictures or more" in text
    assert "ucir search --index 'few one' <picture>" in text
    assert "rejects about 20 % of pictures like these" in ucir(*few, "--false-rejections", "0.2")
    made = ucir("index", "photos", "--model", "model.pt", "--queries", "photos")
    assert "22 pictures of " in made
    assert "left out: cross/notes.jpg: not an image" in made
    assert "limit: nothing is like a query farther than 0." in made
    assert "22 pictures" in ucir("index", "photos")
    table = ucir("search", "photos/cross/0.png", "--top", "3")
    assert "within the limit 0." in table
    assert "    1   1.000  cross/0.png" in table
    lines = ucir("search", "photos/cross/0.png", "photos/circle/0.png", "--json", "--grid", "grid.png")
    first, second = (json.loads(line) for line in lines.splitlines() if line.startswith("{"))
    assert first["hits"][0] == {**first["hits"][0], "rank": 1, "path": "cross/0.png", "duplicates": []}
    assert second["query"] == "photos/circle/0.png"
    assert Image.open("grid.png").height > Image.open("grid.png").width / 11
    with pytest.raises(UserError, match="--top 1000 with --grid: a picture shows at most"):
        ucir("search", "photos/cross/0.png", "--top", "1000", "--grid", "grid.png")
    none = ucir("search", "photos/cross/0.png", "--limit", "-1")
    assert "nothing like it here" in none
    assert "cross/0.png\n" not in none
    assert "`--anyway` lists the nearest" in none
    assert "cross/0.png\n" in ucir("search", "photos/cross/0.png", "--limit", "-1", "--anyway")
    assert "like cross/0.png" in ucir("search", "--like", "cross/0.png", "--folder", "cross")
    some = CliRunner().invoke(app, ["search", "photos/cross/notes.jpg", "photos/cross/0.png", "none.png"])
    assert re.search(r"cross/notes\.jpg: .*; none\.png: No such file", str(some.exception))
    assert "photos/cross/0.png: nearest at" in some.stdout, "the others are answered all the same"
    with pytest.raises(UserError, match="give pictures to search with, or --like"):
        ucir("search")
    with pytest.raises(UserError, match="not with --like"):
        ucir("search", "--like", "cross/0.png", "--limit", "0.1")
    save_model(replace(tiny_model(), domains=("drawn", "my_photos_ä")), tmp_path / "own.pt")
    photos.rename(tmp_path / "my-photos ä")
    seen = ucir("index", "my-photos ä", "--model", "own.pt")
    assert "seen as pictures of my_photos_ä" in seen, "as `adapt` names a folder"
    (tmp_path / "my-photos ä").rename(photos)
    with pytest.raises(UserError, match="model 'mine': neither a file nor one"):
        ucir("index", "photos", "--model", "mine")
    (tmp_path / "dvc.lock").write_text("stages: {sample: {outs: [{path: photos}]}, look: {cmd: look}}")
    assert "22 pictures" in ucir("index", "photos"), "beside an output, not in it"
    with pytest.raises(UserError, match=r"photos/cross\.index: .* removes what else lies there: .* --out"):
        ucir("index", "photos/cross")
