"""A real deployment on this machine, with TLS and node keys: the bits of a simulation."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import fedraclora
from fedraclora.commands import cli, deploy
from fedraclora.commands.deploy import Record
from fedraclora.compose.overrides import composed
from fedraclora.engines.deploy.control import COMPLETED
from fedraclora.engines.deploy.local import LocalDeployment, make_identity, make_node_key
from fedraclora.engines.flower_patches import OWNED, PATCHES
from fedraclora.engines.owner.entries import IN, OUT, REFUSED, TRAIN
from fedraclora.engines.owner.history import History
from fedraclora.engines.programs import Address, Program
from fedraclora.errors import EngineError
from fedraclora.experiments.bench.usage import descendants
from fedraclora.experiments.faults.real import Drill, client_processes, wait_for
from fedraclora.experiments.faults.trials import absent, final_weights
from fedraclora.run.ledger import number, read_ledger
from fedraclora.run.log import LOG
from fedraclora.run.recorder import checkpoint_meta
from fedraclora.run.stopped import stop_kind
from tests.common import simulated, summary_of
from tests.equivalence.listeners import listeners, needs_proc
from tests.strangers import as_stranger, needs_root

pytestmark = pytest.mark.long

WORDS = [
    # Drawn, so that no process imports a library for data or partitions.
    "data=virtual",
    "data.samples=20",
    "data.held_out=50",
    "model.hidden=[12]",
    "method.rank=2",
    "method.alpha=3",
    "local.lr=0.1",
    "rounds=2",
    "output=study",
    "output.progress=false",
]
PATIENCE = 120.0  # seconds for a node that must be refused


@pytest.fixture(scope="module")
def deployment() -> Iterator[LocalDeployment]:
    with LocalDeployment([[0, 1, 2, 3], [4, 5, 6]]) as running:
        yield running


def test_two_nodes_with_seven_clients_have_the_bits_of_vectorized(
    deployment: LocalDeployment,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Followed from here as one on another machine would be: the server has its own folder."""
    here, there, alone = (tmp_path / name for name in ("here", "there", "vectorized"))
    sizes = ["clients=7", "clients_per_round=7", "engine.chunk=4"]
    folders = [f"output.dir={here}", f"engine.folder={there}"]
    request = deploy.prepare([*WORDS, *sizes, *folders], None)
    words, take, running = set[str](), Record.take, list[list[int]]()

    def look(record: Record, row: dict[str, object]) -> None:
        if not running:
            running.append(deployment.connection.running())
        words.update(*map(command_of, descendants()))
        take(record, row)

    monkeypatch.setattr(Record, "take", look)
    with Record(here, request.plain, resume=False) as record:
        deploy.follow(request, deployment.connection, record)
    assert [len(runs) for runs in (*running, deployment.connection.running())] == [1, 0]
    assert "--token-file" in words  # of the server; nobody can read the tokens of tasks
    assert "--token" not in words
    assert "final accuracy" in capsys.readouterr().out
    simulated(composed([*WORDS, *sizes, "engine=vectorized", f"output.dir={alone}"]), alone)
    wanted, found = summary_of(alone), summary_of(here)
    assert found["weights_digest"] == wanted["weights_digest"]
    one, both = (number(read_ledger(f / "ledger.jsonl")[2], "catchup_bytes") for f in (here, alone))
    assert 0 < 7 * one == 2 * both  # to each node, not to each client
    assert (here / "ledger.jsonl").read_text() == (there / "ledger.jsonl").read_text()
    assert (there / "checkpoint").is_dir()
    assert not (here / "checkpoint").exists()


