"""Put a low-rank term on a weight of a user's plain model: ``W`` becomes ``W + s B A``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from fedraclora.lowrank.layers import LayerView

# Attributes of the weight that the term does not change.
SAME = {torch.Tensor.size, torch.Tensor.dim, torch.Tensor.element_size, torch.Tensor.numel}
SAME |= {getattr(torch.Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim")}


class LowRankTerm(nn.Module):
    """Parametrize a stored weight ``W`` in torch as ``W + scale * product``.

    Args:
        view: How the weight is seen as a matrix.
        factors: In the order of their product.
        trained: Labels of those that are trained.
        scale: Of the product.
    """

    def __init__(
        self, view: LayerView, factors: Mapping[str, torch.Tensor], trained: set[str], scale: float
    ) -> None:
        super().__init__()
        self.view, self.labels, self.scale = view, [*factors], scale
        self.others = 0  # other parametrizations of the same weight at install
        for label, value in factors.items():
            own = value.clone(memory_format=torch.contiguous_format)  # as FSDP wants it
            if label in trained:
                self.register_parameter(label, nn.Parameter(own))
            else:
                self.register_buffer(label, own)

    @property
    def form(self) -> dict[str, tuple[tuple[int, ...], bool]]:
        """Return the shape of each factor, and whether it is trained."""
        trained = dict(self.named_parameters())
        return {k: (tuple(getattr(self, k).shape), k in trained) for k in self.labels}

    @override
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling() or type(weight) not in {torch.Tensor, nn.Parameter}:
            return self.added(weight)
        adapted = weight.as_subclass(AdaptedWeight)
        adapted.term, adapted.frozen = self, weight
        return adapted

    def factors(self, dtype: torch.dtype) -> list[torch.Tensor]:
        """Return the factors in the precision of their input."""
        return [getattr(self, label).to(dtype) for label in self.labels]

    def added(self, weight: torch.Tensor) -> torch.Tensor:
        """Form the dense weight."""
        product = reduce(torch.matmul, self.factors(weight.dtype))
        return torch.add(weight, self.view.stored(product, weight), alpha=self.scale)

    def applied(self, out: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add the low-rank term of the inputs to the outputs of a frozen layer.

        Args:
            out: [N, m].
            x: [N, n].
        """
        first, *others = self.factors(x.dtype)
        for factor in reversed(others):
            x = F.linear(x, factor)
        return torch.addmm(out, x, first.mT, alpha=self.scale)


class AdaptedWeight(torch.Tensor):
    """Represent ``W + scale * product``, applied factor by factor.

    No step forms the product or the gradient of a whole weight, which would cost as much as
    training the weight. All other operations use the dense matrix.

    Attributes:
        term: The factors and their scale.
        frozen: W.
    """

    term: LowRankTerm
    frozen: torch.Tensor

    @classmethod
    @override
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in SAME:
            with torch._C.DisableTorchFunctionSubclass():  # noqa: SLF001
                return func(*args, **kwargs)
        own = [i for i, value in enumerate(args) if isinstance(value, cls)]
        if func is F.linear and own == [1]:
            return _linear(*args, **kwargs)
        if func is torch.addmm and own == [2] and not kwargs:
            bias, x, weight = args
            if weight.term.view.kind == "conv1d":  # Conv1D of transformers
                return weight.term.applied(func(bias, x, weight.frozen), x)
        return func(*tree_map_only(cls, cls.dense, args), **tree_map_only(cls, cls.dense, kwargs))

    def dense(self) -> torch.Tensor:
        """Form the dense weight."""
        return self.term.added(self.frozen)


def _linear(
    x: torch.Tensor, weight: AdaptedWeight, bias: torch.Tensor | None = None
) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])  # one sum inside the product: one copy of the outputs fewer
    out = weight.term.applied(F.linear(rows, weight.frozen, bias), rows)
    return out if x.dim() == 2 else out.view(*x.shape[:-1], out.shape[-1])
