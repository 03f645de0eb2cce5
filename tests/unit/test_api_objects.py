"""`fedraclora.simulate` with objects of the program, and what a run gives."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from flwr_datasets.partitioner import DirichletPartitioner
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

import fedraclora
from fedraclora.errors import CheckpointError, ConfigError, DataError, FedRacLoraError, ModelError
from fedraclora.models.built import seeded
from fedraclora.protocol.method import check_method
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.shared.layerwise import LayerMethod
from fedraclora.tree import digest
from tests.common import FIXED

datasets = pytest.importorskip("datasets")

RNG = np.random.default_rng(3)
X = RNG.normal(size=(90, 5)).astype("float32")
Y = (X[:, 0] + 0.1 * RNG.normal(size=90) > 0).astype("int64")
CUTS = ((0, 40), (40, 60), (60, 90))
CLIENTS = [(X[a:b], Y[a:b]) for a, b in CUTS]


def net() -> nn.Module:
    with seeded(0, "test"):
        return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))


def run(**keys: Any) -> fedraclora.RunResult:
    return fedraclora.simulate(
        *FIXED, "output.progress=false", **({"model": net(), "rounds": 2} | keys)
    )


class Pairs(Dataset[Any]):
    def __init__(self, x: Any, y: Any) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, row: int) -> Any:
        return {"x": self.x[row], "label": self.y[row]}


FORMS: dict[str, Any] = {
    "arrays": CLIENTS,
    "a dict": dict(enumerate(CLIENTS)),
    "tensors": [(torch.tensor(x), torch.tensor(y)) for x, y in CLIENTS],
    "named inputs": [({"x": x}, y) for x, y in CLIENTS],
    "TensorDataset": [TensorDataset(torch.tensor(x), torch.tensor(y)) for x, y in CLIENTS],
    "datasets of dicts": [Pairs(x, y) for x, y in CLIENTS],
    "Hugging Face": [datasets.Dataset.from_dict({"x": x, "label": y}) for x, y in CLIENTS],
}


@pytest.mark.parametrize("form", FORMS)
def test_the_same_samples_in_any_form_are_the_same_run(form: str) -> None:
    wanted, found = run(data=CLIENTS), run(data=FORMS[form])
    assert found.summary["weights_digest"] == wanted.summary["weights_digest"]
    assert found.config == wanted.config


def test_a_run_is_that_of_the_samples_in_files(tmp_path: Path) -> None:
    for client, (x, y) in enumerate(CLIENTS):
        np.savez(tmp_path / f"{client}.npz", x=x, target=y)
    np.savez(tmp_path / "test.npz", x=X[:9] + 1, target=Y[:9])
    torch.save(net(), tmp_path / "net.pt")
    test = (X[:9] + 1, Y[:9])
    found = run(data=CLIENTS, test=test, method="ffa_lora", local={"momentum": 0.3})
    words = {"name": "own", "samples": str(tmp_path), "test_file": str(tmp_path / "test.npz")}
    other = run(data=words, method="ffa_lora", local={"momentum": 0.3})
    assert found.summary["weights_digest"] == other.summary["weights_digest"]


class Words(nn.Module):
    """Its ``ids`` are indices of an embedding, which takes no fractions."""

    def __init__(self) -> None:
        super().__init__()
        self.e, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.head(self.e(ids).mean(1))
        return found


IDS = np.abs(np.rint(3 * X)).astype("int64").clip(0, 8)
TEXTS = [(IDS[a:b], IDS[a:b, 0] % 3) for a, b in CUTS]


def words() -> nn.Module:
    with seeded(0, "test"):
        return Words()


@pytest.mark.parametrize("form", ["arrays", "named x", "TensorDataset", "Hugging Face", "bytes"])
def test_whole_numbers_stay_so_where_a_model_takes_indices(
    form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    forms: dict[str, Any] = {
        "arrays": TEXTS,
        "named x": [({"x": x}, y) for x, y in TEXTS],
        "TensorDataset": [TensorDataset(torch.tensor(x), torch.tensor(y)) for x, y in TEXTS],
        "Hugging Face": [datasets.Dataset.from_dict({"x": x, "label": y}) for x, y in TEXTS],
        "bytes": [(x.astype("uint8"), y) for x, y in TEXTS],
    }
    wanted = run(model=words(), data=[({"ids": x}, y) for x, y in TEXTS])
    found = fedraclora.simulate(
        *FIXED, "output.verbose=true", model=words(), data=forms[form], rounds=2
    )
    assert ("uint8" if form == "bytes" else "int64") + " as given" in capsys.readouterr().err
    assert found.summary["weights_digest"] == wanted.summary["weights_digest"]
    x = forms[form][0][0] if form in {"arrays", "bytes"} else IDS[:40]
    assert found.predict(x).equals(wanted.predict({"ids": IDS[:40]}))
    assert found.evaluate(TEXTS[1]) == wanted.evaluate(({"ids": TEXTS[1][0]}, TEXTS[1][1]))
    with pytest.raises(DataError, match="expected integers"):
        found.predict(X)


def test_whole_numbers_become_fractions_where_a_model_wants_these_and_it_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = [(np.rint(9 * x).astype("int64"), y) for x, y in CLIENTS]
    floats = run(data=[(x.astype("float32"), y) for x, y in whole])
    found = fedraclora.simulate(*FIXED, "output.verbose=true", model=net(), data=whole, rounds=2)
    assert "int64 converted to float32" in capsys.readouterr().err
    assert found.summary["weights_digest"] == floats.summary["weights_digest"]
    scaled = [(abs(x).astype("uint8"), y) for x, y in whole]
    fedraclora.simulate("output.verbose=true", model=net(), data=scaled, rounds=0)
    assert "uint8 scaled to 0..1" in capsys.readouterr().err
    np.savez(tmp_path / "0.npz", x=whole[0][0], target=Y[:40])
    words_ = ("data=own", "model=mlp", "output.verbose=true")
    fedraclora.simulate(*words_, {"data": {"samples": str(tmp_path)}}, rounds=0)
    assert "int64 converted to float32" in capsys.readouterr().err
    with pytest.raises(DataError, match="x holds bytes"):
        run(data=[whole[0], (abs(whole[1][0]).astype("uint8"), whole[1][1])])


def test_a_partitioner_divides_as_it_does_alone() -> None:
    table = datasets.Dataset.from_dict({"x": X, "label": Y})
    found = run(data=table, test=(X + 1, Y), partition=DirichletPartitioner(4, "label", 0.5, 3))
    alone = DirichletPartitioner(4, "label", 0.5, 3)
    alone.dataset = table.add_column("row", list(range(90)))
    rows = [np.sort(alone.load_partition(k)["row"][:]) for k in range(4)]
    wanted = run(data=[(X[part], Y[part]) for part in rows], test=(X + 1, Y))
    assert found.summary["weights_digest"] == wanted.summary["weights_digest"]


COLUMNS = {f"f{i}": X[:, i] for i in range(5)} | {"label": Y, "site": np.arange(90) % 3}
UNDIVIDED = {
    "a frame": {"data": pd.DataFrame(COLUMNS), "client": "site"},
    "a list": {"data": CLIENTS},
    "a column of clients": {"data": datasets.Dataset.from_dict(COLUMNS), "client": "site"},
}


@pytest.mark.parametrize("kind", UNDIVIDED)
def test_a_partitioner_of_what_it_cannot_divide_is_refused(
    kind: str,
) -> None:
    with pytest.raises(ConfigError, match=r"partition is a Dirichlet|divided already"):
        run(**UNDIVIDED[kind], partition=DirichletPartitioner(3, "label", 0.5))


def test_a_column_says_whose_a_row_is() -> None:
    owners = np.repeat(["b", "a", "c"], [40, 20, 30])
    columns = {f"f{i}": X[:, i] for i in range(5)}
    table = datasets.Dataset.from_dict({**columns, "label": Y, "site": owners})
    found = run(data=table, client="site", test=(X + 1, Y))
    ordered = [CLIENTS[1], CLIENTS[0], CLIENTS[2]]  # by name
    assert (
        found.summary["weights_digest"]
        == run(data=ordered, test=(X + 1, Y)).summary["weights_digest"]
    )


def test_a_frame_is_the_table_of_a_file(tmp_path: Path) -> None:
    frame = pd.DataFrame({f"f{i}": X[:, i] for i in range(5)})
    frame["ill"], frame["site"] = (
        np.where(Y > 0, "yes", "no"),
        np.repeat(["b", "a", "c"], [40, 20, 30]),
    )
    frame.to_parquet(tmp_path / "table.parquet")
    found = run(data=frame, target="ill", client="site")
    other = run(data=str(tmp_path / "table.parquet"), target="ill", client="site")
    assert found.summary["weights_digest"] == other.summary["weights_digest"]
    assert found.summary["clients"] == 3
    with pytest.raises(ConfigError, match="ilk"):
        run(data=frame, target="ilk", client="site")


def test_the_module_is_copied_and_begins_the_run() -> None:
    model = net()
    before = digest(dict(model.named_parameters()))
    found = run(model=model, data=CLIENTS, method="fedavg", rounds=1, clients_per_round=1)
    assert digest(dict(model.named_parameters())) == before
    untouched = fedraclora.simulate(
        model=model, data=CLIENTS, method="fedavg", rounds=1, local={"lr": 1e-30}
    )
    for name, value in untouched.weights().items():
        torch.testing.assert_close(value, model.state_dict()[name])
    assert digest(found.weights()) != before


@pytest.mark.parametrize("kind", ["float64", "bfloat16"])
def test_a_model_of_another_type_is_converted_and_named(kind: str) -> None:
    """The first lines spoke of inputs alone."""
    found = run(model=net().to(getattr(torch, kind)), data=CLIENTS)
    told: Any = found.summary["task"]
    assert all(word in told["precision"] for word in ("Sequential", kind, "float32"))
    assert {p.dtype for p in found.model().parameters()} == {torch.float32}
    assert "precision" not in run(data=CLIENTS).summary["task"]  # type: ignore[operator]


def test_what_a_run_gives(tmp_path: Path) -> None:
    rows: list[Any] = []
    more: list[Any] = []
    found = run(data=CLIENTS, on_round=[rows.append, more.append])
    assert rows == more == found.rows
    frame = found.history
    assert list(frame.index) == [0, 1, 2]
    metrics: Any = found.rows[-1]["metrics"]
    assert frame["accuracy"].iloc[-1] == metrics["accuracy"]
    assert found.evaluate() == metrics
    model = found.model()
    with torch.no_grad():
        right = (model(torch.tensor(X)).argmax(1).numpy() == Y).mean()
    assert found.evaluate((X, Y))["accuracy"] == pytest.approx(right)
    found.plot(tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    place = found.save(tmp_path / "kept")
    assert sorted(p.name for p in place.iterdir()) == [
        "config.yaml",
        "history.csv",
        "model.safetensors",
        "summary.json",
    ]
    for folder, said in (
        (place, "is not empty"),
        ("/dev/null/x", "cannot make"),
        ("x" * 300, "cannot make"),
    ):
        with pytest.raises(ConfigError, match=said):
            found.save(folder)


def test_a_run_in_a_folder_goes_on_with_the_same_objects(tmp_path: Path) -> None:
    whole = run(data=CLIENTS, rounds=3)
    kept = {"folder": tmp_path / "run", "rounds": 3, "output": {"plots": False}}
    run(data=CLIENTS, **kept)
    again = run(data=CLIENTS, **kept, resume=True)
    assert again.summary["weights_digest"] == whole.summary["weights_digest"]
    assert again.evaluate() == whole.evaluate()
    with pytest.raises(FedRacLoraError, match="digest"):
        run(data=CLIENTS[:2], folder=tmp_path / "run", rounds=3, resume=True)


@pytest.mark.slow
def test_a_run_that_goes_on_without_its_objects_says_which_it_lacks(tmp_path: Path) -> None:
    table = pd.DataFrame(X, columns=list("abcde")).assign(y=Y)
    table.to_csv(tmp_path / "rows.csv", index=False)
    given: dict[str, dict[str, Any]] = {
        "lent": {"model": net(), "data": CLIENTS, "metrics": ["loss", "accuracy", "f1"]},
        "file": {
            "data": {"name": "table", "file": str(tmp_path / "rows.csv"), "label": "y"},
            "partition": "iid",
            "clients": 3,
        },
    }
    said: dict[str, str] = {}
    for name, keys in given.items():
        folder, now = tmp_path / name, {"output": {"progress": False, "plots": False}}
        first = fedraclora.simulate(**keys, **now, rounds=1, folder=folder)
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        with pytest.raises(ConfigError) as error:
            fedraclora.simulate(**now, folder=folder, rounds=2, resume=True)
        said[name] = str(error.value).rpartition(":")[2]
        assert all(key in said[name] for key in keys), said
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        again = fedraclora.simulate(**keys, **now, folder=folder, rounds=2, resume=True)
        assert len(again.rows) == len(first.rows) + 1
    assert "model" not in said["file"]


@dataclass(frozen=True)
class Mine(FedRacLora):
    """A method of the program's own."""


