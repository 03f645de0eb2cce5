"""``python -m tests.campaigns.ray_hosts``: hosts of a Ray cluster are lost, and a run goes on.

Three hosts of a bed (network namespaces) make a cluster. A run goes over it, and while it goes a
host is killed, cut off, stopped, or comes back; the head is killed in a run of its own, which is
gone on with on another cluster. The digests must be those of one process without faults. Of each
fault the table has what it cost: the longest of the rounds after it, less the usual one.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ray
import torch
from rich.table import Table

from fedraclora.engines.ray.pulse import TICK, LivenessPoller, places_of
from fedraclora.errors import FedRacLoraError
from fedraclora.experiments.hosts import Bed, Host, Process, why_not
from fedraclora.run.ledger import Row, read_ledger, round_seconds
from fedraclora.terminal.progress import console_for_tables
from fedraclora.weights.files import load_checkpoint
from tests.campaigns.kill_resume import finish
from tests.campaigns.kill_workers import JOB, WORKER

HERE = "tests.campaigns.ray_hosts"
PACE = "FEDRACLORA_TEST_PACE"  # seconds that a batch takes
PORT = 6379
RAY = str(Path(sys.executable).parent / "ray")
START = (RAY, "start", "--block", "--disable-usage-stats", "--object-store-memory=100000000")
PYTHON = [sys.executable, "-m", "fedraclora.commands.cli", "simulate"]
# On a busy machine a raylet takes longer than Ray waits. The hosts share memory, with others, too.
ENV = {"RAY_raylet_start_wait_time_s": "300", "RAY_memory_monitor_refresh_ms": "0"}
ENV |= {"RAY_USAGE_STATS_ENABLED": "0"}
WHOLE = """if True:
    import ray, sys, time
    ray.init(sys.argv[1], logging_level="ERROR", log_to_driver=False)
    while ray.cluster_resources().get("CPU", 0) < int(sys.argv[2]): time.sleep(0.2)
"""
PATIENCE = 900.0  # seconds for what must come


@dataclass
class Cost:
    """One fault: what the usual round took before it, the longest after it, and what was told."""

    fault: str
    usual: float
    longest: float
    told: list[str]


class Run:
    """A run on a bed's cluster, with one CPU on the head's host and two on each other one.

    Args:
        bed: Of hosts, whose cluster is started.
        driver: Which host the run is started on.
        rounds: Of the job.
        more: What it has besides.
        resume: Whether it goes on.
    """

    def __init__(
        self, bed: Bed, driver: int, rounds: int, *more: str, resume: bool = False
    ) -> None:
        self.bed, self.host = bed, bed[driver]
        self.folder = self.host.path("run")
        address = f"engine.address={bed[0].address}:{PORT}"
        words = ["output.dir=/tmp/home/run", "output.sync=false", f"rounds={rounds}", address]
        if resume:
            words = ["resume=/tmp/home/run", "engine=ray", "engine.chunk=5", address]
        else:
            words = [*job(rounds), "engine=ray", "engine.chunk=5", *words, *more]
        self.said = self.host.path("run.log").open("a")
        streams = {"stdout": self.said, "stderr": self.said}
        self.process: Process = self.host.popen([*PYTHON, *words], env=ENV, **streams)

    @property
    def rows(self) -> list[Row]:
        """The rows of the ledger so far."""
        with suppress(FedRacLoraError, OSError):  # a line is being written
            return read_ledger(self.folder / "ledger.jsonl")
        return []

    def until(self, true: Callable[[], bool]) -> bool:
        """Wait until something is true; False if the run ends first."""
        end = time.monotonic() + PATIENCE
        while not true():
            if self.process.poll() is not None or time.monotonic() > end:
                return False
            time.sleep(0.2)
        return True

    def told(self, since: int) -> list[str]:
        """What the ledger says of incidents since a row."""
        return [str(i) for row in self.rows[since:] for i in row.get("incidents", ())]  # type: ignore[attr-defined]

    def suffer(self, name: str) -> Cost | None:
        """Let one fault happen, wait for its end and some rounds more; None if the run ended."""
        before = len(self.rows)
        if not self.until(lambda: len(self.rows) >= before + 6):
            return None
        began = len(self.rows)
        FAULTS[name](self)
        if not self.until(lambda: len(self.rows) >= began + 6):
            return None
        taken = [round_seconds(row) for row in self.rows]
        usual = statistics.median(taken[max(1, began - 20) : began])
        return Cost(name, usual, max(taken[began:]), self.told(began))


def job(rounds: int) -> list[str]:
    """Rounds of eight chunks."""
    words = [word for word in JOB if not word.startswith(("rounds", "engine"))]
    return [*words, f"data.loss={__name__.replace('__main__', HERE)}:paced", f"rounds={rounds}"]


def paced(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The usual loss, of a model that takes its time on a cluster's workers, and no processor."""
    time.sleep(float(os.environ.get(PACE, "0")))
    return torch.nn.functional.cross_entropy(outputs, targets, reduction="none")


