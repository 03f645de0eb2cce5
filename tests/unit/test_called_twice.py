"""Functions of the user's that must give the same each time: each process calls them itself."""

from __future__ import annotations

import itertools
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedraclora
from fedraclora.data.fingerprint import call_twice, fingerprint_of, what_differs
from fedraclora.errors import CheckpointError, ConfigError
from tests.common import FIXED, normal

HERE, COUNT = __name__, itertools.count()
DRAWN = {
    "numpy": lambda n: np.random.default_rng().permutation(n),
    "torch": lambda n: torch.randperm(n).numpy(),
    "count": lambda n: np.roll(np.arange(n), next(COUNT)),
    "none": np.arange,
}


def drawn_number(how: str) -> float:
    """A number below 50 that two calls do not share by chance."""
    return float(DRAWN[how](50)[:6] @ 50.0 ** -np.arange(6))


def net(shape: Any = (6,), classes: int = 3) -> nn.Module:
    return nn.Sequential(nn.Linear(*shape, 5), nn.Tanh(), nn.Linear(5, classes))


def table(count: int = 64, how: str = "none", key: int = 0) -> Any:
    x = normal(count, 6, key=key).float()[torch.from_numpy(DRAWN[how](count))]
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


def deal(data: Any, *, clients: int, seed: int, how: str = "none") -> Any:
    return np.array_split(DRAWN[how](len(data.train)), clients)


def scaling(data: Any, *, clients: int, seed: int) -> Any:
    data.train.inputs["x"].mul_(2)
    return np.array_split(np.arange(len(data.train)), clients)


def all_clients(*, how: str = "none") -> Any:
    return [table(20, how, key) for key in range(3)]


def client(number: int, *, how: str = "none") -> Any:
    return table(20, how, number)


def drawn_net(*, shape: Any, classes: int, how: str = "none") -> nn.Module:
    model = net(shape, classes)
    model.register_buffer("order", torch.from_numpy(DRAWN[how](7)))
    return model


def loss(output: torch.Tensor, target: torch.Tensor, how: str = "none") -> torch.Tensor:
    noise = drawn_number(how) * 1e-6  # less than sums round by
    return nn.functional.cross_entropy(output, target, reduction="none") * (1 + noise)


def measured(output: torch.Tensor, target: torch.Tensor, how: str = "none") -> float:
    return drawn_number(how)


