"""What a data owner allows at a node: approved runs, limits, and a history of all messages."""

from __future__ import annotations

import hashlib
import json
import os
import tomllib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree

from fedraclora import flower_internals
from fedraclora.commands import node
from fedraclora.commands.app import owner_request, write_app
from fedraclora.commands.deploy import prepare
from fedraclora.engines.flower_patches import OWNED, UNPATCHED
from fedraclora.engines.owner import history as history_module
from fedraclora.engines.owner.entries import DOWNLOAD, IN, OUT, REFUSED, WIRE, Entry, now
from fedraclora.engines.owner.gate import APPROVED, ASK, Gate, RefusedError, ask_owner
from fedraclora.engines.owner.history import HISTORY, History, Tally
from fedraclora.engines.owner.policy import Limits, Policy
from fedraclora.engines.owner.refusal import OwnerRefusal
from fedraclora.engines.owner.request import RunRequest, digest_of
from fedraclora.engines.owner.rotation import line_of, rotate
from fedraclora.engines.owner.watch import NodeWatch, Wire
from fedraclora.engines.replies import OWNER_REFUSES
from fedraclora.errors import ConfigError
from fedraclora.experiments.faults.grid import become_a_task

RUN = RunRequest.of(7, b"app", {"cfg-json": "{}"})
OTHER = "f" * 64


def said(run: RunRequest) -> str:
    """The description of a run, without the breaks of lines."""
    return " ".join(run.text.split())


def entry(way: str, **more: Any) -> Entry:
    first = Entry(now(), way, RUN.digest, 7, 1, "1", "train.cohort")
    return replace(first, **more)


def policy(folder: Path, text: str) -> str:
    (folder / "policy.yaml").write_text(text)
    return str(folder / "policy.yaml")


def test_the_digest_is_that_of_code_and_settings_whether_resumed_or_not() -> None:
    config = {"cfg-json": "{}", "resume": False}
    digest = digest_of(b"app", config)
    assert digest == digest_of(b"app", {"resume": True, "cfg-json": "{}"})
    assert digest != digest_of(b"other", config)
    assert digest != digest_of(b"app", {**config, "cfg-json": '{"rounds": 3}'})
    assert digest != digest_of(b"app", {**config, "more": 1})


@pytest.mark.slow
def test_where_the_server_writes_is_not_in_the_digest(tmp_path: Path) -> None:
    """Its folder has the time of the start in its name: else no digest could be known before."""
    words = ["clients=2", "clients_per_round=2", "data=digits", "local.lr=0.1", "pretrain=none"]
    folders = [f"output.dir={tmp_path}/{name}" for name in "abc"]
    more = ([], ["engine.folder=/srv/other"], ["rounds=3"])
    one, same, other = (
        owner_request(prepare([*words, folder, *own], None)).digest
        for folder, own in zip(folders, more, strict=True)
    )
    assert one == same != other


def test_a_request_says_what_a_run_of_this_project_sends(tmp_path: Path) -> None:
    words = [
        "clients=3",
        "clients_per_round=3",
        "rounds=2",
        "compression.uplink=eden2",
        "evaluate.clients=all",
        "data=digits",
    ]
    run = prepare([*words, f"output.dir={tmp_path}/run", "local.lr=0.1", "pretrain=none"], 3)
    (tmp_path / "made").mkdir()
    _, file = write_app(run, tmp_path / "made")
    config = tomllib.loads(file.read_text())
    told = said(RunRequest.of(1, b"code", config))
    for part in ("fed_rac_lora, rank=8", "2, each with 3 of 3 clients", "SHA-256", "rounds"):
        assert part in told
    assert f"{config['sends']:,} numbers in {run.config.compression.uplink}" in told
    assert "metrics on the node's own samples" in told
    assert "readable by the server" in told


