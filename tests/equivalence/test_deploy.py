"""A deployment, its network in this process: the bits of inline, catch-up, and resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord

from fedraclora.clients.cache import CACHE, MARKER
from fedraclora.config.run_config import from_plain
from fedraclora.engines.records import clients_of
from fedraclora.experiments.faults.network import (
    Network,
    client,
    deploy,
    nodes_for,
    rows,
    small,
)
from fedraclora.flower_internals import message_bytes
from fedraclora.run.ledger import Row
from fedraclora.run.rebuild import state_at
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.runner import execute
from fedraclora.strategies.server.callbacks import RowCallback
from fedraclora.tree import digest
from fedraclora.weights.files import load_tensors, save_tensors
from fedraclora.weights.replica import read_stored_replica, replica_file
from tests.common import simulated, summary_of


def inline(words: list[str], folder: Path) -> dict[str, object]:
    simulated(small(words, folder, "inline"), folder)
    return summary_of(folder)


def file_of(network: Network, folder: Path, id_: int) -> Path:
    """The folder in which a client keeps what it holds."""
    (node,) = [n for n, config in network.nodes.items() if config["partition-id"] == id_]
    return network.cache / str(node) / CACHE / (folder / "run_id").read_text() / str(id_)


def base_at(folder: Path, version: int) -> str:
    return digest(state_at(folder, version).base)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["method=fed_rac_lora", "head=full", "bias=full"],
        ["method=pool_rac_lora", "method.pool=2", "clients=5", "clients_per_round=2"],
        ["method=fedavg_lora"],
        ["method=fedavg"],
        *(
            pytest.param(
                [f"method={name}", *more, "clients=5", "clients_per_round=2"],
                marks=pytest.mark.long,
            )
            for name, *more in (
                ("decomfl", "method.steps=2", "method.momentum=0.9", "local.lr=0.002"),
                ("fedkseed", "method.seeds=64", "local.lr=0.002"),
                ("fedkseed", "method.steps=3", "method.seeds=64", "method.pro=true"),
                ("ferret", "method.directions=16", "method.server_lr=0.05"),
            )
        ),
        pytest.param(
            ["method=subspace_rac_lora", "rounds=5", "clients=5", "clients_per_round=2"],
            marks=pytest.mark.long,
        ),
        [
            "compression.uplink=eden3",
            "compression.uplink_coding=zstd",
            "compression.downlink=int8",
            "compression.downlink_coding=zstd",
            "compression.feedback=true",
            "method.merge_every=2",
        ],
        pytest.param(
            [
                "compression.uplink=eden2",
                "compression.uplink_coding=zstd",
                "compression.downlink=eden2",
                "compression.downlink_coding=zstd",
                "clients=5",
                "clients_per_round=2",
            ],
            marks=pytest.mark.long,
        ),
        ["local=momentum", "rounds=4", "clients=5", "clients_per_round=2"],
        pytest.param(
            ["local.optimizer_state=rows", "local=adamw", "clients=5", "clients_per_round=2"],
            marks=pytest.mark.long,
        ),
        pytest.param(
            [
                "compression.downlink=int8",
                "compression.downlink_coding=zstd",
                "method=pool_rac_lora",
                "method.refresh=4",
                "rounds=6",
                "clients=5",
                "clients_per_round=2",
            ],
            marks=pytest.mark.long,
        ),
        [
            "pretrain=digits_0_4",
            "pretrain.epochs=1",
            "data.labels=[5,6,7,8,9]",
            "aggregation_weights=uniform",
        ],
    ],
    ids=lambda words: words[0],
)
def test_the_bits_and_the_ledger_are_those_of_inline(words: list[str], tmp_path: Path) -> None:
    wanted = inline(words, tmp_path / "inline")
    network = Network(tmp_path / "cache", nodes_for(5))
    deploy(words, tmp_path / "run", network)
    found = summary_of(tmp_path / "run")
    assert found["weights_digest"] == wanted["weights_digest"]
    if "pretrain" not in words[0]:  # else the simulation takes clients to hold the initial weights
        assert found["ledger_digest"] == wanted["ledger_digest"]
    assert not any("incidents" in row for row in rows(tmp_path / "run"))


@pytest.mark.slow
def test_a_rate_that_a_deployment_finds_is_lower_and_gives_the_bits_of_inline(
    tmp_path: Path,
) -> None:
    """It cannot begin anew at a lower rate if it diverges, and so takes one at once."""
    found, words = {}, ["rounds=30"]
    network = Network(tmp_path / "cache", nodes_for(3))
    deploy([*words, "local.lr=auto"], tmp_path / "deploy", network)
    asked = {message.metadata.group_id for message in network.train_messages()}
    assert asked > {"1 of search 1", "2 of search 1", *map(str, range(1, 31))}
    inline([*words, "local.lr=auto"], tmp_path / "inline")
    for name in ("deploy", "inline"):
        found[name] = json.loads((tmp_path / name / "rates.json").read_text())["rate"]
    assert found["inline"] / found["deploy"] == pytest.approx(1.8, rel=0.05)
    fixed = inline([*words, f"local.lr={found['deploy']}"], tmp_path / "fixed")
    digests = {name: summary_of(tmp_path / name)["weights_digest"] for name in found}
    assert fixed["weights_digest"] == digests["deploy"] != digests["inline"]


@pytest.mark.slow
def test_whoever_was_away_ends_with_the_right_weights(tmp_path: Path) -> None:
    """One joins at round 50, one comes back after 20 rounds, one loses its disk."""
    folder = tmp_path / "run"
    everyone = nodes_for(3)
    names = {config["partition-id"]: node for node, config in everyone.items()}
    network = Network(
        tmp_path / "cache", {n: c for k, n in names.items() if k < 2 for c in [everyone[n]]}
    )

    def move(round_: int) -> None:  # takes effect with the next round
        if round_ == 49:
            network.nodes[names[2]] = everyone[names[2]]
        if round_ == 19:
            network.nodes.pop(names[1], None)
        if round_ == 39:  # under another node id
            network.nodes[names[1] + 1] = {
                **everyone[names[1]],
                "cache": f"{tmp_path}/cache/{names[1]}",
            }
        if round_ == 29:
            shutil.rmtree(network.cache / str(names[0]))

    network.on_round = move
    words = ["rounds=51", "engine.min_clients=1", "head=full", "local.epochs=1"]
    deploy(words, folder, network)
    found = rows(folder)
    absent = {r: {f["client"] for f in found[r]["failures"]} for r in (18, 19, 39, 40, 49, 50, 51)}  # type: ignore[attr-defined]
    assert absent == {18: {2}, 19: {1, 2}, 39: {1, 2}, 40: {2}, 49: {2}, 50: set(), 51: set()}
    wanted = base_at(folder, 50)
    run = (folder / "run_id").read_text()
    for k in range(3):
        held = read_stored_replica(network.cache / str(names[k]) / CACHE / run / str(k))
        assert held is not None
        assert (digest(held[0]), held[1]) == (wanted, 50)
    assert found[29]["incidents"] == ["client 0 was sent every base weight"]
    dense = sum(t.numel() * t.element_size() for t in held[0].values())
    assert 0 < int(str(found[40]["catchup_bytes"])) <= 2 * dense


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["changed", "cut short", "gone"])
def test_a_cache_that_is_not_what_it_was_is_replaced_once(harm: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    network = Network(tmp_path / "cache", nodes_for(3))

    def hurt(round_: int) -> None:
        if round_ == 3 and not hurt.__dict__.setdefault("done", False):
            hurt.__dict__["done"] = True
            file = replica_file(file_of(network, folder, 1))
            if harm == "gone":
                file.unlink()
            elif harm == "cut short":
                file.write_bytes(file.read_bytes()[:-3])
            else:
                base, meta = load_tensors(file, "")
                base["fc1.weight"] = base["fc1.weight"] + 1e-6
                save_tensors(file, base, meta, sync=False)

    network.on_round = hurt
    deploy([], folder, network)
    wanted = inline([], tmp_path / "inline")
    assert summary_of(folder)["weights_digest"] == wanted["weights_digest"]
    asked = [client(m) for m in network.train_messages() if m.metadata.dst_node_id != 1]
    assert sorted(asked) == [0, 0, 0, 1, 1, 1, 1, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["method=fedavg"],
        ["method=fed_rac_lora", "method.rank=90"],
        ["method=fedavg", "compression.uplink=int8", "compression.downlink=int8"],
    ],
)
def test_payload_of_the_ledger_is_what_is_serialized(words: list[str], tmp_path: Path) -> None:
    """Payloads of a megabyte and more: within 2 %, and each message holds one array for each."""
    network = Network(tmp_path / "cache", nodes_for(2))
    sized = [
        "model.hidden=[1024,1024]",
        "clients=2",
        "clients_per_round=2",
        "rounds=2",
        "local.steps=1",
    ]
    deploy([*sized, *words], tmp_path / "run", network)
    _, *done = rows(tmp_path / "run")
    payload = sum(int(str(r["uplink_total"])) + int(str(r["downlink_total"])) for r in done[-1:])
    serialized = sum(message_bytes(m) for m in network.posted)
    assert payload > 1 << 20
    assert payload < serialized < 1.02 * payload
    transport = sum(int(str(r["transport_bytes"])) for r in done)
    assert transport == serialized - payload
    for message in network.posted:
        records = [r for r in message.content.values() if isinstance(r, ArrayRecord)]
        assert all(len(r) == 1 for r in records)


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["local=momentum", "local.optimizer_state=merge", "method.merge_every=7"]]
)
def test_a_server_that_goes_on_from_a_checkpoint_takes_clients_back_with_it(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients are three rounds ahead of it, with moments of rounds that never were."""
    words = ["rounds=7", "output.checkpoint_every=3", *words]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    deploy(words, whole, Network(tmp_path / "cache-whole", nodes_for(3)))
    network = Network(tmp_path / "cache", nodes_for(3))

    def stop(_: object, row: Row) -> None:
        if row["round"] == 6:  # before its checkpoint
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("fedraclora.run.events.EventRecord.row", stop)
        with pytest.raises(KeyboardInterrupt):
            deploy(words, cut, network)
    held = read_stored_replica(file_of(network, cut, 0))
    assert held is not None
    assert held[1] == 5
    deploy(words, cut, network, resume=True)
    assert summary_of(cut)["weights_digest"] == summary_of(whole)["weights_digest"]
    dense = sum(t.numel() * t.element_size() for t in held[0].values())
    assert rows(cut)[4]["catchup_bytes"] == 3 * dense
    assert rows(cut)[5]["catchup_bytes"] == rows(whole)[5]["catchup_bytes"]


