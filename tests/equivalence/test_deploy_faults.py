"""Whatever a client does, it harms itself alone: refused by name, and the mean is of the rest."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from flwr.app import Error, Message
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from typing_extensions import override

from fedraclora.engines.asks import read_ask
from fedraclora.engines.deploy import grid, node_registry, straggler_monitor
from fedraclora.engines.deploy.pulling import NOT_WHOLE
from fedraclora.engines.deploy.pushing import PUSHES
from fedraclora.engines.records import read_answer, unfolded
from fedraclora.errors import AbsentError, ClientError
from fedraclora.experiments.faults.harms import (
    BEHAVIOURS,
    HARMS,
    Once,
    changed,
    instead,
    raises,
    replies_twice,
    stays_silent,
)
from fedraclora.experiments.faults.network import (
    Network,
    client,
    deploy,
    nodes_for,
    rows,
    with_content,
)
from fedraclora.flower_internals import message_bytes
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.rebuild import state_at
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.weights import replica
from tests.common import summary_of

ONE = 1  # the client at fault
ROUND = 2  # when


def at_fault(message: Message) -> bool:
    return client(message) == ONE and message.metadata.group_id == str(ROUND)


def check_mean_of_the_rest(folder: Path, network: Network) -> None:
    """W_2 = W_1 + s (sum of p_k B_k) A over the clients 0 and 2, worked out from the messages."""
    before, after = (state_at(folder, version).base for version in (ROUND - 1, ROUND))
    sent = [m for m in network.train_messages() if m.metadata.group_id == str(ROUND)]
    ask = read_ask(sent[0].content)
    downlink, layout = ask.own, ask.own.layout
    asked = {m.metadata.message_id: client(m) for m in sent if m.metadata.message_id}
    found = {}
    for message in sent:
        k = asked.get(message.metadata.reply_to_message_id, ONE)
        if k != ONE:
            found[k] = read_answer(message.content, ask)
    rest = [found[k] for k in (0, 2)]
    weights = torch.cat([r.samples for r in rest]).double()
    assert weights[0] != weights[1]
    mean = (weights / weights.sum()) @ torch.cat([r.numbers for r in rest]).double()
    for name, tensor in layout.unpack(mean).items():
        weight = name.removesuffix("/B")
        if weight == name:  # a bias, which is averaged itself
            torch.testing.assert_close(after[name].double(), tensor, rtol=0, atol=1e-6)
            continue
        adapter = downlink.adapters[weight]
        spec = adapter.factors["A"]
        wanted = before[weight].double() + adapter.scale * tensor @ spec.draw()
        torch.testing.assert_close(after[weight].double(), wanted, rtol=0, atol=1e-6)
        assert (after[weight] - before[weight]).abs().max() > 1e-4


WORDS = ["engine.min_clients=2"]


@pytest.mark.slow
@pytest.mark.parametrize("name", HARMS)
def test_what_cannot_be_used_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    harm, reason = HARMS[name]
    network = Network(tmp_path / "cache", nodes_for(3), changed(harm, at_fault))
    deploy(WORDS, tmp_path / "run", network)
    failures = [row["failures"] for row in rows(tmp_path / "run")[1:]]
    assert failures[0] == failures[2] == []
    (failure,) = failures[1]  # type: ignore[misc]
    assert failure["client"] == ONE
    assert reason in failure["reason"]
    check_mean_of_the_rest(tmp_path / "run", network)


@pytest.mark.slow
@pytest.mark.parametrize("name", BEHAVIOURS)
def test_a_client_that_does_not_answer_well_is_left_out(name: str, tmp_path: Path) -> None:
    make, reason = BEHAVIOURS[name]
    network = Network(tmp_path / "cache", nodes_for(3), make(at_fault))
    deploy([*WORDS, "engine.timeout=3"], tmp_path / "run", network)
    done = rows(tmp_path / "run")
    (failure,) = done[2]["failures"]  # type: ignore[misc, has-type]
    assert failure["client"] == ONE
    assert reason in failure["reason"]
    assert done[3]["failures"] == []
    check_mean_of_the_rest(tmp_path / "run", network)
    asked = [m for m in network.train_messages() if m.metadata.dst_node_id == 993]
    # Every weight is sent once more, and no more than once.
    assert len(asked) == (4 if name == "cannot settle on weights" else 3)


def test_a_node_whose_disk_is_full_says_so_in_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where it keeps its weights; it is the failure of its client alone."""
    save = replica.save_tensors

    def full(path: Path, *words: Any, **named: Any) -> None:
        if path.parent.name == str(ONE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(path, *words, **named)

    monkeypatch.setattr(replica, "save_tensors", full)
    deploy(WORDS, tmp_path / "run", Network(tmp_path / "cache", nodes_for(3)))
    failures = [f for row in rows(tmp_path / "run")[1:] for f in row["failures"]]  # type: ignore[attr-defined]
    assert {failure["client"] for failure in failures} == {ONE}
    for failure in failures:
        assert f"/{ONE}: No space left" in failure["reason"]
        assert "make room" in failure["reason"]


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, PUSHES])
def test_a_push_that_the_superlink_refuses_ends_no_run(tmp_path: Path, times: int) -> None:
    """Pushed again, or if that fails, too, in another try of the round."""
    refused = Counter[str]()

    class Refusing(Network):
        @override
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            (message,) = messages
            opened = with_content(message, unfolded(message.content))
            if self.is_training(message) and at_fault(opened):
                refused["times"] += 1
                if refused["times"] <= times:
                    raise ObjectPushError("a part", 1, "session")
            return super().push_messages(messages)

    deploy(["engine.retries=1"], tmp_path / "run", Refusing(tmp_path / "cache", nodes_for(3)))
    done = rows(tmp_path / "run")
    assert done[ROUND]["failures"] == []
    incidents: Any = done[ROUND]["incidents"]
    assert len(incidents) == times
    assert all(f"client {ONE}" in said for said in incidents)


