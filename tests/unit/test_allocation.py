"""Rules of allocation: scores against numbers worked out by hand, and which layers they choose."""

from __future__ import annotations

import pytest
import torch

from fedraclora.allocation import (
    ALLOCATIONS,
    PROXIES,
    AdaLora,
    HeteroLora,
    component_scores,
    flows,
    gradient_norm,
    kept_components,
    snip,
)
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Adapter, Plan, RoundInstructions
from fedraclora.rng import generator, torch_normal
from fedraclora.tree import Tree

B, A = torch.tensor([[1.0], [-2.0]]), torch.tensor([[0.5, 0.0, 4.0]])
G_B, G_A = torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0, 9.0, -6.0]])


def test_scores_are_those_worked_out_by_hand() -> None:
    values, gradients = {"B": B, "A": A}, {"B": G_B, "A": G_A}
    assert gradient_norm(values, gradients) == 5.0 + 11.0
    assert snip(values, gradients) == 3.0 + 8.0 + 1.0 + 24.0
    assert gradient_norm({"B": B}, {"B": G_B}) == 5.0


def chosen(rule: HeteroLora, gradients: dict[str, Tree]) -> list[str]:
    """Choose by GRAD-NORM, which does not look at values."""
    return rule.chosen(rule.scores(gradients, gradients))


def layers(*sizes: float) -> dict[str, Tree]:
    """Gradients of norm ``size``, of layers of different shapes."""
    found = {}
    for i, size in enumerate(sizes):
        g = torch_normal(generator(1, "gradient", i), 3 + i, 2)
        found[f"fc{i}"] = {"B": size * g / torch.linalg.norm(g)}
    return found


@pytest.mark.parametrize(
    ("share", "wanted"),
    [(0.25, ["fc1"]), (0.5, ["fc1", "fc3"]), (0.9, ["fc1", "fc2", "fc3"]), (0.01, ["fc1"])],
)
def test_the_layers_of_highest_score_are_chosen_in_their_order(
    share: float, wanted: list[str]
) -> None:
    gradients = layers(0.1, 5.0, 0.3, 4.0)
    assert chosen(HeteroLora(share=share), gradients) == wanted


def test_every_layer_is_chosen_with_a_share_of_one_and_equals_go_by_order() -> None:
    equal = {name: {"B": G_B} for name in ("b", "a", "c", "d")}
    assert chosen(HeteroLora(share=1.0), equal) == ["b", "a", "c", "d"]
    assert chosen(HeteroLora(share=0.5), equal) == ["b", "a"]


def test_scores_that_say_nothing_are_refused() -> None:
    zeros = {"fc": {"B": torch.zeros(2, 1), "A": A}}
    gradients = {"fc": {"B": G_B, "A": torch.zeros(1, 3)}}
    rule = HeteroLora(proxy="snip")
    scores = rule.scores(zeros, gradients)
    with pytest.raises(ConfigError, match=r"allocation\.proxy=snip.*proxy=grad_norm"):
        rule.chosen(scores)
    assert chosen(HeteroLora(), gradients) == ["fc"]


def test_when_layers_are_chosen() -> None:
    static, dynamic = HeteroLora(), HeteroLora(every=3)
    assert [r for r in range(1, 9) if static.due(r)] == [1]
    assert [r for r in range(1, 9) if dynamic.due(r)] == [1, 4, 7]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"proxy": "gradnorm"}, "did you mean 'grad_norm'"),
        ({"share": 0.0}, r"allocation\.share=0"),
        ({"share": 1.5}, r"allocation\.share=1\.5"),
        ({"every": 0}, r"allocation\.every=0"),
    ],
)
def test_impossible_rules_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        HeteroLora(**changes)  # type: ignore[arg-type]


def test_the_tables_hold_what_the_names_say() -> None:
    assert {kind.name for kind in ALLOCATIONS.values()} == set(ALLOCATIONS)
    assert set(PROXIES) == {"grad_norm", "snip"}


# --- SYNFLOW -------------------------------------------------------------------------------------


