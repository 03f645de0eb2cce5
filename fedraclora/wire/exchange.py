"""An exchange as data: what some clients of a cohort are asked, and what came back.

The server, its steps and the engines of one process know these alone. What leaves the process is
written as a message (`fedraclora.wire.downlink`, `reply`) and counted as such (`payload_bytes`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from typing_extensions import override

from fedraclora.errors import OF_THE_RUN
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.method import Downlink
from fedraclora.protocol.quantised import FULL, packed_bytes, sent_bytes
from fedraclora.protocol.uplinks import Refusal
from fedraclora.tree import Layout, Tree

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True)
class TrainRequest:
    """What clients are asked beside the downlink.

    Attributes:
        round_: From 1.
        version: Version of the base weights that the clients must hold.
        rate_scale: Of the step sizes in this round.
        clients: Ids, int64 [k].
        first: Place of the first of them in the cohort.
        places: The places of all, int64 [k]; None: they stand in a row.
        reduce: None for one row per client; ``examples`` or ``uniform`` for weighted sums of
            blocks of clients (`fedraclora.protocol.uplinks`), where ``first`` opens a block.
        clip: The greatest norm of the update that a client may send; None: any.
        uplink: How the clients' numbers travel (`fedraclora.protocol.quantised`).
        coding: And how these are coded (`fedraclora.protocol.coding`).
        feedback: Whether clients keep what rounding left (`fedraclora.wire.feedback`).
        measure: None: to train. ``before``: to measure the weights from which the round begins, on
            samples that they do not train on, and to send the sums; ``after``: to train them, too,
            and measure what comes of it, which stays with them.
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

    @property
    def order(self) -> torch.Tensor:
        """The places of the clients in the cohort, ascending, int64 [k]."""
        row = torch.arange(self.first, self.first + len(self.clients))
        return row if self.places is None else self.places


@dataclass(frozen=True)
class Stage:
    """What an ask of secure aggregation, or its answer, says besides.

    Attributes:
        name: One of `fedraclora.wire.secagg.STAGES`.
        settings: What all clients are told.
        data: What each client is told, or says, by its id: plain JSON values.
    """

    name: str
    settings: dict[str, Any]
    data: dict[int, Any]

    @property
    def texts(self) -> dict[str, str]:
        """What is said, as JSON."""
        head = json.dumps({"stage": self.name, "settings": self.settings})
        return {"head": head} | {str(c): json.dumps(said) for c, said in self.data.items()}

    @property
    def length(self) -> int:
        """Count the bytes of these texts."""
        return sum(map(len, self.texts.values()))

    @property
    def heard(self) -> Stage:
        """Give it as the other side hears it: through JSON, and no object in common."""
        return Stage.of(self.texts)

    @classmethod
    def of(cls, texts: Mapping[str, Any]) -> Stage:
        """Read `texts` back."""
        fields = dict(texts)
        head = json.loads(fields.pop("head"))
        data = {int(client): json.loads(value) for client, value in fields.items()}
        return cls(head["stage"], dict(head["settings"]), data)


@dataclass(frozen=True)
class Ask:
    """What some clients of a cohort are asked.

    Attributes:
        request: Who, in which round, from which weights, and what is wanted back.
        downlink: What to train, its numbers as they travel; None: nothing, in a stage of secure
            aggregation.
        kind: How its numbers travel; they have been rounded to it.
        coding: How those that all clients share are coded; what is read tells it by its length.
        apart: Whether it is that of the whole cohort, and not the same to all.
        stage: Of secure aggregation; None: there is none.
    """

    request: TrainRequest
    downlink: Downlink | None = None
    kind: str = FULL
    apart: bool = False
    stage: Stage | None = None
    coding: str = NONE

    @override
    def __str__(self) -> str:
        first, *_, last = [*self.clients, *self.clients]
        who = f"client {first}" if first == last else f"clients {first} to {last}"
        return f"the chunk with {who} of round {self.request.round_}"

    @property
    def clients(self) -> list[int]:
        """Who is asked."""
        found: list[int] = self.request.clients.tolist()
        return found

    @property
    def own(self) -> Downlink:
        """What these clients are to train."""
        if self.downlink is None:
            return Downlink()
        return self.downlink.select(self.request.order) if self.apart else self.downlink


