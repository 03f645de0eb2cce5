"""Clients on Ray workers give the bits of clients in this process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import ray
import torch
from ray import cloudpickle

from fedraclora.commands.status import STATUS
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.config.settings import RayConfig
from fedraclora.engines.ray import Cluster, RayGrid
from fedraclora.engines.ray.session import RaySession
from fedraclora.errors import ClientError, ConfigError
from fedraclora.protocol.method import Plan, RoundInstructions
from fedraclora.run.client_state import ClientStore
from fedraclora.run.ledger import read_ledger
from fedraclora.run.stopped import stop_reason
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.tree import Tree, digest
from fedraclora.weights.files import load_checkpoint
from fedraclora.weights.replica import Replica
from fedraclora.weights.update import WeightHistory, WeightUpdate
from fedraclora.wire.answers import Answer, NoAnswer
from fedraclora.wire.exchange import Ask, TrainRequest
from tests.campaigns import kill_workers
from tests.common import assemble

pytestmark = pytest.mark.long

# Workers cannot import a test module.
cloudpickle.register_pickle_by_value(sys.modules[__name__])

WORDS = (
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "model.hidden=[12]",
    "output=study",
    "clients=80",
    "clients_per_round=70",
    "rounds=4",
    "local.lr=0.1",
    "local=momentum",
)
# Rows, and sums of blocks; links, dense weights and what stays at clients.
RUNS = {
    "rows": ("method.rank=2", "engine.chunk=9"),
    "sums": ("method.rank=2", "engine.chunk=32"),
    "carried": ("method.rank=2", "engine.chunk=32", "method.merge_every=3"),
    "basis of the last link": ("method=subspace_rac_lora", "method.rank=2", "engine.chunk=32"),
    "pool": ("method=pool_rac_lora", "engine.chunk=32", "method.pool=2", "method.refresh=3"),
    "dense": ("method=fedavg", "engine.chunk=32"),
    "both factors": ("method=fedavg_lora", "engine.chunk=20"),
    "local head": ("method.rank=2", "engine.chunk=16", "head=personal"),
    "moments": (
        "method=cola",
        "method.merge_every=2",
        "engine.chunk=16",
        "head=personal",
        "local.optimizer_state=merge",
    ),
    "projected moments": (
        "method=galore_average",
        "method.gap=3",
        "engine.chunk=16",
        "local.optimizer_state=run",
    ),
    "secure": (
        "method.rank=2",
        "engine.chunk=32",
        "secure=secagg",
        "secure.neighbours=4",
        "aggregation_weights=uniform",
    ),
    "ranks": ("method.rank=4", "engine.chunk=32", "system=mixed_ranks"),
    "moments of rows": (
        "method.rank=2",
        "engine.chunk=32",
        "local=adamw",
        "local.optimizer_state=rows",
    ),
    "replayed scalars": (
        "method=decomfl",
        "method.steps=2",
        "method.momentum=0.9",
        "local.momentum=0",
        "local.lr=0.002",
        "engine.chunk=16",
    ),
    "chances of seeds": (
        "method=fedkseed",
        "method.steps=3",
        "method.seeds=64",
        "method.pro=true",
        "local.lr=0.002",
        "engine.chunk=16",
    ),
    "blocks": ("method=ferret", "method.server_lr=0.02", "engine.chunk=32"),
    "coded, and attacked": (
        "method.rank=2",
        "engine.chunk=9",
        "attack=sign_flip",
        "aggregator=median",
        "compression.uplink=eden2",
        "compression.uplink_coding=zstd",
        "compression.downlink=eden2",
        "compression.downlink_coding=zstd",
    ),
    "fewer bits": (
        "method=pool_rac_lora",
        "method.pool=2",
        "engine.chunk=9",
        "compression.uplink=eden3",
        "compression.uplink_coding=zstd",
        "compression.downlink=eden4",
        "compression.downlink_coding=zstd",
        "compression.feedback=true",
    ),
}


@pytest.fixture(scope="module", autouse=True)
def cluster() -> Iterator[None]:
    """One Ray for the module: engines join what is there, and leave it."""
    with closing(RaySession()):
        ray.init(
            address="local",
            num_cpus=3,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
        )
        yield


def run(*words: str) -> RunBuilder:
    done = assemble(from_plain(composed([*WORDS, *words]), METHODS), None)
    with closing(done.grid):
        done.strategy.run(done.grid)
    return done


def bits(done: RunBuilder) -> tuple[str, str]:
    strategy = done.strategy
    weights = strategy.method.weights(strategy.state, strategy.draw)
    return digest(weights), strategy.recorder.ledger.digest()


@cache
def in_process(name: str) -> tuple[str, str]:
    return bits(run(*RUNS[name]))


@cache
def on_ray(name: str, workers: int) -> RunBuilder:
    *words, chunk = sorted(RUNS[name], key=lambda w: w.startswith("engine"))
    return run(*words, "engine=ray", chunk, f"engine.workers={workers}")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.smoke] * (n == "local head")) for n in RUNS]
)
def test_two_workers_are_one_process(name: str) -> None:
    assert bits(on_ray(name, 2)) == in_process(name)


@pytest.mark.parametrize("workers", [1, 3])
def test_the_number_of_workers_changes_no_bit(workers: int) -> None:
    assert bits(on_ray("rows", workers)) == in_process("rows")


def test_replicas_follow_by_links_and_only_the_first_round_sends_weights() -> None:
    done = on_ray("local head", 2)
    assert isinstance(done.grid, RayGrid)
    history = done.grid.history
    assert (history.version, history.oldest) == (4, 0)
    update = history.since(3)
    assert {v for v, _ in update.links} == {4}
    assert 0 < update.payload_bytes < history.since(None).payload_bytes


def test_a_worker_that_drifted_gets_the_whole_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    words = [w for w in RUNS["rows"] if not w.startswith("engine")]
    one = ["engine.chunk=9", "engine.workers=1"]
    done = assemble(from_plain(composed([*WORDS, *words, "engine=ray", *one]), METHODS), None)
    grid = done.grid
    assert isinstance(grid, RayGrid)
    told, asked = grid.history.since, list[int | None]()

    def lie(version: int | None) -> WeightUpdate:
        news = told(version)
        asked.append(version)
        if version is None or version == news.version:
            return news
        return replace(news, mark=news.mark ^ 1)

    monkeypatch.setattr(grid.history, "since", lie)
    with closing(grid):
        done.strategy.run(grid)
    assert bits(done) == in_process("rows")
    assert asked.index(0) < asked.index(None)  # the first weights come with the model
    assert told(0).payload_bytes < told(None).payload_bytes
    rows = done.strategy.recorder.ledger.rows
    assert any("got the whole of version" in i for row in rows for i in row.get("incidents", ()))


def test_a_client_that_fails_is_named() -> None:
    with pytest.raises(ClientError, match=r"round 1: .*client \d+"):
        run("method.rank=2", "local.lr=1e30", "engine=ray", "engine.workers=1")


class BrokenSite:
    """Cannot train anybody, whoever is asked."""

    def __init__(self, plan: Plan) -> None:
        self.replica = Replica(plan, torch.device("cpu"))

    def train(self, ask: Ask, kept: Tree) -> tuple[Answer, Tree]:
        raise ConfigError("there is no such batch")


def test_what_is_no_clients_fault_is_told_from_a_client_that_failed() -> None:
    settings, history = RayConfig(workers=1), WeightHistory()
    history.publish({"W": torch.ones(2, 3)}, 0)
    grid = RayGrid(
        Cluster(settings, "cpu"),
        BrokenSite,
        Plan({}),
        history=history,
        store=ClientStore(),
        settings=settings,
    )
    request = TrainRequest(1, 0, 1.0, torch.tensor([4, 7]))
    ask = Ask(request, RoundInstructions())
    with closing(grid):
        assert list(grid.ask([ask])) == [
            (ask, NoAnswer("ConfigError: there is no such batch", of_the_run=True))
        ]


def left_running(folder: Path) -> list[str]:
    """Processes whose environment or command names the folder of a run."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                text = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if str(folder).encode() in text:
                found.append((entry / "cmdline").read_bytes().decode(errors="replace"))
    return found


