"""Seconds of a round of MiniLM on slow links, and until a target, by method.

``python -m tests.campaigns.slow_links out=DIR [rows=fedavg,...] [rates=1,10,100]``: a deployment
with TLS on a bed of hosts (`tests.hosts`), three nodes with links of so many Mbit/s up and ten
times that down. Bytes and messages of a round are those of the study `STUDY`, its training is one
pair a client: three nodes share the cores of this machine here, so that training is counted apart,
by the processor seconds that the study's runs took. Then the same rounds on the virtual clock
(``system=``). What ``runs.jsonl`` has is not measured again; ``rates=`` alone writes the tables.

Rounds to the target are those of the study: ``deploy`` and ``simulate`` have the same weights.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import numpy as np

from fedraclora.errors import ConfigError
from fedraclora.experiments.overrides import composed
from fedraclora.experiments.simulate import carry_out
from fedraclora.experiments.status import reported
from fedraclora.experiments.tables import Table
from fedraclora.experiments.words import key_values
from fedraclora.plots.comparison import Measured, Panel, bounds_figure
from fedraclora.run.folder import provenance
from fedraclora.run.ledger import read_ledger, round_seconds
from tests.hosts import Bed
from tests.hosts.deployment import Deployment, wait_for

STUDY = Path(__file__).parents[2] / "experiments" / "results" / "leaderboard_minilm"
METRIC, TARGET = "pearson", 0.8
LABELS = {  # of rows of the study
    "fed_rac_lora": "Fed-RAC-LoRA",
    "fed_rac_lora r=32 int8": "Fed-RAC-LoRA, rank 32, int8",
    "warm links of 8": "Fed-RAC-LoRA, links of 8",
    "ffa_lora": "FFA-LoRA",
    "fedavg_lora": "FedAvg-LoRA",
    "fedavg": "FedAvg, all weights",
}
CLIENTS, RATES, DOWN = 3, (100, 10, 1), 10
ROUNDS = {100: 5, 10: 5, 1: 3}
OF_ALL_WEIGHTS = {100: 2, 10: 1, 1: 1}  # at 1 Mbit/s a round takes a quarter of an hour
QUIET = ["data.validation=0.01", "evaluate.split=validation", "evaluate.every=1000"]
QUIET += ["output.progress=false"]  # the server measures on few rows
BRIEF = ["local.steps=1", "local.batch_size=2", *QUIET]
PATIENCE = 3600.0  # seconds of a round: no measure, it ends what hangs
Row = dict[str, object]


def of_study(row: str, phase: str) -> list[Row]:
    """Give the runs of a row of the study."""
    runs = [json.loads(line) for line in (STUDY / "runs.jsonl").read_text().splitlines()]
    return [run for run in runs if run["row"] == row and run["phase"] == phase]


def finals(row: str) -> list[Row]:
    """Give the final runs of a row at the learning rate that was chosen for it."""
    runs = of_study(row, "final")
    chosen = statistics.mode(run["value"] for run in runs)  # another was tried with fewer seeds
    return [run for run in runs if run["value"] == chosen]


def words_of(row: str, more: Sequence[str]) -> list[str]:
    """Give the words of a run of the study, with others in place of its own."""
    mine = {word.partition("=")[0]: word for word in map(str, finals(row)[0]["overrides"])}  # type: ignore[call-overload]
    return [*(mine | {word.partition("=")[0]: word for word in more}).values()]


def rounds_to_target(row: str) -> list[float]:
    """Give the rounds in which each seed meets the target, between evaluations by a straight line.

    Raises:
        ConfigError: If a seed does not.
    """
    found = []
    for run in finals(row):
        curve = [(p["round"], p["metrics"][METRIC]) for p in run["curve"]]  # type: ignore[attr-defined]
        after = next((k for k, (_, y) in enumerate(curve) if y >= TARGET), None)
        if after is None:
            raise ConfigError(f"{row}: a seed of {STUDY.name} does not reach {METRIC} {TARGET}")
        (x0, y0), (x1, y1) = curve[after - 1], curve[after]
        found.append(x0 + (x1 - x0) * (TARGET - y0) / (y1 - y0))
    return found


def on_the_bed(deployment: Deployment, row: str, rates: Sequence[int]) -> Iterator[Row]:
    """Run some rounds at each rate in turn, fastest first; yield what they took."""
    many = OF_ALL_WEIGHTS if row == "fedavg" else ROUNDS
    owners, server = deployment.owners, deployment.server
    for folder in ("run", "there"):
        shutil.rmtree(server.path(folder), ignore_errors=True)

    def bytes_so_far() -> tuple[float, float]:
        sent, received = ([getattr(o, way)() for o in owners] for way in ("sent", "received"))
        return statistics.mean(sent), statistics.mean(received)

    rounds = 1 + sum(many[rate] for rate in rates)
    more = ["clients=3", "engine.chunk=1", *BRIEF, f"rounds={rounds}"]
    link(deployment, rates[0])
    run = deployment.begin(words_of(row, more))
    deployment.until(1, PATIENCE)
    first = deployment.rows()[1]
    for rate in rates:
        link(deployment, rate)
        began, (sent, received) = len(deployment.rows()), bytes_so_far()
        deployment.until(began + many[rate] - 1, PATIENCE)
        now, rows = bytes_so_far(), deployment.rows()[began : began + many[rate]]
        means = {
            key: statistics.mean(float(str(r[key])) for r in rows) / CLIENTS
            for key in ("uplink_bytes", "downlink_bytes", "catchup_bytes", "transport_bytes")
        }
        yield {
            "kind": "bed", "row": row, "rate": rate,
            "seconds": [round(without_measuring(r), 3) for r in rows],
            **means,
            "sent": (now[0] - sent) / len(rows), "received": (now[1] - received) / len(rows),
            "first": {"seconds": without_measuring(first), "catchup_bytes": first["catchup_bytes"]},
            "incidents": [i for r in rows for i in r.get("incidents", ())],  # type: ignore[attr-defined]
            "load": os.getloadavg()[0], **provenance(),
        }  # fmt: skip
    link(deployment, None)
    wait_for(lambda: run.poll() is not None, "the end of the run", PATIENCE)


def without_measuring(row: Mapping[str, object]) -> float:
    """Give the seconds of a round but for those in which the server measures."""
    return round_seconds(row) - float(row["seconds"].get("evaluate", 0.0))  # type: ignore[attr-defined]


def link(deployment: Deployment, rate: int | None) -> None:
    """Limit the links of the nodes; Mbit/s up."""
    for owner in deployment.owners:
        owner.link(*([] if rate is None else [f"{rate}mbit", f"{rate * DOWN}mbit"]))


def simulated(row: str, more: Sequence[str]) -> list[dict[str, object]]:
    """Run in this process; give the ledger."""
    with tempfile.TemporaryDirectory() as made, redirect_stdout(StringIO()):
        folder = Path(made) / "run"
        carry_out(composed([*words_of(row, more), f"output.dir={folder}"]), folder)
        return read_ledger(folder / "ledger.jsonl")


def training(row: str) -> float:
    """Give the processor seconds of a round of one client: the least of the runs that tuned it.

    Two evaluations of a run of twelve rounds are in it: some percent.
    """
    runs = of_study(row, "tune")
    return min(float(str(r["cpu_seconds"])) / int(str(r["rounds"])) / CLIENTS for r in runs)


def on_the_clock(row: str, rate: int) -> Row:
    """Run the rounds of the bed on the virtual clock; without training, which was timed apart."""
    paces = {"uplink": rate / 8, "downlink": rate * DOWN / 8}
    more = [f"+system.{way}={{name: constant, value: {pace}}}" for way, pace in paces.items()]
    clock = [
        float(str(r["virtual_seconds"])) for r in simulated(row, [*more, "rounds=3", *BRIEF])[1:]
    ]
    return {"kind": "clock", "row": row, "rate": rate, "seconds": float(np.diff(clock)[-1])}


class Record:
    """What has been measured, in a file that goes on.

    Args:
        folder: Of the file; made where it is missing.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.file = folder, folder / "runs.jsonl"

    def add(self, row: Row) -> None:
        """Write a row down."""
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["kind"], row["row"], row.get("rate", ""), row["seconds"], flush=True)

    def find(self, kind: str, row: str, rate: int | None = None) -> Row | None:
        """Find the last row of a kind."""
        lines = self.file.read_text().splitlines() if self.file.is_file() else []
        wanted = {"kind": kind, "row": row, **({} if rate is None else {"rate": rate})}
        rows = [r for r in map(json.loads, lines) if wanted.items() <= r.items()]
        return rows[-1] if rows else None

    def median(self, row: str, rate: int) -> float:
        """Give the median seconds of a round on the bed; NaN: not measured."""
        found = self.find("bed", row, rate)
        return statistics.median(found["seconds"]) if found else float("nan")  # type: ignore[arg-type]

    def cells(self) -> list[Row]:
        """Give what was measured on the bed, once for each method and rate."""
        found = (self.find("bed", row, rate) for row in LABELS for rate in RATES)
        return [cell for cell in found if cell]

    def on_the_wire(self) -> float:
        """Give the bytes on a link, over the payload in them; NaN: nothing was measured."""
        found = [float(str(c["sent"])) / float(str(c["uplink_bytes"])) for c in self.cells()]
        return statistics.median(found) if found else float("nan")

    def latency(self) -> float:
        """Give what a round takes beside its bytes: the median of what was measured."""
        found = []
        for cell in self.cells():
            row, rate = str(cell["row"]), int(str(cell["rate"]))
            found.append(self.median(row, rate) - self.on_the_wire() * of_bytes(row, rate))
        return statistics.median(found) if found else float("nan")

    def star(self, row: str, rates: Sequence[int]) -> str:
        """Mark what was not measured at each of these rates."""
        return "" if all(self.find("bed", row, rate) for rate in rates) else " *"

    def seconds(self, row: str, rate: int) -> float:
        """Give the seconds of a round: measured, or those of its bytes and the latency."""
        if self.find("bed", row, rate):
            return self.median(row, rate)
        return self.on_the_wire() * of_bytes(row, rate) + self.latency()


