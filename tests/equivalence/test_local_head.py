"""head=personal: each client keeps its own head, and a resume rolls it back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from vectorized_settings import ALSO, WIDELY

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.data.samples import Samples
from fedraclora.errors import ClientError, ConfigError
from fedraclora.evaluation.evaluate import class_accuracies, personal_accuracy
from fedraclora.experiments.pages import aliases
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.shared.walking import DirectionMethod
from fedraclora.tree import digest
from tests.common import arranged, assemble

# Clients and server go along the same directions of all weights, so that none stays at home.
REFUSED = [name for name, kind in METHODS.items() if issubclass(kind, DirectionMethod)]
JOB = [
    "data=digits",
    "pretrain=none",
    "model.hidden=[12]",
    "clients=12",
    "clients_per_round=4",
    "head=personal",
    "local.lr=0.2",
    "output=study",
    "output.checkpoint_every=2",
    "rounds=6",
]


def job(*words: str, folder: Path | None = None, resume: bool = False) -> RunBuilder:
    config = from_plain(composed([*JOB, *words]), METHODS)
    return assemble(config, folder, resume=resume)


def store_digest(run: RunBuilder) -> str:
    return digest(run.strategy.recorder.store.state())


@pytest.mark.short(when=lambda method: method in WIDELY | ALSO)  # factors of every form
@pytest.mark.parametrize("method", [n for n in METHODS if n not in {*aliases(), *REFUSED}])
def test_heads_stay_at_home_and_differ(method: str) -> None:
    run = job(f"method={method}")
    assert set(run.plan.local) == {"fc2.weight", "fc2.bias"}
    before = {n: run.strategy.state.base[n].clone() for n in run.plan.local}
    run.strategy.run(run.grid)
    assert all(torch.equal(run.strategy.state.base[n], t) for n, t in before.items())
    owned = run.strategy.recorder.store.latest(12)
    heads = [own["fc2.weight"] for own in owned.values()]
    assert len(heads) > 4
    assert not any(torch.equal(heads[0], other) for other in heads[1:])
    row = run.strategy.recorder.ledger.rows[-1]
    assert row["uplink_bytes"] == 4 * 4 * run.config.method.floats(run.plan, row["round"])[0]
    accuracy: Any = row["metrics"]
    assert 0.3 < accuracy["personal_accuracy"] <= 1


@pytest.mark.parametrize("sample", [2, 50])
def test_so_many_personal_models_are_measured_as_the_key_says(
    sample: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = list[int]()

    def counted(model: Any, weights: Any, owned: Any, *rest: Any) -> dict[str, float]:
        measured.append(len(owned))
        return personal_accuracy(model, weights, owned, *rest)

    monkeypatch.setattr("fedraclora.strategies.builder.personal_accuracy", counted)
    run = job(f"evaluate.sample={sample}", "rounds=2")
    run.strategy.run(run.grid)
    trained = len(run.strategy.recorder.store.latest(50))
    assert measured[-1] == min(sample, trained)
    assert 2 < trained < 50


@pytest.mark.parametrize("method", REFUSED)
def test_a_head_that_would_move_with_the_rest_is_refused(method: str) -> None:
    with pytest.raises(ConfigError, match="head=personal"):
        job(f"method={method}", "local.steps=1")


def test_a_server_that_is_behind_its_clients_rolls_them_back(tmp_path: Path) -> None:
    """The clients trained rounds 3 and 4 after the last checkpoint, of round 2; then the end."""
    whole = job(folder=tmp_path / "whole")
    whole.strategy.run(whole.grid)
    run = job(folder=tmp_path / "part")
    run.strategy.run(run.grid, last=2)
    saved = (tmp_path / "part" / "checkpoint" / "checkpoint.safetensors").read_bytes()
    run.strategy.run(run.grid, last=3)
    (tmp_path / "part" / "checkpoint" / "checkpoint.safetensors").write_bytes(saved)
    rest = job(folder=tmp_path / "part", resume=True)
    assert rest.strategy.done == 2
    rest.strategy.run(rest.grid)
    assert store_digest(rest) == store_digest(whole)


def test_a_failed_round_does_not_move_a_head() -> None:
    run = job("rounds=3")
    run.strategy.run(run.grid, last=2)
    store = run.strategy.recorder.store
    clients = torch.arange(12)
    default = {n: run.strategy.state.base[n] for n in run.plan.local}
    before = store.read(clients, 3, default)

    def lose(messages: list[Any]) -> list[Any]:
        return []

    arranged(run.grid, lose)
    with pytest.raises(ClientError, match="no client replied"):
        run.strategy.run(run.grid, last=3)
    after = store.read(clients, 3, default)
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_inline_and_vectorized_agree() -> None:
    runs = [job(f"engine={engine}", "rounds=3") for engine in ("inline", "vectorized")]
    for run in runs:
        run.strategy.run(run.grid)
    left, right = (run.strategy.recorder.store.state() for run in runs)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-5)


def test_a_task_without_classes_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"head=personal.*the classes of.*evaluate\.clients=round"
    ):
        job("data=least_squares", "partition=given", "clients=null")


# --- the measure ---------------------------------------------------------------------------------


def test_each_class_counts_by_its_share_at_the_client() -> None:
    """A model that always says class 0 is right for the share of class 0 at the client."""
    model = nn.Linear(1, 2)
    weights = {"weight": torch.zeros(2, 1), "bias": torch.tensor([1.0, 0.0])}
    samples = Samples({"x": torch.zeros(10, 1)}, torch.tensor([0] * 3 + [1] * 7))
    assert class_accuracies(model, weights, samples, 2, 4).tolist() == [1.0, 0.0]
    counts = np.array([[1, 3], [5, 0]])
    found = personal_accuracy(model, weights, {0: {}, 1: {}}, samples, counts, 4)
    assert found == {"personal_accuracy": (0.25 + 1.0) / 2}
    own = {1: {"bias": torch.tensor([0.0, 1.0])}}
    assert personal_accuracy(model, weights, own, samples, counts[1:], 4)["personal_accuracy"] == 0
