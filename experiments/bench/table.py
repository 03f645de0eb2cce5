"""Markdown tables from the JSON files of the benchmark.

``fedraclora bench table=FOLDER`` prints them, `experiments.pages` brings them into the pages
that show them.
What the benchmark holds its figures against stands in ``bounds.yaml``.
"""

from __future__ import annotations

import json
import os
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml
from typing_extensions import override

from fedraclora.errors import ConfigError, unknown
from fedraclora.experiments.bench import late
from fedraclora.experiments.bench.timing import Rows
from fedraclora.experiments.bench.workloads import PRODUCTS, RAY, WORKLOADS
from fedraclora.run.folder import git_revision
from fedraclora.terminal.tables import TextTable

LABELS: dict[str, str] = yaml.safe_load(
    Path(__file__).with_name("labels.yaml").read_text(encoding="utf-8")
)


def tables(folder: Path, workloads: Sequence[str] = tuple(WORKLOADS)) -> str:
    """Make one table per file of a folder, in the order of the workloads.

    Args:
        folder: Of JSON files.
        workloads: Whose tables, all unless given.

    Raises:
        ConfigError: If there is none.
    """
    paths = [path for name in workloads if (path := folder / f"{name}.json").is_file()]
    if not paths:
        raise ConfigError(f"{folder} holds no figures of the benchmark")
    return "\n".join(table(Report.read(path)).markdown() for path in paths)


def side_by_side(folder: Path, workloads: Sequence[str], names: Sequence[str]) -> str:
    """Make one table of CPU seconds over those of central: a row per name, a column per workload.

    Raises:
        ConfigError: If a workload has no file, or no row of that name.
    """
    reports = [Report.read(folder / f"{workload}.json") for workload in workloads]
    records = []
    for name in names:
        for report in reports:
            if name not in report.rows:
                raise unknown(f"row of workload {report.workload}", name, report.rows)
        record = {"CPU s / central": label(name, reports[0].rows[name])}
        for report in reports:
            ratio = against(report.rows[name], report.rows.get("central"), "cpu_seconds")
            record[WORKLOADS[report.workload].what] = ratio
        records.append(record)
    return TextTable.of(records).markdown()


def table(report: Report) -> TextTable:
    """Make the table of one workload; its note says what was measured where."""
    about, rows = report.about, report.rows
    cuda = about.get("device") == "cuda"
    title = f"{report.workload}: {WORKLOADS[report.workload].what}"
    by, cells = ("seconds", cuda_cells) if cuda else ("cpu_seconds", cpu_cells)
    where = about.get("card") or f"{about.get('processor')}, {about.get('cores')} cores"
    versions = about.get("versions", {})
    note = f"{where}; torch {versions.get('torch')}, {about.get('threads')} thread a process; "
    note += f"revision {about.get('git')}."
    for name in (name for name in PRODUCTS if name in rows):
        note += f" Peak, {label(name, rows[name])}: {speed(rows[name], by) / 1e9:,.0f} GFLOP/s."
    if rows.keys() & late.LATE_BUILDERS.keys():
        return TextTable.of(late.by_round(rows, title), [note])
    ranked = sorted(rows.keys() - set(PRODUCTS), key=lambda name: float(rows[name][by]))
    records = [
        {title: label(name, rows[name]), **cells(report, name), **of_peak(rows, name, by)}
        for name in ranked
    ]
    if cuda and {"bf16", "vectorized"} <= rows.keys():
        gain = against(rows["vectorized"], rows["bf16"], "seconds")
        note += f" bf16-mixed: {gain} times the samples a second of float32."
    return TextTable.of(records, [note])


def cpu_cells(report: Report, name: str) -> dict[str, str]:
    """Write a row that ran on the CPU."""
    row, rows = report.rows[name], report.rows
    if "tokens" in report.about:
        return {
            "CPU s a round": f"{row['cpu_seconds']:.3g}",
            "tokens a CPU s": f"{report.about['tokens'] / row['cpu_seconds']:,.0f}",
            "peak MB": f"{row['peak_bytes'] / 1e6:.0f}",
            "CPU / loop": against(row, rows.get("peft"), "cpu_seconds"),
            "CPU / central": against(row, rows.get("central"), "cpu_seconds"),
        }
    return {
        "s a round": f"{row['seconds']:.3g}",
        "CPU s a round": f"{row['cpu_seconds']:.3g}",
        "peak MB": f"{row['peak_bytes'] / 1e6:.0f}",
        "CPU / central": against(row, rows.get("central"), "cpu_seconds"),
        "CPU / vectorized": against(row, rows.get("vectorized"), "cpu_seconds"),
    }


def cuda_cells(report: Report, name: str) -> dict[str, str]:
    """Write a row that ran on a GPU; throughput counts the samples of the cohort."""
    row, workload = report.rows[name], WORKLOADS[report.workload]
    samples = 0 if "idle" in name else workload.cohort * workload.samples
    return {
        "s a round": f"{row['seconds']:.3g}",
        "samples a s": f"{samples / row['seconds']:,.0f}" if samples else "",
        # What workers of other processes hold on the card, nobody has asked them.
        "peak MB on the GPU": "" if name in RAY else f"{row['peak_bytes'] / 1e6:.0f}",
        "time / central": against(row, report.rows.get("central"), "seconds"),
        "largest chunk": f"{row['largest_chunk']:,}" if "largest_chunk" in row else "",
    }


