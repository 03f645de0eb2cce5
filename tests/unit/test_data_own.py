"""Samples of one's own: what is converted, what is refused and how, and what is held out."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from fedraclora.compose.overrides import composed
from fedraclora.config.build import build_task, resolved
from fedraclora.config.run_config import from_plain
from fedraclora.data import DATASETS, make_partition
from fedraclora.data.encoders.array import SampleSpec, gathered
from fedraclora.data.per_client import read_own
from fedraclora.data.samples import Samples
from fedraclora.data.sources.own import own_samples
from fedraclora.data.task import loss_function
from fedraclora.errors import ConfigError, DataError
from fedraclora.strategies.methods import METHODS

TINY = ["model.hidden=[3]", "method.rank=2", "rounds=1"]
DRAW = np.random.default_rng(3)


def arrays(rows: int = 12, *, classes: int = 3) -> tuple[np.ndarray, np.ndarray]:
    return DRAW.normal(size=(rows, 4)), np.arange(rows) % classes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three clients, with labels as bytes in a column."""
    for client in range(3):
        x, y = arrays(10 + client)
        np.savez(tmp_path / f"{client}.npz", x=x, target=y.astype(np.uint8)[:, None])
    return tmp_path


def fit(x: object, target: object, loss: str = "cross_entropy", classes: int = 3) -> Samples:
    return SampleSpec(None, loss, classes).validate(gathered((x, target), "here"), "here")


@pytest.mark.parametrize("kind", [np.uint8, np.int8, np.uint16, np.int32, np.uint32, np.int64])
def test_labels_of_any_whole_type_and_in_a_column_are_classes(kind: type) -> None:
    x, y = arrays()
    for target in (y.astype(kind), y.astype(kind)[:, None], [int(label) for label in y]):
        found = fit(x, target).target
        assert found.dtype == torch.int64
        assert found.tolist() == y.tolist()


def test_the_server_tells_that_images_of_bytes_are_divided(tmp_path: Path) -> None:
    for client in range(2):
        x = DRAW.integers(0, 256, (9, 1, 2, 3), dtype=np.uint8)
        np.savez(tmp_path / f"{client}.npz", x=x, target=np.arange(9) % 3)
    words: dict[str, Any] = {"clients": 2, "samples": str(tmp_path)}
    for test in ({}, {"test_file": str(tmp_path / "0.npz")}):
        data = DATASETS["own"](**words, **test)
        assert data.reading == {"subtract": 0, "divide_by": 255}


def test_images_of_bytes_go_from_0_to_1_and_other_numbers_are_kept() -> None:
    image = np.array([[[0, 51], [102, 255]]], np.uint8)
    found = fit(image, [0]).inputs["x"]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.flatten(), torch.tensor([0, 0.2, 0.4, 1.0]))
    assert fit(np.array([[7, 300]], np.int64), [0]).inputs["x"].tolist() == [[7.0, 300.0]]
    assert fit(np.array([1.5, 2.5]), [0, 1]).inputs["x"].shape == (2, 1)
    tokens = SampleSpec((), "cross_entropy", 3).validate(
        gathered((np.array([[7]], np.int32), [0]), ""), ""
    )
    assert tokens.inputs["x"].dtype == torch.int64


def test_numbers_to_predict_may_be_of_any_type() -> None:
    x, y = arrays()
    assert fit(x, y, "squared_error", 1).target.dtype == torch.float32
    with pytest.raises(DataError, match=r"here: .*2 numbers.*data\.classes=2"):
        fit(x, np.stack([y, y], axis=1), "squared_error", 1)


