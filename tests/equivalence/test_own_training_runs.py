"""A training function of the user's on every engine, on nodes, and in runs that go on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.clients import node as client_node
from fedraclora.errors import ClientError
from fedraclora.experiments.faults.network import Network, composed, serve
from fedraclora.terminal.opening import introduction
from tests.common import normal, simulated, summary_of

MODULE = """
import pathlib

import torch
from torch import nn


def net(shape=(4,), classes=3):
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def owner(client):
    x = torch.randn(6 + client, 4, generator=torch.Generator().manual_seed(client))
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def texts(client):
    more = pathlib.Path(__file__).with_name("more.txt")
    end = more.read_text() if more.is_file() else ""
    return [f"{client} {row}{end}" for row in range(6 + client)]


def train(round, lr=0.1):
    data = round.data
    if isinstance(data, list):
        assert data == texts(round.client)
        data = owner(round.client)
    model = round.install(net())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    round.state["times"] = times = round.state.get("times", 0) + 1
    for _ in range(times):
        loss = nn.functional.cross_entropy(model(data[0]) + torch.rand(()), data[1])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    said = {"margin": float(round.client)}
    return round.read(model, samples=len(data[1]), steps=times, loss=loss.item(), metrics=said)
"""
WORDS = [
    "data=own",
    "data.classes=3",
    "data.shape=[4]",
    "model=function",
    "model.function=mine_at_nodes:net",
    "method.rank=2",
    "method.alpha=3",
    "clients=3",
    "clients_per_round=3",
    "rounds=3",
    "output=study",
    "local=own",
    "local.train=mine_at_nodes:train",
    "local.parameters={lr:0.2}",
]


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine_at_nodes.py").write_text(MODULE)
    monkeypatch.delitem(sys.modules, "mine_at_nodes", raising=False)  # of the test before
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("source", ["owner", "texts"])
def test_nodes_train_as_one_process(source: str, tmp_path: Path, module: None) -> None:
    """The server has no sample; what a client keeps lies at its node."""
    del module
    name = f"mine_at_nodes:{source}"
    more = ["data.objects=true"] if source == "texts" else ["data.test_fraction=0"]
    nodes: dict[int, Any] = {10 + k: {"partition-id": k, "data": name} for k in range(3)}
    words = [*WORDS, *more[: source == "texts"], "engine=deploy", f"output.dir={tmp_path}/far"]
    serve(composed(words), Network(tmp_path / "cache", nodes))
    here = [*WORDS, *more, "engine=inline", f"data.samples={name}", f"output.dir={tmp_path}/near"]
    simulated(composed(here), tmp_path / "near")
    far, near = summary_of(tmp_path / "far"), summary_of(tmp_path / "near")
    assert far["weights_digest"] == near["weights_digest"]
    assert "mine_at_nodes:train" in introduction(far["begins"])["optimizer"]
    rows = fedraclora.read_run(tmp_path / "far", trust=["mine_at_nodes"]).rows
    assert rows[3]["train_metrics"] == {"margin": pytest.approx((0 * 6 + 1 * 7 + 2 * 8) / 21)}
    assert rows[3]["local_steps"] == 9  # three of each, of which state tells


@pytest.mark.slow
def test_objects_of_a_client_that_change_are_refused(tmp_path: Path, module: None) -> None:
    """No tensors were made of them: what they hold is compared, as in a simulation."""
    del module
    name = "mine_at_nodes:texts"
    nodes: dict[int, Any] = {10 + k: {"partition-id": k, "data": name} for k in range(3)}
    network = Network(tmp_path / "cache", nodes)
    words = [*WORDS, "data.objects=true", "engine=deploy", f"output.dir={tmp_path}/far"]
    serve(composed([*words, "rounds=1"]), network)
    for more in ("", "?"):
        (tmp_path / "more.txt").write_text(more)
        client_node.trainer_for.cache_clear()
        client_node.checked_of.cache_clear()
        if not more:
            serve(composed([*words, "rounds=2"]), network, resume=True)
    with pytest.raises(ClientError, match="client 0: its samples"):
        serve(composed([*words, "rounds=3"]), network, resume=True)


@pytest.mark.long
def test_a_real_deployment_has_the_bits_of_inline(tmp_path: Path, module: None) -> None:
    del module
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(tmp_path), str(root), os.environ.get("PYTHONPATH", "")])
    words = [w for w in WORDS if not w.startswith("rounds")]
    words += ["rounds=2", "data.samples=mine_at_nodes:owner", "data.test_fraction=0"]
    ended = {}
    for command in (["deploy", "nodes=3"], ["simulate", "engine=inline"]):
        place = tmp_path / command[0]
        asked = [sys.executable, "-m", "fedraclora.commands.cli", *command, *words]
        subprocess.run(
            [*asked, f"output.dir={place}"],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path},
            check=True,
        )
        ended[command[0]] = summary_of(place)["weights_digest"]
    assert ended["deploy"] == ended["simulate"]


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def train(round_: Round) -> Trained:
    model = round_.install(net())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    if "optimizer" in round_.state:
        optimizer.load_state_dict(round_.state["optimizer"])
    x, y = round_.data
    nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    round_.state["optimizer"] = optimizer.state_dict()
    return round_.read(model, samples=len(y), steps=1)


def run(*words: str, **more: Any) -> fedraclora.RunResult:
    inputs = [normal(size, 6, key=size).float() for size in (5, 9, 7, 12)]
    data = [(x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()) for x in inputs]
    method = {"name": "fedavg_lora", "rank": 2, "alpha": 3}
    given = {"model": net(), "data": data[:3], "test": data[3], "method": method, "train": train}
    fixed = (
        "output.progress=false",
        "rounds=4",
        "clients_per_round=2",
        "output.checkpoint_every=1",
    )
    return fedraclora.simulate(*fixed[: 4 if "folder" in more else 3], *words, **{**given, **more})


def digest(one: fedraclora.RunResult) -> object:
    return one.summary["weights_digest"]


@pytest.mark.long
def test_ray_gives_the_bits_of_inline() -> None:
    """The function is the program's, and no module of the workers has it."""
    here = {"__name__": "__main__", "nn": nn, "torch": torch, "net": net}
    exec(  # as in a script; each client has an optimizer, a batch and epochs of its own
        "def own(round_):\n    model, c = round_.install(net()), round_.client\n"
        "    (x, y), steps = round_.data, 0\n"
        "    kind = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop][c % 3]\n"
        "    optimizer = kind([p for p in model.parameters() if p.requires_grad], 0.01 * (c + 1))\n"
        "    round_.state['n'] = n = round_.state.get('n', 0) + 1\n"
        "    for _ in range(1 + c % 2):\n"
        "        for rows in torch.randperm(len(y)).split(2 + c):\n"
        "            optimizer.zero_grad()\n"
        "            (n * nn.functional.cross_entropy(model(x[rows]), y[rows])).backward()\n"
        "            optimizer.step()\n            steps += 1\n"
        "    return round_.read(model, samples=len(y), steps=steps)\n",
        here,
    )
    inline = run("engine=inline", train=here["own"])
    assert digest(run("engine=ray", "engine.workers=2", train=here["own"])) == digest(inline)
