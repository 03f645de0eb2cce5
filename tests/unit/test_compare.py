from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from fedraclora.commands import cli
from fedraclora.commands.compare import table as comparing
from fedraclora.commands.compare.table import compare_runs
from fedraclora.commands.run_files import find_runs, read_files
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.run.digests import sealed, write_digests
from fedraclora.run.folder import LEDGER
from fedraclora.run.ledger import Ledger, Row
from fedraclora.terminal.tables import TextTable, read_table
from tests.common import summary_of

ROUNDS = 20
COHORT = 5


def ledger_rows(
    final: float,
    up: int,
    error: float | None,
    metric: str,
    pace: float | None,
    rounding: float | None,
) -> list[Row]:
    """Row 0, then a metric that rises linearly to ``final``, evaluated every second round."""
    rows: list[Row] = [{"round": 0, "metrics": {metric: 0.0, "loss": 3.0}, "uplink_total": 0}]
    rows[0]["downlink_total"] = 0
    for round_ in range(1, ROUNDS + 1):
        row: Row = {
            "round": round_,
            "metrics": {},
            "train_loss": 1.0 / round_,
            "cohort": COHORT,
            "failures": [],
            "uplink_bytes": up * COHORT,
            "catchup_bytes": 10,
            "uplink_total": up * COHORT * round_,
            "downlink_total": 30 * round_,
            "seconds": {"train": 0.25, "evaluate": 0.25},
        }
        if round_ % 2 == 0:
            row["metrics"] = {metric: final * round_ / ROUNDS, "loss": 3.0 - round_ / ROUNDS}
        if error is not None:
            row["report"] = {"aggregation_error": error * round_}
        if rounding is not None:
            row["rounding_up"] = rounding * round_
        if pace is not None:
            row["virtual_seconds"] = pace * round_
            row["dropped"] = [{"client": k, "reason": "late: 9 s"} for k in range(round_ % 2)]
        rows.append(row)
    return rows


Make = Callable[..., Path]


def put_config(folder: Path, text: str) -> None:
    """Write a config with its digest."""
    write_digests(folder, text, {})
    (folder / "config.yaml").write_text(text)


def put_summary(folder: Path, summary: dict[str, object]) -> None:
    """Write a summary that belongs to the ledger beside it."""
    seal = Ledger(folder / "ledger.jsonl").seal()
    (folder / "summary.json").write_text(sealed({**summary, LEDGER: seal}))


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Write a run folder; more config by keyword, nested keys with two underscores."""

    def write(
        name: str,
        method: dict[str, object],
        seed: int = 0,
        *,
        final: float = 0.8,
        up: int = 1000,
        error: float | None = None,
        metric: str = "accuracy",
        pace: float | None = None,
        rounding: float | None = None,
        **more: object,
    ) -> Path:
        folder = tmp_path / "sweep" / name
        folder.mkdir(parents=True)
        ledger = Ledger(folder / "ledger.jsonl")
        for row in ledger_rows(final, up, error, metric, pace, rounding):
            ledger.append(row, sync=False)
        config: dict[str, object] = {
            "method": method,
            "data": {"name": "mnist", "root": f"/mnt/{name}/data", "labels": [5, 6]},
            "model": {"name": "mlp"},
            "engine": {"name": "vectorized"},
            "local": {"name": "sgd", "lr": 0.1},
            "clients": 50,
            "cohort": COHORT,
            "rounds": ROUNDS,
            "seed": seed,
            "output": {"dir": str(folder)},
            "resume": None,
        }
        for key, value in more.items():
            section, _, inner = key.partition("__")
            if inner:
                config[section] = {**config[section], inner: value}  # type: ignore[dict-item]
            else:
                config[section] = value
        put_config(folder, yaml.safe_dump(config, sort_keys=False))
        summary = {
            "rounds": ROUNDS,
            "metrics": ledger.rows[-1]["metrics"],
            "weights_digest": "w",
            "ledger_digest": ledger.digest(),
            "uplink_floats": up // 4,
            "seconds": 10.0,
            "versions": {"torch": "2"},
            "git": "abc",
        }
        put_summary(folder, summary)
        return folder

    return write


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do without the figure, which takes the longest."""
    monkeypatch.setattr(comparing, "compare_figure", lambda *_, **__: None)


