"""Runs of a tuning: which settings come next, when one ends, what the budget still allows.

Optuna's sampler chooses, with two aims: the metric, and the bytes of all clients both ways. Optuna
prunes nothing that has two aims. So a run is ended here, by successive halving of Pareto ranks: at
a rung it goes on if it is among the best `keep` of all runs that got there, ranked by metric and
bytes together. To the sampler it then counts with its metric so far, at the bytes of all rounds; in
the frontier every measured round counts for what it was. Of a run that diverged the metric is that
of the untrained model.
"""

from __future__ import annotations

import fcntl
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

from typing_extensions import override

from fedraclora.binding import PlainDict
from fedraclora.clients.engines import engine_of
from fedraclora.config.run_config import digested, from_plain
from fedraclora.errors import CheckpointError, ClientError, ConfigError, ModelError
from fedraclora.evaluation.clients import AFTER
from fedraclora.experiments.resume import laid_over
from fedraclora.experiments.tune.frontier import Point, mean_curve, ranks
from fedraclora.experiments.tune.space import Space, TuneConfig
from fedraclora.rng import generator
from fedraclora.run.callback import Callback
from fedraclora.run.digests import data_files
from fedraclora.run.folder import alone
from fedraclora.run.ledger import Row, metrics_of, number
from fedraclora.strategies import METHODS
from fedraclora.strategies.outcome import execute
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.weights.files import config_difference, flatten

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

FEW = 4  # runs at a rung, before which none is ended there
REFUSED = 100  # settings in a row, after which nothing is left to try
BUDGET = "the budget is spent"
Say = Callable[[str], object]


class Watch(Callback):
    """Keeps what a run measures, and ends it.

    Args:
        metric: Its name.
        ends: Is asked after each round.
    """

    def __init__(self, metric: str, ends: Callable[[Watch], bool]) -> None:
        self.metric, self.ask = metric, ends
        self.points: list[Point] = []
        self.round, self.bytes, self.last = 0, 0.0, 0.0  # last: bytes of the last round
        self.lost = False  # whether what was measured last is no number

    @property
    def measured(self) -> bool:
        """Whether the last round was."""
        return bool(self.points) and self.points[-1].round == self.round

    @override
    def row(self, row: Row) -> None:
        before, self.bytes = self.bytes, number(row, "uplink_total") + number(row, "downlink_total")
        self.round, self.last = int(number(row, "round")), self.bytes - before
        if (score := score_of(row, self.metric)) is not None:
            self.lost = not math.isfinite(score)
            if not self.lost:
                self.points.append(Point(self.round, self.bytes, score))

    @override
    def ends(self, rows: Sequence[Row]) -> bool:
        return self.ask(self)


