"""Figures of the report, as SVG or PNG bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from ucir.data.pack import DomainImages
from ucir.reports.table import Cell
from ucir.retrieval.metrics import metrics, precision_name

matplotlib.use("Agg")

from matplotlib import pyplot as plt

# text stays text, so that the reader's fonts show names in any script; '$' in a name is no formula
matplotlib.rcParams.update({"svg.fonttype": "none", "text.parse_math": False})

QUERY, HIT, MISS = (37, 99, 235), (22, 163, 74), (220, 38, 38)
UNKNOWN = (160, 160, 160)
THUMB = 56
FRAME = 4
POINTS = 600
"""t-SNE's points per domain: enough to see the shape, few enough for seconds."""


def curves(histories: Mapping[str, Sequence[Mapping[str, float]]], cutoff: int) -> bytes:
    """Loss terms and retrieval scores by epoch, a column for each run; SVG."""
    scored = any(f"val/{precision_name(cutoff)}" in entry for h in histories.values() for entry in h)
    figure, axes = plt.subplots(
        1 + scored,
        len(histories),
        figsize=(4 * len(histories), 2.5 * (1 + scored)),
        squeeze=False,
        sharex="col",
        sharey="row",
    )
    for column, (name, history) in enumerate(histories.items()):
        epochs = [entry["epoch"] + 1 for entry in history]
        terms = dict.fromkeys(k for entry in history for k in entry if k.startswith("train/loss_"))
        for term in terms:
            values = [entry.get(term, np.nan) for entry in history]
            axes[0, column].plot(epochs, values, label=term.removeprefix("train/loss_"))
        if scored:
            for metric in (m for m in metrics((cutoff,)) if m.curve):
                values = [entry[f"val/{metric.identifier}"] for entry in history]
                axes[1, column].plot(epochs, values, label=metric.name)
        axes[0, column].set_title(name)
        axes[-1, column].set_xlabel("epoch")
    axes[0, 0].set_ylabel("loss term (unweighted)")
    if scored:
        axes[1, 0].set_ylabel("percent, mean of directions")
    for row in axes[:, -1]:
        row.legend(fontsize=8)
    figure.tight_layout()
    return _svg(figure)


def imbalance(cells: Mapping[str, Mapping[int, Cell]], metric: str) -> bytes:
    """A line for each method over the ratio of class sizes, with deviations over seeds; SVG."""
    figure, axis = plt.subplots(figsize=(6, 3.6))
    ratios = sorted({ratio for by_ratio in cells.values() for ratio in by_ratio})
    for method, by_ratio in cells.items():
        x = sorted(by_ratio)
        means, deviations = [by_ratio[r].mean for r in x], [by_ratio[r].std or 0.0 for r in x]
        axis.errorbar(x, means, yerr=deviations, marker="o", markersize=4, capsize=3, label=method)
    axis.set_xscale("log")
    axis.set_xticks(ratios, [f"{ratio} : 1" for ratio in ratios])
    axis.minorticks_off()
    axis.set_xlabel("largest : smallest class in training")
    axis.set_ylabel(f"{metric}, percent")
    axis.legend(fontsize=8)
    figure.tight_layout()
    return _svg(figure)


def retrieval_grid(
    query_images: DomainImages,
    gallery_images: DomainImages,
    queries: Sequence[int],
    ranked: np.ndarray,
    query_labels: Sequence[str],
    gallery_labels: Sequence[str],
) -> bytes:
    """A row a query: the query (blue frame), then its nearest gallery images (hit green, miss red); PNG.

    Args:
        query_images, gallery_images: the two domains.
        queries: slots of the queries.
        ranked: slots of the retrieved images, one row for each of ``queries``.
        query_labels, gallery_labels: class names by slot; empty = not known, framed in grey.
    """
    rows = []
    for query, found in zip(queries, ranked, strict=True):
        row = [_framed(query_images.pixels(np.array([query]))[0], QUERY)]
        for slot in found:
            labels = query_labels[query], gallery_labels[slot]
            colour = UNKNOWN if "" in labels else HIT if labels[0] == labels[1] else MISS
            row.append(_framed(gallery_images.pixels(np.array([slot]))[0], colour))
        rows.append(row)
    return _sheet(rows)