def rac(rank: int = 4) -> dict[str, object]:
    return {"name": "fed_rac_lora", "rank": rank, "alpha": "auto"}


def test_groups_are_held_at_the_traffic_of_the_run_that_took_least(
    make: Make, tmp_path: Path
) -> None:
    make("rac", rac(), final=0.7, up=1000)
    make("avg", {"name": "fedavg"}, final=0.8, up=3000)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    other, record = table.records
    assert record["metric_at_traffic"] == pytest.approx(0.7)
    # A third of its rounds, 6.7, are within it; evaluated was round 6.
    assert other["metric_at_traffic"] == pytest.approx(0.8 * 6 / ROUNDS)
    title = f"accuracy at {ROUNDS * (1000 * COHORT + 30) / 1e6:.4g} MB both ways"
    assert dict(zip(table.header, table.cells[0], strict=True))[title] == "0.24"
    make("large", {"name": "full"}, final=0.9, up=30_000)
    first, *_ = compare_runs([tmp_path / "sweep"], tmp_path / "out").cells
    # Not 0, which is the untrained model's.
    assert dict(zip(table.header, first, strict=True))[title] == "before its first evaluation"
    lost = make("lost", rac(2), up=1)  # a run that diverged sets no budget
    (lost / "summary.json").unlink()
    (lost / "stopped.json").write_text('{"kind": "diverged", "round": 0, "reason": "NaN"}')
    again = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert again.header == table.header


def test_seeds_are_joined_and_the_numbers_are_right(make: Make, tmp_path: Path) -> None:
    finals = [0.7, 0.8, 0.95]
    for seed, final in enumerate(finals):
        make(f"rac/{seed}", rac(), seed, final=final, up=1000)
        make(f"avg/{seed}", {"name": "fedavg"}, seed, final=0.4, up=50_000, error=1e-3)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out", None, target=0.72)
    assert [r["label"] for r in table.records] == ["fed_rac_lora", "fedavg"]
    record, other = table.records
    assert (record["rank"], other["rank"]) == (1, 2)
    assert record["seeds"] == 3
    assert record["rounds"] == ROUNDS
    assert record["metric"] == "accuracy"
    assert record["metric_mean"] == pytest.approx(statistics.fmean(finals))
    assert record["metric_std"] == pytest.approx(statistics.stdev(finals))
    assert record["uplink_mb_per_client_round"] == pytest.approx(0.001)
    assert record["uplink_mb"] == pytest.approx(1000 * COHORT * ROUNDS / 1e6)
    assert record["downlink_mb"] == pytest.approx(30 * ROUNDS / 1e6)
    assert record["traffic_mb"] == pytest.approx((1000 * COHORT + 30) * ROUNDS / 1e6)
    assert record["uplink_floats"] == 250
    assert record["round_seconds"] == pytest.approx(0.5 * ROUNDS)
    # 0.8 * 18 / 20 = 0.72 and 0.95 * 16 / 20 = 0.76; 0.7 never reaches it.
    assert record["target_rounds"] == 17
    assert record["target_uplink_mb"] == pytest.approx(1000 * COHORT * 17 / 1e6)
    assert record["target_traffic_mb"] == pytest.approx((1000 * COHORT + 30) * 17 / 1e6)
    assert record["target_reached"] == 2
    assert math.isnan(float(str(record["aggregation_error_last"])))
    assert other["aggregation_error_last"] == pytest.approx(1e-3 * ROUNDS)
    assert other["aggregation_error_mean"] == pytest.approx(1e-3 * (ROUNDS + 1) / 2)
    assert table.notes == ()


def test_the_error_of_aggregation_is_a_figure_or_a_word(make: Make, tmp_path: Path) -> None:
    make("rac", rac(), final=0.9)
    make("avg", {"name": "fedavg_lora", "rank": 4}, final=0.8, error=0.01)
    make("other", {"name": "of a later version"}, final=0.7)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    shown = dict(zip(table.header, zip(*table.cells, strict=True), strict=True))
    assert shown["aggregation error, last"] == ("exact", "0.2", "not measured")


