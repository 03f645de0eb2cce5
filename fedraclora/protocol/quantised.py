"""Numbers in fewer bits: rounded at random so that their mean stays, packed, and read back.

    Q(x) = s floor(x / s + u),  u uniform in [0, 1):   E Q(x) = x,   E (Q(x) - x)^2 <= s^2 / 4

Of int8 and int4 each block of `BLOCK` numbers has a scale s, the smallest power of two with
max |x| <= L s, where L is 127 or 7; a block lies within one tensor, whose last one may be shorter.
It is sent as its exponent, in one byte. Since s is a power of two, what was rounded is read back
without another error, and is left as it is by rounding it again: what is merged, written to disk
and sent anew has the same bits. Of bfloat16 s is the last bit of each number.

References:
    Open Compute Project, *Microscaling formats (MX)*, version 1.0, 2023: blocks of 32 with a scale
    of eight bits, of which 255 is no number. Rounding at random: Alistarh et al., *QSGD*, 2017,
    arXiv 1610.02132.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.errors import WireError

FULL = "float32"  # numbers as they are trained
LEVELS = {"int8": 127, "int4": 7}
ROUNDED = ("bfloat16", *LEVELS)
WIDTHS = {"float32": 4, "float64": 8, "bfloat16": 2}  # bytes of a number
BLOCK = 32
ZERO, NO_NUMBER = 127, 255  # of a scale's byte: that of the scale 1, and of numbers not finite
KEPT_BITS = 45  # of the 52 of a float64, those that bfloat16 does not have

Sizes = Sequence[int] | torch.Tensor
Floats = npt.NDArray[np.float64]


def packed_bytes(sizes: Sizes, kind: str) -> torch.Tensor:
    """Count the bytes of tensors on the wire, scales included.

    Args:
        sizes: Numbers of each tensor, int64 [..., T].
        kind: Of the numbers: a key of `WIDTHS` or `LEVELS`.

    Returns:
        int64 [...].

    Example:
        >>> int(packed_bytes([40, 3], "int4"))  # 3 scales, and 43 numbers of half a byte
        25
    """
    each = torch.as_tensor(sizes, dtype=torch.int64)
    numbers = each.sum(-1)
    if kind in WIDTHS:
        return numbers * WIDTHS[kind]
    scales = ((each + BLOCK - 1) // BLOCK).sum(-1)
    return scales + (numbers if kind == "int8" else (numbers + 1) // 2)


def encode(
    numbers: torch.Tensor, sizes: Sizes, kind: str, rng: np.random.Generator | None = None
) -> torch.Tensor:
    """Round the numbers of some tensors and pack them.

    Args:
        numbers: One tensor after another, [P].
        sizes: Numbers of each.
        kind: One of `ROUNDED`.
        rng: Draws u, in steps of 2^-32; None rounds to the nearest (u = 1/2): numbers that have
            been rounded before need no draw, and under feedback what is left is made up for.

    Returns:
        uint8, as many as `packed_bytes` counts. A block with a number that is not finite or beyond
        2^127 L becomes one of NaN.
    """
    x: Floats = numbers.detach().cpu().double().numpy()
    drawn = np.full(x.shape, 1 << 31) if rng is None else rng.integers(1 << 32, size=x.shape)
    if kind == "bfloat16":
        bits = x.view(np.int64) + (drawn << (KEPT_BITS - 32))
        kept = (bits >> KEPT_BITS << KEPT_BITS).view(np.float64)
        with np.errstate(over="ignore"):
            short = (kept.astype(np.float32).view(np.uint32) >> 16).astype("<u2")
        return torch.from_numpy(short.view(np.uint8))
    starts, lengths = _blocks(sizes)
    scales = _scales(np.maximum.reduceat(np.abs(x), starts), LEVELS[kind])
    with np.errstate(invalid="ignore"):
        whole = np.floor(x / np.repeat(_powers(scales), lengths) + drawn * 2.0**-32)
    codes = np.nan_to_num(whole).clip(-LEVELS[kind], LEVELS[kind]).astype(np.int8)
    if kind == "int4":
        half = np.append(codes, np.zeros(len(codes) % 2, np.int8)).view(np.uint8) & 15
        codes = (half[::2] | half[1::2] << 4).view(np.int8)
    return torch.from_numpy(np.concatenate([scales, codes.view(np.uint8)]))


def decode(raw: torch.Tensor, sizes: Sizes, kind: str) -> torch.Tensor:
    """Read what `encode` packed, float64 [P].

    Raises:
        WireError: If it is of another size or type, or has a number that `encode` does not give.
    """
    size = int(packed_bytes(sizes, kind))
    if raw.dtype != torch.uint8 or tuple(raw.shape) != (size,):
        raise WireError(
            f"numbers of the kind {kind} came as {raw.dtype} of the shape {tuple(raw.shape)}; "
            f"{size} bytes are wanted"
        )
    packed = raw.cpu().numpy()
    if kind == "bfloat16":
        wide = packed.view("<u2").astype(np.uint32) << 16
        return torch.from_numpy(wide.view(np.float32).astype(np.float64))
    _, lengths = _blocks(sizes)
    scales, codes = packed[: len(lengths)], packed[len(lengths) :].view(np.int8)
    if kind == "int4":
        codes = np.stack([codes << 4 >> 4, codes >> 4], axis=1).reshape(-1)[: lengths.sum()]
    if (codes < -LEVELS[kind]).any():
        raise WireError(f"a number of the kind {kind} is below -{LEVELS[kind]}, which none may be")
    return torch.from_numpy(codes * np.repeat(_powers(scales), lengths))


def rounded(
    tensor: torch.Tensor, kind: str, rng: np.random.Generator | None, rows: int = 1
) -> torch.Tensor:
    """Round a tensor as it will be when it has been sent; ``rows`` of it are sent apart."""
    sizes = [tensor.numel() // rows] * rows
    flat = decode(encode(tensor.reshape(-1), sizes, kind, rng), sizes, kind)
    return flat.reshape(tensor.shape).to(tensor)


def _blocks(sizes: Sizes) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Compute where blocks begin, and the numbers in each."""
    each = np.asarray(sizes, np.int64)
    ends = np.cumsum(each)
    starts = [np.arange(end - n, end, BLOCK) for n, end in zip(each, ends, strict=True)]
    first = np.concatenate([*starts, np.zeros(0, np.int64)])
    return first, np.diff(first, append=each.sum())


def _scales(largest: Floats, levels: int) -> npt.NDArray[np.uint8]:
    """Choose the exponents of blocks by their largest numbers, as bytes."""
    fraction, exponent = np.frexp(largest / levels)
    least = exponent - (fraction == 0.5)
    found: npt.NDArray[np.uint8] = np.clip(least + ZERO, 0, NO_NUMBER).astype(np.uint8)
    found[~np.isfinite(largest)] = NO_NUMBER
    return found


def _powers(scales: npt.NDArray[np.uint8]) -> Floats:
    """Compute scales from their bytes."""
    found = np.ldexp(1.0, scales.astype(np.int64) - ZERO)
    found[scales == NO_NUMBER] = np.nan
    return found
