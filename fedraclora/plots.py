"""Figures of runs, made from ledger rows; the only module that knows matplotlib.

Figures are built with matplotlib's object interface: no pyplot, no window, no global state.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from fedraclora.errors import ShapeError
from fedraclora.ledger import Row, column, headline, round_seconds

Vector = npt.NDArray[np.float64]

MEGABYTE = 1e6
# Okabe and Ito's colours, told apart by all kinds of colour vision; yellow is too pale for a line.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_DASHES = ("-", "--", ":", "-.")
_POSITIONS = (
    "round",
    "uplink of all clients so far (MB)",
    "uplink + downlink with catch-up so far (MB)",
    "seconds so far",
)
_STEPS = ("lr", "gamma_min", "gamma_max")
_MAX_BARS = 40  # clients or classes that stacked bars can show; beyond, a heat map
_MAX_PIXELS = 2000  # rows of a heat map; more would not be seen


def curves(rows: Sequence[Row], path: Path, title: str) -> None:
    """Draw one run: metric and losses, metric against bytes, bytes, seconds, diagnostics.

    Args:
        rows: The run's ledger rows; columns that are absent leave their panel empty.
        path: The PNG to write; its folder is made where it is missing.
        title: Title of the figure.
    """
    figure = _figure(14, 7.5)
    figure.suptitle(title, fontsize=14)
    panels = figure.subplots(2, 3).ravel()
    metric = headline(rows) or "metric"
    rounds, sent = column(rows, "round"), column(rows, "uplink_total") / MEGABYTE
    measured = column(rows, "metrics", metric)
    losses = {"training": column(rows, "train_loss"), "test": column(rows, "metrics", "loss")}
    traffic = {
        "uplink": sent,
        "downlink with catch-up": column(rows, "downlink_total") / MEGABYTE,
        "catch-up": np.nancumsum(column(rows, "catchup_bytes")) / MEGABYTE,
    }
    _lines(panels[0], ("round", metric), rounds, {metric: measured})
    _lines(panels[1], ("round", "loss"), rounds, losses)
    _lines(panels[2], ("uplink so far (MB)", metric), sent, {metric: measured}, log="x")
    _lines(panels[3], ("round", "payload so far (MB)"), rounds, traffic, log="y")
    _seconds(panels[4], rows, rounds)
    name, last = "aggregation error", {"error": column(rows, "report", "aggregation_error")}
    if not np.isfinite(last["error"]).any():
        name, last = "step", {key: column(rows, "effective_step", key) for key in _STEPS}
    _lines(panels[5], ("round", name), rounds, last, log="y")
    _save(figure, path)


def compare_figure(groups: Mapping[str, Sequence[Sequence[Row]]], metric: str, path: Path) -> None:
    """Draw a metric against rounds, uplink, all traffic and seconds, one line per group.

    A line is the mean over the group's ledgers (seeds) at the rounds that all of them
    evaluated; the band runs from the least to the greatest of them.

    Args:
        groups: Label -> ledgers.
        metric: Key of the rows' ``metrics``.
        path: The PNG to write.
    """
    labels = [fill(label, 120) for label in groups]
    legend_columns = max(1, min(len(groups), 150 // (max(map(len, labels), default=0) + 8)))
    legend_rows = math.ceil(len("\n".join(labels).splitlines()) / legend_columns)
    figure = _figure(12, 8.5 + 0.24 * legend_rows)
    figure.suptitle(f"{metric}: mean over seeds, band from least to greatest", fontsize=13)
    panels = figure.subplots(2, 2, sharey=True).ravel()
    for index, ledgers in enumerate(groups.values()):
        seeds = _on_common_rounds(ledgers, metric)
        y, colour = seeds[:, :, -1], _COLOURS[index % len(_COLOURS)]
        dash = _DASHES[index // len(_COLOURS) % len(_DASHES)]
        where = seeds[:, :, :-1].mean(axis=0)
        where[:, 1:3][where[:, 1:3] <= 0] = np.nan  # no place on the logarithmic axes
        for panel, x in zip(panels, where.T, strict=True):
            panel.plot(x, y.mean(axis=0), dash, color=colour, marker=_marker(x), markersize=4)
            if len(seeds) > 1:
                panel.fill_between(x, y.min(0), y.max(0), color=colour, alpha=0.18, linewidth=0)
    for panel, name in zip(panels, _POSITIONS, strict=True):
        _finish(panel, name, metric if panel in panels[::2] else "")
        if "MB" in name:
            _logarithmic(panel, "x")
    lines = panels[0].get_lines()
    figure.legend(lines, labels, loc="outside lower center", ncols=legend_columns, frameon=False)
    _save(figure, path)


def label_distribution(counts: npt.NDArray[np.int64], path: Path) -> None:
    """Draw which labels each client holds, and how many samples.

    Up to 40 clients and 20 classes: stacked bars of counts. Beyond that: a heat map of each
    client's shares, clients sorted by their commonest class, beside their numbers of samples.

    Args:
        counts: Samples of each class at each client, [clients, classes].
        path: The PNG to write.

    Raises:
        ShapeError: If ``counts`` is not a matrix with at least one row and one column.
    """
    if counts.ndim != 2 or 0 in counts.shape:
        raise ShapeError(f"counts must be [clients, classes], got {counts.shape}")
    small = counts.shape[0] <= _MAX_BARS and counts.shape[1] <= _MAX_BARS // 2
    _save(_bars(counts) if small else _heat_map(counts), path)


def _bars(counts: npt.NDArray[np.int64]) -> Figure:
    clients, classes = counts.shape
    figure = _figure(10, 2.2 + 0.26 * clients)
    panel = figure.subplots()
    palette = colormaps["tab10" if classes <= 10 else "tab20"]
    left = np.zeros(clients)
    for label in range(classes):
        panel.barh(
            range(clients), counts[:, label], left=left, color=palette(label), label=str(label)
        )
        left += counts[:, label]
    _finish(panel, "samples", "client")
    panel.yaxis.set_major_locator(MaxNLocator(nbins=20, integer=True))
    panel.set(xlim=(0, 1.03 * max(left.max(), 1)), ylim=(clients - 0.5, -0.5))
    figure.legend(title="class", loc="outside right upper", frameon=False)
    return figure


def _heat_map(counts: npt.NDArray[np.int64]) -> Figure:
    totals = counts.sum(axis=1)
    share = counts / np.maximum(totals, 1)[:, None]
    order = np.lexsort((-share.max(axis=1), share.argmax(axis=1)))
    shown = order[np.linspace(0, len(order) - 1, min(len(order), _MAX_PIXELS)).astype(int)]
    figure = _figure(11, 8)
    left, right = figure.subplots(1, 2, width_ratios=[4, 1])
    box = (-0.5, counts.shape[1] - 0.5, len(shown), 0)
    image = left.imshow(share[shown], aspect="auto", interpolation="nearest", extent=box)
    figure.colorbar(image, ax=left, label="share of the client's samples", pad=0.01)
    which = f"{len(shown):,} of {len(counts):,} clients"
    _finish(left, "class", f"{which}, sorted by their commonest class")
    left.locator_params(nbins=20, integer=True)
    left.grid(visible=False)
    right.hist(totals, bins=min(40, max(5, len(totals) // 10)), color=_COLOURS[0])
    _finish(right, "samples of a client", "clients")
    right.yaxis.set(label_position="right", ticks_position="right")
    right.xaxis.set_major_locator(MaxNLocator(nbins=3, integer=True))
    return figure


def _lines(
    panel: Axes, labels: tuple[str, str], x: Vector, series: Mapping[str, Vector], log: str = ""
) -> None:
    """Plot named curves, with a legend above the panel where there are several."""
    for index, (name, y) in enumerate(series.items()):
        # Zero has no place on a logarithmic axis.
        known = np.isfinite(x) & np.isfinite(y) & {"x": x > 0, "y": y > 0}.get(log, True)
        if known.any():
            dash, mark = _DASHES[index % len(_DASHES)], _marker(x[known])
            panel.plot(x[known], y[known], dash, color=_COLOURS[index], marker=mark, label=name)
    _finish(panel, *labels, legend=len(panel.get_lines()) > 1)
    if log:
        _logarithmic(panel, log)
    if not panel.get_lines():
        panel.text(0.5, 0.5, "not recorded", ha="center", va="center", transform=panel.transAxes)
        panel.set(xticks=[], yticks=[])


def _seconds(panel: Axes, rows: Sequence[Row], rounds: Vector) -> None:
    """Stack the seconds of each station of a round."""
    laps = [lap for row in rows if isinstance(lap := row.get("seconds"), Mapping)]
    names = dict.fromkeys(str(name) for lap in laps for name in lap if name != "total")
    parts = {name: np.nan_to_num(column(rows, "seconds", name)) for name in names}
    total = np.array([round_seconds(row) for row in rows])
    parts["other"] = np.maximum(total - sum(parts.values()), 0.0)
    shown = {name: values for name, values in parts.items() if np.any(values > 1e-6)}
    if not shown:
        _lines(panel, ("round", "seconds per round"), rounds, {})
        return
    # Two points for each round, so that every round is a bar, and one round alone is visible.
    edges = np.stack([rounds - 0.5, rounds + 0.5], axis=1).ravel()
    bars = [np.repeat(values, 2) for values in shown.values()]
    panel.stackplot(edges, *bars, labels=list(shown), colors=_COLOURS)
    _finish(panel, "round", "seconds per round", legend=True)


def _on_common_rounds(ledgers: Sequence[Sequence[Row]], metric: str) -> Vector:
    """The rounds that all ledgers evaluated: [ledgers, rounds, `_POSITIONS` and the metric]."""
    tables = []
    for rows in ledgers:
        up, down = (column(rows, f"{way}_total") / MEGABYTE for way in ("uplink", "downlink"))
        seconds = np.cumsum([round_seconds(row) for row in rows])
        where = (column(rows, "round"), up, up + down, seconds)
        table = np.stack([*where, column(rows, "metrics", metric)], axis=1)
        tables.append(table[np.isfinite(table).all(axis=1)])
    common = set.intersection(*(set(table[:, 0]) for table in tables))
    return np.stack([table[np.isin(table[:, 0], list(common))] for table in tables])


def _marker(x: Vector) -> str:
    return "o" if x.size <= 30 else ""


def _logarithmic(panel: Axes, which: str) -> None:
    """Make an axis logarithmic where its positive values span more than a factor of 2."""
    points = (line.get_data()["xy".index(which)] for line in panel.get_lines())
    values = [float(v) for v in np.concatenate([[], *points]) if v > 0]
    if values and max(values) > 2 * min(values):
        axis = panel.xaxis if which == "x" else panel.yaxis
        panel.set(**{f"{which}scale": "log"})
        decades = math.log10(max(values) / min(values))
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,), numticks=9))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axis.set_minor_formatter(NullFormatter())


def _finish(panel: Axes, x_label: str, y_label: str, *, legend: bool = False) -> None:
    panel.set(xlabel=x_label, ylabel=y_label, axisbelow=True)
    panel.grid(visible=True, color="#DDDDDD", linewidth=0.7)
    panel.spines[["top", "right"]].set_visible(False)
    if x_label == "round":
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if legend:  # above the panel, so that it covers no curve
        panel.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=3, frameon=False, fontsize=9)


def _figure(width: float, height: float) -> Figure:
    spaced = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1)
    return Figure(figsize=(width, height), dpi=120, layout=spaced)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
