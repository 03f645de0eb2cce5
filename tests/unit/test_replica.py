"""A replica serves the version that it holds, and no other."""

from __future__ import annotations

import pytest
import torch

from fedraclora.errors import WireError
from fedraclora.replica import Replica


def test_a_replica_gives_the_weights_of_its_version_without_a_copy() -> None:
    base, later = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    replica = Replica(base)
    assert replica.at(0, 1) is base
    replica.publish(later, 3)
    assert replica.at(3, 4) is later


@pytest.mark.parametrize("version", [0, 2, 4])
def test_another_version_is_refused_with_round_and_both_versions(version: int) -> None:
    replica = Replica({}, 3)
    with pytest.raises(WireError) as caught:
        replica.at(version, 7)
    text = str(caught.value)
    assert "round 7" in text
    assert "holds version 3" in text
    assert f"asks for {version}" in text
