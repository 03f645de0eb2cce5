"""Keep what an operator wants of a federation, and what its runs know of the nodes, in files.

The files are in a folder of ``FLWR_HOME``, which the SuperLink, the servers of its runs and the
operator's commands on that host share. A server reads the operator's wishes before each round.
"""

from __future__ import annotations

import fcntl
import getpass
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fedraclora.engines.owner.entries import now
from fedraclora.errors import ConfigError, EngineError
from fedraclora.weights.files import write_text

HOME, FOLDER = "FLWR_HOME", "fedraclora-federation"
WISHES, NODES, AUDIT = "wishes.json", "nodes.json", "audit.jsonl"


@dataclass(frozen=True)
class Wishes:
    """What the operator wants.

    Attributes:
        paused: Whether runs wait before their next round.
        drained: Nodes that take part in no further round, by Flower's number.
        removed: Nodes whose keys were removed, by Flower's number; it does not use one again.
    """

    paused: bool = False
    drained: frozenset[int] = frozenset()
    removed: frozenset[int] = frozenset()


@dataclass(frozen=True)
class NodeFacts:
    """What a run knows of a node.

    Attributes:
        name: The name that its owner gave it; may be empty.
        clients: The clients that it serves.
        replied: When its last reply was read, ISO 8601 in UTC; empty before the first.
        why: Why it does not take part; empty if it does.
    """

    name: str = ""
    clients: tuple[int, ...] = ()
    replied: str = ""
    why: str = ""


class FederationFiles:
    """Read and write the files of a federation.

    Args:
        folder: Where they are; it is made when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> FederationFiles | None:
        """Return those of ``FLWR_HOME``; None if it is not set."""
        return cls(Path(environ[HOME], FOLDER)) if environ.get(HOME) else None

    def wishes(self) -> Wishes:
        """Read the operator's wishes.

        Raises:
            ConfigError: If the file cannot be read.
        """
        found = self._read(WISHES)
        try:
            nodes = (frozenset(map(int, found.get(key, ()))) for key in ("drained", "removed"))
            return Wishes(bool(found.get("paused")), *nodes)
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{self.folder / WISHES} is damaged: {error}. Remove it") from error

    def wish(self, wishes: Wishes) -> None:
        """Write the operator's wishes."""
        with self._open():
            found = {"paused": wishes.paused, "drained": sorted(wishes.drained)}
            found |= {"removed": sorted(wishes.removed)}
            write_text(self.folder / WISHES, json.dumps(found))

    def nodes(self) -> dict[int, NodeFacts]:
        """Read what the last runs knew of the nodes."""
        known = dict[int, NodeFacts]()
        for node, facts in self._read(NODES).items():
            with suppress(TypeError, ValueError):
                found = NodeFacts(**facts)
                known[int(node)] = replace(found, clients=(*found.clients,))
        return known

    def note(self, nodes: Mapping[int, NodeFacts]) -> None:
        """Write what a run knows of its nodes, beside what is known of others."""
        with self._open():
            both = {**self.nodes(), **nodes}
            text = json.dumps({str(node): asdict(facts) for node, facts in both.items()})
            write_text(self.folder / NODES, text)

    def audit(self, what: str, **facts: object) -> None:
        """Append an entry to the audit log, with time and user."""
        entry = {"time": now(), "who": f"{getpass.getuser()}@{socket.gethostname()}", "what": what}
        with self._open(), (self.folder / AUDIT).open("a", encoding="utf-8") as file:
            file.write(json.dumps({**entry, **facts}, default=str) + "\n")

    def entries(self) -> list[dict[str, Any]]:
        """Read the audit log; a line that a kill has cut is left out."""
        found = []
        with suppress(FileNotFoundError):
            for line in (self.folder / AUDIT).read_text(encoding="utf-8").splitlines():
                with suppress(ValueError):
                    found.append(json.loads(line))
        return found

    def _read(self, name: str) -> dict[str, Any]:
        """Read a file of JSON; empty if there is none.

        Raises:
            ConfigError: If it cannot be read.
        """
        try:
            found = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.folder / name} cannot be read: {error}") from error
        return found if isinstance(found, dict) else {}

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Make the folder, and lock it inside.

        Raises:
            EngineError: If this user cannot write there.
        """
        try:
            self.folder.mkdir(mode=0o700, exist_ok=True)
            entry = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError as error:
            raise EngineError(
                f"{self.folder}: {error}. Run this on the SuperLink's host, as its user, with its "
                f"{HOME}"
            ) from error
        try:
            fcntl.flock(entry, fcntl.LOCK_EX)
            yield
        finally:
            os.close(entry)
