"""All methods by name, and what evaluation has to know of them: a training imports its own method alone."""

from __future__ import annotations

from typing import Any

from ucir.methods.base import Method
from ucir.methods.brad import Brad
from ucir.methods.cds import Cds
from ucir.methods.coda import Coda
from ucir.methods.consensus import Consensus
from ucir.methods.darl import Darl
from ucir.methods.dgdir import Dgdir
from ucir.methods.dn2a import Dn2a
from ucir.methods.id import Id
from ucir.methods.pcs import Pcs
from ucir.methods.protonce import ProtoNce
from ucir.methods.protoot import ProtoOt
from ucir.methods.ucdir import Ucdir
from ucir.methods.ucdir_ot import UcdirOt
from ucir.methods.uem import Uem

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "ucdir-v1": ("ucdir", {"cluster_weight": 0.0, "entropy_weight": 0.0, "distance_weight": 0.0}),
    "ucdir-v2": ("ucdir", {"entropy_weight": 0.0, "distance_weight": 0.0}),
    "ucdir-v3": ("ucdir", {"distance_weight": 0.0}),
    "protoot-uniform": ("protoot", {"marginals": "uniform"}),
    "protoot-no-cross": ("protoot", {"cross_weight": 0.0}),
    "protoot-no-neighbour": ("protoot", {"neighbour_weight": 0.0}),
    "protoot-no-push": ("protoot", {"push": False}),
    "protoot-kmeans": ("protoot", {"assignment": "kmeans"}),
    "consensus-no-graph": ("consensus", {"diffusion": 0}),
    "consensus-no-alignment": ("consensus", {"alignment": False}),
    "consensus-balanced": ("consensus", {"relaxation": None}),
    "consensus-no-instance": ("consensus", {"instance_weight": 0.0}),
    "consensus-no-renewal": ("consensus", {"renew": 0}),
    "uem-no-merging": ("uem", {"merging": False}),
    "uem-no-sel": ("uem", {"semantic_weight": 0.0}),
    "uem-dann": ("uem", {"structure_weight": 0.0}),
    "uem-no-sn2m": ("uem", {"matching": "nearest"}),
}
"""Ablations: a method's own block of params.yaml with some keys fixed."""

_BLOCKS: dict[str, type[Method[Any]]] = {
    "id": Id,
    "protonce": ProtoNce,
    "cds": Cds,
    "pcs": Pcs,
    "ucdir": Ucdir,
    "ucdir-ot": UcdirOt,
    "protoot": ProtoOt,
    "coda": Coda,
    "dgdir": Dgdir,
    "darl": Darl,
    "dn2a": Dn2a,
    "brad": Brad,
    "consensus": Consensus,
    "uem": Uem,
}
METHODS = {**_BLOCKS, **{name: _BLOCKS[block] for name, (block, _) in VARIANTS.items()}}


def params_block(method: str) -> str:
    """The block under ``methods`` that a method reads: a variant reads its method's."""
    return VARIANTS[method][0] if method in VARIANTS else method


def fixed_keys(method: str) -> dict[str, Any]:
    """The keys of that block that an ablation has for good, with their values."""
    return VARIANTS[method][1] if method in VARIANTS else {}
