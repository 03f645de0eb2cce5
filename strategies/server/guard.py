"""What a reply must be where clients are other people's machines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fedraclora.errors import ClientError, WireError
from fedraclora.wire import DTYPES, Reply
from strategies.server.loop import LoopConfig

T = TypeVar("T")


def check_reply(
    reply: Reply, clients: Sequence[int], first: int, loop: LoopConfig, *, reduced: bool
) -> None:
    """Hold a reply against the message that it answers.

    Args:
        reply: What came; its layout has been checked.
        clients: Whom the message asked.
        first: Place of the first of them in the cohort.
        loop: Settings: the kind of numbers, and the most samples of a client.
        reduced: Whether sums were asked for.

    Raises:
        WireError: Saying what came and what was wanted.
    """
    named = [*reply.clients.tolist(), *reply.failures, *(r.client for r in reply.refused)]
    if sorted(named) != sorted(clients):
        raise WireError(f"the reply is of clients {sorted(named)}, asked were {[*clients]}")
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
