"""New samples are read as a run's own were, and answered in the words of its data."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import fedraclora
from fedraclora.commands.cli import main
from fedraclora.data import DATASETS, select_labels
from fedraclora.data.encoders import conversations
from fedraclora.data.encoders.array import SampleSpec, as_scaled
from fedraclora.data.encoders.array_reader import ArrayReader
from fedraclora.data.encoders.text import TextReader
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES
from fedraclora.errors import ConfigError, DataError, FedRacLoraError
from fedraclora.evaluation.evaluate import _Words, predict
from tests.common import FIXED

QUIET = "output.progress=false"
DRAW = np.random.default_rng(3)
FRAME = pd.DataFrame({"age": DRAW.integers(20, 80, 90), "dose": DRAW.normal(3, 2, 90)})
FRAME["kind"] = np.where(FRAME.age + 5 * FRAME.dose > 65, "ill", "well")
FRAME["score"] = 40 + 0.5 * FRAME.age
FRAME["note"] = "x"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a table, in ``run``, beside its files and rows without a target."""
    place = tmp_path_factory.mktemp("table")
    FRAME[:60].to_csv(place / "train.csv", index=False)
    FRAME[60:].to_csv(place / "test.csv", index=False)
    FRAME[60:][["dose", "age"]].to_csv(place / "new.csv", index=False)
    fedraclora.simulate(
        *(QUIET, "data=table", f"data.file={place}/train.csv", f"data.test_file={place}/test.csv"),
        *("data.label=kind", "data.features=[age,dose]", "model.hidden=[8]", *FIXED),
        *("output.plots=false", "evaluate.batch_size=7"),
        clients=3,
        rounds=2,
        folder=place / "run",
    )
    return place


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[object, str, str]]:
    """Run ``fedraclora`` on words; give its status and what it printed."""

    def call(*words: object) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["fedraclora"])
        with pytest.raises(SystemExit) as end:
            main([*map(str, words)])
        return end.value.code, *capsys.readouterr()

    return call


def test_a_run_measures_its_own_samples_bit_for_bit_as_its_ledger(folder: Path) -> None:
    run = fedraclora.read_run(folder / "run")
    last = run.rows[-1]["metrics"]
    assert run.evaluate() == run.evaluate(folder / "test.csv") == last
    assert run.evaluate(FRAME[60:]) == last
    assert run.evaluate(str(folder / "test.csv"), round=1) == run.rows[1]["metrics"] != last


def test_a_row_is_answered_for_each_row_in_its_order(folder: Path) -> None:
    run = fedraclora.read_run(folder / "run")
    found = run.predict(folder / "new.csv")
    assert [*found.columns] == ["prediction", "probability.ill", "probability.well"]
    right = (found.prediction.to_numpy() == FRAME.kind[60:].to_numpy()).mean()
    assert right == pytest.approx(run.rows[-1]["metrics"]["accuracy"])
    mixed = FRAME[60:].sample(frac=1, random_state=0)
    pd.testing.assert_frame_equal(
        run.predict(mixed), found.set_axis(FRAME.index[60:]).loc[mixed.index]
    )
    np.testing.assert_allclose(found.filter(like="probability").sum(axis=1), 1)
    with torch.no_grad():
        x = run.builder.built.task.test.inputs["x"]
        by_hand = run.model()(x).softmax(dim=1).numpy()
    np.testing.assert_allclose(found.filter(like="probability"), by_hand, rtol=1e-5)


def test_rows_that_cannot_be_read_end_in_a_sentence(folder: Path, tmp_path: Path) -> None:
    run = fedraclora.read_run(folder / "run")
    FRAME.assign(kind=[*FRAME.kind[:2], "odd", *FRAME.kind[3:]]).to_csv(folder / "odd.csv")
    for data, said in [
        (folder / "new.csv", "lacks the column 'kind'"),
        (FRAME.drop(columns="dose"), "lacks the column 'dose'"),
        (folder / "odd.csv", r"odd\.csv: labels \['odd'\] .* row 3"),
        (FRAME.assign(kind="odd"), "'odd'"),
        (FRAME.assign(age=[30, "old"] * 45), "column age holds numbers, but 'old' in row 2"),
        (FRAME.assign(age=np.nan), "values are missing"),
        ((FRAME[["age", "dose"]].to_numpy(), FRAME.kind), "data is a tuple"),
        (tmp_path / "none.csv", "no such file"),
        ("valid", "test or validation"),
        ("validation", "data.validation=0"),
    ]:
        with pytest.raises(FedRacLoraError, match=said):
            run.evaluate(data)
    with pytest.raises(DataError, match="values are missing"):
        run.predict(FRAME.assign(dose=[np.nan, *FRAME.dose[1:]]))


