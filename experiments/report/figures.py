"""Figures of a report: how they stand in the page, and how a metric is spread over clients."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from fedraclora.plots.axes import COLOURS, Values
from fedraclora.run.by_clients import read_clients
from fedraclora.run.ledger import Row, column, number

if TYPE_CHECKING:
    from pandas import DataFrame

POINTS = 5000  # clients of a scatter; beyond, as many spread over the population
QUARTERS = 4  # of clients, by how many samples they have


def colour_of(place: int) -> str:
    """Choose the colour of a curve; the last of them is black, which is lost on a dark page."""
    return COLOURS[place % (len(COLOURS) - 1)]


def as_html(figure: go.Figure, x_name: str, y_name: str, *, legend: bool, log: bool = False) -> str:
    """Write a figure as an element of the page, whose script sets its colours, light or dark."""
    figure.update_layout(
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        height=300,
        hovermode="x unified" if legend else "closest",
        showlegend=legend,
        legend={"orientation": "h", "y": -0.25},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"title": x_name, "zeroline": False} | ({"type": "log"} if log else {}),
        yaxis={"title": y_name, "zeroline": False},
    )
    options = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=options)
    return text


def spread_figures(runs: Mapping[str, tuple[Path, list[Row]]]) -> dict[str, str]:
    """Draw how a metric is spread over the clients that measured it on samples of their own.

    Args:
        runs: Folder and rows of the ledger, by the label of the run.

    Returns:
        Title -> an HTML element: by round; of each client in the last round, sorted, and against
        the number of its samples. Of the latter nothing is known where clients sent sums alone.
    """
    names = [name for _, rows in runs.values() for row in rows for name in measured(row)]
    if not names:
        return {}
    metric, several = names[0], len(runs) > 1
    by_round, places, sizes = go.Figure(), go.Figure(), go.Figure()
    for place, (label, (folder, rows)) in enumerate(runs.items()):
        name = f"{escape(label, quote=False)}, " if several else ""
        _add_band(by_round, rows, metric, name, colour_of(place))
        if (frame := last_measured(folder, metric)) is not None:
            line = {"color": colour_of(place), "width": 2}
            own = np.sort(frame[metric].to_numpy(dtype=float))
            share = 100 * (np.arange(len(own)) + 0.5) / len(own)
            said = f"{name}round {frame['round'].iloc[0]}"
            places.add_scatter(x=share, y=own, name=said, mode="lines", line=line)
            _add_sizes(sizes, frame, metric, name, colour_of(place))
    found = {f"{metric} of the clients": as_html(by_round, "round", metric, legend=True)}
    if places.data:
        x_name = "samples it measured on"
        found[f"{metric} of each client, sorted"] = as_html(
            places, "clients, %", metric, legend=True
        )
        found[f"{metric} of clients by their number of samples"] = as_html(
            sizes, x_name, metric, legend=True, log=True
        )
    return found


def figures_of(folder: Path, rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """Give the figures of a run over its clients where these measured last, by metric.

    The last ones say how much a metric has to do with the number of a client's samples: its mean
    over each quarter of the clients, from those with the fewest, and Spearman's correlation. They
    are missing where clients sent sums alone.
    """
    last = next((row for row in reversed(rows) if any(measured(row))), {})
    found = {}
    for metric in measured(last):
        told = {name: number(last, "clients", metric, name) for name in named(last, metric)}
        if (frame := last_measured(folder, metric)) is not None:
            means, correlation = by_size(frame, metric)
            told |= {f"quarter {i}": mean[1] for i, mean in enumerate(means, 1)}
            told["rank correlation with size"] = correlation
        found[metric] = told
    return found


def named(row: Row, metric: str) -> list[str]:
    """Name the figures of a metric over clients."""
    clients = row.get("clients")
    return [*clients[metric]] if isinstance(clients, Mapping) else []


def by_size(frame: DataFrame, metric: str) -> tuple[list[Values], float]:
    """Average samples and a metric over each quarter of clients, by size; and Spearman's rho."""
    ordered = frame.sort_values("samples", kind="stable")[["samples", metric]]
    quarters: list[Values] = np.array_split(ordered.to_numpy(dtype=float), QUARTERS)
    rho = float(frame["samples"].corr(frame[metric], method="spearman"))
    return [quarter.mean(axis=0) for quarter in quarters if len(quarter)], rho


def measured(row: Row) -> Iterator[str]:
    """Name the metrics that clients measured in a row, the headline first."""
    clients = row.get("clients")
    for name, figures in clients.items() if isinstance(clients, Mapping) else ():
        if isinstance(figures, Mapping) and "median" in figures:
            yield str(name)


def last_measured(folder: Path, metric: str) -> DataFrame | None:
    """Read what each client measured last, before local training; None where nothing says it."""
    import pandas as pd

    frame = pd.DataFrame(read_clients(folder))
    if metric not in frame.columns:
        return None
    frame = frame[(frame["when"] == "before") & np.isfinite(frame[metric])]
    frame = frame[frame["round"] == frame["round"].max()]
    return frame if len(frame) > 1 else None


def _add_band(figure: go.Figure, rows: list[Row], metric: str, name: str, colour: str) -> None:
    """Draw the tenth to the ninetieth percentile as a band, the median, and the worst tenth."""
    parts = {
        key: column(rows, "clients", metric, key) for key in ("p10", "p90", "median", "worst10")
    }
    known = np.isfinite(parts["median"])
    x = column(rows, "round")[known].tolist()
    edge = {"width": 0, "color": colour}
    pale = f"rgba({','.join(str(int(colour[i : i + 2], 16)) for i in (1, 3, 5))},0.22)"
    mode = "lines" if len(x) > 1 else "markers"
    figure.add_scatter(x=x, y=parts["p10"][known].tolist(), mode="lines", line=edge,
                       showlegend=False, hoverinfo="skip")  # fmt: skip
    figure.add_scatter(x=x, y=parts["p90"][known].tolist(), mode="lines", line=edge, fill="tonexty",
                       fillcolor=pale, name=f"{name}10th to 90th percentile",
                       showlegend=not name)  # fmt: skip
    for key, words, dash in (("median", "median", "solid"), ("worst10", "worst tenth", "dot")):
        line = {"color": colour, "width": 2, "dash": dash}
        y = parts[key][known].tolist()
        figure.add_scatter(x=x, y=y, mode=mode, line=line, name=f"{name}{words}")


def _add_sizes(figure: go.Figure, frame: DataFrame, metric: str, name: str, colour: str) -> None:
    """Draw each client by its number of samples, and the mean of each quarter of them."""
    frame = frame.sort_values("samples", kind="stable")
    some = np.unique(np.linspace(0, len(frame) - 1, min(len(frame), POINTS)).astype(int))
    shown = frame.iloc[some]
    dots = {"color": colour, "size": 6, "opacity": 0.55}
    words = [f"client {client}" for client in shown["client"]]
    figure.add_scatter(x=shown["samples"].tolist(), y=shown[metric].tolist(), mode="markers",
                       marker=dots, text=words, name=f"{name}a client")  # fmt: skip
    means, correlation = by_size(frame, metric)
    said = f"{name}mean of a quarter (rank correlation {correlation:.2f})"
    figure.add_scatter(x=[m[0] for m in means], y=[m[1] for m in means], mode="lines+markers",
                       line={"color": colour}, name=said)  # fmt: skip