class Undecorated(FedRacLora):
    """Keeps what is no field of it."""

    def __init__(self, k: float) -> None:
        super().__init__(rank=2)
        object.__setattr__(self, "k", k)


class Shadowed(Undecorated):
    """Keeps what is no field of it, behind a value of the class."""

    k = 0.1


@dataclass(frozen=True)
class Cached(FedRacLora):
    """Computes something once, and notes something."""

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "_note", 1)

    @cached_property
    def doubled(self) -> int:
        return 4


@dataclass(frozen=True)
class Untold(LayerMethod):
    """Says nothing of its traits."""


@dataclass(frozen=True)
class NoMethod:
    """A dataclass like any other."""


def test_methods_are_names_or_objects() -> None:
    wanted = run(data=CLIENTS, method={"name": "fed_rac_lora", "rank": 2, "alpha": 3.0})
    for method in (FedRacLora(rank=2, alpha=3.0), Mine(rank=2, alpha=3.0)):
        found = run(data=CLIENTS, method=method)
        assert found.summary["weights_digest"] == wanted.summary["weights_digest"]


def test_a_run_goes_on_with_a_method_of_the_same_class_and_fields(tmp_path: Path) -> None:
    kept = {"data": CLIENTS, "folder": tmp_path, "output": {"plots": False}}
    run(method=Mine(rank=2), **kept)
    assert run(method=Mine(rank=2), **kept, resume=True).summary
    with pytest.raises(FedRacLoraError, match=r"method.digest"):
        run(method=Mine(rank=3), **kept, resume=True)


