"""The seed tree: pure, keyed by what it is asked for, and Philox by the book."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora import rng
from fedraclora.rng import (
    _philox4x32,
    cohort_bits,
    cohort_permutations,
    cohort_uniforms,
    generator,
    hash_key,
    position_bits,
    torch_normal,
)

FULL = 0xFFFFFFFF
seeds = st.integers(0, 2**31)
ids = st.integers(0, 2**40)

# Counter, key, output: the known answers of Random123's kat_vectors (philox4x32, 10 rounds).
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((FULL,) * 4, (FULL,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize("of", [torch.tensor, np.array])  # on a card, on the CPU
@pytest.mark.parametrize(("counter", "key", "wanted"), VECTORS)
def test_philox_gives_the_published_known_answers(
    counter: tuple[int, ...],
    key: tuple[int, int],
    wanted: tuple[int, ...],
    of: Callable[[list[int]], Any],
) -> None:
    words = [of([word]) for word in counter]
    assert [word.item() for word in _philox4x32(words, key)] == list(wanted)


def test_cohort_bits_lays_out_the_counter_as_it_says() -> None:
    """(position, stream, client low, client high): the third known answer, through the front."""
    (_, _, low, high), (k0, k1), _ = VECTORS[2]
    client = (high << 32) | low
    position, stream = 2, VECTORS[2][0][1]
    bits = cohort_bits((k1 << 32) | k0, torch.tensor([client]), 4 * (position + 1), stream)
    words = [torch.tensor([w]) for w in (position, stream, low, high)]
    assert bits[0, -4:].tolist() == [int(w) for w in _philox4x32(words, (k0, k1))]


def philox_by_hand(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds in Python's own integers."""
    x, k = list(counter), list(key)
    for _ in range(10):
        p0, p1 = 0xD2511F53 * x[0], 0xCD9E8D57 * x[2]
        x = [(p1 >> 32) ^ x[1] ^ k[0], p1 & FULL, (p0 >> 32) ^ x[3] ^ k[1], p0 & FULL]
        k = [(k[0] + 0x9E3779B9) & FULL, (k[1] + 0xBB67AE85) & FULL]
    return x


words32 = st.integers(0, FULL)


@given(st.lists(words32, min_size=4, max_size=4), st.lists(words32, min_size=2, max_size=2))
def test_philox_on_wrapping_int64_is_philox_on_integers(counter: list[int], key: list[int]) -> None:
    words = [torch.tensor([w], dtype=torch.int64) for w in counter]
    found = [int(w) for w in _philox4x32(words, (key[0], key[1]))]
    assert found == philox_by_hand(counter, key)


def test_keys_are_hashed_not_added() -> None:
    keys = [hash_key(s, p, *k) for s in range(3) for p in ("a", "b") for k in [(), (0,), (1, 2)]]
    assert len(set(keys)) == len(keys)
    assert hash_key(0, "sketch", 12, 3) != hash_key(0, "sketch", 1, 23)
    assert hash_key(0, "sketch", "1") != hash_key(0, "sketch", 1)
    assert hash_key(0, "a/b") != hash_key(0, "a", "b")
    assert hash_key(0, "a'/'b") != hash_key(0, "a", "b")
    assert 0 <= hash_key(0, "x") < 2**128


def test_the_hash_does_not_depend_on_the_process() -> None:
    """Python's own hash() is salted; this one is part of what fixes the bits of a run."""
    assert hash_key(0, "sketch", "fc1.weight") == 0x94842382AA2BBF0D9E139F5151E90794


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_a_generator_is_the_philox_of_its_hash(seed: int, key: int) -> None:
    whole = np.random.Philox(key=rng.hash_key(seed, "test", key))
    found = rng.generator(seed, "test", key)
    assert np.array_equal(found.bit_generator.random_raw(9), whole.random_raw(9))


@given(seeds, st.text(max_size=5), st.lists(st.integers() | st.text(max_size=3), max_size=3))
def test_a_generator_is_a_pure_function_of_its_leaf(
    seed: int, purpose: str, keys: list[int | str]
) -> None:
    first, again = generator(seed, purpose, *keys), generator(seed, purpose, *keys)
    np.testing.assert_array_equal(first.random(5), again.random(5))
    other = generator(seed, purpose, *keys, "more")
    assert not np.array_equal(generator(seed, purpose, *keys).random(5), other.random(5))