def each(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return torch.rand(len(target))


measured.higher_is_better = each.higher_is_better = True  # type: ignore[attr-defined]
KEYS: dict[str, Any] = {
    "partition": lambda how: {
        "data": table(),
        "clients": 3,
        "partition": {"name": f"{HERE}:deal", "how": how},
    },
    "data.function": lambda how: {
        "data": {"name": f"{HERE}:all_clients", "parameters": {"how": how}}
    },
    "data.samples": lambda how: {
        "data": {"name": "own", "samples": f"{HERE}:client", "parameters": {"how": how}},
        "clients": 3,
    },
    "data.test_function": lambda how: {
        "data": {
            "name": "own",
            "samples": f"{HERE}:client",
            "test_function": f"{HERE}:server",
            "parameters": {"how": how},
        },
        "clients": 3,
    },
    "model.function": lambda how: {
        "data": all_clients(),
        "model": {"name": "function", "function": f"{HERE}:drawn_net", "parameters": {"how": how}},
    },
    "loss": lambda how: {"data": all_clients(), "loss": {"name": f"{HERE}:loss", "how": how}},
    "metric": lambda how: {
        "data": all_clients(),
        "metrics": ["accuracy", {"name": f"{HERE}:measured", "how": how}],
    },
}


def server(*, how: str = "none") -> Any:
    return table(20, how, 9)


def run(**keys: Any) -> fedraclora.RunResult:
    given = {"model": net(), "rounds": 1, "clients_per_round": 2, "method": {"rank": 2}}
    return fedraclora.simulate(*FIXED, "output.progress=false", "pretrain=none", **(given | keys))


@pytest.mark.parametrize("how", ["numpy", "torch", "count"])
@pytest.mark.parametrize("key", [*KEYS])
def test_a_function_that_gives_something_else_each_time_is_refused(key: str, how: str) -> None:
    """Nodes shared a third of their rows, and a run that went on had other bits."""
    if (key, how) == ("model.function", "torch"):
        run(**KEYS[key](how))  # the seed of the run is set for it
        return
    with pytest.raises(ConfigError, match=rf"{key}.*(called again|when it is called twice)"):
        run(**KEYS[key](how))


@pytest.mark.parametrize("key", [*KEYS])
def test_one_that_gives_the_same_is_taken(key: str) -> None:
    run(**KEYS[key]("none"))


def test_what_is_measured_of_each_row_is_tried_too() -> None:
    metric = fedraclora.Metric(each, higher_is_better=True, each=True)
    with pytest.raises(ConfigError, match="metric each gives something else"):
        run(data=all_clients(), metrics=[metric])


def test_a_partitioner_may_not_change_what_it_divides() -> None:
    with pytest.raises(ConfigError, match=r"partition=scaling.* changes the data"):
        run(data=table(), clients=3, partition=scaling)


def by_process(data: Any, *, clients: int, seed: int) -> Any:
    rows = np.roll(np.arange(len(data.train)), int(os.environ["TURN"]))
    return np.array_split(rows, clients)


def test_a_run_is_not_resumed_on_rows_that_were_dealt_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ``hash(text)`` the rows are the same in one process, and others in the next."""
    given = {
        "model": net(),
        "data": table(),
        "clients": 3,
        "partition": by_process,
        "folder": tmp_path / "run",
    }
    monkeypatch.setenv("TURN", "0")
    run(**given)
    run(**given, rounds=2, resume=True)
    monkeypatch.setenv("TURN", "3")
    with pytest.raises(CheckpointError, match=r"partition=\S*by_process\S* assigns other rows"):
        run(**given, rounds=3, resume=True)


def turned(by: int) -> Any:
    def dealer(data: Any, *, clients: int, seed: int) -> Any:
        return np.array_split(np.roll(np.arange(len(data.train)), by), clients)

    return dealer


def test_a_function_of_a_program_that_has_changed_is_said_to_have(tmp_path: Path) -> None:
    """Two digests were shown, of which a reader does not know what they are of."""
    given = {"model": net(), "data": table(), "clients": 3, "folder": tmp_path / "run"}
    run(**given, partition=turned(0))
    with pytest.raises(CheckpointError, match=r"partition\S*: .*its code.* has changed"):
        run(**given, partition=turned(1), rounds=2, resume=True)


def test_a_call_that_takes_long_is_not_made_again_and_the_log_says_so(
    caplog: pytest.LogCaptureFixture,
) -> None:
    calls: list[int] = []
    with caplog.at_level(logging.WARNING):
        call_twice("data.function=slow", lambda: calls.append(1), within=-1.0)
    assert len(calls) == 1
    assert "data.function=slow" in caplog.text


def test_a_fingerprint_of_very_many_samples_reads_some_and_is_the_same_each_time() -> None:
    rows = [{"text": f"row {k}", "image": torch.full((3, 8), k)} for k in range(100_000)]
    large = {"x": torch.zeros(3_000_000), "rows": rows}
    found = fingerprint_of(large)
    assert len(found) < 3000
    assert what_differs(found, fingerprint_of(large)) is None
    large["x"].data[:30_000] += 1  # a hundredth
    assert what_differs(found, fingerprint_of(large)) == "['x']"
    before = fingerprint_of(large, versions=True)
    unread = next(k for k in range(7, 100) if unseen(large, k))  # as docs/training.md says
    large["x"][unread] += 1
    assert what_differs(before, fingerprint_of(large, versions=True)) == "['x']"


def unseen(large: Any, place: int) -> bool:
    """Change a number past torch's count, and tell whether the fingerprint stays."""
    before = fingerprint_of(large, versions=True)
    large["x"].numpy()[place] += 1
    differs = what_differs(before, fingerprint_of(large, versions=True))
    large["x"].numpy()[place] -= 1
    return differs is None


def test_what_differs_says_that_entries_or_attributes_came() -> None:
    """A list that had grown was called ``#``."""
    found: Any = [torch.ones(2), {"a": 1}]
    before = fingerprint_of(found)
    found[1]["b"] = 2
    assert "[1] has another number of entries" in str(what_differs(before, fingerprint_of(found)))
    del found[1]["b"]
    found[0].seen = True
    assert "[0] has other attributes" in str(what_differs(before, fingerprint_of(found)))
