"""Aggregate exactly: float64 sums in client order, in fixed blocks.

A float sum depends on its order, even in float64. So clients are summed in ascending order of id,
`SUM_BLOCK` at a time: inside a block one after another, then the blocks one after another. The
result depends only on the clients of the round: not on the order of replies, the size of chunks or
the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from fedraclora.errors import ClientError, DivergenceError, ShapeError
from fedraclora.tree import Layout, Tree

SUM_BLOCK = 32
UNSAID = -math.inf  # the training loss of a client that does not report it
CALMER = "lower local.lr"  # advice if a client's numbers are not finite
AT_ONCE = 1 << 17  # float64 numbers that stay in the cache
TILE = 1 << 15  # the same, if each is read and written for every client


def block_sums(
    stacked: torch.Tensor, weights: torch.Tensor, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Sum ``weights[k] * stacked[k]`` inside each block of `SUM_BLOCK` clients of the round.

    Row after row, so that the bits do not depend on a library's reduction order.

    Args:
        stacked: [K, P], any floating dtype.
        weights: float64 [K].
        places: The clients' positions in the round, ascending, int64 [K]; None = 0, 1, ..., K - 1.
            A missing position (a client that failed) adds nothing.

    Returns:
        float64 [blocks up to the last place, P].
    """
    K, P = stacked.shape
    last = K - 1 if places is None else int(places[-1]) if K else -1
    blocks = last // SUM_BLOCK + 1
    height = max(1, min(last + 1, SUM_BLOCK))
    sums = torch.zeros(blocks, P, dtype=torch.float64, device=stacked.device)
    column = weights.to(stacked.device, torch.float64)[:, None]
    for start in range(0, P if K else 0, step := max(1, AT_ONCE // (height * max(1, blocks)))):
        part, out = stacked[:, start : start + step], sums[:, start : start + step]
        room = out.new_empty(blocks * height, out.shape[1])
        # A missing position adds zero, which changes no bit of a sum that began at zero.
        if last + 1 == K or places is None:
            room[:K].copy_(part).mul_(column)
            room[K:].zero_()
        else:
            room.zero_()[places.to(room.device)] = part.double() * column
        add_rows(out, room.view(blocks, height, -1))
    return sums


def add_rows(out: torch.Tensor, rows: torch.Tensor) -> None:
    """Add the rows of each block, [blocks, height, p], one after another to zeros [blocks, p]."""
    if out.device.type == "cpu" and out.shape[1] > 1:
        # numpy does the same along an axis that is not the last ("numpy.sum", notes on precision).
        np.add.reduce(rows.numpy(), axis=1, out=out.numpy(), initial=0.0)
        return
    for row in rows.unbind(1):
        out += row


def weighted_sum(
    stacked: torch.Tensor, weights: torch.Tensor, places: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute ``sum_k weights[k] * stacked[k]`` in float64 [P]; arguments as in `block_sums`."""
    return sum_blocks(block_sums(stacked, weights, places))


class RunningSum:
    """Compute `weighted_sum` of rows as they arrive, without keeping them.

    Args:
        size: Numbers of a row.
    """

    def __init__(self, size: int) -> None:
        self.total = torch.zeros(size, dtype=torch.float64)
        self.block, self.number = torch.zeros_like(self.total), 0
        self.room = torch.empty(TILE, dtype=torch.float64)  # fresh memory costs more than the sums

    def add(
        self, pieces: Sequence[torch.Tensor], weights: torch.Tensor, places: torch.Tensor
    ) -> None:
        """Add rows.

        Args:
            pieces: The columns of the rows, [K, p] each, side by side.
            weights: float64 [K].
            places: As in `block_sums`; after those already added.
        """
        # Products of 24 and 29 bits are exact in float64, so one step and two steps round equally.
        whole = bool(((weights == weights.round()) & (weights < 1 << 29)).all())
        blocks, counts = torch.unique_consecutive(places // SUM_BLOCK, return_counts=True)
        parts = zip(*(piece.split(counts.tolist()) for piece in pieces), strict=True)
        columns = weights.split(counts.tolist())
        for number, rows, column in zip(blocks.tolist(), parts, columns, strict=True):
            if number != self.number:
                self.add_blocks(self.block[None])
                self.block.zero_()
                self.number = number
            outs = self.block.split([piece.shape[1] for piece in rows])
            for out, piece in zip(outs, rows, strict=True):
                at_once = whole and piece.dtype == torch.float32
                self._add(out, piece, column.tolist(), at_once=at_once)

    def _add(
        self, out: torch.Tensor, rows: torch.Tensor, weights: list[float], *, at_once: bool
    ) -> None:
        """Add rows to a part of the block, in pieces that fit into the cache."""
        for part, columns in zip(out.split(TILE), rows.split(TILE, dim=1), strict=True):
            room = self.room[: len(part)]
            for row, weight in zip(columns, weights, strict=True):
                if at_once:
                    part.add_(room.copy_(row), alpha=weight)
                else:
                    part.add_(room.copy_(row).mul_(weight))

    def add_blocks(self, sums: torch.Tensor) -> None:
        """Add sums of blocks [B, P], float64, which follow the blocks added before."""
        for block in sums:
            self.total += block

    def value(self) -> torch.Tensor:
        """Return the sum, float64 [P]; you cannot add to it afterwards."""
        self.total += self.block
        return self.total


def sum_blocks(blocks: torch.Tensor) -> torch.Tensor:
    """Add blocks [B, P] one after another; float64 [P]."""
    total = blocks[0].clone()
    for block in blocks[1:]:
        total += block
    return total


@dataclass(frozen=True)
class Uplinks:
    """Hold the updates of a round's clients: stacked, or only their sum.

    Attributes:
        clients: Client ids in ascending order, int64 [K].
        weights: Aggregation weights, float64 [K], not normalized.
        layout: Names and shapes of each client's update.
        stacked: [K, P], one packed row per client, or None if only the sum is known.
        summed: float64 [P], ``sum_k weights[k] * row_k``, or None if not yet formed.
        versions: Base version each client trained from, int64 [K].
        places: Their positions in the round, int64 [K], or None if no client is missing.
        denominator: Divisor of the sum for the mean; None: the sum of the weights.
    """

    clients: torch.Tensor
    weights: torch.Tensor
    layout: Layout
    stacked: torch.Tensor | None = None
    summed: torch.Tensor | None = None
    versions: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    places: torch.Tensor | None = None
    denominator: float | None = None

    @property
    def total(self) -> float:
        """Return the sum of the aggregation weights, exactly rounded; or `denominator`."""
        if self.denominator is not None:
            return self.denominator
        return math.fsum(self.weights.tolist())

    def sum(self) -> torch.Tensor:
        """Compute ``sum_k weights[k] * row_k`` in float64 [P], in the order of this module."""
        if self.summed is not None:
            return self.summed
        if self.stacked is None:
            raise ShapeError(
                "these uplinks have neither the clients' rows nor their sum, expected one of them"
            )
        return weighted_sum(self.stacked, self.weights, self.places)

    def mean(self) -> Tree:
        """Return the weighted mean of all updates, float64, by name."""
        mean = self.sum() / self.total
        # Copies: views into one vector have any alignment, and matrix products round by alignment.
        return {n: t.clone() for n, t in self.layout.unpack(mean).items()}

    def stack(self) -> Tree:
        """Return all updates by name, [K, ...].

        Raises:
            ShapeError: If only the sum is known (a pre-reduced or secure aggregation).
        """
        return self.layout.unpack(self.rows())

    def rows(self) -> torch.Tensor:
        """Return all updates as one row for each client, [K, P]; raises as `stack` does."""
        if self.stacked is None:
            raise ShapeError("this method needs each client's own update, but only their sum came")
        return self.stacked

    def select(self, kept: torch.Tensor) -> Uplinks:
        """Keep the clients of a mask, bool [K]; raises as `stack` does."""
        named = ("clients", "weights", "versions", "places")
        each = {n: own[kept] for n in named if (own := getattr(self, n)) is not None}
        return replace(self, stacked=self.rows()[kept], **each)

    @property
    def has_individuals(self) -> bool:
        """Return whether each client's own tensors are available."""
        return self.stacked is not None


@dataclass(frozen=True)
class Refusal:
    """Record a client whose reply was rejected, and why."""

    client: int
    reason: str


def finite(rows: torch.Tensor) -> torch.Tensor:
    """Return which rows of [K, P] have no NaN or infinity: bool [K].

    It uses the largest absolute value, through which a NaN propagates: one pass without copies,
    while ``isfinite`` makes copies of the size of the rows.
    """
    if not rows.shape[1]:
        return torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    greatest: torch.Tensor = torch.linalg.vector_norm(rows, float("inf"), dim=1)
    return greatest.isfinite()


def greatest_norm(dtype: torch.dtype) -> float:
    """Return the largest norm of a usable update: 4e9 (float32), 1e77 (float64).

    A loss squares outputs, and the norm of its gradient squares that: if the fourth power
    overflows, weights may be finite while all results are not.
    """
    return math.sqrt(math.sqrt(torch.finfo(dtype).max))


def norms_of(pieces: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute the norm of each row, given as columns side by side in pieces [K, p]; [K].

    One pass and no copy.
    """
    norms = [torch.linalg.vector_norm(piece, dim=1) for piece in pieces if piece.shape[1]]
    if len(norms) < 2:
        return norms[0] if norms else pieces[0].new_zeros(len(pieces[0]))
    whole: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    return whole


def calmer(*, own: bool) -> str:
    """Return advice against diverging updates; ``own``: for a user's training function."""
    return (
        "take smaller steps in your training function, or clip its gradients"
        if own
        else f"{CALMER} or set local.clip"
    )


def check_rows(
    clients: torch.Tensor,
    weights: torch.Tensor,
    losses: torch.Tensor,
    pieces: Sequence[torch.Tensor],
    norms: torch.Tensor | None = None,
    layout: Layout | None = None,
) -> list[Refusal]:
    """Check each client's row before aggregation: finite and of plausible norm, weight and loss.

    Args:
        clients: int64 [K].
        weights: float64 [K].
        losses: Mean training loss of each client [K], or `UNSAID`.
        pieces: The columns of the rows, [K, p] each, side by side.
        norms: Norms of the rows [K], if known.
        layout: Layout of a row, by which a refusal names the tensor that is not finite.

    Returns:
        One refusal per client that fails; empty if all pass.
    """
    found = norms_of(pieces) if norms is None else norms
    longest, inf = greatest_norm(found.dtype), math.inf
    refused: list[Refusal] = []
    each = zip(found.tolist(), losses.tolist(), weights.tolist(), strict=True)
    for k, (norm, loss, weight) in enumerate(each):
        if norm <= longest and loss < inf and 0.0 < weight < inf:  # a NaN is not
            continue
        if not loss < inf:
            reason = f"its training loss is {loss}; lower local.lr or set local.clip"
        elif not norm <= longest:
            row = torch.cat([piece[k] for piece in pieces])
            where = _not_finite(row, layout)
            reason = f"its update has a NaN or an infinity{where}; {calmer(own=False)}"
            if row.isfinite().all():
                length = float(torch.linalg.vector_norm(row.double()))
                reason = f"its update is too long, of norm {length:.3g}; lower local.lr"
        else:
            reason = f"its weight is {weight}, expected a positive finite number"
        refused.append(Refusal(int(clients[k]), reason))
    return refused


def _not_finite(row: torch.Tensor, layout: Layout | None) -> str:
    """Name the first tensor of a row that is not finite, for messages; empty if none is known."""
    tensors = {} if layout is None else layout.unpack(row)
    found = (name for name, tensor in tensors.items() if not tensor.isfinite().all())
    return f" in {name}" if (name := next(found, "")) else ""


def mean_reported(values: torch.Tensor, weights: torch.Tensor, unsaid: float) -> float:
    """Return the weighted mean over the clients that report a number; NaN if none does."""
    values = values.to(weights.dtype)
    said = ~values.isnan() if math.isnan(unsaid) else values != unsaid
    if not said.all():
        values, weights = values[said], weights[said]
    return float(values @ weights / weights.sum()) if len(values) else math.nan


def failures_error(refused: Sequence[Refusal], round_: int, rule: str) -> ClientError:
    """Build the error for a round that lost more clients than the config allows."""
    lines = "; ".join(f"client {r.client}: {r.reason}" for r in refused[:5])
    more = f" (and {len(refused) - 5} more)" if len(refused) > 5 else ""
    advice = (CALMER, calmer(own=True))
    spoilt = all(any(words in r.reason for words in advice) for r in refused)
    kind = DivergenceError if spoilt else ClientError
    return kind(f"round {round_}: {len(refused)} client(s) failed, {rule}. {lines}{more}")
