"""The kinds of objects that `tests.campaigns.objects` draws from, and how each must end.

The first kind of a part is the usual one. Where nothing is said it must run; ``refused`` must be
refused by one of `fedraclora.errors`, and of ``either`` nobody knows.
"""

from __future__ import annotations

import copy
import functools
import math
import os
import threading
from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from datasets import ClassLabel, DatasetDict
from datasets import Dataset as Columns
from flwr_datasets.partitioner import DirichletPartitioner, IidPartitioner
from torch import nn
from torch.nn.parameter import is_lazy
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Subset,
    TensorDataset,
)

from fedraclora import RoundStep
from fedraclora.attacks import Attack
from fedraclora.data.samples import Samples
from fedraclora.models.built import seeded
from fedraclora.protocol.method import Traits
from fedraclora.protocol.program import ClientProgram, GradientStage
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.shared.layerwise import LayerMethod, LayerUpdate
from fedraclora.training.extras.settings import LocalSettings
from tests.unit.test_api_objects import Mine, Untold

RNG = np.random.default_rng(3)
X = RNG.normal(size=(90, 5)).astype("float32")
Y = (X[:, 0] + 0.1 * RNG.normal(size=90) > 0).astype("int64")
CUTS = ((0, 40), (40, 60), (60, 90))
PLAIN = [(X[a:b], Y[a:b]) for a, b in CUTS]
QUIET = ("output.progress=false",)
TEST = (X[:30] + np.float32(0.25), Y[:30])


class Raised(Exception):
    """What a callback raises."""


@dataclass
class GuardedHooks:
    """What is known of a case beside its parts.

    Attributes:
        model: A copy of the module that was given.
        rows: What a callback has seen.
        raises: Whether a callback raises `Raised`.
        clients: How many there are; 0: unknown.
    """

    model: Any = None
    rows: list[Any] = field(default_factory=list)
    raises: bool = False
    clients: int = 0

    @staticmethod
    def copies(keys: Mapping[str, Any]) -> dict[str, Any]:
        """Copy the numbers that must not change: of modules, arrays and frames."""
        return {name: numbers(keys.get(name)) for name in ("model", "data", "test")}

    def changes(self, keys: Mapping[str, Any], kept: object) -> str | None:
        """Name an object of the caller's that is another now."""
        found = self.copies(keys)
        return None if found == kept else str([*found])


def numbers(thing: Any) -> Any:
    """Read the numbers of modules, arrays, tensors and frames, in lists and dicts of them."""
    if isinstance(thing, nn.Module):
        return {n: numbers(t) for n, t in vars(thing)["_parameters"].items()}, [
            numbers(part) for part in vars(thing)["_modules"].values()
        ]
    if isinstance(thing, torch.Tensor):
        odd = is_lazy(thing) or thing.is_meta or thing.is_quantized
        odd = odd or thing.layout != torch.strided or thing.dtype == torch.bfloat16
        return None if odd else thing.detach().numpy().tobytes()
    if isinstance(thing, list | tuple):
        return [numbers(part) for part in thing]
    if isinstance(thing, dict):
        return {str(name): numbers(part) for name, part in thing.items()}
    if isinstance(thing, pd.DataFrame):
        return thing.to_csv()
    return thing.tobytes() if isinstance(thing, np.ndarray) else None


@contextmanager
def in_folder(folder: Path) -> Iterator[None]:
    """Work in a folder, and come back."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


@dataclass(frozen=True)
class Kind:
    """A kind of a part.

    Attributes:
        make: Gives keyword arguments of `simulate`; it may note what it knows.
        ends: ``runs``, ``refused`` or ``either``.
        task: What it is of, where that is not two classes of five numbers; parts of two tasks need
            not go together.
        same: Samples that are those of `PLAIN`, in another form.
        said: What must be printed where it runs.
    """

    make: Callable[[GuardedHooks], dict[str, Any]]
    ends: str = "runs"
    task: str = ""
    same: bool = False
    said: str = ""


# ---- Models -------------------------------------------------------------------------------------


def net(*layers: nn.Module) -> nn.Sequential:
    """Build the usual network, with more layers in its middle."""
    return nn.Sequential(nn.Linear(5, 6), nn.ReLU(), *layers, nn.Linear(6, 2))


class Calls(nn.Module):
    """A network whose hidden numbers, or what it gives, a function makes of the usual ones."""

    def __init__(
        self, hidden: Callable[[Any], Any] = lambda h: h, out: Callable[..., Any] = lambda o: o
    ) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 6), nn.Linear(6, 2)
        self.hidden, self.out = hidden, out

    def forward(self, x: torch.Tensor) -> Any:
        return self.out(self.last(self.hidden(self.first(x).relu())))


class InTraining(Calls):
    """Does something else in training mode."""

    def forward(self, x: torch.Tensor) -> Any:
        h = self.first(x).relu()
        return self.out(self.last(self.hidden(h) if self.training else h))


class Counting(Calls):
    """Gives something else each time it is called."""

    def forward(self, x: torch.Tensor) -> Any:
        self.calls = getattr(self, "calls", 0) + 1
        return super().forward(x) * self.calls


class WritesInput(Calls):
    """Writes into its input."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x.mul_(2))


