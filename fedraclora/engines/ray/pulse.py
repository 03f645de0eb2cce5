"""Check whether a Ray process is alive: it responds at its port even while it computes.

A thread outside of Python accepts connections (gRPC, HTTP/2). So a slow process, or one with a
locked interpreter, responds; a stopped one, or one on a frozen or disconnected host, does not.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import lru_cache
from threading import Thread
from typing import Any

import ray
from ray._private import state
from ray.exceptions import RayError

from fedraclora.engines.private_ray import RECONNECT
from fedraclora.errors import EngineError

# The start of an HTTP/2 connection, and the type of the frame by which a server responds. Ray waits
# for ever if something listens that does not respond.
HTTP2 = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
SETTINGS = b"\x04"
PATIENCE = 10.0  # seconds for an address to respond
TICK = 1.0  # seconds between checks
QUIET = 5.0  # least seconds without a response after which a process counts as silent
RAYS_OWN = 60.0  # seconds for which Ray looks for the head, by default
SLACK = 10  # like QUIET, as a multiple of the slowest response: on a busy machine all are slow
Place = tuple[str, int]  # host and port


def check_response(host: str, port: int, patience: float) -> float:
    """Check that a Ray server responds, or, under TLS, that something listens; else raise OSError.

    Returns:
        Seconds until the response, without those of the connection, which depend on the network:
        after a broken connection they do not show how busy a host is.
    """
    with socket.create_connection((host, port), patience) as link:
        began = time.monotonic()
        if os.environ.get("RAY_USE_TLS", "0").lower() in {"0", "false"}:
            link.sendall(HTTP2)
            if link.recv(9)[3:4] != SETTINGS:  # empty, or another protocol
                raise ConnectionError("the process at this port is not a gRPC server")
        return time.monotonic() - began


class LivenessPoller:
    """Poll processes for a response, in a thread of its own.

    Args:
        find: Returns host and port of each; called in that thread.

    Attributes:
        quiet: Seconds without a response while this process polled; time without polls, or while
            this process is stopped, does not count.
    """

    def __init__(self, find: Callable[[], list[Place]]) -> None:
        self.find, self.quiet = find, 0.0
        self._slowest, self._last = 0.0, 0.0
        self._looked, self._asking = time.monotonic(), False

    def look(self) -> float:
        """Poll again, without waiting; return how long it was quiet: from 1 on it is silent."""
        now = time.monotonic()
        if (gap := now - self._looked) >= TICK / 2:
            self.quiet += min(gap, 2 * TICK)
            self._looked = now
            if not self._asking:
                self._asking = True
                Thread(target=self._ask, daemon=True).start()
        return self.quiet / max(QUIET, SLACK * self._slowest)

    def _ask(self) -> None:
        try:
            taken = max([check_response(*place, PATIENCE) for place in self.find()])
        # its host reports that the process ended: there is none to wait for
        except ConnectionRefusedError:
            self.quiet = max(self.quiet, QUIET, SLACK * self._slowest)
        except (OSError, RayError):
            pass
        else:
            # One slow response may follow a stop; on a busy machine the next one is slow, too.
            self._slowest = max(0.9 * self._slowest, min(taken, self._last))
            self._last = taken
            self.quiet = 0.0
        finally:
            self._asking = False


def places_of(actor: Any) -> list[Place]:
    """Find an actor's process and its host's raylet, through which all its messages go.

    Raises:
        OSError: If the head does not know it.
    """
    known = state.actors(actor._actor_id.hex()).get("Address", {})  # noqa: SLF001
    if not known.get("Port"):
        raise OSError("no such process")
    host = str(known["IPAddress"])
    return [(host, int(known["Port"])), (host, raylet_port(str(known["NodeID"])))]


@lru_cache
def raylet_port(node: str) -> int:
    """Find the port of a machine's raylet, which does not change."""
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    return next(int(n["NodeManagerPort"]) for n in nodes if n["NodeID"] == node)


class Head(LivenessPoller):
    """Watch the processes that a run needs: the cluster's head, and Ray on this machine.

    Ray ends this process if one of them is missing: the head after a while, the local ones as soon
    as a large object is passed to them.

    Args:
        count: Asks the head for how many workers there are free resources; called in the thread.

    Attributes:
        room: The last result.
    """

    def __init__(self, count: Callable[[], int] = lambda: 0) -> None:
        self.address = ray.get_runtime_context().gcs_address
        self.count, self.room = count, 0
        super().__init__(self._place)
        # The other half is for a checkpoint, and for ending Ray.
        self.patience = float(os.environ.get(RECONNECT, RAYS_OWN)) / 2
        own = ray.get_runtime_context().get_node_id()
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
        (self.here,) = (str(n["RayletSocketName"]) for n in nodes if n["NodeID"] == own)

    def _place(self) -> list[Place]:
        self.room = self.count()
        host, _, port = self.address.rpartition(":")
        return [(host.strip("[]"), int(port))]

    def check(self) -> None:
        """Raise EngineError if one of them ended, or the head is silent for too long."""
        why = ""
        try:
            with socket.socket(socket.AF_UNIX) as link:
                link.connect(self.here)
        except (ConnectionRefusedError, FileNotFoundError):
            why = "Ray's process on this machine (raylet) ended"
        if self.look() * QUIET > self.patience:
            silent = f"has been silent for {self.quiet:.0f} s"
            why = f"the head of the Ray cluster, {self.address}, {silent}"
        if why:
            raise EngineError(
                f"{why}: it was killed (perhaps by lack of memory), or its host is down. "
                "Resume the run once a cluster is available"
            )
