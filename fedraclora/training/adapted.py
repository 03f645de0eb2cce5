"""Apply a frozen linear layer with a low-rank term per client, with the backward pass written out.

    out_k = x_k W^T + b + s x_k (F_1 F_2 ...)_k^T

Autograd computes the same with more copies: it copies the gradient to add in place on a view, adds
the gradients of the two paths to x as whole tensors, and keeps a rounded copy of W for every use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from typing_extensions import override

from fedraclora.models.packed_layout import Places


class BatchTerm(NamedTuple):
    """Describe the low-rank terms of a batch.

    Attributes:
        clients: In the batch, K.
        scale: s.
        places: Places of the real tokens if products with W skip the padding; else None.
    """

    clients: int
    scale: float = 1.0
    places: Places | None = None


def times(x: torch.Tensor, factor: torch.Tensor, K: int) -> torch.Tensor:
    """Apply a factor from the right: ``x @ factor.T`` per sample.

    Args:
        x: [K * b, ..., n].
        factor: [r, n], shared, or [K, r, n].
        K: Clients in the batch.

    Returns:
        [K * b, ..., r].
    """
    if factor.dim() == 2:
        return F.linear(x, factor)
    wide = torch.bmm(x.reshape(K, -1, x.shape[-1]), factor.mT)
    return wide.reshape(*x.shape[:-1], factor.shape[1])


def add_product(
    out: torch.Tensor, x: torch.Tensor, factor: torch.Tensor, K: int, scale: float
) -> None:
    """Add ``scale * x @ factor.T`` per sample to ``out``, in place; see `times`."""
    if factor.dim() == 2:
        rows = out.view(-1, out.shape[-1])
        rows.addmm_(x.reshape(-1, x.shape[-1]), factor.mT, alpha=scale)
    else:
        wide = out.view(K, -1, out.shape[-1])
        wide.baddbmm_(x.reshape(K, -1, x.shape[-1]), factor.mT, alpha=scale)


class AdaptedLinear(torch.autograd.Function):
    """Apply the layer; padding, if its places are known, gets the low-rank term only.

    Args:
        x: [K * b, ..., n].
        weight: [m, n], in the precision of the products, which is also that of the result.
        bias: [m], or None.
        term: Of the batch.
        factors: F_1, F_2, ..., each [., .] if shared, or [K, ., .]; empty: no low-rank term.

    Returns:
        [K * b, ..., m].
    """

    @override
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        term: BatchTerm,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        K, scale, places = term
        dtype = weight.dtype
        x, factors = x.to(dtype), tuple(factor.to(dtype) for factor in factors)
        bias = None if bias is None else bias.to(dtype)
        rows = x.reshape(-1, x.shape[-1])
        if places is None:
            out = F.linear(rows, weight, bias)
        else:
            out = places.spread(F.linear(places.pack(rows), weight, bias))
        out = out.view(*x.shape[:-1], -1)
        passed = [x]  # the input of each factor, the last factor first
        for factor in reversed(factors[1:]):
            passed.append(times(passed[-1], factor, K))
        if factors:
            add_product(out, passed[-1], factors[0], K, scale)
        trained = ctx.needs_input_grad
        if not (trained[1] or (factors and trained[-1])):
            passed[0] = x.new_empty(0)  # the largest input, not needed any more
        ctx.term, ctx.shape = term, x.shape
        ctx.save_for_backward(weight, *factors, *passed)
        return out

    @override
    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        K, scale, places = ctx.term
        to_x, to_weight, to_bias, _, *to_factors = ctx.needs_input_grad
        weight, *saved = ctx.saved_tensors
        factors, passed = saved[: len(to_factors)], saved[len(to_factors) :]
        rows = slope.reshape(-1, slope.shape[-1])
        of_x = of_weight = None
        if to_x and places is None:
            of_x = rows @ weight
        elif to_x:
            of_x = places.spread(places.pack(rows) @ weight)
        if to_weight:
            of_weight = rows.mT @ passed[0].reshape(len(rows), -1)
        of_factors: list[torch.Tensor | None] = [None] * len(factors)
        back = slope.reshape(K, -1, slope.shape[-1])
        for i, factor in enumerate(factors):
            alpha = scale if i == 0 else 1.0
            if to_factors[i]:
                given = passed[len(factors) - 1 - i].reshape(K, -1, factor.shape[-1])
                of_factors[i] = (given.mT @ back).mul_(alpha).mT
            if i < len(factors) - 1:
                back = times(back, factor.mT, K).mul_(alpha)
            elif of_x is not None:
                add_product(of_x, back, factor.mT, K, alpha)
        of_bias = rows.sum(dim=0) if to_bias else None
        of_x = None if of_x is None else of_x.view(ctx.shape)
        return of_x, of_weight, of_bias, None, *of_factors


# Some releases of torch annotate `apply` and some do not: our own annotation type-checks under
# both.
adapted_linear: Callable[..., torch.Tensor] = AdaptedLinear.apply
