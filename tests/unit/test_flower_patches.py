"""What is patched in Flower: that it is what it was, and what stands in its place."""

from __future__ import annotations

import inspect
import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from flwr.app import Message, RecordDict
from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE
from flwr.proto.message_pb2 import PushObjectRequest, PushObjectResponse
from flwr.supercore.fab import Fab
from flwr.supercore.inflatable.inflatable_object import get_object_tree
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPushError,
    push_object_contents_from_iterable,
)
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import Run
from flwr.supercore.superexec import run_superexec
from flwr.superlink.servicer.control import control_handlers
from flwr.supernode import start_client_internal
from flwr.supernode.fleet_http_client import FleetHttpClient
from httpx import (
    BaseTransport,
    Client,
    ConnectError,
    HTTPStatusError,
    Request,
    Response,
    SyncByteStream,
)

from fedraclora.engines import flower_patches
from fedraclora.engines.flower_patches import (
    AT_SOCKETS,
    EARLY,
    FLEET,
    NODE,
    OLDEST,
    OWNER,
    PART,
    PATCHES,
    SOCKETS,
    UNPATCHED,
    WAKE,
    Patch,
    Pauses,
    executor_pauses,
    in_parts,
    lines,
    node_pauses,
    off,
    patch,
    patch_mismatch,
    patient,
    sending_all_parts,
    source_of,
    why_without,
)
from fedraclora.experiments.faults.grid import become_a_task

FILE = flower_patches.__file__


@pytest.fixture
def unpatched(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, object]]:
    """What stands at each place that is patched; all of it is put back at the end."""
    found = dict[str, object]()
    for each in PATCHES:
        for place in each.uses:
            module, _, name = place.partition(":")
            found[place] = getattr(import_module(module), name)
            monkeypatch.setattr(import_module(module), name, found[place])
    # What forks is stood in for: this process has threads, and is no SuperExec.
    monkeypatch.setattr(os, "fork", lambda: 1)
    monkeypatch.setattr(flower_patches, "end_with_parent", lambda: None)
    monkeypatch.setenv(WAKE, "0")
    forks = list[socket.socket]()
    monkeypatch.setattr(flower_patches, "FORKS", forks)
    monkeypatch.setenv(SOCKETS, '{"127.0.0.1:2": "/nowhere/api"}')
    yield found
    for link in forks:
        link.close()


def replaced(unpatched: dict[str, object]) -> set[str]:
    """The places at which something else stands now."""
    return {
        place
        for place, before in unpatched.items()
        if getattr(import_module(place.partition(":")[0]), place.partition(":")[2]) is not before
    }


@pytest.mark.parametrize("each", [*PATCHES, OWNER], ids=lambda each: each.name)
def test_flower_is_what_a_patch_was_written_for(each: Patch) -> None:
    """If this fails, Flower has changed what is patched; the patch is left out until it follows."""
    assert patch_mismatch(each) is None


@pytest.mark.parametrize("each", PATCHES, ids=lambda each: each.name)
def test_a_patch_replaces_all_that_it_looks_at_and_nothing_else(
    each: Patch, unpatched: dict[str, object]
) -> None:
    for replace in each.programs.values():
        replace()
    assert replaced(unpatched) == {*each.uses}


def looks_at(each: Patch, module: str) -> bool:
    """Whether a patch is left out where that module of Flower is another."""
    return any(place.partition(":")[0] == module for place in (*each.uses, *each.takes))


CHANGES = [
    (each, form, place)
    for each in PATCHES
    for form, places in (("uses", each.uses), ("takes", each.takes))
    for place in places
]


