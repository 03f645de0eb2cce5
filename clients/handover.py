"""Pass a message to the resident process of this node, and start that process if needed.

Flower starts a process for every message; a resident process (`clients.resident`) keeps the slow
imports, model and data. It listens at a Unix socket in a folder of the node's cache that only its
user can enter, and each end checks that the other belongs to that user. A resident serves one run.
One that has ended, is silent, or serves another run is replaced. While it processes a message it
sends heartbeats; if it ends or falls silent meanwhile, the message fails, and the server decides
whether to send it again. All lasting state is on the node's disk.
"""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Message

from fedraclora.clients.cache import cache_of, claim, on_disk, some
from fedraclora.engines.node_config import served
from fedraclora.errors import ClientError, ConfigError

FOLDERS = "residents"  # subfolder of the cache, with a folder for each node
NUMBER = "pid"  # file in that folder, with the resident's process id
PROGRAM = ("-m", "fedraclora.clients.resident")
READY = b"ready"
GONE = (EOFError, ConnectionError)  # errors of a process whose peer has ended
START = 300.0  # seconds for all imports of a resident
SILENCE = 60.0  # seconds of silence after which a resident counts as stuck
LOOK = 0.1  # seconds between checks whether another process of the node is done


def hand_over(message: Message, context: Context) -> Message:
    """Return the resident process's reply to a message.

    Raises:
        ClientError: If it does not start, ends or falls silent before it replies, or its folder
            cannot be used.
    """
    asked = message.metadata.group_id  # the round; empty for a request to report clients
    mine = some(served(context.node_config))
    where = f"{f'round {asked}, ' if asked else ''}clients {mine} of this node"
    until = time.monotonic() + message.metadata.ttl  # after that the reply is not needed
    try:
        with open_alone(cache_of(context), context.node_id, until) as address:
            key = f"{context.run_id} {Path(__file__).parent}".encode()  # other code is another app
            resident = reach(address, key) or started(address, key)
            if resident is None:
                raise ClientError(
                    "the training process of this node did not start. See the output of the "
                    "SuperNode for the reason"
                )
            with resident:
                try:
                    return resident_reply(resident, message, context, until)
                except ClientError:
                    end(address)
                    raise
    except (ClientError, ConfigError) as error:  # errors in its node-config are not the run's fault
        raise ClientError(f"{where}: {error}") from error


def resident_reply(
    resident: Connection, message: Message, context: Context, until: float
) -> Message:
    """Send a message to a resident process, and return its reply.

    Args:
        resident: The connection to it.
        message: The message.
        context: The node's context.
        until: The time after which the reply is not needed.

    Raises:
        ClientError: If there is no reply.
    """
    why = "sent a reply that cannot be decoded"
    try:
        resident.send((message, context))
        while (reply := resident.recv()) is None:
            if time.monotonic() > until:
                why = "was still at work when the time limit (engine.timeout) passed"
                break
        if isinstance(reply, Message):
            return reply
    except GONE:
        why = "ended before it answered: it was killed, or memory ran out"
    except BlockingIOError:
        why = f"was silent for {SILENCE:g} s before it answered (it was stopped), and was ended"
    except Exception as error:  # bytes of any kind
        why = f"{why} ({type(error).__name__}: {error})"
    raise ClientError(
        f"the training process of this node {why}. See the output of the SuperNode; the next "
        "message starts a new process"
    )


@contextmanager
def open_alone(cache: Path, node: int, until: float) -> Iterator[str]:
    """Yield the address of a node's resident process, locked for this process.

    Args:
        cache: The folder of the node's files.
        node: The node.
        until: The time until which to wait for another process that uses it.

    Raises:
        ClientError: If other users may enter its folder, it cannot be created, or another process
            uses it for too long.
    """
    claim(cache)
    folder = cache / FOLDERS / str(node)
    with on_disk(folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        entry = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = os.fstat(entry)
        if found.st_uid != os.geteuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise ClientError(
                f"{folder}: it belongs to user {found.st_uid} and has mode "
                f"{stat.S_IMODE(found.st_mode):o}, but only the user of this process "
                f"({os.geteuid()}) may have access. Remove the folder; the node makes it again"
            )
        while not is_locked(entry):
            if time.monotonic() > until:
                raise ClientError(
                    "the node is still answering an earlier message. Wait for "
                    "that answer, then send this message again"
                )
            time.sleep(LOOK)
        # By its file descriptor: the path of a socket has room for 107 bytes, and a cache may be
        # anywhere.
        with on_disk(folder):
            yield f"/proc/self/fd/{entry}/socket"
    finally:
        os.close(entry)


def is_locked(entry: int) -> bool:
    """Lock a file for this process, if no other process has it."""
    try:
        fcntl.flock(entry, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def reach(address: str, key: bytes, seconds: float | None = None) -> Connection | None:
    """Connect to the resident at an address; None if there is none that serves this run.

    Args:
        address: The address of its socket.
        key: The key of the run.
        seconds: Seconds of silence after which it counts as stuck, and is ended; None: `SILENCE`.
    """
    with socket.socket(socket.AF_UNIX) as link:
        limit(link, seconds or SILENCE)
        try:
            link.connect(address)
        except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
            return None  # its queue is full
        check_peer(link)
        resident = Connection(os.dup(link.fileno()))
        try:
            resident.send_bytes(key)
            if resident.recv_bytes(len(READY)) == READY:
                limit(link, SILENCE)
                return resident
            end(address)
        except GONE:
            pass
        except OSError:  # it is silent, or sends something unknown
            end(address)
    resident.close()
    return None


def limit(link: socket.socket, seconds: float) -> None:
    """Set the timeout of a socket, for reading and writing, in seconds."""
    value = struct.pack("ll", int(seconds), int(seconds % 1 * 1e6))  # struct timeval
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        link.setsockopt(socket.SOL_SOCKET, option, value)


def end(address: str) -> None:
    """Kill the resident process at an address."""
    with suppress(OSError, ValueError):
        pid = int(Path(address).with_name(NUMBER).read_text())
        if PROGRAM[-1].encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
            os.kill(pid, signal.SIGKILL)


def started(address: str, key: bytes) -> Connection | None:
    """Start a resident process and connect to it; None if it ends or takes too long.

    It inherits a listening socket, so that no process waits for a file to appear, and a handle of
    this process's parent, with which it ends.
    """
    Path(address).unlink(missing_ok=True)
    node = os.pidfd_open(os.getppid())
    try:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            Path(address).chmod(0o600)
            listener.listen()
            handles = [listener.fileno(), node]
            # The modules imported here are found there: the app's own copy of this code comes
            # first.
            path = os.pathsep.join(part or str(Path.cwd()) for part in sys.path)
            process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", *PROGRAM, *map(str, handles), key.decode()],
                env={**os.environ, "PYTHONPATH": path},
                pass_fds=handles,
            )
    finally:
        os.close(node)
    Path(address).with_name(NUMBER).write_text(str(process.pid))
    resident = reach(address, key, START)
    if resident is None:
        process.kill()
    return resident


def check_peer(link: socket.socket) -> None:
    """Check that the process at the other end belongs to this user.

    Raises:
        ClientError: If it is not.
    """
    form = "3i"  # struct ucred: process, user, group
    found = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize(form))
    _, user, _ = struct.unpack(form, found)
    if user != os.geteuid():
        raise ClientError(
            f"the process at the other end of the node's socket belongs to user {user}, but "
            f"only user {os.geteuid()} may connect"
        )