@given(seeds, st.lists(ids, min_size=1, max_size=6, unique=True), st.integers(1, 9))
def test_the_bits_of_a_client_do_not_depend_on_the_cohort(
    key: int, clients: list[int], count: int
) -> None:
    together = cohort_bits(key, torch.tensor(clients), count)
    assert together.shape == (len(clients), count)
    assert bool(((together >= 0) & (together <= FULL)).all())
    for row, client in zip(together, clients, strict=True):
        assert torch.equal(row, cohort_bits(key, torch.tensor([client]), count)[0])
        assert torch.equal(row[:1], cohort_bits(key, torch.tensor([client]), 1)[0])


@given(seeds, st.lists(ids, min_size=1, max_size=4), st.integers(0, 3))
def test_a_position_has_its_four_words_wherever_it_is_asked_for(
    key: int, clients: list[int], stream: int
) -> None:
    everyone = torch.tensor(clients)
    whole = cohort_bits(key, everyone, 24, stream).reshape(len(clients), 6, 4)
    positions = torch.tensor([[5, 0, 3, 3]]).expand(len(clients), -1)
    assert torch.equal(position_bits(key, everyone, positions, stream), whole[:, positions[0]])


def test_clients_streams_and_keys_draw_apart() -> None:
    clients = torch.tensor([0, 1, 1 << 32, (1 << 32) + 1])
    rows = [cohort_bits(k, clients, 8, s) for k in (0, 1, 1 << 32) for s in (0, 1)]
    words = torch.cat(rows).flatten().tolist()
    assert len(set(words)) == len(words)


@given(
    seeds,
    st.lists(st.tuples(ids, st.integers(1, 9)), min_size=1, max_size=5, unique_by=lambda p: p[0]),
)
def test_permutations_shuffle_each_client_by_itself(
    key: int, cohort: list[tuple[int, int]]
) -> None:
    clients = torch.tensor([c for c, _ in cohort])
    sizes = torch.tensor([n for _, n in cohort])
    found = cohort_permutations(key, clients, sizes, epoch=2)
    assert found.shape == (len(cohort), int(sizes.max()))
    for k, (client, size) in enumerate(cohort):
        assert sorted(found[k, :size].tolist()) == list(range(size))
        assert found[k, size:].tolist() == list(range(size, int(sizes.max())))
        alone = cohort_permutations(key, torch.tensor([client]), torch.tensor([size]), epoch=2)
        assert torch.equal(found[k, :size], alone[0])


def test_epochs_are_shuffled_anew() -> None:
    clients, sizes = torch.arange(3), torch.tensor([40, 40, 40])
    first, second = (cohort_permutations(5, clients, sizes, e) for e in (0, 1))
    assert all(not torch.equal(first[k], second[k]) for k in range(3))
    assert not torch.equal(first[0], first[1])


def test_clients_may_each_be_in_an_epoch_of_their_own() -> None:
    clients, sizes, epochs = (torch.tensor(x) for x in ([4, 4, 7], [9, 9, 6], [0, 2, 1]))
    found = cohort_permutations(5, clients, sizes, epochs)
    for k in range(3):
        alone = cohort_permutations(5, clients[k : k + 1], sizes[k : k + 1], int(epochs[k]))
        assert torch.equal(found[k, : int(sizes[k])], alone[0])


def test_a_permutation_is_uniform() -> None:
    """All 6 orders of 3 samples over 6000 clients: chi-square with 5 degrees, far from its tail."""
    orders = cohort_permutations(9, torch.arange(6000), torch.full((6000,), 3), 0)
    _, counts = orders.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert float(((counts - 1000.0) ** 2 / 1000.0).sum()) < 20.5  # p = 0.001


def test_normals_are_float64_of_the_shape_that_is_asked_for() -> None:
    drawn = torch_normal(generator(0, "test"), 3, 4)
    assert drawn.shape == (3, 4)
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn, torch_normal(generator(0, "test"), 3, 4))


def test_cohort_uniforms_are_the_bits_of_each_client() -> None:
    clients = torch.tensor([0, 7, 2**40])
    bits = cohort_bits(11, clients, 2).tolist()
    wanted = [((high << 20) + (low >> 12) + 0.5) / 2**52 for high, low in bits]
    assert cohort_uniforms(11, clients).tolist() == wanted


@pytest.mark.parametrize(("bits", "end"), [(0, 2.0**-53), (FULL, 1 - 2.0**-53)])
def test_cohort_uniforms_leave_out_their_ends(
    monkeypatch: pytest.MonkeyPatch, bits: int, end: float
) -> None:
    monkeypatch.setattr(rng, "cohort_bits", lambda key, clients, n: torch.full((1, n), bits))
    assert cohort_uniforms(0, torch.tensor([0])).tolist() == [end]
