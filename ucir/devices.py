"""The device of a single process; Ray Train gives its workers theirs."""

from __future__ import annotations

import torch

from ucir.config import ClusterParams
from ucir.errors import UserError


def wants_gpu(cluster: ClusterParams) -> bool:
    """``use_gpu``, or whether there is one."""
    return torch.cuda.is_available() if cluster.use_gpu is None else cluster.use_gpu


def choose_device(cluster: ClusterParams) -> torch.device:
    """The first GPU, or the CPU.

    Raises:
        UserError: a GPU is asked for and there is none.
    """
    if wants_gpu(cluster) and not torch.cuda.is_available():
        raise UserError("params.yaml: cluster.use_gpu is true, but torch finds no GPU here")
    return torch.device("cuda" if wants_gpu(cluster) else "cpu")