def test_without_patches_of_flower_a_deployment_has_the_bits_of_simulate(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slower, by the command alone, and who asks for it is told that ports are open."""
    here, alone = tmp_path / "here", tmp_path / "alone"
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    words = ["nodes=2", "deploy.patched=false", *WORDS, f"output.dir={here}"]
    assert cli.run("deploy", words) == 0
    said = capsys.readouterr().err
    assert all(each.name in said for each in PATCHES)
    assert "ports" in said
    simulated(composed([*WORDS, "clients=2", "clients_per_round=2", f"output.dir={alone}"]), alone)
    assert summary_of(here)["weights_digest"] == summary_of(alone)["weights_digest"]
    assert not [*tmp_path.glob("fedraclora-*")]


def test_a_run_waits_until_the_owner_of_the_data_approves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The operator is told at once, before there is a row; a file that breaks is waited for."""
    here, alone, state = (tmp_path / name for name in ("here", "alone", "state"))
    policy, history = tmp_path / "policy.yaml", History(state)
    policy.write_text("approved: []\n")
    monkeypatch.setenv(OWNED, json.dumps({"policy": str(policy), "state": str(state)}))

    told = ""

    def approve() -> None:
        nonlocal told
        wait_for(lambda: len(history.entries()) > 1, "a refused message of each node")
        wait_for(lambda: "not approved" in (here / LOG).read_text(), "a line of the log")
        told = capsys.readouterr().err
        good = f"approved: [{history.entries()[0].digest}]\n"
        policy.write_text(good)
        wait_for(lambda: any(e.is_training for e in history.entries()), "a message of a round")
        policy.write_text("approved: [")
        wait_for(lambda: "cannot be read" in (here / LOG).read_text(), "a line of the log")
        policy.write_text(good)

    owner = threading.Thread(target=approve)
    owner.start()
    words = ["nodes=2", *WORDS, "output.progress=true", "rounds=60", f"output.dir={here}"]
    assert cli.run("deploy", words) == 0
    owner.join()
    assert "not approved" in told
    assert "round 1" not in told
    said = capsys.readouterr().err
    assert said.count("cannot be read") >= 1
    assert "back" in said
    two = ["clients=2", "clients_per_round=2", "rounds=60", "engine=inline"]
    two += [f"output.dir={alone}"]
    simulated(composed([*WORDS, *two]), alone)
    assert summary_of(here)["weights_digest"] == summary_of(alone)["weights_digest"]
    entries = history.entries()
    assert entries[0].way == REFUSED
    trained = [entry for entry in entries if entry.kind.startswith(TRAIN)]
    assert {int(e.round) for e in trained if e.way == IN} == {*range(1, 61)}
    first, again = ({e.samples for e in trained if e.way == OUT and e.round == n} for n in "12")
    assert first == again
    assert None not in first


@pytest.mark.parametrize(
    ("word", "said"), [("deploy.patched=false", "nodes=N"), ("deploy.patched=no", "expected bool")]
)
def test_patches_are_left_out_of_what_is_started_here_alone(
    word: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("deploy", ["connection=house", word]) == 1
    assert said in capsys.readouterr().err


def test_a_preset_of_tune_is_deployed_with_the_bits_of_simulate(
    deployment: LocalDeployment, tmp_path: Path
) -> None:
    """By its name alone, as it was written."""
    tuned, here, there, alone = (tmp_path / name for name in ("tuned", "here", "there", "alone"))
    task = [
        "data=digits",
        "data.labels=null",
        "model.hidden=[12]",
        "clients=7",
        "clients_per_round=7",
    ]
    task += ["rounds=2", "output.progress=false"]
    limits = {"runs": 2, "sizes": [1], "test_seeds": [0]}
    fedraclora.tune(*task, tune=limits, folder=tuned)
    words = ["--config-dir", str(tuned), "experiment=at_1MB", "output=study"]
    folders = [f"output.dir={here}", f"engine.folder={there}"]
    request = deploy.prepare([*words, *folders], None)
    with Record(here, request.plain, resume=False) as record:
        deploy.follow(request, deployment.connection, record)
    simulated = fedraclora.simulate(*words, folder=alone)
    assert summary_of(here)["weights_digest"] == simulated.summary["weights_digest"]
    assert summary_of(here)["rounds"] == simulated.summary["rounds"]


def command_of(pid: int) -> list[str]:
    """The words of a process's command line, as everybody can read it."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    except OSError:  # it has just ended
        return []


@needs_proc
@needs_root
def test_no_other_user_starts_a_run_or_takes_a_task(deployment: LocalDeployment) -> None:
    (first, second) = deployment.nodes
    assert first is not None
    assert second is not None
    assert deployment.link is not None
    for program in (deployment.link, first, second):
        assert listeners(program.process.pid) == {}
    apis = [Address(2, deployment.home / name) for name in ("link", "node0.api", "node1.api")]
    end = time.monotonic() + PATIENCE
    while (
        not all(map(Address.listens, apis)) and time.monotonic() < end
    ):  # nodes take a while to start
        time.sleep(0.2)
    assert all(map(Address.listens, apis))
    assert as_stranger(lambda: [*map(Address.listens, apis)]) == "[False, False, False]"


def test_its_folder_and_its_keys_are_private(deployment: LocalDeployment) -> None:
    for path in (deployment.home, deployment.home / "keys"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o700
    for path in (deployment.key(0), deployment.identity.key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def is_refused(node: Program) -> bool:
    """Wait for a node to give up."""
    end = time.monotonic() + PATIENCE
    try:
        while time.monotonic() < end:
            if node.ended:
                return node.process.returncode != 0
            time.sleep(0.2)
        return False
    finally:
        node.end()


# That a node finds its server out, and sends a key, is Flower's.
@pytest.mark.parametrize("kind", ["an unknown key", "another certificate", "plain text", "no key"])
def test_strangers_are_refused(kind: str, deployment: LocalDeployment, tmp_path: Path) -> None:
    make_node_key(tmp_path / "stranger")
    root = ["--root-certificates", str(deployment.identity.certificate)]
    key = ["--auth-supernode-private-key", str(tmp_path / "stranger")]
    if kind == "another certificate":
        other = make_identity(tmp_path / "other")
        root = ["--root-certificates", str(other.certificate)]
        key = ["--auth-supernode-private-key", str(deployment.key(0))]
    secure = {"plain text": ["--insecure"], "no key": root}.get(kind, [*root, *key])
    node = deployment.node([*secure, "--max-retries", "1"], f"{kind}.log", "partition-id=0")
    assert is_refused(node)
    assert "Exit Code: 305" in node.file.read_text()  # Flower's: no connection to the SuperLink


def test_a_run_that_fails_has_its_words_and_its_status(
    deployment: LocalDeployment, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The server cannot make its folder."""
    (tmp_path / "file").write_text("")
    words = [*WORDS, "clients=2", "clients_per_round=2", f"output.dir={tmp_path / 'here'}"]
    request = deploy.prepare([*words, f"engine.folder={tmp_path / 'file' / 'run'}"], None)
    with pytest.raises(EngineError, match=r"finished:failed: .*cannot make the folder"):
        deploy.follow(request, deployment.connection, None)
    assert "Traceback" in capsys.readouterr().err  # there is no folder for it
    with (
        Record(request.folder, request.plain, resume=False) as record,
        pytest.raises(EngineError, match=LOG),
    ):
        deploy.follow(request, deployment.connection, record)
    assert "Traceback" not in capsys.readouterr().err
    assert "Traceback" in (request.folder / LOG).read_text()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_command_that_is_interrupted_leaves_no_process(sign: int, tmp_path: Path) -> None:
    """And it can be gone on with."""
    folder = tmp_path / "run"
    words = [*WORDS, "rounds=400", "nodes=2", f"output.dir={folder}"]
    environ = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-m", "fedraclora.commands.cli", "deploy", *words]
    process = subprocess.Popen(command, env=environ, stderr=subprocess.PIPE, text=True)
    ledger = folder / "ledger.jsonl"
    end = time.monotonic() + 300
    while not (ledger.is_file() and ledger.read_bytes().count(b"\n") >= 2):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.2)
    process.send_signal(sign)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "interrupted after round" in said
    assert f"resume with: fedraclora deploy nodes=2 resume={folder}" in said
    assert checkpoint_meta(folder)["round"] == len(read_ledger(ledger)) - 1  # no round is lost
    assert stop_kind(folder) == "interrupted"
    assert not [*tmp_path.glob("fedraclora-*")]
    listed = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True)
    assert str(tmp_path) not in listed.stdout


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False


