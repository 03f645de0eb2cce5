"""Run the callbacks of a run: evaluation, early stopping, and those of your program."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from operator import itemgetter
from typing import Any, cast

import torch
from typing_extensions import override

from fedraclora.config.settings import StopConfig
from fedraclora.errors import CheckpointError, ConfigError, unknown
from fedraclora.evaluation.generate import GreedyGeneration
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.limits import COLUMNS
from fedraclora.narrow_weight import dense
from fedraclora.object_registry import attribute_digests, refuse_changed
from fedraclora.run.callback import Callback, RunStart
from fedraclora.run.ledger import BY_CLIENTS, Row, ledger_value, metrics_of, number
from fedraclora.schema import of_project
from fedraclora.strategies.server.sound import OF_CALLBACKS, HookCheck, describe
from fedraclora.tree import Tree

log = logging.getLogger(__name__)


class Callbacks:
    """Call all callbacks in order; the hooks are those of `Callback`.

    Attributes:
        list: The callbacks; more may be added.
        ended: Whether one of them has ended the run.
    """

    def __init__(self, callbacks: Sequence[Callback]) -> None:
        self.list, self.ended = list(callbacks), False
        self._begun: list[Callback] = []
        # columns of a program's callbacks, for the next row
        self._columns: list[tuple[str, Row]] = []
        self._rows: list[Row] = []  # copies for a program's callbacks

    def begin(self, run: RunStart) -> None:
        """Call `begin` of each callback."""
        for callback in self.list:
            callback.begin(run)
            self._begun.append(callback)

    def measure(self, weights: Callable[[], Tree], round_: int) -> Row:
        """Collect the columns for new weights, which are computed if a callback needs them."""
        measuring = [c for c in self.list if _measures(c)]
        row: Row = {"metrics": {}}
        now = weights() if measuring else {}
        for callback in measuring:
            if isinstance(callback, GuardedHooks):
                self._columns.append((callback.name, callback.measure(dense(now), round_)))
            else:
                row |= callback.measure(now, round_)
        return row

    def own_columns(self, row: Row) -> Row:
        """Add the columns of a program's callbacks to a row.

        Raises:
            ConfigError: If the row has such a column already.
        """
        while self._columns:
            who, found = self._columns.pop(0)
            row = joined(row, found, who)
        return row

    def row(self, row: Row) -> None:
        """Pass the row of a round to each callback."""
        for callback in self.list:
            callback.row(row)

    def ends(self, rows: Sequence[Row]) -> bool:
        """Return whether a callback ends the run."""
        if any(isinstance(c, GuardedHooks) for c in self.list):
            self._rows += copy.deepcopy(rows[len(self._rows) :])
        self.ended = any(
            c.ends(self._rows if isinstance(c, GuardedHooks) else rows) for c in self.list
        )
        return self.ended

    def end(self, summary: Mapping[str, object], *, failed: bool = False) -> None:
        """Call `end` of each started callback; after a failure no error may hide the first one."""
        while self._begun:
            try:
                self._begun.pop(0).end(summary, failed=failed)
            except Exception as error:
                if not failed:
                    raise
                log.warning("the end hook of a callback failed: %r", error)


def _measures(callback: Callback) -> bool:
    inner = callback.inner if isinstance(callback, GuardedHooks) else callback
    return type(inner).measure is not Callback.measure


def joined(row: Row, found: Mapping[str, object], who: str) -> Row:
    """Add columns of a program's callback to a row.

    Raises:
        ConfigError: If they are no columns, exist already, or cannot be written to the ledger.
    """
    if not isinstance(found, Mapping):
        raise ConfigError(
            f"{who} returns {describe(found)}, expected a dict of columns by name for the ledger"
        )
    for name in found:
        if not isinstance(name, str) or not name.isprintable() or not name:
            raise ConfigError(
                f"{who} returns the column {name!r:.100}, whose name is not a "
                "text. Use a str as name"
            )
        if name in row or name.partition(".")[0] in COLUMNS:
            raise ConfigError(
                f"{who} returns the column {name!r}, which rows have already. Rename it"
            )
    try:
        return row | {str(name): ledger_value(value, name) for name, value in found.items()}
    except (CheckpointError, RecursionError) as error:
        raise ConfigError(f"{who}: {error}. Return numbers, texts, lists or dicts") from error


@dataclass
class Evaluate(Callback):
    """Measure the weights of a run on its own samples.

    Attributes:
        metrics: Computes the metrics by name.
        answering: Generates a language model's answers; None: none.
        rounds: Rounds of the run.
    """

    metrics: Callable[[Tree], dict[str, float]]
    answering: GreedyGeneration | None = None
    rounds: int = 0

    @override
    def measure(self, weights: Tree, round_: int) -> Row:
        found = self.metrics(weights)
        if self.answering is None or not self.answering.due(round_, self.rounds):
            return {"metrics": found}
        match, generations = self.answering.columns(weights)
        return {"metrics": found | match, "generations": generations}


@dataclass
class Stopping(Callback):
    """Stop early by a metric of the validation split or of clients.

    The decision depends on the ledger only, so that a resumed run stops at the same round. The run
    ends with the weights of its last round; the summary also names the best round.

    Attributes:
        config: Metric and patience; without patience nothing is measured and nothing stops.
        validated: Computes the metrics of weights on the validation split; None: clients do.
        lower: The user's own metrics for which lower is better.
    """

    config: StopConfig = field(default_factory=StopConfig)
    validated: Callable[[Tree], dict[str, float]] | None = None
    lower: Collection[str] = ()
    _seen: int = field(default=0, init=False, repr=False)  # rows that `ends` has read
    _costs: list[float] = field(default_factory=list, init=False, repr=False)  # of these

    @override
    def measure(self, weights: Tree, round_: int) -> Row:
        """Compute the ledger's column ``validation``; empty if it is not needed.

        Raises:
            ConfigError: If the metric is not among those of the data set.
        """
        if self.config.patience is None or self.validated is None:
            return {}
        found = self.validated(weights)
        if self.config.metric not in found:
            raise unknown("stop.metric", self.config.metric, found)
        return {"validation": found}

    @override
    def ends(self, rows: Sequence[Row]) -> bool:
        """Check whether the last ``patience`` evaluations have not improved on one before them."""
        if self.config.patience is None:
            return False
        if len(rows) < self._seen:
            self._seen, self._costs = 0, []
        # A ledger reads its rows from its file, so each is asked for once.
        self._costs += [c for row in rows[self._seen :] if (c := self._cost(row)) is not None]
        self._seen = len(rows)
        if not self._costs:
            return False
        least, after = self._costs[0], 0
        for cost in self._costs[1:]:
            if cost < least - self.config.min_delta:
                least, after = cost, 0
            else:
                after += 1
        return after >= self.config.patience

    def best(self, rows: Sequence[Row]) -> Row | None:
        """Find the row of the best evaluation, the first among equals; None without any."""
        measured = [(cost, row) for row in rows if (cost := self._cost(row)) is not None]
        return min(measured, key=itemgetter(0), default=(0.0, None))[1]

    def _cost(self, row: Row) -> float | None:
        """Return the metric of a row, as a cost; None if the row has none."""
        metric, by_clients = self.config.metric, self.config.metric.startswith(BY_CLIENTS)
        if metric not in metrics_of(row) if by_clients else "validation" not in row:
            return None
        value = number(row, "metrics" if by_clients else "validation", metric)
        if math.isnan(value):
            return math.inf
        return -value if higher_is_better(metric, self.lower) else value


@dataclass
class RowCallback(Callback):
    """Call a function with each new row of the ledger; the function must return None."""

    call: Callable[[Row], object]

    @override
    def row(self, row: Row) -> None:
        """Call the function.

        Raises:
            ConfigError: If it returns a value, which cannot end the run.
        """
        if (found := self.call(row)) is not None:
            raise ConfigError(
                f"the function {_name(self.call)} among the callbacks returns {found!r:.100}, "
                "which is not used. Return None; to end a run, use the hook ends(rows) of a "
                "fedraclora.Callback"
            )


def unchanged(things: Mapping[str, object]) -> Callback:
    """Refuse the user's objects, by name, that change from round to round."""
    own = {
        key: (it, attribute_digests(it)) for key, it in things.items() if not of_project(type(it))
    }

    def check(_: Row) -> None:
        for key, (thing, before) in own.items():
            refuse_changed(key, thing, before)

    return RowCallback(check)


