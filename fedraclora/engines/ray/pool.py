"""Resident workers that pull jobs; one that dies or hangs is replaced, and its job run again."""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from fedraclora.errors import EngineError

log = logging.getLogger(__name__)

CREATION = "creation task"  # how Ray says that a worker's own start raised
Job = TypeVar("Job")


@dataclass
class Seat:
    """A worker's place in the pool; its process may change.

    Attributes:
        number: From 0.
        actor: The process that sits in it.
        version: Version of the base weights that it is known to hold, or None.
    """

    number: int
    actor: Any
    version: int | None = None


@dataclass
class Running(Generic[Job]):
    """A job that a worker is at."""

    seat: Seat
    job: Job
    since: float


class WorkerPool:
    """Workers, each of them one process.

    Args:
        start: Starts a process and gives its handle.
        workers: Processes.
        retries: Workers that may be lost within one call of `run`.
        timeout: Seconds after which a worker that is at one job counts as hung.

    Attributes:
        incidents: Workers that were lost and replaced: one sentence each.
    """

    def __init__(
        self, start: Callable[[], Any], workers: int, retries: int, timeout: float
    ) -> None:
        self.start, self.retries, self.timeout = start, retries, timeout
        self.incidents: list[str] = []
        self.seats = [Seat(i, start()) for i in range(workers)]

    def facts(self, timeout: float = 300.0) -> list[dict[str, str]]:
        """Wait until every worker is ready; give what each says about itself.

        Raises:
            EngineError: If one did not start, with the reason.
        """
        found: list[dict[str, str]] = []
        lost = 0
        while len(found) < len(self.seats):
            seat = self.seats[len(found)]
            try:
                found.append(ray.get(seat.actor.facts.remote(), timeout=timeout))
            except GetTimeoutError as error:
                raise EngineError(
                    f"worker {seat.number} of {len(self.seats)} was not ready after {timeout:g} s; "
                    "lower engine.workers; on a cluster Ray's log says more"
                ) from error
            except RayError as error:
                lost += 1
                if CREATION in str(error) or lost > self.retries:
                    raise EngineError(
                        f"a Ray worker did not start: {reason(error)}; every node needs this "
                        "project and its packages, in the versions of this process"
                    ) from error
                self._replace(seat, f"worker {seat.number} died: {reason(error)}", "its start")
        return found

    def run(
        self, jobs: Sequence[Job], submit: Callable[[Seat, Job], Any], limit: float | None
    ) -> Iterator[tuple[Job, Seat, Any]]:
        """Run jobs, in any order.

        Args:
            jobs: What to do.
            submit: Hands a job to the worker of a seat; gives the reference of its answer.
            limit: Seconds for all jobs, or None; those not done by then yield nothing.

        Yields:
            The job, the seat that did it, and the answer.

        Raises:
            EngineError: If more workers were lost than `retries`, or one raised.
        """
        queue, free = deque(jobs), deque(self.seats)
        running: dict[Any, Running[Job]] = {}
        end = time.monotonic() + limit if limit is not None else float("inf")
        lost = 0
        try:
            while (queue or running) and time.monotonic() < end:
                while queue and free:
                    seat, job = free.popleft(), queue.popleft()
                    running[submit(seat, job)] = Running(seat, job, time.monotonic())
                oldest = min(r.since for r in running.values()) + self.timeout
                wait = max(0.0, min(oldest, end) - time.monotonic())
                done, _ = ray.wait(list(running), num_returns=1, timeout=wait)
                late = time.monotonic() - self.timeout
                for ref in done or [ref for ref, task in running.items() if task.since < late]:
                    task = running.pop(ref)
                    free.append(task.seat)
                    cause = f"did not answer within {self.timeout:g} s"
                    if done:
                        try:
                            answer = ray.get(ref)
                        except RayTaskError as error:  # another worker would raise it, too
                            raise EngineError(
                                f"worker {task.seat.number} raised at {task.job}: {reason(error)}"
                            ) from error
                        except RayError as error:  # its process, its node, or what it answered
                            cause = f"was lost: {reason(error)}"
                        else:
                            yield task.job, task.seat, answer
                            continue
                    lost += 1
                    if lost > self.retries:
                        raise EngineError(
                            f"worker {task.seat.number} {cause}; engine.retries={self.retries} "
                            f"allows no further loss in a round. It was at {task.job}"
                        )
                    self._replace(task.seat, f"worker {task.seat.number} {cause}", task.job)
                    queue.appendleft(task.job)
        except KeyboardInterrupt:  # the run ends: nothing new is started
            running.clear()
            raise
        finally:
            for task in running.values():  # out of time, or an error: nobody waits for these
                self._replace(task.seat, f"worker {task.seat.number} was given up", task.job)

    def _replace(self, seat: Seat, text: str, job: object) -> None:
        """Put a fresh process into a seat."""
        self.incidents.append(f"{text}; {job} was run again")
        log.warning("%s", self.incidents[-1])
        ray.kill(seat.actor, no_restart=True)
        seat.actor, seat.version = self.start(), None

    def close(self) -> None:
        """End all processes."""
        for seat in self.seats:
            ray.kill(seat.actor, no_restart=True)
        self.seats = []


def reason(error: Exception) -> str:
    """Extract the last line of an error of Ray's, which has the cause."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
