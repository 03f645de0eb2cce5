"""A table for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from rich.console import JustifyMethod
from rich.table import Table as RichTable

from experiments.progress import console_for_tables
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
        texts: How many of the first columns are texts, which are not flush right.
    """

    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    records: tuple[Mapping[str, object], ...]
    notes: tuple[str, ...] = ()
    texts: int = 1

    @classmethod
    def of(
        cls,
        records: Sequence[Mapping[str, object]],
        notes: Sequence[str] = (),
        text: Callable[[object], str] = str,
    ) -> Table:
        """Make the table whose columns are the keys of the records, each value written as text."""
        cells = tuple(tuple(map(text, record.values())) for record in records)
        header = tuple(records[0]) if records else ()
        return cls(header, cells, tuple(records), tuple(notes))

    def markdown(self) -> str:
        """The table and its notes as Markdown."""
        numbers = len(self.header) - self.texts
        rows = [self.header, ("---",) * self.texts + ("---:",) * numbers, *self.cells]
        lines = ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in rows]
        return "\n".join([*lines, *(f"\n{note}" for note in self.notes)]) + "\n"

    def write(self, folder: Path, name: str) -> None:
        """Write ``name.md``, and the records as ``name.csv``; what is not known is empty there."""
        import pandas as pd

        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        frame = pd.DataFrame(list(self.records), dtype=object)
        frame.to_csv(folder / f"{name}.csv", index=False, lineterminator="\r\n")

    def print(self) -> None:
        """Show the table and its notes on the terminal; of the columns, the first that fit."""
        console = console_for_tables()
        widths = self._widths(console.width) if self.header else []
        shown = len(widths)
        table = RichTable()
        for index, width in enumerate(widths):
            justify: JustifyMethod = "left" if index < self.texts else "right"
            table.add_column(self.header[index], justify=justify, width=width)
        for row in self.cells:
            table.add_row(*row[:shown])
        if widths:
            console.print(table)
        if left := self.header[shown:]:
            console.print(f"no room here for: {', '.join(left)}", soft_wrap=True)
        for note in self.notes:
            console.print(note, soft_wrap=True)

    def _widths(self, room: int) -> list[int]:
        """Divide the room among the first columns that fit.

        A column needs the width of its longest number or word; what is left over goes to those
        whose texts would be broken into lines, the label first.
        """
        least, whole = [], []
        for title, *cells in zip(self.header, *self.cells, strict=True):
            texts = [title, *(cell for cell in cells if cell[:1].isalpha())]
            words = [word for text in texts for word in text.split()]
            least.append(max(map(len, [*words, *set(cells).difference(texts)]), default=1))
            whole.append(max(map(len, [title, *cells])))
        # A line before every column and behind the last, and a blank on either side of a text.
        needed = list(accumulate(width + 3 for width in least))
        shown = max(self.texts + 1, sum(total < room for total in needed))
        widths, spare = least[:shown], room - 1 - needed[min(shown, len(needed)) - 1]
        label = self.texts - 1
        for index in sorted(range(len(widths)), key=lambda index: index != label):
            more = max(0, min(spare, whole[index] - widths[index]))
            widths[index] += more
            spare -= more
        return widths


def read_table(path: Path) -> Cells:
    """Read the first table of a Markdown file: one dict per row, by title of column.

    Raises:
        ConfigError: No such file, or no table in it.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} is not there: run its study first, or take its block out of the page"
        )
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ConfigError(f"{path} holds no table")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
