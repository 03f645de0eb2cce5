from __future__ import annotations

import itertools
import math
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from pandas import DataFrame

from fedraclora.commands.report.figures import lines_of
from fedraclora.errors import ShapeError
from fedraclora.plots import comparison, frontier, run
from fedraclora.plots.comparison import (
    BoardRow,
    clusters,
    compare_figure,
    leaderboard_figure,
    spanned,
)
from fedraclora.plots.frontier import frontier_figure, useful_range
from fedraclora.plots.palette import PALETTE, line_styles
from fedraclora.plots.run import label_distribution, run_curves
from fedraclora.rng import generator
from fedraclora.run.ledger import Row
from fedraclora.run.statistics import mean_curve, rounds_of
from fedraclora.strategies.methods import METHODS

pytestmark = pytest.mark.usefixtures("painted")


def rows(rounds: int, every: int = 1, *, up: int = 4000, error: float | None = None) -> list[Row]:
    found: list[Row] = [{"round": 0, "metrics": {"accuracy": 0.1}, "uplink_total": 0}]
    found[0]["downlink_total"] = 0
    for round_ in range(1, rounds + 1):
        row: Row = {
            "round": round_,
            "train_loss": math.exp(-round_ / 9),
            "catchup_bytes": up,
            "uplink_total": up * round_,
            "downlink_total": 2 * up * round_,
            "effective_step": {"lr": 0.5, "gamma_min": 0.1, "gamma_max": 0.3},
            "seconds": {"open": 0.01, "train": 0.1, "evaluate": 0.02},
        }
        if round_ % every == 0:
            row["metrics"] = {"accuracy": 1 - math.exp(-round_ / 9), "loss": 2.0 / round_}
        if error is not None:
            row["report"] = {"aggregation_error": error}
        found.append(row)
    return found


def on_devices(plain: list[Row], pace: float = 40.0) -> list[Row]:
    """The same run with a virtual clock and dropped clients; row 0 has neither."""
    reasons = ("late: 83.2 s, the deadline is 60 s", "dropped out after 12.1 s")
    for row in plain[1:]:
        t = int(str(row["round"]))
        row["virtual_seconds"] = pace * t
        row["dropped"] = [{"client": k, "reason": reasons[k % 2]} for k in range(t % 4)]
    return plain


def assert_picture(path: Path, least: int = 200) -> None:
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width >= least
    assert height >= least
    assert len(data) > 2000


@pytest.mark.parametrize(
    "found",
    [
        rows(60, 10),
        rows(12, error=0.1),
        rows(3, error=0.0),
        rows(1),
        rows(0),
        [],
        [{"round": 1, "metrics": {"accuracy": None}, "train_loss": None, "seconds": None}],
        on_devices(rows(40, 5)),
        on_devices(rows(1)),
        [{"round": 1, "metrics": {"accuracy": 0.5}, "dropped": []}],
        [{"round": 1, "metrics": {"accuracy": 0.5}, "virtual_seconds": None}],
    ],
)
def test_curves_draw_any_run(tmp_path: Path, found: list[Row]) -> None:
    run_curves(found, tmp_path / "new" / "curves.png", title="fed_rac_lora rank=4, seed 0")
    assert_picture(tmp_path / "new" / "curves.png")


def test_the_first_panel_has_the_spread_over_clients() -> None:
    """Only where they measured; a run whose clients measure nothing has its panel as before."""
    each = {"p10": 0.2, "median": 0.5, "p90": 0.7, "worst10": 0.1}
    found = [{"round": t, "metrics": {"accuracy": 0.6}} for t in range(4)]
    bare, *_ = run.figure_of(found, "t").axes
    assert (len(bare.lines), len(bare.collections)) == (1, 0)
    seen = [
        row | ({"clients": {"accuracy": each}} if row["round"] in {0, 3} else {}) for row in found
    ]
    panel, *_ = run.figure_of(seen, "t").axes
    assert [line.get_label() for line in panel.lines] == [
        "accuracy",
        "median client",
        "worst tenth",
    ]
    (band,) = panel.collections
    box = band.get_datalim(panel.transData)
    assert (box.x0, box.x1, box.y0, box.y1) == (0, 3, 0.2, 0.7)


def test_the_title_says_what_a_run_came_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(run, "write_png", lambda figure, _: figures.append(figure))
    run_curves(
        rows(12, 5), tmp_path / "curves.png", "fedavg on mnist, sgd lr=0.1, seed 3", planned=150
    )
    assert figures[0].get_suptitle().splitlines() == [
        "fedavg on mnist, sgd lr=0.1, seed 3",
        "accuracy 0.6708, loss 0.2000, round 12 of 150",
    ]
    assert run.outcome([]) == "no rounds yet"
    assert run.outcome([{"round": 3}], 3) == "not evaluated, round 3"
    lost: Row = {"round": 4, "metrics": {"accuracy": 0.1, "loss": None}}
    assert run.outcome([lost], 4) == "accuracy 0.1000, loss not finite, round 4"


