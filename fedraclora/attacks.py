"""Simulate attacks by malicious clients, for testing.

The attackers are one seeded draw for the whole run. A label flip changes the attackers' data; a
sign flip and noise change their updates. Colluding attackers know each other's updates, so the
simulation changes them where all are known: on the uplinks, before the aggregator.
"""

# Hooks have arguments that only some overrides use.
# ruff: noqa: ARG002

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.data.clients import ChangedClients, ClientData
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, DataError
from fedraclora.limits import Limited, Share
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.program import LocalResult
from fedraclora.rng import cohort_bits, generator, hash_key
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.own.trainer import OwnTrainer
from fedraclora.tree import Layout, Tree


@dataclass(frozen=True)
class Attack(Limited, group="attack"):
    """Run no attack: all clients are honest.

    Attributes:
        name: Its key in the config.
        colludes: Whether attackers know each other's updates.
        share: Share of the population that attacks, rounded to a number of clients.
    """

    name: ClassVar[str] = "none"
    colludes: ClassVar[bool] = False

    share: Share = 0.0

    @override
    def __init_subclass__(cls, **given: Any) -> None:
        super().__init_subclass__(**given)
        cls.name = vars(cls).get("name", cls.__name__)

    def poisoned(self, data: ClientData, classes: int, seed: int) -> ClientData:
        """Change the attackers' data among all clients' data; ``classes`` is 0 without classes.

        Raises:
            DataError: If it does not fit them.
        """
        return data

    def attackers(self, seed: int, population: int) -> torch.Tensor:
        """Draw the attackers: ids in ascending order, int64."""
        count = round(self.share * population)
        drawn = generator(seed, "attackers").choice(population, count, replace=False)
        return torch.from_numpy(drawn).sort().values

    def sent(self, updates: torch.Tensor, clients: torch.Tensor, key: int) -> torch.Tensor:
        """Compute the updates that attackers send in place of their own.

        Args:
            updates: Their updates, float64 [k, P]: trained values less the start.
            clients: Ids, int64 [k].
            key: Key of the round's draws, by `fedraclora.rng.hash_key`.
        """
        return updates

    def colluded(self, rows: torch.Tensor, attackers: torch.Tensor) -> torch.Tensor:
        """Replace the rows of colluding attackers: float64 [K, P]; attackers are bool [K]."""
        return rows

    @Feature(
        "a chosen attack",
        take="attacks, but attack=none has none",
        reads=("attack.share",),
    )
    def _is_chosen(self) -> bool:
        return type(self) is not Attack

    @Feature("an attack", instead="attack=none")
    def _attacks(self) -> str:
        return f"attack={self.name}" if self.share > 0 else ""

    @Feature("an attack whose clients collude", instead="another attack")
    def _colludes(self) -> str:
        return f"attack={self.name}" if self.colludes else ""


@dataclass(frozen=True)
class SignFlip(Attack):
    """Attackers send the negative of their update.

    Attributes:
        scale: Factor of its length.
    """

    name: ClassVar[str] = "sign_flip"

    share: Share = 0.2
    scale: float = 1.0

    @override
    def sent(self, updates: torch.Tensor, clients: torch.Tensor, key: int) -> torch.Tensor:
        return -self.scale * updates


@dataclass(frozen=True)
class ScaledNoise(Attack):
    """Attackers send Gaussian noise.

    Attributes:
        scale: Its norm relative to the client's own update (in mean square).
    """

    name: ClassVar[str] = "scaled_noise"

    share: Share = 0.2
    scale: float = 1.0

    @override
    def sent(self, updates: torch.Tensor, clients: torch.Tensor, key: int) -> torch.Tensor:
        count = updates.shape[1]
        bits = cohort_bits(key, clients.cpu(), count)
        normals: torch.Tensor = torch.special.ndtri((bits.double() + 0.5) * 2.0**-32)
        size = updates.norm(dim=1, keepdim=True) / math.sqrt(max(1, count))
        noise: torch.Tensor = self.scale * size * normals.to(updates)
        return noise


@Feature("attack=label_flip", instead="another attack")
@dataclass(frozen=True)
class LabelFlip(Attack):
    """Attackers train on flipped labels: class c of C is called C - 1 - c."""

    name: ClassVar[str] = "label_flip"

    share: Share = 0.2

    @override
    def poisoned(self, data: ClientData, classes: int, seed: int) -> ClientData:
        if not classes:
            raise DataError("attack=label_flip needs samples with classes; choose another attack")
        return Flipped(data, self.attackers(seed, data.num_clients), classes)