class Gru(nn.Module):
    """Reads the five numbers as a sequence."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.gru = nn.GRU(1, 6, num_layers=2, batch_first=True, dropout=dropout)
        self.last = nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.gru(x[..., None])[0][:, -1])


class Attends(nn.Module):
    """Looks at the five numbers by attention."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.up, self.last = nn.Linear(1, 4), nn.Linear(4, 2)
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)

    def forward(self, x: torch.Tensor) -> Any:
        h = self.up(x[..., None])
        return self.last(self.attention(h, h, h)[0].mean(dim=1))


class Bare(nn.Module):
    """Has weights that are in no layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.last = nn.Parameter(torch.randn(5, 6)), nn.Linear(6, 2)

    def forward(self, x: torch.Tensor) -> Any:
        return self.last((x @ self.table).relu())


class Tied(nn.Module):
    """Uses a matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.last = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.two.weight = self.one.weight

    def forward(self, x: torch.Tensor) -> Any:
        return self.last(self.two(self.one(x).relu()))


class Uncopied(nn.Sequential):
    """Cannot be copied."""

    def __deepcopy__(self, counters: Any) -> Any:
        raise RuntimeError("a lock cannot be copied")


class Locked(nn.Sequential):
    """Holds what cannot be copied."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.lock = threading.Lock()


class Unread(nn.Sequential):
    """Cannot say what it is."""

    def extra_repr(self) -> str:
        raise ValueError("no name")


Output = namedtuple("Output", ["logits", "more"])


def changed(change: Callable[[nn.Sequential], Any], *layers: nn.Module) -> nn.Sequential:
    """Build the usual network, and do something to it."""
    model = net(*layers)
    change(model)
    return model


def with_value(value: float) -> nn.Sequential:
    return changed(lambda m: m[0].weight.data.__setitem__((2, 3), value))


def normed(*, frozen: bool) -> nn.Sequential:
    """Build a network with BatchNorm, which has seen a batch."""
    norm = nn.BatchNorm1d(6)
    model = net(norm)
    model(torch.tensor(X))
    return changed(lambda m: norm.eval() if frozen else None, norm) if frozen else model


def zeroed(model: Calls) -> Calls:
    """Set the head to zero, which hides what lies before it."""
    nn.init.zeros_(model.last.weight)
    return model


def parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(model)


def hooked() -> nn.Module:
    model = net()
    model[0].register_forward_hook(lambda _m, _i, o: 2 * o)
    return model


def model(make: Callable[[], Any], ends: str = "runs", **more: Any) -> Kind:
    """Make a kind of model, with fixed draws."""

    def made(told: GuardedHooks) -> dict[str, Any]:
        with seeded(0, "model of the campaign"):
            found = make()
        if ends == "runs":
            told.model = copy.deepcopy(found)
        return {"model": found}

    return Kind(made, ends, **more)


MODELS = {
    "two layers": model(net),
    "deep": model(lambda: net(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.GELU())),
    "one layer": model(lambda: nn.Linear(5, 2)),
    "dropout": model(lambda: net(nn.Dropout(0.3))),
    "layer norm": model(lambda: net(nn.LayerNorm(6))),
    "frozen batch norm": model(lambda: normed(frozen=True)),
    "a function in it": model(lambda: Calls(torch.sin)),
    "an object with logits": model(lambda: Calls(out=lambda o: Output(o, None))),
    "float64": model(lambda: net().double()),
    "float16": model(lambda: net().half(), "either"),
    "bfloat16": model(lambda: net().bfloat16(), "either"),
    "in evaluation mode": model(lambda: net().eval()),
    "a sequence": model(Gru),
    "attention": model(lambda: Attends(0.0)),
    "weights in no layer": model(Bare),
    "a convolution": model(
        lambda: nn.Sequential(
            nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 3, 3), nn.Flatten(), nn.Linear(9, 2)
        )
    ),
    "weight norm": model(lambda: changed(lambda m: nn.utils.parametrizations.weight_norm(m[0]))),
    "an idle weight": model(
        lambda: changed(lambda m: m.register_parameter("idle", nn.Parameter(torch.ones(3))))
    ),
    "a buffer": model(lambda: changed(lambda m: m.register_buffer("of_ints", torch.arange(3)))),
    "an infinite buffer": model(
        lambda: changed(lambda m: m.register_buffer("mask", torch.full((3,), -math.inf)))
    ),
    "a head of zeros": model(lambda: changed(lambda m: nn.init.zeros_(m[-1].weight))),
    "names with dots": model(
        lambda: nn.Sequential(OrderedDict(a_b=nn.Linear(5, 6), relu=nn.ReLU(), c=nn.Linear(6, 2)))
    ),
    "in a wrapper": model(lambda: nn.Sequential(net())),
    "all frozen": model(lambda: net().requires_grad_(False), said="requires_grad"),
    "half frozen": model(
        lambda: changed(lambda m: m[0].requires_grad_(False)), said="requires_grad"
    ),
    "tied": model(Tied, "either"),
    "data parallel": model(lambda: parallel(net()), "either"),
    "compiled": model(lambda: torch.compile(net(), backend="eager"), "either"),
    "scripted": model(lambda: torch.jit.script(net()), "refused"),
    "scripted layer": model(lambda: net(torch.jit.script(nn.Linear(6, 6))), "refused"),
    "scripted function": model(lambda: net(torch.jit.script(nn.Tanh()))),
    "hooked": model(hooked),
    "spectral norm": model(
        lambda: changed(lambda m: nn.utils.parametrizations.spectral_norm(m[0])), "refused"
    ),
    "batch norm": model(lambda: normed(frozen=False), "refused"),
    "blank batch norm": model(lambda: net(nn.BatchNorm1d(6).eval()), "refused"),
    "batch means": model(lambda: Calls(lambda h: h - h.mean(dim=0)), "refused"),
    "hidden batch means": model(lambda: zeroed(Calls(lambda h: h - h.mean(dim=0))), "refused"),
    "doubled in training": model(lambda: InTraining(lambda h: 2 * h), "refused"),
    "noise in training": model(lambda: InTraining(lambda h: h + torch.randn_like(h)), "refused"),
    "no gradient in training": model(lambda: InTraining(lambda h: h.detach()), "refused"),
    "noise": model(lambda: Calls(lambda h: h + torch.randn_like(h)), "refused"),
    "noise of numpy": model(lambda: Calls(lambda h: h + float(np.random.rand())), "refused"),  # noqa: NPY002
    "counts calls": model(Counting, "refused"),
    "writes its input": model(WritesInput, "refused"),
    "dropout by a function": model(lambda: InTraining(F.dropout), "refused"),
    "dropout in attention": model(lambda: Attends(0.3), "refused"),
    "dropout in a GRU": model(lambda: Gru(0.3), "refused"),
    "alpha dropout": model(lambda: net(nn.AlphaDropout(0.2)), "refused"),
    "lazy": model(lambda: nn.Sequential(nn.LazyLinear(6), nn.Linear(6, 2)), "refused"),
    "meta": model(lambda: net().to("meta"), "refused"),
    "complex": model(lambda: nn.Linear(5, 2, dtype=torch.complex64), "refused"),
    "sparse": model(
        lambda: changed(
            lambda m: setattr(m[0], "weight", nn.Parameter(torch.eye(6, 5).to_sparse()))
        ),
        "refused",
    ),
    "NaN": model(lambda: with_value(math.nan), "refused"),
    "an infinity": model(lambda: with_value(-math.inf), "refused"),
    "weights of ints": model(
        lambda: changed(
            lambda m: m.register_parameter("n", nn.Parameter(torch.arange(3), requires_grad=False))
        ),
        "refused",
    ),
    "uncopied": model(lambda: Uncopied(*net()), "refused"),
    "locked": model(lambda: Locked(*net()), "refused"),
    "unread": model(lambda: Unread(*net()), "refused"),
    "no weights": model(nn.Flatten, "refused"),
    "no layer": model(lambda: nn.Bilinear(5, 5, 2), "refused"),
    "too narrow": model(lambda: nn.Linear(4, 2), "refused"),
    "one output": model(lambda: nn.Linear(5, 1), "refused"),
    "a tuple": model(lambda: Calls(out=lambda o: (o, o)), "refused"),
    "nothing": model(lambda: Calls(out=lambda _o: None), "refused"),
    "a number": model(lambda: Calls(out=lambda o: o.mean()), "refused"),
    "raises": model(lambda: Calls(lambda h: {}[h.shape]), "refused"),
    "a class": model(lambda: nn.Linear, "refused"),
    "a function": model(lambda: net, "refused"),
    "a partial": model(lambda: functools.partial(net), "refused"),
    "five": model(lambda: 5, "refused"),
    "a tensor": model(lambda: torch.ones(5, 2), "refused"),
    "a state dict": model(lambda: net().state_dict(), "refused"),
    "no such name": model(lambda: "resnet9000", "refused"),
    "a mapping": model(lambda: {"name": "mlp", "hidden": [3]}, "either"),
    "nothing said": Kind(lambda _told: {"model": None}, "either"),
}


# ---- Samples ------------------------------------------------------------------------------------


class Rows(Dataset[Any]):
    """A dataset whose samples a function makes."""

    def __init__(self, make: Callable[[int], Any], count: int = 40) -> None:
        self.make, self.count = make, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, row: int) -> Any:
        return self.make(row)


class Stream(IterableDataset[Any]):
    """Has no length."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(X, Y, strict=True)