@pytest.mark.parametrize("patched", [True, False])
def test_one_process_of_a_node_trains_until_it_is_killed(patched: bool, tmp_path: Path) -> None:
    """Who kills it as it works fails that client's rounds alone, by name."""
    with LocalDeployment([[0], [1], [2]], patched=patched) as running:
        job = Drill(running, tmp_path / "run", ["rounds=6"])
        job.begin()
        job.rounds_until(1)
        (first,) = client_processes(running, 0)
        job.rounds_until(2)
        assert client_processes(running, 0) == [first]
        at = job.kill_for_a_round(0)
        assert job.end().word == COMPLETED
        (second,) = client_processes(running, 0)
        assert second != first
        (program, _, _) = running.nodes
        assert program is not None
        program.process.kill()  # it alone: what it has started ends by itself
        program.process.wait()  # as who supervises it does: else its number is still taken
        wait_for(lambda: not is_alive(second), "the end of the process that trains")
    missing = {row["round"]: row["failures"] for row in job.rows()[1:] if row["failures"]}
    for round_, failures in missing.items():
        (failure,) = failures
        assert failure["client"] == 0
        assert f"round {round_}, clients [0] of this node" in failure["reason"]
    assert at in missing
    fault = absent({round_: [0] for round_ in missing})
    wanted = final_weights(["rounds=6", "engine.min_clients=1"], fault)
    assert summary_of(tmp_path / "run")["weights_digest"] == wanted