@dataclass(frozen=True)
class ALittleIsEnough(Attack):
    """Attackers agree on an update just within the spread of the honest ones.

    Attributes:
        z: Standard deviations; None: the largest for which, in each coordinate, the attackers'
            value is closer to the mean than those of enough honest clients for a majority.

    References:
        Baruch et al., *A little is enough*, arXiv 1902.06156. Departures: mean and deviation are
        those of the round's attackers only, so a single attacker does nothing.
    """

    name: ClassVar[str] = "a_little_is_enough"
    colludes: ClassVar[bool] = True

    share: Share = 0.2
    z: float | None = None

    def deviations(self, cohort: int, attackers: int) -> float:
        """Compute z for K = ``cohort`` clients: the normal quantile of (h - s) / h.

        h clients are honest; s of them together with the attackers make a majority.
        """
        if self.z is not None:
            return self.z
        honest = cohort - attackers
        supporters = cohort // 2 + 1 - attackers
        if honest < 1 or supporters < 1:
            raise ConfigError(
                f"attack.z is null, but {attackers} of {cohort} clients attack: a majority needs "
                "no help; set attack.z, or lower attack.share"
            )
        share = torch.tensor((honest - supporters) / honest, dtype=torch.float64)
        return max(0.0, float(torch.special.ndtri(share)))

    @override
    def colluded(self, rows: torch.Tensor, attackers: torch.Tensor) -> torch.Tensor:
        count = int(attackers.sum())
        if not count:
            return rows
        own = rows[attackers]
        away = self.deviations(len(rows), count) * own.std(dim=0, correction=0)
        return torch.where(attackers[:, None], own.mean(dim=0) - away, rows)


@dataclass(frozen=True)
class Flipped(ChangedClients):
    """Flip the labels of some clients' data, and leave the rest unchanged.

    Attributes:
        attackers: Their ids, int64.
        classes: Number of labels.
    """

    attackers: torch.Tensor
    classes: int

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        taken = self.data.gather(clients, positions)
        hit = torch.isin(clients, self.attackers.to(clients.device))
        hit = hit.repeat_interleave(positions.shape[1])
        flipped = self.classes - 1 - taken.target
        return replace(taken, target=torch.where(hit, flipped, taken.target))


ATTACKS: dict[str, type[Attack]] = {
    kind.name: kind for kind in (Attack, SignFlip, ScaledNoise, LabelFlip, ALittleIsEnough)
}


def same_shape(attack: Attack, found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Check the result of an attack, which may be the user's own.

    Raises:
        ConfigError: Naming the shapes.
    """
    if isinstance(found, torch.Tensor) and found.shape == wanted.shape:
        return found
    came = [*found.shape] if isinstance(found, torch.Tensor) else f"a {type(found).__name__}"
    raise ConfigError(f"attack={attack.name} gives {came}, expected a tensor {[*wanted.shape]}")


class AttackedTrainer(CohortTrainer):
    """Train clients, and replace the results of attackers.

    Args:
        attack: The attack.

    The others are those of `CohortTrainer`.
    """

    def __init__(self, *given: Any, attack: Attack, **named: Any) -> None:
        super().__init__(*given, **named)
        self.attack = attack
        self.attackers = attack.attackers(self.seed, self.data.num_clients)

    @override
    def train(
        self,
        base: Tree,
        downlink: RoundInstructions,
        clients: torch.Tensor,
        *,
        round_: int,
        **given: Any,
    ) -> LocalResult:
        result = super().train(base, downlink, clients, round_=round_, **given)
        hit = torch.nonzero(torch.isin(clients.cpu(), self.attackers)).flatten()
        if not len(hit):
            return result
        layout = Layout(tuple((n, s.shape) for n, s in downlink.uploaded().items()))
        rows = layout.pack({n: result.trained[n][hit].cpu().double() for n, _ in layout.shapes}, 1)
        start = opening_rows(downlink, base, layout, hit)
        key = hash_key(self.seed, "attack", round_)
        moved = same_shape(self.attack, self.attack.sent(rows - start, clients[hit], key), rows)
        trained = dict(result.trained)
        for name, tensor in layout.unpack(start + moved).items():
            trained[name] = trained[name].clone()
            trained[name][hit] = tensor.to(trained[name])
        return replace(result, trained=trained)


class AttackedOwnTrainer(AttackedTrainer, OwnTrainer):
    """Train clients with a user's function, and replace the results of attackers."""
