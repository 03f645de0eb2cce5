"""The codec: what is split comes back, and JSON that is not what was split is refused by path."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.codec import from_bytes, join, split, to_bytes
from fedraclora.narrow_weight import QuantisedWeight, quantized
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.link import Link, Term
from fedraclora.protocol.quantized import rounded
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree, fingerprint

SPEC = SketchSpec("gaussian", "right", rank=2, dim=7, seed=2**62 + 1, index=3)


@dataclass(frozen=True)
class Inner:
    """A part, some of whose tensors are in few bits."""

    numbers: tuple[torch.Tensor | SketchSpec | Factor, ...] = field(metadata={"kind": "kind"})
    kind: str = "float32"
    beside: torch.Tensor | None = field(default=None, metadata={"written": False})


@dataclass(frozen=True)
class Outer:
    """Fields of all types that are known."""

    tree: Tree
    parts: dict[int, Inner]
    pair: tuple[int, float]
    words: list[str]
    nothing: float | None
    maybe: torch.Tensor | None = None
    flag: bool = True
    trees: dict[str, Tree] = field(default_factory=dict)
    anything: dict[str, Any] = field(default_factory=dict)


def outer(kind: str = "float32") -> Outer:
    """One of everything."""
    numbers = torch.linspace(-1, 1, 35).reshape(5, 7)
    if kind != "float32":
        numbers = rounded(numbers, kind, None)
    derived = Factor(sketch=SPEC, coefficients=torch.ones(2, 4, dtype=torch.float64))
    return Outer(
        {"a/b": torch.arange(3), "c": torch.ones(2, dtype=torch.bfloat16), "d": torch.zeros(0, 2)},
        {
            7: Inner((numbers, SPEC, Factor(sketch=SPEC, count=2), derived), kind, numbers),
            1: Inner(()),
        },
        (2**62, 0.5),
        ["x", "é"],
        None,
        trees={"e": {"f": torch.ones(2, 3)}, "g": {}},
        anything={"h": [1, None, {"i": "j"}]},
    )


def again(value: Any) -> Any:
    """Split a value, write both parts, and join them."""
    tensors, plain = split(value, "top")
    raw, table = to_bytes(tensors)
    text = json.dumps([table, plain])
    table, plain = json.loads(text)
    return join(type(value), from_bytes(raw, table), plain, "top")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8", "int4", "eden2"])
def test_what_is_split_comes_back(kind: str) -> None:
    one = outer(kind)
    found = again(one)
    one_part, part = one.parts[7], found.parts[7]
    assert torch.equal(part.numbers[0], one_part.numbers[0])
    assert part.numbers[0].dtype == torch.float32
    assert part.numbers[1:3] == one_part.numbers[1:3]
    assert torch.equal(part.numbers[3].coefficients, one_part.numbers[3].coefficients)
    assert part.beside is None
    assert [*found.parts] == [7, 1]
    assert fingerprint(found.tree) == fingerprint(one.tree)
    assert [*found.tree] == [*one.tree]
    assert found.trees["e"]["f"].shape == (2, 3)
    assert found.trees["g"] == {}
    rest = ("pair", "words", "nothing", "maybe", "flag", "anything")
    assert [getattr(found, n) for n in rest] == [getattr(one, n) for n in rest]
    sizes = {"float32": 140, "bfloat16": 70, "int8": 37, "int4": 20, "eden2": 16}
    assert split(one)[0]["parts/7/numbers/0"].nbytes == sizes[kind]


def test_what_has_its_default_is_left_out_and_older_files_may_lack_it() -> None:
    _, plain = split(outer())
    assert plain.keys().isdisjoint({"maybe", "flag"})
    assert plain["parts"]["1"] == {"numbers": []}
    assert again(replace(outer(), flag=False)).flag is False


def test_narrow_weights_travel_as_codes_and_scales() -> None:
    weight = quantized(torch.linspace(-1, 1, 160).reshape(5, 32), "int4", "w")
    tensors, _ = split(Link(dense={"w": weight}))
    assert [*tensors] == ["dense/w|codes", "dense/w|scale"]
    found = again(Link(dense={"w": weight})).dense["w"]
    assert isinstance(found, QuantisedWeight)
    assert torch.equal(found.dequantized(), weight.dequantized())


def test_numbers_of_a_link_are_read_in_the_types_that_they_had() -> None:
    for dtype in (torch.float32, torch.float64):
        matrix = rounded(torch.linspace(-1, 1, 15).reshape(5, 3), "int4", None).to(dtype)
        link = Link({"w": Term.of((matrix, SPEC), 2.0, "int4")}, {"v": matrix}, kind="int4")
        assert split(link)[0]["terms/w/factors/0/numbers"].nbytes == 9  # a scale, 15 half bytes
        found = again(link)
        assert found.dense["v"].dtype == found.terms["w"].factors[0].draw().dtype == dtype
        assert torch.equal(found.dense["v"], matrix)


DAMAGES: dict[str, Any] = {
    "a missing field": lambda p: p.pop("pair"),
    "a field too many": lambda p: p.update(more=1),
    "a text for a number": lambda p: p["pair"].__setitem__(0, "1"),
    "a truth value for a number": lambda p: p["pair"].__setitem__(0, True),
    "an infinite number": lambda p: p["pair"].__setitem__(1, float("inf")),
    "three of two": lambda p: p["pair"].append(1),
    "a list for an object": lambda p: p.update(parts=[]),
    "null for an object": lambda p: p["parts"].update({"7": None}),
    "a key that is no number": lambda p: p["parts"].update(x=p["parts"]["7"]),
    "a sketch without a seed": lambda p: p["parts"]["7"]["numbers"][1].pop("seed"),
    "a tensor that is missing": lambda p: p.update(maybe=[]),
    "a tensor of a dict that is missing": lambda p: p.update(tree={"z": []}),
    "a kind that is none": lambda p: p.update(tree={"c": ["int3", [2], "float32"]}),
    "a type that is none": lambda p: p.update(tree={"c": ["int8", [2], "int8"]}),
    "a shape below zero": lambda p: p.update(tree={"c": ["int8", [-2], "float32"]}),
    "a shape of text": lambda p: p.update(tree={"c": ["int8", "2", "float32"]}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_json_that_was_never_split_is_refused(damage: str) -> None:
    tensors, plain = split(outer())
    plain = json.loads(json.dumps(plain))
    DAMAGES[damage](plain)
    with pytest.raises(ValueError, match=r"\w"):
        join(Outer, tensors, plain)


TABLES: dict[str, Any] = {
    "cut short": lambda raw, table: (raw[:-1], table),
    "too long": lambda raw, table: (torch.cat([raw, raw[:1]]), table),
    "of numbers": lambda raw, table: (raw.float(), table),
    "of an unknown kind": lambda raw, table: (raw, [["a", "complex64", [2]]]),
    "of a shape below zero": lambda raw, table: (raw, [["a", "int8", [-1]], *table]),
    "one twice": lambda raw, table: (torch.cat([raw, raw]), table * 2),
    "no table": lambda raw, table: (raw, {"a": 1}),
    "no pair": lambda raw, table: (raw, [["a", "int8"]]),
}


@pytest.mark.parametrize("damage", TABLES)
def test_bytes_that_are_not_those_of_the_table_are_refused(damage: str) -> None:
    raw, table = TABLES[damage](*to_bytes({"w": torch.ones(5, 3), "v": torch.ones(2).long()}))
    with pytest.raises(ValueError, match=r"\w"):
        from_bytes(raw, table)


@given(st.lists(st.sampled_from(["float32", "float64", "int8", "bool", "bfloat16"]), max_size=5))
def test_bytes_give_tensors_back_wherever_they_begin(kinds: list[str]) -> None:
    tree = {f"{i}/é": torch.ones(3, i).to(getattr(torch, kind)) for i, kind in enumerate(kinds)}
    found = from_bytes(*to_bytes(tree))
    assert [*found] == [*tree]
    assert all(t.dtype == tree[n].dtype and torch.equal(t, tree[n]) for n, t in found.items())
