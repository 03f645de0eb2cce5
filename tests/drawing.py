"""Figures in `make test`: runs and comparisons write a blank picture in place of each.

To draw one takes half a second, eight times what the tiny runs of tests take besides, and hundreds
of tests have a folder with figures that they do not look at. Axes, lines and labels are made as
ever, and only not painted. They are painted in tests of figures (the fixture ``painted``), in other
processes, and in `make test-all`.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO
from unittest.mock import patch

from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

print_png = FigureCanvasAgg.print_png


def picture() -> bytes:
    """Return a blank PNG."""
    held = io.BytesIO()
    Image.new("L", (8, 8), 255).save(held, format="png")
    return held.getvalue()


BLANK = picture()


def print_blank(_: FigureCanvasAgg, target: str | Path | IO[bytes], **__: object) -> None:
    """Write the blank picture where the figure was to go."""
    if isinstance(target, str | Path):
        Path(target).write_bytes(BLANK)
    else:
        target.write(BLANK)


def install() -> None:
    """Leave figures blank, in this process."""
    FigureCanvasAgg.print_png = print_blank


@contextmanager
def painting() -> Iterator[None]:
    """Paint figures until the end of a block."""
    with patch.object(FigureCanvasAgg, "print_png", print_png):
        yield
