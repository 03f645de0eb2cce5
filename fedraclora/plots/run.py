"""Draw figures of one run: its course, round by round, and the labels of each client."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fedraclora.devices.timeline import REASONS
from fedraclora.errors import ShapeError
from fedraclora.plots.axes import (
    COLOURS,
    MEGABYTE,
    Values,
    draw_lines,
    label_axes,
    new_figure,
    write_png,
)
from fedraclora.run.ledger import Row, column, headline, number, round_seconds

_STEPS = ("lr", "gamma_min", "gamma_max")
_MAX_BARS = 40  # most clients or classes in stacked bars; beyond, a heat map
_MAX_PIXELS = 2000  # most rows of a heat map; more would not be visible


def run_curves(rows: Sequence[Row], path: Path, title: str, *, planned: int | None = None) -> None:
    """Write `figure_of` a run as a PNG; its folder is created if missing."""
    write_png(figure_of(rows, title, planned=planned), path)


def figure_of(rows: Sequence[Row], title: str, *, planned: int | None = None) -> Figure:
    """Draw one run: metric and losses, metric against bytes, bytes, seconds, diagnostics.

    If clients measured, the first panel has their median, the mean of the worst tenth, and a band
    from the 10th to the 90th percentile.

    A run on simulated devices gets two panels more: metric against virtual time, dropped clients.

    Args:
        rows: The run's ledger rows; columns that are absent leave their panel empty.
        title: Title of the figure; the run's outcome is below it.
        planned: Planned rounds of the run; None: as many as it has.
    """
    devices = any("virtual_seconds" in row or "dropped" in row for row in rows)
    figure = new_figure(18 if devices else 14, 7.5)
    figure.suptitle(f"{title}\n{outcome(rows, planned)}", fontsize=13)
    panels = figure.subplots(2, 4 if devices else 3).ravel()
    metric = headline(rows) or "metric"
    rounds, sent = column(rows, "round"), column(rows, "uplink_total") / MEGABYTE
    measured = column(rows, "metrics", metric)
    losses = {"training": column(rows, "train_loss"), "test": column(rows, "metrics", "loss")}
    traffic = {
        "uplink": sent,
        "downlink with catch-up": column(rows, "downlink_total") / MEGABYTE,
        "catch-up": np.nancumsum(column(rows, "catchup_bytes")) / MEGABYTE,
    }
    draw_lines(panels[0], ("round", metric), rounds, {metric: measured} | _clients(rows, metric))
    low, high = (column(rows, "clients", metric, key) for key in ("p10", "p90"))
    if (known := np.isfinite(low)).any():  # clients need not measure in each round
        edges = rounds[known], low[known], high[known]
        panels[0].fill_between(*edges, color=COLOURS[1], alpha=0.2, linewidth=0)
    draw_lines(panels[1], ("round", "loss"), rounds, losses)
    draw_lines(panels[2], ("uplink so far (MB)", metric), sent, {metric: measured}, log="x")
    draw_lines(panels[3], ("round", "payload so far (MB)"), rounds, traffic, log="y")
    _stack(panels[4], "seconds per round", rounds, _seconds(rows))
    name, last = "aggregation error", column(rows, "report", "aggregation_error")
    shown = {name: last}
    if not np.isfinite(last).any():
        name, shown = "step", {key: column(rows, "effective_step", key) for key in _STEPS}
    draw_lines(panels[5], ("round", name), rounds, shown, log="y")
    if devices:
        clock = column(rows, "virtual_seconds")
        draw_lines(panels[6], ("virtual seconds so far", metric), clock, {metric: measured})
        _stack(panels[7], "clients dropped", rounds, _dropped(rows))
    return figure


def outcome(rows: Sequence[Row], planned: int | None = None) -> str:
    """Describe the outcome of a run: its last metrics, and their round.

    Args:
        rows: The rows of its ledger.
        planned: Planned rounds of the run; None: as many as it has.

    Example:
        >>> outcome([{"round": 12, "metrics": {"accuracy": 0.5}}], 150)
        'accuracy 0.5000, round 12 of 150'
    """
    if not rows:
        return "no rounds yet"
    last = int(number(rows[-1], "round"))
    where = f"round {last}" if planned in {None, last} else f"round {last} of {planned}"
    measured = [row for row in rows if row.get("metrics")]
    if not measured:
        return f"not evaluated, {where}"
    metrics = measured[-1]["metrics"]
    names = [*metrics] if isinstance(metrics, Mapping) else []
    found = {str(name): number(measured[-1], "metrics", str(name)) for name in names}
    words = [f"{n} {v:.4f}" if math.isfinite(v) else f"{n} not finite" for n, v in found.items()]
    return f"{', '.join(words)}, {where}"


def _clients(rows: Sequence[Row], metric: str) -> dict[str, Values]:
    """Return the median and worst tenth of the clients that measured, if any did."""
    words = {"median": "median client", "worst10": "worst tenth"}
    found = {words[key]: column(rows, "clients", metric, key) for key in words}
    return {name: values for name, values in found.items() if np.isfinite(values).any()}


def _seconds(rows: Sequence[Row]) -> dict[str, Values]:
    """Return the seconds of each part of a round."""
    laps = [lap for row in rows if isinstance(lap := row.get("seconds"), Mapping)]
    names = dict.fromkeys(str(name) for lap in laps for name in lap if name != "total")
    parts = {name: np.nan_to_num(column(rows, "seconds", name)) for name in names}
    total = np.array([round_seconds(row) for row in rows])
    return parts | {"other": np.maximum(total - sum(parts.values()), 0.0)} if laps else {}


def _dropped(rows: Sequence[Row]) -> dict[str, Values]:
    """Count the dropped clients of each round, by the start of their reason."""
    counts = np.zeros((len(REASONS), len(rows)))
    for place, row in enumerate(rows):
        dropped = row.get("dropped")
        for client in dropped if isinstance(dropped, list) else []:
            counts[[client["reason"].startswith(start) for start in REASONS], place] += 1
    return dict(zip(REASONS, counts, strict=True))


def _stack(panel: Axes, label: str, rounds: Values, parts: Mapping[str, Values]) -> None:
    """Stack the parts of a round; draw plain lines if all rounds lack them."""
    shown = {name: values for name, values in parts.items() if np.any(values > 1e-6)}
    if not shown:
        draw_lines(panel, ("round", label), rounds, parts)
        return
    # Two points for each round, so that every round is a bar, and a single round is visible.
    edges = np.stack([rounds - 0.5, rounds + 0.5], axis=1).ravel()
    bars = [np.repeat(values, 2) for values in shown.values()]
    panel.stackplot(edges, *bars, labels=list(shown), colors=COLOURS)
    label_axes(panel, "round", label, legend=True)


def label_distribution(
    counts: npt.NDArray[np.int64], path: Path, *, population: int | None = None
) -> None:
    """Draw the labels of each client, and its number of samples.

    Up to 40 clients and 20 classes: stacked bars of counts. Beyond that: a heat map of each
    client's shares, clients sorted by their commonest class, beside their numbers of samples.

    Args:
        counts: Samples of each class at each client, [clients, classes].
        path: The PNG to write.
        population: Number of all clients; None if these are all.

    Raises:
        ShapeError: If ``counts`` is not a matrix with at least one row and one column.
    """
    if counts.ndim != 2 or 0 in counts.shape:
        raise ShapeError(
            f"the counts have the shape {counts.shape}, but must be [clients, classes]"
        )
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
