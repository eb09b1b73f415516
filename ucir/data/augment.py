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
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.config.data import AugmentParams, ViewParams

GREY = (0.299, 0.587, 0.114)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)


@dataclass(frozen=True)
class InputFormat:
    """The pictures that a network takes; mean and deviation are ImageNet's unless it says otherwise."""

    side: int
    """Pixels per side that it is made for."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"


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
    turn_B: Tensor  # radians
    slant_B: Tensor

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
        turn_B=uniform(-1, 1) * math.radians(params.turn),
        slant_B=uniform(-1, 1) * params.slant,
    )


def render_views(images_BSS3: Tensor, draw: ViewDraw, view: ViewParams, form: InputFormat) -> Tensor:
    """Apply a draw to stored images (uint8). Returns normalised float32 (B, 3, side, side)."""
    x = resized_crops(images_BSS3, draw.box_B4, view.side or form.side, form.interpolation)
    if draw.turn_B.any() or draw.slant_B.any():
        x = _lean(x, draw.turn_B, draw.slant_B)
    x = torch.where(draw.inverted_B.to(x.device)[:, None, None, None], 1 - x, x)
    x = _jitter(x, draw)
    grey = draw.grey_B.nonzero().flatten().to(x.device)
    if len(grey):
        x[grey] = luma(x[grey]).expand(-1, 3, -1, -1)
    blurred = (draw.sigma_B > 0).nonzero().flatten()
    if len(blurred):
        x[blurred.to(x.device)] = gaussian_blur(x[blurred.to(x.device)], draw.sigma_B[blurred])
    flipped = draw.flipped_B.nonzero().flatten().to(x.device)
    if len(flipped):
        x[flipped] = x[flipped].flip(-1)
    return normalised(x, form)


def eval_views(images_BSS3: Tensor, size_B2: Tensor, view: ViewParams, form: InputFormat) -> Tensor:
    """The view that features are taken from: the centre square of the original picture.

    Args:
        images_BSS3: stored images, uint8.
        size_B2: original widths and heights.
        view: its ``eval_crop`` is the square's side as a share of the shorter side; 224/256 is the papers'
            ``Resize(256), CenterCrop(224)``.
        form: of the network's input.
    """
    size = size_B2.float()
    extent = view.eval_crop * size.amin(dim=1, keepdim=True) / size
    box_B4 = torch.cat([(1 - extent) / 2, extent], dim=1)
    return normalised(resized_crops(images_BSS3, box_B4, view.side or form.side, form.interpolation), form)


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


def resized_crops(images_BSS3: Tensor, box_B4: Tensor, side: int, interpolation: str = "bilinear") -> Tensor:
    """Crop and resize each image with its own box, antialiased; outside the picture its edge repeats.

    Resampling is linear in the pixels and separable: two batched matrix products, the same on CPU and GPU.
    The whole picture gives what ``F.interpolate(..., mode=interpolation, antialias=True)`` gives; a crop
    differs from crop-then-resize only at its rim, where the filter sees the picture go on.

    Args:
        images_BSS3: stored images, uint8.
        box_B4: left, top, width, height as shares of the image.
        side: side of the result in pixels.
        interpolation: ``bilinear`` or ``bicubic``.

    Returns:
        (B, 3, side, side) float32 in 0..1.
    """
    stored = images_BSS3.shape[1]
    box = box_B4.to(images_BSS3.device) * stored
    across_BsS = _resampling(box[:, 0], box[:, 2], stored, side, interpolation)
    down_BsS = _resampling(box[:, 1], box[:, 3], stored, side, interpolation)
    rows = down_BsS @ images_BSS3.float().div_(255).flatten(2)  # (B, side, S * 3)
    rows = rows.reshape(-1, side, stored, 3).permute(0, 3, 1, 2)
    crops: Tensor = rows @ across_BsS.transpose(1, 2).unsqueeze(1)
    return crops if interpolation == "bilinear" else crops.clamp_(0, 1)  # a cubic overshoots


def _resampling(start_B: Tensor, extent_B: Tensor, stored: int, side: int, interpolation: str) -> Tensor:
    """Weights (B, side, S) of the stored pixels in each resampled one: a triangle or a cubic (a = -0.5), as
    wide as the step."""
    step_B1 = (extent_B / side)[:, None]
    centre_Bs = start_B[:, None] + (torch.arange(side, device=start_B.device) + 0.5) * step_B1
    centre_Bs = centre_Bs.clamp(0.5, stored - 0.5)  # outside, the edge goes on
    pixel = torch.arange(stored, device=start_B.device) + 0.5
    distance = (pixel - centre_Bs[:, :, None]).abs() / step_B1[:, :, None].clamp(min=1)
    if interpolation == "bilinear":
        weight = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    return weight / weight.sum(dim=2, keepdim=True)


def _lean(x: Tensor, turn_B: Tensor, slant_B: Tensor) -> Tensor:
    """Rotate about the centre and slant, bilinear; outside the picture its edge repeats."""
    cos, sin, zero = turn_B.cos(), turn_B.sin(), torch.zeros_like(turn_B)
    first_row = torch.stack([cos, slant_B - sin, zero], dim=1)
    second_row = torch.stack([sin, cos, zero], dim=1)
    theta_B23 = torch.stack([first_row, second_row], dim=1).to(x.device)
    grid = F.affine_grid(theta_B23, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


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
        other = luma(x).mean(dim=(1, 2, 3), keepdim=True)
    else:
        other = luma(x)
    return (factor * x + (1 - factor) * other).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """Grey values (B, 1, S, S) of pictures in 0..1."""
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
    sigma_B1 = sigma_B[:, None].clamp(min=1e-3)
    kernel = torch.exp(-0.5 * (offset / sigma_B1) ** 2)
    kernel = kernel * (offset.abs() <= (3 * sigma_B1).ceil())  # its own width, whatever the batch
    kernel = (kernel / kernel.sum(dim=1, keepdim=True)).to(x.device)
    count, channels, height, width = x.shape
    weight = kernel.repeat_interleave(channels, dim=0)[:, None, None, :]
    flat = x.reshape(1, count * channels, height, width)
    flat = F.pad(flat, (radius, radius, 0, 0), mode="replicate")
    flat = F.conv2d(flat, weight, groups=count * channels)
    flat = F.pad(flat, (0, 0, radius, radius), mode="replicate")
    flat = F.conv2d(flat, weight.transpose(2, 3), groups=count * channels)
    return flat.reshape(count, channels, height, width)


def whole_views(images_BSS3: Tensor, side: int, form: InputFormat) -> Tensor:
    """The whole stored picture, resized and normalised."""
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(images_BSS3), 4)
    return normalised(resized_crops(images_BSS3, box, side, form.interpolation), form)


def as_pixels(view_B3SS: Tensor, form: InputFormat) -> Tensor:
    """What :func:`normalised` was given, back in 0..1."""
    mean = torch.tensor(form.mean, device=view_B3SS.device)[None, :, None, None]
    std = torch.tensor(form.std, device=view_B3SS.device)[None, :, None, None]
    return (view_B3SS * std + mean).clamp(0, 1)


def normalised(x: Tensor, form: InputFormat) -> Tensor:
    """Pictures in 0..1 as the network takes them, channels last."""
    mean = torch.tensor(form.mean, device=x.device)[None, :, None, None]
    std = torch.tensor(form.std, device=x.device)[None, :, None, None]
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)
