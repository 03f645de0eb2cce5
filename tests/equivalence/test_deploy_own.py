"""Data, model and loss of another package: the worked example of docs/deploy.md."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedraclora.clients import node as client_node
from fedraclora.clients.cache import CACHE
from fedraclora.commands import deploy
from fedraclora.compose.resume import resume_config
from fedraclora.data.encoders.array import SampleSpec, gathered
from fedraclora.data.per_client import read_own
from fedraclora.data.sources.own import own_samples
from fedraclora.errors import CheckpointError, ClientError, ConfigError, DataError
from fedraclora.experiments.faults.network import Network, composed, rows, serve
from fedraclora.experiments.faults.trials import absent
from fedraclora.imports import import_object
from fedraclora.run.ledger import number
from fedraclora.terminal.opening import introduction
from tests.campaigns.wire import raw
from tests.common import simulated, summary_of

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "deploy"
WORDS = [
    "data=own",
    "data.classes=10",
    "data.shape=[64]",
    "data.test_function=clinic.data:held_out",
    "data.loss=clinic.model:smoothed",
    "model=function",
    "model.function=clinic.model:network",
    "model.head=[classifier]",
    "+model.parameters.width=24",
    "method.rank=3",
    "method.alpha=2",
    "clients=3",
    "clients_per_round=3",
    "rounds=3",
    "local.lr=0.1",
    "head=full",
    "output=study",
]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the example's package were installed on every machine."""
    monkeypatch.syspath_prepend(str(EXAMPLE))


def run(folder: Path, network: Network, *words: str) -> None:
    serve(composed([*WORDS, "engine=deploy", f"output.dir={folder}", *words]), network)


@pytest.mark.slow
def test_each_node_trains_on_what_it_has(tmp_path: Path) -> None:
    """One from a file, one from a folder of several, one from a function: the bits of inline."""
    owner = import_object("data", "clinic.data:owner")
    for client, name in ((0, "own/train.npz"), (1, "shared/1.npz")):
        x, y = owner(client)
        (tmp_path / name).parent.mkdir()
        np.savez(tmp_path / name, x=x, target=y)
    nodes: dict[int, dict[str, bool | bytes | float | int | str]] = {
        7: {"partition-id": 0, "data": str(tmp_path / "own")},
        5: {"partition-id": 1, "data": str(tmp_path / "shared")},
        6: {"partition-id": 2, "data": "clinic.data:owner"},
    }
    run(tmp_path / "run", Network(tmp_path / "cache", nodes))
    inline = tmp_path / "inline"
    words = ["engine=inline", "data.samples=clinic.data:owner", f"output.dir={inline}"]
    simulated(composed([*WORDS, *words]), inline)
    found, wanted = summary_of(tmp_path / "run"), summary_of(inline)
    assert found["weights_digest"] == wanted["weights_digest"]
    assert [r.get("metrics") for r in rows(tmp_path / "run")] == [
        r.get("metrics") for r in rows(inline)
    ]
    assert rows(inline)[3]["metrics"]["loss"] < rows(inline)[0]["metrics"]["loss"]  # type: ignore[index]


def restarted() -> None:
    """What a node has in memory goes with its process."""
    client_node.trainer_for.cache_clear()
    client_node.checked_of.cache_clear()


def files_of(folder: Path, **changes: float) -> dict[int, dict[str, bool | float | int | str]]:
    """Write the samples of three clients, some with another first number; give their nodes."""
    folder.mkdir(exist_ok=True)
    owner = import_object("data", "clinic.data:owner")
    for client in range(3):
        x, y = owner(client)
        x = np.array(x)
        x[0, 0] += changes.get(f"client{client}", 0.0)
        np.savez(folder / f"{client}.npz", x=x, target=y)
    nodes = {2: {"partition-ids": "0-1"}, 1: {"partition-id": 2}}
    return {node: {**config, "data": str(folder)} for node, config in nodes.items()}


