"""Control a SuperLink through Flower's command line: start, follow and stop a run."""

from __future__ import annotations

import json
import subprocess
import time
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedraclora.engines.certificates import folder_warnings
from fedraclora.engines.programs import flwr, flwr_of
from fedraclora.errors import ConfigError, EngineError

PENDING, COMPLETED = "pending", "finished:completed"
LOST = 60.0  # seconds without a reply after which a SuperLink counts as lost
PAUSE = 1.0  # seconds between polls of a run


@dataclass(frozen=True)
class Status:
    """Hold the status of a run, since ``flwr run`` always exits with 0.

    Attributes:
        word: Flower's name for it.
        details: Why the run failed, if it did.
    """

    word: str
    details: str

    @property
    def ended(self) -> bool:
        """Return whether the run has ended, for any reason."""
        return self.word.startswith("finished")

    @property
    def completed(self) -> bool:
        """Return whether the run finished without an error."""
        return self.word == COMPLETED


class Connection:
    """Use a named connection of Flower's configuration.

    Args:
        name: The name of the connection.
        environ: The environment of Flower's programs: ``FLWR_HOME`` says where connections are.
    """

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self.name, self.environ = name, {**environ, "PYTHONUNBUFFERED": "1"}
        self.home = Path(environ.get("FLWR_HOME") or Path.home() / ".flwr")

    def submit(self, app: Path, run_config: Path) -> int:
        """Start a run of a Flower app; return its number.

        Args:
            app: Folder with its pyproject.toml; the bundle is built from it.
            run_config: TOML file that overrides the app's run config.

        Raises:
            EngineError: If it was not accepted.
        """
        run = self._call("run", str(app), self.name, "-c", str(run_config))
        return int(str(self._read(run, "run-id", "took no run")))

    def nodes(self) -> list[dict[str, object]]:
        """List its registered nodes, as ``flwr supernode list --format json`` does.

        Raises:
            ConfigError: If there is no file of connections; Flower would create one.
            EngineError: If it does not respond.
        """
        if not (file := self.home / "config.toml").is_file():
            raise ConfigError(
                f"connection={self.name}: {file} does not exist. Write it with address and "
                f"root-certificates in [superlink.{self.name}], or set FLWR_HOME to its folder"
            )
        listed = self._read(self._call("supernode", "list", self.name), "nodes", "is silent")
        return [dict(node) for node in listed]

    def unregister(self, node: int) -> None:
        """Remove a node: its key is refused from now on.

        Raises:
            EngineError: If the SuperLink refuses.
        """
        done = self._call("supernode", "unregister", str(node), self.name)
        self._read(done, "node-id", f"did not remove node {node}")

    def known(self) -> dict[str, object]:
        """Read addresses of connections by name; empty if Flower itself reports an error."""
        return {name: section.get("address") for name, section in self._sections().items()}

    def _sections(self) -> dict[str, dict[str, object]]:
        try:
            found = tomllib.loads((self.home / "config.toml").read_text(encoding="utf-8"))
            return {n: c for n, c in found["superlink"].items() if isinstance(c, dict)}
        except (OSError, ValueError, KeyError, AttributeError):
            return {}

    def certificate_warnings(self) -> list[str]:
        """Say which certificates beside the connection's ``root-certificates`` end soon."""
        roots = self._sections().get(self.name, {}).get("root-certificates")
        return folder_warnings(Path(roots).parent) if isinstance(roots, str) else []

    def _call(self, *words: str) -> subprocess.CompletedProcess[str]:
        return flwr([*words, "--format", "json"], self.environ, stderr=subprocess.PIPE)

    def _read(self, done: subprocess.CompletedProcess[str], key: str, failed: str) -> Any:
        found = _json(done.stdout)
        if key in found:
            return found[key]
        if (names := self.known()) and self.name not in names:
            raise EngineError(
                f"connection={self.name}: {self.home / 'config.toml'} has no section "
                f"[superlink.{self.name}]. Use one of {', '.join(names)}, or add the section"
            )
        reason = found.get("error-message") or f"{done.stdout}{done.stderr}".strip()
        reason = "; ".join([str(reason).rstrip("."), *self.certificate_warnings()])
        raise EngineError(
            f"connection={self.name}: the SuperLink {failed}: {reason}. Check that address "
            "and root-certificates of the connection are those of the SuperLink"
        )

    def runs(self) -> list[dict[str, object]]:
        """List its runs, whoever started them, as ``flwr list --format json`` does.

        Raises:
            EngineError: If it does not respond.
        """
        listed = self._read(self._call("list", self.name), "runs", "is silent")
        return [dict(run) for run in listed]

    def running(self) -> list[int]:
        """List the runs that have not ended.

        Raises:
            EngineError: If it does not respond.
        """
        states = {int(str(run["run-id"])): Status(str(run["status"]), "") for run in self.runs()}
        return [run for run, status in states.items() if not status.ended]

    def status(self, run: int) -> Status:
        """Return the status of a run.

        Raises:
            EngineError: If the SuperLink does not respond for `LOST` seconds.
        """
        end = time.monotonic() + LOST
        while True:
            listed = self._call("list", self.name, "--run-id", str(run))
            runs = _json(listed.stdout).get("runs")
            if isinstance(runs, list) and runs:
                return Status(str(runs[0]["status"]), str(runs[0].get("status-details") or ""))
            if time.monotonic() > end:
                raise EngineError(
                    f"connection={self.name}: the SuperLink has not answered for {LOST:g} s "
                    f"({(listed.stdout + listed.stderr).strip()[-300:]}), and run {run} may "
                    "still be running there. Check with `flwr list`, and resume the run once "
                    "it has ended"
                )
            time.sleep(PAUSE)

    def follow(self, run: int) -> Iterator[str]:
        """Yield the lines of a run's log as they arrive, until the stream ends."""
        log = subprocess.Popen(  # noqa: S603
            [*flwr_of(self.environ), "log", str(run), self.name, "--stream"],
            env=self.environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,  # Ctrl-C is handled by this process, which ends it
        )
        try:
            if log.stdout is not None:
                yield from log.stdout
        finally:
            log.terminate()
            log.communicate()

    def stop(self, run: int, seconds: float = 30.0) -> None:
        """Stop a run, and wait some seconds for it to end."""
        flwr(["stop", str(run), self.name], self.environ, stdout=subprocess.DEVNULL)
        end = time.monotonic() + seconds
        while not self.status(run).ended and time.monotonic() < end:
            time.sleep(PAUSE)


def _json(text: str) -> dict[str, object]:
    """Parse a command's output as JSON; empty if it is not JSON."""
    start = text.find("{")
    try:
        found = json.loads(text[start:]) if start >= 0 else {}
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
