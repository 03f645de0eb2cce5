"""Check replies of untrusted clients, and the weights that a method returns.

A method's result must also match its declared traits. `fedraclora.wire.reply` names the other
checks of a reply.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedraclora.aggregation.base import AggregationContext, rows_of, starts
from fedraclora.errors import ConfigError, WireError
from fedraclora.protocol.factor import adapted_weight
from fedraclora.protocol.method import Method, RoundInstructions, State
from fedraclora.protocol.uplinks import SUM_BLOCK, Uplinks, finite, greatest_norm
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.wire.answers import NumericAnswer, SummedAnswer, TrainedAnswer
from fedraclora.wire.exchange import DTYPES, Ask


def check_reply(reply: NumericAnswer, ask: Ask, loop: LoopConfig, counts: torch.Tensor) -> None:
    """Check a reply against the message that it answers.

    Args:
        reply: The reply; its fields and its layout have been checked.
        ask: The request.
        loop: Settings: the number format, and the most samples of a client.
        counts: How many numbers each of these clients must send, int64 [k].

    Raises:
        WireError: Naming the found and the expected value.
    """
    clients, first = ask.clients, ask.request.first
    answered = reply.clients.tolist()
    named = [*answered, *reply.failures]
    named += [r.client for r in reply.refused] if isinstance(reply, SummedAnswer) else []
    if sorted(named) != sorted(clients):
        raise WireError(f"the reply is from clients {sorted(named)}, expected {clients}")
    if answered != [client for client in clients if client in set(answered)]:
        raise WireError(f"the reply lists clients {answered}, expected the order {clients}")
    if reply.first != first:
        raise WireError(
            f"the reply begins at place {reply.first} of the round's clients, expected place "
            f"{first}"
        )
    expected = DTYPES[loop.dtype] if isinstance(reply, TrainedAnswer) else torch.float64
    if reply.numbers.dtype != expected:
        raise WireError(f"the numbers of the reply are {reply.numbers.dtype}, expected {expected}")
    most = loop.max_samples
    for name, found, least in (("samples", reply.samples, 1), ("steps", reply.steps, 0)):
        low = found <= 0 if found.is_floating_point() else found < least  # of Flower apps
        if (low | (found > most)).any():
            raise WireError(
                f"the reply reports {found.tolist()} {name}, expected {least} to {most}"
            )
    rounding = reply.vectors.get("rounding")
    if rounding is not None and not (rounding.isfinite() & (rounding >= 0)).all():
        raise WireError(
            f"the reply reports a quantization error of {rounding.tolist()}, expected numbers "
            "of at least 0"
        )
    if isinstance(reply, SummedAnswer):
        _check_sums(reply, clients)
        return
    sent = int(counts[torch.isin(ask.request.clients, reply.clients)].sum())
    if reply.numbers.numel() != sent:
        raise WireError(
            f"{len(answered)} clients sent {reply.numbers.numel()} numbers in all, expected {sent}"
        )


def _check_sums(reply: SummedAnswer, clients: Sequence[int]) -> None:
    """Check sums against the clients in them, which have checked their own rows."""
    blocks = -(-len(clients) // SUM_BLOCK)
    if len(reply.numbers) != blocks:
        raise WireError(f"the reply has {len(reply.numbers)} sums, expected {blocks}")
    if not finite(reply.numbers).all() or not (reply.losses < math.inf).all():
        raise WireError("a sum or a loss in the reply is NaN or infinite")
    if not len(reply.clients) and reply.numbers.any():
        raise WireError("the reply has a nonzero sum, but no client in it")


def hold_to_traits(method: Method, before: State, after: State, sent: RoundInstructions) -> State:
    """Return the state after a round, checked against the method's traits.

    A round without client steps may subtract the first factors from the base.

    Raises:
        ConfigError: If a method that declares no merges has changed an adapted weight.
    """
    for name in before.plan.targets if sent.program.trains and not method.traits.merges else ():
        old, new = before.base[name], after.base[name]
        if new is not old and not torch.equal(new, old):
            raise ConfigError(
                f"{type(method).__name__} has merges=False in its traits, but merges into "
                f"{name}. Set merges=True, or carry the factors (LayerUpdate(carried=...))"
            )
    return after


def overflowing(after: State, before: State) -> list[str]:
    """Return the tensors of a new state that are too large or not finite; only changed ones.

    With such weights every client would fail, in the next round and in every resume. Norms of a
    layer's factors are multiplied, like the factors; other tensors (row lengths, a method's own
    sums) are checked separately. One pass without copies.
    """
    new = [*after.base.items(), *after.carried.items(), *after.moments.items()]
    old = {id(t) for tree in (before.base, before.carried, before.moments) for t in tree.values()}
    wrong = [n for n, t in new if id(t) not in old and not _norm(t) <= _limit(t)]
    layers: dict[str, list[torch.Tensor]] = {}
    for name, tensor in after.carried.items():
        weight = adapted_weight(name, after.plan.targets)
        if weight is not None and tensor.is_floating_point():
            layers.setdefault(weight, []).append(tensor)
    return wrong or [layer for layer, factors in layers.items() if not _fits(factors)]


def _fits(factors: list[torch.Tensor]) -> bool:
    """Return whether the product of the factors of one layer is small enough."""
    return math.prod(max(1.0, _norm(f)) for f in factors) <= min(map(_limit, factors))


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor)) if tensor.is_floating_point() else 0.0


def _limit(tensor: torch.Tensor) -> float:
    return greatest_norm(tensor.dtype) if tensor.is_floating_point() else 0.0


def largest(uplinks: Uplinks, setting: AggregationContext) -> tuple[int, float]:
    """Find the client whose update has the largest norm, and that norm."""
    norms = torch.linalg.vector_norm(rows_of(uplinks) - starts(setting, uplinks), dim=1)
    place = int(norms.argmax())
    return int(uplinks.clients[place]), float(norms[place])