def two_layers() -> tuple[torch.nn.Module, Tree, RoundInstructions, Plan]:
    """4 -> 3 -> 2 without activations, and an adapter of rank 2 on each layer."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(3, 2))
    base = {n: p.detach().clone() for n, p in model.named_parameters()}
    views = {"0.weight": LayerView("linear", (3, 4)), "1.weight": LayerView("linear", (2, 3))}
    adapters = {}
    for i, (name, view) in enumerate(views.items()):
        m, n = view.shape
        B, A = (torch_normal(generator(i, k), *d) for k, d in (("B", (m, 2)), ("A", (2, n))))
        adapters[name] = Adapter.of({"B": to_train((m, 2), B), "A": to_train((2, n), A)}, 2.5)
    return model, base, RoundInstructions(adapters), Plan(views)


def test_synflow_is_the_flow_through_an_adapter() -> None:
    """R = 1^T W_2 W_1 1 + bias with magnitudes; a factor's share of it is that of s |B| |A|."""
    model, base, sent, plan = two_layers()
    like = Samples({"x": torch.randn(5, 4)}, torch.zeros(5))
    found = flows(model, like, base, sent, plan)
    term = {}
    for name, adapter in sent.adapters.items():
        B, A = (f.draw().abs() for f in adapter.factors.values())
        term[name] = adapter.scale * B @ A
    whole = {n: base[n].double().abs() + t for n, t in term.items()}
    first = float((whole["1.weight"] @ term["0.weight"]).sum())
    second = float((term["1.weight"] @ whole["0.weight"]).sum())
    assert list(found) == ["0.weight", "1.weight"]
    # Each of the two factors has all of the flow of their product.
    assert found["0.weight"] == pytest.approx(2 * first, rel=1e-12)
    assert found["1.weight"] == pytest.approx(2 * second, rel=1e-12)
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters())


def test_synflow_needs_inputs_that_can_be_ones() -> None:
    model, base, sent, plan = two_layers()
    tokens = Samples({"input_ids": torch.ones(5, 4, dtype=torch.int64)}, torch.zeros(5))
    with pytest.raises(ConfigError, match=r"synflow, which puts ones.*input_ids"):
        flows(model, tokens, base, sent, plan)


# --- AdaLoRA -------------------------------------------------------------------------------------


def test_the_budget_falls_with_the_cube_and_stays() -> None:
    rule = AdaLora(target=2.0, begin=3, end=13, every=1)
    found = [rule.budget(t, first=40, layers=4) for t in range(1, 16)]
    assert found[:3] == [None, None, None]
    falling = [int(8 + 32 * (1 - (t - 3) / 10) ** 3) for t in range(4, 13)]
    assert found[3:] == [*falling, 8, 8, 8]
    assert falling == sorted(falling, reverse=True)
    sparse = AdaLora(target=2.0, begin=3, end=13, every=4)
    due = [t for t in range(1, 16) if sparse.budget(t, first=40, layers=4) is not None]
    assert due == [4, 8, 12, 13, 14, 15]


def test_importance_is_smoothed_and_so_is_its_uncertainty() -> None:
    rule = AdaLora(beta1=0.75, beta2=0.5)
    value, slope = torch.tensor([[2.0, -1.0]]), torch.tensor([[-3.0, 0.5]])
    mean, spread = rule.smoothed(None, value, slope)
    assert mean.tolist() == [[1.5, 0.125]]
    assert spread.tolist() == [[0.5 * 4.5, 0.5 * 0.375]]
    again, wider = rule.smoothed((mean, spread), value, 0 * slope)
    assert again.tolist() == [[1.125, 0.09375]]
    assert wider.tolist() == [[0.5 * 2.25 + 0.5 * 1.125, 0.5 * 0.1875 + 0.5 * 0.09375]]


def test_a_component_is_scored_by_its_column_and_its_row() -> None:
    scores = component_scores(torch.tensor([[1.0, 0.0], [3.0, 6.0]]), torch.tensor([[9.0], [2.0]]))
    assert scores.tolist() == [11.0, 5.0]


def test_components_are_kept_over_all_layers_and_a_layer_may_lose_all() -> None:
    scores = {"a": torch.tensor([0.1, 0.2]), "b": torch.tensor([0.9, 0.3, 0.8])}
    for budget, wanted in ((5, [[0, 1], [0, 1, 2]]), (3, [[], [0, 1, 2]]), (2, [[], [0, 2]])):
        found = kept_components(scores, budget)
        assert [found[n].tolist() for n in ("a", "b")] == wanted
    equal = {"a": torch.ones(2), "b": torch.ones(2)}
    assert [t.tolist() for t in kept_components(equal, 3).values()] == [[0, 1], [0]]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"target": 0.0}, r"allocation\.target=0"),
        ({"begin": 5, "end": 5}, r"allocation\.begin=5 .*allocation\.end=5"),
        ({"every": 0}, r"allocation\.every=0"),
        ({"beta1": 1.0}, r"allocation\.beta1=1"),
        ({"beta2": -0.1}, r"allocation\.beta2=-0\.1"),
    ],
)
def test_impossible_schedules_are_refused(changes: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        AdaLora(**changes)  # type: ignore[arg-type]
