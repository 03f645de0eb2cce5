"""A simulated fleet: who is asked, what devices take, and what a config may say."""

from __future__ import annotations

import inspect
import math
import tracemalloc
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typing_extensions import override

from fedraclora import rng
from fedraclora.binding import build, without
from fedraclora.compose.choices import choice, groups
from fedraclora.devices.distributions import (
    Availability,
    Bernoulli,
    Choice,
    Constant,
    Diurnal,
    LogNormal,
    UniformSpread,
)
from fedraclora.devices.system import SystemConfig
from fedraclora.devices.timeline import Load
from fedraclora.errors import ClientError, ConfigError
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.training.localconfig import LocalConfig
from tests.common import accepted
from tests.reference.client import batches

PRESETS = list(groups()["system"])
FLEET = SystemConfig(
    speed=LogNormal(50.0, 0.7),
    downlink=LogNormal(4.0, 1.0),
    uplink=UniformSpread(0.1, 2.0),
    rank_budget=Choice([0.25, 1.0]),
    availability=Bernoulli(0.5),
    drop_out=0.2,
    jitter=0.3,
    deadline=60.0,
    over_select=1.5,
)


def load(clients: torch.Tensor) -> Load:
    return Load(clients % 91 + 1, clients * 0 + 2_000_000, clients * 0 + 500_000)


def read(group: dict[str, Any]) -> SystemConfig:
    return build("system", SystemConfig, without(group, "name"))


def preset(name: str) -> dict[str, Any]:
    return choice("system", name)


# --- who is asked --------------------------------------------------------------------------------


@given(st.integers(0, 2**31), st.integers(1, 500), st.data())
def test_none_asks_whom_the_sampling_draws(seed: int, clients: int, data: st.DataObject) -> None:
    cohort = data.draw(st.integers(1, clients))
    asked = SystemConfig().ask(seed, 3, clients, cohort, 0.0)
    assert torch.equal(asked, draw_cohort(seed, 3, clients, cohort))
    assert asked.dtype == torch.int64


def test_none_draws_nothing_and_drops_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rng, "cohort_bits", None)
    off, clients = SystemConfig(), torch.arange(5)
    found = off.timeline(0, 1, clients, load(clients), 5)
    assert found.kept.tolist() == [0, 1, 2, 3, 4]
    assert (found.dropped, found.seconds, found.notes) == ([], 0.0, [])
    assert off.ranks(0, clients, 8) is None
    assert not off.enabled
    assert not off.timed


@given(st.integers(0, 2**31), st.integers(1, 400), st.data())
def test_who_is_asked_is_there_once_and_enough(
    seed: int, clients: int, data: st.DataObject
) -> None:
    cohort = data.draw(st.integers(1, clients))
    row = data.draw(st.sampled_from([Bernoulli(0.6), Diurnal(0.5, 0.9), Bernoulli(0.05)]))
    over = data.draw(st.sampled_from([1.0, 1.3, 4]))
    devices = SystemConfig(speed=Constant(1.0), availability=row, over_select=over)
    now = data.draw(st.floats(0, 1e6))
    there = torch.nonzero(row.at(seed, 2, now, torch.arange(clients))).flatten().tolist()
    if not there:
        with pytest.raises(ClientError, match=rf"round 2: none of the {clients} clients"):
            devices.ask(seed, 2, clients, cohort, now)
        return
    asked = devices.ask(seed, 2, clients, cohort, now)
    ids = asked.tolist()
    assert ids == sorted(set(ids))
    assert set(ids) <= set(there)
    assert torch.equal(asked, devices.ask(seed, 2, clients, cohort, now))
    # At most 64 times as many are looked at; 400 are few enough for all but the smallest cohorts.
    wanted = math.ceil(round(devices.over_select * cohort, 6))
    if clients <= 64 * wanted:
        assert len(ids) == min(wanted, len(there))


@pytest.mark.parametrize(("over", "cohort", "asked"), [(1.1, 50, 55), (1.3, 20, 26), (1.01, 5, 6)])
def test_over_selection_asks_more_and_rounds_up(over: float, cohort: int, asked: int) -> None:
    devices = SystemConfig(over_select=over)
    assert torch.equal(devices.ask(0, 1, 100, cohort, 0.0), draw_cohort(0, 1, 100, asked))
    assert len(devices.ask(0, 1, cohort, cohort, 0.0)) == cohort