def test_caches_and_private_notes_of_a_method_are_no_fields_of_it() -> None:
    check_method(cached := Cached(rank=2))
    assert cached.doubled == 4
    check_method(cached)


class Raising(Pairs):
    def __getitem__(self, row: int) -> Any:
        if row == 3:
            raise KeyError("the image is not there")
        return super().__getitem__(row)


class Uncopied(nn.Sequential):
    def __deepcopy__(self, counters: Any) -> Any:
        raise RuntimeError("it holds a lock")


def odd(change: Callable[[nn.Module], object]) -> nn.Module:
    model = net()
    change(model)
    return model


FRAME = pd.DataFrame({"a": X[:, 0], "b": X[:, 1], "label": Y})
MASKED = np.ma.masked_array(X, mask=X > 1)
BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"data": 3}, DataError, "data is of type int"),
    ({"data": []}, DataError, "empty list"),
    ({"data": (X, Y)}, ConfigError, "clients is not set"),
    ({"data": [(X, Y), (X[:3], Y[:2])]}, DataError, "client 1: there are 2 targets"),
    ({"data": [(X, Y), (X[:, :3], Y)]}, DataError, r"client 1: one input has \(3,\)"),
    ({"data": [(X, Y), (X * np.nan, Y)]}, DataError, "client 1: x holds NaN"),
    ({"data": [(X, Y), (X, Y - 1)]}, DataError, "client 1: the labels go from -1"),
    ({"data": (X, Y), "client": "site"}, ConfigError, "names a column"),
    ({"data": "digits", "test": (X, Y)}, ConfigError, "apply to data of your program"),
    ({"data": CLIENTS, "test": (X[:, :2], Y)}, DataError, "test: one input has"),
    ({"data": CLIENTS, "model": 3}, ConfigError, "model is of type int"),
    ({"data": CLIENTS, "method": FedRacLora}, ConfigError, r"give an instance, FedRacLora\("),
    (
        {"data": CLIENTS, "method": Untold(rank=2)},
        ConfigError,
        "Untold, which does not say what",
    ),
    ({"data": CLIENTS, "method": NoMethod()}, ConfigError, "NoMethod, which is derived from no"),
    ({"data": CLIENTS, "method": Undecorated(0.5)}, ConfigError, "the attribute 'k'"),
    ({"data": CLIENTS, "method": Shadowed(0.5)}, ConfigError, "the attribute 'k'"),
    (
        {"data": CLIENTS, "partition": DirichletPartitioner(2, "y", 1.0)},
        ConfigError,
        "divided already",
    ),
    ({"data": CLIENTS, "metrics": ["speed"]}, ConfigError, "speed"),
    ({"data": [(X, Y + 1)]}, DataError, "gives 2 outputs .* up to class 2"),
    ({"data": [(X, Y.astype("float32"))]}, DataError, "give them as whole numbers"),
    ({"data": CLIENTS, "on_round": "print"}, ConfigError, "on_round has 'print'"),
    ({}, ConfigError, "there are no data"),
    ({"data": CLIENTS, "on_round": 5}, ConfigError, "on_round has 5"),
    ({"data": [(X, Y), (MASKED, Y)]}, DataError, "client 1: x is a masked array"),
    ({"data": [(X, Y), ([*MASKED], Y)]}, DataError, "client 1: x is a masked array"),
    ({"data": [(X, Y), Raising(X, Y)]}, DataError, "client 1: reading sample 3 raises KeyError"),
    ({"data": [(torch.tensor(X).to_sparse(), Y)]}, DataError, "client 0: x is a tensor of kind"),
    ({"data": [(torch.empty(90, 5, device="meta"), Y)]}, DataError, "kind meta: load its numbers"),
    ({"data": [(X, Y.astype("uint64") + 2**63)]}, DataError, "does not fit into int64"),
    ({"data": [(X.astype("longdouble"), Y)]}, DataError, "float64 is the widest"),
    ({"data": pd.Series(X[:, 0]), "clients": 3}, DataError, "data is of type Series"),
    (
        {"data": pd.concat([FRAME, FRAME[["a"]]], axis=1), "clients": 3},
        DataError,
        "columns named 'a'",
    ),
    ({"data": FRAME, "test": (X, Y), "clients": 3}, DataError, "test is a tuple.*frame"),
    ({"data": FRAME, "test": "new.csv", "clients": 3}, DataError, "the columns of data"),
    ({"data": CLIENTS, "callbacks": 5}, ConfigError, "callbacks has 5"),
    ({"data": CLIENTS, "callbacks": [fedraclora.Callback]}, ConfigError, r"Callback\(\.\.\.\)"),
    ({"data": FRAME[:0], "clients": 3}, DataError, "data holds no rows"),
    ({"data": CLIENTS, "model": nn.LazyLinear(2)}, ModelError, "weight has no shape yet"),
    ({"data": CLIENTS, "model": net().to("meta")}, ModelError, "on the device meta"),
    (
        {"data": CLIENTS, "model": nn.Linear(5, 2, dtype=torch.complex64)},
        ModelError,
        "complex64 numbers",
    ),
    ({"data": CLIENTS, "model": odd(lambda m: m[2].bias.data.fill_(np.nan))}, ModelError, "2.bias"),
    ({"data": CLIENTS, "model": Uncopied(*net())}, ModelError, "it holds a lock"),
    ({"data": CLIENTS, "model": nn.Linear(4, 2)}, ModelError, "cannot be used with these data"),
    ({"data": CLIENTS, "folder": 5}, ConfigError, "folder=5"),
    ({"data": CLIENTS, "folder": "a\0b"}, ConfigError, "folder="),
    ({"data": CLIENTS, "folder": "~nobody-here/x"}, ConfigError, "folder="),
    ({"data": CLIENTS, "folder": "/dev/null/run"}, ConfigError, "/dev/null/run"),
    ({"data": CLIENTS, "folder": "x" * 300}, ConfigError, "choose a shorter name"),
    ({"data": [datasets.Dataset.from_dict({"label": Y})] * 2}, DataError, "only column"),
    ({"data": datasets.DatasetDict({"a": FORMS["Hugging Face"][0]})}, ConfigError, "splits"),
]


