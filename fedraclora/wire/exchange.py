"""Requests as data: the server's request to some clients in an exchange, and its payload.

In one process and between Ray workers the object itself is passed on; `fedraclora.engines.asks`
writes it as Flower records. Both send the part that all clients of an exchange share separately
from each client's own part (`without_own`, `own_rows`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from typing_extensions import override

from fedraclora.codec import join, split
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.quantized import FULL, packed_bytes, sent_bytes
from fedraclora.tree import Tree, to_numpy

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TrainRequest:
    """Hold the instructions to clients beside the downlink.

    Attributes:
        round_: From 1.
        version: Version of the base weights that the clients must hold.
        rate_scale: Factor of the step sizes in this round.
        clients: Ids, int64 [k].
        first: Place of the first of them in the cohort.
        places: The places of all, int64 [k]; None: consecutive places.
        reduce: None for one row per client; ``examples`` or ``uniform`` for weighted sums of
            blocks of clients (`fedraclora.protocol.uplinks`), where ``first`` opens a block.
        clip: Largest norm of a client's update; None: no limit.
        uplink: Number format of the uplink (`fedraclora.protocol.quantized`).
        coding: Lossless coding of these numbers (`fedraclora.protocol.coding`).
        feedback: Whether clients keep the quantization error (`fedraclora.wire.feedback`).
        lr: The learning rate, if the config of remote clients says auto; None: their own.
        measure: None: train. ``before``: evaluate the weights at the start of the round on
            held-out samples, and send the sums. ``after``: also train them, evaluate the result,
            and keep it at the client.
    """

    round_: int
    version: int
    rate_scale: float
    clients: torch.Tensor
    first: int = 0
    reduce: str | None = None
    clip: float | None = None
    uplink: str = FULL
    feedback: bool = False
    measure: str | None = None
    places: torch.Tensor | None = None
    coding: str = NONE
    lr: float | None = None

    @property
    def order(self) -> torch.Tensor:
        """Return the clients' places in the round, ascending, int64 [k]."""
        row = torch.arange(self.first, self.first + len(self.clients))
        return row if self.places is None else self.places


@dataclass(frozen=True)
class Stage:
    """Hold the data of one stage of secure aggregation, in a request or a reply.

    Attributes:
        name: One of `fedraclora.wire.secagg.STAGES`.
        settings: Sent to all clients.
        data: To or from each client, by its id: plain JSON values.
    """

    name: str
    settings: dict[str, Any]
    data: dict[int, Any]

    @property
    def length(self) -> int:
        """Return the bytes of the data as JSON."""
        head = {"stage": self.name, "settings": self.settings}
        return sum(len(json.dumps(said)) for said in (head, *self.data.values()))

    @property
    def through_json(self) -> Stage:
        """Return a copy as the receiver reads it, converted to JSON and back."""
        return join(Stage, {}, json.loads(json.dumps(split(self)[1])))