@pytest.mark.slow
def test_everyone_who_is_there_has_the_same_chance() -> None:
    devices, rounds = SystemConfig(speed=Constant(1.0), availability=Diurnal(0.5)), 800
    there = devices.availability.at(0, 1, 0.0, torch.arange(40))
    counts = torch.zeros(40)
    for round_ in range(1, rounds + 1):
        counts[devices.ask(0, round_, 40, 3, 0.0)] += 1
    # Binomial(rounds, 3 / available): five standard deviations.
    chance = 3 / int(there.sum())
    tolerance = 5 * math.sqrt(rounds * chance * (1 - chance))
    assert counts[~there].sum() == 0
    assert float((counts[there] - rounds * chance).abs().max()) < tolerance


class Counted(Availability):
    """Bernoulli, and how many clients it was asked about."""

    def __init__(self, chance: float) -> None:
        self.row, self.looks = Bernoulli(chance), 0

    @override
    def at(self, seed: int, round_: int, now: float, clients: torch.Tensor) -> torch.Tensor:
        self.looks += len(clients)
        return self.row.at(seed, round_, now, clients)


@pytest.mark.parametrize("chance", [0.5, 0.1, 0.001])
@pytest.mark.parametrize("population", [10**6, 10**12])
def test_the_work_is_that_of_the_cohort(population: int, chance: float) -> None:
    row = Counted(chance)
    devices = SystemConfig(availability=row)
    tracemalloc.start()
    asked = devices.ask(0, 1, population, 50, 0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Searches double up to 64 x 50 clients, and the last one is at most half of them all.
    assert row.looks <= 2 * 64 * 50
    assert row.looks <= 16 * 50 / chance
    assert peak < 500_000  # bytes: half of one for each of a million clients
    assert len(asked) == 50 or chance == 0.001


def test_a_search_that_finds_too_few_takes_a_smaller_cohort() -> None:
    asked = SystemConfig(availability=Bernoulli(0.001)).ask(0, 1, 10**6, 50, 0.0)
    assert 0 < len(asked) < 50  # about 3 of the 3,200 that were looked at


def test_nobody_there_says_where_and_when() -> None:
    devices = SystemConfig(availability=Bernoulli(1e-9))
    wanted = r"round 4: none .*10 clients .*7,200 .*Bernoulli\(chance=1e-09\)\); raise"
    with pytest.raises(ClientError, match=wanted):
        devices.ask(0, 4, 10, 2, 7200.0)


# --- what devices take ---------------------------------------------------------------------------


def test_seconds_add_up_downlink_work_and_uplink() -> None:
    devices = SystemConfig(speed=Constant(50.0), downlink=Constant(4.0), uplink=Constant(0.5))
    work = Load(torch.tensor([100, 25]), torch.tensor([2e6, 0]), torch.tensor([1e6, 3e6]))
    found = devices.timeline(0, 1, torch.tensor([3, 8]), work, 2)
    assert found.per_client.tolist() == [0.5 + 2.0 + 2.0, 0.0 + 0.5 + 6.0]
    assert found.seconds == 6.5


def test_latency_is_added_to_what_bytes_and_work_take() -> None:
    work = Load(torch.tensor([100, 25]), torch.tensor([2e6, 0]), torch.tensor([1e6, 3e6]))
    clients = torch.tensor([3, 8])
    slow = SystemConfig(uplink=Constant(0.5), latency=Constant(1.25))
    assert slow.timeline(0, 1, clients, work, 2).per_client.tolist() == [2.0 + 1.25, 6.0 + 1.25]
    alone = read({"latency": {"name": "constant", "value": 1.25}, "deadline": 5.0})
    assert alone.timed
    assert alone.timeline(0, 1, clients, work, 2).seconds == 1.25


@given(st.permutations(range(12)), st.integers(1, 12))
def test_what_a_client_is_does_not_depend_on_the_cohort(order: list[int], cut: int) -> None:
    ids = torch.tensor([3, 14, 15, 92, 65, 35, 89, 79, 32, 38, 46, 10**9])
    places = torch.tensor(order[:cut])
    some = ids[places]
    whole, own = FLEET.draw_delays(1, 2, ids, load(ids)), FLEET.draw_delays(1, 2, some, load(some))
    assert all(torch.equal(few, all_[places]) for few, all_ in zip(own, whole, strict=True))
    ranks, few = FLEET.ranks(1, ids, 8), FLEET.ranks(1, some, 8)
    assert ranks is not None
    assert few is not None
    assert torch.equal(few, ranks[places])


def test_a_round_is_a_function_of_seed_and_round() -> None:
    ids = torch.arange(0, 900, 30)
    first, again, other, later = (
        FLEET.timeline(seed, round_, ids, load(ids), 20)
        for seed, round_ in ((0, 1), (0, 1), (1, 1), (0, 2))
    )
    assert torch.equal(first.per_client, again.per_client)
    assert (first.kept.tolist(), first.dropped) == (again.kept.tolist(), again.dropped)
    assert not torch.equal(first.per_client, other.per_client)
    assert not torch.equal(first.per_client, later.per_client)


def test_a_device_is_the_same_in_each_round_and_jitter_is_not() -> None:
    ids = torch.arange(4000)
    calm = SystemConfig(speed=LogNormal(50.0, 0.7))
    rough = SystemConfig(speed=LogNormal(50.0, 0.7), jitter=0.3)
    first, second = (calm._seconds(0, t, ids, load(ids)) for t in (1, 2))
    assert torch.equal(first, second)
    logs = torch.log(rough._seconds(0, 1, ids, load(ids)) / first)
    # Normal(0, 0.3): the mean of n has deviation 0.3 / sqrt(n), their deviation 0.3 / sqrt(2 n).
    assert float(logs.mean()) == pytest.approx(0.0, abs=5 * 0.3 / math.sqrt(4000))
    assert float(logs.std()) == pytest.approx(0.3, abs=5 * 0.3 / math.sqrt(8000))
    again = torch.log(rough._seconds(0, 2, ids, load(ids)) / first)
    # The correlation of independent draws has deviation 1 / sqrt(n).
    both = torch.corrcoef(torch.stack([logs, again]))
    assert abs(float(both[0, 1])) < 5 / math.sqrt(4000)


def test_speed_and_bandwidth_are_drawn_apart() -> None:
    ids = torch.arange(4000)
    row = LogNormal(1.0, 1.0)
    parts = torch.stack([FLEET._of_device(n, row, 0, ids) for n in ("speed", "downlink", "uplink")])
    corner = torch.corrcoef(torch.log(parts)) - torch.eye(3, dtype=torch.float64)
    assert float(corner.abs().max()) < 5 / math.sqrt(4000)


def test_clients_vanish_as_often_as_asked_and_evenly_in_time() -> None:
    ids = torch.arange(20_000)
    work = Load(torch.full_like(ids, 10), torch.zeros_like(ids), torch.zeros_like(ids))
    system = SystemConfig(speed=Constant(1.0), drop_out=0.2)
    seconds, gone = system.draw_delays(0, 1, ids, work)
    assert torch.equal(seconds, torch.full_like(seconds, 10.0))
    lost = gone[gone.isfinite()]
    assert len(lost) == pytest.approx(4000, abs=5 * math.sqrt(20_000 * 0.2 * 0.8))
    assert float(lost.min()) > 0
    assert float(lost.max()) < 10
    # Uniform on (0, 10): mean 5, deviation 10 / sqrt(12).
    assert float(lost.mean()) == pytest.approx(5.0, abs=5 * 10 / math.sqrt(12 * len(lost)))


def test_equal_devices_are_taken_at_random_and_not_by_id() -> None:
    devices, ids = SystemConfig(over_select=2.0), torch.arange(10)
    counts = torch.zeros(10)
    for round_ in range(1, 1001):
        counts[devices.timeline(0, round_, ids, load(ids), 5).kept] += 1
    # Binomial(1000, 1 / 2): five standard deviations are 79.
    assert float((counts - 500).abs().max()) < 79


def test_slow_clients_are_dropped_by_a_deadline() -> None:
    devices = SystemConfig(speed=Constant(1.0), deadline=60.0)
    work = Load(torch.tensor([50, 70, 10]), torch.zeros(3), torch.zeros(3))
    found = devices.timeline(0, 1, torch.tensor([4, 5, 6]), work, 3)
    assert found.kept.tolist() == [0, 2]
    assert [vars(d) for d in found.dropped] == [
        {"client": 5, "reason": "late: 70.0 s, the deadline is 60 s"}
    ]
    assert found.seconds == 60.0


# --- rank budgets --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "rank", "ranks"), [(0.5, 8, 4), (0.07, 100, 7), (0.3, 4, 2), (1e-6, 4, 1), (9, 4, 4)]
)
def test_a_budget_is_a_share_of_the_rank_rounded_up(share: float, rank: int, ranks: int) -> None:
    found = SystemConfig(rank_budget=Constant(share)).ranks(0, torch.tensor([3, 1]), rank)
    assert found is not None
    assert found.dtype == torch.int64
    assert found.tolist() == [ranks, ranks]