def each(make: Callable[[Any, Any], Any]) -> list[Any]:
    """Give the samples of each client in some form."""
    return [make(x, y) for x, y in PLAIN]


def last(make: Callable[[Any, Any], Any]) -> list[Any]:
    """Give those of the last client in some form, those of the others as arrays."""
    return [*PLAIN[:-1], make(*PLAIN[-1])]


def data(
    make: Callable[[], Any],
    ends: str = "runs",
    *,
    clients: int = 3,
    same: bool = False,
    **keys: Any,
) -> Kind:
    """Make a kind of samples, with keywords that they need."""
    task = keys.pop("task", "")

    def made(told: GuardedHooks) -> dict[str, Any]:
        told.clients = clients if ends == "runs" else 0
        divided = isinstance(keys.get("partition"), str | dict)
        return {"data": make(), **({"clients": clients} if divided else {}), **keys}

    return Kind(made, ends, task, same)


def columns(x: Any, y: Any) -> Columns:
    return Columns.from_dict({"x": x, "label": y})


def frame(**more: Any) -> pd.DataFrame:
    return pd.DataFrame({f"f{i}": X[:, i] for i in range(5)} | {"label": Y} | more)


def shifted() -> pd.DataFrame:
    """Give rows to test on that are none of the others."""
    rows = frame()[:30]
    return rows.assign(**{f"f{i}": rows[f"f{i}"] + 0.25 for i in range(5)})


