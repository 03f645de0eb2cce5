"""Checks of single fields of a received message, before they are used.

A message comes from another machine. Its header is JSON, in which any field may have any value: a
number instead of a list, a list nested a thousand times, a text of a gigabyte, or terminal control
characters.
"""

from __future__ import annotations

import json
import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fedraclora.errors import WireError

if TYPE_CHECKING:  # a node's own process, which has no torch, reads texts of other machines, too
    from fedraclora.tree import Layout

LONGEST = 1000  # characters of a text that another machine wrote
MANY = 100  # sentences in one message
LARGEST = 2**63 - 1
AXES, LONGEST_AXIS = 8, 2**40  # of a shape that a message names


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Convert any error inside to an error of the message.

    Args:
        what: The thing that is read; the message starts with it.

    Raises:
        WireError: For any other exception.
    """
    try:
        yield
    except WireError:
        raise
    except Exception as error:
        reason = printable(f"{type(error).__name__}: {error}")
        raise WireError(f"{what} cannot be read ({reason})") from error


def printable(text: str, longest: int = LONGEST) -> str:
    r"""Replace characters that are unsafe in a log line or a terminal.

    Args:
        text: Of any length, with any characters.
        longest: Characters that are kept; of the others their number is said.

    Example:
        >>> print(printable("lost\n\x1b[2Jeverything", longest=14))
        lost\n\x1b[2Jevery ... (5 characters more)
    """
    kept = text[:longest]
    if not kept.isprintable():
        kept = "".join(c if c.isprintable() else repr(c)[1:-1] for c in kept)
    more = len(text) - longest
    return kept if more <= 0 else f"{kept} ... ({more} characters more)"


def shown(value: object) -> str:
    """Return a short text for a value of any size, for messages."""
    return printable(_SHORT.repr(value), 100)


_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxlong = _SHORT.maxother = 60


def parsed(text: object, what: str) -> dict[str, Any]:
    """Parse a JSON object.

    Raises:
        WireError: If the text is no JSON object, repeats a key, or has a non-finite number.
    """
    if not isinstance(text, str):
        raise WireError(f"{what} is {shown(text)}, expected a text of JSON")
    try:
        found = json.loads(text, parse_constant=_no_number, object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise WireError(f"{what} is no JSON ({printable(str(error))})") from error
    return checked_object(found, what)


def _no_number(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is named twice")
    return found


def whole_number(value: object, what: str, least: int = 0, most: int = LARGEST) -> int:
    """Check an integer; booleans are rejected.

    Raises:
        WireError: If it is no integer, or outside of ``least`` to ``most``.
    """
    if type(value) is not int or not least <= value <= most:
        raise WireError(f"{what} is {shown(value)}, expected a whole number of at least {least}")
    return value


def finite_number(value: object, what: str) -> float:
    """Check a finite number; integers stay integers.

    Raises:
        WireError: If it is not a finite number.
    """
    if type(value) not in {int, float} or not math.isfinite(float(value)):  # type: ignore[arg-type]
        raise WireError(f"{what} is {shown(value)}, expected a finite number")
    return value  # type: ignore[return-value]


def checked_name(value: object, what: str) -> str:
    """Check a name.

    Raises:
        WireError: If it is not a text that can be a name.
    """
    if not isinstance(value, str) or len(value) > LONGEST or not value.isprintable():
        raise WireError(f"{what} is {shown(value)}, expected a name")
    return value


def checked_list(value: object, what: str, most: int | None = None) -> Sequence[Any]:
    """Check a list.

    Raises:
        WireError: If it is no list, or has more than ``most`` elements.
    """
    if not isinstance(value, list | tuple):
        raise WireError(f"{what} is {shown(value)}, expected a list")
    if most is not None and len(value) > most:
        raise WireError(f"{what} has {len(value)} elements, expected at most {most}")
    return value


def checked_object(value: object, what: str) -> dict[str, Any]:
    """Check a JSON object.

    Raises:
        WireError: If it is not an object.
    """
    if not isinstance(value, dict):
        raise WireError(f"{what} is {shown(value)}, expected a JSON object")
    return value


def shape_of(sizes: object, what: str) -> tuple[int, ...]:
    """Check a shape.

    Raises:
        WireError: If it is not a list of sizes.
    """
    return tuple(
        whole_number(size, what, most=LONGEST_AXIS) for size in checked_list(sizes, what, AXES)
    )


def layout_of(shapes: object, what: str) -> Layout:
    """Check a layout: pairs of a name and a shape.

    Args:
        shapes: The pairs.
        what: The layout; the message starts with it.

    Raises:
        WireError: If it is not a layout, or names a tensor twice.
    """
    found = []
    for pair in checked_list(shapes, what):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise WireError(f"{what} holds {shown(pair)}, expected a name and a shape")
        found.append((checked_name(pair[0], what), shape_of(pair[1], what)))
    if len(dict(found)) != len(found):
        raise WireError(f"{what} names a tensor twice")
    from fedraclora.tree import Layout  # with torch

    return Layout(tuple(found))
