"""Shared products over the real tokens of a padded batch, and not over its padding.

What a layer gives at a padded token reaches no loss: attention gives padding a weight of exactly
zero (see `fedraclora.data.samples.Samples.trim`). Sentences of a batch differ in length, so that
half of a trimmed batch may still be padding; a product over the real tokens alone, whose rows are
then put back in their places, is the same where it counts, and zero elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from typing_extensions import override

from fedraclora.data.samples import Samples

WORTH_PACKING = 0.85  # share of real tokens above which moving the rows costs what it saves


def real_tokens(samples: Samples, valid: torch.Tensor, real: int) -> torch.Tensor | None:
    """Find the places of the real tokens of a batch, where there is enough padding to save.

    Args:
        samples: [N, T] tokens each, padded.
        valid: Which of the samples count, N in all; the others have no real token.
        real: How many there are, known before (`fedraclora.training.schedule.Batch`), so that no
            device is waited for; 0: all tokens are to be computed.

    Returns:
        int64 [real], into the batch as [N * T], in order; None where all are to be computed.
    """
    tokens, lengths = samples.padded, samples.lengths
    if lengths is None or not 0 < real <= WORTH_PACKING * len(samples) * tokens:
        return None
    place = torch.arange(tokens, device=lengths.device)
    padding = place >= (lengths * valid.reshape(-1))[:, None]
    return padding.reshape(-1).byte().argsort(stable=True)[:real]


def packed_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, places: torch.Tensor
) -> torch.Tensor:
    """Compute ``x @ weight.T + bias`` at the real tokens, and zero at padding.

    Args:
        x: [N, T, n].
        weight: [m, n].
        bias: [m], or None.
        places: Of `real_tokens`.

    Returns:
        [N, T, m].
    """
    N, T, n = x.shape
    # Some releases of torch type `apply` and some do not: with our own type both check alike.
    gather: Callable[..., torch.Tensor] = _Gather.apply
    scatter: Callable[..., torch.Tensor] = _Scatter.apply
    out = F.linear(gather(x.reshape(N * T, n), places), weight, bias)
    return scatter(out, places, N * T).reshape(N, T, -1)


# Autograd's own way back from `index_select` adds row after row; no place comes twice here.


def _scattered(rows: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    return rows.new_zeros(count, rows.shape[1]).index_copy_(0, places, rows)


class _Gather(torch.autograd.Function):
    @override
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(places)
        ctx.count = x.shape[0]
        return x.index_select(0, places)

    @override
    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None]:
        (places,) = ctx.saved_tensors
        return _scattered(slope, places, ctx.count), None


class _Scatter(torch.autograd.Function):
    @override
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
        ctx.save_for_backward(places)
        return _scattered(rows, places, count)

    @override
    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return slope.index_select(0, places), None, None
