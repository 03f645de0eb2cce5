"""Choose colors: one for each method, the same in every figure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

# Six of Okabe and Ito's, told apart by all kinds of color vision, and four between them; each can
# be seen on a light page and on a dark one.
PALETTE = (
    "#56B4E9",
    "#009E73",
    "#A03060",
    "#CC79A7",
    "#999933",
    "#D55E00",
    "#6A51A3",
    "#E69F00",
    "#0072B2",
    "#777777",
)
DASHES = ("-", "--", ":", "-.")


class LineStyle(NamedTuple):
    """Hold how a curve is drawn.

    Attributes:
        color: As ``#RRGGBB``.
        dash: As matplotlib writes it.
    """

    color: str
    dash: str


def line_styles(methods: Sequence[str]) -> list[LineStyle]:
    """Choose the look of each curve of a figure: the color of its method, and a dash.

    A method has its color by its name, in every figure; where two of a figure would share one, the
    later in the alphabet takes the next that is free. Curves of one color differ in their dash.
    Where all curves are of one method, colors tell them apart.

    Args:
        methods: The name of the method of each curve; case and hyphens do not matter.

    Example:
        >>> [look.dash for look in line_styles(["one", "two", "one"])]
        ['-', '-', '--']
        >>> line_styles(["My-Method"]) == line_styles(["my_method"])
        True
    """
    names = [method.lower().replace("-", "_") for method in methods]
    if len({*names}) == 1:
        places = [(_own(name) + step) % len(PALETTE) for step, name in enumerate(names)]
    else:
        taken = _shared_out(sorted({*names}))
        places = [taken[name] for name in names]
    dashes = [places[:index].count(place) % len(DASHES) for index, place in enumerate(places)]
    return [LineStyle(PALETTE[p], DASHES[dash]) for p, dash in zip(places, dashes, strict=True)]


def _shared_out(names: Sequence[str]) -> dict[str, int]:
    """Assign each name a place in the palette: its own, or the next of those used least."""
    taken: dict[str, int] = {}
    for name in names:
        if _own(name) not in taken.values():
            taken[name] = _own(name)
    for name in names:
        if name not in taken:
            tried = [(_own(name) + step) % len(PALETTE) for step in range(len(PALETTE))]
            taken[name] = min(tried, key=[*taken.values()].count)
    return taken


def _own(name: str) -> int:
    return crc32(name.encode()) % len(PALETTE)
