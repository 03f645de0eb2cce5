"""Real clients answer a round once: whoever asks again gets the same bytes, or nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message

from fedraclora.engines.asks import read_ask
from fedraclora.engines.records import unfolded
from fedraclora.errors import ClientError, ConfigError
from fedraclora.experiments.faults.harms import Once, raises
from fedraclora.experiments.faults.network import (
    Fault,
    Network,
    client,
    deploy,
    nodes_for,
    over_the_wire,
    rows,
)
from tests.common import summary_of
from tests.messages import stage_in

ONCE = "output.checkpoint_every=1"
NOISY = ["local=dp_sgd", "local.lr=0.1", "local.dp.noise_multiplier=3", ONCE]
SECURE = ["clients=5", "clients_per_round=5", "aggregation_weights=uniform", "secure=secagg", ONCE]


def round_of_message(message: Message) -> int:
    return read_ask(unfolded(message.content)).request.round_


def asked(network: Network, who: int, round_: int) -> list[Message]:
    """The messages to a client in a round, in order."""
    return [
        m
        for m in network.train_messages()
        if not m.metadata.reply_to_message_id and client(m) == who and round_of_message(m) == round_
    ]


def again(message: Message) -> Message:
    """The same message once more."""
    found = Message(
        over_the_wire(message.content),
        dst_node_id=message.metadata.dst_node_id,
        message_type=message.metadata.message_type,
        group_id=message.metadata.group_id,
    )
    found.metadata.__dict__["_message_id"] = message.metadata.message_id
    return found


def numbers(network: Network, message: Message) -> bytes:
    """What a client sends for a message that reaches it (once more)."""
    reply = network.call(message)
    found: bytes = reply.content["arrays"]["flat"].numpy().tobytes()
    return found


def sent(network: Network, message: Message) -> bytes:
    """What it sent for it in the run."""
    (reply,) = [
        m
        for m in network.train_messages()
        if m.metadata.reply_to_message_id == message.metadata.message_id
    ]
    found: bytes = reply.content["arrays"]["flat"].numpy().tobytes()
    return found


def at_stage(stage: str, clients: set[int]) -> Callable[[Message], bool]:
    """Whether a message asks one of these clients for a stage."""

    def guilty(message: Message) -> bool:
        said = stage_in(message.content)
        return said is not None and said.name == stage and client(message) in clients

    return guilty


@pytest.mark.slow
def test_a_round_that_is_asked_twice_tells_nothing_new(tmp_path: Path) -> None:
    """The attack: the same round with another downlink, so that the same noise falls out."""
    network = Network(tmp_path / "cache", nodes_for(3))
    deploy([*NOISY, "rounds=2"], tmp_path / "run", network)
    (message,) = asked(network, 1, 2)
    assert numbers(network, again(message)) == sent(network, message)
    header = str(message.content["config"]["header"])
    for rate in ("0.0", "0.5"):
        other = again(message)
        other.content["config"]["header"] = header.replace(
            '"rate_scale": 1.0', f'"rate_scale": {rate}'
        )
        assert "A client answers a round once" in network.call(other).error.reason
    for round_, words in ((1, "answered round 2"), (3, "a round that the run does not have")):
        other = again(message)
        other.content["config"]["header"] = header.replace('"round_": 2', f'"round_": {round_}')
        assert words in network.call(other).error.reason


def test_noise_is_new_in_every_answer_that_is_computed(tmp_path: Path) -> None:
    """Where a disk is set back, two answers differ by two noises, not by the gradients alone."""
    network = Network(tmp_path / "cache", nodes_for(3))
    deploy([*NOISY, "rounds=1"], tmp_path / "run", network)
    (message,) = asked(network, 1, 1)
    first = np.frombuffer(sent(network, message), np.float32)
    (kept,) = (tmp_path / "cache" / "993").rglob("train.safetensors")
    kept.unlink()
    gap = np.frombuffer(numbers(network, again(message)), np.float32) - first
    assert float((gap == 0).mean()) < 0.01


@pytest.mark.slow
def test_a_server_that_is_restored_gets_the_answers_that_were_given(tmp_path: Path) -> None:
    """One client fails in the second round, the run stops, and goes on."""
    words, folder = [*NOISY, "rounds=3", "engine.retries=1"], tmp_path / "run"
    fault = raises(lambda m: client(m) == 2 and round_of_message(m) == 2)
    network = Network(tmp_path / "cache", nodes_for(3), fault)
    with pytest.raises(ClientError, match=r"round 2: 1 client\(s\) failed"):
        deploy(words, folder, network)
    network.fault = None
    deploy(words, folder, network, resume=True)
    for who in (0, 1):
        each = asked(network, who, 2)
        assert len(each) == 3  # once, once more, and by the server that was restored
        assert len({sent(network, m) for m in each}) == 1
    assert [row["failures"] for row in rows(folder)[1:]] == [[], [], []]
    assert torch.isfinite(torch.tensor(float(summary_of(folder)["metrics"]["loss"])))  # type: ignore[index]


@pytest.mark.slow
def test_a_secure_round_with_too_few_goes_on_where_it_failed(tmp_path: Path) -> None:
    """Whoever has sent its vector is not asked for another; the bits are those without a fault."""
    fault: Fault = raises(Once(at_stage("masked", {3})))
    network = Network(tmp_path / "cache", nodes_for(5), fault)
    deploy([*SECURE, "rounds=2"], tmp_path / "run", network)
    whole = Network(tmp_path / "whole", nodes_for(5))
    deploy([*SECURE, "rounds=2"], tmp_path / "plain", whole)
    found, wanted = summary_of(tmp_path / "run"), summary_of(tmp_path / "plain")
    assert found["weights_digest"] == wanted["weights_digest"]
    row = rows(tmp_path / "run")[1]
    assert row["failures"] == []
    assert "run again: round 1: 1 client(s) failed" in row["incidents"][0]  # type: ignore[index]
    stages = [
        [stage_in(m.content).name for m in asked(network, who, 1)]  # type: ignore[union-attr]
        for who in (0, 3)
    ]
    first = ["keys", "shares", "masked"]
    assert stages == [[*first, "unmask"], [*first, "masked", "unmask"]]
    once = rows(tmp_path / "plain")[1]
    ratio = [int(str(r["downlink_bytes"])) / 5 for r in (row, once)]
    assert ratio[0] == 6 * ratio[1] / 5  # to one of five twice
    assert row["uplink_bytes"] == once["uplink_bytes"]  # that one alone had not answered
    assert row["secure"]["down"] > once["secure"]["down"]  # type: ignore[index]


@pytest.mark.slow
def test_a_secure_round_that_was_cut_short_is_given_up(tmp_path: Path) -> None:
    """Vectors were sent, and no sum came: nobody sends another, and the run goes on."""
    words, folder = [*SECURE, "rounds=3", "engine.retries=0"], tmp_path / "run"
    fault = raises(lambda m: round_of_message(m) == 2 and at_stage("unmask", {*range(5)})(m))
    network = Network(tmp_path / "cache", nodes_for(5), fault)
    with pytest.raises(ClientError, match="too many clients dropped out"):
        deploy(words, folder, network)
    network.fault = None
    deploy(words, folder, network, resume=True)
    one, two, three = rows(folder)[1:]
    assert two["secure"]["lost"].startswith("the run was stopped after")  # type: ignore[index]
    assert "sends one in a round" in two["notes"][0]  # type: ignore[index]
    assert (one["secure"]["clients"], three["secure"]["clients"]) == (5, 5)  # type: ignore[index]
    assert summary_of(folder)["rounds"] == 3
    for who in range(5):
        names = [stage_in(m.content).name for m in asked(network, who, 2)]  # type: ignore[union-attr]
        assert names == ["keys", "shares", "masked", "unmask"]


def test_a_server_that_could_not_go_back_is_told_before_it_starts(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(3))
    for words in (["local=dp_sgd"], ["secure=secagg", "aggregation_weights=uniform"]):
        with pytest.raises(ConfigError, match=r"output\.checkpoint_every=1"):
            deploy(words, tmp_path / "run", network)