class UndefinedMetricsLog(Callback):
    """Log metrics without a value, once, with their targets."""

    def __init__(self, target: torch.Tensor) -> None:
        self.targets, self.warned = "samples of the clients", False
        if len(target):
            kind, ends = str(target.dtype).removeprefix("torch."), target.aminmax()
            self.targets = f"targets {kind} {[*target.shape]} from {ends.min:g} to {ends.max:g}"

    @override
    def row(self, row: Row) -> None:
        found = {n: v for n, v in metrics_of(row).items() if n.endswith(".mean") or "." not in n}
        lost = [n for n, v in found.items() if not isinstance(v, float) or not math.isfinite(v)]
        if lost and not self.warned:
            text = (
                "%s: not a number in round %s, on %s; a metric without a value cannot be "
                "used to stop or to compare runs"
            )
            log.warning(text, ", ".join(lost), row["round"], self.targets)
        self.warned |= bool(found)


class GuardedHooks:
    """Wrap an object of your program, so that an error in a hook names the object.

    Args:
        inner: The object.
        name: Its name for messages.
        checks: Checks of the hooks' results, by hook.
        copies: Whether its hooks receive copies; rows are copied before.
    """

    own = True

    def __init__(
        self, inner: object, name: str, checks: Mapping[str, HookCheck], *, copies: bool = False
    ) -> None:
        vars(self).update(inner=inner, name=name, checks=checks, copies=copies)

    def __getattr__(self, attribute: str) -> Any:
        """Fetch an attribute of the object."""
        if "inner" not in vars(self):  # a copy that is being made
            raise AttributeError(attribute)
        found = getattr(self.inner, attribute)
        inherited = of_project(found) and not self.copies  # its own method calls are not wrapped
        if not callable(found) or inherited:
            return found

        def call(*arguments: object, **named: object) -> object:
            if self.copies and attribute != "ends":
                arguments, named = copy.deepcopy((arguments, named))
            try:
                made = found(*arguments, **named)
                if (check := self.checks.get(attribute)) is not None:
                    made = check(f"{attribute} of {self.name}", made, self.inner, arguments)
                return made
            except Exception as error:
                error.add_note(f"in {attribute} of {self.name}")
                raise

        return call

    @override
    def __setattr__(self, attribute: str, value: object) -> None:
        """Set an attribute of the object, which may be frozen."""
        object.__setattr__(self.inner, attribute, value)


