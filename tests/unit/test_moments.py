"""Moments that live on: where they are reset, what a partial reset keeps, unequal clients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from fedraclora.errors import ConfigError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import Adapter, RoundInstructions
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.moments import begin_moments, blank_moments, mark_largest
from fedraclora.training.optimizer import CohortOptimizer
from fedraclora.tree import Tree
from tests.common import accepted

A = SketchSpec("gaussian", "right", 2, 7, seed=3, index=0)
SENT = RoundInstructions(
    {"w": Adapter.of({"B": to_train((5, 2)), "A": A}, 1.5)}, {"b": to_train((5,))}, link=4
)
ADAMW = LocalConfig(optimizer="adamw", lr=0.1, weight_decay=0.2, optimizer_state="merge")


def held(links: list[int]) -> Tree:
    """What three clients kept, each of another link."""
    rng, K = generator(1, "held"), len(links)
    blank = blank_moments(ADAMW, SENT, torch.float64)
    found = {n: torch_normal(rng, K, *t.shape) for n, t in blank.items()}
    found["moments/link"] = torch.tensor(links).double()
    found["moments/steps"] = torch.tensor([3.0, 8.0, 5.0]).double()
    return found


def test_an_optimizer_keeps_its_moments_of_what_is_trained() -> None:
    names = list(blank_moments(ADAMW, SENT, torch.float32))
    first = ["moments/first/w/B", "moments/first/b"]
    second = ["moments/second/w/B", "moments/second/b"]
    assert names == [*first, *second, "moments/steps", "moments/link"]
    sgd = LocalConfig(lr=0.5, momentum=0.5, optimizer_state="run")
    assert list(blank_moments(sgd, SENT, torch.float32)) == [*first, *names[4:]]
    assert blank_moments(replace(ADAMW, optimizer_state="round"), SENT, torch.float32) == {}


def test_only_clients_whose_link_has_ended_begin_anew() -> None:
    before = held([4, 3, 4])
    copy = {n: t.clone() for n, t in before.items()}
    after = begin_moments(before, ADAMW, 4)
    assert all(torch.equal(t, copy[n]) for n, t in before.items())
    assert after["moments/link"].tolist() == [4, 4, 4]
    assert after["moments/steps"].tolist() == [3, 0, 5]
    for name in ("moments/first/w/B", "moments/second/b"):
        assert torch.equal(after[name][[0, 2]], before[name][[0, 2]])
        assert not after[name][1].any()


def test_moments_of_a_run_are_never_reset() -> None:
    before = held([4, 3, 0])
    after = begin_moments(before, replace(ADAMW, optimizer_state="run"), 4)
    assert all(torch.equal(t, before[n]) for n, t in after.items() if n != "moments/link")
    assert begin_moments({}, ADAMW, 4) == {}


def test_a_partial_reset_keeps_the_largest_of_each_client_and_the_steps() -> None:
    before = held([4, 3, 2])
    after = begin_moments(before, replace(ADAMW, optimizer_state_kept=0.3), 4)
    assert torch.equal(after["moments/steps"], before["moments/steps"])
    for kind in ("first", "second"):
        kept, was = (moments[f"moments/{kind}/w/B"] for moments in (after, before))
        assert torch.equal(kept[0], was[0])
        for k in (1, 2):
            top = before["moments/first/w/B"][k].flatten().abs().topk(3).indices  # 0.3 of 10
            assert set(kept[k].flatten().nonzero().flatten().tolist()) == set(top.tolist())
            assert torch.equal(kept[k].flatten()[top], was[k].flatten()[top])


def test_what_is_kept_moves_nothing_far_while_its_gradient_is_zero() -> None:
    """As the factor does whose partner begins at zero: in ReLoRA, A under B = 0."""
    gradients = [torch_normal(generator(4, "gradient", j), 3, 5, 2) for j in range(6)]
    before = held([3, 3, 3])
    before["moments/first/w/B"] = gradients[-1]
    before["moments/second/w/B"] = torch.stack(gradients).square().mean(dim=0)  # in another order
    local = replace(ADAMW, weight_decay=0.0, optimizer_state_kept=0.2)
    value = torch.zeros(3, 5, 2, dtype=torch.float64)
    optimizer = CohortOptimizer(
        local, {"w/B": value}, {"w/B": 0.1}, begin_moments(before, local, 4)
    )
    optimizer.step({"w/B": torch.zeros_like(value)})
    assert 0 < float(value.abs().max()) < 1


@pytest.mark.parametrize(("share", "count"), [(0.0, 0), (0.04, 0), (0.1, 1), (0.5, 5), (1.0, 10)])
def test_a_share_is_rounded_to_a_number_of_entries(share: float, count: int) -> None:
    values = torch_normal(generator(2, "share"), 3, 5, 2)
    assert mark_largest(values, share).sum(dim=(1, 2)).tolist() == [count] * 3


CASES: list[dict[str, Any]] = [
    {"optimizer": "adamw", "weight_decay": 0.2},
    {"momentum": 0.9},
    {"momentum": 0.9, "nesterov": True},
]


@pytest.mark.parametrize("changes", CASES)
def test_clients_go_on_after_different_numbers_of_steps(changes: dict[str, Any]) -> None:
    """Each as its own torch optimizer that was never interrupted."""
    local = LocalConfig(lr=0.1, optimizer_state="run", **changes)
    K, counts, more = 3, [1, 4, 2], [3, 2, 2]  # those that finish first stand last
    shape = (4, 2)
    gradients = [torch_normal(generator(9, "gradient", j), K, *shape) for j in range(8)]
    values, optims = [], []
    for k in range(K):
        value = nn.Parameter(torch_normal(generator(9, "start", k), *shape))
        if local.optimizer == "adamw":
            optim: torch.optim.Optimizer = torch.optim.AdamW([value], lr=0.1, weight_decay=0.2)
        else:
            optim = torch.optim.SGD([value], lr=0.1, momentum=0.9, nesterov=local.nesterov)
        for j in range(counts[k]):
            value.grad = gradients[j][k].clone()
            optim.step()
        values.append(value)
        optims.append(optim)

    def stacked(key: str) -> torch.Tensor:
        return torch.stack([o.state[v][key] for o, v in zip(optims, values, strict=True)])

    keys = {"first": "exp_avg", "second": "exp_avg_sq"} if local.optimizer == "adamw" else {}
    keys = keys or {"first": "momentum_buffer"}
    begun = {f"moments/{kind}/v": stacked(key).clone() for kind, key in keys.items()}
    begun["moments/steps"] = torch.tensor(counts).double()
    own = {"v": torch.stack([v.detach().clone() for v in values])}
    cohort = CohortOptimizer(local, own, {"v": 0.1}, begun)
    for j in range(max(more)):
        active = sum(m > j for m in more)
        cohort.step({"v": gradients[5 + j][:active]})
    for k in range(K):
        for j in range(more[k]):
            values[k].grad = gradients[5 + j][k].clone()
            optims[k].step()
        torch.testing.assert_close(own["v"][k], values[k].detach(), rtol=1e-13, atol=1e-13)
    after = cohort.moments(torch.tensor(more))
    assert after["moments/steps"].tolist() == [c + m for c, m in zip(counts, more, strict=True)]
    for kind, key in keys.items():
        torch.testing.assert_close(after[f"moments/{kind}/v"], stacked(key), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"optimizer_state": "epoch"}, "unknown local.optimizer_state 'epoch'"),
        ({"optimizer_state": "merge"}, "an optimizer without moments"),
        ({"momentum": 0.5, "optimizer_state_kept": 0.1}, "it is for local.optimizer_state=merge"),
        (
            {"momentum": 0.5, "optimizer_state": "merge", "optimizer_state_kept": 1.5},
            "a number in [0, 1]",
        ),
        ({"restart_every": 0}, "local.restart_every=0: expected 1 or"),
    ],
)
def test_what_cannot_live_on_is_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        accepted("local", LocalConfig(**{"lr": 0.5, **changes}))
    assert words in str(caught.value)
