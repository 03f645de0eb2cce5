"""What a pool does with workers that are lost, silent or late: by its rules, without a Ray."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    RayActorError,
    RayError,
    RayTaskError,
)

from fedraclora.config.settings import RayConfig
from fedraclora.engines.ray import grid as grids
from fedraclora.engines.ray import pool as module
from fedraclora.engines.ray import pulse as pulses
from fedraclora.engines.ray.pool import WorkerPool, WorkerSlot
from fedraclora.errors import ConfigError, EngineError

NEVER = 1e9
Event = tuple[float, Callable[[], object]]


@dataclass(eq=False)
class Ref:
    """An answer, and when it comes."""

    due: float
    answer: object


@dataclass
class Worker:
    """A process that answers at once, but for what a test says of it; quiet: since when."""

    world: World
    number: int
    starts: float = 0.0
    quiet: float = NEVER
    dead: RayError | None = None
    slow: float = 1.0
    refs: list[Ref] = field(default_factory=list)

    @property
    def facts(self) -> Worker:
        return self

    def remote(self) -> Ref:
        return self.give(max(self.world.now, self.starts), {"address": f"10.0.0.{self.number}"})

    def give(self, due: float, answer: object) -> Ref:
        lost = self.dead is not None or due >= self.quiet
        ref = Ref(self.world.now if self.dead else NEVER if lost else due, self.dead or answer)
        self.refs.append(ref)
        return ref

    def die(self, error: RayError) -> None:
        self.dead = error
        for ref in self.refs:
            if ref.due > self.world.now:
                ref.due, ref.answer = self.world.now, error

    def look(self) -> float:
        """Its pulse, in units of what is allowed."""
        return max(0.0, self.world.now - self.quiet) / pulses.QUIET


class World:
    """Ray's `wait`, `get` and `kill` on a clock of its own."""

    def __init__(self) -> None:
        self.now, self.workers, self.killed = 0.0, list[Worker](), list[Worker]()
        self.events: list[Event] = []
        self.slow_start = 0.0

    def start(self) -> Worker:
        self.workers.append(Worker(self, len(self.workers), self.now + self.slow_start))
        return self.workers[-1]

    def at(self, moment: float, event: Callable[[], object]) -> None:
        self.events.append((moment, event))

    def wait(self, refs: list[Ref], *, num_returns: int, timeout: float) -> tuple[list[Ref], None]:
        assert num_returns == 1
        end = self.now + timeout
        while True:
            first = min(refs, key=lambda ref: ref.due)
            due = [each for each in self.events if each[0] <= min(end, first.due)]
            if not due:
                self.now = max(self.now, min(end, first.due))
                return ([first] if first.due <= end else []), None
            self.events.remove(event := min(due, key=lambda each: each[0]))
            self.now = max(self.now, event[0])
            event[1]()

    def get(self, ref: Ref) -> object:
        if isinstance(ref.answer, Exception):
            raise ref.answer
        return ref.answer

    def kill(self, worker: Worker, *, no_restart: bool) -> None:
        assert no_restart
        self.killed.append(worker)

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    world = World()
    monkeypatch.setattr(module, "ray", world)
    monkeypatch.setattr(module, "time", world)
    return world


@dataclass
class Pulse:
    worker: Worker
    quiet: float = 0.0

    def look(self) -> float:
        self.quiet = self.worker.look() * pulses.QUIET
        return self.worker.look()


def pool_of(world: World, workers: int = 2, **more: Any) -> WorkerPool:
    settings: dict[str, Any] = {"retries": 3, "timeout": 3600.0, "wait": 300.0} | more
    pool = WorkerPool(world.start, workers, pulse_of=Pulse, **settings)
    pool.facts()
    pool.check = lambda _: None
    return pool


def submit(slot: WorkerSlot, job: str) -> Any:
    """A job takes as long as its worker is slow."""
    worker: Worker = slot.actor
    return worker.give(worker.world.now + worker.slow, f"{job} by {worker.number}")


def run(pool: WorkerPool, *jobs: str) -> dict[str, str]:
    found = [(job, answer) for job, _, answer in pool.run(jobs, submit)]
    assert sorted(job for job, _ in found) == sorted(jobs)  # each once
    return dict(found)


class Died(ActorDiedError):
    """Ray's own wants a message of its head."""

    def __init__(self, text: str) -> None:
        RayActorError.__init__(self, "", text)


DIED, AWAY = Died("it died"), ActorUnavailableError("socket closed", b"1" * 16)