def test_a_request_of_another_app_is_described_without_control_characters() -> None:
    found = RunRequest.of(1, b"code", {"lr": "\x1b[2J1"})
    assert "not those of fedraclora" in said(found)
    assert "\x1b" not in found.text


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("approved: yes", ["approved", "list of digests"]),
        ("approved: [12]", ["approved", "64"]),
        ("- a", ["list"]),
        ("allowed: []", ["allowed"]),
        ("run: {rounds: 0}", ["run.rounds", "0"]),
        ("day: {bytes: 3}", ["day.bytes"]),
        ("day: 3", ["day", "limits"]),
        ("a: [", ["--approve"]),
    ],
)
def test_a_policy_of_another_form_is_refused(tmp_path: Path, text: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        Policy.read(Path(policy(tmp_path, text)))
    for part in parts:
        assert part in str(error.value)


def test_a_policy_survives_being_written(tmp_path: Path) -> None:
    whole = Policy(frozenset({OTHER}), Limits(rounds=3), Limits(megabytes=1.5, hours=2.0))
    whole.with_approved(RUN.digest).write(tmp_path / "policy.yaml")
    found = Policy.read(tmp_path / "policy.yaml")
    assert found == replace(whole, approved=frozenset({OTHER, RUN.digest}))


def test_a_run_trains_once_its_digest_is_in_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate = Gate(policy(tmp_path, f"approved: [{OTHER}]"), History(tmp_path))
    for _ in range(2):
        with pytest.raises(RefusedError, match=RUN.digest):
            gate.check(RUN, "query.partition", "")
    assert capsys.readouterr().err.count(RUN.digest) == 1  # told once
    policy(tmp_path, f"approved: [{RUN.digest}]")
    gate.check(RUN, "query.partition", "")
    policy(tmp_path, "approved: [")  # broken by its owner: nothing trains
    with pytest.raises(RefusedError):
        gate.check(RUN, "train.cohort", "1")


def test_an_owner_is_asked_once_and_the_answer_is_kept(tmp_path: Path) -> None:
    asked = list[str]()
    answers = iter([False, True])

    def ask(text: str) -> bool:
        asked.append(text)
        return next(answers)

    gate, history = Gate(ASK, History(tmp_path), ask), History(tmp_path)
    for _ in range(2):
        with pytest.raises(RefusedError):
            gate.check(RUN, "train.cohort", "1")
    assert len(asked) == 1
    Gate(ASK, history, ask).check(RUN, "train.cohort", "1")  # after a restart of the node
    Gate(ASK, history, ask).check(RUN, "train.cohort", "2")
    assert len(asked) == 2
    assert Policy.read(tmp_path / APPROVED).approved == {RUN.digest}


@pytest.mark.parametrize(("typed", "approved"), [(b"y\n", True), (b"\n", False)])
def test_an_owner_answers_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, typed: bytes, approved: bool
) -> None:
    ours, theirs = os.openpty()
    try:
        monkeypatch.setattr("fedraclora.engines.owner.gate.TERMINAL", Path(os.ttyname(theirs)))
        os.write(ours, typed)
        assert ask_owner("digest 123\n") is approved
        shown = b""  # after the echo of what was typed
        while b"Approve it?" not in shown:
            shown += os.read(ours, 1 << 12)
        assert b"digest 123" in shown
    finally:
        os.close(ours)
        os.close(theirs)


def test_where_nobody_can_be_asked_the_run_is_refused(tmp_path: Path) -> None:
    def gone(_: str) -> bool:
        raise OSError("no terminal")

    with pytest.raises(RefusedError):
        Gate(ASK, History(tmp_path), gone).check(RUN, "train.cohort", "1")


@pytest.mark.parametrize(
    ("limits", "reached"),
    [
        ("run: {rounds: 2}", "rounds=2 of a run"),
        ("day: {rounds: 3}", None),
        ("day: {rounds: 2}", "rounds=2 of a day"),
        ("run: {megabytes: 2}", "megabytes=2 of a run"),
        ("run: {megabytes: 2.1}", None),
        ("day: {hours: 0.5}", "hours=0.5 of a day"),
    ],
)
def test_limits_end_the_training_of_a_run_or_a_day(
    tmp_path: Path, limits: str, reached: str | None
) -> None:
    history = History(tmp_path)
    yesterday = (datetime.now(UTC) - timedelta(days=1, hours=1)).isoformat()
    for other in ({"time": yesterday, "digest": OTHER}, {"round": "1"}, {"round": "2"}):
        history.add(entry(IN, **other))
        history.add(entry(OUT, **other, bytes=1_000_000, seconds=900.0))
    gate = Gate(policy(tmp_path, f"approved: [{RUN.digest}]\n{limits}"), history)
    if reached is None:
        gate.check(RUN, "query.partition", "")
        gate.check(RUN, "train.cohort", "3")
        return
    for kind, round_ in (("query.partition", ""), ("train.cohort", "3")):
        with pytest.raises(RefusedError, match=reached) as refused:
            gate.check(RUN, kind, round_)
        assert bool(refused.value.refusal.until) == ("day" in reached)


