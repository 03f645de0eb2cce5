"""Hands a message to the process that stays on this node, and starts that where there is none.

Flower starts a process for every message; what takes time to load is kept by one that stays, the
resident (`clients.resident`). It listens at a Unix socket in a folder of the node's cache that only
its user can enter, and each end checks that the other is of that user. A resident serves one run.
One that has gone, or serves another run, is replaced; one that goes while it has a message fails
that message, and the server decides whether to send it again. All that must outlast it is on the
node's disk.
"""

from __future__ import annotations

import fcntl
import os
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Message

from clients.cache import cache_of, claim, served
from fedraclora.errors import ClientError

FOLDERS = "residents"  # in the cache, with a folder for each node
PROGRAM = ("-m", "clients.resident")
READY = b"ready"
GONE = (EOFError, ConnectionError)  # what a process meets whose peer has gone


def hand_over(message: Message, context: Context) -> Message:
    """Let the resident of this node answer a message.

    Raises:
        ClientError: If it does not start, goes before it has answered, or its folder is not this
            user's alone.
    """
    asked = message.metadata.group_id  # the round; empty for a question
    where = f"{f'round {asked}, ' if asked else ''}clients {served(context)} of this node"
    with open_alone(cache_of(context), context.node_id) as address:
        key = f"{context.run_id} {Path(__file__).parent}".encode()  # other code is another app
        resident = reach(address, key) or started(address, key)
        if resident is None:
            raise ClientError(
                f"{where}: the process that trains here did not start; the output of the SuperNode "
                "says why"
            )
        with resident:
            try:
                resident.send((message, context))
                reply: Message = resident.recv()
            except GONE as error:
                raise ClientError(
                    f"{where}: the process that trains here ended before it answered: it was "
                    "killed, or memory ran out (see the output of the SuperNode); another is "
                    "started with the next message"
                ) from error
    return reply


@contextmanager
def open_alone(cache: Path, node: int) -> Iterator[str]:
    """Yield the address of a node's resident, while no other process of the node has it.

    Raises:
        ClientError: If others than this user may enter its folder.
    """
    claim(cache)
    folder = cache / FOLDERS / str(node)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = os.fstat(entry)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise ClientError(
                f"{folder} belongs to user {found.st_uid} and has mode "
                f"{stat.S_IMODE(found.st_mode):o}; only the user of this process "
                f"({os.geteuid()}) may enter it: remove it, and it is made anew"
            )
        fcntl.flock(entry, fcntl.LOCK_EX)
        # By its number: the path of a socket has room for 107 bytes, and a cache may be anywhere.
        yield f"/proc/self/fd/{entry}/socket"
    finally:
        os.close(entry)


def reach(address: str, key: bytes) -> Connection | None:
    """Connect to the resident of an address; None if there is none that serves this run."""
    link = socket.socket(socket.AF_UNIX)
    try:
        link.connect(address)
        check_peer(link)
    except (FileNotFoundError, ConnectionRefusedError):
        link.close()
        return None
    except BaseException:
        link.close()
        raise
    resident = Connection(link.detach())
    with suppress(*GONE):
        resident.send_bytes(key)
        if resident.recv_bytes() == READY:
            return resident
    resident.close()
    return None


def started(address: str, key: bytes) -> Connection | None:
    """Start a resident at an address, and connect to it; None if it ends at once.

    It gets a socket that listens already, so that nobody waits for a file to appear, and a handle
    of the process that started this one: with that it ends.
    """
    Path(address).unlink(missing_ok=True)
    node = os.pidfd_open(os.getppid())
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            Path(address).chmod(0o600)
            listener.listen()
            handles = [listener.fileno(), node]
            # What is imported here is found there: the app's own copy of this code comes first.
            path = os.pathsep.join(part or str(Path.cwd()) for part in sys.path)
            subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", *PROGRAM, *map(str, handles), key.decode()],
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=handles,
            )
    finally:
        os.close(node)
    return reach(address, key)


def check_peer(link: socket.socket) -> None:
    """Check that the process at the other end is of this user.

    Raises:
        ClientError: If it is not.
    """
    form = "3i"  # struct ucred: process, user, group
    found = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form))
    _, user, _ = struct.unpack(form, found)
    if user != os.geteuid():
        raise ClientError(
            f"the process at the other end of a node's socket is of user {user}; only those of "
            f"user {os.geteuid()} may speak there"
        )
