"""Hold frozen matrices as integers of 8 or 4 bits, which every product dequantizes again.

    int8   W_ij = c_ij s_i,   one scale a row
    int4   W_ij = c_ij s_ig,  one scale for 32 numbers of a row, two numbers in a byte

The scales are those of torchao's symmetric affine quantization. The tensor class is our own:
torchao has no int4 for training on a CPU, and its tensors do not work in cohort layers,
`torch.func.vmap` and files. If torchao is installed, transformers imports it, which costs two
seconds in every process.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
from torch.utils._pytree import tree_map_only
from typing_extensions import override

from fedraclora.errors import ConfigError

BITS = {"int8": 8, "int4": 4}
GROUP = 32  # numbers of a row that share a scale, with 4 bits
_aten = torch.ops.aten


class QuantisedWeight(torch.Tensor):
    """Hold a matrix [m, n] of codes and scales that computes like the dense one; read-only.

    Every operator dequantizes it while it runs. Autograd keeps the codes for the backward pass, so
    that no step holds the dense weights of two layers.

    Attributes:
        codes: int8 [m, n]; or uint8 [m, n / 2]: the first half of a row in the low bits.
        scale: [m, groups of a row].
        turned: Whether the tensor is the transpose [n, m].
    """

    codes: torch.Tensor
    scale: torch.Tensor
    turned: bool

    @staticmethod
    def __new__(
        cls,
        codes: torch.Tensor,
        scale: torch.Tensor,
        dtype: torch.dtype | None = None,
        *,
        turned: bool = False,
    ) -> Self:
        """Create a tensor that appears to have the type ``dtype``."""
        m, n = codes.shape[0], codes.shape[1] * (1 + (codes.dtype == torch.uint8))
        made: Self = torch.Tensor._make_wrapper_subclass(  # noqa: SLF001
            cls,
            (n, m) if turned else (m, n),
            strides=(1, n) if turned else (n, 1),
            dtype=dtype or scale.dtype,
            device=codes.device,
        )
        made.codes, made.scale, made.turned = codes, scale, turned
        return made

    def dequantized(self) -> torch.Tensor:
        """Compute the dense matrix; the scale is multiplied in its own precision."""
        codes, (m, groups) = self.codes, self.scale.shape
        if codes.dtype == torch.uint8:
            codes = torch.cat([codes & 15, codes >> 4], dim=1).to(torch.int8) - 8
        dense = codes.reshape(m, groups, -1) * self.scale[..., None]
        dense = dense.reshape(m, -1).to(self.dtype)
        return dense.mT if self.turned else dense

    @property
    @override
    def nbytes(self) -> int:  # type: ignore[override]
        """Count the bytes of codes and scales."""
        return self.codes.nbytes + self.scale.nbytes

    def __tensor_flatten__(self) -> tuple[list[str], tuple[torch.dtype, bool]]:
        """List the inner tensors, for torch."""
        return ["codes", "scale"], (self.dtype, self.turned)

    @classmethod
    def __tensor_unflatten__(
        cls, inner: Mapping[str, torch.Tensor], meta: tuple[torch.dtype, bool], *_: object
    ) -> Self:
        """Rebuild the tensor from the inner tensors, for torch."""
        return cls(inner["codes"], inner["scale"], meta[0], turned=meta[1])

    def converted(self, *, dtype: torch.dtype | None = None, turn: bool = False, **to: Any) -> Self:
        """Copy the tensor with another type, transposed, or moved by ``to``."""
        codes, scale = self.codes.to(**to), self.scale.to(**to)
        return type(self)(codes, scale, dtype or self.dtype, turned=self.turned != turn)

    @override
    def __repr__(self) -> str:  # type: ignore[override]
        return f"{type(self).__name__}({tuple(self.shape)}, {base_name(self)})"

    @classmethod
    @override
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        own = args[0] if args and isinstance(args[0], cls) else None
        if own is not None:
            if func in {_aten.detach.default, _aten.alias.default}:
                return own.converted()
            if func is _aten.clone.default:
                return own.converted(copy=True)
            if func is _aten.t.default or (
                func is _aten.transpose.int and {d % 2 for d in args[1:]} == {0, 1}
            ):
                return own.converted(turn=True)
            dtype = kwargs.get("dtype") or own.dtype
            if func is _aten._to_copy.default and dtype.is_floating_point:  # noqa: SLF001
                return own.converted(dtype=dtype, device=kwargs.get("device"))
            if func._schema.is_mutable:  # noqa: SLF001
                raise RuntimeError(f"{func} would write into {own}, which is frozen")
        args, kwargs = tree_map_only(cls, cls.dequantized, (args, kwargs))
        return func(*args, **kwargs)


def base_name(weight: torch.Tensor) -> str:
    """Return the precision of a weight, as in ``model.base``."""
    if isinstance(weight, QuantisedWeight):
        return "int4" if weight.codes.dtype == torch.uint8 else "int8"
    return str(weight.dtype)[6:]


def is_narrow(weight: torch.Tensor) -> bool:
    """Return whether a weight has fewer bits than float32: updates are not merged into it."""
    return isinstance(weight, QuantisedWeight) or weight.dtype.itemsize < 4


def quantized(weight: torch.Tensor, base: str, name: str) -> QuantisedWeight:
    """Round a matrix [m, n] to the nearest codes, symmetric about zero.

    Args:
        weight: A matrix of any float type, which products see; codes and scales use float32.
        base: A key of `BITS`.
        name: The weight's name, for messages.

    Raises:
        ConfigError: If rows do not divide into groups.
    """
    bits, (m, n), exact = BITS[base], weight.shape, weight.to(torch.float32)
    if bits == 4 and n % GROUP:
        raise ConfigError(
            f"model.base is int4, which holds rows in groups of {GROUP} numbers, but those of "
            f"{name} have {n}: take model.base=int8"
        )
    rows = exact.reshape(m, -1, GROUP if bits == 4 else n)
    half = 1 << bits - 1  # codes are -half to half - 1, as in torchao
    scale = rows.abs().amax(dim=2, keepdim=True) / (half - 0.5)
    scale = scale.clamp(min=torch.finfo(exact.dtype).tiny)  # scale of a row of zeros
    codes = (rows / scale).round().clamp(-half, half - 1).to(torch.int8).reshape(m, n)
    if bits == 4:
        halves = (codes + 8).to(torch.uint8).chunk(2, dim=1)
        codes = halves[0] | halves[1] << 4
    return QuantisedWeight(codes, scale.reshape(m, -1), weight.dtype)


def dense(tree: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Dequantize named weights; dense ones are not copied."""
    quantized = QuantisedWeight
    return {n: t.dequantized() if isinstance(t, quantized) else t for n, t in tree.items()}


MARK = "|codes"  # suffix of a weight's name; the rest describes its layout
SCALE = "|scale"


def in_parts(tree: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Replace quantized weights by their codes and scales.

    Example:
        >>> w = QuantisedWeight(torch.ones(2, 3, dtype=torch.int8), torch.ones(2, 1))
        >>> list(in_parts({"b": torch.zeros(2), "w": w}))
        ['b', 'w|codes', 'w|scale']
        >>> rejoined(in_parts({"w": w}))
        {'w': QuantisedWeight((2, 3), int8)}
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tree.items():
        if isinstance(tensor, QuantisedWeight):
            turned = "|turned" if tensor.turned else ""
            found[f"{name}{turned}{MARK}"] = tensor.codes
            found[f"{name}{turned}{SCALE}"] = tensor.scale
        else:
            found[name] = tensor
    return found


def rejoined(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rebuild quantized weights; the inverse of `in_parts`."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(MARK)
        if stem != name and stem + SCALE in tensors:
            weight = stem.removesuffix("|turned")
            found[weight] = QuantisedWeight(tensor, tensors[stem + SCALE], turned=weight != stem)
        elif not (name.endswith(SCALE) and name.removesuffix(SCALE) + MARK in tensors):
            found[name] = tensor
    return found
