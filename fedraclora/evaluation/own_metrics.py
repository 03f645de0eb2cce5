"""Add the user's own metrics: of torchmetrics, a function of all outputs, or of each sample."""

from __future__ import annotations

import copy
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from typing_extensions import override

from fedraclora.data.own_loss import PASSING, own_object, short_name
from fedraclora.data.task import read_as
from fedraclora.errors import ConfigError
from fedraclora.evaluation.counts import Batch, Formula, MetricInput, ratio
from fedraclora.imports import as_user_error, check_call

WANTED = (
    "a metric is a name of the project's, a metric of torchmetrics, or a function(output, target) "
    "of all outputs that gives a number"
)


@dataclass(frozen=True)
class Metric:
    """Define a metric of your own.

    Attributes:
        function: ``function(output, target)`` returns a number; or a metric of torchmetrics.
            Outputs and targets have one row for each sample, token or pixel.
        higher_is_better: Its direction; None: that of the torchmetrics metric.
        each: Whether the function returns a number for each row, [N]; the metric is their mean.
            Such a metric consists of sums, so that it works under secure aggregation.
        name: Its name in the ledger; empty: that of the function.
    """

    function: Callable[..., Any]
    higher_is_better: bool | None = None
    each: bool = False
    name: str = ""

    def __post_init__(self) -> None:
        """Reject a value that is no function, and a name that a ledger cannot have.

        Raises:
            ConfigError: Naming it.
        """
        if not callable(self.function):
            raise ConfigError(f"fedraclora.Metric({self.function!r:.100}): a function is wanted")
        if self.name and not (isinstance(self.name, str) and re.fullmatch(r"\w+", self.name)):
            raise ConfigError(
                f"fedraclora.Metric(name={self.name!r:.100}): letters, digits and _ make a name"
            )

    def __call__(self, output: torch.Tensor, target: torch.Tensor) -> Any:
        """Call the function."""
        return self.function(output, target)


def own_metric(name: str) -> Formula:
    """Find a user's metric by its name.

    Raises:
        ConfigError: If there is none, or its direction is unknown.
    """
    found = own_object("data.metrics", name)
    metric = found if isinstance(found, Metric) else Metric(found)
    higher = metric.higher_is_better
    if higher is None:
        inner = getattr(metric.function, "func", metric.function)  # the function inside a partial
        higher = getattr(inner, "higher_is_better", None)
    if not isinstance(higher, bool):
        raise ConfigError(
            f"data.metrics has {name}, which does not say whether more of it is better: give the "
            "function an attribute (NAME.higher_is_better = False), or say "
            "fedraclora.Metric(NAME, higher_is_better=...)"
        )
    kinds = type(metric.function).__mro__  # torchmetrics need not be installed
    is_torch = any(kind.__module__ == "torchmetrics.metric" for kind in kinds)
    own = (_Torch if is_torch else _Each if metric.each else _Whole)(name, metric.function)
    if not is_torch:
        check_call(f"data.metrics: {own.name}", metric.function, "all outputs", "all targets")
    return Formula(
        own.value, frozenset(), MetricInput(short_name(name), own.take, own.sums), higher
    )


class _Whole:
    """Apply a function of all outputs that returns one number; errors name the function."""

    sums = False

    def __init__(self, name: str, function: Any) -> None:
        self.name, self.function = name.partition("@")[0], function
        self.tried = False  # called twice with the same input, to detect random draws

    def take(self, batch: Batch) -> Any:
        """Compute sums for each owner, [owners, q], or outputs, targets and owners of a batch."""
        return batch.rows()

    def value(self, *given: Any) -> float:
        """Compute the metric from an owner's sums, or from its outputs and targets."""
        found = self.number(self.called(self.function, *given))
        again = found if self.tried else self.number(self.called(self.function, *given))
        self.repeats(torch.tensor(found), torch.tensor(again))
        return found

    def repeats(self, found: torch.Tensor, again: torch.Tensor) -> None:
        """Refuse a function that returns something else the second time.

        Raises:
            ConfigError: Naming it.
        """
        self.tried = True
        if not torch.equal(found.nan_to_num(), again.nan_to_num()):
            raise ConfigError(
                f"metric {self.name} gives something else when it is called again with the same "
                "outputs and targets: it may draw no numbers, and keep nothing from call to call"
            )

    def called(self, function: Callable[..., Any], *given: torch.Tensor) -> Any:
        """Call a user's function and name it in errors."""
        of = " and ".join(f"{each.dtype} {tuple(each.shape)}" for each in given)
        what = f"calling it with {of}" if given else "computing it"
        context = (f"metric {self.name}: ", what, f"; {WANTED}", PASSING)
        with as_user_error(ConfigError, *context):
            return function(*given)

    def number(self, found: Any) -> float:
        """Convert the result to a number."""
        try:
            if isinstance(found, str):  # float() would accept it
                raise TypeError("a text is no number")
            return float(found)
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise ConfigError(
                f"metric {self.name} gives {_kind(found)}, expected one number (of torchmetrics: "
                "average='macro', say)"
            ) from error


