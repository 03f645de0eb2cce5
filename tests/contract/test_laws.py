"""The table of laws is whole: every test of all methods has its law, and every law its test."""

from __future__ import annotations

import importlib
import inspect
from types import SimpleNamespace

import pytest
from laws import BY_TEST, LAWS, PAGE, add_law, listed

SUITE = ("test_method_contract", "test_method_runs", "test_personal_methods", "test_method_bytes")


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


@pytest.mark.parametrize("failed", [True, False])
def test_a_test_that_fails_says_its_law(failed: bool) -> None:
    (name, law), *_ = BY_TEST.items()
    report = SimpleNamespace(failed=failed, sections=[])
    add_law(report, name)  # type: ignore[arg-type]
    add_law(report, "test_of_something_else")  # type: ignore[arg-type]
    assert [text for _, text in report.sections] == ([str(law)] if failed else [])
    assert all(part in str(law) for part in (law.says, law.cause, law.mend))
