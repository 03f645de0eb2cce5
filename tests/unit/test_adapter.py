"""The policy of a run: what is adapted, what is trained in full, at which rank and scale."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fedraclora.errors import ConfigError, ModelError
from fedraclora.protocol.plan import (
    Rank,
    check_patterns,
    check_rank,
    make_plan,
    resolve_rank,
    resolve_scale,
)
from fedraclora.strategies.methods import METHODS
from tests.common import accepted


def network() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            conv=nn.Conv2d(1, 2, 3),
            norm=nn.LayerNorm(6),
            fc1=nn.Linear(7, 6),
            fc2=nn.Linear(6, 5, bias=False),
            head=nn.Linear(5, 4),
        )
    )


HEAD = ("head",)
TARGETS = {"fc1.weight", "fc2.weight"}
FULL = ("conv.weight", "norm.weight", "fc1.weight", "fc2.weight")

# head policy, bias policy -> targets beside fc1 and fc2, dense, weights of full fine-tuning
POLICIES = [
    ("full", "frozen", set(), ("head.weight", "head.bias"), FULL),
    ("full", "full", set(), ("fc1.bias", "head.weight", "head.bias"), FULL),
    ("frozen", "frozen", set(), (), FULL),
    ("frozen", "full", set(), ("fc1.bias",), FULL),
    ("lora", "frozen", {"head.weight"}, (), (*FULL, "head.weight")),
    ("lora", "full", {"head.weight"}, ("fc1.bias", "head.bias"), (*FULL, "head.weight")),
]


@pytest.mark.parametrize(("head", "bias", "more", "dense", "weights"), POLICIES)
def test_head_and_bias_are_one_policy(
    head: str, bias: str, more: set[str], dense: tuple[str, ...], weights: tuple[str, ...]
) -> None:
    plan = make_plan(network(), HEAD, head_policy=head, bias_policy=bias)
    assert set(plan.targets) == TARGETS | more
    assert plan.dense == dense
    assert plan.weights == weights
    assert plan.targets["fc1.weight"].shape == (6, 7)


@pytest.mark.parametrize(("head", "bias"), [p[:2] for p in POLICIES])
def test_nothing_is_trained_twice(head: str, bias: str) -> None:
    plan = make_plan(
        network(), HEAD, head_policy=head, bias_policy=bias, modules_to_save="conv,fc2"
    )
    assert not set(plan.targets) & set(plan.dense)
    assert not set(plan.weights) & set(plan.dense)
    assert set(plan.targets) <= set(plan.weights)


def test_shapes_are_stored_shapes_of_every_parameter() -> None:
    model = network()
    wanted = {n: tuple(p.shape) for n, p in model.named_parameters()}
    assert make_plan(model, HEAD).shapes == wanted


@pytest.mark.parametrize(
    ("dense", "wanted"),
    [
        ("conv", ("conv.weight", "conv.bias")),
        ("conv, norm", ("conv.weight", "conv.bias", "norm.weight", "norm.bias")),
        ("n*", ("norm.weight", "norm.bias")),
        ("norm.weight", ("norm.weight",)),
    ],
)
def test_further_layers_are_trained_in_full_by_pattern(dense: str, wanted: tuple[str, ...]) -> None:
    plan = make_plan(network(), HEAD, head_policy="frozen", modules_to_save=dense)
    assert plan.dense == wanted
    assert set(plan.targets) == TARGETS


def test_what_is_trained_in_full_is_not_adapted() -> None:
    plan = make_plan(network(), HEAD, head_policy="frozen", modules_to_save="fc1")
    assert set(plan.targets) == {"fc2.weight"}
    assert plan.dense == ("fc1.weight", "fc1.bias")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modules_to_save": "cnov"}, "unknown layer 'cnov'"),
        ({"target_modules": "fc3"}, "unknown target layer 'fc3'"),
    ],
)
def test_a_name_that_does_not_exist_is_refused(changes: dict[str, str], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make_plan(network(), HEAD, **changes)
    assert words in str(caught.value)


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 4)
        self.fc = nn.Linear(4, 4)
        self.lm_head = nn.Linear(4, 9, bias=False)
        self.lm_head.weight = self.embed.weight


# named_parameters() lists a tied weight once, under its first name: a tied head would drop out.
@pytest.mark.parametrize("policy", ["lora", "full"])
def test_a_tied_head_is_refused_or_trained_but_not_dropped(policy: str) -> None:
    try:
        plan = make_plan(Tied(), ("lm_head",), head_policy=policy)
    except ModelError:
        return
    assert {*plan.targets, *plan.dense} & {"lm_head.weight", "embed.weight"}


@pytest.mark.parametrize(
    ("pattern", "gone"),
    [
        ("body.fc", {"body.fc.weight", "body.fc.bias"}),
        ("body", {"body.fc.weight", "body.fc.bias", "body.norm.weight", "body.norm.bias"}),
        ("norm.weight", {"body.norm.weight"}),
        ("lm_head", {"embed.weight"}),
    ],
)
def test_what_is_left_out_is_neither_adapted_nor_trained(pattern: str, gone: set[str]) -> None:
    model = Tied()
    model.body = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    policies = {"head_policy": "frozen", "bias_policy": "full", "modules_to_save": ["norm", "fc"]}
    before, after = (
        make_plan(model, ("lm_head",), **policies, exclude_modules=left_out)  # type: ignore[arg-type]
        for left_out in (None, [pattern])
    )
    trained = [{*plan.targets, *plan.dense, *plan.weights} for plan in (before, after)]
    assert trained[0] - trained[1] == gone
    assert trained[1] <= trained[0]


# --- rank and scale ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rank", "dim", "wanted"),
    [
        (4, 7, Rank(4)),
        (7, 7, Rank(7)),
        (0.25, 784, Rank(196)),
        (0.25, 10, Rank(2)),
        (0.001, 10, Rank(1)),
        ("full", 10, Rank(10)),
        (9, 7, Rank(7, "rank of fc1 capped at 7 (asked: 9)")),
    ],
)
def test_a_rank_is_a_number_or_a_share(rank: float, dim: int, wanted: Rank) -> None:
    assert resolve_rank(rank, dim, "fc1", cap=True) == wanted


def test_a_rank_that_several_parts_share_a_dimension_for_says_so() -> None:
    shared = {"parts": 8, "of": "sketches (method.pool)"}
    said = "rank of fc1 capped at 3 (asked: 16): its 24 dimensions are shared by 8 sketches (method"
    found = resolve_rank(16, 24, "fc1", cap=True, **shared)
    assert found.value == 3
    assert found.note is not None
    assert found.note.startswith(said)
    assert resolve_rank(3, 24, "fc1", cap=False, **shared) == Rank(3)
    assert resolve_rank("full", 24, "fc1", cap=False, **shared) == Rank(3)
    wanted = r"only 3 .*24 dimensions .*8 sketches \(method\.pool\); .*method\.cap"
    with pytest.raises(ConfigError, match=wanted):
        resolve_rank(16, 24, "fc1", cap=False, **shared)


@given(st.integers(1, 2000), st.floats(0, 1, exclude_min=True))
def test_a_share_gives_at_least_one_and_at_most_all(dim: int, share: float) -> None:
    rank = resolve_rank(share, dim, "fc1", cap=False)
    assert 1 <= rank.value <= dim
    assert rank.note is None


@pytest.mark.parametrize(
    ("rank", "words"),
    [
        (0, "method.rank=0"),
        (-3, "method.rank=-3"),
        (0.0, "method.rank=0.0"),
        (float("nan"), "method.rank=nan"),
        (float("inf"), "method.rank=inf"),
        (True, "method.rank=True"),
        (1.5, "below 1"),
        (
            8,
            "method.rank=8",
        ),
    ],
)
def test_an_impossible_rank_names_the_key(rank: float, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_rank(rank, 7, "fc1", cap=False)
    assert words in str(caught.value)


def test_a_rank_may_be_given_by_layer() -> None:
    """By the weight's whole name, else by the first pattern that fits."""
    ranks = {"query": 4, "layer.1.*": 2, "*": 0.5, "layer.1.query.weight": 7}
    found = {
        name: resolve_rank(ranks, 10, f"layer.{name}.weight", cap=True).value
        for name in ("0.query", "1.query", "1.key", "0.key")
    }
    assert found == {"0.query": 4, "1.query": 7, "1.key": 2, "0.key": 5}


