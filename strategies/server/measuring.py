"""Clients measure what a round has made, on samples of their own: whom to ask, and the row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedraclora.config.build import measured_samples
from fedraclora.config.settings import EvaluateConfig
from fedraclora.data.task import Task
from fedraclora.errors import ClientError, WireError
from fedraclora.evaluation.clients import AFTER, ClientMeasure, spread, usual
from fedraclora.protocol.method import Downlink
from fedraclora.protocol.recipes import RECIPES
from fedraclora.run.by_clients import Columns
from fedraclora.run.ledger import BY_CLIENTS, Row, number
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.server.guard import check_reply
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.tree import Layout, difference
from fedraclora.wire.exchange import (
    DTYPES,
    Answer,
    Ask,
    Came,
    NoAnswer,
    TrainRequest,
    payload_bytes,
    sent_tensors,
)
from fedraclora.wire.fields import printable
from fedraclora.wire.reply import checked


@dataclass(frozen=True)
class Measuring:
    """Which clients measure when, and what they send.

    Attributes:
        asked: The settings.
        measure: What they send.
        alone: Whether the server has no samples: then the metrics of a row are theirs.
    """

    asked: EvaluateConfig
    measure: ClientMeasure
    alone: bool = False

    @classmethod
    def of(cls, asked: EvaluateConfig, task: Task) -> Measuring | None:
        """Make it of the settings of a run; None where no client measures."""
        if not asked.by_clients:
            return None
        return cls(asked, ClientMeasure.of(task), not len(measured_samples(task, asked.split)))

    @property
    def names(self) -> list[str]:
        """Names of the metrics, the headline first."""
        return [*self.measure.measure.metrics]

    @property
    def named(self) -> list[str]:
        """The same as `stop`, studies and tables name them: ``clients.accuracy.worst10``."""
        points = ["", AFTER] if self.asked.personal else [""]
        kinds = spread("", np.zeros(1), 0.0)
        return [f"{BY_CLIENTS}{p}{n}.{kind}" for p in points for n in self.names for kind in kinds]

    def due(self, round_: int, rounds: int) -> bool:
        """Check whether they measure the weights that a round has made."""
        return round_ % self.asked.clients_every == 0 or round_ == rounds

    def who(self, cohort: torch.Tensor, clients: int) -> torch.Tensor:
        """Choose who is asked: ids, int64, ascending."""
        return torch.arange(clients) if self.asked.clients == "all" else cohort


@dataclass
class Measurement:
    """One exchange in which clients measure.

    Attributes:
        measuring: What they send.
        downlink: From which they begin.
        clients: Who is asked, int64 [K].
        round_: The round that begins from these weights.
        version: Of the base weights.
        loop: Settings of the round loop.
        rate_scale: Of the step sizes, where they train, too.
        answers: That came and can be used, in the order of clients.
        failures: Why others have measured nothing, by id.
        summed: What came of a secure sum, in place of answers; None: there was none.
        received: The bytes of the vectors that were summed.
    """

    measuring: Measuring
    downlink: Downlink
    clients: torch.Tensor
    round_: int
    version: int
    loop: LoopConfig
    rate_scale: float
    answers: list[Answer] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    summed: Row | None = None
    received: int = 0

    def __post_init__(self) -> None:
        """Write what is asked of each chunk of clients."""
        loop, clients = self.loop, self.clients
        # What clients are first asked for may be gradients, of which no weights come.
        personal = self.measuring.asked.personal and RECIPES[self.downlink.recipe].steps
        self.when = {"before": ""} | ({"after": AFTER} if personal else {})
        self.layout = Layout(())  # known once they have answered
        request = TrainRequest(
            self.round_, self.version, self.rate_scale, clients, measure=[*self.when][-1]
        )
        downlink = self.downlink.to(DTYPES[loop.dtype])
        own = any(each for _, each in sent_tensors(downlink).values())
        self.asks = [
            Ask(
                replace(request, clients=clients[first : first + loop.chunk], first=first),
                downlink,
                loop.downlink,
                own or downlink.ranks is not None,
            )
            for first in range(0, len(clients), loop.chunk)
        ]

    def collect(self, send: Callable[[Sequence[Ask]], Came]) -> None:
        """Ask, and read what comes; what cannot be used is a failure of its clients.

        Raises:
            ClientError: If one failed where all are this machine's.
        """
        silent = {c for ask in self.asks for c in ask.clients}
        try:
            for ask, answer in send(self.asks):
                silent -= {*ask.clients}
                if isinstance(answer, NoAnswer):
                    self._failed(ask, answer.reason)
                    continue
                try:
                    self._take(ask, answer)
                except Exception as error:  # whatever another machine may send
                    self._failed(ask, f"its answer is refused: {error}")
        except ClientError as error:
            if not self.loop.guarded:
                raise
            self.failures |= dict.fromkeys(sorted(silent), printable(str(error)))
        else:
            self.failures |= dict.fromkeys(sorted(silent), "no answer in time")
        came = sorted(self.answers, key=lambda each: each.first)
        self.answers = [answer for answer in came if len(answer.clients)]
        if self.answers:
            self.layout = usual([answer.layout for answer in self.answers])
            for answer in self.answers:
                if answer.layout != self.layout:
                    why = f"it sent {difference(answer.layout, self.layout)}"
                    self.failures |= dict.fromkeys(answer.clients.tolist(), why)
            self.answers = [a for a in self.answers if a.layout == self.layout]

    def _failed(self, ask: Ask, why: str) -> None:
        if not self.loop.guarded:
            raise ClientError(
                f"after round {self.round_ - 1} the clients {ask.clients} could not measure: {why}"
            )
        self.failures |= dict.fromkeys(ask.clients, printable(why))

    def _take(self, ask: Ask, answer: Answer) -> None:
        """Check an answer against its ask, and keep it."""
        if (answer.round_, answer.version) != (self.round_, self.version):
            raise WireError(
                f"it is of round {answer.round_} and version {answer.version}, but "
                f"{self.round_} and {self.version} were asked for"
            )
        names, loop = self.measuring.measure.names(self.when.values()), self.loop
        if [name for name, _ in answer.layout.shapes] != (names if len(answer.clients) else []):
            raise WireError(f"it has {answer.layout.shapes}; {names} are wanted")
        answer, sizes = checked(answer, answer.layout), torch.tensor([answer.layout.size])
        loop, counts = replace(loop, dtype="float64"), sizes.expand(len(ask.clients))
        check_reply(answer, ask.clients, ask.request.first, loop, reduced=False, counts=counts)
        if loop.guarded and not torch.isfinite(answer.numbers).all():
            raise WireError("what it measured has a NaN or an infinity")
        self.answers.append(answer)
        self.failures |= answer.failures

    @property
    def bytes(self) -> tuple[int, int]:
        """Payload of all clients that were asked: of their sums, and of what they were sent."""
        up = self.received + 8 * self.layout.size * sum(
            len(answer.clients) for answer in self.answers
        )
        _, kind = self.loop.kinds
        return up, payload_bytes(self.downlink, len(self.clients), kind) * len(self.clients)

    def columns(self, recorder: RunRecorder, took: dict[str, int]) -> Row:
        """Give the columns of the ledger, and hand what single clients measured to the recorder.

        Args:
            recorder: Of the run.
            took: The bytes of it.
        """
        column = self.summed or {}
        if self.answers:
            column, parts = self._described()
            recorder.by_clients.parts += parts
        failed = [{"client": c, "reason": why} for c, why in sorted(self.failures.items())]
        row: Row = {"clients": column | took | ({"failures": failed} if failed else {})}
        if self.measuring.alone:
            row["metrics"] = {n: known(column, n) for n in self.measuring.names if n in column}
        return row

    def _described(self) -> tuple[Row, list[Columns]]:
        def joined(name: str) -> torch.Tensor:
            return torch.cat([getattr(answer, name) for answer in self.answers])

        clients, samples, steps = map(joined, ("clients", "samples", "steps"))
        sent = self.layout.unpack(joined("numbers"))
        column, parts = Row(), list[Columns]()
        lower = self.measuring.measure.measure.lower
        for when, prefix in self.when.items():
            own = {n: t for n, t in sent.items() if n.startswith(AFTER) == bool(prefix)}
            values, pooled = self.measuring.measure.values(own, prefix)
            column |= {prefix + n: spread(n, v, pooled[n], lower) for n, v in values.items()}
            told = {"client": clients, "samples": samples}
            told["steps"] = steps if prefix else torch.zeros_like(steps)
            row = {"round": np.full(len(clients), self.round_ - 1)}
            row |= {name: numbers.numpy() for name, numbers in told.items()}
            parts.append(row | {"when": np.full(len(clients), when)} | values)
        return column | {"n": len(clients), "samples": int(samples.sum())}, parts


def known(column: Row, metric: str) -> float:
    """Give a metric of all samples together; where sums do not tell it, its mean over clients."""
    pooled, mean = (number(column, metric, key) for key in ("pooled", "mean"))
    return pooled if math.isfinite(pooled) else mean