def test_the_command_line_measures_and_answers(
    folder: Path, tmp_path: Path, command: Callable[..., tuple[int, str, str]]
) -> None:
    run = fedraclora.read_run(folder / "run")
    new, out = folder / "new.csv", tmp_path / "out.jsonl"
    status, said, _ = command("evaluate", folder / "run", "--data", folder / "test.csv", "--json")
    assert (status, json.loads(said)) == (
        0,
        {"metrics": run.rows[-1]["metrics"], "samples": 30, "left_out": 0},
    )
    assert "samples   30" in command("evaluate", folder / "run", "--round", 1)[1]
    found = run.predict(new)
    assert command("predict", folder / "run", "--data", new)[1] == found.to_csv(index=False)
    assert command("predict", folder / "run", "--data", new, "--out", out)[:2] == (0, "")
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows == found.to_dict("records")
    for words, reason in [
        (["--out", out], "exists already"),
        (["--out", tmp_path / "a.txt"], "end in .csv or .jsonl"),
        (["--out", tmp_path / "no" / "a.csv"], "does not exist"),
        (["--round", 9], "not round 9"),
    ]:
        status, said, error = command("predict", folder / "run", "--data", new, *words)
        assert (status, said) == (1, "")
        assert reason in error
        assert "Traceback" not in error
    assert "is not a run folder" in command("evaluate", tmp_path / "no")[2]
    run.export(tmp_path / "export", "state_dict")
    assert "is an export" in command("predict", tmp_path / "export", "--data", new)[2]


def test_data_that_have_changed_are_not_taken_for_those_of_the_run(
    folder: Path, tmp_path: Path
) -> None:
    """Means, deviations and classes would be others."""
    file = tmp_path / "train.csv"
    FRAME.to_csv(file, index=False)
    words = (QUIET, "data=table", f"data.file={file}", "data.label=kind", "output.plots=false")
    fedraclora.simulate(*words, clients=2, rounds=0, folder=tmp_path / "run")
    FRAME[5:].to_csv(file, index=False)
    with pytest.raises(DataError, match=r"train.csv has changed"):
        fedraclora.read_run(tmp_path / "run").predict(folder / "new.csv")


def test_a_number_is_answered_on_its_own_scale_and_dropped_rows_have_none() -> None:
    rows = FRAME.assign(dose=[np.nan, *FRAME.dose[1:]])
    run = fedraclora.simulate(
        *(
            QUIET,
            "data.missing=drop",
            "local.lr=0.3",
            "engine.chunk=8",
            "local.epochs=5",
            "data.features=[age,dose]",
        ),
        data=rows,
        target="score",
        clients=2,
        rounds=10,
        method="fedavg",
        model="linear",
    )
    found = run.predict(rows.drop(columns="score"))
    assert [*found.columns] == ["prediction"]
    assert np.isnan(found.prediction[0])
    assert found.prediction[1:].notna().all()
    assert np.abs(found.prediction[1:] - FRAME.score[1:]).max() < 1
    assert len(run.read(rows).rows) == 89


@pytest.mark.parametrize("label", ["kind", "score"])
def test_a_table_reads_its_test_file_as_whatever_comes_later(label: str, tmp_path: Path) -> None:
    for name, rows in {"train": FRAME[:60], "test": FRAME[60:]}.items():
        rows.to_csv(tmp_path / f"{name}.csv", index=False)
    data = DATASETS["table"](
        file=str(tmp_path / "train.csv"),
        test_file=str(tmp_path / "test.csv"),
        label=label,
        task="regression" if label == "score" else "classification",
    )
    read = data.reader(tmp_path / "test.csv", data.reading)
    assert torch.equal(read.samples.inputs["x"], data.test.inputs["x"])
    assert torch.equal(read.samples.target, data.test.target)


