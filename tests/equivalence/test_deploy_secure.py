"""Secure aggregation and privacy on the nodes of a deployment, its network in this process."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Message

from fedraclora.clients.secure import MEASUREMENTS
from fedraclora.engines.deploy.control import COMPLETED
from fedraclora.engines.deploy.local import LocalDeployment
from fedraclora.engines.records import clients_of
from fedraclora.errors import ConfigError
from fedraclora.experiments.faults.harms import raises
from fedraclora.experiments.faults.network import Network, deploy, nodes_for, rows, small
from fedraclora.experiments.faults.real import Drill, end_node
from fedraclora.experiments.faults.trials import absent
from fedraclora.privacy.secret import KEY_FILE
from fedraclora.run.client_state import ClientStore
from fedraclora.run.ledger import number
from fedraclora.weights.files import load_tensors
from fedraclora.weights.links import read_links
from tests.common import simulated, summary_of
from tests.messages import stage_in

ONCE = "output.checkpoint_every=1"  # real clients answer a round once
SECURE = [
    "clients=5",
    "clients_per_round=5",
    "aggregation_weights=uniform",
    "secure=secagg",
    "rounds=2",
    ONCE,
]

TOOK = {"uplink_bytes", "downlink_bytes", "texts_up", "texts_down"}


@pytest.mark.slow
def test_the_bits_are_those_of_a_simulation_and_keys_are_forgotten(tmp_path: Path) -> None:
    simulated(small(SECURE, tmp_path / "inline", "inline"), tmp_path / "inline")
    network = Network(tmp_path / "cache", nodes_for(5))
    deploy(SECURE, tmp_path / "run", network)
    found, wanted = summary_of(tmp_path / "run"), summary_of(tmp_path / "inline")
    assert found["weights_digest"] == wanted["weights_digest"]
    assert not any(row.get("failures") for row in rows(tmp_path / "run"))
    files = list((tmp_path / "cache").rglob("kept.safetensors"))
    assert len(files) == 5
    for path in files:
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        store = ClientStore()
        store.restore(load_tensors(path, "")[0])
        assert set(store.secrets.values()) == {b'{"answered": 2}'}


def test_the_server_sees_masks_and_sealed_shares_only(tmp_path: Path) -> None:
    """Between machines nothing of a client's own is in any message."""
    network = Network(tmp_path / "cache", nodes_for(5))
    deploy([*SECURE, "rounds=1"], tmp_path / "run", network)
    sizes = {
        (array.numpy().dtype.name, array.numpy().size)
        for message in network.train_messages()
        if stage_in(message.content) is not None
        for name, record in message.content.array_records.items()
        if name == "arrays"
        for array in record.values()
    }
    words = [size for kind, size in sizes if kind == "uint32"]
    assert len(words) == 1
    assert all(size == 0 for kind, size in sizes if kind != "uint32")
    assert not any("kept" in message.content for message in network.train_messages())


def at_stage(stage: str, client: int, reply: Callable[[Message], list[Message]]) -> object:
    """A fault of one client at one stage."""

    def fault(message: Message, answer: Callable[[], Message]) -> list[Message]:
        said = stage_in(message.content)
        if said is not None and said.name == stage and clients_of(message.content) == [client]:
            return reply(answer())
        return [answer()]

    return fault


def nothing_of_it(message: Message) -> list[Message]:
    header = json.loads(str(message.content["config"]["header"]))
    header["stage"]["data"]["3"] = {"mask": "no key", "box": "no key"}
    message.content["config"] = ConfigRecord({"header": json.dumps(header)})
    return [message]


def wrong_words(message: Message) -> list[Message]:
    flat = message.content["arrays"]["flat"]
    message.content["arrays"]["flat"] = type(flat)(np.zeros((1, 3), dtype=np.uint32))
    return [message]


def twice(message: Message) -> list[Message]:
    return [message, message]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "reply", "words"),
    [
        ("keys", nothing_of_it, "keys: its reply"),
        ("shares", nothing_of_it, "shares: its reply"),
        ("masked", wrong_words, "the shape (1, 3)"),
        ("masked", twice, None),
    ],
)
def test_what_a_client_sends_amiss_is_its_failure_alone(
    stage: str, reply: Callable[[Message], list[Message]], words: str | None, tmp_path: Path
) -> None:
    network = Network(tmp_path / "cache", nodes_for(5))
    network.fault = at_stage(stage, 3, reply)  # type: ignore[assignment]
    deploy([*SECURE, "rounds=1", "engine.min_clients=4"], tmp_path / "run", network)
    failures = rows(tmp_path / "run")[-1]["failures"]
    assert isinstance(failures, list)
    if words is None:
        assert failures == []
        return
    (failure,) = failures
    assert failure["client"] == 3
    assert words in failure["reason"]
    assert number(rows(tmp_path / "run")[-1], "secure", "clients") == 4


