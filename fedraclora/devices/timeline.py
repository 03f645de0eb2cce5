"""Run one round on the virtual clock: used replies, dropped clients and duration.

A round ends at the first of: enough replies; every client has replied or dropped out; the deadline.
The server notices a dropout at once (the connection is lost).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from fedraclora.errors import ClientError
from fedraclora.protocol.uplinks import Refusal

# Prefixes of the reasons for a dropped client.
REASONS = ("dropped out", "late", "not among the first")


@dataclass(frozen=True)
class Load:
    """Hold the work of each client of a round.

    Attributes:
        passes: Sample passes of each client [K].
        down, up: Payload bytes [K].
    """

    passes: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor


@dataclass(frozen=True)
class Timeline:
    """Hold the outcome of a round on the virtual clock.

    Attributes:
        kept: Positions of the clients whose reply is used, ascending, int64.
        dropped: The other clients, each with its reason, in order.
        seconds: Virtual duration of the round.
        per_client: Virtual seconds until each client's reply, if nothing stops it, float64 [K].
        notes: Further entries for the ledger.
    """

    kept: torch.Tensor
    dropped: list[Refusal]
    seconds: float
    per_client: torch.Tensor
    notes: list[str]


@dataclass(frozen=True)
class ArrivalOrder:
    """Order the clients of a round by when they would reply or drop out.

    Attributes:
        round_: From 1.
        clients: Ids, int64 [K].
        seconds: Virtual seconds until each client's reply, float64 [K].
        dropped: Virtual seconds until each client drops out, inf if it does not, float64 [K].
        ties: Orders clients of equal seconds, [K].
        needed: Replies that end the round.
        deadline: Virtual seconds after which replies are late; inf = none.
    """

    round_: int
    clients: torch.Tensor
    seconds: torch.Tensor
    dropped: torch.Tensor
    ties: torch.Tensor
    needed: int
    deadline: float = math.inf

    def run(self) -> Timeline:
        """Compute which clients reply in time.

        Raises:
            ClientError: If no client does.
        """
        stays = self.dropped.isinf()
        answers = torch.nonzero(stays & (self.seconds <= self.deadline)).flatten()
        if not len(answers):
            raise self._nobody(stays)
        answers = answers[self.ties[answers].argsort()]
        answers = answers[self.seconds[answers].argsort(stable=True)]
        kept = answers[: self.needed].sort().values
        if len(kept) == self.needed:
            end = float(self.seconds[kept].max())
        else:
            end = min(self.deadline, float(torch.minimum(self.seconds, self.dropped).max()))
        left = torch.ones(len(self.clients), dtype=torch.bool)
        left[kept] = False
        columns = (column[left].tolist() for column in (self.clients, self.seconds, self.dropped))
        dropped = [Refusal(k, self._reason(s, g, end)) for k, s, g in zip(*columns, strict=True)]
        notes = []
        if len(self.clients) < self.needed:
            notes.append(f"asked {len(self.clients)} of {self.needed} clients: no more available")
        return Timeline(kept, dropped, end, self.seconds, notes)

    def _reason(self, seconds: float, dropped: float, end: float) -> str:
        if dropped <= end:
            return f"{REASONS[0]} after {_shown(dropped)}"
        if seconds > self.deadline:
            return f"{REASONS[1]}: {_shown(seconds)}, the deadline is {self.deadline:g} s"
        return f"{REASONS[2]} {self.needed} to answer"

    def _nobody(self, stays: torch.Tensor) -> ClientError:
        lost = len(stays) - int(stays.sum())
        failure = f"round {self.round_}: no client answered; {lost} of {len(stays)} dropped out"
        if lost == len(stays):
            return ClientError(
                f"{failure}; lower system.drop_out, or raise clients_per_round or over_select"
            )
        fastest = _shown(float(self.seconds[stays].min()))
        return ClientError(
            f"{failure}, the fastest of the others takes {fastest} and the deadline is "
            f"{self.deadline:g} s; raise system.deadline, or give clients less work"
        )


def _shown(seconds: float) -> str:
    return f"{seconds:,.1f} s" if seconds >= 10 else f"{seconds:.3g} s"
