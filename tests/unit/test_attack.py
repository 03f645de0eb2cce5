"""Attacks: who, and what they make of an update."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fedraclora.attacks import (
    ATTACKS,
    ALittleIsEnough,
    Attack,
    LabelFlip,
    ScaledNoise,
    SignFlip,
)
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, DataError
from fedraclora.rng import hash_key


def normals(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def test_who_attacks_is_a_draw_of_the_seed() -> None:
    attack = SignFlip(share=0.3)
    drawn = attack.attackers(5, 40)
    assert len(drawn) == len(set(drawn.tolist())) == 12
    assert drawn.tolist() == sorted(drawn.tolist())
    assert torch.equal(drawn, attack.attackers(5, 40))
    assert not torch.equal(drawn, attack.attackers(6, 40))
    assert len(Attack().attackers(5, 40)) == 0


def test_a_flipped_sign() -> None:
    updates = normals(3, 5)
    assert torch.equal(SignFlip(0.2, 3.0).sent(updates, torch.arange(3), 0), -3 * updates)
    assert torch.equal(Attack().sent(updates, torch.arange(3), 0), updates)


def test_noise_has_the_size_that_it_says_and_is_the_clients_own() -> None:
    updates, clients = normals(4, 20000), torch.tensor([2, 5, 7, 11])
    attack = ScaledNoise(0.2, 4.0)
    sent = attack.sent(updates, clients, hash_key(1, "attack", 3))
    ratio = sent.norm(dim=1) / updates.norm(dim=1)
    torch.testing.assert_close(ratio, torch.full((4,), 4.0).double(), rtol=0.02, atol=0)
    assert float((sent / sent.std()).mean()) == pytest.approx(0, abs=0.02)
    overlap = torch.corrcoef(torch.cat([sent, updates])) - torch.eye(8)
    assert float(overlap.abs().max()) < 0.04
    one = attack.sent(updates[2:3], clients[2:3], hash_key(1, "attack", 3))
    assert torch.equal(one[0], sent[2])
    assert not torch.equal(attack.sent(updates, clients, hash_key(1, "attack", 4)), sent)


def test_flipped_labels_of_attackers_only() -> None:
    target = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    samples = Samples({"x": torch.arange(7.0)[:, None]}, target)
    data = PartitionedData.of(samples, [np.array(part) for part in ([0, 1], [2, 3, 4], [5, 6])])
    attack = LabelFlip(0.4)
    bad = attack.attackers(0, 3).tolist()
    poisoned = attack.poisoned(data, 5, 0)
    assert len(bad) == 1
    assert poisoned.num_clients == 3
    clients = torch.arange(3)
    assert torch.equal(poisoned.sizes(clients), data.sizes(clients))
    places = torch.zeros(3, 2, dtype=torch.int64) + torch.arange(2)
    clean, found = data.gather(clients, places), poisoned.gather(clients, places)
    assert torch.equal(found.inputs["x"], clean.inputs["x"])
    hit = torch.isin(clients, torch.tensor(bad)).repeat_interleave(2)
    assert torch.equal(found.target, torch.where(hit, 4 - clean.target, clean.target))
    with pytest.raises(DataError, match=r"label_flip .*classes"):
        attack.poisoned(data, 0, 0)


def test_a_little_is_enough_by_hand() -> None:
    """50 clients, 12 of them bad: 14 honest ones are wanted, z is the quantile of (38 - 14)/38."""
    attack = ALittleIsEnough(0.24)
    share = 0.5 * (1 + math.erf(attack.deviations(50, 12) / math.sqrt(2)))
    assert share == pytest.approx((38 - 14) / 38, rel=1e-9)
    rows = normals(50, 3)
    bad = torch.zeros(50, dtype=torch.bool)
    bad[[4, *range(20, 31)]] = True
    found = attack.colluded(rows, bad)
    assert torch.equal(found[~bad], rows[~bad])
    own = rows[bad]
    deviation = (own - own.mean(dim=0)).square().mean(dim=0).sqrt()
    wanted = own.mean(dim=0) - attack.deviations(50, 12) * deviation
    torch.testing.assert_close(found[bad], wanted.expand(12, 3), rtol=1e-12, atol=1e-12)
    assert torch.equal(attack.colluded(rows, torch.zeros(50, dtype=torch.bool)), rows)
    assert ALittleIsEnough(0.2, z=1.5).deviations(50, 49) == 1.5
    with pytest.raises(ConfigError, match="26 of 50 clients attack"):
        attack.deviations(50, 26)


@pytest.mark.parametrize("name", ATTACKS)
def test_impossible_shares_are_refused(name: str) -> None:
    for share in (-0.1, 1.1, float("nan")):
        with pytest.raises(ConfigError, match=f"attack.share={share}"):
            ATTACKS[name](share)
