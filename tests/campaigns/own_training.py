"""Training functions that return or do what they should not, each beside honest clients.

    python -m tests.campaigns.own_training --times 400
    python -m tests.campaigns.own_training --times 20 --engine ray

What is returned, what is done to the model, the samples and the time, the kind of the samples, the
optimizer, the model and the run are drawn by a seeded generator. One client of five misbehaves.
Either nothing that counts has changed, and the run is that of honest clients to the bit; or this
client failed, in one sentence that names it, and the run is to the bit that of the four others.
What can be wrong is

    silent      what must fail was taken, or another client's part is another
    refused     what must run failed
    traceback   an error that is none of `fedraclora.errors`
    words       a failure that is no sentence

and is printed with what was drawn. The status is non-zero if there is any.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import logging
import os
import pickle
import random  # noqa: TID251  (a function of somebody's may seed it)
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.errors import FedRacLoraError
from fedraclora.rng import generator
from fedraclora.training.own.deadline import OutOfTimeError
from tests.common import normal

SIZES, CULPRIT = (5, 9, 7, 4, 6), 1
Model = Any
Weights = dict[str, torch.Tensor]


def net() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        norm = nn.BatchNorm1d(3)
        norm.running_mean = torch.full((3,), 0.1)
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), norm).eval()


def samples(count: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = normal(count, 6, key=key).float()
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


def plain() -> Model:
    return net()


def adapted() -> Model:
    return get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]))  # type: ignore[arg-type]


class Rows(torch.utils.data.Dataset[Any]):
    """Samples of a dataset of torch."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.tensors, self.cache = {"x": x, "y": y}, dict[int, Any]()

    def __len__(self) -> int:
        return len(self.tensors["y"])

    def __getitem__(self, k: int) -> Any:
        return self.cache.setdefault(k, k) and self.tensors["x"][k]


def as_arrays(x: torch.Tensor, y: torch.Tensor) -> Any:
    return {"x": x.numpy(), "y": y.numpy()}


def as_columns(x: torch.Tensor, y: torch.Tensor) -> Any:
    from datasets import Dataset

    return Dataset.from_dict({"x": x.tolist(), "y": y.tolist()})


FORMS: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "tensors": lambda x, y: (x, y),
    "arrays": as_arrays,
    "dataset": Rows,
    "columns": as_columns,
}


def table_of(data: Any) -> dict[str, torch.Tensor]:
    """Read samples of any of these kinds, in their own memory where they have one."""
    if isinstance(data, tuple):
        return {"x": data[0], "y": data[1]}
    table = data.tensors if isinstance(data, Rows) else data
    return {name: torch.as_tensor(table[name][:]) for name in ("x", "y")}