def hit_grid(queries: Sequence[Image.Image], hits: Sequence[Sequence[Image.Image]]) -> bytes:
    """A row a query: the query (blue frame), then what was found, best first; PNG."""
    side = (2 * THUMB, 2 * THUMB)
    rows = [
        [
            ImageOps.expand(ImageOps.pad(image.convert("RGB"), side, color="white"), FRAME, colour)
            for image, colour in [(query, QUERY), *((hit, UNKNOWN) for hit in found)]
        ]
        for query, found in zip(queries, hits, strict=True)
    ]
    return _sheet(rows)


def query_slots(labels: Sequence[str], count: int) -> list[int]:
    """Queries to show: the first image of each class, class after class, the same for every method."""
    by_class = {
        label: [i for i, other in enumerate(labels) if other == label] for label in sorted(set(labels))
    }
    turns = zip(
        *([*slots, *[-1] * (count - len(slots))][:count] for slots in by_class.values()),
        strict=True,
    )
    return [slot for turn in turns for slot in turn if slot >= 0][:count]


def embedding(features: Mapping[str, Tensor], labels: Mapping[str, Sequence[str]], seed: int = 0) -> bytes:
    """t-SNE of both domains, colour = class, marker = domain; SVG, the points in it as a picture."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    # slots are in no meaningful order, so that the first ones are as good as any
    chosen = {domain: min(POINTS, len(x)) for domain, x in features.items()}
    points = np.concatenate([features[domain][:n].numpy() for domain, n in chosen.items()])
    points = PCA(min(50, *points.shape), random_state=seed).fit_transform(points)
    perplexity = min(30, (len(points) - 1) / 3)
    flat = TSNE(2, perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)
    classes = sorted({label for domain, n in chosen.items() for label in labels[domain][:n]})
    colour = {label: plt.get_cmap("tab20")(i % 20) for i, label in enumerate(classes)}
    figure, axis = plt.subplots(figsize=(5, 4.2))
    first = 0
    for (domain, n), marker in zip(chosen.items(), "o+", strict=False):
        of_domain = flat[first : first + n]
        first += n
        axis.scatter(
            of_domain[:, 0],
            of_domain[:, 1],
            s=14,
            marker=marker,
            c=[colour[label] for label in labels[domain][:n]],
            linewidths=0.8,
            alpha=0.7,
            rasterized=True,
        )
        axis.scatter([], [], color="grey", marker=marker, label=_legend(domain), s=14)
    for label in filter(None, classes[:20]):
        axis.scatter([], [], color=colour[label], label=_legend(label), s=14)
    axis.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    axis.set_xticks([])
    axis.set_yticks([])
    return _svg(figure)


def _legend(name: str) -> str:
    """A name as the legend shows it: matplotlib passes over those that begin with an underscore."""
    return f" {name}" if name.startswith("_") else name


def _framed(pixels: np.ndarray, colour: tuple[int, int, int]) -> Image.Image:
    thumb = Image.fromarray(np.asarray(pixels)).resize((THUMB, THUMB), Image.Resampling.BICUBIC)
    return ImageOps.expand(thumb, FRAME, colour)


def _sheet(rows: Sequence[Sequence[Image.Image]]) -> bytes:
    """Squares of one size, row by row; the first column stands apart; PNG."""
    cell = rows[0][0].width + 2
    sheet = Image.new("RGB", (cell * max(map(len, rows)) + FRAME, cell * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * cell + FRAME * (x > 0), y * cell))
    return _png(sheet)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _svg(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    # a fixed id salt and no date: equal results give equal bytes
    with plt.rc_context({"svg.hashsalt": "ucir"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of its own, not of the reader's
        figure.savefig(buffer, format="svg", dpi=110, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
