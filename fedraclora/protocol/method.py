"""Define the interface of a federated method.

A method is a frozen dataclass of hyperparameters with a few pure functions. It never sees a
client, a message or a data set: it returns the clients' instructions (`RoundInstructions`),
receives their updates (`Uplinks`), and returns the server's next state (`State`).
"""

# Hooks have arguments that only some overrides use.
# ruff: noqa: ARG002

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property, lru_cache
from inspect import getattr_static
from typing import Any, ClassVar, Protocol, Self

import torch

from fedraclora.compatibility import Feature
from fedraclora.errors import ConfigError
from fedraclora.limits import check_limits
from fedraclora.protocol.factor import Factor, pasts
from fedraclora.protocol.instructions import Adapter, RoundInstructions
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import hash_key
from fedraclora.tree import Tree

__all__ = [
    "Adapter",
    "Cohort",
    "Counters",
    "Draw",
    "Factor",
    "Link",
    "Method",
    "Plan",
    "RoundInstructions",
    "State",
    "Term",
    "Traits",
    "apply_link",
    "first_instructions",
]


KEPT_BY_CLIENTS = Feature(
    "a part of the model that is kept at each client",
    take="head=personal and methods that leave a part at each client",
    reads=("evaluate.sample",),
)
ASKS_TWICE = Feature(
    "two exchanges in a round",
    instead="another method or method.init, allocation=none",
)
# What a round shows of a method while it is computed.
DOES_MORE = Feature("a method whose clients do more than plain local steps")
OTHER_LAYERS = Feature("a method that leaves some layers out")
BEGINS_ANEW = Feature("a method that has restarted its trained factors")
FROZEN_CHANGED = Feature("a method that has changed its frozen factors")
OTHER_LAYOUT = Feature("a method that has changed the shapes that it trains")
BEYOND_WEIGHTS = Feature("a method whose next round needs more than the weights")


@dataclass(frozen=True)
class Traits:
    """Declare the properties of a method that hold in all its rounds.

    The contract suite holds every method to them.

    Attributes:
        exact: The new effective weights are old + step (mean - old), where mean is the weighted
            mean of the clients' effective weights; with a step of 1 they are that mean. With
            quantized updates, a client's weights are those received; the server's rounding error is
            a column of the ledger.
        linear: Weighted sums of the updates are enough, as in secure aggregation.
        merges: Updates are merged into the base weights, so that absent clients must catch up.
        ranks: The properties hold under rank budgets (`Cohort.ranks`), which it passes on.
        step: The server's step, in `exact`.
        varies: The trained tensors change from round to round, so clients keep none of them. One
            round's updates may determine the next round's tensors.
    """

    exact: bool
    linear: bool
    merges: bool
    ranks: bool = False
    step: float = 1.0
    varies: bool = False


@dataclass(frozen=True)
class Cohort:
    """The clients of one round, in ascending order of id.

    Attributes:
        clients: Ids, int64 [K].
        weights: Aggregation weights, float64 [K], not normalized; ones if the server does not know
            them.
        ranks: Rank budgets, int64 [K], each 1 or more (as `fedraclora.devices.system` draws them);
            None: no budgets.
    """

    clients: torch.Tensor
    weights: torch.Tensor
    ranks: torch.Tensor | None = None

    def __len__(self) -> int:
        return int(self.clients.shape[0])

    def select(self, chosen: torch.Tensor) -> Cohort:
        """Keep the clients of a mask, bool [K]."""
        ranks = None if self.ranks is None else self.ranks[chosen]
        return Cohort(self.clients[chosen], self.weights[chosen], ranks)


@dataclass(frozen=True)
class Counters:
    """Hold counters of a method between rounds; files use the field names.

    A method with further counters sets a subclass in `Method.counters`, whose fields have defaults:
    each is a number, or numbers by weight.

    Attributes:
        sketch: Number of links that have ended; sketches differ from link to link.
        age: Rounds since the link began.
    """

    sketch: int = 0
    age: int = 0

    def stored(self) -> dict[str, int]:
        """Return the numbers by name; ``<field>/<weight>`` if there is one for each weight."""
        found: dict[str, int] = {}
        for name, value in vars(self).items():
            many = isinstance(value, dict)
            found |= {f"{name}/{key}": v for key, v in value.items()} if many else {name: value}
        return found

    @classmethod
    def read(cls, stored: Mapping[str, int]) -> Self:
        """Read the output of `stored`; missing numbers keep their start, others are ignored."""
        values: dict[str, int | dict[str, int]] = {}
        for name in (each.name for each in fields(cls)):
            inside = {k.partition("/")[2]: v for k, v in stored.items() if k.startswith(f"{name}/")}
            if inside or name in stored:
                values[name] = inside or stored[name]
        return cls(**values)  # type: ignore[arg-type]