def test_the_last_panel_has_the_error_of_aggregation_or_the_step() -> None:
    def shown(found: list[Row]) -> tuple[str, int]:
        panel = run.figure_of(found, "a run").axes[5]
        return panel.get_ylabel(), sum(np.size(line.get_xdata()) for line in panel.lines)

    assert shown(rows(4, error=0.1)) == ("aggregation error", 4)
    assert shown(rows(4)) == ("step", 12)


def means(groups: dict[str, list[list[Row]]], metric: str = "accuracy") -> dict[str, DataFrame]:
    return {
        name: mean_curve(rounds_of(dict(enumerate(ledgers)), [metric]), name)
        for name, ledgers in groups.items()
    }


def drawn(curves: dict[str, DataFrame], metric: str, path: Path) -> None:
    """Draw curves, the first word of whose label is their method."""
    methods = {label: label.partition(" ")[0] for label in curves}
    compare_figure(curves, metric, path, methods=methods)


def test_compare_draws_groups_of_seeds(tmp_path: Path) -> None:
    groups = {
        "fed_rac_lora rank=4": [rows(20), rows(20), rows(14)],
        "fedavg": [rows(20, 5, up=90_000)],
        "diverged": [[{"round": 1, "metrics": {"accuracy": None}}]],
        "a long label " * 30: [rows(20)],
    }
    drawn(means(groups), "accuracy", tmp_path / "compare.png")
    assert_picture(tmp_path / "compare.png")


def test_compare_leaves_the_first_rounds_out_of_its_axis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(comparison, "write_png", lambda figure, _: figures.append(figure))
    late = rows(20)
    for row, value in zip(late[1:], np.r_[[0.05] * 3, np.linspace(0.8, 0.9, 17)], strict=True):
        row["metrics"] = {"accuracy": float(value)}
    drawn(means({"late": [late]}), "accuracy", tmp_path / "compare.png")
    assert all(panel.get_ylim()[0] > 0.7 for panel in figures[0].axes)


def test_compare_draws_runs_on_devices_beside_others(tmp_path: Path) -> None:
    groups = {
        "phones": [on_devices(rows(20)), on_devices(rows(20), 55.0)],
        "one lost its clock": [on_devices(rows(20)), rows(20)],
        "none": [rows(20, 5), rows(20, 5)],
    }
    drawn(means(groups), "accuracy", tmp_path / "compare.png")
    assert_picture(tmp_path / "compare.png")


@pytest.mark.parametrize(
    ("curves", "span"),
    [
        ([[[0.1, 0.8, 0.82, 0.85, 0.9]], [[0.7, 0.8, 0.8, 0.8, 0.8]]], (0.795, None)),
        ([[[9.0, 0.4, 0.3, 0.2, 0.2]]], (None, 0.41)),  # a loss: it is the upper end
        ([[[0.72, 0.8, 0.82, 0.85, 0.9]]], (None, None)),  # no more than twice the rest
        ([[[0.1, 0.8, 0.82, 0.9]]], (None, None)),  # too few points to leave one out
        ([[[0.1, 0.8, 0.8, 0.8, 0.8]], [[]]], (None, None)),
        ([[[]]], (None, None)),
    ],
)
def test_the_first_rounds_do_not_squeeze_the_others(
    curves: list[list[list[float]]], span: tuple[float | None, float | None]
) -> None:
    found = comparison._span([(np.min(curve, axis=0), np.max(curve, axis=0)) for curve in curves])
    assert found == pytest.approx(span, abs=1e-12)


def test_many_groups_fit_into_the_legend(tmp_path: Path) -> None:
    groups = {f"fed_rac_lora rank={i} local.lr=0.1": [rows(4)] for i in range(40)}
    drawn(means(groups, "loss"), "loss", tmp_path / "compare.png")
    assert_picture(tmp_path / "compare.png")


def test_dropped_clients_are_counted_by_reason() -> None:
    found = run._dropped(on_devices(rows(5)))
    assert list(found) == ["dropped out", "late", "not among the first"]
    assert found["dropped out"].tolist() == [0, 0, 1, 1, 0, 0]
    assert found["late"].tolist() == [0, 1, 1, 2, 0, 1]
    assert found["not among the first"].tolist() == [0] * 6


