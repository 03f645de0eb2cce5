"""DoRA's algebra, its setting, and the scale of a layer's outputs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.errors import ConfigError
from fedraclora.lowrank.dora import magnitude_of, rescaled, row_lengths
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.wrappers.dora import Dora
from fedraclora.training.cohort_layers import CohortContext, CohortLinear
from tests.common import assemble, normal

SMALL = [
    "data=digits",
    "pretrain=none",
    "clients=6",
    "clients_per_round=3",
    "rounds=1",
    "model.hidden=[9]",
]


@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.sampled_from(["B", "A", "both"]))
def test_lengths_are_those_of_the_sum(m: int, n: int, r: int, own: str) -> None:
    W, B, A = normal(m, n), normal(4, m, r), normal(4, r, n)
    B, A = (B[0] if own == "A" else B), (A[0] if own == "B" else A)
    wanted = torch.linalg.norm(W + 0.7 * B @ A, dim=-1)
    torch.testing.assert_close(row_lengths(W, [B, A], 0.7), wanted)


def test_lengths_of_a_product_of_three() -> None:
    W, B, R, A = normal(5, 7), normal(5, 2), normal(3, 2, 4), normal(4, 7)
    wanted = torch.linalg.norm(W + 0.3 * B @ R @ A, dim=-1)
    torch.testing.assert_close(row_lengths(W, [B, R, A], 0.3), wanted)


def test_gradients_of_a_rescaled_matrix() -> None:
    """Of the magnitude: the part along the row. Of the matrix: scaled, and not projected."""
    V, m = normal(3, 5).requires_grad_(), (normal(3) + 3).requires_grad_()
    G = normal(5, 3).T
    rescaled(V, m).backward(G)
    lengths = V.detach().norm(dim=1)
    torch.testing.assert_close(m.grad, (G * V.detach()).sum(dim=1) / lengths)
    torch.testing.assert_close(V.grad, (m.detach() / lengths)[:, None] * G)


def test_a_magnitude_is_named_after_its_layer() -> None:
    assert magnitude_of("a.weight_net.weight") == "a.weight_net.magnitude"
    assert magnitude_of("weight") == "magnitude"


def test_outputs_are_scaled_in_the_precision_of_the_weights() -> None:
    layer = nn.Linear(7, 5)
    context = CohortContext(active=2, rows=6, scales={"fc.weight": 0.5})
    context.factors = {"fc.weight": [normal(2, 5, 3).float(), normal(3, 7).float()]}
    context.dense = {"fc.magnitude": normal(2, 5).float()}
    cohort = CohortLinear(layer, "fc", context)
    wide = cohort.rescale()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = cohort.rescale()
        out = cohort(normal(6, 7).float())
    assert wide is not None
    assert mixed is not None
    assert torch.equal(mixed, wide)
    assert out.dtype == torch.bfloat16


def config(*words: str) -> RunConfig:
    return from_plain(composed([*SMALL, *words]), METHODS)


def test_the_setting_puts_magnitudes_around_the_method() -> None:
    run = assemble(config("method=fedavg_lora", "method.alpha=4", "dora=true"), None)
    assert isinstance(run.strategy.method, Dora)
    run.strategy.run(run.grid)
    row = run.strategy.recorder.ledger.rows[-1]
    up, down = run.strategy.method.floats(run.plan, 1)
    assert row["uplink_bytes"] == 3 * 4 * up
    assert down == 9 + 10  # magnitudes of the hidden layer and the head: A is a seed, B is zero


def test_a_method_that_merges_is_refused_by_the_setting() -> None:
    with pytest.raises(ConfigError, match=r"dora=true .* merges updates .*dora=false"):
        assemble(config("method=fed_rac_lora", "dora=true"), None)


def test_it_is_a_part_of_what_a_run_is() -> None:
    assert config().digested["dora"] is False
    assert config("method=ffa_lora", "dora=true").digested["dora"] is True
