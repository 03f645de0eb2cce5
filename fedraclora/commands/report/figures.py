"""Draw the figures of a report, among them a metric's distribution over clients."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go

from fedraclora.plots.axes import Values
from fedraclora.plots.palette import line_styles
from fedraclora.run.ledger import Row, column, number
from fedraclora.run.recorder import read_clients

if TYPE_CHECKING:
    from pandas import DataFrame

POINTS = 5000  # most clients of a scatter plot; of more, evenly spaced ones are drawn
PLOTLY = {"-": "solid", "--": "dash", ":": "dot", "-.": "dashdot"}  # Matplotlib's dash -> Plotly's
OPTIONS = {"responsive": True, "displaylogo": False, "displayModeBar": False}
LEGEND_LINE = 20  # pixels
QUARTERS = 4  # groups of clients, by number of samples


def lines_of(labels: Iterable[str], methods: Sequence[str]) -> dict[str, dict[str, object]]:
    """Return the line style of each run by its label, in the color of its method."""
    found = zip(labels, line_styles(methods), strict=True)
    return {k: {"color": look.color, "width": 2, "dash": PLOTLY[look.dash]} for k, look in found}


def with_layout(
    figure: go.Figure, x_name: str, y_name: str, *, legend: bool, log: bool = False
) -> go.Figure:
    """Apply the layout of a page, whose script sets light or dark colors.

    The legend has a line for each name, below the title of the x-axis; the figure grows with it.
    """
    names = sum(trace.showlegend is not False for trace in figure.data) if legend else 0
    figure.update_layout(
        margin={"l": 56, "r": 12, "t": 8, "b": 44 + LEGEND_LINE * names},
        height=300 + LEGEND_LINE * names,
        hovermode="x unified" if legend else "closest",
        showlegend=legend,
        legend={"y": 0, "yref": "container", "yanchor": "bottom", "x": 0},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"title": x_name, "zeroline": False}
        | ({"type": "log", "exponentformat": "none"} if log else {}),
        yaxis={"title": y_name, "zeroline": False},
    )
    return figure


def as_html(figure: go.Figure) -> str:
    """Render a figure as an HTML element of a page that includes Plotly."""
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=OPTIONS)
    return text


def spread_figures(
    runs: Mapping[str, tuple[Path, list[Row]]], lines: Mapping[str, dict[str, object]]
) -> dict[str, go.Figure]:
    """Draw the distribution of a metric that clients measured on their own samples.

    Args:
        runs: Folder and ledger rows, by the label of the run.
        lines: Line styles by the same label (`lines_of`).

    Returns:
        Title -> a figure: percentiles by round; each client's value in the last round, sorted; and
        each client's value by its number of samples. The last two are missing if clients sent only
        sums.
    """
    names = [name for _, rows in runs.values() for row in rows for name in measured(row)]
    if not names:
        return {}
    metric, many = names[0], len(runs) > 1
    by_round, places, sizes = go.Figure(), go.Figure(), go.Figure()
    for label, (folder, rows) in runs.items():
        color = str(lines[label]["color"])
        name = f"{escape(label, quote=False)}, " if many else ""
        _add_band(by_round, rows, metric, name, color)
        if (frame := last_measured(folder, metric)) is not None:
            line = lines[label]
            own = np.sort(frame[metric].to_numpy(dtype=float))
            share = 100 * (np.arange(len(own)) + 0.5) / len(own)
            legend = f"{name}round {frame['round'].iloc[0]}"
            places.add_scatter(x=share, y=own, name=legend, mode="lines", line=line)
            _add_sizes(sizes, frame, metric, name, color)
    drawn = {f"{metric} of the clients": (by_round, "round", False)}
    if places.data:
        drawn[f"{metric} of each client, sorted"] = places, "clients, %", False
        sized = f"{metric} of clients by their number of samples"
        drawn[sized] = sizes, "samples it measured on", True
    return {
        title: with_layout(figure, x_name, metric, legend=True, log=log)
        for title, (figure, x_name, log) in drawn.items()
    }


def figures_of(folder: Path, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Summarize each metric over the clients that measured it last.

    Besides the statistics of the ledger, this relates a metric to the number of a client's samples:
    its mean over each quarter of the clients, from the smallest clients on, and Spearman's
    correlation. These are missing if clients sent only sums.
    """
    last = next(filter(None, map(measured, reversed(rows))), {})
    found = {}
    for metric, figures in last.items():
        statistics = {name: number(figures, name) for name in figures}
        if (frame := last_measured(folder, metric)) is not None:
            means, correlation = by_size(frame, metric)
            statistics |= {f"quarter {i}": mean[1] for i, mean in enumerate(means, 1)}
            statistics["rank correlation with size"] = correlation
            values = frame.set_index("client")[metric]
            low = number(figures, "worst10") <= number(figures, "best10")
            statistics["worst client (partition id)"] = int(
                values.idxmin() if low else values.idxmax()
            )
        found[metric] = statistics
    return found