@pytest.mark.parametrize("devices", [True, False])
def test_metrics_are_drawn_against_virtual_time_where_there_is_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, devices: bool
) -> None:
    figures: list[Figure] = []
    for module in (run, comparison):
        monkeypatch.setattr(module, "write_png", lambda figure, path: figures.append(figure))
    found = on_devices(rows(6, 2)) if devices else rows(6, 2)
    run_curves(found, tmp_path / "curves.png", "one")
    drawn(means({"a": [found], "b": [rows(6)]}), "accuracy", tmp_path / "compare.png")
    for figure in figures:
        panels = {str(panel.get_xlabel()): panel for panel in figure.axes}
        assert ("virtual seconds so far" in panels) == devices
        if devices:
            lines = panels["virtual seconds so far"].get_lines()
            shown = np.asarray(lines[0].get_xdata(), dtype=float)
            assert shown[np.isfinite(shown)].tolist() == [80.0, 160.0, 240.0]


def test_a_study_without_clocks_has_no_panel_of_seconds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(comparison, "write_png", lambda figure, path: figures.append(figure))
    untimed = [{k: v for k, v in row.items() if k != "seconds"} for row in rows(6)]
    drawn(means({"a": [untimed], "b": [untimed]}), "accuracy", tmp_path / "compare.png")
    assert [str(panel.get_xlabel()).partition(" ")[0] for panel in figures[0].axes] == [
        "round",
        "uplink",
        "uplink",
    ]


@pytest.mark.parametrize("shape", [(5, 3), (30, 10), (20, 100), (500, 10), (1, 1), (41, 1)])
def test_label_distributions_of_all_sizes(tmp_path: Path, shape: tuple[int, int]) -> None:
    counts = generator(0, "test plots").integers(0, 9, shape)
    label_distribution(counts, tmp_path / "partition.png")
    assert_picture(tmp_path / "partition.png")


@pytest.mark.parametrize("shape", [(3, 4), (60, 4)])
def test_clients_without_samples_are_drawn(tmp_path: Path, shape: tuple[int, int]) -> None:
    label_distribution(np.zeros(shape, dtype=np.int64), tmp_path / "partition.png")
    assert_picture(tmp_path / "partition.png")


def test_a_part_of_the_clients_is_called_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(run, "write_png", lambda figure, _: figures.append(figure))
    counts = np.ones((60, 4), dtype=np.int64)
    label_distribution(counts, tmp_path / "partition.png", population=10**6)
    label_distribution(counts, tmp_path / "partition.png")
    labels = [figure.axes[0].get_ylabel() for figure in figures]
    assert [label.split(" clients")[0] for label in labels] == [
        "60 of 1,000,000",
        "60 of 60",
    ]


@pytest.mark.parametrize("shape", [(5,), (0, 3), (3, 0), (2, 2, 2)])
def test_counts_must_be_a_matrix(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ShapeError, match="clients, classes"):
        label_distribution(np.zeros(shape, dtype=np.int64), tmp_path / "partition.png")


def test_a_method_has_one_color_in_every_figure() -> None:
    """Whatever is beside it, in whichever order, as long as there are colors for all."""
    names = [*METHODS]
    own = {name: line_styles([name])[0].color for name in names}
    for name, other in itertools.permutations(names, 2):
        one, two = line_styles([name, other])
        assert one.color != two.color
        if own[name] != own[other]:
            assert (one.color, two.color) == (own[name], own[other])
        else:
            assert (one if name < other else two).color == own[name]
    few = names[: len(PALETTE)]
    shown = dict(zip(few, line_styles(few), strict=True))
    assert len({look.color for look in shown.values()}) == len(few)
    assert [*map(shown.get, few[::-1])] == line_styles(few[::-1])
    assert len({*line_styles(names)}) == len(names)  # more than there are colors: dashes help


def test_rows_of_one_method_are_told_apart() -> None:
    color = line_styles(["ffa_lora"])[0].color
    both = line_styles(["ffa_lora", "fedavg", "ffa_lora"])
    assert (both[0].color, both[2].color) == (color, color)
    assert both[0].dash != both[2].dash
    alone = line_styles(["ffa_lora"] * 3)
    assert alone[0].color == color
    assert len({look.color for look in alone}) == 3


