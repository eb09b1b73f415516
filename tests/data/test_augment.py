"""Views: the same pixels as torchvision where the maths is the same, the same distribution elsewhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tv

from ucir.config.data import AugmentParams, ViewParams
from ucir.data.augment import (
    BRIGHTNESS,
    CONTRAST,
    HUE,
    SATURATION,
    InputFormat,
    adjust_colour,
    colour_maps,
    coloured_in_steps,
    draw_view,
    eval_views,
    gaussian_blur,
    luma,
    render_views,
    resized_crops,
)
from ucir.data.batches import seeded

FORM = InputFormat(12)  # of a trunk for views of 12 px
VIEW = ViewParams(side=16, eval_crop=1.0)
GREYING = (CONTRAST, SATURATION)  # torchvision rounds its weights of the luma
PLAIN = AugmentParams(
    crop_area=(1, 1), crop_aspect=(1, 1), jitter_share=0, grey_share=0, blur_share=0, flip_share=0
)


def pictures(count: int, side: int = 24) -> Tensor:
    return torch.randint(
        0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def denormalised(views: Tensor) -> Tensor:
    return views * torch.tensor(FORM.std)[:, None, None] + torch.tensor(FORM.mean)[:, None, None]


def test_a_plain_view_is_the_resized_picture() -> None:
    images = pictures(3)
    draw = draw_view(PLAIN, torch.tensor([[24, 24]] * 3), seeded(0))
    expected = tv.resize(images.permute(0, 3, 1, 2), [12, 12], antialias=True) / 255
    view = ViewParams(augment=PLAIN)
    assert torch.allclose(denormalised(render_views(images, draw, view, FORM)), expected, atol=1e-5)


def test_a_crop_shows_its_part_of_the_picture_and_repeats_the_edge_outside() -> None:
    images = pictures(2, 20)
    boxes = torch.tensor([[0.25, 0.5, 0.5, 0.5], [-0.5, -0.5, 1.0, 1.0]])
    crops = resized_crops(images, boxes, 10, pad=0.5)
    assert torch.equal(crops[0], images[0, 10:20, 5:15].permute(2, 0, 1))
    # the second box is the whole side, moved half-way out: its first quarter shows the corner alone
    assert torch.equal(crops[1][:, :4, :4], crops[1][:, :1, :1].expand(3, 4, 4))
    inside = resized_crops(images, torch.tensor([[0.0, 0.0, 1.0, 1.0]] * 2), 10)[1]
    assert torch.equal(crops[1][:, 6:9, 6:9], inside[:, 1:4, 1:4])
    mirrored = resized_crops(images, boxes, 10, pad=0.5, flipped_B=torch.tensor([False, True]))
    assert torch.equal(mirrored, torch.stack([crops[0], crops[1].flip(2)]))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [9, 24, 40])
def test_crops_are_the_same_all_at_once(interpolation: str, side: int) -> None:
    """As another device than the CPU makes them."""
    draw = draw_view(AugmentParams(crop_pad=0.25), torch.tensor([[300, 200]] * 64), seeded(1))
    one_by_one, at_once = (
        resized_crops(pictures(64), draw.box_B4, side, interpolation, 0.25, draw.flipped_B, dense).int()
        for dense in (False, True)
    )
    assert (at_once - one_by_one).abs().max() <= 2  # rounded twice
    assert (at_once != one_by_one).float().mean() < 0.1


@pytest.mark.parametrize("colour", ["affine", "steps"])
def test_views_are_the_same_all_at_once(colour: str) -> None:
    augment = AugmentParams(
        crop_pad=0.1, turn=20, slant=0.2, invert_share=0.3, blur_sigma=(0.1, 1.5), colour=colour
    )
    draw = draw_view(augment, torch.tensor([[30, 20]] * 64), seeded(2))
    one_by_one, at_once = (
        denormalised(render_views(pictures(64), draw, ViewParams(side=16, augment=augment), FORM, dense))
        for dense in (False, True)
    )
    assert torch.allclose(one_by_one, at_once, atol=0.02)
    assert (one_by_one - at_once).abs().mean() < 1e-3


@pytest.mark.parametrize("kind", [BRIGHTNESS, CONTRAST, SATURATION, HUE])
def test_colour_operations_are_torchvisions(kind: int) -> None:
    reference = {
        BRIGHTNESS: tv.adjust_brightness,
        CONTRAST: tv.adjust_contrast,
        SATURATION: tv.adjust_saturation,
        HUE: tv.adjust_hue,
    }[kind]
    x = pictures(4).permute(0, 3, 1, 2).float() / 255
    x[3] = 0.5  # grey has no hue
    factors = [-0.3, 0.0, 0.1, 0.45] if kind == HUE else [0.6, 1.0, 1.4, 0.2]
    ours = adjust_colour(x.clone(), kind, torch.tensor(factors))
    for image, result, factor in zip(x, ours, factors, strict=True):
        assert torch.allclose(result, reference(image, factor), atol=2e-3 if kind in GREYING else 1e-5)


def test_colours_in_one_map_are_those_in_steps_where_nothing_is_clamped() -> None:
    """Pixels near the middle; hue, which turns in another plane, apart."""
    augment = AugmentParams(jitter=(0.2, 0.2, 0.2, 0), jitter_share=0.8, invert_share=0.5)
    draw = draw_view(augment, torch.ones(64, 2), seeded(4))
    x = 0.4 + 0.2 * pictures(64).permute(0, 3, 1, 2) / 255
    one_map, in_steps = colour_maps(draw)(255 * x), coloured_in_steps(x, draw)
    assert torch.allclose(one_map, in_steps, atol=1e-5)
    assert (in_steps - x).abs().amax(dim=(1, 2, 3)).median() > 0.05


def test_hue_in_one_map_keeps_luma_and_turns_as_hsv_does() -> None:
    augment = AugmentParams(jitter=(0, 0, 0, 0.1), jitter_share=1, grey_share=0)
    draw = draw_view(augment, torch.ones(64, 2), seeded(5))
    x = 0.4 + 0.2 * pictures(64).permute(0, 3, 1, 2) / 255
    ours, torchvisions = colour_maps(draw)(255 * x), coloured_in_steps(x, draw)
    assert torch.allclose(luma(ours), luma(x), atol=1e-5)
    moved, wanted = (ours - x).flatten(1), (torchvisions - x).flatten(1)
    assert torch.nn.functional.cosine_similarity(moved, wanted).mean() > 0.6
    assert float(moved.norm() / wanted.norm()) == pytest.approx(1, abs=0.15)


def test_blur_is_torchvisions_with_a_sigma_for_each_image() -> None:
    x = pictures(2).permute(0, 3, 1, 2).float() / 255
    ours = gaussian_blur(x, torch.tensor([0.5, 2.0]))
    assert torch.allclose(ours, gaussian_blur(x, torch.tensor([0.5, 2.0]), widest=2.5), atol=1e-6)
    inner = (slice(None), slice(7, -7), slice(7, -7))  # torchvision reflects at the edge
    tail = 3e-3  # ours ends at three sigma
    for image, result, sigma in zip(x, ours, (0.5, 2.0), strict=True):
        assert torch.allclose(result[inner], tv.gaussian_blur(image, [13, 13], [sigma] * 2)[inner], atol=tail)


def test_crop_boxes_are_distributed_as_torchvisions() -> None:
    count, width, height = 4000, 300, 200
    params = AugmentParams()
    box = draw_view(params, torch.tensor([[width, height]] * count), seeded(0)).box_B4.numpy()
    torch.manual_seed(0)
    blank = torch.empty(3, height, width)
    reference = np.array(
        [RandomResizedCrop.get_params(blank, [0.2, 1.0], [3 / 4, 4 / 3]) for _ in range(count)]
    )[:, [1, 0, 3, 2]] / [width, height, width, height]
    assert np.allclose(box.mean(axis=0), reference.mean(axis=0), atol=0.01)
    assert np.allclose(box.std(axis=0), reference.std(axis=0), atol=0.01)
    assert (box[:, :2] >= -1e-6).all()
    assert (box[:, :2] + box[:, 2:] <= 1 + 1e-6).all()


def test_shares_are_kept() -> None:
    draw = draw_view(AugmentParams(invert_share=0.1), torch.ones(5000, 2), seeded(0))
    for drawn, share in (
        (draw.jittered_B, 0.8),
        (draw.grey_B, 0.2),
        (draw.sigma_B > 0, 0.5),
        (draw.flipped_B, 0.5),
        (draw.inverted_B, 0.1),
    ):
        assert drawn.float().mean() == pytest.approx(share, abs=0.03)


def test_rows_are_rendered_alike_alone_and_in_the_batch() -> None:
    """What a worker computes of its own rows is what one process computes of all."""
    images = pictures(8)
    view = VIEW.model_copy(update={"augment": AugmentParams(crop_pad=0.2)})
    draw = draw_view(view.augment, torch.tensor([[24, 24]] * 8), seeded(3))
    whole = render_views(images, draw, view, FORM)
    for rows in (torch.tensor([5]), torch.tensor([7, 0, 3])):
        assert torch.allclose(render_views(images[rows], draw[rows], view, FORM), whole[rows], atol=1e-5)


def test_the_evaluation_view_is_the_centre_square_of_the_original() -> None:
    """A 2:1 picture lies squashed in the store; its centre is cut out in the original's proportions."""
    wide = torch.zeros(1, 32, 32, 3, dtype=torch.uint8)
    wide[:, :, 8:24] = 255  # the centre half of the width is the largest square
    view = denormalised(eval_views(wide, torch.tensor([[200, 100]]), VIEW, FORM))
    assert view[..., 1:-1].min() > 0.99
    expected = tv.center_crop(
        tv.resize(pictures(1, 32).permute(0, 3, 1, 2).float() / 255, [16, 16], antialias=True), [14, 14]
    )
    ours = denormalised(
        eval_views(
            pictures(1, 32),
            torch.tensor([[32, 32]]),
            ViewParams(side=16, eval_crop=14 / 16).model_copy(update={"side": 14}),
            FORM,
        )
    )
    inner = (..., slice(1, -1), slice(1, -1))  # at the rim the papers' resize sees what is cut off
    assert torch.allclose(ours[inner], expected[inner], atol=1.5 / 255)
