"""What Hydra remembers in the tests is what it composes."""

from __future__ import annotations

import pytest
from composing import REPLACED

from fedraclora.compose.overrides import composed
from fedraclora.errors import ConfigError

WORDS = (
    ["seed=3"],
    ["seed=4", "method.rank=3"],
    ["method=fedavg_lora", "local=momentum", "method.rank=3"],
    ["local=adamw", "method=fedavg_lora", "compression.uplink=int8"],
    ["method=fedavg_lora", "local=momentum", "++local.clip=1"],
    ["experiment=rotten_tomatoes", "clients_per_round=4"],
    ["experiment=rotten_tomatoes", "model.path=here", "method=ffa_lora"],
)


@pytest.mark.slow
def test_a_composition_from_memory_is_the_one_of_hydra(monkeypatch: pytest.MonkeyPatch) -> None:
    for owner, name, here, _ in REPLACED:
        monkeypatch.setattr(owner, name, here)
    remembered = [composed(words) for _ in range(2) for words in WORDS]
    for owner, name, _, theirs in REPLACED:
        monkeypatch.setattr(owner, name, theirs)
    assert remembered == 2 * [composed(words) for words in WORDS]


@pytest.mark.parametrize("word", ["method=nosuch", "nosuch=3"])
def test_an_error_is_not_remembered(word: str) -> None:
    for _ in range(2):
        with pytest.raises(ConfigError):
            composed([word])
