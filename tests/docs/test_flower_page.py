"""The app of the page on Flower runs as it stands there, with the bits of `simulate`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.engines.flower.superlink import SuperLink
from fedraclora.strategies.fed_rac_lora import FedRacLora

pytestmark = pytest.mark.slow

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
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for rows in torch.randperm(len(data)).split(10):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(data.x[rows]), data.y[rows])
        loss.backward()
        optimiser.step()
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
    found = torch.load(tmp_path / "weights.pt")
    monkeypatch.syspath_prepend(str(tmp_path / "app"))
    monkeypatch.delitem(sys.modules, "myapp", raising=False)
    from myapp import task  # type: ignore[import-not-found]

    def own(round_: Round) -> Trained:
        model, data = round_.install(task.Net()), task.Data(round_.client)
        loss = task.train(model, data)
        return round_.read(model, samples=len(data), steps=1, loss=loss)

    data: Any = [(task.Data(k).x, task.Data(k).y) for k in range(4)]
    test = (task.Data(9).x, task.Data(9).y)
    run = fedraclora.simulate(
        "output.progress=false", model=task.Net(), data=data, test=test, train=own,
        method=FedRacLora(rank=4), rounds=3,
    )  # fmt: skip
    wanted = run.weights()
    assert found.keys() == wanted.keys()
    assert all(torch.equal(wanted[name], tensor) for name, tensor in found.items())
    assert json.dumps(ended.log).count("eval_loss") >= 3
