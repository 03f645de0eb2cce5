"""Layer kinds, their (out, in) view, and how targets are found."""

from __future__ import annotations

from collections import OrderedDict

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from fedraclora.errors import ConfigError, ModelError
from fedraclora.lowrank.layers import (
    LayerView,
    find_targets,
    is_head,
    layer_kind,
    layer_view,
    matches,
    refuse_tied,
)


class Block(nn.Module):
    """Two layers of other kinds, nested."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(4, 3)
        self.key = Conv1D(3, 4)
        self.norm = nn.LayerNorm(3)


def network() -> nn.Module:
    return nn.Sequential(
        OrderedDict(
            embed=nn.Embedding(6, 4),
            conv=nn.Conv2d(2, 5, 3),
            first=Block(),
            second=Block(),
            head=nn.Linear(3, 2),
        )
    )


# --- views ---------------------------------------------------------------------------------------

VIEWS = [
    (nn.Linear(4, 3), "linear", (3, 4)),
    (Conv1D(3, 4), "conv1d", (3, 4)),
    (nn.Conv2d(4, 6, (3, 2), groups=2), "conv", (6, 12)),
    (nn.Embedding(7, 5), "embedding", (7, 5)),
]


@pytest.mark.parametrize(("module", "kind", "shape"), VIEWS)
def test_every_kind_has_an_out_by_in_view(
    module: nn.Module, kind: str, shape: tuple[int, int]
) -> None:
    assert layer_kind(module) == kind
    view = layer_view(module)
    assert view == LayerView(kind, shape)
    stored = module.get_parameter("weight").detach()
    matrix = view.matrix(stored)
    assert matrix.shape == shape
    back = view.stored(matrix, stored)
    assert torch.equal(back, stored)
    assert back.is_contiguous()


def test_the_view_of_a_linear_map_acts_from_the_left() -> None:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(0))
    for module in (nn.Linear(4, 3), Conv1D(3, 4), nn.Linear(4, 4), Conv1D(4, 4)):
        stored = module.weight.detach()
        wanted = x @ layer_view(module).matrix(stored).T + module.bias
        torch.testing.assert_close(module(x), wanted)


def test_the_view_of_a_convolution_acts_on_patches() -> None:
    conv = nn.Conv2d(2, 3, 2, bias=False)
    x = torch.randn(1, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    patches = nn.functional.unfold(x, 2)  # [1, 2 * 2 * 2, 4]
    wanted = layer_view(conv).matrix(conv.weight.detach()) @ patches
    torch.testing.assert_close(conv(x).reshape(1, 3, 4), wanted)


@pytest.mark.parametrize("module", [nn.LayerNorm(3), nn.ReLU(), nn.Conv1d(2, 3, 1)])
def test_other_modules_cannot_be_adapted(module: nn.Module) -> None:
    assert layer_kind(module) is None
    with pytest.raises(ModelError, match=f"{type(module).__name__} cannot be adapted"):
        layer_view(module)


# --- names ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "pattern", "hit"),
    [
        ("first.query", "query", True),
        ("first.query", "first.query", True),
        ("first.query", "*.query", True),
        ("first.query", "f*", True),
        ("first.query", "uery", False),
        ("first.query", "first", False),
        ("first.Query", "query", False),
        ("query", "query", True),
    ],
)
def test_a_pattern_is_the_whole_name_or_its_last_parts(name: str, pattern: str, hit: bool) -> None:
    assert matches(name, pattern) == hit


def test_the_head_is_a_prefix_of_whole_parts() -> None:
    assert is_head("head", ("head",))
    assert is_head("head.weight", ("head",))
    assert is_head("classifier.out.bias", ("pooler", "classifier.out"))
    assert not is_head("header.weight", ("head",))
    assert not is_head("a.head", ("head",))
    assert not is_head("head", ())


@pytest.mark.parametrize(
    ("pattern", "wanted"),
    [
        ("all-linear", ["first.query", "first.key", "second.query", "second.key"]),
        ("all", ["conv", "first.query", "first.key", "second.query", "second.key"]),
        ("query", ["first.query", "second.query"]),
        ("second.*", ["second.query", "second.key"]),
        ("key, first.query", ["first.query", "first.key", "second.key"]),
        ("embed", ["embed"]),
        (["key", "first.query"], ["first.query", "first.key", "second.key"]),
        (["all"], ["conv", "first.query", "first.key", "second.query", "second.key"]),
    ],
)
def test_targets_are_found_in_model_order(pattern: str | list[str], wanted: list[str]) -> None:
    found = find_targets(network(), pattern, ("head",))
    assert list(found) == [f"{n}.weight" for n in wanted]


def test_a_pattern_that_matches_nothing_names_the_nearest_layer() -> None:
    with pytest.raises(ConfigError) as caught:
        find_targets(network(), "query,frist.key", ("head",))
    text = str(caught.value)
    assert "target_modules=query,frist.key" in text
    assert "did you mean 'first.key'" in text
    assert "second.query" in text


def test_the_head_is_no_target() -> None:
    with pytest.raises(ConfigError, match="head is the head"):
        find_targets(network(), "head", ("head",))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ModelError, match=r"target_modules=all-linear.*no layer"):
        find_targets(nn.Sequential(nn.ReLU()), "all-linear", ())


def test_a_model_that_is_all_head_has_no_targets() -> None:
    model = nn.Sequential(OrderedDict(head=nn.Linear(3, 2)))
    assert find_targets(model, "all-linear", ("head",)) == {}


# --- tied weights --------------------------------------------------------------------------------


def tied() -> nn.Module:
    model = nn.Sequential(OrderedDict(embed=nn.Embedding(6, 4), out=nn.Linear(4, 6, bias=False)))
    model.out.weight = model.embed.weight  # type: ignore[union-attr]
    return model


@pytest.mark.parametrize("pattern", ["all-linear", "out", "embed"])
def test_a_tied_weight_is_no_target(pattern: str) -> None:
    with pytest.raises(ModelError, match="is tied to") as caught:
        find_targets(tied(), pattern, ())
    assert "embed.weight" in str(caught.value)
    assert "out.weight" in str(caught.value)


def test_weights_that_are_not_asked_for_may_be_tied() -> None:
    refuse_tied(tied(), [])
    refuse_tied(network(), ["first.query.weight"])
