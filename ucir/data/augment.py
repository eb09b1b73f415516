"""Random views and the evaluation view of images that lie decoded in memory.

The training view is the MoCo v2 "aug-plus" recipe that UCDIR and ProtoOT train with (UCDIR
``loader.py``): random resized crop, colour jitter, grey, blur, flip, normalise. All random draws of a
global batch are made at once from one seed and the pixels computed row by row, so that a worker that
renders only its own rows gets the very pixels that a single process would.

Shapes: B batch, S side of the stored square, s side of the view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.config import AugmentParams

MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
GREY = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class ViewDraw:
    """The random numbers of one view of B images; indexing picks rows."""

    box_B4: Tensor  # left, top, width, height as shares of the image
    jitter_B4: Tensor  # factors for brightness, contrast, saturation; turns of the hue circle
    order_B4: Tensor  # the order in which a row applies the four
    jittered_B: Tensor
    inverted_B: Tensor
    grey_B: Tensor
    sigma_B: Tensor  # blur in pixels of the view; 0 = none
    flipped_B: Tensor

    def __getitem__(self, rows: Tensor) -> ViewDraw:
        return ViewDraw(*(getattr(self, field.name)[rows] for field in fields(self)))


def draw_view(params: AugmentParams, size_B2: Tensor, generator: torch.Generator) -> ViewDraw:
    """Draw one random view for each image.

    Args:
        params: the augmentation block of params.yaml.
        size_B2: original width and height of each image in pixels: the crop's area and aspect are
            measured in the original picture, although the store holds it squashed to a square.
        generator: CPU generator; the draw depends on its state and on B alone.
    """
    count = len(size_B2)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=generator) * (high - low) + low

    def coin(share: float) -> Tensor:
        return torch.rand(count, generator=generator) < share

    jitter = params.jitter
    return ViewDraw(
        box_B4=_crop_boxes(params, size_B2.float(), generator),
        jitter_B4=torch.stack(
            [
                *(uniform(max(0.0, 1 - j), 1 + j) for j in jitter[:3]),
                uniform(-jitter[3], jitter[3]),
            ],
            dim=1,
        ),
        order_B4=torch.rand(count, 4, generator=generator).argsort(dim=1),
        jittered_B=coin(params.jitter_share),
        inverted_B=coin(params.invert_share),
        grey_B=coin(params.grey_share),
        sigma_B=uniform(*params.blur_sigma) * coin(params.blur_share),
        flipped_B=coin(params.flip_share),
    )


def render_views(images_BSS3: Tensor, draw: ViewDraw, side: int) -> Tensor:
    """Apply a draw to stored images (uint8). Returns normalised float32 (B, 3, side, side)."""
    x = torch.cat(
        [
            _resized_crop(image, box, side)
            for image, box in zip(images_BSS3, draw.box_B4.tolist(), strict=True)
        ]
    )
    x = x.float().div_(255)
    x = torch.where(draw.inverted_B.to(x.device)[:, None, None, None], 1 - x, x)
    x = _jitter(x, draw)
    grey = draw.grey_B.nonzero().flatten().to(x.device)
    if len(grey):
        x[grey] = _luma(x[grey]).expand(-1, 3, -1, -1)
    blurred = (draw.sigma_B > 0).nonzero().flatten()
    if len(blurred):
        x[blurred.to(x.device)] = gaussian_blur(x[blurred.to(x.device)], draw.sigma_B[blurred])
    flipped = draw.flipped_B.nonzero().flatten().to(x.device)
    if len(flipped):
        x[flipped] = x[flipped].flip(-1)
    return _normalise(x)


def eval_views(images_BSS3: Tensor, size_B2: Tensor, side: int, crop: float) -> Tensor:
    """The view that features are taken from: the centre square of the original picture.

    Args:
        images_BSS3: stored images, uint8.
        size_B2: original widths and heights.
        side: side of the view in pixels.
        crop: side of the square as a share of the shorter side; 224/256 is the papers'
            ``Resize(256), CenterCrop(224)``.
    """
    rows = []
    for image, (width, height) in zip(images_BSS3, size_B2.tolist(), strict=True):
        square = crop * min(width, height)
        w, h = square / width, square / height
        rows.append(_resized_crop(image, [(1 - w) / 2, (1 - h) / 2, w, h], side))
    return _normalise(torch.cat(rows).float().div_(255))


def _crop_boxes(params: AugmentParams, size_B2: Tensor, generator: torch.Generator) -> Tensor:
    """Boxes of ``RandomResizedCrop`` on a canvas that ``pad`` widens on every side.

    torchvision tries ten times to find a box that fits and then takes the centre; here all ten are
    drawn at once and the first that fits is taken.
    """
    count = len(size_B2)
    pad = params.crop_pad
    canvas_B2 = size_B2 * (1 + 2 * pad)
    area = canvas_B2.prod(dim=1, keepdim=True) * (
        torch.rand(count, 10, generator=generator) * (params.crop_area[1] - params.crop_area[0])
        + params.crop_area[0]
    )
    low, high = (math.log(value) for value in params.crop_aspect)
    aspect = torch.exp(torch.rand(count, 10, generator=generator) * (high - low) + low)
    width = (area * aspect).sqrt()
    height = (area / aspect).sqrt()
    fits = (width <= canvas_B2[:, :1]) & (height <= canvas_B2[:, 1:])
    first = fits.float().argmax(dim=1, keepdim=True)
    # the fallback: the largest centre box of an allowed aspect
    full_aspect = (canvas_B2[:, 0] / canvas_B2[:, 1]).clamp(*params.crop_aspect)
    none = ~fits.any(dim=1)
    w = torch.where(
        none,
        torch.minimum(canvas_B2[:, 0], canvas_B2[:, 1] * full_aspect),
        width.gather(1, first)[:, 0],
    )
    h = torch.where(
        none,
        torch.minimum(canvas_B2[:, 1], canvas_B2[:, 0] / full_aspect),
        height.gather(1, first)[:, 0],
    )
    place = torch.rand(count, 2, generator=generator)
    place = torch.where(none[:, None], torch.full_like(place, 0.5), place)
    extent = torch.stack([w, h], dim=1)
    corner = place * (canvas_B2 - extent) - pad * size_B2
    return torch.cat([corner / size_B2, extent / size_B2], dim=1)


def _resized_crop(image_SS3: Tensor, box: list[float], side: int) -> Tensor:
    """One crop, antialiased, uint8 in and out, (1, 3, side, side). Outside the picture its edge repeats."""
    stored = image_SS3.shape[0]
    x0, y0 = round(box[0] * stored), round(box[1] * stored)
    x1 = max(x0 + 1, round((box[0] + box[2]) * stored))
    y1 = max(y0 + 1, round((box[1] + box[3]) * stored))
    if x0 < 0 or y0 < 0 or x1 > stored or y1 > stored:
        rows = torch.arange(y0, y1, device=image_SS3.device).clamp(0, stored - 1)
        columns = torch.arange(x0, x1, device=image_SS3.device).clamp(0, stored - 1)
        crop = image_SS3[rows][:, columns]
    else:
        crop = image_SS3[y0:y1, x0:x1]
    x = crop.permute(2, 0, 1).unsqueeze(0)
    if x.shape[-2:] == (side, side):
        return x
    if x.is_cuda:  # the native uint8 kernel exists on the CPU alone
        resized = F.interpolate(x.float(), (side, side), mode="bilinear", antialias=True)
        return resized.round().clamp(0, 255).byte()
    return F.interpolate(x, (side, side), mode="bilinear", antialias=True)


def _jitter(x: Tensor, draw: ViewDraw) -> Tensor:
    """Colour jitter in each row's own order, as ``torchvision.transforms.ColorJitter`` draws it."""
    for place in range(4):
        for kind in range(4):
            rows = (draw.jittered_B & (draw.order_B4[:, place] == kind)).nonzero().flatten()
            if len(rows):
                factor = draw.jitter_B4[rows, kind].to(x.device)[:, None, None, None]
                where = rows.to(x.device)
                x[where] = adjust_colour(x[where], kind, factor)
    return x


