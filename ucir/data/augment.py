"""Random views and the evaluation view of images that lie decoded in memory.

The training view is the MoCo v2 "aug-plus" recipe that UCDIR and ProtoOT train with (UCDIR
``loader.py``): random resized crop, colour jitter, grey, blur, flip, normalise. All random draws of a
global batch are made at once from one seed and the pixels computed row by row, so that a worker that
renders only its own rows gets the very pixels that a single process would.

On the CPU each picture is cropped and resized by torch's uint8 kernel, and colours and blur pass over as many
views at once as its cache holds. Another device does all views of a batch at once, in the same arithmetic,
with no operation whose shape depends on the draw (but for ``augment.colour: steps``).

Shapes: B batch, S side of the stored square, s side of the view.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ucir.config.data import AugmentParams, ViewParams

GREY = (0.299, 0.587, 0.114)
TO_YIQ = torch.tensor([GREY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112)])
FROM_YIQ: Tensor = torch.linalg.inv(TO_YIQ)
BRIGHTNESS, CONTRAST, SATURATION, HUE = range(4)
UNCHANGED = (1.0, 1.0, 1.0, 0.0)
IN_CACHE = 2 * 224**2
"""Pixels of the views that the CPU works on at once."""


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

    values_BX: Tensor
    """All of them, float32: they go to a device as one."""

    @property
    def box_B4(self) -> Tensor:
        """Left, top, width, height as shares of the image."""
        return self.values_BX[:, 0:4]

    @property
    def jitter_B4(self) -> Tensor:
        """Factors for brightness, contrast, saturation; turns of the hue circle."""
        return self.values_BX[:, 4:8]

    @property
    def order_B4(self) -> Tensor:
        """The order in which a row applies the four, int64."""
        return self.values_BX[:, 8:12].long()

    @property
    def jittered_B(self) -> Tensor:
        return self.values_BX[:, 12] > 0

    @property
    def inverted_B(self) -> Tensor:
        return self.values_BX[:, 13] > 0

    @property
    def grey_B(self) -> Tensor:
        return self.values_BX[:, 14] > 0

    @property
    def sigma_B(self) -> Tensor:
        """Blur in pixels of the view; 0 = none."""
        return self.values_BX[:, 15]

    @property
    def flipped_B(self) -> Tensor:
        return self.values_BX[:, 16] > 0

    @property
    def turn_B(self) -> Tensor:
        """Radians."""
        return self.values_BX[:, 17]

    @property
    def slant_B(self) -> Tensor:
        return self.values_BX[:, 18]

    def __getitem__(self, rows: Tensor | slice) -> ViewDraw:
        return ViewDraw(self.values_BX[rows])


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
    columns = [
        *_crop_boxes(params, size_B2.float(), generator).unbind(1),
        *(uniform(max(0.0, 1 - j), 1 + j) for j in jitter[:3]),
        uniform(-jitter[3], jitter[3]),
        *torch.rand(count, 4, generator=generator).argsort(dim=1).unbind(1),
        coin(params.jitter_share),
        coin(params.invert_share),
        coin(params.grey_share),
        uniform(*params.blur_sigma) * coin(params.blur_share),
        coin(params.flip_share),
        uniform(-1, 1) * math.radians(params.turn),
        uniform(-1, 1) * params.slant,
    ]
    return ViewDraw(torch.stack([column.float() for column in columns], dim=1))


def render_views(
    images_BSS3: Tensor, draw: ViewDraw, view: ViewParams, form: InputFormat, dense: bool | None = None
) -> Tensor:
    """Apply a draw to stored images (uint8), on the device where they lie.

    Args:
        images_BSS3: uint8.
        draw: of B rows.
        view: size and augmentation.
        form: of the network's input.
        dense: all views of the batch at once, by operations whose shapes do not depend on the draw; None: on
            every device but the CPU.

    Returns:
        (B, 3, side, side) float32, normalised, channels last.
    """
    side, augment, device = view.side or form.side, view.augment, images_BSS3.device
    dense = device.type != "cpu" if dense is None else dense
    draw = ViewDraw(draw.values_BX.to(device, non_blocking=True))
    colours = colour_maps(draw) if augment.colour == "affine" else None
    crops_BCss = resized_crops(
        images_BSS3, draw.box_B4, side, form.interpolation, augment.crop_pad, draw.flipped_B, dense
    )
    out = torch.empty(len(crops_BCss), side, side, 3, device=device).permute(0, 3, 1, 2)
    mean, std = _statistics(form, device)
    together = len(out) if dense else max(1, IN_CACHE // side**2)
    for first in range(0, len(out), together):
        rows = slice(first, first + together)
        x = crops_BCss[rows].contiguous().float()
        if augment.turn or augment.slant:
            sign_B = 1 - 2 * draw.flipped_B[rows].float()  # the picture is flipped already
            x = _lean(x, sign_B * draw.turn_B[rows], sign_B * draw.slant_B[rows])
        x = colours[rows](x) if colours else coloured_in_steps(x.div_(255), draw[rows])
        if augment.blur_share:
            x = _blurred(x, draw.sigma_B[rows], augment.blur_sigma[1] if dense else None)
        out[rows] = x.sub_(mean).div_(std)
    return out


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
    box_B4 = torch.cat([(1 - extent) / 2, extent], dim=1).to(images_BSS3.device)
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


def resized_crops(
    images_BSS3: Tensor,
    box_B4: Tensor,
    side: int,
    interpolation: str = "bilinear",
    pad: float = 0.0,
    flipped_B: Tensor | None = None,
    dense: bool | None = None,
) -> Tensor:
    """Crop each image with its own box, in whole pixels, and resize it, antialiased, as torchvision does.

    One by one with ``F.interpolate(..., antialias=True)``, or all at once by two products with its weights,
    rounded as it rounds: few pixels differ, by two at most.

    Args:
        images_BSS3: stored images, uint8.
        box_B4: left, top, width, height as shares of the image.
        side: side of the result in pixels.
        interpolation: ``bilinear`` or ``bicubic``.
        pad: how far a box reaches out of the picture at most, as a share of it; there its edge repeats.
        flipped_B: which crops to mirror.
        dense: all at once; None: on every device but the CPU.

    Returns:
        (B, 3, side, side) uint8, channels last.
    """
    stored = images_BSS3.shape[1]
    corner_B4 = torch.cat([box_B4[:, :2], box_B4[:, :2] + box_B4[:, 2:]], dim=1).mul(stored).round().long()
    border = round(pad * stored)
    first_B2 = corner_B4[:, :2].clamp(-border, stored + border - 1)
    last_B2 = torch.maximum(corner_B4[:, 2:].clamp(max=stored + border), first_B2 + 1)
    if images_BSS3.device.type != "cpu" if dense is None else dense:
        return _dense_crops(images_BSS3, first_B2, last_B2, side, interpolation, border, flipped_B)
    if border:
        images_BSS3 = _with_border(images_BSS3, border)
    out_BCss = torch.empty(len(images_BSS3), side, side, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    flips = flipped_B.tolist() if flipped_B is not None else [False] * len(images_BSS3)
    corners = torch.cat([first_B2, last_B2], dim=1).add(border).tolist()
    for row, ((left, top, right, bottom), flipped) in enumerate(zip(corners, flips, strict=True)):
        crop = images_BSS3[row : row + 1, top:bottom, left:right].permute(0, 3, 1, 2)
        resized = F.interpolate(crop, side, mode=interpolation, antialias=True)
        out_BCss[row : row + 1] = resized.flip(3) if flipped else resized
    return out_BCss


def _with_border(images_BSS3: Tensor, border: int) -> Tensor:
    """The images, their edges repeated on every side over so many pixels."""
    count, stored = images_BSS3.shape[:2]
    out = images_BSS3.new_empty(count, stored + 2 * border, stored + 2 * border, 3)
    inner = slice(border, -border)
    out[:, inner, inner] = images_BSS3
    out[:, :border, inner], out[:, -border:, inner] = images_BSS3[:, :1], images_BSS3[:, -1:]
    out[:, :, :border] = out[:, :, border : border + 1]
    out[:, :, -border:] = out[:, :, -border - 1 : -border]
    return out


def _dense_crops(
    images_BSS3: Tensor,
    first_B2: Tensor,
    last_B2: Tensor,
    side: int,
    interpolation: str,
    border: int,
    flipped_B: Tensor | None,
) -> Tensor:
    """All crops at once; the ends of the boxes in pixels of the stored image."""
    stored = images_BSS3.shape[1]
    across_BsS, down_BsS = (
        _resampling(first_B2[:, axis], last_B2[:, axis], stored, side, interpolation, border)
        for axis in (0, 1)
    )
    if flipped_B is not None:
        across_BsS = torch.where(flipped_B[:, None, None], across_BsS.flip(1), across_BsS)
    pixels = images_BSS3.permute(0, 3, 1, 2).float()
    rows = (pixels @ across_BsS.transpose(1, 2).unsqueeze(1)).round_().clamp_(0, 255)
    crops: Tensor = (down_BsS.unsqueeze(1) @ rows).round_().clamp_(0, 255)  # a cubic overshoots
    return crops.to(torch.uint8, memory_format=torch.channels_last)


def _resampling(
    first_B: Tensor, last_B: Tensor, stored: int, side: int, interpolation: str, border: int
) -> Tensor:
    """Weights (B, side, S) of the stored pixels in each resampled one: a triangle or a cubic (a = -0.5), as
    wide as the step, of pixels of the crop alone."""
    step_B1 = ((last_B - first_B) / side)[:, None]
    centre_Bs = first_B[:, None] + (torch.arange(side, device=first_B.device) + 0.5) * step_B1
    pixel = torch.arange(-border, stored + border, device=first_B.device)
    distance = (pixel + 0.5 - centre_Bs[:, :, None]).abs() / step_B1[:, :, None].clamp(min=1)
    if interpolation == "bilinear":
        weight = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, torch.zeros_like(far)))
    within = (pixel >= first_B[:, None]) & (pixel < last_B[:, None])
    weight = weight * within[:, None, :]
    weight = weight / weight.sum(dim=2, keepdim=True)
    inside = weight[:, :, border : border + stored].contiguous()
    if border:  # the edge stands for what lies beyond it
        inside[:, :, 0] += weight[:, :, :border].sum(dim=2)
        inside[:, :, -1] += weight[:, :, border + stored :].sum(dim=2)
    return inside


def _lean(x: Tensor, turn_B: Tensor, slant_B: Tensor) -> Tensor:
    """Rotate about the centre and slant, bilinear; outside the picture its edge repeats."""
    cos, sin, zero = turn_B.cos(), turn_B.sin(), torch.zeros_like(turn_B)
    first_row = torch.stack([cos, slant_B - sin, zero], dim=1)
    second_row = torch.stack([sin, cos, zero], dim=1)
    theta_B23 = torch.stack([first_row, second_row], dim=1)
    grid = F.affine_grid(theta_B23, list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@dataclass(frozen=True)
class ColourMaps:
    """Inversion, colour jitter and grey of each row as one affine map of its colours, clamped once.

    A colour c becomes M c + C m + o, where m is the mean colour of its view. Brightness, contrast, saturation
    and grey are linear in the colours, contrast given their mean. Hue turns in the plane of constant luma
    (YIQ) and not in HSV. torchvision clamps after each operation.
    """

    matrix_B33: Tensor
    of_mean_B33: Tensor
    offset_B3: Tensor

    def __getitem__(self, rows: slice) -> ColourMaps:
        return ColourMaps(self.matrix_B33[rows], self.of_mean_B33[rows], self.offset_B3[rows])

    def __call__(self, x: Tensor) -> Tensor:
        """Views (B, 3, s, s) in 0..255, in new colours in 0..1."""
        pixels = x.flatten(2)
        offset_B31 = torch.baddbmm(
            self.offset_B3[:, :, None], self.of_mean_B33, pixels.mean(dim=2, keepdim=True), alpha=1 / 255
        )
        return torch.baddbmm(offset_B31, self.matrix_B33, pixels, alpha=1 / 255).clamp_(0, 1).view_as(x)


def colour_maps(draw: ViewDraw) -> ColourMaps:
    """What a draw does to the colours of its rows."""
    device = draw.values_BX.device
    one_33 = torch.eye(3, device=device)
    grey_33 = torch.tensor(GREY, device=device).expand(3, 3)
    sign_B11 = (1 - 2 * draw.inverted_B.float())[:, None, None]
    matrix_B33, of_mean_B33 = sign_B11 * one_33, torch.zeros(len(sign_B11), 3, 3, device=device)
    offset_B31 = ((1 - sign_B11) / 2).expand(-1, 3, 1)
    factor_B4 = torch.where(draw.jittered_B[:, None], draw.jitter_B4, torch.tensor(UNCHANGED, device=device))
    brightness, contrast, saturation = (
        factor_B4[:, kind, None, None] for kind in (BRIGHTNESS, CONTRAST, SATURATION)
    )
    kinds_B433 = torch.stack(
        [
            brightness * one_33,
            contrast * one_33,
            saturation * one_33 + (1 - saturation) * grey_33,
            _hue_turn(factor_B4[:, HUE]),
        ],
        dim=1,
    )
    rows = torch.arange(len(sign_B11), device=device)
    for kind_B in draw.order_B4.unbind(1):
        # contrast mixes with the grey of the mean colour, as it is by then
        towards_B11 = torch.where(kind_B[:, None, None] == CONTRAST, 1 - contrast, torch.zeros_like(contrast))
        greyed_B33 = towards_B11 * grey_33
        kind_B33 = kinds_B433[rows, kind_B]
        of_mean_B33 = kind_B33 @ of_mean_B33 + greyed_B33 @ (matrix_B33 + of_mean_B33)
        offset_B31 = (kind_B33 + greyed_B33) @ offset_B31
        matrix_B33 = kind_B33 @ matrix_B33
    last_B33 = torch.where(draw.grey_B[:, None, None], grey_33, one_33)
    return ColourMaps(last_B33 @ matrix_B33, last_B33 @ of_mean_B33, (last_B33 @ offset_B31)[:, :, 0])


def _hue_turn(turn_B: Tensor) -> Tensor:
    """Turn colours about the grey axis, luma kept, (B, 3, 3): a rotation in the chroma plane of YIQ."""
    to_yiq, from_yiq = TO_YIQ.to(turn_B.device), FROM_YIQ.to(turn_B.device)
    angle = 2 * math.pi * turn_B
    cos, sin, zero, one = angle.cos(), angle.sin(), torch.zeros_like(angle), torch.ones_like(angle)
    rows = [(one, zero, zero), (zero, cos, sin), (zero, -sin, cos)]
    turn_B33 = torch.stack([torch.stack(row, dim=1) for row in rows], dim=1)
    return from_yiq @ turn_B33 @ to_yiq


def coloured_in_steps(x: Tensor, draw: ViewDraw) -> Tensor:
    """What :class:`ColourMaps` does as torchvision does it: one operation after the other, each clamped, hue
    in HSV. Views (B, 3, s, s) in 0..1."""
    x = torch.where(draw.inverted_B[:, None, None, None], 1 - x, x)
    for place in range(4):
        for kind in range(4):
            rows = (draw.jittered_B & (draw.order_B4[:, place] == kind)).nonzero().flatten()
            if len(rows):
                x[rows] = adjust_colour(x[rows], kind, draw.jitter_B4[rows, kind])
    return torch.where(draw.grey_B[:, None, None, None], luma(x), x)


def adjust_colour(x: Tensor, kind: int, factor_B: Tensor) -> Tensor:
    """One colour operation on RGB in 0..1 with a factor per image, as torchvision defines it; changes x."""
    factor = factor_B[:, None, None, None]
    if kind == HUE:
        return _turn_hue(x, factor)
    if kind == BRIGHTNESS:
        return x.mul_(factor).clamp_(0, 1)
    if kind == CONTRAST:
        level_B = x.mean(dim=(2, 3)) @ torch.tensor(GREY, device=x.device)
        return x.mul_(factor).add_((1 - factor) * level_B[:, None, None, None]).clamp_(0, 1)
    return torch.lerp(luma(x), x, factor).clamp_(0, 1)


def luma(x: Tensor) -> Tensor:
    """Grey values (B, 1, S, S) of pictures in 0..1."""
    r, g, b = (x[:, channel : channel + 1] for channel in range(3))
    return (r * GREY[0]).add_(g, alpha=GREY[1]).add_(b, alpha=GREY[2])


def _turn_hue(x: Tensor, turn: Tensor) -> Tensor:
    """Turn the hue by ``turn`` (share of the circle) in HSV, without leaving RGB arithmetic."""
    r, g, b = (x[:, channel : channel + 1] for channel in range(3))
    top = torch.maximum(torch.maximum(r, g), b)
    span = top - torch.minimum(torch.minimum(r, g), b)
    safe = span.clamp(min=1e-12)
    sector = torch.where(top == g, ((b - r) / safe).add_(2), ((r - g) / safe).add_(4))
    sector = torch.where(top == r, (g - b).div_(safe), sector)
    # HSV to RGB in closed form: each channel is the value less a trapezoid of the hue
    shift = torch.tensor([5.0, 3.0, 1.0], device=x.device)[None, :, None, None]
    k = sector + (shift + 6 * turn)
    k.sub_((k / 6).floor_().mul_(6))
    return torch.addcmul(top, torch.minimum(k, 4 - k).clamp_(0, 1), span, value=-1)


def _blurred(x: Tensor, sigma_B: Tensor, widest: float | None) -> Tensor:
    """Each row with its own blur, or none: with a widest one all rows alike, else those that have one."""
    if widest is not None:
        return gaussian_blur(x, sigma_B, widest)
    rows = (sigma_B > 0).nonzero().flatten()
    if len(rows):
        x[rows] = gaussian_blur(x[rows], sigma_B[rows])
    return x


def gaussian_blur(x: Tensor, sigma_B: Tensor, widest: float | None = None) -> Tensor:
    """Gaussian blur with one sigma (pixels) per image, separable, edges repeated, ending at three sigma.

    Args:
        x: (B, 3, S, S) float32.
        sigma_B: 0 = none.
        widest: no sigma is larger: the work is the same whatever they are. None: as far as they reach.
    """
    reach = float(sigma_B.max()) if widest is None else widest
    radius = min(max(1, math.ceil(3 * reach)), x.shape[-1] - 1)
    offset = torch.arange(-radius, radius + 1, dtype=torch.float32, device=x.device)
    sigma_B1 = sigma_B[:, None].clamp(min=1e-3)
    kernel_BR = torch.exp(-0.5 * (offset / sigma_B1) ** 2)
    kernel_BR = kernel_BR * (offset.abs() <= (3 * sigma_B1).ceil())  # its own width, whatever the batch
    kernel_BR = kernel_BR / kernel_BR.sum(dim=1, keepdim=True)
    along = _taps_along if widest is None else _convolved_along
    for dim in (3, 2):
        sides = (radius, radius, 0, 0) if dim == 3 else (0, 0, radius, radius)
        x = along(F.pad(x, sides, mode="replicate"), kernel_BR, dim)
    return x


def _taps_along(padded: Tensor, kernel_BR: Tensor, dim: int) -> Tensor:
    """Tap by tap, which the CPU's cache likes."""
    length = padded.shape[dim] - kernel_BR.shape[1] + 1
    weight = kernel_BR[:, :, None, None, None]
    out = padded.narrow(dim, 0, length) * weight[:, 0]
    for tap in range(1, kernel_BR.shape[1]):
        out.addcmul_(padded.narrow(dim, tap, length), weight[:, tap])
    return out


