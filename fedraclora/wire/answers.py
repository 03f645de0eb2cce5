"""Client replies as data: updates, sums of them, secure aggregation stages, measurements.

Each kind of reply is a dataclass with its own fields. In one process and between Ray workers the
object itself is passed on; `fedraclora.engines.records` writes it as Flower records with the codec.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from typing_extensions import override

from fedraclora.codec import join, split
from fedraclora.errors import OF_THE_RUN
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.named import RegisteredByName
from fedraclora.protocol.quantized import FULL
from fedraclora.protocol.uplinks import Refusal
from fedraclora.tree import Layout, Tree, to_numpy
from fedraclora.wire.exchange import Ask, Stage

# What has one value for each client, and its type; named alike in asks and answers.
VECTORS = {
    "clients": torch.int64,
    "places": torch.int64,
    "ranks": torch.int64,
    "samples": torch.int64,
    "sizes": torch.int64,
    "steps": torch.int64,
    "losses": torch.float64,
    "rounding": torch.float64,
    "metrics": torch.float64,
}


@dataclass(frozen=True, kw_only=True)
class Answer(RegisteredByName):
    """Hold the reply of the clients of a request.

    Attributes:
        round_: The round of the request.
        version: Version of the base weights from which the clients started.
        clients: Ids of the clients with a result here, int64 [k].
        failures: Why a client has no result, by id.
        notes: Sentences for the ledger.
        payload: The field in which the codec finds the large tensor.
    """

    payload: ClassVar[str] = ""

    round_: int
    version: int
    clients: torch.Tensor
    failures: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def vectors(self) -> dict[str, torch.Tensor]:
        """Return the fields with one value per client."""
        each = {name: value for name, value in vars(self).items() if name in VECTORS}
        return {n: v for n, v in each.items() if isinstance(v, torch.Tensor)}

    def select(self, kept: torch.Tensor) -> Self:
        """Keep some of the clients, bool [k], in everything but their numbers."""
        found: dict[str, Any] = {name: each[kept] for name, each in self.vectors.items()}
        return replace(self, **found)

    def packed(self) -> Self:
        """Return a copy with its numbers in one tensor, for writing."""
        return self

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle as numpy arrays, which Ray sends to other processes with one copy."""
        tensors, plain = split(self.packed())
        return _from_arrays, ({name: to_numpy(t) for name, t in tensors.items()}, plain)


def _from_arrays(arrays: Mapping[str, Any], plain: Mapping[str, Any]) -> Answer:
    # Copied into memory of torch's own: that of Ray is not to be written to.
    return join(Answer, {name: torch.from_numpy(a.copy()) for name, a in arrays.items()}, plain)


@dataclass(frozen=True, kw_only=True)
class NumericAnswer(Answer):
    """Hold a reply with numbers that clients computed from their samples.

    Attributes:
        first: Place in the cohort of the first client of the request.
        samples, steps: Number of samples and of local steps of each client, int64 [k].
        pieces: The columns of `numbers`, side by side: in one process large tensors stay where
            they were trained.
        layout: Names and shapes of the tensors that each client sends.
    """

    payload: ClassVar[str] = "pieces/0"

    first: int
    samples: torch.Tensor
    steps: torch.Tensor
    pieces: tuple[torch.Tensor, ...]
    layout: Layout = Layout(())  # noqa: RUF009

    @cached_property
    def numbers(self) -> torch.Tensor:
        """Return the numbers of all clients in one tensor; the kind of reply sets its shape."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces, dim=-1)

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of `numbers` without joining them."""
        *lead, last = (piece.shape for piece in self.pieces)
        return (*last[:-1], sum(piece[-1] for piece in (*lead, last))) if last else ()

    @override
    def packed(self) -> Self:
        return self if len(self.pieces) == 1 else replace(self, pieces=(self.numbers,))


@dataclass(frozen=True, kw_only=True)
class TrainingAnswer(NumericAnswer):
    """Hold a reply of clients that trained.

    Attributes:
        losses: Mean training loss of each client, float64 [k].
        rounding: Quantization error of each client's update, relative to it, float64 [k]; None
            without quantization.
        metrics: Values that a user's training function returned, float64 [k] by name; NaN if it
            returned none.
    """

    losses: torch.Tensor
    rounding: torch.Tensor | None = None
    metrics: Tree = field(default_factory=dict)

    @override
    def select(self, kept: torch.Tensor) -> Self:
        told = {name: metric[kept] for name, metric in self.metrics.items()}
        return replace(super().select(kept), metrics=told)


@dataclass(frozen=True, kw_only=True)
class TrainedAnswer(TrainingAnswer):
    """Hold each client's trained values: rows [k, P], or with rank budgets their parts, end to end.

    Attributes:
        sizes: Bytes that each client sent, int64 [k]; None without coding.
    """

    name = "trained"

    sizes: torch.Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class SummedAnswer(TrainingAnswer):
    """Hold weighted sums of trained values: float64 [blocks, P], for the blocks of a chunk.

    Attributes:
        refused: Clients left out of the sums, because their numbers cannot be used.
    """

    name = "summed"

    refused: list[Refusal] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class MeasuredAnswer(NumericAnswer):
    """Hold the measurements of each client: float64 rows [k, P] of sums over its samples."""

    name = "measured"


@dataclass(frozen=True, kw_only=True)
class StageAnswer(Answer):
    """Hold the replies of clients in a stage of secure aggregation.

    Attributes:
        stage: The data of each client, by id.
        words: Their masked vectors, uint32 [k, P + 2]; None in a stage without any.
    """

    name = "staged"
    payload: ClassVar[str] = "words"

    stage: Stage
    words: torch.Tensor | None = None


@dataclass(frozen=True)
class NoAnswer:
    """Record why all the clients of a request have no reply.

    Attributes:
        reason: In words.
        of_the_run: Whether the run caused it, so that no client is to blame.
    """

    reason: str
    of_the_run: bool = False

    @classmethod
    def of(cls, raised: Exception) -> NoAnswer:
        """Convert an exception from training to a failed reply."""
        reason = f"{type(raised).__name__}: {raised}"
        return cls(reason, isinstance(raised, OF_THE_RUN))


Came = Iterable[tuple[Ask, Answer | NoAnswer]]  # what came, each with what it answers


def answer_kind(ask: Ask) -> type[Answer]:
    """Return the kind of reply to a request."""
    if ask.stage is not None:
        return StageAnswer
    if ask.request.measure is not None:
        return MeasuredAnswer
    return TrainedAnswer if ask.request.reduce is None else SummedAnswer


def failed_answer(ask: Ask, failures: Mapping[int, str]) -> Answer:
    """Build the reply to a request whose clients have all failed, with the reasons."""
    request, none = ask.request, torch.zeros(0, dtype=torch.int64)
    said: dict[str, Any] = {"round_": request.round_, "version": request.version, "clients": none}
    said |= {"failures": dict(failures)}
    if ask.stage is not None:
        return StageAnswer(**said, stage=Stage(ask.stage.name, {}, {}))
    said |= {"first": request.first, "samples": none, "steps": none}
    said |= {"pieces": (torch.zeros(0, 0).double(),)}
    if request.measure is not None:
        return MeasuredAnswer(**said)
    said |= {"losses": none.double(), "rounding": None if request.uplink == FULL else none.double()}
    if request.reduce is not None:
        return SummedAnswer(**said)
    return TrainedAnswer(**said, sizes=None if request.coding == NONE else none)
