"""Define the server's instructions to the clients of a round: factors, adapters, tensors.

Effective weight of an adapted matrix: ``W + scale * F_1 F_2 (F_3)``, with factors that are frozen
or trained (`fedraclora.protocol.factor`), shared by the clients or one per client.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch

from fedraclora.compatibility import Feature
from fedraclora.protocol.factor import Factor, FactorLike, past_name
from fedraclora.protocol.program import PLAIN, ClientProgram
from fedraclora.tree import Layout, Tree

FROM_ZERO = Feature(
    "a factor that begins at zero",
    instead="method.init=orthogonal, where the method has it",
    reads=("method.zero_init",),
)
PARTS_OF_WEIGHTS = Feature(
    "factors or magnitudes that hold a part of the weights",
    instead="method.init=kaiming_uniform (a drawing), another method, dora=false",
)


@dataclass(frozen=True)
class Adapter:
    """Define a low-rank term on one matrix: ``scale * product of factors``, left to right.

    The names of the factors ("B", "A") become part of the names of trained tensors:
    ``"<weight>/B"``.
    """

    factors: dict[str, Factor]
    scale: float

    @classmethod
    def of(cls, factors: Mapping[str, FactorLike], scale: float) -> Adapter:
        """Build an adapter from factors in the order of their product."""
        return cls({label: Factor.of(given) for label, given in factors.items()}, scale)

    @property
    def trains_beside_shared(self) -> bool:
        """Return whether it has one trained factor and one frozen factor shared by all clients."""
        frozen = [f for f in self.factors.values() if not f.trained]
        return len(self.factors) == 2 and len(frozen) == 1 and not frozen[0].per_client


@dataclass(frozen=True)
class RoundInstructions:
    """Hold the instructions of one exchange to the clients of a round.

    Attributes:
        adapters: Low-rank terms by weight name.
        dense: Tensors trained in full, by parameter name. A name that is no parameter belongs to
            the client program (which must take it out in `ClientProgram.held` and send it in
            `upload`), or to a wrapper, which defines its start and its effect on the weights.
        program: The clients' program, with its payload.
        ranks: Components of every adapter that each client trains; the others keep their starting
            values (`fedraclora.protocol.rank_budgets`). Int64 [K]: the first r_k (all of an
            adapter of lower rank); int64 [K, 2]: part g of G equal parts. None: all.
        link: Number of links that have ended, with a merge or without. As long as it stays, frozen
            factors stay and trained ones are continued, so that a client may keep its moments
            (`fedraclora.training.moments`).
        extras: Further tensors that clients add to gradients, by the name of the extra that sends
            them: by trained name, in its shape, or [K, *shape] at the clients.
    """

    adapters: dict[str, Adapter] = field(default_factory=dict)
    dense: dict[str, Factor] = field(default_factory=dict)
    program: ClientProgram = PLAIN
    ranks: torch.Tensor | None = None
    link: int = 0
    extras: dict[str, Tree] = field(default_factory=dict)

    @property
    def frame(self) -> tuple[int, int, int]:
        """Return the frozen factor's place, the number of factors that recur, and its index."""
        return self.program.frame or (0, 1, self.link)

    def factors(self) -> dict[str, Factor]:
        """All factors of all adapters, by ``"<weight>/<label>"``."""
        return self._factors

    @cached_property  # called some thirty times in a round
    def _factors(self) -> dict[str, Factor]:
        return {
            f"{weight}/{label}": factor
            for weight, adapter in self.adapters.items()
            for label, factor in adapter.factors.items()
        }

    @cached_property
    def named(self) -> dict[str, Factor]:
        """Return all factors and all tensors trained in full, by name."""
        return self._factors | self.dense

    def mapped(self, change: Callable[[str, Factor], Factor]) -> RoundInstructions:
        """Replace every factor and dense tensor by ``change(name, value)``."""
        found = {name: change(name, factor) for name, factor in self.named.items()}
        if all(found[name] is factor for name, factor in self.named.items()):
            return self  # as if only seeds are sent
        adapters = {
            w: replace(a, factors={k: found[f"{w}/{k}"] for k in a.factors})
            for w, a in self.adapters.items()
        }
        dense = {name: found[name] for name in self.dense}
        return replace(self, adapters=adapters, dense=dense)

    def with_past(self, base: Tree) -> RoundInstructions:
        """Fill in the factors of the last merge, which are stored beside the base weights."""
        return self.mapped(
            lambda name, each: each.with_past(base.get(past_name(name.rpartition("/")[0])))
        )

    def to(self, dtype: torch.dtype) -> RoundInstructions:
        """Convert tensors for sending: on the CPU, in one precision, row by row.

        Coefficients stay in float64.

        A tensor read from a message is contiguous; products of one that is not may differ in their
        last bits.
        """

        def sent(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to("cpu", dtype).contiguous()

        found = self.mapped(lambda _, each: each.with_numbers(sent))
        trees = self.extras.items()
        extras = {e: {n: sent(t) for n, t in tree.items()} for e, tree in trees}
        return replace(found, extras=extras) if extras else found

    def trained(self) -> Mapping[str, Factor]:
        """Return everything that clients train, by its name on the uplink, in packing order."""
        return self._trained

    @cached_property
    def _trained(self) -> Mapping[str, Factor]:
        return {name: f for name, f in self.factors().items() if f.trained} | self.dense

    def uploaded(self) -> Mapping[str, Factor]:
        """Return what clients send back, in packing order."""
        return self._uploaded

    @cached_property
    def _uploaded(self) -> Mapping[str, Factor]:
        return {name: slot for name, slot in self.trained().items() if slot.upload}

    @cached_property
    def layout(self) -> Layout:
        """Return names and shapes of what each client sends back."""
        return Layout(tuple((name, slot.shape) for name, slot in self.uploaded().items()))

    @cached_property
    def apart(self) -> bool:
        """Return whether the same position in two uplinks may belong to different parameters."""
        own = (f.per_client for f in self.named.values() if f.upload)
        return self.ranks is not None or any(own)

    # What a run in which this is sent does not go with.

    @Feature(
        "clients that train different parameters",
        instead="another method, system=none (system.rank_budget=null), method.sketches=1",
        each_round=True,
    )
    def _trains_apart(self) -> bool:
        return self.apart

    @Feature("clients that start from different factors", each_round=True)
    def _starts_apart(self) -> bool:
        return any(slot.per_client for slot in self.uploaded().values())

    @Feature(
        "a round without a mean gradient",
        instead="another method, system.rank_budget=null",
        each_round=True,
    )
    def _has_no_mean_gradient(self) -> str:
        if self.apart:
            return "other factors for each client"
        return self._own_steps()

    @Feature("clients that send gradients", each_round=True)
    def _asks_gradients(self) -> bool:
        return not self.program.trains

    @Feature(
        "a method with a client program of its own",
        instead="another method, another method.init or allocation=none",
        each_round=True,
    )
    def _own_steps(self) -> str:
        return "" if self.program.plain else f"the client program {self.program.name}"

    @Feature(
        "a method without adapters",
        instead="a method with adapters",
        each_round=True,
    )
    def _has_no_adapters(self) -> bool:
        return self.program.trains and not self.adapters

    @Feature("adapters with three factors", each_round=True)
    def _multiplies_three(self) -> str:
        return self._unlike(lambda adapter: tuple(adapter.factors) == ("B", "A"))

    @Feature("adapters with three factors that train an outer one", each_round=True)
    def _trains_ends(self) -> str:
        def core(adapter: Adapter) -> bool:
            trained = [label for label, each in adapter.factors.items() if each.trained]
            return tuple(adapter.factors) == ("B", "A") or trained == ["R"]

        return self._unlike(core)

    @Feature("adapters that train both factors", each_round=True)
    def _trains_both(self) -> str:
        return self._unlike(lambda adapter: any(not f.trained for f in adapter.factors.values()))

    @Feature("a method with its own rule for local steps", each_round=True)
    def _limits_steps(self) -> str:
        limits = self.program.trains and not self.program.plain
        return f"the client program {self.program.name}" if limits else ""

    def _unlike(self, wanted: Callable[[Adapter], bool]) -> str:
        """Name the first adapter that clients train and that is not as wanted."""
        adapters = self.adapters.items() if self.program.trains else ()
        return next((name for name, adapter in adapters if not wanted(adapter)), "")

    @Feature("a method whose clients send gradients first")
    def _begins_with_gradients(self) -> bool:
        return not self.program.trains

    @Feature("a method that sends numbers that it never trains")
    def _fixes(self) -> bool:
        return self.program.fixes

    @Feature("a method that trains a sparse part of the full weights")
    def _fixes_entries(self) -> bool:
        return self.program.fixes and not self.adapters

    @Feature("a method whose clients send numbers along random directions")
    def _along_directions(self) -> str:
        return f"the client program {self.program.name}" if self.program.moves_weights else ""

    @Feature("a method that estimates gradients from losses")
    def _by_losses(self) -> bool:
        return self.program.forms_gradients

    @Feature("momentum that the method keeps over rounds", instead="no momentum of the method")
    def _keeps_direction(self) -> bool:
        return self.program.keeps_direction

    @Feature("a trained factor A or B", take="a method whose clients train one in round 1")
    def _trains_rows(self) -> bool:
        factors = self.factors().items()
        sent = (name for name, factor in factors if factor.trained and factor.upload)
        return not self.program.trains or any(name.endswith(("/A", "/B")) for name in sent)

    @FROM_ZERO
    def _begins_at_zero(self) -> str:
        """Return the name of the first such adapter."""
        for name, adapter in self.adapters.items():
            if not all(map(_begun, adapter.factors.values())):
                return name
        return ""

    @PARTS_OF_WEIGHTS
    def _holds_weights(self) -> str:
        """Return the names of products and tensors that do not start at zero."""
        for name, adapter in self.adapters.items():
            factors = adapter.factors.values()
            if any(f.numbers is not None for f in factors) and all(map(_begun, factors)):
                return f"the factors of {name}"
        return next((name for name, slot in self.dense.items() if _begun(slot)), "")

    def select(self, places: torch.Tensor) -> RoundInstructions:
        """Keep the per-client values of the clients at ``places`` (int64) only."""

        def part(_name: str, each: Factor) -> Factor:
            return each.with_numbers(lambda t: t[places]) if each.per_client else each

        ranks = None if self.ranks is None else self.ranks[places]
        slots = self.trained()
        extras = {
            extra: {n: t[places] if t.dim() > len(slots[n].shape) else t for n, t in tree.items()}
            for extra, tree in self.extras.items()
        }
        return replace(self.mapped(part), ranks=ranks, extras=extras)

    def of_one(self, place: int) -> RoundInstructions:
        """Replace per-client values by those of the client at one place."""
        return self.mapped(
            lambda _, each: each.with_numbers(lambda t: t[place]) if each.per_client else each
        )


def _begun(factor: Factor) -> bool:
    """Return whether a factor is sent and is not zero."""
    return factor.sketch is not None if factor.numbers is None else bool(factor.numbers.any())


def opening_rows(
    sent: RoundInstructions, base: Tree, layout: Layout, places: torch.Tensor
) -> torch.Tensor:
    """Compute the starting values of what clients upload, as rows.

    Args:
        sent: The instructions.
        base: The base weights: the start of dense tensors, unless ``sent`` has one.
        layout: Layout of the uplink.
        places: The clients' places among those that ``sent`` is for, int64 [K].

    Returns:
        float64 [P] on the CPU; or [K, P] if clients start at different values.
    """
    slots = sent.uploaded()
    apart = any(slot.per_client for slot in slots.values())
    found = {}
    for name, shape in layout.shapes:
        start = slots[name].opening()
        if start is None:
            start = base.get(name, torch.zeros(shape))
        start = start.to("cpu", torch.float64)
        if slots[name].per_client:
            start = start[places]
        elif apart:
            start = start.expand(len(places), *shape)
        found[name] = start
    return layout.pack(found, lead=int(apart))
