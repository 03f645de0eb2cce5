"""Server optimizers against the formulas written out, and momentum moved between factors."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from fedraclora.aggregation.server_optimizers import (
    SERVER_OPTIMIZERS,
    Adagrad,
    Adam,
    Momentum,
    ServerOptimizer,
    Yogi,
)
from fedraclora.errors import ConfigError
from fedraclora.protocol.change_of_basis import held_beside, transported
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import Adapter
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree

CHANGES = (0.5, -0.25, 0.0, 2.0)


def steps(rule: ServerOptimizer) -> list[float]:
    """What a rule makes of `CHANGES`, one a round."""
    moments: Tree = {}
    found = []
    for change in CHANGES:
        step, moments = rule.advance({"w": torch.tensor([change]).double()}, moments)
        found.append(float(step["w"]))
    return found


def test_momentum_sums_the_changes_by_age() -> None:
    first = [0.5, 0.9 * 0.5 - 0.25, 0.9**2 * 0.5 - 0.9 * 0.25, 0.9**3 * 0.5 - 0.9**2 * 0.25 + 2.0]
    assert steps(Momentum(lr=0.3, beta=0.9)) == pytest.approx([0.3 * m for m in first], rel=1e-14)
    assert steps(Momentum(lr=1.0, beta=0.0)) == [*CHANGES]


@pytest.mark.parametrize("rule", [Adam(), Yogi(), Adagrad()], ids=lambda r: r.name)
def test_adaptive_rules_are_the_papers(rule: Adam | Adagrad) -> None:
    m, v, wanted = 0.0, rule.tau**2, []
    for d in CHANGES:
        m = rule.beta1 * m + (1 - rule.beta1) * d
        if isinstance(rule, Adagrad):
            v = v + d * d
        elif isinstance(rule, Yogi):
            sign = (v > d * d) - (v < d * d)
            v = v - (1 - rule.beta2) * d * d * sign
        else:
            v = rule.beta2 * v + (1 - rule.beta2) * d * d
        wanted.append(rule.lr * m / (math.sqrt(v) + rule.tau))
    assert steps(rule) == pytest.approx(wanted, rel=1e-13)
    assert len({round(w, 9) for w in wanted}) == len(wanted)


def test_a_tensor_that_is_not_there_in_a_round_keeps_its_moments() -> None:
    rule = Adam()
    one, two = torch.ones(1).double(), torch.full((1,), 2.0).double()
    _, moments = rule.advance({"a": one, "b": two}, {})
    _, later = rule.advance({"a": two}, moments)
    assert torch.equal(later["first/b"], moments["first/b"])
    assert torch.equal(later["second/b"], moments["second/b"])
    assert not torch.equal(later["first/a"], moments["first/a"])


@pytest.mark.parametrize(
    ("kind", "settings", "told"),
    [
        (
            "momentum",
            {"beta": 1.0},
            r"server_optimizer.beta=1.0: expected a number in \[0, 1\)",
        ),
        ("momentum", {"lr": 0.0}, r"server_optimizer\.lr=0\.0"),
        ("adam", {"beta2": -0.1}, "server_optimizer.beta2=-0.1"),
        ("yogi", {"tau": math.inf}, "server_optimizer.tau=inf"),
        ("adagrad", {"space": "weight"}, "did you mean 'weights'"),
    ],
)
def test_settings_that_cannot_be_are_refused(
    kind: str, settings: dict[str, float | str], told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        SERVER_OPTIMIZERS[kind](**settings)


def test_what_is_moved_is_the_nearest_change_beside_the_new_factor() -> None:
    rng = generator(3, "transport")
    B, old, new = (torch_normal(rng, *shape) for shape in ((5, 3), (3, 7), (2, 7)))
    wanted = torch.linalg.lstsq(new.T, (B @ old).T).solution.T
    torch.testing.assert_close(transported("B", B, old, new), wanted, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        transported("A", B.T, old.T, new.T), wanted.T, rtol=1e-10, atol=1e-12
    )
    torch.testing.assert_close(transported("B", B, old, old), B, rtol=1e-10, atol=1e-12)


def test_a_fresh_sketch_keeps_a_share_r_of_n_of_the_energy() -> None:
    r, n, draws = 3, 12, 400
    specs = [SketchSpec("orthonormal", "right", r, n, 1, index=i) for i in range(draws + 1)]
    B = torch.ones(4, r).double()
    kept = [
        float(transported("B", B, a.draw(), b.draw()).square().sum() / B.square().sum())
        for a, b in pairwise(specs)
    ]
    assert sum(kept) / draws == pytest.approx(r / n, abs=0.02)


def test_what_stands_beside_a_trained_factor() -> None:
    spec = SketchSpec("gaussian", "left", 2, 5, 1, index=0)
    pair = held_beside(Adapter.of({"B": spec, "A": to_train((2, 4))}, 1.0))
    assert pair is not None
    assert pair[0] == "A"
    assert torch.equal(pair[1], spec.draw())
    own = torch.zeros(3, 2, 4)
    for factors in (
        {"B": to_train((5, 2)), "A": to_train((2, 4))},
        {"B": to_train((5, 2)), "A": own},
        {"B": torch.zeros(5, 2), "R": to_train((2, 2)), "A": torch.zeros(2, 4)},
    ):
        assert held_beside(Adapter.of(dict(factors), 1.0)) is None  # type: ignore[arg-type]