def test_what_fewer_bits_cost_gets_columns(make: Make, tmp_path: Path) -> None:
    make("float32", rac(), wire={"uplink": "float32"})
    make("int8", rac(), wire={"uplink": "int8"}, rounding=0.01)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    shown = dict(zip(table.header, zip(*table.cells, strict=True), strict=True))
    assert sorted(shown["rounding error, up"]) == ["-", f"{0.01 * (ROUNDS + 1) / 2:.4g}"]
    assert "rounding error, down" not in shown


def test_virtual_time_and_dropped_clients_get_columns(make: Make, tmp_path: Path) -> None:
    for seed, pace in enumerate((30.0, 50.0)):
        make(f"phones/{seed}", rac(), seed, pace=pace, system={"name": "phones"})
    make("none", rac(), 0, final=0.1, system={"name": "none"})
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out", target=0.72)
    phones, none = table.records
    assert [phones["label"], none["label"]] == [
        "fed_rac_lora system=phones",
        "fed_rac_lora system=none",
    ]
    assert phones["virtual_seconds"] == pytest.approx(40.0 * ROUNDS)
    assert phones["dropped_per_round"] == pytest.approx(0.5)
    assert phones["target_virtual_seconds"] == pytest.approx(40.0 * 18)  # 0.8 * 18 / 20 = 0.72
    for key in ("virtual_seconds", "dropped_per_round", "target_virtual_seconds"):
        assert math.isnan(float(str(none[key])))
    shown = dict(zip(table.header, zip(*table.cells, strict=True), strict=True))
    assert shown["virtual seconds"] == ("800", "-")
    assert shown["virtual seconds to 0.72"] == ("720", "not reached")
    assert [*shown][2:5] == ["accuracy (mean ± std)", "rounds to 0.72", "MB up to 0.72"]
    assert shown["dropped per round"] == ("0.5", "-")


def test_without_devices_there_is_no_column_of_theirs(make: Make, tmp_path: Path) -> None:
    make("a", rac())
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out", target=0.1)
    assert not any("virtual" in title or "dropped" in title for title in table.header)


def test_the_files_hold_the_table(make: Make, tmp_path: Path) -> None:
    for seed in range(2):
        make(f"a{seed}", rac(), seed, final=0.5 + 0.1 * seed)
    make("b", {"name": "fedavg"}, 0, final=0.1, local__name="a|b")
    out = tmp_path / "out"
    table = compare_runs([tmp_path / "sweep"], out, "accuracy", target=0.55)
    text = (out / "table.md").read_text()
    assert text == table.markdown()
    assert "| 1 | fed_rac_lora local=sgd | 0.55 ± 0.071 | 20 (1 of 2 runs) |" in text
    assert "not reached" in text
    assert "local=a\\|b" in text
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["metric_mean"]) for r in rows] == pytest.approx([0.55, 0.1])
    assert rows[1]["metric_std"] == ""
    assert (out / "compare.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ([(rac(4), {}), (rac(8), {})], ["fed_rac_lora rank=4", "fed_rac_lora rank=8"]),
        # What one method has and the other has not goes without saying.
        ([(rac(4), {}), ({"name": "fedavg"}, {})], ["fed_rac_lora", "fedavg"]),
        # A hyperparameter that methods share does not.
        (
            [(rac(4), {}), ({"name": "fedavg_lora", "rank": 8, "alpha": "auto"}, {})],
            ["fed_rac_lora rank=4", "fedavg_lora rank=8"],
        ),
        (
            [(rac(4), {}), (rac(4), {"local__lr": 0.01}), (rac(8), {"local__lr": 0.01})],
            [
                "fed_rac_lora rank=4 local.lr=0.1",
                "fed_rac_lora rank=4 local.lr=0.01",
                "fed_rac_lora rank=8 local.lr=0.01",
            ],
        ),
        (
            [(rac(), {}), (rac(), {"data": {"name": "digits", "split": 0.2}})],
            ["fed_rac_lora data=mnist", "fed_rac_lora data=digits"],
        ),
        (
            [(rac(), {}), (rac(), {"data__labels": [5]})],
            ["fed_rac_lora data.labels=[5, 6]", "fed_rac_lora data.labels=[5]"],
        ),
    ],
)
def test_labels_are_built_from_what_differs(
    make: Make,
    tmp_path: Path,
    runs: list[tuple[dict[str, object], dict[str, object]]],
    labels: list[str],
) -> None:
    for index, (method, more) in enumerate(runs):
        make(f"run{index}", method, **more)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert [r["label"] for r in table.records] == labels


