"""``method.rank`` by layer: shapes, scales, exactness and bytes of methods whose layers differ."""

from __future__ import annotations

import pytest
from worlds import (
    RAGGED,
    assert_close_trees,
    make_method,
    make_world,
    mean_weights,
    play_rounds,
    run,
)

from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Draw

DRAW = Draw(17)
RANKS = {"fc1": 2, "*": 4}
NAMES = ("fed_rac_lora", "ffa_lora", "fedavg_lora", "flora_stacking", "fedsvd", "bernoulli_lora")


@pytest.mark.parametrize("name", NAMES)
def test_each_layer_has_its_rank_and_its_scale(name: str) -> None:
    world, method = make_world(), make_method(name, rank=RANKS)
    for played in play_rounds(method, world, 3, DRAW):
        for weight, adapter in played.sent.adapters.items():
            rank = 2 if weight == "fc1.weight" else 4
            assert adapter.scale == 5.0 / rank
            for label, factor in adapter.factors.items():
                axis = 1 if label == "B" else 0
                assert factor.shape[axis] == rank
        if method.traits.exact:
            assert_close_trees(method.weights(played.after, DRAW), mean_weights(played))


@pytest.mark.parametrize("name", NAMES)
def test_the_bytes_are_the_formula_at_these_ranks(name: str) -> None:
    world, method = make_world(), make_method(name, rank=RANKS)
    done = run(world, method, RAGGED, rounds=2, cohort=3)
    for round_, row in enumerate(done.rows, start=1):
        assert row["uplink_bytes"] == 3 * 8 * method.floats(world.plan, round_)[0]
    wide = make_method(name, rank=4).floats(world.plan, 1)[0]
    assert method.floats(world.plan, 1)[0] < wide


@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg_lora"])
def test_patterns_must_fit_the_layers_and_layers_a_pattern(name: str) -> None:
    world = make_world()
    for ranks, said in (
        ({"fc1": 2, "*": 3, "fc9": 1}, "unknown adapted layer 'fc9'"),
        ({"fc1": 2, "fc2": 3}, "no pattern that fits the layer fc3"),
    ):
        with pytest.raises(ConfigError, match=said):
            make_method(name, rank=ranks).initial_state(world.base, world.plan, DRAW)
