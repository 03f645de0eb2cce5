"""A private Ray for one run on this machine: others cannot reach it, and it leaves no files.

As Ray comes, its processes listen on all interfaces and run what anybody sends them, and its
sockets and logs lie in a folder where all may write. Here they listen at 127.0.0.1, ask for a
token that is made for the run, and lie in a folder that only this user can enter.

What must be set where this process starts Ray itself is in `fedraclora.engines.ray.session`.
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
    # Ray may not hide GPUs from processes that ask for none, nor say that it will.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
}
# Seconds for which processes of Ray look for its head, before they end as well. In half of it a
# run sees that the head was killed (`fedraclora.engines.ray.pulse`), and in the rest it ends.
RECONNECT = "RAY_gcs_rpc_server_reconnect_timeout_s"
PRIVATE = {
    # Ray's own name for "no cluster of several machines". It is off where Ray has no clusters, and
    # then every process listens at 127.0.0.1 alone; Ray has no other setting that it obeys.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray starts a worker for each CPU beforehand, in its own environment: those that train have
    # another one, so all of them would be started for nothing.
    "RAY_prestart_worker_first_driver": "0",
    "RAY_AUTH_MODE": "token",
}
# Characters of the folder's path: that of a socket below it has 68 more, and may have 103.
LONGEST = 34
KILLED = (
    "error: the process of this run ended because Ray ended (raylet or gcs_server was "
    "killed, perhaps by lack of memory) or because the system killed it. Run the same "
    "command again; if the run folder exists, the command says how to resume"
)
PATIENCE = 3.0  # seconds in which processes must end that were told to


def cpus() -> int:
    """Count the CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def put_back(environ: Mapping[str, str]) -> None:
    """Restore the environment of this process."""
    for name in os.environ.keys() - environ.keys():
        del os.environ[name]
    os.environ.update(environ)


class LastWord:
    """Prints why this process ended if Ray kills it, which Ray does without a message.

    A shell waits at a pipe. It speaks where the pipe ends and nobody has said that all is in order.
    """

    def __init__(self) -> None:
        self._shell = subprocess.Popen(  # noqa: S603
            ["/bin/sh", "-c", f"read -r _ || echo '{KILLED}' >&2"],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env={},
            start_new_session=True,  # signals for this process are not for it
        )
        atexit.register(self.close)

    def close(self) -> None:
        """Cancel the message; a second call does nothing."""
        atexit.unregister(self.close)
        if self._shell.returncode is None:
            self._shell.communicate(b"\n")


class RayFolder:
    """A private folder for the sockets and logs of a Ray, and its access token.

    Attributes:
        path: The folder; gone after `close`.
        environ: What processes of this Ray, and those that start it, must have set.
    """

    def __init__(self) -> None:
        self._made = PrivateFolder(os.environ.get("RAY_TMPDIR"), LONGEST)
        self.path = self._made.path
        self.environ = {
            **{k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()},
            **PRIVATE,
            RECONNECT: os.environ.get(RECONNECT, "30"),
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_TMPDIR": str(self.path),  # Ray makes a folder in it that all may enter
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
        """Find those that inherited the name of the folder; none where there is no /proc."""
        mark = f"RAY_TMPDIR={self.path}".encode()
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended, or is another user's
                words = (entry / "environ").read_bytes().split(b"\0")
                if mark in words and int(entry.name) != os.getpid():
                    found.append(int(entry.name))
        return found
