"""What Flower's `Strategy` asks for and this project leaves to the server."""

from __future__ import annotations

from collections.abc import Iterable

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from typing_extensions import override


class OwnLoop(Strategy):
    """A strategy with a `start` of its own, which closes rounds and measures weights itself."""

    @override
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Flower's own loop would ask; `start` closes its rounds otherwise."""
        return None, None

    @override
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """Evaluation is the server's: no messages."""
        return []

    @override
    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        """Evaluation is the server's: nothing to aggregate."""
        return None

    @override
    def summary(self) -> None:
        """What runs stands in the config of the run."""
