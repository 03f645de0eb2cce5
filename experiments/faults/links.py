"""What can happen to a host of a deployment: its link, its address, its disk, its processes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from fedraclora.experiments.hosts import Host
from fedraclora.experiments.hosts.deployment import Deployment
from fedraclora.experiments.hosts.host import HOME

BYTES = 15_000  # of a message that have passed when something happens in its middle
RATE = "20mbit"
CACHE, ROOM = f"{HOME}/cache", "12m"
Undo = Callable[[], object]


def nothing() -> None:
    """Undo what needs no undoing."""


def cut(host: Host) -> Undo:
    """Cut the link: packets are dropped, and neither end gets an error."""
    host.cut()
    return host.heal


def crawl(host: Host) -> Undo:
    """Let 5 kB a second pass each way."""
    host.link(up="40kbit", down="40kbit")
    return lambda: host.link(RATE, RATE)


def stop(host: Host) -> Undo:
    """Stop every process; connections stay open."""
    host.stop()
    return host.cont


def move(host: Host) -> Undo:
    """Take another address, under which it stays."""
    subnet, _, last = host.address.rpartition(".")
    host.move(f"{subnet}.{(int(last) + 40) % 240 + 10}")
    return nothing


def fill(host: Host) -> Undo:
    """Fill the disk of the node's cache."""
    host.run(["sh", "-c", f"dd if=/dev/zero of={CACHE}/filler bs=4k 2> /dev/null || true"])
    return lambda: host.run(["rm", "-f", f"{CACHE}/filler"])


def kill_resident(host: Host) -> Undo:
    """Kill the process that trains."""
    with suppress(Exception):  # there is none, perhaps
        host.run(["pkill", "-9", "-f", "fedraclora.clients.resident"])
    return nothing


def reset(host: Host) -> Undo:
    """Break every open connection of the host; both ends are told."""
    host.run(["ss", "-K", "state", "connected"], root=True)
    return nothing


def kill(host: Host) -> Undo:
    """Kill every process; who supervises it starts the node again."""
    host.kill()
    return nothing


# What is done, when, and for how many seconds (at least, at most); 0: until the round has ended.
HOST_FAULTS: dict[str, tuple[Callable[[Host], Undo], str, float, float]] = {
    "cut as its reply leaves": (cut, "sent", 1, 6),
    "cut as a message comes": (cut, "received", 1, 6),
    "cut at any time": (cut, "", 1, 6),
    "crawls at 40 kbit/s": (crawl, "", 2, 8),
    "stopped": (stop, "", 1, 6),
    "moves as its reply leaves": (move, "sent", 0, 0),
    "moves at any time": (move, "", 0, 0),
    "full disk": (fill, "", 0, 0),
    "resident killed": (kill_resident, "", 0, 0),
    "cut for 20 s": (cut, "received", 20, 20),
    "cut for 80 s": (cut, "received", 80, 80),
    "the server is cut": (cut, "", 2, 6),
}
# The same, where each is looked at alone.
ALONE_FAULTS: dict[str, tuple[Callable[[Host], Undo], str, float, float]] = {
    **HOST_FAULTS,
    "connections reset as its reply leaves": (reset, "sent", 0, 0),
    "connections reset at any time": (reset, "", 0, 0),
    "stopped for 40 s": (stop, "", 40, 40),
    "node killed": (kill, "", 0, 0),
    "the server is stopped": (stop, "", 2, 6),
    "connections of the server reset": (reset, "", 0, 0),
}
OF_SERVER = ("the server is cut", "the server is stopped", "connections of the server reset")
RARE = {"cut for 20 s": 2, "cut for 80 s": 1, "the server is cut": 2, "moves at any time": 3}
AT_ONCE = 3


@dataclass
class HostFault:
    """One thing that happens to a host.

    Attributes:
        kind: Of `ALONE_FAULTS`, or what a whole act does.
        client: Whom it concerns; -1: the server.
        host: Of whom.
        when: A number in [0, 1) that says when in the round, where nothing else does.
        seconds: For how long; 0: until the round has ended.
        round_: In which it came; None: it has not.
        ended: The last round in which it lasted.
        slow: Rounds that took longer than they should, until they were as before; None: not
            counted.
        ended_run: Why the run ended while it lasted, each time.
    """

    kind: str
    client: int
    host: Host
    when: float
    seconds: float
    round_: int | None = None
    ended: int | None = None
    slow: int | None = None
    ended_run: list[str] = field(default_factory=list)
    began: float = 0.0
    counters: tuple[int, int] = (0, 0)
    undo: Undo = field(default=nothing)

    def look(self, at: int, since: float, usual: float) -> None:
        """Begin or end it if it is time.

        Args:
            at: The round that goes on.
            since: Seconds since it began.
            usual: Seconds that a round takes.
        """
        do, trigger, _, _ = ALONE_FAULTS[self.kind]
        if self.round_ is None:
            sent, received = self.host.sent(), self.host.received()
            passed = {
                "sent": sent - self.counters[0] > BYTES,
                "received": received - self.counters[1] > BYTES,
                "": since > self.when * usual,
            }
            if passed[trigger]:
                self.round_, self.began, self.undo = at, time.monotonic(), do(self.host)
        elif self.ended is None:
            lasted = time.monotonic() - self.began
            if (lasted >= self.seconds) if self.seconds else at > self.round_:
                self.undo()
                self.ended = at


def drawn(
    rng: np.random.Generator, deployment: Deployment, number: int
) -> Iterator[list[HostFault]]:
    """Yield what happens in each round: to every node up to `AT_ONCE` things, each another."""
    common = [kind for kind in HOST_FAULTS if kind not in RARE]
    bag = [kind for kind, times in RARE.items() for _ in range(times)][:number]
    bag += [common[k % len(common)] for k in range(number - len(bag))]
    bag = [bag[k] for k in rng.permutation(len(bag))]
    while bag:
        faults = list[HostFault]()
        for client, owner in enumerate(deployment.owners):
            mine = list[str]()
            for kind in bag:
                done = [HOST_FAULTS[each][0] for each in mine]
                if len(mine) < AT_ONCE and HOST_FAULTS[kind][0] not in done:
                    mine.append(kind)
            for kind in mine:
                bag.remove(kind)
                server = kind == "the server is cut"
                host = deployment.server if server else owner
                seconds = rng.uniform(*HOST_FAULTS[kind][2:])
                faults.append(
                    HostFault(kind, -1 if server else client, host, rng.random(), seconds)
                )
        yield faults


def drawn_alone(
    rng: np.random.Generator, deployment: Deployment, number: int, together: int
) -> Iterator[list[HostFault]]:
    """Yield acts of so many faults, each at another host: every kind in turn, at drawn hosts."""
    kinds = [list(ALONE_FAULTS)[k] for k in rng.permutation(len(ALONE_FAULTS))]
    bag = [kinds[k % len(kinds)] for k in range(number)]
    for first in range(0, number, together):
        faults = list[HostFault]()
        clients = rng.permutation(len(deployment.owners))
        for kind, client in zip(bag[first : first + together], clients.tolist(), strict=False):
            server = kind in OF_SERVER
            host = deployment.server if server else deployment.owners[client]
            seconds = rng.uniform(*ALONE_FAULTS[kind][2:])
            faults.append(HostFault(kind, -1 if server else client, host, rng.random(), seconds))
        yield faults