@pytest.mark.slow
@pytest.mark.parametrize(
    "words", [[], ["evaluate.clients=round"], ["local=dp_sgd", "local.dp.noise_multiplier=1"]]
)
def test_a_client_whose_samples_change_is_refused_by_name_and_nobody_else(
    words: list[str], tmp_path: Path
) -> None:
    """Between two rounds, as its node has ended in between; and it goes on once they are back."""
    nodes = files_of(tmp_path / "own")
    network = Network(tmp_path / "cache", nodes)  # type: ignore[arg-type]

    def move(round_: int) -> None:
        if round_ in {2, 4}:
            files_of(tmp_path / "own", client1=1e-3 if round_ == 2 else 0.0)
            restarted()

    network.on_round = move
    more = ["engine.min_clients=2", "rounds=4", "output.checkpoint_every=1", *words]
    run(tmp_path / "run", network, *more)
    failures: list[Any] = [row["failures"] for row in rows(tmp_path / "run")[1:]]
    assert [[f["client"] for f in each] for each in failures] == [[], [1], [1], []]
    for part in ("client 1: its samples ", "Restore the samples", "new run"):
        assert part in failures[1][0]["reason"]
    (note,) = (tmp_path / "cache" / "2" / CACHE).rglob("1/samples.json")
    assert note.stat().st_mode & 0o777 == 0o600
    digest = json.loads(note.read_text())["samples"]
    sent = [m for m in network.posted if m.has_content()]
    assert not any(digest.encode() in raw(m.content) for m in sent)  # it stays where it is


@pytest.mark.slow
def test_a_client_joins_a_run_that_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bits are those of a run that it belonged to from the start, and was away from."""
    monkeypatch.setenv("FEDRACLORA_TRUST", "clinic")
    nodes: dict[int, dict[str, bool | float | int | str]] = {
        n: {"partition-id": n, "data": "clinic.data:owner"} for n in range(3)
    }
    first, folder = Network(tmp_path / "cache", {n: nodes[n] for n in (0, 1)}), tmp_path / "run"
    samples = "data.samples=clinic.data:owner"
    words = [*WORDS, samples, "engine=deploy", "rounds=2", "clients=2", "clients_per_round=100%"]
    serve(composed([*words, f"output.dir={folder}"]), first)
    grown = deploy.prepare([f"resume={folder}", "clients=3", "rounds=4"], 3)
    serve(grown.plain, Network(tmp_path / "cache", nodes), resume=True)
    joined = rows(folder)
    assert [row["cohort"] for row in joined[1:]] == [2, 2, 3, 3]
    assert [row["failures"] for row in joined[1:]] == [[]] * 4
    assert "clients: 2 -> 3" in str(joined[3]["incidents"])
    assert number(joined[3], "catchup_bytes") > number(joined[4], "catchup_bytes")
    away = absent({1: [2], 2: [2]})
    network = Network(tmp_path / "other", nodes, away)
    run(tmp_path / "all", network, "engine.min_clients=2", "rounds=4")
    found, wanted = (summary_of(tmp_path / name) for name in ("run", "all"))
    assert found["weights_digest"] == wanted["weights_digest"]
    assert found["clients"] == 3


@pytest.mark.parametrize(
    ("words", "typed", "said"),
    [
        ([], ["clients=2"], "above 3"),
        ([], ["clients_per_round=2"], "above 3"),
        (["local=dp_sgd", "local.dp.noise_multiplier=1"], ["clients=4"], "dp_sgd"),
        (["engine=inline", "data.samples=clinic.data:owner"], ["clients=4"], "engine=deploy"),
    ],
)
def test_clients_of_a_run_neither_leave_nor_join_where_its_numbers_would_be_wrong(
    words: list[str], typed: list[str], said: str, tmp_path: Path
) -> None:
    stored = composed([*WORDS, "engine=deploy", *words])
    plain = composed([*WORDS, "engine=deploy", *words, *typed])
    with pytest.raises(CheckpointError, match=f"{typed[0].partition('=')[0]}: .*{said}"):
        resume_config(tmp_path, stored, plain, [typed[0].partition("=")[0]])


@pytest.mark.slow
def test_samples_that_change_before_a_run_goes_on_are_refused(tmp_path: Path) -> None:
    network = Network(tmp_path / "cache", files_of(tmp_path / "own"))  # type: ignore[arg-type]
    folder = tmp_path / "run"
    serve(composed([*WORDS, "engine=deploy", f"output.dir={folder}", "rounds=2"]), network)
    plain = composed([*WORDS, "engine=deploy", f"output.dir={folder}", "rounds=3"])
    files_of(tmp_path / "own", client2=-1e-6)
    restarted()
    with pytest.raises(ClientError, match=r"client 2: its samples .*begin a new run"):
        serve(plain, network, resume=True)
    files_of(tmp_path / "own")
    restarted()
    serve(plain, network, resume=True)
    restarted()
    serve(composed([*WORDS, "engine=deploy", f"output.dir={tmp_path / 'plain'}"]), network)
    digests = [summary_of(tmp_path / name)["weights_digest"] for name in ("run", "plain")]
    assert digests[0] == digests[1]


PARTS = """
from dataclasses import dataclass

