"""``flwr run`` on this machine: the bits of a run in process, and a status that is true."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fedraclora.clients.engines import engine_of
from fedraclora.commands import cli, flower
from fedraclora.commands.app import copy_app
from fedraclora.commands.simulate import simulate
from fedraclora.commands.status import STATUS
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.engines.flower.superlink import Ended, SuperLink
from fedraclora.run.ledger import Row
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.outcome import execute
from fedraclora.strategies.server.callbacks import AfterRound
from tests.common import summary_of
from tests.equivalence.listeners import listeners, needs_proc, off_loopback

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


def test_a_run_that_began_in_process_goes_on_as_an_app(tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    inline = [*WORDS, "engine=inline", "output.plots=true"]
    simulate(composed([*inline, f"output.dir={whole}"]), whole)

    def stop(row: Row) -> None:
        if row["round"] == 3:
            raise KeyboardInterrupt

    config = from_plain(composed([*inline, f"output.dir={cut}"]), METHODS)
    with pytest.raises(KeyboardInterrupt):
        execute(config, cut, engine_of, callbacks=[AfterRound(stop)])
    assert cli.run("flower", [f"resume={cut}", "engine.workers=2"]) == 0
    found, wanted = summary_of(cut), summary_of(whole)
    assert [found[name] for name in DIGESTS] == [wanted[name] for name in DIGESTS]
    assert found["git"] == wanted["git"]
    assert {p.name for p in cut.iterdir()} == {p.name for p in whole.iterdir()}


@pytest.mark.parametrize(
    "words",
    [
        ("method=pool_rac_lora", "method.pool=2", "method.refresh=3", "local.moments=link"),
        ("secure=secagg", "weights=uniform", "head=frozen"),
        (
            "method=ffa_lora",
            "wire.uplink=int4",
            "wire.downlink=eden2",
            "wire.feedback=true",
            "wire.downlink_coding=zstd",
        ),
    ],
    ids=["pool", "secure", "fewer bits"],
)
def test_nodes_are_one_process(words: tuple[str, ...], tmp_path: Path) -> None:
    app, here = tmp_path / "app", tmp_path / "here"
    more = [*WORDS, "local=momentum", *words]
    assert cli.run("flower", [*more, "engine.workers=2", f"output.dir={app}"]) == 0
    simulate(composed([*more, "engine=inline"]), here)
    assert [summary_of(app)[name] for name in DIGESTS] == [
        summary_of(here)[name] for name in DIGESTS
    ]


def test_a_run_that_fails_has_its_words_and_its_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, "local.lr=1e30", "engine.workers=1", f"output.dir={folder}"]
    assert cli.run("flower", words) == 1
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


def left_running(mark: str) -> list[str]:
    """Processes that inherited a word of the environment, but those that are dead already."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
            except OSError:
                continue
    return found


@needs_proc
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nobody_else_reaches_it_and_nothing_is_left(how: int, tmp_path: Path) -> None:
    words = [*WORDS, "rounds=100000", "engine.workers=1"]
    with tempfile.TemporaryDirectory(prefix="r") as made:  # short, for Ray's sockets
        folder = Path(made) / "run"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fedraclora.commands.flower",
                *words,
                f"output.dir={folder}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={
                **os.environ,
                "MARK_OF_THIS_TEST": made,
                "OMP_NUM_THREADS": "1",
                "TMPDIR": made,
                "RAY_TMPDIR": made,
            },
        )
        deadline = time.monotonic() + 300
        ledger = folder / "ledger.jsonl"
        while not (ledger.is_file() and ledger.read_bytes().count(b"\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        found = listeners(process.pid)
        assert any("gcs_server" in who for who in found.values())
        assert off_loopback(found) == {}
        process.send_signal(how)
        _, said = process.communicate(timeout=120)
        assert process.returncode == (-how if how == signal.SIGKILL else STATUS)
        assert ("interrupted" in said) == (how != signal.SIGKILL)
        while left_running(made) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left_running(made) == []
        if how != signal.SIGKILL:
            assert [*Path(made).glob("fedraclora-*")] == []