@pytest.mark.parametrize(
    ("each", "form", "place"), CHANGES, ids=[f"{e.name}, {p}" for e, _, p in CHANGES]
)
@pytest.mark.parametrize("gone", [False, True])
def test_a_patch_is_left_out_where_flower_has_changed_what_it_replaces(
    each: Patch,
    form: str,
    place: str,
    gone: bool,
    unpatched: dict[str, object],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new use, another argument, a module that is no more: then none of it is replaced."""
    module, _, name = place.partition(":")
    read, plain = source_of, source_of(module)
    last = name.rpartition(".")[2]
    more = f"{plain}\n{name}.another_thing()\n"
    if form == "takes":
        more = re.sub(rf"(def {last}\([^)]*?)(,?\s*\) ->)", r"\1, another=None\2", plain)
        assert more != plain
    changed = "" if gone else more
    monkeypatch.setattr(
        flower_patches, "source_of", lambda asked: changed if asked == module else read(asked)
    )
    # Other patches look at other modules: what is known of them stays known.
    fresh = patch_mismatch.__wrapped__
    monkeypatch.setattr(
        flower_patches,
        "patch_mismatch",
        lambda other: (fresh if looks_at(other, module) else patch_mismatch)(other),
    )
    why = why_without(each)
    assert why is not None
    assert module in why
    assert ("nothing" in why) is gone
    assert any(each.name in line and why in line for line in lines())
    if each is AT_SOCKETS:  # who said that addresses are sockets must not listen elsewhere
        with pytest.raises(SystemExit, match="is left out"):
            patch(NODE)
    monkeypatch.delenv(SOCKETS)
    for program in each.programs:
        patch(program)
    others = {p for one in PATCHES if one is not each for p in one.uses}
    assert not replaced(unpatched) & (each.uses.keys() - others)


def test_patches_that_are_named_are_left_out(
    unpatched: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(UNPATCHED, "fork, slow_links")
    assert lines() == [
        "Flower's patches fork, slow_links are left out: FEDRACLORA_UNPATCHED=fork, slow_links"
    ]
    patch(NODE)
    assert f"{FLEET}:make_simple_http_retry_invoker" in replaced(unpatched)
    assert f"{FLEET}:FleetHttpClient" not in replaced(unpatched)


def test_all_patches_can_be_left_out(
    unpatched: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(UNPATCHED, "all")
    monkeypatch.delenv(SOCKETS)
    told, ports = lines()
    assert all(each.name in told for each in PATCHES)
    assert "ports that every user" in ports
    for program in {program for each in PATCHES for program in each.programs}:
        patch(program)
    assert not replaced(unpatched)


def test_a_name_that_is_no_patch_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNPATCHED, "fork,spoon")
    with pytest.raises(SystemExit, match="spoon is none of all, fork"):
        patch(NODE)


def test_a_request_is_written_in_parts_each_with_its_own_time() -> None:
    written = list[bytes]()

    class Link(BaseTransport):
        def handle_request(self, request: Request) -> Response:
            assert isinstance(request.stream, SyncByteStream)
            written.extend(request.stream)
            assert request.headers["content-length"] == str(sum(map(len, written)))
            return Response(200, content=PushObjectResponse(stored=True).SerializeToString())

    client = in_parts(FleetHttpClient)("http://link")
    client._client = Client(transport=Link())
    asked = PushObjectRequest(object_content=os.urandom(3 * PART))
    assert client.PushObject(asked).stored
    assert PushObjectRequest.FromString(b"".join(written)) == asked
    assert max(map(len, written)) <= PART


def test_a_part_that_is_refused_keeps_no_other_part_back() -> None:
    """It was sent a second time, since the link broke before the answer to the first came."""
    sent = list[str]()

    def push_part(name: str, content: bytes) -> None:
        if name == "first":
            raise ObjectPushError(name, 1, "session")
        sent.append(name)

    parts = [(name, b"part") for name in ("first", "second", "third")]
    with pytest.raises(ObjectPushError):
        push_object_contents_from_iterable(parts, push_part, max_concurrent_pushes=1)
    sent.clear()
    sending_all_parts(push_object_contents_from_iterable, ObjectPushError)(
        parts, push_object_fn=push_part
    )
    assert sorted(sent) == ["second", "third"]


@pytest.mark.parametrize(
    ("said", "ends"),
    [
        ("_ssl.c:989: The handshake operation timed out", False),
        ("certificate verify failed: certificate has expired (_ssl.c:1006)", False),
        ("[SSL: UNEXPECTED_EOF_WHILE_READING] EOF occurred in violation of protocol", False),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", True),
        ("[SSL: WRONG_VERSION_NUMBER] wrong version number", True),
    ],
)
def test_a_link_that_breaks_in_a_handshake_ends_no_node(said: str, ends: bool) -> None:
    error = ConnectError(said)
    assert make_simple_http_retry_invoker().should_giveup(error)
    assert patient(make_simple_http_retry_invoker)().should_giveup(error) is ends


@pytest.mark.parametrize(("seconds", "told"), [(3700, "ahead of"), (-3700, "behind")])
@pytest.mark.parametrize(("path", "ends"), [("activate-node", True), ("pull-messages", False)])
def test_a_node_whose_signatures_are_refused_says_how_far_its_clock_is_off(
    seconds: int, told: str, path: str, ends: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that has begun is ended by Flower, by a signal."""
    there = datetime.now(UTC) - timedelta(seconds=seconds)
    request = Request("POST", f"https://link:8000/v1/fleet/{path}")
    answer = Response(401, headers={"date": format_datetime(there, usegmt=True)}, request=request)
    given_up = list[Exception]()
    retries = SimpleNamespace(should_giveup=given_up.append)
    found = patient(lambda: retries)().should_giveup(
        HTTPStatusError("", request=request, response=answer)
    )
    assert (found, len(given_up)) == ((True, 0) if ends else (None, 1))
    assert (EARLY, OLDEST) == (SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE)
    assert off({"date": format_datetime(datetime.now(UTC), usegmt=True)}) == off({}) == ""
    assert re.search(rf"clock here is 3[67]\d\d s {told} the SuperLink's", capsys.readouterr().err)


@pytest.mark.parametrize(("path", "said"), [("activate-node", False), ("pull-messages", True)])
def test_a_running_node_whose_key_is_removed_says_so(
    path: str, said: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """Flower ends it, by a signal; a key that was never registered has an error of its own."""
    request = Request("POST", f"https://link:8000/v1/fleet/{path}")
    clock = {"date": format_datetime(datetime.now(UTC), usegmt=True)}
    answer = Response(401, headers=clock, request=request)
    given_up = list[Exception]()
    retries = SimpleNamespace(should_giveup=given_up.append)
    patient(lambda: retries)().should_giveup(HTTPStatusError("", request=request, response=answer))
    assert len(given_up) == 1
    assert ("federation remove" in capsys.readouterr().err) is said


@pytest.mark.parametrize("code", [2004, 2003])
def test_a_node_whose_key_is_not_registered_says_so(
    code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    request = Request("POST", "https://link:8000/v1/fleet/activate-node")
    answer = Response(400, json={"code": code, "detail": "Failed"}, request=request)
    error = HTTPStatusError("", request=request, response=answer)
    patient(make_simple_http_retry_invoker)().should_giveup(error)
    assert ("not registered" in capsys.readouterr().err) is (code == 2004)


def test_pauses_are_a_tenth_of_the_time_since_something_happened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slept = [50.0], list[float]()
    clock = SimpleNamespace(monotonic=lambda: now[0], sleep=slept.append)
    monkeypatch.setattr(flower_patches, "time", clock)
    pauses = Pauses()
    for seconds in (50.2, 52.0, 60.0, 500.0):
        now[0] = seconds
        pauses.sleep(3.0)
    pauses.sleep(0.5)
    pauses.note()
    pauses.sleep(3.0)
    pauses.sleep(0.5)
    assert slept == pytest.approx([0.1, 0.2, 1.0, 3.0, 0.5, 0.1, 0.005])


def test_every_message_wakes_who_starts_a_process_for_it(
    unpatched: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who looks for it would pause for a minute; once the node has gone the pauses are Flower's."""
    pushed, ends, pipe = list[str](), list[int](), os.pipe

    def make_pipe() -> tuple[int, int]:
        ends.extend(pipe())
        return ends[0], ends[1]

    monkeypatch.setattr(os, "pipe", make_pipe)
    monkeypatch.delenv(WAKE, raising=False)
    monkeypatch.setattr(start_client_internal, "_push_messages", pushed.append)
    node_pauses()
    executor_pauses()
    began = time.monotonic()
    for word in ("one", "two"):
        start_client_internal._push_messages(word)  # type: ignore[call-arg,arg-type]
        run_superexec.time.sleep(60)  # type: ignore[attr-defined]
    os.close(ends[1])
    run_superexec.time.sleep(0.01)  # type: ignore[attr-defined]
    os.close(ends[0])
    assert 0.01 < time.monotonic() - began < 30
    assert pushed == ["one", "two"]


@pytest.mark.slow
def test_an_app_is_installed_once_for_all_processes(tmp_path: Path) -> None:
    """Of one message and the next, which are others: the first is forked from this one."""
    words = """
import os, pathlib, runpy, sys
def install(app, name):
    print(app.decode(), name, os.getpid(), flush=True)
    folder = pathlib.Path(sys.argv[2], app.decode())
    folder.mkdir(exist_ok=True)
    return folder
installed = runpy.run_path(sys.argv[1])["once"](install)
if (child := os.fork()) == 0:
    installed(b"one", name=1)
    os._exit(0)
os.waitpid(child, 0)
print(child, os.getpid(), flush=True)
for app in (b"one", b"two", b"two", b"one"):
    installed(app, name=1)
pathlib.Path(sys.argv[2], "one").rmdir()
installed(b"one", name=2)
"""
    command = [sys.executable, "-c", words, FILE, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, processes, *more = done.stdout.splitlines()
    child, parent = processes.split()
    assert first == f"one 1 {child}"
    assert more == [f"two 1 {parent}", f"one 1 {parent}", f"one 2 {parent}"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "status", "said"),
    [
        ("pass", 0, ""),
        ("sys.exit(3)", 3, ""),
        ("sys.exit()", 0, ""),
        ("sys.exit('no')", 1, ""),
        ("1 / 0", 1, "ZeroDivisionError: division by zero"),
    ],
)
def test_a_process_ends_at_once_with_its_status(how: str, status: int, said: str) -> None:
    words = "import atexit, runpy, sys; scope = runpy.run_path(sys.argv[1])\n"
    words += "atexit.register(print, 'late')\n"
    words += f"def run():\n    print('ran', end='')\n    {how}\nscope['end_after'](run)"
    done = subprocess.run(
        [sys.executable, "-c", words, FILE],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (status, "ran")
    assert done.stderr.strip().endswith(said)
    assert bool(done.stderr) == bool(said)


@pytest.mark.slow
def test_it_imports_nothing_of_this_project() -> None:
    """An app brings its own copy, which a module that is loaded would hide."""
    words = "import runpy, sys; runpy.run_path(sys.argv[1]); print(*sys.modules)"
    command = [sys.executable, "-c", words, FILE]
    loaded = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert not [name for name in loaded if name.partition(".")[0] in {"fedraclora", "flwr"}]


@pytest.mark.slow
def test_a_process_for_each_command_line_is_forked_until_nobody_asks(tmp_path: Path) -> None:
    """Flower is stood in for: each process is told its words, and is another."""
    stand_in = tmp_path / "flwr" / "supernode" / "cli"
    stand_in.mkdir(parents=True)
    (tmp_path / "flwr" / "__init__.py").touch()
    (tmp_path / "flwr" / "supernode" / "__init__.py").touch()
    for name in ("cli/install", "supernode/runtime/run_clientapp"):
        file = tmp_path / "flwr" / f"{name}.py"
        file.parent.mkdir()
        (file.parent / "__init__.py").touch()
        file.write_text("def install_from_fab(): pass")
    (tmp_path / "httpcore.py").touch()
    (stand_in / "__init__.py").write_text(
        "import os, sys, time\n"
        "def flwr_clientapp():\n"
        "    print(*sys.argv, os.getpid(), os.getppid(), flush=True)\n"
        "    if sys.argv[-1] == 'long':\n"
        "        time.sleep(60)\n"
    )
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        words = "import runpy, socket, sys; scope = runpy.run_path(sys.argv[1]); "
        words += "scope['run_clientapps'](socket.socket(fileno=int(sys.argv[2])))"
        with subprocess.Popen(
            [sys.executable, "-c", words, FILE, str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env={"PYTHONPATH": str(tmp_path)},
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            theirs.close()
            for token in ("one", "two"):
                ours.send(f'["flwr-clientapp", "--token", "{token}"]'.encode())
            assert process.stdout is not None
            lines = sorted(process.stdout.readline().split() for _ in range(2))
            ours.send(b'["flwr-clientapp", "--token", "long"]')
            assert process.stdout.readline().split()[2] == "long"
            ours.close()
            assert process.wait() == 0
            assert process.stdout.read() == ""  # the last of them ends with it
    assert [line[:3] for line in lines] == [
        ["flwr-clientapp", "--token", t] for t in ("one", "two")
    ]
    assert {line[4] for line in lines} == {str(process.pid)}
    assert len({line[3] for line in lines} | {str(process.pid)}) == 3


def test_trusted_entities_refuse_an_app_that_no_hub_has_signed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As docs/deploy.md says: a run that is submitted as a bundle has no verification."""
    become_a_task()
    asked, kept = Message(RecordDict(), 7, "query.partition", ttl=100), list[Message]()
    asked.metadata.__dict__["_run_id"] = 5
    monkeypatch.setattr(start_client_internal, "_insert_message", lambda m, *_: kept.append(m))
    state = SimpleNamespace(get_run=lambda _: None, get_node_id=lambda: 7)
    pull = partial(
        start_client_internal._pull_and_store_message,
        state=state,
        object_store=SimpleNamespace(preregister=lambda *_: []),
        node_config={},
        receive=lambda: (asked, get_object_tree(asked)),
        get_run=lambda _: Run.create_empty(5),
        get_fab=lambda *_: Fab("hash", b"any", {}),  # what `start_run` makes of a bundle
        pull_object=lambda *_: b"",
        confirm_message_received=lambda *_: None,
    )
    assert pull(trusted_entities={"key": "ssh-ed25519 AAAA"}) == 5
    assert [m.error.code for m in kept] == [start_client_internal.FAB_VERIFICATION_ERROR.code]
    started = inspect.getsource(control_handlers.start_run)
    assert re.search(r"verification_dict: dict\[str, str\] = {}", started)
    local = started.partition("# Start a run using the provided app")[2]
    assert "verification_dict" not in local.partition("if len(fab_file)")[0]


@pytest.mark.slow
def test_a_node_that_has_given_its_connection_up_ends(tmp_path: Path) -> None:
    """Flower's own stays: a thread that serves its API keeps the process."""
    program = tmp_path / "flower-supernode"
    program.write_text(
        f"#!{sys.executable}\nimport sys, threading, time\n"
        "threading.Thread(target=time.sleep, args=(300,)).start()\nsys.exit(None)\n"
    )
    program.chmod(0o755)
    command = [sys.executable, "-P", flower_patches.__file__, str(program)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1
    assert flower_patches.LINK_LOST in done.stderr


def test_a_superlink_that_fails_for_a_moment_ends_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(monotonic=lambda: clock.now, now=1000.0)
    monkeypatch.setattr(flower_patches, "time", clock)
    request = Request("POST", "https://link/v1/fleet/pull-messages")
    error = HTTPStatusError("", request=request, response=Response(500, request=request))
    retries = patient(make_simple_http_retry_invoker)()
    ends = []
    for seconds in (0.0, 1.0, 30.0, 28.0, 10.0, 61.0):
        clock.now += seconds
        ends.append(retries.should_giveup(error))
    assert ends == [False, False, False, False, True, False]