def test_a_worker_that_starts_gets_no_job_and_holds_nobody_up(world: World) -> None:
    pool = pool_of(world)
    world.slow_start = NEVER  # there is no processor left for another one
    world.at(0.5, lambda: world.workers[1].die(DIED))
    assert run(pool, "a", "b", "c") == {"a": "a by 0", "b": "b by 0", "c": "c by 0"}
    assert world.now < 5
    assert pool.incidents == ["worker 1 on 10.0.0.1 was lost: it died; b was run again"]
    assert run(pool, "d", "e") == {"d": "d by 0", "e": "e by 0"}  # nor in rounds to come
    assert world.now < 10


def test_a_silent_worker_costs_seconds_and_is_not_killed(world: World) -> None:
    pool = pool_of(world)
    world.workers[1].quiet = 0.5
    found = run(pool, "a", "b", "c", "d")
    assert set(found) == {"a", "b", "c", "d"}
    assert world.now < pulses.QUIET + 4
    assert world.killed == []
    assert "worker 1 on 10.0.0.1 has been silent for" in pool.incidents[0]
    assert pool.incidents[0].endswith(" s; b was run again")
    before = world.now
    assert len(run(pool, "e", "f", "g")) == 3
    assert world.now - before < 4  # it gets nothing more


def test_a_worker_that_had_nothing_to_do_is_told_when_it_falls_silent(world: World) -> None:
    pool = pool_of(world, workers=3)
    world.workers[2].quiet = 0.5
    while not pool.incidents:
        run(pool, "a", "b")
        assert world.now < pulses.QUIET + 4
    assert pool.incidents[0].startswith("worker 2 on 10.0.0.2 has been silent")


def test_a_worker_that_answers_again_works_again_and_what_it_did_is_not_heard(world: World) -> None:
    pool = pool_of(world)
    stopped = world.workers[1]
    stopped.quiet = 0.5

    def heal() -> None:
        stopped.quiet = NEVER
        for ref in stopped.refs:
            ref.due = min(ref.due, world.now + 0.1)

    world.at(20.0, heal)
    heard = {job: run(pool, job, f"{job}'")[job] for job in "abcdefghijklmnopqrstuvwxyz"}
    assert len(heard) == 26
    assert pool.incidents[-1] == "worker 1 on 10.0.0.1 answers again"
    assert run(pool, "A", "B") == {"A": "A by 0", "B": "B by 1"}
    assert world.killed == []


def test_an_answer_that_never_comes_though_its_worker_is_back_is_given_up(world: World) -> None:
    """Ray loses answers that were on their way when a link was cut."""
    pool = pool_of(world)
    world.workers[1].quiet = 0.5
    world.at(10.0, lambda: setattr(world.workers[1], "quiet", NEVER))
    while not pool.incidents or "answers again" not in pool.incidents[-1]:
        run(pool, "a", "b")
        assert world.now < 60
    assert {answer[-1] for answer in run(pool, "A", "B").values()} == {"0", "1"}


def test_a_worker_that_is_back_and_brings_nothing_holds_nobody_up(world: World) -> None:
    """Its port answers as soon as a link is healed; Ray's own connections may not come back."""
    pool = pool_of(world)
    world.workers[1].quiet = 0.5
    world.at(10.0, lambda: setattr(world.workers[1], "quiet", NEVER))
    world.at(10.0, lambda: setattr(world.workers[1], "slow", NEVER))
    while not pool.incidents or "answers again" not in pool.incidents[-1]:
        run(pool, "a", "b")
        assert world.now < 60
    before = world.now
    assert run(pool, "A", "B") == {"A": "A by 0", "B": "B by 0"}
    assert run(pool, "C", "D") == {"C": "C by 0", "D": "D by 0"}
    assert world.now - before < 6
    world.workers[1].slow = 1.0
    (stuck,) = [ref for ref in world.workers[1].refs if ref.due > world.now and ref.due >= NEVER][
        -1:
    ]
    stuck.due = world.now
    assert run(pool, "E", "F", "G", "H").keys() == {*"EFGH"}
    assert not pool.slots[1].doubted


def test_a_slow_worker_that_answers_is_never_set_aside(world: World) -> None:
    pool = pool_of(world)
    world.workers[1].slow = 3000.0
    assert run(pool, "a", "b") == {"a": "a by 0", "b": "b by 1"}
    assert (world.killed, pool.incidents) == ([], [])


def test_a_worker_that_hangs_is_replaced_after_the_time_of_a_chunk(world: World) -> None:
    pool = pool_of(world, timeout=40.0)
    world.workers[1].slow = NEVER
    assert run(pool, "a", "b")["b"] != "b by 1"
    assert 40 < world.now < 45
    assert world.killed == [world.workers[1]]


