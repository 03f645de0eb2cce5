"""Tables of numbers and arrays of images of one's own."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.binding import bind
from fedraclora.data import DATASETS, DataSet, hold_out, make_partition, select_labels
from fedraclora.data.sources.mnist import parse_idx
from fedraclora.errors import ConfigError, DataError, FedRacLoraError

DRAW = np.random.default_rng(5)
ROWS = 60
FRAME = pd.DataFrame(
    {
        "age": DRAW.integers(20, 80, ROWS),
        "dose": DRAW.normal(3, 2, ROWS),
        "constant": 4,
        "note": ["x, y"] * ROWS,
        "smoker": DRAW.random(ROWS) < 0.5,
        "outcome": [("well", "ill", "None ")[k % 3].strip() for k in range(ROWS)],
        "site": [f"site {k % 4}" for k in range(ROWS)],
    }
).replace({"outcome": {"None": "gone"}})


def load(table: Path, **words: Any) -> DataSet:
    return DATASETS["table"](**{"file": str(table), "label": "outcome"} | words)


def written(folder: Path, kind: str, frame: pd.DataFrame = FRAME) -> Path:
    path = folder / f"table{kind}"
    if kind == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, sep="\t" if ".tsv" in kind else ",")
    return path


@pytest.mark.parametrize("how", ["missing", "validation", "labels"])
def test_a_client_of_whom_no_row_is_left_is_named(tmp_path: Path, how: str) -> None:
    frame = FRAME[FRAME.outcome != "gone"].reset_index(drop=True)
    if how == "missing":
        frame.loc[frame.site == "site 2", "dose"] = np.nan
        data = load(written(tmp_path, ".csv", frame), client="site", missing="drop")
    elif how == "labels":
        frame.loc[frame.site == "site 2", "outcome"] = "gone"
        data = load(written(tmp_path, ".csv", frame), client="site")
        data = select_labels(data, [1, 2])
    else:
        one = frame[frame.site == "site 2"][:1]
        frame = pd.concat([frame[frame.site != "site 2"], one])
        data = load(written(tmp_path, ".csv", frame), client="site", test_fraction=0.1)
        for seed in range(20):  # until it is held out
            found, _ = hold_out(data, 0.4, seed)
            if "site 2" not in found.columns["site"]:
                data = found
                break
    for name, words in {"auto": {}, "natural": {"column": "site"}}.items():
        _, facts = make_partition(data, name=name, clients=None, seed=0, **words)
        assert (facts["clients"], facts["without_rows"]) == (3, ["site 2"])


def test_of_many_clients_without_rows_a_few_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = FRAME[FRAME.outcome != "gone"]
    lost = [kept[:1].assign(site=f"lost {k:02}", dose=np.nan) for k in range(30)]
    file = written(tmp_path, ".csv", pd.concat([kept, *lost], ignore_index=True))
    make_partition(load(file, client="site", missing="drop"), name="auto", clients=None, seed=0)
    assert "30 clients" in caplog.text
    assert caplog.text.count("lost ") == 5
    assert "25 more" in caplog.text


@pytest.mark.parametrize("kind", [".csv", ".tsv", ".csv.gz", ".parquet"])
def test_every_kind_of_file_is_the_same_table(tmp_path: Path, kind: str) -> None:
    data, csv = load(written(tmp_path, kind)), load(written(tmp_path, ".csv"))
    assert torch.equal(data.train.inputs["x"], csv.train.inputs["x"])
    assert torch.equal(data.test.target, csv.test.target)
    assert data.info["classes"] == ["gone", "ill", "well"]
    assert data.info["features"] == ["age", "dose", "constant", "smoker"]
    assert data.info["columns_left_out"] == ["note", "site"]
    assert (len(data.train), len(data.test)) == (48, 12)
    assert np.bincount(data.test.target).tolist() == [4, 4, 4]


def test_features_are_standardized_by_the_training_rows(tmp_path: Path) -> None:
    file = written(tmp_path, ".csv")
    data, raw = load(file), load(file, standardize=False)
    x, plain = data.train.inputs["x"], raw.train.inputs["x"]
    torch.testing.assert_close(x.mean(0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(x.std(0, correction=0), torch.tensor([1.0, 1, 0, 1]))
    mean, deviation = plain.mean(0), plain.std(0, correction=0).clamp(min=1e-9)
    scaled = (raw.test.inputs["x"] - mean) / deviation
    torch.testing.assert_close(data.test.inputs["x"], scaled, atol=1e-4, rtol=1e-4)


def test_one_feature_needs_no_brackets(tmp_path: Path) -> None:
    group = {"name": "table", "file": str(written(tmp_path, ".csv")), "label": "outcome"}
    name = str(load(Path(group["file"])).reading["features"][0])
    data = bind("data", DATASETS, group | {"features": name}, clients=None, seed=0)()
    assert data.reading["features"] == [name]


def test_a_wide_table_says_its_scale_too_though_the_summary_does_not(tmp_path: Path) -> None:
    wide = pd.DataFrame(DRAW.normal(3, 2, (ROWS, 60)), columns=[f"f{k}" for k in range(60)])
    data = load(written(tmp_path, ".csv", wide.assign(outcome=FRAME.outcome)))
    assert data.info["features"] == 60
    assert "feature_means" not in data.info
    assert data.reading["features"] == [*wide.columns]
    assert len(data.reading["subtract"]) == len(data.reading["divide_by"]) == 60
    frame = wide.assign(outcome=FRAME.outcome)
    rows = data.reader(frame, data.reading).samples
    found = (rows.inputs["x"][:, None, :] == data.test.inputs["x"]).all(dim=2)
    assert found.sum(dim=0).tolist() == [1] * len(data.test)


def test_labels_that_are_chosen_are_the_classes_that_the_data_name(tmp_path: Path) -> None:
    data = select_labels(load(written(tmp_path, ".csv")), [2, 0])
    assert data.info["classes"] == data.reading["classes"] == ["well", "gone"]
    rows = FRAME[FRAME.outcome != "ill"]
    found = data.reader(rows, data.reading).samples
    assert found.target.tolist() == [int(name == "gone") for name in rows.outcome]
    digits = select_labels(DATASETS["digits"](), [7, 3])
    assert digits.reading["classes"] == [7, 3]


def test_a_column_of_clients_is_the_partition_and_else_rows_are_divided(tmp_path: Path) -> None:
    file = written(tmp_path, ".csv")
    data = load(file, client="site")
    parts, info = make_partition(data, name="auto", clients=None, seed=1)
    assert (info["partition"], info["clients"]) == ("natural", 4)
    assert isinstance(parts, list)
    assert {*data.columns["site"][parts[2]]} == {"site 2"}
    parts, info = make_partition(load(file), name="auto", clients=7, seed=1)
    assert (info["partition"], info["clients"], info["samples_max"]) == ("iid", 7, 7)
    assert make_partition(data, name="dirichlet", clients=3, seed=1, alpha=1.0)[1]["clients"] == 3
    with pytest.raises(ConfigError, match=r"clients is not set.*column.*data\.client"):
        make_partition(load(file), name="auto", clients=None, seed=1)


def test_test_rows_may_have_a_file_of_their_own(tmp_path: Path) -> None:
    file, other = written(tmp_path, ".csv", FRAME[:40]), written(tmp_path, ".parquet", FRAME[40:])
    data = load(file, test_file=str(other), features=["dose", "age"])
    assert (len(data.train), len(data.test), data.sample_shape) == (40, 20, (2,))
    strange = written(tmp_path, ".tsv", FRAME[40:].assign(outcome="new"))
    with pytest.raises(DataError, match=r"table\.tsv: labels \['new'\]"):
        load(file, test_file=str(strange))


def test_a_number_is_predicted_where_it_is_asked_for(tmp_path: Path) -> None:
    data = load(written(tmp_path, ".csv"), label="dose", task="regression")
    assert (data.loss, data.classes, data.train.target.dtype) == ("squared_error", 1, torch.float32)
    assert "label" not in data.columns
    assert abs(float(data.train.target.mean())) < 1e-6
    raw = load(written(tmp_path, ".csv"), label="dose", task="regression", standardize=False)
    mean, deviation = data.info["label_mean"], data.info["label_deviation"]
    torch.testing.assert_close(data.test.target * deviation + mean, raw.test.target)


def test_rows_that_miss_a_value_are_refused_or_dropped_and_counted(tmp_path: Path) -> None:
    frame = FRAME.copy()
    frame.loc[[7, 9], "dose"] = np.nan
    frame.loc[11, "outcome"] = None
    file = written(tmp_path, ".csv", frame)
    with pytest.raises(DataError, match=r"dose in 2 rows.*outcome in 1 .*row 8\. .*data\.mi"):
        load(file)
    data = load(file, missing="drop")
    assert data.info["rows_dropped"] == 3
    assert len(data.train) + len(data.test) == 57


def far(value: float) -> pd.DataFrame:
    """A table in which ten rows have a value beside which the other rows of a column are one."""
    frame = FRAME.assign(level=np.linspace(-1, 1, ROWS))
    frame.loc[range(10), ["dose", "level"]] = value  # some are training rows
    return frame


def last(fold: str) -> pd.DataFrame:
    """A table with a column of splits, whose last row says something else than "train"."""
    return FRAME.assign(fold=["train"] * (ROWS - 1) + [fold])


PRICES = pd.DataFrame({"carat": np.linspace(0, 1, 303), "price": np.arange(303) // 3 + 900})
LEVEL = {"label": "level", "features": ["age"], "task": "regression"}
# What is refused: the table, the keys beside it, and key words of the message.
REFUSED: dict[str, tuple[pd.DataFrame, dict[str, Any], str]] = {
    "no label": (FRAME, {"label": None}, r"data\.label .*'outcome', 'site'"),
    "label": (FRAME, {"label": "outcom"}, r"data\.label: .*'outcome'"),
    "client and label": (FRAME, {"client": "outcome"}, r"data\.label"),
    "client": (FRAME, {"client": "sites"}, r"data\.client: .*'site'"),
    "words": (FRAME, {"features": ["age", "note"]}, r"\['note'\]"),
    "the label": (FRAME, {"label": "age", "features": ["age"]}, "label"),
    "fractions": (FRAME, {"label": "dose"}, r"fractions.*data\.task=regression"),
    "one class": (FRAME, {"label": "constant"}, "only"),
    "share": (FRAME, {"test_fraction": 0.001}, r"data\.test_fraction=0\.001 of 60 rows"),
    "both": (FRAME, {"test_file": "x.csv", "test_fraction": 0.1}, "all but one"),
    "file": (FRAME, {"file": None}, r"data\.file"),
    "missing": (FRAME, {"missing": "guess"}, "data.missing 'guess'.*drop, error"),
    "prices": (PRICES, {"label": "price"}, r"101 .* 303 rows.*data\.task=regression"),
    "split": (last("hidden"), {"split": "fold"}, r"data\.split=fold .*'hidden'"),
    "no test rows": (last("train"), {"split": "fold"}, "test or validation"),
    "split and share": (
        last("test"),
        {"split": "fold", "test_fraction": 0.5},
        r"data\.split=fold and data\.test_fraction",
    ),
    "no such split": (last("test"), {"split": "folds"}, r"data\.split: .*'folds'"),
    "split is a feature": (last("test"), {"split": "fold", "features": ["fold"]}, "fold"),
    **{f"far {value}": (far(value), {}, "column dose") for value in (1e308, -1e308, 1e30)},
    "far, as it stands": (far(1e39), {"standardize": False}, "column dose"),
    "far target": (far(1e30), LEVEL, "column level"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_a_wrong_key_or_column_is_named(tmp_path: Path, why: str) -> None:
    frame, words, said = REFUSED[why]
    with pytest.raises(FedRacLoraError, match=f"(?i){said}"):
        load(written(tmp_path, ".csv", frame), **words)


def test_what_is_near_to_a_refusal_is_taken(tmp_path: Path) -> None:
    few = PRICES.assign(price=PRICES["price"] % 100)
    assert load(written(tmp_path, ".csv", few), label="price").classes == 100
    assert load(written(tmp_path, ".csv", far(3.0)), **LEVEL).train.target.std() > 0
    assert len(load(written(tmp_path, ".csv", last("test")), split="fold").test) == 1


ROWS_OF_NUMBERS = [f"{v},{v % 2},word" for v in range(9)]
NO_TABLE = {
    "separator": ("t.csv", "a;outcome\n1;2\n", r"data\.separator=';'"),
    "no rows": ("t.csv", "a,outcome\n", "no rows"),
    "a name twice": ("t.csv", "a, a ,outcome\n1,2,ill\n3,4,well\n", "'a'"),
    "empty": ("t.csv", "", "as a table"),
    "no Parquet": ("t.parquet", "a", "as a table"),
    "another kind": ("t.xlsx", "a", r"\.csv, \.tsv.*\.parquet"),
    "a spoiled cell": (
        "t.csv",
        "\n".join(["a,outcome,b", *ROWS_OF_NUMBERS[:3], "n/a?,1,word", *ROWS_OF_NUMBERS[4:]]),
        r"column a .*'n/a\?' in row 4",
    ),
    "decimal commas": (
        "t.tsv",
        "a\toutcome\n" + "\n".join(f"{v},5\t{v % 2}" for v in range(9)),
        "decimal commas.*'0,5'",
    ),
    "Latin-1": ("t.csv", "name,outcome\nM\xfcller,1\n", "UTF-8"),
}


@pytest.mark.parametrize(("name", "text", "said"), NO_TABLE.values(), ids=NO_TABLE)
def test_a_file_that_is_no_table_is_named(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text, encoding="latin-1")
    with pytest.raises(FedRacLoraError, match=rf"{name}.*{said}"):
        load(tmp_path / name)


IMAGES = DRAW.integers(0, 256, (50, 6, 5), dtype=np.uint8)
LABELS = (np.arange(50) % 5 + 1).astype(np.uint8)  # from 1, as EMNIST's


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes([0, 0, 8, array.ndim]) + sizes + array.tobytes()


def test_images_are_the_same_from_npz_and_idx(tmp_path: Path) -> None:
    folder = tmp_path / "raw"
    folder.mkdir()
    (folder / "train-images-idx3-ubyte").write_bytes(idx(IMAGES[:40]))
    (folder / "train-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(LABELS[:40])))
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(IMAGES[40:])))
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(LABELS[40:]))
    names = {"x_train": IMAGES[:40], "y_train": LABELS[:40]}
    np.savez(tmp_path / "a.npz", **names, x_test=IMAGES[40:], y_test=LABELS[40:][:, None])
    one, two = (DATASETS["arrays"](file=str(tmp_path / name)) for name in ("raw", "a.npz"))
    assert one.sample_shape == (1, 6, 5)
    assert one.info["classes"] == ["1", "2", "3", "4", "5"]
    assert torch.equal(one.test.target, torch.arange(10) % 5)
    assert torch.equal(one.test.inputs["x"], two.test.inputs["x"])
    assert one.reading == two.reading
    assert one.reading == {"subtract": 0, "divide_by": 255, "classes": [1, 2, 3, 4, 5]}
    wanted = torch.from_numpy(IMAGES[:40]) / 255
    torch.testing.assert_close(one.train.inputs["x"][:, 0], wanted)


def test_colours_go_first_and_clients_are_kept_with_their_samples(tmp_path: Path) -> None:
    x = DRAW.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    owner = np.arange(20) // 5
    words = np.array(["cat", "dog"])[np.arange(20) % 2]
    np.savez(tmp_path / "a.npz", x=x, target=words, client=owner)
    data = DATASETS["arrays"](file=str(tmp_path / "a.npz"), test_fraction=0.25)
    assert data.sample_shape == (3, 6, 5)
    assert data.info["classes"] == ["cat", "dog"]
    parts, info = make_partition(data, name="auto", clients=None, seed=1)
    assert info["partition"] == "natural"
    pictures = torch.from_numpy(np.moveaxis(x, -1, 1)) / 255
    for row in parts[2].tolist():  # type: ignore[index]
        place = (pictures == data.train.inputs["x"][row]).flatten(1).all(1).nonzero().item()
        assert owner[int(place)] == 2


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"x": IMAGES}, "nothing for target"),
        ({"x": IMAGES, "target": LABELS, "y": LABELS}, r"\['target', 'y'\] could be"),
        ({"x": IMAGES, "target": LABELS, "x_test": IMAGES}, "nothing for test_target"),
        ({"x": IMAGES, "target": LABELS[:9]}, "9 targets, but inputs of {'x': 50}"),
        ({"x": IMAGES, "target": np.eye(50)}, r"target\.argmax\(1\)"),
        ({"x": IMAGES, "target": LABELS * 0}, r"every target is \['0'\]"),
        ({"x": IMAGES, "target": LABELS, "client": LABELS[:9]}, r"client has shape \(9,\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named(tmp_path: Path, arrays: Any, said: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(FedRacLoraError, match=rf"a\.npz.*{said}"):
        DATASETS["arrays"](file=str(tmp_path / "a.npz"))


@given(st.integers(0, len(idx(LABELS)) - 1) | st.binary(max_size=20))
def test_a_damaged_idx_file_is_named(data: int | bytes) -> None:
    """Cut short at any byte, or any other bytes."""
    with pytest.raises(DataError, match=r"it\b"):
        parse_idx(idx(LABELS)[:data] if isinstance(data, int) else data, "it")


def test_a_part_of_an_npz_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez(file, x=np.zeros((20, 9)), target=np.arange(20) % 2)
    whole = file.read_bytes()

    @given(st.integers(0, len(whole) - 1))
    def refused(kept: int) -> None:
        file.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=r"a\.npz"):
            DATASETS["arrays"](file=str(file))

    refused()


FOLDS = np.where(
    np.arange(ROWS) % 5 == 0, "test", np.where(np.arange(ROWS) % 5 == 1, "validation", "train")
)


def test_a_column_of_splits_gives_each_client_its_own_test_and_scales_by_training_rows(
    tmp_path: Path,
) -> None:
    frame = FRAME.assign(fold=FOLDS, site=[f"site {k % 3}" for k in range(ROWS)])
    frame.loc[(frame.site == "site 1") & (frame.fold == "test"), "fold"] = "train"
    data = load(written(tmp_path, ".csv", frame), client="site", split="fold")
    sizes = {name: int((frame.fold == name).sum()) for name in ("train", "test", "validation")}
    assert data.validation is not None
    assert (len(data.train), len(data.test), len(data.validation)) == tuple(sizes.values())
    assert "fold" not in data.reading["features"]
    training = frame[frame.fold == "train"]
    assert data.reading["subtract"][0] == pytest.approx(training["age"].mean())
    first, none, last = data.tests
    assert none is None
    for own, site in ((first, "site 0"), (last, "site 2")):
        raw = frame[(frame.fold == "test") & (frame.site == site)]["age"]
        wanted = (raw - training["age"].mean()) / training["age"].std(ddof=0)
        assert own is not None
        torch.testing.assert_close(own.inputs["x"][:, 0], torch.tensor(wanted.to_numpy()).float())
    parts, _ = make_partition(data, name="natural", clients=None, seed=0)
    assert isinstance(parts, list)
    assert len(parts) == 3
    with pytest.raises(ConfigError, match="by number"):
        make_partition(data, name="iid", clients=3, seed=0)
    with pytest.raises(ConfigError, match=r"data\.validation=0\.1.*leave it at 0"):
        hold_out(data, 0.1, 0)


def test_what_is_far_off_in_test_rows_or_too_fine_for_float32_is_refused(tmp_path: Path) -> None:
    other = FRAME.copy()
    other.loc[5, "dose"] = 1e308
    (tmp_path / "other").mkdir()
    test = str(written(tmp_path / "other", ".csv", other))
    with pytest.raises(DataError, match=r"column dose .*1e\+308.*float32"):
        load(written(tmp_path, ".csv"), test_file=test)
    stamps = written(tmp_path, ".csv", FRAME.assign(stamp=1.7e9 + np.arange(ROWS)))
    assert len(load(stamps).train.inputs["x"][:, -1].unique()) > 40
    with pytest.raises(DataError, match=r"column stamp"):
        load(stamps, standardize=False)
    rare = written(tmp_path, ".csv", FRAME.assign(rare=(np.arange(ROWS) % 20 == 0) * 9e5))
    assert len(load(rare).train.inputs["x"][:, -1].unique()) == 2
