"""Retrieval metrics: one pure function each over a ranking, and the table that names them all.

Curves, final scores, sweeps and reports read :func:`metrics`: a new metric is a function and a row there.
Values are percent; ``nan`` is what cannot be told. The paper of UEM (section 4.1) does not say which mAP, nor
over which queries accuracy is taken, so that each reading has a row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ucir.retrieval.ranking import Ranking

NOTHING = float("nan")


@dataclass(frozen=True)
class Decisions:
    """What a gate said of the queries of a ranking."""

    score_Q: np.ndarray
    """How far a query lies beyond the limit of the method's own gate."""
    calibrated_Q: np.ndarray | None = None
    """The same of the calibrated gate."""

    @property
    def rejected_Q(self) -> np.ndarray:
        """Above the limit, bool."""
        return self.score_Q > 0


@dataclass(frozen=True)
class Metric:
    """A row of the table."""

    identifier: str
    """Such as MLflow accepts: ``P_at_50``."""
    name: str
    """For people: ``P@50``."""
    value: Callable[[Ranking, Decisions], float]
    curve: bool = False
    """Whether it is followed over the epochs, too: then it needs no gate."""
    error: bool = False
    """Whether less of it is better."""


def metrics(cutoffs: Sequence[int]) -> tuple[Metric, ...]:
    """All metrics.

    Args:
        cutoffs: the K of P@K.
    """
    return (
        *(Metric(precision_name(k), f"P@{k}", partial(precision_at, k=k), curve=True) for k in cutoffs),
        Metric("mAP_at_All", "mAP@All", mean_average_precision, curve=True),
        Metric("mAP_interpolated_at_All", "interpolated mAP@All", interpolated),
        Metric("mAP_macro_at_All", "macro mAP@All", macro),
        Metric("mAP_macro_interpolated_at_All", "macro interpolated mAP@All", macro_interpolated),
        Metric("mAP_gated_at_All", "gated mAP@All", gated),
        Metric("null_shared", "rejected though shared", rejected_though_shared, error=True),
        Metric("null_private", "open-set accuracy", rejected_of_private),
        Metric("null_accuracy", "open-set accuracy of all queries", right_decisions),
        Metric("null_AUROC", "gate AUROC", auroc),
        Metric(
            "calibrated_shared",
            "rejected though shared, calibrated",
            _calibrated(rejected_though_shared),
            error=True,
        ),
        Metric("calibrated_private", "open-set accuracy, calibrated", _calibrated(rejected_of_private)),
        Metric("calibrated_AUROC", "gate AUROC, calibrated", _calibrated(auroc)),
    )


def precision_name(k: int) -> str:
    """``P_at_50``."""
    return f"P_at_{k}"


def metric_values(
    ranking: Ranking, cutoffs: Sequence[int], decisions: Decisions | None = None
) -> dict[str, float]:
    """Every metric by its identifier; without decisions those of curves.

    What cannot be told is left out, but for P@K and mAP, which are ``nan`` then.
    """
    unknown = Decisions(np.zeros(len(ranking.relevant_Q)))
    values = {}
    for metric in metrics(cutoffs):
        if metric.curve or decisions:
            value = metric.value(ranking, decisions or unknown)
            if metric.curve or not np.isnan(value):
                values[metric.identifier] = value
    return values


def precision_at(ranking: Ranking, _: Decisions | None = None, *, k: int) -> float:
    """P@K = 100 sum_q hits_q(t_q) / sum_q t_q with t_q = min(K, R_q).

    The micro average of UCDIR's and ProtoOT's ``retrieval_precision_cal``; a query without a counterpart
    counts on neither side.

    >>> precision_at(Ranking(np.array([1, 3, 2]), np.array([2, 1]), np.array(["a", "b"])), k=2)
    33.333333333333336
    """
    hit_Q, shown_Q = _hits(ranking, k)
    hits, shown = int(hit_Q.sum()), int(shown_Q.sum())
    return 100 * hits / shown if shown else NOTHING


def precision_by_class(ranking: Ranking, k: int) -> dict[str, float]:
    """:func:`precision_at` of the queries of each class that has a counterpart."""
    hit_Q, shown_Q = _hits(ranking, k)
    return {
        label: 100 * float(hit_Q[of_class].sum() / shown_Q[of_class].sum())
        for label in sorted(set(ranking.label_Q[ranking.shared_Q].tolist()))
        for of_class in [ranking.label_Q == label]
    }