def _kind(found: Any) -> str:
    shape = getattr(found, "shape", None)
    return type(found).__name__ + ("" if shape is None else f" of shape {tuple(shape)}")


class _Each(_Whole):
    """Apply a function that returns a number for each row; the metric is the mean."""

    sums = True

    @override
    def take(self, batch: Batch) -> torch.Tensor:
        output, target, owners = batch.rows()
        found = self.called(self.function, output, target)
        real = isinstance(found, torch.Tensor) and not found.is_complex()
        if not real or found.shape != (len(target),):
            raise ConfigError(
                f"metric {self.name} gives {_kind(found)} for {len(target)} rows, expected a "
                f"tensor of shape ({len(target)},) with each=True"
            )
        if not self.tried:
            self.repeats(found, self.called(self.function, output, target))
        return owners.sums(found, torch.ones_like(found))

    @override
    def value(self, *given: Any) -> float:
        return ratio(*given)


class _Torch(_Whole):
    """Apply a metric of torchmetrics. Class metrics get probabilities, not logits."""

    def __init__(self, name: str, function: Any) -> None:
        super().__init__(name, copy.deepcopy(function))
        # torchmetrics has no public list of states that are summed or kept.
        self.states: dict[str, Any] = {**self.function._defaults}  # noqa: SLF001
        rules = {getattr(r, "__name__", "") for r in self.function._reductions.values()}  # noqa: SLF001
        zeros = all(isinstance(t, torch.Tensor) and not bool(t.any()) for t in self.states.values())
        self.sums = rules == {"dim_zero_sum"} and zeros
        self.classifies = ".classification" in "".join(k.__module__ for k in type(function).__mro__)

    @override
    def take(self, batch: Batch) -> Any:
        output, target, owners = batch.rows()
        output = output.double()
        if self.classifies and batch.reads in {"logistic", "multi_label"}:
            output, target = output.sigmoid(), target.long()
        elif self.classifies and read_as(batch.reads).axis is not None:
            output = output.softmax(dim=-1)
        if not self.sums:
            return output, target, owners
        found = []
        for owner in range(owners.count):
            here = slice(None) if owners.of is None else owners.of == owner
            self.update(output[here], target[here])
            parts = [getattr(self.function, name).double().reshape(-1) for name in self.states]
            found.append(torch.cat(parts))
        return torch.stack(found)

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        """Update the metric with outputs and targets."""
        self.function.to(output.device).reset()
        self.function.set_dtype(torch.float64)
        if len(target):
            self.called(self.function.update, output, target)

    @override
    def value(self, *given: Any) -> float:
        if not self.sums:
            self.update(*given)
        elif given[0].any():
            self.load(torch.from_numpy(given[0]))
        else:
            return math.nan
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = self.called(self.function.compute)
        # A warning that the metric is undefined, as the area under the curve of one class.
        empty = any("meaningless" in str(each.message) for each in caught)
        return math.nan if empty else self.number(found)

    def load(self, left: torch.Tensor) -> None:
        """Load sums into the metric, as if it had seen the samples."""
        self.function.cpu().reset()
        # With several outputs, sums (but not counts) grow to [outputs] at the first update.
        wide = {n for n, t in self.states.items() if t.numel() == 1 and t.is_floating_point()}
        rest = len(left) - sum(start.numel() for start in self.states.values())
        for name, start in self.states.items():
            shape = [1 + rest // len(wide)] if rest and name in wide else [*start.shape]
            setattr(self.function, name, left[: prod(shape)].reshape(shape))
            left = left[prod(shape) :]
        self.function._update_count = 1  # noqa: SLF001 - else it warns that it has seen nothing
