"""Run Flower's programs as child processes, which end with this process.

A program is started by `tethered.py`. All of its child processes inherit its standard input, so
that the end of the last of them is detected.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from fedraclora.engines import flower_patches
from fedraclora.engines.flower_patches import ALL, AT_SOCKETS, FLWR, SOCKETS, UNPATCHED
from fedraclora.errors import EngineError

log = logging.getLogger(__name__)

TETHERED = Path(__file__).with_name("tethered.py")
RUNNER = Path(flower_patches.__file__)  # runs Flower's programs
HOST, LINK, NODE = "127.0.0.1", 1, 2  # ports that represent the sockets of a SuperLink and a node
LONGEST = 80  # most characters of a home's path: that of a socket in it may have 107
CONNECTION = "local"  # name of the connection to our own SuperLink, in Flower's configuration
START = 120.0  # seconds until a program must listen
END = 20.0  # seconds for all of its child processes to end


@dataclass(frozen=True)
class Address:
    """Describe where one of Flower's programs listens on this machine.

    Attributes:
        port: A port of 127.0.0.1; for a socket the number that represents it.
        socket: The path of a socket; None: it listens at the port.
    """

    port: int
    socket: Path | None

    @classmethod
    def choose(cls, path: Path, port: int, environ: Mapping[str, str]) -> Address:
        """Choose the socket of a path, or a free port if the platform has no sockets.

        Args:
            path: The socket's path.
            port: The number that represents it.
            environ: The result of `environment`.
        """
        if SOCKETS in environ:
            return cls(port, path)
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            return cls(probe.getsockname()[1], None)

    @override
    def __str__(self) -> str:
        return f"{HOST}:{self.port}"

    def listens(self) -> bool:
        """Return whether a process listens there."""
        where = (HOST, self.port) if self.socket is None else str(self.socket)
        with socket.socket(socket.AF_INET if self.socket is None else socket.AF_UNIX) as link:
            return link.connect_ex(where) == 0


def environment(home: Path, *, patched: bool = True) -> dict[str, str]:
    """Build the environment for Flower's programs: this Python, a home of their own, no network.

    Args:
        home: A private folder, with the socket of the SuperLink.
        patched: Whether modules of Flower are patched (`flower_patches`).
    """
    environ = command_line(os.environ) | ({} if patched else {UNPATCHED: ALL})
    environ.pop(SOCKETS, None)
    if flower_patches.why_without(AT_SOCKETS, environ) is None:
        environ[SOCKETS] = addresses({LINK: home / "link"})
    return {
        **environ,
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_TELEMETRY_ENABLED": "0",
        # Otherwise Flower builds an environment without torch from the network, for every run.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        # Files of a killed process are removed with the folder.
        "TMPDIR": str(home),
    }


def addresses(sockets: Mapping[int, Path]) -> str:
    """Encode which ports represent sockets, as `flower_patches` reads it."""
    return json.dumps({f"{HOST}:{port}": str(path) for port, path in sockets.items()})


def command_line(environ: Mapping[str, str]) -> dict[str, str]:
    """Build an environment in which Flower's commands are those of this Python."""
    path = os.pathsep.join([str(Path(sys.executable).parent), environ.get("PATH", "")])
    return {**environ, "PATH": path}


def flwr_of(environ: Mapping[str, str]) -> list[str]:
    """Return how to call Flower's command line: with its patches if it is that of this Python."""
    found = shutil.which(FLWR, path=environ.get("PATH"))
    own = found is not None and Path(found).parent == Path(sys.executable).parent
    return [sys.executable, "-P", str(RUNNER), FLWR] if own or SOCKETS in environ else [FLWR]


def flwr(
    words: Sequence[str],
    environ: Mapping[str, str],
    *,
    stdout: int | None = subprocess.PIPE,
    stderr: int | None = subprocess.DEVNULL,
) -> subprocess.CompletedProcess[str]:
    """Call Flower's command line."""
    return subprocess.run(  # noqa: S603
        [*flwr_of(environ), *words],
        env=environ,
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        check=False,
    )


class Program:
    """Run one of Flower's programs.

    Args:
        name: For example ``flower-superlink``.
        words: Its command line.
        environ: Its environment.
        file: Receives its output.

    Raises:
        EngineError: If there is no such program.
    """

    def __init__(
        self,
        name: str,
        words: Sequence[str],
        environ: Mapping[str, str],
        file: Path,
    ) -> None:
        self.name, self.file = name, file
        found = shutil.which(name, path=environ["PATH"])
        if found is None:
            raise EngineError(
                f"the program {name} is missing in this Python environment. Install flwr"
            )
        with file.open("wb") as log:
            self.process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", str(TETHERED), str(RUNNER), found, *words],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is sent from here, in order
            )

    @property
    def ended(self) -> bool:
        """Return whether the program has ended."""
        return self.process.poll() is not None

    @property
    def last_words(self) -> str:
        """Return the last lines of the program's output."""
        lines = self.file.read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-5:]) or "nothing"

    def await_listening(self, address: Address) -> None:
        """Wait until it listens.

        Raises:
            EngineError: If it ends, or does not in time.
        """
        end = time.monotonic() + START
        while not address.listens():
            if self.ended or time.monotonic() > end:
                kind = self.name.removeprefix("flower-").replace("super", "Super")
                kind = kind.replace("link", "Link").replace("node", "Node")
                raise EngineError(f"Flower's {kind} did not start: {self.last_words}")
            time.sleep(0.1)

    def end(self) -> None:
        """End the program and its child processes, as `end_all` does."""
        end_all([self])

    def is_over(self, seconds: float = 0.0) -> bool:
        """Wait until it and its child processes have ended, which share its standard input."""
        pipe = self.process.stdin
        return pipe is None or pipe.closed or without_readers(pipe.fileno(), seconds)

    def signal_all(self, sign: int) -> None:
        """Send a signal to it and its child processes, which are a process group."""
        if not self.is_over():  # otherwise the number may already be another group's
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, sign)


def superlink(
    home: Path, words: Sequence[str], environ: Mapping[str, str], trust: str
) -> tuple[Program, Address]:
    """Start a SuperLink in a home, and name it there for Flower's command line.

    Args:
        home: A private folder.
        words: Its command line, without the address.
        environ: The result of `environment`.
        trust: How its connection is secured: a line of Flower's configuration.

    Returns:
        The program, and where it will listen.
    """
    at = Address.choose(home / "link", LINK, environ)
    (home / "config.toml").write_text(
        f'[superlink.{CONNECTION}]\naddress = "{at}"\n{trust}\n', encoding="utf-8"
    )
    words = [*words, "--host", HOST, "--port", str(at.port)]
    return Program("flower-superlink", words, environ, home / "superlink.log"), at


def end_all(programs: Sequence[Program]) -> None:
    """End programs and their child processes; kill those that do not end in time.

    By themselves, Flower's processes would end late: they check their parent's process id, which
    exists until some process has waited for it, and then signal a thread, which does not end pauses
    of the main one of up to 20 s.
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
        log.warning("%g s after %s these programs still run: %s", END, sign.name, ", ".join(late))
    for program in programs:
        program.process.communicate()


def without_readers(pipe: int, seconds: float) -> bool:
    """Wait until no process holds the other end of a pipe; False if some still do."""
    poll = select.poll()
    poll.register(pipe, 0)  # an error is expected: no process can read any more
    return bool(poll.poll(seconds * 1000))
