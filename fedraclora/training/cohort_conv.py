"""Convolutions that serve many clients in one batch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from fedraclora.training.cohort_layers import CohortLayer


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