@pytest.mark.parametrize(("keys", "kind", "words"), BAD, ids=[str(n) for n in range(len(BAD))])
def test_bad_input_is_refused_by_name(keys: Any, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        run(**keys)


@pytest.mark.long
def test_objects_reach_other_processes() -> None:
    engines = ("ray", "vectorized")
    found, wanted = (run(data=TEXTS, model=words(), engine=engine) for engine in engines)
    assert found.summary["weights_digest"] == wanted.summary["weights_digest"]
    found, wanted = (run(data=CLIENTS, engine=engine) for engine in engines)
    assert found.summary["weights_digest"] == wanted.summary["weights_digest"]


def test_layers_that_are_not_trained_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(0, "test"):
        layers = [
            nn.Unflatten(1, (1, 1, 5)),
            nn.Conv2d(1, 2, (1, 2)),
            nn.Flatten(),
            nn.Linear(8, 2),
        ]
    model = nn.Sequential(*layers)
    simulated = fedraclora.simulate(model=model, data=CLIENTS, rounds=1)
    told = capsys.readouterr().err
    assert "not trained: layer 1 (target_modules=all" in told
    assert "target_modules=all adds convolutions, target_modules=[NAME]" in told, (
        "all has no embedding"
    )
    before = dict(model.named_parameters())
    assert torch.equal(simulated.weights()["1.weight"], before["1.weight"])
    whole = fedraclora.simulate(model=model, data=CLIENTS, rounds=1, target_modules="all")
    assert "not trained" not in capsys.readouterr().err
    assert not torch.equal(whole.weights()["1.weight"], before["1.weight"])


class Mixed(nn.Module):
    """A network with a convolution, a norm and a parameter of its own, and a tied layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 2, (1, 2))
        self.norm = nn.GroupNorm(1, 2)
        self.gain = nn.Parameter(torch.ones(1))
        self.first, self.again = nn.Linear(8, 8), nn.Linear(8, 8)
        self.embed = nn.Embedding(8, 8)
        self.embed.weight = self.first.weight
        self.out = nn.Linear(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(x.view(-1, 1, 1, 5))).flatten(1)
        x = self.again(self.first(x * self.gain))
        return self.out(x @ self.embed.weight)


@pytest.mark.parametrize("method", ["fedavg", "ffa_lora", "decomfl"])
def test_what_does_not_train_is_what_the_note_names(
    method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with seeded(0, "test"):
        model = Mixed()
    keys: dict[str, Any] = {"target_modules": ["again"], "local": {"lr": 0.01}, "head": "lora"}
    found = fedraclora.simulate(model=model, data=CLIENTS, rounds=1, method=method, **keys)
    note = next(line for line in capsys.readouterr().err.splitlines() if "not trained" in line)
    named = {*re.findall(r"[a-z.]+", note.partition("(")[0])}
    for name, weight in found.weights().items():
        still = torch.equal(weight, model.get_parameter(name))
        assert still == bool({name, name.partition(".")[0]} & named), name
    saved = {"modules_to_save": ["bias"]}
    fedraclora.simulate(model=model, data=CLIENTS, rounds=1, method=method, **keys | saved)
    assert ".bias" not in capsys.readouterr().err


def test_a_saved_result_is_told_from_a_run_folder_and_its_weights_load(tmp_path: Path) -> None:
    found, model = run(data=CLIENTS), net()
    found.save(tmp_path / "saved")
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        fedraclora.read_run(tmp_path / "saved")
    model.load_state_dict(load_file(tmp_path / "saved" / "model.safetensors"), strict=False)
    assert digest(dict(model.named_parameters())) == digest(found.weights())


class Spare(nn.Module):
    """A network with a layer that forward does not use, and two layers of one weight."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.first, self.second, self.out = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.spare = nn.Linear(5, 3)
        if tied:
            self.second.weight, self.spare = self.first.weight, nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(self.second(torch.relu(self.first(x))))


@pytest.mark.parametrize("engine", ["inline", "vectorized"])
@pytest.mark.parametrize("method", ["fedavg", "ffa_lora"])
def test_a_layer_that_is_not_used_is_named_with_the_key_that_leaves_it_out(
    method: str, engine: str
) -> None:
    with seeded(0, "test"):
        model = Spare()
    keys: dict[str, Any] = {"model": model, "data": CLIENTS, "rounds": 1, "method": method}
    keys |= {"local": {"lr": 0.1}, "engine": engine}
    with pytest.raises(ModelError, match=r"spare\.weight.*exclude_modules=\[spare\]"):
        fedraclora.simulate(**keys)
    found = fedraclora.simulate(**keys, exclude_modules=["spare"]).weights()
    same = {n for n, w in found.items() if torch.equal(w, model.get_parameter(n))}
    assert same == {"spare.weight", "spare.bias"}


@pytest.mark.parametrize(
    ("head", "key", "keys"),
    [
        ([], r"exclude_modules=\[first\]", {"exclude_modules": ["first"]}),
        (["second"], "head=frozen", {"head": "frozen"}),
    ],
)
@pytest.mark.parametrize("method", ["fedavg", "ffa_lora"])
def test_the_key_that_the_error_of_tied_weights_names_works(
    method: str, head: list[str], key: str, keys: dict[str, Any]
) -> None:
    given: dict[str, Any] = {
        "model": Spare(tied=True),
        "data": CLIENTS,
        "rounds": 1,
        "method": method,
    }
    given |= {"local": {"lr": 0.1}, "target_modules": ["first", "second"]}
    if head:
        given |= {"model.head": head, "target_modules": ["out"]}
    with pytest.raises(ModelError, match=key):
        fedraclora.simulate(**given)
    fedraclora.simulate(**given | keys)


CUT = {
    "pool_rac_lora": (
        {"pool": 3, "rank": 4},
        "capped at 1 (asked: 4): its 5 dimensions are shared by 3 sketches",
    ),
    "ravan": ({"heads": 2, "rank": 4}, "are shared by 2 heads (method.heads)"),
    "galore_average": ({"rank": 200}, "rank of 0.weight capped at 5 (asked: 200)"),
}


@pytest.mark.parametrize("method", CUT)
def test_a_rank_that_was_cut_is_said_once_where_a_run_begins(
    method: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    keys, words = CUT[method]
    chosen = {"model": net(), "data": CLIENTS, "method": {"name": method, **keys}, "rounds": 0}
    kept = {"folder": tmp_path / "run", "output": {"plots": False}}
    fedraclora.simulate(**chosen, **kept)
    shown = capsys.readouterr().err
    assert shown.count("note: rank of 0.weight") == 1
    assert words in shown
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING]
    fedraclora.simulate(**chosen | {"rounds": 1, "resume": True}, **kept)
    assert "note:" not in capsys.readouterr().err
    run(**chosen)  # without progress
    assert any(words in record.message for record in caplog.records)


def test_many_notes_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(0, "test"):
        model = nn.Sequential(*[nn.Linear(5, 5) for _ in range(11)])
    fedraclora.simulate(model=model, data=CLIENTS, method={"name": "ffa_lora", "rank": 9}, rounds=0)
    shown = capsys.readouterr().err
    assert shown.count("note: rank of") == 8
    assert "3 more such notes" in shown


def test_a_hugging_face_model_is_passed_as_it_is() -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 12, "vocab_size": 20, "max_position_embeddings": 8}
    with seeded(0, "test"):
        model = transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    ids = RNG.integers(0, 20, (30, 6))
    clients = [
        ({"input_ids": part, "attention_mask": np.ones_like(part)}, part[:, 0] % 2)
        for part in (ids[:20], ids[20:])
    ]
    found = run(model=model, data=clients)
    inputs = {name: torch.tensor(value) for name, value in clients[1][0].items()}
    with torch.no_grad():
        right = (found.model()(**inputs).logits.argmax(1).numpy() == clients[1][1]).mean()
    assert found.evaluate(clients[1])["accuracy"] == pytest.approx(right)