def masked(x: Any) -> Any:
    return np.ma.masked_array(x, mask=x > 1)


def bad_row(row: int) -> Any:
    if row == 7:
        raise FileNotFoundError("image 7 is not there")
    return X[row], Y[row]


def image_bytes() -> Any:
    return [(np.clip(40 * x + 100, 0, 255).astype("uint8"), y) for x, y in PLAIN]


SITES = np.repeat(["b", "a", "c"], [40, 20, 30])
OTHER = "another form"  # of test samples
DATA = {
    "arrays": data(lambda: PLAIN, same=True),
    "tensors": data(lambda: each(lambda x, y: (torch.tensor(x), torch.tensor(y))), same=True),
    "tensors with gradients": data(
        lambda: each(lambda x, y: (torch.tensor(x).requires_grad_(), torch.tensor(y))), same=True
    ),
    "a dict": data(lambda: dict(enumerate(PLAIN)), same=True),
    "named": data(lambda: each(lambda x, y: ({"x": x}, y)), same=True),
    "lists": data(lambda: each(lambda x, y: (x.tolist(), y.tolist())), same=True),
    "float64": data(lambda: each(lambda x, y: (x.astype("float64"), y)), same=True),
    "int8 labels": data(lambda: each(lambda x, y: (x, y.astype("int8"))), same=True),
    "uint64 labels": data(lambda: each(lambda x, y: (x, y.astype("uint64"))), same=True),
    "uint16 tensors": data(
        lambda: each(lambda x, y: (x, torch.tensor(y).to(torch.uint16))), same=True
    ),
    "bool labels": data(lambda: each(lambda x, y: (x, y.astype(bool))), same=True),
    "a column of labels": data(lambda: each(lambda x, y: (x, y[:, None])), same=True),
    "Fortran order": data(lambda: each(lambda x, y: (np.asfortranarray(x), y)), same=True),
    "strided": data(lambda: each(lambda x, y: (np.repeat(x, 2, axis=0)[::2], y)), same=True),
    "big-endian": data(lambda: each(lambda x, y: (x.astype(">f4"), y.astype(">i8"))), same=True),
    "nothing masked": data(lambda: each(lambda x, y: (np.ma.masked_array(x), y)), same=True),
    "Samples": data(
        lambda: each(lambda x, y: Samples({"x": torch.tensor(x)}, torch.tensor(y))), same=True
    ),
    "TensorDataset": data(
        lambda: each(lambda x, y: TensorDataset(torch.tensor(x), torch.tensor(y))), same=True
    ),
    "Subset": data(
        lambda: [
            Subset(TensorDataset(torch.tensor(X), torch.tensor(Y)), range(a, b)) for a, b in CUTS
        ],
        same=True,
    ),
    "ConcatDataset": data(
        lambda: each(lambda x, y: ConcatDataset([TensorDataset(torch.tensor(x), torch.tensor(y))])),
        same=True,
    ),
    "columns": data(lambda: each(columns), same=True),
    "columns with classes": data(
        lambda: each(lambda x, y: columns(x, y).cast_column("label", ClassLabel(names=["n", "p"]))),
        same=True,
    ),
    "Series of labels": data(lambda: each(lambda x, y: (x, pd.Series(y))), same=True),
    "frames of inputs": data(lambda: each(lambda x, y: (pd.DataFrame(x), pd.Series(y))), same=True),
    "float16": data(lambda: each(lambda x, y: (x.astype("float16"), y))),
    "bytes": data(image_bytes, test=None),
    "bytes to train on, fractions to test on": data(image_bytes, "refused"),
    "one table": data(lambda: (X, Y), clients=4, partition="iid"),
    "one dataset": data(
        lambda: TensorDataset(torch.tensor(X), torch.tensor(Y)),
        clients=4,
        partition={"name": "iid"},
    ),
    "divided columns": data(lambda: columns(X, Y), clients=4, partition=IidPartitioner(4)),
    "sited columns": data(lambda: columns(X, Y).add_column("site", SITES), client="site"),
    "one sample": data(lambda: [*PLAIN[:2], (X[:1], Y[:1])]),
    "one class a client": data(lambda: [(X[c == Y], Y[c == Y]) for c in (0, 1)], clients=2),
    "frame": data(frame, clients=3, task="frame", partition="iid", test=shifted()),
    "sited frame": data(lambda: frame(site=SITES), task="frame", client="site", test=None),
    "fractions": data(
        lambda: each(lambda x, y: (x, x[:, :2] + 0.5)), "either", task="regression", test=None
    ),
    "masked": data(lambda: last(lambda x, y: (masked(x), y)), "refused"),
    "masked labels": data(lambda: last(lambda x, y: (x, np.ma.masked_equal(y, 1))), "refused"),
    "a list of masked rows": data(lambda: last(lambda x, y: ([*masked(x)], y)), "refused"),
    "NaN": data(lambda: last(lambda x, y: (np.where(x > 1, np.nan, x), y)), "refused"),
    "infinite": data(lambda: last(lambda x, y: (np.where(x > 1, np.inf, x), y)), "refused"),
    "NaN labels": data(lambda: last(lambda x, y: (x, np.where(y > 0, np.nan, y))), "refused"),
    "labels below zero": data(lambda: last(lambda x, y: (x, y - 1)), "refused"),
    "labels from one": data(lambda: each(lambda x, y: (x, y + 1)), "refused"),
    "a label too many": data(lambda: last(lambda x, y: (x, y * 7)), "refused"),
    "labels of fractions": data(lambda: last(lambda x, y: (x, y + 0.5)), "refused"),
    "one-hot": data(lambda: each(lambda x, y: (x, np.eye(2, dtype="int64")[y])), "refused"),
    "sparse": data(lambda: last(lambda x, y: (torch.tensor(x).to_sparse(), y)), "refused"),
    "sparse rows": data(lambda: last(lambda x, y: (torch.tensor(x).to_sparse_csr(), y)), "refused"),
    "meta": data(lambda: last(lambda x, y: (torch.empty(30, 5, device="meta"), y)), "refused"),
    "meta Samples": data(
        lambda: last(
            lambda x, y: Samples({"x": torch.empty(30, 5, device="meta")}, torch.tensor(y))
        ),
        "refused",
    ),
    "quantized": data(
        lambda: last(
            lambda x, y: (torch.quantize_per_tensor(torch.tensor(x), 0.1, 0, torch.qint8), y)
        ),
        "refused",
    ),
    "complex": data(lambda: last(lambda x, y: (x + 0j, y)), "refused"),
    "complex tensors": data(lambda: last(lambda x, y: (torch.tensor(x + 0j), y)), "refused"),
    "long doubles": data(lambda: last(lambda x, y: (x.astype("longdouble"), y)), "refused"),
    "huge labels": data(lambda: last(lambda x, y: (x, y.astype("uint64") + 2**63)), "refused"),
    "words": data(lambda: last(lambda x, y: (x.astype(str), y)), "refused"),
    "words as labels": data(lambda: last(lambda x, y: (x, y.astype(str))), "refused"),
    "objects": data(lambda: last(lambda x, y: (np.array([object()] * 30), y)), "refused"),
    "dates": data(
        lambda: last(lambda x, y: (np.array(["2024-01-01"] * 30, "datetime64[D]"), y)), "refused"
    ),
    "records": data(lambda: last(lambda x, y: (np.zeros(30, dtype=[("a", "f4")]), y)), "refused"),
    "ragged": data(
        lambda: last(lambda x, y: ([row[: 1 + i % 3] for i, row in enumerate(x)], y)), "refused"
    ),
    "missing in a Series": data(
        lambda: last(lambda x, y: (x, pd.Series(y, dtype="Int64").mask(y > 0))), "refused"
    ),
    "too few labels": data(lambda: last(lambda x, y: (x, y[:-1])), "refused"),
    "nobody's samples": data(lambda: last(lambda x, y: (x[:0], y[:0])), "refused"),
    "narrower": data(lambda: last(lambda x, y: (x[:, :3], y)), "refused"),
    "another input": data(lambda: last(lambda x, y: ({"z": x}, y)), "refused"),
    "a number": data(lambda: last(lambda x, y: (3.5, 1)), "refused"),
    "three parts": data(lambda: last(lambda x, y: (x, y, y)), "refused"),
    "no labels": data(lambda: last(lambda x, y: x), "refused"),
    "None among them": data(lambda: [*PLAIN, None], "refused"),
    "a path among them": data(lambda: [*PLAIN, Path("x.csv")], "refused"),
    "a raising dataset": data(lambda: last(lambda x, y: Rows(bad_row)), "refused"),
    "a dataset too short": data(
        lambda: last(lambda x, y: Rows(lambda r: [(X[0], Y[0])][r])), "refused"
    ),
    "a negative length": data(lambda: last(lambda x, y: Rows(bad_row, -3)), "refused"),
    "unlike samples": data(
        lambda: last(lambda x, y: Rows(lambda r: (X[r, : 1 + r % 3], Y[r]))), "refused"
    ),
    "samples of None": data(lambda: last(lambda x, y: Rows(lambda r: None)), "refused"),
    "samples of words": data(lambda: last(lambda x, y: Rows(lambda r: ("a", "b"))), "refused"),
    "samples without label": data(
        lambda: last(lambda x, y: Rows(lambda r: {"x": X[r], "y": Y[r]})), "refused"
    ),
    "masked samples": data(
        lambda: last(lambda x, y: Rows(lambda r: (masked(X)[r], Y[r]))), "refused"
    ),
    "a stream": data(Stream, "refused"),
    "streams": data(lambda: last(lambda x, y: Stream()), "refused"),
    "loaders": data(
        lambda: last(lambda x, y: DataLoader(TensorDataset(torch.tensor(x), torch.tensor(y)))),
        "refused",
    ),
    "a generator": data(lambda: (part for part in PLAIN), "refused"),
    "a function": data(lambda: lambda: PLAIN, "refused"),
    "an empty list": data(list, "refused"),
    "an empty dict": data(dict, "refused"),
    "five": data(lambda: 5, "refused"),
    "an array": data(lambda: X, "refused"),
    "a Series": data(lambda: pd.Series(X[:, 0]), "refused"),
    "columns twice": data(
        lambda: pd.concat([frame(), frame()[["f1"]]], axis=1), "refused", task="frame"
    ),
    "a frame of words": data(
        lambda: frame(f0="a", f1="b", f2="c", f3="d", f4="e"), "refused", task="frame"
    ),
    "no row": data(lambda: frame()[:0], "refused", task="frame"),
    "a frame with gaps": data(
        lambda: frame(f0=np.where(X[:, 0] > 0, np.nan, X[:, 0])), "refused", task="frame"
    ),
    "splits": data(lambda: DatasetDict({"train": columns(X, Y)}), "refused"),
    "columns without label": data(
        lambda: columns(X, Y).rename_column("label", "outcome"), "refused"
    ),
    "columns of words": data(lambda: Columns.from_dict({"x": ["a"] * 90, "label": Y}), "refused"),
    "gaps in columns": data(
        lambda: Columns.from_dict({"x": X, "label": [None, *Y[1:].tolist()]}), "refused"
    ),
    "a missing file": data(lambda: "no/such.csv", "refused"),
    "no such name": data(lambda: "cifar9000", "refused"),
    "too many clients": data(lambda: (X, Y), "refused", clients=91, partition="iid"),
    "a list of arrays": data(lambda: [X, Y], "refused"),
}