@dataclass(frozen=True)
class State:
    """Hold the server's state between rounds.

    Attributes:
        base: The master weights, float32 or wider, and, under names with a "/", the tensors that
            replicas keep beside them.
        plan: The plan of the run (constant; not part of a checkpoint).
        carried: The method's own tensors (continued factors, moments).
        counters: The method's own counters.
        link: The last round's change of `base`, or None.
        report: The last round's figures for the ledger.
        notes: Sentences for the ledger (a rank that was capped).
        moments: The moments of the server's optimizer.
    """

    base: Tree
    plan: Plan
    carried: Tree = field(default_factory=dict)
    counters: Counters = field(default_factory=Counters)
    link: Link | None = None
    report: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    moments: Tree = field(default_factory=dict)

    @property
    def depends_on_past(self) -> bool:
        """Return whether the next round depends on more than the weights."""
        return bool(self.carried or pasts(self.base))


@dataclass(frozen=True)
class Draw:
    """Draw random sketches for a method, by layer."""

    seed: int

    def sketch_seed(self, weight: str) -> int:
        """Seed of all sketches of one layer; 63 bits, so that it fits a message."""
        return _sketch_seed(self.seed, weight)


@lru_cache(maxsize=1 << 12)
def _sketch_seed(seed: int, weight: str) -> int:
    return hash_key(seed, "sketch", weight) >> 65


class Method(Protocol):
    """Base of federated methods. Subclass it explicitly to take the defaults."""

    counters: ClassVar[type[Counters]] = Counters
    """The class of `State.counters`."""
    gradient_figures: ClassVar[tuple[str, ...]] = ()
    """Figures of its report that assume local steps to be multiples of the gradient. They are left
    out otherwise, as under an adaptive optimizer."""

    @property
    def traits(self) -> Traits:
        """Return the method's declared properties."""

    @property
    def client_state(self) -> bool:
        """Return whether clients keep a factor between rounds (``upload=False``)."""
        return False

    @property
    def looks_at_clients(self) -> bool:
        """Return whether it reports on single clients, if the server has their updates."""
        return False

    @property
    def link_rounds(self) -> int | None:
        """Return for how many rounds trained factors keep their coordinates; None: for all."""
        return None

    @property
    def recurs(self) -> bool:
        """Return whether frozen factors return after later merges.

        Then the factor trained under each is kept beside its weight, under its own name, and a
        merge replaces its value.
        """
        return False

    @property
    def begins_with_last(self) -> bool:
        """Return whether a merge period starts from a factor of the last one."""
        return False

    @property
    def rank(self) -> Any:
        """Return the rank of all adapters, the base of rank budgets; None: it has none."""
        return None

    @property
    def most_steps(self) -> int | None:
        """Return the most local steps of a client if it sends a number for each; None: no limit."""
        return None

    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        """Build the state before the first round."""

    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        """Build the instructions of round ``round_`` (from 1)."""

    def next_exchange(
        self, state: State, sent: RoundInstructions, uplinks: Uplinks
    ) -> RoundInstructions | None:
        """Return the instructions of another exchange in the same round, or None to close it."""
        return None

    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        """Return the next state from the clients' updates; it contains the round's merge."""

    def in_effect(self, state: State) -> tuple[Method, State]:
        """Return the method and the state in effect; a wrapper may omit layers."""
        return self, state

    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        """Return the dense weights: global, or personal with a client's factors (``own``)."""
        return state.base

    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        """Return the numbers (up, down) per client and round, by the formula in the docstring.

        Catch-up of absent clients and the bytes of seeds and headers are not included.
        """

    # Features that this method is incompatible with; a method of your own may declare more.

    @Feature(
        "a method that merges after every round",
        instead="method.merge_every=2 or more, where the method has it, or another method",
    )
    def _links_last_a_round(self) -> bool:
        return not self.recurs and self.link_rounds == 1

    @Feature(
        "a method that merges after several rounds",
        instead="a method that merges after every round (method.merge_every=1)",
    )
    def _links_last_rounds(self) -> bool:
        return self.traits.merges and not self.recurs and (self.link_rounds or 1) > 1

    @Feature(
        "a method that needs each client's update",
        instead="a method that docs/methods.md marks `linear`",
    )
    def _needs_updates(self) -> str:
        return "" if self.traits.linear else f"method={config_name(type(self))}"

    @KEPT_BY_CLIENTS
    @Feature("a method that keeps a part of the model at each client")
    def _leaves_a_part(self) -> bool:
        return self.client_state

    @Feature("a method that trains different tensors in each round")
    def _varies(self) -> bool:
        return self.traits.varies

    @Feature(
        "a method that merges updates into the weights",
        instead="a method that leaves them (method.merge_every=null, where it has that)",
    )
    def _merges(self) -> bool:
        return self.traits.merges

    @Feature(
        "a method that takes its first factors out of the weights",
        instead="another method.init or method",
    )
    def _takes_from_weights(self) -> str:
        return ""

    @Feature("a method with counters of its own")
    def _keeps_numbers(self) -> bool:
        return self.counters is not Counters

    @Feature(
        "a method that restarts its components",
        instead="a method that docs/methods.md marks `both`",
    )
    def _ends_components(self) -> str:
        return f"method={config_name(type(self))}"

    @Feature(
        "a method that sends a scalar for each of method.steps",
        instead="method.steps at or below local.steps",
        avoids={"local.steps below method.steps": "clients would send zeros for the missing steps"},
    )
    def _sends_each_step(self) -> str:
        return "" if self.most_steps is None else f"method.steps={self.most_steps}"

    @Feature("a method whose frozen factors recur")
    def _recurs(self) -> bool:
        return self.recurs

    @Feature("a method that starts from the factors of the last merge")
    def _begins_with_last(self) -> bool:
        return self.begins_with_last

    @Feature(
        "a method without rank budgets",
        instead="a method that docs/methods.md marks `ranks`",
    )
    def _has_one_rank(self) -> bool:
        return not self.traits.ranks

    @Feature(
        "a method without one rank for all layers",
        instead="a whole number as method.rank, allocation=none",
    )
    def _has_no_rank(self) -> str:
        return "" if isinstance(self.rank, int) else f"its rank is {self.rank!r}"

    @Feature("a method that restarts its factors at each merge")
    def _factors_begin_anew(self, sent: RoundInstructions) -> str:
        if not self.traits.merges:
            return ""
        return next((n for n, a in sent.adapters.items() if not a.trains_beside_shared), "")

    @Feature("a method that changes the frozen factors at each merge")
    def _factors_change(self, sent: RoundInstructions) -> str:
        changes = self.traits.merges or self.recurs
        return next(iter(sent.adapters), "") if changes else ""


