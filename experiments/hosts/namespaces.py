"""Namespaces that end with the process that made them, and processes in them.

A `Namespaces` is a process whose input is a pipe from this one. Whatever ends this one, the pipe
ends, and with it that process, the first of its namespace of processes: the kernel then kills all
others there, and takes their network, their devices and their mounts away.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from typing_extensions import override

UNSHARE = ["unshare", "--fork", "--pid", "--mount-proc", "--mount", "--net", "--ipc", "--uts"]
NSENTER = ["nsenter", "--no-fork", "--pid", "--mount", "--net", "--ipc", "--uts"]
# A shell waits, outside of the namespace of processes: nsenter stops with what it brings there.
BRING = ["--", "sh", "-c", '"$@"; exit $?', "sh"]
# What ends here need not be waited for.
LAST = "\nip link set lo up\necho ready\nexec env --ignore-signal=CHLD cat > /dev/null\n"
SECONDS = 600.0  # no measure: it ends what hangs


def children(pid: int) -> list[int]:
    """Give the processes that a process has started and that live; none if it is gone."""
    with suppress(OSError):
        return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return []


class Process(subprocess.Popen[str]):
    """A process on a host; signals reach it, and not what brought it there.

    Its status after signal 9 is 137, as shells have it.
    """

    @property
    def inner(self) -> int:
        """Its number outside; that of what brings it there as long as it is on its way."""
        return (children(self.pid) or [self.pid])[0]

    @override
    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.inner, sig)


class Namespaces:
    """A network, processes, mounts and a name of their own.

    Args:
        first: Shell commands, run inside before anything else.
        words: Their ``$1``, ``$2``, ...
    """

    def __init__(self, first: str = "", words: Sequence[str] = ()) -> None:
        line = [*UNSHARE, "sh", "-ec", first + LAST, "sh", *words]
        pipe = subprocess.PIPE  # a session of its own: Ctrl-C is for who made it
        self.keeper = subprocess.Popen(
            line, stdin=pipe, stdout=pipe, stderr=pipe, text=True, start_new_session=True
        )
        if not self.keeper.stdout or self.keeper.stdout.readline() != "ready\n":
            _, said = self.keeper.communicate()
            raise OSError(f"no namespaces are to be had here: {said.strip()}")
        (self.pid,) = children(self.keeper.pid)
        self.brought: list[Process] = []

    def popen(
        self,
        command: Sequence[str | Path],
        *,
        env: Mapping[str, str] | None = None,
        cwd: str | Path = "/",
        uid: int | None = None,
        **streams: int | IO[str] | None,
    ) -> Process:
        """Start a process inside; ``streams`` are `subprocess.Popen`'s."""
        line = [*NSENTER, f"--target={self.pid}", f"--wdns={cwd}"]
        line += [] if uid is None else [f"-S{uid}", f"-G{uid}"]
        line += [*BRING, *map(str, command)]
        process: Process = Process(line, env=env, text=True, start_new_session=True, **streams)  # type: ignore[call-overload]
        self.brought.append(process)
        return process

    def run(
        self, command: Sequence[str | Path], timeout: float = SECONDS, **options: object
    ) -> str:
        """Run a command inside; give what it printed.

        Raises:
            CalledProcessError: If its status is not 0; ``stderr`` is what it said.
            TimeoutExpired: After so many seconds, when it has been killed.
        """
        pipe = subprocess.PIPE
        with self.popen(command, stdout=pipe, stderr=pipe, **options) as process:  # type: ignore[arg-type]
            try:
                out, said = process.communicate(timeout=timeout)
            except BaseException:
                process.kill()
                raise
        self.brought.remove(process)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, process.args, out, said)
        return out

    def signal_all(self, sig: int) -> None:
        """Send a signal to every process inside but the first one."""
        name = signal.Signals(sig).name.removeprefix("SIG")
        # There is none, perhaps.
        with suppress(subprocess.CalledProcessError):
            self.run(["sh", "-c", f"kill -s {name} -- -1"])

    def close(self) -> None:
        """End all processes inside, and wait until they have ended."""
        self.keeper.communicate()  # ends its input
        for process in self.brought:
            process.__exit__(None, None, None)  # closes its streams
