"""Provide layers that serve many clients in one batch.

The batch is [K * b, ...], client after client. A frozen weight is shared: one large product over
the whole batch. Trained tensors carry the client axis K and enter as batched products. Any
model whose samples do not interact works unmodified once the layers that hold trained tensors
are replaced by the classes here.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from fedraclora.errors import ModelError
from fedraclora.lowrank.dora import magnitude_of, row_lengths
from fedraclora.lowrank.layers import layer_view
from fedraclora.models.packed_layout import PackedLayout, Places
from fedraclora.rng import cohort_bits, hash_key
from fedraclora.training.adapted import BatchTerm, adapted_linear, times
from fedraclora.tree import Tree


@dataclass
class CohortContext:
    """Hold the values that the replaced layers read during one forward pass.

    Attributes:
        active: Number of clients in the batch.
        rows: Samples in the batch, all clients together.
        tokens, padded: Tokens of a sample after and before padding was trimmed, for dropout masks;
            0 if samples have no padding.
        places: Of the real tokens (`fedraclora.models.packed_layout.real_tokens`), or None.
        layout: Layout of the batch inside the blocks of a transformer, if they are packed.
        dense: Tensors that clients train in full, [K, ...] by parameter name.
        factors: Low-rank terms by weight name: factors in order, 2-D shared or 3-D per client.
        beside: Two more factors, 2-D, of each weight with a term beside it that is not merged.
        scales: Scale of each low-rank term.
        narrowed: Frozen weights in the precision of products, by layer, if it differs.
        clients: Ids of the clients in the batch, for dropout masks.
        step: The local step, for dropout masks.
        seed, round_: For dropout masks.
    """

    active: int = 0
    rows: int = 0
    tokens: int = 0
    padded: int = 0
    places: Places | None = None
    layout: PackedLayout | None = None
    dense: Tree = field(default_factory=dict)
    factors: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    beside: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    scales: dict[str, float] = field(default_factory=dict)
    narrowed: Tree = field(default_factory=dict)
    clients: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    step: int = 0
    seed: int = 0
    round_: int = 0

    def clear(self) -> None:
        """Release the tensors of a finished chunk."""
        self.dense, self.factors, self.beside = {}, {}, {}
        self.places, self.layout, self.narrowed = None, None, {}

    def is_packed(self, x: torch.Tensor) -> bool:
        """Check whether an input belongs to packed blocks of a transformer."""
        return self.layout is not None and self.layout.holds(x)

    def places_in(self, x: torch.Tensor) -> Places | None:
        """Return the places of real tokens in a layer's input, if it has padded tokens."""
        whole = x.dim() == 3 and x.shape[0] == self.rows and x.shape[1] == self.tokens
        return self.places if whole else None


def appended(factor: torch.Tensor, shared: torch.Tensor, dim: int) -> torch.Tensor:
    """Append the components of a shared factor, 2-D, to a factor that may have a client axis."""
    return torch.cat([factor, shared.expand(*factor.shape[:-2], *shared.shape)], dim=dim)


class CohortLayer(nn.Module):
    """Base of the replaced layers: holds the original layer, its name and the shared context."""

    def __init__(self, inner: nn.Module, name: str, context: CohortContext) -> None:
        super().__init__()
        self.inner, self.layer, self.context = inner, name, context

    def batched(self, x: torch.Tensor) -> torch.Tensor:
        """Expand an input of one row for all samples to the batch; return others unchanged.

        Transformers look up positions once for the whole batch ([1, T]); with a table per client
        every sample needs its own row.

        Raises:
            ModelError: If the first axis is not the batch, so that clients cannot be separated.
        """
        rows = self.context.rows
        if x.shape[0] == rows or self.context.is_packed(x):
            return x
        if x.shape[0] == 1:
            return x.expand(rows, *x.shape[1:])
        raise ModelError(
            f"layer {self.layer!r} got an input of shape {tuple(x.shape)}; the first axis must be "
            f"the batch of {rows} samples, or 1, for the layer to be trained per client"
        )

    def per_client(self, leaf: str) -> torch.Tensor | None:
        """Return the trained tensor ``<layer>.<leaf>`` [K, ...], or None if it is frozen."""
        return self.context.dense.get(f"{self.layer}.{leaf}")

    def low_rank(self) -> tuple[list[torch.Tensor], float] | None:
        """Return factors and scale of the low-rank term on the weight, or None."""
        name = f"{self.layer}.weight"
        factors = self.context.factors.get(name)
        if factors is None:
            return None
        if (more := self.context.beside.get(name)) is not None:
            factors = [appended(factors[0], more[0], dim=-1), appended(factors[1], more[1], dim=-2)]
        return factors, self.context.scales[name]

    def rescale(self) -> torch.Tensor | None:
        """Compute each client's factor on the outputs, [K, out]; None if there is none (DoRA).

        The factor scales rows to their trained lengths. It is computed in the precision of the
        weights, whatever the precision of the products.
        """
        own = self.context.dense.get(magnitude_of(f"{self.layer}.weight"))
        if own is None:
            return None
        weight: torch.Tensor = self.inner.weight  # type: ignore[assignment]
        with torch.autocast(weight.device.type, enabled=False):
            with torch.no_grad():  # the gradient treats row lengths as constants
                W = layer_view(self.inner).matrix(weight)
                lengths = row_lengths(W, *(self.low_rank() or ()))
            return own / lengths


