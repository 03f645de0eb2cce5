"""Send requests to a pool of resident Ray workers."""

from __future__ import annotations

import gc
import logging
import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import ray
import torch
from typing_extensions import override

from fedraclora.config.settings import RayConfig
from fedraclora.engines.base import Grid
from fedraclora.engines.ray.cluster import SOME, Cluster
from fedraclora.engines.ray.packages import loaded_code
from fedraclora.engines.ray.pool import WorkerPool, WorkerSlot
from fedraclora.engines.ray.pulse import Head
from fedraclora.errors import ConfigError
from fedraclora.imports import importing
from fedraclora.run.client_state import ClientStore
from fedraclora.tree import Tree
from fedraclora.weights.replica import Replica
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.answers import Answer, Came, NoAnswer
from fedraclora.wire.exchange import Ask, OwnPart, shared_of


class WorkerStateLike(Protocol):
    """Define a worker's state between rounds."""

    replica: Replica

    def train(self, ask: Ask, stored: Tree) -> tuple[Answer, Tree]:
        """Answer a request; ``stored`` is the clients' state, before and after."""


@dataclass(frozen=True)
class WorkerResult:
    """Hold the result of a worker: the reply, or the reason why there is none.

    ``stale``: its base weights could not be updated to the requested version.
    """

    answer: Answer | NoAnswer = field(default_factory=lambda: NoAnswer("it has other weights"))
    kept: Tree = field(default_factory=dict)
    stale: bool = False


def facts() -> dict[str, Any]:
    """Return the versions and hardware that influence the results of this process."""
    card = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    return {
        "address": ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": " with ".join([torch.backends.cpu.get_cpu_capability(), *card]),
    }


class Resident:
    """Run a worker's process: model, data and base weights stay from round to round."""

    def __init__(self, build: Callable[[Any], WorkerStateLike], parts: list[Any]) -> None:
        with importing("a Ray worker"):
            self.state = build(ray.get(parts[0]))
        gc.freeze()
        self._shared: tuple[str, Ask] | None = None

    def facts(self) -> dict[str, Any]:
        """Report the versions and hardware."""
        own = {"node": platform.node(), "code": loaded_code(), "mark": self.state.replica.mark}
        return facts() | own

    def train(
        self, update: list[Any], shared: list[Any], part: OwnPart, stored: Tree
    ) -> WorkerResult:
        """Update the base weights and answer a request.

        Args:
            update: Reference of the update to the newest version.
            shared: Reference of the part that all clients of the exchange share.
            part: The rest of the request.
            stored: The clients' state.
        """
        if not self.state.replica.follow(ray.get(update[0])):
            return WorkerResult(stale=True)
        key = shared[0].hex()
        if self._shared is None or self._shared[0] != key:  # read once
            self._shared = key, ray.get(shared[0])
        try:
            answer, left = self.state.train(part.joined(self._shared[1]), stored)
        except Exception as error:
            return WorkerResult(NoAnswer.of(error))
        return WorkerResult(answer, left)