def of_bytes(row: str, rate: int) -> float:
    """Give the seconds that the payload of a client takes, up and then down."""
    run = finals(row)[0]
    rounds, totals = int(str(run["rounds"])), [run["uplink_total"], run["downlink_total"]]
    up, down = (float(str(t)) / CLIENTS * 8e-6 for t in totals)  # the first round sends none down
    return up / rounds / rate + down / (rounds - 1) / rate / DOWN


def table_of_rounds(record: Record) -> Table:
    """Tabulate a round of each method: bytes, training, and seconds at each rate."""
    rows = []
    for row, label in LABELS.items():
        found = [record.find("bed", row, rate) for rate in RATES]
        one: Row = next((f for f in found if f), {})
        columns: Row = {"method": label}
        for name, keys in (
            ("MB up", ["uplink_bytes"]),
            ("with headers", ["sent"]),
            ("MB down", ["downlink_bytes", "catchup_bytes"]),
        ):
            columns[name] = sum(float(str(one.get(key, "nan"))) for key in keys) / 1e6
        columns["training, s"] = training(row)
        for rate in RATES:
            seconds = shown(record.seconds(row, rate))
            columns[f"s a round at {rate} Mbit/s"] = seconds + record.star(row, [rate])
        rows.append(columns)
    note = (
        f"* Not measured: {record.on_the_wire():.3f} of its payload, and {record.latency():.1f} s."
    )
    return Table.of(rows, [note], text=shown)


