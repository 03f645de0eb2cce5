"""The Ray engine: a Flower `Grid` whose one node is a pool of resident workers."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import ray
import torch
from flwr.app import Error, Message, RecordDict
from typing_extensions import override

from fedraclora.config.settings import RayConfig
from fedraclora.engines.local import LocalGrid, error_of, failed
from fedraclora.engines.ray.cluster import Cluster, worker_environment
from fedraclora.engines.ray.pool import Pool, Seat
from fedraclora.errors import ConfigError
from fedraclora.imports import importing
from fedraclora.run.client_state import ClientStore
from fedraclora.tree import Tree
from fedraclora.weights.replica import Replica
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.records import clients_of

SHARED = ("config", "arrays")  # records that all messages of an exchange have in common


class Site(Protocol):
    """What a worker holds between rounds."""

    replica: Replica

    def train(self, content: RecordDict, stored: Tree) -> tuple[RecordDict, Tree]:
        """Answer a train message; ``stored`` is what its clients hold, before and after."""


@dataclass(frozen=True)
class Job:
    """One train message, and which of the call's messages it is."""

    place: int
    message: Message
    clients: list[int]

    @override
    def __str__(self) -> str:
        first, last = self.clients[0], self.clients[-1]
        return f"clients {first} to {last} of round {self.message.metadata.group_id}"


@dataclass(frozen=True)
class Answer:
    """What a worker gives back: the reply, or why there is none.

    ``stale``: its base weights could not be brought to the version that was asked for.
    """

    content: RecordDict | None = None
    kept: Tree | None = None
    error: Error | None = None
    stale: bool = False


class Resident:
    """The process of a worker: model, data and base weights stay from round to round."""

    def __init__(self, build: Callable[[Any], Site], parts: list[Any]) -> None:
        with importing("a Ray worker"):
            self.site = build(ray.get(parts[0]))
        self._shared: tuple[str, dict[str, Any]] = ("", {})

    def facts(self) -> dict[str, str]:
        """Report what runs here."""
        return {
            "node": platform.node(),
            "python": platform.python_version(),
            "torch": torch.__version__,
        }

    def train(
        self, update: list[Any], shared: list[Any], rest: dict[str, Any], stored: Tree
    ) -> Answer:
        """Update the base weights and answer a train message.

        Args:
            update: The reference of what brings them to the newest version.
            shared: The reference of the records that all messages of the exchange share.
            rest: The other records.
            stored: What the clients hold.
        """
        if not self.site.replica.follow(ray.get(update[0])):
            return Answer(stale=True)
        key = shared[0].hex()
        if self._shared[0] != key:  # read once, so that the worker unpacks it once
            self._shared = (key, ray.get(shared[0]))
        try:
            content, left = self.site.train(RecordDict({**self._shared[1], **rest}), stored)
        except Exception as error:
            return Answer(error=error_of(error))
        return Answer(content, left)


class RayGrid(LocalGrid):
    """Trains chunks on resident workers; bits do not depend on how many there are.

    Args:
        cluster: Where workers run; ended with the grid.
        build: Makes a worker's site of ``parts``; importable on every node.
        parts: What sites are made of: sent once, through the object store.
        history: The versions of the base weights, published by the strategy.
        store: What clients keep between rounds; it travels with their messages.
        settings: Workers, retries, time-outs, threads.

    Raises:
        EngineError: If a worker does not start.
        ConfigError: If a node has other versions than this process.
    """

    def __init__(
        self,
        cluster: Cluster,
        build: Callable[[Any], Site],
        parts: object,
        *,
        history: WeightHistory,
        store: ClientStore,
        settings: RayConfig,
    ) -> None:
        super().__init__()
        self.cluster, self.history, self.store = cluster, history, store
        self._updates: dict[tuple[int, int | None], Any] = {}  # to and from a version -> reference
        try:
            self._start(build, parts, settings)
        except BaseException:
            self.close()
            raise

    def _start(self, build: Callable[[Any], Site], parts: object, settings: RayConfig) -> None:
        """Start the workers, and wait until all of them are ready."""
        shared = ray.put(parts)
        kind = ray.remote(Resident).options(
            num_cpus=1,
            num_gpus=self.cluster.gpus,
            max_restarts=0,
            runtime_env={"env_vars": worker_environment(settings.threads)},
        )
        self.pool = Pool(
            lambda: kind.remote(build, [shared]),
            self.cluster.workers,
            settings.retries,
            settings.timeout,
        )
        self._check(self.pool.facts())

    def _check(self, found: list[dict[str, str]]) -> None:
        here = {"python": platform.python_version(), "torch": torch.__version__}
        for facts in found:
            if any(facts[k] != v for k, v in here.items()):
                raise ConfigError(
                    f"node {facts['node']} has Python {facts['python']} and torch "
                    f"{facts['torch']}, this process {here['python']} and {here['torch']}: bits "
                    "would depend on which worker trains; install the same versions"
                )

    @override
    def answer(self, messages: list[Message], timeout: float | None) -> list[Message]:
        replies, shared = [], {}
        jobs = [Job(i, m, clients_of(m.content)) for i, m in enumerate(messages)]

        def submit(seat: Seat, job: Job) -> Any:
            content = job.message.content
            key = id(content["arrays"])
            if key not in shared:
                shared[key] = ray.put({name: content[name] for name in SHARED})
            rest = {n: r for n, r in content.items() if n not in SHARED}
            stored = self.store.part(job.clients, int(job.message.metadata.group_id))
            return seat.actor.train.remote([self._update(seat)], [shared[key]], rest, stored)

        while jobs:
            again = []
            for job, seat, answer in self.pool.run(jobs, submit, timeout):
                if answer.stale:
                    self.incidents.append(
                        f"worker {seat.number} got the whole of version {self.history.version}"
                    )
                    seat.version = None
                    again.append(job)
                    continue
                seat.version = self.history.version
                if answer.error is not None:
                    replies.append(failed(job.message, answer.error))
                else:
                    self.store.absorb(answer.kept)
                    replies.append(Message(answer.content, reply_to=job.message))
            jobs = again
        self.incidents += self.pool.incidents
        self.pool.incidents = []
        return replies

    def _update(self, seat: Seat) -> Any:
        """Put what a worker lacks into the object store, once for all that hold its version."""
        newest, key = self.history.version, (self.history.version, seat.version)
        if key not in self._updates:
            self._updates = {k: ref for k, ref in self._updates.items() if k[0] == newest}
            self._updates[key] = ray.put(self.history.since(seat.version))
        return self._updates[key]

    @override
    def close(self) -> None:
        pool: Pool | None = getattr(self, "pool", None)
        if pool is not None:
            pool.close()
        self._updates = {}
        self.cluster.close()
