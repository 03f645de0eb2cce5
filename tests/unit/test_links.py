"""Symbolic links in a run folder that may be of others: nothing is written through them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

import fedraclora
from fedraclora.commands import cli
from fedraclora.commands.compare.table import compare_runs
from fedraclora.errors import ConfigError
from fedraclora.run.digests import read_sealed

SMALL = ("data=digits", "data.labels=null", "pretrain=none", "partition=iid", "model.hidden=[6]")
SMALL += (
    "clients=2",
    "clients_per_round=2",
    "rounds=2",
    "output.sync=false",
    "output.progress=false",
)
LINKS = ("report.html", "curves.png", "ledger.jsonl", ".lock", "chain", "checkpoint", "export")
LINKS += ("chain/own", ".report.html.partial", "run_id")


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    return int(end.value.code or 0)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "run"
    fedraclora.simulate(*SMALL, "output.chain=true", folder=folder)
    return folder


def writers(run: Path) -> dict[str, Callable[[], object]]:
    """All that writes into a run folder, or below it."""
    return {
        "resume": lambda: command("simulate", f"resume={run}", "rounds=3"),
        "python": lambda: fedraclora.simulate(*SMALL, "rounds=3", folder=run, resume=True),
        "compact": lambda: command("compact", str(run), "--every", "2"),
        "report": lambda: command("report", str(run)),
        "export": lambda: command("export", str(run), "--format", "state_dict"),
        "compare": lambda: compare_runs([run], run / "compared"),
        "predict": lambda: command("predict", str(run), "--data", "test", "--out", f"{run}/p.csv"),
        "save": lambda: fedraclora.read_run(run).save(run / "saved"),
    }


@pytest.mark.parametrize("name", LINKS)
def test_nothing_is_written_through_a_link_out_of_a_run_folder(
    name: str, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run, aside, link = tmp_path / "run", tmp_path / "aside", tmp_path / "run" / name
    shutil.copytree(whole, run)
    aside.mkdir()
    target = aside / "target"
    if link.exists():
        shutil.move(link, target)  # so that the run can be read as before
    elif "." in name or name == "run_id":
        target.write_text("canary")
    else:
        target.mkdir()
        (target / "canary").write_text("canary")
    link.symlink_to(target)
    before = contents(aside), contents(run)
    for what, write in writers(run).items():
        said = ""
        try:
            assert write() == 1, what
        except ConfigError as error:
            said = str(error)
        assert f"{link} is a symbolic link" in said + capsys.readouterr().err, what
        assert (contents(aside), contents(run)) == before, what
    assert command("evaluate", str(run)) == 0  # which only reads
    assert command("report", str(run), "--out", str(tmp_path / "there.html")) == 0


@pytest.mark.slow
def test_links_within_a_run_folder_and_to_it_are_no_harm(whole: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(whole, run)
    (run / "wandb" / "run-1").mkdir(parents=True)
    (run / "wandb" / "latest-run").symlink_to("run-1")
    (tmp_path / "latest").symlink_to("run")
    assert command("simulate", f"resume={tmp_path / 'latest'}", "rounds=3") == 0
    assert command("report", str(tmp_path / "latest")) == 0
    assert read_sealed(run / "summary.json")["rounds"] == 3
    assert (run / "report.html").is_file()
    assert (run / "wandb" / "latest-run").is_symlink()