def table_of_targets(record: Record) -> Table:
    """Tabulate the seconds until the target, by rate."""
    rows = []
    for row, label in LABELS.items():
        rounds = rounds_to_target(row)
        columns: Row = {
            "method": label,
            f"rounds to {TARGET:g}": statistics.mean(rounds),
            "± deviation": statistics.stdev(rounds),
        }
        for rate in RATES:
            seconds = shown(seconds_to_target(record, row, rate))
            columns[f"s to it at {rate} Mbit/s"] = seconds + record.star(row, [rate])
        rows.append(columns)
    return Table.of(rows, text=shown)


def table_of_clocks(record: Record) -> Table:
    """Tabulate how far a round on the virtual clock is from one on the bed, in percent."""
    rows = []
    for row, label in LABELS.items():
        columns: Row = {"method": label}
        for what in ("", " with latency"):
            for rate in RATES:
                found, real = record.find("clock", row, rate), record.median(row, rate)
                key, off = f"{rate} Mbit/s{what}", float("nan")
                if found is not None:
                    seconds = float(str(found["seconds"])) + (record.latency() if what else 0.0)
                    off = 100 * (seconds / real - 1)
                columns[key] = f"{off:+.0f} %" if off == off else None  # noqa: PLR0124
        rows.append(columns)
    return Table.of(rows)


