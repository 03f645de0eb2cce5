"""The recipe for a new method in CONTRIBUTING.md works as it is printed."""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.compose.overrides import composed
from fedraclora.config.build import build_task
from fedraclora.config.keys import help_of, nodes, summary
from fedraclora.config.run_config import task_from_plain
from fedraclora.data import DATASETS
from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Method, Plan
from fedraclora.protocol.program import ClientProgram
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.tree import Layout

TEXT = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text()


def block(language: str, holds: str) -> str:
    """The first fenced block of a language that holds a word."""
    blocks = re.findall(rf"^( *)```{language}\n(.*?)^\1```", TEXT, flags=re.MULTILINE | re.DOTALL)
    return next(textwrap.dedent(body) for _, body in blocks if holds in body)


@pytest.fixture
def my_method(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    module = ModuleType("fedraclora.strategies.methods.my_method")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up
    exec(compile(block("python", "class MyMethod"), "CONTRIBUTING.md", "exec"), module.__dict__)
    found: type[Method] = module.__dict__["MyMethod"]
    return found


def test_the_example_does_what_its_docstring_says(my_method: type[Method]) -> None:
    m, n, K, rank = 5, 7, 3, 2
    rng = generator(0, "test")
    base = {"w": torch_normal(rng, m, n)}
    plan = Plan({"w": LayerView("linear", (m, n))}, shapes={"w": (m, n)})
    method = my_method(rank=rank, alpha=3.0)  # type: ignore[call-arg]
    draw = Draw(seed=1)
    cohort = Cohort(torch.arange(K), torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64))
    state = method.initial_state(base, plan, draw)
    sent = method.open_round(state, 1, cohort, draw)
    layout = Layout(tuple((name, slot.shape) for name, slot in sent.uploaded().items()))
    rows = torch_normal(rng, K, layout.size)
    got = Uplinks(cohort.clients, cohort.weights, layout, rows)
    after = method.weights(method.close_round(state, sent, got), draw)

    A = sent.adapters["w"].factors["A"]
    assert A.drawing is not None
    B = (cohort.weights / cohort.weights.sum()) @ rows
    wanted = base["w"] + (3.0 / rank) * B.reshape(m, rank) @ A.draw()
    torch.testing.assert_close(after["w"], wanted, rtol=1e-12, atol=1e-12)
    assert method.floats(plan, 1) == (layout.size, 0)


def test_the_example_is_a_choice_whose_keys_are_its_fields(my_method: type[Method]) -> None:
    node = nodes({"my_method": my_method})["method/my_method"]
    assert dataclasses.is_dataclass(my_method)
    assert {*node} - {"name"} == {f.name for f in dataclasses.fields(my_method)}
    assert all(help_of(my_method, key, node) for key in {*node} - {"name"})
    assert summary(my_method).startswith("MyMethod: ")


