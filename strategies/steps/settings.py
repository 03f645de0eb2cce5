"""What was chosen of the steps of a round."""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from fedraclora.aggregation.base import Aggregator, Mean
from fedraclora.aggregation.server_optimisers import ServerOptimiser
from fedraclora.attacks.attack import Attack
from fedraclora.config.run_config import RunConfig
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
        secure: What the server sees of a cohort.
        server_optimiser: What the server makes of the mean of a round.
        control_variates: Whether clients' drift is corrected by control variates.
    """

    aggregator: Aggregator = field(default_factory=Mean)
    attack: Attack = field(default_factory=Attack)
    privacy: Privacy = field(default_factory=Privacy)
    secret: Secret | None = None
    secure: Open = field(default_factory=Open)
    server_optimiser: ServerOptimiser = field(default_factory=ServerOptimiser)
    control_variates: bool = False

    @classmethod
    def of(cls, config: RunConfig) -> RoundSettings:
        """Take what was chosen from a config, whose keys have the names of these fields."""
        names = [field.name for field in fields(cls) if hasattr(config, field.name)]
        return cls(**{name: getattr(config, name) for name in names})
