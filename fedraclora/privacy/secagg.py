"""Define the settings of secure aggregation: neighbours, threshold, step of quantization.

The protocol is SecAgg+; ECDH, Shamir's sharing and Fernet are Flower's, masks are ChaCha20 streams.
A round has four exchanges:

- ``keys``: a client sends two public keys (P-384), and a commitment to the seed of its own mask.
- ``shares``: it gets its neighbours' keys, and sends for each, encrypted, a share of that seed and
  one of its mask key.
- ``masked``: it gets what to train and the encrypted shares, and sends its vector modulo 2^32, with
  its own mask and those of its neighbours.
- ``unmask``: it learns which clients are in the sum, and sends shares of the seeds of these and of
  the keys of the others.

Neighbours are all other clients, or the nearest on a ring that is drawn in each round. A secret
needs t shares, more than half of the neighbours. A client commits in advance to everything that it
reveals later, so that a misbehaving client can be identified.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from annotated_types import Ge, Lt

from fedraclora.compatibility import Feature
from fedraclora.errors import ConfigError
from fedraclora.limits import Count, Limit, Limited, Positive
from fedraclora.rng import generator

_EVEN = Limit("an even number from 2 on", lambda value: value >= 2 and value % 2 == 0)
SUM_ALONE = "the server sees only the sum of the updates"
LEAST_CLIENTS = 3  # clients of a sum: of two, each knows the other's part
# Why there is no sum of measurements, in the words of clients and of the server.
FEW = "fewer than evaluate.min_clients={} clients have samples to measure on"


@dataclass(frozen=True)
class Open(Limited, group="secure"):
    """No secure aggregation: the server sees the upload of each client."""

    name: ClassVar[str] = "none"


@Feature(
    "secure=secagg",
    instead="secure=none",
    avoids={
        "a robust rule that needs each client's update": SUM_ALONE,
        "an attack whose clients collude": SUM_ALONE,
        "a method that needs each client's update": SUM_ALONE,
        "another round step that needs each client's update": SUM_ALONE,
        "clients_per_round of 1 or 2": "a client can only hide among at least 3",
        "clients that train different parameters": (
            "only updates of the same parameters can be summed"
        ),
        "compression.uplink below float32": ("its clients quantize their updates already"),
        "fewer measuring clients than evaluate.min_clients": (
            "metrics of so few clients are not released"
        ),
        "two exchanges in a round": "its masks are made for one exchange in a round",
    },
)
@dataclass(frozen=True)
class SecAgg(Open):
    """Add secure aggregation (SecAgg+): the server sees only the sum over a round's clients.

    Attributes:
        clip: Largest norm of an update: longer ones are scaled down, and counted in the ledger
            (secure.clipped). It determines the step of the quantization. With
            privacy=client_level, the clip of that setting is used.
        neighbours: Number of clients with which each client shares masks and keys (even); None:
            all.
        threshold: Share of a client's neighbours that must stay so that its masks can be removed;
            above a half, so that no two groups can be asked for different secrets.
        max_weight: Largest weight of a client; 1 with aggregation_weights=uniform.

    References:
        Bonawitz et al., *Practical secure aggregation for privacy-preserving machine learning*,
        CCS 2017; Bell et al., *Secure single-server aggregation with (poly)logarithmic overhead*,
        CCS 2020 (SecAgg+).
    """

    name: ClassVar[str] = "secagg"

    clip: Positive = 10.0
    neighbours: Annotated[int, _EVEN] | None = None
    threshold: Annotated[float, Ge(0.5), Lt(1)] = 0.5
    max_weight: Count = 1

    @Feature(
        "secure.max_weight above 1",
        instead="secure.max_weight=1",
        avoids={
            "aggregation_weights=uniform": "every weight is 1, so a larger bound has no effect"
        },
    )
    def _weighs_clients(self) -> str:
        return f"secure.max_weight={self.max_weight}" if self.max_weight > 1 else ""

    @Feature(
        "secure.max_weight=1",
        instead="for secure.max_weight the most samples that a client may have",
        avoids={"aggregation_weights=samples": "the weight of a client is its number of samples"},
    )
    def _weighs_nobody(self) -> bool:
        return self.max_weight == 1

    def graph(self, clients: list[int], seed: int, round_: int) -> dict[int, list[int]]:
        """Draw each client's neighbours: the nearest ones on a randomly ordered ring.

        Args:
            clients: Ids.
            seed: Of the run.
            round_: From 1.

        Returns:
            The neighbours of each client, ascending; a client is not its own neighbour.
        """
        K = len(clients)
        reach = K if self.neighbours is None else self.neighbours // 2
        order = [clients[i] for i in generator(seed, "neighbours", round_).permutation(K)]
        found = {}
        for i, client in enumerate(order):
            near = {order[(i + d) % K] for d in range(-min(reach, K - 1), min(reach, K - 1) + 1)}
            found[client] = sorted(near - {client})
        return found

    def least(self, clients: int) -> int:
        """Compute the fewest neighbours of a client if ``clients`` or more are asked."""
        others = max(LEAST_CLIENTS, clients) - 1
        return others if self.neighbours is None else min(self.neighbours, others)

    def shares(self, neighbours: int) -> int:
        """Compute the number of ``neighbours``' shares that recover a secret: more than half."""
        return int(self.threshold * neighbours) + 1

    def step(self, clients: int, clip: float, largest: int) -> float:
        """Compute the quantization step with which no weighted sum of ``clients`` overflows.

        Each of its numbers is ``clip * max_weight`` at most, and the sum of weights must fit, too.

        Args:
            clients: Most clients in the sum.
            clip: Largest norm of an update.
            largest: Largest integer that a sum may have.

        Raises:
            ConfigError: If the weights alone overflow.
        """
        if clients * self.max_weight >= largest / 2:
            raise ConfigError(
                f"{clients} clients of weight up to secure.max_weight={self.max_weight} do not fit "
                "into 32 bits; lower it, or lower clients_per_round"
            )
        # Reserve room for rounding to whole steps, half a step for each client. Updates cannot
        # exceed the clip: clients clip them last, in float64.
        return clients * clip * self.max_weight / (largest - clients)


@dataclass(frozen=True)
class SecAggTerms:
    """Hold the conditions that a client demands, whatever the server says.

    Attributes:
        config: Clip, neighbours, threshold, greatest weight.
        weights: ``examples`` or ``uniform``.
        fewest: Fewest clients of a round: all of its clients less those that may fail.
        measurers: Fewest clients with samples to measure on, for a sum of measurements.
        counted: Whether the sum includes the number of clipped updates, which has no noise.
    """

    config: SecAgg
    weights: str
    fewest: int = LEAST_CLIENTS
    measurers: int = LEAST_CLIENTS
    counted: bool = True

    @property
    def neighbours(self) -> int:
        """Return the fewest neighbours among whom a client splits its secrets."""
        return self.config.least(self.fewest)


SECURES: dict[str, type[Open]] = {kind.name: kind for kind in (Open, SecAgg)}
