"""Seconds of a round of MiniLM on slow links, and until a target, by method.

    python -m fedraclora.experiments.slow_links out=DIR [rows=fedavg,...] [rates=1,10,100]

A deployment with TLS on a bed of hosts (`fedraclora.experiments.hosts`), three nodes with links of
so many Mbit/s up and ten times that down. Bytes and messages of a round are those of the study
`STUDY`, its training is one pair a client: three nodes share the cores of this machine here, so
that training is counted apart, by the processor seconds that the study's runs took. Then the same
rounds on the virtual clock (``system=``). What ``runs.jsonl`` has is not measured again; ``rates=``
alone writes the tables.

Instead of that, ``whole=RATE`` runs the study's own run of each of the rows until its target.

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

from fedraclora.commands import RESULTS
from fedraclora.commands.status import reported
from fedraclora.compose.overrides import composed
from fedraclora.compose.words import key_values
from fedraclora.config.run_config import from_plain
from fedraclora.errors import ConfigError
from fedraclora.experiments.hosts import Bed
from fedraclora.experiments.hosts.deployment import Deployment, wait_for
from fedraclora.launch import run_shown
from fedraclora.plots.axes import COLOURS, label_axes, make_logarithmic, new_figure, write_png
from fedraclora.run import packed
from fedraclora.run.folder import provenance
from fedraclora.run.ledger import read_ledger, round_seconds
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.terminal.tables import TextTable

STUDY = RESULTS / "leaderboard_minilm"
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
ROUNDS = {100: 8, 10: 8, 1: 5}
OF_ALL_WEIGHTS = {100: 5, 10: 3, 1: 1}  # at 1 Mbit/s a round takes a quarter of an hour
QUIET = ["data.validation=0.01", "evaluate.split=validation", "evaluate.every=1000"]
QUIET += ["output.progress=false"]  # the server measures on few rows
BRIEF = ["local.steps=1", "local.batch_size=2", *QUIET]
# Of a link's bytes TCP, IP and Ethernet take 66 of 1,514, and TLS 22 of 16,406.
PAYLOAD = 1448 / 1514 * 16384 / 16406
FITTED = ("fed_rac_lora", 100)  # the cell by which the clock gets its latency
PATIENCE = 3600.0  # seconds of a round: no measure, it ends what hangs
Row = dict[str, object]


def of_study(row: str, phase: str) -> list[Row]:
    """Give the runs of a row of the study."""
    runs = [json.loads(line) for line in packed.read_text(STUDY / "runs.jsonl").splitlines()]
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
        began, (sent, received) = len(deployment.rows()), bytes_so_far()
        link(deployment, rate)
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
            "incidents": what_went_wrong(rows),
            "load": os.getloadavg()[0], **provenance(),
        }  # fmt: skip
    link(deployment, None)
    wait_for(lambda: run.poll() is not None, "the end of the run", PATIENCE)


def without_measuring(row: Mapping[str, object]) -> float:
    """Give the seconds of a round but for those in which the server measures."""
    return round_seconds(row) - float(row["seconds"].get("evaluate", 0.0))  # type: ignore[attr-defined]


def whole(deployment: Deployment, row: str, rate: int) -> Row:
    """Run the first of the study's runs of a row until its target; give seconds by round."""
    for folder in ("run", "there"):
        shutil.rmtree(deployment.server.path(folder), ignore_errors=True)
    link(deployment, rate)
    words = words_of(row, ["clients=3", "engine.chunk=1", "output.progress=false"])
    run = deployment.begin(words)
    curve = {p["round"]: p["metrics"][METRIC] for p in finals(row)[0]["curve"]}  # type: ignore[attr-defined]
    deployment.until(min(k for k, y in curve.items() if y >= TARGET), PATIENCE)
    rows = deployment.rows()[1:]
    run.terminate()
    mine = {r["round"]: r["metrics"][METRIC] for r in rows if r["metrics"]}  # type: ignore[index]
    return {
        "kind": "whole", "row": row, "rate": rate,
        "seconds": [round(without_measuring(r), 3) for r in rows],
        "curve": mine, "study": {k: curve[k] for k in mine}, "cores": os.cpu_count() or 1,
        "incidents": what_went_wrong(rows), "load": os.getloadavg()[0], **provenance(),
    }  # fmt: skip


def what_went_wrong(rows: Sequence[Mapping[str, object]]) -> list[object]:
    """Give the incidents and failures of some rounds."""
    return [i for r in rows for key in ("incidents", "failures") for i in r.get(key, ())]  # type: ignore[attr-defined]


