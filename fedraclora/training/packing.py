"""Shared products over the real tokens of a padded batch, and not over its padding.

What a layer gives at a padded token reaches no loss: attention gives padding a weight of exactly
zero (see `fedraclora.data.samples.Samples.trim`). Sentences of a batch differ in length, so that
half of a trimmed batch may still be padding; a product over the real tokens alone, whose rows are
then put back in their places, is the same where it counts, and zero elsewhere.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from fedraclora.data.samples import Samples
from fedraclora.models.packed_layout import Layout

WORTH_PACKING = 0.85  # share of real tokens above which moving the rows costs what it saves


class Places(NamedTuple):
    """Where the real tokens of a batch are, and the way back.

    Rows are only ever taken: putting rows in their places is several times as slow.

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
        """Put rows back, and zero at padding: [N * T, m]. The last row of ``packed`` is lost."""
        packed[-1] = 0
        return packed.index_select(0, self.back)


def real_tokens(samples: Samples, valid: torch.Tensor, real: int) -> Places | None:
    """Find the places of the real tokens of a batch, where there is enough padding to save.

    Args:
        samples: [N, T] tokens each, padded.
        valid: Which of the samples count, N in all; the others have no real token.
        real: How many there are, known before (`fedraclora.training.schedule.Batch`), so that no
            device is waited for; 0: all tokens are to be computed.

    Returns:
        The places; None where all are to be computed.
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
) -> Layout | None:
    """Lay out the real tokens of a batch, where there is enough padding to save.

    Args:
        samples: [N, T] tokens each, padded.
        valid: Which of the samples count, [K, N / K]; the others have no real token.
        longest: Real tokens of the client that has most (`fedraclora.training.schedule.Batch`); 0:
            all tokens are to be computed.
        tops: Of the same batch.
    """
    tokens, lengths, clients = samples.padded, samples.lengths, len(valid)
    worth = clients * (longest + 1) <= WORTH_PACKING * len(samples) * tokens
    if lengths is None or not longest or not worth:
        return None
    counted = lengths * valid.reshape(-1)
    return Layout.of(counted, clients=clients, tokens=tokens, longest=longest, tops=tops)