def test_the_last_round_that_a_limit_allows_is_brought_to_its_end(tmp_path: Path) -> None:
    """It may have several messages; a run that is resumed begins its rounds anew."""
    history = History(tmp_path)
    history.add(entry(IN, round="1"))
    gate = Gate(policy(tmp_path, f"approved: [{RUN.digest}]\nrun: {{rounds: 1}}"), history)
    gate.check(RUN, "train.cohort", "1")
    with pytest.raises(RefusedError, match="rounds=1"):
        gate.check(RUN, "train.cohort", "2")
    with pytest.raises(RefusedError, match="rounds=1"):
        gate.check(replace(RUN, run=8), "train.cohort", "1")


def test_a_round_that_is_asked_for_again_after_another_counts_again(tmp_path: Path) -> None:
    history, tally = History(tmp_path), Tally(tmp_path / HISTORY)

    def rounds_after(*asked: str, node: int = 3) -> float | None:
        for round_ in asked:
            history.add(entry(IN, round=round_, node=node))
        tally.update()
        return tally.of_run(RUN.digest).limits.rounds

    assert rounds_after("1", "1", "2") == 2  # several messages of a round
    assert rounds_after("1", node=4) == 2  # another node of the owner's, which is late
    assert rounds_after("2", node=4) == 2
    assert rounds_after("1", "2", "1", "2") == 6
    assert rounds_after("1 of search 1", "2 of search 1", "3") == 9
    rotate(history.file, history.entries())
    anew = Tally(history.file)
    anew.update()
    assert anew.of_run(RUN.digest).limits.rounds == 9
    gate = Gate(policy(tmp_path, f"approved: [{RUN.digest}]\nrun: {{rounds: 9}}"), history)
    gate.check(RUN, "train.cohort", "3")
    with pytest.raises(RefusedError, match="rounds=9"):
        gate.check(RUN, "train.cohort", "2")


def test_an_owner_is_told_once_for_each_run_until_it_may_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gate, told = Gate(policy(tmp_path, "approved: ["), History(tmp_path)), list[int]()

    def check(run: RunRequest, text: str) -> None:
        policy(tmp_path, text)
        with suppress(RefusedError):
            gate.check(run, "query.partition", "")
        told.append(len(capsys.readouterr().err))

    for run in (RUN, RUN, replace(RUN, run=8)):
        check(run, "approved: [")
    check(RUN, f"approved: [{RUN.digest}]")  # says that it may train
    check(RUN, f"approved: [{RUN.digest}]")
    check(RUN, "approved: [")
    assert [bool(count) for count in told] == [True, False, True, True, False, True]


def test_a_history_goes_on_after_a_line_that_a_kill_has_cut(tmp_path: Path) -> None:
    history = History(tmp_path)
    history.add(entry(IN))
    with history.file.open("a") as file:
        file.write('{"time": "2026')
    assert len(history.entries()) == 1
    History(tmp_path).add(entry(OUT, bytes=5))
    assert [e.way for e in history.entries()] == [IN, OUT]
    tally = Tally(history.file)
    tally.update()
    assert tally.of_run(RUN.digest).limits == Limits(1, 5e-6, 0.0)


def test_what_was_used_is_added_up_as_it_comes(tmp_path: Path) -> None:
    """Of several nodes in one file; a file that was moved away is begun anew."""
    history, other = History(tmp_path), History(tmp_path)
    tally = Tally(history.file)
    for number in range(1, 4):
        history.add(entry(IN, round=str(number)))
        other.add(entry(OUT, round=str(number), bytes=500_000, seconds=360.0))
        tally.update()
        wanted = Limits(number, number / 2, number / 10)
        for found in (tally.of_run(RUN.digest), tally.of_day(now()[:10])):
            assert found.limits == wanted
    tally.update()
    assert tally.of_run(RUN.digest).limits == wanted
    with history.file.open("a") as file:
        file.write('{"time": "2026')  # of a kill
    tally.update()
    history.file.unlink()
    History(tmp_path).add(entry(IN))
    tally.update()
    assert tally.of_run(RUN.digest).limits == Limits(1, 0.0, 0.0)
    with history.file.open("a") as file:
        file.write("{}\n")
    with pytest.raises(ConfigError, match="no entry"):
        tally.update()


