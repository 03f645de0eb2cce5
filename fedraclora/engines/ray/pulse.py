"""Whether a process of Ray is there: it answers at its port, however long it has been computing.

A thread below Python greets whoever connects (gRPC, HTTP/2). So a process answers that is slow, or
whose interpreter is locked, and one does not that is stopped, or whose host is frozen or cut off.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from threading import Thread
from typing import Any

import ray
from ray._private import state

from fedraclora.engines.private_ray import RECONNECT
from fedraclora.errors import EngineError

# What opens a connection of HTTP/2, and the type of the frame by which a server answers it. Ray
# waits for ever where something listens that does not.
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = b"\x04"
PATIENCE = 10.0  # seconds in which an address must answer
TICK = 1.0  # seconds between looks
QUIET = 5.0  # seconds without an answer, after which a process counts as silent, at least
RAYS_OWN = 60.0  # seconds for which Ray looks for the head, where nobody says otherwise
SLACK = 10  # the same, in times of the slowest answer: on a busy machine all are slow


def greet(host: str, port: int, patience: float) -> None:
    """See that a server of Ray answers, under TLS that somebody listens; else raise OSError."""
    with socket.create_connection((host, port), patience) as link:
        if os.environ.get("RAY_USE_TLS", "0").lower() in {"0", "false"}:
            link.sendall(HTTP2)
            if link.recv(9)[3:4] != SETTINGS:  # nothing, or another protocol
                raise ConnectionError("what listens there is none")


class Pulse:
    """Looks again and again whether a process answers, in a thread of its own.

    Args:
        find: Gives its host and port; called in that thread.

    Attributes:
        quiet: Seconds since it answered, of those in which this process looked: what passes while
            nobody looks, or this process is stopped itself, is no silence.
    """

    def __init__(self, find: Callable[[], tuple[str, int]]) -> None:
        self.find, self.quiet = find, 0.0
        self._slowest, self._looked, self._asking = 0.0, time.monotonic(), False

    def look(self) -> float:
        """Ask again, without waiting; give how long it has been quiet: from 1 on it is silent."""
        now = time.monotonic()
        if (gap := now - self._looked) >= TICK / 2:
            self.quiet += min(gap, 2 * TICK)
            self._looked = now
            if not self._asking:
                self._asking = True
                Thread(target=self._ask, daemon=True).start()
        return self.quiet / max(QUIET, SLACK * self._slowest)

    def _ask(self) -> None:
        began = time.monotonic()
        try:
            greet(*self.find(), PATIENCE)
        except ConnectionRefusedError:  # its host says that it is gone: there is none to wait for
            self.quiet = max(self.quiet, QUIET, SLACK * self._slowest)
        except OSError:
            pass
        else:
            self._slowest = max(0.9 * self._slowest, time.monotonic() - began)
            self.quiet = 0.0
        finally:
            self._asking = False


def place_of(actor: Any) -> tuple[str, int]:
    """Find host and port of an actor's process; raise OSError if the head knows of none."""
    known = state.actors(actor._actor_id.hex()).get("Address", {})  # noqa: SLF001
    if not known.get("Port"):
        raise OSError("no such process")
    return str(known["IPAddress"]), int(known["Port"])


class Head(Pulse):
    """The pulse of what a run cannot be without: the cluster's head, and Ray on this machine.

    Ray ends this process where it misses one of them: the head after a while, and what it has here
    as soon as something large is handed to it.
    """

    def __init__(self) -> None:
        self.address = ray.get_runtime_context().gcs_address
        host, _, port = self.address.rpartition(":")
        super().__init__(lambda: (host.strip("[]"), int(port)))
        # The other half is for a checkpoint, and for the end of Ray.
        self.patience = float(os.environ.get(RECONNECT, RAYS_OWN)) / 2
        own = ray.get_runtime_context().get_node_id()
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        (self.here,) = (str(n["RayletSocketName"]) for n in nodes if n["NodeID"] == own)

    def check(self) -> None:
        """Look; raises EngineError if one was ended, or the head is silent for too long."""
        why = ""
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.connect(self.here)
        except (ConnectionRefusedError, FileNotFoundError):
            why = "Ray's process on this machine (raylet) was ended"
        if self.look() * QUIET > self.patience:
            silent = f"has been silent for {self.quiet:.0f} s"
            why = f"the head of the Ray cluster, {self.address}, {silent}"
        if why:
            raise EngineError(
                f"{why}: it was killed (by the system, where memory ran out?), or its host is "
                "gone; go on with the run, where there is a cluster again"
            )
