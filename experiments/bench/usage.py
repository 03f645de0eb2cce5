"""CPU time and memory of a process and of all its descendants (Linux; standard library only).

The peers run this file in their own environments, so it must not import ours.
"""

from __future__ import annotations

import os
import time
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path

TICK = os.sysconf("SC_CLK_TCK")
PROC = Path("/proc")


def descendants(top: int | None = None) -> list[int]:
    """List the ids of the living descendants of a process; of this one by default."""
    children: dict[int, list[int]] = {}
    for name in filter(str.isdigit, os.listdir(PROC)):  # noqa: PTH208  iterdir is slower
        if fields := _stat(int(name)):
            children.setdefault(int(fields[1]), []).append(int(name))
    found = [*children.get(top or os.getpid(), [])]
    for pid in found:  # grows while it is read
        found += children.get(pid, [])
    return found


def cpu(pid: int) -> float:
    """CPU seconds used so far by a living process, without those that it started."""
    # The clock of another process, as clock_getcpuclockid(3) makes its number.
    return time.clock_gettime((~pid << 3) | 2)


def children_cpu() -> float:
    """CPU seconds used so far by the descendants of this process.

    Living processes are read by their CPU clock, in nanoseconds; those that have ended and were
    waited for are known by the kernel's clock tick only (10 ms).
    """
    times = os.times()
    total = times.children_user + times.children_system
    for pid in descendants():
        fields = _stat(pid)
        try:
            total += cpu(pid)
        except OSError:  # it has just ended
            continue
        total += sum(int(ticks) for ticks in fields[13:15]) / TICK
    return total


def tree_peak(workers: Collection[int] | None = None) -> int:
    """Bytes: the peak resident size of this process and each living descendant, summed up.

    Args:
        workers: Of Ray's worker processes, count these alone: others are other rows' or idle.
    """
    pids = [os.getpid(), *descendants()]
    if workers is not None:
        pids = [p for p in pids if p in workers or not _read(p, "cmdline").startswith("ray::")]
    return sum(peak(pid) for pid in pids)


def reset_peak() -> None:
    """Reset the peak of this process's memory to what it uses now."""
    (PROC / "self" / "clear_refs").write_text("5")


def peak(pid: int | None = None) -> int:
    """Bytes: the peak resident size of a process, this one unless named; 0 if it has ended."""
    pid = os.getpid() if pid is None else pid
    lines = _read(pid, "status").splitlines()
    sizes = [int(line.split()[1]) for line in lines if line.startswith("VmHWM:")]
    return 1024 * sum(sizes)  # none for a process that has ended, or is ending


def _read(pid: int, name: str) -> str:
    """Read a file of ``/proc/PID``; it is empty if the process has ended."""
    try:
        return (PROC / str(pid) / name).read_text(errors="replace")
    except OSError:
        return ""


def _stat(pid: int) -> list[str]:
    """Fields of ``/proc/PID/stat`` from the state on."""
    return _read(pid, "stat").rpartition(")")[2].split()


@dataclass
class Laps:
    """Wall and CPU seconds of rounds, in this process and, where asked for, its descendants.

    What the reading costs lies between the rounds.

    Attributes:
        children: Whether to read descendants, too.
        wall: Seconds of each round.
        cpu: CPU seconds of each round.
    """

    children: bool = True
    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    _began: tuple[float, float] = (0.0, 0.0)

    def begin(self) -> None:
        """Begin a round."""
        others = children_cpu() if self.children else 0.0
        self._began = time.perf_counter(), others + time.process_time()

    def end(self) -> None:
        """End the round."""
        wall, cpu = time.perf_counter(), time.process_time()
        others = children_cpu() if self.children else 0.0
        self.wall.append(wall - self._began[0])
        self.cpu.append(cpu + others - self._began[1])
