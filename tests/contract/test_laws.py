"""The table of laws is whole: every test of all methods has its law, and every law its test."""

from __future__ import annotations

import importlib
import inspect
import re
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from laws import BY_TEST, LAWS, PAGE, add_law, listed
from typing_extensions import override
from worlds import assert_close_trees, client_weights, make_world, play_rounds, some_cohort

from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Draw
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies

SUITE = (
    "test_method_contract",
    "test_method_runs",
    "test_personal_methods",
    "test_method_bytes",
    "test_rounded_links",
)


def of_all_methods(module: str) -> set[str]:
    """Names of the tests of a file that some parameter leads through all methods."""
    found = vars(importlib.import_module(module)).items()
    tests = {n: f for n, f in found if n.startswith("test_") and inspect.isfunction(f)}
    return {
        n
        for n, f in tests.items()
        if {"variant", "name", "done", "folder"} & inspect.signature(f).parameters.keys()
    }


def test_every_test_of_all_methods_holds_a_law() -> None:
    assert set().union(*map(of_all_methods, SUITE)) == BY_TEST.keys()
    assert sum(len(law.tests) for law in LAWS) == len(BY_TEST)


def test_contributing_lists_all_laws() -> None:
    page = PAGE.read_text()
    assert page == listed(page), "python -m tests.contract.laws writes them"


def test_contributing_names_the_files_whose_tests_say_their_laws() -> None:
    said = re.search(r"assertion fails in (.+?) says which law", PAGE.read_text(), flags=re.DOTALL)
    assert said is not None
    assert set(re.findall(r"`(\w+)\.py`", said[1])) == {*SUITE}


def failure(error: Exception | None) -> pytest.CallInfo[None]:
    """Call what raises an error, as pytest calls a test."""

    def test() -> None:
        if error is not None:
            raise error

    return pytest.CallInfo.from_call(test, "call")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (AssertionError("2 != 3"), True),
        (pytest.fail.Exception("DID NOT RAISE"), True),
        (ConfigError("a method has no update"), False),  # the test did not get as far as its law
        (None, False),
    ],
)
def test_a_test_says_its_law_where_an_assertion_failed(error: Exception, says: bool) -> None:
    (name, law), *_ = BY_TEST.items()
    report = SimpleNamespace(failed=error is not None, sections=[])
    add_law(report, failure(error), name)  # type: ignore[arg-type]
    add_law(report, failure(error), "test_of_something_else")  # type: ignore[arg-type]
    assert [text for _, text in report.sections] == ([str(law)] if says else [])
    assert all(part in str(law) for part in (law.says, law.cause, law.mend))


def test_what_is_merged_and_carried_on_is_said_where_it_is_met() -> None:
    @dataclass(frozen=True)
    class Twice(FedRacLora):
        @override
        def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
            B = replies.mean("B")
            return LayerUpdate(carried={"B": B}, merged=(B, replies["A"]))

    world, method, draw = make_world(), Twice(rank=3, alpha=5.0), Draw(1)
    played, *_ = play_rounds(method, world, 1, draw, some_cohort((3.5,)))
    with pytest.raises(AssertionError):
        assert_close_trees(method.weights(played.after, draw), client_weights(played, 0))
    for test in (
        "a_cohort_of_one_gives_the_weights_of_that_client",
        "exact_methods_give_the_mean_of_the_clients_weights",
    ):
        assert "merged and carried on" in BY_TEST[f"test_{test}"].cause
