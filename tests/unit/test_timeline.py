"""One round on the virtual clock, against a plain list of events."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.devices.timeline import ArrivalOrder, Timeline
from fedraclora.errors import ClientError

INF = math.inf


def race(
    seconds: list[float],
    gone: list[float] | None = None,
    needed: int = 2,
    deadline: float = INF,
    ties: list[float] | None = None,
) -> ArrivalOrder:
    K = len(seconds)
    return ArrivalOrder(
        round_=7,
        clients=torch.arange(K) * 10,
        seconds=torch.tensor(seconds, dtype=torch.float64),
        dropped=torch.tensor(gone or [INF] * K, dtype=torch.float64),
        ties=torch.tensor(ties or [0.0] * K, dtype=torch.float64),
        needed=needed,
        deadline=deadline,
    )


def reasons(found: Timeline) -> dict[int, str]:
    return {refusal.client: refusal.reason for refusal in found.dropped}


def test_all_who_answer_are_kept_and_the_last_ends_the_round() -> None:
    found = race([5.0, 83.25, 1.0], needed=3).run()
    assert found.kept.tolist() == [0, 1, 2]
    assert found.kept.dtype == torch.int64
    assert found.seconds == 83.25
    assert found.per_client.tolist() == [5.0, 83.25, 1.0]
    assert (found.dropped, found.notes) == ([], [])


def test_the_first_to_answer_are_kept_and_end_the_round() -> None:
    found = race([5.0, 9.0, 1.0, 4.0], needed=2).run()
    assert found.kept.tolist() == [2, 3]
    assert found.seconds == 4.0
    assert reasons(found) == dict.fromkeys([0, 10], "not among the first 2 to answer")


def test_who_is_late_is_waited_for_until_the_deadline() -> None:
    found = race([83.24, 9.0, 61.0], needed=2, deadline=60.0).run()
    assert found.kept.tolist() == [1]
    assert found.seconds == 60.0
    assert reasons(found) == {
        0: "late: 83.2 s, the deadline is 60 s",
        20: "late: 61.0 s, the deadline is 60 s",
    }


def test_a_reply_at_the_deadline_is_in_time() -> None:
    assert race([60.0], needed=1, deadline=60.0).run().kept.tolist() == [0]


def test_who_is_gone_is_not_waited_for() -> None:
    found = race([20.0, 5.0, 40.0], [12.06, INF, 0.0123], needed=3, deadline=60.0).run()
    assert found.kept.tolist() == [1]
    assert found.seconds == 12.06
    assert reasons(found) == {0: "dropped out after 12.1 s", 20: "dropped out after 0.0123 s"}


def test_who_would_be_gone_after_the_round_is_only_slow() -> None:
    found = race([20.0, 5.0], [12.0, INF], needed=1).run()
    assert found.seconds == 5.0
    assert reasons(found) == {0: "not among the first 1 to answer"}


def test_who_would_be_gone_after_the_deadline_is_late() -> None:
    found = race([90.0, 5.0], [70.0, INF], needed=2, deadline=60.0).run()
    assert found.seconds == 60.0
    assert reasons(found) == {0: "late: 90.0 s, the deadline is 60 s"}


def test_equal_times_are_ordered_by_ties() -> None:
    found = race([1.0] * 4, needed=2, ties=[0.3, 0.1, 0.4, 0.2]).run()
    assert found.kept.tolist() == [1, 3]


def test_fewer_clients_than_wanted_are_noted() -> None:
    assert race([1.0], needed=3).run().notes == ["asked 1 of 3 clients: no more available"]


def test_nobody_in_time_names_round_deadline_and_the_fastest() -> None:
    wanted = r"round 7: .*1 of 3 dropped out.* 61\.5 s.* 60 s; raise system\.dead"
    with pytest.raises(ClientError, match=wanted):
        race([90.0, 61.5, 70.0], [5.0, INF, INF], deadline=60.0).run()


def test_everybody_gone_is_told_as_that() -> None:
    with pytest.raises(ClientError, match=r"round 7: .*2 of 2 dropped"):
        race([9.0, 1.0], [5.0, 0.5]).run()


def played(run: ArrivalOrder) -> tuple[list[int], float]:
    """Play the events one after another: who is kept, and when the round ends."""
    events = []
    for place, (seconds, gone) in enumerate(
        zip(run.seconds.tolist(), run.dropped.tolist(), strict=True)
    ):
        tie = float(run.ties[place])
        events.append((gone, 1, tie, place) if gone < INF else (seconds, 0, tie, place))
    kept: list[int] = []
    now = 0.0
    for time, leaves, _, place in sorted(events):
        if time > run.deadline:
            return sorted(kept), run.deadline
        now = time
        if not leaves:
            kept.append(place)
        if len(kept) == run.needed:
            break
    return sorted(kept), now


@st.composite
def races(draw: st.DrawFn) -> ArrivalOrder:
    K = draw(st.integers(1, 9))
    seconds = [float(draw(st.integers(0, 12))) for _ in range(K)]
    shares = [draw(st.sampled_from([None, 0.0, 0.25, 0.75])) for _ in range(K)]
    gone = [INF if f is None else f * s for f, s in zip(shares, seconds, strict=True)]
    ties = [float(t) for t in draw(st.permutations(range(K)))]
    deadline = draw(st.sampled_from([INF, 3.0, 8.0]))
    return race(seconds, gone, draw(st.integers(1, K + 2)), deadline, ties)


@given(races())
def test_the_round_is_what_its_events_make_it(run: ArrivalOrder) -> None:
    kept, end = played(run)
    if not kept:
        with pytest.raises(ClientError, match="round 7: no client answered"):
            run.run()
        return
    found = run.run()
    assert found.kept.tolist() == kept
    assert found.seconds == end
    left = [k for k in range(len(run.clients)) if k not in kept]
    assert [refusal.client for refusal in found.dropped] == [10 * k for k in left]
    for k, refusal in zip(left, found.dropped, strict=True):
        gone, late = float(run.dropped[k]) <= end, float(run.seconds[k]) > run.deadline
        start = "dropped out" if gone else "late" if late else "not among the first"
        assert refusal.reason.startswith(start)
        assert gone or late or len(kept) == run.needed