def _convolved_along(padded: Tensor, kernel_BR: Tensor, dim: int) -> Tensor:
    """As a convolution of one group for each channel of each image."""
    count, channels, height, width = padded.shape
    weight = kernel_BR.repeat_interleave(channels, dim=0)[:, None, None, :]
    weight = weight if dim == 3 else weight.transpose(2, 3)
    flat = padded.reshape(1, count * channels, height, width)
    out: Tensor = F.conv2d(flat, weight, groups=count * channels)
    return out.reshape(count, channels, *out.shape[2:])


def whole_views(images_BSS3: Tensor, side: int, form: InputFormat) -> Tensor:
    """The whole stored picture, resized and normalised."""
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]], device=images_BSS3.device).expand(len(images_BSS3), 4)
    return normalised(resized_crops(images_BSS3, box, side, form.interpolation), form)


def as_pixels(view_B3SS: Tensor, form: InputFormat) -> Tensor:
    """What :func:`normalised` was given, back in 0..1."""
    mean, std = _statistics(form, view_B3SS.device)
    return (view_B3SS * std + mean).clamp(0, 1)


def normalised(x: Tensor, form: InputFormat) -> Tensor:
    """Pictures, uint8 or in 0..1, as the network takes them: float32, channels last."""
    mean, std = _statistics(form, x.device)
    if x.dtype == torch.uint8:
        # a row of pixels at a time, so that the innermost loop is long
        count, _, height, width = x.shape
        pixels = x.permute(0, 2, 3, 1).reshape(count * height, width * 3).float()
        scale, shift = (row.flatten().repeat(width) for row in (1 / (255 * std), -mean / std))
        pixels = torch.addcmul(shift, pixels, scale)
        return pixels.view(count, height, width, 3).permute(0, 3, 1, 2)
    return ((x - mean) / std).contiguous(memory_format=torch.channels_last)


def _statistics(form: InputFormat, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation, (3, 1, 1)."""
    mean, std = (torch.tensor(values, device=device)[:, None, None] for values in (form.mean, form.std))
    return mean, std