def test_budgets_come_as_often_as_the_preset_says() -> None:
    found = read(preset("mixed_ranks")).ranks(0, torch.arange(8000), 8)
    assert found is not None
    for rank in (1, 2, 4, 8):
        # Binomial(8000, 1 / 4): five standard deviations are 194.
        assert abs(int((found == rank).sum()) - 2000) < 194


# --- settings ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_sets_every_field_by_its_own_name(name: str) -> None:
    group = preset(name)
    assert group["name"] == name
    assert set(group) == {"name", *inspect.signature(SystemConfig).parameters}
    assert read(group).enabled == (name != "none")


def test_none_is_the_default() -> None:
    assert read(preset("none")) == SystemConfig() == read({})


def test_the_phones_answer_in_most_rounds_and_lose_some() -> None:
    phones = read(preset("phones"))
    now, kept, lost = 0.0, 0, 0
    for round_ in range(1, 51):
        ids = phones.ask(0, round_, 10_000, 20, now)
        found = phones.timeline(0, round_, ids, load(ids), 20)
        now += found.seconds
        kept, lost = kept + len(found.kept), lost + len(found.dropped)
        assert 0 < found.seconds <= 30
        assert len(ids) == 26
    assert 0.9 * 20 * 50 < kept <= 20 * 50
    assert lost == 26 * 50 - kept