def test_images_are_read_as_those_of_the_run(tmp_path: Path) -> None:
    images = DRAW.integers(0, 256, (40, 6, 5, 3), dtype=np.uint8)
    names = np.array(["dog", "cat"])[np.arange(40) % 2]
    parts = {"x": images[:30], "target": names[:30]}
    np.savez(tmp_path / "own.npz", **parts, x_test=images[30:], target_test=names[30:])
    np.savez(tmp_path / "new.npz", images=images[30:], labels=names[30:])
    np.savez(tmp_path / "bare.npz", x=images[30:])
    words = (QUIET, "data=arrays", f"data.file={tmp_path}/own.npz", "output.plots=false")
    run = fedraclora.simulate(
        *FIXED, *words, model="linear", clients=2, rounds=1, folder=tmp_path / "run"
    )
    run = fedraclora.read_run(tmp_path / "run")
    last = run.rows[-1]["metrics"]
    assert run.evaluate(tmp_path / "new.npz") == run.evaluate((images[30:], names[30:])) == last
    found = run.predict(tmp_path / "bare.npz").prediction
    assert (found == names[30:]).mean() == last["accuracy"]
    assert (run.predict(images[30:]).prediction == found).all()
    for data, said in [
        (tmp_path / "bare.npz", "no target to evaluate on"),
        (tmp_path / "own.npz", "beside other samples"),
        ((images[30:] / 255.0, names[30:]), "scaled already"),
        ((images[30:], np.full(10, "cow")), "'cow'"),
        ((images[30:, :5], names[30:]), "data.shape"),
    ]:
        with pytest.raises(DataError, match=said):
            run.evaluate(data)


def test_bytes_are_none_of_a_run_on_other_numbers() -> None:
    reader = ArrayReader(SampleSpec((3,), "cross_entropy", 2), numbered=True)
    x = DRAW.normal(size=(4, 3))
    assert torch.equal(reader(x, {}, target=False).samples.inputs["x"], torch.tensor(x).float())
    with pytest.raises(DataError, match="holds bytes"):
        reader((x.astype(np.uint8), [0, 1, 0, 1]), {})


def test_bytes_are_scaled_to_the_very_bits_of_training() -> None:
    every = torch.arange(256, dtype=torch.uint8)
    fitted = SampleSpec((1,), "cross_entropy", 2).validate(Samples({"x": every}, every % 2), "here")
    scaled = as_scaled(every, {"subtract": 0.0, "divide_by": 255.0}).float()
    assert torch.equal(fitted.inputs["x"][:, 0], scaled)


def test_classes_are_told_by_name_where_some_were_chosen() -> None:
    run = fedraclora.simulate(
        *(QUIET, "data=digits", "data.labels=[7,3]", "pretrain=none", "clients_per_round=2"),
        clients=2,
        rounds=0,
    )
    data = select_labels(DATASETS["digits"](), [7, 3])
    raw = data.test.inputs["x"] * 16
    names = np.array([7, 3])[data.test.target]
    assert run.evaluate((raw, names)) == run.evaluate() == run.rows[-1]["metrics"]
    assert {*run.predict(raw).prediction} <= {7, 3}
    with pytest.raises(DataError, match="'5'"):
        run.evaluate((raw, np.full(len(raw), 5)))


@pytest.mark.parametrize("words", [["method=fedsa_lora"], ["head=personal"]])
def test_a_model_of_which_clients_keep_a_part_is_refused(words: list[str]) -> None:
    run = fedraclora.simulate(
        QUIET,
        *FIXED,
        "data=digits",
        "pretrain=none",
        *words,
        clients=2,
        clients_per_round=2,
        rounds=1,
    )
    for call in (run.evaluate, lambda: run.predict("test")):
        with pytest.raises(ConfigError, match="each client keeps"):
            call()