def three_days(rounds: int) -> Iterator[Entry]:
    """The messages of a run at two nodes of one owner, with a question and a refusal."""
    yield entry(IN, round="", kind="query.partition", bytes=40, time="2026-01-01T09:00:00")
    yield entry(REFUSED, round="1", bytes=70, time="2026-01-01T09:00:01")
    for number in range(1, rounds + 1):
        day = 1 + 3 * (number - 1) // rounds
        about = {"round": str(number), "time": f"2026-01-0{day}T10:00:00.{number:03d}"}
        for k in range(2):
            yield entry(IN, bytes=200, node=k, **about)
            more = {"samples": 30 + number % 7, "records": {"Array": 500}}
            yield entry(OUT, bytes=500, node=k, seconds=0.5, **more, **about)
            yield entry(WIRE, bytes=900, node=k, **about)


def test_an_old_history_is_bounded_and_its_sums_are_those_of_all_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rounds, largest = 64, 0
    whole, rotated = History(tmp_path / "whole"), History(tmp_path / "rotated")
    whole.file.write_bytes(b"".join(map(line_of, three_days(rounds))))
    monkeypatch.setattr(history_module, "MOST_HISTORY", most := 10_000)
    running = Tally(rotated.file)  # of a node that runs all the time
    for each in three_days(rounds):
        rotated.add(each)
        running.update()
        largest = max(largest, sum(f.stat().st_size for f in rotated.file.parent.iterdir()))
    assert whole.file.stat().st_size > 8 * most
    assert largest < 2 * most
    known, anew = Tally(whole.file), Tally(rotated.file)
    known.update()
    anew.update()
    for tally in (running, anew):
        for day in ("2026-01-02", "2026-01-03"):
            assert tally.of_day(day).limits == known.of_day(day).limits
        assert tally.of_run(RUN.digest).limits == known.of_run(RUN.digest).limits
    assert known.of_run(RUN.digest).limits == Limits(rounds, rounds / 1000, rounds / 3600)
    rows = []
    monkeypatch.setenv("COLUMNS", "200")
    for state in ("whole", "rotated"):
        assert node.main(["--history", f"--state={tmp_path}/{state}"]) == 0
        printed = capsys.readouterr().out.splitlines()
        rows.append(next(line.split() for line in printed if " all " in line))
        assert any(" earlier " in line for line in printed) == (state == "rotated")
    assert rows[0] == rows[1]


def test_no_entry_of_two_nodes_is_lost_while_one_of_them_rotates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(history_module, "MOST_HISTORY", 3_000)

    def write(node: int) -> None:
        for number in range(50):
            History(tmp_path).add(entry(OUT, round=str(number), node=node, bytes=1))

    with ThreadPoolExecutor(2) as threads:
        list(threads.map(write, range(2)))
    assert sum(e.bytes for e in History(tmp_path).entries()) == 100


class Node:
    """What Flower's node holds, and its functions: one message comes, and its reply goes."""

    def __init__(self, watch: NodeWatch, run: int = 7) -> None:
        become_a_task()
        self.asked = RecordDict({"job": ConfigRecord({"x": 1})})
        self.message = Message(self.asked, 3, "train.cohort", group_id="4")
        self.message.metadata.__dict__["_run_id"] = run
        self.message.metadata.__dict__["_message_id"] = "m"
        self.replies = list[Message]()
        self.apps, self.app, self.called = 0, b"app", hashlib.sha256(b"app").hexdigest()
        self.state = SimpleNamespace(get_node_id=lambda: 3, store_message=self.replies.append)
        self.store = SimpleNamespace(preregister=lambda *_: None, put=lambda *_: None)
        self.pull = watch.pulling(self.flower_pulls)
        self.push = watch.pushing(self.flower_pushes)

    def flower_pulls(self, **given: Any) -> int | None:
        message, _ = given["receive"]()
        run = message.metadata.run_id
        given["get_fab"](given["get_run"](run).fab_hash, run)
        for name in get_all_nested_objects(message):
            given["pull_object"](run, name)
        return int(run)

    def flower_pushes(self, _state: Any, _store: Any, send: Any, push_object: Any) -> None:
        for reply in self.replies:
            send(reply, get_object_tree(reply), 0.0)
            for name, found in get_all_nested_objects(reply).items():
                push_object(7, "session", name, found.deflate())

    def get_fab(self, *_: object) -> Any:
        self.apps += 1
        return SimpleNamespace(content=self.app)

    def come(self) -> int | None:
        """One message comes."""
        objects = get_all_nested_objects(self.message)
        found: int | None = self.pull(
            state=self.state,
            object_store=self.store,
            node_config={"name": "north", "partition-ids": "0,2-3"},
            receive=lambda: (self.message, get_object_tree(self.message)),
            get_run=lambda run: SimpleNamespace(fab_hash=self.called, run_id=run),
            get_fab=self.get_fab,
            pull_object=lambda _, name: objects[name].deflate(),
        )
        return found


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flower_internals, "run_config", lambda *_: {"cfg-json": "{}"})


