"""The table of metrics, from what one pass over the samples counts.

Sums serve the cheap metrics; the others keep every prediction, and import scikit-learn or scipy
when they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fedraclora.data.task import LOSSES

_CLASSES = frozenset({"cross_entropy", "logistic", "next_token"})
_NUMBERS = frozenset({"squared_error", "logistic"})


@dataclass(frozen=True)
class Tally:
    """What one pass over the samples gives to the metrics.

    Attributes:
        loss: Sum of the losses.
        parts: Number of parts of the loss (samples; for ``next_token``, tokens).
        correct: Number of right classes.
        counted: Number of classes that were predicted.
        classes: Number of classes of the model's output (2 for a logistic score).
        labels: Predicted and true classes [2, P]; [2, 0] where no metric needs them.
        numbers: Predicted and true numbers [2, N]; [2, 0] where no metric needs them.
    """

    loss: float
    parts: int
    correct: int
    counted: int
    classes: int
    labels: npt.NDArray[np.generic]
    numbers: npt.NDArray[np.generic]


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`.

    Attributes:
        compute: From the tally of a pass to the value.
        losses: Losses (keys of `fedraclora.data.task.LOSSES`) whose outputs the metric can read.
        needs: ``loss`` | ``correct`` (sums), ``classes`` | ``numbers`` (all predictions kept).
        higher_is_better: Direction, for "reached the target".
    """

    compute: Callable[[Tally], float]
    losses: frozenset[str]
    needs: str
    higher_is_better: bool = True


def _mean_loss(tally: Tally) -> float:
    return tally.loss / tally.parts if tally.parts else math.nan


def _perplexity(tally: Tally) -> float:
    try:
        return math.exp(_mean_loss(tally))
    except OverflowError:
        return math.inf


def _accuracy(tally: Tally) -> float:
    return tally.correct / tally.counted if tally.counted else math.nan


def _matthews(tally: Tally) -> float:
    from sklearn.metrics import matthews_corrcoef

    predicted, actual = tally.labels
    if np.unique(tally.labels).size < 2:
        return 0.0  # by definition; scikit-learn gives the same, with a warning
    return float(matthews_corrcoef(actual, predicted))


def _f1(tally: Tally) -> float:
    from sklearn.metrics import f1_score

    predicted, actual = tally.labels
    average = "binary" if tally.classes == 2 else "macro"
    return float(f1_score(actual, predicted, average=average, zero_division=0.0))


def _correlation(name: str) -> Callable[[Tally], float]:
    def compute(tally: Tally) -> float:
        from scipy import stats

        scores, truth = tally.numbers.astype(np.float64)
        # A constant or a non-finite side has no correlation; scipy says so with a warning.
        for side in (scores, truth):
            if side.size < 2 or not np.isfinite(side).all() or np.ptp(side) == 0.0:
                return math.nan
        return float(getattr(stats, name)(scores, truth).statistic)

    return compute


METRICS: dict[str, Metric] = {
    "accuracy": Metric(_accuracy, _CLASSES, "correct"),
    "token_accuracy": Metric(_accuracy, frozenset({"next_token"}), "correct"),
    "loss": Metric(_mean_loss, frozenset(LOSSES), "loss", higher_is_better=False),
    "perplexity": Metric(
        _perplexity, frozenset({"next_token", "cross_entropy"}), "loss", higher_is_better=False
    ),
    "matthews": Metric(_matthews, _CLASSES, "classes"),
    "f1": Metric(_f1, _CLASSES, "classes"),
    "pearson": Metric(_correlation("pearsonr"), _NUMBERS, "numbers"),
    "spearman": Metric(_correlation("spearmanr"), _NUMBERS, "numbers"),
}


def higher_is_better(metric: str) -> bool:
    """Return the direction of a metric; names outside `METRICS` are taken as scores."""
    return METRICS[metric].higher_is_better if metric in METRICS else True