OPTIMIZERS: dict[str, Callable[..., Any]] = {
    "SGD": lambda given: torch.optim.SGD(given, lr=0.2),
    "momentum": lambda given: torch.optim.SGD(given, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda given: torch.optim.Adam(given, lr=0.01),
    "AdamW": lambda given: torch.optim.AdamW(given, lr=0.01),
    "RMSprop": lambda given: torch.optim.RMSprop(given, lr=0.01),
    "LBFGS": lambda given: torch.optim.LBFGS(given, lr=0.05, max_iter=3),
}


def learn(round_: Round, model: Model, optimizer: str = "SGD") -> float:
    table = table_of(round_.data)
    steps = OPTIMIZERS[optimizer]([p for p in model.parameters() if p.requires_grad])

    def closure() -> torch.Tensor:
        steps.zero_grad()
        loss = nn.functional.cross_entropy(model(table["x"]), table["y"])
        loss.backward()
        return loss

    losses = [float(steps.step(closure).detach()) for _ in range(2)]
    return losses[0]


# What is done, after the install (and by default some learning): None where it must not matter.
def parameters(model: Model, part: str) -> list[Any]:
    found = [*model.named_parameters(), *model.named_buffers()]
    return [tensor for name, tensor in found if part in name]


def frozen(model: Model) -> Any:
    found = parameters(model, "lora_A") or parameters(model, "weight.0.A")
    return found[0]


def trained(model: Model) -> Any:
    return next(p for p in model.parameters() if p.requires_grad)


def base(model: Model) -> Any:
    found = parameters(model, "base_layer.weight") or parameters(model, "original")
    return found[0]


def put(choose: Callable[[Model], Any], change: Callable[[Any], Any]) -> Callable[..., None]:
    def do(round_: Round, model: Model) -> None:
        with torch.no_grad():
            change(choose(model))

    return do


def drop_parameter(round_: Round, model: Model) -> None:
    owner = next(m for m in model.modules() if isinstance(m, nn.Linear))
    name = next(iter(dict(owner.named_parameters(recurse=False))))
    delattr(owner, name)


def all_thawed(round_: Round, model: Model) -> None:
    model.requires_grad_(True)
    learn(round_, model)


def of_peft(call: Callable[[Any], Any]) -> Callable[..., None]:
    """Do what only PEFT has; a plain model gets a NaN."""

    def do(round_: Round, model: Model) -> None:
        if hasattr(model, "peft_config"):
            call(model)
        else:
            trained(model).data.fill_(float("nan"))

    return do


def scales(module: Any) -> bool:
    return hasattr(module, "scaling")


def both(model: Any) -> None:
    model.add_adapter("b", LoraConfig(r=2, target_modules=["0", "2"]))
    model.base_model.set_adapter(["default", "b"])


def rescaled(model: Any) -> None:
    next(m for m in model.modules() if hasattr(m, "scaling")).set_scale("default", 2.0)


def seeded(*_: object) -> None:
    torch.manual_seed(1)  # noqa: TID251
    np.random.seed(1)  # noqa: NPY002, TID251
    random.seed(1)


def on_data(change: Callable[[torch.Tensor], Any]) -> Callable[..., None]:
    """Change the inputs of the samples by some route; of columns, which are copies, a list."""

    def do(round_: Round, _: Model) -> None:
        change(table_of(round_.data)["x"])

    return do


def of_another_kind(round_: Round, _: Model) -> None:
    data = round_.data
    if isinstance(data, tuple):
        data[1].data.copy_(data[1].flip(0) + 0)
        data[1].data[0] += 1
    elif isinstance(data, Rows):
        data.tensors["x"] = data.tensors["x"] * 2
    elif isinstance(data, dict):
        data["x"] = data["x"] * 2


def in_a_thread(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def terms(model: Model) -> list[Any]:
    return [m for m in model.modules() if type(m).__name__ == "LowRankTerm"]


def of_term(call: Callable[[Model, Any], Any]) -> Callable[..., None]:
    """Do what only a plain model has; one of PEFT gets a NaN."""

    def do(round_: Round, model: Model) -> None:
        if terms(model):
            call(model, terms(model)[0])
        else:
            trained(model).data.fill_(float("nan"))

    return do


def swallow(round_: Round, model: Model) -> None:
    while True:
        try:  # noqa: SIM105
            time.sleep(0.002)
        except BaseException:
            pass


def swallow_once(round_: Round, model: Model) -> None:
    try:  # noqa: SIM105
        time.sleep(60)
    except:  # noqa: E722
        pass


def computes_on(round_: Round, model: Model) -> None:
    while True:
        try:  # noqa: SIM105
            torch.ones(9, 9) @ torch.ones(9, 9)
        except Exception:
            pass


def stops_the_clock(round_: Round, model: Model) -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(1.2 * TIME)


class Unsayable(Exception):
    def __str__(self) -> str:
        raise ValueError("it does not tell")


class Twice(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


TIME = 1.5  # seconds, where the end of it is tried
LATE = {"swallows": swallow, "swallows once": swallow_once, "computes on": computes_on}
LATE |= {"stops the clock": stops_the_clock}
# Of samples that are no columns; they fail from then on.
LASTING: dict[str, Callable[..., None]] = {
    "data changed": on_data(lambda x: x.mul_(2)),
    "data by a view": on_data(lambda x: x[1:, :2].neg_()),
    "data by .data": on_data(lambda x: x.data.mul_(2)),
    "data by numpy": on_data(lambda x: np.negative(x.numpy(), out=x.numpy())),
    "one number of data": on_data(lambda x: x.numpy().__setitem__((0, 0), 7)),
    "data by set_": on_data(lambda x: x.data.untyped_storage().fill_(1)),
    "data in a thread": lambda r, m: in_a_thread(lambda: on_data(lambda x: x.data.mul_(2))(r, m)),
    "other data": of_another_kind,
}
ACCOMPLICE = "data changed by another client"  # after its own call: it fails in the next round


DEEDS: dict[str, tuple[Callable[..., Any], bool]] = {
    "nothing": (lambda *_: None, True),
    "A moved": (put(frozen, lambda t: t.add_(0.1)), False),
    "A moved by one bit": (put(frozen, lambda t: t.view(-1)[:1].mul_(1.0000001)), False),
    "A is NaN": (put(frozen, lambda t: t.fill_(float("nan"))), False),
    "B is NaN": (put(trained, lambda t: t.view(-1)[0].fill_(float("nan"))), False),
    "B is infinite": (put(trained, lambda t: t.fill_(float("inf"))), False),
    "W moved": (put(base, lambda t: t.add_(0.1)), False),
    "rows of W have changed places": (put(base, lambda t: t.copy_(t.flip(0))), False),
    "W is zero": (put(base, lambda t: t.zero_()), False),
    "all thawed and trained": (all_thawed, False),
    "a buffer moved": (put(lambda m: parameters(m, "running_mean")[0], lambda t: t.add_(1)), False),
    "BatchNorm trained": (lambda r, m: (m.train(), m(r.data[0])), False),
    "a parameter gone": (drop_parameter, False),
    "B of another shape": (
        lambda r, m: setattr(trained(m), "data", torch.zeros(2, 7)),
        False,
    ),
    "merged": (of_peft(lambda m: m.merge_adapter()), False),
    "unloaded": (of_peft(lambda m: m.unload()), False),
    "switched off": (of_peft(lambda m: m.base_model.disable_adapter_layers()), False),
    "another adapter": (
        of_peft(
            lambda m: (
                m.add_adapter("b", LoraConfig(r=2, target_modules=["0", "2"])),
                m.set_adapter("b"),
            )
        ),
        False,
    ),
    "rescaled": (of_peft(rescaled), False),
    **{name: (do, False) for name, do in LASTING.items()},
    **{name: (do, False) for name, do in LATE.items()},
    ACCOMPLICE: (lambda *_: None, False),
    "scale times 100": (of_term(lambda m, term: setattr(term, "scale", 100 * term.scale)), False),
    "scaling times 100": (
        of_peft(lambda m: [h.scaling.update(default=150.0) for h in m.modules() if scales(h)]),
        False,
    ),
    "another A": (of_term(lambda m, term: setattr(term, "A", term.A.flip(0) * 2)), False),
    "taken off": (
        of_term(lambda m, _: remove_parametrizations(m[0], "weight")),
        False,
    ),
    "a second term": (
        of_term(lambda m, _: register_parametrization(m[0], "weight", Twice())),
        False,
    ),
    "two adapters at once": (of_peft(both), False),
    "a hook left": (lambda r, m: m.register_forward_hook(lambda *_: None), True),
    "data set up": (lambda r, m: getattr(r.data, "set_format", id)("numpy"), True),
    "data read": (lambda r, m: table_of(r.data), True),
    "a thread": (lambda r, m: in_a_thread(lambda: torch.ones(3).sum()), True),
    "its own alarm": (lambda r, m: (signal.alarm(5), signal.alarm(0)), True),
    "state that cannot be kept": (lambda r, m: r.state.update(f=lambda: 1), False),
    "state that is none": (lambda r, m: setattr(r, "state", 3), False),
    "a state": (lambda r, m: r.state.update(n=1, t=torch.ones(2)), True),
    "eval": (lambda r, m: m.eval(), True),
    "gradients gone": (lambda r, m: m.zero_grad(), True),
    "seeds": (seeded, True),
    "draws": (lambda *_: (torch.rand(3), np.random.rand(), random.random()), True),  # noqa: NPY002
    "default dtype": (lambda *_: torch.set_default_dtype(torch.float64), True),
    "no gradients from here on": (lambda *_: torch.set_grad_enabled(False), True),
    "threads": (lambda *_: torch.set_num_threads(2), True),
    "another folder": (lambda *_: os.chdir(tempfile.gettempdir()), True),
    "set_adapter": (lambda r, m: getattr(m, "set_adapter", id)("default"), True),
}
LAST: dict[str, Trained] = {}


def later(value: Trained) -> Trained:
    """Give what the round before gave, in the first round what it should."""
    old = LAST.get("own", value)
    LAST["own"] = value
    return old


def told(**changed: Any) -> Callable[..., Any]:
    """Read with other words."""
    return lambda round_, model, loss: round_.read(
        model, **{"samples": SIZES[CULPRIT], "steps": 1, "loss": loss, **changed}
    )


def by_hand(**changed: Any) -> Callable[..., Any]:
    """Change what was read."""
    return lambda round_, model, loss: dataclasses.replace(
        told()(round_, model, loss),
        **{k: v(told()(round_, model, loss)) if callable(v) else v for k, v in changed.items()},
    )


def raising(error: BaseException) -> Callable[..., Any]:
    def give(*_: object) -> None:
        raise error

    return give


def changed(found: Trained, change: Callable[[torch.Tensor], Any]) -> Trained:
    change(next(iter(found.tensors.values())))
    return found


def ones(change: Callable[[torch.Tensor], Any]) -> Callable[[Trained], dict[str, Any]]:
    return lambda t: {n: change(v) for n, v in t.tensors.items()}


WRONG_COUNTS = (0, -1, 1.5, "3", None, True, float("nan"), 2**70, torch.tensor([1, 2]), object())
WRONG_NUMBERS = (float("nan"), float("inf"), -float("inf"), "x", torch.ones(2), [], object())
RETURNS: dict[str, tuple[Callable[..., Any], bool]] = {
    "what was read": (told(), True),
    "no loss": (told(loss=None), True),
    "a loss of numpy": (told(loss=np.float32(0.5)), True),
    "a loss that is a tensor": (told(loss=torch.tensor(0.5)), True),
    "counts of numpy": (told(samples=np.int64(SIZES[CULPRIT]), steps=torch.tensor(1)), True),
    "metrics": (told(metrics={"margin": 0.5, "n": 3}), True),
    **{f"samples={v!r:.20}": (told(samples=v), False) for v in WRONG_COUNTS},
    **{f"steps={v!r:.20}": (told(steps=v), False) for v in WRONG_COUNTS},
    **{f"loss={v!r:.20}": (told(loss=v), False) for v in WRONG_NUMBERS},
    **{f"metric={v!r:.20}": (told(metrics={"m": v}), False) for v in WRONG_NUMBERS},
    "metrics=[1]": (told(metrics=[1]), False),
    "None": (lambda *_: None, False),
    "a number": (lambda *_: 0.5, False),
    "a dict": (lambda r, m, loss: vars(told()(r, m, loss)), False),
    "a list": (lambda r, m, loss: [told()(r, m, loss)], False),
    "tensors": (lambda r, m, loss: told()(r, m, loss).tensors, False),
    "the model": (lambda r, m, loss: m, False),
    "the round": (lambda r, m, loss: r, False),
    "a generator": (lambda r, m, loss: (x for x in [told()(r, m, loss)]), False),
    "what was read, from another process": (
        lambda r, m, loss: pickle.loads(pickle.dumps(told()(r, m, loss))),
        True,
    ),
    "a deep copy": (lambda r, m, loss: copy.deepcopy(told()(r, m, loss)), True),
    "read of a copy": (lambda r, m, loss: told()(r, copy.deepcopy(m), loss), True),
    "read twice": (lambda r, m, loss: (told()(r, m, loss), told()(r, m, loss))[0], True),
    "by hand, the same": (
        lambda r, m, loss: Trained(r.client, r.number, told()(r, m, loss).tensors, 3, 1, loss),
        False,
    ),
    "by hand, ones": (by_hand(tensors=ones(torch.ones_like)), False),
    "by hand, doubled": (by_hand(tensors=ones(lambda v: 2 * v)), False),
    "by hand, noise": (by_hand(tensors=ones(lambda v: v + 1e-3 * torch.randn(v.shape))), False),
    "by hand, zero": (by_hand(tensors=ones(torch.zeros_like)), False),
    "changed after read": (
        lambda r, m, loss: changed(told()(r, m, loss), lambda t: t.view(-1)[:1].add_(1)),
        False,
    ),
    "another client's tensors": (
        lambda r, m, loss: dataclasses.replace(
            dataclasses.replace(r, client=2).read(m, samples=3, steps=1), client=r.client
        ),
        False,
    ),
    "another client's": (by_hand(client=2), False),
    "another round's": (by_hand(number=9), False),
    "by hand, no names": (by_hand(tensors=lambda t: {}), False),
    "by hand, a name more": (by_hand(tensors=lambda t: {**t.tensors, "x": torch.ones(1)}), False),
    "by hand, None": (by_hand(tensors=lambda t: None), False),
    "by hand, NaN": (by_hand(tensors=ones(lambda v: v * float("nan"))), False),
    "by hand, another shape": (by_hand(tensors=ones(lambda v: v[:1])), False),
    "by hand, arrays": (by_hand(tensors=ones(lambda v: v.numpy())), False),
    "by hand, samples": (by_hand(samples=0), False),
    "by hand, other samples": (by_hand(samples=9_000_000), False),
    "by hand, another loss": (by_hand(loss=-5.0), False),
    "by hand, other steps": (by_hand(steps=2), False),
    "by hand, other metrics": (by_hand(metrics={"m": 1.0}), False),
    "ValueError": (raising(ValueError("no")), False),
    "KeyError": (raising(KeyError("x")), False),
    "StopIteration": (raising(StopIteration()), False),
    "SystemExit": (raising(SystemExit(0)), False),
    "GeneratorExit": (raising(GeneratorExit()), False),
    "AssertionError": (raising(AssertionError()), False),
    "BaseException": (raising(BaseException("of another kind")), False),
    "RecursionError": (raising(RecursionError("deep")), False),
    "OSError": (raising(OSError(28, "No space left on device")), False),
    "an error that cannot be said": (raising(Unsayable()), False),
    "a group of errors": (raising(ExceptionGroup("two", [ValueError("a"), KeyError("b")])), False),
    "OutOfTimeError": (raising(OutOfTimeError()), False),
    "surrogates": (raising(ValueError("\ud800")), False),
    "a text of many lines": (raising(ValueError("one\ntwo\x1b[31m\n" * 50)), False),
}
# How a function goes about it: installed, learnt, done, read; or something left out.
WAYS: dict[str, bool] = {"as it should": True, "nothing learnt": False, "not installed": False}
FAILING = {"never": (), "once": (2,), "from then on": (2, 3), "later": (3,)}  # rounds
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "int8": ("compression.uplink=int8",),
    "secure": ("secure=secagg", "aggregation_weights=uniform"),
    "median": ("aggregator=median",),
}
MODELS: dict[str, Callable[[], Model]] = {"plain": plain, "peft": adapted}


@dataclasses.dataclass(frozen=True)
class Case:
    """What is drawn: keys of the tables above."""

    deed: str = "nothing"
    given: str = "what was read"
    way: str = "as it should"
    kind: str = "plain"
    run: str = "plain"
    form: str = "tensors"
    optimizer: str = "SGD"

    @property
    def words(self) -> tuple[str, ...]:
        """Words of the run; of columns and the like nobody else knows the loss."""
        return (*RUNS[self.run], *([f"local.timeout={TIME}"] if self.deed in LATE else []))

    @property
    def must_run(self) -> bool:
        """Tell whether it must run as that of an honest client."""
        copied = self.form == "columns" and self.deed in {*LASTING, ACCOMPLICE}
        return (copied or DEEDS[self.deed][1]) and RETURNS[self.given][1] and WAYS[self.way]

    @property
    def fails(self) -> str:
        """Name the rounds in which the culprit fails, of `FAILING`."""
        lasts = self.form != "columns" and self.deed in LASTING
        if self.deed == ACCOMPLICE and self.form != "columns":
            return "later" if RETURNS[self.given][1] and WAYS[self.way] else "from then on"
        return "never" if self.must_run else "from then on" if lasts else "once"


def drawn(seed: int, number: int) -> Case:
    """Draw a case: mostly one thing is wrong, so that it shows."""
    rng = generator(seed, "own training", number)

    def pick(table: dict[str, Any]) -> str:
        return str(rng.choice([*table]))

    deed, given, way = "nothing", "what was read", "as it should"
    match rng.integers(10):
        case 0:
            way = pick(WAYS)
        case 1 | 2 | 3 | 4 | 5:
            deed = pick(DEEDS)
        case 6:
            deed, given = pick(DEEDS), pick(RETURNS)
        case _:
            given = pick(RETURNS)
    return Case(deed, given, way, pick(MODELS), pick(RUNS), pick(FORMS), pick(OPTIMIZERS))


def function_of(case: Case, *, honest: bool = False) -> Callable[[Round], Any]:
    """Make the training function: honest but for the culprit, in its second round."""
    seen: list[Any] = []  # the samples of the culprit

    def train(round_: Round) -> Any:
        culprit = round_.client == CULPRIT and round_.number == 2
        if honest and round_.client == CULPRIT and round_.number in FAILING[case.fails]:
            raise ValueError("the reference of a client that failed")
        model = MODELS[case.kind]()
        if honest or not culprit:
            model = round_.install(model)
            loss = learn(round_, model, case.optimizer)
            found = told(samples=SIZES[round_.client])(round_, model, loss)
            if not honest and case.deed == ACCOMPLICE and (round_.client, round_.number) == (3, 2):
                for data in seen[:1]:
                    table_of(data)["x"].data.mul_(2)
            return found
        seen.append(round_.data)
        if case.way != "not installed":
            model = round_.install(model)
        loss = 0.5 if case.way != "as it should" else learn(round_, model, case.optimizer)
        DEEDS[case.deed][0](round_, model)
        return RETURNS[case.given][0](round_, model, loss)

    return train


ENGINES = {"inline": ("engine=inline",), "ray": ("engine=ray", "engine.workers=1")}


def run(train: Callable[[Round], Any], case: Case, engine: str = "inline") -> fedraclora.RunResult:
    data = [FORMS[case.form](*samples(size, key)) for key, size in enumerate(SIZES)]
    fixed = (
        "output.progress=false",
        "local.lr=1",
        "rounds=3",
        "clients_per_round=5",
        "max_failures=1",
        *ENGINES[engine],
    )
    given: dict[str, Any] = {"model": net(), "data": data, "test": samples(9, 9), "train": train}
    method = {"name": "fed_rac_lora", "rank": 2, "alpha": 3}
    return fedraclora.simulate(*fixed, *case.words, **given, method=method, loss="cross_entropy")


@cache
def reference(kind: str, of_run: str, optimizer: str, deed: str, given: str) -> Weights:
    case = Case(deed=deed, given=given, kind=kind, run=of_run, optimizer=optimizer)
    return run(function_of(case, honest=True), case).weights()


# A case that fails in the same rounds, for the reference.
ALIKE = {"never": "nothing", "once": "A moved", "from then on": "data changed", "later": ACCOMPLICE}


def judged(case: Case, engine: str = "inline") -> str:  # noqa: PLR0911
    """Run a case and hold it against one of ``inline``; say what is wrong, or nothing."""
    alike = ALIKE[case.fails]
    wanted = reference(case.kind, case.run, case.optimizer, alike, "what was read")
    try:
        done = run(function_of(case), case, engine)
    except FedRacLoraError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {error}"
    failures = [f for row in done.rows for f in row.get("failures", ())]  # type: ignore[attr-defined]
    if case.must_run and failures:
        return f"refused: {failures}"
    if [f["client"] for f in failures] != [CULPRIT] * len(FAILING[case.fails]):
        return f"silent: failures are {failures}"
    for failure in failures:
        reason = failure["reason"]
        if len(reason.split()) < 5 or "\n" in reason or "\x1b" in reason:
            return f"words: {reason!r}"
    found = done.weights()
    if any(not torch.equal(found[n], wanted[n]) for n in wanted):
        return "silent: another client's part is another"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=ENGINES, default="inline")
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    wrong, kinds = 0, set()
    for number in range(asked.times):
        case = drawn(asked.seed, number)
        kinds.add(case)
        if said := judged(case, asked.engine):
            wrong += 1
            print(number, case, said, flush=True)
    print(f"{asked.times} cases of {len(kinds)} kinds, {wrong} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