@pytest.mark.usefixtures("config")
def test_what_comes_and_goes_is_written_down_with_its_bytes(tmp_path: Path) -> None:
    history = History(tmp_path)
    there = Node(NodeWatch(Gate(None, history), history))
    assert there.come() == 7
    reply = RecordDict({"job": ConfigRecord({"y": b"12345"})})
    there.replies = [Message(reply, reply_to=there.message)]
    there.push(there.state, there.store, lambda *_: None, lambda *_: None)
    entries = [e for e in history.entries() if e.way != WIRE]
    bundle, came, went = entries
    assert (bundle.way, bundle.bytes) == (DOWNLOAD, len(there.app))
    bytes_ = [
        sum(len(o.deflate()) for o in get_all_nested_objects(m).values())
        + flower_internals.announcement_bytes(m, get_object_tree(m))
        for m in (there.message, there.replies[0])
    ]
    assert (came.way, went.way, [came.bytes, went.bytes]) == (IN, OUT, bytes_)
    assert (came.round, came.kind, came.node, came.digest) == ("4", "train.cohort", 3, RUN.digest)
    assert went.seconds is not None
    assert came.records is not None
    assert sum(came.records.values()) < came.bytes


@pytest.mark.usefixtures("config")
def test_a_refused_message_reaches_no_code_of_the_run(tmp_path: Path) -> None:
    history = History(tmp_path)
    gate = Gate(policy(tmp_path, "approved: []"), history)
    there = Node(NodeWatch(gate, history))
    assert there.come() == 7
    assert there.come() == 7
    assert there.apps == 1  # the bundle is fetched once
    (reply, _) = there.replies
    assert reply.error.code == OWNER_REFUSES
    said = OwnerRefusal.read(reply.error.reason)
    assert RUN.digest in said.why
    assert (said.name, said.clients) == ("north", (0, 2, 3))
    there.push(there.state, there.store, lambda *_: None, lambda *_: None)
    refused = [e for e in history.entries() if e.way == REFUSED]
    assert {e.way for e in history.entries()} == {DOWNLOAD, REFUSED, WIRE}
    size = flower_internals.announcement_bytes(there.message, get_object_tree(there.message))
    assert [e.bytes for e in refused] == [size, size]


@pytest.mark.parametrize(
    "text", ["no", "[1]", '{"why": 3}', "{}", '{"why": "\\u001b[2J", "until": 0}']
)
def test_the_reason_of_another_machine_may_be_any_text(text: str) -> None:
    found = OwnerRefusal.read(text)
    assert str(found).isprintable()
    assert found.clients == ()


@pytest.mark.usefixtures("config")
def test_an_app_that_is_another_than_the_one_that_was_approved_is_refused(tmp_path: Path) -> None:
    history = History(tmp_path)
    watch = NodeWatch(Gate(policy(tmp_path, f"approved: [{RUN.digest}]"), history), history)
    there = Node(watch)
    assert there.come() == 7
    there.app = b"other"
    watch.apps.clear()
    assert there.come() == 7  # Flower asks again in this test
    (reply,) = there.replies
    assert reply.error.code == OWNER_REFUSES


@pytest.mark.usefixtures("config")
def test_a_bundle_is_downloaded_once_for_all_runs_that_have_it(tmp_path: Path) -> None:
    """Under its SHA-256; one that is not what it is called is kept for nobody."""
    history = History(tmp_path)
    watch = NodeWatch(Gate(None, history), history)
    nodes = [Node(watch, run) for run in (7, 8)]
    for there in nodes:
        there.called = hashlib.sha256(there.app).hexdigest()
        assert there.come() == there.message.metadata.run_id
    assert [there.apps for there in nodes] == [1, 0]
    bundles = [e for e in history.entries() if e.way == DOWNLOAD]
    assert [e.run for e in bundles] == [7]
    other = Node(watch, 9)
    other.app, other.called = b"another", nodes[0].called[::-1]
    other.come()
    assert other.apps == 2


