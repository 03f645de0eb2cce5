"""A node with several clients: one message for all of them, and each is as if it were alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

from fedraclora.clients import node as client_node
from fedraclora.clients import respond
from fedraclora.engines.deploy import grid
from fedraclora.engines.node_config import served
from fedraclora.engines.records import clients_of
from fedraclora.errors import ClientError, ConfigError
from fedraclora.experiments.faults.harms import header, stays_silent, vector
from fedraclora.experiments.faults.network import Network, deploy, rows, small
from fedraclora.experiments.faults.trials import absent, final_weights
from fedraclora.flower_internals import message_bytes
from tests.common import simulated, summary_of

NODES: dict[int, dict[str, Any]] = {
    11: {"partition-ids": "0, 2,5"},
    7: {"partition-id": 3},
    9: {"partition-ids": "4,6 1"},
}
IN_A_ROW: dict[int, dict[str, Any]] = {5: {"partition-ids": "0-3"}, 3: {"partition-ids": "4-6"}}
SEVEN = ["clients=7", "clients_per_round=7", "rounds=2"]
ONCE = "output.checkpoint_every=1"


def in_process(words: list[str], folder: Path, engine: str = "inline") -> dict[str, object]:
    simulated(small([*SEVEN, *words], folder, engine), folder)
    return summary_of(folder)


def asked(network: Network) -> list[Message]:
    """The train messages to nodes."""
    return [m for m in network.train_messages() if not m.metadata.reply_to_message_id]


def who(message: Message) -> list[int]:
    return clients_of(message.content)


@pytest.mark.parametrize(
    "words",
    [
        ["head=full", "evaluate.clients=round", "clients_per_round=5"],
        pytest.param(
            [
                "compression.uplink=int4",
                "compression.downlink=int8",
                "compression.feedback=true",
                "method.merge_every=2",
            ],
            marks=pytest.mark.long,
        ),
        ["method.sketches=2", "compression.uplink=int8"],
        pytest.param(
            ["secure=secagg", "aggregation_weights=uniform", ONCE], marks=pytest.mark.slow
        ),
        pytest.param(["method=fedsa_lora", "evaluate.clients=all"], marks=pytest.mark.long),
    ],
    ids=lambda words: words[0],
)
def test_one_message_a_node_has_the_bits_of_one_for_each_client(
    words: list[str], tmp_path: Path
) -> None:
    network = Network(tmp_path / "cache", NODES)
    deploy([*SEVEN, *words], tmp_path / "run", network)
    wanted = in_process(words, tmp_path / "inline")
    assert summary_of(tmp_path / "run")["weights_digest"] == wanted["weights_digest"]
    for mine, plain in zip(rows(tmp_path / "run"), rows(tmp_path / "inline"), strict=True):
        same = {"train_loss", "local_steps", "failures", "uplink_bytes", "notes"}
        assert {k: mine.get(k) for k in same} == {k: plain.get(k) for k in same}
        by_clients: list[Any] = [dict(row.get("clients", {})) for row in (mine, plain)]
        for column in by_clients:  # what all clients of a node share goes there once
            column.pop("downlink_bytes", None)
        assert by_clients[0] == by_clients[1]
        assert "incidents" not in mine
    stages = 4 if "secure=secagg" in words else 1
    measured = 3 if any("evaluate.clients" in word for word in words) else 0
    assert len(asked(network)) == len(NODES) * (2 * stages + measured)


@pytest.mark.slow
def test_chunks_that_lie_on_one_node_have_the_bits_of_vectorized(tmp_path: Path) -> None:
    words = ["engine.chunk=4", "head=full"]
    deploy([*SEVEN, *words], tmp_path / "run", Network(tmp_path / "cache", IN_A_ROW))
    wanted = in_process(words, tmp_path / "vectorized", "vectorized")
    assert summary_of(tmp_path / "run")["weights_digest"] == wanted["weights_digest"]
    assert wanted["chunk"] == summary_of(tmp_path / "run")["chunk"] == 4
    assert not any("incidents" in row for row in rows(tmp_path / "run"))
    deploy([*SEVEN, *words], tmp_path / "cut", Network(tmp_path / "cache", NODES))
    (said,) = [line for row in rows(tmp_path / "cut") for line in row.get("incidents", [])]  # type: ignore[attr-defined]
    assert "engine.chunk=4" in said
    losses = [[r.get("train_loss") for r in rows(tmp_path / name)[1:]] for name in ("run", "cut")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_weights_and_what_all_share_are_sent_to_a_node_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where its clients are too many for one message; the count is that of the messages."""
    words = [*SEVEN, "method=fedavg", "compression.downlink=int8", "rounds=3"]
    alone = {900 + k: {"partition-id": k} for k in range(7)}
    sizes, digests = {}, set()
    for name, nodes in (("alone", alone), ("one", NODES), ("several", NODES)):
        if name == "several":
            monkeypatch.setattr(grid, "MOST", 1)
        network = Network(tmp_path / name / "cache", nodes)
        deploy(words, tmp_path / name / "run", network)
        done = rows(tmp_path / name / "run")
        columns = ("downlink_bytes", "catchup_bytes")
        sizes[name] = [[int(str(row[column])) for row in done[1:]] for column in columns]
        digests.add(summary_of(tmp_path / name / "run")["weights_digest"])
        payload = sum(int(str(done[-1][f"{k}_total"])) for k in ("uplink", "downlink"))
        transport = sum(int(str(row["transport_bytes"])) for row in done[1:])
        assert payload + transport == sum(map(message_bytes, network.posted))
        by_node = [ways for row in done[1:] for ways in row["transport"].values()]  # type: ignore[attr-defined]
        assert sum(sum(ways.values()) for ways in by_node) == payload + transport
    assert len(digests) == 1
    (down, fetched), (one, once), (several, twice) = (sizes[n] for n in ("alone", "one", "several"))
    assert fetched[1] > 0
    assert [7 * n for n in once] == [3 * n for n in fetched]
    assert once == twice
    assert [7 * n for n in one] == [3 * n for n in down]
    assert several == down


