"""Merges: how one round changed the base weights, and the function that applies the change."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import reduce

import torch

from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.narrow_weight import QuantisedWeight, base_name
from fedraclora.protocol.factor import Factor, FactorLike, past_name
from fedraclora.protocol.named import RegisteredByName
from fedraclora.protocol.quantized import FULL
from fedraclora.tree import Tree


@dataclass(frozen=True)
class Plan:
    """Define which parameters are adapted, and which are trained in full; the same for all methods.

    Attributes:
        targets: Adapted matrices: weight name -> its (out, in) view.
        dense: Parameters trained in full and averaged (biases, an averaged head, modules_to_save).
        local: Parameters trained in full that stay at each client (a personal head).
        weights: Every weight that full fine-tuning trains, in model order, without biases.
        shapes: Stored shape of every parameter.
    """

    targets: dict[str, LayerView]
    dense: tuple[str, ...] = ()
    local: tuple[str, ...] = ()
    weights: tuple[str, ...] = ()
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """Add a product of factors to a weight.

    Attributes:
        factors: Factors in order; a single one is a change in the weight's stored shape.
        scale: Scale of their product.
        kind: Number format in which they are sent (`fedraclora.protocol.quantized`); they have
            already been rounded to it.
        keep: Index of the factor, a matrix, that stays beside the weight until the next such term,
            which may be computed from it (`fedraclora.protocol.factor`); None: none.

    Raises:
        ConfigError: If the factor to keep is not one of its matrices.
    """

    factors: tuple[Factor, ...] = field(metadata={"kind": "kind"})
    scale: float
    kind: str = FULL
    keep: int | None = None

    def __post_init__(self) -> None:
        """Reject a factor to keep that clients would not have."""
        if self.keep is not None and self.kept is None:
            raise ConfigError(
                f"factor {self.keep} of a product of {len(self.factors)} is to stay beside its "
                "weight, but it is no matrix: whoever needs a drawing draws it from its seed"
            )

    @classmethod
    def of(
        cls, factors: Iterable[FactorLike], scale: float, kind: str = FULL, keep: int | None = None
    ) -> Term:
        """Build a term from a method's factors."""
        return cls(tuple(map(Factor.of, factors)), scale, kind, keep)

    def with_past(self, past: torch.Tensor | None) -> Term:
        """Fill in the factor of the last merge, if a factor is computed from it."""
        return replace(self, factors=tuple(f.with_past(past) for f in self.factors))

    @property
    def kept(self) -> torch.Tensor | None:
        """Return the factor that is kept beside the weight."""
        found = {place: f.numbers for place, f in enumerate(self.factors)}
        return None if self.keep is None else found.get(self.keep)


Terms = dict[str, Term]


@dataclass(frozen=True)
class Move(RegisteredByName):
    """Change some weights together by a few numbers.

    Attributes:
        names: The weights.
    """

    names: tuple[str, ...]

    @property
    def payload_bytes(self) -> int:
        """Return the bytes of its numbers, and 8 for each seed."""
        raise NotImplementedError

    @property
    def keeps_direction(self) -> bool:
        """Return whether a tensor of the size of each weight is kept beside it (momentum)."""
        return False

    def taken(self, base: Mapping[str, torch.Tensor]) -> Tree:
        """Compute the new weights, and the tensors kept beside them; ``base`` is not changed."""
        raise NotImplementedError


@dataclass(frozen=True)
class Link:
    """Hold how one round changed the base: low-rank terms to add, dense values to replace.

    The sequence of merges is the log from which an absent client catches up.

    Attributes:
        terms: Low-rank terms by weight.
        dense: New values by name. A name with a "/" is not a parameter, but a tensor that replicas
            keep beside the parameters (`fedraclora.protocol.factor`, or a method).
        rest: Further changes of the same round, in order: a weight may have a term in each.
        kind: Number format of the new values, as in `Term`; `rest` has its own.
        moves: Changes of whole weights by few numbers, each of different weights.
    """

    terms: dict[str, Term] = field(default_factory=dict)
    dense: Tree = field(default_factory=dict, metadata={"kind": "kind"})
    rest: tuple[Link, ...] = ()
    kind: str = FULL
    moves: tuple[Move, ...] = ()

    @property
    def changes(self) -> bool:
        """Return whether the merge changes any weight."""
        return bool(self.terms or self.dense or self.rest or self.moves)

    def parts(self) -> tuple[Link, ...]:
        """Split the merge into the changes of the round, in order."""
        own = (replace(self, rest=()),)
        return own + tuple(part for link in self.rest for part in link.parts())


def matrices(term: Term) -> tuple[torch.Tensor, ...]:
    """Compute the factors of a term as float64 matrices."""
    return tuple(f.draw().to("cpu", torch.float64) for f in term.factors)


def apply_link(base: Mapping[str, torch.Tensor], link: Link, plan: Plan) -> Tree:
    """Merge a round's change into base weights: ``W + scale * product``, dense values replaced.

    The server and all replicas call this function, so that they stay equal to the bit on one build.
    The product is computed in float64 on the CPU, where sketches are drawn, and rounded once to the
    type of the base. The factor that a term keeps is stored beside its weight.

    Args:
        base: Weights in their stored layout. Not modified.
        link: The change to merge.
        plan: Has each target's (out, in) view.

    Raises:
        ConfigError: If there is a term for a quantized weight.

    Returns:
        A new tree; untouched tensors are shared with ``base``.
    """
    out = dict(base)
    for name, term in link.terms.items():
        if isinstance(base[name], QuantisedWeight):
            raise ConfigError(
                f"{name} is held in {base_name(base[name])}, and nothing can be merged into it: "
                "set model.base=float32"
            )
        # Each in one memory layout: how a library multiplies, and so the last bit, may depend on
        # it.
        known = term.with_past(out.get(past_name(name)))
        first, *others = (matrix.contiguous() for matrix in matrices(known))
        old = base[name]
        new = torch.empty(old.shape, dtype=torch.float64, device=old.device).copy_(old)
        W = plan.targets[name].matrix(new) if others else new
        if others and new.device.type == "cpu":
            *middle, last = others
            W.addmm_(reduce(torch.matmul, middle, first), last, alpha=term.scale)
        else:
            W.add_(reduce(torch.matmul, others, first).to(new.device), alpha=term.scale)
        out[name] = new.to(old.dtype)
        if term.kept is not None:
            out[past_name(name)] = term.kept.to(out[name])
    for name, value in link.dense.items():
        out[name] = value.to(base[name]) if name in base else value
    for move in link.moves:
        out |= move.taken(out)
    for part in link.rest:
        out = apply_link(out, part, plan)
    return out
