"""The table of metrics, from what one pass over the samples counts.

Sums serve the cheap metrics; the others keep every prediction, and import scikit-learn or scipy
when they are computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from fedraclora.data.task import LOSSES

_CLASSES = frozenset({"cross_entropy", "logistic", "next_token", "token_classes", "pixel_classes"})
_LABELS = frozenset({"multi_label"})
_NUMBERS = frozenset({"squared_error", "logistic"})


@dataclass(frozen=True)
class Tally:
    """What one pass over the samples gives to the metrics.

    Attributes:
        loss: Sum of the losses.
        parts: Number of parts of the loss: samples; or what has a label of them, tokens or pixels;
            or outputs, for ``multi_label``.
        correct: Number of right classes.
        counted: Number of classes that were predicted.
        classes: Number of classes of the model's output (2 for a logistic score).
        labels: Predicted and true classes [2, P]; [2, 0] where no metric needs them.
        numbers: Predicted and true numbers [2, N], of ``multi_label`` [2, N, C]; [2, 0] where no
            metric needs them.
        confusion: How often a class (row) was predicted as another (column), int64 [C, C]; [0, 0]
            where no metric needs it.
    """

    loss: float
    parts: int
    correct: int
    counted: int
    classes: int
    labels: npt.NDArray[np.generic]
    numbers: npt.NDArray[np.generic]
    confusion: npt.NDArray[np.int64]


@dataclass(frozen=True)
class Metric:
    """One entry of `METRICS`.

    Attributes:
        compute: From the tally of a pass to the value.
        losses: Losses (keys of `fedraclora.data.task.LOSSES`) whose outputs the metric can read.
        needs: ``loss`` | ``correct`` | ``confusion`` (sums), ``classes`` | ``numbers`` (all
            predictions kept).
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


def _f1_of_labels(tally: Tally, *, macro: bool) -> float:
    # By hand: scikit-learn takes a single column for two classes.
    said, wanted = tally.numbers[0] > 0, tally.numbers[1] == 1
    right, both = (said & wanted).sum(axis=0), said.sum(axis=0) + wanted.sum(axis=0)
    if not macro:
        right, both = right.sum(keepdims=True), both.sum(keepdims=True)
    return float(np.mean(2 * right / np.maximum(both, 1)))


def _auc(tally: Tally) -> float:
    """Area under the ROC curve: the mean over the outputs of which both classes occur."""
    from sklearn.metrics import roc_auc_score

    scores, truth = tally.numbers.reshape(2, tally.numbers.shape[1], -1).astype(np.float64)
    both = [k for k in range(truth.shape[1]) if np.unique(truth[:, k]).size == 2]
    if not both or not np.isfinite(scores).all():
        return math.nan
    return float(np.mean([roc_auc_score(truth[:, k], scores[:, k]) for k in both]))


def _mean_iou(tally: Tally) -> float:
    """Intersection over union: the mean over the classes that occur or were predicted."""
    right = np.diag(tally.confusion)
    union = tally.confusion.sum(axis=0) + tally.confusion.sum(axis=1) - right
    return float(np.mean(right[union > 0] / union[union > 0])) if union.any() else math.nan


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
    "token_accuracy": Metric(_accuracy, frozenset({"next_token", "token_classes"}), "correct"),
    "loss": Metric(_mean_loss, frozenset(LOSSES), "loss", higher_is_better=False),
    "perplexity": Metric(
        _perplexity, frozenset({"next_token", "cross_entropy"}), "loss", higher_is_better=False
    ),
    "matthews": Metric(_matthews, _CLASSES, "classes"),
    "f1": Metric(_f1, _CLASSES, "classes"),
    "f1_micro": Metric(partial(_f1_of_labels, macro=False), _LABELS, "numbers"),
    "f1_macro": Metric(partial(_f1_of_labels, macro=True), _LABELS, "numbers"),
    "auc": Metric(_auc, _LABELS | {"logistic"}, "numbers"),
    "mean_iou": Metric(_mean_iou, frozenset({"pixel_classes"}), "confusion"),
    "pearson": Metric(_correlation("pearsonr"), _NUMBERS, "numbers"),
    "spearman": Metric(_correlation("spearmanr"), _NUMBERS, "numbers"),
}


def higher_is_better(metric: str) -> bool:
    """Return the direction of a metric; names outside `METRICS` are taken as scores."""
    return METRICS[metric].higher_is_better if metric in METRICS else True
