"""An operator steers a federation of real processes: what is asked of it happens, and is kept."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typing_extensions import override

from fedraclora.commands import cli
from fedraclora.engines.deploy.federation import FederationFiles
from fedraclora.engines.deploy.local import LocalDeployment, make_node_key
from fedraclora.engines.flower_patches import AT_SOCKETS, SOCKETS, UNPATCHED
from fedraclora.engines.owner.entries import OUT
from fedraclora.engines.owner.history import History
from fedraclora.engines.programs import CONNECTION, Address, Program
from fedraclora.experiments.faults.network import RANK, SMALL
from fedraclora.experiments.faults.real import client_processes, pgrep, wait_for
from fedraclora.experiments.faults.trials import absent, final_weights
from fedraclora.imports import import_object
from fedraclora.run.ledger import read_ledger
from fedraclora.run.log import LOG
from tests.common import summary_of

pytestmark = pytest.mark.long

ROUNDS = ["rounds=120"]
PAUSED = 3  # rounds that a run could have done while it is paused


class Clinics(LocalDeployment):
    """A deployment whose nodes have names: ``clinic0`` and so on."""

    @override
    def node(self, secure: Any, log: str, config: str) -> Program:
        return super().node(secure, log, f"{config} name='clinic{log[4]}'")


class Operator:
    """Types commands on the SuperLink's host, and follows one run."""

    def __init__(
        self,
        clinics: Clinics,
        folder: Path,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        self.clinics, self.folder, self.capsys = clinics, folder, capsys
        self.files = FederationFiles.of(clinics.environ)

    def begin(self, *words: str) -> subprocess.Popen[bytes]:
        """Start a run as a process of its own, whose output goes to a file."""
        command = [sys.executable, "-m", "fedraclora.commands.cli", "deploy"]
        command += [f"connection={CONNECTION}", *words, "output.progress=true"]
        with self.folder.with_suffix(".said").open("a") as said:
            return subprocess.Popen(command, env=self.clinics.environ, stdout=said, stderr=said)

    def __call__(self, *words: str) -> str:
        """Run ``fedraclora federation``; return what it prints."""
        self.capsys.readouterr()
        assert cli.run("federation", [*words, f"connection={CONNECTION}"]) == 0
        return self.capsys.readouterr().out

    def row(self, name: str) -> str:
        """The line of ``status`` of a node."""
        return next(line for line in self("status").splitlines() if name in line)

    def rows(self) -> list[dict[str, Any]]:
        """The ledger of the run so far, without what is measured before round 1."""
        ledger = self.folder / "ledger.jsonl"
        return read_ledger(ledger)[1:] if ledger.is_file() else []

    def until(self, when: Callable[[list[dict[str, Any]]], bool], what: str) -> int:
        """Wait until the ledger is so; return its last round."""
        wait_for(lambda: when(self.rows()), what)
        return len(self.rows())

    def said(self) -> str:
        """What the command and the log of the run have said."""
        return self.folder.with_suffix(".said").read_text() + (self.folder / LOG).read_text()


@pytest.fixture
def operator(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Iterator[Operator]:
    """An operator of as many clinics as the test says, which have own samples or those of a run."""
    clinics_asked, own = request.param
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "docs" / "deploy"))
    owner = import_object("data", "clinic.data:owner")
    for client in range(3):
        x, y = owner(client)
        np.savez(tmp_path / f"{client}.npz", x=x, target=y)
    served = [[k] for k in range(clinics_asked)]
    with Clinics(served, data=str(tmp_path) if own else None) as clinics:
        for key in ("FLWR_HOME", SOCKETS):
            monkeypatch.setenv(key, clinics.environ[key])
        monkeypatch.setenv("COLUMNS", "250")
        yield Operator(clinics, tmp_path / "run", capsys)


def without(row: dict[str, Any]) -> list[int]:
    """The clients that a round left out."""
    return [failure["client"] for failure in row["failures"]]


