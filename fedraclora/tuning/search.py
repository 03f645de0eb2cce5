"""Run the trials of a tuning: choose settings, stop bad runs early, and keep to the budget.

Optuna's sampler chooses settings, with one objective for each of ``tune.sizes``: the metric of the
last rounds within that many bytes of all clients both ways. Optuna cannot prune trials with several
objectives. Therefore this module stops runs itself, by successive halving of Pareto ranks: at a
rung a run continues if it is among the best `keep` of all runs that got there, ranked by all
objectives. The sampler sees a stopped run with its measurements so far; the frontier uses every
measured round. A diverged run has the metric of the untrained model.
"""

from __future__ import annotations

import fcntl
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from typing_extensions import override

from fedraclora.binding import PlainDict, section
from fedraclora.compose.resume import with_changes
from fedraclora.config.resuming import plans_rounds
from fedraclora.config.run_config import digested, from_plain
from fedraclora.errors import CheckpointError, ClientError, ConfigError, ModelError
from fedraclora.plots.axes import MEGABYTE
from fedraclora.rng import generator
from fedraclora.run.callback import Callback
from fedraclora.run.digests import data_files
from fedraclora.run.folder import locked_folder
from fedraclora.run.ledger import Row, number
from fedraclora.run.statistics import (
    mean_curve,
    measured_value,
    metric_names,
    ranks,
    rounds_of,
    steady_within,
    traffic,
)
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.result import RunResult
from fedraclora.strategies.runner import execute
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.tuning.space import Space, TuneConfig
from fedraclora.weights.files import (
    config_difference,
    flatten,
    is_private,
    keep_private,
    open_lock,
)

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial
    from pandas import DataFrame

FEW = 4  # runs at a rung, before which none is ended there
REFUSED = 100  # settings in a row, after which nothing is left to try
# What may end a run.
BUDGET, DIVERGED, HALVED = "the budget is spent", "diverged", "halved"
BUDGET_KEY = "budget"  # of the study: what `fedraclora watch` measures progress by
BEYOND = "the next round is beyond the largest size"
KEPT = ["round", "traffic", "value"]  # of the mean curve of a trial


class TrialLogger(Callback):
    """Record the measurements of a run, and stop it.

    Args:
        metric: Its name.
        ends: Called after each round; returns why the run stops.
    """

    def __init__(self, metric: str, ends: Callable[[TrialLogger], bool]) -> None:
        self.names, self.ask = metric_names(metric), ends
        self.rows: list[Row] = []
        self.round, self.bytes, self.last = 0, 0.0, 0.0  # last: bytes of the last round
        self.lost = False  # whether what was measured last is no number

    @override
    def row(self, row: Row) -> None:
        before, self.bytes = self.bytes, traffic(row)
        self.round, self.last = int(number(row, "round")), self.bytes - before
        if (score := measured_value(row, self.names)) is not None:
            self.lost = not math.isfinite(score)
        self.rows.append(row)

    @override
    def ends(self, rows: Sequence[Row]) -> bool:
        return self.ask(self)


