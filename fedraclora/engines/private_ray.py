"""Start a private Ray for one run on this machine: others cannot reach it, and no files remain.

By default Ray's processes listen on all interfaces and run any code sent to them, and its sockets
and logs are in a folder that every user can write to. Here they listen at 127.0.0.1, require a
token made for the run, and are in a folder that only this user can enter.

Settings for starting Ray in this process are in `fedraclora.engines.ray.session`.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from fedraclora.private_folder import PrivateFolder

log = logging.getLogger(__name__)

ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray must not hide GPUs from processes that request none, nor warn about it.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Seconds for which Ray's processes look for its head before they end. In the first half a run
# detects that the head was killed (`fedraclora.engines.ray.pulse`); in the rest it ends.
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
PRIVATE = {
    # Ray's own switch for "no cluster of several machines". Without clusters every process listens
    # only at 127.0.0.1; Ray has no other effective setting for that.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray starts a worker for each CPU in advance, in its own environment; training workers have
    # another environment, so those would be useless.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_AUTH_MODE": "token",
}
# Most characters of the folder's path: that of a socket below it has 68 more, and may have 103.
LONGEST = 34
KILLED = (
    "error: the process of this run ended because Ray ended (raylet or gcs_server was "
    "killed, perhaps by lack of memory) or because the system killed it. Run the same "
    "command again; if the run folder exists, the command says how to resume"
)
PATIENCE = 3.0  # seconds for processes to end after they were asked to


def cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def put_back(environ: Mapping[str, str]) -> None:
    """Restore the environment of this process."""
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    os.environ.update(environ)


class ExitReporter:
    """Print why this process ended if Ray kills it, which Ray does without a message.

    A shell waits at a pipe. If the pipe closes without a cancellation, the shell prints the
    message.
    """

    def __init__(self) -> None:
        self._shell = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", f"read -r _ || echo '{KILLED}' >&2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # it ignores signals for this process
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Cancel the message; a second call does nothing."""
        atexit.unregister(self.close)
        if self._shell.returncode is None:
            self._shell.communicate(b"\n")


class RayFolder:
    """Provide a private folder for Ray's sockets and logs, and its access token.

    Attributes:
        path: The folder; removed by `close`.
        environ: Environment of this Ray's processes, and of those that start it.
    """

    def __init__(self) -> None:
        self._made = PrivateFolder(os.environ.get("RAY_TMPDIR"), LONGEST)
        self.path = self._made.path
        self.environ = {
            **{k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()},
            **PRIVATE,
            RECONNECT: os.environ.get(RECONNECT, "30"),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": str(self.path),  # Ray creates a folder in it that every user may enter
        }

    def close(self) -> None:
        """Kill the remaining processes of this Ray, and remove the folder."""
        end = time.monotonic() + PATIENCE
        while (left := self._processes()) and time.monotonic() < end:
            time.sleep(0.05)
        for pid in left:
            log.info("Ray ended %g s ago; killing its remaining process %d", PATIENCE, pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self._made.cleanup()

    def _processes(self) -> list[int]:
        """Find the processes that inherited the folder's name; none without /proc."""
        mark = f"RAY_TMPDIR={self.path}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended, or belongs to another user
                words = (entry / "environ").read_bytes().split(b"\0")
                if mark in words and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found