def test_a_config_with_objects_is_the_same_run_with_them() -> None:
    first = run(data=CLIENTS)
    again = fedraclora.simulate(first.config, model=net(), data=CLIENTS)
    assert again.summary["weights_digest"] == first.summary["weights_digest"]
    assert (
        fedraclora.simulate(first.config, model=net(), data=CLIENTS, rounds=3).rows[-1]["round"]
        == 3
    )


def test_the_head_that_a_config_names_holds_for_an_object_given_beside_it() -> None:
    first = run(data=CLIENTS, head="full", **{"model.head": ["0"]})
    again = fedraclora.simulate(first.config, model=net(), data=CLIENTS)
    assert again.config["model"] == first.config["model"]
    assert again.summary["weights_digest"] == first.summary["weights_digest"]


def test_keys_of_tables_hold_for_frames() -> None:
    frame = pd.DataFrame({f"f{i}": X[:, i] for i in range(5)} | {"label": Y})
    frame.loc[3, "f0"] = np.nan
    with pytest.raises(DataError, match=r"data\.missing=drop"):
        run(data=frame, clients=3)
    found = fedraclora.simulate(
        "output.progress=false", "data.missing=drop", model=net(), data=frame, clients=3, rounds=1
    )
    assert found.summary["task"]["rows_dropped"] == 1  # type: ignore[index]


