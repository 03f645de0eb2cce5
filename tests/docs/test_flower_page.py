"""The app of the page on Flower runs as it stands there, with the bits of `simulate`."""

from __future__ import annotations

import json
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.engines.deploy.local import LocalDeployment
from fedraclora.engines.programs import Program, end_all
from fedraclora.run.ledger import read_ledger
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from tests.superlink import SuperLink

pytestmark = pytest.mark.long

PAGE = Path(__file__).parents[2] / "docs" / "flower.md"
PROJECT = """
[project]
name = "myapp"
version = "1.0.0"
dependencies = []
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "somebody"
[tool.flwr.app.components]
serverapp = "myapp.server_app:app"
clientapp = "myapp.client_app:app"
[tool.flwr.app.config]
"""
TASK = '''
"""A model, data and training that know nothing of this project."""

import torch
from torch import nn


class Data(list):
    """The samples of a client."""

    def __init__(self, client: int) -> None:
        draws = torch.Generator().manual_seed(client)
        x = torch.randn(30 + 10 * client, 12, generator=draws)
        super().__init__(zip(x, x[:, :5].argmax(dim=1)))
        self.x, self.y = x, x[:, :5].argmax(dim=1)


def Net() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 5))


def load(context) -> Data:
    return Data(int(context.node_config["partition-id"]))


def train(model: nn.Module, data: Data) -> float:
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for rows in torch.randperm(len(data)).split(10):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
        loss.backward()
        optimizer.step()
    return loss.item()


def evaluate(model: nn.Module, data: Data) -> float:
    with torch.no_grad():
        return nn.functional.cross_entropy(model(data.x), data.y).item()
'''


def write_app(folder: Path, result: Path) -> None:
    """Write the app of the page; all nodes take part, and the weights at the end are kept."""
    (folder / "myapp").mkdir(parents=True)
    (folder / "pyproject.toml").write_text(PROJECT)
    (folder / "myapp" / "__init__.py").write_text("")
    (folder / "myapp" / "task.py").write_text(TASK)
    blocks = re.findall(r"```python\n# (myapp/\w+\.py)\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert [name for name, _ in blocks] == ["myapp/server_app.py", "myapp/client_app.py"]
    for name, code in blocks:
        (folder / name).write_text(code)
    server = folder / "myapp" / "server_app.py"
    code = server.read_text().replace("fraction_train=0.5", "min_available_nodes=4")
    code = code.replace("    strategy.start(", "    result = strategy.start(")
    kept = f"torch.save(result.arrays.to_torch_state_dict(), {str(result)!r})"
    server.write_text(f"{code}\n    import torch\n\n    {kept}\n")


def test_the_app_of_the_page_has_the_weights_of_simulate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_app(tmp_path / "app", tmp_path / "weights.pt")
    (tmp_path / "run.toml").write_text("")
    options = {"num-supernodes": 4, "client-resources-num-cpus": 1, "init-args-num-cpus": 2}
    quiet = {"init-args-logging-level": "ERROR", "init-args-log-to-driver": False}
    with SuperLink(show=False) as link:
        ended = link.run_app(tmp_path / "app", tmp_path / "run.toml", {**options, **quiet})
    assert ended.word == "finished:completed", ended.log
    check_weights(tmp_path, 3, 4, monkeypatch)
    assert json.dumps(ended.log).count("eval_loss") >= 3


class Nodes(LocalDeployment):
    """SuperNodes whose configuration is the one that the app of the page reads."""

    @override
    def start_node(self, k: int) -> Program:
        certificate, key = map(str, (self.identity.certificate, self.key(k)))
        secure = ["--root-certificates", certificate, "--auth-supernode-private-key", key]
        self.nodes[k] = node = self.node(secure, f"node{k}.log", f"partition-id={k}")
        return node


def test_on_a_superlink_a_run_that_was_stopped_goes_on_with_nodes_that_began_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are those of `simulate`."""
    write_app(tmp_path / "app", tmp_path / "weights.pt")
    server, ledger = tmp_path / "app" / "myapp" / "server_app.py", tmp_path / "run" / "ledger.jsonl"
    more = f"min_available_nodes=3, checkpoint={str(tmp_path / 'run')!r}"
    code = server.read_text().replace("min_available_nodes=4", more)
    server.write_text(code.replace("num_rounds=3", "num_rounds=30"))
    (tmp_path / "run.toml").write_text("")
    with Nodes([[0], [1], [2]]) as network:
        run = network.connection.submit(tmp_path / "app", tmp_path / "run.toml")
        while not (ledger.is_file() and len(read_ledger(ledger)) > 2):
            assert not network.connection.status(run).ended
            time.sleep(0.5)
        network.connection.stop(run)
        end_all([node for node in network.nodes[1:2] if node])
        network.start_node(1)
        rounds = len(read_ledger(ledger)) + 1  # two more
        server.write_text(code.replace("num_rounds=3", f"num_rounds={rounds}"))
        run = network.connection.submit(tmp_path / "app", tmp_path / "run.toml")
        while not (ended := network.connection.status(run)).ended:
            time.sleep(0.5)
        assert ended.completed, [*network.connection.follow(run)]
    rows = read_ledger(ledger)
    assert [row["round"] for row in rows] == [*range(rounds + 1)]
    check_weights(tmp_path, rounds, 3, monkeypatch)


def check_weights(
    tmp_path: Path, rounds: int, clients: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hold the weights that the app has kept against those of `simulate`."""
    found = torch.load(tmp_path / "weights.pt")
    monkeypatch.syspath_prepend(str(tmp_path / "app"))
    monkeypatch.delitem(sys.modules, "myapp", raising=False)
    from myapp import task  # type: ignore[import-not-found]

    def own(round_: Round) -> Trained:
        model, data = round_.install(task.Net()), task.Data(round_.client)
        loss = task.train(model, data)
        return round_.read(model, samples=len(data), steps=1, loss=loss)

    data: Any = [(task.Data(k).x, task.Data(k).y) for k in range(clients)]
    test = (task.Data(9).x, task.Data(9).y)
    run = fedraclora.simulate(
        "output.progress=false", model=task.Net(), data=data, test=test, train=own,
        method=FedRacLora(rank=4), rounds=rounds,
    )  # fmt: skip
    wanted = run.weights()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in found.items())


def test_learning_rates_are_as_the_page_says() -> None:
    words = ("data=digits", "output.progress=false", "pretrain=none", "partition=iid")

    def reached(rate: float, **method: Any) -> float:
        keys = {
            "clients": 20,
            "clients_per_round": 5,
            "rounds": 15,
            "model": {"name": "mlp", "hidden": [128]},
        }
        found = [
            fedraclora.simulate(
                *words, "evaluate.every=15", method=method, seed=seed,
                local={"name": "momentum", "lr": rate}, **keys,
            ).rows[-1]["metrics"]["accuracy"]
            for seed in (0, 1)
        ]  # fmt: skip
        return sum(found) / 2

    low = {"name": "fed_rac_lora", "rank": 8}
    found = {
        "FedAvg at 0.1": reached(0.1, name="fedavg"),
        "0.1": reached(0.1, **low),
        "1.0": reached(1.0, **low),
        "identity at 0.1": reached(0.1, **low, normalize="identity"),
        "identity at 1.0": reached(1.0, **low, normalize="identity"),
    }
    wanted = dict(zip(found, (0.91, 0.52, 0.87, 0.89, 0.1), strict=True))
    assert found == pytest.approx(wanted, abs=0.02)
    assert all(f"{value}" in PAGE.read_text() for value in wanted.values())
