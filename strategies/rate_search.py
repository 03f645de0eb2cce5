"""Find the learning rate of a run (``local.lr=auto``): a few rounds at each rate of a ladder.

    walk      `FIRST` rounds at a rate, and at its neighbors, a factor `STEP` apart, up or down for
              as long as the training loss is lower: then the best has a worse one on either side
    refine    up to `LONGEST` rounds at the best rate, and at rates half a step above or below it
              in the same way

The rounds are those of the run: its method, optimizer, model, precision and compression, and the
clients that it samples, though fewer a round where more cannot be paid. They are in memory, and
draws are functions of the seed, so that the run is the same as one whose rate was typed. The score
of a rate is the median training loss of the second half of its rounds, of the same clients at every
rate; test data are not looked at. Two rounds at least, for a method that trains factors in turns.

The walk starts at the rate of the rule where it knows the run, else at `first_rate`, both of
`fedraclora.strategies.rate`. If early losses do not tell which rate ends best (`falls_late`), the
rule's rate is taken, unless training fails at it.

A rate that looks best after a few rounds may still diverge later. The run then begins anew at a
lower one (`restart_rate`).
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

from fedraclora.errors import AbsentError, ClientError, ConfigError, DivergenceError
from fedraclora.run.callback import Callback
from fedraclora.run.found_rate import FoundRate
from fedraclora.run.ledger import Row, number
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.rate import falls_late, first_rate, rule_rate
from fedraclora.strategies.server.measuring import EvaluationPlan

STEP = 10**0.5  # between neighbors of the ladder
WIDTH = 8  # rates on either side of the first: four decades
SHARE = 0.15  # of the run's local training, at most
# Trainings of a client that a search has at least; in a shorter run one rate is tried that may do.
LEAST = 50
ROUNDS = 12  # of all clients that the run samples, which a search needs; else fewer clients train
FIRST, LONGEST = 2, 5  # rounds at a rate
NOISE = 0.005  # a smaller relative difference of losses tells nothing
SAFE = 4  # rounds; after fewer, half a step below the best is taken
RISEN = 10  # times the training loss of the first round: the run counts as diverged
WORSE = 2  # times that loss, in the second round: a short run tries a lower rate
NEAR = 0.02  # of the loss of a guess among all classes: such a model has learnt nothing
RESTARTS = 4  # of a run that diverges at the rate that was found
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
        return (RisenLoss(),)

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
        last = self.recorder.ledger.rows[-max(1, rounds // 2) :]
        return statistics.median(number(row, "train_loss") for row in last)


class RateSearch:
    """Searches the ladder.

    Args:
        run: Of which the task may be built, and nothing else.
        first: The rate to begin with.
        trusted: Whether it is tuned well enough to be kept if a few rounds alone speak against it.
        kept: Whether others are tried only if training fails at it.
    """

    def __init__(
        self, run: RunBuilder, first: float, *, trusted: bool = False, kept: bool = False
    ) -> None:
        self.run, self.first, self.trusted, self.kept = run, first, trusted, kept
        self.spent = 0
        cohort, rounds = run.built.cohort, run.config.rounds
        self.total = cohort * rounds
        self.budget = max(SHARE * self.total, LEAST)
        self.clients = max(1, min(cohort, int(self.budget // ROUNDS)))
        if self.total < LEAST:
            self.clients = min(cohort, 2)
        self.rungs: dict[float, Rung] = {}

    def rung(self, place: float) -> Rung:
        """Return a rate of the ladder, made if it is new."""
        if place not in self.rungs:
            rate = float(f"{self.first * STEP**place:.2g}")
            self.rungs[place] = Rung(rate, Probe(self.run, rate, self.clients))
        return self.rungs[place]

    def affordable(self, place: float, rounds: int) -> bool:
        """Return whether a rate can go on to a round."""
        done = self.rungs[place].rounds if place in self.rungs else 0
        return rounds - done <= self.left

    def advance(self, rung: Rung, rounds: int) -> float:
        """Have a rate go on to a round; return its loss there, infinite if it fails before."""
        if rung.probe is None or rung.rounds >= rounds:
            return rung.loss
        ended, before = rounds, rung.rounds
        try:
            rung.losses[rounds] = rung.probe.advance(rounds)
        except FAILURES as error:
            ended = min(rounds, rung.probe.strategy.done + 1)
            rung.failed, rung.probe = f"round {ended}: {type(error).__name__}", None
            rung.error = error
            own = self.run.config.local.is_own and not isinstance(error, DivergenceError)
            if own or isinstance(error, AbsentError):
                raise  # of the user's function, or for want of clients, at whatever rate
        self.spent += (ended - before) * self.clients
        return rung.loss

    @property
    def is_blind(self) -> bool:
        """Return whether clients tell no losses, so that no rate has a score."""
        return any(math.isnan(loss) for r in self.rungs.values() for loss in r.losses.values())

    def run_all(self) -> None:
        """Try what there is room for."""
        if self.total < LEAST:
            self.settle()
            return
        if self.kept and self.advance(self.rung(0), min(LONGEST, self.left)) < math.inf:
            return
        self.walk()
        if self.differs:  # else nothing reads the rate
            self.refine()

    def settle(self) -> None:
        """For a short run: try the first rate, and lower ones as long as it does not train."""
        for place in range(0, -WIDTH - 1, -1):
            rung = self.rung(place)
            before = self.advance(rung, 1)
            if self.advance(rung, FIRST) > WORSE * before:
                rung.failed = rung.failed or f"round {FIRST}: the training loss has risen"
                rung.probe = None
            if not rung.failed or self.is_blind:
                return

    @property
    def differs(self) -> bool:
        """Return whether the rate changes anything."""
        losses = [rung.loss for rung in self.rungs.values()]
        return not all(math.isclose(loss, losses[0], rel_tol=NOISE) for loss in losses)

    def chosen(self) -> float:
        """Return the rate to take: the best, or half a step below it after few rounds.

        Another half where the run cannot begin anew if it diverges later. The first rate if the
        losses do not differ, or if it is trusted and rates had few rounds.
        """
        best, first = self.best(), self.rung(0)
        if self.total < LEAST:
            return best.rate
        few = best.rounds < SAFE
        if not self.differs or (few and self.trusted and not first.failed):
            return first.rate
        halves = few + (not self.run.restartable)
        return float(f"{best.rate / STEP ** (halves / 2):.2g}")

    def walk(self) -> None:
        """Try the first rate and its neighbors, until the best has a worse one on either side."""
        self.advance(self.rung(0), FIRST)
        for way in (1, -1):
            place = 0
            while abs(place + way) <= WIDTH and not self.is_blind:
                if not self.affordable(place + way, FIRST):
                    return
                here, there = self.rung(place), self.rung(place + way)
                better = self.advance(there, FIRST) < here.loss
                if not better and not (way < 0 and (here.failed or there.failed)):
                    break
                place += way

    def refine(self) -> None:
        """Have the best rate go on, and rates half a step apart from it."""
        if (place := self.place()) is None or self.is_blind:
            return
        for rung in self.rungs.values():  # those above it release their memory
            rung.probe = rung.probe if rung.rate <= self.rungs[place].rate else None
        rounds = min(LONGEST, (self.left + FIRST) // 3)  # which three rates can come to
        while rounds > FIRST and self.advance(self.rung(place), rounds) == math.inf:
            place -= 1
            rounds = min(rounds, self.left + self.rung(place).rounds)
        for half in (0.5, -0.5):
            start = place
            while rounds > FIRST and self.affordable(place + half, rounds):
                if self.advance(self.rung(place + half), rounds) >= self.rungs[place].loss:
                    break
                place += half
            if place != start:
                return

    @property
    def left(self) -> int:
        """How many rounds can still be paid."""
        return int((self.budget - self.spent) // self.clients)

    def level(self) -> list[float]:
        """List the places of the rates that have come furthest, the best first.

        None is above a rate that has failed: it would fail, too, if later.
        """
        failed = [place for place, rung in self.rungs.items() if rung.failed]
        sound = {
            p: r for p, r in self.rungs.items() if r.losses and p < min(failed, default=math.inf)
        }
        furthest = max((rung.rounds for rung in sound.values()), default=0)
        return sorted(
            (place for place, rung in sound.items() if rung.rounds == furthest),
            key=lambda place: (sound[place].loss, abs(place), place),
        )

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
    first = rule or first_rate(config, run.built)
    rule = first if config.local.is_own else rule  # which is that of the function
    # The rule of adaptive optimizers follows from six tasks, that of SGD from one.
    trusted = rule is not None and not config.local.is_own and config.local.optimizer != "sgd"
    kept = rule is not None and falls_late(config, run.built)
    search = RateSearch(run, first, trusted=trusted, kept=kept)
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
    ladder = tuple(r.record() for _, r in sorted(search.rungs.items()))
    return FoundRate(search.chosen(), "search", seconds, search.spent, share, ladder)


class RisenLoss(Callback):
    """Count a run as diverged if its training loss rises far above that of its first round."""

    def __init__(self) -> None:
        self.first = math.nan

    @override
    def row(self, row: Row) -> None:
        """Compare the loss of a round.

        Raises:
            DivergenceError: If it is more than `RISEN` times that of the first.
        """
        if "train_loss" not in row:
            return
        loss = number(row, "train_loss")
        self.first = loss if math.isnan(self.first) else self.first
        if loss > RISEN * self.first:
            raise DivergenceError(
                f"round {row['round']}: the training loss has risen from {self.first:.3g} to "
                f"{loss:.3g}; lower local.lr"
            )


def still_note(run: RunBuilder) -> str:
    """Say that a run at a found rate has left its training loss where it was; empty if it has not.

    That is the case if the loss of the second half of its rounds is not below that of its first
    round, or, of one class a sample, stays at that of a guess. Runs of a few trainings are too
    short to tell.
    """
    config, found = run.config, run.found
    losses = [number(row, "train_loss") for row in run.recorder.ledger.rows]
    losses = [loss for loss in losses if math.isfinite(loss)]
    if found is None or run.built.cohort * len(losses) < LEAST:
        return ""
    first, *halves = losses[0], losses[len(losses) // 2 :], losses[-(len(losses) // 4) :]
    last, end = map(statistics.median, halves)
    classes = run.built.classes if run.task.loss == "cross_entropy" else 0
    guess = math.log(max(1, classes))
    guesses = all(math.isclose(loss, guess, rel_tol=NEAR) for loss in (last, end))
    if last < (1 - NOISE) * first and not guesses:
        return ""
    near = f", that of a guess among {classes} classes" if guesses else ""
    risen = last > (1 + NOISE) * first
    other = float(f"{found.rate * STEP ** (-2 if risen else 2):.2g}")
    plain = config.local.optimizer == "sgd" and run.first_instructions.program.plain
    adamw = "local=adamw, or " if plain and not config.local.is_own else ""
    what = "factor on the rate of your function" if config.local.is_own else "learning rate"
    return (
        f"training did not {'improve' if risen else 'move'}: the training loss was {first:.4g} in "
        f"round 1 and {last:.4g} in the second half of the rounds{near}. Try {adamw}another "
        f"{what}, such as local.lr={other:g}"
    )


def restart_rate(run: RunBuilder) -> FoundRate | None:
    """Return the rate at which a run begins anew if it diverges: half a step lower, later a whole.

    None if it ends instead: it has not searched for its rate in this process, does not make its own
    engine, or has begun anew `RESTARTS` times. Under privacy and secure aggregation there is no
    search: a second run would tell more about the clients.
    """
    found = run.found
    if found is None or found.how != "search" or not run.restartable:
        return None
    if len(found.diverged) == RESTARTS:
        return None
    step = STEP if found.diverged else STEP**0.5
    return replace(
        found, rate=float(f"{found.rate / step:.2g}"), diverged=(*found.diverged, found.rate)
    )


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
