"""Figure of a partition: which labels each client holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedraclora.errors import ShapeError
from fedraclora.plots.axes import COLOURS, label_axes, new_figure, write_png

_MAX_BARS = 40  # clients or classes that stacked bars can show; beyond, a heat map
_MAX_PIXELS = 2000  # rows of a heat map; more would not be seen


def label_distribution(
    counts: npt.NDArray[np.int64], path: Path, *, population: int | None = None
) -> None:
    """Draw which labels each client holds, and how many samples.

    Up to 40 clients and 20 classes: stacked bars of counts. Beyond that: a heat map of each
    client's shares, clients sorted by their commonest class, beside their numbers of samples.

    Args:
        counts: Samples of each class at each client, [clients, classes].
        path: The PNG to write.
        population: Clients in all; None where these are all of them.

    Raises:
        ShapeError: If ``counts`` is not a matrix with at least one row and one column.
    """
    if counts.ndim != 2 or 0 in counts.shape:
        raise ShapeError(f"the counts have the shape {counts.shape}; [clients, classes] is wanted")
    small = counts.shape[0] <= _MAX_BARS and counts.shape[1] <= _MAX_BARS // 2
    write_png(_bars(counts) if small else _heat_map(counts, population or len(counts)), path)


def _bars(counts: npt.NDArray[np.int64]) -> Figure:
    clients, classes = counts.shape
    figure = new_figure(10, 2.2 + 0.26 * clients)
    panel = figure.subplots()
    palette = colormaps["tab10" if classes <= 10 else "tab20"]
    left = np.zeros(clients)
    for label in range(classes):
        panel.barh(
            range(clients), counts[:, label], left=left, color=palette(label), label=str(label)
        )
        left += counts[:, label]
    label_axes(panel, "samples", "client")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    panel.set(xlim=(0, 1.03 * max(left.max(), 1)), ylim=(clients - 0.5, -0.5))
    figure.legend(title="class", loc="outside right upper", frameon=False)
    return figure


def _heat_map(counts: npt.NDArray[np.int64], population: int) -> Figure:
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]
    order = np.lexsort((-share.max(axis=1), share.argmax(axis=1)))
    shown = order[np.linspace(0, len(order) - 1, min(len(order), _MAX_PIXELS)).astype(int)]
    figure = new_figure(11, 8)
    left, right = figure.subplots(1, 2, width_ratios=[4, 1])
    box = (-0.5, counts.shape[1] - 0.5, len(shown), 0)
    image = left.imshow(share[shown], aspect="auto", interpolation="nearest", extent=box)
    figure.colorbar(image, ax=left, label="share of the client's samples", pad=0.01)
    which = f"{len(shown):,} of {population:,} clients"
    label_axes(left, "class", f"{which}, sorted by their commonest class")
    left.locator_params(nbins=20, integer=True)
    left.grid(visible=False)
    right.hist(totals, bins=min(40, max(5, len(totals) // 10)), color=COLOURS[0])
    label_axes(right, "samples of a client", "clients")
    right.yaxis.set(label_position="right", ticks_position="right")
    right.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    return figure