def test_all_that_a_node_sends_and_receives_is_counted() -> None:
    class Client:
        def _send(self, context: Any, *, stream: bool = False) -> httpx.Response:
            context.request.headers["signature"] = "s" * 100
            return httpx.Client(transport=httpx.MockTransport(answer)).send(context.request)

    def answer(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=iter([b"r" * 1000]))

    wire = Wire()
    client = wire.counting(Client)()
    for size in (0, 5000):
        request = httpx.Request("POST", "http://link/pull", content=b"x" * size)
        client._send(SimpleNamespace(request=request))
    took = wire.take()
    assert took["requests"] == 2
    assert 5000 + 2 * 100 < took["sent"] < 5000 + 2 * 500
    assert 2000 < took["received"] < 2 * 1500
    assert wire.take() == {"sent": 0, "received": 0, "requests": 0}


def test_a_node_gets_what_its_owner_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    got = dict[str, Any]()
    monkeypatch.setattr(node.os, "execve", lambda _, words, environ: got.update(w=words, e=environ))
    file = policy(tmp_path, "approved: []")
    node.main([f"--approve={file}", "--state", f"{tmp_path}/s", "--superlink", "a:1"])
    assert got["w"][-2:] == ["--superlink", "a:1"]
    assert json.loads(got["e"][OWNED]) == {"policy": file, "state": f"{tmp_path}/s"}
    with pytest.raises(ConfigError, match="approve"):
        node.main([f"--approve={tmp_path}/none"])
    node.main([f"--approve={file}", "--plain", "--state", f"{tmp_path}/s", "--port", "9093"])
    assert got["w"][-2:] == ["--port", "9093"]
    assert "--plain" not in got["w"]
    assert got["e"][UNPATCHED] == "all"
    assert got["e"][OWNED]
    with pytest.raises(ConfigError, match="--port"):
        node.main(["--port", "9093"])


def test_history_is_printed_by_run_and_round(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(ConfigError, match="none"):
        node.main(["--history", f"--state={tmp_path}/none"])
    history = History(tmp_path)
    for number in ("1", "2"):
        history.add(entry(IN, round=number, bytes=2000))
        history.add(entry(OUT, round=number, bytes=7000, samples=30, seconds=1.5))
    history.add(entry(REFUSED, round="3"))
    assert node.main(["--history", f"--state={tmp_path}"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    whole = next(row for row in rows if "all" in row)
    assert {"4.0", "14.0", "30", "3.0", "1"} <= {*whole}
    assert sum(RUN.digest[:8] in row for row in rows) == 4


@pytest.mark.parametrize(
    ("which", "rounds", "left"),
    [
        ("", range(71, 121), 70),
        ("=2", (119, 120), 118),
        ("=all", range(1, 121), 0),
        ("=2026-01-07", (120,), 119),
    ],
)
def test_the_last_rounds_of_a_long_history_are_printed_and_the_others_counted(
    which: str,
    rounds: Sequence[int],
    left: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    history = History(tmp_path)
    about = [(str(k), f"2026-01-0{1 + k // 20}T10:{k % 60:02d}:00.000") for k in range(1, 121)]
    entries = [entry(IN, round=number, time=time) for number, time in about]
    history.file.write_bytes(b"".join(map(line_of, sorted(entries, key=lambda e: e.time))))
    assert node.main([f"--history{which}", f"--state={tmp_path}"]) == 0
    printed = capsys.readouterr().out
    rows = [line.partition(RUN.digest[:8])[2].split() for line in printed.splitlines()]
    first, *others = [row[1] for row in rows if row]
    assert first == "all"
    assert sorted(map(int, others)) == [*rounds]
    assert (f"{left} rounds before" in printed) == bool(left)


@pytest.mark.parametrize("which", ["yesterday", "-3", "2026-13-01"])
def test_rounds_of_a_history_that_cannot_be_meant_are_refused(which: str, tmp_path: Path) -> None:
    History(tmp_path)
    with pytest.raises(ConfigError, match=r"2026-12-31, or all"):
        node.main([f"--history={which}", f"--state={tmp_path}"])
