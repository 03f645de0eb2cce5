"""The contract between a federated method and everything else.

A method is a frozen dataclass of hyperparameters with a few pure functions. It never sees a
client, a message or a data set: it says what the cohort trains (`Downlink`), is handed what
came back (`Uplinks`), and says what the server holds next (`State`).

Effective weight of an adapted matrix: ``W + scale * F_1 F_2 (F_3)``, where each factor is drawn
from a seed (`Sketched`), sent and held fixed (`Frozen`) or trained (`Trained`), and is shared by
the cohort or one per client (a leading axis K).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import torch

from fedraclora.aggregate import Uplinks
from fedraclora.link import Link, Plan, Term, apply_link
from fedraclora.rng import hash_key
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree

__all__ = [
    "Adapter",
    "Cohort",
    "Downlink",
    "Draw",
    "Factor",
    "Frozen",
    "Link",
    "Method",
    "Plan",
    "Sketched",
    "State",
    "Term",
    "Trained",
    "Traits",
    "apply_link",
]


@dataclass(frozen=True)
class Traits:
    """What a method promises; the contract suite holds it to the first three.

    Attributes:
        exact: The new effective weights equal the weighted mean of the clients' own.
        linear: Weighted sums of what clients send are enough (secure aggregation can serve it).
        merges: Updates are folded into the base weights, so absent clients must catch up.
        client_state: Something stays at the clients between rounds.
        ranks: Clients may have different ranks.
    """

    exact: bool
    linear: bool
    merges: bool
    client_state: bool = False
    ranks: bool = False


@dataclass(frozen=True)
class Sketched:
    """A frozen factor that both ends draw from a seed."""

    spec: SketchSpec


@dataclass(frozen=True)
class Frozen:
    """A frozen factor that is sent: [rows, cols], or [K, rows, cols] for one per client."""

    value: torch.Tensor

    @property
    def per_client(self) -> bool:
        """Whether each client has its own."""
        return self.value.dim() == 3


@dataclass(frozen=True)
class Trained:
    """A tensor that clients train.

    Attributes:
        shape: Its shape, without the cohort axis.
        start: Where it starts: None (zeros for a factor, the replica's value for a dense
            tensor), a shared tensor, or [K, *shape].
        main: True for what the method is about (step size ``local.lr``), False for the head
            and biases beside it (``local.dense_lr``).
        upload: False for what stays at the client (personalised methods).
    """

    shape: tuple[int, ...]
    start: torch.Tensor | None = None
    main: bool = True
    upload: bool = True

    @property
    def per_client(self) -> bool:
        """Whether each client starts elsewhere."""
        return self.start is not None and self.start.dim() > len(self.shape)


Factor = Sketched | Frozen | Trained


@dataclass(frozen=True)
class Adapter:
    """A low-rank term on one matrix: ``scale * product of factors``, left to right.

    The names of the factors ("B", "A") become part of the names of what is trained:
    ``"<weight>/B"``.
    """

    factors: dict[str, Factor]
    scale: float


@dataclass(frozen=True)
class Downlink:
    """What one exchange asks of the cohort.

    Attributes:
        adapters: Low-rank terms by weight name.
        dense: Tensors trained in full, by parameter name.
        recipe: A key of `fedraclora.recipe.RECIPES`: what clients do beyond plain local steps.
        arguments: Numbers for the recipe.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    dense: dict[str, Trained] = field(default_factory=dict)
    recipe: str = "plain"
    arguments: dict[str, float | int] = field(default_factory=dict)

    def trained(self) -> dict[str, Trained]:
        """Everything that clients train, by its name on the uplink, in packing order."""
        found = {
            f"{weight}/{label}": factor
            for weight, adapter in self.adapters.items()
            for label, factor in adapter.factors.items()
            if isinstance(factor, Trained)
        }
        return found | self.dense

    def uploaded(self) -> dict[str, Trained]:
        """What clients send back, in packing order."""
        return {name: slot for name, slot in self.trained().items() if slot.upload}


@dataclass(frozen=True)
class Cohort:
    """The clients of one round, in ascending order of id, with their aggregation weights."""

    clients: torch.Tensor  # int64 [K]
    weights: torch.Tensor  # float64 [K], not normalised; ones where the server cannot know them

    def __len__(self) -> int:
        return int(self.clients.shape[0])


@dataclass(frozen=True)
class State:
    """What the server holds between rounds.

    Attributes:
        base: The master weights, float32 or wider.
        plan: The plan of the run (static; not part of a checkpoint).
        carried: The method's own tensors (factors that live on, moments).
        memo: The method's own small numbers.
        link: How the last close changed `base`, or None.
        report: Figures of the last round for the ledger.
        notes: Sentences for the ledger (a rank that was capped).
    """

    base: Tree
    plan: Plan
    carried: Tree = field(default_factory=dict)
    memo: dict[str, int] = field(default_factory=dict)
    link: Link | None = None
    report: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Draw:
    """The method's access to randomness: specs of sketches, keyed by layer."""

    seed: int

    def sketch_seed(self, weight: str) -> int:
        """Seed of all sketches of one layer; 63 bits, so that it fits a message."""
        return hash_key(self.seed, "sketch", weight) >> 65


class Method(Protocol):
    """A federated method. Subclass it explicitly to take the defaults."""

    @property
    def traits(self) -> Traits:
        """What the method promises."""
        ...

    def init(self, base: Tree, plan: Plan, draw: Draw) -> State:
        """Build the state before the first round."""
        ...

    def open_round(self, state: State, round_: int, cohort: Cohort, draw: Draw) -> Downlink:
        """Say what the cohort trains in round ``round_`` (from 1)."""
        ...

    def next_exchange(self, state: State, sent: Downlink, got: Uplinks) -> Downlink | None:
        """Ask for another exchange in the same round (a second pass), or None to close it."""
        del state, sent, got
        return None

    def close_round(self, state: State, sent: Downlink, got: Uplinks) -> State:
        """Turn what came back into the next state; the changed base goes with its link."""
        ...

    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        """Effective dense weights: global, or personal with what a client keeps (``own``)."""
        del draw, own
        return state.base

    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        """Numbers (up, down) per client and round by the formula in the method's docstring.

        Catch-up of an absent client and the bytes of seeds and headers are not in it.
        """
        ...
