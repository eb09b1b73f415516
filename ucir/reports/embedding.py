"""Features in the plane: t-SNE of two domains, some of the points as pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from ucir.data.pack import DomainImages
from ucir.reports.thumbnails import Thumbnail, Thumbnails

POINTS = 400
"""Of a domain: enough to see the shape, few enough for seconds."""
PICTURED = 90
"""Points of a domain, the same for every method, that are pictures where there is room."""
WIDTH = 1000
"""Of the plane."""
SAME = 1e-6
"""Features this close are equal."""
ROOM = 65
"""Between pictures."""
COLOURS = (
    *("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f", "#bcbd22"),
    *("#17becf", "#aec7e8", "#ffbb78", "#98df8a", "#ff9896", "#c5b0d5", "#c49c94", "#f7b6d2", "#dbdb8d"),
    "#9edae5",
)
NO_CLASS = "#888888"


@dataclass(frozen=True)
class PlacedPicture:
    """A point that is shown as its picture."""

    thumbnail: Thumbnail
    domain: int
    """0 or 1."""
    left: float
    top: float
    """Percent."""


@dataclass(frozen=True)
class Embedding:
    """A plot; its points are dots of zero length in SVG paths, one path for each domain and class."""

    domains: list[str]
    paths: list[tuple[int, str, str]]
    """Number of the domain, colour, path."""
    pictures: list[PlacedPicture]
    classes: list[tuple[str, str]]
    """Names and colours; of more than there are colours, the first."""


def embedding(
    dataset: str,
    features: Mapping[str, Tensor],
    images: Mapping[str, DomainImages],
    labels: Mapping[str, Sequence[str]],
    thumbnails: Thumbnails,
    seed: int = 0,
) -> Embedding:
    """t-SNE of two domains.

    Args:
        dataset: its name.
        features, images, labels: by domain, in the same order.
        thumbnails: of the page.
        seed: of t-SNE.
    """
    # slots are in no meaningful order, so that the first ones are as good as any
    chosen = {domain: min(POINTS, len(x)) for domain, x in features.items()}
    flat = _flattened(np.concatenate([features[domain][:n].numpy() for domain, n in chosen.items()]), seed)
    classes = sorted({label for domain, n in chosen.items() for label in labels[domain][:n]})
    colour = {label: COLOURS[i % len(COLOURS)] if label else NO_CLASS for i, label in enumerate(classes)}
    paths, pictures = [], []
    taken = np.empty((0, 2))
    places = dict(zip(chosen, np.split(flat, np.cumsum(list(chosen.values()))[:-1]), strict=True))
    for number, (domain, places_N2) in enumerate(places.items()):
        label_N = np.array(labels[domain][: len(places_N2)])
        for label in classes:
            dots = "".join(f"M{x} {y}h0" for x, y in places_N2[label_N == label])
            if dots:
                paths.append((number, colour[label], dots))
    for slot in range(PICTURED):  # in turns, so that neither domain takes all the room
        for number, (domain, places_N2) in enumerate(places.items()):
            if slot >= len(places_N2):
                continue
            place = places_N2[slot]
            if (np.abs(taken - place).max(axis=1) < ROOM).any():
                continue
            taken = np.vstack([taken, place])
            thumbnail = thumbnails.of(dataset, images[domain], slot)
            left, top = 100 * place / WIDTH
            pictures.append(PlacedPicture(thumbnail, number, float(left), float(top)))
    named = [(label, colour[label]) for label in classes if label][: len(COLOURS)]
    return Embedding(list(features), paths, pictures, named)


def _flattened(points_ND: np.ndarray, seed: int) -> np.ndarray:
    """Places in the plane, int64 (N, 2), a margin around them."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    if np.ptp(points_ND, axis=0).max() < SAME:  # t-SNE would divide by their spread, and crash
        return np.full((len(points_ND), 2), WIDTH // 2, np.int64)
    points_ND = PCA(min(50, *points_ND.shape), random_state=seed).fit_transform(points_ND)
    perplexity = min(30, (len(points_ND) - 1) / 3)
    # half of the usual steps keep neighbours as well (trustworthiness 0.997 both), in half of the time
    tsne = TSNE(2, perplexity=perplexity, init="pca", max_iter=500, random_state=seed)
    flat_N2 = tsne.fit_transform(points_ND)
    low, high = flat_N2.min(axis=0), flat_N2.max(axis=0)
    margin = 40
    scaled = margin + (WIDTH - 2 * margin) * (flat_N2 - low) / np.maximum(high - low, 1e-12)
    places: np.ndarray = scaled.round().astype(np.int64)
    return places