@pytest.mark.parametrize("most", [None, 1, 5, 100])
@pytest.mark.parametrize("local", [{"steps": 10}, {"steps": 3}, {"epochs": 2}])
@pytest.mark.parametrize("batch_size", [0, 4, 32])
def test_a_client_passes_over_the_samples_of_its_batches(
    local: dict[str, int], batch_size: int, most: int | None
) -> None:
    """The last batch of each epoch is short; a recipe may end before all steps are taken."""
    settings = LocalConfig(lr=0.5, batch_size=batch_size, **local)
    sizes = [33, 70, 32, 5, 1]
    clock = DeviceSimulator(SystemConfig(speed=Constant(1.0)), 0, settings)
    found = clock.passes(torch.tensor(sizes), most)
    wanted = [sum(map(len, [*batches(size, 0, settings, 0, 1)][:most])) for size in sizes]
    assert found.tolist() == wanted


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"availability": {"name": "diurnal", "share": 0.5}},
        "system.availability=diurnal does not go with .* without a speed or a network",
    ),
    ({"speed": {"name": "lognorml"}}, "unknown system.speed 'lognorml'; did you mean 'lognormal'"),
    ({"speed": {"median": 3.0}}, "unknown system.speed 'None'"),
    (
        {"speed": {"name": "lognormal", "median": 3}},
        "system.speed.sigma is missing: expected float",
    ),
    (
        {"uplink": {"name": "constant", "value": -1}},
        "system.uplink.value=-1: expected a positive",
    ),
    (
        {"speed": {"name": "constant", "valu": 1}},
        "unknown key 'system.speed.valu'; did you mean 'system.speed.value'",
    ),
    ({"speed": {"name": "constant", "value": "fast"}}, "system.speed.value='fast': expected float"),
    ({"speed": 3}, r"system.speed=3: expected a group with a name \(constant, .*\) or null"),
    (
        {"rank_budget": {"name": "choice", "values": [1, 0.5], "probabilities": [0.5, 0.6]}},
        r"system.rank_budget.probabilities is \[0.5, 0.6\], of sum 1.1",
    ),
    (
        {"availability": 0.5},
        r"system.availability=0.5: expected a group with a name \(bernoulli, di",
    ),
    ({"availability": {"name": "weekly"}}, "unknown system.availability 'weekly'"),
    (
        {"availability": {"name": "bernoulli", "chance": 2}},
        "system.availability.chance=2: expected ",
    ),
    ({"drop_out": 1}, r"system.drop_out=1: expected a number in \[0, 1\)"),
    ({"drop_out": -0.1}, "system.drop_out=-0.1"),
    ({"jitter": -1}, "system.jitter=-1: expected "),
    ({"jitter": 0.1}, "system.jitter=0.1 has no effect"),
    ({"deadline": 5}, "system.deadline=5.0 has no effect"),
    ({"deadline": 0}, "system.deadline=0: expected a positive .*or null"),
    ({"over_select": 0.9}, "system.over_select=0.9: expected a finite number from 1 on"),
    ({"over_select": math.nan}, "system.over_select=nan"),
    ({"overselect": 1.1}, "unknown key 'system.overselect'; did you mean 'system.over_select'"),
]


@pytest.mark.parametrize(("group", "words"), REFUSED)
def test_what_cannot_run_is_refused(group: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=f"^{words}"):
        accepted("system", read(group))


def test_nested_groups_become_their_rows() -> None:
    found = read(preset("phones") | {"speed": {"name": "uniform", "low": 1, "high": 2}})
    assert found.speed == UniformSpread(1.0, 2.0)
    assert found.availability == Diurnal(0.4, 0.5)


def test_a_fleet_may_lose_clients_without_a_clock() -> None:
    assert SystemConfig(drop_out=0.1).enabled
    assert not SystemConfig(drop_out=0.1).timed
    assert SystemConfig(uplink=Constant(1.0)).timed
