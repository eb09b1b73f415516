"""All methods by name."""

from __future__ import annotations

from typing import Any

from ucir.config import PARAMS_FILE, Params, checked
from ucir.errors import UserError, nearest
from ucir.methods.base import Method, MethodParams
from ucir.methods.ucdir import Ucdir

METHODS: dict[str, type[Method[Any]]] = {"ucdir": Ucdir}

TO_COME = (
    *("id", "protonce", "cds", "pcs", "ucdir-v1", "ucdir-v2", "ucdir-v3", "protoot"),
    *("uem", "uem-no-merging", "uem-no-sel", "uem-dann", "uem-no-sn2m", "coda", "dgdir", "darl", "dn2a"),
)
"""Rows of the papers' tables that are not built yet; studies may name them, and leave them out aloud."""


def method_params(params: Params, method: str, dataset: str) -> MethodParams:
    """The checked block ``methods.<method>.<dataset>`` of params.yaml.

    Raises:
        UserError: an unknown method, no block for the data set, an unknown key, a value out of range.
    """
    for name in (method, *params.methods):
        if name not in METHODS:
            raise UserError(f"method {name!r} is unknown; {nearest(name, METHODS)}")
        for block in params.methods.get(name, {}):
            if block not in params.datasets:
                raise UserError(
                    f"{PARAMS_FILE}: methods.{name}.{block}: there is no data set {block!r}; "
                    f"{nearest(block, params.datasets)}"
                )
    blocks = params.methods.get(method, {})
    if dataset not in blocks:
        raise UserError(
            f"{PARAMS_FILE}: methods.{method} has no block {dataset!r}; "
            f"copy one of {', '.join(blocks) or 'the README'} and adapt it"
        )
    where = f"methods.{method}.{dataset}"
    classes = params.datasets[dataset].entry.classes  # the papers give the number of classes as K
    given = {**({"clusters": classes} if classes else {}), **blocks[dataset]}
    return checked(METHODS[method].params_type, given, PARAMS_FILE, where)
