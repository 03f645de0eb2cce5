"""``compare method=...``: methods run alike, each seed once, and held against one of them."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from drawing import painting

import fedraclora
from fedraclora.commands import cli
from fedraclora.commands.compare import run as comparing
from fedraclora.commands.compare.command import names_methods
from fedraclora.commands.compare.outcome import outcome_sentence
from fedraclora.commands.compare.run import Row
from fedraclora.commands.compare.table import settings_of
from fedraclora.commands.run_files import Group, RunFiles, read_files
from fedraclora.compose.values import pairs_of
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.rng import generator
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fedavg import FedAvg
from tests.common import summary_of

TASK = ["data=digits", "pretrain=none", "model.hidden=[8]", "clients=6", "clients_per_round=3"]
TASK += ["rounds=2", "local.steps=2", "local.lr=0.1", "output=study"]
WORDS = ["method=fed_rac_lora,fedavg_lora", "fed_rac_lora:method.rank=2,compression.uplink=eden2"]
WORDS += ["fedavg_lora:method.rank=3", "fedavg_lora:method.alpha=6", "reference=fedavg_lora"]


def run(folder: Path, *words: str) -> int:
    return cli.run("compare", [*words, *TASK, f"output.dir={folder}"])


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two methods on two seeds."""
    folder = tmp_path_factory.mktemp("compared")
    with painting():
        assert run(folder, *WORDS, "seeds=2") == 0
    return folder


def summaries(folder: Path, row: str) -> list[dict[str, Any]]:
    return [
        dict(summary_of(path.parent)) for path in sorted(folder.glob(f"{row}_*/*/summary.json"))
    ]


def records(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "table.csv").open() as file:
        return {row["label"]: row for row in csv.DictReader(file)}


@pytest.mark.slow
def test_each_method_runs_the_same_seeds_with_its_own_settings(compared: Path) -> None:
    found = {
        row: [yaml.safe_load(path.read_text()) for path in compared.glob(f"{row}_*/*/config.yaml")]
        for row in ("fed_rac_lora", "fedavg_lora")
    }
    for row, configs in found.items():
        assert sorted(config["seed"] for config in configs) == [0, 1]
        assert {config["method"]["name"] for config in configs} == {row}
        assert {config["rounds"] for config in configs} == {2}
    rac, avg = (configs[0] for configs in found.values())
    assert (rac["method"]["rank"], avg["method"]["rank"]) == (2, 3)
    assert avg["method"]["alpha"] == 6
    assert (rac["compression"]["uplink"], avg["compression"]["uplink"]) == ("eden2", "float32")


def test_the_table_has_what_the_runs_say(compared: Path) -> None:
    rows = records(compared)
    scores = {row: [s["metrics"]["accuracy"] for s in summaries(compared, row)] for row in rows}
    for row, record in rows.items():
        one, two = scores[row]
        assert float(record["metric_mean"]) == pytest.approx((one + two) / 2)
        assert float(record["metric_error"]) == pytest.approx(abs(one - two) / 2)
        sent = [s["uplink_total"] + s["downlink_total"] for s in summaries(compared, row)]
        assert float(record["traffic_mb"]) == pytest.approx(sum(sent) / 2e6)
    differences = [a - b for a, b in zip(*scores.values(), strict=True)]
    first, other = rows.values()
    sign = 1 if first["label"] == "fed_rac_lora" else -1
    mine = rows["fed_rac_lora"]
    assert float(mine["difference"]) == pytest.approx(sign * sum(differences) / 2)
    assert float(mine["difference_error"]) == pytest.approx(
        abs(differences[0] - differences[1]) / 2
    )
    assert float(rows["fedavg_lora"]["difference"]) == 0
    assert (mine["rank"], mine["precision up"]) == ("2", "eden2")
    assert other["precision down"] == "float32"
    assert float(first["metric_mean"]) >= float(other["metric_mean"])
    text = (compared / "table.md").read_text()
    assert "method.rank" in text
    assert "compression.uplink" in text
    assert "data.name" not in text  # it is the same


def test_a_figure_and_a_report_are_written(compared: Path) -> None:
    picture = (compared / "compare.png").read_bytes()
    assert picture[:4] == b"\x89PNG"
    assert len(picture) > 10_000
    text = (compared / "report.html").read_text()
    assert "fed_rac_lora" in text
    assert "fedavg_lora" in text