class CohortLinear(CohortLayer):
    """`torch.nn.Linear` (out, in) or Hugging Face's Conv1D (in, out)."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [K * b, ..., in] to [K * b, ..., out]."""
        x = self.batched(x)
        K, weight, bias = self.context.active, self.per_client("weight"), self.per_client("bias")
        transposed = not isinstance(self.inner, nn.Linear)
        frozen_bias: torch.Tensor | None = self.inner.bias if bias is None else None  # type: ignore[assignment]
        rescale = self.rescale()
        if rescale is not None and frozen_bias is not None:  # it is added to what is rescaled
            bias, frozen_bias = frozen_bias[None], None
        if weight is None or K == 1:
            factors, scale = self.low_rank() or ([], 1.0)
            shared = self.shared(weight)
            term = BatchTerm(K, scale, self.context.places_in(x))
            shared = shared.mT if transposed else shared
            out = adapted_linear(x, shared, frozen_bias, term, *factors)
        else:
            out = times(x, weight.mT if transposed else weight, K)
            out = out if frozen_bias is None else out + frozen_bias.to(out.dtype)
        if rescale is not None:
            rows = out.reshape(K, -1, out.shape[-1])
            out = (rows * rescale[:, None]).to(out.dtype).reshape(out.shape)
        if bias is not None:
            rows = out.reshape(K, -1, out.shape[-1])
            out = (rows + bias[:, None].to(out.dtype)).reshape(out.shape)
        return out

    def shared(self, trained: torch.Tensor | None) -> torch.Tensor:
        """Return the weight of all clients in the precision of products.

        Args:
            trained: [1, ...], of the one client there is; None: it is frozen, and narrowed once.
        """
        weight: torch.Tensor = self.inner.weight if trained is None else trained[0]  # type: ignore[assignment]
        kind = weight.device.type
        if not torch.is_autocast_enabled(kind) or weight.dtype != torch.float32:
            return weight
        dtype, narrowed = torch.get_autocast_dtype(kind), self.context.narrowed
        if trained is not None:
            return weight.to(dtype)
        if self.layer not in narrowed:
            narrowed[self.layer] = weight.to(dtype)
        return narrowed[self.layer]


class CohortLayerNorm(CohortLayer):
    """`torch.nn.LayerNorm` with a gain and a shift per client."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalize [K * b, ..., *normalized_shape]."""
        x = self.batched(x)
        inner: nn.LayerNorm = self.inner  # type: ignore[assignment]
        K, weight, bias = self.context.active, self.per_client("weight"), self.per_client("bias")
        out = F.layer_norm(x, inner.normalized_shape, None, None, inner.eps)
        rows = out.reshape(K, -1, *inner.normalized_shape)
        gain = inner.weight if weight is None else weight[:, None]
        shift = inner.bias if bias is None else bias[:, None]
        rows = rows if gain is None else rows * gain
        return (rows if shift is None else rows + shift).reshape(x.shape)


class CohortDropout(CohortLayer):
    """Dropout whose mask is a function of (seed, round, layer, client, step)."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Zero a share p of [K * b, ...] and scale the rest by 1 / (1 - p)."""
        p = float(self.inner.p)  # type: ignore[arg-type]
        if p == 0:
            return x
        x = self.batched(x)
        context = self.context
        key = hash_key(context.seed, "dropout", context.round_, self.layer)
        # A token's mask must not depend on how far the batch was trimmed: drawn before the cut.
        layout = context.layout if context.is_packed(x) else None
        whole = list(x.shape)
        if layout is not None:
            whole[:2] = [context.rows, context.padded]
        elif x.dim() > 2 and whole[1] == context.tokens:
            whole[1] = context.padded
        count = prod(whole) // len(context.clients)
        bits = cohort_bits(key, context.clients, count, stream=context.step).reshape(whole)
        keep = bits >= int(p * 2**32)
        if layout is not None:
            keep = layout.pack(keep[:, : layout.tokens])
        elif whole != list(x.shape):
            keep = keep[:, : x.shape[1]]
        return x * keep.to(x.dtype) / (1 - p)


