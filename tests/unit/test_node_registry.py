"""Who serves a client: the node registered first, whatever the order of the answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from fedraclora.engines.deploy.node_registry import AGAIN, PATIENCE, NodeRegistry
from fedraclora.engines.deploy.straggler_monitor import Pace, StragglerMonitor
from fedraclora.engines.owner.refusal import OwnerRefusal
from fedraclora.errors import ClientError, EngineError
from tests.campaigns.claims import STEP, Link, Waiting, campaign, clocks

Make = Callable[..., tuple[NodeRegistry, Waiting, Link]]


@pytest.fixture
def make() -> Iterator[Make]:
    with ExitStack() as open_:

        def made(link: Link, **settings: Any) -> tuple[NodeRegistry, Waiting, Link]:
            for clock in clocks(link):
                open_.enter_context(clock)
            post = Waiting(link, **settings)
            return NodeRegistry(post), post, link

        yield made


EARLY, LATE = "2026-01-01T09:00:00+00:00", "2026-01-02T09:00:00+00:00"


@pytest.mark.parametrize("delays", [{}, {7: [5.0]}, {3: [5.0]}, {3: [9.0], 7: [4.0]}])
@pytest.mark.parametrize("first", [3, 7])
def test_the_node_registered_first_serves_a_client_whoever_answers_first(
    make: Make, delays: dict[int, list[float]], first: int
) -> None:
    nodes = {3: [0, 1], 7: [0], 9: [2]}
    registered = {first: EARLY, 10 - first: LATE, 9: EARLY}
    who, post, _ = make(Link(nodes, delays, registered))
    found = who.gather([0, 1, 2])
    assert found == {0: first, 1: 3, 2: 9}
    (said,) = post.incidents  # in the first exchange, and once
    for part in ("client 0:", "node 3 ", "node 7 ", EARLY, LATE):
        assert part in said
    assert who.gather([0, 1, 2]) == found
    assert len(post.incidents) == 1


@pytest.mark.slow
def test_nodes_that_claim_at_random() -> None:
    counts = campaign(150)
    assert counts["exchange"] > 150
    assert min(counts["ended"], counts["claim or move told"]) > 30


def test_a_node_that_comes_later_gets_a_client_only_while_the_first_is_away(make: Make) -> None:
    registered = {3: EARLY, 7: LATE}
    who, post, link = make(Link({3: [0], 9: [1]}, {}, registered), wait=5.0)
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    assert not post.incidents
    link.nodes[7] = [0]
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    del link.nodes[3]
    assert who.gather([0, 1]) == {0: 7, 1: 9}
    assert who.gather([0, 1]) == {0: 7, 1: 9}
    link.nodes[3] = [0]
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    assert len(post.incidents) == 3
    assert all("node 3" in said and "node 7" in said for said in post.incidents)


def test_a_client_that_moves_to_another_node_is_named(make: Make) -> None:
    who, post, link = make(Link({3: [0, 1, 2]}))
    who.gather([0])
    link.nodes = {4: [0, 1, 2]}
    assert who.gather([2]) == {2: 4}
    (said,) = post.incidents
    assert "[0, 1, 2]" in said
    assert said.index("node 4") < said.index("node 3")


@pytest.mark.parametrize("most", [0, 1, 2])
def test_more_claims_than_the_run_allows_end_it(make: Make, most: int) -> None:
    who, _, _ = make(Link({3: [0, 1, 2], 7: [1, 2]}), max_claims=most)
    if most == 2:
        assert who.gather([0]) == {0: 3}
        return
    for _ in range(2):  # it is no error that another try mends
        with pytest.raises(EngineError, match=rf"engine.max_claims={most}.*\[1, 2\]") as caught:
            who.gather([0])
        assert all(node in str(caught.value) for node in ("node 3", "node 7"))


def test_a_node_whose_answer_was_lost_is_asked_again(make: Make) -> None:
    """Its first answer never comes, as after a SuperLink that was killed."""
    never = 10**9
    who, _, link = make(Link({3: [0], 7: [1]}, {7: [never, 2.0]}), min_clients=1)
    assert who.gather([0, 1]) == {0: 3, 1: 7}
    assert AGAIN < link.now < AGAIN + 5
    assert link.asked == [3, 7, 7]
    began = link.now
    assert who.gather([0, 1]) == {0: 3, 1: 7}
    assert link.now == began


def test_a_node_that_never_answers_holds_up_one_exchange(make: Make) -> None:
    who, _, link = make(Link({3: [0], 7: [1]}, {7: [1e9]}), min_clients=1, timeout=3600.0)
    assert who.gather([0, 1]) == {0: 3}
    assert "node 7" in who.absence(1)
    assert "not connected" not in who.absence(1)
    assert link.now <= PATIENCE + 1
    began = link.now
    for _ in range(20):
        assert who.gather([0, 1]) == {0: 3}
        link.now += 100
    assert link.now == began + 20 * 100
    assert link.asked.count(7) <= 8  # each time after twice as long
    link.delays[7] = [0.0]
    link.now += 10_000
    who.gather([0, 1])
    assert who.gather([0, 1]) == {0: 3, 1: 7}


def test_a_run_without_the_client_of_a_node_that_never_answers_stops(make: Make) -> None:
    who, _, link = make(Link({3: [0], 7: [1]}, {7: [1e9]}), wait=90.0)
    with pytest.raises(ClientError, match=r"1 of 2 clients .*\[1\]"):
        who.gather([0, 1])
    assert 90 < link.now < 92


def test_a_question_of_silence_holds_nobody_up(make: Make) -> None:
    """A node that is silent in an exchange is asked again; it is known whom it serves."""
    who, _, link = make(Link({3: [0], 7: [1]}, {7: [0.0, 1e9]}))
    who.gather([0, 1])
    watch = StragglerMonitor(who)
    watch.lost({"m": 7})
    link.now += 61
    assert not watch.lost({"m": 7})
    assert link.asked == [3, 7, 7]
    began = link.now
    assert who.gather([0, 1]) == {0: 3, 1: 7}
    assert link.now == began


def test_a_long_silence_is_told_once_with_who_is_silent(make: Make) -> None:
    who, _, link = make(Link({3: [0]}))
    watch = StragglerMonitor(who)
    link.now += 10
    watch.late(["client 0"])  # half of all replies take 10 s
    link.now += 35
    assert not watch.overdue(["client 1 (north)"])
    link.now += 10
    assert not watch.overdue([])
    assert "client 1 (north)" in watch.overdue(["client 1 (north)"])
    assert not watch.overdue(["client 1 (north)"])


def test_clients_that_were_away_together_are_named_beside_what_is_usual(make: Make) -> None:
    """Half of the nodes replied late: beside each other they were on time."""
    who, _, link = make(Link({3: [0, 1]}))
    pace = Pace()
    assert pace.usual("train") == math.inf
    for half in (20.0, 1.0, 1.0, 25.0, 1.0):
        pace.add("train", half)
    pace.add("measure", 1000.0)
    watch = StragglerMonitor(who, pace.usual("train"))
    link.now += 11
    assert not watch.late(["client 2"])
    link.now += 9
    (said,) = watch.late(["client 0 (north)", "client 1"])
    assert all(word in said for word in ("client 0 (north)", "client 1", "20 s", "1 s"))
    assert not StragglerMonitor(who, 5.0).late(["client 0"])


def test_a_node_that_the_next_exchange_waits_for_is_named(make: Make) -> None:
    who, post, link = make(Link({3: [0], 7: [1]}, {7: [30.0]}))
    who.gather([0, 1])
    assert link.now >= 30
    assert not post.incidents  # it starts with the run
    link.delays = {}
    who.gather([0, 1])
    assert not post.incidents
    del link.nodes[7]

    def come_back(what: str) -> None:
        link.now += STEP
        if link.now > gone + 25:
            link.nodes[7] = [1]

    post.wait, gone = come_back, link.now  # type: ignore[assignment,method-assign]
    who.gather([0, 1])
    (said,) = post.incidents
    assert all(word in said for word in ("client 1 ", "25 s"))


def test_an_absent_client_is_named_with_the_node_that_served_it(make: Make) -> None:
    who, _, link = make(Link({3: [0], 9: [1]}, {}, {3: EARLY, 9: EARLY}))
    who.gather([0, 1])
    del link.nodes[3]
    assert all(part in who.absence(0) for part in ("not connected", "node 3", EARLY))
    assert "node" not in who.absence(2)


NORTH = OwnerRefusal("not approved").write({"name": "north", "partition-ids": "1-2"})


def test_a_refusal_is_told_once_with_the_name_and_clients_of_the_node(make: Make) -> None:
    """Also of a node that has never served: what it refuses is not called an absence."""
    who, post, link = make(Link({3: [0], 9: [1, 2]}, refused={9: NORTH}), min_clients=1)
    for _ in range(3):
        assert who.gather([0, 1, 2]) == {0: 3}
    (said,) = post.incidents
    for part in ("north", "node 9", "[1, 2]", "not approved", "engine.min_clients=1"):
        assert part in said
    assert all(part in who.absence(1) for part in ("north", "not approved"))
    assert "not connected" not in who.absence(1)
    link.refused.clear()
    assert who.gather([0, 1, 2]) == {0: 3, 1: 9, 2: 9}
    link.refused[9] = NORTH
    who.forget(9)
    who.gather([0, 1, 2])
    assert len(post.incidents) == 2  # again, since it has served in between


def test_a_run_that_needs_all_clients_waits_for_one_whose_owner_refuses(make: Make) -> None:
    who, post, link = make(Link({3: [0], 9: [1]}, refused={9: NORTH}), wait=90.0)
    with pytest.raises(ClientError, match=r"missing are \[1\]; north .*not approved"):
        who.gather([0, 1])
    assert 90 < link.now < 92
    assert link.asked.count(9) == 5  # every 20 s
    assert "waits until" in post.incidents[0]


def test_a_node_that_refuses_in_a_round_is_asked_whether_it_serves(make: Make) -> None:
    """No message of a round, with all that it brings, goes to it before it says so."""
    who, _, link = make(Link({3: [0], 9: [1]}), min_clients=1)
    assert who.gather([0, 1]) == {0: 3, 1: 9}
    link.refused[9] = NORTH
    assert "not approved" in who.refused(9, NORTH)
    assert who.gather([0, 1]) == {0: 3}
    assert link.asked == [3, 9, 9]


def test_the_bundle_is_counted_once_for_each_node_that_replies(make: Make) -> None:
    """Under its name, also what was sent before that was known; one that refuses has it, too."""
    _, post, link = make(Link({3: [0], 9: [1]}, refused={9: NORTH}), min_clients=1)
    who = NodeRegistry(post, bundle=100_000)
    for _ in range(3):
        who.gather([0, 1])
    link.refused.clear()
    who.gather([0, 1])
    moved = post.traffic.nodes
    assert {*moved} == {"3", "north"}
    assert {ways["bundle"] for ways in moved.values()} == {100_000}
    assert sum(sum(ways.values()) for ways in moved.values()) == post.traffic.serialized


def test_a_node_has_the_name_with_which_it_was_registered(make: Make) -> None:
    """Before its first reply, and whatever its owner calls it."""
    who, post, link = make(Link({3: [0], 9: [1, 2]}, refused={9: NORTH}), min_clients=1)
    link.names = {3: "south", 9: "n-1"}
    who.gather([0, 1, 2])
    assert who.names == {3: "south", 9: "n-1"}
    assert "south" in who.served_by([0])
    assert all("n-1" in said and "north" not in said for said in post.incidents)
    assert {*post.traffic.nodes} == {"south", "n-1"}