def config_name(kind: type) -> str:
    """Return the config name of a method's class."""
    package, _, module = kind.__module__.rpartition(".")
    inside = package.endswith("strategies.methods")
    return module if inside else f"{kind.__module__}:{kind.__qualname__}"


def first_instructions(
    method: Method, state: State, draw: Draw, clients: int, *, round_: int = 1
) -> RoundInstructions:
    """Build the instructions of a round from the initial state, to read its shapes before a run.

    Args:
        method: The algorithm.
        state: The state before round 1. Not modified.
        draw: The run's sketches.
        clients: Number of clients, with equal weights.
        round_: From 1.
    """
    cohort = Cohort(torch.arange(clients), torch.ones(clients, dtype=torch.float64))
    return method.open_round(state, round_, cohort, draw)


def check_method(method: Any) -> None:
    """Check a method whose class the user's program defines.

    Raises:
        ConfigError: If it is no method, or has state outside its fields, by which a resumed run
            recognizes its method.
    """
    kind = type(method).__name__
    if Method not in type(method).__mro__:
        raise ConfigError(
            f"method is a {kind}, which is derived from no method: take "
            "fedraclora.strategies.shared.layerwise.LayerMethod (CONTRIBUTING.md, A new method)"
        )
    if not isinstance(method.traits, Traits):
        raise ConfigError(
            f"method is a {kind}, which does not say what it promises: give the class "
            "`traits = Traits(...)` (CONTRIBUTING.md, A new method)"
        )
    check_limits("method", type(method), vars(method))  # also for a class that is not `Limited`
    shown = {f.name for f in fields(method) if f.repr}
    for name in getattr(method, "__dict__", {}):
        cached = isinstance(getattr_static(type(method), name, None), cached_property)
        if name not in shown and not cached and not name.startswith("_"):
            raise ConfigError(
                f"method is a {kind} with the attribute {name!r}, which its repr does not show, so "
                f"that a run could not tell two values of it apart: make {kind} a "
                f"@dataclass(frozen=True) with a field {name}"
            )