def test_a_worker_that_stays_silent_is_replaced_and_the_new_one_is_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    pool = pool_of(world)
    world.workers[1].quiet, world.slow_start = 0.5, 5.0
    while len(world.workers) < 3 or pool.slots[1].facts is None:
        run(pool, "a", "b")
        assert world.now < 90
    assert world.now > module.GIVEN_UP
    assert any("silent for 60 s: another is started" in told for told in pool.incidents)
    assert not any("is ready" in record.message for record in caplog.records), "it is no warning"
    assert world.killed == [world.workers[1]]
    assert pool.incidents[-1] == "worker 1 on 10.0.0.2 is ready"


def test_an_unreachable_worker_is_asked_before_it_gets_a_job(world: World) -> None:
    pool = pool_of(world)
    away = world.workers[1]
    away.slow = 5.0
    world.at(0.5, lambda: away.die(AWAY))
    world.at(6.0, lambda: setattr(away, "dead", None))
    assert run(pool, *"abcdefghij")["b"] != "b by 1"
    assert [i.partition(";")[0] for i in pool.incidents] == [
        "worker 1 on 10.0.0.1 cannot be reached",
        "worker 1 on 10.0.0.1 answers again",
    ]
    assert world.killed == []


def test_a_job_that_kills_its_workers_is_told_from_hosts_that_go(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = pool_of(world, workers=1, retries=2)
    for moment in (0.5, 1.2, 2.1):
        world.at(moment, lambda: world.workers[-1].die(DIED))
    with pytest.raises(EngineError, match=r"engine\.retries=2: .*\(poison\)"):
        run(pool, "poison")
    monkeypatch.setattr(module, "ray", world := World())
    monkeypatch.setattr(module, "time", world)
    pool = pool_of(world, workers=1, retries=2)
    gone = Died("The actor died because its node has died.")
    for moment in (0.5, 1.2, 2.1, 3.0):
        world.at(moment, lambda: world.workers[-1].die(gone))
    assert set(run(pool, "a")) == {"a"}
    assert len(pool.incidents) == 8


@pytest.mark.parametrize("how", ["silent", "starting"])
def test_without_a_worker_it_waits_and_ends_in_words(world: World, how: str) -> None:
    pool = pool_of(world, wait=30.0)
    world.slow_start = NEVER
    for worker in world.workers:
        if how == "silent":
            worker.quiet = 0.5
        else:
            world.at(0.5, lambda w=worker: w.die(DIED))  # type: ignore[misc]
    with pytest.raises(EngineError, match=r"engine\.wait=30: none of 2 workers"):
        run(pool, "a", "b")
    assert 30 < world.now < 45


def test_workers_that_are_added_get_jobs_when_they_are_ready(world: World) -> None:
    pool = pool_of(world)
    world.slow_start = 1.5
    pool.add(2)
    assert run(pool, *"abc") == {"a": "a by 0", "b": "b by 1", "c": "c by 0"}
    assert run(pool, *"defg") == {job: f"{job} by {k}" for k, job in enumerate("defg")}
    assert pool.incidents == [f"worker {k} on 10.0.0.{k} is ready" for k in (2, 3)]


def test_the_heads_pulse_asks_for_room_where_it_finds_its_place() -> None:
    head = object.__new__(pulses.Head)
    head.address, head.room, head.count = "[::1]:6379", 0, lambda: 7
    assert (head._place(), head.room) == ([("::1", 6379)], 7)


def test_what_a_late_answer_raises_is_not_heard(world: World) -> None:
    pool = pool_of(world)
    late = world.workers[1]
    late.quiet = 0.5
    run(pool, "a", "b")
    error = RayTaskError("train", "ValueError: no", ValueError("no"))
    late.quiet = NEVER
    for ref in late.refs[1:]:
        ref.due, ref.answer = world.now, error
    run(pool, "c", "d", "e", "f")
    assert world.killed == []


@pytest.mark.parametrize("cause", [RayError("gone"), BrokenPipeError("of its raylet")])
def test_what_a_worker_needed_and_lost_on_its_way_is_no_fault_of_its_job(
    world: World, cause: Exception
) -> None:
    pool = pool_of(world)
    lost = RayTaskError("train", "ObjectLostError: gone", cause)
    world.at(0.5, lambda: [setattr(ref, "answer", lost) for ref in world.workers[1].refs[1:]])
    assert run(pool, "a", "b", "c").keys() == {"a", "b", "c"}
    assert "cannot be reached" in pool.incidents[0]


def test_a_worker_that_comes_later_and_may_not_work_is_left_out(world: World) -> None:
    pool = pool_of(world)

    def refuse(_: object) -> None:
        raise ConfigError("another torch")

    pool.check = refuse
    world.at(0.5, lambda: world.workers[1].die(DIED))
    assert len(run(pool, *"abcdef")) == 6
    assert pool.incidents[-1] == "worker 1 is left out: another torch"
    assert [slot.number for slot in pool.slots] == [0]


def test_time_in_which_nobody_looks_is_no_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    monkeypatch.setattr(pulses, "time", world)
    monkeypatch.setattr(pulses, "Thread", lambda **_: world)
    monkeypatch.setattr(world, "start", lambda: None, raising=False)
    pulse = pulses.LivenessPoller(lambda: [("", 0)])
    world.now += 3600  # this process was stopped, or at other work
    assert pulse.look() < 1
    for _ in range(5):
        world.now += 1
        silence = pulse.look()
    assert silence >= 1


@pytest.mark.parametrize(
    ("connection", "answers", "slow"),
    [
        (7.0, [0.1, 0.1], False),  # asked for while a link was cut, it comes when it is healed
        (0.1, [0.9, 0.9], True),
        (0.1, [0.1, 9.0], False),  # when a stopped process goes on
    ],
)
def test_slow_answers_are_waited_for_longer_and_one_that_ends_a_fault_is_none(
    monkeypatch: pytest.MonkeyPatch, connection: float, answers: list[float], *, slow: bool
) -> None:
    world, link = World(), MagicMock()

    def connect(*_: object) -> MagicMock:
        world.now += connection
        return link

    def answered(_: int) -> bytes:
        world.now += answers.pop(0)
        return bytes(3) + pulses.SETTINGS

    link.__enter__.return_value.recv = answered
    monkeypatch.setattr(pulses, "time", world)
    monkeypatch.setattr(pulses, "Thread", lambda **_: MagicMock())
    monkeypatch.setattr(pulses.socket, "create_connection", connect)
    pulse = pulses.LivenessPoller(lambda: [("", 0)])
    pulse._ask()
    pulse._ask()
    for _ in range(6):
        world.now += 1
        silence = pulse.look()
    assert (silence < 1) == slow


def test_a_worker_is_as_silent_as_the_raylet_of_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def greet(_: str, port: int, patience: float) -> float:
        if port == 2:
            raise TimeoutError(patience)
        return 0.1

    monkeypatch.setattr(pulses, "check_response", greet)
    for places, quiet in ([("", 1), ("", 2)], 4.0), ([("", 1), ("", 3)], 0.0):
        pulse = pulses.LivenessPoller(lambda places=places: places)  # type: ignore[misc]
        pulse.quiet = 4.0
        pulse._ask()
        assert pulse.quiet == quiet


def test_a_process_that_is_gone_is_silent_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        place = listener.getsockname()
    pulse = pulses.LivenessPoller(lambda: [place])
    pulse._ask()
    assert pulse.look() >= 1


def test_what_is_loaded_by_the_first_round_is_not_searched_for_garbage_until_the_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Ray has all processes collect it again and again while a worker waits for a core."""
    world = World()
    monkeypatch.setattr(grids, "ray", world)
    monkeypatch.setattr(world, "get", lambda _: None)
    calls: list[str] = []
    names = {name: partial(calls.append, name) for name in ("freeze", "unfreeze")}
    frozen = {"get_freeze_count": lambda: calls.count("freeze") - 1}  # here by nobody else
    monkeypatch.setattr(grids, "gc", SimpleNamespace(**names, **frozen))
    grids.Resident(lambda _: None, [None])  # type: ignore[arg-type, return-value]
    assert calls == ["freeze"]
    for name in ("put", "remote"):
        monkeypatch.setattr(world, name, lambda _: None, raising=False)
    monkeypatch.setattr(grids, "Head", lambda *_: None)
    monkeypatch.setattr(grids, "WorkerPool", MagicMock())
    monkeypatch.setattr(grids.RayGrid, "_check", lambda *_: None)
    given: dict[str, Any] = {"history": None, "store": None, "settings": RayConfig()}
    grid = grids.RayGrid(MagicMock(), lambda _: None, None, **given)  # type: ignore[arg-type, return-value]
    assert calls == ["freeze", "freeze"]
    grid.close()
    assert calls == ["freeze", "freeze", "unfreeze"]
