"""The one Flower `Strategy`: it drives any method over any grid.

Flower's own loop starts at round 1, has no place for retries or checkpoints and goes on when
clients fail, so `start` is overridden once; it uses public `Grid` calls only. What Flower passes
around as ``arrays`` is a version token: weights live in the method's state and in replicas.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy
from typing_extensions import override

from fedraclora.aggregate import Aggregator, Refusal, Uplinks, check_rows, mean_aggregator, too_many
from fedraclora.chain import CatchUp
from fedraclora.errors import ClientError, WireError
from fedraclora.method import Cohort, Downlink, Draw, Method, State
from fedraclora.optimiser import LocalConfig
from fedraclora.replica import Replica
from fedraclora.runbook import RunBook, Stopwatch
from fedraclora.sampling import client_weights, draw_cohort
from fedraclora.steps import effective_step
from fedraclora.tree import Layout, Tree
from fedraclora.wire import Order, Reply, pack_downlink, payload_bytes, unpack_trial

log = logging.getLogger(__name__)
Row = dict[str, object]


@dataclass(frozen=True)
class LoopConfig:
    """Settings of the round loop.

    Attributes:
        rounds: Rounds to run in all.
        clients: Size of the population.
        cohort: Clients per round.
        chunk: Clients per train message.
        seed: Of the run.
        weights: ``examples`` or ``uniform``.
        dtype: Of numbers on the wire, that of the base weights.
        evaluate_every: Rounds between evaluations; the last round is always evaluated.
        max_failures: Clients that may fail in a round before the run stops.
        timeout: Seconds to wait for the replies of a round.
    """

    rounds: int
    clients: int
    cohort: int
    chunk: int
    seed: int
    weights: str = "examples"
    dtype: str = "float32"
    evaluate_every: int = 1
    max_failures: int = 0
    timeout: float = 3600.0


@dataclass
class Exchange:
    """One downlink and what came back."""

    downlink: Downlink
    layout: Layout
    replies: list[Reply] = field(default_factory=list)
    failures: list[Refusal] = field(default_factory=list)


class FedStrategy(Strategy):
    """Runs a method round by round.

    Args:
        method: The algorithm.
        state: Its state before the next round.
        local: Local settings, for the step size that the ledger logs and clients are told.
        loop: Settings of the loop.
        replica: Where new base weights are published.
        evaluate: Gives the metrics of dense weights.
        book: Ledger, chain and checkpoints.
        aggregator: What happens between the checks and the method.
        on_round: Called with each new ledger row.
    """

    def __init__(
        self,
        method: Method,
        state: State,
        local: LocalConfig,
        loop: LoopConfig,
        *,
        replica: Replica,
        evaluate: Callable[[Tree], dict[str, float]] | None,
        book: RunBook,
        aggregator: Aggregator = mean_aggregator,
        on_round: Callable[[Row], None] | None = None,
    ) -> None:
        self.method, self.state, self.local, self.loop = method, state, local, loop
        self.replica, self.evaluate, self.book = replica, evaluate, book
        self.aggregator, self.on_round = aggregator, on_round
        self.draw = Draw(loop.seed)
        self.catch_up = CatchUp(state.base, loop.clients)
        self.done = 0
        self._cohort = Cohort(torch.zeros(0, dtype=torch.int64), torch.zeros(0))
        self._exchange = Exchange(Downlink(), Layout(()))

    def resume(self, state: State, done: int) -> None:
        """Go on after round ``done`` from a restored state (`catch_up` is restored in place)."""
        self.state, self.done = state, done

    @override
    def start(  # type: ignore[override]
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        **_: object,
    ) -> Result:
        """Run the rounds that are left.

        Args:
            grid: Where clients run.
            initial_arrays: Ignored: the state holds the weights.
            num_rounds: Last round; None = ``loop.rounds``.
            timeout: Seconds per exchange; None = ``loop.timeout``.

        Returns:
            Flower's result, with the effective weights as arrays.

        Raises:
            ClientError: If more clients failed than allowed; a checkpoint was written before.
        """
        del initial_arrays
        self.replica.publish(self.state.base, self.catch_up.version)
        result = Result()
        if self.done == 0:
            self._initial_row()
        for round_ in range(self.done + 1, (num_rounds or self.loop.rounds) + 1):
            try:
                metrics = self._round(grid, round_, timeout or self.loop.timeout)
            except (ClientError, WireError):
                self.book.save(self.state, self.done, self.catch_up)
                raise
            result.train_metrics_clientapp[round_] = metrics
        self.book.save(self.state, self.done, self.catch_up)
        weights = self.method.weights(self.state, self.draw)
        result.arrays = ArrayRecord({n: Array(t.cpu().numpy()) for n, t in weights.items()})
        return result

    def _initial_row(self) -> None:
        """Write row 0: the metrics of the initial weights."""
        self.book.begin(self.state)
        metrics = self._metrics()
        row: Row = {"round": 0, "metrics": metrics, "uplink_total": 0, "downlink_total": 0}
        row["notes"] = list(self.state.notes)
        self._publish_row(row)

    def _round(self, grid: Grid, round_: int, timeout: float) -> MetricRecord:
        """Run one round: exchanges until the method closes it, then evaluate and write."""
        watch = Stopwatch()
        version = ArrayRecord({"version": Array(np.array([self.catch_up.version]))})
        messages = list(self.configure_train(round_, version, ConfigRecord(), grid))
        fetched = int(self.catch_up.fetch(self._cohort.clients).sum())
        watch.lap("open")
        up = down = 0
        while True:
            replies = grid.send_and_receive(messages, timeout=timeout)
            watch.lap("train")
            got = self._collect(round_, replies)
            sent = self._exchange.downlink
            itemsize = torch.finfo(got.stacked.dtype).bits // 8 if got.stacked is not None else 0
            up += self._exchange.layout.size * itemsize * len(got.clients)
            down += payload_bytes(sent, len(self._cohort), itemsize) * len(self._cohort)
            got = self.aggregator(got)
            again = self.method.next_exchange(self.state, sent, got)
            if again is None:
                break
            messages = self._messages(again, round_, grid)
        self.state = self.method.close_round(self.state, sent, got)
        self.catch_up.add(self.state.link)
        self.replica.publish(self.state.base, self.catch_up.version)
        self.done = round_
        watch.lap("close")
        due = round_ % self.loop.evaluate_every == 0 or round_ == self.loop.rounds
        metrics = self._metrics() if due else {}
        watch.lap("evaluate")
        row = self._row(round_, metrics, (up, down, fetched))
        self.book.link(round_, self.state.link)
        if self.book.due(round_):
            self.book.save(self.state, round_, self.catch_up)
        watch.lap("write")
        row["seconds"] = watch.laps
        self._publish_row(row)
        return MetricRecord({"train-loss": float(str(row["train_loss"]))})

    def _metrics(self) -> dict[str, float]:
        if self.evaluate is None:
            return {}
        return self.evaluate(self.method.weights(self.state, self.draw))

    def _publish_row(self, row: Row) -> None:
        self.book.append(row)
        if self.on_round is not None:
            self.on_round(row)

    def _row(self, round_: int, metrics: dict[str, float], moved: tuple[int, int, int]) -> Row:
        """Build the ledger row of a round; ``moved``: bytes up, down, and caught up."""
        up, down, fetched = moved
        replies, sent = self._exchange.replies, self._exchange.downlink
        losses = torch.cat([r.losses for r in replies])
        last = self.book.totals()
        factor = self.local.factor(round_, self.loop.rounds)
        return {
            "round": round_,
            "metrics": metrics,
            "train_loss": float(losses.mean()),
            "cohort": len(self._cohort),
            "failures": [vars(f) for f in self._exchange.failures],
            "uplink_bytes": up,
            "downlink_bytes": down,
            "catchup_bytes": fetched,
            "uplink_total": last[0] + up,
            "downlink_total": last[1] + down + fetched,
            "effective_step": effective_step(sent, self.local, factor),
            "report": self.state.report,
            "notes": [*self.state.notes, *(n for r in replies for n in r.notes)],
        }

    @override
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Draw the cohort, open the round, and write one message per chunk."""
        del arrays, config
        loop = self.loop
        clients = draw_cohort(loop.seed, server_round, loop.clients, loop.cohort)
        self._cohort = Cohort(clients, torch.ones(len(clients), dtype=torch.float64))
        downlink = self.method.open_round(self.state, server_round, self._cohort, self.draw)
        return self._messages(downlink, server_round, grid)

    def _messages(self, downlink: Downlink, round_: int, grid: Grid) -> list[Message]:
        slots = downlink.uploaded()
        layout = Layout(tuple((n, s.shape) for n, s in slots.items()))
        self._exchange = Exchange(downlink, layout)
        nodes = list(grid.get_node_ids())
        factor = self.local.factor(round_, self.loop.rounds)
        messages = []
        for i, first in enumerate(range(0, len(self._cohort), self.loop.chunk)):
            places = slice(first, first + self.loop.chunk)
            clients = self._cohort.clients[places]
            order = Order(round_, self.catch_up.version, factor, clients)
            content = pack_downlink(downlink, order, places, self.loop.dtype)
            node = nodes[i % len(nodes)]
            messages.append(
                Message(content, node, "train.cohort", group_id=str(round_), ttl=self.loop.timeout)
            )
        return messages

    def _collect(self, round_: int, replies: Iterable[Message]) -> Uplinks:
        """Read, check and sort the replies of an exchange.

        Raises:
            ClientError: If more clients failed than allowed, or none is left.
        """
        exchange = self._exchange
        for message in replies:
            if message.has_error():
                raise ClientError(f"round {round_}: a train message failed: {message.error.reason}")
            reply = unpack_trial(message.content, exchange.layout)
            if reply.round_ != round_:
                raise WireError(f"a reply of round {reply.round_} came in round {round_}")
            exchange.replies.append(reply)
            exchange.failures += [Refusal(c, r) for c, r in reply.failures.items()]
        exchange.replies.sort(key=lambda r: int(r.clients[0]) if len(r.clients) else -1)
        parts = exchange.replies
        clients = torch.cat([r.clients for r in parts])
        rows, losses = torch.cat([r.rows for r in parts]), torch.cat([r.losses for r in parts])
        weights = client_weights(self.loop.weights, torch.cat([r.samples for r in parts]))
        self._check_ids(round_, clients)
        refused = check_rows(clients, weights, losses, rows)
        exchange.failures += refused
        if len(exchange.failures) > self.loop.max_failures or len(refused) == len(clients):
            raise too_many(exchange.failures, round_, self.loop.max_failures)
        if refused:
            bad = torch.tensor([r.client for r in refused])
            keep = ~torch.isin(clients, bad)
            clients, rows, weights = clients[keep], rows[keep], weights[keep]
        versions = torch.full_like(clients, self.catch_up.version)
        return Uplinks(clients, weights, exchange.layout, rows, versions=versions)

    def _check_ids(self, round_: int, clients: torch.Tensor) -> None:
        """Hold the clients that answered against the cohort: each once, none else, none silent."""
        failed = torch.tensor([f.client for f in self._exchange.failures], dtype=torch.int64)
        answered = torch.cat([clients, failed]).sort().values
        if torch.equal(answered, self._cohort.clients):
            return
        missing = set(self._cohort.clients.tolist()) - set(answered.tolist())
        if len(answered) != len(answered.unique()) or not torch.isin(
            answered, self._cohort.clients
        ).all():
            raise WireError(
                f"round {round_}: clients {answered.tolist()} answered, each of "
                f"{self._cohort.clients.tolist()} was wanted once"
            )
        self._exchange.failures += [Refusal(c, "no reply in time") for c in sorted(missing)]

    @override
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Close a round that `configure_train` opened (Flower's own loop calls this)."""
        got = self.aggregator(self._collect(server_round, replies))
        self.state = self.method.close_round(self.state, self._exchange.downlink, got)
        self.catch_up.add(self.state.link)
        self.replica.publish(self.state.base, self.catch_up.version)
        self.done = server_round
        token = ArrayRecord({"version": Array(np.array([self.catch_up.version]))})
        return token, MetricRecord({"clients": len(got.clients)})

    @override
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation is the server's: no messages."""
        del server_round, arrays, config, grid
        return []

    @override
    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Evaluation is the server's: nothing to aggregate."""
        del server_round, replies
        return None

    @override
    def summary(self) -> None:
        """Log what runs."""
        log.info("%s, %s", self.method, self.loop)
