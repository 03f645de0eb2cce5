"""The interface of an engine: it owns the base weights that clients read, and the grid.

A grid is asked, and gives what came; how it gets to the clients is its own business.

The engines of one machine stand in `fedraclora.clients.engines`, those inside a ServerApp in
`fedraclora.strategies.server_app`. Whoever wires a run knows this class alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from fedraclora.privacy.secagg import SecAggTerms
from fedraclora.protocol.link import Link
from fedraclora.run.client_state import ClientStore
from fedraclora.training.cohort import CohortTrainer
from fedraclora.tree import Tree
from fedraclora.weights.update import BaseWeights
from fedraclora.wire.answers import Came
from fedraclora.wire.exchange import Ask


@dataclass
class Traffic:
    """Communication since the strategy last read it.

    Attributes:
        fetched: Payload bytes by which clients caught up on base weights, what was sent again
            included.
        serialized: Bytes of messages in both directions, as they are written.
        sent: The ask of each message: twice where it was sent twice, and not where its clients
            were not there.
    """

    fetched: int = 0
    serialized: int = 0
    sent: list[Ask] = field(default_factory=list)


class Grid(ABC):
    """Sends requests to the clients of one run.

    Attributes:
        incidents: What went wrong and was mended since the strategy last looked: sentences for
            the ledger.
        traffic: What went over the wire since then; None where nothing is sent.
        told: What a run says of where its clients are when it begins, by title.
        workers: Processes that train its chunks.
    """

    def __init__(self) -> None:
        self.told: dict[str, str] = {}
        self.workers = 1
        self.incidents: list[str] = []
        self.traffic: Traffic | None = None

    @abstractmethod
    def ask(self, asks: Sequence[Ask], timeout: float | None = None) -> Came:
        """Send requests to clients, and return their answers.

        Args:
            asks: Each of some clients of one round.
            timeout: Seconds for all of them; None: the grid knows when to give up.

        Returns:
            What came, each with the very ask that it answers, in any order; nothing of who is
            late.

        Raises:
            FedRacLoraError: If nobody can be asked.
        """

    def close(self) -> None:  # noqa: B027
        """Stop everything that the grid has started."""


# Starts what runs clients, from the trainer of this process, what clients keep between rounds, and
# what they insist on in secure aggregation.
MakeGrid = Callable[[CohortTrainer, ClientStore, SecAggTerms | None], Grid]
Recall = Callable[[Tree, Iterable[tuple[int, Link]], int], None]


@dataclass
class Engine:
    """Where the clients of one run train.

    Attributes:
        replica: Where the strategy publishes base weights, and clients find them.
        make_grid: Starts what runs clients.
        recall: Takes over the history of a run that goes on, where clients may hold its older
            weights: its weights now, the links of its rounds in order, and where it stands. None:
            its clients end with the run, so that there is nothing to do.
        spread: Whether several processes train the chunks of a round at the same time.
        share: Share of a GPU that each of these processes has; None: this process trains.
        elsewhere: Whether clients train on other machines, with samples that are not here.
        grid: What was started.
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
            trainer: Of this process.
            store: What clients keep between rounds, where they run here.
            terms: What clients insist on in secure aggregation; None without it.

        Raises:
            FedRacLoraError: If it does not start, or there is less than is asked for.
        """
        self.grid = self.make_grid(trainer, store, terms)
        return self.grid

    def close(self) -> None:
        """Stop everything that was started; a second call does nothing."""
        if self.grid is not None:
            self.grid.close()
            self.grid = None
        self.replica.close()
