"""A server without a single sample: nobody measures, no row says that anybody did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.commands.compare.table import compare_runs
from fedraclora.commands.report.page import page_of, read_shown
from fedraclora.compose.overrides import composed
from fedraclora.config.build import build_task
from fedraclora.config.run_config import from_plain
from fedraclora.data import DATASETS
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.strategies.methods import METHODS
from fedraclora.terminal.opening import introduction
from tests.common import normal

X = normal(60, 4).float()
CLIENTS = [(x, (x[:, 0] > 0).long()) for x in X.split([10, 20, 30])]
MODEL = torch.nn.Sequential(torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 2))
WORDS = ("output.progress=false", "local.lr=0.1", "method.rank=2", "method.alpha=3")


def simulated(**more: Any) -> fedraclora.RunResult:
    return fedraclora.simulate(
        *WORDS, model=MODEL, data=CLIENTS, **({"method": "fed_rac_lora", "rounds": 2} | more)
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> fedraclora.RunResult:
    return simulated(test=0, folder=tmp_path_factory.mktemp("run") / "run")


def test_whether_the_server_measures_changes_no_weight(run: fedraclora.RunResult) -> None:
    """All samples are trained on: no share of them was held out for nobody."""
    measured = simulated(test=(normal(9, 4, seed=1).float(), torch.arange(9) % 2))
    assert measured.rows[2]["metrics"] != {}
    assert run.summary["weights_digest"] == measured.summary["weights_digest"]
    assert [row["metrics"] for row in run.rows] == [{}, {}, {}]
    assert run.summary["metrics"] == {}
    assert "no test samples" in introduction(run.summary["begins"])["metrics"]  # type: ignore[index]


@pytest.mark.slow
def test_every_command_reads_a_run_that_nobody_measured(
    run: fedraclora.RunResult, tmp_path: Path
) -> None:
    assert run.folder is not None
    again = simulated(test=0, folder=tmp_path / "again", rounds=1)
    gone_on = simulated(test=0, folder=again.folder, resume=True, rounds=2)
    assert gone_on.summary["weights_digest"] == run.summary["weights_digest"]
    text = page_of([read_shown(run.folder)])
    assert "no test samples" in text
    assert "not finite" not in text
    run.plot(tmp_path / "a.png")
    with pytest.raises(CheckpointError, match=r"none .*evaluated"):
        compare_runs([run.folder], tmp_path / "table")
    with pytest.raises(ConfigError, match="no test samples"):
        run.evaluate()
    assert run.evaluate(CLIENTS[0])["accuracy"] <= 1
    assert len(run.predict(CLIENTS[2][0])) == 30
    exported = run.export(tmp_path / "out", "state_dict")
    assert exported["warnings"] == []
    assert "| accuracy |" not in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize("test", [True, 1, -0.1, float("nan")])
def test_what_is_no_share_is_refused(test: object) -> None:
    with pytest.raises(ConfigError, match=r"test=.*in \[0, 1\)"):
        simulated(test=test)


def test_a_share_may_be_said_in_place_of_samples() -> None:
    task = simulated(test=0.5, rounds=1).builder.built.task
    assert (task.info["train"], task.info["test"]) == (30, 30)
    assert task.info["held_out"] == 0.5


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["evaluate.generate=1"], r"evaluate\.generate .*data of numbers"),
        (["stop.patience=1"], r"data\.validation=0"),
    ],
)
def test_what_needs_test_samples_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        fedraclora.simulate(
            "data=digits", "data.test_fraction=0", "pretrain=none", "rounds=1", *words
        )


OWN = ["data=own", "clients=3", "model=mlp", "pretrain=none", "output=study"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], r"data\.classes or data\.shape .*no sample"),
        (["data.classes=3"], r"data\.classes or data\.shape "),
        (["data.classes=3", "data.shape=[4]", "data.test_fraction=0.2"], "at the clients"),
    ],
)
def test_a_server_without_a_sample_is_told_what_samples_look_like(
    words: list[str], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        build_task(from_plain(composed([*OWN, *words]), METHODS))


@pytest.mark.parametrize(
    ("loss", "target"),
    [("cross_entropy", ()), ("logistic", ()), ("squared_error", (3,)), ("multi_label", (3,))],
)
def test_a_server_without_a_sample_has_a_table_of_their_form(
    loss: str, target: tuple[int, ...]
) -> None:
    data = DATASETS["own"](clients=2, classes=3, shape=[5, 4], loss=loss)
    assert (len(data.test), tuple(data.test.inputs["x"].shape)) == (0, (0, 5, 4))
    assert tuple(data.test.target.shape[1:]) == target


@pytest.mark.parametrize("load", [lambda: DATASETS["digits"](test_fraction=0.0)], ids=["digits"])
def test_a_share_of_nothing_leaves_all_rows_to_train_on(load: Callable[[], Any]) -> None:
    data = load()
    assert (len(data.train), len(data.test)) == (1797, 0)