def processes(host: Host, name: bytes) -> list[int]:
    """Give the processes of a host whose command begins with a name."""
    found, own = [], Path(f"/proc/{host.inside.pid}/ns/net").readlink()
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            command = (entry / "cmdline").read_bytes()
            if name in command.split(b"\0")[0] and (entry / "ns/net").readlink() == own:
                found.append(int(entry.name))
    return sorted(found)


def join(bed: Bed, k: int, cpus: int = 2) -> None:
    """Start Ray on a host that joins the head's cluster."""
    words = [f"--node-ip-address={bed[k].address}", f"--num-cpus={cpus}"]
    where = ["--head", f"--port={PORT}", "--include-dashboard=false"]
    if k:
        where = [f"--address={bed[0].address}:{PORT}"]
    said = bed[k].path("ray").open("a")
    bed[k].popen([*START, *words, *where], env={**ENV, PACE: "0.1"}, stdout=said, stderr=said)


def begin(bed: Bed, cores: Sequence[int]) -> None:
    """Start the cluster, and wait until it is whole."""
    address = f"{bed[0].address}:{PORT}"
    for k, cpus in enumerate(cores):
        words = [sys.executable, "-c", WHOLE, address, str(sum(cores[: k + 1]))]
        end = time.monotonic() + PATIENCE
        while True:
            join(bed, k, cpus)
            try:
                bed[0].run(words, timeout=200, env=ENV)
                break
            except subprocess.SubprocessError:  # on a busy machine a start may fail
                if time.monotonic() > end:
                    raise
                bed[k].kill()


def cut(seconds: float) -> Callable[[Run], None]:
    """Cut the link of host 1 for so long."""

    def fault(run: Run) -> None:
        run.bed[1].cut()
        run.until(hold(seconds))
        run.bed[1].heal()
        if seconds > 20:
            back(run)

    return fault


def hold(seconds: float) -> Callable[[], bool]:
    """Be true after so long."""
    end = time.monotonic() + seconds
    return lambda: time.monotonic() > end


def back(run: Run) -> None:
    """Wait until the last that the ledger says of each worker is that it is there.

    Where Ray has given host 1 up, its processes there end themselves, and it is started again.
    """

    def there() -> bool:
        if not processes(run.bed[1], b"raylet"):
            join(run.bed, 1)
            run.until(hold(20))
        last = {told.split()[1]: told for told in run.told(0) if told.startswith("worker")}
        return all("answers again" in t or "is ready" in t for t in last.values())

    run.until(hold(8))
    run.until(there)


def kill(run: Run) -> None:
    """Kill all processes of host 1; Ray is started there again later."""
    run.bed[1].kill()
    run.until(hold(12))
    back(run)


def stop(name: bytes, seconds: float) -> Callable[[Run], None]:
    """Stop a process of host 1 for so long; empty: all of them."""

    def fault(run: Run) -> None:
        pids = processes(run.bed[1], name)[: 1 if name else None]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)
        run.until(hold(seconds))
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        back(run)

    return fault


