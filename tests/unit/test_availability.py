"""When clients can be asked: rates, days, and independence of the rest of the cohort."""

from __future__ import annotations

import math

import pytest
import torch

from fedraclora.devices.distributions import AVAILABILITY, Availability, Bernoulli, Diurnal
from fedraclora.errors import ConfigError

CLIENTS = torch.arange(20_000)
HOUR = 3600.0


def rate(found: torch.Tensor) -> float:
    return float(found.to(torch.float64).mean())


def tolerance(chance: float) -> float:
    """Five standard deviations of the mean of Bernoulli draws, one per client."""
    return 5 * math.sqrt(chance * (1 - chance) / len(CLIENTS))


@pytest.mark.parametrize(
    ("row", "chance"),
    [(Bernoulli(1.0), 1.0), (Bernoulli(0.3), 0.3), (Diurnal(0.25), 0.25), (Diurnal(0.5, 0.4), 0.2)],
)
@pytest.mark.parametrize("now", [0.0, 5 * HOUR, 1000 * HOUR])
def test_as_many_are_there_as_asked(row: Availability, chance: float, now: float) -> None:
    assert rate(row.at(0, 1, now, CLIENTS)) == pytest.approx(chance, abs=tolerance(chance))


@pytest.mark.parametrize("row", [Bernoulli(0.3), Diurnal(0.25, 0.5)])
def test_a_client_does_not_depend_on_the_others(row: Availability) -> None:
    some = torch.tensor([17, 3, 9_999_999_999, 250])
    whole = row.at(1, 4, HOUR, some)
    alone = [bool(row.at(1, 4, HOUR, some[k : k + 1])) for k in range(4)]
    assert whole.tolist() == alone
    assert torch.equal(whole, row.at(1, 4, HOUR, some))


def test_rounds_and_seeds_draw_apart() -> None:
    row = Bernoulli(0.5)
    first = row.at(0, 1, 0.0, CLIENTS)
    for other in (row.at(0, 2, 0.0, CLIENTS), row.at(1, 1, 0.0, CLIENTS)):
        # Independent fair coins agree in half of the places.
        assert rate(first == other) == pytest.approx(0.5, abs=tolerance(0.5))


def test_a_client_has_the_same_hours_every_day() -> None:
    row = Diurnal(0.25, day=24 * HOUR)
    at = {h: row.at(0, 1 + h, h * HOUR, CLIENTS) for h in range(48)}
    assert all(torch.equal(at[h], at[h + 24]) for h in range(24))
    hours = torch.stack([at[h] for h in range(24)]).sum(0)
    assert set(hours.tolist()) == {6}  # a quarter of the day
    # In one piece: it comes and goes once.
    changes = torch.stack([at[h] != at[h + 1] for h in range(24)]).sum(0)
    assert set(changes.tolist()) == {2}


def test_the_day_of_a_round_decides_and_not_its_number() -> None:
    row = Diurnal(0.5)
    assert torch.equal(row.at(0, 1, HOUR, CLIENTS), row.at(0, 9, HOUR, CLIENTS))
    assert not torch.equal(row.at(0, 1, HOUR, CLIENTS), row.at(0, 1, 7 * HOUR, CLIENTS))


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("bernoulli", {"chance": 0.0}, r"chance=0.0: expected a number in \(0, 1\]"),
        ("bernoulli", {"chance": 1.1}, "chance=1.1"),
        ("diurnal", {"share": 0.0}, "share=0.0"),
        ("diurnal", {"share": 0.5, "chance": math.nan}, "chance=nan"),
        (
            "diurnal",
            {"share": 0.5, "day": 0.0},
            r"day=0\.0: expected a positive",
        ),
    ],
)
def test_impossible_settings_are_refused(
    name: str, arguments: dict[str, float], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        AVAILABILITY[name](**arguments)