def seconds_to_target(record: Record, row: str, rate: int) -> float:
    """Give rounds to the target times the seconds of a round and of its training."""
    return statistics.mean(rounds_to_target(row)) * (record.seconds(row, rate) + training(row))


def shown(value: object) -> str:
    """Write a number of a table in three digits."""
    if not isinstance(value, float):
        return str(value)
    return "-" if value != value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR0124


def figure(record: Record) -> None:
    """Draw the seconds until the target against the rate."""
    curves = {
        label + record.star(row, RATES): Measured(
            np.array([float(rate) for rate in RATES]),
            np.array([seconds_to_target(record, row, rate) for rate in RATES]),
        )
        for row, label in LABELS.items()
    }
    labels = ("Mbit/s up at a node, ten times that down", f"seconds until {METRIC} {TARGET:g}")
    panel = Panel("", labels, curves, log="xy", marks=True)
    title = "Time to target by bandwidth\n(* in part computed)"
    bounds_figure(title, [panel], 1, record.folder / "slow_links.png")


def report(record: Record) -> None:
    """Write the tables and the figure."""
    for name, table in {
        "rounds": table_of_rounds(record),
        "table": table_of_targets(record),
        "clocks": table_of_clocks(record),
    }.items():
        table.write(record.folder, name)
        print(table.markdown())
    figure(record)


@reported
def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing, and write the tables and the figure."""
    group = key_values(sys.argv[1:] if words is None else words)
    if "out" not in group or group.keys() - {"out", "rows", "rates"}:
        raise ConfigError("slow_links takes out=DIR, rows=NAME,... and rates=NUMBER,...")
    record = Record(Path(str(group["out"])))
    rows = str(group["rows"]).split(",") if "rows" in group else [*LABELS]
    wanted = {int(rate) for rate in str(group.get("rates", "1,10,100")).split(",") if rate}
    if (unknown := {*rows} - LABELS.keys()) or wanted - {*RATES}:
        raise ConfigError(f"rows are {', '.join(LABELS)}, and rates {RATES}; not {unknown}")
    rates = [rate for rate in RATES if rate in wanted]
    missing = {row: [r for r in rates if not record.find("bed", row, r)] for row in rows}
    if any(missing.values()):
        with Bed(1 + CLIENTS) as bed:
            deployment = Deployment(bed)
            for row, mine in missing.items():
                for found in on_the_bed(deployment, row, mine) if mine else ():
                    record.add(found)
    for row in rows:
        for rate in rates:
            if not record.find("clock", row, rate):
                record.add(on_the_clock(row, rate))
    report(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