class Said(nn.Module):
    """Gives its input as output."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.one


def answered(outputs: Any, loss: str, **reading: Any) -> list[dict[str, object]]:
    x = torch.tensor(outputs, dtype=torch.float64)
    samples = Samples({"x": x}, torch.zeros(len(x)))
    return predict(Said(), {"one": torch.ones(())}, samples, loss, reading, batch_size=2)


def test_outputs_are_put_into_words_by_their_loss() -> None:
    assert {*LOSSES} <= {*vars(_Words)}
    names = {"classes": ["no", "yes"]}
    odds = float(np.log(3))
    for loss, outputs in {"cross_entropy": [[0, odds]] * 3, "logistic": [[odds]] * 3}.items():
        rows = answered(outputs, loss, **names)
        assert len(rows) == 3
        assert rows[2]["prediction"] == "yes"
        assert rows[2]["probability"] == pytest.approx({"no": 0.25, "yes": 0.75})
    assert answered([[1, -1], [2, 3]], "multi_label")[1]["prediction"] == [0, 1]
    scale = {"target": {"subtract": 40.0, "divide_by": 2.0}}
    assert answered([[1.5]], "squared_error", **scale) == [{"prediction": 43.0}]
    assert answered([[1, 2]], "squared_error") == [{"prediction": [1.0, 2.0]}]
    tokens = answered([[[0, 1], [0, odds]]], "next_token", symbols="ab")
    assert tokens == [{"prediction": "b", "probability": pytest.approx(0.75)}]
    assert answered([[[0, 1], [2, 0]]], "token_classes", **names) == [{"prediction": ["yes", "no"]}]
    pixels = [[[[0, 3, 0]], [[1, 1, 1]]]]  # two classes of one row of three pixels
    assert answered(pixels, "pixel_classes") == [{"prediction": [[1, 0, 1]]}]
    assert answered([[1, 2]], "mine:loss") == [{"output": [1.0, 2.0]}]


def test_inputs_are_those_of_the_run() -> None:
    """Tokens without their mask would be answered, as if padding were text."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(**sizes, intermediate_size=8, num_labels=3)
    ids = DRAW.integers(1, 20, (20, 6))
    mask = np.where(np.arange(6) < 4 + 2 * (np.arange(20)[:, None] % 2), 1, 0)
    target = np.where(mask, ids % 3, -100)
    inputs = {"input_ids": ids, "attention_mask": mask}
    run = fedraclora.simulate(
        QUIET,
        model=transformers.BertForTokenClassification(config),
        data=[(inputs | {"input_ids": (ids + 1) % 20}, target)] * 2,
        test=(
            {"input_ids": ids[::-1].copy(), "attention_mask": mask[::-1].copy()},
            target[::-1].copy(),
        ),
        rounds=0,
    )
    assert run.evaluate((inputs, target)) == pytest.approx(run.rows[-1]["metrics"])
    assert [len(row) for row in run.predict(inputs).prediction] == mask.sum(axis=1).tolist()
    for data, said in [
        ({"input_ids": ids}, "expected .*attention_mask"),
        (ids, "expected .*attention_mask"),
        (inputs | {"input_ids": ids + 30}, "knows 20 tokens"),
    ]:
        with pytest.raises(FedRacLoraError, match=said):
            run.predict(data)


@pytest.mark.parametrize(
    "values",
    [[0, 1], [7, 3], ["7", "3"], [True, False], ["ill", "well"]],
    ids=lambda values: f"{type(values[0]).__name__} {values[0]}",
)
def test_a_class_is_answered_as_its_column_has_it(values: list[Any]) -> None:
    frame = FRAME[["age", "dose"]].assign(kind=np.array(values)[1 * (FRAME.kind == "ill")])
    run = fedraclora.simulate(
        *(QUIET, "local.lr=0.3", "engine.chunk=8", "local.epochs=5", "data.missing=drop"),
        data=frame,
        target="kind",
        clients=3,
        rounds=2,
    )
    found = run.predict(frame).prediction
    assert found.dtype == frame.kind.dtype
    assert (found == frame.kind).mean() == pytest.approx(run.evaluate(frame)["accuracy"])
    assert (found == frame.kind).mean() > 0.5
    gaps = run.predict(frame.assign(dose=[np.nan, *frame.dose[1:]])).prediction
    assert gaps[1:].tolist() == found[1:].tolist()
    assert {*map(type, gaps[1:])} == {type(values[0])}
    assert np.isnan(gaps[0])


def test_whole_numbers_of_a_file_are_numbers_also_beside_rows_without_an_answer(
    command: Callable[..., tuple[object, str, str]], tmp_path: Path
) -> None:
    frame = FRAME[["age", "dose"]].assign(kind=np.where(FRAME.kind == "ill", 4, 12))
    frame.to_csv(tmp_path / "train.csv", index=False)
    frame.assign(dose=[np.nan, *frame.dose[1:]]).to_csv(tmp_path / "new.csv", index=False)
    fedraclora.simulate(
        *(QUIET, "data=table", f"data.file={tmp_path}/train.csv", "data.label=kind"),
        *("data.missing=drop", "model.hidden=[4]", "output.plots=false", *FIXED),
        clients=2,
        clients_per_round=2,
        rounds=1,
        folder=tmp_path / "run",
    )
    given = ("predict", tmp_path / "run", "--data", tmp_path / "new.csv")
    answers = [json.loads(line)["prediction"] for line in command(*given, "--json")[1].splitlines()]
    assert answers[0] is None
    assert {*answers[1:]} <= {4, 12}
    assert {*map(type, answers[1:])} == {int}
    cells = [line.partition(",")[0] for line in command(*given)[1].splitlines()]
    assert cells[1:] == ["", *map(str, answers[1:])]


def test_a_model_that_names_its_classes_answers_by_them() -> None:
    class Config:
        id2label: dict[int, str]

    def said(labels: list[str], loss: str = "cross_entropy", **reading: Any) -> object:
        model, x = Said(), torch.tensor([[1.0, 2.0, 0.0]])
        model.config = Config()
        model.config.id2label = dict(enumerate(labels))
        samples = Samples({"x": x}, torch.zeros(1))
        (row,) = predict(model, {"one": torch.ones(())}, samples, loss, reading, 1)
        return row["prediction"]

    assert said(["PER", "ORG", "O"]) == "ORG"
    assert said(["PER", "ORG", "O"], "multi_label") == ["PER", "ORG"]
    assert said(["LABEL_0", "LABEL_1", "LABEL_2"]) == 1
    assert said(["PER", "ORG", "O"], classes=["a", "b", "c"]) == "b"  # the data's own come first


