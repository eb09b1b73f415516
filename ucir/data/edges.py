"""Views as drawings of their edges, by Canny: BrAD (Harary et al., CVPR 2022), ``moco/loader.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from ucir.data.augment import InputFormat, as_pixels

GROUND = 0.5
"""What is taken off an edge picture, in which most pixels are 0, instead of the mean of photographs."""


def edge_views(view_B3SS: Tensor, form: InputFormat, sigma: float) -> Tensor:
    """White edges on black, as three equal channels, on the views' device.

    Args:
        view_B3SS: normalised views; the edges are those of the mean of their colours.
        form: how they are normalised.
        sigma: of Canny's Gaussian, in pixels.

    Returns:
        (B, 3, S, S) float32, less 0.5, over the deviation of ``form``.
    """
    from skimage.feature import canny  # a second to import

    grey_BSS = as_pixels(view_B3SS, form).mean(dim=1).cpu().numpy()
    edges = torch.stack([torch.from_numpy(canny(grey, sigma=sigma)) for grey in grey_BSS])
    std = torch.tensor(form.std, device=view_B3SS.device)[:, None, None]
    return (edges.to(view_B3SS.device, torch.float32)[:, None] - GROUND) / std