def test_by_parts_the_groups_and_says_what_it_pools(make: Make, tmp_path: Path) -> None:
    for index, (rank, lr) in enumerate([(4, 0.1), (4, 0.2), (8, 0.1)]):
        make(f"run{index}", rac(rank), index, local__lr=lr)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out", by=["rank"])
    assert [r["label"] for r in table.records] == ["fed_rac_lora rank=4", "fed_rac_lora rank=8"]
    assert [r["seeds"] for r in table.records] == [2, 1]
    assert table.notes == ("fed_rac_lora rank=4: pools runs that differ in local.lr",)
    with pytest.raises(ConfigError, match=r"unknown config key 'rnk'.*method\.rank"):
        compare_runs([tmp_path / "sweep"], tmp_path / "out", by=["rnk"])
    with pytest.raises(ConfigError, match="may mean"):
        compare_runs([tmp_path / "sweep"], tmp_path / "out", by=["name"])
    with pytest.raises(ConfigError, match="one group"):
        compare_runs([tmp_path / "sweep"], tmp_path / "out", by=["seed"])


def test_a_loss_reaches_a_target_from_above(make: Make, tmp_path: Path) -> None:
    make("a", rac())
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out", "loss", target=2.5)
    assert table.records[0]["target_rounds"] == 10


def test_different_tasks_are_compared_with_a_warning(make: Make, tmp_path: Path) -> None:
    make("a", rac())
    make("b", rac(), metric="f1", data__name="digits")
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert len(table.records) == 2
    assert any("different tasks (data.name: mnist, digits)" in note for note in table.notes)
    assert any("sweep/b: accuracy is absent" in note for note in table.notes)


def test_a_metric_that_is_not_finite_is_not_averaged_away(make: Make, tmp_path: Path) -> None:
    make("a", rac(), 0)
    make("b", rac(), 1, final=math.nan)  # with a finite loss: as a correlation with constants
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert math.isnan(float(str(table.records[0]["metric_mean"])))
    assert any("sweep/b: accuracy is absent or not finite" in note for note in table.notes)


@pytest.mark.usefixtures("undrawn")
def test_runs_are_ranked_by_the_metric(make: Make, tmp_path: Path) -> None:
    for index, final in enumerate((0.5, 0.9, 0.7)):
        make(f"run{index}", rac(index + 1), final=final)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert [row[0] for row in table.cells] == ["1", "2", "3"]
    assert [r["metric_mean"] for r in table.records] == pytest.approx([0.9, 0.7, 0.5])
    make("more", {"name": "fedavg"}, metric="mse", final=0.1)
    loss = compare_runs([tmp_path / "sweep"], tmp_path / "out", "loss")
    assert [r["rank"] for r in loss.records] == [1, 2, 3, 4]


@pytest.mark.usefixtures("undrawn")
def test_a_diverged_run_is_named_and_not_advised_to_go_on(make: Make, tmp_path: Path) -> None:
    """By its losses, or because it stopped for it; its accuracy may look like one."""
    make("good", rac(4))
    for seed in range(2):
        make(f"lost{seed}", rac(8), seed)
    ledger = Ledger(tmp_path / "sweep" / "lost1" / "ledger.jsonl")
    rows = [*ledger.rows]
    ledger.cut(11)
    for row in rows[12:]:
        ledger.append(row | {"metrics": {"accuracy": 0.1, "loss": None} if row["metrics"] else {}})
    summary = summary_of(ledger.path.parent)  # type: ignore[union-attr]
    summary["ledger_digest"] = ledger.digest()
    put_summary(tmp_path / "sweep" / "lost1", summary)
    stopped(make("stopped", rac(2)), {"kind": "diverged", "round": ROUNDS, "reason": "loss"})
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert [row[:3] for row in table.cells] == [
        ("1", "fed_rac_lora rank=4", "0.8"),
        ("-", "fed_rac_lora rank=8", "1 of 2 diverged (round 12)"),
        ("-", "fed_rac_lora rank=2", "diverged (round 21)"),
    ]
    assert len(table.notes) == 2
    assert all("local.lr" in note and "resume=" not in note for note in table.notes)


