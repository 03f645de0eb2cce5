"""Flower's programs as processes of this machine: whoever starts them ends them, however it ends.

A program is on a tether (`tethered.py`). All that it starts holds its standard input, too, so that
the end of the last of them is seen.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from fedraclora.errors import EngineError

log = logging.getLogger(__name__)

TETHERED = Path(__file__).with_name("tethered.py")
START = 120.0  # seconds until a program must listen
END = 20.0  # seconds for all that it has started to end


def environment(home: Path) -> dict[str, str]:
    """Build the environment for Flower's programs: this Python, a home of their own, no network."""
    return {
        **command_line(os.environ),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        # Else an environment without torch is built from the network, for every run.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        # What is left by a process that is killed goes with the folder.
        "TMPDIR": str(home),
    }


def command_line(environ: Mapping[str, str]) -> dict[str, str]:
    """Build an environment in which the Flower of this Python is found."""
    path = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", "")])
    return {**environ, "PATH": path}


def flwr(
    words: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdout: int | None = subprocess.PIPE,
    stderr: int | None = subprocess.DEVNULL,
) -> subprocess.CompletedProcess[str]:
    """Call Flower's command line."""
    return subprocess.run(  # noqa: S603
        ["flwr", *words],  # noqa: S607
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        check=False,
    )


class Program:
    """One of Flower's programs, running.

    Args:
        name: For example ``flower-superlink``.
        words: Its command line.
        environ: Its environment.
        file: Takes what it writes.
        script: Python file to run in its place; it takes the same words.

    Raises:
        EngineError: If there is no such program.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        environ: Mapping[str, str],
        file: Path,
        script: Path | None = None,
    ) -> None:
        self.name, self.file = name, file
        program = script or shutil.which(name, path=environ["PATH"])
        if program is None:
            raise EngineError(f"there is no {name} beside this Python: install flwr")
        with file.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", str(TETHERED), str(program), *words],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes from here, in order
            )

    @property
    def ended(self) -> bool:
        """Return whether it has ended by itself."""
        return self.process.poll() is not None

    @property
    def last_words(self) -> str:
        """The last lines that it wrote."""
        lines = self.file.read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-5:]) or "nothing"

    def await_listening(self, port: int, authority: Path | None = None) -> None:
        """Wait until it answers at a port of this machine.

        Raises:
            EngineError: If it ends, or does not in time.
        """
        end = time.monotonic() + START
        while not listens(port, authority):
            if self.ended or time.monotonic() > end:
                kind = self.name.removeprefix("flower-").replace("super", "Super")
                kind = kind.replace("link", "Link").replace("node", "Node")
                raise EngineError(f"Flower's {kind} did not start: {self.last_words}")
            time.sleep(0.1)

    def end(self) -> None:
        """End it with all that it has started, as `end_all` does."""
        end_all([self])

    def is_over(self, seconds: float = 0.0) -> bool:
        """Wait until it has ended with all below it, which hold its standard input, too."""
        pipe = self.process.stdin
        return pipe is None or pipe.closed or without_readers(pipe.fileno(), seconds)

    def signal_all(self, sign: int) -> None:
        """Send a signal to it and to all below it: they are a group of their own."""
        if not self.is_over():  # else the number may be that of another group by now
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)


def end_all(programs: Sequence[Program]) -> None:
    """End programs with all that they have started, at once; what does not end is killed.

    Left to themselves, Flower's processes would end late: they look for the number of their parent,
    which is taken until somebody has waited for it, and are then told in a thread, which does not
    wake the main one from pauses of up to 20 s.
    """
    for sign in (signal.SIGTERM, signal.SIGKILL):
        for program in programs:
            program.signal_all(sign)
        end = time.monotonic() + END
        for program in programs:
            with suppress(subprocess.TimeoutExpired):
                program.process.wait(max(0.0, end - time.monotonic()))
        late = [p.name for p in programs if not p.is_over(max(0.0, end - time.monotonic()))]
        if not late:
            break
        log.warning("%g s after %s not all has ended of %s", END, sign.name, ", ".join(late))
    for program in programs:
        program.process.communicate()


def free_port() -> int:
    """Find a port of this machine that nobody listens at."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
    return port


def listens(port: int, authority: Path | None = None) -> bool:
    """Check whether Flower answers at a port of this machine: by TLS, where there is an authority.

    Args:
        port: The port.
        authority: File with the certificate that the server's is signed by.
    """
    scheme = "http" if authority is None else "https"
    context = None if authority is None else ssl.create_default_context(cafile=str(authority))
    try:
        url = f"{scheme}://127.0.0.1:{port}/health"
        with urllib.request.urlopen(url, timeout=5, context=context):  # noqa: S310
            return True
    except OSError:
        return False


def without_readers(pipe: int, seconds: float) -> bool:
    """Wait until no process holds the other end of a pipe; False if some still do."""
    poll = select.poll()
    poll.register(pipe, 0)  # an error is what is waited for: nobody can read any more
    return bool(poll.poll(seconds * 1000))


def private_folder() -> tempfile.TemporaryDirectory[str]:
    """Make a folder that only this user can enter, for a SuperLink's home."""
    return tempfile.TemporaryDirectory(prefix="fedraclora-", ignore_cleanup_errors=True)
