"""Draw random numbers from the seed tree: pure functions of (seed, purpose, keys).

There are two kinds of draw. `generator` returns one numpy generator for one purpose (a sketch, a
partition). `cohort_bits` and `position_bits` draw for many clients at once from a counter, so that
a client's numbers depend on its id, and not on the other clients, their order, or the process.
"""

from __future__ import annotations

import hashlib
from operator import index
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from numpy.random.bit_generator import ISeedSequence
from typing_extensions import override

_PLACE_BITS = 30  # bits of a position in a shuffle: 2^30 samples of a client
_LOW32, _LOW64 = 0xFFFFFFFF, 0xFFFFFFFFFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)

Words = TypeVar("Words", torch.Tensor, npt.NDArray[np.int64])


def hash_key(seed: int, purpose: str, *keys: int | str) -> int:
    """Hash a path of the seed tree to 128 bits.

    Adding would collide: with ``seed + 1000 * round + layer`` the draw of seed 0, layer 2 equals
    that of seed 2, layer 0.

    Args:
        seed: The seed of the run.
        purpose: The name of the draw, for example ``"sketch"``.
        *keys: Round, layer name, client, and the like.

    Returns:
        An integer in [0, 2^128).

    Example:
        >>> hash_key(0, "sketch", 2) == hash_key(2, "sketch", 0)
        False
    """
    parts = (part if isinstance(part, str) else index(part) for part in (seed, purpose, *keys))
    path = "/".join(map(repr, parts))
    return int.from_bytes(hashlib.blake2b(path.encode(), digest_size=16).digest(), "big")


def generator(seed: int, purpose: str, *keys: int | str) -> np.random.Generator:
    """Create the numpy generator of one leaf of the seed tree (Philox, keyed by the hash).

    Args:
        seed: The seed of the run.
        purpose: The name of the draw.
        *keys: Round, layer name, client, and the like.

    Returns:
        A fresh generator; two calls with equal arguments give equal draws.
    """
    key = _Key(hash_key(seed, purpose, *keys))
    return np.random.Generator(np.random.Philox(key))  # type: ignore[arg-type]


class _Key(ISeedSequence):
    """Pass a Philox key directly: with ``key=``, numpy first asks the system for entropy."""

    def __init__(self, key: int) -> None:
        self.key = key

    @override
    def generate_state(
        self, n_words: int, dtype: npt.DTypeLike = np.uint32
    ) -> npt.NDArray[np.uint32 | np.uint64]:
        """Return the two words of 64 bits that Philox requests."""
        return np.array([self.key & _LOW64, self.key >> 64], dtype=np.uint64)