def _hits(ranking: Ranking, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Relevant ones among the first t_q = min(K, R_q) of each query, and t_q, (Q,)."""
    shown_Q = np.minimum(k, ranking.relevant_Q)
    hit_R = ranking.rank_R <= shown_Q[ranking.query_R]
    return np.bincount(ranking.query_R[hit_R], minlength=len(shown_Q)), shown_Q


def average_precision(ranking: Ranking, interpolate: bool = False) -> np.ndarray:
    """Each query's (1 / R_q) sum_i i / rank_i over the whole ranking, (Q,), 0 to 1; ``nan`` without a
    counterpart.

    Args:
        ranking: of the gallery.
        interpolate: the best precision at each rank or any later one (VOC 2010), as CoDA's code has it.

    >>> average_precision(Ranking(np.array([2, 3]), np.array([2]), np.array(["a"])))
    array([0.58333333])
    """
    precision_R = ranking.place_R / ranking.rank_R
    if interpolate:
        # the largest of a query's from here on; a query's own offset keeps the others out
        offset_R = 2.0 * (len(ranking.relevant_Q) - ranking.query_R)
        precision_R = np.maximum.accumulate((precision_R + offset_R)[::-1])[::-1] - offset_R
    total_Q = np.bincount(ranking.query_R, precision_R, len(ranking.relevant_Q))
    with np.errstate(invalid="ignore"):  # 0 / 0 is nan: no counterpart
        mean_Q: np.ndarray = total_Q / ranking.relevant_Q
    return mean_Q


def mean_average_precision(ranking: Ranking, _: Decisions | None = None) -> float:
    """mAP@All: over the queries with a counterpart, not interpolated."""
    return percent(average_precision(ranking))


def interpolated(ranking: Ranking, _: Decisions | None = None) -> float:
    """mAP@All of interpolated precision."""
    return percent(average_precision(ranking, interpolate=True))


def macro(ranking: Ranking, _: Decisions | None = None) -> float:
    """Mean over classes of the classes' mAP@All."""
    return percent(average_precision(ranking), ranking.label_Q)


def macro_interpolated(ranking: Ranking, _: Decisions | None = None) -> float:
    """Macro and interpolated: CoDA's code, which UEM says it follows."""
    return percent(average_precision(ranking, interpolate=True), ranking.label_Q)


def gated(ranking: Ranking, decisions: Decisions) -> float:
    """mAP@All where a query with a counterpart that the gate rejects has an average precision of 0."""
    precision_Q = average_precision(ranking)
    return percent(np.where(decisions.rejected_Q, 0 * precision_Q, precision_Q))


def rejected_though_shared(ranking: Ranking, decisions: Decisions) -> float:
    """Rejected share of the queries with a counterpart: an error."""
    return _share(decisions.rejected_Q[ranking.shared_Q])


def rejected_of_private(ranking: Ranking, decisions: Decisions) -> float:
    """Rejected share of the queries without a counterpart: accuracy of open-set detection, as recall."""
    return _share(decisions.rejected_Q[~ranking.shared_Q])


def right_decisions(ranking: Ranking, decisions: Decisions) -> float:
    """Right decisions over all queries; nothing where all have a counterpart."""
    if ranking.shared_Q.all():
        return NOTHING
    return _share(decisions.rejected_Q == ~ranking.shared_Q)


def _calibrated(metric: Callable[[Ranking, Decisions], float]) -> Callable[[Ranking, Decisions], float]:
    """A metric of decisions, of the calibrated gate's."""

    def value(ranking: Ranking, decisions: Decisions) -> float:
        return (
            NOTHING if decisions.calibrated_Q is None else metric(ranking, Decisions(decisions.calibrated_Q))
        )

    return value


def auroc(ranking: Ranking, decisions: Decisions) -> float:
    """Of the gate's score, which needs no threshold; nothing where all queries are of one kind."""
    from sklearn.metrics import roc_auc_score

    if ranking.shared_Q.all() or not ranking.shared_Q.any():
        return NOTHING
    return float(100 * roc_auc_score(~ranking.shared_Q, decisions.score_Q))


def percent(value_Q: np.ndarray, label_Q: np.ndarray | None = None) -> float:
    """100 times the mean of what is not ``nan``; ``nan`` if nothing is.

    Args:
        value_Q: one number a query.
        label_Q: for the mean over classes of the classes' means (macro).
    """
    there = ~np.isnan(value_Q)
    if not there.any():
        return NOTHING
    if label_Q is None:
        return float(100 * value_Q[there].mean())
    classes = dict.fromkeys(label_Q[there].tolist())
    return float(100 * np.mean([value_Q[there & (label_Q == label)].mean() for label in classes]))


def _share(true_Q: np.ndarray) -> float:
    return float(100 * true_Q.mean()) if len(true_Q) else NOTHING
