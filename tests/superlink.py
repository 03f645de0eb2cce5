"""A SuperLink in Flower's simulation runtime, for an app of somebody's own.

``flwr run`` itself would start one that stays alive, with the environment and the working folder
of its first run. This one ends together with all that it has started.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from fedraclora.engines import programs
from fedraclora.engines.deploy.control import Status
from fedraclora.engines.private_ray import RayFolder
from fedraclora.errors import EngineError
from fedraclora.private_folder import PrivateFolder

Options = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class Ended(Status):
    """How a run ended.

    Attributes:
        log: What was written meanwhile, if it was not shown.
    """

    log: str


class SuperLink:
    """A SuperLink in simulation mode; as a context it runs inside, and is gone after.

    Args:
        show: Whether `run_app` prints what Flower's programs write.
    """

    def __init__(self, *, show: bool = True) -> None:
        self.show = show
        self._made = PrivateFolder(longest=programs.LONGEST)
        self.home = self._made.path
        self._ray = RayFolder()  # of the Ray that Flower's programs start
        self.environ = programs.environment(self.home) | self._ray.environ
        self.environ.pop("RAY_ADDRESS", None)
        self._program: programs.Program | None = None

    def __enter__(self) -> SuperLink:
        """Start it, and wait until it listens."""
        try:
            words, trust = ["--insecure", "--simulation"], "insecure = true"
            self._program, at = programs.superlink(self.home, words, self.environ, trust)
            self._program.await_listening(at)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        """End it with all that it has started, and remove its folders."""
        if self._program is not None:
            self._program.end()
            self._program = None
        self._ray.close()
        self._made.cleanup()

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
        words = ["run", str(app), programs.CONNECTION, "--stream", "-c", str(run_config)]
        run = programs.flwr(
            [*words, "--federation-config", option_words(options)],
            self.environ,
            stdout=None if self.show else subprocess.PIPE,
            stderr=None if self.show else subprocess.STDOUT,
        )
        listed = programs.flwr(["list", programs.CONNECTION, "--format", "json"], self.environ)
        try:
            (found,) = json.loads(listed.stdout)["runs"]
        except (ValueError, KeyError) as error:
            last = "nothing" if self._program is None else self._program.last_words
            raise EngineError(
                f"flwr run did not begin, or its SuperLink ended ({(run.stdout or '').strip()}); "
                f"the last words of that: {last}"
            ) from error
        return Ended(str(found["status"]), str(found["status-details"]), run.stdout or "")


def option_words(options: Options) -> str:
    """Write options as the command line of ``flwr`` wants them.

    Example:
        >>> option_words({"num-supernodes": 8, "init-args-log-to-driver": False})
        'num-supernodes=8 init-args-log-to-driver=false'
    """
    return " ".join(f"{key}={json.dumps(value)}" for key, value in options.items())
