"""Locate the real tokens of a padded batch, so that products skip the padding.

A layer's output at a padded token reaches no loss: attention gives padding a weight of exactly zero
(see `fedraclora.data.samples.Samples.trim`). Sentences of a batch differ in length, so that half of
a trimmed batch may still be padding. `Places` computes a product over the real tokens only and puts
the rows back: the result is the same at real tokens, and zero elsewhere. Inside the blocks of a
transformer the rows stay packed (`PackedLayout`, `fedraclora.models.packed`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from typing_extensions import override

from fedraclora.data.samples import Samples

WORTH_PACKING = 0.85  # share of real tokens above which moving rows costs more than it saves


class TakeRows(torch.autograd.Function):
    """Take the rows ``there`` of x; ``back`` holds the new position of each row of x.

    Each row, except rows with zero gradient, is taken once, so the backward pass takes rows, too.
    """

    @override
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, there: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        ctx.back = back
        return x.index_select(0, there)

    @override
    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return slope.index_select(0, ctx.back), None, None


# Some releases of torch annotate `apply` and some do not: our own annotation type-checks under
# both.
take_rows: Callable[..., torch.Tensor] = TakeRows.apply


@dataclass(frozen=True)
class Bucket:
    """A group of samples of similar length.

    Attributes:
        count, tokens: Number of samples, and tokens of the longest.
        lengths: Tokens of each sample, int64 [count].
        places: Position of each token in the packed batch, int64 [count, tokens].
    """

    count: int
    tokens: int
    lengths: torch.Tensor
    places: torch.Tensor

    def hidden(self) -> torch.Tensor:
        """Return a mask of the keys that no query may see, bool [count, 1, 1, tokens]."""
        place = torch.arange(self.tokens, device=self.lengths.device)
        return (place >= self.lengths[:, None])[:, None, None]


@dataclass(frozen=True)
class PackedLayout:
    """Hold the positions of a batch's real tokens.

    Attributes:
        clients, length: The packed batch is [clients, length, ...]; each row ends in padding.
        there: For each packed token, its position in the padded batch, int64 [clients * length].
        back: For each token of the padded batch, its position in the packed one, int64 [N * T].
        tokens: T.
        buckets: The samples, longest first.
        heads: Results of `of_heads`, by number of heads.
    """

    clients: int
    length: int
    there: torch.Tensor
    back: torch.Tensor
    tokens: int
    buckets: tuple[Bucket, ...]
    heads: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        lengths: torch.Tensor,
        *,
        clients: int,
        tokens: int,
        longest: int,
        tops: tuple[int, ...],
    ) -> PackedLayout:
        """Lay out a batch.

        Args:
            lengths: Tokens of each sample, client after client, int64 [N]; at least one position of
                the padded batch must be padding.
            clients: K; each has N / K samples.
            tokens: Of each sample with its padding, T.
            longest: Tokens of the client that has most.
            tops: Tokens of the longest sample of each bucket (`bucket_tops`).
        """
        N, device = len(lengths), lengths.device
        own = lengths.reshape(clients, -1)
        before = (own.cumsum(dim=1) - own).reshape(-1)  # tokens of the client's earlier samples
        length = longest + 1
        row = torch.arange(N, device=device) // own.shape[1] * length
        start = row + before  # of each sample in the packed batch
        spare = longest  # a packed place that is padding: the last of the first client
        place = torch.arange(tokens, device=device)
        real = place < lengths[:, None]
        back = torch.where(real, start[:, None] + place, spare).reshape(-1)
        padding = torch.argmin(real.reshape(-1).byte())  # a padded position that is padding
        there = padding.expand(clients * length).clone()
        # Padding writes, too: to a position beyond the end, so that no size depends on the data.
        there = torch.cat([there, there[:1]])
        target = torch.where(real, start[:, None] + place, clients * length).reshape(-1)
        there = there.index_copy(0, target, torch.arange(N * tokens, device=device))[:-1]

        order = torch.argsort(lengths, descending=True, stable=True)
        parts = order.split(-(-N // len(tops)))
        buckets = []
        for part, top in zip(parts, tops, strict=True):
            at, own = place[:top], lengths[part]
            token = torch.where(at < own[:, None], start[part, None] + at, spare)
            buckets.append(Bucket(len(part), top, own, token))
        return cls(clients, length, there, back, tokens, tuple(buckets))

    def holds(self, x: torch.Tensor) -> bool:
        """Check whether a tensor is of the packed batch."""
        return x.dim() > 1 and x.shape[0] == self.clients and x.shape[1] == self.length

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Turn [N, T, ...], or [1, T, ...] for all samples, into [clients, length, ...]."""
        if x.shape[0] * self.tokens == len(self.back):
            packed = take_rows(x.flatten(0, 1), self.there, self.back)
        else:
            packed = x[0].index_select(0, self.there % self.tokens)
        return packed.view(self.clients, self.length, *x.shape[2:])

    def spread(self, x: torch.Tensor) -> torch.Tensor:
        """Turn [clients, length, ...] into [N, T, ...]; padding gets values that no loss reads."""
        return take_rows(x.flatten(0, 1), self.back, self.there).view(-1, self.tokens, *x.shape[2:])

    def of_heads(self, heads: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Locate rows [tokens, heads] of the packed batch in buckets [count, heads, tokens].

        Returns:
            Indices there and back; the buckets end with one more row of padding.
        """
        if heads not in self.heads:
            device, count = self.there.device, len(self.there)
            head = torch.arange(heads, device=device)
            end = heads * sum(bucket.count * bucket.tokens for bucket in self.buckets)
            begin, stride = torch.tensor([[end], [0]], device=device).repeat(1, count + 1)
            there, done = [], 0
            for bucket in self.buckets:
                there.append((bucket.places[:, None] * heads + head[:, None]).reshape(-1))
                # Padding writes, too: to a position beyond the end.
                target = bucket.places.masked_fill(bucket.hidden()[:, 0, 0], count)
                place = torch.arange(bucket.tokens, device=device)
                sample = torch.arange(bucket.count, device=device)[:, None] * heads * bucket.tokens
                begin[target] = done + sample + place
                stride[target] = bucket.tokens
                done += len(there[-1])
            back = begin[:count, None] + stride[:count, None] * head
            spare = torch.full((1,), (self.length - 1) * heads, device=device)
            self.heads[heads] = torch.cat([*there, spare]), back.reshape(-1)
        return self.heads[heads]


def bucket_tops(lengths: list[int], most: int = 4, least: int = 8) -> tuple[int, ...]:
    """Choose at most ``most`` buckets of a batch, of ``least`` samples or more each.

    Args:
        lengths: Of the samples, descending.
        most: Most buckets; each costs some calls.
        least: Fewest samples of a bucket, if there are enough.

    Returns:
        Tokens of the longest sample of each.
    """
    size = -(-len(lengths) // max(1, min(most, len(lengths) // least)))
    return tuple(max(1, top) for top in lengths[::size])


class Places(NamedTuple):
    """Locate the real tokens of a batch, and map rows back.

    Rows are only gathered: scattering rows is several times slower.

    Attributes:
        real: int64 [real + 1], into the batch as [N * T]: the real tokens, in order, then any one
            of padding.
        back: int64 [N * T], into those rows; padding is the last of them.
    """

    real: torch.Tensor
    back: torch.Tensor

    def pack(self, rows: torch.Tensor) -> torch.Tensor:
        """Take the real rows of [N * T, n], and one of padding: [real + 1, n]."""
        return rows.index_select(0, self.real)

    def spread(self, packed: torch.Tensor) -> torch.Tensor:
        """Put rows back, with zeros at padding: [N * T, m]. ``packed`` ends in a row to drop."""
        packed[-1] = 0
        return packed.index_select(0, self.back)


def real_tokens(samples: Samples, valid: torch.Tensor, real: int) -> Places | None:
    """Locate the real tokens of a batch, if there is enough padding to save time.

    Args:
        samples: [N, T] tokens each, padded.
        valid: Which of the samples count, N in all; the others have no real token.
        real: Their number, known in advance (`fedraclora.training.schedule.StepBatch`), so that no
            device is waited for; 0: compute all tokens.

    Returns:
        The places; None if all tokens are to be computed.
    """
    tokens, lengths = samples.padded, samples.lengths
    if lengths is None or not 0 < real <= WORTH_PACKING * len(samples) * tokens:
        return None
    place = torch.arange(tokens, device=lengths.device)
    padding = (place >= (lengths * valid.reshape(-1))[:, None]).reshape(-1)
    back = torch.where(padding, real, (~padding).cumsum(0) - 1)
    return Places(padding.byte().argsort(stable=True)[: real + 1], back)


def packed_layout(
    samples: Samples, valid: torch.Tensor, longest: int, tops: tuple[int, ...]
) -> PackedLayout | None:
    """Lay out the real tokens of a batch, if there is enough padding to save time.

    Args:
        samples: [N, T] tokens each, padded.
        valid: Which of the samples count, [K, N / K]; the others have no real token.
        longest: Real tokens of the client that has most (`fedraclora.training.schedule.StepBatch`);
            0: all tokens are to be computed.
        tops: Of the same batch.
    """
    tokens, lengths, clients = samples.padded, samples.lengths, len(valid)
    worth = clients * (longest + 1) <= WORTH_PACKING * len(samples) * tokens
    if lengths is None or not longest or not worth:
        return None
    counted = lengths * valid.reshape(-1)
    return PackedLayout.of(counted, clients=clients, tokens=tokens, longest=longest, tops=tops)
