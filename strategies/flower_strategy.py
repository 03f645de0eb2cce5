"""The rounds of any method under Flower's own loop: a Flower `Strategy` with all of its hooks.

`Strategy.start` asks a strategy what to send, sends it, and hands the replies back. Here the
messages are those of real hosts (`fedraclora.engines.deploy`): each brings its client's base
weights up to date, and the ClientApp is this project's. Checkpoints, chain and ledger are written
as by `fedraclora deploy`; what Flower's loop lacks is a second attempt at a round that failed.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Sequence

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from typing_extensions import override

from fedraclora.engines.deploy.grid import Answered, DeployGrid, Letter
from fedraclora.errors import ConfigError, WireError
from fedraclora.narrow_weight import dense
from fedraclora.run.ledger import number
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.server.rows import Cost
from fedraclora.wire.exchange import Ask, Came

log = logging.getLogger("flwr")


class FlowerStrategy(Strategy):
    """Runs the rounds of a run that is wired, one at each call of Flower's loop.

    Args:
        rounds: The round loop's strategy, of which single rounds are run here.
        post: Writes its messages, and reads the replies.

    Raises:
        ConfigError: If what is asked first in a round is not what clients train.
    """

    def __init__(self, rounds: FedStrategy, post: DeployGrid) -> None:
        if any(type(s).receive is not RoundStep.receive for s in rounds.steps.steps):
            raise ConfigError(
                "secure=secagg asks clients in stages, which Flower's own loop does not know: run "
                "`fedraclora deploy`, or set secure=none"
            )
        self.rounds, self.post = rounds, post
        self._round: tuple[Exchange, Cost] | None = None
        self._letters: list[Letter] = []
        self._absent: list[Answered] = []

    @override
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Open a round: one message for each of its clients that is connected.

        Args:
            server_round: Counted from the first that this run has left.
            arrays: Not looked at: weights travel as links.
            config: Not looked at: the run has its own.
            grid: Flower's own.
        """
        rounds = self.rounds
        self.post.grid = grid
        if self._round is None:
            rounds.begin(self.post)
        cost = Cost()
        with rounds.saving():
            exchange = rounds.open(rounds.done + 1)
            cost.watch.lap("open")
            self._round = exchange, cost
            seconds = self.post.settings.timeout
            self._letters, self._absent = self.post.letters(exchange.asks, seconds)
        return [letter.message for letter in self._letters]

    @override
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord, MetricRecord]:
        """Close the round: check what came, merge it, measure, and write the row of the ledger.

        A method that wants a second exchange gets it here.

        Returns:
            The effective weights, and the training loss, the failures and the bytes of the round.

        Raises:
            ClientError: If more clients failed than allowed, after a checkpoint.
            WireError: If no round was opened.
        """
        if self._round is None:
            raise WireError("replies came before a round was opened")
        exchange, cost = self._round

        def send(asks: Sequence[Ask]) -> Came:
            return self._answers(replies) if asks is exchange.asks else self.post.ask(asks)

        with self.rounds.saving():
            self.rounds.close(exchange, send, self.post, cost)
        row = self.rounds.recorder.ledger.rows[-1]
        found = {key: number(row, key) for key in ("uplink_bytes", "downlink_bytes")}
        found["failures"] = len(failures) if isinstance(failures := row["failures"], list) else 0
        if row["train_loss"] is not None:
            found["train-loss"] = number(row, "train_loss")
        metrics = MetricRecord({**found})
        weights = dense(self.rounds.method.weights(self.rounds.state, self.rounds.draw))
        return ArrayRecord({n: Array(t.cpu().numpy()) for n, t in weights.items()}), metrics

    def _answers(self, replies: Iterable[Message]) -> list[Answered]:
        """Read the replies to this round's messages; who asks for every weight is asked again."""
        for letter in self._letters:
            self.post.count(letter)
        sent = {letter.message.metadata.message_id: letter for letter in self._letters}
        came = [(reply.metadata.reply_to_message_id, reply) for reply in replies]
        waiting = {name: sent[name] for name, _ in came if name in sent}  # not for who is late
        end = time.monotonic() + self.post.settings.timeout
        return self._absent + self.post.receive(waiting, end, came)

    @override
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Ask nobody: the server measures, where a round is closed."""
        return []

    @override
    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Return what the server has measured in this round; None where it was not due."""
        metrics = self.rounds.recorder.ledger.rows[-1]["metrics"]
        return MetricRecord(metrics) if isinstance(metrics, dict) and metrics else None

    @override
    def summary(self) -> None:
        """Log the method, and where the run stands."""
        log.info("\t%s, after round %d", self.rounds.method, self.rounds.done)
