"""Write tables for people and for programs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from rich.console import JustifyMethod
from rich.table import Table as RichTable

from fedraclora.errors import ConfigError
from fedraclora.terminal.progress import console_for_tables
from fedraclora.weights.files import keep_private
from fedraclora.wire.fields import printable

Cells = list[dict[str, str]]
Column = tuple[str, Sequence[str]]  # its title, and its cells
TAG = re.compile(r"<(?=[A-Za-z/!?])")  # what a browser, and so Markdown, may take for HTML
LONGEST_CELL = 2000  # characters
UNKNOWN_WIDTH = 100  # where a table leads into a pipe or a file; the folder has it whole


def cell_text(value: object) -> str:
    """Format the value of a cell; an unknown value is a dash."""
    return "-" if value is None or value != value else str(value)  # noqa: PLR0124


@dataclass(frozen=True)
class TextTable:
    """Hold a table in two forms; control characters in its texts are escaped.

    Attributes:
        header: Column titles.
        cells: Text for people, one row per group.
        records: The same with plain numbers, for files and programs.
        notes: What the reader must know: runs left out, different tasks.
        texts: Number of the first columns that are texts, which are aligned left.
    """

    header: tuple[str, ...]
    cells: tuple[tuple[str, ...], ...]
    records: tuple[Mapping[str, object], ...]
    notes: tuple[str, ...] = ()
    texts: int = 1

    def __post_init__(self) -> None:
        """Escape control characters and line ends."""
        rows = (tuple(map(_plain, row)) for row in self.cells)
        for name, texts in (("header", map(_plain, self.header)), ("cells", rows)):
            object.__setattr__(self, name, tuple(texts))
        object.__setattr__(self, "notes", tuple(map(_plain, self.notes)))

    @classmethod
    def of(
        cls,
        records: Sequence[Mapping[str, object]],
        notes: Sequence[str] = (),
        text: Callable[[object], str] = cell_text,
    ) -> TextTable:
        """Build the table whose columns are the keys of the records, each value as text."""
        cells = tuple(tuple(map(text, record.values())) for record in records)
        header = tuple(records[0]) if records else ()
        return cls(header, cells, tuple(records), tuple(notes))

    def markdown(self) -> str:
        """Return the table and its notes as Markdown."""
        numbers = len(self.header) - self.texts
        rows = [self.header, ("---",) * self.texts + ("---:",) * numbers, *self.cells]
        lines = ["| " + " | ".join(map(_in_cell, row)) + " |" for row in rows]
        notes = (f"\n{TAG.sub('&lt;', note)}" for note in self.notes)
        return "\n".join([*lines, *notes]) + "\n"

    def write(self, folder: Path, name: str) -> None:
        """Write ``name.md``, and the records as ``name.csv``, where unknown values are empty."""
        import pandas as pd

        (folder / f"{name}.md").write_text(self.markdown(), encoding="utf-8")
        frame = pd.DataFrame(list(self.records), dtype=object)
        frame.to_csv(folder / f"{name}.csv", index=False, lineterminator="\r\n")
        for suffix in ("md", "csv"):
            keep_private(folder / f"{name}.{suffix}")

    def print(self) -> None:
        """Print the table and its notes, without empty columns.

        If the columns do not fit side by side, each becomes a line. If the rows do not fit then,
        either, the columns stand in several tables, each with the texts of the first.
        """
        console = console_for_tables(UNKNOWN_WIDTH)
        told = [i for i, column in enumerate(zip(*self.cells, strict=True)) if any(column)]
        columns = [(self.header[i], [row[i] for row in self.cells]) for i in told]
        one_block = not columns or len(self._widths(columns, console.width)) == len(columns)
        if not one_block and (turned := self._turned(columns, console.width)):
            console.print(turned)
        else:
            for block in self._blocks(columns, console.width):
                console.print(block)
        for note in self.notes:
            console.print(note, soft_wrap=True)

    def _blocks(self, columns: Sequence[Column], room: int) -> Iterator[RichTable]:
        """Build tables of as many columns as fit, each beginning with the columns of texts."""
        split = min(self.texts, len(columns) - 1)
        texts, rest = [*columns[:split]], [*columns[split:]]
        while rest:
            widths = self._widths([*texts, *rest], room)
            shown = [*texts, *rest][: len(widths)]
            table = RichTable()
            for index, (width, (title, _)) in enumerate(zip(widths, shown, strict=True)):
                justify: JustifyMethod = "left" if index < self.texts else "right"
                table.add_column(title, justify=justify, width=width, overflow="fold")
            for row in zip(*(cells for _, cells in shown), strict=True):
                table.add_row(*row)
            yield table
            rest = rest[len(widths) - len(texts) :]

    def _turned(self, columns: Sequence[Column], room: int) -> RichTable | None:
        """Build the transposed table; None if it does not fit, either.

        No cell is broken, and titles break at blanks.
        """
        label = [title for title, _ in columns].index(self.header[self.texts - 1])
        rest = [column for place, column in enumerate(columns) if place != label]
        needed = max(len(word) for title, _ in columns for word in title.split())
        longest = [max(map(len, cells)) for cells in zip(*(c for _, c in columns), strict=True)]
        # A line before every column and behind the last, and a blank on either side of a text.
        spare = room - 1 - sum(length + 3 for length in longest) - (needed + 3)
        if spare < 0 or not rest:
            return None
        table = RichTable()
        whole = max(len(title) for title, _ in columns)
        table.add_column(columns[label][0], width=min(whole, needed + spare), overflow="fold")
        for text, length in zip(columns[label][1], longest, strict=True):
            table.add_column(text, justify="right", width=length)
        for title, cells in rest:
            table.add_row(title, *cells)
        return table

    def _widths(self, columns: Sequence[Column], room: int) -> list[int]:
        """Divide the width among the first columns that fit.

        A column needs the width of its longest number or word. The label gets at most half of the
        width: a path in it may be broken, a number may not. The remaining width goes to columns
        whose texts would be broken into lines, first to the label.
        """
        least, whole = [], []
        label = self.texts - 1
        for index, (title, cells) in enumerate(columns):
            texts = [title, *(cell for cell in cells if cell[:1].isalpha())]
            words = [word for text in texts for word in text.split()]
            width = max(map(len, [*words, *set(cells).difference(texts)]), default=1)
            least.append(min(width, max(len(title), room // 2)) if index == label else width)
            whole.append(max(map(len, [title, *cells])))
        # A line before every column and behind the last, and a blank on either side of a text.
        needed = list(accumulate(width + 3 for width in least))
        shown = max(self.texts + 1, sum(total < room for total in needed))
        widths, spare = least[:shown], room - 1 - needed[min(shown, len(needed)) - 1]
        for index in sorted(range(len(widths)), key=lambda index: index != label):
            more = max(0, min(spare, whole[index] - widths[index]))
            widths[index] += more
            spare -= more
        return widths


def _plain(text: str) -> str:
    return printable(" ".join(text.split()), LONGEST_CELL)


def _in_cell(text: str) -> str:
    """Write a text into a cell of Markdown; `_out_of_cell` reads it."""
    return TAG.sub("&lt;", text.replace("|", "\\|"))


def _out_of_cell(text: str) -> str:
    return text.strip().replace("\\|", "|").replace("&lt;", "<")


def read_table(path: Path) -> Cells:
    """Read the first table of a Markdown file: one dict per row, by title of column.

    Raises:
        ConfigError: No such file, or no table in it.
    """
    if not path.is_file():
        raise ConfigError(
            f"{path} does not exist: run its study first, or remove its block from the page"
        )
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    if len(lines) < 3:
        raise ConfigError(f"{path} contains no table")
    rows = [[_out_of_cell(cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]
