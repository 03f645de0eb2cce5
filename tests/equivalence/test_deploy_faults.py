"""Whatever a client does, it harms itself alone: refused by name, and the mean is of the rest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from deployed import Network, client, deploy, nodes_for, over_the_wire, rows, small, summary
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedraclora.build import build_task, plan_of
from fedraclora.config import from_plain
from fedraclora.errors import ClientError
from fedraclora.runbook import weights_at
from fedraclora.sketch import SketchSpec
from fedraclora.wire import unpack_downlink, unpack_trial, uplink_layout
from strategies import METHODS

ONE = 1  # the client at fault
ROUND = 2  # when
Harm = Callable[[RecordDict], None]


def numbers(change: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    def harm(content: RecordDict) -> None:
        record = ArrayRecord()
        old = torch.from_numpy(content["arrays"]["flat"].numpy())  # type: ignore[union-attr]
        record["flat"] = Array(np.ascontiguousarray(change(old).numpy()))
        content["arrays"] = record

    return harm


def header(**changes: object) -> Harm:
    def harm(content: RecordDict) -> None:
        old = json.loads(str(content["config"]["header"]))
        content["config"] = ConfigRecord({"header": json.dumps({**old, **changes})})

    return harm


def vector(name: str, *values: float, dtype: type = np.int64) -> Harm:
    def harm(content: RecordDict) -> None:
        content["chunk"][name] = np.array(values, dtype).tobytes()  # type: ignore[index]

    return harm


def filled(value: float) -> Harm:
    return numbers(lambda t: torch.cat([t[:, :-1], torch.full_like(t[:, :1], value)], dim=1))


def without(name: str) -> Harm:
    return lambda content: content.__delitem__(name)


def proof(content: RecordDict) -> None:
    content["job"] = ConfigRecord({"held": ROUND - 1, "mark": "123"})


HARMS: dict[str, tuple[Harm, str]] = {
    "NaN": (filled(float("nan")), "its update has a NaN or an infinity"),
    "infinity": (filled(float("inf")), "its update has a NaN or an infinity"),
    "a loss that is no number": (
        vector("losses", float("nan"), dtype=np.float64),
        "its training loss is nan",
    ),
    "too few numbers": (numbers(lambda t: t[:, 1:]), "wanted (1, "),
    "another shape": (numbers(lambda t: t.mT), "wanted (1, "),
    "two rows": (numbers(lambda t: torch.cat([t, t])), "wanted (1, "),
    "another dtype": (numbers(torch.Tensor.double), "its numbers are torch.float64"),
    "whole numbers": (numbers(torch.Tensor.int), "its numbers are torch.int32"),
    "another round": (header(round=ROUND - 1), "answered for round 1 from version 1"),
    "another version": (header(version=0), "answered for round 2 from version 0"),
    "another layout": (header(layout=[["w", [66]]]), "wanted {"),
    "a sum": (header(reduced=True), "reduced=True"),
    "another client": (vector("clients", 2), "the reply is of clients [2], asked were [1]"),
    "two clients": (vector("clients", 1, 2), "with 2 ids"),
    "another place": (lambda c: c["chunk"].__setitem__("first", 0), "the reply is of place 0"),  # type: ignore[union-attr, list-item]
    "no header": (without("config"), "wanted the records config, arrays and chunk"),
    "no JSON": (
        lambda c: c.__setitem__("config", ConfigRecord({"header": "{"})),
        "its reply is refused",
    ),
    "no numbers": (without("arrays"), "wanted the records config, arrays and chunk"),
    "other weights": (proof, "it trained on weights of version and fingerprint (1, '123')"),
    "no proof": (without("job"), "it trained on weights of version and fingerprint None"),
    "negative samples": (vector("samples", -5), "it claims [-5] samples; 1 to 10000000"),
    "no samples": (vector("samples", 0), "it claims [0] samples"),
    "too many samples": (vector("samples", 2**62), "it claims [4611686018427387904] samples"),
    "samples that are no number": (
        vector("samples", float("nan"), dtype=np.float64),
        "it claims [9221120237041090560] samples",
    ),
    "negative steps": (vector("steps", -1), "it claims [-1] steps"),
    "a refusal of another": (header(refused=[[2, "so there"]]), "the reply is of clients [1, 2]"),
}


def at_fault(message: Message) -> bool:
    return client(message) == ONE and message.metadata.group_id == str(ROUND)


def changed(harm: Harm) -> Callable[[Message, Callable[[], Message]], list[Message]]:
    def fault(message: Message, call: Callable[[], Message]) -> list[Message]:
        reply = call()
        if at_fault(message):
            harm(reply.content)
        return [reply]

    return fault


def check_mean_of_the_rest(folder: Path, network: Network) -> None:
    """W_2 = W_1 + s (sum of p_k B_k) A over the clients 0 and 2, worked out from the messages."""
    config = from_plain(small(WORDS, folder, "deploy"), METHODS)
    plan = plan_of(config, build_task(config).task)
    before, after = (weights_at(folder, version, plan) for version in (ROUND - 1, ROUND))
    sent = [m for m in network.train_messages() if m.metadata.group_id == str(ROUND)]
    downlink, _ = unpack_downlink(sent[0].content)
    layout = uplink_layout(downlink)
    asked = {m.metadata.message_id: client(m) for m in sent if m.metadata.message_id}
    found = {}
    for message in sent:
        k = asked.get(message.metadata.reply_to_message_id, ONE)
        if k != ONE:
            found[k] = unpack_trial(message.content, layout)
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
        spec = adapter.factors["A"].spec  # type: ignore[union-attr]
        assert isinstance(spec, SketchSpec)
        wanted = before[weight].double() + adapter.scale * tensor @ spec.draw()
        torch.testing.assert_close(after[weight].double(), wanted, rtol=0, atol=1e-6)
        assert (after[weight] - before[weight]).abs().max() > 1e-4


WORDS = ["engine.min_clients=2"]


@pytest.mark.parametrize("name", HARMS)
def test_what_cannot_be_used_is_refused_with_its_reason(name: str, tmp_path: Path) -> None:
    harm, reason = HARMS[name]
    network = Network(tmp_path / "cache", nodes_for(3), changed(harm))
    deploy(WORDS, tmp_path / "run", network)
    failures = [row["failures"] for row in rows(tmp_path / "run")[1:]]
    assert failures[0] == failures[2] == []
    (failure,) = failures[1]  # type: ignore[misc]
    assert failure["client"] == ONE
    assert reason in failure["reason"]
    check_mean_of_the_rest(tmp_path / "run", network)


def raises(message: Message, call: Callable[[], Message]) -> list[Message]:
    if at_fault(message):
        return [Message(Error(2, "OSError: the disk is gone"), reply_to=message)]
    return [call()]


def stays_silent(message: Message, call: Callable[[], Message]) -> list[Message]:
    return [] if at_fault(message) else [call()]


def trains_and_stays_silent(message: Message, call: Callable[[], Message]) -> list[Message]:
    reply = call()
    return [] if at_fault(message) else [reply]


def cannot_settle(message: Message, call: Callable[[], Message]) -> list[Message]:
    if at_fault(message):
        stale = RecordDict({"stale": ConfigRecord({"held": 0})})
        return [Message(stale, reply_to=message)]
    return [call()]


def is_misconfigured(message: Message, call: Callable[[], Message]) -> list[Message]:
    if at_fault(message):
        return [Message(Error(1000, "ConfigError: no such file"), reply_to=message)]
    return [call()]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (raises, "OSError: the disk is gone"),
        (stays_silent, "no reply in time"),
        (trains_and_stays_silent, "no reply in time"),
        (cannot_settle, "it asked for every base weight twice"),
        (is_misconfigured, "ConfigError: no such file"),
    ],
)
def test_a_client_that_does_not_answer_is_left_out(
    fault: Callable[[Message, Callable[[], Message]], list[Message]], reason: str, tmp_path: Path
) -> None:
    network = Network(tmp_path / "cache", nodes_for(3), fault)
    deploy([*WORDS, "engine.timeout=3"], tmp_path / "run", network)
    done = rows(tmp_path / "run")
    assert done[2]["failures"] == [{"client": ONE, "reason": reason}]
    assert done[3]["failures"] == []
    check_mean_of_the_rest(tmp_path / "run", network)
    asked = [m for m in network.train_messages() if m.metadata.dst_node_id == 993]
    assert len(asked) == (4 if fault is cannot_settle else 3)  # every weight is sent once more


def test_a_reply_that_comes_twice_counts_once(tmp_path: Path) -> None:
    def twice(message: Message, call: Callable[[], Message]) -> list[Message]:
        reply = call()
        if at_fault(message):
            return [reply, Message(over_the_wire(reply.content), reply_to=message)]
        return [reply]

    network = Network(tmp_path / "cache", nodes_for(3), twice)
    deploy(WORDS, tmp_path / "run", network)
    done = rows(tmp_path / "run")
    assert done[2]["incidents"] == ["a second reply to a message was ignored"]
    deploy(WORDS, tmp_path / "plain", Network(tmp_path / "cache", nodes_for(3)))
    wanted, found = summary(tmp_path / "plain"), summary(tmp_path / "run")
    assert found["weights_digest"] == wanted["weights_digest"]


def test_an_old_reply_played_again_is_refused(tmp_path: Path) -> None:
    old: list[RecordDict] = []

    def replay(message: Message, call: Callable[[], Message]) -> list[Message]:
        reply = call()
        if client(message) == ONE and not old:
            old.append(over_the_wire(reply.content))
        if at_fault(message):
            return [Message(old[0], reply_to=message)]
        return [reply]

    network = Network(tmp_path / "cache", nodes_for(3), replay)
    deploy(WORDS, tmp_path / "run", network)
    (failure,) = rows(tmp_path / "run")[2]["failures"]  # type: ignore[misc, has-type]
    assert failure["client"] == ONE
    assert "it trained on weights of version and fingerprint (0, " in failure["reason"]
    check_mean_of_the_rest(tmp_path / "run", network)


# ---- Rounds with too few ------------------------------------------------------------------------


def test_a_round_with_too_few_is_run_again(tmp_path: Path) -> None:
    """All are wanted, and one fails once: the run is the one in which nothing failed."""
    failed: list[Message] = []

    def once(message: Message, call: Callable[[], Message]) -> list[Message]:
        if at_fault(message) and not failed:
            failed.append(message)
            return [Message(Error(2, "OSError: the disk is gone"), reply_to=message)]
        return [call()]

    network = Network(tmp_path / "cache", nodes_for(3), once)
    deploy([], tmp_path / "run", network)
    done = rows(tmp_path / "run")
    assert done[2]["failures"] == []
    (said,) = done[2]["incidents"]  # type: ignore[misc, has-type]
    assert "run again: round 2: 1 client(s) failed, engine.min_clients=all. client 1: OSE" in said
    deploy([], tmp_path / "plain", Network(tmp_path / "cache", nodes_for(3)))
    wanted, found = summary(tmp_path / "plain"), summary(tmp_path / "run")
    assert found["weights_digest"] == wanted["weights_digest"]


@pytest.mark.parametrize("retries", [0, 2])
def test_then_the_run_stops_with_a_checkpoint_that_goes_on(retries: int, tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(3), raises)
    words = [f"engine.retries={retries}"]
    with pytest.raises(ClientError, match=r"round 2: 1 client\(s\) failed, .*client 1: OSError"):
        deploy(words, tmp_path / "run", network)
    asked = [m for m in network.train_messages() if m.metadata.group_id == str(ROUND)]
    assert len(asked) == 2 * 3 * (1 + retries)
    assert not (tmp_path / "run" / "summary.json").exists()
    network.fault = None
    deploy(words, tmp_path / "run", network, resume=True)
    deploy([], tmp_path / "plain", Network(tmp_path / "cache", nodes_for(3)))
    wanted, found = summary(tmp_path / "plain"), summary(tmp_path / "run")
    assert found["weights_digest"] == wanted["weights_digest"]


def test_a_run_whose_clients_never_come_stops(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(1))
    with pytest.raises(ClientError, match=r"1 of 3 clients were connected .* missing are \[1, 2\]"):
        deploy(["engine.wait=0.5", "engine.retries=1"], tmp_path / "run", network)
    assert not network.train_messages()


def test_the_same_faults_end_a_simulation(tmp_path: Path) -> None:
    """There is nobody else to blame: max_failures=0, and nonsense is an error of the program."""
    with pytest.raises(Exception, match="max_failures is 1, but with engine=deploy"):
        deploy(["max_failures=1"], tmp_path / "run", Network(tmp_path / "cache", nodes_for(3)))
