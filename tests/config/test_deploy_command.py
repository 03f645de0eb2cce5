"""``fedraclora deploy`` refuses before anything starts, and is true about a run elsewhere."""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from fedraclora.commands import cli, deploy
from fedraclora.commands.app import ServerRun
from fedraclora.commands.deploy import Record
from fedraclora.compose.overrides import composed
from fedraclora.compose.words import part
from fedraclora.config.run_config import from_plain
from fedraclora.engines.deploy import control
from fedraclora.engines.deploy.control import COMPLETED, Connection, Status
from fedraclora.engines.deploy.local import LocalDeployment
from fedraclora.errors import CheckpointError, ConfigError, EngineError
from fedraclora.run.events import OPENING, ROW, STOPPED, SUMMARY, Event
from fedraclora.run.folder import locked_folder
from fedraclora.run.ledger import read_ledger
from fedraclora.run.stopped import stop_kind, stop_reason
from fedraclora.strategies.facts import facts_of
from fedraclora.strategies.methods import METHODS
from tests.common import assemble, summary_of

SMALL = ["data=digits", "data.labels=null", "pretrain=none", "model.hidden=[6]", "output=study"]
SMALL += ["method.rank=2", "rounds=2"]
ROWS = [
    {"round": r, "metrics": {"accuracy": 0.1 * r}, "uplink_total": r, "downlink_total": r}
    for r in range(3)
]
TOTALS = {"rounds": 2, "clients": 3, "cohort": 3, "uplink_floats": 8, "seconds": 1.0}
OUTCOME = {"metrics": {"accuracy": 0.2}, "uplink_total": 2, "downlink_total": 2, **TOTALS}


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("something was started")

    monkeypatch.setattr(LocalDeployment, "__enter__", fail)
    monkeypatch.setattr(Connection, "submit", fail)


