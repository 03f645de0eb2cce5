"""Markdown tables from the JSON files of the benchmark.

``fedraclora bench table=FOLDER`` prints them, ``python -m experiments.pages`` brings them into the
pages that show them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from experiments.bench.report import Report
from experiments.bench.workloads import RAY, WORKLOADS
from fedraclora.errors import ConfigError, unknown

LABELS = {
    "vectorised": "**`vectorised`**",
    "bf16": "**`vectorised`**, `precision=bf16-mixed`",
    "central": "central: one model, the same samples and steps",
    "inline": "`inline`: one client after another",
    "idle": "`vectorised`, clients that do nothing",
    "fedavg": "`vectorised`, full weights (`fedavg`)",
    "loop": "full weights, plain PyTorch loop",
    "ray idle": "`ray`, 2 workers, clients that do nothing",
    "ray x1": "`ray`, 1 worker",
    "ray x2": "`ray`, 2 workers",
    "flower": "Flower {flwr}, Ray {ray}, 2 actors",
    "pfl": "pfl {pfl}",
    "fedlab": "FedLab {fedlab}",
    "fedjax": "FedJAX {fedjax}, jit",
}
COLUMNS = {
    "cpu": ("s a round", "CPU s a round", "peak MB", "CPU / central", "CPU / vectorised"),
    "cuda": ("s a round", "samples a s", "peak MB on the GPU", "time / central", "largest chunk"),
}


def tables(folder: Path) -> str:
    """Make one table per file of a folder, in the order of the workloads.

    Raises:
        ConfigError: If there is none.
    """
    found = [
        Report.read(folder / f"{name}.json")
        for name in WORKLOADS
        if (folder / f"{name}.json").is_file()
    ]
    if not found:
        raise ConfigError(f"{folder} holds no figures of the benchmark")
    return "\n\n".join(table(report) for report in found)


def side_by_side(folder: Path, workloads: Sequence[str], names: Sequence[str]) -> str:
    """Make one table of CPU seconds over those of central: a row per name, a column per workload.

    Raises:
        ConfigError: If a workload has no file, or no row of that name.
    """
    reports = [Report.read(folder / f"{workload}.json") for workload in workloads]
    titles = [WORKLOADS[report.workload].what for report in reports]
    lines = [f"| CPU s / central | {' | '.join(titles)} |", "|---|" + "---:|" * len(titles)]
    for name in names:
        for report in reports:
            if name not in report.rows:
                raise unknown(f"row of workload {report.workload}", name, report.rows)
        cells = [
            against(report.rows[name], report.rows.get("central"), "cpu_seconds")
            for report in reports
        ]
        lines.append(f"| {' | '.join((label(name, reports[0].rows[name]), *cells))} |")
    return "\n".join(lines)


def table(report: Report) -> str:
    """Make the table of one workload; its last line says what was measured where."""
    about, rows = report.about, report.rows
    device = "cuda" if about.get("device") == "cuda" else "cpu"
    title = f"{report.workload}: {WORKLOADS[report.workload].what}"
    lines = [f"| {' | '.join((title, *COLUMNS[device]))} |", "|---|" + "---:|" * 5]
    by = "seconds" if device == "cuda" else "cpu_seconds"
    for name, row in sorted(rows.items(), key=lambda item: number(item[1], by)):
        made = cuda_cells(report, name) if device == "cuda" else cpu_cells(report, name)
        lines.append(f"| {' | '.join((label(name, row), *made))} |")
    versions = about.get("versions")
    torch = versions.get("torch") if isinstance(versions, Mapping) else None
    where = about.get("card") or f"{about.get('processor')}, {about.get('cores')} cores"
    lines += ["", f"{where}; torch {torch}, {about.get('threads')} thread a process; "]
    lines[-1] += f"revision {about.get('git')}."
    if device == "cuda" and {"bf16", "vectorised"} <= rows.keys():
        gain = against(rows["vectorised"], rows["bf16"], "seconds")
        lines[-1] += f" bf16-mixed: {gain} times the samples a second of float32."
    return "\n".join(lines)


def cpu_cells(report: Report, name: str) -> tuple[str, ...]:
    """Write a row that ran on the CPU."""
    row, rows = report.rows[name], report.rows
    return (
        f"{number(row, 'seconds'):.3g}",
        f"{number(row, 'cpu_seconds'):.3g}",
        f"{number(row, 'peak_bytes') / 1e6:.0f}",
        against(row, rows.get("central"), "cpu_seconds"),
        against(row, rows.get("vectorised"), "cpu_seconds"),
    )


def cuda_cells(report: Report, name: str) -> tuple[str, ...]:
    """Write a row that ran on a GPU; throughput counts the samples of the cohort."""
    row, workload = report.rows[name], WORKLOADS[report.workload]
    samples = 0 if "idle" in name else workload.cohort * workload.samples
    return (
        f"{number(row, 'seconds'):.3g}",
        f"{samples / number(row, 'seconds'):,.0f}" if samples else "",
        # What workers of other processes hold on the card, nobody has asked them.
        "" if name in RAY else f"{number(row, 'peak_bytes') / 1e6:.0f}",
        against(row, report.rows.get("central"), "seconds"),
        f"{row['largest_chunk']:,}" if "largest_chunk" in row else "",
    )


def number(row: Mapping[str, object], key: str) -> float:
    """Read a figure."""
    return float(str(row[key]))


def against(row: Mapping[str, object], other: Mapping[str, object] | None, by: str) -> str:
    """Write a ratio, to three digits but never as a power of ten."""
    if other is None:
        return ""
    ratio = number(row, by) / number(other, by)
    return f"{ratio:.0f}" if ratio >= 100 else f"{ratio:.3g}"


def label(name: str, row: Mapping[str, object]) -> str:
    """Name a row for the reader; a peer with its versions."""
    facts = row.get("facts")
    versions = facts.get("versions") if isinstance(facts, Mapping) else None
    return LABELS.get(name, name).format(**versions if isinstance(versions, Mapping) else {})
