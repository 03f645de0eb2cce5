"""What a run says first, and who shows it again."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fedraclora
from fedraclora.commands.compare.table import compare_runs
from fedraclora.commands.report.page import page_of, read_shown
from fedraclora.errors import ConfigError
from fedraclora.models.built import seeded
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import Adapter, RoundInstructions
from fedraclora.protocol.plan import trained_of
from fedraclora.run.log import logged
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.terminal import progress
from fedraclora.terminal.opening import idle_workers, introduction

X = np.random.default_rng(4).normal(size=(40, 5)).astype("float32")
CLIENTS = [(part, (part[:, 0] > 0).astype("int64")) for part in np.split(X, 4)]


with seeded(0, "test"):
    BUILT = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))


def run(**keys: Any) -> fedraclora.RunResult:
    method = {"name": "ffa_lora", "rank": 2}
    chosen = {"model": BUILT, "data": CLIENTS, "method": method, "rounds": 1} | keys
    return fedraclora.simulate(**chosen)


def test_the_first_lines_say_what_is_learnt_on_whose_data_and_what_is_sent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    local = {"lr": 0.25, "momentum": 0.5, "steps": 3, "batch_size": 4}
    found = run(local=local, rounds=2, folder=tmp_path, clients_per_round=3)
    said = capsys.readouterr().err.splitlines()
    first = said[: [line.startswith("round 0") for line in said].index(True)]
    count = found.summary["uplink_floats"]
    for line, parts in zip(
        first,
        (
            ("your model", "50 parameters", "your data", "ffa_lora r=2", "2 rounds", "3 of 4"),
            ("32 training", "4 clients", "8 test", "cross_entropy", "guessed", "accuracy, loss"),
            (f"trains {count} parameters", f"sends {count} numbers", "rank 2", "sgd", "0.25"),
            (str(tmp_path), "run.log"),
        ),
        strict=True,
    ):
        assert all(part in line for part in parts), line
    log = (tmp_path / "run.log").read_text()
    assert all(line in log for line in first)
    assert "chunk:" in log


@pytest.mark.slow
def test_a_resumed_run_says_from_where_in_the_log_of_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(rounds=1, folder=tmp_path)
    before = (tmp_path / "run.log").read_text()
    capsys.readouterr()
    run(rounds=2, folder=tmp_path, resume=True)
    assert "after round 1 of 2" in capsys.readouterr().err.splitlines()[0]
    log = (tmp_path / "run.log").read_text()
    assert log.startswith(before)
    assert "after round 1 of 2" in log


def test_all_that_a_run_begins_with_is_shown_where_that_is_asked_for(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = run(output={"verbose": True})
    lines = capsys.readouterr().err.splitlines()
    titles = ["loss", "metrics", "optimizer", "trained", "data", "chunk"]
    start = [line.partition(":")[0] for line in lines].index("loss")
    assert start <= 5
    lines = lines[start:]
    assert [line.partition(":")[0] for line in lines[:6]] == titles
    assert len({len(line) - len(line.partition(":")[2].lstrip()) for line in lines[:6]}) == 1
    count = found.summary["uplink_floats"]
    assert "rank 2 of layers 0, 2; " in lines[3]
    assert f" 0.bias, 2.bias: {count:,} numbers" in lines[3]
    assert re.search("32 training .* 4 clients, 8 test .*0.2 of all", lines[4])
    begins: Any = found.summary["begins"]
    assert introduction(begins)["trained"] in lines[3]


@dataclass(frozen=True)
class Hers(FedRacLora):
    """A method of a program's own."""


def test_a_method_of_ones_own_is_named_by_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    run(method=Hers(rank=2))
    assert "Hers" in capsys.readouterr().err.splitlines()[0]


def test_the_most_steps_of_a_method_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    run(method={"name": "decomfl", "steps": 50}, local={"lr": 1e-4})
    assert "50 steps at most" in capsys.readouterr().err


def test_full_weights_of_a_large_layer_are_measured_and_trained() -> None:
    """Its weight takes its step while its gradient is formed, so that no gradient of it is left."""
    wide = nn.Sequential(nn.Linear(5, 60_000), nn.ReLU(), nn.Linear(60_000, 2))
    found = run(model=wide, method="fedavg", local={"lr": 0.1})
    assert found.rows[-1]["metrics"]["accuracy"] > 0.5


@pytest.mark.parametrize(
    ("cohort", "chunk", "workers", "said"),
    [
        (12, 12, 5, ["4 of 5", "12 clients", "1 chunk;", "engine.chunk=3 "]),
        (12, 4, 5, ["2 of 5", "3 chunks;", "engine.chunk=3 "]),
        (12, 3, 5, []),  # smaller ones would take two turns
        (40, 5, 5, []),
        (100, 35, 3, []),
        (3, 1, 5, []),  # there is no more to divide
        (12, 12, 1, []),
    ],
)
def test_workers_that_a_round_leaves_idle_are_told_with_the_chunk_that_uses_them(
    cohort: int, chunk: int, workers: int, said: list[str]
) -> None:
    text = idle_workers(
        {"clients_per_round": cohort, "chunk": {"chunk": chunk}, "workers": workers}
    )
    assert bool(text) == bool(said)
    assert all(part in text["idle"] for part in said)


