"""Markdown tables from the JSON files of the benchmark.

``python -m experiments.bench.table FOLDER`` prints them; a second argument names a file in which
the text between the two marks is replaced by them.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

from experiments.bench.report import Report
from experiments.bench.workloads import RAY, WORKLOADS
from experiments.status import reported
from fedraclora.errors import ConfigError

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
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


def replace_between_marks(text: str, new: str) -> str:
    """Put ``new`` between the marks of a document.

    Raises:
        ConfigError: If the marks are not there once each, in order.
    """
    before, mark, rest = text.partition(BEGIN)
    _, last, after = rest.partition(END)
    if not mark or not last:
        raise ConfigError(f"the document needs the lines {BEGIN} and {END}, in this order")
    return f"{before}{BEGIN}\n{new}\n{END}{after}"


@reported
def main(words: list[str]) -> int:
    """Print the tables of a folder, or write them into a document."""
    made = tables(Path(words[0] if words else "experiments/results/bench"))
    for document in map(Path, words[1:2]):
        document.write_text(replace_between_marks(document.read_text(), made))
    if len(words) < 2:
        print(made)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