@pytest.mark.parametrize("operator", [(3, False)], indirect=True)
def test_a_federation_is_paused_drained_and_left_by_a_node(operator: Operator) -> None:
    folders = [f"output.dir={operator.folder}", f"engine.folder={operator.folder}-there"]
    words = [*SMALL, *RANK, *ROUNDS, "engine.min_clients=2", "engine.wait=120", *folders]
    run = operator.begin(*words)
    operator.until(lambda rows: len(rows) >= 2, "round 2")
    for k in range(3):
        row = operator.row(f"clinic{k}")
        assert "online" in row
        assert f" {k} " in row.partition(f"clinic{k}")[2]
    assert "has not ended" in operator("status")

    operator("pause")
    wait_for(lambda: "paused before round" in operator.said(), "the pause")
    before = len(operator.rows())
    assert "paused" in operator("status")  # takes as long as several rounds
    assert len(operator.rows()) == before
    operator("resume")
    operator.until(lambda rows: len(rows) > before, "a round after the pause")

    operator("drain", "clinic2")
    drained = operator.until(lambda rows: without(rows[-1]) == [2], "a round without clinic2")
    assert "drained" in operator.rows()[-1]["failures"][0]["reason"]
    assert "drained" in operator.row("clinic2")
    operator("undrain", "clinic2")
    operator.until(lambda rows: len(rows) > drained and not without(rows[-1]), "its return")

    (node,) = (n for n, facts in operator.files.nodes().items() if facts.name == "clinic2")
    operator("drain", "clinic2")
    operator.until(lambda rows: without(rows[-1]) == [2], "a round without clinic2")
    operator("remove", "clinic2")
    assert "clinic2" not in operator("status")
    process = operator.clinics.nodes[2]
    assert process is not None
    wait_for(lambda: process.ended, "the end of the node that was removed")
    assert "fedraclora federation remove" in process.file.read_text()
    process.end()
    again = operator.clinics.start_node(2)
    wait_for(lambda: again.ended, "the end of the node whose key is refused")
    assert again.process.returncode != 0
    assert "not registered" in again.file.read_text()
    again.end()
    removed = len(operator.rows())

    assert run.wait(600) == 0, operator.said()
    rows = operator.rows()
    assert len(rows) == 120
    assert removed < 120  # otherwise the test has shown nothing of the rounds after
    assert all(without(row) == [2] for row in rows[removed:])
    missing = {row["round"]: without(row) for row in rows}
    wanted = final_weights([*ROUNDS, "engine.min_clients=2"], absent(missing))
    assert summary_of(operator.folder)["weights_digest"] == wanted

    said = operator.folder.with_suffix(".said").read_text().splitlines()
    drains = [line for line in said if line.startswith("clinic2") and "drained" in line]
    assert len(drains) == 2  # each is said at once, though the words are the same
    (line,) = (line for line in said if "is removed" in line)
    assert "client 2 (clinic2)" in line

    log = operator("log")
    entries = operator.files.entries()
    assert [e["what"] for e in entries] == [
        *["start", "pause", "resume", "drain", "undrain", "drain", "remove", "end"]
    ]
    assert entries[-1]["status"] == "completed"
    assert {e["node"] for e in entries if "node" in e} == {node}
    for key in ("digest", "code"):
        assert entries[0][key][:12] in log
    assert entries[0]["who"] in log