def test_without_progress_notes_are_warnings_of_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    wrong: Any = {"method": {"name": "ffa_lora", "rank": 9}, "rounds": 0}
    run(**wrong)
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    caplog.clear()
    run(output={"progress": False}, folder=tmp_path, **wrong)
    assert not capsys.readouterr().err
    assert [r.message for r in caplog.records if r.levelname == "WARNING"] == shown
    assert shown
    log = (tmp_path / "run.log").read_text()
    assert all(note in log for note in shown)
    assert "optimizer:" in log


def test_what_libraries_announce_goes_to_the_log_and_all_else_is_shown(tmp_path: Path) -> None:
    """A FutureWarning of torch is for programmers; a UserWarning of it, or one of ours, is not."""
    with warnings.catch_warnings(record=True) as seen, logged(tmp_path):
        warnings.simplefilter("always")
        shown = warnings.showwarning
        for kind, file in (
            (FutureWarning, "site-packages/torch/nn/a.py"),
            (DeprecationWarning, "site-packages/ray/b.py"),
            (UserWarning, "site-packages/torch/nn/a.py"),
            (FutureWarning, "mine.py"),
        ):
            shown(kind(f"{kind.__name__} of {file}"), kind, file, 3)
    assert [str(warning.message) for warning in seen] == [
        "UserWarning of site-packages/torch/nn/a.py",
        "FutureWarning of mine.py",
    ]
    log = (tmp_path / "run.log").read_text()
    assert "FutureWarning of site-packages/torch" in log
    assert "DeprecationWarning of site-packages/ray" in log


@pytest.mark.parametrize("notes", [0, 1, 2, 5])
def test_notes_beyond_the_first_lines_are_in_the_log(
    notes: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    every = [f"thing {k} is not as it was asked for" for k in range(notes)]
    monkeypatch.setattr(progress, "notes_of", lambda facts: every)
    run(folder=tmp_path, rounds=0)
    said = capsys.readouterr().err.splitlines()
    before = [line.startswith("round 0") for line in said].index(True)
    assert before <= 8
    told = [line for line in said[:before] if line.startswith("note: ")]
    assert bool(told) == bool(notes)
    if notes == 5:
        assert "3 more" in told[-1]
        assert "run.log" in told[-1]
    log = (tmp_path / "run.log").read_text()
    assert all(note in log for note in every)


@pytest.mark.parametrize(
    ("loss", "source"), [(None, "guessed from the targets"), ("cross_entropy", "(said)")]
)
def test_it_is_said_whether_a_loss_was_said_or_guessed(
    loss: str | None, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run(loss=loss, rounds=0)
    assert source in capsys.readouterr().err.splitlines()[1]


@pytest.mark.slow
def test_reports_and_comparisons_show_what_runs_learn(tmp_path: Path) -> None:
    for name, lr in (("a", 0.1), ("b", 0.3)):
        run(folder=tmp_path / "runs" / name, local={"lr": lr})
    page = page_of([read_shown(tmp_path / "runs" / name) for name in "ab"])
    assert "cross_entropy (guessed" in page
    notes = "\n".join(compare_runs([tmp_path / "runs"], tmp_path / "out").notes)
    assert notes.count("cross_entropy (guessed") == 1  # of all runs
    assert "learning rate 0.1" in notes
    assert "learning rate 0.3" in notes


def test_where_nothing_is_left_to_train_it_is_said() -> None:
    model = nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(6, 2))
    data = [(x[:, None], target) for x, target in CLIENTS]
    with pytest.raises(ConfigError, match=r"nothing is left .*head=frozen"):
        run(model=model, data=data, head="frozen", **{"model.head": ["2"]})


def test_many_layers_that_differ_in_numbers_are_told_as_one() -> None:
    names = [f"block.{k}.query.weight" for k in range(12)]
    shapes = dict.fromkeys(names, (6, 4)) | {"out.bias": (3,)}
    factors = [{"B": to_train((6, 1 + k % 3)), "A": to_train((1 + k % 3, 4))} for k in range(12)]
    adapters = {
        name: Adapter.of(dict(each), 1.0) for name, each in zip(names, factors, strict=True)
    }
    said = str(trained_of(RoundInstructions(adapters, {"out.bias": to_train((3,))}), shapes))
    assert said.startswith(
        "rank 1 to 3 of 12 layers in block.*.query; in full parameter out.bias: 243 numbers"
    )
    wide = Adapter.of({"B": to_train((2, 8)), "A": torch.zeros(8, 30)}, 1.0)  # 8 columns travel
    both = {"fc.weight": Adapter.of({"B": to_train((6, 8)), "A": to_train((8, 9))}, 1.0)}
    for asked in ({"out.weight": wide}, both | {"out.weight": wide}):
        assert str(trained_of(RoundInstructions(asked), shapes)).startswith("rank 8 of layer")
    full = {name: to_train(shape) for name, shape in shapes.items()}
    assert str(trained_of(RoundInstructions({}, full), shapes)).startswith(
        "in full all of it: 291 numbers"
    )


def test_biases_and_row_lengths_are_not_all_of_a_model() -> None:
    """They are as many as its parameters, under DoRA."""
    shapes = {"0.weight": (6, 4), "0.bias": (6,)}
    adapters = {"0.weight": Adapter.of({"B": to_train((6, 2)), "A": to_train((2, 4))}, 1.0)}
    dense = {"0.bias": to_train((6,)), "0.magnitude": to_train((6,))}
    said = str(trained_of(RoundInstructions(adapters, dense), shapes))
    assert "in full parameters 0.bias, 0.magnitude: 32 numbers" in said
