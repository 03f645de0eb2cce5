"""Provide the common parts of figures: colours, axes, legends, files.

Figures are built with matplotlib's object interface: no pyplot, no window, no global state.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from typing_extensions import override

from fedraclora.plots.palette import DASHES
from fedraclora.weights.files import keep_private, make_folder

Values = npt.NDArray[np.float64]

MEGABYTE = 1e6
# Of series that are no methods (`palette` has theirs): Okabe and Ito's colours, told apart by all
# kinds of colour vision; yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
FEW = (1, 1.5, 2, 3, 4, 5, 7)  # minor ticks of an axis of less than a decade


class NotebookFigure(Figure):
    """Let a notebook show a figure unchanged; pyplot, which usually sets the hook, is not used.

    A dollar sign in a name does not start a formula.
    """

    @override
    def draw(self, renderer: RendererBase) -> None:
        for text in self.findobj(Text):
            text.set_parse_math(False)
        super().draw(renderer)

    def _repr_png_(self) -> bytes:
        held = io.BytesIO()
        self.savefig(held, format="png")
        return held.getvalue()


def draw_lines(
    panel: Axes, labels: tuple[str, str], x: Values, series: Mapping[str, Values], log: str = ""
) -> None:
    """Plot named curves, with a legend above the panel if there are several."""
    for index, (name, y) in enumerate(series.items()):
        # Zero cannot be drawn on a logarithmic axis.
        known = np.isfinite(x) & np.isfinite(y) & {"x": x > 0, "y": y > 0}.get(log, True)
        if known.any():
            dash, mark = DASHES[index % len(DASHES)], marker(x[known])
            panel.plot(x[known], y[known], dash, color=COLOURS[index], marker=mark, label=name)
    label_axes(panel, *labels, legend=len(panel.get_lines()) > 1)
    if log:
        make_logarithmic(panel, log)
    if not panel.get_lines():
        panel.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=panel.transAxes)
        panel.set(xticks=[], yticks=[])


def marker(x: Values) -> str:
    """Mark points if there are few."""
    return "o" if x.size <= 30 else ""


def make_logarithmic(panel: Axes, which: str) -> None:
    """Make an axis logarithmic if its positive values span more than a factor of 2."""
    points = (line.get_data()["xy".index(which)] for line in panel.get_lines())
    values = [float(v) for v in np.concatenate([[], *points]) if v > 0]
    if values and max(values) > 2 * min(values):
        axis = panel.xaxis if which == "x" else panel.yaxis
        panel.set(**{f"{which}scale": "log"})
        decades = math.log10(max(values) / min(values))
        steps = FEW if decades < 1 else (1, 2, 5) if decades < 1.7 else (1,)
        axis.set_major_locator(LogLocator(subs=steps, numticks=9))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def label_axes(panel: Axes, x_label: str, y_label: str, *, legend: bool = False) -> None:
    """Label a panel, give it a grid and, if asked, a legend above it."""
    panel.set(xlabel=x_label, ylabel=y_label, axisbelow=True)
    panel.grid(visible=True, color="#DDDDDD", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    if x_label == "round":
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if legend:  # above the panel, so that it covers no curve
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)


def new_figure(width: float, height: float) -> Figure:
    """Create an empty figure; inches."""
    spaced = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return NotebookFigure(figsize=(width, height), dpi=120, layout=spaced)


def new_panels(
    figure: Figure, rows: int, columns: int, count: int, *, sharey: bool = False
) -> list[Axes]:
    """Create the first ``count`` panels of a grid, in reading order."""
    grid = figure.subplots(rows, columns, squeeze=False, sharey=sharey).ravel()
    for unused in grid[count:]:
        unused.remove()
    return [*grid[:count]]


def write_png(figure: Figure, path: Path) -> None:
    """Write a figure; its folder is created if missing.

    `Figure.savefig` would draw it twice, the first time to find its bounding box.
    """
    make_folder(path.parent)
    write: Callable[[Path], object] = FigureCanvasAgg(figure).print_png  # it has no types
    write(path)
    keep_private(path)