@pytest.mark.parametrize(
    "word",
    ["missing=mean", "standardize=maybe", "standardize=0", "split_seed=1.5", "test_fraction=5"],
)
def test_values_of_keys_are_checked_alike_for_a_frame_and_its_file(
    word: str, tmp_path: Path
) -> None:
    frame = pd.DataFrame({f"f{i}": X[:, i] for i in range(5)} | {"label": Y})
    frame.to_csv(tmp_path / "table.csv", index=False)
    said = []
    for data, target in ((frame, {}), (tmp_path / "table.csv", {"target": "label"})):
        with pytest.raises(ConfigError, match=rf"data\.{word.partition('=')[0]}") as error:
            fedraclora.simulate(f"data.{word}", data=data, clients=3, rounds=1, **target)  # type: ignore[arg-type]
        said.append(str(error.value))
    assert said[0] == said[1]


def test_a_key_is_said_by_a_word_or_by_an_object_and_not_by_both(tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    pd.DataFrame({"a": X[:, 0], "label": Y}).to_csv(table, index=False)
    keys: dict[str, Any] = {"target": "label", "clients": 3, "rounds": 1}
    for word, method in (("data.label=a", "ffa_lora"), ("method.rank=2", FedRacLora(rank=4))):
        with pytest.raises(ConfigError, match=word.partition("=")[0]):
            fedraclora.simulate(word, data=table, method=method, **keys)


@pytest.mark.parametrize("loss", [None, "squared_error"])
def test_new_rows_of_a_frame_are_brought_to_its_scale(loss: str | None) -> None:
    frame = pd.DataFrame({f"f{i}": 7 + 3 * X[:, i] for i in range(5)})
    frame["y"] = np.where(Y > 0, "yes", "no") if loss is None else 5 + 2.0 * X[:, 0]
    with seeded(0, "test"):
        model = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2 if loss is None else 1))
    rows, test = frame[:60], frame[60:]
    found = run(model=model, data=rows, test=test, target="y", clients=3, loss=loss)
    assert found.evaluate(test, target="y") == pytest.approx(found.evaluate(), rel=1e-6)
    with pytest.raises(ConfigError, match="f3"):
        found.evaluate(test.drop(columns="f3"), target="y")