def slow(run: Run) -> None:
    """Limit the link of host 1."""
    run.bed[1].link("1mbit", "1mbit")
    run.until(hold(10))
    run.bed[1].link()


def late(run: Run) -> None:
    """Let another host join, and wait for its workers."""
    join(run.bed, 3)
    run.until(lambda: sum(run.bed[3].address in told for told in run.told(0)) == 2)


FAULTS: dict[str, Callable[[Run], None]] = {
    "nothing": lambda run: None,
    "link of 1 Mbit/s 10 s": slow,
    "another host joins": late,
    "link cut 5 s": cut(5),
    "link cut 30 s": cut(30),
    "worker stopped 20 s": stop(WORKER, 20),
    "worker stopped 90 s": stop(WORKER, 90),
    "raylet stopped 20 s": stop(b"raylet", 20),
    "host stopped 20 s": stop(b"", 20),
    "host killed, joins 20 s later": kill,
    "link cut 90 s, joins": cut(90),
}


@contextmanager
def cluster(cores: Sequence[int] = (1, 2, 2)) -> Iterator[Bed]:
    """Start a bed with a cluster on it, and one host besides that has not joined it."""
    with Bed(len(cores) + 1) as bed:
        begin(bed, cores)
        yield bed


def lose_the_head(rounds: int, driver: int, *, together: bool) -> tuple[str, dict[str, str]]:
    """Kill Ray on the head's host, or all that is there; give what was left, and the last digests.

    The run goes on with another cluster, whose hosts have other addresses.
    """
    with cluster() as bed:
        run = Run(bed, driver, rounds)
        run.until(lambda: len(run.rows) > 12)  # the first checkpoint is that of round 10
        began, at = time.monotonic(), len(run.rows) - 1
        if together:
            bed[0].kill()
        for pid in (*processes(bed[0], b"gcs_server"), *processes(bed[0], b"raylet")):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        run.process.wait(PATIENCE)
        words = (run.host.path("run.log").read_text().splitlines() or [""])[-1]
        left = (
            f"killed in round {at + 1}: status {run.process.returncode} after "
            f"{time.monotonic() - began:.0f} s, {len(run.rows) - 1} rounds in the ledger, a "
            f"checkpoint of round {load_checkpoint(run.folder / 'checkpoint')[1]['round']}: {words}"
        )
        kept = run.folder.rename(Path(tempfile.gettempdir()) / f"h{os.getpid()}")
        for host in bed:
            host.kill()
        with cluster() as new:  # the old bed holds its addresses
            kept.rename(new[driver].path("run"))
            run = Run(new, driver, rounds, resume=True)
            return left, finish(run.process, run.folder)  # type: ignore[arg-type]