def link(deployment: Deployment, rate: int | None) -> None:
    """Limit the links of the nodes; Mbit/s up."""
    for owner in deployment.owners:
        owner.link(*([] if rate is None else [f"{rate}mbit", f"{rate * DOWN}mbit"]))


def in_process(row: str, more: Sequence[str]) -> list[dict[str, object]]:
    """Run in this process; give the ledger."""
    with tempfile.TemporaryDirectory() as made, redirect_stdout(StringIO()):
        folder = Path(made) / "run"
        plain = composed([*words_of(row, more), f"output.dir={folder}"])
        run_shown(RunBuilder(from_plain(plain, METHODS), folder))
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
        float(str(r["virtual_seconds"])) for r in in_process(row, [*more, "rounds=3", *BRIEF])[1:]
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
        packed.decompress(self.file)
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row["kind"], row["row"], row.get("rate", ""), row["seconds"], flush=True)

    def find(self, kind: str, row: str = "", rate: int | None = None) -> Row | None:
        """Find the last row of a kind."""
        lines = packed.read_text(self.file).splitlines() if packed.exists(self.file) else []
        wanted: Row = {"kind": kind, **({"row": row} if row else {})}
        wanted |= {} if rate is None else {"rate": rate}
        rows = [r for r in map(json.loads, lines) if wanted.items() <= r.items()]
        return rows[-1] if rows else None

    def median(self, row: str, rate: int) -> float:
        """Give the median seconds of a round on the bed; NaN: not measured.

        In the first round, of several, the links changed.
        """
        if (found := self.find("bed", row, rate)) is None:
            return float("nan")
        seconds: list[float] = found["seconds"]  # type: ignore[assignment]
        return statistics.median(seconds[1:] or seconds)

    def clock(self, row: str, rate: int) -> float:
        """Give the seconds of a round on the virtual clock, with a link's share of payload.

        Its seconds are those of bytes alone: a smaller pace is as good as a division. NaN: not run.
        """
        found = self.find("clock", row, rate)
        return float(str(found["seconds"])) / PAYLOAD if found else float("nan")

    def seconds(self, row: str, rate: int) -> tuple[float, str]:
        """Give the seconds of a round; with a star where they are computed.

        They are those of its bytes, and of what a round on the links before took beside its bytes.
        """
        if self.find("bed", row, rate):
            return self.median(row, rate), ""
        before = RATES[RATES.index(rate) - 1]
        beside = self.median(row, before) - self.clock(row, before)
        return self.clock(row, rate) + beside, " *"

    def latency(self) -> float:
        """Give what a round takes beside its bytes, by one cell."""
        return self.median(*FITTED) - self.clock(*FITTED)


def table_of_rounds(record: Record) -> TextTable:
    """Tabulate a round of each method: bytes, training, and seconds at each rate."""
    rows = []
    for row, label in LABELS.items():
        one = record.find("bed", row, RATES[1]) or {}
        columns: Row = {"method": label}
        for name, keys in (
            ("MB up", ["uplink_bytes"]),
            ("with headers", ["sent"]),
            ("MB down", ["downlink_bytes", "catchup_bytes"]),
        ):
            columns[name] = sum(float(str(one.get(key, "nan"))) for key in keys) / 1e6
        columns["training, s"] = training(row)
        for rate in RATES:
            seconds, star = record.seconds(row, rate)
            columns[f"s a round at {rate} Mbit/s"] = shown(seconds) + star
        rows.append(columns)
    return TextTable.of(rows, text=shown)


def table_of_targets(record: Record) -> TextTable:
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
            columns[f"s to it at {rate} Mbit/s"] = seconds + record.seconds(row, rate)[1]
        rows.append(columns)
    return TextTable.of(rows, text=shown)


def table_of_clocks(record: Record) -> TextTable:
    """Tabulate how far a round on the virtual clock is from one on the bed."""
    rows = []
    for row, label in LABELS.items():
        columns: Row = {"method": label}
        for rate in RATES:
            real, clock = record.median(row, rate), record.clock(row, rate) + record.latency()
            off = f"{clock - real:+.1f} s, {100 * (clock / real - 1):+.0f} %"
            known = "" if real != real else off  # noqa: PLR0124
            columns[f"{rate} Mbit/s"] = "fitted" if (row, rate) == FITTED else known
        rows.append(columns)
    return TextTable.of(rows, [f"system.latency is {record.latency():.2f} s."])


