"""Run federated evaluation after a round: ask clients, and compute the columns of the row."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedraclora.config.build import measured_samples
from fedraclora.config.settings import EvaluateConfig
from fedraclora.data.task import Task
from fedraclora.errors import ClientError, WireError
from fedraclora.evaluation.clients import Floats, scored, spread, sums_named, usual, values_of
from fedraclora.evaluation.metrics import AFTER, Measure
from fedraclora.protocol.method import Cohort, RoundInstructions
from fedraclora.protocol.quantized import FULL
from fedraclora.protocol.uplinks import Refusal
from fedraclora.run.ledger import BY_CLIENTS, Row, number
from fedraclora.run.recorder import Columns, RunRecorder
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.guard import check_reply
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.tree import Layout, difference
from fedraclora.wire.answers import Answer, Came, MeasuredAnswer, NoAnswer
from fedraclora.wire.exchange import Ask
from fedraclora.wire.fields import printable
from fedraclora.wire.reply import ExpectedReply, checked


@dataclass(frozen=True)
class EvaluationPlan:
    """Hold the settings of federated evaluation: which clients, when, and which metrics.

    Attributes:
        asked: The settings.
        measure: The metrics.
        alone: Whether the server has no samples: then a row's metrics are the clients'.
        noisy: Whether only noisy means are kept.
    """

    asked: EvaluateConfig
    measure: Measure
    alone: bool = False
    noisy: bool = False

    @classmethod
    def of(cls, asked: EvaluateConfig, task: Task, *, noisy: bool = False) -> EvaluationPlan | None:
        """Create it from the settings of a run; None if no client measures."""
        if not asked.by_clients:
            return None
        alone = not len(measured_samples(task, asked.split))
        return cls(asked, Measure.of_task(task), alone, noisy)

    @property
    def names(self) -> list[str]:
        """Names of the metrics, the headline first."""
        return [*self.measure.metrics]

    @property
    def pooled(self) -> list[str]:
        """Return the metrics of all samples together that sums give; with noise, of all clients."""
        unknown = [] if self.noisy else scored(self.measure)
        return [name for name in self.names if name not in unknown]

    @property
    def points(self) -> list[str]:
        """Return the prefix of metrics for each point of a round."""
        return ["", AFTER] if self.asked.personal else [""]

    @property
    def named(self) -> list[str]:
        """Return the names that `stop`, studies and tables use: ``clients.accuracy.worst10``."""
        kinds = ["mean"] if self.noisy else spread("", np.zeros(1), 0.0)
        names = [point + name for point in self.points for name in self.names]
        return [f"{BY_CLIENTS}{name}.{kind}" for name in names for kind in kinds]

    def count(self, loop: LoopConfig) -> int:
        """Count the clients that are asked to measure; the mean if their number is random."""
        return loop.clients if self.asked.clients == "all" else loop.cohort

    def due(self, round_: int, rounds: int) -> bool:
        """Check whether clients measure the weights of a round."""
        return round_ % self.asked.clients_every == 0 or round_ == rounds


class Measurement(Exchange):
    """Run one exchange in which clients measure.

    Args:
        measuring: The settings.
        downlink: The downlink from which they begin.
        cohort: The asked clients.
        round_: The round that begins from these weights.
        version: Version of the base weights.
        loop: Settings of the round loop.
        rate_scale: Factor of the step sizes, if they also train.

    Attributes:
        when: Prefix of the names of metrics, by when they are measured.
        summed: The sum, in place of replies; None: there was none.
        beside: Other columns of the row.
    """

    def __init__(
        self,
        measuring: EvaluationPlan,
        downlink: RoundInstructions,
        cohort: Cohort,
        round_: int,
        version: int,
        loop: LoopConfig,
        rate_scale: float,
    ) -> None:
        # Failed clients are named, and do not end the run.
        loop = replace(loop, max_failures=len(cohort), min_clients=1, uplink=FULL, feedback=False)
        super().__init__(downlink, round_, version, cohort, cohort, loop, rate_scale)
        # A first exchange may ask for gradients, which give no weights.
        personal = measuring.asked.personal and downlink.program.trains
        self.when = {"before": ""} | ({"after": AFTER} if personal else {})
        self.measuring, self.measure = measuring, [*self.when][-1]
        self.layout = Layout(())  # known once they have replied
        self.untold = set[int]()  # clients without samples, which is no failure
        self.summed: Row | None = None
        self.beside = Row()
        self.ask()

    def gather(self, send: Callable[[Sequence[Ask]], Came]) -> None:
        """Ask clients and read their replies; an invalid reply counts as a failure.

        Raises:
            ClientError: If one failed and all clients are on this machine.
        """
        silent, why = {*self.cohort.clients.tolist()}, "no answer in time"
        try:
            for ask, answer in send(self.asks):
                silent -= {*ask.clients}
                if isinstance(answer, NoAnswer):
                    self._failed(ask, answer.reason)
                    continue
                try:
                    self._add(ask, answer)
                except Exception as error:  # another machine may send anything
                    self._failed(ask, f"its answer is refused: {error}")
        except ClientError as error:
            if not self.loop.untrusted:
                raise
            why = printable(str(error))
        self._fail(silent, why)
        ordered = sorted(self.replies, key=lambda each: each.first)
        self.replies = [answer for answer in ordered if len(answer.clients)]
        if self.replies:
            self.layout = usual([answer.layout for answer in self.replies])
        for answer in self.replies:
            if answer.layout != self.layout:
                why = f"it sent {difference(answer.layout, self.layout)}"
                self._fail(answer.clients.tolist(), why)
        self.replies = [a for a in self.replies if a.layout == self.layout]
        self.received = sum(a.numbers.nbytes for a in self.replies)

    def _fail(self, clients: Iterable[int], why: str) -> None:
        self.failures += [Refusal(client, why) for client in clients]

    def _failed(self, ask: Ask, why: str) -> None:
        if not self.loop.untrusted:
            raise ClientError(
                f"after round {self.round_ - 1} the clients {ask.clients} could not evaluate: {why}"
            )
        self._fail(ask.clients, printable(why))

    def _add(self, ask: Ask, answer: Answer) -> None:
        """Check a reply against its request, and store it."""
        answer = checked(answer, ask, MeasuredAnswer, ExpectedReply(self.round_, self.version))
        names = sums_named(self.measuring.measure, self.when.values())
        if [name for name, _ in answer.layout.shapes] != (names if len(answer.clients) else []):
            raise WireError(f"it has {answer.layout.shapes}, expected {names}")
        sizes = torch.tensor([answer.layout.size])
        check_reply(answer, ask, self.loop, counts=sizes.expand(len(ask.clients)))
        # If noise covers each client's values, no client may remove those of its chunk.
        finite = self.measuring.noisy or torch.isfinite(answer.numbers).all()
        if self.loop.untrusted and not finite:
            raise WireError("its metrics contain NaN or infinity")
        self.replies.append(answer)
        self.failures += [Refusal(c, why) for c, why in answer.failures.items()]
        self.untold |= {*answer.failures} if self.measuring.noisy else set()

    def columns(self, recorder: RunRecorder, took: Row) -> Row:
        """Return the columns of the ledger, and pass the clients' metrics to the recorder.

        Args:
            recorder: The recorder of the run.
            took: The bytes of the exchange.
        """
        column = self.summed or {}
        if self.replies:
            column, parts = self._described()
            recorder.by_clients += parts
        why = {refusal.client: refusal.reason for refusal in self.failures}
        reasons = sorted((c, reason) for c, reason in why.items() if c not in self.untold)
        failed = [{"client": c, "reason": reason} for c, reason in reasons]
        row: Row = {"clients": column | took | ({"failures": failed} if failed else {})}
        row |= self.beside
        if self.measuring.alone:
            kind = "mean" if self.measuring.noisy else "pooled"
            pooled = [name for name in self.measuring.pooled if name in column]
            row["metrics"] = {name: number(column, name, kind) for name in pooled}
        return row

    def values(self) -> Iterator[tuple[dict[str, Floats], dict[str, float]]]:
        """Compute the metrics of clients and of all samples, of each point of the round."""
        sent = self.layout.unpack(self._joined("numbers"))
        for prefix in self.when.values():
            own = {n: t for n, t in sent.items() if n.startswith(AFTER) == bool(prefix)}
            yield values_of(self.measuring.measure, own, prefix)

    def own(self) -> dict[str, Floats]:
        """Compute the clients' metrics, by the names in the row; empty without clients."""
        if not self.replies:
            names = self.measuring.names
            return {point + n: np.zeros(0) for point in self.when.values() for n in names}
        found = zip(self.when.values(), self.values(), strict=True)
        return {point + n: each for point, (own, _) in found for n, each in own.items()}

    def _described(self) -> tuple[Row, list[Columns]]:
        clients, samples, steps = map(self._joined, ("clients", "samples", "steps"))
        column, parts = Row(), list[Columns]()
        lower = self.measuring.measure.lower
        for (when, prefix), (values, pooled) in zip(self.when.items(), self.values(), strict=True):
            column |= {prefix + n: spread(n, v, pooled[n], lower) for n, v in values.items()}
            counts = {"client": clients, "samples": samples}
            counts["steps"] = steps if prefix else torch.zeros_like(steps)
            row = {"round": np.full(len(clients), self.round_ - 1)}
            row |= {name: numbers.numpy() for name, numbers in counts.items()}
            parts.append(row | {"when": np.full(len(clients), when)} | values)
        return column | {"n": len(clients), "samples": int(samples.sum())}, parts
