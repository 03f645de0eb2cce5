"""The short form of the campaign of links in fewer bits, and that it sees what is wrong."""

from __future__ import annotations

import pytest

from fedraclora.strategies.server.quantized import stays
from fedraclora.strategies.shared import layerwise
from tests.campaigns.planting import Planting
from tests.campaigns.rounded_links import CHANGES, REFUSED, Case, drawn, judged

KEPT = {"basis": "coordinate", "merge_every": 3}
CASE = Case("subspace_rac_lora", KEPT, {"downlink": "int4"}, "linear", 3, 3, rounds=6, seed=1)


@pytest.mark.slow
@pytest.mark.parametrize("times", [6, pytest.param(200, marks=pytest.mark.long)])
def test_clients_have_the_weights_of_the_server(times: int) -> None:
    said = {number: judged(drawn(1, number)) for number in range(times)}
    assert {n: why for n, why in said.items() if why and not why.startswith(REFUSED)} == {}
    assert sum(not why for why in said.values()) > times // 2


def test_cases_are_of_every_kind() -> None:
    cases = [drawn(0, number) for number in range(700)]
    assert {case.method for case in cases} >= CHANGES.keys()
    assert len({case.method for case in cases}) > 25
    assert len({(c.bits["downlink"], c.bits["uplink"]) for c in cases}) == 64
    assert judged(CASE) == ""


def test_a_factor_that_is_rounded_anew_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    Planting(monkeypatch).function(stays, lambda factor: False)
    assert judged(CASE).startswith(("factor", "start"))


def test_a_factor_that_is_measured_whole_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "FROZEN", "nowhere/")
    assert judged(CASE).startswith("start")
