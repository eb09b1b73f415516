"""All methods by name."""

from __future__ import annotations

from typing import Any

from ucir.config import PARAMS_FILE, Params, checked
from ucir.errors import UserError, nearest
from ucir.methods.base import Method, MethodParams
from ucir.methods.baselines import Cds, Id, Pcs, ProtoNce
from ucir.methods.coda import Coda
from ucir.methods.dgdir import Dgdir
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
    "uem": Uem,
}
METHODS = {**_BLOCKS, **{name: _BLOCKS[block] for name, (block, _) in VARIANTS.items()}}

TO_COME = ("darl", "dn2a")
"""Rows of the papers' tables that are not built yet; studies may name them, and leave them out aloud."""


def params_block(method: str) -> str:
    """The block under ``methods`` that a method reads: a variant reads its method's."""
    return VARIANTS[method][0] if method in VARIANTS else method


def method_params(params: Params, method: str, dataset: str) -> MethodParams:
    """The checked block ``methods.<method>.<dataset>`` of params.yaml.

    Raises:
        UserError: an unknown method, no block for the data set, an unknown key, a value out of range.
    """
    for name in (method, *params.methods):
        if name in TO_COME:
            raise UserError(f"method {name!r} is not built yet; there is: {', '.join(METHODS)}")
        if name in params.methods and name in VARIANTS:
            raise UserError(
                f"{PARAMS_FILE}: methods.{name}: {name} is methods.{params_block(name)} with some keys "
                "fixed; give its settings there"
            )
        if name not in METHODS:
            raise UserError(f"method {name!r} is unknown; {nearest(name, METHODS)}")
        for known in params.methods.get(name, {}):
            if known not in params.datasets:
                raise UserError(
                    f"{PARAMS_FILE}: methods.{name}.{known}: there is no data set {known!r}; "
                    f"{nearest(known, params.datasets)}"
                )
    block = params_block(method)
    blocks = params.methods.get(block, {})
    if dataset not in blocks:
        raise UserError(
            f"{PARAMS_FILE}: methods.{block} has no block {dataset!r}; "
            f"copy one of {', '.join(blocks) or 'the README'} and adapt it"
        )
    where = f"methods.{block}.{dataset}"
    classes = params.datasets[dataset].entry.classes  # the papers' K, but for UEM
    kind = METHODS[method].params_type
    given = {**blocks[dataset], **VARIANTS.get(method, ("", {}))[1]}
    if classes and "clusters" in kind.model_fields and kind.model_fields["clusters"].is_required():
        given.setdefault("clusters", classes)
    return checked(kind, given, PARAMS_FILE, where)