@dataclass(frozen=True)
class Answer:
    """What came back: what clients trained, and who failed.

    Attributes:
        round_, version: Of what is answered.
        first: Place of the first client that was asked in the cohort.
        clients: Ids of the clients whose work is here, int64 [k].
        losses, samples, steps: One value per client [k].
        pieces: The columns of `numbers`, side by side: in this process large tensors stay where
            they were trained.
        reduced: Whether they are sums.
        failures: Why a client trained nothing, by id.
        refused: Clients that a sum leaves out, because their numbers cannot be used.
        notes: Sentences for the ledger.
        rounding: What rounding added to the change of each client, relative to it [k]; None where
            numbers are sent as they are.
        sizes: How many bytes each client sent, int64 [k]; None where they are not coded.
        layout: What each client sends.
        stage: What clients say of secure aggregation, where numbers are masked; None without it.
        metrics: What a user's training function says of its training, float64 [k] by name.
    """

    round_: int
    version: int
    first: int
    clients: torch.Tensor
    losses: torch.Tensor
    samples: torch.Tensor
    steps: torch.Tensor
    pieces: tuple[torch.Tensor, ...]
    reduced: bool = False
    failures: dict[int, str] = field(default_factory=dict)
    refused: list[Refusal] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    rounding: torch.Tensor | None = None
    sizes: torch.Tensor | None = None
    layout: Layout = Layout(())  # noqa: RUF009
    stage: Stage | None = None
    metrics: Tree = field(default_factory=dict)

    @cached_property
    def numbers(self) -> torch.Tensor:
        """Their rows [k, P]; under rank budgets what is left of the rows, one after another.

        Or float64 sums of the chunk's blocks [blocks, P].
        """
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, dim=-1)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of `numbers`, which are not joined for it."""
        *lead, last = (piece.shape for piece in self.pieces)
        return (*last[:-1], sum(piece[-1] for piece in (*lead, last))) if last else ()

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """What has one value per client."""
        names = ("clients", "losses", "samples", "steps", "rounding", "sizes")
        each = {name: getattr(self, name) for name in names}
        return {name: vector for name, vector in each.items() if vector is not None}

    def select(self, kept: torch.Tensor) -> Answer:
        """Keep some of the clients, bool [k], in everything but their numbers."""
        vectors: dict[str, Any] = {name: each[kept] for name, each in self.vectors.items()}
        told = {name: metric[kept] for name, metric in self.metrics.items()}
        return replace(self, **vectors, metrics=told)


@dataclass(frozen=True)
class NoAnswer:
    """Why all the clients that were asked together have no answer.

    Attributes:
        reason: In words.
        of_the_run: Whether they met what no client is to blame for.
    """

    reason: str
    of_the_run: bool = False

    @classmethod
    def of(cls, raised: Exception) -> NoAnswer:
        """Say what was raised where clients were to be trained."""
        reason = f"{type(raised).__name__}: {raised}"
        return cls(reason, isinstance(raised, OF_THE_RUN))


Came = Iterable[tuple[Ask, Answer | NoAnswer]]  # what came, each with what it answers


def sent_tensors(downlink: Downlink) -> dict[str, tuple[torch.Tensor, bool]]:
    """Collect every tensor that a downlink carries, by name, and whether it is one per client.

    Coefficients, which are float64 always, are `coefficients`.
    """
    named = downlink.named.items()
    sent = {n: (f.numbers, f.per_client) for n, f in named if f.numbers is not None}
    for extra, tree in downlink.extras.items():
        sent |= {f"{extra}/{name}": (tensor, False) for name, tensor in tree.items()}
    return sent


def coefficients(downlink: Downlink) -> Tree:
    """Collect the coefficients of the factors that are computed from the last link, by name."""
    factors = downlink.factors().items()
    return {name: f.coefficients for name, f in factors if f.coefficients is not None}


def payload_bytes(
    downlink: Downlink, cohort: int, kind: str, clients: int = 1, coding: str = NONE
) -> int:
    """Count the payload of one message with a downlink to clients of a cohort.

    Args:
        downlink: What is sent.
        cohort: To how many.
        kind: Of its numbers: a key of `WIDTHS`, or one of `ROUNDED`.
        clients: How many of them the message is for: what is not one's own is in it once.
        coding: Of what is not one's own.

    Returns:
        The bytes of its numbers, and 8 per seed; of what is computed from the last link those of
        the coefficients and of a seed.
    """
    sent = sent_tensors(downlink).values()
    shared = sent_bytes([t for t, own in sent if not own], kind, coding)
    each = packed_bytes([t.numel() // cohort for t, own in sent if own], kind)
    exact = sum(f.exact_bytes for f in downlink.named.values())
    exact += downlink.program.payload_bytes
    return shared + clients * int(each) + exact
