"""Files of records: plain while they grow, packed (``NAME.xz`` in their place) once they are kept.

Readers give the plain name and need not know which of the two is there.
"""

from __future__ import annotations

import lzma
from pathlib import Path

from fedraclora.errors import DataError
from fedraclora.weights.files import replacing

SUFFIX = ".xz"


def packed(path: Path) -> Path:
    """Return where the packed form of a file is."""
    return path.with_name(path.name + SUFFIX)


def exists(path: Path) -> bool:
    """Check whether a file is there, in either form."""
    return path.is_file() or packed(path).is_file()


def read_text(path: Path) -> str:
    """Read a file, in whichever form it is there.

    Raises:
        DataError: If its packed form is damaged.
    """
    return path.read_text(encoding="utf-8") if path.is_file() else _unpacked(path).decode("utf-8")


def decompress(path: Path) -> None:
    """Put the plain form in the place of the packed one, so that the file can grow.

    Raises:
        DataError: If its packed form is damaged.
    """
    if not path.is_file() and exists(path):
        with replacing(path) as partial:
            partial.write_bytes(_unpacked(path))
    packed(path).unlink(missing_ok=True)


def compress(path: Path) -> None:
    """Put the packed form in the place of the plain one, where that is there."""
    if path.is_file():
        with replacing(packed(path)) as partial:
            partial.write_bytes(lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME))
        path.unlink()


def _unpacked(path: Path) -> bytes:
    try:
        return lzma.decompress(packed(path).read_bytes())
    except lzma.LZMAError as error:
        raise DataError(f"{packed(path)} is damaged ({error}): restore it from a copy") from error
