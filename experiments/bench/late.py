"""Rounds late in a run: what a round costs once ten, a hundred or a thousand have gone before.

Clients do nothing, so that what is timed is the server's work and files: cohort, messages, merge,
catch-up, ledger, link, checkpoint. Runs that stand at different rounds are timed in turn, since a
machine is not as fast in one minute as in the next.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from fedraclora.clients.engines import in_process
from fedraclora.experiments.bench.runs import ENDLESS, BenchRow, opened, settle, trainer_maker
from fedraclora.experiments.bench.timing import Rows
from fedraclora.experiments.bench.usage import Laps
from fedraclora.experiments.bench.workloads import Case
from fedraclora.run.ledger import column
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.wiring import RoundsBuilder
from fedraclora.training.chunking import plan_chunk

LAP = 10  # rounds that are timed as one, with the checkpoint that they have
STANDING = (10, 100, 1000)  # rounds that are over when the counted ones begin
GRID = {"1k/100": (1_000, 100), "1M/100": (10**6, 100), "1M/1k": (10**6, 1_000)}
GRID |= {"1M/10k": (10**6, 10_000)}  # clients, and how many of them a round asks


def late(case: Case, clients: int, asked: int, round_: int) -> BenchRow:
    """Build a row whose first lap ends with a round; the counted ones come after it.

    Args:
        case: A workload on a device.
        clients: Size of the population.
        asked: Clients of a round.
        round_: A multiple of `LAP`.
    """
    case = replace(case, workload=replace(case.workload, clients=clients, asked=asked))
    method = FedRacLora(rank=case.workload.rank)
    trainer = trainer_maker(case, method, steps=0)()
    state, downlink = opened(method, trainer, asked)
    chunk = plan_chunk("auto", trainer, state.base, downlink, asked).chunk
    loop = LoopConfig(rounds=ENDLESS, clients=clients, cohort=asked, chunk=chunk, seed=0)
    made = tempfile.TemporaryDirectory()
    folder = Path(made.name)
    # Checkpoints come at the end of each start, which is that of a lap.
    recorder = RunRecorder(folder, every=ENDLESS, sync=False)
    parts = {"initial_state": state, "recorder": recorder}
    run = RoundsBuilder(method, trainer, loop, in_process(), **parts).ready()
    run.start(round_ - LAP)
    facts: dict[str, float] = {}

    def lap(laps: Laps) -> None:
        laps.begin()
        run.start(run.strategy.done + LAP)
        settle()
        laps.end()
        laps.wall[-1] /= LAP
        laps.cpu[-1] /= LAP
        lasting = [folder / "ledger.jsonl", *(folder / "chain").iterdir()]
        facts["disk"] = sum(path.stat().st_size for path in lasting) / run.strategy.done
        facts["checkpoint"] = sum(p.stat().st_size for p in (folder / "checkpoint").iterdir())
        facts["catchup"] = float(column(recorder.ledger.rows[-LAP:], "catchup_bytes").mean())

    def close() -> None:
        run.close()
        made.cleanup()

    return BenchRow(lap, facts=facts, close=close)


def named(size: str, round_: int) -> str:
    """Name a row by population and cohort, and the round where it stands."""
    return f"{size}@{round_}"


LATE_BUILDERS = {
    named(size, round_): partial(late, clients=clients, asked=asked, round_=round_)
    for size, (clients, asked) in GRID.items()
    for round_ in STANDING
}


def by_round(rows: Rows, title: str) -> list[dict[str, str]]:
    """Write the table of the workload: a line for each size, a column for each round."""
    records = []
    for size, (clients, asked) in GRID.items():
        if any(named(size, round_) not in rows for round_ in STANDING):
            continue
        first, *_, last = (rows[named(size, round_)] for round_ in STANDING)
        record = {title: f"{clients:,} clients, {asked:,} a round"}
        for round_ in STANDING:
            record[f"CPU s, round {round_:,}"] = f"{rows[named(size, round_)]['cpu_seconds']:.3g}"
        record["last / first"] = f"{last['cpu_seconds'] / first['cpu_seconds']:.3g}"
        for word, row in (("first", first), ("last", last)):
            record[f"peak MB, {word}"] = f"{row['peak_bytes'] / 1e6:.0f}"
        record["kB on disk a round"] = f"{last['facts']['disk'] / 1e3:.3g}"
        record["checkpoint kB"] = f"{last['facts']['checkpoint'] / 1e3:,.0f}"
        record["catch-up MB a round"] = f"{last['facts']['catchup'] / 1e6:.3g}"
        records.append(record)
    return records
