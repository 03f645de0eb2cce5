"""What a reply must be where clients are other people's machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fedraclora.errors import ClientError, WireError
from fedraclora.protocol.uplinks import SUM_BLOCK, finite
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.wire.exchange import DTYPES, Answer

T = TypeVar("T")


def check_reply(
    reply: Answer,
    clients: Sequence[int],
    first: int,
    loop: LoopConfig,
    *,
    reduced: bool,
    counts: torch.Tensor,
) -> None:
    """Check a reply against the message that it answers.

    Args:
        reply: What came; its fields and its layout have been checked.
        clients: Whom the message asked.
        first: Place of the first of them in the cohort.
        loop: Settings: the kind of numbers, and the most samples of a client.
        reduced: Whether sums were asked for.
        counts: How many numbers each of these clients is to send, int64 [k].

    Raises:
        WireError: Saying what came and what was wanted.
    """
    answered = reply.clients.tolist()
    named = [*answered, *reply.failures, *(r.client for r in reply.refused)]
    if sorted(named) != sorted(clients):
        raise WireError(f"the reply is of clients {sorted(named)}, but {[*clients]} were asked")
    if answered != [client for client in clients if client in set(answered)]:
        raise WireError(
            f"the reply is of clients {answered}, in another order than they were asked: "
            f"{[*clients]}"
        )
    if reply.reduced != reduced or reply.first != first:
        raise WireError(
            f"the reply begins at place {reply.first} of the cohort with reduced={reply.reduced}, "
            f"but place {first} with reduced={reduced} was asked for"
        )
    expected = torch.float64 if reduced else DTYPES[loop.dtype]
    if reply.numbers.dtype != expected:
        raise WireError(
            f"the numbers of the reply are {reply.numbers.dtype}, but {expected} is wanted"
        )
    most = loop.max_samples
    for name, found, least in (("samples", reply.samples, 1), ("steps", reply.steps, 0)):
        if ((found < least) | (found > most)).any():
            raise WireError(
                f"the reply says {found.tolist()} {name}; {least} to {most} are possible"
            )
    if reply.rounding is not None and not (reply.rounding.isfinite() & (reply.rounding >= 0)).all():
        raise WireError(
            f"the reply says that rounding added {reply.rounding.tolist()} of each change; "
            "numbers from 0 on are possible"
        )
    if reduced:
        _check_sums(reply, clients)
    else:
        sent = int(counts[torch.isin(torch.tensor([*clients]), reply.clients)].sum())
        if reply.numbers.numel() != sent:
            raise WireError(
                f"{len(answered)} clients sent {reply.numbers.numel()} numbers in all, but {sent} "
                "are wanted"
            )


def _check_sums(reply: Answer, clients: Sequence[int]) -> None:
    """Check sums against who is in them: clients have checked their own rows."""
    blocks = -(-len(clients) // SUM_BLOCK)
    if len(reply.numbers) != blocks:
        raise WireError(f"the reply has {len(reply.numbers)} sums, but {blocks} are wanted")
    if not finite(reply.numbers).all() or not torch.isfinite(reply.losses).all():
        raise WireError("a sum of the reply or one of its losses has a NaN or an infinity")
    if not len(reply.clients) and reply.numbers.any():
        raise WireError("the reply has a sum that is not zero, but no client in it")


def persistently(run: Callable[[], T], retries: int, incidents: list[str]) -> T:
    """Run a round, and run it again if too few clients answered.

    Args:
        run: Runs it; a round that fails has changed nothing.
        retries: Times that it is run again.
        incidents: Takes a sentence for the ledger each time.

    Raises:
        ClientError: That of the last time.
    """
    for _ in range(retries):
        try:
            return run()
        except ClientError as error:
            incidents.append(f"run again: {error}")
    return run()
