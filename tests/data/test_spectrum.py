"""Spectral views against numpy, written from DGDIR's release."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from ucir.data import augment, spectrum
from ucir.data.batches import seeded
from ucir.data.spectrum import SpectrumDraw, draw_spectrum

S = 224
FORM = augment.InputFormat(S)
as_pixels = partial(augment.as_pixels, form=FORM)
normalised = partial(augment.normalised, form=FORM)
phase_views = partial(spectrum.phase_views, form=FORM)
mixed_views = partial(spectrum.mixed_views, form=FORM)


def pictures(count: int, side: int = S, seed: int = 0) -> Tensor:
    coarse = torch.rand(count, 3, side // 8, side // 8, generator=torch.Generator().manual_seed(seed))
    return torch.nn.functional.interpolate(coarse, size=side, mode="bilinear")


def test_phase_views_are_the_releases_at_its_size() -> None:
    x = pictures(2)
    ours = as_pixels(phase_views(normalised(x)))
    for one, view in zip(x, ours, strict=True):
        grey = 255 * (0.299 * one[0] + 0.587 * one[1] + 0.114 * one[2]).double().numpy()
        phase = np.angle(np.fft.fft2(grey))
        expected = np.clip(np.real(np.fft.ifft2(50_000 * np.exp(1j * phase))), 0, 255) / 255
        for channel in view:
            assert np.abs(channel.numpy() - expected).mean() < 2e-3


def test_mixed_views_are_the_releases_at_its_size() -> None:
    x, partner = pictures(2), pictures(2, seed=1)
    draw = SpectrumDraw(torch.tensor([0.3, 0.9]), torch.tensor([0.4, 0.1]))
    ours = as_pixels(mixed_views(normalised(x), normalised(partner), draw))
    low = np.zeros((S, S))
    low[87:137, 87:137] = 1
    for i in range(2):
        lam, share = float(draw.amplitude_B[i]), float(draw.phase_B[i])
        spectrum, other = (np.fft.fft2(p[i].double().numpy(), axes=(1, 2)) for p in (x, partner))
        amplitude = lam * np.abs(other) + (1 - lam) * np.abs(spectrum)
        phases = [np.fft.fftshift(np.angle(f), axes=(1, 2)) for f in (spectrum, other)]
        mixed = phases[0] * (1 - low) + low * ((1 - share) * phases[0] + share * phases[1])
        angle = np.fft.ifftshift(mixed, axes=(1, 2))
        expected = np.clip(np.real(np.fft.ifft2(amplitude * np.exp(1j * angle), axes=(1, 2))), 0, 1)
        assert np.abs(ours[i].numpy() - expected).mean() < 2e-3


def test_no_share_of_the_partner_leaves_a_view_as_it_was() -> None:
    x = normalised(pictures(3, side=32))
    none = SpectrumDraw(torch.zeros(3), torch.zeros(3))
    assert torch.allclose(mixed_views(x, normalised(pictures(3, side=32, seed=1)), none), x, atol=1e-4)


@pytest.mark.parametrize("side", [64, 112, 224])
def test_phase_views_forget_brightness_and_contrast(side: int) -> None:
    x = 0.25 + 0.5 * pictures(1, side=side)
    one, two = phase_views(normalised(x)), phase_views(normalised(0.5 * x + 0.2))
    assert float((one - two).abs().mean()) < 0.02 * float(one.std())
    # as strong at every size as 50,000 is at 224 px
    at_224 = phase_views(normalised(pictures(1)))
    assert float(as_pixels(one).square().mean()) == pytest.approx(
        float(as_pixels(at_224).square().mean()), rel=0.4
    )


def test_shares_are_drawn_within_their_limits() -> None:
    draw = draw_spectrum(1000, 1.0, 0.4, seeded(0))
    assert 0.9 < float(draw.amplitude_B.max()) <= 1
    assert 0.36 < float(draw.phase_B.max()) <= 0.4
    assert float(draw[torch.tensor([3])].phase_B) == float(draw.phase_B[3])