@pytest.mark.slow
def test_a_message_that_was_lost_on_the_way_is_sent_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node is well and has nothing to answer: nobody waits for it until the time-out."""
    monkeypatch.setattr(straggler_monitor, "SILENT", 0.0)
    monkeypatch.setattr(straggler_monitor, "SETTLED", 0.0)
    nodes = {node: {**own, "name": f"clinic {node}"} for node, own in nodes_for(3).items()}
    network = Network(tmp_path / "cache", nodes, stays_silent(Once(at_fault)))
    deploy(["engine.timeout=20", "engine.retries=0"], tmp_path / "run", network)
    done = rows(tmp_path / "run")
    assert done[ROUND]["failures"] == []
    assert f"client {ONE} (clinic {1000 - 7 * ONE}) was sent again" in str(done[ROUND]["incidents"])
    assert not any(done[r].get("incidents") for r in (1, 3))
    deploy([], tmp_path / "well", Network(tmp_path / "other", nodes_for(3)))
    digests = [summary_of(tmp_path / name)["weights_digest"] for name in ("run", "well")]
    assert digests[0] == digests[1]


def test_a_round_with_enough_replies_does_not_wait_for_a_silent_node(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(3), stays_silent(at_fault))
    words = ["engine.min_clients=2", "engine.straggler_wait=0.2", "engine.timeout=3000"]
    deploy(words, tmp_path / "run", network)
    done = rows(tmp_path / "run")
    (failure,) = done[ROUND]["failures"]
    assert failure["client"] == ONE
    assert "engine.straggler_wait=0.2" in failure["reason"]
    assert done[ROUND + 1]["failures"] == []
    check_mean_of_the_rest(tmp_path / "run", network)


class Forgetful(Network):
    """Where the first answer of client 1's node to a server is lost: whom it serves."""

    lost = ""

    @override
    def serve(self, message: Message) -> list[Message]:
        name = message.metadata.message_id
        if not self.is_training(message) and message.metadata.dst_node_id == 993:
            self.lost = self.lost or name
        return [] if name == self.lost else super().serve(message)


