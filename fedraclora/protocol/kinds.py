"""Base class of the quantized number formats, and those that round each number separately.

    Q(x) = s floor(x / s + u),  u uniform in [0, 1):   E Q(x) = x,   E (Q(x) - x)^2 <= s^2 / 4

In int8 and int4 each block of `BLOCK` numbers has a scale s, the smallest power of two with
max |x| <= L s, where L is 127 or 7; a block is within one tensor, whose last block may be shorter.
The scale is sent as its exponent, in one byte. Since s is a power of two, rounded numbers are
decoded without further error, and rounding them again does not change them: merged, stored and
resent numbers have the same bits. In bfloat16 s is the last bit of each number.

References:
    Open Compute Project, *Microscaling formats (MX)*, version 1.0, 2023: blocks of 32 with a scale
    of eight bits, of which 255 is no number. Rounding at random: Alistarh et al., *QSGD*, 2017,
    arXiv 1610.02132.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from fedraclora.errors import WireError

BLOCK = 32
ZERO, NO_NUMBER = 127, 255  # of a scale's byte: that of the scale 1, and of numbers not finite
KEPT_BITS = 45  # of the 52 of a float64, those that bfloat16 does not have

Doubles = npt.NDArray[np.float64]
Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Draws:
    """Choose how numbers are rounded.

    Attributes:
        rngs: The random generator of each row; empty: no draws.
        nearest: Whether to round to the nearest number, with the least error, instead of randomly
            without bias.
        again: Whether rounded numbers may be rounded again, like the server's, which it resends.
            Numbers already in the format are then unchanged; and a format with errors of whole
            blocks uses its least error, since unbiased rounding would lengthen a factor in each
            round.
    """

    rngs: Sequence[np.random.Generator] = ()
    nearest: bool = True
    again: bool = True

    def offsets(self, shape: tuple[int, int]) -> Doubles:
        """Draw the rounding offsets of all rows, in steps of 2^-32; 1/2 for rounding to nearest."""
        if self.nearest or not self.rngs:
            return np.full(shape, 0.5)
        found = np.empty((len(self.rngs), shape[1]))
        for row, rng in zip(found, self.rngs, strict=True):
            np.multiply(rng.integers(1 << 32, size=shape[1]), 2.0**-32, out=row)
        return found


class Kind(ABC):
    """Encode rows of tensors, one after another, as bytes.

    Attributes:
        name: In settings, messages and files.
        added: Bound on the mean square of the rounding error, relative to that of the numbers.
    """

    def __init__(self, name: str, added: float) -> None:
        self.name, self.added = name, added

    @abstractmethod
    def size(self, sizes: torch.Tensor) -> torch.Tensor:
        """Return the bytes of tensors with so many numbers: int64 [..., T] to [...]."""

    @abstractmethod
    def encode(self, x: Doubles, sizes: Sequence[int], draws: Draws) -> Bytes:
        """Round rows [K, P], and pack each of them [K, bytes]."""

    @abstractmethod
    def decode(self, packed: Bytes, sizes: Sequence[int], again: bool = True) -> Doubles:
        """Decode rows [K, P].

        Raises:
            WireError: If there is something that `encode` does not give, with ``again`` as there.
        """

    def refused(self, what: str) -> WireError:
        """Build the error for bytes that `encode` never produces."""
        return WireError(f"{what} of the kind {self.name} is one that none may be")


class BFloat16(Kind):
    """bfloat16: the upper half of a float32."""

    def __init__(self) -> None:
        super().__init__("bfloat16", 2.0**-16)

    @override
    def size(self, sizes: torch.Tensor) -> torch.Tensor:
        return sizes.sum(-1) * 2

    @override
    def encode(self, x: Doubles, sizes: Sequence[int], draws: Draws) -> Bytes:
        bits = x.view(np.int64) + (draws.offsets(x.shape) * 2.0**KEPT_BITS).astype(np.int64)
        kept = (bits >> KEPT_BITS << KEPT_BITS).view(np.float64)
        with np.errstate(over="ignore"):
            return (kept.astype(np.float32).view(np.uint32) >> 16).astype("<u2").view(np.uint8)

    @override
    def decode(self, packed: Bytes, sizes: Sequence[int], again: bool = True) -> Doubles:
        wide = packed.view("<u2").astype(np.uint32) << 16
        return wide.view(np.float32).astype(np.float64)


class Scaled(Kind):
    """int8 and int4: integers from -L to L, with a power of two for each block."""

    def __init__(self, bits: int) -> None:
        self.bits, self.levels = bits, (1 << bits - 1) - 1
        super().__init__(f"int{bits}", BLOCK / self.levels**2)

    @override
    def size(self, sizes: torch.Tensor) -> torch.Tensor:
        return ((sizes + BLOCK - 1) // BLOCK).sum(-1) + (sizes.sum(-1) * self.bits + 7) // 8

    @override
    def encode(self, x: Doubles, sizes: Sequence[int], draws: Draws) -> Bytes:
        starts, lengths = _blocks(tuple(sizes))
        largest = np.maximum(
            np.maximum.reduceat(x, starts, axis=1), -np.minimum.reduceat(x, starts, axis=1)
        )
        scales = _scales(largest, self.levels)
        with np.errstate(invalid="ignore"):
            whole = _by_block(x, _powers(scales, -1), lengths)
            whole += draws.offsets(x.shape)
            np.floor(whole, out=whole)
        if (scales == NO_NUMBER).any():
            whole = np.nan_to_num(whole)
        codes = np.clip(whole, -self.levels, self.levels, out=whole).astype(np.int8)
        return np.concatenate([scales, pack(codes.view(np.uint8), self.bits)], axis=1)

    @override
    def decode(self, packed: Bytes, sizes: Sequence[int], again: bool = True) -> Doubles:
        _, lengths = _blocks(tuple(sizes))
        scales, codes = np.split(packed, [len(lengths)], axis=1)
        left = 8 - self.bits
        whole = (unpack(codes, self.bits, sum(sizes)) << left).view(np.int8) >> left
        if (whole < -self.levels).any():
            raise self.refused(f"a number below -{self.levels}")
        return _by_block(whole, _powers(scales), lengths)


def pack(codes: Bytes, bits: int) -> Bytes:
    """Pack the low bits of codes [K, P], the first ones lowest; each row begins at a byte."""
    if bits == 8:
        return codes
    K, P = codes.shape
    wide = np.zeros((K, -(-P // 8) * 8), np.uint8)
    np.bitwise_and(codes, (1 << bits) - 1, out=wide[:, :P])
    words = wide.view("<u8")  # of eight codes, a byte each
    for joined in (1, 2, 4):
        words = (words | words >> joined * (8 - bits)) & _lanes(2 * joined, bits)
    packed = words[..., None].view(np.uint8)[..., :bits]
    return packed.reshape(K, -1)[:, : (P * bits + 7) // 8]


def unpack(packed: Bytes, bits: int, count: int) -> Bytes:
    """Read ``count`` codes of each row back, [K, count]."""
    if bits == 8:
        return packed
    K, words = len(packed), -(-count // 8)
    room = np.zeros((K, words * bits), np.uint8)
    room[:, : packed.shape[1]] = packed
    wide = np.zeros((K, words, 8), np.uint8)
    wide[..., :bits] = room.reshape(K, words, bits)
    found = wide.view("<u8")[..., 0]
    for joined in (4, 2, 1):
        found = (found | found << joined * (8 - bits)) & _lanes(joined, bits)
    return found[..., None].view(np.uint8).reshape(K, -1)[:, :count]


def _lanes(joined: int, bits: int) -> np.uint64:
    """Return the bits of a word that codes take, if so many of them lie side by side."""
    lane = (1 << joined * bits) - 1
    return np.uint64(sum(lane << at for at in range(0, 64, 8 * joined)))


@lru_cache(maxsize=64)
def _blocks(sizes: tuple[int, ...]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Compute the start of each block, and the numbers in it."""
    each = np.asarray(sizes, np.int64)
    ends = np.cumsum(each)
    starts = [np.arange(end - n, end, BLOCK) for n, end in zip(each, ends, strict=True)]
    first = np.concatenate([*starts, np.zeros(0, np.int64)])
    return first, np.diff(first, append=each.sum())


def _scales(largest: Doubles, levels: int) -> Bytes:
    """Choose the exponents of blocks by their largest numbers, as bytes."""
    fraction, exponent = np.frexp(largest / levels)
    least = exponent - (fraction == 0.5)
    found: Bytes = np.clip(least + ZERO, 0, NO_NUMBER).astype(np.uint8)
    found[~np.isfinite(largest)] = NO_NUMBER
    return found


def _powers(scales: Bytes, sign: int = 1) -> Doubles:
    """Compute scales from their bytes, or their inverses."""
    found = np.ldexp(1.0, sign * (scales.astype(np.int64) - ZERO))
    found[scales == NO_NUMBER] = np.nan
    return found


def _by_block(x: npt.NDArray[Any], values: Doubles, lengths: npt.NDArray[np.int64]) -> Doubles:
    """Multiply the numbers of each block by its value, [K, P] by [K, blocks]."""
    if (lengths == BLOCK).all():  # several times as fast
        found: Doubles = x.reshape(*values.shape, BLOCK) * values[..., None]
        return found.reshape(x.shape)
    each: Doubles = np.repeat(values, lengths, axis=1)
    each *= x
    return each