def test_padding_has_no_class_and_ends_no_text() -> None:
    class Counted(Said):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(input_ids, 5).double() * self.one

    ids = torch.tensor([[3, 1, 4, 4], [2, 0, 0, 0], [1, 2, 3, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 1, 0]])
    samples = Samples({"input_ids": ids, "attention_mask": mask}, torch.zeros(3))
    for loss, wanted in {
        "token_classes": [[3, 1, 4, 4], [2], [1, 2, 3]],
        "next_token": [4, 2, 3],
    }.items():
        rows = predict(Counted(), {"one": torch.ones(())}, samples, loss, {}, batch_size=2)
        assert [row["prediction"] for row in rows] == wanted


def test_of_two_columns_of_one_name_none_is_taken_in_silence() -> None:
    frame = pd.DataFrame([["a", "b", "c"]], columns=["prompt", "response", "prompt"])
    reader = TextReader(("prompt",), "response", True, "classification", None, None, None, 8)
    form = conversations.RowForm()
    for read in (reader.rows, lambda found: conversations.program_rows(found, form)):
        with pytest.raises(DataError, match="several columns named 'prompt'"):
            read(frame)


def test_a_run_answers_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its data were named from the folder in which it began."""
    began, elsewhere = tmp_path / "began", tmp_path / "elsewhere"
    for place in (began, elsewhere):
        place.mkdir()
    FRAME.to_csv(began / "train.csv", index=False)
    monkeypatch.chdir(began)
    words = ("data=table", "data.file=train.csv", "data.label=kind", "data.features=[age,dose]")
    run = fedraclora.simulate(QUIET, *FIXED, *words, clients=3, rounds=1, folder=began / "run")
    wanted = run.predict(FRAME)
    monkeypatch.chdir(elsewhere)
    found = fedraclora.read_run(began / "run")
    assert found.predict(FRAME).equals(wanted)
    assert found.evaluate() == run.rows[-1]["metrics"]
    FRAME[:-1].to_csv(began / "train.csv", index=False)
    with pytest.raises(DataError, match="has changed"):
        fedraclora.read_run(began / "run").evaluate()
    (began / "train.csv").unlink()
    with pytest.raises(DataError, match=r"train\.csv.*missing.*restore the file") as raised:
        fedraclora.read_run(began / "run").evaluate()
    assert str(began) in str(raised.value)
    FRAME.to_csv(began / "train.csv", index=False)  # as it says
    assert fedraclora.read_run(began / "run").evaluate() == run.rows[-1]["metrics"]


def test_each_advice_on_later_rows_works(folder: Path, tmp_path: Path) -> None:
    """None of them names a key, which `predict` and `evaluate` do not take."""
    run, path = fedraclora.read_run(folder / "run"), tmp_path / "later.csv"

    def refused(frame: pd.DataFrame) -> str:
        frame.to_csv(path, index=False)
        with pytest.raises(FedRacLoraError) as raised:
            run.evaluate(path)
        told = str(raised.value)
        assert "data." not in told.replace(str(path), "")
        assert "did you mean" not in told
        return told

    def answered(frame: pd.DataFrame) -> None:
        frame.to_csv(path, index=False)
        assert run.evaluate(path)
        assert len(run.predict(path)) == len(frame)

    good = FRAME[60:70]
    gap = good.assign(dose=good.dose.where(good.index != 63))
    assert "Fill them in, or leave such rows out" in refused(gap)
    answered(gap.fillna(1.0))
    answered(gap.dropna())
    word = good.assign(dose=good.dose.astype(object).where(good.index != 63, "high"))
    assert "correct the cell" in refused(word)
    answered(word[word.dose != "high"])
    lacking = good.drop(columns="dose").assign(doses=1.0)  # no name for another
    assert "'dose'" in (told := refused(lacking))
    assert "add it" in told
    answered(lacking.assign(dose=2.0))
    assert "rename 'DOSE' to 'dose'" in refused(good.rename(columns={"dose": "DOSE"}))
    answered(good)
    assert "'kind'" in (told := refused(good.drop(columns="kind")))
    assert "predict" in told
    good.drop(columns="kind").to_csv(path, index=False)
    assert len(run.predict(path)) == 10
