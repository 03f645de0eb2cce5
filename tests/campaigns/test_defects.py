"""Every defect can still be planted, and is found: a short form of `tests.campaigns.defects`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from fedraclora.protocol.uplinks import finite
from tests.campaigns import defects_methods, defects_server, defects_wire
from tests.campaigns.defects import DEFECTS, FOUND, found_by, main, pytest_exception_interact
from tests.campaigns.planting import Defect, Planting

every_defect = pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)

# One of a method, one of a server optimizer, one of what waits: each with the quickest test.
SHORT = {
    "scale_is_alpha": "test_the_scale_is_alpha_over_the_rank and fed_rac_lora",
    "yogi_moves_the_wrong_way": "yogi and weights",
    "buffer_never_emptied": "test_every_step_is_the_discounted_mean and ffa_lora",
}


@every_defect
def test_what_a_defect_replaces_is_there_and_comes_back(defect: Defect) -> None:
    with defect.planted() as planting:
        assert planting.replaced
        for owner, name, before in planting.replaced:
            assert getattr(owner, name) is not before, f"{name} is as it was"
    for owner, name, before in planting.replaced:
        assert getattr(owner, name) is before


def test_names_are_unique() -> None:
    parts = defects_methods.METHOD_DEFECTS, defects_server.SERVER_DEFECTS, defects_wire.WIRE_DEFECTS
    assert len(DEFECTS) == sum(map(len, parts))


def test_what_is_not_there_is_refused() -> None:
    with pytest.MonkeyPatch.context() as patch:
        planting = Planting(patch)
        with pytest.raises(AttributeError):
            planting.put(defects_methods.Uplinks, "gone", None)
        with pytest.raises(AttributeError, match="internal"):
            planting.put(defects_methods.Uplinks, "__init__", None)
        planting.function(finite, lambda rows: None)
        with pytest.raises(AttributeError, match="is another function"):
            planting.function(finite, lambda rows: None)


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), AssertionError("off by 1")])
def test_an_assertion_alone_finds_a_defect(error: Exception) -> None:
    node = SimpleNamespace(name="test_x", config=SimpleNamespace(stash=pytest.Stash()))
    node.session = SimpleNamespace(shouldfail=False)
    with pytest.raises(type(error)) as caught:
        raise error
    pytest_exception_interact(node, SimpleNamespace(excinfo=caught, when="call"))  # type: ignore[arg-type]
    asserted = isinstance(error, AssertionError)
    assert bool(node.session.shouldfail) == asserted
    assert (node.config.stash.get(FOUND, "") == "test_x") == asserted


@pytest.mark.long
@pytest.mark.parametrize("name", SHORT)
def test_the_contract_suite_finds_three(name: str) -> None:
    assert found_by(DEFECTS[name], SHORT[name])


@pytest.mark.long
@every_defect
def test_the_contract_suite_finds_it(defect: Defect) -> None:
    assert found_by(defect)


def test_an_unknown_defect_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["only=gone"]) != 0
    assert "gone" in capsys.readouterr().err