def traffic(rounds: int) -> tuple[Table, str]:
    """Count what passes a link in rounds that are all trained behind it, beside the ledger."""
    table = Table("rounds", "to the host, kB", "from it, kB", "ledger: down, kB", "up, kB")
    with cluster((0, 2)) as bed:
        host = bed[1]

        def counts() -> list[float]:
            return [host.received() / 1e3, host.sent() / 1e3]

        first, began = counts(), time.monotonic()
        time.sleep(20)
        idle = [(b - a) / (time.monotonic() - began) for a, b in zip(first, counts(), strict=True)]
        run, marks = Run(bed, 0, rounds, "model.hidden=[512]"), {-1: (time.monotonic(), counts())}
        for mark in (0, 1, 2, rounds // 2, rounds):
            if run.until(lambda mark=mark: len(run.rows) > mark):  # type: ignore[misc]
                marks[len(run.rows) - 1] = time.monotonic(), counts()
        run.process.wait(PATIENCE)
        last, rows = -1, run.rows
        for mark in [*marks][1:]:
            seconds = marks[mark][0] - marks[last][0]
            pairs = zip(marks[last][1], marks[mark][1], idle, strict=True)
            passed = [b - a - seconds * each for a, b, each in pairs]
            ledger = [
                (float(rows[mark][key]) - float(rows[max(0, last)][key])) / 1e3  # type: ignore[arg-type]
                for key in ("downlink_total", "uplink_total")
            ]
            which = f"{last + 1} to {mark}"
            table.add_row(which, *(f"{number:,.0f}" for number in (*passed, *ledger)))
            last = mark
    return table, f"Ray alone, kB a second: {idle[0]:.1f} to the host, {idle[1]:.1f} from it"


def heartbeat(seconds: float = 60) -> str:
    """Measure processor seconds that looks at workers cost here and there, beside none."""
    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    workers = [Resting.remote() for _ in range(8)]
    found = []
    for pulses in [], [LivenessPoller(partial(places_of, worker)) for worker in workers]:
        began = [time.process_time(), *ray.get([w.seconds.remote() for w in workers])]
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            for pulse in pulses:
                pulse.look()
            time.sleep(TICK)
        ended = [time.process_time(), *ray.get([w.seconds.remote() for w in workers])]
        taken = [(b - a) * 60 / seconds for a, b in zip(began, ended, strict=True)]
        found.append((taken[0] / len(workers), sum(taken[1:]) / len(workers)))
    ray.shutdown()
    (run, worker), (looked, seen) = found
    return (
        f"processor seconds a minute and worker: the run's process {looked:.3f} ({run:.3f} "
        f"without looks), the worker {seen:.3f} ({worker:.3f})"
    )


@ray.remote(num_cpus=0)
class Resting:
    """A worker that does nothing."""

    def seconds(self) -> float:
        """Give the processor seconds of its process."""
        return time.process_time()


def main(words: Sequence[str] | None = None) -> int:
    """Run the faults; status 1 if a digest differs."""
    parser = argparse.ArgumentParser(description=str(__doc__).split("\n", maxsplit=1)[0])
    parser.add_argument("--faults", nargs="*", default=[*FAULTS], choices=FAULTS)
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--driver", type=int, default=0, help="the host that the run is on")
    parser.add_argument("--head", choices=["ray", "host"], help="what of the head's host to kill")
    parser.add_argument("--bytes", action="store_true", help="count what passes a link")
    parser.add_argument("--heartbeat", action="store_true", help="what looks at workers cost")
    asked = parser.parse_args(words)
    if reason := why_not():
        print(reason)
        return 1
    console = console_for_tables()
    if asked.heartbeat:
        print(heartbeat())
        return 0
    if asked.bytes:
        table, idle = traffic(asked.rounds)
        console.print(table)
        print(idle)
        return 0
    with Bed(1) as bed:
        alone = [*PYTHON, *job(asked.rounds), "engine=vectorized", "engine.chunk=5"]
        process = bed[0].popen([*alone, "output.dir=/tmp/home/run"], stdout=subprocess.DEVNULL)
        wanted = finish(process, bed[0].path("run"))  # type: ignore[arg-type]
    if asked.head:
        left, found = lose_the_head(asked.rounds, asked.driver, together=asked.head == "host")
        console.print(f"run on host {asked.driver}, {left}")
        console.print("gone on with: same digests" if found == wanted else "DIFFERENT digests")
        return 0 if found == wanted else 1
    with cluster() as bed:
        run = Run(bed, asked.driver, asked.rounds)
        table = Table("fault", "usual round, s", "longest, s", "lost, s", "the ledger says")
        for name in asked.faults:
            cost = run.suffer(name)
            if cost is None:
                table.add_row(name, "the run ended before")
                break
            numbers = cost.usual, cost.longest, cost.longest - cost.usual
            table.add_row(name, *(f"{n:.1f}" for n in numbers), "\n".join(cost.told))
            print(name, *numbers, *cost.told, sep="\n  ", flush=True)
        same = finish(run.process, run.folder) == wanted  # type: ignore[arg-type]
        console.print(table)
        console.print("same digests" if same else "DIFFERENT digests")
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