def test_what_has_run_is_not_run_again(
    compared: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the same command, nor by one of fewer methods."""

    def never(*_: object, **__: object) -> None:
        raise AssertionError("a run began")

    kept = (compared / "table.csv").read_bytes()
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr("fedraclora.commands.compare.run.run_asked", never)
        assert run(compared, *WORDS[:-1], "seeds=1") == 0
        assert [*records(compared)["fed_rac_lora"]["seeds"]] == ["1"]
        assert run(compared, *WORDS, "seeds=2") == 0
    assert (compared / "table.csv").read_bytes() == kept
    *_, where, said = capsys.readouterr().out.splitlines()
    assert str(compared / "compare.png") in where
    rows = records(compared)
    assert f"{float(rows['fed_rac_lora']['metric_mean']):.4f}" in said
    assert f"{float(rows['fedavg_lora']['metric_mean']):.4f}" in said


@pytest.mark.slow
def test_a_run_is_one_line_and_its_log_has_the_rest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=fedavg,ffa_lora", "seeds=2", *TASK, "output=run", "output.plots=false"]
    assert cli.run("compare", [*words, f"output.dir={tmp_path / 'brief'}"]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    lines = told.out.splitlines()
    table = next(k for k, line in enumerate(lines) if not line.startswith("["))
    assert table == 4  # two methods on two seeds
    assert all("accuracy" in line and "learning rate 0.1" in line for line in lines[:table])
    logs = [path.read_text() for path in (tmp_path / "brief").glob("*/*/run.log")]
    assert len(logs) == 4
    assert all("training samples" in text for text in logs)
    one = ["method=ffa_lora", "seeds=1", *TASK, "output=run", "output.plots=false"]
    whole = f"output.dir={tmp_path / 'whole'}"
    assert cli.run("compare", [*one, whole, "output.verbose=true"]) == 0
    assert "training samples" in capsys.readouterr().err


def test_other_settings_are_other_runs(compared: Path) -> None:
    before = {*compared.glob("*/*/summary.json")}
    assert run(compared, "method=fedavg_lora", "rounds=1", "ffa:method=ffa_lora") == 0
    more = {*compared.glob("*/*/summary.json")} - before
    assert sorted(path.parts[-3].rpartition("_")[0] for path in more) == ["fedavg_lora", "ffa"]
    assert set(records(compared)) == {"fedavg_lora", "ffa"}


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["method=fed_rac_lora,fedavgg"], "did you mean 'fedavg'"),
        (["method=fedavg,ffa_lora", "fedavg_lora:method.rank=2"], "fedavg_lora.*not compared"),
        (["method=fedavg,ffa_lora", "reference=fedavg_lora"], "unknown reference"),
        (["method=fedavg,ffa_lora", "method.rank=2"], "fedavg.*rank"),
        (["method=fedavg,ffa_lora", "fedavg:clients=0"], "clients"),
        (["method=fedavg,ffa_lora", "seeds=0"], "seeds=0"),
        (["method=fedavg,ffa_lora", "seeds=[3,4]"], "seed=0 seeds=3"),
        (["method=fedavg,ffa_lora", "seed=3,4"], "seed=0 seeds=3"),
        ([], "method=A,B"),
        (["method=fedavg,ffa_lora", "metric=acuracy"], "did you mean 'accuracy'"),
    ],
)
def test_what_is_wrong_is_said(
    words: list[str], match: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(tmp_path / "out", *words) != 0
    told = capsys.readouterr()
    assert re.search(match, told.err + told.out)
    assert not [*tmp_path.glob("out/*.md")]
    ran = [*tmp_path.glob("out/*/seed_0")]
    assert bool(ran) == (words[-1:] == ["metric=acuracy"])  # which only a run can tell


def test_a_comparison_without_words_of_its_own_is_with_the_first_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In runs/compare, by the first metric of the task, on one seed."""
    monkeypatch.chdir(tmp_path)
    assert cli.run("compare", ["method=ffa_lora,fedavg", *TASK]) == 0
    rows = records(tmp_path / "runs" / "compare")
    assert float(rows["ffa_lora"]["difference"]) == 0
    assert float(rows["fedavg"]["difference"]) != 0
    for row, found in rows.items():
        (summary,) = summaries(tmp_path / "runs" / "compare", row)
        assert float(found["metric_mean"]) == pytest.approx(summary["metrics"]["accuracy"])


@pytest.mark.slow
def test_a_row_that_diverges_is_shown_and_not_run_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["method=fedavg,ffa_lora", "ffa_lora:local.lr=1e30"]
    assert run(tmp_path, *words) == 0
    assert "diverged" in capsys.readouterr().out.splitlines()[-1]
    (kept,) = tmp_path.glob("ffa_lora_*/seed_0/stopped.json")
    before = kept.stat().st_mtime_ns
    assert run(tmp_path, *words) == 0
    assert kept.stat().st_mtime_ns == before
    assert math.isnan(float(records(tmp_path)["ffa_lora"]["metric_mean"] or "nan"))


def test_a_row_that_fails_leaves_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What only shows in the run: a sample cannot be divided among so many clients."""
    words = ["method=fedavg,ffa_lora", "ffa_lora:clients=100000"]
    assert run(tmp_path, *words) != 0
    assert "1 of 2 rows failed" in capsys.readouterr().err
    assert set(records(tmp_path)) == {"fedavg"}


@dataclass(frozen=True)
class Scaled(FedRacLora):
    """A method of somebody's own."""


@pytest.mark.slow
def test_instances_of_methods_are_named_and_show_their_rank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    methods = [FedRacLora(rank=3), Scaled(rank=2), FedAvg(), "ffa_lora"]
    found = fedraclora.compare(*TASK, methods=methods, folder=tmp_path)
    assert dict(zip(found.table["label"], found.table["rank"], strict=True)) == {
        "fed_rac_lora r=3": "3",
        "Scaled r=2": "2",
        "fedavg": "-",
        "ffa_lora": "8",
    }
    runs = [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]
    assert [line.split("] ")[1].split(", seed")[0] for line in runs] == [*found.runs]
    with pytest.raises(ConfigError, match="r=3 is named twice"):
        fedraclora.compare(*TASK, methods=[FedRacLora(rank=3)] * 2, folder=tmp_path)


@pytest.mark.slow
def test_objects_of_a_program_are_compared(tmp_path: Path) -> None:
    x = torch.from_numpy(generator(0, "compared").normal(size=(60, 4))).float()
    data = [(part, (part[:, 0] > 0).long()) for part in x.split(20)]
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    given: dict[str, Any] = {"model": net, "data": data, "local": {"lr": 0.1}, "rounds": 2}
    methods = {
        "ffa_lora": None,
        "mine": FedRacLora(rank=2),
        "r=4": {"method": {"name": "fed_rac_lora", "rank": 4}},
        "r=3": {"name": "fed_rac_lora", "rank": 3},
    }
    found = fedraclora.compare(
        "output.progress=false", methods=methods, folder=tmp_path, seeds=2, **given
    )
    assert set(found.table["label"]) == {"ffa_lora", "mine", "r=4", "r=3"}
    assert {row: len(folders) for row, folders in found.runs.items()} == dict.fromkeys(methods, 2)
    ranks = {row: read_files(f[0]).config["method"]["rank"] for row, f in found.runs.items()}  # type: ignore[index]
    assert (ranks["mine"], ranks["r=4"], ranks["r=3"]) == (2, 4, 3)
    assert "ffa_lora" in found.summary
    assert (found.folder / "compare.png").is_file()
    with pytest.raises(ConfigError, match="twice"):
        fedraclora.compare(methods=["fedavg", "fedavg"], folder=tmp_path)


@pytest.mark.parametrize(
    ("shared", "own"),
    [
        ({"compression": {"uplink": "eden2"}}, {"compression.uplink": "int4"}),
        ({"compression": {"uplink": "eden2"}}, ["compression.uplink=int4"]),
        ({"local": {"lr": 0.1, "momentum": 0.5}}, {"local": {"lr": 0.3}}),
        ({"rounds": 3}, ["rounds=2"]),
        ({"clients_per_round": 2}, {"clients_per_round": 3}),
        ({"local": "sgd"}, {"local": "adamw"}),
        ({"local": "sgd"}, ["local=adamw"]),
        ({"aggregator": "mean"}, {"aggregator": "median"}),
        ({"partition": {"name": "dirichlet", "alpha": 0.1}}, {"partition.alpha": 0.5}),
        ({"partition": "iid"}, {"partition": "dirichlet"}),
    ],
)
def test_a_rows_own_settings_replace_those_of_all(
    shared: dict[str, Any], own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: dict[str, Any] = {}

    def note(rows: dict[str, Row], *_: object) -> dict[str, str]:
        found.update({name: row.plain for name, row in rows.items()})
        return dict.fromkeys(rows, "not run")

    monkeypatch.setattr(comparing, "run_all", note)
    words = own if isinstance(own, list) else [own]
    methods = {"ffa_lora": None, "b": [*words, "method=fed_rac_lora"]}
    task = ["data=digits", "model.hidden=[8]", "clients=30", "output=study"]
    with pytest.raises(FedRacLoraError, match="not run"):
        fedraclora.compare(*task, methods=methods, folder=tmp_path, **shared)
    for key, value in pairs_of(shared):
        assert_has(found["ffa_lora"], key, value)
    for each in words:
        pairs = [tuple(each.split("="))] if isinstance(each, str) else pairs_of(each)
        for key, value in pairs:
            assert_has(found["b"], key, value)


def assert_has(plain: dict[str, Any], key: str, value: object) -> None:
    """A composed config has a value; of a group its choice."""
    group, _, leaf = key.partition(".")
    at = plain[group]
    assert str(at[leaf or "name"] if isinstance(at, dict) else at) == str(value), key


@pytest.mark.slow
def test_an_interrupted_comparison_is_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With the numbers of one that was never interrupted."""

    def stop(row: dict[str, Any]) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt

    def once(name: str, **more: Any) -> fedraclora.ComparisonResult:
        methods = ["fedavg", "ffa_lora"]
        return fedraclora.compare(*TASK, methods=methods, folder=tmp_path / name, **more)

    with pytest.raises(KeyboardInterrupt):
        once("a", callbacks=[stop])
    assert not (tmp_path / "a" / "table.md").exists()
    figures = ["label", "metric_mean", "traffic_mb"]
    found, whole = once("a"), once("b")
    assert found.table[figures].equals(whole.table[figures])
    assert found.summary == whole.summary


def test_a_folder_may_be_named_like_a_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of a sweep are."""
    (tmp_path / "method=fedavg,seed=0").mkdir()
    monkeypatch.chdir(tmp_path)
    assert not names_methods(["method=fedavg,seed=0"])
    assert names_methods(["method=fedavg"])
    assert names_methods(["mine:method=fedavg"])
    assert not names_methods(["runs/a", "--out", "x"])


@pytest.mark.parametrize(
    ("metric", "difference", "error", "words"),
    [
        ("accuracy", 0.02, 0.001, "better"),
        ("accuracy", -0.02, 0.001, "worse"),
        ("loss", 0.02, 0.001, "worse"),
        ("loss", -0.02, math.nan, "better"),
        ("accuracy", 0.02, 0.015, "not decided"),
        ("accuracy", 0.0, 0.0, "equal"),
    ],
)
def test_the_sentence_says_what_the_numbers_say(
    metric: str, difference: float, error: float, words: str
) -> None:
    groups = [Group(name, [RunFiles(Path(), {}, [], {"rounds": 1})]) for name in ("base", "ours")]
    base = {"label": "base", "metric": metric, "metric_mean": 0.9, "traffic_mb": 200.0}
    ours = base | {"label": "ours", "difference": difference, "difference_error": error}
    ours |= {"metric_mean": 0.9 + difference, "traffic_mb": 50.0}
    said = outcome_sentence([base, ours], "base", groups)
    found = [word for word in ("better", "worse", "not decided", "equal") if word in said]
    assert found == [words]
    assert "25 %" in said
    ours |= {"target_traffic_mb": 30.0, "target_reached": 3, "seeds": 5}
    assert "3 of 5 runs are as good after 30 MB" in outcome_sentence([base, ours], "base", groups)
    ours |= {"target_reached": 5}
    assert "is as good after 30 MB" in outcome_sentence([base, ours], "base", groups)
    assert "4 times" in outcome_sentence([ours, base | {"difference": -difference}], "ours", groups)


@pytest.mark.parametrize(("train", "shown"), [(None, "0.5"), ("mine:train", "times 0.5")])
def test_a_rate_is_a_factor_where_training_has_rates_of_its_own(
    train: str | None, shown: str
) -> None:
    config: dict[str, object] = {"local": {"lr": 0.5, "train": train}}
    found = settings_of(Group("own", [RunFiles(Path(), config, [], {"rounds": 1})]))
    assert found["learning rate"] == shown
