"""Quantize tensors to bytes, in one of the available formats, and back.

Rounded numbers are decoded without further error, and rounding them again does not change them:
merged, stored and resent numbers have the same bits. Other code only uses the interface
`fedraclora.protocol.kinds.Kind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch

from fedraclora.errors import WireError
from fedraclora.protocol.coding import NONE, compressed, unframed
from fedraclora.protocol.kinds import BFloat16, Draws, Kind, Scaled
from fedraclora.protocol.rotated import Rotated

FULL = "float32"  # unquantized numbers
WIDTHS = {"float32": 4, "float64": 8}  # bytes of a number
_KINDS = (BFloat16(), Scaled(8), Scaled(4), *map(Rotated, (4, 3, 2, 1)))
ROUNDINGS: dict[str, Kind] = {kind.name: kind for kind in _KINDS}
ROUNDED = tuple(ROUNDINGS)

Sizes = Sequence[int] | torch.Tensor
Rng = np.random.Generator | Sequence[np.random.Generator] | None


def packed_bytes(sizes: Sizes, kind: str) -> torch.Tensor:
    """Return the bytes of quantized tensors, scales included.

    Args:
        sizes: Numbers of each tensor, int64 [..., T].
        kind: Their format: one of `WIDTHS` or `ROUNDED`.

    Returns:
        int64 [...].

    Example:
        >>> int(packed_bytes([40, 3], "int4"))  # 3 scales, and 43 numbers of half a byte
        25
    """
    each = torch.as_tensor(sizes, dtype=torch.int64)
    return each.sum(-1) * WIDTHS[kind] if kind in WIDTHS else ROUNDINGS[kind].size(each)


@lru_cache(maxsize=1024)  # asked for each message
def row_bytes(sizes: tuple[int, ...], kind: str) -> int:
    """Return the bytes of one row of quantized tensors; see `packed_bytes`."""
    return int(packed_bytes(sizes, kind))


def encode(
    numbers: torch.Tensor,
    sizes: Sequence[int],
    kind: str,
    rng: Rng = None,
    *,
    nearest: bool = False,
    again: bool = True,
    coding: str = NONE,
) -> torch.Tensor:
    """Quantize and pack tensors.

    Args:
        numbers: Concatenated tensors, [P]; or such rows, [K, P].
        sizes: Numbers of each tensor.
        kind: One of `ROUNDED`.
        rng: Random generator; one for each row. None: round to the nearest number without draws,
            which numbers that were rounded before do not need.
        nearest: Round to the nearest number: error feedback compensates for the rest.
        again: Whether they may have been rounded before, or be rounded again (`Draws`).
        coding: Lossless coding of the bytes, for numbers [P] (`fedraclora.protocol.coding`).

    Returns:
        uint8, for each row as many as `packed_bytes` counts; with coding, at most as many. A block
        with a number that is not finite, or too large, becomes NaN.
    """
    x = numbers.detach().cpu().double().numpy()
    rngs = [] if rng is None else [rng] if isinstance(rng, np.random.Generator) else rng
    draws = Draws(rngs, nearest or rng is None, again)
    rows = np.ascontiguousarray(np.atleast_2d(x))
    packed = torch.from_numpy(ROUNDINGS[kind].encode(rows, [*map(int, sizes)], draws))
    if x.ndim > 1:
        return packed
    return packed[0] if coding == NONE else compressed([packed[0]])[0]


def sent_bytes(tensors: Sequence[torch.Tensor], kind: str, coding: str = NONE) -> int:
    """Return the bytes of tensors sent together; coded ones count as their frame."""
    sizes = [tensor.numel() for tensor in tensors]
    if coding == NONE or kind in WIDTHS:
        return row_bytes(tuple(sizes), kind)
    flat = torch.cat([torch.zeros(0), *(tensor.detach().cpu().flatten() for tensor in tensors)])
    return len(encode(flat, sizes, kind, coding=coding))


def decode(
    raw: torch.Tensor, sizes: Sequence[int], kind: str, axes: int = 1, *, again: bool = True
) -> torch.Tensor:
    """Decode the output of `encode`, float64 [P] or, with two axes, [K, P].

    Coded bytes are recognized because they are shorter.

    Raises:
        WireError: If its size or type is wrong, it contains values that `encode` does not produce,
            or its coding is damaged.
    """
    size = row_bytes(tuple(sizes), kind)
    if axes == raw.dim() == 1 and raw.dtype == torch.uint8 and len(raw) < size:
        try:
            raw = unframed(raw, size)
        except WireError as error:
            raise WireError(f"numbers of the kind {kind} came as {error}") from error
    if raw.dtype != torch.uint8 or raw.dim() != axes or raw.shape[-1] != size:
        raise WireError(
            f"numbers of the kind {kind} came as {raw.dtype} of the shape {tuple(raw.shape)}, "
            "expected "
            f"{size} bytes"
        )
    packed = np.ascontiguousarray(np.atleast_2d(raw.cpu().numpy()))
    found = torch.from_numpy(ROUNDINGS[kind].decode(packed, [*map(int, sizes)], again))
    return found[0] if axes == 1 else found


def rounded(
    tensor: torch.Tensor,
    kind: str,
    rng: np.random.Generator | None,
    rows: int = 1,
    *,
    nearest: bool = False,
) -> torch.Tensor:
    """Quantize a tensor and convert it back; ``rows`` of it are sent separately."""
    sizes = [tensor.numel() // rows] * rows
    raw = encode(tensor.reshape(-1), sizes, kind, rng, nearest=nearest)
    return decode(raw, sizes, kind).reshape(tensor.shape).to(tensor)
