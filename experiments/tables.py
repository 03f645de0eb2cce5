"""A table for people and for programs."""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table as RichTable

from fedraclora.errors import ConfigError

Cells = list[dict[str, str]]


@dataclass(frozen=True)
class Table:
    """A table in two forms.

    Attributes:
        header: Column titles.
        cells: Text for people, one row per group.
        records: The same with plain numbers, for files and programs.
        notes: What the reader must know: runs left out, tasks that differ.
    """

    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    records: tuple[dict[str, object], ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The table and its notes as Markdown."""
        rows = [self.header, ("---",) + ("---:",) * (len(self.header) - 1), *self.cells]
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def write_csv(self, path: Path) -> None:
        """Write the records as CSV; what is not known is empty."""
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, fieldnames=list(self.records[0]))
            writer.writeheader()
            writer.writerows({k: _known(v) for k, v in row.items()} for row in self.records)

    def print(self) -> None:
        """Show the table and its notes on the terminal."""
        console = Console(markup=False, highlight=False)
        if not console.is_terminal:
            console = Console(markup=False, highlight=False, width=240)  # a pipe has no width
        table = RichTable()
        for index, title in enumerate(self.header):
            table.add_column(title, justify="right" if index else "left")
        for row in self.cells:
            table.add_row(*row)
        console.print(table)
        for note in self.notes:
            console.print(note, soft_wrap=True)


def read_table(path: Path) -> Cells:
    """Read the first table of a Markdown file: one dict per row, by title of column.

    Raises:
        ConfigError: No such file, or no table in it.
    """
    if not path.is_file():
        raise ConfigError(f"{path} is not there: run its study first, or mend the page")
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ConfigError(f"{path} holds no table")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def _known(value: object) -> object:
    return None if isinstance(value, float) and math.isnan(value) else value