@contextmanager
def in_round(round_: int) -> Iterator[None]:
    """Add the round to errors of a program's objects."""
    try:
        yield
    except Exception as error:
        if getattr(error, "__notes__", ()) or isinstance(error, ConfigError):
            error.add_note(f"in round {round_}")
        raise


def own_callbacks(key: str, given: object) -> list[Callback]:
    """Check the callbacks of a program.

    Args:
        key: The argument's name, for messages.
        given: Callbacks and functions, one or several; None: none.

    Raises:
        ConfigError: If an object is neither.
    """
    things = [(_callback(key, thing), _name(thing)) for thing in each_of(given)]
    return [
        cast(Callback, GuardedHooks(each, name, OF_CALLBACKS, copies=True)) for each, name in things
    ]


def each_of(given: object) -> list[Any]:
    """Return a list of the objects given: none, one, or several."""
    if isinstance(given, Sequence | Set) and not isinstance(given, str | bytes):
        return [*given]
    return [] if given is None else [given]


def _callback(key: str, thing: Any) -> Callback:
    if isinstance(thing, Callback):
        return thing
    if isinstance(thing, type) and issubclass(thing, Callback):
        raise ConfigError(
            f"{key} has the class {thing.__name__}, expected an object. Write {thing.__name__}(...)"
        )
    if isinstance(thing, type) or not callable(thing):
        raise ConfigError(
            f"{key} has {thing!r:.200}, expected a fedraclora.Callback or a function of a new "
            "row. Objects that change a round go to steps=[...]"
        )
    try:
        signature(thing).bind({})
    except ValueError:  # some functions in C have no signature
        pass
    except TypeError as error:
        raise ConfigError(f"{key}: {_name(thing)} must take one row: {error}") from error
    return RowCallback(thing)


def _name(thing: Any) -> str:
    return str(getattr(thing, "__qualname__", type(thing).__qualname__))
