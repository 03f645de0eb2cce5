"""Training functions that return or do what they should not, each beside honest clients.

    python -m tests.campaigns.own_training --times 400
    python -m tests.campaigns.own_training --times 20 --engine ray

What is returned, what is done to the model, the model and the run are drawn by a seeded generator.
One client of five misbehaves. Either nothing that counts has changed, and the run is that of
honest clients to the bit; or this client failed, in one sentence that names it, and the run is to
the bit that of the four others. What can be wrong is

    silent      what must fail was taken, or another client's part is another
    refused     what must run failed
    traceback   an error that is none of `fedraclora.errors`
    words       a failure that is no sentence

and is printed with what was drawn. The status is non-zero if there is any.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import random  # noqa: TID251  (a function of somebody's may seed it)
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.errors import FedRacLoraError
from fedraclora.rng import generator
from tests.common import normal

SIZES, CULPRIT = (5, 9, 7, 4, 6), 1
Model = Any


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


def learn(round_: Round, model: Model) -> float:
    x, y = round_.data
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    loss = nn.functional.cross_entropy(model(x), y)
    loss.backward()
    optimiser.step()
    return loss.item()


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


def rescaled(model: Any) -> None:
    next(m for m in model.modules() if hasattr(m, "scaling")).set_scale("default", 2.0)


def seeded(*_: object) -> None:
    torch.manual_seed(1)  # noqa: TID251
    np.random.seed(1)  # noqa: NPY002, TID251
    random.seed(1)


def in_place(round_: Round, model: Model) -> None:
    round_.data[0].mul_(2)


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
    "data changed": (in_place, False),
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
        model, **{"samples": 3, "steps": 1, "loss": loss, **changed}
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


def ones(change: Callable[[torch.Tensor], Any]) -> Callable[[Trained], dict[str, Any]]:
    return lambda t: {n: change(v) for n, v in t.tensors.items()}


WRONG_COUNTS = (0, -1, 1.5, "3", None, True, float("nan"), 2**70, torch.tensor([1, 2]), object())
WRONG_NUMBERS = (float("nan"), float("inf"), -float("inf"), "x", torch.ones(2), [], object())
RETURNS: dict[str, tuple[Callable[..., Any], bool]] = {
    "what was read": (told(), True),
    "no loss": (told(loss=None), True),
    "a loss of numpy": (told(loss=np.float32(0.5)), True),
    "a loss that is a tensor": (told(loss=torch.tensor(0.5)), True),
    "counts of numpy": (told(samples=np.int64(3), steps=torch.tensor(1)), True),
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
    "another client's": (by_hand(client=2), False),
    "another round's": (by_hand(number=9), False),
    "by hand, no names": (by_hand(tensors=lambda t: {}), False),
    "by hand, a name more": (by_hand(tensors=lambda t: {**t.tensors, "x": torch.ones(1)}), False),
    "by hand, None": (by_hand(tensors=lambda t: None), False),
    "by hand, NaN": (by_hand(tensors=ones(lambda v: v * float("nan"))), False),
    "by hand, another shape": (by_hand(tensors=ones(lambda v: v[:1])), False),
    "by hand, arrays": (by_hand(tensors=ones(lambda v: v.numpy())), False),
    "by hand, samples": (by_hand(samples=0), False),
    "ValueError": (raising(ValueError("no")), False),
    "KeyError": (raising(KeyError("x")), False),
    "StopIteration": (raising(StopIteration()), False),
    "SystemExit": (raising(SystemExit(0)), False),
    "GeneratorExit": (raising(GeneratorExit()), False),
    "AssertionError": (raising(AssertionError()), False),
    "BaseException": (raising(BaseException("of another kind")), False),
    "RecursionError": (raising(RecursionError("deep")), False),
    "OSError": (raising(OSError(28, "No space left on device")), False),
    "a text of many lines": (raising(ValueError("one\ntwo\x1b[31m\n" * 50)), False),
}
# How a function goes about it: installed, learnt, done, read; or something left out.
WAYS: dict[str, bool] = {"as it should": True, "nothing learnt": False, "not installed": False}
FAILING = {"never": (), "once": (2,), "from then on": (2, 3)}  # rounds
RUNS: dict[str, tuple[str, ...]] = {
    "plain": (),
    "int8": ("wire.uplink=int8",),
    "secure": ("secure=secagg", "weights=uniform"),
    "median": ("aggregator=median",),
}
MODELS: dict[str, Callable[[], Model]] = {"plain": plain, "peft": adapted}
Case = tuple[str, str, str, str, str]


def drawn(seed: int, number: int) -> Case:
    """Draw a case: mostly one thing is wrong, so that it shows."""
    rng = generator(seed, "own training", number)

    def pick(table: dict[str, Any]) -> str:
        return str(rng.choice([*table]))

    deed, given, way = "nothing", "what was read", "as it should"
    match rng.integers(10):
        case 0:
            way = pick(WAYS)
        case 1 | 2 | 3 | 4:
            deed = pick(DEEDS)
        case 5:
            deed, given = pick(DEEDS), pick(RETURNS)
        case _:
            given = pick(RETURNS)
    return deed, given, way, pick(MODELS), pick(RUNS)


def runs(case: Case) -> bool:
    """Tell whether a case must run as that of an honest client."""
    deed, given, way, *_ = case
    return DEEDS[deed][1] and RETURNS[given][1] and WAYS[way]


def function_of(case: Case | None, kind: str, *, fails: str = "never") -> Callable[[Round], Any]:
    """Make the training function: honest but for the culprit, in its second round."""

    def train(round_: Round) -> Any:
        culprit = round_.client == CULPRIT and round_.number == 2
        if round_.client == CULPRIT and round_.number in FAILING[fails]:
            raise ValueError("the reference of a client that failed")
        model = MODELS[kind]()
        if not culprit or case is None:
            model = round_.install(model)
            return told(samples=SIZES[round_.client])(round_, model, learn(round_, model))
        deed, given, way, *_ = case
        if way != "not installed":
            model = round_.install(model)
        loss = 0.5 if way != "as it should" else learn(round_, model)
        DEEDS[deed][0](round_, model)
        found = RETURNS[given][0](round_, model, loss)
        honest = isinstance(found, Trained) and runs(case)
        return dataclasses.replace(found, samples=SIZES[CULPRIT]) if honest else found

    return train


ENGINES = {"inline": ("engine=inline",), "ray": ("engine=ray", "engine.workers=1")}


def run(
    train: Callable[[Round], Any], words: tuple[str, ...], engine: str = "inline"
) -> fedraclora.Run:
    data = [samples(size, key) for key, size in enumerate(SIZES)]
    fixed = ("output.progress=false", "rounds=3", "cohort=5", "max_failures=1", *ENGINES[engine])
    method = {"name": "fed_rac_lora", "rank": 2, "alpha": 3}
    return fedraclora.simulate(
        *fixed, *words, model=net(), data=data, test=samples(9, 9), method=method, train=train
    )


@cache
def reference(kind: str, words: tuple[str, ...], *, fails: str) -> dict[str, torch.Tensor]:
    return run(function_of(None, kind, fails=fails), words).weights()


def judged(case: Case, engine: str = "inline") -> str:  # noqa: PLR0911
    """Run a case and hold it against one of ``inline``; say what is wrong, or nothing."""
    *_, kind, way_of_run = case
    words = RUNS[way_of_run]
    lasts = case[0] == "data changed"  # the samples of the next round are changed, too
    fails = "never" if runs(case) else "from then on" if lasts else "once"
    wanted = reference(kind, words, fails=fails)
    try:
        done = run(function_of(case, kind), words, engine)
    except FedRacLoraError as error:
        return f"refused: {error}"
    except BaseException as error:
        return f"traceback: {type(error).__name__}: {error}"
    failures = [f for row in done.rows for f in row.get("failures", ())]  # type: ignore[attr-defined]
    if runs(case) and failures:
        return f"refused: {failures}"
    if [f["client"] for f in failures] != [CULPRIT] * len(FAILING[fails]):
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