@dataclass(frozen=True)
class Ask:
    """Hold a request to some clients of a round.

    Attributes:
        request: The clients, the round, the version of the weights, and the form of the reply.
        downlink: The factors to train, with their numbers as sent; None in a stage of secure
            aggregation that sends none.
        kind: Number format of the downlink, to which its numbers have been rounded.
        coding: Coding of the numbers that all clients share; a reader sees it from the length.
        apart: Whether the downlink is that of the whole cohort, with values of each client.
        stage: Of secure aggregation, or None.
    """

    request: TrainRequest
    downlink: RoundInstructions | None = None
    kind: str = FULL
    apart: bool = False
    stage: Stage | None = None
    coding: str = NONE

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as numpy arrays, which Ray sends to other processes with one copy."""
        tensors, plain = split(self)
        return _from_arrays, ({name: to_numpy(t) for name, t in tensors.items()}, plain)

    @override
    def __str__(self) -> str:
        first, *_, last = [*self.clients, *self.clients]
        who = f"client {first}" if first == last else f"clients {first} to {last}"
        return f"the chunk with {who} of round {self.request.round_}"

    @property
    def clients(self) -> list[int]:
        """Return the ids of the clients."""
        found: list[int] = self.request.clients.tolist()
        return found

    @property
    def places(self) -> torch.Tensor:
        """Return the places of its clients in the downlink, int64 [k]."""
        return self.request.order if self.apart else torch.arange(len(self.request.clients))

    @property
    def own(self) -> RoundInstructions:
        """Return the downlink of these clients."""
        if self.downlink is None:
            return RoundInstructions()
        return self.downlink.select(self.request.order) if self.apart else self.downlink


def _from_arrays(arrays: Mapping[str, Any], plain: Mapping[str, Any]) -> Ask:
    # Copied into memory of torch's own: that of Ray is not to be written to.
    return join(Ask, {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, plain)


@dataclass(frozen=True)
class OwnPart:
    """Hold the part of a request that is for its clients only; the rest is shared.

    Attributes:
        request: With its own clients; its other fields are shared.
        rows: The downlink's tensors with one value per client, [k, ...] by name.
        ranks: Their rank budgets, if any.
        stage: Of secure aggregation.
    """

    request: TrainRequest
    rows: Tree
    ranks: torch.Tensor | None
    stage: Stage | None

    @classmethod
    def of(cls, ask: Ask) -> OwnPart:
        """Select the part from a request."""
        sent, places = ask.downlink, ask.places
        if sent is None:
            return cls(ask.request, {}, None, ask.stage)
        own = {n: f.numbers for n, f in sent.named.items() if f.per_client}
        rows = {name: numbers[places] for name, numbers in own.items() if numbers is not None}
        ranks = None if sent.ranks is None else sent.ranks[places]
        return cls(ask.request, rows, ranks, ask.stage)

    def joined(self, shared: Ask) -> Ask:
        """Join the part with the shared rest (`shared_of`)."""
        found = replace(shared, request=self.request, stage=self.stage)
        if found.downlink is None or not (self.rows or self.ranks is not None):
            return found
        rows = self.rows
        downlink = found.downlink.mapped(
            lambda name, each: replace(each, numbers=rows[name]) if name in rows else each
        )
        return replace(found, downlink=replace(downlink, ranks=self.ranks))


def shared_of(ask: Ask) -> Ask:
    """Return a request without its clients' own part, but with their ids (`OwnPart`)."""

    def blank(_: str, each: Factor) -> Factor:
        return replace(each, numbers=None) if each.per_client else each

    downlink = ask.downlink
    if downlink is not None:
        downlink = downlink.mapped(blank)
        downlink = downlink if downlink.ranks is None else replace(downlink, ranks=None)
    return replace(ask, downlink=downlink, apart=False, stage=None)


def sent_tensors(downlink: RoundInstructions) -> dict[str, tuple[torch.Tensor, bool]]:
    """Return every tensor of a downlink by name, and whether each client has its own.

    Coefficients, which are float64 always, are left out.
    """
    named = downlink.named.items()
    sent = {n: (f.numbers, f.per_client) for n, f in named if f.numbers is not None}
    for extra, tree in downlink.extras.items():
        sent |= {f"{extra}/{name}": (tensor, False) for name, tensor in tree.items()}
    return sent


def payload_bytes(
    downlink: RoundInstructions, cohort: int, kind: str, clients: int = 1, coding: str = NONE
) -> int:
    """Return the payload bytes of a message with a downlink to clients of a round.

    Args:
        downlink: The instructions.
        cohort: Number of clients of the round.
        kind: Number format: a key of `WIDTHS`, or one of `ROUNDED`.
        clients: Number of clients of this message; it contains shared numbers once.
        coding: Of the shared numbers.

    Returns:
        The bytes of its numbers, and 8 per seed. A factor computed from the last merge counts
        with its coefficients and a seed.
    """
    sent = sent_tensors(downlink).values()
    shared = sent_bytes([t for t, own in sent if not own], kind, coding)
    each = packed_bytes([t.numel() // cohort for t, own in sent if own], kind)
    exact = sum(f.exact_bytes for f in downlink.named.values())
    exact += downlink.program.payload_bytes
    return shared + clients * int(each) + exact