def await_start(folder: Path) -> bool:
    """Tell whether Ray has begun to start."""
    return any(folder.glob("fedraclora-*/ray/session_*"))


def await_workers(folder: Path) -> bool:
    """Tell whether workers have begun to start."""
    return any(folder.glob("fedraclora-*/ray/session_*/logs/worker-*"))


def await_rounds(folder: Path) -> bool:
    """Tell whether some rounds are done."""
    ledger = folder / "run" / "ledger.jsonl"
    return ledger.is_file() and ledger.read_bytes().count(b"\n") > 3


# name -> what is sent, to its group, when
ENDS = {
    "end": (None, False, await_rounds),
    "interrupt": (signal.SIGINT, False, await_rounds),
    "Ctrl-C": (signal.SIGINT, True, await_rounds),
    "terminate": (signal.SIGTERM, False, await_rounds),
    "terminate all": (signal.SIGTERM, True, await_rounds),
    "the terminal closes": (signal.SIGHUP, True, await_rounds),
    "terminate at the start": (signal.SIGTERM, False, await_start),
    "terminate before the workers": (signal.SIGTERM, False, await_workers),
}


@pytest.mark.parametrize("how", ENDS)
def test_nothing_is_left_behind(how: str, tmp_path: Path) -> None:
    sign, group, due = ENDS[how]
    rounds = "rounds=3" if sign is None else "rounds=100000"
    words = [*WORDS, "method.rank=2", "engine=ray", "engine.workers=1", rounds]
    with tempfile.TemporaryDirectory(prefix="r") as made:  # short, for Ray's sockets
        folder = Path(made)
        process = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "fedraclora.commands.cli",
                "simulate",
                *words,
                f"output.dir={folder / 'run'}",
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "RAY_TMPDIR": made, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while sign is not None and not due(folder):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        if sign is not None:
            (os.killpg if group else os.kill)(process.pid, sign)
        _, said = process.communicate(timeout=120)
        assert process.returncode == (0 if sign is None else STATUS), said
        assert ("interrupted" in said) == (sign is not None)
        assert left_running(folder) == []
        assert [*folder.glob("fedraclora-*")] == []