@pytest.mark.usefixtures("undrawn")
def test_an_unfinished_run_is_shown_without_a_rank(make: Make, tmp_path: Path) -> None:
    """Apart from the seeds that are finished, whatever it has come to."""
    make("a", rac(), 0)
    for seed, round_ in ((1, 12), (2, 16)):
        folder = make(f"b{seed}", rac(), seed, final=0.99)
        stopped(folder, {"kind": "interrupted", "round": round_, "reason": ""})
        Ledger(folder / "ledger.jsonl").cut(round_)
    (tmp_path / "sweep" / "b2" / "stopped.json").unlink()  # as after kill -9
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert [row[:4] for row in table.cells] == [
        ("1", "fed_rac_lora", "0.8", "1"),
        ("-", "fed_rac_lora (unfinished, rounds 12 to 16 of 20)", "0.693 ± 0.14", "2"),
    ]
    assert [note.rpartition("; ")[2] for note in table.notes] == [
        f"resume it with resume={tmp_path / 'sweep' / name}" for name in ("b1", "b2")
    ]


@pytest.mark.parametrize("width", [60, 80, 240])
def test_a_table_fits_the_terminal(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    header = ("rank", "group", "accuracy (mean ± std)", "seeds", "MB up", "MB down", "seconds")
    best = ("1", "fed_rac_lora local.lr=0.1 rank=8", "0.83 ± 0.012", "3", "1,234", "5,678", "9.5")
    lost = ("-", "a-name-that-cannot-be-broken", "diverged (round 7)", "1", "0", "0", "0.1")
    TextTable(header, (best, lost), (), ("a note",), texts=2).print()
    *drawn, note = capsys.readouterr().out.splitlines()
    assert note == "a note"
    assert max(map(len, drawn)) <= width
    shown = " ".join(drawn)
    assert all(text in shown for text in ("0.83 ± 0.012", "diverged", "cannot-be-broken"))
    assert all(shown.count(word) == 1 for word in ("seeds", "seconds", "9.5"))
    tables = sum(line[0] == "┏" for line in drawn)
    assert shown.count("fed_rac_lora") == shown.count("group") == tables


def test_folders_that_end_alike_are_told_apart_by_what_lies_above(
    make: Make, tmp_path: Path
) -> None:
    for name in ("a", "b"):
        make(f"{name}/seed_0", rac(), 0, init_from=f"/a/folder/with/a/long/path/of/{name}")
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert {record["label"] for record in table.records} == {"a/seed_0", "b/seed_0"}


def test_a_long_label_breaks_and_no_number_does(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    start = "/a/folder/with/a/path/that/is/longer/than/the/terminal/is/wide/so/that/no/column/fits"
    for seed in range(2):
        make(f"warm{seed}", rac(), seed, final=0.7 + 0.1 * seed, init_from=start)
    make("cold", rac(), 0, final=0.5, init_from=None)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert [record["label"] for record in table.records] == [
        "warm0 and 1 more",
        "fed_rac_lora init_from=null",
    ]
    assert f"warm0 and 1 more: fed_rac_lora init_from={start}" in table.notes
    TextTable(("group", "accuracy"), ((start, "0.8765 ± 0.012"),), ()).print()
    drawn = capsys.readouterr().out.splitlines()
    assert {len(line) for line in drawn} == {len(drawn[0])}
    assert len(drawn[0]) <= 80
    assert "0.8765 ± 0.012" in "".join(drawn)
    assert "…" not in "".join(drawn)


def test_what_is_shown_of_a_table_controls_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = "a\x1b[31m\n| b <script>c</script> | \x9b2J\u202e"
    table = TextTable.of([{"method": bad, bad: 1.0, "std": math.nan, "none": None}], [bad])
    table.write(tmp_path, "table")
    table.print()
    text = (tmp_path / "table.md").read_text()
    for shown in (text, capsys.readouterr().out):
        assert not {"\x1b", "\x9b", "\u202e"} & set(shown)
    assert "<script>" not in text
    assert len(text.splitlines()) == 5  # header, line, one row, a blank, one note
    (row,) = read_table(tmp_path / "table.md")
    assert row["method"] == table.cells[0][0]
    assert "<script>" in row["method"]
    assert row["std"] == row["none"] == "-"


@pytest.mark.parametrize("rows", [1, 12])
def test_a_table_in_a_pipe_shows_every_column(
    rows: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As lines where there are few rows; else in several tables, each with the label."""
    monkeypatch.delenv("COLUMNS", raising=False)
    record = {"method": "ours", "empty": ""} | {f"column {i} of them": "0.5000" for i in range(30)}
    TextTable.of([record] * rows).print()
    out = capsys.readouterr().out
    assert max(map(len, out.splitlines())) <= 100
    assert "empty" not in out
    assert all(f" {i} " in out for i in range(30))
    assert out.count("0.5000") == 30 * rows


def test_a_seed_that_comes_twice_is_told(make: Make, tmp_path: Path) -> None:
    make("a", rac(), 3)
    make("b", rac(), 3)
    (note,) = compare_runs([tmp_path / "sweep"], tmp_path / "out").notes
    assert "2 runs but 1 different seeds" in note
    assert "sweep/a" in note
    assert "sweep/b" in note


def spoil_nothing_left(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    put_config(folder, "a: 1")


def stopped(folder: Path, found: object) -> None:
    """Take a run's summary away, and say how it ended."""
    (folder / "summary.json").unlink()
    (folder / "stopped.json").write_text(json.dumps(found))


BAD: dict[str, tuple[Callable[[Path], object], str]] = {
    "no config": (lambda f: (f / "config.yaml").unlink(), r"no config\.yaml"),
    "bad yaml": (lambda f: put_config(f, "a: [1"), r"config\.yaml is damaged"),
    "no mapping": (lambda f: put_config(f, "7"), r"config\.yaml does not contain"),
    "bad json": (lambda f: (f / "summary.json").write_text("{"), r"summary\.json is damaged"),
    "no ledger": (lambda f: (f / "ledger.jsonl").unlink(), r"no ledger .*ledger\.jsonl"),
    "empty ledger": (lambda f: (f / "ledger.jsonl").write_text(""), "has no rounds"),
    "bad ledger": (lambda f: (f / "ledger.jsonl").write_text("x\n{}\n"), "line 1 is damaged"),
    "bad end": (lambda f: stopped(f, 7), r"stopped\.json is damaged.*Remove it"),
    "longer": (
        lambda f: Ledger(f / "ledger.jsonl").append({"round": 21}),
        "not belong together",
    ),
    "changed": (
        lambda f: (f / "ledger.jsonl").write_text(
            (f / "ledger.jsonl").read_text().replace('"cohort": 5', '"cohort": 6')
        ),
        "is damaged .its checksum does not match",
    ),
    "nothing left": (spoil_nothing_left, "no ledger"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_runs_are_named_and_left_out(make: Make, tmp_path: Path, case: str) -> None:
    spoil, words = BAD[case]
    make("good", rac())
    bad = make("bad", rac(), 1)
    spoil(bad)
    with pytest.raises(CheckpointError, match=words):
        read_files(bad)
    table = compare_runs([tmp_path / "sweep"], tmp_path / "out")
    assert [r["seeds"] for r in table.records] == [1]
    (note,) = table.notes
    assert str(bad) in note
    assert note.replace("<", "&lt;") in (tmp_path / "out" / "table.md").read_text()
    with pytest.raises(CheckpointError, match=r"no run to compare\n.*sweep/bad"):
        compare_runs([bad], tmp_path / "out")


def test_runs_are_found_below_a_folder_once(make: Make, tmp_path: Path) -> None:
    a, b = make("x/a", rac()), make("x/deep/b", rac())
    hydra = tmp_path / "sweep" / "x" / ".hydra"
    hydra.mkdir()
    (hydra / "config.yaml").write_text("a: 1")
    (a / "checkpoint").mkdir()
    assert find_runs([tmp_path / "sweep", a]) == ([a, b], [])
    with pytest.raises(CheckpointError, match="no run in"):
        find_runs([a / "checkpoint"])
    with pytest.raises(CheckpointError, match="absent does not exist"):
        find_runs([tmp_path / "absent"])
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match="no run folders"):
        find_runs([tmp_path / "study"])


@pytest.mark.usefixtures("undrawn")
def test_a_comparison_may_be_made_again_of_all_that_lies_beside_it(
    make: Make, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make("a", rac())
    sweep = tmp_path / "sweep"
    out = sweep / "compare"

    def words() -> list[str]:  # as the shell reads sweep/*
        return [str(path) for path in sorted(sweep.iterdir())]

    assert cli.run("compare", [*words(), "--out", str(out)]) == 0
    assert "skipped" not in capsys.readouterr().out
    table = (out / "table.md").read_text()
    study = sweep / "compared" / "mine"
    study.mkdir(parents=True)
    (study / "study.yaml").write_text("grid: {}")
    assert cli.run("compare", [*words(), "--out", str(out)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "skipped" in x]
    assert line.endswith(f"{out}, {study.parent}")
    assert (out / "table.md").read_text() == table
    # So is an empty folder and a file; a command that names no run at all is an error.
    (sweep / "empty").mkdir()
    (sweep / "notes.txt").write_text("mine")
    assert cli.run("compare", [*words(), "--out", str(out)]) == 0
    (line,) = [x for x in capsys.readouterr().out.splitlines() if "skipped" in x]
    assert line.endswith(f"{out}, {study.parent}, {sweep}/empty, {sweep}/notes.txt")
    assert cli.run("compare", [str(out), "--out", str(out)]) == 1
    assert f"no run in {out} " in capsys.readouterr().err
    assert cli.run("compare", [str(sweep / "notes.txt"), "--out", str(out)]) == 1
    assert f"no run in {sweep}/notes.txt " in capsys.readouterr().err


def test_a_run_that_was_never_evaluated_has_nothing_to_compare(make: Make, tmp_path: Path) -> None:
    folder = make("a", rac())
    (folder / "ledger.jsonl").unlink()
    ledger = Ledger(folder / "ledger.jsonl")
    ledger.append({"round": 1, "metrics": {}})
    put_summary(folder, {"rounds": 1, "weights_digest": "w"})
    with pytest.raises(CheckpointError, match=r"none .*runs was evaluated"):
        compare_runs([folder], tmp_path / "out")


def test_an_unknown_metric_names_the_known_ones(make: Make, tmp_path: Path) -> None:
    make("a", rac())
    with pytest.raises(ConfigError, match="There are: accuracy, loss"):
        compare_runs([tmp_path / "sweep"], tmp_path / "out", "acuracy")
    with pytest.raises(ConfigError, match="target=nan"):
        compare_runs([tmp_path / "sweep"], tmp_path / "out", "accuracy", float("nan"))


def test_the_command_prints_the_table_or_the_error(
    make: Make,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "240")
    for rank in (4, 8):
        make(f"rank{rank}", rac(rank))
    out = str(tmp_path / "out")
    words = [str(tmp_path / "sweep"), "--out", out, "--target", "0.4", "--by", "method.rank"]
    assert cli.run("compare", [*words, "--metric", "accuracy"]) == 0
    printed = capsys.readouterr().out
    assert "fed_rac_lora rank=8" in printed
    assert "rounds to 0.4" in (tmp_path / "out" / "table.md").read_text()
    assert cli.run("compare", [str(tmp_path / "absent")]) == 1
    assert "error: " in capsys.readouterr().err


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("name", ["table.md", "compare.png"])
def test_files_of_somebody_elses_are_not_overwritten(name: str, make: Make, tmp_path: Path) -> None:
    runs, out = make("a", rac()), tmp_path / "out"
    compare_runs([runs], out)
    compare_runs([runs], out)  # its own are
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(ConfigError, match=name):
        compare_runs([runs], tmp_path / "mine")
    assert {p.name: p.read_text() for p in (tmp_path / "mine").iterdir()} == {name: "mine"}
