"""Local optimizers on a cohort against torch.optim on each client, and the local settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedraclora.errors import ConfigError
from fedraclora.rng import generator, torch_normal
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.optimizer import CohortOptimizer, clip_per_client
from fedraclora.tree import Tree
from tests.common import accepted

SETTINGS: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
    {"weight_decay": 0.1},
    {"momentum": 0.5, "weight_decay": 0.1, "nesterov": True},
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "weight_decay": 0.3, "beta1": 0.8, "beta2": 0.95, "eps": 1e-3},
]
SHAPES = {"w/B": (4, 2), "b": (3,)}
RATES = {"w/B": 0.3, "b": 0.05}


def normals(K: int, *keys: int) -> Tree:
    rng = generator(0, "optimizer", *keys)
    return {name: torch_normal(rng, K, *shape) for name, shape in SHAPES.items()}


def by_torch(config: LocalSettings, start: Tree, gradients: list[Tree]) -> Tree:
    """One client, its own torch optimizer."""
    values = {n: v.clone().requires_grad_() for n, v in start.items()}
    groups = [{"params": [v], "lr": RATES[n]} for n, v in values.items()]
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            groups,
            momentum=config.momentum,
            nesterov=config.nesterov,
            weight_decay=config.weight_decay,
        )
    else:
        optimizer = torch.optim.AdamW(
            groups,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            weight_decay=config.weight_decay,
        )
    for gradient in gradients:
        for name, value in values.items():
            value.grad = gradient[name].clone()
        optimizer.step()
    return {n: v.detach() for n, v in values.items()}


@pytest.mark.parametrize("changes", SETTINGS)
def test_a_cohort_takes_the_steps_of_torch_optim(changes: dict[str, Any]) -> None:
    config = LocalSettings(**{"lr": 0.5, **changes})
    K, steps = 3, [5, 3, 1]  # clients that finish first stand last
    start = normals(K)
    values = {n: v.clone() for n, v in start.items()}
    optimizer = CohortOptimizer(config, values, RATES)
    gradients = [normals(K, j) for j in range(5)]
    for j in range(5):
        active = sum(s > j for s in steps)
        optimizer.step({n: g[:active] for n, g in gradients[j].items()})
    for k in range(K):
        own = [{n: g[k] for n, g in gradient.items()} for gradient in gradients[: steps[k]]]
        wanted = by_torch(config, {n: v[k] for n, v in start.items()}, own)
        for name, value in wanted.items():
            torch.testing.assert_close(values[name][k], value, rtol=1e-13, atol=1e-13)


def test_sgd_by_hand() -> None:
    values = {"w/B": torch.tensor([[1.0]], dtype=torch.float64)}
    optimizer = CohortOptimizer(LocalSettings(lr=0.5, momentum=0.5), values, {"w/B": 0.1})
    for gradient, wanted in ((2.0, 0.8), (2.0, 0.5), (0.0, 0.35)):  # buffers 2, 3, 1.5
        optimizer.step({"w/B": torch.tensor([[gradient]], dtype=torch.float64)})
        assert float(values["w/B"]) == pytest.approx(wanted, abs=1e-15)


def test_the_first_step_of_adamw_is_the_learning_rate() -> None:
    """m / (sqrt(v) + eps) is the sign of the gradient; decay is decoupled: 1 - 0.1 * 0.5."""
    values = {"w/B": torch.tensor([[1.0, -1.0]], dtype=torch.float64)}
    config = LocalSettings(lr=0.5, optimizer="adamw", weight_decay=0.5, eps=1e-15)
    optimizer = CohortOptimizer(config, values, {"w/B": 0.1})
    optimizer.step({"w/B": torch.tensor([[7.0, -0.01]], dtype=torch.float64)})
    assert values["w/B"].tolist() == [pytest.approx([0.95 - 0.1, -0.95 + 0.1])]


@given(st.floats(1e-3, 1e3), st.integers(1, 5))
def test_clipping_is_torchs_on_each_client(largest: float, K: int) -> None:
    gradients = normals(K, 9)
    clipped = clip_per_client(gradients, largest)
    for k in range(K):
        own = [nn.Parameter(torch.zeros_like(g[k])) for g in gradients.values()]
        for parameter, gradient in zip(own, gradients.values(), strict=True):
            parameter.grad = gradient[k].clone()
        nn.utils.clip_grad_norm_(own, largest)
        for parameter, name in zip(own, gradients, strict=True):
            torch.testing.assert_close(clipped[name][k], parameter.grad, rtol=1e-13, atol=0)


def test_clipping_by_layer_is_torchs_on_each_layer() -> None:
    shapes = {
        "a.fc.weight/B": (3, 2, 4),
        "a.fc.weight/A": (3, 4),
        "a.fc.bias": (3, 5),
        "b.w": (3, 2),
    }
    gradients = {
        n: torch.randn(s, generator=torch.Generator().manual_seed(1)) for n, s in shapes.items()
    }
    clipped = clip_per_client(gradients, 1.5, "layer")
    for k in range(3):
        for layer in (["a.fc.weight/B", "a.fc.weight/A", "a.fc.bias"], ["b.w"]):
            own = [nn.Parameter(torch.zeros_like(gradients[n][k])) for n in layer]
            for parameter, name in zip(own, layer, strict=True):
                parameter.grad = gradients[name][k].clone()
            nn.utils.clip_grad_norm_(own, 1.5)
            for parameter, name in zip(own, layer, strict=True):
                torch.testing.assert_close(clipped[name][k], parameter.grad, rtol=1e-6, atol=0)
    assert not torch.equal(clipped["b.w"], clip_per_client(gradients, 1.5)["b.w"])


def test_clipping_leaves_zero_and_the_given_gradients_alone() -> None:
    gradients = {"a": torch.zeros(2, 3), "b": torch.full((2, 1), 5.0)}
    kept = {n: g.clone() for n, g in gradients.items()}
    clipped = clip_per_client(gradients, 1.0)
    assert all(torch.equal(gradients[n], g) for n, g in kept.items())
    assert torch.equal(clipped["a"], kept["a"])
    torch.testing.assert_close(clipped["b"], torch.ones(2, 1), rtol=1e-6, atol=0)
    assert clip_per_client({}, 1.0) == {}


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, [1, 1, 1, 1, 1]),
        ({"schedule": "linear"}, [1, 0.8, 0.6, 0.4, 0.2]),
        ({"schedule": "linear", "min_lr_ratio": 0.5}, [1, 0.9, 0.8, 0.7, 0.6]),
        ({"schedule": "step", "step_every": 2, "step_factor": 0.1}, [1, 1, 0.1, 0.1, 0.01]),
        ({"warmup": 2}, [1 / 3, 2 / 3, 1, 1, 1]),
        ({"warmup": 1, "schedule": "linear"}, [0.5, 1, 0.75, 0.5, 0.25]),
        ({"warmup": 1, "restart_every": 2}, [0.5, 1, 0.5, 1, 0.5]),
        ({"warmup": 1, "schedule": "step", "step_every": 2}, [0.5, 1, 1, 0.5, 0.5]),
        (
            {"warmup": 1, "restart_every": 2, "schedule": "linear", "min_lr_ratio": 0.2},
            [0.5, 1, 0.5 * 0.8, 0.6, 0.5 * 0.4],
        ),
        ({"schedule": "cosine"}, [1, 0.9045085, 0.6545085, 0.3454915, 0.0954915]),
        (
            {"schedule": "cosine", "min_lr_ratio": 0.2},
            [1, 0.9236068, 0.7236068, 0.4763932, 0.2763932],
        ),
    ],
)
def test_the_schedule_over_five_rounds(changes: dict[str, Any], wanted: list[float]) -> None:
    config = LocalSettings(**{"lr": 0.5, **changes})
    assert [config.rate_scale(t, 5) for t in range(1, 6)] == pytest.approx(wanted, abs=1e-7)


def test_a_schedule_of_one_round_is_one() -> None:
    for schedule in ("constant", "cosine", "linear", "step"):
        assert LocalSettings(lr=0.5, schedule=schedule).rate_scale(1, 1) == 1.0


def test_dense_tensors_have_their_own_step_size() -> None:
    config = LocalSettings(lr=0.4, full_lr=0.01)
    assert config.rate(main=True, rate_scale=0.5) == 0.2
    assert config.rate(main=False, rate_scale=0.5) == 0.005
    assert LocalSettings(lr=0.4).rate(main=False, rate_scale=1.0) == 0.4


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer": "adam"}, "local.optimizer 'adam'"),
        ({"schedule": "cosin"}, "local.schedule 'cosin'"),
        ({"lr": 0.0}, "local.lr=0.0"),
        ({"lr": -1.0}, "local.lr=-1.0"),
        ({"lr": NAN}, "local.lr=nan"),
        ({"lr": INF}, "local.lr=inf"),
        ({"full_lr": 0.0}, "local.full_lr=0.0"),
        ({"clip": -1.0}, "local.clip=-1.0"),
        ({"clip_by": "layer"}, "local.clip_by=layer has no effect"),
        ({"clip": 1.0, "clip_by": "row"}, "unknown local.clip_by 'row'"),
        ({"eps": 0.0}, "local.eps=0.0"),
        ({"epochs": -1}, "local.epochs=-1: expected 0"),
        ({"steps": -2}, "local.steps=-2"),
        ({"batch_size": -1}, "local.batch_size=-1: expected 0 or more"),
        ({"prox": -0.1}, "local.prox"),
        ({"weight_decay": -0.1}, "local.weight_decay"),
        ({"momentum": 1.0}, "local.momentum=1.0"),
        ({"momentum": NAN}, "local.momentum=nan"),
        ({"nesterov": True}, "local.nesterov=True has no effect"),
        (
            {"momentum": 0.8, "optimizer": "adamw"},
            "local.momentum=0.8 has no effect",
        ),
        ({"momentum": 0.8, "optimizer": "lora_rite"}, "it is for local.optimizer=sgd"),
        ({"restart_every": 3}, "with 0 there is nothing"),
        ({"restart_every": 3, "warmup": 3}, "with 3 or more"),
        ({"beta1": 0.5}, "an adaptive local.optimizer"),
        ({"beta2": 0.9}, "local.beta2=0.9 has no effect"),
        ({"eps": 1e-6}, "Leave it at 1e-08"),
    ],
)
def test_settings_that_cannot_train_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        accepted("local", LocalSettings(**{"lr": 0.5, **changes}))
    assert words in str(caught.value)


# NaN compares false; step_every=0 and a beta of 1 divide by zero in the middle of a run.
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("step_every", 0),
        ("warmup", -2),
        ("prox", NAN),
        ("prox", INF),
        ("weight_decay", NAN),
        ("beta2", 1.0),
        ("min_lr_ratio", NAN),
        ("step_factor", NAN),
    ],
)
def test_more_settings_that_cannot_train_are_refused(key: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"local.{key}"):
        LocalSettings(**{"lr": 0.5, key: value})  # type: ignore[arg-type]
