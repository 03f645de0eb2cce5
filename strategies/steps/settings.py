"""What was chosen of the steps of a round."""

from __future__ import annotations

from dataclasses import dataclass, field

from fedraclora.aggregation.base import Aggregator, Mean
from fedraclora.aggregation.server_optimisers import ServerOptimiser
from fedraclora.attacks.attack import Attack
from fedraclora.privacy.client_level import Privacy
from fedraclora.privacy.secagg import Open
from fedraclora.privacy.secret import Secret


@dataclass(frozen=True)
class RoundSettings:
    """The attack of a simulation, robustness, privacy, and the server's own step.

    Attributes:
        aggregator: What the method sees of the updates.
        attack: What some clients do to harm the run.
        privacy: What a round may tell of a client.
        secret: Where its noise comes from; None: the run folder's own key.
        security: What the server sees of a cohort.
        optimiser: What the server makes of the mean of a round.
        variates: Whether clients' drift is corrected by control variates.
    """

    aggregator: Aggregator = field(default_factory=Mean)
    attack: Attack = field(default_factory=Attack)
    privacy: Privacy = field(default_factory=Privacy)
    secret: Secret | None = None
    security: Open = field(default_factory=Open)
    optimiser: ServerOptimiser = field(default_factory=ServerOptimiser)
    variates: bool = False
