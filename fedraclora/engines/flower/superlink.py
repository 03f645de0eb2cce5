"""A SuperLink on this machine, for runs by ``flwr run`` in Flower's simulation runtime.

``flwr run`` itself would start one that stays alive, with the environment and the working folder
of its first run. This one belongs to whoever starts it: it listens on a free port, keeps its files
in a folder of its own, and ends together with all that it has started.
"""

from __future__ import annotations

import json
import logging
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from fedraclora.engines.flower.runtime import ENVIRONMENT
from fedraclora.errors import EngineError

log = logging.getLogger(__name__)

NAME = "local"  # of the connection, in Flower's own configuration
START = 120.0  # seconds until it must listen
END = 20.0  # seconds for all that it has started to end
COMPLETED = "finished:completed"
TETHERED = Path(__file__).with_name("tethered.py")


Options = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Ended:
    """How a run ended, as the SuperLink tells it: ``flwr run`` exits with 0 whatever happened.

    Attributes:
        status: Flower's word for it.
        details: Of a run that failed, why.
        log: What was written meanwhile, if it was not shown.
    """

    status: str
    details: str
    log: str

    @property
    def completed(self) -> bool:
        """Whether it came to its end."""
        return self.status == COMPLETED


def environment(home: Path) -> dict[str, str]:
    """Give the environment for Flower's programs: this Python, this machine, nothing else."""
    kept = {k: v for k, v in os.environ.items() if k != "RAY_ADDRESS"}  # Ray is started anew
    return {
        **ENVIRONMENT,
        **kept,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), kept.get("PATH", "")]),
        "FLWR_HOME": str(home),
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        # Else an environment without torch is built from the network, for every run.
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",
        # What is left by a process that is killed goes with the folder. But not Ray's: the paths of
        # its sockets may not be long.
        "TMPDIR": str(home),
        "RAY_TMPDIR": kept.get("RAY_TMPDIR", tempfile.gettempdir()),
    }


class SuperLink:
    """A SuperLink in simulation mode; as a context it runs inside, and is gone after.

    Args:
        show: Whether `run_app` prints what Flower's programs write.
    """

    def __init__(self, *, show: bool = True) -> None:
        self.show = show
        self._made = tempfile.TemporaryDirectory(prefix="fedraclora-", ignore_cleanup_errors=True)
        self.home = Path(self._made.name)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> SuperLink:
        """Start it, and wait until it listens."""
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it."""
        self._end()

    def run_app(self, app: Path, run_config: Path, options: Options) -> Ended:
        """Run a Flower app to its end, whatever that is.

        Args:
            app: Folder with its pyproject.toml; the bundle is built from it.
            run_config: TOML file with what overrides the app's run config.
            options: Of the simulation: nodes and resources.

        Returns:
            How it ended.

        Raises:
            EngineError: If it did not begin, or the SuperLink is gone.
        """
        words = ["run", str(app), NAME, "--stream", "-c", str(run_config)]
        run = self._flwr(
            [*words, "--federation-config", words_of(options)],
            stdout=None if self.show else subprocess.PIPE,
            stderr=None if self.show else subprocess.STDOUT,
        )
        listed = self._flwr(["list", NAME, "--format", "json"], stdout=subprocess.PIPE)
        try:
            (found,) = json.loads(listed.stdout)["runs"]
        except (ValueError, KeyError) as error:
            raise EngineError(
                f"flwr run did not begin, or its SuperLink ended ({(run.stdout or '').strip()}); "
                f"the last words of that: {self._last_words()}"
            ) from error
        return Ended(str(found["status"]), str(found["status-details"]), run.stdout or "")

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        connection = f'[superlink.{NAME}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
        (self.home / "config.toml").write_text(connection)
        environ = environment(self.home)
        program = shutil.which("flower-superlink", path=environ["PATH"])
        if program is None:
            raise EngineError("there is no flower-superlink beside this Python: install flwr")
        words = ["--insecure", "--simulation", "--host", "127.0.0.1", "--port", str(port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(  # noqa: S603
                [sys.executable, "-P", str(TETHERED), program, *words],
                env=environ,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C comes from here, in order
            )
        end = time.monotonic() + START
        while not listens(port):
            if self._process.poll() is not None or time.monotonic() > end:
                raise EngineError(f"Flower's SuperLink did not start: {self._last_words()}")
            time.sleep(0.1)

    def _flwr(
        self, words: Sequence[str], *, stdout: int | None, stderr: int | None = subprocess.DEVNULL
    ) -> subprocess.CompletedProcess[str]:
        """Call Flower's command line."""
        return subprocess.run(  # noqa: S603
            ["flwr", *words],  # noqa: S607
            env=environment(self.home),
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            text=True,
            check=False,
        )

    @property
    def _log(self) -> Path:
        return self.home / "superlink.log"

    def _last_words(self) -> str:
        lines = self._log.read_text(errors="replace").strip().splitlines()
        return " / ".join(lines[-5:]) or "nothing"

    def _end(self) -> None:
        """End it, wait for the end of all that it has started, and remove its folder."""
        if self._process is not None and self._process.stdin is not None:
            self._process.terminate()
            # The processes below it end when they find it gone; all hold its standard input.
            if not without_readers(self._process.stdin.fileno(), END):
                log.warning("processes of Flower are still running after %g s", END)
            self._process.kill()
            self._process.communicate()
            self._process = None
        self._made.cleanup()


def words_of(options: Options) -> str:
    """Write options as the command line of ``flwr`` wants them.

    Example:
        >>> words_of({"num-supernodes": 8, "init-args-log-to-driver": False})
        'num-supernodes=8 init-args-log-to-driver=false'
    """
    return " ".join(f"{key}={json.dumps(value)}" for key, value in options.items())


def listens(port: int) -> bool:
    """Tell whether a SuperLink answers at a port of this machine."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
            return True
    except OSError:
        return False


def without_readers(pipe: int, seconds: float) -> bool:
    """Wait until no process holds the other end of a pipe; False if some still do."""
    poll = select.poll()
    poll.register(pipe, 0)  # an error is what is waited for: nobody can read any more
    return bool(poll.poll(seconds * 1000))