# Which server is killed -> what the run says of it.
SERVERS = {"raylet": "Ray's process on this machine", "gcs_server": "the head of the Ray cluster"}


@pytest.mark.parametrize("server", SERVERS)
def test_a_run_whose_ray_is_killed_ends_with_a_checkpoint(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    words = [*WORDS, "method.rank=2", "rounds=100000", "engine=ray"]
    words += ["engine.workers=1", f"output.dir={folder}"]
    with tempfile.TemporaryDirectory(prefix="r", ignore_cleanup_errors=True) as made:
        process = subprocess.Popen(
            [sys.executable, "-m", "fedraclora.commands.cli", "simulate", *words],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "RAY_TMPDIR": made, "OMP_NUM_THREADS": "1"},
        )
        while not await_rounds(tmp_path):
            assert process.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (pid,) = (int(p) for p in children if Path(f"/proc/{p}/comm").read_text() == f"{server}\n")
        os.kill(pid, signal.SIGKILL)
        _, said = process.communicate(timeout=240)
        assert process.returncode == 1
        assert any(line.startswith(f"error: {SERVERS[server]}") for line in said.splitlines()), said
        assert left_running(Path(made)) == []
    assert SERVERS[server] in str(stop_reason(folder))
    _, state = load_checkpoint(folder / "checkpoint")
    assert state["round"] == read_ledger(folder / "ledger.jsonl")[-1]["round"]


def test_workers_are_killed_and_the_digests_stand() -> None:
    assert kill_workers.main(["--times", "3"]) == 0
