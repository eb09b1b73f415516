"""Methods side by side: the right pictures, the right queries, the right numbers."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import normalize, one_hot

from ucir.data.pack import DomainImages
from ucir.reports.compare import Comparison, Direction, query_slots
from ucir.reports.embedding import ROOM, WIDTH, embedding
from ucir.reports.thumbnails import PER_SHEET, SIDE, Thumbnail, Thumbnails

LABELS = {"art": ["cat", "dog", "cat", "dog"], "photo": ["dog", "cat", "cow", "dog", "cat"]}


def painted(name: str, count: int, channel: int, first: int = 0) -> DomainImages:
    """Pictures of one colour each, by which they are known; their pack has more rows before them."""
    pixels = np.zeros((count + first, 8, 8, 3), np.uint8)
    pixels[..., channel] = (20 * np.arange(count + first))[:, None, None] % 240
    return DomainImages(name, pixels, np.arange(first, first + count), np.full((count, 2), 8))


def features_of(labels: list[str], wrong: tuple[int, ...] = ()) -> Tensor:
    """Pictures of a class alike; those that are wrong look like the next class."""
    classes = sorted({*LABELS["art"], *LABELS["photo"]})
    number = torch.tensor([classes.index(label) for label in labels])
    for slot in wrong:
        number[slot] = (number[slot] + 1) % len(classes)
    # none equal, so that the order is known
    return normalize(one_hot(number, len(classes) + 1) + 0.01 * torch.arange(len(labels))[:, None], dim=1)


@pytest.fixture
def direction() -> Direction:
    features = {
        "start": {"art": features_of(LABELS["art"], (0, 1)), "photo": features_of(LABELS["photo"])},
        "mine": {"art": features_of(LABELS["art"], (2,)), "photo": features_of(LABELS["photo"])},
    }
    images = {"art": painted("art", 4, 0, first=2), "photo": painted("photo", 5, 1)}
    return Direction("art", "photo", features, images, LABELS)


def pixel(thumbnails: Thumbnails, thumbnail: Thumbnail) -> tuple[int, ...]:
    """The middle of what an element shows that stands at this place of its sheet."""
    sheets = dict(re.findall(r"\.s(\d+)\{.*?base64,(.*?)\)", thumbnails.style()))
    sheet = Image.open(io.BytesIO(base64.b64decode(sheets[str(thumbnail.sheet)]))).convert("RGB")
    value = sheet.getpixel((SIDE * thumbnail.column + SIDE // 2, SIDE * thumbnail.row + SIDE // 2))
    assert isinstance(value, tuple)
    return value


def test_the_same_queries_with_what_each_method_retrieves(direction: Direction) -> None:
    thumbnails = Thumbnails()
    compared = Comparison("x", 2, "start", "mine", thumbnails)
    compared.add(direction, 2)
    (shown,) = compared.directions
    assert shown.title == "art → photo"
    assert [query.label for query in shown.same] == ["cat", "dog"]
    first = shown.same[0]
    assert [hits.method for hits in first.hits] == ["start", "mine"]
    assert first.hits[1].kinds[:3] == ["hit", "hit", "miss"]
    assert first.hits[0].kinds[0] == "miss"
    assert first.hits[1].words == "2 of 5 of the same class"
    assert pixel(thumbnails, first.thumbnail)[0] == pytest.approx(40, abs=6)  # its slot 0 is the pack's row 2
    expected = direction.top("mine", [0], 5)[0]
    for hit, thumbnail in zip(expected, first.hits[1].thumbnails, strict=True):
        assert pixel(thumbnails, thumbnail)[1] == pytest.approx(20 * hit, abs=6)


def test_queries_that_gained_and_lost_stand_out(direction: Direction) -> None:
    compared = Comparison("x", 2, "start", "mine", Thumbnails())
    compared.add(direction, 2)
    extremes = dict(compared.directions[0].extremes)
    assert list(extremes) == ["most improved", "lost most", "worst"]
    assert len(extremes["most improved"]) == 2
    (lost,) = extremes["lost most"]
    before, after = (hits.precision for hits in lost.hits)
    assert before == 100
    assert after is not None
    assert after < before
    assert extremes["worst"][0].hits[1].precision == after
    alone = Comparison("x", 2, "start", None, Thumbnails())
    alone.add(direction, 2)
    assert alone.directions[0].extremes == []


def test_classes_and_what_is_taken_for_them(direction: Direction) -> None:
    compared = Comparison("x", 2, "start", "mine", Thumbnails())
    compared.add(direction, 2)
    table = compared.class_table()
    assert table is not None
    assert table.columns == ["cat", "dog"]
    # mine: one cat finds both cats, the other the cow first; both dogs find theirs
    assert dict(table.rows)["mine"] == ["75.0", "100.0"]
    assert table.best[1] == {1}
    start, mine = compared.confusions()
    assert (start.method, mine.method) == ("start", "mine")
    assert mine.classes == ["cat", "cow", "dog"]
    assert mine.share_CC[[0, 2]].sum(axis=1) == pytest.approx([100, 100])
    assert mine.share_CC[0].tolist() == [75, 25, 0]
    assert mine.strongest == [("cat", "cow", 25.0)]


def test_without_labels_there_are_pictures_alone(direction: Direction) -> None:
    bare = Direction(
        "art", "photo", direction.features, direction.images, {"art": [""] * 4, "photo": [""] * 5}
    )
    compared = Comparison("x", 2, "start", None, Thumbnails())
    compared.add(bare, 3)
    assert len(compared.directions[0].same) == 3
    assert set(compared.directions[0].same[0].hits[0].kinds) == {""}
    assert compared.directions[0].same[0].hits[0].words == "5 pictures"
    assert compared.class_table() is None
    assert compared.confusions() == []


def test_a_picture_is_held_once() -> None:
    thumbnails = Thumbnails()
    images = painted("photo", PER_SHEET + 1, 1)
    part = DomainImages("photo", images.stored_MSS3, images.row_N[5:], images.size_N2[5:])  # of a setting
    assert thumbnails.of("x", images, 7) == thumbnails.of("x", images, 7) == thumbnails.of("x", part, 2)
    assert thumbnails.of("x", painted("art", 9, 0), 7).sheet != thumbnails.of("x", images, 7).sheet
    places = [thumbnails.of("x", images, slot) for slot in range(PER_SHEET + 1)]
    assert len(set(places)) == PER_SHEET + 1
    assert thumbnails.style().count("data:image/webp") == 3
    assert pixel(thumbnails, places[9])[1] == pytest.approx(180, abs=6)


def test_the_same_queries_one_of_each_class_first() -> None:
    labels = ["b", "a", "b", "c", "a"]
    assert query_slots(labels, 3) == [1, 0, 3]
    assert query_slots(labels, 5) == [1, 0, 3, 4, 2]
    assert query_slots(labels, 50) == [1, 0, 3, 4, 2]


def test_the_plane_holds_every_point_and_pictures_where_there_is_room() -> None:
    torch.manual_seed(0)
    features = {d: normalize(torch.randn(n, 6), dim=1) for d, n in (("a", 30), ("b", 20))}
    labels = {"a": ["x", "y", "z"] * 10, "b": ["x", ""] * 10}
    images = {d: painted(d, len(x), 0) for d, x in features.items()}
    plot = embedding("set", features, images, labels, Thumbnails())
    assert plot.domains == ["a", "b"]
    assert [name for name, _ in plot.classes] == ["x", "y", "z"]
    assert len({colour for _, colour in plot.classes}) == 3
    dots = {number: "".join(path for n, _, path in plot.paths if n == number) for number in (0, 1)}
    assert (dots[0].count("M"), dots[1].count("M")) == (30, 20)
    places = np.array(re.findall(r"M(\d+) (\d+)h0", dots[0] + dots[1]), int)
    assert places.min() > 0
    assert places.max() < WIDTH
    at = np.array([(p.left, p.top) for p in plot.pictures]) * WIDTH / 100
    assert {p.domain for p in plot.pictures} == {0, 1}
    apart = np.abs(at[:, None] - at[None]).max(axis=2) + 2 * ROOM * np.eye(len(at))
    assert apart.min() >= ROOM - 1e-6


def test_pictures_that_are_all_the_same_lie_on_one_point() -> None:
    """t-SNE would divide by their spread, and bring the process down."""
    row = normalize(torch.ones(1, 6), dim=1)
    features = {d: row.expand(20, 6).contiguous() for d in "ab"}
    labels = {d: ["x"] * 20 for d in "ab"}
    plot = embedding("set", features, {d: painted(d, 20, 0) for d in "ab"}, labels, Thumbnails())
    places = set(re.findall(r"M(\d+) (\d+)h0", "".join(path for _, _, path in plot.paths)))
    assert places == {(str(WIDTH // 2), str(WIDTH // 2))}