def adjust_colour(x: Tensor, kind: int, factor: Tensor) -> Tensor:
    """One colour operation on RGB in 0..1 with a factor per image, as torchvision defines it."""
    if kind == HUE:
        return _turn_hue(x, factor)
    if kind == BRIGHTNESS:
        other = torch.zeros_like(x)
    elif kind == CONTRAST:
        other = _luma(x).mean(dim=(1, 2, 3), keepdim=True)
    else:
        other = _luma(x)
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def _luma(x: Tensor) -> Tensor:
    weight = torch.tensor(GREY, device=x.device)[None, :, None, None]
    return (x * weight).sum(dim=1, keepdim=True)


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by ``turn`` (share of the circle) in HSV, without leaving RGB arithmetic."""
    top = x.amax(dim=1, keepdim=True)
    span = top - x.amin(dim=1, keepdim=True)
    safe = torch.where(span == 0, torch.ones_like(span), span)
    r, g, b = x[:, :1], x[:, 1:2], x[:, 2:]
    sector = torch.where(
        top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    sector = (sector + 6 * turn) % 6
    # HSV to RGB in closed form: each channel is the value less a trapezoid of the hue
    shift = torch.tensor([5.0, 3.0, 1.0], device=x.device)[None, :, None, None]
    k = (shift + sector) % 6
    return top - span * torch.minimum(k, 4 - k).clamp(0, 1)


def gaussian_blur(x: Tensor, sigma_B: Tensor) -> Tensor:
    """Gaussian blur with one sigma (pixels) per image, separable, edges repeated."""
    radius = max(1, math.ceil(3 * float(sigma_B.max())))
    radius = min(radius, x.shape[-1] - 1)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (offset[None] / sigma_B[:, None].clamp(min=1e-3)) ** 2)
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(x.device)
    count, channels, height, width = x.shape
    weight = kernel.repeat_interleave(channels, dim=0)[:, None, None, :]
    flat = x.reshape(1, count * channels, height, width)
    flat = F.pad(flat, (radius, radius, 0, 0), mode="replicate")
    flat = F.conv2d(flat, weight, groups=count * channels)
    flat = F.pad(flat, (0, 0, radius, radius), mode="replicate")
    flat = F.conv2d(flat, weight.transpose(2, 3), groups=count * channels)
    return flat.reshape(count, channels, height, width)


def _normalise(x: Tensor) -> Tensor:
    mean = torch.tensor(MEAN, device=x.device)[None, :, None, None]
    std = torch.tensor(STD, device=x.device)[None, :, None, None]
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)
