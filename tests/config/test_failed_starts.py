"""What is refused leaves no folder, and no start that failed is in the way of the next one."""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedraclora.api import simulate
from fedraclora.commands.cli import main
from fedraclora.commands.compare.table import compare_runs
from fedraclora.commands.simulate import sweep_name
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.errors import ConfigError, EngineError, FedRacLoraError
from fedraclora.privacy.secagg import SecAgg
from fedraclora.run.folder import has_begun
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.runner import execute

SMALL = [
    *("data=digits", "data.labels=null", "pretrain=none", "partition=iid", "model.hidden=[6]"),
    *("clients=8", "clients_per_round=4", "rounds=1", "output=study", "local.lr=0.5"),
]
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Call ``fedraclora simulate`` in this process; give its status and what it wrote to stderr."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    monkeypatch.delenv("FEDRACLORA_DATA", raising=False)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "")  # which simulate sets

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedraclora"])
        with pytest.raises(SystemExit) as end:
            main(["simulate", *words])
        assert isinstance(end.value.code, int)
        return end.value.code, capsys.readouterr().err

    yield call
    root.handlers[:] = handlers
    root.setLevel(level)


def unusual(said: str) -> str:
    """Leave out what every run says first."""
    return "".join(line for line in said.splitlines(True) if not line.startswith("INFO "))


def configured(folder: Path, *words: str) -> RunConfig:
    return from_plain(composed([*SMALL, f"output.dir={folder}", *words]), METHODS)


# ---- Before a folder is made --------------------------------------------------------------------

REFUSED: dict[str, list[str]] = {
    "method.name=[]": ["unknown method '[]'", "There are: "],
    "method.name={a: 1}": ["unknown method", "There are: "],
    "engine.name=[]": ["unknown engine '[]'", "There are: "],
    "data.name=[0]": ["unknown data '[0]'", "There are: "],
    "secure.name=[]": ["unknown secure '[]'", "There are: "],
    "++local.dp.name=[0]": ["unknown local.dp '[0]'", "gaussian"],
    "resume=[]": ["resume=[]", "auto or null"],
    "resume=2": ["resume=2", "auto or null"],
    "engine.threads=2147483648": ["engine.threads=2147483648", "1 to 1024"],
    "local.lr=1e308": ["local.lr=1e+308", "float32"],
    "method.alpha=1e308": ["method.alpha=1e+308", "float32"],
    "system=phones system.over_select=1e308": ["system.over_select=1e+308", "float32"],
    "local=dp_sgd local.dp.noise_multiplier=1e308": ["local.dp.noise_multiplier=1e+308"],
    "local.dp={name: gaussian, clip: 1e30, noise_multiplier: 1e30}": ["local.dp.", "product"],
    "seed=99999999999999999999": ["seed is 99999999999999999999", "up to 9223372"],
    "local.epochs=2147483648": ["local.epochs=2147483648", "1000000"],
    "engine=inline method=fed_sb local=lora_rite": ["local.optimizer=lora_rite", "three factors"],
    "secure=secagg aggregation_weights=uniform clients_per_round=2": [
        "3 or more",
        "clients_per_round=2",
        "secure=none",
    ],
    "local=relora method=fedmomentum": ["local.restart_every", "'method.merge_every'"],
    "method.rank=${foo}": ["method.rank takes its value", "'foo'"],
    "seed=???": ["seed: ??? marks", "set seed=VALUE"],
    "=3": ["a group is chosen by the name of one of its files"],
    "system=buffered system.buffer=9": ["system.buffer=9", "8 clients"],
    "method=": ["unknown method ''", "There are: "],
}


@pytest.mark.parametrize("words", REFUSED)
def test_what_is_refused_leaves_no_folder(command: Run, words: str, tmp_path: Path) -> None:
    typed = [words] if ": " in words else words.split(" ")
    status, error = command(*SMALL, f"output.dir={tmp_path / 'run'}", *typed)
    assert status == 1
    assert error.startswith("error: ")
    assert error.count("\n") == 1, error
    assert [part for part in REFUSED[words] if part not in error] == []
    assert not (tmp_path / "run").exists()


def test_a_model_of_somebody_elses_says_what_it_is_called_with(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "theirs.py").write_text("def root(x, /):\n    return x**0.5\n")
    monkeypatch.syspath_prepend(tmp_path)
    words = [word for word in SMALL if not word.startswith("model.")]
    functions = {"theirs:root": ["shape, classes", "takes (x, /)"], "nix:f": ["'nix'"]}
    for function, said in functions.items():
        status, error = command(
            *words, "model=function", f"model.function={function}", "model.head=[]"
        )
        assert status == 1
        assert error.startswith("error: model.function")
        assert [part for part in said if part not in error] == []


