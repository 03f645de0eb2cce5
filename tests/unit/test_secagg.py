"""Masks, shares, graphs and steps of secure aggregation."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import numpy as np
import pytest
import torch
from flwr.app import ConfigRecord
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.clients.secure import _whole
from fedraclora.engines.asks import AskWriter, read_ask
from fedraclora.errors import ConfigError, WireError
from fedraclora.privacy.secagg import SecAgg, SecAggTerms
from fedraclora.run.client_state import ClientStore
from fedraclora.wire.exchange import Ask, Stage, TrainRequest
from fedraclora.wire.secagg import (
    LARGEST,
    as_words,
    combine,
    is_pair,
    new_pair,
    new_seed,
    own_mask,
    pair_mask,
    seal,
    shared_key,
    signed,
    split_secret,
    unseal,
)


@given(seed=st.integers(0, 10**6), K=st.integers(3, 40), weight=st.integers(1, 300))
def test_whole_steps_never_run_over_and_are_off_by_half_a_step(
    seed: int, K: int, weight: int
) -> None:
    """The worst case: all clients at the clip, in one coordinate, with the greatest weight."""
    step = SecAgg(max_weight=weight).step(K, 2.0, LARGEST)
    drawn = torch.randn(K, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for rows in (torch.full((K, 5), 2.0).double(), torch.full((K, 5), -2.0).double(), drawn):
        updates = rows.clamp(-2.0, 2.0) * weight
        total = as_words(updates / step).sum(axis=0, dtype=np.uint32)
        gap = signed(total).double() * step - updates.sum(dim=0)
        assert float(gap.abs().max()) <= K * step / 2 * (1 + 1e-6)


@given(
    K=st.integers(3, 40),
    weight=st.integers(1, 300),
    clip=st.floats(1e-3, 50.0),
    start=st.floats(-100.0, 100.0),
    sign=st.sampled_from([-1.0, 1.0]),
)
def test_what_float32_adds_to_the_clip_does_not_run_over(
    K: int, weight: int, clip: float, start: float, sign: float
) -> None:
    """All clients at the clip in one coordinate, from a start whose rounding is as long again."""
    terms = SecAggTerms(SecAgg(clip, max_weight=weight), "samples")
    step = terms.config.step(K, clip, LARGEST)
    begin = torch.tensor([start, start, 0.0], dtype=torch.float64)
    reached = (begin + torch.tensor([sign * clip, 0.0, 0.0])).float()
    further = torch.nextafter(reached, torch.full((3,), sign * torch.inf))
    for row in (reached, further):
        update = row.double() - begin
        whole = _whole(update, float(weight), False, None, {"step": step}, terms)
        total = signed(np.sum([whole] * K, axis=0, dtype=np.uint32))
        short = update * min(1.0, clip / float(update.norm()))
        gap = total[:-2].double() * step - K * weight * short
        assert float(gap.abs().max()) <= K * step * 0.51
        assert float(total[:-2].double().norm() * step) <= K * weight * clip * (1 + 1e-6)
        assert total[-2:].tolist() == [K * weight, 0]


def test_words_of_either_sign() -> None:
    words = np.array([0, 1, 2**31 - 1, 2**31, 2**32 - 1], dtype=np.uint32)
    assert signed(words).tolist() == [0, 1, 2**31 - 1, -(2**31), -1]
    assert as_words(torch.tensor([[-1.4, -0.6, 2.0]])).tolist() == [[2**32 - 1, 2**32 - 1, 2]]


def test_the_masks_of_a_pair_cancel_and_are_nobody_elses() -> None:
    (a, A), (b, B), (c, _) = new_pair(), new_pair(), new_pair()
    one, other = pair_mask(a, B, 999, add=True), pair_mask(b, A, 999, add=False)
    assert not (one + other).any()
    assert one.any()
    stranger = pair_mask(c, B, 999, add=True)
    assert float((one == stranger).mean()) < 0.01
    assert shared_key(a, B) == shared_key(b, A)
    seed = new_seed()
    assert np.array_equal(own_mask(seed, 999), own_mask(seed, 999))
    assert not np.array_equal(own_mask(seed, 999), own_mask(new_seed(), 999))


def test_any_threshold_of_shares_brings_a_secret_back() -> None:
    scalar, _ = new_pair()
    for secret in (new_seed(), scalar):
        shares = split_secret(secret, 3, 5)
        for chosen in ([0, 1, 2], [4, 2, 0], [1, 3, 4]):
            assert combine([shares[i] for i in chosen]) == secret
        with suppress(WireError):  # mostly: too few shares give bytes that are no secret
            assert combine(shares[:2]) != secret


@pytest.mark.parametrize("shares", [[], ["ab"], ["zz"], [5], [None], ["ab" * 52, "cd" * 68]])
def test_what_are_no_shares_is_said_to_be_none(shares: list[object]) -> None:
    with pytest.raises(WireError, match="secret from its shares"):
        combine(shares)  # type: ignore[arg-type]


def test_a_pair_of_keys_is_known_as_one() -> None:
    (a, A), (_, B) = new_pair(), new_pair()
    assert is_pair(a, A)
    assert not is_pair(a, B)
    assert not is_pair("0", A)


def test_shares_open_for_their_receiver_only() -> None:
    (a, A), (b, B), (c, _) = new_pair(), new_pair(), new_pair()
    text = seal(shared_key(a, B), 3, 8, ["seed", "key"])
    assert unseal(shared_key(b, A), 3, 8, text) == ["seed", "key"]
    with pytest.raises(WireError, match="shares of client 3 cannot"):
        unseal(shared_key(c, A), 3, 8, text)
    with pytest.raises(WireError, match=r"client 3 for client 8 .*another"):
        unseal(shared_key(b, A), 4, 8, text)


@pytest.mark.parametrize(("K", "neighbours"), [(5, None), (9, 4), (20, 6), (4, 100), (7, 6)])
def test_the_graph_is_regular_and_mutual(K: int, neighbours: int | None) -> None:
    clients = [3 * k + 1 for k in range(K)]
    graph = SecAgg(neighbours=neighbours).graph(clients, 0, 2)
    degree = K - 1 if neighbours is None else min(neighbours, K - 1)
    assert sorted(graph) == clients
    assert {len(near) for near in graph.values()} == {degree}
    for client, near in graph.items():
        assert client not in near
        assert all(client in graph[other] for other in near)
    pairs = Counter(n for near in graph.values() for n in near)
    assert set(pairs.values()) == {degree}
    if degree < K - 1:
        assert graph != SecAgg(neighbours=neighbours).graph(clients, 0, 3)


def test_a_threshold_is_more_than_half() -> None:
    assert [SecAgg().shares(n) for n in (2, 4, 5, 19)] == [2, 3, 3, 10]
    assert SecAgg(threshold=0.75).shares(8) == 7


def test_a_stage_comes_back_as_it_was_sent() -> None:
    stage = Stage("shares", {"t": 3}, {4: {"keys": {"5": "x"}}, 9: None})
    request = TrainRequest(7, 0, 1.0, torch.tensor([4, 9]))
    ask = read_ask(AskWriter().write(Ask(request, stage=stage)))
    assert (ask.stage, ask.request.round_, ask.clients) == (stage, 7, [4, 9])
    sent = AskWriter().write(Ask(request, stage=stage))
    head = '{"name": "later", "settings": {}, "data": {}}'
    for wrong in ("no json", '{"name": "shares"}', head):
        sent["secure"] = ConfigRecord({"header": wrong})
        with pytest.raises(
            WireError, match=r"is not JSON|is no JSON|cannot be read|no stage 'later'"
        ):
            read_ask(sent)
    sent["secure"] = ConfigRecord(
        {"header": head.replace("later", "keys").replace("{}}", '{"5": 1}}')}
    )
    with pytest.raises(WireError, match=r"clients \[4, 9\].*for \[5\]"):
        read_ask(sent)


def test_secrets_travel_with_a_client_and_are_in_no_checkpoint() -> None:
    store, other = ClientStore(), ClientStore()
    store.secrets |= {3: b"\x00key", 5: b"other"}
    part = store.part([3], 1)
    assert not store.state()
    other.restore(part)
    assert other.secrets == {3: b"\x00key"}
    other.secrets[3] = b""
    store.absorb(other.since(1))
    assert store.secrets == {3: b"", 5: b"other"}
    store.stage(torch.tensor([3]), 1, {"w": torch.ones(1, 2)})
    assert not [name for name in store.state() if "kept" in name]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"clip": 0.0}, r"secure\.clip=0\.0"),
        ({"threshold": 0.4}, r"secure\.threshold=0\.4"),
        ({"neighbours": 3}, r"secure\.neighbours=3: expected .*even"),
        ({"max_weight": 0}, r"secure\.max_weight=0"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SecAgg(**changes)  # type: ignore[arg-type]


def test_weights_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"secure\.max_weight=100000000 do not fit"):
        SecAgg(max_weight=10**8).step(20, 1.0, LARGEST)
