"""A method's block of params.yaml, checked by the method's own params class; and its gate."""

from __future__ import annotations

from collections.abc import Mapping

from ucir.config.base import PARAMS_FILE, checked
from ucir.config.load import Params
from ucir.errors import UserError, nearest
from ucir.methods.base import MethodParams
from ucir.methods.registry import METHODS, VARIANTS, fixed_keys, params_block
from ucir.prototypes.merging import MergingLimit
from ucir.retrieval.gate import GateChoice


def method_params(params: Params, method: str, dataset: str) -> MethodParams:
    """The checked block ``methods.<method>.<dataset>`` of params.yaml.

    Raises:
        UserError: an unknown method, one that needs pixels where features are stored, no block for the data
            set, an unknown key, a value out of range.
    """
    for name in (method, *params.methods):
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
    needs_pixels = METHODS[method].step_type.needs_pixels
    if needs_pixels and params.datasets[dataset].start.trained == "head":
        raise UserError(
            f"{needs_pixels}, which stored features do not hold: {PARAMS_FILE}: datasets.{dataset}.start."
            "trained must be last or all"
        )
    if dataset not in blocks:
        raise UserError(
            f"{PARAMS_FILE}: methods.{block} has no block {dataset!r}; "
            f"copy one of {', '.join(blocks) or 'the README'} and adapt it"
        )
    where = f"methods.{block}.{dataset}"
    classes = params.datasets[dataset].entry.classes  # the papers' K, but for UEM
    kind = METHODS[method].params_type
    given = {**blocks[dataset], **fixed_keys(method)}
    if classes and "clusters" in kind.model_fields and kind.model_fields["clusters"].is_required():
        given.setdefault("clusters", classes)
    return checked(kind, given, PARAMS_FILE, where)


def check_methods(params: Params) -> None:
    """Every block under ``methods``. Raises UserError: as :func:`method_params`."""
    for method, blocks in params.methods.items():
        for dataset in blocks:
            method_params(params, method, dataset)


def check_sizes(params: MethodParams, where: str, setting: str, counts: Mapping[str, int]) -> None:
    """Can so many pictures be clustered and make a batch?

    Args:
        params: of the method.
        where: they stand.
        setting: its name.
        counts: pictures of the two domains, by name.

    Raises:
        UserError: a domain has fewer pictures than clusters, or both have fewer than a batch.
    """
    left = "" if setting == "closed" else f" that the setting {setting!r} leaves"
    for domain, count in counts.items():
        if params.most_clusters > count:
            raise UserError(
                f"{where}: clusters = {params.most_clusters} exceeds the {count} images of domain "
                f"{domain}{left}: set fewer"
            )
    larger = max(counts.values())
    if params.batch_size > larger:
        raise UserError(
            f"{where}: batch_size = {params.batch_size} exceeds the {larger} images of the larger domain of "
            f"{'-'.join(counts)}{left}: set a smaller one"
        )


def gate_choice(params: Params, dataset: str, method: str | None) -> GateChoice:
    """A method's gate with its own K; None: that of the start.

    Who has no K takes the number of classes, as the papers' baselines are given it, or looks for one.
    """
    block = params.datasets[dataset]
    known: int | str = block.entry.classes or "elbow"
    rate = block.evaluate.false_rejections
    if method is None:
        return GateChoice.of(None, known, false_rejections=rate)
    given = method_params(params, method, dataset)
    limit: MergingLimit = getattr(given, "merging_limit", "domain")
    return GateChoice.of(params_block(method), getattr(given, "clusters", known), limit, rate)