X, Y = arrays()
WRONG = {
    "one-hot": ((X, np.eye(3)[Y]), r"shape \(12, 3\).*target\.argmax\(1\)"),
    "fractions": ((X, Y + 0.5), r"torch\.float64 numbers, such as 0\.5.*squared_error"),
    "float classes": ((X, Y.astype(np.float32)), "classes to int64"),
    "too large": ((X, Y + 2), r"labels go from 2 to 4, but must be 0 to 2.*data\.classes=5"),
    "negative": ((X, Y - 1), r"labels go from -1 to 1"),
    "words": ((X, np.array(["a"] * 12)), r"the target holds words.*data=table"),
    "nan": ((np.where(X[2] == X, np.nan, X), Y), r"x holds NaN.*first in row 2"),
    "none": ((X[:0], Y[:0]), "0 targets, but inputs of {'x': 0} samples"),
    "ragged": (([[1.0], [1.0, 2.0]], [0, 1]), "x is not an array"),
    "scalar": ((X, 3), "target is a single number"),
    "complex": ((X * 1j, Y), "x holds complex numbers"),
}


@pytest.mark.parametrize(("found", "said"), WRONG.values(), ids=WRONG)
def test_what_could_mean_two_things_is_refused_with_what_to_write(found: tuple, said: str) -> None:
    with pytest.raises(DataError, match=f"here.*{said}"):
        fit(*found)


