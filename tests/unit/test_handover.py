"""A message goes to the process that stays on its node, which is replaced and ends as it should."""

from __future__ import annotations

import errno
import os
import pickle
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict

from fedraclora.clients import cache as cache_module
from fedraclora.clients import handover
from fedraclora.clients.cache import cache_of
from fedraclora.clients.handover import check_peer, hand_over, open_alone, started
from fedraclora.errors import ClientError
from fedraclora.experiments.faults.grid import become_a_task

# Stands for `fedraclora.clients.resident`, without what takes time to import.
STAND_IN = """
import os, signal, socket, sys, time
from flwr.app import ConfigRecord, Message, RecordDict
from fedraclora.clients import resident

def respond(message, context):
    asked = message.content["asked"]["what"]
    if asked == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if asked == "work":
        open(context.node_config["cache"] + "/working", "w").write(str(os.getpid()))
        time.sleep(60)
    if asked == "nonsense":
        return "nonsense"
    said = {"process": os.getpid(), "was": asked, "path": sys.path[0]}
    return Message(RecordDict({"said": ConfigRecord(said)}), reply_to=message)

listener, node, key = sys.argv[1:]
resident.IDLE = float(os.environ.get("IDLE", "60"))
resident.BEAT, resident.GREETING, resident.SILENCE = 0.05, 1.0, 2.0
resident.serve(socket.socket(fileno=int(listener)), int(node), key.encode(), respond)
"""

Parent = subprocess.Popen[bytes]


@pytest.fixture
def parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Parent]:
    """Stands for the process of the node that starts this one for a message."""
    become_a_task()
    script = tmp_path / "stand_in.py"
    script.write_text(STAND_IN)
    monkeypatch.setattr(handover, "PROGRAM", (str(script),))
    with subprocess.Popen(["sleep", "300"]) as process:
        monkeypatch.setattr(os, "getppid", lambda: process.pid)
        yield process
        process.kill()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A path that is too long for a socket."""
    folder = tmp_path / ("a folder of a long name " * 8)
    folder.mkdir()
    return folder


def context(cache: Path, *, run: int = 7) -> Context:
    return Context(run, 5, {"partition-id": 3, "cache": str(cache)}, RecordDict(), {})


def message(what: str) -> Message:
    content = RecordDict({"asked": ConfigRecord({"what": what})})
    return Message(content, dst_node_id=5, message_type="train.cohort", group_id="4")


def asked(cache: Path, what: str = "who", *, run: int = 7) -> int:
    """Let a message be answered; the process that did."""
    reply = hand_over(message(what), context(cache, run=run))
    said = reply.content["said"]
    assert said["was"] == what
    assert said["path"] == sys.path[0]  # it imports what this process would
    return int(said["process"])


def has_ended(pid: int) -> bool:
    """Wait for the end of a process; nobody waits for it else."""
    return until(lambda: state(pid) in "ZX")


def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"


def until(ready: Callable[[], bool]) -> bool:
    end = time.monotonic() + 60
    while not ready():
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def working(cache: Path) -> int:
    """Wait until a process is in the middle of a message; that process."""
    mark = cache / "working"
    assert until(lambda: mark.is_file() and mark.read_text() != "")
    return int(mark.read_text())


@pytest.mark.long
def test_one_process_answers_them_all_and_is_replaced_when_it_goes(
    parent: Parent, cache: Path
) -> None:
    first = asked(cache)
    assert first != os.getpid()
    assert asked(cache) == first
    os.kill(first, signal.SIGKILL)
    assert has_ended(first)
    second = asked(cache)
    assert second != first
    with pytest.raises(ClientError, match=r"round 4, clients \[3\] .* ended before it answered"):
        asked(cache, "die")
    third = asked(cache)
    assert third not in {first, second}
    fourth = asked(cache, run=8)  # it serves one run
    assert fourth != third
    assert has_ended(third)
    parent.kill()  # and ends with its node
    assert has_ended(fourth)


def test_only_its_user_may_enter(
    parent: Parent, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked(cache)
    folder = cache_of(context(cache)) / handover.FOLDERS / "5"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "socket").stat().st_mode) == 0o600
    folder.chmod(0o711)
    with pytest.raises(ClientError, match="mode 711, but only the user"):
        asked(cache)
    one, other = socket.socketpair()
    with one, other:
        check_peer(one)
        monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
        with pytest.raises(ClientError, match="belongs to user"):
            check_peer(one)


@pytest.mark.parametrize("whose", ["node", "message"])
def test_it_does_not_work_for_who_is_gone(whose: str, parent: Parent, cache: Path) -> None:
    with open_alone(cache_of(context(cache)), 5, time.monotonic() + 60) as address:
        resident = started(address, b"key")
        assert resident is not None
        resident.send((message("work"), context(cache)))
        pid = working(cache)
        if whose == "node":
            parent.kill()
        else:
            resident.close()
        assert has_ended(pid)


@pytest.mark.long
def test_one_that_is_stopped_is_replaced(
    parent: Parent, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = asked(cache)
    os.kill(first, signal.SIGSTOP)
    monkeypatch.setattr(handover, "SILENCE", 1.0)
    assert asked(cache) != first
    assert has_ended(first)


@pytest.mark.long
def test_one_that_is_stopped_at_work_fails_its_message_and_is_replaced(
    parent: Parent, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And one that works for long does not: it says that it is there."""
    monkeypatch.setattr(handover, "SILENCE", 1.0)
    stopped = list[int]()

    def stop() -> None:
        stopped.append(working(cache))
        time.sleep(2)  # longer than it may be silent
        os.kill(stopped[0], signal.SIGSTOP)

    with ThreadPoolExecutor() as pool:
        done = pool.submit(stop)
        with pytest.raises(ClientError, match=r"round 4, clients \[3\] .* was silent for 1 s"):
            asked(cache, "work")
        assert done.exception() is None
    assert has_ended(stopped[0])
    assert asked(cache) != stopped[0]


