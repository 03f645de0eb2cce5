"""Flower's SuperNode with short pauses and a warm start of its apps.

``python -P supernode.py WORD ...``, with the words of ``flower-supernode``. By itself Flower 1.42
pauses for 3 s where a SuperNode finds no message, for up to 1 s until its SuperExec knows of one,
and for 0.5 s between looks for a reply; and it starts a Python for every message, which takes more
than a second to import Flower. Here a SuperNode pauses the shorter, the less time has passed since
the last message, wakes its SuperExec with one, and a process for a message is forked from one that
has imported Flower. Run as a file, without this project: what an app imports is its own copy of it.
"""

from __future__ import annotations

import ctypes
import gc
import hashlib
import json
import mmap
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

HERE = Path(__file__)
AT_SOCKETS = runpy.run_path(str(HERE.parents[1] / "sockets.py"))  # of no package here
put, use_sockets = AT_SOCKETS["put"], AT_SOCKETS["use_sockets"]
ADDRESS = ("127.0.0.1", "2")  # stands for the socket of this node
SUPEREXEC, CLIENT_APP = "flower-superexec", "flwr-clientapp"  # Flower's commands
LONGEST_PATH = 80  # characters of a folder's: that of a socket in it may have 107
INSTALLED = 1 << 13  # bytes of a digest and a path
EARLY, OLDEST = 5, 300  # seconds by which Flower lets a clock be ahead, or behind
STRANGER = (
    "the SuperLink refuses this node: its key is not registered (send the public part to the "
    "operator, who runs `flwr supernode register`), or a node with this key was killed less than a "
    "minute ago"
)
PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends
LEAST = 0.1  # seconds of a pause between looks at a SuperLink: each is a request
WITHIN = 0.005  # the same in the memory of this process
SHARE = 0.1  # of the time since something happened, that a pause may add to it
PART = 1 << 16  # bytes of a request that are written at once


class Pauses:
    """Pauses between looks for something to do: brief while there is much, longer after a while."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def note(self) -> None:
        """Take down that something happened."""
        self.last = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Pause for at most so many seconds: Flower's pauses below 1 s are within this process."""
        least = WITHIN if seconds < 1 else LEAST
        time.sleep(min(seconds, max(least, SHARE * (time.monotonic() - self.last))))


def run_supernode() -> None:
    """Run ``flower-supernode``."""
    from flwr.supercore.inflatable.inflatable_utils import (
        ObjectPushError,
        pull_objects,
        push_object_contents_from_iterable,
    )
    from flwr.supercore.retry import make_simple_http_retry_invoker
    from flwr.supernode import fleet_http_connection as fleet
    from flwr.supernode import start_client_internal as loop
    from flwr.supernode.cli import flower_supernode
    from flwr.supernode.fleet_http_client import FleetHttpClient

    use_sockets("flower-supernode")
    if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    pauses, push = Pauses(), loop._push_messages  # noqa: SLF001
    asleep, wake = os.pipe()

    def push_messages(*words: Any, **named: Any) -> None:  # called with every message
        pauses.note()
        os.write(wake, b".")
        push(*words, **named)
        pauses.note()

    def popen(words: Sequence[str]) -> subprocess.Popen[bytes]:
        if words[0] != SUPEREXEC:
            return subprocess.Popen(words)  # noqa: S603
        own = [sys.executable, "-P", __file__, SUPEREXEC, str(asleep)]
        return subprocess.Popen([*own, *words[1:]], pass_fds=[asleep])  # noqa: S603

    put(loop, time=SimpleNamespace(sleep=pauses.sleep), subprocess=SimpleNamespace(Popen=popen))
    put(loop, _push_messages=push_messages)
    push_parts = going_on(push_object_contents_from_iterable, ObjectPushError)
    put(loop, push_object_contents_from_iterable=push_parts)
    put(fleet, make_simple_http_retry_invoker=patient(make_simple_http_retry_invoker))
    put(fleet, FleetHttpClient=in_parts(FleetHttpClient))
    # A message is given out before its parts have come; then Flower pauses for a second or more.
    put(loop, pull_objects=partial(pull_objects, initial_backoff=LEAST))
    flower_supernode()