def test_the_client_and_its_file_are_named(folder: Path) -> None:
    np.savez(folder / "1.npz", x=np.zeros((0, 4)), target=np.zeros(0))
    with pytest.raises(
        DataError, match=rf"client 1 \(data\.samples={folder}\): there are 0 targets"
    ):
        own_samples(clients=3, samples=str(folder))
    (folder / "t.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match=r"data\.test_file=.*t\.csv .*\.npz file.*data=tabl"):
        own_samples(clients=3, samples=str(folder), test_file=str(folder / "t.csv"))


def test_each_client_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that what is held out and what is trained on are parts of one answer; the first twice."""
    (tmp_path / "asked_once.py").write_text(
        "import numpy as np\nASKED = []\n"
        "def samples(k):\n    ASKED.append(k)\n"
        "    return np.random.default_rng(k).normal(size=(10, 2)), np.arange(10) % 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    data = own_samples(clients=3, samples="asked_once:samples")
    data.parts.sizes(torch.arange(3))  # type: ignore[union-attr]
    import asked_once  # type: ignore[import-not-found]

    assert asked_once.ASKED == [0, 0, 1, 2]


def test_what_a_function_raises_is_told_with_its_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "raises.py").write_text("def samples(k):\n    return {}[k]\n")
    (tmp_path / "unfinished.py").write_text("def samples(k:\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(DataError, match=r"with \(0\) raises KeyError.*raises\.py, line 2"):
        own_samples(clients=1, samples="raises:samples")
    with pytest.raises(ConfigError, match=r"raises SyntaxError.*unfinished\.py, line 1"):
        own_samples(clients=1, samples="unfinished:samples")
    with pytest.raises(DataError, match=r"is a file\. Give a folder.*data=table"):
        own_samples(clients=1, samples=str(tmp_path / "raises.py"))


def test_one_file_is_one_clients(tmp_path: Path) -> None:
    """A folder with train.npz alone gave every client the same samples."""
    x, y = arrays()
    np.savez(tmp_path / "train.npz", x=x, target=y)
    assert len(read_own(str(tmp_path), 2, alone=True)[0]) == len(y)
    assert own_samples(clients=None, samples=str(tmp_path)).parts.num_clients == 1  # type: ignore[union-attr]
    with pytest.raises(DataError, match=r"client 0.*train\.npz is only read for a single client"):
        own_samples(clients=3, samples=str(tmp_path))
    np.savez(tmp_path / "0.npz", x=x, target=y)
    with pytest.raises(DataError, match=r"client 2.*train\.npz is only read for a single client"):
        read_own(str(tmp_path), 2, alone=True)


def test_files_are_counted_without_a_gap(folder: Path) -> None:
    config = composed(["data=own", f"data.samples={folder}"])
    found = resolved(config)
    assert found["clients"] == 3
    assert found["data"] == {**config["data"], "clients": 3, "classes": 3, "shape": [4]}  # type: ignore[dict-item]
    (folder / "1.npz").unlink()
    with pytest.raises(DataError, match=r"2\.npz but no 1\.npz"):
        resolved(config)


def test_what_is_held_out_of_a_client_is_not_trained_on(folder: Path) -> None:
    data = own_samples(clients=3, samples=str(folder), test_fraction=0.25)
    node = own_samples(
        clients=3, samples=str(folder), test_fraction=0.25, classes=3, shape=[4], served=[2]
    )
    rows = torch.arange(9)
    here = data.parts.gather(torch.tensor([2]), rows[None])  # type: ignore[union-attr]
    there = node.parts.gather(torch.tensor([2]), rows[None])  # type: ignore[union-attr]
    assert torch.equal(here.inputs["x"], there.inputs["x"])
    sizes = data.parts.sizes(torch.arange(3))  # type: ignore[union-attr]
    assert sizes.tolist() == [7, 8, 9]
    assert len(data.test) == 3 + 3 + 3
    whole = np.concatenate([np.load(folder / f"{k}.npz")["x"] for k in range(3)])
    kept = [data.parts.client(k).inputs["x"] for k in range(3)]  # type: ignore[union-attr]
    both = torch.cat([*kept, data.test.inputs["x"]]).sort(0).values
    torch.testing.assert_close(both, torch.from_numpy(whole).float().sort(0).values)


@pytest.mark.parametrize("name", ["iid", "dirichlet", "shards", "bootstrap"])
@pytest.mark.parametrize("data", ["own", "virtual"])
def test_clients_that_are_found_are_the_only_division(data: str, name: str, folder: Path) -> None:
    """They were dropped, and the server's own table was divided: its test samples, or others."""
    words = ["data=own", f"data.samples={folder}"] if data == "own" else ["data=virtual"]
    plain = composed([*words, f"partition={name}", *TINY])
    with pytest.raises(ConfigError, match=r"already.*partition=given"):
        from_plain(plain, METHODS)


def test_the_default_partition_fits_the_data(folder: Path) -> None:
    built = build_task(from_plain(composed(["data=own", f"data.samples={folder}", *TINY]), METHODS))
    assert built.clients == built.cohort == 3
    words = ["data=virtual", "clients=5", "clients_per_round=2", "data.held_out=9", *TINY]
    built = build_task(from_plain(composed(words), METHODS))
    assert built.task.train.num_clients == 5
    assert built.task.info["partition"]["partition"] == "given"  # type: ignore[index]
    data = DATASETS["virtual"](clients=5, held_out=9)
    assert make_partition(data, name="auto", clients=5, seed=0)[0] is data.parts


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["pretrain=aside"], "pretraining: the server has no"),
        (["pretrain=digits_0_4"], "pretraining: the server has no"),
        (["data.validation=0.2"], r"data\.validation.*the server has no"),
        (["data.test_file=x.npz", "data.test_fraction=0.2"], "leave out all but one"),
        (["clients=null", "data.samples=mine:samples"], "clients is not set"),
    ],
)
def test_the_server_has_nothing_to_train_on(words: list[str], said: str, folder: Path) -> None:
    """pretrain=aside trained on the server's test samples."""
    plain = composed(["data=own", f"data.samples={folder}", "clients=3", *TINY, *words])
    with pytest.raises(ConfigError, match=said):
        build_task(from_plain(resolved(plain), METHODS))


def table(x: np.ndarray, y: np.ndarray) -> Samples:
    return gathered((x, y), "")


def test_test_samples_that_clients_have_are_refused_where_the_task_is_built(folder: Path) -> None:
    every = [np.load(folder / f"{k}.npz") for k in range(3)]
    x, y = (np.concatenate([file[name] for file in every]) for name in ("x", "target"))
    np.savez(folder / "all_of_it.npz", x=x, target=y)
    words = ["data=own", f"data.samples={folder}", f"data.test_file={folder / 'all_of_it.npz'}"]
    config = from_plain(resolved(composed([*words, *TINY])), METHODS)
    with pytest.raises(DataError, match=r"33 of the 33.*data\.test_file=.*all_of_it"):
        build_task(config)