@pytest.mark.long
def test_nobody_waits_longer_than_the_server(parent: Parent, cache: Path) -> None:
    late = message("work")
    late.metadata.ttl = 0.5
    with pytest.raises(ClientError, match=r"still at work .* \(engine.timeout\)"):
        hand_over(late, context(cache))
    assert has_ended(working(cache))
    with (
        open_alone(cache_of(context(cache)), 5, time.monotonic() + 60),
        pytest.raises(ClientError, match=r"clients \[3\] .*earlier message"),
    ):
        hand_over(late, context(cache))


def frame(content: bytes, size: int | None = None) -> bytes:
    """Bytes as `multiprocessing.connection` sends them."""
    return struct.pack("!i", len(content) if size is None else size) + content


MALFORMED = {
    "silence": b"",
    "a part of a size": b"\0",
    "a size beyond all": frame(b"", 1 << 30),
    "a size of 64 bits": frame(b"\xff" * 8, -1),
    "no pickle": frame(b"KEY") + frame(b"no pickle"),
    "too much": frame(b"KEY") + frame(b"\xff" * 8, -1),
    "half a message": frame(b"KEY") + frame(b"half", 1 << 20),
    "no message": frame(b"KEY") + frame(pickle.dumps(5)),
}


@pytest.mark.long
def test_bytes_that_are_no_message_do_not_end_it(
    parent: Parent, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    first = asked(cache)
    key = f"7 {Path(handover.__file__).parent}".encode()
    entry = os.open(cache_of(context(cache)) / handover.FOLDERS / "5", os.O_RDONLY)
    for kind, said in MALFORMED.items():
        link = socket.socket(socket.AF_UNIX)
        link.connect(f"/proc/self/fd/{entry}/socket")
        link.sendall(said.replace(frame(b"KEY"), frame(key)))
        if kind not in {"silence", "half a message"}:  # these stay
            link.close()
        assert asked(cache) == first, kind
        link.close()
    os.close(entry)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.long
def test_an_answer_that_is_no_message_is_the_error_of_the_message(
    parent: Parent, cache: Path
) -> None:
    with pytest.raises(ClientError, match=r"clients \[3\] .*cannot be decoded"):
        asked(cache, "nonsense")
    asked(cache)


def test_what_is_in_the_way_of_its_socket_is_named(
    parent: Parent, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = cache_of(context(cache)) / handover.FOLDERS
    (folder / "5" / "socket").mkdir(parents=True)
    (folder / "5").chmod(0o700)
    (folder.parent / cache_module.MARKER).touch()
    with pytest.raises(ClientError, match=rf"clients \[3\] .*{folder}/5: .*in the way"):
        asked(cache)
    shutil.rmtree(folder / "5")
    (folder / "5").touch()
    with pytest.raises(ClientError, match=rf"clients \[3\] .*{folder}/5: File exists"):
        asked(cache)
    (folder / "5").unlink()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(socket.socket, "bind", full)
    with pytest.raises(ClientError, match=rf"{folder}/5: No space left .* make room"):
        asked(cache)


@pytest.mark.long
def test_it_ends_where_nothing_comes(
    parent: Parent, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("IDLE", "0.1")
    assert has_ended(asked(cache))


def test_one_that_does_not_start_is_the_error_of_the_message(
    parent: Parent, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handover, "PROGRAM", ("-c", "raise SystemExit('no torch')"))
    with pytest.raises(ClientError, match=r"round 4, clients \[3\] .* did not start"):
        asked(cache)


@pytest.mark.long
def test_the_app_of_a_message_imports_nothing_that_takes_time() -> None:
    words = "import sys, fedraclora.clients.client_app; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", words], capture_output=True, text=True, check=True, env=os.environ
    )
    loaded = done.stdout.split()
    heavy = {"torch", "scipy", "pandas", "sklearn", "safetensors", "transformers", "ray"}
    assert not heavy & {*loaded}
    ours = {m for m in loaded if m.partition(".")[0] in {"clients", "fedraclora", "strategies"}}
    assert ours == {
        "fedraclora.clients",
        "fedraclora.clients.cache",
        "fedraclora.clients.client_app",
        "fedraclora.clients.handover",
        "fedraclora",
        "fedraclora.engines",
        "fedraclora.engines.node_config",
        "fedraclora.engines.replies",
        "fedraclora.errors",
        "fedraclora.flower_internals",
        "fedraclora.renamed",
        "fedraclora.wire",
        "fedraclora.wire.fields",
    }
