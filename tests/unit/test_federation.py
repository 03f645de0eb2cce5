"""What an operator sees and steers: nodes, pauses, drained nodes, and a log of what was started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from fedraclora.commands import cli, federation
from fedraclora.engines.deploy.federation import (
    FOLDER,
    HOME,
    WISHES,
    FederationFiles,
    NodeFacts,
    Wishes,
)
from fedraclora.engines.deploy.node_registry import NodeRegistry
from fedraclora.errors import AbsentError, ConfigError
from tests.campaigns.claims import Link, Waiting, clocks


@pytest.fixture
def files(tmp_path: Path) -> FederationFiles:
    return FederationFiles(tmp_path / FOLDER)


@pytest.fixture
def link() -> Iterator[Link]:
    found = Link({3: [0], 9: [1]})
    with ExitStack() as stack:
        for clock in clocks(found):
            stack.enter_context(clock)
        yield found


class Operator(Waiting):
    """A grid that does something when a registry has waited for some seconds."""

    def __init__(self, link: Link, at: float, does: Any, **settings: Any) -> None:
        super().__init__(link, **settings)
        self.at, self.does = at, does

    def wait(self, what: str) -> None:
        super().wait(what)
        if self.grid.now > self.at and self.does is not None:
            self.does()
            self.does = None


def test_a_paused_run_waits_before_its_next_round_alone(files: FederationFiles, link: Link) -> None:
    post = Operator(link, 50.0, lambda: files.wish(Wishes()))
    who = NodeRegistry(post, files)
    who.begin(1)
    files.wish(Wishes(paused=True))
    who.begin(1)  # a further exchange of the same round
    assert link.now == 0
    who.begin(2)
    assert 50 < link.now < 60
    assert [("paused" in said, "ended" in said) for said in post.incidents] == [
        (True, False),
        (False, True),
    ]


def test_a_drained_node_finishes_its_round_and_is_back_once_it_is_wanted(
    files: FederationFiles, link: Link
) -> None:
    post = Waiting(link, min_clients=1)
    who = NodeRegistry(post, files)
    who.begin(1)
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    files.wish(Wishes(drained=frozenset({9})))
    who.begin(1)
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    who.begin(2)
    assert who.gather([0, 1]) == {0: 3}
    assert "drained" in who.absence(1)
    assert "drained" in files.nodes()[9].why
    assert link.asked.count(9) == 1
    files.wish(Wishes())
    who.begin(3)
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    assert files.nodes()[9].why == ""


def test_a_run_that_waits_for_a_drained_node_goes_on_when_it_is_wanted(
    files: FederationFiles, link: Link
) -> None:
    files.wish(Wishes(drained=frozenset({9})))
    who = NodeRegistry(Operator(link, 40.0, lambda: files.wish(Wishes())), files)
    who.begin(1)
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    assert 40 < link.now < 70


def test_a_run_says_once_that_a_node_of_its_own_was_removed_and_whom_it_served(
    files: FederationFiles, link: Link
) -> None:
    post = Waiting(link, min_clients=1)
    files.wish(Wishes(removed=frozenset({4})))  # before this run: it knows nothing of it
    who = NodeRegistry(post, files)
    who.begin(1)
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    assert not post.incidents
    files.wish(Wishes(removed=frozenset({4, 9})))
    del link.nodes[9]
    for round_ in (2, 3):
        who.begin(round_)
        assert who.gather([0, 1]) == {0: 3}
    (said,) = post.incidents
    assert "client 1 is removed" in said
    assert "removed" in who.absence(1)


def test_a_run_that_waits_says_that_a_node_was_removed(files: FederationFiles, link: Link) -> None:
    def remove() -> None:
        files.wish(Wishes(removed=frozenset({9})))

    post = Operator(link, 40.0, remove, wait=100.0)
    who = NodeRegistry(post, files)
    who.begin(1)
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    del link.nodes[9]
    with pytest.raises(AbsentError):
        who.gather([0, 1])
    assert "client 1 is removed" in post.incidents[-1]


def test_wishes_that_cannot_be_read_change_nothing(files: FederationFiles, link: Link) -> None:
    files.wish(Wishes(drained=frozenset({9})))
    who = NodeRegistry(Waiting(link, min_clients=1), files)
    who.begin(1)
    (files.folder / WISHES).write_text("{")
    who.begin(2)
    assert who.gather([0, 1]) == {0: 3}


class Known:
    """A SuperLink with two nodes."""

    name = "house"
    removed: list[int]
    runs_now: list[int]

    def __init__(self, *_: object) -> None:
        pass

    def nodes(self) -> list[dict[str, object]]:
        times = {"online-at": "2026-01-01 09:00:00Z", "offline-at": "N/A"}
        states = {"3": "online", "9": "offline", "5": "unregistered"}
        return [{"node-id": node, "status": state, **times} for node, state in states.items()]

    def unregister(self, node: int) -> None:
        self.removed.append(node)

    def running(self) -> list[int]:
        return self.runs_now

    def certificate_warnings(self) -> list[str]:
        return []

    def runs(self) -> list[dict[str, object]]:
        about = {"fab-hash": "abcdef", "pending-at": "2026-01-02 00:00:00Z"}
        return [{"run-id": n, "status": "finished:failed", **about} for n in ("77", "78")]


@pytest.fixture
def known(
    files: FederationFiles, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> type[Known]:
    Known.removed, Known.runs_now = [], [77]
    monkeypatch.setattr(federation, "Connection", Known)
    monkeypatch.setenv(HOME, str(files.folder.parent))
    monkeypatch.setenv("COLUMNS", "300")
    files.note({3: NodeFacts("north", (0, 1), "2026-01-01T10:00:00"), 9: NodeFacts("south", (2,))})
    return Known


def act(*words: str) -> None:
    federation.main([*words, "connection=house"])


@pytest.mark.usefixtures("known")
def test_the_status_names_nodes_their_clients_and_why_they_are_absent(
    files: FederationFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    act("drain", "north")
    assert files.wishes() == Wishes(drained=frozenset({3}))
    act("pause")
    capsys.readouterr()
    act("status")
    said = capsys.readouterr().out
    for part in ("north", "0, 1", "drained", "2026-01-01 10:00:00", "south", "not connected"):
        assert part in said
    assert "unregistered" not in said
    assert "run 77" in said
    assert "paused" in said
    act("undrain", "3")
    act("resume")
    assert files.wishes() == Wishes()


def test_a_node_in_a_round_is_drained_before_it_is_removed(
    known: type[Known], files: FederationFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="drain"):
        act("remove", "north")
    act("remove", "south")  # it is not connected
    act("drain", "north")
    act("remove", "north")
    assert known.removed == [9, 3]
    assert "north (node 3, clients 0, 1) is removed" in capsys.readouterr().out
    assert files.wishes() == Wishes(removed=frozenset({3, 9}))
    assert [e["what"] for e in files.entries()] == ["remove", "drain", "remove"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["drain", "east"], "north"),
        (["drain"], "one node"),
        (["status", "north"], "no further"),
        (["stop"], "stop"),
    ],
)
def test_words_that_name_nothing_are_refused(
    known: type[Known], words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("federation", [*words, "connection=house"]) == 1
    assert said in capsys.readouterr().err


@pytest.mark.usefixtures("known")
def test_the_log_has_each_start_with_its_code_and_how_it_ended(
    files: FederationFiles, capsys: pytest.CaptureFixture[str]
) -> None:
    files.audit("start", run=77, digest="d" * 64, code="c" * 64, folder="/runs/a")
    files.audit("end", run=77, status="the disk is full")
    with (files.folder / "audit.jsonl").open("a") as file:
        file.write('{"time": "20')  # a kill has cut it
    act("log")
    said = capsys.readouterr().out
    for part in ("d" * 12, "c" * 12, "finished:failed", "the disk is full", "/runs/a"):
        assert part in said
    assert "abcdef" in said  # of the run that was started elsewhere
    assert json.loads((files.folder / "audit.jsonl").read_text().splitlines()[0])["who"]