import fedraclora
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.protocol.program import ClientProgram, GradientStage

@dataclass(frozen=True)
class Method(FedRacLora):
    boost: float = 1.0

@dataclass(frozen=True)
class Decay(ClientProgram):
    form = "decay={rate}"
    rate: float = 0.1

    def hooks(self, chunk):
        return {GradientStage.LOSS: lambda g, v: {n: g[n] + self.rate * v[n] for n in g}}

class Doubled(fedraclora.RoundStep):
    def columns(self, exchange, got):
        return {"doubled": 2.0}
"""


@pytest.mark.long
def test_parts_of_ones_own_have_the_bits_of_inline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Method, model, local step and round step are named, and each node imports them."""
    (tmp_path / "deployed_parts.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    nodes: dict[int, dict[str, bool | bytes | float | int | str]] = {
        1000 - k: {"partition-id": k, "data": "clinic.data:owner"} for k in range(3)
    }
    words = ["method=deployed_parts:Method", "method.boost=2", "rounds=2", "clients_per_round=2"]
    words += ["steps=[deployed_parts:Doubled]"]
    extras = "local.extras=[{name: deployed_parts:Decay, rate: 0.3}]"
    run(tmp_path / "run", Network(tmp_path / "cache", nodes), *words, extras)
    digests = {}
    for name, more in (("same", [extras]), ("without", [])):
        own = ["engine=inline", "data.samples=clinic.data:owner", f"output.dir={tmp_path / name}"]
        simulated(composed([*WORDS, *own, *words, *more]), tmp_path / name)
        digests[name] = summary_of(tmp_path / name)["weights_digest"]
    assert summary_of(tmp_path / "run")["weights_digest"] == digests["same"] != digests["without"]
    assert [row.get("doubled") for row in rows(tmp_path / "run")] == [
        row.get("doubled") for row in rows(tmp_path / "same")
    ]
    assert rows(tmp_path / "run")[2]["doubled"] == 2.0


@pytest.mark.slow
def test_a_server_without_a_sample_has_the_weights_of_one_that_measures(tmp_path: Path) -> None:
    """Nobody measures, and nodes train on all that they have: nothing is held out for nobody."""
    nodes: dict[int, dict[str, bool | bytes | float | int | str]] = {
        1000 - k: {"partition-id": k, "data": "clinic.data:owner"} for k in range(3)
    }
    run(tmp_path / "run", Network(tmp_path / "cache", nodes), "data.test_function=null", "rounds=2")
    inline = tmp_path / "inline"
    words = ["engine=inline", "data.samples=clinic.data:owner", f"output.dir={inline}"]
    simulated(composed([*WORDS, *words, "rounds=2"]), inline)
    found = summary_of(tmp_path / "run")
    assert found["weights_digest"] == summary_of(inline)["weights_digest"]
    assert found["metrics"] == {}
    assert "no test samples" in introduction(found["begins"])["metrics"]
    assert "samples_min" not in found["task"]["partition"]  # the server does not know it