class CohortConv2d(CohortLayer):
    """`torch.nn.Conv2d`: full weights as a grouped convolution, low-rank terms as small ones."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map [K * b, C, H, W] to [K * b, out, H', W']."""
        x = self.batched(x)
        K, weight, bias = self.context.active, self.per_client("weight"), self.per_client("bias")
        inner: nn.Conv2d = self.inner  # type: ignore[assignment]
        out = self._convolve(x, inner.weight) if weight is None else self._grouped(x, weight, K)
        if (term := self.low_rank()) is not None:
            factors, scale = term
            out = out + scale * self._low_rank(x, factors, K)
        b = x.shape[0] // K
        if (rescale := self.rescale()) is not None:
            out = (out * rescale.repeat_interleave(b, dim=0)[:, :, None, None]).to(out.dtype)
        if bias is not None:
            out = out + bias.to(out.dtype).repeat_interleave(b, dim=0)[:, :, None, None]
        elif inner.bias is not None:
            out = out + inner.bias[:, None, None].to(out.dtype)
        return out

    def _convolve(self, x: torch.Tensor, weight: torch.Tensor, sides: int = 1) -> torch.Tensor:
        """Convolve without bias, ``sides`` times as many channels as those of one sample."""
        inner: nn.Conv2d = self.inner  # type: ignore[assignment]
        groups = sides * inner.groups
        return F.conv2d(x, weight, None, inner.stride, inner.padding, inner.dilation, groups)

    def _grouped(self, x: torch.Tensor, weight: torch.Tensor, K: int) -> torch.Tensor:
        """Convolve each client's samples with its own kernel [K, out, in/groups, k, k]."""
        b = x.shape[0] // K
        side = x.reshape(K, b, *x.shape[1:]).transpose(0, 1).reshape(b, -1, *x.shape[2:])
        out = self._convolve(side, weight.reshape(-1, *weight.shape[2:]), K)
        out = out.reshape(b, K, -1, *out.shape[2:]).transpose(0, 1)
        return out.reshape(x.shape[0], -1, *out.shape[3:])

    def _low_rank(self, x: torch.Tensor, factors: list[torch.Tensor], K: int) -> torch.Tensor:
        """Convolve with the last factor seen as kernels, then mix channels by the others."""
        inner: nn.Conv2d = self.inner  # type: ignore[assignment]
        kernel, last = inner.weight.shape[1:], factors[-1]
        if last.dim() == 2:
            z = self._convolve(x, last.reshape(-1, *kernel))
        else:
            z = self._grouped(x, last.reshape(K, -1, *kernel), K)
        for factor in reversed(factors[:-1]):
            flat = z.reshape(K, -1, z.shape[1], z.shape[2] * z.shape[3])
            mix = factor if factor.dim() == 2 else factor[:, None]
            flat = torch.matmul(mix, flat)
            z = flat.reshape(z.shape[0], -1, *z.shape[2:])
        return z


class CohortEmbedding(CohortLayer):
    """`torch.nn.Embedding` with a table, or a low-rank term on it, per client."""

    @override
    def forward(self, index: torch.Tensor) -> torch.Tensor:
        """Look up int64 [K * b, ...] -> [K * b, ..., width]."""
        index = self.batched(index)
        inner: nn.Embedding = self.inner  # type: ignore[assignment]
        K, weight = self.context.active, self.per_client("weight")
        if weight is None:
            out = F.embedding(index, inner.weight, inner.padding_idx)
        else:
            out = self._look_up(index, weight, K)
        if (term := self.low_rank()) is not None:
            factors, scale = term
            rows = factors[0]
            z = F.embedding(index, rows) if rows.dim() == 2 else self._look_up(index, rows, K)
            for factor in factors[1:]:
                z = times(z, factor.mT, K)
            out = out + scale * z
        return out

    def _look_up(self, index: torch.Tensor, tables: torch.Tensor, K: int) -> torch.Tensor:
        """Look up each client's rows in its own table [K, tokens, width]."""
        inner: nn.Embedding = self.inner  # type: ignore[assignment]
        shift = torch.arange(K, device=index.device) * tables.shape[1]
        rows = index.reshape(K, -1) + shift[:, None]
        out = F.embedding(rows, tables.reshape(-1, tables.shape[2]))
        if inner.padding_idx is not None:  # the padding row is never trained, as in torch
            fixed = (index.reshape(K, -1) == inner.padding_idx)[..., None]
            out = torch.where(fixed, out.detach(), out)
        return out.reshape(*index.shape, tables.shape[2])
