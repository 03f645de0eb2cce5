"""Find the learning rate of a run (``local.lr=auto``): a few rounds at each rate of a ladder.

    walk      `FIRST` rounds at a rate, and at its neighbors, a factor `STEP` apart, up or down for
              as long as the training loss is lower: then the best has a worse one on either side
    race      the best goes on for longer, and its upper neighbor: what a large rate loses in the
              first rounds it often makes up for, and what diverges does so by then. The lower
              neighbor, if there is room, and lower ones, as long as they are better
    between   half a step above the best, if there is room

The rounds are those of the run: its method, optimizer, model, precision and compression, and the
clients that it samples, though fewer a round where more cannot be paid. They are in memory, and
draws are functions of the seed, so that the run is the same as one whose rate was typed. The score
of a rate is the mean training loss of the last third of its rounds, of the same clients at every
rate; test data are not looked at. Two rounds at least, for a method that trains factors in turns.

The walk starts at the rate of the rule (`fedraclora.strategies.rate`) where it knows the run.
"""

from __future__ import annotations

import copy
import logging
import math
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from typing_extensions import override

from fedraclora.errors import ClientError, ConfigError, DivergenceError
from fedraclora.run.callback import Callback
from fedraclora.run.found_rate import FoundRate
from fedraclora.run.ledger import number
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.rate import rule_rate
from fedraclora.strategies.server.measuring import EvaluationPlan

STEP = 10**0.5  # between neighbors of the ladder
WIDTH = 8  # rates on either side of the first: four decades
SHARE = 0.15  # of the run's local training, at most
LEAST = 12  # trainings of a client that a search has where no rule knows the run
FIRST = 2  # rounds at a rate of the walk
# The most rounds at a rate, and the least share of the run's clients of a round with which they
# tell something: means of fewer clients are noisier, and bear smaller rates only. A search takes
# about `RUNS` times as many rounds in all.
LENGTHS = {32: 1.0, 16: 1.0, 8: 0.5, 4: 0.2, 2: 0.0}
RUNS = 2.5
HOPELESS = 4  # times the best loss: a rate is too large
NOISE = 1.01  # times another loss: no difference
RISEN = 2  # times its own first loss: a rate diverges
LEVEL = 1.2  # times the best loss: a neighbor is as good, and what lies between at least so
SAFE = 6  # rounds; after fewer, half a step below the best is taken
# Where no rule knows the run: SGD; adaptive optimizers, whose steps have about the length of the
# rate; a function of the user's, whose own rate is multiplied.
FIRST_RATES = {"sgd": 0.1, "own": 1.0}
FIRST_ADAPTIVE = 0.003
# What a rate that is too large ends in.
FAILURES = (ClientError, ArithmeticError, torch.linalg.LinAlgError)  # type: ignore[attr-defined]


@dataclass
class Rung:
    """One rate of the ladder.

    Attributes:
        rate: It.
        probe: The run at this rate; None once it has failed or is not needed any more.
        losses: The training loss of its weights, by the number of rounds that made them.
        failed: Why it cannot be taken; empty where it can.
        error: What was raised then.
    """

    rate: float
    probe: Probe | None
    losses: dict[int, float] = field(default_factory=dict)
    failed: str = ""
    error: Exception | None = None

    @property
    def rounds(self) -> int:
        """How far it has come."""
        return max(self.losses, default=0)

    @property
    def loss(self) -> float:
        """The last loss; infinite where there is none."""
        return math.inf if self.failed or not self.losses else self.losses[self.rounds]

    def fail(self, why: str) -> None:
        """Leave it out from now on."""
        self.failed, self.probe = why, None

    def record(self) -> dict[str, object]:
        """Return what the run's folder keeps of it, as JSON values."""
        found: dict[str, object] = {"rate": self.rate, "losses": self.losses}
        return found | ({"failed": self.failed} if self.failed else {})