LEAST = "evaluate.min_clients=3"


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["head=full", "method=fedsa_lora"],
        [
            "head=personal",
            *["secure=secagg", "aggregation_weights=uniform", "output.checkpoint_every=1"],
            LEAST,
        ],
    ],
    ids=["factors", "head and secure sums"],
)
def test_what_stays_at_a_client_is_measured_there(words: list[str], tmp_path: Path) -> None:
    """By a server without a sample, as in a simulation: before and after local training."""
    nodes: dict[int, dict[str, bool | bytes | float | int | str]] = {
        1000 - k: {"partition-id": k, "data": "clinic.data:owner"} for k in range(3)
    }
    more = ["data.test_function=null", "data.loss=cross_entropy", "rounds=1", *words]
    more += ["evaluate.clients=all", "evaluate.personal=true"]
    run(tmp_path / "run", Network(tmp_path / "cache", nodes), *more)
    inline = tmp_path / "inline"
    own = ["engine=inline", "data.samples=clinic.data:owner", "data.test_fraction=0"]
    simulated(composed([*WORDS, *own, f"output.dir={inline}", *more]), inline)
    for found, wanted in zip(rows(tmp_path / "run"), rows(inline), strict=True):
        assert found["metrics"] == wanted["metrics"]
        assert found["clients"] == wanted["clients"]
        assert {"accuracy", "finetuned_accuracy"} <= {*found["clients"]}  # type: ignore[misc]


@pytest.mark.slow
def test_a_node_without_data_is_refused_by_name(tmp_path: Path) -> None:
    nodes: dict[int, dict[str, bool | bytes | float | int | str]] = {
        1000 - k: {"partition-id": k, "data": "clinic.data:owner"} for k in range(3)
    }
    del nodes[999]["data"]
    run(tmp_path / "run", Network(tmp_path / "cache", nodes), "engine.min_clients=2")
    for row in rows(tmp_path / "run")[1:]:
        (failure,) = row["failures"]  # type: ignore[misc, has-type]
        assert failure["client"] == 1
        assert "does not fit data=" in failure["reason"]


# Sources of client 1, `here` with the files below: the error, and key words of it.
NO_SOURCES: dict[str, tuple[type[Exception], str]] = {
    "clinic.data:nothing": (ConfigError, "cannot be imported"),
    "nowhere.data:owner": (ConfigError, "'nowhere'.*PYTHONPATH"),
    "clinic.data:CLINICS": (ConfigError, "int.*function"),
    "no/such/folder": (DataError, "no/such/folder/1.npz.*no/such/folder/train.npz"),
    "here/without a target": (DataError, "needs target"),
    "here/with pickles": (DataError, "cannot be read"),
}
FILES = {
    "without a target": {"x": np.zeros((2, 4))},
    "with pickles": {"x": np.array([{}, {}], object), "target": np.zeros(2)},
}


@pytest.mark.parametrize("source", NO_SOURCES)
def test_sources_that_are_none_are_named(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, arrays in FILES.items():
        (tmp_path / "here" / name).mkdir(parents=True)
        np.savez(tmp_path / "here" / name / "1.npz", **arrays)  # type: ignore[arg-type]
    error, why = NO_SOURCES[source]
    with pytest.raises(error, match=why):
        read_own(source, 1)


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (torch.zeros(3, 4), r"a Tensor.*\(inputs, target\)"),
        ((torch.zeros(3, 4), torch.zeros(2)), r"2 targets, .*{'x': 3}"),
        ((torch.zeros(0, 4), torch.zeros(0)), r"0 targets, .*{'x': 0}"),
        ((torch.zeros(3, 5), torch.zeros(3)), r"input has \(5,\).*\(4,\)"),
        (({"ids": torch.zeros(3, 4)}, torch.zeros(3)), r"input has \['ids'\]"),
    ],
)
def test_samples_that_do_not_fit_are_named(found: object, said: str) -> None:
    form = SampleSpec((4,), "clinic.model:smoothed", 10)
    with pytest.raises(DataError, match=said):
        form.validate(gathered(found, "it"), "it")


def test_what_is_with_its_owners_is_not_simulated() -> None:
    data = own_samples(clients=3, classes=10, shape=[64], test_function="clinic.data:held_out")
    with pytest.raises(ConfigError, match="at the clients"):
        data.parts.gather(torch.tensor([0]), torch.tensor([[0]]))  # type: ignore[union-attr]