def cohort_bits(
    key: int, clients: torch.Tensor, count: int, stream: int | torch.Tensor = 0
) -> torch.Tensor:
    """Draw 32 random bits for each of ``count`` positions of each client (Philox4x32-10).

    The counter is (position, stream, client low, client high) and the key is the low 64 bits of
    ``key``, so the bits of a client do not depend on the rest of the cohort. Integer arithmetic
    only: the same bits on every machine and device.

    Args:
        key: A key from `hash_key`, for example over (seed, purpose, round).
        clients: Client ids, int64 [K], on the device of the draw.
        count: Positions per client.
        stream: A further counter word, for example the local step; or one for each client,
            int64 [K].

    Returns:
        Integers in [0, 2^32) as int64 [K, count].

    References:
        Salmon et al., *Parallel random numbers: as easy as 1, 2, 3*, SC 2011.

    Example:
        >>> a = cohort_bits(7, torch.tensor([3, 5]), 4)
        >>> b = cohort_bits(7, torch.tensor([5]), 4)
        >>> bool((a[1] == b[0]).all())
        True
    """
    place = torch.arange((count + 3) // 4, dtype=torch.int64, device=clients.device)
    words = position_bits(key, clients, place.expand(clients.shape[0], -1), stream)
    return words.flatten(1)[:, :count]


def position_bits(
    key: int, clients: torch.Tensor, positions: torch.Tensor, stream: int | torch.Tensor = 0
) -> torch.Tensor:
    """Draw four words of 32 random bits for each given position of each client.

    Position p has the words 4 p to 4 p + 3 of `cohort_bits`, so each can be drawn separately.

    Args:
        key: A key from `hash_key`.
        clients: Client ids, int64 [K], on the device of the draw.
        positions: In [0, 2^32), int64 [K, b].
        stream: A further counter word, or one for each client, int64 [K].

    Returns:
        Integers in [0, 2^32) as int64 [K, b, 4].

    Example:
        >>> all_words = cohort_bits(7, torch.tensor([3]), 12).reshape(1, 3, 4)
        >>> one = position_bits(7, torch.tensor([3]), torch.tensor([[2]]))
        >>> bool((one[:, 0] == all_words[:, 2]).all())
        True
    """
    word = stream[:, None] if isinstance(stream, torch.Tensor) else stream
    zero = torch.zeros_like(positions, memory_format=torch.contiguous_format)
    words = [
        zero + positions,
        zero + (word & _LOW32),
        zero + (clients & _LOW32)[:, None],
        zero + ((clients >> 32) & _LOW32)[:, None],
    ]
    halves = key & _LOW32, (key >> 32) & _LOW32
    if positions.device.type == "cpu":  # NumPy is faster for few clients
        drawn = _philox4x32([word.numpy() for word in words], halves)
        return torch.from_numpy(np.stack(drawn, axis=-1))
    return torch.stack(_philox4x32(words, halves), dim=-1)


def _philox4x32(words: list[Words], key: tuple[int, int]) -> list[Words]:
    """Compute ten rounds of Philox4x32 on four int64 arrays of 32-bit words, in place."""
    k0, k1 = key
    x0, x1, x2, x3 = words
    for _ in range(10):
        # int64 products wrap, but their low 64 bits equal those of the unsigned product.
        x0 *= _MULTIPLIERS[0]
        x2 *= _MULTIPLIERS[1]
        high0, high1 = x0 >> 32, x2 >> 32
        high0 &= _LOW32
        high1 &= _LOW32
        high0 ^= x3
        high1 ^= x1
        high0 ^= k1
        high1 ^= k0
        x0 &= _LOW32
        x2 &= _LOW32
        x0, x1, x2, x3 = high1, x2, high0, x0
        k0, k1 = (k0 + _WEYL[0]) & _LOW32, (k1 + _WEYL[1]) & _LOW32
    return [x0, x1, x2, x3]


def cohort_permutations(
    key: int, clients: torch.Tensor, sizes: torch.Tensor, epoch: int | torch.Tensor
) -> torch.Tensor:
    """Shuffle each client's sample positions for one local epoch (random reshuffling).

    Args:
        key: A key from `hash_key` over (seed, "shuffle", round).
        clients: Client ids, int64 [K].
        sizes: Number of samples of each client, int64 [K].
        epoch: The local epoch, from 0; or one for each client, int64 [K].

    Returns:
        Positions, int64 [K, max(sizes)]: row k starts with a permutation of 0..sizes[k]-1; the rest
        is padding (positions from sizes[k] on, in order).
    """
    width = int(sizes.max())
    bits = cohort_bits(key, clients, width, stream=epoch)
    position = torch.arange(width, device=clients.device)
    # Random bits above, position below: the position breaks ties. Padding is sorted last.
    above = torch.where(position < sizes[:, None], bits << _PLACE_BITS, 1 << (_PLACE_BITS + 32))
    words = above + position
    if words.device.type == "cpu":  # NumPy sorts integers with vector instructions
        words.numpy().sort(axis=1)
    else:
        words = words.sort(dim=1).values
    return words & ((1 << _PLACE_BITS) - 1)


def cohort_uniforms(key: int, clients: torch.Tensor) -> torch.Tensor:
    """Draw one uniform number for each client, from 52 of its bits (`cohort_bits`).

    Args:
        key: A key from `hash_key`.
        clients: Client ids, int64 [K].

    Returns:
        float64 [K], in (0, 1) without its ends, so that every quantile is finite.

    Example:
        >>> cohort_uniforms(7, torch.tensor([3, 5]))[1] == cohort_uniforms(7, torch.tensor([5]))[0]
        tensor(True)
    """
    high, low = cohort_bits(key, clients, 2).unbind(dim=1)
    return ((high << 20 | low >> 12).to(torch.float64) + 0.5) * 2.0**-52


def torch_normal(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    """Draw standard normals as a float64 torch tensor of the given shape."""
    values: npt.NDArray[np.float64] = rng.standard_normal(shape)
    return torch.from_numpy(values)