def of_peak(rows: Mapping[str, Any], name: str, by: str) -> dict[str, str]:
    """Write what share of the machine's peak a row reaches; nothing where no peak was timed.

    Its work is that of the matrix products of central training on the same samples: doing more
    gains a row nothing. The peak is one large product's speed, timed in turn with the rows.
    """
    work = rows.get("central", {}).get("facts", {}).get("flops")
    peak = rows.get("product bf16" if "bf16" in name else "product")
    if not work or peak is None:
        return {}
    return {"of peak": "" if "idle" in name else f"{work / rows[name][by] / speed(peak, by):.2g}"}


def speed(row: Mapping[str, Any], by: str) -> float:
    """Operations of matrix products a second, of a row that makes nothing else."""
    return float(row["facts"]["flops"]) / float(row[by])


def against(row: Mapping[str, Any], other: Mapping[str, Any] | None, by: str) -> str:
    """Write a ratio, to three digits but never as a power of ten."""
    if other is None:
        return ""
    ratio = row[by] / other[by]
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def label(name: str, row: Mapping[str, Any]) -> str:
    """Name a row for the reader; a peer with its versions."""
    return LABELS.get(name, name).format(**row.get("facts", {}).get("versions", {}))


PACKAGES = ("torch", "flwr", "ray", "numpy")


@dataclass
class Report:
    """What was found for one workload.

    Attributes:
        workload: Its name.
        rows: Figures by name of the row.
        missing: Rows that were wanted, and why they are not there.
        about: Machine, versions, revision.
    """

    workload: str
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        """Write ``<workload>.json``."""
        folder.mkdir(parents=True, exist_ok=True)
        found = {"what": WORKLOADS[self.workload].what, **vars(self)}
        text = json.dumps(found, indent=1, default=str)
        (folder / f"{self.workload}.json").write_text(text + "\n")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a file of `write` back.

        Raises:
            ConfigError: If it is no such file.
        """
        try:
            found = json.loads(path.read_text())
            return cls(found["workload"], found["rows"], found["missing"], found["about"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} holds no figures of the benchmark: {error}") from error


def about(device: torch.device, threads: int) -> dict[str, object]:
    """Name the machine, the versions and the revision."""
    found: dict[str, object] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "device": device.type,
        "threads": threads,
        "versions": {package: version(package) for package in PACKAGES},
        "git": git_revision(),
    }
    if device.type == "cuda":
        found["card"] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """Name the processor as Linux does, or as Python does elsewhere."""
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


SAME_LOSS = 1e-4  # relative: float32 sums of another order differ in the sixth digit


@dataclass(frozen=True)
class Bound:
    """A ratio of two rows of a workload, or one row alone, and how large it may or must be.

    Attributes:
        workload: Of both rows.
        over: The row above the line.
        under: The row below it; None takes ``over`` in seconds as it is.
        most: The largest value that is allowed, or None.
        least: The smallest, or None.
        by: ``cpu_seconds``, which a busy machine hardly moves, or ``seconds``.
    """

    workload: str
    over: str
    under: str | None
    most: float | None = None
    least: float | None = None
    by: str = "cpu_seconds"

    def value(self, rows: Rows) -> float | None:
        """The ratio; None where a row is missing."""
        names = (self.over,) if self.under is None else (self.over, self.under)
        if any(name not in rows for name in names):
            return None
        over, *under = (rows[name][self.by] for name in names)
        return float(over / under[0] if under else over)

    @override
    def __str__(self) -> str:
        """Describe the bound."""
        what = self.over if self.under is None else f"{self.over} / {self.under}"
        limit = f"at most {self.most:g}" if self.most is not None else f"at least {self.least:g}"
        return f"{self.workload}: {what} in {self.by.replace('_', ' ')}, {limit} wanted"


TABLE = Path(__file__).with_name("bounds.yaml").read_text(encoding="utf-8")
BOUNDS = tuple(Bound(**row) for row in yaml.safe_load(TABLE))


def judge_rows(workload: str, rows: Rows, device: str = "cpu") -> dict[str, list[str]]:
    """Check the rows of a workload against the bounds; on a GPU the wall time alone counts.

    Returns:
        Lines for the reader: bounds that are ``kept``, those that are ``broken``, and those that
        are ``open``, since a row is missing.
    """
    lines: dict[str, list[str]] = {"kept": [], "broken": [], "open": []}
    for bound in BOUNDS:
        if bound.workload != workload:
            continue
        if device != "cpu" and bound.by == "cpu_seconds":
            bound = replace(bound, by="seconds")  # noqa: PLW2901
        value = bound.value(rows)
        if value is None:
            lines["open"].append(f"{bound}; a row is missing")
            continue
        high = bound.most is not None and value > bound.most
        low = bound.least is not None and value < bound.least
        lines["broken" if high or low else "kept"].append(f"{bound}; it is {value:.4g}")
    return lines


def disagreements(rows: Rows) -> list[str]:
    """List the rows of one algorithm that ended at another loss than the first of them."""
    losses = {name: row["loss"] for name, row in rows.items() if "loss" in row}
    if not losses:
        return []
    first, reference = next(iter(losses.items()))
    return [
        f"{name} ended at training loss {loss:.6g}, {first} at {reference:.6g}: not the same work"
        for name, loss in losses.items()
        if not abs(loss - reference) <= SAME_LOSS * abs(reference)
    ]