@dataclass(frozen=True)
class Search:
    """A tuning of one task.

    Attributes:
        space: What can be tried.
        config: The settings.
        metric: By which settings are judged.
        higher: Whether more of it is better.
        steps, callbacks: Of the user's, for each run.
        folder: Where the trials are kept, in ``tune.db``.
        final: Keys in which the runs of what was found differ: those of the split.
        say: Is told what happens.
    """

    space: Space
    config: TuneConfig
    metric: str
    higher: bool
    folder: Path
    final: PlainDict
    say: Say
    steps: Sequence[RoundStep] = ()
    callbacks: Sequence[Callback] = ()

    @property
    def rounds(self) -> int:
        """Of a run that nothing ends."""
        return int(str(self.space.plain["rounds"]))

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Let one process at a time look at the budget and take from it."""
        with (self.folder / "tune.lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def study(self, seed: int = 0) -> Study:
        """Open the trials, or begin with none.

        Raises:
            CheckpointError: If they are of another task or space, naming what differs.
        """
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        study = optuna.create_study(
            study_name="tune",
            storage=f"sqlite:///{self.folder / 'tune.db'}",
            sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=10),
            directions=["maximize" if self.higher else "minimize", "minimize"],
            load_if_exists=True,
        )
        config = self.config
        told: dict[str, object] = {
            "task": digested(self.space.plain, METHODS),
            "files": data_files(dict(self.space.plain["data"])),  # type: ignore[call-overload]
            "tune": {
                "tried": self.space.told(),
                "metric": self.metric,
                "seeds": config.seeds,
                "rungs": config.rungs,
            },
        }
        if (known := study.user_attrs.get("of")) is None:
            study.set_user_attr("of", told)
            for params in self.space.first(config.first):
                study.enqueue_trial(params)
        elif lines := config_difference(known, told):
            raise CheckpointError(
                f"{self.folder} holds a tuning of something else; it goes on with the same words "
                "(the budget may grow), or name another folder:\n  " + "\n  ".join(lines)
            )
        return study

    def run(self) -> bool:
        """Run trials until the budget is spent.

        Returns:
            Whether no other process still runs one.

        Raises:
            ConfigError: If nothing that is tried can be run.
            CheckpointError: See `study`.
        """
        refused, reasons, reason = 0, set[str](), None
        with ExitStack() as stack:
            with self.turn():
                slot = self._slot(stack)
                known = len(self.study().trials)
                draw = generator(self.config.seeds[0], "tune", slot, known)
                study = self.study(int(draw.integers(1 << 31)))
            while refused < REFUSED:
                with self.turn():
                    self._take_up(study, slot)
                    if self.is_over(study):
                        return not self._running(study)
                    trial = study.ask()
                    plain = self.space.suggest(trial)
                    trial.set_user_attr("process", slot)
                reason = self._try(study, trial, plain)
                refused = refused + 1 if reason else 0
                if reason and reason not in reasons:
                    reasons.add(reason)
                    self.say(f"left out: {reason}")
        raise ConfigError(
            f"{REFUSED} settings in a row cannot be run or are never to be tried, the last since "
            f"{reason}: change what is tried (tune.method, tune.rank, ...) or what is said beside"
        )

    def _slot(self, stack: ExitStack) -> int:
        """Take the first number that no living process has."""
        for slot in count():
            try:
                stack.enter_context(alone(self.folder / "processes" / str(slot)))
            except CheckpointError:
                continue
            return slot
        raise AssertionError

    def _take_up(self, study: Study, mine: int) -> None:
        """Call trials failed whose process is dead, and have their settings tried again."""
        for trial in self._running(study):
            owner = trial.user_attrs.get("process")
            try:
                if owner not in {None, mine}:
                    with alone(self.folder / "processes" / str(owner)):
                        pass
            except CheckpointError:
                continue
            self.say(f"run {trial.number} was cut off: its settings are tried again")
            _failed(study, trial.number)
            study.enqueue_trial(trial.params)

    @staticmethod
    def _running(study: Study) -> list[FrozenTrial]:
        from optuna.trial import TrialState

        return [*study.get_trials(deepcopy=False, states=[TrialState.RUNNING])]

    def _left(self, study: Study) -> tuple[float, float]:
        """Give the core-seconds and the bytes that are left."""
        trials, config = study.get_trials(deepcopy=False), self.config
        cores = math.inf if config.core_hours is None else config.core_hours * 3600
        size = math.inf if config.megabytes is None else config.megabytes * 1e6
        cores -= sum(trial.user_attrs.get("core_seconds", 0.0) for trial in trials)
        size -= sum(trial.user_attrs.get("bytes", 0.0) for trial in trials)
        return cores, size

    def is_over(self, study: Study) -> bool:
        """Tell whether the budget is spent."""
        runs = len(self._running(study)) + len(done(study))
        spent = self.config.runs is not None and runs >= self.config.runs
        return spent or min(self._left(study)) <= 0

    def _try(self, study: Study, trial: Trial, plain: PlainDict) -> str | None:
        """Run one trial; give the reason where it was refused."""
        began = time.process_time()
        runs: list[Watch] = []
        try:
            if reason := self._never(plain):
                _failed(study, trial.number)
                return reason
            ended = self._runs(study, trial, plain, runs)
        except (ConfigError, ModelError) as error:
            trial.set_user_attr("refused", str(error))
            _failed(study, trial.number)
            return str(error)
        except BaseException as error:
            self._spent(trial, runs, began)
            _failed(study, trial.number)
            if isinstance(error, KeyboardInterrupt):
                study.enqueue_trial(trial.params)
            raise
        self._spent(trial, runs, began)
        curve = mean_curve([run.points for run in runs])
        lost = ended == "diverged"
        score = curve[0 if lost else -1].score if curve else math.nan
        if not math.isfinite(score):
            raise ConfigError(
                f"{self.metric} is no number before the first round: choose another tune.metric"
            )
        reached = max(run.round for run in runs)
        cost = statistics.fmean(run.bytes for run in runs)
        cost *= self.rounds / max(reached, 1) if ended else 1
        if lost:  # maybe in round 1, of which no bytes are known
            cost = max([cost, *(other.values[1] for other in done(study))])
        for key, value in {"curve": [vars(p) for p in curve], "ended": ended}.items():
            trial.set_user_attr(key, value)
        study.tell(trial, [score, cost])
        why = f", ended ({ended}) after round {reached}" if ended else ""
        why += f" ({shorten(failed, 100)})" if (failed := trial.user_attrs.get("failed")) else ""
        words = " ".join(f"{k}={shown(v)}" for k, v in trial.params.items())
        self.say(f"run {trial.number}: {self.metric} {score:.4f}{why}: {words}")
        return None

    def _runs(self, study: Study, trial: Trial, plain: PlainDict, runs: list[Watch]) -> str:
        """Run a trial's seeds; say what ended it before its last round, if anything did."""
        began, why, passed = time.process_time(), [""], list[int]()
        rungs = [share * self.rounds for share in sorted(self.config.rungs)]
        limited = (self.config.core_hours, self.config.megabytes) != (None, None)

        def ends(watch: Watch) -> bool:
            first, place = watch is runs[0], len(passed)
            if limited:
                self._spent(trial, runs, began)
                cores, size = self._left(study)
                if cores <= 0 or size < watch.last:  # the next round may take as much
                    why[0] = BUDGET
            if not first:  # as long as the run of the first seed
                return runs[0].round <= watch.round or why[0] == BUDGET
            if watch.round >= self.rounds:
                why[0] = ""
            elif place < len(rungs) and watch.round >= rungs[place] and watch.measured:
                passed.append(watch.round)
                if not self._goes_on(study, trial, place, watch.points[-1]):
                    why[0] = "halved"
            return bool(why[0])

        for seed in self.config.seeds:
            config = from_plain(laid_over(plain, {"seed": seed}), METHODS)
            runs.append(watch := Watch(self.metric, ends))
            watching = [*self.callbacks, watch]
            try:
                execute(config, None, engine_of, callbacks=watching, steps=self.steps)
            except ClientError as error:  # numbers not finite, or merged weights too large
                trial.set_user_attr("failed", str(error))
                watch.lost = True
            if watch.lost:
                return "diverged"
            if why[0] == BUDGET:
                break
        return why[0]

    def _goes_on(self, study: Study, trial: Trial, place: int, mine: Point) -> bool:
        """Decide at a rung: by the Pareto rank among all runs that got there."""
        key = f"rung {place}"
        trial.set_user_attr(key, [mine.bytes, mine.score])
        trials = study.get_trials(deepcopy=False)
        others = [t for t in trials if key in t.user_attrs and t.number != trial.number]
        found = [mine, *(Point(0, *other.user_attrs[key]) for other in others)]
        if len(found) < FEW:
            return True
        own, *rest = ranks(found, higher=self.higher)
        return sum(rank < own for rank in rest) < self.config.keep * len(found)

    def _never(self, plain: PlainDict) -> str | None:
        """Say which line of ``tune.never`` some settings hold whole."""
        flat = flatten(plain)
        words = {f"{key.removesuffix('.name')}={shown(value)}" for key, value in flat.items()}
        line = next((line for line in self.config.never if {*line} <= words), None)
        return None if line is None else f"tune.never has [{', '.join(line)}]"

    def _spent(self, trial: Trial, runs: Sequence[Watch], began: float) -> None:
        trial.set_user_attr("bytes", sum(run.bytes for run in runs))
        trial.set_user_attr("core_seconds", time.process_time() - began)


def score_of(row: Mapping[str, object], metric: str) -> float | None:
    """Return what a round or a run measured, NaN if that is no number; None: nothing."""
    found = metrics_of(row)
    for name in (metric, f"{AFTER}{metric}"):
        if name in found:
            score = found[name]
            return float(score) if isinstance(score, float | int) else math.nan
    return None


def done(study: Study) -> list[FrozenTrial]:
    """List the trials that came to an end, whichever."""
    from optuna.trial import TrialState

    return [*study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])]


def _failed(study: Study, number_: int) -> None:
    from optuna.trial import TrialState

    study.tell(number_, state=TrialState.FAIL)


def shown(value: object) -> str:
    """Write a value of a setting."""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
