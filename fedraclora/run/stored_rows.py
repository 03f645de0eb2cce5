"""Read rows of a ledger's file when they are asked for.

A row takes 5 kB in memory, and a server that runs for a year has a million. Of each, its place in
the file is kept, and the last row whole.
"""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

from typing_extensions import override

StoredRow = dict[str, object]
SEAL = "sha256"  # key of a line's checksum of its row and all earlier ones; readers do not see it


class StoredRows(Sequence[StoredRow]):
    """The rows of a file that only grows, or is cut at the end of a row.

    Args:
        path: The file.
        rows: Those that it has.
        ends: Where in the file each ends, in bytes.
    """

    def __init__(
        self, path: Path, rows: Sequence[StoredRow] = (), ends: Iterable[int] = ()
    ) -> None:
        self.path, self._ends = path, array("Q", ends)
        self._last = rows[-1] if rows else None

    def append(self, row: StoredRow, size: int) -> None:
        """Take down a row that was appended to the file with so many bytes."""
        self._ends.append(self.end(len(self)) + size)
        self._last = row

    def end(self, count: int) -> int:
        """Return where the first rows end in the file."""
        return self._ends[count - 1] if count else 0

    def cut(self, count: int) -> None:
        """Forget all rows but the first ones, after the file was cut."""
        del self._ends[count:]
        self._last = None

    @override
    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> StoredRow: ...
    @overload
    def __getitem__(self, index: slice) -> list[StoredRow]: ...
    @override
    def __getitem__(self, index: int | slice) -> StoredRow | list[StoredRow]:
        if isinstance(index, slice):
            wanted = range(*index.indices(len(self)))
            return self._read(wanted) if wanted else []  # there may be no file yet
        at = range(len(self))[index]
        if at == len(self) - 1 and self._last is not None:
            return self._last
        return self._read([at])[0]

    @override
    def __iter__(self) -> Iterator[StoredRow]:
        return iter(self[:])

    @override
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self[:] == list(other)

    # As that of a list, whose type the annotation of `object` does not foresee either.
    __hash__ = None  # type: ignore[assignment]

    def _read(self, indices: Iterable[int]) -> list[StoredRow]:
        found: list[StoredRow] = []
        with self.path.open("rb") as file:
            for at in indices:
                file.seek(self.end(at))
                row: dict[str, Any] = json.loads(file.read(self.end(at + 1) - self.end(at)))
                row.pop(SEAL, None)
                found.append(row)
        return found