def test_a_reply_of_several_clients_is_a_message_of_one_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each record more is three objects: as many requests at each of three hops."""
    replies = dict[int, set[tuple[str, ...]]]()

    def noted(message: Message, context: Context) -> Message:
        reply = respond.respond(message, context)
        if message.metadata.message_type != "query.partition":
            replies.setdefault(message.metadata.dst_node_id, set()).add((*reply.content,))
        return reply

    monkeypatch.setattr(respond, "APART", 1)
    monkeypatch.setattr("fedraclora.experiments.faults.network.respond", noted)
    deploy(SEVEN, tmp_path / "run", Network(tmp_path / "cache", NODES))
    assert replies == {11: {("job",)}, 9: {("job",)}, 7: {("arrays", "job")}}


@pytest.mark.slow
def test_a_client_of_a_node_that_fails_is_left_out_alone(tmp_path: Path) -> None:
    """One raises as it trains; one sends what cannot be used; of one whose node is cut nothing."""
    broken = tmp_path / "cache" / "11"
    network = Network(tmp_path / "cache", NODES)

    def fault(message: Message, call: Callable[[], Message]) -> list[Message]:
        round_, node = int(message.metadata.group_id), message.metadata.dst_node_id
        if (round_, node) == (2, 11):  # what is kept of client 2 is damaged
            for file in broken.rglob("2/kept.safetensors"):
                file.write_bytes(file.read_bytes()[:-3])
        reply = call()
        if (round_, node) == (3, 9):
            poisoned(reply.content)
        if (round_, node) == (4, 9):
            vector("samples", 5, -5, 5)(reply.content)
        if (round_, node) == (5, 9):
            vector("clients", 1, 4, 5)(reply.content)
        if (round_, node) == (6, 9):
            header(version=1)(reply.content)
        return [reply]

    network.fault = fault
    words = [*SEVEN, "rounds=6", "local=momentum", "local.optimizer_state=merge"]
    words += ["method.merge_every=7", "engine.min_clients=1"]
    deploy(words, tmp_path / "run", network)
    failures: list[Any] = [row["failures"] for row in rows(tmp_path / "run")[1:]]
    ids = [[f["client"] for f in each] for each in failures]
    assert ids == [[], [2], [2, 4], [2, 4], [1, 2, 4, 6], [1, 2, 4, 6]]
    for words_, why in (
        ("restore it, or remove it", failures[1][0]),
        ("a NaN or an infinity", failures[2][1]),
        ("[-5] samples", failures[3][1]),
        ("clients [1, 4, 5]", failures[4][0]),
        ("from version 1", failures[5][0]),
    ):
        assert words_ in why["reason"]


def poisoned(content: RecordDict) -> None:
    """Put a NaN into what the second client of a reply sends."""
    flat = np.array(content["arrays"]["flat"].numpy())  # type: ignore[union-attr]
    flat[1, 0] = np.nan
    content["arrays"] = ArrayRecord({"flat": Array(flat)})


@pytest.mark.slow
def test_a_silent_node_loses_its_clients_each_by_name(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", NODES)
    network.fault = stays_silent(
        lambda m: m.metadata.dst_node_id == 9 and m.metadata.group_id == "2"
    )
    words = [*SEVEN, "rounds=3", "engine.min_clients=4", "engine.timeout=2"]
    deploy(words, tmp_path / "run", network)
    failures: list[Any] = [row["failures"] for row in rows(tmp_path / "run")[1:]]
    assert [[f["client"] for f in each] for each in failures] == [[], [1, 4, 6], []]
    assert {f["reason"] for f in failures[1]} == {"no reply in time"}
    wanted = final_weights([*words, "engine.min_clients=1"], absent({2: [1, 4, 6]}), 7)
    assert summary_of(tmp_path / "run")["weights_digest"] == wanted


def test_what_a_client_of_a_node_answers_once_it_answers_once(tmp_path: Path) -> None:
    """Asked again with others, or alone, it gives the same; nothing to another question."""
    words = [*SEVEN, "rounds=1", "local=dp_sgd", "local.dp.noise_multiplier=3", ONCE]
    network = Network(tmp_path / "cache", NODES)
    deploy([*words, "engine.chunk=7"], tmp_path / "run", network)
    (message,) = [m for m in asked(network) if m.metadata.dst_node_id == 11]
    first, again = (numbers(network.call(message)) for _ in range(2))
    assert torch.equal(first, again)
    (kept,) = (tmp_path / "cache" / "11").rglob("2/answers/train.safetensors")
    kept.unlink()
    other = numbers(network.call(message))
    assert torch.equal(other[[0, 2]], first[[0, 2]])
    assert not torch.equal(other[1], first[1])
    text = str(message.content["config"]["header"])
    other_rate = text.replace('"rate_scale": 1.0', '"rate_scale": 0.5')
    message.content["config"]["header"] = other_rate
    failures = str(network.call(message).content["config"]["header"])
    assert failures.count("answers a round once") == 3


def numbers(reply: Message) -> torch.Tensor:
    return torch.from_numpy(np.array(reply.content["arrays"]["flat"].numpy()))


def test_a_node_of_another_format_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_node, "FORMAT", 1)
    said = "format 1.*one release"
    with pytest.raises(ClientError, match=said):
        deploy([*SEVEN, "engine.wait=0.5"], tmp_path / "run", Network(tmp_path / "cache", NODES))


@pytest.mark.parametrize(
    ("text", "clients"), [("0-2", [0, 1, 2]), ("4, 1-2 4", [4, 1, 2]), ("7", [7])]
)
def test_clients_of_a_node_are_numbers_and_spans(text: str, clients: list[int]) -> None:
    assert served({"partition-ids": text}) == clients


@pytest.mark.parametrize("text", ["", "0,x", "3-1", "-1", "1-", "0-99999999999"])
def test_clients_of_a_node_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"partition-ids='.*'0-124'"):
        served({"partition-ids": text})