def test_labels_with_a_gap_ask_how_many_classes_there_are(tmp_path: Path) -> None:
    for client in range(3):
        np.savez(tmp_path / f"{client}.npz", x=np.zeros((3, 4)), target=np.array([0, 1, 7]))
    with pytest.raises(DataError, match=r"labels are \[0, 1, 7\].*from 0 to 7"):
        own_samples(clients=3, samples=str(tmp_path))
    assert own_samples(clients=3, samples=str(tmp_path), classes=8).classes == 8


def test_files_may_hold_a_class_for_each_token_or_yes_and_no_for_every_output(
    tmp_path: Path,
) -> None:
    for client in range(2):
        tags = DRAW.integers(0, 4, (9, 5))
        tags[:, 3:], tags[0, 0] = -100, 3
        ids = DRAW.integers(0, 20, (9, 5))
        np.savez(tmp_path / f"{client}.npz", input_ids=ids, target=tags)
    data = own_samples(clients=2, samples=str(tmp_path), loss="token_classes")
    assert (data.classes, data.metrics) == (4, ("accuracy", "f1", "loss"))
    for client in range(2):
        np.savez(
            tmp_path / f"{client}.npz", x=DRAW.normal(size=(9, 4)), target=DRAW.random((9, 3)) > 0.5
        )
    data = own_samples(clients=2, samples=str(tmp_path), loss="multi_label")
    assert (data.classes, data.test.target.dtype) == (3, torch.float32)
    with pytest.raises(DataError, match=r"multi_label"):  # the loss of the config is for classes
        own_samples(clients=2, samples=str(tmp_path))


def test_a_loss_of_another_package_is_told_what_it_is_to_give(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = ModuleType("losses_of_mine")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    output, target = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    each = torch.nn.functional.cross_entropy(output, target, reduction="none")
    for given, came in ((each[:, None] + each, r"\(5, 5\)"), ((each, 5), "5,"), (3, "no tensor")):
        monkeypatch.setattr(module, "mine", lambda *_, given=given: given, raising=False)
        with pytest.raises(
            ConfigError, match=rf"losses_of_mine:mine gives .*{came}.*pair of tensors"
        ):
            loss_function("losses_of_mine:mine")(output, target)
    monkeypatch.setattr(module, "mine", lambda *_: (each, torch.ones(5)))
    assert loss_function("losses_of_mine:mine")(output, target)[0] is each


def test_functions_get_the_parameters_of_the_config(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "with_parameters.py").write_text(
        "import numpy as np\n"
        "def samples(client, *, rows):\n"
        "    return np.full((rows + client, 2), client), np.arange(rows + client) % 2\n"
        "def held_out(*, rows):\n    return np.full((rows, 2), 9), np.arange(rows) % 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    named = ["data.samples=with_parameters:samples", "data.test_function=with_parameters:held_out"]
    words = ["data=own", "clients=2", *named, *TINY]

    def built(*more: str) -> Any:
        return build_task(from_plain(resolved(composed([*words, *more])), METHODS)).task

    with pytest.raises(ConfigError, match="unknown key 'data"):
        built("+data.root=here")
    task = built("data.parameters={rows: 7}")
    assert task.train.sizes(torch.arange(2)).tolist() == [7, 8]
    assert len(task.test) == 7
    for more, said in (("3", "a mapping"), ("{row: 7}", r"unknown key .*data.parameters.rows")):
        with pytest.raises((ConfigError, DataError), match=said):
            built(f"data.parameters={more}")
    files = (f"data.samples={tmp_path}", "data.test_function=null")
    with pytest.raises(ConfigError, match=r"data\.parameters.*no effect.*function"):
        from_plain(composed([*words, *files, "data.parameters={rows: 7}"]), METHODS)