@dataclass(frozen=True)
class Search:
    """Hold a tuning of one task.

    Attributes:
        space: The search space.
        config: The settings.
        metric: The metric that ranks settings.
        higher: Whether more of it is better.
        clients: Of the task.
        folder: Where the trials are stored, in ``tune.db``.
        final: Keys in which final runs differ from trials: those of the split.
        say: Called with each message.
        steps, callbacks: The user's, for each run.
    """

    space: Space
    config: TuneConfig
    metric: str
    higher: bool
    clients: int
    folder: Path
    final: PlainDict
    say: Callable[[str], object]
    steps: Sequence[RoundStep] = ()
    callbacks: Sequence[Callback] = ()

    @property
    def rounds(self) -> int:
        """Return the number of rounds of a run that is not stopped."""
        return int(str(self.space.plain["rounds"]))

    @property
    def unit(self) -> float:
        """Return the bytes of all clients for one megabyte per client."""
        return MEGABYTE * self.clients

    @cached_property
    def sizes(self) -> dict[float, float]:
        """Return the bytes of all clients, by ``tune.sizes``."""
        return {size: size * self.unit for size in sorted(self.config.sizes)}

    @cached_property
    def is_whole(self) -> bool:
        """Return whether only the end of a run counts: its length changes what each round does."""
        return plans_rounds(self.space.plain) is not None

    def curve(self, runs: Sequence[TrialLogger]) -> DataFrame:
        """Average the measurements of runs of several seeds (`statistics.mean_curve`)."""
        rows = {seed: run.rows for seed, run in enumerate(runs)}
        return mean_curve(rounds_of(rows, metric_names(self.metric)), "mean")

    def metric_by_size(self, curve: DataFrame) -> list[float]:
        """Return the metric of a run at each of ``tune.sizes``: that of its last rounds there.

        If even the first round is larger, it is the metric of the untrained model. If only the end
        of a run counts, it is the metric so far, at the bytes of all rounds.
        """
        if self.is_whole:
            whole = curve["traffic"] * self.rounds / curve["round"].clip(lower=1)
            curve = curve.assign(traffic=whole).iloc[[0, -1]]
        worth = (steady_within(curve, most)["value"] for most in self.sizes.values())
        return [float(value.iloc[0]) for value in worth]

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Lock the budget, so that one process at a time reads it and takes from it."""
        with open_lock(self.folder / "tune.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def study(self) -> Study:
        """Open the trials, or create an empty study.

        Raises:
            CheckpointError: If they are of another task or space, naming the differences.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name="tune",
            storage=f"sqlite:///{self.folder / 'tune.db'}",
            directions=["maximize" if self.higher else "minimize"] * len(self.sizes),
            load_if_exists=True,
        )
        keep_private(self.folder / "tune.db")
        tried = {"tried": self.space.description(), "metric": self.metric}
        told: dict[str, object] = {
            "task": digested(self.space.plain, METHODS),
            "files": data_files(section(self.space.plain, "data")),
            "tune": {key: getattr(self.config, key) for key in ("seeds", "rungs", "sizes")} | tried,
        }
        limits = {key: getattr(self.config, key) for key in ("runs", "core_hours", "megabytes")}
        study.set_user_attr(BUDGET_KEY, limits | {"clients": self.clients})  # it may grow
        if (known := study.user_attrs.get("of")) is None:
            study.set_user_attr("of", told)
            for params in self.space.first(self.config.first):
                study.enqueue_trial(params)
        elif lines := config_difference(known, told):
            raise CheckpointError(
                f"{self.folder} holds another tuning. Give the same arguments to resume it (the "
                "budget may grow), or name another folder:\n  " + "\n  ".join(lines)
            )
        return study

    def run(self) -> bool:
        """Run trials until the budget is spent.

        Returns:
            Whether no other process still runs a trial.

        Raises:
            ConfigError: If none of the settings can run.
            CheckpointError: See `study`.
        """
        from optuna.samplers import TPESampler

        refused = list[str]()  # since one could be run
        told = dict[str, int]()  # by which trial first
        with self.turn():
            study = self.study()
        while len(refused) < REFUSED:
            with ExitStack() as stack:
                with self.turn():
                    self._take_up(study)
                    if self.is_over(study):
                        return not trials(study, "RUNNING")
                    begun = len(study.trials) - len(trials(study, "WAITING"))
                    draw = generator(self.config.seeds[0], "tune", begun)
                    study.sampler = TPESampler(seed=int(draw.integers(1 << 31)))
                    trial = study.ask()
                    plain = self.space.suggest(trial)
                    stack.enter_context(self._runs_here(trial.number))
                reason = self._try(study, trial, plain)
            refused = [*refused, reason] if reason else []
            if reason and told.setdefault(reason, trial.number) == trial.number:
                self.say(f"left out: {reason}")
        raise ConfigError(
            f"{REFUSED} settings in a row cannot be run or are excluded, the last since "
            f"{refused[-1]}. Change the space (tune.method, tune.rank, ...) or the other "
            "arguments"
        )

    def _runs_here(self, trial: int) -> AbstractContextManager[None]:
        """Lock a trial for this process; the operating system unlocks it when the process ends."""
        return locked_folder(
            self.folder / "processes" / str(trial), shared=not is_private(self.folder)
        )

    def _take_up(self, study: Study) -> None:
        """Mark trials failed whose process has ended, and queue their settings again."""
        for trial in trials(study, "RUNNING"):
            with suppress(CheckpointError), self._runs_here(trial.number):
                if trial.number not in {each.number for each in trials(study, "RUNNING")}:
                    continue  # another process has ended it meanwhile
                self.say(f"run {trial.number} was interrupted: its settings are tried again")
                _fail(study, trial.number)
                study.enqueue_trial(trial.params)

    def _left(self, study: Study) -> tuple[float, float]:
        """Return the remaining core-seconds and bytes."""
        cores, size = self.config.core_hours or math.inf, self.config.megabytes or math.inf
        spent = [trial.user_attrs for trial in study.get_trials(deepcopy=False)]
        cores = cores * 3600 - sum(of.get("core_seconds", 0.0) for of in spent)
        return cores, size * 1e6 - sum(of.get("bytes", 0.0) for of in spent)

    def is_over(self, study: Study) -> bool:
        """Return whether the budget is spent."""
        runs = len(trials(study, "RUNNING", "COMPLETE"))
        return runs >= (self.config.runs or math.inf) or min(self._left(study)) <= 0

    def _try(self, study: Study, trial: Trial, plain: PlainDict) -> str | None:
        """Run one trial; return the reason if its settings are invalid."""
        try:
            plain = self.space.rated(plain)
            self._refuse_never(plain)
            runs, ended = self._runs(study, trial, plain)
        except (ConfigError, ModelError) as error:
            trial.set_user_attr("refused", str(error))
            _fail(study, trial.number)
            return str(error)
        except Exception:
            _fail(study, trial.number)
            raise
        curve = self.curve(runs)
        if curve.empty:
            raise ConfigError(
                f"{self.metric} is not a number before round 1: choose another tune.metric"
            )
        score = float(curve["value"].iloc[0 if ended == DIVERGED else -1])
        trial.set_user_attr("curve", curve[KEPT].to_dict("records"))
        trial.set_user_attr("ended", ended)
        study.tell(
            trial, [score] * len(self.sizes) if ended == DIVERGED else self.metric_by_size(curve)
        )
        why = f", ended ({ended}) after round {max(run.round for run in runs)}" if ended else ""
        if ended == DIVERGED and (lower := self.space.lower(trial.params)):
            study.enqueue_trial(lower, skip_if_exists=True)
            why += "; a quarter of the rate is tried next"
        why += f" ({shorten(failed, 160)})" if (failed := trial.user_attrs.get("failed")) else ""
        values = self.space.values(trial.params, plain)
        words = " ".join(f"{k}={shown(v)}" for k, v in values.items())
        size = curve["traffic"].iloc[-1] / self.unit
        told = f"{self.metric} {score:.4f} at {size:.3g} MB a client"
        told += f" in {trial.user_attrs['core_seconds']:.3g} s"
        self.say(f"run {trial.number}: {told}{why}: {words}")
        return None

    def _runs(self, study: Study, trial: Trial, plain: PlainDict) -> tuple[list[TrialLogger], str]:
        """Run a trial's seeds; return what stopped it before its last round, if anything did."""
        began, runs = time.process_time(), list[TrialLogger]()
        last, ended = self.rounds, ""

        def spent() -> None:
            trial.set_user_attr("bytes", sum(run.bytes for run in runs))
            trial.set_user_attr("core_seconds", time.process_time() - began)

        def ends(watch: TrialLogger) -> bool:
            nonlocal last, ended
            if self.config.core_hours or self.config.megabytes:
                spent()
                cores, size = self._left(study)
                # The next round may send as many bytes as this one.
                if watch.round < last and (cores <= 0 or size < watch.last):
                    last, ended = 0, BUDGET
            if watch is runs[0] and last and watch.round < last:
                too_large = watch.bytes + watch.last > max(self.sizes.values())
                if too_large or not self._goes_on(study, trial, watch):
                    # Other seeds run as long as the first one.
                    last, ended = watch.round, BEYOND if too_large else HALVED
            return watch.round >= last

        try:
            for seed in self.config.seeds:
                runs.append(watch := TrialLogger(self.metric, ends))
                self.execute(plain, seed, watch)
                if watch.lost or not last:
                    break
        except ClientError as error:  # numbers not finite, or merged weights too large
            trial.set_user_attr("failed", str(error))
            runs[-1].lost = True
        finally:
            spent()
        return runs, DIVERGED if runs[-1].lost else ended

    def execute(self, plain: PlainDict, seed: int, *watching: Callback) -> RunResult:
        """Run a config under a seed."""
        config = from_plain(with_changes(plain, {"seed": seed}), METHODS)
        watching = (*self.callbacks, *watching)
        return execute(RunBuilder(config, callbacks=watching, steps=self.steps))

    def _goes_on(self, study: Study, trial: Trial, watch: TrialLogger) -> bool:
        """Decide at a rung by the Pareto rank among all runs that got there."""
        rung = sum(watch.round >= share * self.rounds for share in self.config.rungs)
        key, value = f"rung {rung - 1}", measured_value(watch.rows[-1], watch.names)
        if not rung or value is None or watch.lost or key in trial.user_attrs:
            return True
        trial.set_user_attr(key, self.metric_by_size(self.curve([watch])))
        there = [t for t in study.get_trials(deepcopy=False) if key in t.user_attrs]
        sign = 1 if self.higher else -1
        found = ranks([[sign * score for score in t.user_attrs[key]] for t in there])
        own = next(r for t, r in zip(there, found, strict=True) if t.number == trial.number)
        return len(there) < FEW or sum(r < own for r in found) < self.config.keep * len(found)

    def _refuse_never(self, plain: PlainDict) -> None:
        """Reject settings that match a whole line of ``tune.never``."""
        flat = flatten(plain)
        words = {f"{key.removesuffix('.name')}={shown(value)}" for key, value in flat.items()}
        for line in self.config.never:
            if {*line} <= words:
                raise ConfigError(f"tune.never has [{', '.join(line)}]")


def trials(study: Study, *states: str) -> list[FrozenTrial]:
    """List the trials in given states."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.name in states]


def done(study: Study) -> list[FrozenTrial]:
    """List all trials that ended."""
    return trials(study, "COMPLETE")


def _fail(study: Study, trial: int) -> None:
    from optuna.trial import TrialState

    study.tell(trial, state=TrialState.FAIL)


def shown(value: object) -> str:
    """Format the value of a setting."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