def test_images_of_bytes_and_named_classes_are_told_for_exports() -> None:
    images = np.arange(2 * 10 * 5, dtype=np.uint8).reshape(2, 10, 5)
    clients = [(part, np.arange(10) % 2) for part in images]
    found = run(data=clients, rounds=0).builder.built.task.reading
    assert found == {"shape": [5], "subtract": 0, "divide_by": 255}
    table = datasets.Dataset.from_dict({"x": X, "label": Y % 2}).cast_column(
        "label", datasets.ClassLabel(names=["no", "yes"])
    )
    for data in (table, {"one": table.select(range(40)), "two": table.select(range(40, 90))}):
        found = run(data=data, clients=2 if data is table else None, rounds=0)
        assert found.builder.built.task.reading == {"shape": [5], "classes": ["no", "yes"]}


def test_whole_numbers_without_a_sign_and_arrays_of_which_nothing_is_masked_are_read() -> None:
    wanted = run(data=CLIENTS)
    for x, y in ((np.ma.masked_array(X), Y), (X, Y.astype("uint64")), (X, torch.tensor(Y))):
        found = run(data=[(x[a:b], y[a:b]) for a, b in CUTS])
        assert found.summary["weights_digest"] == wanted.summary["weights_digest"]


def test_a_partitioner_may_divide_twice() -> None:
    table = datasets.Dataset.from_dict({"x": X, "label": Y})
    partitioner = DirichletPartitioner(4, "label", 0.5, 3)
    first, again = (run(data=table, partition=partitioner, rounds=1) for _ in range(2))
    assert first.summary["weights_digest"] == again.summary["weights_digest"]


def test_frozen_parameters_that_are_trained_all_the_same_are_named(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    model = net().requires_grad_(False)
    said = "0.weight, 0.bias, 2.weight, 2.bias"
    fedraclora.simulate(model=model, data=CLIENTS, rounds=1)
    assert said in capsys.readouterr().err
    run(data=CLIENTS, model=model)  # without progress
    assert any(said in record.message for record in caplog.records)
    fedraclora.simulate(model=net(), data=CLIENTS, rounds=0)
    assert "requires_grad" not in capsys.readouterr().err


def test_a_module_that_was_changed_since_is_not_taken_for_what_it_was() -> None:
    model = net()
    first = run(data=CLIENTS, model=model)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ConfigError, match="no longer what"):
        fedraclora.simulate(first.config)
