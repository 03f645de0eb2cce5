"""Embeddings that serve many clients in one batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from fedraclora.training.adapted import times
from fedraclora.training.cohort_layers import CohortLayer


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