# ---- A start that failed ------------------------------------------------------------------------


def test_a_start_that_fails_takes_its_folder_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    config = configured(folder)
    with monkeypatch.context() as patch:
        patch.setattr(FedStrategy, "_measured", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            execute(RunBuilder(config, folder))
    assert not folder.exists()
    execute(RunBuilder(config, folder))
    assert (folder / "summary.json").is_file()


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


@pytest.mark.parametrize(
    "theirs",
    [
        {"config.yaml": "mine: 1\n", "thesis.txt": "all of it"},
        {"thesis.txt": "all of it"},
        {"summary.json": "{}"},
        {"config.yaml": "method: {name: mine}\n"},
        {"digests.json": "{}", "config.yaml": "mine: 1\n"},
    ],
    ids=" ".join,
)
def test_a_folder_of_somebody_elses_is_refused_and_stays(
    theirs: dict[str, str], command: Run, tmp_path: Path
) -> None:
    for name, text in theirs.items():
        (tmp_path / name).write_text(text)
    before = contents(tmp_path)
    with pytest.raises(ConfigError, match="and no run"):  # of a server app, which chooses no folder
        execute(RunBuilder(configured(tmp_path), tmp_path))
    for more in ([], ["resume=auto"]):
        status, error = command(*SMALL, f"output.dir={tmp_path}", *more)
        assert status == 1
        assert error.startswith(f"error: {tmp_path}")
        assert "resume=" not in error  # there is nothing to go on with
    for resume in (False, True):
        with pytest.raises(
            FedRacLoraError, match=r"not? (a )?run|is not the config|digests\.json is damaged"
        ):
            simulate(*SMALL, folder=tmp_path, resume=resume)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", [".hydra", ".lock", "run_id"])
def test_what_is_hidden_or_of_a_killed_start_is_not_in_the_way(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir() if name == ".hydra" else (tmp_path / name).write_text("a")
    execute(RunBuilder(configured(tmp_path), tmp_path))
    assert (tmp_path / "summary.json").is_file()


def test_what_somebody_else_puts_beside_a_start_that_fails_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(self: FedStrategy) -> dict[str, object]:
        (tmp_path / "notes.txt").write_text("mine")
        raise ZeroDivisionError

    monkeypatch.setattr(FedStrategy, "_measured", failing)
    with pytest.raises(ZeroDivisionError):
        execute(RunBuilder(configured(tmp_path), tmp_path))
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt"}


def test_a_start_that_was_killed_is_not_in_the_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(tmp_path / "other")
    wanted = execute(RunBuilder(config, tmp_path / "other")).summary["weights_digest"]
    folder = tmp_path / "run"

    def killed(self: FedStrategy) -> dict[str, object]:
        # Nothing is cleared after a kill.
        monkeypatch.setattr("fedraclora.run.folder._remove", lambda *_: None)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FedStrategy, "_measured", killed)
        with pytest.raises(KeyboardInterrupt):
            execute(RunBuilder(configured(folder, "seed=1"), folder))
    monkeypatch.undo()
    assert (folder / "config.yaml").is_file()
    assert not has_begun(folder)
    found = execute(RunBuilder(configured(folder), folder)).summary["weights_digest"]
    assert found == wanted
    assert yaml.safe_load((folder / "config.yaml").read_text())["seed"] == 0


def test_a_round_that_is_left_to_too_few_names_the_stage(command: Run, tmp_path: Path) -> None:
    assert SecAgg().shares(2) == 2
    words = [
        "secure=secagg",
        "aggregation_weights=uniform",
        "clients_per_round=3",
        f"output.dir={tmp_path / 'run'}",
    ]
    assert command(*SMALL, *words)[0] == 0


# ---- Disks and files ----------------------------------------------------------------------------


@pytest.mark.parametrize("place", range(12))
@pytest.mark.short(when=lambda place: place in {0, 4, 8, 11})
def test_a_full_disk_names_the_file_and_costs_nothing(
    place: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = ["output.chain=true", "output.sync=true"]
    flushed: list[int] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", flushed.append)
        wanted = execute(RunBuilder(configured(tmp_path / "a", *kept), tmp_path / "a")).summary
    left = place * (len(flushed) - 1) // 11  # from the first flush of the run to its last
    folder = tmp_path / "b"
    config = configured(folder, *kept)

    def full(handle: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left") as caught:
            execute(RunBuilder(config, folder))
    assert Path(str(caught.value.filename)).is_relative_to(folder)
    resume = folder.exists() and has_begun(folder)
    found = execute(RunBuilder(config, folder, resume=resume)).summary
    assert found["weights_digest"] == wanted["weights_digest"]
    assert found["ledger_digest"] == wanted["ledger_digest"]


@pytest.mark.parametrize("begun", [False, True])
def test_a_full_disk_says_how_to_go_on_where_there_is_a_run(
    begun: bool, command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "somewhere")

    place = (
        "fedraclora.strategies.base.FedStrategy._close",
        "fedraclora.strategies.runner.begin_folder",
    )[not begun]
    monkeypatch.setattr(place, full)
    folder = tmp_path / "run"
    status, error = command(*SMALL, "method.rank=4", f"output.dir={folder}")
    error = unusual(error)
    assert (status, folder.exists(), error.count("\n")) == (1, begun, 1)
    assert "make room" in error
    hint = "after round 0 of 1, with a checkpoint after round 0: 0 will be run again; resume with: "
    assert (f"{hint}fedraclora simulate resume={folder}" in error) == begun
    assert ("resume" in error) == begun


def test_an_engine_that_ends_says_how_to_go_on(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def ended(*_: object) -> None:
        raise EngineError("it is gone")

    monkeypatch.setattr("fedraclora.strategies.base.FedStrategy._close", ended)
    _, error = command(*SMALL, "method.rank=4", f"output.dir={tmp_path / 'run'}")
    assert unusual(error).startswith(
        "error: it is gone. The run stopped after round 0 of 1, with a "
    )
    assert f"; resume with: fedraclora simulate resume={tmp_path / 'run'}\n" in error


def test_a_place_where_no_folder_can_be_made_is_one_line(command: Run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    status, error = command(*SMALL, f"output.dir={tmp_path / 'file' / 'run'}")
    assert status == 1
    assert error.startswith("error: ")
    assert "Choose another" in error


@pytest.mark.parametrize("name", ["config.yaml", "summary.json"])
@pytest.mark.parametrize("bytes_", [b"\xff\xfe\x00\x9c" * 9, b"[1, 2"], ids=["binary", "cut"])
def test_a_damaged_file_is_named(command: Run, name: str, bytes_: bytes, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    execute(RunBuilder(configured(folder), folder))
    (folder / name).write_bytes(bytes_)
    status, error = command(f"resume={folder}")
    assert status == 1
    assert error.startswith("error: ")
    assert f"{folder / name}" in error


# ---- Sweeps with long names ---------------------------------------------------------------------


def test_a_long_name_is_cut_and_stays_unique() -> None:
    words = [f"key{i}.of_a_group={i}" for i in range(40)]
    name = sweep_name(words)
    assert len(name.encode()) == 255
    assert name == sweep_name(reversed(words))  # type: ignore[arg-type]
    assert name[:200] == sweep_name([*words, "seed=1"])[:200]
    assert len({name, sweep_name([*words, "seed=1"]), sweep_name([*words, "seed=2"])}) == 3
    wide = sweep_name([f"model.name={'é' * 200}"])
    assert len(wide.encode()) <= 255
    assert "\ufffd" not in wide


@pytest.mark.slow
def test_a_sweep_with_a_long_name_runs_and_is_found_again(
    command: Run, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    hydra = tmp_path_factory.mktemp("multirun")
    long = [f"local.lr={0.5:.230f}", f"output.dir={tmp_path}", f"hydra.sweep.dir={hydra}"]
    words = ["-m", *SMALL, "output.sync=false", "method.rank=1,2", *long]
    status, said = command(*words)
    assert (status, unusual(said)) == (0, "")
    folders = sorted(path.name for path in tmp_path.iterdir())
    assert len(folders) == 2
    logs = [(tmp_path / name / "run.log").read_text() for name in folders]
    assert [log.count(" trained: ") for log in logs] == [1, 1]  # also without progress
    assert command(*words, "resume=auto")[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == folders
    table: Any = compare_runs([tmp_path], tmp_path / "out")
    assert {row[1] for row in table.cells} == {"fed_rac_lora rank=1", "fed_rac_lora rank=2"}