@pytest.mark.slow
def test_a_run_that_began_in_process_goes_on_deployed(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    words = ["rounds=4", "output.checkpoint_every=2"]
    wanted = inline(words, whole)

    def stop(row: Row) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt

    config = from_plain(small(words, cut, "inline"), METHODS)
    with pytest.raises(KeyboardInterrupt):
        execute(RunBuilder(config, cut, callbacks=[RowCallback(stop)]))
    network = Network(tmp_path / "cache", nodes_for(3))
    deploy(words, cut, network, resume=True)
    assert summary_of(cut)["weights_digest"] == wanted["weights_digest"]
    incidents = [line for row in rows(cut) for line in row.get("incidents", [])]
    assert incidents[0] == 'goes on with engine.name: "inline" -> "deploy"'
    assert ["after round 2" in line for line in incidents[1:]] == [True]  # what was run again
    # The links lead on from version 0, which clients can make themselves. Biases, which
    # are replaced, are sent once: 12 and 10 numbers to each of 3 clients.
    found, each = rows(cut), int(str(rows(whole)[2]["catchup_bytes"]))
    assert [row.get("catchup_bytes") for row in found[3:]] == [2 * each - 3 * 22 * 4, each]


@pytest.mark.slow
def test_clients_are_found_wherever_they_are(tmp_path: Path) -> None:
    """Two on one node, one claimed twice, one node that serves nobody."""
    nodes: dict[int, dict[str, bool | bytes | float | int | str]] = {
        5: {"partition-ids": "2, 0"},
        3: {"partition-id": 1},
        9: {"partition-id": 1},
        8: {},
    }
    network = Network(tmp_path / "cache", nodes)
    deploy([], tmp_path / "run", network)
    assert (
        summary_of(tmp_path / "run")["weights_digest"]
        == inline([], tmp_path / "inline")["weights_digest"]
    )
    used = {
        m.metadata.dst_node_id: clients_of(m.content)
        for m in network.train_messages()
        if m.metadata.dst_node_id != 1
    }
    assert used == {5: [0, 2], 3: [1]}
    said = " ".join(map(str, rows(tmp_path / "run")[1]["incidents"]))  # type: ignore[call-overload]
    assert "client 1: served by node 3," in said
    assert "does not take part: ConfigError: node-config partition-id=''" in said


@pytest.mark.slow
def test_the_cache_of_a_node_keeps_few_runs(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(3))
    for i in range(6):
        deploy(["rounds=1"], tmp_path / f"run{i}", network)
    kept = {p.name for p in (network.cache / "1000" / CACHE).iterdir()} - {MARKER}
    wanted = {(tmp_path / f"run{i}" / "run_id").read_text() for i in range(6)[-4:]}
    assert kept == wanted


def test_aligned_copies(tmp_path: Path) -> None:
    """What an update brings lies as torch allocates it: matrix products round by alignment."""
    network = Network(tmp_path / "cache", nodes_for(3))
    deploy(["rounds=1"], tmp_path / "run", network)
    held = read_stored_replica(file_of(network, tmp_path / "run", 0))
    assert held is not None
    assert all(isinstance(t, torch.Tensor) and t.data_ptr() % 64 == 0 for t in held[0].values())
