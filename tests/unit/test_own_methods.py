"""What a method of the user's says of a matrix is checked, and named where it is wrong."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from typing_extensions import override

import fedraclora
from fedraclora.compose.overrides import composed
from fedraclora.errors import ConfigError, DivergenceError, FedRacLoraError
from fedraclora.protocol.method import Traits
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.shared.layerwise import LayerMethod, LayerUpdate
from tests.common import FIXED

DRAWN = torch.Generator().manual_seed(3)
X = torch.randn(60, 5, generator=DRAWN)
CLIENTS = [(x, (x[:, 0] > 0).long()) for x in X.split(20)]


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3, generator=torch.Generator().manual_seed(1))
    return model


def run(method: object, *words: str, **keys: Any) -> fedraclora.RunResult:
    given: dict[str, Any] = {"model": net(), "data": CLIENTS, "rounds": 2, "method": method}
    return fedraclora.simulate(*FIXED, "output.progress=false", *words, **(given | keys))


@dataclass(frozen=True)
class Odd(LayerMethod):
    """Says what functions give in the place of what is right; None: what is right."""

    traits = Traits(exact=True, linear=True, merges=True)
    sent: Any = None
    made: Any = None

    @override
    def factors(self, layer: Any, now: Any) -> Any:
        if self.sent is not None:
            return self.sent(layer, now)
        return {"B": layer.trained("B"), "A": sketch(layer, now)}

    @override
    def update(self, layer: Any, replies: Any) -> Any:
        if self.made is not None:
            return self.made(layer, replies.mean("B"), replies["A"])
        return LayerUpdate(merged=(replies.mean("B"), replies["A"]))


def sketch(layer: Any, now: Any) -> Any:
    return now.sketch(layer, "A", "gaussian", index=layer.link)


def merged(make: Callable[[Any], Any]) -> Callable[..., LayerUpdate]:
    return lambda _, B, A: LayerUpdate(merged=(make(B), A))


def carried(make: Callable[[Any], Any]) -> Callable[..., LayerUpdate]:
    return lambda _, B, A: LayerUpdate(carried=make(B))


UPDATES: dict[str, Callable[..., Any]] = {
    "nothing": lambda *_: None,
    "rows of another number": merged(lambda B: B[:1]),
    "a vector": merged(lambda B: B[0]),
    "a number": merged(lambda B: B.sum()),
    "one for each client": merged(lambda B: B[None]),
    "one tensor": lambda _, B, A: LayerUpdate(merged=B),
    "five": lambda _, B, A: LayerUpdate(merged=5),  # type: ignore[arg-type]
    "an array": merged(lambda B: B.numpy()),
    "whole numbers": merged(lambda B: B.long()),
    "truths": merged(lambda B: B > 0),
    "complex numbers": merged(lambda B: B + 0j),
    "no numbers": merged(lambda B: B.to("meta")),
    "a sparse matrix": merged(lambda B: B.to_sparse()),
    "carried None": carried(lambda _: None),
    "a list": carried(lambda B: [B]),
    "carried rows of another number": carried(lambda B: {"B": B[:1]}),
    "an unknown factor": carried(lambda B: {"Z": B}),
    "a factor by number": carried(lambda B: {3: B}),
    "no factor": carried(lambda _: {"B": None}),
    "an aggregate of five": lambda _, B, A: LayerUpdate(merged=(B, A), aggregate=5),  # type: ignore[arg-type]
    "kept by number": lambda _, B, A: LayerUpdate(merged=(B, A), keep=5),  # type: ignore[arg-type]
    "an error": lambda _, B, A: {}["mine"],
    "an error of torch": lambda _, B, A: B @ B,
}
FACTORS: dict[str, Callable[..., Any]] = {
    "nothing": lambda *_: None,
    "none": lambda *_: {},
    "a set": lambda *_: {"A", "B"},
    "a list": lambda layer, now: [layer.trained("B"), sketch(layer, now)],
    "one": lambda layer, now: {"B": layer.trained("B")},
    "an unknown one": lambda layer, now: {"Z": layer.trained("B"), "A": sketch(layer, now)},
    "swapped": lambda layer, now: {"A": layer.trained("B"), "B": sketch(layer, now)},
    "an array": lambda layer, _: {"B": layer.trained("B"), "A": np.ones((2, layer.n))},
    "whole numbers": lambda layer, _: {"B": layer.trained("B"), "A": torch.ones(2, layer.n).int()},
    "another rank": lambda layer, _: {"B": layer.trained("B"), "A": torch.ones(3, layer.n)},
    "another start": lambda layer, now: {
        "B": layer.trained("B", torch.ones(3, 3)),
        "A": sketch(layer, now),
    },
    "a rank below zero": lambda layer, now: {
        "B": layer.trained("B", rank=-1),
        "A": sketch(layer, now),
    },
    "an error": lambda *_: 1 / 0,
}


@pytest.mark.parametrize("kind", UPDATES)
def test_an_impossible_update_is_named_with_its_method_and_layer(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"Odd.*0\.weight") as raised:
        run(Odd(rank=2, made=UPDATES[kind]))
    assert "update" in str(raised.value)
    assert "in round 1" in raised.value.__notes__


@pytest.mark.parametrize("kind", FACTORS)
def test_impossible_factors_are_named_with_their_method_and_layer(kind: str) -> None:
    with pytest.raises(ConfigError, match=r"Odd.*0\.weight") as raised:
        run(Odd(rank=2, sent=FACTORS[kind]))
    assert "factors" in str(raised.value)


def test_numbers_that_are_not_finite_are_those_of_the_method() -> None:
    for odd in (
        Odd(rank=2, made=merged(lambda B: B * math.nan)),
        Odd(rank=2, made=carried(lambda B: {"B": B / 0})),
        Odd(
            rank=2,
            sent=lambda layer, _: {
                "B": layer.trained("B"),
                "A": torch.full((2, layer.n), math.inf),
            },
        ),
    ):
        with pytest.raises(DivergenceError, match=r"Odd.*0\.weight.*finite"):
            run(odd)


def test_what_is_right_in_another_form_has_the_same_bits() -> None:
    wanted = run(Odd(rank=2)).summary["weights_digest"]
    same = merged(lambda B: B.clone().requires_grad_())
    assert run(Odd(rank=2, made=same)).summary["weights_digest"] == wanted
    double = Odd(rank=2, made=lambda _, B, A: LayerUpdate(merged=[B, A]))  # type: ignore[arg-type]
    assert run(double).summary["weights_digest"] == wanted


# ---- Layers that are named by numbers -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [{2: 1, "*": 2}, {"2": 1, "*": 2}])
def test_ranks_by_layer_take_names_that_are_numbers(ranks: Any, tmp_path: Path) -> None:
    wanted = run({"name": "fed_rac_lora", "rank": {"2.weight": 1, "*": 2}})
    given = {"name": "fed_rac_lora", "rank": ranks}
    found = run(given, folder=tmp_path)
    assert found.summary["weights_digest"] == wanted.summary["weights_digest"]
    told = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert told["method"]["rank"] == {"2": 1, "*": 2}
    again = run(given, folder=tmp_path, resume=True)
    assert again.summary["weights_digest"] == wanted.summary["weights_digest"]
    object_ = run(FedRacLora(rank=ranks))
    assert object_.summary["weights_digest"] == wanted.summary["weights_digest"]
    typed = run(None, "method.rank={2: 1, *: 2}")
    assert typed.summary["weights_digest"] == wanted.summary["weights_digest"]


def test_a_name_that_looks_like_a_fraction_stays_that_name() -> None:
    deep = nn.Sequential(nn.Sequential(*(nn.Linear(5, 5) for _ in range(12))), nn.Linear(5, 2))
    found = run({"name": "fed_rac_lora", "rank": {"0.10": 1, "*": 2}}, model=deep, rounds=1)
    assert found.config["method"]["rank"] == {"0.10": 1, "*": 2}  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"method\.rank.*0\.1.*0\.1\.weight"):
        composed(["method.rank={0.10: 1, *: 2}"])
    assert composed(["method.rank={0.10.weight: 1}"])["method"]["rank"] == {"0.10.weight": 1}  # type: ignore[index]


@pytest.mark.parametrize("name", [2.5, None, True, "null", "1e3", "-1", "nan"])
def test_a_layer_that_is_not_there_is_named_as_it_was_said(name: object) -> None:
    for method in ({"name": "fed_rac_lora", "rank": {name: 1, "*": 2}}, FedRacLora(rank={name: 1})):  # type: ignore[dict-item]
        with pytest.raises(FedRacLoraError, match=f"'{name}'"):
            run(method)


def test_text_of_numpy_is_text_in_a_config(tmp_path: Path) -> None:
    plain = run({"name": "fed_rac_lora", "rank": 2}).config
    plain = plain | {"method": {**plain["method"], "train": np.str_("A")}}  # type: ignore[dict-item]
    found = fedraclora.simulate(plain, model=net(), data=CLIENTS, folder=tmp_path)
    assert type(found.config["method"]["train"]) is str  # type: ignore[index]
