"""Figures of the report, as SVG or PNG bytes."""

from __future__ import annotations

import io
import warnings
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from PIL import Image, ImageOps

from ucir.reports.table import Cell
from ucir.retrieval.metrics import metrics, precision_name

matplotlib.use("Agg")

from matplotlib import pyplot as plt

# text stays text, so that the reader's fonts show names in any script; '$' in a name is no formula
matplotlib.rcParams.update({"svg.fonttype": "none", "text.parse_math": False})

QUERY, HIT = (37, 99, 235), (160, 160, 160)
"""Frames."""
SIDE = 112
FRAME = 4


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
                values = [entry.get(f"val/{metric.identifier}", np.nan) for entry in history]
                axes[1, column].plot(epochs, values, label=metric.name)
        axes[0, column].set_title(name)
        axes[-1, column].set_xlabel("epoch")
    axes[0, 0].set_ylabel("loss term (unweighted)")
    if scored:
        axes[1, 0].set_ylabel("percent, mean of directions")
    for row in axes[:, -1]:
        row.legend(fontsize=8)
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
    return _svg(figure)


def hit_grid(queries: Sequence[Image.Image], hits: Sequence[Sequence[Image.Image]]) -> bytes:
    """A row a query: the query (blue frame), then what was found, best first; PNG."""
    side = (SIDE, SIDE)
    rows = [
        [
            ImageOps.expand(ImageOps.pad(image.convert("RGB"), side, color="white"), FRAME, colour)
            for image, colour in [(query, QUERY), *((hit, HIT) for hit in found)]
        ]
        for query, found in zip(queries, hits, strict=True)
    ]
    cell = side[0] + 2 * FRAME + 2
    sheet = Image.new("RGB", (cell * max(map(len, rows)) + FRAME, cell * len(rows)), "white")
    for y, row in enumerate(rows):
        for x, image in enumerate(row):
            sheet.paste(image, (x * cell + FRAME * (x > 0), y * cell))  # the query stands apart
    buffer = io.BytesIO()
    sheet.save(buffer, "png", optimize=True)
    return buffer.getvalue()


def _svg(figure: plt.Figure) -> bytes:
    buffer = io.BytesIO()
    # a fixed id salt and no date: equal results give equal bytes
    with plt.rc_context({"svg.hashsalt": "ucir"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of its own, not of the reader's
        figure.tight_layout()
        figure.savefig(buffer, format="svg", dpi=110, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)
    return buffer.getvalue()