def table_of_wholes(record: Record) -> TextTable:
    """Tabulate runs of the study as deployments, beside the sum of their rounds.

    In the sum nodes train as here, on fewer cores than there are nodes.
    """
    rows = []
    for row, label in LABELS.items():
        for rate in RATES:
            if (found := record.find("whole", row, rate)) is None:
                continue
            seconds: list[float] = found["seconds"]  # type: ignore[assignment]
            each = record.median(row, rate) + CLIENTS / int(str(found["cores"])) * training(row)
            rows.append(
                {
                    "method": label,
                    "Mbit/s up": rate,
                    "rounds after the first": len(seconds) - 1,
                    "s measured": sum(seconds[1:]),
                    "s, sum": (len(seconds) - 1) * each,
                }
            )
    return TextTable.of(rows, text=shown)


def seconds_to_target(record: Record, row: str, rate: int) -> float:
    """Give rounds to the target times the seconds of a round and of its training."""
    return statistics.mean(rounds_to_target(row)) * (record.seconds(row, rate)[0] + training(row))


def shown(value: object) -> str:
    """Write a number of a table in three digits."""
    if not isinstance(value, float):
        return str(value)
    return "-" if value != value else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"  # noqa: PLR0124


def figure(record: Record) -> None:
    """Draw the seconds until the target, a line for each method and a mark for each rate."""
    drawn = new_figure(5.0, 3.9)  # a README shows it on a telephone, too
    stars = ["".join(record.seconds(row, rate)[1] for rate in RATES) for row in LABELS]
    title = "Time to target by bandwidth" + (" (* in part computed)" if any(stars) else "")
    drawn.suptitle(title, fontsize=13)
    panel = drawn.subplots()
    for colour, mark, rate in zip(COLOURS, "osD", RATES, strict=False):
        seconds = [seconds_to_target(record, row, rate) for row in LABELS]
        panel.plot(seconds, range(len(LABELS)), mark, color=colour, label=f"{rate}", markersize=8)
    for place, row in enumerate(LABELS):
        ends = [seconds_to_target(record, row, rate) for rate in RATES]
        panel.plot([min(ends), max(ends)], [place, place], color="#999999", zorder=0)
    label_axes(panel, f"seconds until {METRIC} {TARGET:g}", "")
    make_logarithmic(panel, "x")
    panel.set_xticks([50, 100, 300, 1000, 3000, 10000])
    names = [x.replace(", ", ",\n", 1) for x in LABELS.values()]
    panel.set_yticks(range(len(LABELS)), [a + b for a, b in zip(names, stars, strict=True)])
    panel.invert_yaxis()
    drawn.legend(loc="outside lower center", ncols=3, frameon=False, title="Mbit/s up at a node")
    write_png(drawn, record.folder / "slow_links.png")


def write_slow_links(record: Record, out: Path) -> None:
    """Write the tables."""
    for name, table in {
        "rounds": table_of_rounds(record),
        "table": table_of_targets(record),
        "clocks": table_of_clocks(record),
        **({"wholes": table_of_wholes(record)} if record.find("whole") else {}),
    }.items():
        table.write(out, name)
        print(table.markdown())


def measured(record: Record, rows: Sequence[str], rates: Sequence[int], at: int) -> Iterator[Row]:
    """Measure on the bed what is asked for, or else what is missing."""
    missing = {row: [r for r in rates if not record.find("bed", row, r)] for row in rows}
    if not at and not any(missing.values()):
        return
    with Bed(1 + CLIENTS) as bed:
        deployment = Deployment(bed)
        for row, mine in missing.items():
            if at:
                yield whole(deployment, row, at)
            elif mine:
                yield from on_the_bed(deployment, row, mine)


@reported
def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing, and write the tables and the figure."""
    group = key_values(sys.argv[1:] if words is None else words)
    if "out" not in group or group.keys() - {"out", "rows", "rates", "whole"}:
        raise ConfigError("slow_links takes out=DIR, rows=NAME,..., rates=NUMBER,..., whole=NUMBER")
    record = Record(Path(str(group["out"])))
    rows = str(group["rows"]).split(",") if "rows" in group else [*LABELS]
    wanted = {int(rate) for rate in str(group.get("rates", "1,10,100")).split(",") if rate}
    if (unknown := {*rows} - LABELS.keys()) or wanted - {*RATES}:
        raise ConfigError(f"rows are {', '.join(LABELS)}, and rates {RATES}; not {unknown}")
    rates = [rate for rate in RATES if rate in wanted]
    for found in measured(record, rows, rates, int(str(group.get("whole", 0)))):
        record.add(found)
    for row in rows:
        for rate in rates:
            if not record.find("clock", row, rate):
                record.add(on_the_clock(row, rate))
    write_slow_links(record, record.folder)
    figure(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