def test_every_figure_draws_a_method_in_its_color(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    for module in (comparison, frontier):
        monkeypatch.setattr(module, "write_png", lambda figure, _: figures.append(figure))
    names = ["fed_rac_lora", "fedavg_lora"]
    path = tmp_path / "a.png"
    drawn(means({name: [rows(6)] for name in names}), "accuracy", path)
    points = [(1.0, 0.5), (10.0, 0.9)]
    frontier_figure({name: ([points], points) for name in names}, ("MB", "accuracy"), path)
    board = [BoardRow(name, 0.9, 0.01, 10.0, exact=True, method=name) for name in names]
    leaderboard_figure(board, "accuracy", path)
    colors = {name: look.color for name, look in zip(names, line_styles(names), strict=True)}
    assert {k: line["color"] for k, line in lines_of(names, names).items()} == colors
    for figure in figures:
        used = {line.get_color() for panel in figure.axes for line in panel.get_lines()}
        assert {*colors.values()} <= used


def test_the_axis_of_a_frontier_is_that_of_the_rows_of_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that is far below is a mark at the edge; a loss has it the other way round."""
    low, high = useful_range([0.9, 0.89, 0.88, 0.85, 0.1])
    assert 0.8 < low < 0.88
    assert 0.9 < high < 0.95
    worse, better = useful_range([0.2, 0.21, 0.22, 0.25, 5.0], higher=False)
    assert 0.22 < worse < 0.4
    assert 0.1 < better < 0.2
    assert useful_range([0.9, 0.89, 0.88, 0.1], [0.5])[0] < 0.5
    assert useful_range([0.5, 0.5]) == pytest.approx((0.45, 0.55))
    figures: list[Figure] = []
    monkeypatch.setattr(frontier, "write_png", lambda figure, _: figures.append(figure))
    good = [[(1.0, 0.2), (10.0, 0.9 - 0.01 * i)] for i in range(4)]
    lost = [(2.0, 0.1), (20.0, 0.11)]
    groups = {"ours": (good, good[0]), "theirs": ([lost], lost)}
    frontier_figure(groups, ("MB", "accuracy"), tmp_path / "a.png")
    (panel,) = figures[0].axes
    marks = [line for line in panel.get_lines() if line.get_marker() == "v"]
    assert [tuple(line.get_xydata()[0]) for line in marks] == [(20.0, panel.get_ylim()[0])]  # type: ignore[index, arg-type]
    assert panel.get_ylim()[0] > 0.8


@pytest.mark.parametrize("uplinks", [(31.0, 66.0), (1.0, 9.0), (0.1, 20.0), (0.01, 4000.0)])
def test_the_axis_of_a_leaderboard_has_ticks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uplinks: tuple[float, float]
) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(comparison, "write_png", lambda figure, _: figures.append(figure))
    board = [BoardRow(f"m{u}", 0.9, 0.01, u, exact=True, method=f"m{u}") for u in uplinks]
    leaderboard_figure(board, "accuracy", tmp_path / "a.png")
    lower = figures[0].axes[1]
    least, most = lower.get_xlim()
    assert len([tick for tick in lower.get_xticks() if least <= tick <= most]) >= 2


def test_a_dollar_in_a_name_begins_no_formula(tmp_path: Path) -> None:
    run_curves(
        [{"round": 1, "metrics": {"$\\foo$": 0.5}, "train_loss": 2.0}],
        tmp_path / "c.png",
        "$\\bar$",
    )
    assert (tmp_path / "c.png").is_file()


@pytest.mark.slow
def test_no_figure_goes_through_pyplot(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib\n"
        "from fedraclora.plots.run import run_curves\n"
        "run_curves([{'round': 1, 'train_loss': 2.0}], pathlib.Path(sys.argv[1]), 'run')\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "curves.png")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_points_of_a_leaderboard_that_touch_share_a_label() -> None:
    """Nearer than a label is tall, at about the same uplink: one label, at the best of them."""
    means = [0.95, 0.91, 0.909, 0.905, 0.902, 0.5]
    uplinks = [400.0, 34.0, 33.0, 35.0, 80.0, 34.0]
    board = [
        BoardRow(label=f"m{i}", mean=mean, spread=0.0, uplink=uplink, exact=True, method="m")
        for i, (mean, uplink) in enumerate(zip(means, uplinks, strict=True))
    ]
    found = [(first.label, places) for first, places in clusters(board, near=0.01)]
    assert found == [("m0", "1"), ("m1", "2-4"), ("m4", "5"), ("m5", "6")]
    both = [replace(board[0], uplink=34.0, mean=0.911), *board[1:4]]
    assert [places for _, places in clusters(both, near=0.0015)] == ["1, 2", "3", "4"]
    assert [places for _, places in clusters([*board[1:3], board[4], board[3]], 0.01)] == [
        "1, 2, 4",
        "3",
    ]


def test_a_method_that_broke_down_does_not_stretch_the_axes_of_a_leaderboard(
    tmp_path: Path,
) -> None:
    sound = [
        BoardRow(f"m{i}", 0.85 - 0.01 * i, 0.004, 10.0 * (i + 1), exact=True, method=f"m{i}")
        for i in range(5)
    ]
    wild = BoardRow("wild", 0.45, 0.5, 30.0, exact=False, method="wild")
    low, high = spanned([*sound, wild])
    assert (low, high) == pytest.approx(spanned(sound))
    assert 0.8 < low < 0.81 - 0.004
    assert 0.854 < high < 0.86
    leaderboard_figure([*sound, wild], "pearson", tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 10_000
    alone = [replace(sound[0], spread=math.nan)]
    assert spanned(alone) == pytest.approx((0.8, 0.9))