@pytest.mark.slow
@pytest.mark.parametrize("least", [4, 5])
def test_a_client_that_is_gone_while_measurements_are_summed_is_left_out(
    least: int, tmp_path: Path
) -> None:
    """It trained, and its masks are taken off the sum of what the others measured, if enough do."""

    def lost(message: Message) -> bool:
        said = stage_in(asked := message.content)
        measured = said is not None and said.name == "masked" and MEASUREMENTS in said.settings
        return measured and clients_of(asked) == [3]

    network = Network(tmp_path / "cache", nodes_for(5), raises(lost))
    words = ["rounds=1", "evaluate.clients=round", f"evaluate.min_clients={least}"]
    deploy([*SECURE, *words], tmp_path / "run", network)
    for row in rows(tmp_path / "run"):
        found: Any = row["clients"]
        if least > 4:
            assert {*found} - TOOK == {"withheld", "failures"}
            continue
        assert (found["in_sum"], found["n"]) == (4, 4)
        assert 0 <= found["accuracy"]["mean"] <= 1
        (failure,) = found["failures"]
        assert failure["client"] == 3
    assert number(rows(tmp_path / "run")[1], "secure", "clients") == 5


@pytest.mark.slow
def test_the_noise_of_a_real_client_is_not_in_the_seed(tmp_path: Path) -> None:
    words = ["local=dp_sgd", "rounds=1", "local.lr=0.1", ONCE]
    digests = []
    for name in ("one", "two"):
        network = Network(tmp_path / name / "cache", nodes_for(3))
        deploy(words, tmp_path / name / "run", network)
        digests.append(summary_of(tmp_path / name / "run")["weights_digest"])
        answers = list((tmp_path / name / "cache").rglob("answers/train.safetensors"))
        assert len(answers) == 3
        assert {stat.S_IMODE(path.stat().st_mode) for path in answers} == {0o600}
        assert number(rows(tmp_path / name / "run")[-1], "sample_privacy", "epsilon") > 0
    assert digests[0] != digests[1]


@pytest.mark.slow
def test_the_same_key_gives_the_same_private_deployment(tmp_path: Path) -> None:
    words = [
        "privacy=client_level",
        "privacy.delta=1e-3",
        "aggregation_weights=uniform",
        "clients_per_round=2",
    ]
    words += ["output.checkpoint_every=1"]
    network = Network(tmp_path / "cache", nodes_for(3))
    deploy([*words, "rounds=4"], tmp_path / "run", network)
    key = (tmp_path / "run" / KEY_FILE).read_bytes()
    whole = summary_of(tmp_path / "run")
    again = Network(tmp_path / "again", nodes_for(3))
    (tmp_path / "cut" / KEY_FILE.parent).mkdir(parents=True)
    (tmp_path / "cut" / KEY_FILE).write_bytes(key)
    deploy([*words, "rounds=4"], tmp_path / "cut", again)
    assert summary_of(tmp_path / "cut")["weights_digest"] == whole["weights_digest"]


def test_an_attack_is_for_simulations(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", nodes_for(3))
    with pytest.raises(ConfigError, match="engine=deploy does not go with an attack"):
        deploy(["attack=sign_flip"], tmp_path / "run", network)


@pytest.mark.long
def test_secure_sums_of_real_nodes_of_which_one_is_killed(tmp_path: Path) -> None:
    """Four SuperNodes with TLS; one dies in the second round, with a client process in it."""
    words = ["clients=4", "clients_per_round=4", "rounds=2", "aggregation_weights=uniform", ONCE]
    secured = [*words, "secure=secagg", "secure.clip=100"]
    with LocalDeployment([[0], [1], [2], [3]]) as running:
        job = Drill(running, tmp_path / "run", secured)
        job.begin()
        job.rounds_until(1)
        job.catch(3)
        end_node(running, 3, killed=True)
        assert job.end().word == COMPLETED
    first, second = rows(tmp_path / "run")[1:]
    assert first["failures"] == []
    assert [f["client"] for f in second["failures"]] == [3]  # type: ignore[attr-defined]
    assert (number(first, "secure", "clients"), number(second, "secure", "clients")) == (4, 3)
    for name, asked in (("secure", secured), ("plain", words)):
        network = Network(tmp_path / name / "cache", nodes_for(4), absent({2: [3]}))
        deploy([*asked, "engine.min_clients=1"], tmp_path / name / "run", network)
    found = summary_of(tmp_path / "run")["weights_digest"]
    assert found == summary_of(tmp_path / "secure" / "run")["weights_digest"]
    # Round 1 began from the same weights: the mean is as near to the plain one as the ledger says.
    bound = number(first, "secure", "error_bound")
    got, want = (
        {round_: link for round_, link, _ in read_links(tmp_path / name / "chain")}[1]
        for name in ("run", "plain/run")
    )
    assert got.keys() == want.keys()
    gap = max(float((got[n].double() - want[n].double()).abs().max()) for n in got)
    rounding = max(float(t.abs().max()) for t in want.values()) * 2.0**-23
    assert 0 < gap <= bound + rounding
