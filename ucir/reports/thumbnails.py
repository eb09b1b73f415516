"""Small pictures of a page: each is held once, in a sheet, however often it is shown.

A sheet is the background of those elements that show a part of it; a browser decodes it when the first of
them is on the screen, so that a page whose sections are folded opens at once.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from ucir.data.pack import DomainImages

SIDE = 48
COLUMNS = 16
PER_SHEET = COLUMNS * 16


@dataclass(frozen=True)
class Thumbnail:
    """Where a picture stands."""

    sheet: int
    column: int
    row: int


@dataclass
class Thumbnails:
    """Those of one page."""

    known: dict[tuple[str, str, int], Thumbnail] = field(default_factory=dict)
    """By data set, domain and row of the pack."""
    sheets: list[list[Image.Image]] = field(default_factory=list)
    open_sheets: dict[tuple[str, str], int] = field(default_factory=dict)
    """The sheet that a data set's domain adds to: what is shown together lies together."""

    def of(self, dataset: str, images: DomainImages, slot: int) -> Thumbnail:
        """The thumbnail of a picture, made when it is asked for first."""
        domain = (dataset, images.name)
        key = (*domain, int(images.row_N[slot]))
        if key not in self.known:
            sheet = self.open_sheets.get(domain)
            if sheet is None or len(self.sheets[sheet]) == PER_SHEET:
                sheet = self.open_sheets[domain] = len(self.sheets)
                self.sheets.append([])
            pixels = images.pixels(np.array([slot]))[0]
            place = len(self.sheets[sheet])
            self.sheets[sheet].append(Image.fromarray(pixels).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
            self.known[key] = Thumbnail(sheet, place % COLUMNS, place // COLUMNS)
        return self.known[key]

    def style(self) -> str:
        """CSS: a class ``s<number>`` for each sheet."""
        return "\n".join(
            f".s{number}{{background-image:url(data:image/webp;base64,{base64.b64encode(_sheet(images)).decode()})}}"
            for number, images in enumerate(self.sheets)
        )


def _sheet(images: list[Image.Image]) -> bytes:
    """All of a sheet's pictures as WebP; every sheet is as wide as a full one, so that one rule fits all."""
    rows = -(-len(images) // COLUMNS)
    sheet = Image.new("RGB", (COLUMNS * SIDE, rows * SIDE), "white")
    for place, image in enumerate(images):
        sheet.paste(image, (place % COLUMNS * SIDE, place // COLUMNS * SIDE))
    buffer = io.BytesIO()
    sheet.save(buffer, "webp", quality=45, method=6)
    return buffer.getvalue()