def test_ranks_by_layer_that_fit_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"pattern .* layer fc2.* fc1"):
        resolve_rank({"fc1": 3}, 10, "fc2.weight", cap=True)
    check_patterns({"fc1": 3, "fc*": 2}, ["fc1.weight", "fc2.weight"])
    check_patterns(5, ["fc1.weight"])
    with pytest.raises(ConfigError, match="adapted layer 'fc3'"):
        check_patterns({"fc1": 3, "fc3": 2}, ["fc1.weight", "fc2.weight"])


@pytest.mark.parametrize("ranks", [{}, {"fc1": 3, "fc2": 0}, {"fc1": "three"}, {"fc1": 1.5}])
def test_impossible_ranks_by_layer_are_refused(ranks: dict[str, int | float]) -> None:
    with pytest.raises(ConfigError, match=r"method\.rank="):
        check_rank(ranks)


@pytest.mark.parametrize(
    ("alpha", "rank", "wanted"), [("auto", 3, 1.0), (6.0, 4, 1.5), (5, 3, 5 / 3), (0.5, 1, 0.5)]
)
def test_the_scale_is_alpha_over_rank(alpha: float | str, rank: int, wanted: float) -> None:
    assert resolve_scale(alpha, rank) == wanted


def test_rslora_divides_by_the_root_of_the_rank() -> None:
    assert resolve_scale(6.0, 4, rslora=True) == 3.0
    with pytest.raises(ConfigError, match=r"method\.rslora=True has no effect.*method\.alpha"):
        accepted("method", METHODS["ffa_lora"](rslora=True))


@pytest.mark.parametrize("alpha", [0, -1.0, float("nan"), float("inf"), "atuo", "8"])
def test_an_impossible_alpha_names_the_key(alpha: float | str) -> None:
    with pytest.raises(
        ConfigError, match=f"method.alpha={alpha}: expected a positive finite number"
    ):
        resolve_scale(alpha, 4)


def test_a_plan_does_not_touch_the_model() -> None:
    model = network()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    make_plan(model, HEAD, head_policy="lora", bias_policy="full")
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad


@pytest.mark.parametrize("head", ["frozen", "personal"])
def test_a_model_of_one_layer_has_no_head_that_could_be_left(head: str) -> None:
    with pytest.raises(ConfigError, match=f"head is {head}"):
        make_plan(nn.Sequential(nn.Flatten(), nn.Linear(4, 3)), (), head_policy=head)
    assert make_plan(nn.Linear(4, 3), (), head_policy="lora").targets.keys() == {"weight"}