@pytest.mark.parametrize("operator", [(2, True)], indirect=True)
def test_a_clinic_joins_a_run_that_is_interrupted_and_no_round_is_lost(operator: Operator) -> None:
    """By Ctrl-C, between two regular checkpoints."""
    folder, clinics = operator.folder, operator.clinics
    words = ["data=own", "data.classes=10", "data.shape=[64]", "model.hidden=[12]", *RANK]
    words += ["local.lr=0.1", "clients=2", "rounds=400", "output=study"]
    run = operator.begin(*words, f"output.dir={folder}", f"engine.folder={folder}-there")
    operator.until(lambda rows: len(rows) >= 3, "round 3")
    run.send_signal(signal.SIGINT)
    assert run.wait(120) == 130
    done = len(read_ledger(folder.with_name("run-there") / "ledger.jsonl")) - 1
    assert f"with a checkpoint after round {done}: 0 will be run again" in operator.said()
    assert f"resume={folder}" in operator.said()

    clinics.register(make_node_key(clinics.key(2)))
    clinics.served, clinics.nodes = [[0], [1], [2]], [*clinics.nodes, None]
    clinics.start_node(2)
    run = operator.begin(f"resume={folder}", "clients=3", f"rounds={done + 2}")
    assert run.wait(600) == 0, operator.said()
    rows = operator.rows()
    assert [row["round"] for row in rows] == [*range(1, done + 3)]
    assert [row["cohort"] for row in rows] == [2] * done + [3] * 2
    assert not any(row["failures"] for row in rows)
    assert "run again" not in str([row.get("incidents") for row in rows])
    assert "clinic2" in operator("status")


class OwnersNode(Program):
    """``fedraclora node``, as an owner types it."""

    def __init__(self, words: list[str], environ: dict[str, str], file: Path) -> None:
        self.name, self.file = "fedraclora node", file
        command = [sys.executable, "-m", "fedraclora.commands.cli", "node", *words]
        with file.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env=environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )


class Owners(Clinics):
    """Clinics whose owners start the nodes, each with a history in a folder of its own."""

    @override
    def node(self, secure: Any, log: str, config: str) -> Program:
        at = Address.choose(self.home / log, 0, self.environ)
        words = [*secure, "--superlink", str(self.at), "--host", "127.0.0.1"]
        words += ["--port", str(at.port), "--state", str(self.home / f"state{log[4]}")]
        words += ["--node-config", f"{config} name='clinic{log[4]}'"]
        return OwnersNode(words, dict(self.environ), self.home / log)

    def trained(self, k: int) -> set[int]:
        """The rounds that the history of an owner has a reply of."""
        entries = History(self.home / f"state{k}").entries()
        return {int(e.round) for e in entries if e.way == OUT and e.samples is not None}


@pytest.mark.parametrize("sign", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_a_node_or_a_run_and_no_round_is_lost(
    sign: signal.Signals,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """As a service manager, or a terminal that closes, sends it to one process."""
    monkeypatch.setenv(UNPATCHED, AT_SOCKETS.name)  # an address of the command line is refused else
    folder, there = tmp_path / "run", tmp_path / "run-there"
    with Owners([[0], [1], [2]]) as owners:
        operator = Operator(owners, folder, capsys)
        words = [*SMALL, *RANK, "rounds=400", "engine.min_clients=2", "engine.wait=300"]
        run = operator.begin(*words, f"output.dir={folder}", f"engine.folder={there}")
        operator.until(lambda rows: len(rows) >= 2, "round 2")

        node, (resident,) = owners.nodes[1], client_processes(owners, 1)
        assert node is not None
        node.process.send_signal(sign)
        node.process.wait(60)
        wait_for(lambda: pgrep("-f", "fedraclora.clients.resident").count(resident) == 0, "its end")
        operator.until(lambda rows: without(rows[-1]) == [1], "a round without the client")
        node.end()
        owners.start_node(1)
        operator.until(lambda rows: not without(rows[-1]), "its return")

        run.send_signal(sign)
        assert run.wait(120) == 130
        done = len(read_ledger(there / "ledger.jsonl")) - 1
        assert f"with a checkpoint after round {done}: 0 will be run again" in operator.said()
        run = operator.begin(f"resume={folder}", f"rounds={done + 2}")
        assert run.wait(600) == 0, operator.said()
        missing = {row["round"]: without(row) for row in operator.rows()}
        assert [*missing] == [*range(1, done + 3)]
        assert {client for own in missing.values() for client in own} == {1}
        for k in range(3):
            assert owners.trained(k) >= {r for r, own in missing.items() if k not in own}
    wanted = final_weights([f"rounds={done + 2}", "engine.min_clients=2"], absent(missing))
    assert summary_of(folder)["weights_digest"] == wanted