# ---- The rest -----------------------------------------------------------------------------------


def says(ends: str = "runs", **keys: Any) -> Kind:
    """Make a kind that says some keywords, as they are."""
    return Kind(lambda _told: dict(keys), ends, keys.pop("task", ""))


def called(make: Callable[[GuardedHooks], Any], ends: str = "runs") -> Kind:
    return Kind(lambda told: {"on_round": make(told)}, ends)


def raising(told: GuardedHooks) -> Any:
    told.raises = True

    def stop(_row: Any) -> None:
        raise Raised

    return stop


def writing(row: Any) -> None:
    """Write into a row whatever can be written."""
    for key, value in list(row.items()):
        row[key] = {"accuracy": 1.0} if isinstance(value, dict) else 0
    row.clear()


class Listener:
    """Can be called."""

    def __init__(self, told: GuardedHooks) -> None:
        self.told = told

    def __call__(self, row: Any) -> None:
        self.told.rows.append(row)


def file(name: str, text: str = "") -> str:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return name


def made(name: str) -> str:
    Path(name).mkdir(parents=True)
    return name


def folder(make: Callable[[], Any], ends: str = "runs", **more: Any) -> Kind:
    return Kind(lambda _told: {"folder": make(), **more}, ends)


def centred(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss whose samples interact."""
    losses = F.cross_entropy(output, target, reduction="none")
    return losses - losses.mean(), torch.ones_like(target)


def plain_loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, by another name."""
    return F.cross_entropy(output, target, reduction="none"), torch.ones_like(target)


def raising_loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A loss that cannot be computed."""
    raise ArithmeticError("no loss")


@dataclass(frozen=True)
class Averages(LayerMethod):
    """A method that keeps a drawing."""

    traits = Traits(exact=True, linear=True, merges=True)

    def factors(self, layer: Any, now: Any) -> Any:
        return {"B": layer.trained("B"), "A": now.sketch(layer, "A", "gaussian", index=layer.link)}

    def update(self, layer: Any, replies: Any) -> Any:
        return LayerUpdate(merged=(replies.mean("B"), replies["A"]), keep="A")


@dataclass(frozen=True)
class Decay(ClientProgram):
    """A local step of somebody's."""

    form = "decay={rate}"
    rate: float = 0.1

    def hooks(self, chunk: Any) -> Any:
        return {
            GradientStage.LOSS: lambda grads, now: {n: grads[n] + self.rate * now[n] for n in grads}
        }


@dataclass(frozen=True)
class Louder(Attack):
    """An attack of somebody's."""

    times: float = 3.0

    def sent(self, updates: Any, clients: Any, key: int) -> Any:
        return self.times * updates


@dataclass(frozen=True)
class Cut(Attack):
    """Sends too few numbers."""

    def sent(self, updates: Any, clients: Any, key: int) -> Any:
        return updates[:, 1:]


class Odd(RoundStep):
    """A round step of somebody's."""

    def __init__(self, by: float = 1.0) -> None:
        self.by = by

    def columns(self, exchange: Any, uplinks: Any) -> Any:
        return {"odd": self.by}


def all_rows(data: Any, *, clients: int | None, seed: int) -> Any:
    """Give everybody all rows."""
    return [range(len(data.train))] * (clients or 2)


def odd_rows(data: Any, *, clients: int | None, seed: int) -> Any:
    """Deal rows out by turns."""
    return [range(k, len(data.train), clients or 3) for k in range(clients or 3)]


HERE = __name__
PARTS: dict[str, dict[str, Kind]] = {
    "model": MODELS,
    "data": DATA,
    "test": {
        "arrays": Kind(lambda _told: {}),
        "tensors": Kind(lambda _told: {"test": tuple(map(torch.tensor, TEST))}, task="classes"),
        "held out": Kind(lambda _told: {"test": None}, task="classes"),
        "a dataset": Kind(
            lambda _told: {"test": TensorDataset(*map(torch.tensor, TEST))}, task="classes"
        ),
        "masked": says("refused", test=(masked(X), Y)),
        "NaN": says("refused", test=(X * np.nan, Y)),
        "narrower": says("refused", test=(X[:, :2], Y)),
        "empty": says("refused", test=(X[:0], Y[:0])),
        "too few": says("refused", test=(X, Y[:3])),
        "another class": says("refused", test=(X + 1, Y + 5)),
        "the training samples": says("either", test=(X, Y)),
        "five": says("refused", test=5),
        "a word": says("refused", test="digits"),
        "a list": says("refused", test=[X, Y, X]),
        "a frame": says("either", test=frame()),
        "a raising dataset": Kind(lambda _told: {"test": Rows(bad_row)}, "refused"),
    },
    "rounds": {
        "one": says(rounds=1),
        "two": says(rounds=2),
        "none": says(rounds=0),
        "of numpy": says(rounds=np.int64(1)),
        "below zero": says("refused", rounds=-1),
        "a fraction": says("refused", rounds=1.5),
        "a word": says("refused", rounds="many"),
        "NaN": says("refused", rounds=math.nan),
        "an array": says("refused", rounds=np.arange(2)),
    },
    "seed": {
        "zero": says(),
        "one": says(seed=1),
        "of numpy": says(seed=np.uint8(7)),
        "large": says("either", seed=2**63),
        "below zero": says("either", seed=-1),
        "a fraction": says("refused", seed=0.5),
        "a word": says("refused", seed="x"),
        "a list": says("refused", seed=[1, 2]),
        "a tensor": says("refused", seed=torch.tensor(3)),
    },
    "on_round": {
        "nobody": says(),
        "a function": called(lambda told: told.rows.append),
        "a list": called(lambda told: [told.rows.append, lambda row: None]),
        "an object": called(Listener),
        "a partial": called(lambda told: functools.partial(told.rows.append)),
        "one that writes": called(lambda _told: writing),
        "first one that writes": called(lambda told: [writing, told.rows.append]),
        "one that raises": called(raising, "either"),
        "an empty list": called(lambda _told: []),
        "five": called(lambda _told: 5, "refused"),
        "a word": called(lambda _told: "print", "refused"),
        "a number among them": called(lambda _told: [print, 5], "refused"),
        "a dict": called(lambda _told: {"a": print}, "refused"),
        "of two arguments": called(lambda _told: lambda _a, _b: None, "refused"),
    },
    "folder": {
        "memory": says(),
        "new": folder(lambda: "run"),
        "a path": folder(lambda: Path("deep") / "er" / "run"),
        "an empty one": folder(lambda: made("there")),
        "begun by name": folder(lambda: "run", resume=True),
        "with markup": folder(lambda: "a[/y]b [red]"),
        "with a newline": folder(lambda: "a\nb"),
        "with an escape": folder(lambda: "a\x1b[2Jb"),
        "with other signs": folder(lambda: "日本 'é\" $x ~"),
        "with a file": folder(lambda: str(Path(file("kept/notes.txt", "mine")).parent)),
        "a file": folder(lambda: file("taken"), "refused"),
        "in a file": folder(lambda: file("taken") + "/run", "refused"),
        "too long": folder(lambda: "x" * 300, "refused"),
        "with NUL": folder(lambda: "a\0b", "refused"),
        "nobody's": folder(lambda: "~nobody-has-this/run", "refused"),
        "a device": folder(lambda: "/dev/null", "refused"),
        "in proc": folder(lambda: "/proc/run", "refused"),
        "a run that is none": folder(
            lambda: str(Path(file("odd/config.yaml", "a: [")).parent), "either"
        ),
        "none to resume": folder(
            lambda: str(Path(file("odd/config.yaml", "a: [")).parent), "refused", resume=True
        ),
        "five": folder(lambda: 5, "refused"),
        "bytes": folder(lambda: b"run", "refused"),
        "empty": folder(lambda: "", "refused"),
        "to resume without": says("refused", resume=True),
        "resume a word": folder(lambda: "run", "refused", resume="yes"),
    },
    "init_from": {
        "nothing": says(),
        "a missing one": says("refused", start="no/run"),
        "an empty folder": Kind(lambda _told: {"init_from": made("begun")}, "refused"),
        "a file": Kind(lambda _told: {"init_from": file("adapter.bin", "x")}, "refused"),
        "an adapter of words": Kind(
            lambda _told: {"init_from": str(Path(file("bad/adapter_config.json", "[1")).parent)},
            "refused",
        ),
        "five": says("refused", start=5),
        "a module": Kind(lambda _told: {"init_from": net()}, "refused"),
        "a list": says("refused", start=["a"]),
        "with NUL": says("refused", start="a\0b"),
        "nobody's": says("refused", start="~nobody-has-this"),
    },
    "method": {
        "usual": says(),
        "a name": says(method="ffa_lora"),
        "a mapping": says(method={"name": "fedavg_lora", "rank": 2}),
        "full": says(method="fedavg"),
        "an instance": Kind(lambda _told: {"method": FedRacLora(rank=2, alpha=3.0)}),
        "one's own": Kind(lambda _told: {"method": Mine(rank=2)}),
        "one that keeps a drawing": Kind(lambda _told: {"method": Averages(rank=2)}, "refused"),
        "untold": Kind(lambda _told: {"method": Untold(rank=2)}, "refused"),
        "a class": says("refused", method=FedRacLora),
        "five": says("refused", method=5),
        "a module": Kind(lambda _told: {"method": net()}, "refused"),
        "a missing one": says("refused", method="sgd"),
        "an odd rank": says("refused", method={"name": "ffa_lora", "rank": 0}),
        "an odd key": says("refused", method={"name": "ffa_lora", "ranks": 2}),
    },
    "local": {
        "usual": says(local={"lr": 0.1}),
        "a name": says(local="momentum"),
        "small batches": says(local={"lr": 0.05, "batch_size": 4, "steps": 3}),
        "NaN": says("refused", local={"lr": math.nan}),
        "a word": says("refused", local={"lr": "much"}),
        "five": says("refused", local=5),
        "a function": says("refused", local={"lr": abs}),
        "huge": says("either", local={"lr": 1e30}),
        "an extra": says(local={"extras": [Decay(0.01)], "lr": 0.1}),
        "an extra by name": says(local={"extras": [{"name": f"{HERE}:Decay", "rate": 0.01}]}),
        "settings": Kind(lambda _told: {"local": LocalSettings(lr=0.1, extras=[Decay(0.01)])}),
        "a class of extras": says("refused", local={"extras": [Decay]}),
        "an odd parameter": says(
            "refused", local={"extras": [{"name": f"{HERE}:Decay", "rat": 1}]}
        ),
        "an extra that is none": Kind(lambda _told: {"local": {"extras": [net()]}}, "refused"),
        "a step as an extra": says("refused", local={"extras": [Odd()]}),
    },
    "attack": {
        "none": says(),
        "an object": Kind(lambda _told: {"attack": Louder(share=0.4)}),
        "a name": says(attack={"name": f"{HERE}:Louder", "share": 0.4, "times": 2}),
        "a class": says("refused", attack=Louder),
        "an odd share": says("refused", attack={"name": f"{HERE}:Louder", "share": 4}),
        "an odd type": says("refused", attack={"name": f"{HERE}:Louder", "times": "often"}),
        "a missing one": says("refused", attack=f"{HERE}:Quieter"),
        "a method": says("refused", attack=f"{HERE}:Averages"),
        "of another shape": Kind(lambda _told: {"attack": Cut(share=0.4)}, "refused"),
        "five": says("refused", attack=5),
    },
    "steps": {
        "none": says(),
        "an object": Kind(lambda _told: {"steps": [Odd()]}),
        "a name": says(steps=[f"{HERE}:Odd"]),
        "with a parameter": says(steps=[{"name": f"{HERE}:Odd", "by": 2.0}]),
        "an odd parameter": says("refused", steps=[{"name": f"{HERE}:Odd", "by": "two"}]),
        "a class": says("refused", steps=[Odd]),
        "five": says("refused", steps=[5]),
        "an extra": says("refused", steps=[f"{HERE}:Decay"]),
    },
    "loss": {
        "found": says(),
        "said": says(loss="cross_entropy"),
        "of a function": says(loss=f"{HERE}:plain_loss", metrics=["loss"], task="classes"),
        "that interacts": says("refused", loss=f"{HERE}:centred"),
        "that raises": says("refused", loss=f"{HERE}:raising_loss"),
        "a missing one": says("refused", loss="hinge"),
        "a missing function": says("refused", loss=f"{HERE}:nope"),
        "a missing metric": says("refused", metrics=["speed"]),
    },
    "engine": {
        "vectorized": says(),
        "inline": says(engine="inline"),
        "a missing one": says("refused", engine="warp"),
        "five": says("refused", engine=5),
    },
    "partition": {
        "as data say": says(),
        "five": says("refused", partition=5),
        "a missing one": says("refused", partition="halves"),
        "a function": says("refused", partition=len),
        "of rows twice": says("refused", partition=all_rows),
        "by name": says("either", partition=f"{HERE}:odd_rows"),
        "a partitioner": Kind(
            lambda _told: {"partition": DirichletPartitioner(3, "label", 0.5)}, "either"
        ),
        "by a missing column": Kind(
            lambda _told: {"partition": DirichletPartitioner(3, "nope", 0.5)}, "refused"
        ),
    },
    "column": {
        "as data say": says(),
        "a missing client": says("refused", client="nope"),
        "a client of five": says("refused", client=5),
        "a missing target": says("either", target="nope"),
        "a target of five": says("either", target=5),
    },
    "clients_per_round": {
        "all": says(),
        "two": says(cohort=2),
        "a share": says(cohort=0.5),
        "none": says("refused", cohort=0),
        "too many": says("refused", cohort=1000),
        "a word": says("refused", cohort="few"),
    },
    "choices": {
        "quiet": says(choices=QUIET),
        "progress": says(),
        "a mapping": says(choices=({"output": {"progress": False}},)),
        "five": says("refused", choices=(5,)),
        "None": says("refused", choices=(None,)),
        "a missing key": says("refused", choices=("speed=1",)),
        "a sweep": says("refused", choices=("seed=1,2",)),
        "no key": says("refused", choices=("=",)),
        "an odd sign": says("refused", choices=("seed=[",)),
        "an escape": says("refused", choices=("\x1b[31mseed=1",)),
        "numbers as keys": says("refused", choices=({5: 1},)),
    },
    "target_modules": {
        "all": says(),
        "a missing layer": says("refused", target_modules=["nope"]),
        "five": says("refused", target_modules=5),
        "an empty list": says("refused", target_modules=[]),
        "everything": says("either", target_modules="all"),
        "a missing head": says("refused", **{"model.head": ["nope"]}),
    },
}
