"""Run the blocks of a transformer on the real tokens of a batch, without its padding.

Sentences differ in length, so that half of a batch is often padding. The transformers model is not
changed: before its first block the real tokens of each client's samples are concatenated, and after
its last block they return to their positions. In between every layer acts on each token separately,
except attention. transformers looks up attention functions by name; ours gathers the samples again,
a few of similar length at a time.

Positions without a token hold the finite values of padding. Their gradient is exactly zero in every
backward pass, since outputs of padding reach no loss.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

from fedraclora.data.task import forward
from fedraclora.models.packed_layout import Bucket, PackedLayout, take_rows

ATTENTION_NAME = "fedraclora_packed"  # in the table of transformers
# Unsupported attention arguments of some models, by their names there.
UNUSUAL = ("sliding_window", "softcap", "s_aux", "position_bias")
PROBE = (5, 9, 3, 7)  # tokens of the samples on which a model is tested


class PackedAttention(torch.autograd.Function):
    """Compute attention by plain products, with a hand-written backward pass and fewer copies."""

    @override
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        hidden: torch.Tensor | None,
        scale: float,
    ) -> torch.Tensor:
        n, heads, T, _ = q.shape
        few = k.shape[1]
        q, k, v = q.reshape(n * few, -1, q.shape[-1]), k.flatten(0, 1), v.flatten(0, 1)
        with torch.autocast(q.device.type, enabled=False):
            scores = torch.bmm(q, k.mT).mul_(scale)
            if hidden is not None:
                low = torch.finfo(scores.dtype).min
                scores.view(n, heads, T, T).masked_fill_(hidden, low)
            shares = torch.softmax(scores, dim=-1)
            out = torch.bmm(shares, v)
        ctx.scale, ctx.shape = scale, (n, few, T)
        ctx.save_for_backward(q, k, v, shares)
        return out.view(n, heads, T, -1)

    @override
    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, shares = ctx.saved_tensors
        slope = slope.reshape(len(q), -1, v.shape[-1])
        to_v = torch.bmm(shares.mT, slope)
        back = torch.bmm(slope, v.mT)
        back = torch._softmax_backward_data(back, shares, -1, shares.dtype)  # noqa: SLF001
        to_q, to_k = torch.bmm(back, k).mul_(ctx.scale), torch.bmm(back.mT, q).mul_(ctx.scale)
        n, few, T = ctx.shape
        found = [t.view(n, few, -1, t.shape[-1]) for t in (to_q, to_k, to_v)]
        return found[0].view(n, -1, T, q.shape[-1]), *found[1:], None, None


class Packer:
    """Pack the batches of a transformers model.

    Args:
        model: Receives hooks before and after its blocks, which do nothing until `use`.
        blocks: The model's blocks.
    """

    def __init__(self, model: nn.Module, blocks: nn.ModuleList) -> None:
        self.layout: PackedLayout | None = None
        owners = [model, *blocks.modules()]
        configs = {id(c): c for m in owners if (c := getattr(m, "config", None)) is not None}
        self.plain = [(config, config._attn_implementation) for config in configs.values()]  # noqa: SLF001
        self.fused = any(plain == "sdpa" for _, plain in self.plain)
        for module in blocks.modules():
            module.packer = self  # type: ignore[assignment]
        self.hooks = [
            block.register_forward_pre_hook(partial(self._enter, first=i == 0), with_kwargs=True)
            for i, block in enumerate(blocks)
        ]
        self.hooks.append(blocks[-1].register_forward_hook(self._leave))

    @classmethod
    def of(cls, model: nn.Module) -> Packer | None:
        """Prepare a model if its blocks can be packed, tested on a few tokens.

        Args:
            model: In evaluation mode.

        Returns:
            The packer; None if the model is not from transformers, or has other blocks or
            attention.
        """
        layers: Any = sys.modules.get("transformers.modeling_layers")
        kind = getattr(layers, "GradientCheckpointingLayer", None)
        if kind is None or getattr(getattr(model, "config", None), "sliding_window", None):
            return None
        lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        found = [blocks for blocks in lists if all(isinstance(b, kind) for b in blocks)]
        if len(found) != 1:
            return None
        return tried(model, found[0])

    def use(self, layout: PackedLayout | None) -> None:
        """Pack the batches from now on, also in recomputed forward passes."""
        if layout is None and self.layout is None:
            return
        self.layout = layout
        for config, plain in self.plain:
            config._attn_implementation = plain if layout is None else ATTENTION_NAME  # noqa: SLF001

    def detach(self) -> None:
        """Remove the hooks from the model."""
        self.use(None)
        for hook in self.hooks:
            hook.remove()

    def _enter(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, first: bool
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if self.layout is None:
            return None
        rest = {name: self._packed(value) for name, value in kwargs.items()}
        if first and args:
            return (self._packed(args[0]), *args[1:]), rest
        return args, rest

    def _packed(self, value: Any) -> Any:
        """Pack tensors with tokens on their second axis: [N, T, ...] or [1, T, ...], or tuples."""
        layout = self.layout
        if isinstance(value, tuple):
            return tuple(self._packed(part) for part in value)
        if layout is None or not isinstance(value, torch.Tensor) or layout.holds(value):
            return value
        if value.dim() > 1 and value.shape[1] == layout.tokens:
            return layout.pack(value)
        return value

    def _leave(self, _: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        if self.layout is None:
            return None
        if isinstance(output, tuple):
            return (self.layout.spread(output[0]), *output[1:])
        return self.layout.spread(output)


def attend(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **given: Any,
) -> tuple[torch.Tensor, None]:
    """Attend within each sample: queries [K, heads, L, width] -> [K, L, heads, width].

    Raises:
        NotImplementedError: If the model needs unsupported arguments of attention.
    """
    packer: Packer = module.packer
    layout = packer.layout
    unusual = [name for name in UNUSUAL if given.get(name) is not None]
    if layout is None or attention_mask is not None or unusual:
        raise NotImplementedError(f"{type(module).__name__} wants {unusual or 'a mask'}")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype == torch.float32:
        dtype = torch.get_autocast_dtype(kind)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    sizes = [bucket.count * bucket.tokens for bucket in layout.buckets]
    parts = []
    for x in (query, key, value.to(query.dtype)):
        heads = x.shape[1]
        taken = take_rows(x.transpose(1, 2).reshape(-1, x.shape[-1]), *layout.of_heads(heads))
        parts.append(taken.split([*(size * heads for size in sizes), 1]))
    found = []
    for i, bucket in enumerate(layout.buckets):
        q, k, v = (p[i].view(bucket.count, -1, bucket.tokens, p[i].shape[-1]) for p in parts)
        found.append(attend_within(q, k, v, bucket, scale, causal=causal, fused=packer.fused))
    width, heads = found[0].shape[-1], query.shape[1]
    there, back = layout.of_heads(heads)
    together = [out.reshape(-1, width) for out in found]
    together.append(found[0].new_zeros(1, width))
    out = take_rows(torch.cat(together), back, there)
    return out.view(layout.clients, layout.length, heads, width), None


def attend_within(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    bucket: Bucket,
    scale: float,
    *,
    causal: bool,
    fused: bool,
) -> torch.Tensor:
    """Attend within the samples of a bucket, [count, heads, tokens, width]."""
    if fused:
        seen = None if causal else ~bucket.hidden()
        return F.scaled_dot_product_attention(
            q, k, v, seen, is_causal=causal, scale=scale, enable_gqa=k.shape[1] != q.shape[1]
        )
    if causal:  # a real query does not see padding, which comes after it
        hidden = torch.ones(bucket.tokens, bucket.tokens, dtype=torch.bool, device=q.device).triu(1)
    else:
        hidden = bucket.hidden()
    apply: Callable[..., torch.Tensor] = PackedAttention.apply
    return apply(q, k, v, hidden, scale)


def tried(model: nn.Module, blocks: nn.ModuleList) -> Packer | None:
    """Prepare a model if packing leaves its outputs the same; else restore it."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS.register(ATTENTION_NAME, attend)
    packer = Packer(model, blocks)
    weight = next(model.parameters())
    tokens, device = max(PROBE), weight.device
    lengths = torch.tensor(PROBE, device=device)
    ids = 1 + torch.arange(len(PROBE) * tokens, device=device).reshape(len(PROBE), tokens)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None) or len(PROBE) * tokens
    mask = (torch.arange(tokens, device=device) < lengths[:, None]).long()
    inputs = {"input_ids": ids * mask % vocabulary, "attention_mask": mask}
    layout = PackedLayout.of(lengths, clients=2, tokens=tokens, longest=14, tops=(9, 5))
    try:
        with torch.no_grad():
            padded = forward(model, inputs)
            packer.use(layout)
            packed = forward(model, inputs)
    except Exception:  # it needs something unsupported, or takes other inputs
        packer.detach()
        return None
    packer.use(None)
    if padded.dim() == 3 and padded.shape[1] == tokens:
        padded, packed = padded[mask.bool()], packed[mask.bool()]
    if alike(padded, packed):
        return packer
    packer.detach()
    return None


def alike(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    """Check whether two outputs are the same up to rounding."""
    # Some eager attention computes its softmax in float32, whatever the precision of weights.
    close = max(torch.finfo(wanted.dtype).eps ** 0.5, 1e-5)
    return torch.allclose(wanted, found, rtol=close, atol=close * float(wanted.abs().max()))