class RayGrid(Grid):
    """Train chunks on resident workers; results do not depend on their number.

    Args:
        cluster: Where workers run; ended with the grid.
        build: Creates a worker's state from ``parts``; importable on every node.
        parts: Inputs of the state, sent once through the object store.
        history: The versions of the base weights, published by the strategy.
        store: The clients' state between rounds, which is sent with their messages.
        settings: Workers, retries, time-outs, threads.

    Raises:
        EngineError: If a worker does not start.
        ConfigError: If a node has other versions than this process.
    """

    def __init__(
        self,
        cluster: Cluster,
        build: Callable[[Any], WorkerStateLike],
        parts: object,
        *,
        history: WeightHistory,
        store: ClientStore,
        settings: RayConfig,
    ) -> None:
        super().__init__()
        self.cluster, self.history, self.store = cluster, history, store
        self.workers, self._thaws = cluster.workers, not gc.get_freeze_count()
        self._admitted: list[str] = []  # the address of each worker that was checked
        self._updates: dict[tuple[int, int | None], Any] = {}  # from and to a version -> reference
        try:
            self._start(build, parts, settings)
        except BaseException:
            self.close()
            raise

    def _start(
        self, build: Callable[[Any], WorkerStateLike], parts: object, settings: RayConfig
    ) -> None:
        """Start the workers, and wait until all of them are ready."""
        shared = ray.put(parts)
        kind = ray.remote(Resident)
        own = {"num_cpus": 1, "num_gpus": self.cluster.gpus, "max_restarts": 0}

        def start() -> Any:
            return kind.options(**own, runtime_env=self.cluster.runtime_env()).remote(
                build, [shared]
            )

        room = self.cluster.room()
        head = Head(self.cluster.room) if settings.workers is None else Head()

        def watch() -> None:
            nonlocal room
            head.check()
            more, room = head.room - room, max(room, head.room)
            for host in self.cluster.new_machines():
                text = f"host {host.address} joined, with room for {host.room} workers"
                self.pool.say(text, logging.INFO)
            self.pool.add(max(0, more))

        self.pool = WorkerPool(
            start,
            self.cluster.workers,
            settings.retries,
            settings.timeout,
            settings.wait,
            watch=watch,
        )
        self._check(self.pool.facts())
        # While a worker waits for a core, Ray makes all processes collect garbage every 10 s, which
        # takes seconds on a busy host; loaded modules contain little garbage.
        gc.freeze()
        self.pool.check = self._admit

    def _check(self, found: list[dict[str, Any]]) -> None:
        """Reject workers with other versions; report hosts, and other causes of changed bits."""
        here, code = facts(), loaded_code()
        (self._began,) = {there["mark"] for there in found}
        for there in found:
            host = f"node {there['node']} ({there['address']})"
            if any(there[k] != here[k] for k in ("python", "torch")):
                raise ConfigError(
                    f"{host} has Python {there['python']} and torch {there['torch']}, but "
                    f"this process has {here['python']} and {here['torch']}, so results would "
                    "depend on which worker trains. Install the same versions"
                )
            for name, (digest, file) in there["code"].items():
                if code.get(name, (digest,))[0] != digest:
                    raise ConfigError(
                        f"{host} imports another {name} ({file}) than the one that this "
                        "process sent. Remove that file from Python's path on the host"
                    )
        self._admitted += [there["address"] for there in found]
        places = Counter(self._admitted)
        text = ", ".join(f"{count} on {address}" for address, count in places.most_common(SOME))
        rest = f", and {len(places) - SOME} hosts more" if len(places) > SOME else ""
        self.facts = self.cluster.facts and {
            **self.cluster.facts,
            "workers": f"{len(self._admitted)}: {text}{rest}",
        }
        if len(kinds := {there["processor"] for there in [here, *found]}) > 1:
            self.facts["processors"] = (
                f"{', '.join(sorted(kinds))}; they may round differently, so results may "
                "depend on which host trains"
            )

    def _admit(self, late: list[dict[str, Any]]) -> None:
        """Check workers that join later like those of the start, and report new differences."""
        known = self.facts.get("processors")
        self._check(late)
        if (now := self.facts.get("processors")) and now != known:
            self.incidents.append(f"processors: {now}")

    @override
    def ask(self, asks: Sequence[Ask], timeout: float | None = None) -> Came:
        # The timeout is not used: engine.timeout applies to each chunk.
        found: list[tuple[Ask, Answer | NoAnswer]] = []
        shared = dict[int, tuple[object, Any]]()

        def submit(slot: WorkerSlot, ask: Ask) -> Any:
            # kept alive: otherwise its id may be reused
            if (key := id(ask.downlink)) not in shared:
                shared[key] = ask.downlink, ray.put(shared_of(ask))
            stored = self.store.part(ask.clients, ask.request.round_)
            update = self._update(slot)
            slot.version = self.history.version
            return slot.actor.train.remote([update], [shared[key][1]], OwnPart.of(ask), stored)

        left = [*asks]
        while left:
            again = []
            for ask, slot, done in self.pool.run(left, submit):
                if done.stale:
                    self.incidents.append(
                        f"worker {slot.number} got the whole of version {self.history.version}"
                    )
                    slot.version = None
                    again.append(ask)
                    continue
                if isinstance(done.answer, Answer):
                    self.store.absorb(done.kept)
                found.append((ask, done.answer))
            left = again
        self.incidents += self.pool.incidents
        self.pool.incidents = []
        return found

    def _update(self, slot: WorkerSlot) -> Any:
        """Put a worker's update into the object store, once for all workers of its version."""
        newest, start = self.history.version, slot.version
        if start is None and newest == 0 and self.history.since(0).mark == self._began:
            start = 0  # the model brought the weights
        key = (newest, start)
        if key not in self._updates:
            self._updates = {k: ref for k, ref in self._updates.items() if k[0] == newest}
            self._updates[key] = ray.put(self.history.since(start))
        return self._updates[key]

    @override
    def close(self) -> None:
        pool: WorkerPool | None = getattr(self, "pool", None)
        if pool is not None:
            pool.close()
        self._updates = {}
        if self._thaws:
            gc.unfreeze()
        self.cluster.close()