def run_superexec(asleep: int) -> None:
    """Run ``flower-superexec``, which starts a process for every message.

    Args:
        asleep: End of a pipe: the SuperNode writes to it when there is a message.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:  # before there are threads
        ours.close()
        run_clientapps(theirs)
        return
    theirs.close()
    end_with_parent()

    from flwr.supercore.cli import flower_superexec
    from flwr.supercore.superexec import run_superexec as loop
    from flwr.supercore.superexec.executor import subprocess_executor

    use_sockets(SUPEREXEC)

    def sleep(seconds: float) -> None:
        woken, _, _ = select.select([asleep], [], [], seconds)
        if woken and not os.read(asleep, 1 << 10):  # the SuperNode has gone
            time.sleep(seconds)

    def popen(words: Sequence[str], **named: Any) -> None:
        if words[0] == CLIENT_APP:
            ours.send(json.dumps(words).encode())
        else:
            AT_SOCKETS["popen"](words, **named)

    put(loop, time=SimpleNamespace(sleep=sleep))
    put(subprocess_executor, subprocess=SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
    flower_superexec()


def run_clientapps(asked: socket.socket) -> None:
    """Fork a process that runs ``flwr-clientapp`` for each command line that comes.

    Args:
        asked: Brings them, as JSON; when its other end closes, this process ends.
    """
    from flwr.cli.install import install_from_fab
    from flwr.supernode.cli import flwr_clientapp
    from flwr.supernode.runtime import run_clientapp

    use_sockets(CLIENT_APP)
    import_module("httpcore")  # which httpx imports with its first client
    put(run_clientapp, install_from_fab=once(install_from_fab))
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the whole group
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    gc.freeze()  # else each of them would write to all that it shares with this one
    while words := asked.recv(1 << 16):
        if os.fork() == 0:
            asked.close()
            end_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.argv = json.loads(words)
            end_after(flwr_clientapp)


def end_after(run: Callable[[], None]) -> NoReturn:
    """Run what ends by itself, and end at once: to take a whole interpreter apart takes longer."""
    status: object = None
    try:
        run()
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else int(status is not None))


def once(install: Callable[..., Path]) -> Callable[..., None]:
    """Leave out the installation of an app that the process for the message before installed.

    Flower unpacks and checks all files of an app for every message, and throws them away where it
    has the app. Processes that are forked from this one share what was installed last, and where.

    Args:
        install: Flower's; it takes the bytes of an app, and gives its folder.
    """
    last = mmap.mmap(-1, INSTALLED)

    def installed(app: bytes, **named: Any) -> None:
        digest = hashlib.sha256(app).hexdigest()
        found, _, folder = os.fsdecode(last[:].rstrip(b"\0")).partition(" ")
        if found != digest or not Path(folder).is_dir():
            last[:] = os.fsencode(f"{digest} {install(app, **named)}").ljust(INSTALLED, b"\0")

    return installed


def going_on(push: Callable[..., None], refused: type[Exception]) -> Callable[..., None]:
    """Send the other parts of a reply, too, where one is refused.

    A part is sent again if its answer was lost with the link. The SuperLink, which has it by then,
    refuses it; Flower would leave the rest out, and the run wait three minutes for that.

    Args:
        push: Flower's; it takes the parts, and what sends one.
        refused: What that raises.
    """

    def push_parts(parts: object, push_object_fn: Callable[[str, bytes], None]) -> None:
        def push_part(name: str, content: bytes) -> None:
            with suppress(refused):
                push_object_fn(name, content)

        push(parts, push_part)

    return push_parts


def in_parts(client: Any) -> Any:
    """Let each `PART` of a request have the 30 s that Flower gives to a request as a whole.

    With TLS a write ends when all of it is sent. Below 3 Mbit/s two at a time of 5 MB never were.

    Args:
        client: Flower's class.
    """
    from httpx import Request

    def send(self: Any, context: Any, **named: Any) -> Any:
        content = context.request.content
        parts = (content[k : k + PART] for k in range(0, len(content), PART))
        context.request.stream = Request("POST", "", content=parts).stream
        return client._send(self, context, **named)  # noqa: SLF001

    return type(client.__name__, (client,), {"_send": send})


def patient(make: Callable[[], Any]) -> Callable[[], Any]:
    """Let a node try again, too, whose link broke while it made a connection safe.

    Flower takes every error with TLS in its text for a wrong certificate, and ends the node. It
    ends one whose signatures are refused, too; that has its reason here.

    Args:
        make: Flower's; it makes what tries again, and asks its ``should_giveup`` about each error.
    """
    from flwr.supercore.error import ApiErrorCode, FlowerError

    def made() -> Any:
        retries = make()
        gives_up = retries.should_giveup

        def should_giveup(error: Exception) -> bool:
            answer: Any = getattr(error, "response", None)
            if getattr(answer, "status_code", 0) == 401 and (told := off(answer.headers)):
                sys.stderr.write(f"{told}\n")
                if answer.request.url.path.endswith("/activate-node"):
                    return True  # Flower ends a node that has begun, and says nothing
            code = getattr(FlowerError.from_json(getattr(answer, "text", None)), "code", 0)
            if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
                sys.stderr.write(f"{STRANGER}\n")
            broke = "handshake operation timed out" in str(error) or "EOF" in str(error)
            return not broke and gives_up(error)

        retries.should_giveup = should_giveup
        return retries

    return made


def off(headers: Mapping[str, str]) -> str:
    """Say by how much the clock here is off, if Flower refuses signatures for that; else nothing.

    Args:
        headers: Of an answer; the date is that of the SuperLink's clock.
    """
    there = parsedate_to_datetime(headers["date"]) if "date" in headers else datetime.now(UTC)
    ahead = (datetime.now(UTC) - there).total_seconds()
    if -OLDEST < ahead < EARLY:
        return ""
    told = f"{abs(ahead):.0f} s {'ahead of' if ahead > 0 else 'behind'} the SuperLink's"
    return (
        f"the SuperLink refuses what this node signs: the clock here is {told}, and Flower takes "
        f"{OLDEST} s behind to {EARLY} s ahead: set it"
    )


def end_with_parent() -> None:
    """Get SIGTERM when the process ends that started this one.

    Flower's own watch of it tells a thread, which wakes nobody from long pauses.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Run what the command line names."""
    if sys.argv[1:2] == [SUPEREXEC]:
        _, sys.argv[0], asleep, *sys.argv[1:] = sys.argv
        run_superexec(int(asleep))
    elif AT_SOCKETS["sockets"]():
        run_supernode()
    else:
        private = runpy.run_path(str(HERE.parents[2] / "temporary.py"))["PrivateFolder"]
        with private(longest=LONGEST_PATH) as made:
            os.environ[AT_SOCKETS["VARIABLE"]] = json.dumps({":".join(ADDRESS): f"{made}/api"})
            sys.argv += ["--host", ADDRESS[0], "--port", ADDRESS[1]]
            run_supernode()


if __name__ == "__main__":
    main()