@pytest.mark.slow
def test_after_a_resume_a_node_whose_answer_is_lost_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the SuperLink was killed meanwhile: no client is left out, and no bit is another."""
    monkeypatch.setattr(node_registry, "AGAIN", 0.1)
    network = Forgetful(tmp_path / "cache", nodes_for(3))
    began = time.monotonic()
    for rounds in (2, 4):
        network.lost = ""
        words = [*WORDS, f"rounds={rounds}"]
        deploy(words, tmp_path / "run", network, resume=rounds == 4)
        assert network.lost
    assert [row["failures"] for row in rows(tmp_path / "run")[1:]] == [[]] * 4
    assert time.monotonic() - began < node_registry.PATIENCE
    deploy([*WORDS, "rounds=4"], tmp_path / "well", Network(tmp_path / "other", nodes_for(3)))
    digests = [summary_of(tmp_path / name)["weights_digest"] for name in ("run", "well")]
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_a_reply_of_which_half_came_is_asked_for_again(tmp_path: Path) -> None:
    """Flower says so when its parts have not come for minutes."""
    half = instead(Once(at_fault), lambda m: [Message(Error(NOT_WHOLE, "lost"), reply_to=m)])
    deploy(["engine.retries=0"], tmp_path / "run", Network(tmp_path / "cache", nodes_for(3), half))
    done = rows(tmp_path / "run")
    assert done[ROUND]["failures"] == []
    assert f"client {ONE} was asked again" in str(done[ROUND]["incidents"])
    deploy([], tmp_path / "well", Network(tmp_path / "other", nodes_for(3)))
    digests = [summary_of(tmp_path / name)["weights_digest"] for name in ("run", "well")]
    assert digests[0] == digests[1]


def test_a_reply_whose_parts_are_waited_for_until_the_end_costs_no_other_client(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others' have arrived meanwhile, and are read though the time is over."""
    clock, looks = [0.0], Counter[int]()
    monkeypatch.setattr(grid, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def slow(message: Message, call: Callable[[], Message]) -> list[Message]:
        now = message.metadata.group_id == str(ROUND)
        looks[k := client(message)] += now
        if not now or looks[k] > 1:
            return [call()]
        clock[0] += 50.0 * (k == ONE)
        return [Message(Error(NOT_WHOLE, "lost"), reply_to=message)] if k == ONE else []

    network = Network(tmp_path / "cache", nodes_for(3), slow)
    deploy([*WORDS, "engine.timeout=20", "engine.retries=0"], tmp_path / "run", network)
    failures = [row["failures"] for row in rows(tmp_path / "run")[1:]]
    assert failures == [[], [{"client": ONE, "reason": "lost"}], []]
    check_mean_of_the_rest(tmp_path / "run", network)


def test_a_client_that_replies_long_after_the_others_stands_in_the_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one whose link was cut for less than it takes to be missed."""
    clock, looks = [0.0], list[str]()
    monkeypatch.setattr(straggler_monitor, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def late(message: Message, call: Callable[[], Message]) -> list[Message]:
        if not at_fault(message):
            return [call()]
        looks.append(message.metadata.message_id)
        clock[0] += 20.0 * (len(looks) - 1)
        return [call()] if len(looks) > 1 else []

    deploy([], tmp_path / "run", Network(tmp_path / "cache", nodes_for(3), late))
    first, second, third = (row.get("incidents") or [] for row in rows(tmp_path / "run")[1:])
    assert first == third == []
    assert [f"client {ONE} " in str(note) for note in second] == [True]


@pytest.mark.slow
def test_a_reply_that_comes_twice_counts_once(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(3), replies_twice(at_fault))
    deploy(WORDS, tmp_path / "run", network)
    done = rows(tmp_path / "run")
    assert done[2]["incidents"] == ["a second reply to a message was ignored"]
    deploy(WORDS, tmp_path / "plain", Network(tmp_path / "cache", nodes_for(3)))
    wanted, found = summary_of(tmp_path / "plain"), summary_of(tmp_path / "run")
    assert found["weights_digest"] == wanted["weights_digest"]


class Undecodable(Network):
    """Where one client's reply is bytes that Flower cannot decode: it then gives none back."""

    @override
    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        found = list(super().pull_messages(message_ids))
        for reply in found:
            if reply.metadata.group_id == str(ROUND) and reply.metadata.src_node_id == 993:
                raise ValueError("invalid object\x1b content")
        return found


def test_a_reply_that_cannot_be_decoded_is_found_in_the_next_try(tmp_path: Path) -> None:
    network = Undecodable(tmp_path / "cache", nodes_for(3))
    deploy([*WORDS, "engine.retries=1"], tmp_path / "run", network)
    done = rows(tmp_path / "run")
    (said,) = done[2]["incidents"]  # type: ignore[misc, has-type]
    assert said.startswith(r"run again: a client's reply cannot be decoded (invalid object\x1b")
    (failure,) = done[2]["failures"]  # type: ignore[misc, has-type]
    assert failure["client"] == ONE
    assert r"be decoded: invalid object\x1b" in failure["reason"]
    check_mean_of_the_rest(tmp_path / "run", network)


@pytest.mark.slow
def test_an_error_that_nobody_foresaw_leaves_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the reading of a round may still raise: nothing of the rounds before is lost."""
    network = Network(tmp_path / "cache", nodes_for(3))
    read = Exchange._used

    def broken(exchange: Exchange) -> Uplinks:
        if exchange.round_ == ROUND:
            raise TypeError("'int' object is not iterable")
        return read(exchange)

    monkeypatch.setattr(Exchange, "_used", broken)
    with pytest.raises(ClientError, match=r"round 2: .*TypeError: 'int'"):
        deploy(["output.checkpoint_every=9"], tmp_path / "run", network)
    monkeypatch.undo()
    deploy(["output.checkpoint_every=9"], tmp_path / "run", network, resume=True)
    deploy([], tmp_path / "plain", Network(tmp_path / "cache", nodes_for(3)))
    wanted, found = summary_of(tmp_path / "plain"), summary_of(tmp_path / "run")
    assert found["weights_digest"] == wanted["weights_digest"]


# ---- Rounds with too few ------------------------------------------------------------------------


@pytest.mark.slow
def test_a_round_with_too_few_is_run_again(tmp_path: Path) -> None:
    """All are wanted, and one fails once: the run is the one in which nothing failed."""
    network = Network(tmp_path / "cache", nodes_for(3), raises(Once(at_fault)))
    deploy([], tmp_path / "run", network)
    done = rows(tmp_path / "run")
    assert done[2]["failures"] == []
    said, back = done[2]["incidents"]  # type: ignore[misc, has-type]
    assert "client 1 is back" in back
    assert "run again: round 2: 1 client(s) failed, engine.min_clients=all. client 1: OSE" in said
    deploy([], tmp_path / "plain", Network(tmp_path / "cache", nodes_for(3)))
    wanted, found = summary_of(tmp_path / "plain"), summary_of(tmp_path / "run")
    assert found["weights_digest"] == wanted["weights_digest"]


def moved(row: Mapping[str, object], *names: str) -> list[int]:
    return [int(str(row[f"{name}_bytes"])) for name in names]


@pytest.mark.slow
def test_a_round_that_is_run_again_counts_what_both_attempts_sent(tmp_path: Path) -> None:
    """Three are asked twice; two answer the first time, and have caught up; all the second."""
    network = Network(tmp_path / "cache", nodes_for(3), raises(Once(at_fault)))
    deploy([], tmp_path / "run", network)
    deploy([], tmp_path / "plain", Network(tmp_path / "cache", nodes_for(3)))
    columns = ("uplink", "downlink", "catchup")
    found, once = (moved(rows(tmp_path / name)[2], *columns) for name in ("run", "plain"))
    assert 0 not in once
    assert [3 * n for n in found] == [5 * once[0], 6 * once[1], 4 * once[2]]
    payload = sum(sum(moved(row, *columns, "transport")) for row in rows(tmp_path / "run")[1:])
    assert payload == sum(message_bytes(m) for m in network.posted)


def test_a_message_counts_as_often_as_it_is_sent(tmp_path: Path) -> None:
    """Once more to a client that asks for every weight, and not at all to one that is not there."""
    make, _ = BEHAVIOURS["cannot settle on weights"]
    network = Network(tmp_path / "cache", nodes_for(3), make(at_fault))
    deploy([*WORDS, "engine.timeout=3"], tmp_path / "again", network)
    one, two, _ = (moved(row, "downlink")[0] for row in rows(tmp_path / "again")[1:])
    assert (one % 3, two) == (0, one // 3 * 4)
    deploy([*WORDS, "engine.wait=0.5"], tmp_path / "away", Network(tmp_path / "two", nodes_for(2)))
    assert [moved(row, "downlink")[0] for row in rows(tmp_path / "away")[1:]] == [one // 3 * 2] * 3


@pytest.mark.slow
@pytest.mark.parametrize("retries", [0, 2])
def test_then_the_run_stops_with_a_checkpoint_that_goes_on(retries: int, tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(3), raises(at_fault))
    words = [f"engine.retries={retries}"]
    with pytest.raises(ClientError, match=r"round 2: 1 client\(s\) failed, .*client 1: OSError"):
        deploy(words, tmp_path / "run", network)
    asked = [m for m in network.train_messages() if m.metadata.group_id == str(ROUND)]
    assert len(asked) == 2 * 3 * (1 + retries)
    assert not (tmp_path / "run" / "summary.json").exists()
    network.fault = None
    deploy(words, tmp_path / "run", network, resume=True)
    deploy([], tmp_path / "plain", Network(tmp_path / "cache", nodes_for(3)))
    wanted, found = summary_of(tmp_path / "plain"), summary_of(tmp_path / "run")
    assert found["weights_digest"] == wanted["weights_digest"]


def test_a_run_whose_clients_never_come_stops(tmp_path: Path) -> None:
    """What a node that cannot take part has said is in the error."""
    network = Network(tmp_path / "cache", {**nodes_for(1), 5: {}})
    said = r"1 of 3 clients were connected .* missing are \[1, 2\]; node .* partition-id=''"
    with pytest.raises(ClientError, match=said):
        deploy(["engine.wait=0.5", "engine.retries=1"], tmp_path / "run", network)
    assert not network.train_messages()


def test_a_search_for_the_rate_tries_no_other_rate_where_clients_never_come(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(2))
    words = ["local.lr=auto", "engine.wait=0.5", "engine.retries=0", "rounds=30"]
    with pytest.raises(AbsentError):
        deploy(words, tmp_path / "run", network)
    asked = {str(m.content["job"]["run"]) for m in network.sent if "job" in m.content}  # type: ignore[index]
    assert len(asked) == 1


def test_the_same_faults_end_a_simulation(tmp_path: Path) -> None:
    """There is nobody else to blame: max_failures=0, and nonsense is an error of the program."""
    with pytest.raises(Exception, match=r"engine=deploy .*max_failures=1"):
        deploy(["max_failures=1"], tmp_path / "run", Network(tmp_path / "cache", nodes_for(3)))
