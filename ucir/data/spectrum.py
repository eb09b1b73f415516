"""Views by their Fourier spectrum: DGDIR (Hu, Zhang & Lee, ICCV 2023), ``utils/domainnet.py``.

A picture's phase holds its shapes, its amplitude its style. The release's numbers belong to 224 px; here they
are in proportion to the side. It rounds to bytes in between, which is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ucir.data.augment import InputFormat, as_pixels, luma, normalised

AMPLITUDE = 50_000 / 255 / 224
"""Amplitude of every frequency of a phase picture, over its side."""
LOW = 50 / 224
"""Side of the square of low frequencies whose phase is mixed, as a share of the picture's."""


@dataclass(frozen=True)
class SpectrumDraw:
    """How each view is mixed with a partner."""

    amplitude_B: Tensor
    """Share of the partner's amplitude, 0 to 1."""
    phase_B: Tensor
    """Share of the partner's phase at low frequencies, 0 to ``most_phase``."""

    def __getitem__(self, rows: Tensor) -> SpectrumDraw:
        return SpectrumDraw(self.amplitude_B[rows], self.phase_B[rows])


def draw_spectrum(
    count: int, most_amplitude: float, most_phase: float, generator: torch.Generator
) -> SpectrumDraw:
    """Shares for ``count`` views, uniform from 0."""
    share = torch.rand(2, count, generator=generator)
    return SpectrumDraw(most_amplitude * share[0], most_phase * share[1])


def phase_views(view_B3SS: Tensor, form: InputFormat) -> Tensor:
    """The phase of the grey picture with one amplitude at all frequencies, as three equal channels.

    Args:
        view_B3SS: normalised views; so is what is returned.
        form: how they are normalised.
    """
    grey = luma(as_pixels(view_B3SS, form))
    side = view_B3SS.shape[-1]
    angle = torch.fft.fft2(grey).angle()
    flat = torch.fft.ifft2(torch.polar(torch.full_like(angle, AMPLITUDE * side), angle)).real
    return normalised(flat.clamp(0, 1).expand(-1, 3, -1, -1), form)


def mixed_views(view_B3SS: Tensor, partner_B3SS: Tensor, draw: SpectrumDraw, form: InputFormat) -> Tensor:
    """Views with some of a partner's amplitude, and of its phase at low frequencies.

    Args:
        view_B3SS, partner_B3SS: normalised; so is what is returned.
        draw: one for each view.
        form: how they are normalised.
    """
    spectrum, partner = (torch.fft.fft2(as_pixels(x, form)) for x in (view_B3SS, partner_B3SS))
    lam, share = (x.to(spectrum.device)[:, None, None, None] for x in (draw.amplitude_B, draw.phase_B))
    amplitude = lam * partner.abs() + (1 - lam) * spectrum.abs()
    side = view_B3SS.shape[-1]
    width = LOW * side
    first, last = round((side - width) / 2), round((side + width) / 2)
    low = torch.zeros(side, side, device=spectrum.device)
    low[first:last, first:last] = 1
    share = share * torch.fft.ifftshift(low)
    angle = (1 - share) * spectrum.angle() + share * partner.angle()
    return normalised(torch.fft.ifft2(torch.polar(amplitude, angle)).real.clamp(0, 1), form)
