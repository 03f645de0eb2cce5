"""Flower's SuperNode with short pauses and a warm start of its apps.

``python -P supernode.py WORD ...``, with the words of ``flower-supernode``. By itself Flower 1.42
pauses for 3 s where a SuperNode finds no message, and starts a Python for every message, which
takes more than a second to import Flower. Neither can be set. Here both loops pause the shorter,
the less time has passed since the last message, and a process for a message is forked from one that
has imported Flower. Run as a file, without this project: what an app imports is its own copy of it.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

SUPEREXEC, CLIENT_APP = "flower-superexec", "flwr-clientapp"  # Flower's commands
PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent ends
LEAST = 0.1  # seconds of a pause
SHARE = 0.1  # of the time since something happened, that a pause may add to it


class Pauses:
    """Pauses between looks for something to do: brief while there is much, longer after a while."""

    def __init__(self) -> None:
        self.last = time.monotonic()

    def note(self) -> None:
        """Take down that something happened."""
        self.last = time.monotonic()

    def sleep(self, seconds: float) -> None:
        """Pause for at most so many seconds."""
        time.sleep(min(seconds, max(LEAST, SHARE * (time.monotonic() - self.last))))


def run_supernode() -> None:
    """Run ``flower-supernode``."""
    from flwr.supernode import start_client_internal as loop
    from flwr.supernode.cli import flower_supernode

    pauses, push = Pauses(), loop._push_messages  # noqa: SLF001

    def push_messages(*words: Any, **named: Any) -> None:  # called with every message
        pauses.note()
        push(*words, **named)
        pauses.note()

    def popen(words: Sequence[str]) -> subprocess.Popen[bytes]:
        own = [sys.executable, "-P", __file__] if words[0] == SUPEREXEC else []
        return subprocess.Popen([*own, *words])  # noqa: S603

    put(loop, time=SimpleNamespace(sleep=pauses.sleep), subprocess=SimpleNamespace(Popen=popen))
    put(loop, _push_messages=push_messages)
    flower_supernode()


def run_superexec() -> None:
    """Run ``flower-superexec``, which starts a process for every message."""
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

    pauses = Pauses()

    def popen(words: Sequence[str], **named: Any) -> None:
        pauses.note()
        if words[0] == CLIENT_APP:
            ours.send(json.dumps(words).encode())
        else:
            subprocess.Popen(words, **named)  # noqa: S603

    put(loop, time=SimpleNamespace(sleep=pauses.sleep))
    put(subprocess_executor, subprocess=SimpleNamespace(Popen=popen, DEVNULL=subprocess.DEVNULL))
    flower_superexec()


def run_clientapps(asked: socket.socket) -> None:
    """Fork a process that runs ``flwr-clientapp`` for each command line that comes.

    Args:
        asked: Brings them, as JSON; when its other end closes, this process ends.
    """
    from flwr.supernode.cli import flwr_clientapp

    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C is for the whole group
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them
    while words := asked.recv(1 << 16):
        if os.fork() == 0:
            asked.close()
            end_with_parent()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            sys.argv = json.loads(words)
            flwr_clientapp()
            return


def end_with_parent() -> None:
    """Get SIGTERM when the process ends that started this one.

    Flower's own watch of it tells a thread, which wakes nobody from long pauses.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def put(module: object, **names: object) -> None:
    """Replace names of a module of Flower, which must be there.

    Raises:
        AttributeError: If this Flower has none of that name.
    """
    for name, value in names.items():
        getattr(module, name)
        setattr(module, name, value)


def main() -> None:
    """Run what the command line names."""
    run: Callable[[], None] = run_supernode
    if sys.argv[1:2] == [SUPEREXEC]:
        run = run_superexec
        del sys.argv[0]
    run()


if __name__ == "__main__":
    main()
