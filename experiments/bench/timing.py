"""Times rows against each other: in turn, so that a busy machine slows all of them."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from fedraclora.data.task import Task
from fedraclora.errors import ConfigError
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.experiments.bench.runs import BenchRow
from fedraclora.experiments.bench.usage import Laps, peak, reset_peak, tree_peak

PATIENCE = 60.0  # seconds of counted rounds, after which a slow row stops early
LEAST = 3  # counted rounds of a row, however slow
Figures = dict[str, Any]  # of a row, by name
Rows = Mapping[str, Mapping[str, Any]]
BURST, SHORT = 5, 0.25  # rounds in a row, where one takes less than so many seconds


def figures(
    wall: Sequence[float],
    cpu: Sequence[float],
    peak: int,
    loss: float | None,
    facts: Mapping[str, object],
) -> Figures:
    """Sum up the rounds of a row, the first of which is not counted.

    Args:
        wall: Seconds of each round.
        cpu: CPU seconds of each round, over all processes of the row.
        peak: Bytes: largest resident size in a round, summed over the processes of the row. On a
            GPU: the most that PyTorch held there.
        loss: Training loss of the final weights where rows must agree on it.
        facts: Whatever else the row says of itself.

    Returns:
        ``seconds`` and ``cpu_seconds``, medians of a counted round; ``peak_bytes``; ``rounds``,
        those that are counted; ``first_seconds``; ``load``, the load average at the end: above the
        row's own processes, distrust seconds; ``loss`` and ``facts`` where there are any.
    """
    found: Figures = {
        "seconds": statistics.median(wall[1:]),
        "cpu_seconds": statistics.median(cpu[1:]),
        "peak_bytes": peak,
        "rounds": len(wall) - 1,
        "first_seconds": wall[0],
        "load": os.getloadavg()[0],
    }
    known = {"loss": loss, "facts": facts or None}
    return found | {key: value for key, value in known.items() if value is not None}


def interleaved(
    rows: Mapping[str, BenchRow],
    rounds: int,
    loss: Callable[[dict[str, torch.Tensor]], float],
    device: torch.device,
) -> dict[str, Figures]:
    """Time each row for ``rounds`` rounds, in turn, after one round that does not count.

    Args:
        rows: Rows by name.
        rounds: Counted rounds. A row that is held against others by its loss makes all of them;
            any other stops once it has used up a minute.
        loss: Training loss of weights.
        device: Whose memory is looked at.

    Returns:
        What each row came to; see `figures`. Fact ``flops``: operations of the matrix products of
        a round, where it runs in this process.
    """
    laps = {name: Laps(children=row.workers is not None) for name, row in rows.items()}
    peaks, flops = dict.fromkeys(rows, 0), dict.fromkeys(rows, 0)
    while todo := [n for n, row in rows.items() if not done(laps[n], rounds, row)]:
        for name in todo:
            row, lap = rows[name], laps[name]
            # Short rounds come in bursts: caches are warm in a run, which is what is timed.
            burst = 1 if not lap.wall or lap.wall[-1] > SHORT else BURST
            restart_peak(device)
            if not lap.wall and row.workers is None:  # the round that does not count
                flops[name] = counted(row, lap)
                continue
            for _ in range(min(burst, rounds + 1 - len(lap.wall))):
                row.round(lap)
            peaks[name] = max(peaks[name], peak_of(row, device))
    found = {}
    for name, row in rows.items():
        final = None if row.weights is None else loss(row.weights())
        facts = {**row.facts, "flops": flops[name]} if flops[name] else row.facts
        found[name] = figures(laps[name].wall, laps[name].cpu, peaks[name], final, facts)
    return found


def counted(row: BenchRow, lap: Laps) -> int:
    """Run a round of this process; floating-point operations of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        row.round(lap)
    return int(counter.get_total_flops())


def restart_peak(device: torch.device) -> None:
    """Reset the peak of memory to what is allocated now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        reset_peak()


def peak_of(row: BenchRow, device: torch.device) -> int:
    """Bytes: the peak since `restart_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return tree_peak(row.workers()) if row.workers else peak()


def done(laps: Laps, rounds: int, row: BenchRow) -> bool:
    """Return whether a row has made its rounds, or so slowly that some of them must do."""
    counted = laps.wall[1:]
    slow = len(counted) >= LEAST and sum(counted) > PATIENCE and row.weights is None
    return slow or len(counted) >= rounds


def training_loss(task: Task, weights: Mapping[str, torch.Tensor]) -> float:
    """Mean loss of weights over the samples of all clients."""
    owner = next(task.model.parameters())
    moved = {name: weight.to(owner) for name, weight in weights.items()}
    if (found := task.train.table) is None:
        raise ConfigError("the loss of virtual clients cannot be compared")
    samples, _ = found
    return evaluate(task.model, moved, samples, task.loss, ("loss",), batch_size=8192)["loss"]
