"""Distribute jobs to a pool of resident workers; lost workers are replaced."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, RayError, RayTaskError
from typing_extensions import override

from fedraclora.engines.ray.pulse import QUIET, TICK, LivenessPoller, places_of
from fedraclora.engines.ray.session import LOOPBACK
from fedraclora.errors import ConfigError, EngineError

log = logging.getLogger(__name__)

CREATION = "creation task"  # Ray's text for an error at a worker's start
NODE = "its node has died"  # Ray's text for a lost host
GIVEN_UP = 60.0  # seconds after which a silent worker is replaced; Ray gives up hosts after as long
Job = TypeVar("Job")
Facts = dict[str, Any]


@dataclass(eq=False)
class PoolTask(Generic[Job]):
    """Hold a job; the pool may give it to a second worker if the first is silent.

    Attributes:
        job: The job.
        lost: Workers that died or hung at it.
        done: Whether its result has arrived, or is not needed any more.
    """

    job: Job
    lost: int = 0
    done: bool = False


@dataclass(eq=False)
class WorkerSlot:
    """Hold the place of a worker in the pool; its process may be replaced.

    Attributes:
        number: From 0.
        actor: Its process.
        pulse: Checks whether this process responds.
        version: Version of its base weights after its jobs, or None.
        facts: Facts reported by the process; None: it is starting.
        silent: Whether it has not responded for a while, so that it gets no job.
        doubted: Whether it was silent and has finished no job since: after a broken connection a
            worker may respond although Ray delivers neither jobs nor results.
        task: Its present task.
        asked: Whether it has been asked for its facts.
        since: When it received the task or that request.
        failed: Processes that failed to start here in a row.
    """

    number: int
    actor: Any = None
    pulse: Any = None
    version: int | None = None
    facts: Facts | None = None
    silent: bool = False
    doubted: bool = False
    task: PoolTask[Any] | None = None
    asked: bool = False
    since: float = 0.0
    failed: int = 0

    @override
    def __str__(self) -> str:
        """Return the number of the worker, and its host if that is another machine."""
        address = (self.facts or {}).get("address", LOOPBACK[0])
        return f"worker {self.number}" + ("" if address in LOOPBACK else f" on {address}")

    @property
    def free(self) -> bool:
        """Return whether it can take a job."""
        return self.facts is not None and not (self.silent or self.task or self.asked)


class WorkerPool:
    """Manage workers, each of them one process.

    Args:
        start: Starts a process and returns its handle.
        workers: Number of processes.
        retries: Workers that may die or hang at one job.
        timeout: Seconds on one job after which a worker counts as hung.
        wait: Seconds to wait for a worker if none is ready.
        watch: Checks whether Ray itself is lost; raises if so.
        pulse_of: Creates the check whether a process responds.

    Attributes:
        check: Checks the facts of a worker that joins later; raises if it is not suitable.
        incidents: Lost workers and their replacements: one sentence each.
    """

    def __init__(
        self,
        start: Callable[[], Any],
        workers: int,
        retries: int,
        timeout: float,
        wait: float = 300.0,
        *,
        watch: Callable[[], object] = lambda: None,
        pulse_of: Callable[[Any], Any] = lambda actor: LivenessPoller(partial(places_of, actor)),
    ) -> None:
        self.start, self.retries, self.timeout, self.wait = start, retries, timeout, wait
        self.watch, self.pulse_of = watch, pulse_of
        self.check: Callable[[list[Facts]], object] | None = None
        self.incidents: list[str] = []
        self._queue: deque[PoolTask[Any]] = deque()
        # None: a request for its facts
        self._waits: dict[Any, tuple[WorkerSlot, PoolTask[Any] | None]] = {}
        self._looked, self._without = time.monotonic(), 0.0
        self.slots: list[WorkerSlot] = []
        self.add(workers)

    def add(self, workers: int) -> None:
        """Start more workers; they get jobs when they are ready."""
        first = 1 + max((slot.number for slot in self.slots), default=-1)
        self.slots += (new := [WorkerSlot(first + i) for i in range(workers)])
        for slot in new:
            self._start(slot)

    def facts(self, timeout: float = 300.0) -> list[Facts]:
        """Wait until every worker is ready; return the facts of each.

        Raises:
            EngineError: If one did not start, with the reason.
        """
        end = time.monotonic() + timeout
        while missing := [slot for slot in self.slots if slot.facts is None]:
            if time.monotonic() > end:
                raise EngineError(
                    f"{missing[0]} of {len(self.slots)} was not ready after {timeout:g} s. "
                    "Lower engine.workers; on a cluster, see Ray's log"
                )
            self._step()
        return [slot.facts for slot in self.slots if slot.facts is not None]

    def run(
        self, jobs: Sequence[Job], submit: Callable[[WorkerSlot, Job], Any]
    ) -> Iterator[tuple[Job, WorkerSlot, Any]]:
        """Run jobs, in any order.

        Args:
            jobs: The jobs.
            submit: Passes a job to the worker of a slot; returns the reference of its result.

        Yields:
            The job, its slot, and the result; each job once.

        Raises:
            EngineError: If one job lost more workers than `retries`, if a worker raised, or if none
                was ready in time.
        """
        tasks = [PoolTask(job) for job in jobs]
        self._queue.extend(tasks)
        self._without = 0.0
        self.watch()
        try:
            while not all(task.done for task in tasks):
                self._queue = deque(task for task in self._queue if not task.done)
                free = sorted((s for s in self.slots if s.free), key=lambda s: s.doubted)
                if not self._queue:  # other workers can also do the jobs of doubted ones
                    self._queue.extend(self._doubtful()[: sum(not s.doubted for s in free)])
                for slot in free[: len(self._queue)]:
                    slot.task, slot.since = self._queue.popleft(), time.monotonic()
                    slot.pulse.quiet = 0.0
                    self._waits[submit(slot, slot.task.job)] = slot, slot.task
                yield from self._step()
        finally:
            self._queue.clear()
            for task in tasks:  # later results are ignored
                task.done = True

    def _doubtful(self) -> list[PoolTask[Any]]:
        """List tasks that only doubted workers have."""
        sure = [s.task for s in self.slots if not s.doubted]
        return [t for s in self.slots if (t := s.task) and not t.done and t not in sure]

    def _step(self) -> list[tuple[Any, WorkerSlot, Any]]:
        """Wait for a result, or a moment; return the result of an unfinished job."""
        if time.monotonic() - self._looked >= TICK:
            self._look()
        if not self._waits:
            time.sleep(TICK)
            return []
        ready, _ = ray.wait([*self._waits], num_returns=1, timeout=TICK)
        for ref in ready:
            slot, task = self._waits.pop(ref)
            try:
                answer = ray.get(ref)
            except RayError as error:
                self._failed(slot, task, error)
                continue
            if task is None:
                self._sit(slot, answer)
                continue
            slot.task, slot.pulse.quiet, slot.doubted = None, 0.0, False
            if not task.done:
                task.done = True
                return [(task.job, slot, answer)]
        return []

    def _failed(self, slot: WorkerSlot, task: PoolTask[Any] | None, error: RayError) -> None:
        """Decide what to do with a worker and its job after an error."""
        cause = f"was lost: {reason(error)}"
        if isinstance(error, RayTaskError) and not isinstance(error.cause, RayError | OSError):
            slot.task = None
            if task is not None and not task.done:  # another worker would raise it, too
                raise EngineError(f"{slot} raised at {task.job}: {reason(error)}") from error
        # it may be available again soon
        elif isinstance(error, ActorUnavailableError | RayTaskError):
            if not slot.silent and slot.facts is not None:
                slot.silent = slot.doubted = True
                self.say(f"{slot} cannot be reached{self._again(slot)}")
            slot.asked = slot.asked and task is not None
            slot.task = slot.version = None
        elif slot.facts is not None:
            died = isinstance(error, ActorDiedError) and NODE not in str(error)
            self._replace(slot, cause, at_fault=died and not slot.silent)
        else:
            slot.failed += 1
            if CREATION in str(error) or slot.failed > self.retries:
                self._refuse(
                    slot,
                    f"a Ray worker did not start: {reason(error)}; every host needs the "
                    "packages of this process, in its versions",
                    error,
                )
            else:
                self._replace(slot, f"died: {reason(error)}")

    def _sit(self, slot: WorkerSlot, facts: Facts) -> None:
        """Accept a worker that has responded, for the first time or again."""
        began = self.check is not None
        if self.check is not None and slot.facts is None:
            try:
                self.check([facts])
            except ConfigError as error:
                self._refuse(slot, str(error), error)
                return
        if slot.facts is not None:  # workers run one job after another: the earlier job has ended
            self._forget(slot)
        word = "is ready" if slot.facts is None else "answers again"
        slot.facts, slot.asked, slot.silent, slot.failed = facts, False, False, 0
        slot.pulse.quiet = 0.0
        if began:
            self.say(f"{slot} {word}", logging.INFO)

    def _look(self) -> None:
        """Check which workers are silent, respond again, or must be replaced."""
        now = time.monotonic()
        gap, self._looked = min(now - self._looked, 2 * TICK), now
        self.watch()
        there = any(slot.free for slot in self.slots)
        for slot in [*self.slots]:
            if slot.facts is None:
                if not slot.asked:
                    self._ask(slot)
                continue
            silence = slot.pulse.look()
            there |= silence < 1 and slot.task is not None
            if slot.task and now - slot.since > self.timeout:
                self._replace(slot, f"did not answer within {self.timeout:g} s", at_fault=True)
            elif silence * QUIET >= GIVEN_UP or (
                slot.asked and not slot.task and now - slot.since > GIVEN_UP
            ):
                self._replace(slot, f"has been silent for {GIVEN_UP:g} s: another is started")
            elif silence >= 1 and not slot.silent:
                # Others get its task; it may still finish first.
                slot.silent = slot.doubted = True
                self.say(f"{slot} has been silent for {slot.pulse.quiet:.0f} s{self._again(slot)}")
            elif silence < 1 and slot.silent and not slot.asked:
                self._ask(slot)
        self._without = 0.0 if there else self._without + gap
        if self._without > self.wait and self.check is not None:
            raise EngineError(
                f"engine.wait={self.wait:g}: none of {len(self.slots)} workers was ready for "
                "so many seconds. Check the hosts of the cluster (ray status), then resume; "
                "the ledger lists what happened (incidents)"
            )

    def _ask(self, slot: WorkerSlot) -> None:
        """Ask a worker for its facts, which it returns when it is ready."""
        slot.asked, slot.since = True, slot.since if slot.task else time.monotonic()
        self._waits[slot.actor.facts.remote()] = slot, None

    def _replace(self, slot: WorkerSlot, cause: str, *, at_fault: bool = False) -> None:
        """Replace the process of a slot; raise if its job, if at fault, lost too many workers."""
        task = slot.task
        if task is not None and not task.done:
            task.lost += at_fault
            if task.lost > self.retries:
                raise EngineError(
                    f"engine.retries={self.retries}: {slot} {cause}, and no further worker "
                    f"may be lost at the same job ({task.job}). Find out why the job ends "
                    "workers, or raise engine.retries"
                )
        self.say(f"{slot} {cause}{self._again(slot)}")
        self._end(slot)
        self._start(slot)

    def _start(self, slot: WorkerSlot) -> None:
        slot.actor = self.start()
        slot.pulse = self.pulse_of(slot.actor)
        slot.version, slot.facts, slot.silent, slot.doubted = None, None, False, False
        self._ask(slot)

    def _end(self, slot: WorkerSlot) -> None:
        self._forget(slot)
        ray.kill(slot.actor, no_restart=True)

    def _refuse(self, slot: WorkerSlot, text: str, error: Exception) -> None:
        """Drop a worker that cannot work; if none has worked yet, the run cannot begin."""
        if self.check is None or len(self.slots) == 1:
            raise (error if isinstance(error, ConfigError) else EngineError(text)) from error
        self.say(f"{slot} is left out: {text}")
        self._end(slot)
        self.slots.remove(slot)

    def _again(self, slot: WorkerSlot) -> str:
        """Put a worker's task back into the queue, unless it is done or another worker has it."""
        if slot.facts is None:
            return "; its start was run again"
        if slot.task is None or slot.task.done:
            return ""
        if slot.task not in self._queue and not any(
            s.task is slot.task for s in self.slots if s is not slot and not s.silent
        ):
            self._queue.appendleft(slot.task)
        return f"; {slot.task.job} was run again"

    def _forget(self, slot: WorkerSlot) -> None:
        """Ignore all results that a slot still owes."""
        self._waits = {ref: own for ref, own in self._waits.items() if own[0] is not slot}
        slot.task, slot.asked = None, False

    def say(self, text: str, level: int = logging.WARNING) -> None:
        """Record an incident for the ledger, and log it."""
        self.incidents.append(text)
        log.log(level, "%s", text)

    def close(self) -> None:
        """End all processes."""
        for slot in self.slots:
            self._end(slot)
        self.slots = []


def reason(error: Exception) -> str:
    """Return the last line of a Ray error, which contains the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
