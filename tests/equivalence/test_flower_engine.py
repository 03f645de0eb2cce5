"""Clients on the nodes of Flower's simulation runtime give the bits of clients in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
from listeners import listeners, needs_proc, off_loopback

from fedraclora.config.run_config import from_plain
from fedraclora.engines.flower import FlowerGrid
from fedraclora.errors import ClientError
from fedraclora.experiments.assemble import Assembled, assemble
from fedraclora.experiments.bench.usage import descendants
from fedraclora.experiments.choices import composed
from fedraclora.experiments.interrupt import STATUS
from fedraclora.strategies import METHODS
from fedraclora.tree import digest
from fedraclora.weights.job import JobFolder
from fedraclora.weights.update import WeightUpdate

WORDS = (
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "model.hidden=[12]",
    "output=study",
    "clients=8",
    "cohort=6",
    "rounds=4",
    "local.lr=0.1",
    "local=momentum",
)
RUNS = {
    "local head": ("method.rank=2", "head=local"),
    "rows": ("method.rank=2",),
    "carried": ("method.rank=2", "method.resample_every=3"),
    "basis of the last link": ("method=subspace_rac_lora", "method.rank=2"),
    "pool": ("method=pool_rac_lora", "method.pool=2", "method.refresh=3"),
    "dense": ("method=fedavg",),
    "both factors": ("method=fedavg_lora",),
    "lengths of rows": ("method=fedavg_lora", "method.alpha=4", "dora=true"),
    "moments": ("method=cola", "method.resample_every=2", "local.moments=link"),
    "projected moments": ("method=galore_average", "method.gap=3", "local.moments=run"),
    "secure": ("method.rank=2", "secure=secagg", "weights=uniform"),
    "ranks": ("method.rank=4", "system=mixed_ranks"),
    "moments of rows": ("method.rank=2", "local=adamw", "local.moments=rows"),
    "fewer bits": (
        "method=ffa_lora",
        "method.rank=2",
        "wire.uplink=int4",
        "wire.downlink=int8",
        "wire.feedback=true",
    ),
}
PROCESS = b"ray::ClientAppActor"  # how Ray names Flower's processes; a dot and a method follow


def processes(*, busy: bool = False) -> list[int]:
    """Flower's client processes below this one."""
    found = []
    for pid in descendants():
        try:
            command = Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:  # it has just ended
            continue
        if command.startswith(PROCESS + b".run" * busy):
            found.append(pid)
    return found


def run(*words: str, watch: Callable[[Assembled], None] = lambda _: None) -> Assembled:
    done = assemble(from_plain(composed([*WORDS, *words]), METHODS), None)
    watch(done)
    with closing(done.grid):
        done.strategy.start(done.grid)
    return done


def bits(done: Assembled) -> tuple[str, str]:
    strategy = done.strategy
    weights = strategy.method.weights(strategy.state, strategy.draw)
    return digest(weights), strategy.recorder.ledger.digest()


@pytest.mark.slow
def test_a_killed_process_is_replaced_and_no_bit_changes() -> None:
    """It is killed while it trains clients that keep tensors of their own."""
    words = (*RUNS["local head"], "rounds=2", "local.epochs=20")  # long enough to be met at work
    killed: list[int] = []

    def lie_in_wait(done: Assembled) -> None:
        grid, recorder = done.grid, done.strategy.recorder
        assert isinstance(grid, FlowerGrid)
        wait = grid.wait

        def strike(what: str) -> None:
            if len(recorder.ledger.rows) > 1 and not killed and (victims := processes(busy=True)):
                os.kill(victims[0], signal.SIGKILL)
                killed.append(victims[0])
            wait(what)

        grid.wait = strike  # type: ignore[method-assign]

    on_flower = run(*words, "engine=flower", "engine.workers=1", watch=lie_in_wait)
    assert len(killed) == 1
    assert on_flower.strategy.recorder.ledger.rows[-1]["failures"] == []
    assert bits(on_flower) == bits(run(*words, "engine=inline"))
    assert processes() == []


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RUNS if name != "local head"])
def test_nodes_are_one_process(name: str) -> None:
    on_flower = run(*RUNS[name], "engine=flower", "engine.workers=2")
    assert bits(on_flower) == bits(run(*RUNS[name], "engine=inline"))


@pytest.mark.slow
def test_processes_that_drifted_get_the_whole_weights(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = JobFolder.since

    def lie(self: JobFolder, held: int | None) -> WeightUpdate:
        update = told(self, held)
        return update if held is None else replace(update, mark=update.mark ^ 1)

    monkeypatch.setattr(JobFolder, "since", lie)
    on_flower = run(*RUNS["rows"], "engine=flower", "engine.workers=2")
    assert any("asked for every base weight" in line for line in caplog.messages)
    assert bits(on_flower) == bits(run(*RUNS["rows"], "engine=inline"))


@pytest.mark.slow
def test_a_client_that_fails_is_named() -> None:
    with pytest.raises(ClientError, match=r"round 1: .*client \d+: its training loss"):
        run("method.rank=2", "local.lr=1e30", "engine=flower", "engine.workers=1")


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


@pytest.mark.slow
@needs_proc
@pytest.mark.parametrize("command", ["simulate", "flower"])
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nobody_else_reaches_it_and_nothing_is_left(command: str, how: int, tmp_path: Path) -> None:
    words = [*WORDS, "method.rank=2", "rounds=100000", "engine=flower", "engine.workers=1"]
    with tempfile.TemporaryDirectory(prefix="r") as made:  # short, for Ray's sockets
        folder = Path(made) / "run"
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                f"fedraclora.experiments.{command}",
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
