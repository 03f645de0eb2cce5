"""Quantize to b = 4 to 1 bits a number after a random rotation (eden4 to eden1).

    z = H D x,  q_i the level nearest to g z_i / |x|,  x~ = s D H q

D are random signs and H is the Hadamard matrix of entries 1 and -1, which makes any numbers nearly
normal; levels are those of Lloyd and Max for a normal distribution. s = |x|^2 / <q, z> makes
<x~, x> = |x|^2, and the mean of x~ over D is near x: clients use it, so that errors average out
over clients. s = <q, z> / (d |q|^2) has the least error: the server uses it, and clients with error
feedback. Their squared errors, relative to |x|^2 and for large d:

    bits            4      3      2      1
    without bias    0.010  0.036  0.133  0.571
    least           0.010  0.035  0.117  0.363

**Bias.** <x~, x> is exact for each D. The rest of the mean is exact for a uniformly random
rotation. For a Hadamard matrix with random signs it is not if few numbers of a block dominate the
others, since z then takes few values. The norm of the bias relative to |x|, equal at 64 and at 1024
numbers:

    bits                                              4      3      2      1
    normal                                            0.00   0.00   0.01   0.02
    one number as long as all others together         0.00   0.00   0.03   0.17
    one number three times as long                    0.00   0.00   0.10   0.32
    three numbers that are not zero (1, 1/2, 1/4)     0.08   0.10   0.23   0.56

More clients or rounds do not reduce it; int8, int4 and bfloat16 have no bias.

**Equal blocks.** All blocks of a tensor have the same signs. So equal blocks have equal errors,
which do not average out in their sum; errors of different blocks, and of tensors, are independent.

**Length.** |x~| is sqrt(1 + e) |x|, e the error without bias: x~ may exceed a bound on the norm of
x.

**Equal bits.** Levels are integers up to 63, and s has 8 bits and an exponent. So all numbers of x~
in a block of up to 1024 are integers below 2^24 times one power of two: float32 represents them
exactly, and no order of summation, library or host can change them. Rounding works on x in 26 bits,
and so on integers, too.

**Blocks.** The first numbers of a tensor form blocks of 1024; the others form at most one block
each of 512, 256, 128, 64 and 32, by the binary digits of their number; the rest of fewer than 32
numbers is a block of int8. Nothing is padded.

**Signs** follow from a number of two bytes, drawn for each tensor and sent with it. It is one of
`FOUND` if x~ may be rounded again before it is resent or stored: all of these are tried, and if x
is s D H q for one of them, that is its code.

    a row:  the signs of each tensor | s of each block, as exponent and 8 bits | q | the rest

References:
    Vargaftik et al., *DRIVE*, 2021, arXiv 2105.08339; *EDEN*, 2022, arXiv 2108.08842. Departures:
    their s is a float32 and a tensor is padded to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from typing_extensions import override

from fedraclora.protocol.kinds import BLOCK, Bytes, Doubles, Draws, Kind, Scaled, pack, unpack
from fedraclora.rng import generator

LENGTHS = (1024, 512, 256, 128, 64, BLOCK)  # lengths of blocks
LEVELS = {  # of either sign, and g: the value of one standard deviation
    1: ((1,), 1.0),
    2: ((3, 10), 6.623),
    3: ((7, 22, 39, 63), 29.09),
    4: ((3, 9, 15, 22, 29, 37, 48, 63), 23.07),
}
ADDED = {1: 0.571, 2: 0.133, 3: 0.036, 4: 0.01}
FINE, COARSE = 26, 24  # bits of x, and of one that has been rounded
MOST = 1000  # below it float64 has both 2^e and 2^-e
AT_ONCE = 1 << 16  # numbers that are rotated together: they fit a cache
LOWEST, TOP, NO_NUMBER = -149, 254, (255, 128)  # exponents of s: the first, and how many more
SIGNS, FOUND = 1 << 16, 16  # number of sets of signs, and how many of them are tried
REST = Scaled(8)

Whole = npt.NDArray[np.int64]
Reals = TypeVar("Reals", Doubles, npt.NDArray[np.float32])


class Rotated(Kind):
    """Quantize to ``bits`` bits a number, 1 to 4.

    Attributes:
        levels: The value of each code [2^bits].
        table: The code of the level nearest to i / 2 and a bit, by the byte of i, -128 to 127.
    """

    def __init__(self, bits: int) -> None:
        super().__init__(f"eden{bits}", ADDED[bits])
        self.bits, above = bits, np.array(LEVELS[bits][0], np.float64)
        self.levels = np.concatenate([-above[::-1], above])
        middle = [a + b for a, b in pairwise(self.levels)]  # twice the midpoints between two levels
        below = np.arange(256).astype(np.int8)  # in the order of their bytes
        self.table = np.searchsorted(middle, below, side="right").astype(np.uint8)

    @override
    def size(self, sizes: torch.Tensor) -> torch.Tensor:
        rotated, scales = sizes - sizes % BLOCK, sizes // LENGTHS[0]
        for length in LENGTHS[1:]:
            scales = scales + sizes // length % 2
        rest = REST.size(sizes % BLOCK)
        return ((rotated > 0) * 2 + scales * 2 + rotated * self.bits // 8).sum(-1) + rest

    @override
    def encode(self, x: Doubles, sizes: Sequence[int], draws: Draws) -> Bytes:
        plan, K = _plan(tuple(sizes), len(x)), len(x)
        known = np.full((K, plan.tensors), -1)
        if draws.again:
            known[:] = [self._known(row, plan) for row in x]
        turns = np.zeros_like(known)
        for row, rng in zip(turns, draws.rngs, strict=False):
            row[:] = rng.integers(FOUND if draws.again else SIGNS, size=plan.tensors)
        turns = np.where(known < 0, turns, known)
        u, signs = draws.offsets((K, plan.blocks)), signs_of(turns)
        scales, coded = [np.zeros((K, 0, 2), np.uint8)], [np.zeros((K, 0), np.uint8)]
        for part in plan.parts:
            here = _Blocks.of(part.cut(x), signs[:, part.tensors, : part.length])
            s, codes = self._rounded(here, draws.nearest or draws.again, u[:, part.place])
            if (kept := known[:, part.tensors] >= 0).any():
                rows = np.nonzero(kept)
                which, exact_s, exact = self._exact(here[rows])
                where = rows[0][which], rows[1][which]
                s[where], codes[where] = exact_s, exact
            scales.append(s)
            coded.append(codes.reshape(K, -1))
        all_s, all_codes = np.concatenate(scales, axis=1), np.concatenate(coded, axis=1)
        parts = [turns.astype("<u2").view(np.uint8), all_s.reshape(K, -1)]
        parts.append(pack(all_codes, self.bits))
        if plan.rests:
            parts.append(REST.encode(x[:, plan.rest], plan.rests, draws))
        return np.concatenate(parts, axis=1)

    @override
    def decode(self, packed: Bytes, sizes: Sequence[int], again: bool = True) -> Doubles:
        plan, K = _plan(tuple(sizes), len(packed)), len(packed)
        ends = np.cumsum([2 * plan.tensors, 2 * plan.blocks, plan.rotated * self.bits // 8])
        told, s, codes, rest = (np.ascontiguousarray(p) for p in np.split(packed, ends, axis=1))
        turns = told.view("<u2")
        if again and (turns >= FOUND).any():
            raise self.refused(f"a number of signs above {FOUND - 1}, of what is sent on,")
        signs, scales = signs_of(turns), self._read(s.reshape(K, plan.blocks, 2))
        each_code, at = unpack(codes, self.bits, plan.rotated), 0
        x = np.empty((K, sum(sizes)))
        for part in plan.parts:
            end = at + len(part.tensors) * part.length
            # Sums of levels are integers that float32 represents exactly.
            q = self.levels.astype(np.float32)[each_code[:, at:end]]
            each = hadamard(q.reshape(K, -1, part.length))
            each *= signs[:, part.tensors, : part.length]
            blocks = each * scales[:, part.place, None]
            blocks += 0.0  # turns -0 into 0
            part.put(x, blocks)
            at = end
        if plan.rests:
            x[:, plan.rest] = REST.decode(rest, plan.rests)
        return x

    def _rounded(self, x: _Blocks, least: bool, u: Doubles) -> tuple[Bytes, Bytes]:
        """Round blocks: scales [K, b, 2], and codes [K, b, d]."""
        norm = x.norm.astype(np.float64)
        some = norm > 0
        g = np.divide(2 * LEVELS[self.bits][1], np.sqrt(norm), where=some, out=np.zeros_like(norm))
        codes = self._nearest(x.z * g[..., None])
        q = self.levels[codes]
        along = np.einsum("...i,...i", q, x.z)
        over = (x.z.shape[-1] * np.einsum("...i,...i", q, q), along) if least else (along, norm)
        s = np.divide(over[1], over[0], where=some, out=np.zeros_like(norm))
        found = _scales(x.scaled(s), u)
        found[~x.finite] = NO_NUMBER
        return found, codes

    def _exact(self, x: _Blocks) -> tuple[Whole, Bytes, Bytes]:
        """Find blocks of [N, d] that equal s D H q; return their positions, s and q."""
        largest, d = np.abs(x.z).max(-1), x.z.shape[-1]
        codes, s = np.zeros(x.z.shape, np.uint8), np.zeros((len(x.z), 2), np.uint8)
        fits = x.finite & (largest == 0)
        for level in LEVELS[self.bits][0][::-1]:  # the largest number may be any of them
            rows = np.flatnonzero(~fits & x.finite)
            scales = _scales(x.scaled(largest[rows] / (d * level), rows), np.array(0.5))
            same = self._read(scales) * (d * level) == x.scaled(largest[rows], rows)
            rows, scales = rows[same], scales[same]
            found = codes[:0]
            for columns in (slice(8), slice(None)):  # most that are not end here
                z, most = x.z[rows, columns], largest[rows, None]
                found = self._nearest(z * (2 * level / most))
                same = (z * level == most * self.levels[found]).all(-1)
                rows, scales, found = rows[same], scales[same], found[same]
            fits[rows], s[rows], codes[rows] = True, scales, found
        where = np.flatnonzero(fits)
        return where, s[where], codes[where]

    def _known(self, row: Doubles, plan: _Plan) -> list[int]:
        """Find for each tensor the signs with which it was rounded before; -1: none."""
        left = [np.arange(FOUND) for _ in range(plan.tensors)]
        tried = set()
        for part in plan.parts:
            for tensor, block in zip(part.tensors, part.cut(row[None])[0], strict=True):
                if tensor in tried and len(left[tensor]) < 2:
                    continue
                if not (block.any() and np.isfinite(block).all()):
                    continue
                tried.add(tensor)
                # A rounded block has at most 24 of the 26 bits: most new ones are told by that.
                if (_whole(block)[0] % (1 << FINE - COARSE)).any():
                    left[tensor] = left[tensor][:0]
                    continue
                signs = signs_of(left[tensor][None])[0, :, : part.length]
                fits, *_ = self._exact(_Blocks.of(np.broadcast_to(block, signs.shape), signs))
                left[tensor] = left[tensor][fits]
        return [int(each[0]) if len(each) else -1 for each in left]

    def _nearest(self, doubled: Doubles) -> Bytes:
        """Return the codes of the levels nearest to numbers, given times 2 and overwritten."""
        np.floor(doubled, out=doubled)
        np.clip(doubled, -128, 127, out=doubled)
        return self.table[doubled.astype(np.int8).view(np.uint8)]

    def _read(self, s: Bytes) -> Doubles:
        """Read scales [..., 2]."""
        exponent, whole = s[..., 0].astype(np.int64), s[..., 1]
        none = (s == NO_NUMBER).all(-1)
        if (((exponent > 0) & (whole < 128)) | ((exponent > TOP) & ~none)).any():
            raise self.refused("a scale")
        found = np.ldexp(whole.astype(np.float64), exponent + LOWEST)
        found[none] = np.nan
        return found


@dataclass(frozen=True)
class _Blocks:
    """Hold blocks [..., d] as rotated integers.

    Attributes:
        z: H D x.
        norm: |x|^2.
        exponent: Exponent of the power of two by which x was divided.
        finite: Whether x is finite; else it counts as 0.
    """

    z: Doubles
    norm: Whole
    exponent: Whole
    finite: npt.NDArray[np.bool_]

    @classmethod
    def of(cls, x: Doubles, signs: npt.NDArray[np.int8]) -> _Blocks:
        whole, exponent, finite = _whole(x)
        squares = whole.astype(np.int64)
        norm = np.einsum("...i,...i", squares, squares)
        whole *= signs
        return cls(hadamard(whole), norm, exponent, finite)

    def __getitem__(self, rows: Any) -> _Blocks:
        return _Blocks(*(each[rows] for each in vars(self).values()))

    def scaled(self, value: Doubles, rows: Any = ...) -> Doubles:
        """Multiply integers of blocks by the divisor of x."""
        found: Doubles = np.ldexp(value, self.exponent[rows])
        return found


@dataclass(frozen=True)
class _Part:
    """Locate the blocks of one length.

    Attributes:
        length: d.
        spans: Their start and end in a row, for each tensor that has some.
        tensors: The index of each block's tensor.
        place: The position of their scales among those of all blocks.
    """

    length: int
    spans: list[tuple[int, int]]
    tensors: Whole
    place: slice

    def cut(self, x: Doubles) -> Doubles:
        """Cut blocks out of rows: [K, P] to [K, b, d]."""
        parts = [x[:, a:b].reshape(len(x), -1, self.length) for a, b in self.spans]
        return np.concatenate(parts, axis=1)

    def put(self, x: Doubles, blocks: Doubles) -> None:
        """Put blocks [K, b, d] into rows [K, P]."""
        at = 0
        for a, b in self.spans:
            end = at + (b - a) // self.length
            x[:, a:b] = blocks[:, at:end].reshape(len(x), -1)
            at = end


@dataclass(frozen=True)
class _Plan:
    """Describe how the rows of some tensors are cut into blocks.

    Attributes:
        parts: Their blocks, the longest first.
        tensors, blocks, rotated: Number of tensors with blocks, of blocks, and of their numbers.
        rest: The positions of the other numbers.
        rests: Number of these in each tensor.
    """

    parts: list[_Part]
    tensors: int
    blocks: int
    rotated: int
    rest: Whole
    rests: list[int]


@lru_cache(maxsize=64)
def _plan(sizes: tuple[int, ...], rows: int) -> _Plan:
    """Plan how so many rows of tensors of these sizes are cut."""
    at_once = max(1, AT_ONCE // (max(1, rows) * LENGTHS[0])) * LENGTHS[0]
    starts = np.cumsum([0, *sizes])[:-1].tolist()
    rotated = [(start, n) for start, n in zip(starts, sizes, strict=True) if n >= BLOCK]
    parts, blocks, firsts = [], 0, [start for start, _ in rotated]
    for length in LENGTHS:
        spans = list[tuple[int, int, int]]()
        for i, (start, n) in enumerate(rotated):
            first, end = firsts[i], start + n // length * length
            firsts[i] = end
            spans += [(i, a, min(a + at_once, end)) for a in range(first, end, at_once)]
        while spans:
            some = [spans.pop(0)]
            while spans and sum(b - a for _, a, b in [*some, spans[0]]) <= at_once:
                some.append(spans.pop(0))
            tensors = [i for i, a, b in some for _ in range(a, b, length)]
            place = slice(blocks, blocks + len(tensors))
            parts.append(_Part(length, [(a, b) for _, a, b in some], np.array(tensors), place))
            blocks += len(tensors)
    rest = [np.arange(s + n - n % BLOCK, s + n) for s, n in zip(starts, sizes, strict=True)]
    places = np.concatenate([*rest, np.zeros(0, np.int64)])
    rests = [n % BLOCK for n in sizes if n % BLOCK]
    return _Plan(parts, len(rotated), blocks, sum(sizes) - len(places), places, rests)


def _whole(x: Doubles) -> tuple[Doubles, Whole, npt.NDArray[np.bool_]]:
    """Round blocks [..., d] to integers of 26 bits; return them, `exponent` and `finite`."""
    largest = np.maximum(x.max(-1), -x.min(-1))
    finite = np.isfinite(largest)
    if not finite.all():
        x, largest = np.where(finite[..., None], x, 0.0), np.where(finite, largest, 0.0)
    _, exponents = np.frexp(largest)
    exponent = exponents.astype(np.int64) - FINE
    # Scaling by a power of two is exact, in two steps where one of them is no float64.
    first = -exponent // 2 if np.abs(exponent).max(initial=0) > MOST else -exponent
    whole: Doubles = x * np.ldexp(1.0, first)[..., None]
    if (rest := -exponent - first).any():
        whole *= np.ldexp(1.0, rest)[..., None]
    return np.rint(whole, out=whole), exponent, finite


def _scales(s: Doubles, u: Doubles) -> Bytes:
    """Round scales to 8 bits and an exponent, [...] to [..., 2]; NaN and too large ones, too."""
    _, exponent = np.frexp(s)
    exponent = np.where(s > 0, np.maximum(exponent.astype(np.int64) - 8, LOWEST), LOWEST)
    whole = np.floor(np.ldexp(s, -exponent) + u)
    up = whole == 256
    found = np.stack([exponent - LOWEST + up, np.where(up, 128, whole)], axis=-1)
    found[found[..., 0] > TOP] = NO_NUMBER
    return found.astype(np.uint8)


def signs_of(turns: npt.NDArray[np.integer]) -> npt.NDArray[np.int8]:
    """Draw sets of signs by their numbers: [K, T] to [K, T, 1024]."""
    raw = np.frombuffer(b"".join(map(_sign_bits, turns.flat)), np.uint8)
    signs = np.unpackbits(raw).view(np.int8).reshape(*turns.shape, LENGTHS[0])
    signs *= 2
    signs -= 1
    return signs


@lru_cache(maxsize=SIGNS)  # of 128 bytes each
def _sign_bits(turn: int) -> bytes:
    return generator(0, "signs", turn).bytes(LENGTHS[0] // 8)


def hadamard(x: Reals) -> Reals:
    """Multiply each of the last axis, of d numbers, by the d x d Hadamard matrix H.

    It uses H_d = H_a (x) H_c with d = a c: two products of small matrices.
    """
    *lead, d = x.shape
    bits = d.bit_length() - 1
    a, c = (_matrix(k, x.dtype.char) for k in (bits >> 1, bits + 1 >> 1))
    z = (x.reshape(-1, len(c)) @ c).reshape(-1, len(a), len(c)).swapaxes(1, 2)
    z = (z.reshape(-1, len(a)) @ a).reshape(-1, len(c), len(a)).swapaxes(1, 2)
    found: Reals = z.reshape(*lead, d)
    return found


@cache
def _matrix(k: int, kind: str) -> npt.NDArray[np.floating]:
    found = np.ones((1, 1), kind)
    for _ in range(k):
        found = np.block([[found, found], [found, -found]])
    return found