@pytest.mark.usefixtures("nothing_starts")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "connection=NAME"),
        (["nodes=3", "connection=x"], "connection=NAME"),
        (["nodes=0"], "nodes=0: expected 1 or more"),
        (["nodes=-1"], "nodes='-1'"),
        (["nodes=1.5"], "nodes='1.5'"),
        (["nodes=three"], "nodes='three': expected int"),
        (["nodes=3", "local=three"], "unknown local 'three'"),
        (["nodes=3", "engine=ray"], "engine=ray"),
        (["nodes=3", "engine=inlne"], "did you mean 'inline'?"),
        (["nodes=3", "clints=3"], "unknown key 'clints'; did you mean 'clients'?"),
        (["nodes=3", "engine.min_clients=0"], "engine.min_clients=0"),
        (["nodes=3", "engine.timeout=0"], "engine.timeout=0"),
        (["nodes=3", "engine.max_samples=0"], "engine.max_samples=0"),
        (["nodes=3", "engine.chunk=auto"], "engine.chunk"),
        (["nodes=3", "max_failures=1"], "engine.min_clients sets how many clients a round needs"),
        (["nodes=3", "system=phones"], "engine=deploy does not go with simulated devices"),
        (["nodes=3", "system=buffered"], "engine=deploy does not go with simulated devices"),
        (
            ["connection=x", "clients=3", "clients_per_round=3", "system=buffered"],
            "system=none",
        ),
        (["nodes=3", "head=personal"], "engine=deploy does not go with head=personal"),
        (["connection=x", "data=table", "data.file=a.csv"], "data.file=a.csv is relative"),
        (["connection=x", "data=own", "data.test_file=a.npz"], "data.test_file=a.npz is relative"),
        (["connection=x", "engine.folder=here"], "engine.folder='here' is not an absolute path"),
        (["nodes=3", "resume=nowhere"], "nowhere is not a run folder"),
    ],
)
def test_what_cannot_run_is_refused_in_one_message(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run("deploy", [*SMALL, f"output.dir={tmp_path / 'run'}", *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "clients", "cohort"),
    [
        ([], 3, 3),
        (["clients=8"], 8, 20),
        (["clients=8", "clients_per_round=2"], 8, 2),
        (["clients_per_round=2"], 3, 2),
    ],
)
def test_clients_are_as_many_as_nodes_unless_typed(
    words: list[str], clients: int, cohort: int, tmp_path: Path
) -> None:
    if cohort > clients:
        with pytest.raises(Exception, match=r"clients_per_round=20.*8 clients"):
            deploy.prepare([*SMALL, *words], 3)
        return
    asked = deploy.prepare([*SMALL, *words, f"output.dir={tmp_path}/run"], 3)
    assert (asked.config.clients, asked.config.clients_per_round) == (clients, cohort)
    assert asked.config.output.dir == str(tmp_path / "run")


@pytest.mark.parametrize("words", [["local=adamw", "nodes=3"], ["nodes=3", "local=adamw"]])
def test_how_clients_train_is_chosen_beside_the_number_of_nodes(words: list[str]) -> None:
    own, rest = part([*SMALL, "clients_per_round=2", *words], deploy.OWN_KEYS)
    assert deploy.own_settings(own) == ("", 3, deploy.LaunchOptions())
    assert deploy.prepare(rest, 3).config.local.optimizer == "adamw"


@pytest.mark.slow
def test_other_nodes_than_a_preset_has_clients_are_said(tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "four.yaml").write_text("# @package _global_\nclients: 4\n")
    words = [*SMALL, "clients_per_round=2", "--config-dir", str(tmp_path), "experiment=four"]
    with pytest.raises(ConfigError, match=r"clients=4.*clients=2"):
        deploy.prepare(words, 2)
    assert deploy.prepare(words, 4).config.clients == 4
    assert deploy.prepare([*words, "clients=2"], 2).config.clients == 2


def test_the_server_has_a_folder_of_its_own(tmp_path: Path) -> None:
    words = [*SMALL, "clients=3", "clients_per_round=3", f"output.dir={tmp_path}/run"]
    assert deploy.prepare(words, None).config.output.dir == "~/fedraclora/run"
    asked = deploy.prepare([*words, "engine.folder=/srv/run"], None)
    assert asked.config.output.dir == "/srv/run"
    assert asked.plain["output"]["dir"] == f"{tmp_path}/run"  # type: ignore[index]


def test_a_run_goes_on_with_the_patience_that_it_began_with(tmp_path: Path) -> None:
    """However many clients are enough, and where its server keeps it; unless it is typed anew."""
    sizes = [*SMALL, "clients=3", "clients_per_round=3", f"output.dir={tmp_path}/run"]
    own = ["engine.min_clients=1", "engine.timeout=7", "engine.folder=/srv/run"]
    began = deploy.prepare([*sizes, *own], None)
    with Record(began.folder, began.plain, resume=False) as record:
        record.take(ROWS[0])
    found = deploy.prepare([f"resume={tmp_path}/run", "engine.timeout=8"], None).config
    assert (found.engine.min_clients, found.engine.timeout) == (1, 8)  # type: ignore[union-attr]
    assert found.output.dir == "/srv/run"


class Elsewhere(Connection):
    """A SuperLink that tells of a run what a test wants."""

    def __init__(self, streams: list[list[str]], status: str = COMPLETED) -> None:
        super().__init__("elsewhere", {})
        self.streams, self.word = streams, status
        self.stopped: list[int] = []

    def submit(self, app: Path, run_config: Path) -> int:
        assert (app / "pyproject.toml").is_file()
        assert "cfg-json" in run_config.read_text()
        return 7

    def status(self, run: int) -> Status:
        assert run == 7
        return Status("running" if self.streams else self.word, "the disk is full")

    def follow(self, run: int) -> Iterator[str]:
        yield from self.streams.pop(0)

    def stop(self, run: int, seconds: float = 30.0) -> None:
        self.stopped.append(run)


def test_a_run_waits_until_those_before_it_have_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = iter(
        [("running", "finished:completed"), ("running", "pending"), ("finished:failed",)]
    )
    lists = [
        json.dumps({"runs": [{"run-id": str(k), "status": s} for k, s in enumerate(states, 4)]})
        for states in answers
    ]
    connection = Connection("house", {})
    called = list[tuple[str, ...]]()

    def call(*words: str) -> SimpleNamespace:
        called.append(words)
        return SimpleNamespace(stdout=lists[len(called) - 1], stderr="")

    monkeypatch.setattr(connection, "_call", call)
    monkeypatch.setattr(deploy, "TURN", 0.0)
    deploy.await_turn(connection)
    assert called == [("list", "house")] * 3
    said = capsys.readouterr().err.splitlines()
    assert [("4" in text, "5" in text) for text in said] == [(True, False), (True, True)]


@pytest.mark.parametrize(("word", "told"), [("pending", 1), ("running", 0)])
def test_a_run_that_is_not_started_is_told_once(
    word: str, told: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deploy, "NOT_STARTED", 0.01)
    link, said = Elsewhere([], word), list[str]()
    with deploy.told_if_pending(link, 7, said.append):
        time.sleep(0.3)
    assert len(said) == told
    assert all("run 7" in text and "restart the SuperLink" in text for text in said)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ({"nodes": 2, "deploy.queue": False}, "connection=NAME"),
        ({"connection": "house", "deploy.patched": False}, "nodes=N"),
        ({"connection": "house", "deploy.queue": "perhaps"}, "deploy.queue"),
    ],
)
def test_options_that_do_not_fit_a_deployment(own: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        deploy.own_settings(own)


def line(kind: str, value: dict[str, object]) -> str:
    return Event(kind, value).line


LINES = [line(ROW, row) for row in ROWS]


@pytest.fixture
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ServerRun:
    monkeypatch.setattr(deploy, "PAUSE", 0.0)
    words = [
        *SMALL,
        "clients=3",
        "clients_per_round=3",
        "output.progress=false",
        "output.plots=true",
    ]
    return deploy.prepare([*words, f"output.dir={tmp_path}/run"], None)


@pytest.mark.slow
def test_a_run_elsewhere_leaves_its_record_here(asked: ServerRun) -> None:
    """The stream breaks once, and begins anew."""
    streams = [["INFO: hello\n", *LINES[:2]], [*LINES, line(SUMMARY, OUTCOME)]]
    with Record(asked.folder, asked.plain, resume=False) as record:
        deploy.follow(asked, Elsewhere(streams), record)
    assert read_ledger(asked.folder / "ledger.jsonl") == ROWS
    assert summary_of(asked.folder)["rounds"] == 2
    assert (asked.folder / "curves.png").is_file()
    assert yaml.safe_load((asked.folder / "config.yaml").read_text()) == asked.plain


@pytest.mark.slow
def test_what_the_server_begins_with_is_said_once(
    asked: ServerRun, capsys: pytest.CaptureFixture[str]
) -> None:
    asked.config = replace(asked.config, output=replace(asked.config.output, progress=True))
    words = [*SMALL, "clients=3", "clients_per_round=3", "rounds=0"]
    began = facts_of(assemble(from_plain(composed(words), METHODS), None))
    opening = line(OPENING, began | {"state": ["[/odd] names"]})
    streams = [[opening, LINES[0]], [opening, *LINES, line(SUMMARY, OUTCOME)]]
    with Record(asked.folder, asked.plain, resume=False) as record:
        deploy.follow(asked, Elsewhere(streams), record)
    said = capsys.readouterr().err
    assert said.count("note: [/odd] names\nround") == 1
    assert said.count("cross_entropy") == 1


def test_a_server_that_went_back_overwrites_rounds(asked: ServerRun) -> None:
    with Record(asked.folder, asked.plain, resume=False) as record:
        for row in ROWS:
            record.take(row)
    again = {**ROWS[1], "uplink_total": 5}
    with Record(asked.folder, asked.plain, resume=True) as record:
        record.take(again)
    assert read_ledger(asked.folder / "ledger.jsonl") == [ROWS[0], again]


def test_a_folder_with_a_run_is_not_written_over(asked: ServerRun) -> None:
    with Record(asked.folder, asked.plain, resume=False) as record:
        record.take({"round": 0})
    with pytest.raises(CheckpointError, match="holds a run already"):
        deploy.prepare([*SMALL, f"output.dir={asked.folder}"], None)


@pytest.mark.usefixtures("nothing_starts")
def test_a_run_that_goes_on_is_not_started_again(asked: ServerRun) -> None:
    asked.resume = True
    with (
        locked_folder(asked.folder),
        pytest.raises(CheckpointError, match="another process is running"),
        deploy.place(asked, 3, ""),
    ):
        pass


@pytest.mark.parametrize("word", ["finished:failed", "finished:stopped"])
def test_a_run_that_failed_has_its_words(
    word: str, asked: ServerRun, capsys: pytest.CaptureFixture[str]
) -> None:
    link = Elsewhere([["ERROR: no space\n", LINES[0]]], word)
    with pytest.raises(EngineError, match=f"run 7 ended as {word}: the disk is full"):
        deploy.follow(asked, link, None)
    assert "ERROR: no space" in capsys.readouterr().err


def test_the_record_of_a_run_says_how_it_ended_early(asked: ServerRun) -> None:
    told = line(STOPPED, {"round": 1, "kind": "diverged"})
    with Record(asked.folder, asked.plain, resume=False) as record, pytest.raises(EngineError):
        deploy.follow(asked, Elsewhere([[*LINES, told]], "finished:failed"), record)
    assert stop_kind(asked.folder) == "diverged"
    assert "the disk is full" in str(stop_reason(asked.folder))
    words = [f"resume={asked.folder}", "local.lr=0.01"]  # which a run that diverged may change
    again = deploy.prepare(words, None)
    assert again.config.local.lr == 0.01
    with Record(asked.folder, again.plain, resume=True) as record:
        deploy.follow(again, Elsewhere([[*LINES, line(SUMMARY, OUTCOME)]]), record)
    assert stop_kind(asked.folder) is None


def test_ctrl_c_stops_the_run(asked: ServerRun) -> None:
    class Interrupted(Elsewhere):
        def follow(self, run: int) -> Iterator[str]:
            yield LINES[0]
            raise KeyboardInterrupt

    link = Interrupted([])
    with pytest.raises(KeyboardInterrupt):
        deploy.follow(asked, link, None)
    assert link.stopped == [7]


def program(folder: Path, text: str) -> dict[str, str]:
    """An environment whose ``flwr`` does what a test wants."""
    path = folder / "flwr"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return {"PATH": f"{folder}:/usr/bin:/bin", "FLWR_HOME": str(folder)}  # names no connection


def test_the_command_line_of_flower_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = """case $1 in
    run) echo 'INFO: built'; echo '{"success": true, "run-id": "12"}';;
    list) echo '{"runs": [{"status": "finished:failed", "status-details": "why"}]}';;
    log) echo one; echo two;;
    esac"""
    environ = program(tmp_path, said)
    monkeypatch.setenv("PATH", environ["PATH"])
    link = Connection("house", environ)
    assert link.submit(tmp_path, tmp_path / "run.toml") == 12
    assert link.status(12) == Status("finished:failed", "why")
    assert [*link.follow(12)] == ["one\n", "two\n"]


WORDS = [*SMALL, "clients=3", "clients_per_round=3", "output.progress=false", "connection=house"]


def refusing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a Flower in the path that cannot reach its SuperLink."""
    monkeypatch.setenv("PATH", program(folder, "echo no such host >&2; exit 1")["PATH"])
    monkeypatch.setattr(deploy, "command_line", dict)
    monkeypatch.setenv("FLWR_HOME", str(folder))


def test_a_run_that_is_not_taken_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing(tmp_path, monkeypatch)
    (tmp_path / "runs").mkdir()
    words = [*WORDS, f"output.dir={tmp_path}/runs/new/run"]
    for _ in range(2):  # what the first call left would be in the way of the second
        assert cli.run("deploy", words) == 1
        assert "no such host" in capsys.readouterr().err
        assert [*(tmp_path / "runs").iterdir()] == []


def test_a_run_that_is_not_taken_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing(tmp_path, monkeypatch)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".notes").write_text("mine")
    assert cli.run("deploy", [*WORDS, f"output.dir={folder}"]) == 1
    assert [p.name for p in folder.iterdir()] == [".notes"]
    asked = deploy.prepare([*WORDS[:-1], f"output.dir={folder}"], None)
    with Record(folder, asked.plain, resume=False) as record:
        record.take(ROWS[0])
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    assert cli.run("deploy", [*SMALL[-2:], "connection=house", f"resume={folder}"]) == 1
    assert capsys.readouterr().err.count("no such host") == 2
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_folder_of_somebody_elses_is_refused_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing(tmp_path, monkeypatch)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("mine: 1")
    assert cli.run("deploy", [*WORDS, f"output.dir={folder}"]) == 1
    assert "and no run" in capsys.readouterr().err
    assert {p.name: p.read_text() for p in folder.iterdir()} == {"config.yaml": "mine: 1"}


def test_files_that_are_found_from_any_folder_go_to_a_connection(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y\n")
    for data in (
        {"file": str(tmp_path / "a.csv"), "root": None, "samples": "here"},
        {"file": "a.csv", "root": str(tmp_path), "test_function": "mine:held_out"},
        {"file": "package:mlxtend/a.csv", "tokenizer": "hub:bert"},
    ):
        deploy.check_files({"data": data, "model": {"path": "package:minilm/model"}})
    with pytest.raises(ConfigError, match=r"data\.test_file=b\.csv is relative"):
        deploy.check_files({"data": {"test_file": "b.csv", "root": str(tmp_path)}, "model": {}})
    with pytest.raises(ConfigError, match=r"model\.path=bert is relative"):
        deploy.check_files({"data": {}, "model": {"path": "bert"}})


def test_nodes_are_not_asked_for_without_a_file_of_connections(tmp_path: Path) -> None:
    link = Connection("house", program(tmp_path, "touch started") | {"FLWR_HOME": str(tmp_path)})
    with pytest.raises(ConfigError, match=r"config\.toml does not exist.* \[superlink\.house\]"):
        link.nodes()


def test_a_superlink_that_does_not_answer_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    environ = program(tmp_path, "echo no such host >&2; exit 1")
    monkeypatch.setenv("PATH", environ["PATH"])
    monkeypatch.setattr(control, "LOST", 0.0)
    link = Connection("house", environ)
    with pytest.raises(EngineError, match="no such host"):
        link.submit(tmp_path, tmp_path / "run.toml")
    with pytest.raises(EngineError, match=r"has not answered for 0 s .*no such host"):
        link.status(12)


def test_simulate_sends_its_reader_to_deploy() -> None:
    config = from_plain(
        composed([*SMALL, "clients=3", "clients_per_round=3", "engine=deploy"]), METHODS
    )
    with pytest.raises(ConfigError, match="Run `fedraclora deploy` with"):
        assemble(config, None)
