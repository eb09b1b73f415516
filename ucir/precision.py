"""The precision that losses and sums are computed in."""

from __future__ import annotations

import torch
from torch import Tensor


def full_precision(x: Tensor) -> Tensor:
    """Half-precision features as float32; single and double stay as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
