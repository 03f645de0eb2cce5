"""Define an engine: it owns the base weights that clients read, and the grid.

A grid takes requests and returns replies; subclasses decide how they reach the clients.

The engines of one machine are in `fedraclora.clients.engines`, those inside a ServerApp in
`fedraclora.strategies.server_app`. Code that assembles a run only knows this class.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from fedraclora.privacy.secagg import SecAggTerms
from fedraclora.protocol.link import Link
from fedraclora.run.client_state import ClientStore
from fedraclora.run.log import NOTICE
from fedraclora.training.cohort import CohortTrainer
from fedraclora.tree import Tree
from fedraclora.weights.update import BaseWeights
from fedraclora.wire.answers import Came
from fedraclora.wire.exchange import Ask

log = logging.getLogger(__name__)


@dataclass
class Traffic:
    """Count communication since the strategy last read it.

    Attributes:
        fetched: Payload bytes of catch-up on base weights, resent ones included.
        serialized: Bytes of messages in both directions, as written.
        sent: The request of each message: twice if it was sent twice, and none if its clients were
            not connected.
        nodes: The same bytes by node and way: ``down``, ``up``, and ``bundle`` (the app's).
    """

    fetched: int = 0
    serialized: int = 0
    sent: list[Ask] = field(default_factory=list)
    nodes: dict[str, dict[str, int]] = field(default_factory=dict)

    def count(self, node: str, way: str, size: int) -> None:
        """Count bytes between the server and a node."""
        self.serialized += size
        add_up(self.nodes, {node: {way: size}})


def add_up(total: dict[str, dict[str, int]], more: Mapping[str, Mapping[str, int]]) -> None:
    """Add bytes of nodes to others, by node and way."""
    for node, ways in more.items():
        own = total.setdefault(node, {})
        for way, size in ways.items():
            own[way] = own.get(way, 0) + size


class Grid(ABC):
    """Sends requests to the clients of one run.

    Attributes:
        incidents: Problems that were solved since the strategy last looked: sentences for the
            ledger.
        traffic: Communication since then; None if no messages are sent.
        told: Facts on the clients' location for the start of a run, by title.
        workers: Processes that train its chunks.
    """

    def __init__(self) -> None:
        self.facts: dict[str, str] = {}
        self.workers = 1
        self.incidents: list[str] = []
        self.traffic: Traffic | None = None

    @abstractmethod
    def ask(self, asks: Sequence[Ask], timeout: float | None = None) -> Came:
        """Send requests to clients, and return their replies.

        Args:
            asks: Requests, each for some clients of one round.
            timeout: Seconds for all of them; None: the grid decides.

        Returns:
            The replies, each with its request, in any order, without late ones.

        Raises:
            FedRacLoraError: If no client can be asked.
        """

    def tell(self, text: str) -> None:
        """Record an incident, and log it at once: its row may come much later."""
        log.log(NOTICE, "%s", text)
        self.incidents.append(text)

    def close(self) -> None:  # noqa: B027
        """Stop all processes that the grid has started."""


# Starts the clients' processes, from this process's trainer, the clients' state between rounds, and
# their conditions for secure aggregation.
MakeGrid = Callable[[CohortTrainer, ClientStore, SecAggTerms | None], Grid]
Recall = Callable[[Tree, Iterable[tuple[int, Link]], int], None]


@dataclass
class Engine:
    """Define where the clients of one run train.

    Attributes:
        replica: Where the strategy publishes base weights, and clients find them.
        make_grid: Starts the grid.
        recall: Restores the history of a resumed run if clients may hold older weights: its present
            weights, the merges of its rounds in order, and its version. None: its clients end with
            the run, so that it is not needed.
        spread: Whether several processes train the chunks of a round at the same time.
        share: Share of a GPU of each of these processes; None: this process trains.
        elsewhere: Whether clients train on other machines, with samples that are not here.
        grid: The started grid.
    """

    replica: BaseWeights
    make_grid: MakeGrid
    recall: Recall | None = None
    spread: bool = False
    share: float | None = None
    elsewhere: bool = False
    grid: Grid | None = field(default=None, init=False)

    def start(
        self, trainer: CohortTrainer, store: ClientStore, terms: SecAggTerms | None = None
    ) -> Grid:
        """Start the processes that train clients.

        Args:
            trainer: This process's trainer.
            store: The clients' state between rounds, if they run here.
            terms: The clients' conditions for secure aggregation; None without it.

        Raises:
            FedRacLoraError: If it does not start, or has fewer resources than requested.
        """
        self.grid = self.make_grid(trainer, store, terms)
        return self.grid

    def close(self) -> None:
        """Stop all processes that were started; a second call does nothing."""
        if self.grid is not None:
            self.grid.close()
            self.grid = None
        self.replica.close()