def by_size(frame: DataFrame, metric: str) -> tuple[list[Values], float]:
    """Average size and metric over each quarter of the clients, by size; and Spearman's rho."""
    ordered = frame.sort_values("samples", kind="stable")[["samples", metric]]
    quarters: list[Values] = np.array_split(ordered.to_numpy(dtype=float), QUARTERS)
    differs = min(frame["samples"].nunique(), frame[metric].nunique()) > 1
    rho = frame["samples"].corr(frame[metric], method="spearman") if differs else math.nan
    return [quarter.mean(axis=0) for quarter in quarters if len(quarter)], float(rho)


def measured(row: Row) -> dict[str, Mapping[str, object]]:
    """Collect a row's statistics of the metrics that clients measured, the primary one first."""
    clients = row.get("clients")
    items = clients.items() if isinstance(clients, Mapping) else ()
    return {str(n): each for n, each in items if isinstance(each, Mapping) and "median" in each}


def last_measured(folder: Path, metric: str) -> DataFrame | None:
    """Read each client's last metrics before local training; None if there are none."""
    import pandas as pd

    frame = pd.DataFrame(read_clients(folder))
    if metric not in frame.columns:
        return None
    frame = frame[(frame["when"] == "before") & np.isfinite(frame[metric])]
    frame = frame[frame["round"] == frame["round"].max()]
    return frame if len(frame) > 1 else None


def _add_band(figure: go.Figure, rows: list[Row], metric: str, name: str, color: str) -> None:
    """Draw the 10th to 90th percentile as a band, the median, and the worst tenth."""
    shown = [row for row in rows if math.isfinite(number(row, "clients", metric, "median"))]
    x = column(shown, "round").tolist()
    pale = f"rgba({','.join(str(int(color[i : i + 2], 16)) for i in (1, 3, 5))},0.22)"
    edge = {"mode": "lines", "line": {"width": 0, "color": color}}
    filled = {"fill": "tonexty", "fillcolor": pale, "name": f"{name}10th to 90th percentile"}
    curves: dict[str, dict[str, Any]] = {
        "p10": edge | {"showlegend": False, "hoverinfo": "skip"},
        "p90": edge | filled | {"showlegend": not name},
    }
    for key, words, dash in (("median", "median", "solid"), ("worst10", "worst tenth", "dot")):
        curves[key] = {"mode": "lines" if len(x) > 1 else "markers", "name": f"{name}{words}"}
        curves[key]["line"] = {"color": color, "width": 2, "dash": dash}
    for key, style in curves.items():
        figure.add_scatter(x=x, y=column(shown, "clients", metric, key).tolist(), **style)


def _add_sizes(figure: go.Figure, frame: DataFrame, metric: str, name: str, color: str) -> None:
    """Draw each client by its number of samples, and the mean of each quarter of the clients."""
    frame = frame.sort_values("samples", kind="stable")
    drawn = np.unique(np.linspace(0, len(frame) - 1, min(len(frame), POINTS)).astype(int))
    shown = frame.iloc[drawn]
    dots = {"color": color, "size": 6, "opacity": 0.55}
    words = [f"client {client}" for client in shown["client"]]
    figure.add_scatter(x=shown["samples"].tolist(), y=shown[metric].tolist(), mode="markers",
                       marker=dots, text=words, name=f"{name}a client")  # fmt: skip
    means, correlation = by_size(frame, metric)
    suffix = f" (rank correlation {correlation:.2f})" if math.isfinite(correlation) else ""
    legend = f"{name}mean of a quarter{suffix}"
    figure.add_scatter(x=[m[0] for m in means], y=[m[1] for m in means], mode="lines+markers",
                       line={"color": color}, name=legend)  # fmt: skip