class Probe(RunBuilder):
    """The first rounds of a run at one rate, in memory: nothing is measured, written or told.

    Args:
        run: The run, whose task and plan are shared.
        rate: The rate.
        clients: Of a round.
    """

    def __init__(self, run: RunBuilder, rate: float, clients: int) -> None:
        config = run.config.at_rate(rate)
        given = copy.deepcopy([*run.given_steps])
        name = f"{len(run.probed):02d}"
        run.probed.append(name)
        super().__init__(config, steps=given, engine=run.probing(name))
        self.found = FoundRate(rate, "probe")
        self.built = replace(run.built, cohort=clients)
        self.plan = run.plan

    @cached_property
    @override
    def callbacks(self) -> Sequence[Callback]:
        return ()

    @cached_property
    @override
    def measuring(self) -> EvaluationPlan | None:
        return None

    @cached_property
    @override
    def recorder(self) -> RunRecorder:
        return RunRecorder(None, store=self.store)

    def advance(self, rounds: int) -> float:
        """Run to the end of a round, and return the training loss of the last rounds."""
        # Neither a warm-up nor the end of a schedule tells how large steps may be.
        self.strategy.rate_scale = lambda _round, _rounds: 1.0
        self.strategy.run(self.grid, rounds)
        last = self.recorder.ledger.rows[-max(1, rounds // 3) :]
        return statistics.fmean(number(row, "train_loss") for row in last)


class RateSearch:
    """Searches the ladder.

    Args:
        run: Of which the task may be built, and nothing else.
        first: The rate to begin with.
        known: Whether it is that of a rule, and so not far off.
    """

    def __init__(self, run: RunBuilder, first: float, *, known: bool) -> None:
        self.run, self.first, self.spent = run, first, 0
        cohort, rounds = run.built.cohort, run.config.rounds
        self.total = cohort * rounds
        self.budget = max(SHARE * self.total, 0 if known else LEAST)
        self.longest, self.clients = FIRST, 1
        for longest, least in LENGTHS.items():
            clients = min(cohort, int(self.budget // (RUNS * longest)))
            if longest <= rounds and clients >= max(1, least * cohort):
                self.longest, self.clients = longest, clients
                break
        if not known:  # a wide ladder
            self.clients = min(self.clients, max(1, int(self.budget // (WIDTH * FIRST))))
        # Few rounds of one client or two say less than a rule does.
        self.rich = self.longest > FIRST or not known
        if not self.rich:
            self.clients = min(cohort, 2)
        self.rungs: dict[float, Rung] = {}

    def rung(self, place: float) -> Rung:
        """Return a rate of the ladder, made if it is new."""
        if place not in self.rungs:
            rate = self.rate_at(place)
            self.rungs[place] = Rung(rate, Probe(self.run, rate, self.clients))
        return self.rungs[place]

    def rate_at(self, place: float) -> float:
        """Return the rate so many steps above the first."""
        return float(f"{self.first * STEP**place:.2g}")

    def affordable(self, rungs: Sequence[Rung], rounds: int) -> bool:
        """Return whether all of some rates can go on to a round."""
        more = sum(rounds - rung.rounds for rung in rungs if not rung.failed)
        return self.spent + more * self.clients <= self.budget

    def advance(self, rung: Rung, rounds: int) -> float:
        """Have a rate go on to a round; return its loss there, infinite if it fails before."""
        if rung.probe is None or rung.rounds >= rounds:
            return rung.loss
        ended, before = rounds, rung.rounds
        try:
            rung.losses[rounds] = rung.probe.advance(rounds)
        except FAILURES as error:
            ended = rung.probe.strategy.done + 1
            rung.fail(f"round {ended}: {type(error).__name__}")
            rung.error = error
            if self.run.config.local.is_own and not isinstance(error, DivergenceError):
                raise  # of the user's function, at whatever rate
        self.spent += (ended - before) * self.clients
        if rung.loss > RISEN * next(iter(rung.losses.values()), math.inf):
            rung.fail(f"round {ended}: its training loss has risen")
        return rung.loss

    @property
    def is_blind(self) -> bool:
        """Return whether clients tell no losses, so that no rate has a score."""
        return any(math.isnan(loss) for r in self.rungs.values() for loss in r.losses.values())

    def run_all(self) -> None:
        """Try what there is room for."""
        if not self.rich:
            self.settle()
            return
        self.walk()
        if self.differs and not self.is_blind:  # else nothing reads the rate
            self.race()

    def settle(self) -> None:
        """For a short run: try the first rate, and lower ones as long as it does not train."""
        for place in range(0, -WIDTH - 1, -1):
            self.advance(self.rung(place), FIRST)
            if not self.rungs[place].failed or self.is_blind:
                return

    @property
    def tried(self) -> list[Rung]:
        """The rates that were tried, from the lowest."""
        return [rung for _, rung in sorted(self.rungs.items()) if rung.losses or rung.failed]

    @property
    def differs(self) -> bool:
        """Return whether the rate changes anything."""
        losses = [rung.loss for rung in self.tried]
        return not all(math.isclose(loss, losses[0], rel_tol=1e-6) for loss in losses)

    def chosen(self) -> float:
        """Return the rate to take: the best, or between it and a neighbor that is as good.

        Lower than any that failed, since next to it another client or a later round may fail, too:
        half a step where these were rounds of all clients that the run samples, else a step. Half
        a step below the best where rounds were few.
        """
        best, (place, *others) = self.best(), self.level()
        if not self.differs:
            return self.first
        if not self.rich:
            return best.rate
        near = [
            p for p in others if abs(p - place) <= 1 and self.rungs[p].loss <= LEVEL * best.loss
        ]
        place = (place + near[0]) / 2 if near else place
        place -= 0 if best.rounds >= SAFE else 0.5
        whole = best.rounds >= SAFE and self.clients == self.run.built.cohort
        failed = min((p for p, rung in self.rungs.items() if rung.failed), default=math.inf)
        return self.rate_at(min(place, failed - (0.5 if whole else 1)))

    def walk(self) -> None:
        """Try the first rate and its neighbors, until the best has a worse one on either side."""
        self.advance(self.rung(0), FIRST)
        for way in (1, -1):
            place = 0
            while abs(place + way) <= WIDTH and not self.is_blind:
                here, there = self.rung(place), self.rung(place + way)
                if not self.affordable([there], FIRST):
                    return
                better = self.advance(there, FIRST) < here.loss * NOISE**way
                if not self.differs:
                    return
                if not better and not (way < 0 and here.failed):
                    break
                place += way

    def race(self) -> None:
        """Have the best rate and its neighbors go on, as far as two of them can."""
        if (place := self.place()) is None:
            return
        rounds = self.common([place, place + 1], self.longest)
        while self.advance(self.rung(place), rounds) == math.inf and place > -WIDTH:
            place -= 1
            rounds = self.common([place, place + 0.5], rounds, SAFE)
            rounds = self.common([place], rounds)
        above, first = self.rung(place + 1), self.rung(place).losses.get(FIRST, math.inf)
        if above.loss <= HOPELESS * first:
            self.go_on(place + 1, rounds)
        if above.failed:
            self.go_on(place + 0.5, rounds)
        while self.go_on(place - 1, rounds) and self.place() == place - 1 > -WIDTH:
            place -= 1

    def common(self, places: Sequence[float], most: int, least: int = FIRST) -> int:
        """Return how far some rates can go on."""
        rungs = [self.rung(place) for place in places]
        return next(n for n in range(most, 0, -1) if n <= least or self.affordable(rungs, n))

    def go_on(self, place: float, rounds: int) -> bool:
        """Have a rate go on to a round, if there is room; return whether there is."""
        if room := self.affordable([self.rung(place)], rounds):
            self.advance(self.rung(place), rounds)
        return room

    def level(self) -> list[float]:
        """List the places of the rates that have come furthest, the best first.

        Of rates whose losses do not differ, the largest is.
        None is above a rate that has failed: it would fail, too, if later.
        """
        failed = [place for place, rung in self.rungs.items() if rung.failed]
        sound = {
            p: r for p, r in self.rungs.items() if r.losses and p < min(failed, default=math.inf)
        }
        furthest = max((rung.rounds for rung in sound.values()), default=0)
        losses = {place: rung.loss for place, rung in sound.items() if rung.rounds == furthest}
        least = NOISE * min(losses.values(), default=0.0)
        return sorted(losses, key=lambda place: (max(losses[place], least), -place))

    def place(self) -> float | None:
        """Return the place of the best rate; None if none trains."""
        return next(iter(self.level()), None)

    def best(self) -> Rung:
        """Return the best rate.

        Raises:
            ClientError: If none trains.
        """
        if (place := self.place()) is None:
            lowest = min(self.rungs.values(), key=lambda rung: rung.rate)
            if lowest.error is not None:  # which a lower rate does not mend
                raise lowest.error
            raise ClientError(
                f"local.lr=auto: no learning rate from {lowest.rate:g} on trains. Set "
                "local.lr=NUMBER"
            )
        return self.rungs[place]


def find_rate(run: RunBuilder) -> FoundRate:
    """Find the learning rate of a run.

    Args:
        run: A new run, of which nothing but the task is built yet.

    Raises:
        ConfigError: If clients tell no training loss, and no rule knows the run.
        ClientError: If clients fail at every rate.
    """
    began = time.perf_counter()
    config, rule = run.config, rule_rate(run.config, run.built)
    kind = "own" if config.local.is_own else config.local.optimizer
    rule = FIRST_RATES[kind] if config.local.is_own else rule  # which is that of the function
    first = rule or FIRST_RATES.get(kind, FIRST_ADAPTIVE)
    search = RateSearch(run, first, known=rule is not None)
    if not search.total:  # no round reads it
        return FoundRate(search.first, "rule")
    # Of sums from the same weights, the server could take differences.
    hidden = config.veiled or config.local.answers_once
    if not hidden:
        with quiet():
            search.run_all()
    if hidden or search.is_blind:
        if rule is None:
            raise ConfigError(
                "local.lr=auto: clients tell no training loss, by which a rate is chosen, and "
                "there is no rule for such a run; say local.lr=NUMBER"
            )
        return FoundRate(rule, "rule")
    seconds, share = time.perf_counter() - began, search.spent / search.total
    ladder = tuple(rung.record() for rung in search.tried)
    return FoundRate(search.chosen(), "search", seconds, search.spent, share, ladder)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep warnings of rates that are too large from being shown."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logging.disable(before)
