"""Refuse names of clients and classes that hardly differ, or warn about them."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import replace

import numpy as np

from fedraclora.data.dataset import DataSet
from fedraclora.errors import DataError

SHOWN = 3  # most pairs in a message
OF = {"data.client": "clients", "data.label": "classes"}


def with_clear_names(data: DataSet) -> DataSet:
    """Check the names of clients and classes; add warnings to the facts.

    Raises:
        DataError: As `check_similar`.
    """
    columns = data.columns.get("client", np.zeros(0))
    clients = np.unique(columns).tolist() if columns.dtype.kind in "OSU" else []
    classes = data.reading.get("classes")
    named = {"data.client": clients, "data.label": classes if isinstance(classes, list) else []}
    notes = [note for key, names in named.items() for note in check_similar(key, map(str, names))]
    return replace(data, info=data.info | {"similar_names": notes}) if notes else data


def check_similar(key: str, names: Iterable[str]) -> list[str]:
    """Warn about names that differ only in letter case; refuse those that differ in less.

    Args:
        key: The key of the column, a key of `OF`.
        names: All names.

    Raises:
        DataError: If two differ only in blanks, in the Unicode form of a letter, in invisible
            characters, or in the zeros after a decimal point.

    Example:
        >>> check_similar("data.label", ["Ill", "ill", "well"])
        ["data.label: 'Ill' and 'ill' differ only in letter case; they count as two classes"]
    """
    every = [*dict.fromkeys(names)]
    for one, other in _pairs(every, _plain):
        raise DataError(
            f"{key}: {_shown(one)} and {_shown(other)} differ only in blanks, invisible "
            f"characters, Unicode form or zeros, but would be two {OF[key]}: write them alike"
        )
    found = _pairs(every, lambda name: unicodedata.normalize("NFKC", _plain(name)).casefold())
    pairs = " and ".join(f"{_shown(one)} and {_shown(other)}" for one, other in found[:SHOWN])
    more = f" (and {len(found) - SHOWN} more)" if found[SHOWN:] else ""
    warning = f"{key}: {pairs}{more} differ only in letter case; they count as two {OF[key]}"
    return [warning] if found else []


def _pairs(names: list[str], form: Callable[[str], str]) -> list[tuple[str, str]]:
    """Pair each name with the first one that has the same form."""
    first: dict[str, str] = {}
    found = ((first.setdefault(form(name), name), name) for name in names)
    return [(one, other) for one, other in found if one != other]


def _plain(name: str) -> str:
    seen = "".join(sign for sign in name if unicodedata.category(sign) != "Cf")
    words = " ".join(unicodedata.normalize("NFC", seen).split())
    return re.sub(r"^([+-]?\d+)\.0+$", r"\1", words)


def _shown(name: str) -> str:
    """Show a name; with its code points if it is not plain ASCII."""
    return repr(name) if name.isascii() else f"{name!r} ({name!a})"
