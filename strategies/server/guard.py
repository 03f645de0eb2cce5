"""What a reply must be where clients are other people's machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fedraclora.errors import ClientError, WireError
from fedraclora.protocol.uplinks import SUM_BLOCK, finite
from fedraclora.wire import DTYPES, Reply
from strategies.server.loop import LoopConfig

T = TypeVar("T")


def check_reply(
    reply: Reply,
    clients: Sequence[int],
    first: int,
    loop: LoopConfig,
    *,
    reduced: bool,
    counts: torch.Tensor,
) -> None:
    """Hold a reply against the message that it answers.

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
        raise WireError(f"the reply is of clients {sorted(named)}, asked were {[*clients]}")
    if answered != [client for client in clients if client in set(answered)]:
        raise WireError(f"the reply is of clients {answered}, in another order than {[*clients]}")
    if reply.reduced != reduced or reply.first != first:
        raise WireError(
            f"the reply is of place {reply.first}, reduced={reply.reduced}; asked was "
            f"{first}, reduced={reduced}"
        )
    wanted = torch.float64 if reduced else DTYPES[loop.dtype]
    if reply.numbers.dtype != wanted:
        raise WireError(f"its numbers are {reply.numbers.dtype}, wanted are {wanted}")
    most = loop.max_samples
    for name, found, least in (("samples", reply.samples, 1), ("steps", reply.steps, 0)):
        if ((found < least) | (found > most)).any():
            raise WireError(f"it claims {found.tolist()} {name}; {least} to {most} are wanted")
    if reduced:
        _check_sums(reply, clients)
    else:
        sent = int(counts[torch.isin(torch.tensor([*clients]), reply.clients)].sum())
        if reply.numbers.numel() != sent:
            raise WireError(
                f"{len(answered)} clients sent {reply.numbers.numel()} numbers, wanted are {sent}"
            )


def _check_sums(reply: Reply, clients: Sequence[int]) -> None:
    """Hold sums against who is in them: clients have checked their own rows."""
    blocks = -(-len(clients) // SUM_BLOCK)
    if len(reply.numbers) != blocks:
        raise WireError(f"{len(reply.numbers)} sums came, wanted are {blocks}")
    if not finite(reply.numbers).all() or not torch.isfinite(reply.losses).all():
        raise WireError("its sum has a NaN or an infinity, or one of its losses has")
    if not len(reply.clients) and reply.numbers.any():
        raise WireError("it sent a sum of nobody")


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
