"""The curves of a report, by plotly: one line for each run, hover to read a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

import numpy as np
import plotly.graph_objects as go

from fedraclora.plots.axes import COLOURS, MEGABYTE, Values
from fedraclora.run.ledger import Row, column, headline, round_seconds

Lines = Mapping[str, tuple[Sequence[float], Sequence[float]]]


def curves(runs: Mapping[str, Sequence[Row]]) -> dict[str, str]:
    """Draw the curves of some runs.

    Args:
        runs: Rows of the ledger, by the label of the run.

    Returns:
        Title -> an HTML element with the curve; only what was recorded of at least one run.
    """
    names = [name for rows in runs.values() if (name := headline(rows)) is not None]
    metric = names[0] if names else "metric"
    axes = {
        f"{metric} by round": ("round", metric, ("round",), ("metrics", metric)),
        f"{metric} by traffic, both ways": ("MB, up and down", metric, (), ("metrics", metric)),
        "loss on the test samples": ("round", "loss", ("round",), ("metrics", "loss")),
        "exact match of answers": ("round", "share", ("round",), ("metrics", "exact_match")),
        "training loss": ("round", "loss", ("round",), ("train_loss",)),
        "gradient energy in the basis": ("round", "share", ("round",), ("report", "energy_seen")),
        "sent by clients, in all": ("round", "MB", ("round",), ("uplink_total",)),
        "sent to clients, catch-up included": ("round", "MB", ("round",), ("downlink_total",)),
        "seconds of a round": ("round", "seconds", ("round",), ("seconds",)),
    }
    found = {}
    for title, (x_name, y_name, x_keys, y_keys) in axes.items():
        lines = {}
        for label, rows in runs.items():
            x = column(rows, *x_keys) if x_keys else traffic(rows)
            y = seconds(rows) if y_keys == ("seconds",) else column(rows, *y_keys)
            kept = np.isfinite(y)
            if kept.sum() > 1:
                unit = MEGABYTE if y_name == "MB" else 1.0
                lines[label] = x[kept].tolist(), (y[kept] / unit).tolist()
        if lines and not (metric == "loss" and title.startswith("loss")):
            found[title] = drawn(lines, x_name, y_name)
    return found


def traffic(rows: Sequence[Row]) -> Values:
    """Megabytes both ways up to each round."""
    return (column(rows, "uplink_total") + column(rows, "downlink_total")) / MEGABYTE


def seconds(rows: Sequence[Row]) -> Values:
    """Wall-clock seconds of each round, all phases together; NaN where none are told."""
    return np.array([round_seconds(row) if "seconds" in row else np.nan for row in rows])


def drawn(lines: Lines, x_name: str, y_name: str) -> str:
    """Draw lines; colours of the page, light or dark, are set by its own script."""
    figure = go.Figure()
    for place, (label, (x, y)) in enumerate(lines.items()):
        colour = COLOURS[place % (len(COLOURS) - 1)]  # the last is black: lost on a dark page
        # Plotly takes tags in a name for markup.
        figure.add_scatter(
            x=x,
            y=y,
            name=escape(label, quote=False),
            mode="lines",
            line={"color": colour, "width": 2},
        )
    figure.update_layout(
        margin={"l": 56, "r": 12, "t": 8, "b": 44},
        height=300,
        hovermode="x unified" if len(lines) > 1 else "closest",
        showlegend=len(lines) > 1,
        legend={"orientation": "h", "y": -0.25},
        paper_bgcolor="rgba(0,0,0,0)",
        plot_bgcolor="rgba(0,0,0,0)",
        xaxis={"title": x_name, "zeroline": False},
        yaxis={"title": y_name, "zeroline": False},
    )
    options = {"responsive": True, "displaylogo": False, "displayModeBar": False}
    text: str = figure.to_html(full_html=False, include_plotlyjs=False, config=options)
    return text