@pytest.mark.long
def test_the_contract_suite_takes_the_example_as_it_is_printed(tmp_path: Path) -> None:
    """The recipe on a copy: one file, one line, and the suite, without a test written."""
    root = Path(__file__).resolve().parents[2]
    for name in ("fedraclora", "strategies", "clients", "conf", "experiments", "tests"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(root / name, tmp_path / name, symlinks=True, ignore=ignored)
    shutil.copy(root / "pyproject.toml", tmp_path)
    (tmp_path / "strategies/methods/my_method.py").write_text(block("python", "class MyMethod"))
    table = tmp_path / "strategies/methods/__init__.py"
    text = table.read_text().replace(
        "METHODS: dict",
        "from fedraclora.strategies.methods.my_method import MyMethod\n\nMETHODS: dict",
    )
    table.write_text(
        text.replace('"fedavg": FedAvg,', '"fedavg": FedAvg,\n    "my_method": MyMethod,')
    )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/contract", "-k", "my_method"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.findall(r"(\d+) passed", done.stdout)[0]) > 30


@pytest.mark.slow
def test_the_example_of_a_step_runs_as_it_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found: dict[str, Any] = {}
    exec(compile(block("python", "class Cosine"), "CONTRIBUTING.md", "exec"), found)
    assert "cosine" in capsys.readouterr().out
    assert all(-1 < row["cosine"] < 1 for row in found["run"].rows[1:])
    assert found["Cosine"]().columns(None, None) == {}, "a round that was given up has no treat"
    alone = fedraclora.simulate(
        "pretrain=none", "output.progress=false", clients=20, clients_per_round=1, rounds=1,
        steps=[found["Cosine"]()],
    )  # fmt: skip
    assert alone.rows[1]["cosine"] is None


def test_the_example_of_a_data_source_is_trained_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, Any] = {"__name__": "fedraclora.data.sources.moons"}
    exec(compile(block("python", "def load_moons"), "CONTRIBUTING.md", "exec"), found)
    monkeypatch.setitem(DATASETS, "moons", found["load_moons"])
    data = {"name": "moons", "samples": 200, "test_fraction": 0.2}
    config = composed(
        ["data=digits", "pretrain=none", "clients=4", "clients_per_round=4", "rounds=2"]
    )
    built = build_task(task_from_plain({**config, "data": {**config["data"], **data}}))
    assert len(built.task.test) == 40
    assert int(built.task.train.sizes(torch.arange(4)).sum()) == 160


def test_the_example_of_a_client_program_runs_as_it_is_printed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("some_rows")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up
    monkeypatch.setattr(ClientProgram, "known", dict(ClientProgram.known))
    exec(compile(block("python", "class SomeRows"), "CONTRIBUTING.md", "exec"), module.__dict__)
    found, none = module.__dict__, None  # of a chunk: it does not look at it
    (hook,) = found["SomeRows"](share=0.5).hooks(none).values()
    gradients = {"w/B": torch.ones(2, 4, 3), "bias": torch.ones(2, 4)}
    after = hook(gradients, {})
    assert after["w/B"].sum(dim=(0, 2)).tolist() == [6.0, 6.0, 0.0, 0.0]
    assert torch.equal(after["bias"], gradients["bias"])
    with pytest.raises(ConfigError, match=r"method.share=2"):
        found["SomeRows"](share=2.0)


def test_the_example_of_a_tensor_beside_the_factors_is_sent_and_weights_the_mean(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("norms")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # dataclasses look it up
    monkeypatch.setattr(ClientProgram, "known", dict(ClientProgram.known))
    exec(compile(block("python", "class SendNorms"), "CONTRIBUTING.md", "exec"), module.__dict__)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    kind = module.__dict__["WeightedByNorm"]

    def update(self: Any, layer: Any, replies: Any) -> Any:
        found = plain(self, layer, replies)
        norms = replies.all.stack[f"{layer.name}/norm"].double()
        mean = (norms * replies.p[:, None] * replies.B.flatten(1)).sum(dim=0)
        seen.append((found.merged[0].flatten(), mean / float(replies.p @ norms[:, 0])))
        return found

    plain = kind.update
    monkeypatch.setattr(kind, "update", update)
    given: list[str] = ["clients=4", "clients_per_round=3", "rounds=2", "pretrain=none"]
    given += ["local.lr=0.1", "output.progress=false", "data=digits"]
    runs = [
        fedraclora.simulate(*given, f"engine={engine}", method=kind(rank=2))
        for engine in ("inline", "vectorized")
    ]
    torch.testing.assert_close(seen[0][0], seen[0][1], rtol=1e-5, atol=1e-9)
    assert len({str(each.rows[-1]["uplink_bytes"]) for each in runs}) == 1
    for here, there in zip(seen[: len(seen) // 2], seen[len(seen) // 2 :], strict=True):
        torch.testing.assert_close(here, there, rtol=1e-5, atol=1e-9)
