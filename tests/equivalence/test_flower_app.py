"""``flwr run`` on this machine: the bits of a run in process, and a status that is true."""

from __future__ import annotations

import json
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedraclora.clients.engines import engine_of
from fedraclora.config.run_config import from_plain
from fedraclora.engines.flower.superlink import Ended, SuperLink
from fedraclora.experiments import flower
from fedraclora.experiments.app import copy_app
from fedraclora.experiments.choices import composed
from fedraclora.experiments.simulate import simulate
from fedraclora.strategies import METHODS
from fedraclora.strategies.outcome import execute
from fedraclora.strategies.server.rows import Row

pytestmark = pytest.mark.slow

WORDS = [
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "model.hidden=[12]",
    "method.rank=2",
    "head=local",
    "clients=6",
    "cohort=4",
    "rounds=4",
    "local.lr=0.1",
    "output=study",
    "output.checkpoint_every=2",
]
DIGESTS = ("weights_digest", "ledger_digest")


def summary(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "summary.json").read_text())
    return found


def test_a_run_that_began_in_process_goes_on_as_an_app(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    inline = [*WORDS, "engine=inline", "output.plots=true"]
    simulate(composed([*inline, f"output.dir={whole}"]), whole)

    def stop(row: Row) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt

    config = from_plain(composed([*inline, f"output.dir={cut}"]), METHODS)
    with pytest.raises(KeyboardInterrupt):
        execute(config, cut, engine_of, on_round=[stop])
    assert flower.main([f"resume={cut}", "engine.workers=2"]) == 0
    found, wanted = summary(cut), summary(whole)
    assert [found[name] for name in DIGESTS] == [wanted[name] for name in DIGESTS]
    assert found["git"] == wanted["git"]
    assert {p.name for p in cut.iterdir()} == {p.name for p in whole.iterdir()}


def test_a_run_that_fails_has_its_words_and_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, "local.lr=1e30", "engine.workers=1", f"output.dir={folder}"]
    assert flower.main(words) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: round 1: 4 client(s) failed")
    assert "its training loss is" in last
    assert "(finished:failed)" in last
    assert (folder / "checkpoint" / "checkpoint.safetensors").is_file()
    assert not (folder / "summary.json").exists()


def run_app(link: SuperLink, text: str, options: dict[str, str | int | float | bool]) -> Ended:
    copy_app(link.home / "app")
    (link.home / "run.toml").write_text(text)
    return link.run_app(link.home / "app", link.home / "run.toml", options)


def test_flwr_run_without_a_config_says_how_to_write_one() -> None:
    with SuperLink(show=False) as link:
        ended = run_app(link, "resume = false\n", {"num-supernodes": 2})
    assert not ended.completed
    assert "cfg-json, the config of the run, is empty" in ended.details
    assert "--write" in ended.details
    assert not link.home.exists()


def kill_a_client_process(link: SuperLink, ledger: Path) -> None:
    """Kill a process of a run's Ray once some rounds are done."""
    while not (ledger.is_file() and ledger.read_bytes().count(b"\n") > 3):
        time.sleep(0.05)
    for entry in Path("/proc").iterdir():
        try:
            ours = f"TMPDIR={link.home}".encode() in (entry / "environ").read_bytes()
            name = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if ours and name.startswith(b"ray::ClientAppActor"):
            os.kill(int(entry.name), signal.SIGKILL)
            return


def test_a_process_that_dies_under_flwr_run_ends_the_run(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    request = flower.prepare([*WORDS, "rounds=100000", f"output.dir={folder}"])
    with SuperLink(show=False) as link, ThreadPoolExecutor() as thread:
        killed = thread.submit(kill_a_client_process, link, folder / "ledger.jsonl")
        ended = run_app(link, request.run_config, dict(flower.options_of(request)))
        killed.result(timeout=60)
    assert not ended.completed
    assert "the process that trained client" in ended.details
    assert "go on with resume" in ended.details
    assert (folder / "checkpoint" / "checkpoint.safetensors").is_file()
