"""Plug-in objects of the user's of all kinds, each alone, and how a run with it must end.

    python -m tests.campaigns.objects --plug-ins

Methods, round steps, callbacks, metrics, losses, partitioners, aggregators and server optimizers
that give nothing, other shapes and types, NaN, huge whole numbers, numbers of numpy, texts, names
that a ledger has, errors, and nothing at all; some are right in another form.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

import fedraclora
from tests.campaigns.odd_objects import Kind, says
from tests.unit.test_own_hooks import WRONG, changed, optimizer, rule, step
from tests.unit.test_own_methods import FACTORS, UPDATES, Odd, carried, merged, sketch

NUMBERS = [10**400, 2**70, math.nan, math.inf, -0.0, True, np.float32(2), np.int64(3)]
NUMBERS += [np.bool_(True), np.float16(1), torch.tensor(1.0), torch.ones(1)]
OTHERS: list[Any] = [None, "0.5", np.str_("TEST"), b"x", 1j, {}, [], [1.0], (), object(), print]
OTHERS += [np.ones(3), np.zeros(0), torch.ones(3), torch.zeros(0), torch.tensor(1j)]


def mine(make: Callable[[], Any], ends: str = "refused") -> Kind:
    """Make a kind whose object is made when it is wanted."""
    return Kind(lambda _told: make(), ends)


def listed(values: list[Any], ends: Callable[[Any], str], use: Callable[[Any], Any]) -> Any:
    """Make a kind of each value, by place and type."""
    return {
        f"{k} {type(value).__name__}": mine(lambda value=value: use(value), ends(value))  # type: ignore[misc]
        for k, value in enumerate(values)
    }


def fails(*_: object) -> Any:
    """Raise what no code of the project does."""
    raise LookupError("mine")


def methods() -> Iterator[tuple[str, Kind]]:
    """Give methods of the user's."""
    for name, made in UPDATES.items():
        yield f"update: {name}", says("refused", method=Odd(rank=2, made=made))
    for name, sent in FACTORS.items():
        yield f"factors: {name}", says("refused", method=Odd(rank=2, sent=sent))
    for name, made in {
        "NaN": merged(lambda B: B * math.nan),
        "an infinity": merged(lambda B: B + math.inf),
        "NaN carried": carried(lambda B: {"B": B * math.nan}),
    }.items():
        yield f"update: {name}", says("refused", method=Odd(rank=2, made=made))
    for name, made in {
        "with gradients": merged(lambda B: B.clone().requires_grad_()),
        "in half precision": merged(lambda B: B.half()),
        "strided": merged(lambda B: B.mT.contiguous().mT),
    }.items():
        yield f"update: {name}", says(method=Odd(rank=2, made=made))
    double: Any = lambda layer, now: {  # noqa: E731
        "B": layer.trained("B"),
        "A": torch.ones(layer.rank, layer.n, dtype=torch.float64),
    }
    yield "factors: float64", says(method=Odd(rank=2, sent=double))
    swapped: Any = lambda layer, now: {"A": sketch(layer, now), "B": layer.trained("B")}  # noqa: E731
    yield "factors: in another order", says(method=Odd(rank=2, sent=swapped))


def steps() -> Iterator[tuple[str, Kind]]:
    """Give round steps of the user's."""
    for k, (hook, found) in enumerate(WRONG):
        make: Any = lambda hook=hook, found=found: {"steps": [step(hook, found)]}  # noqa: E731
        yield f"{hook} {k}", mine(make)
    for name, right in {
        "treat": lambda got, _: got,
        "columns": {"mine": np.float32(1), "nan": math.nan, "deep": {"a": [torch.ones(2)]}},
        "bound": np.float64(2.5),
        "begin": "nobody reads it",
    }.items():
        make = lambda name=name, right=right: {"steps": [step(name, right)]}  # noqa: E731
        yield f"right {name}", mine(make, "runs")
    make = lambda: {"steps": [step("treat", changed(stacked=lambda g: g.stacked * math.nan))]}  # noqa: E731
    yield "treat NaN", mine(make)


def callback(hook: str, found: Any) -> dict[str, Any]:
    """Give a callback of the user's whose hook gives something."""
    kind: Any = type("Odd", (fedraclora.Callback,), {hook: lambda *_, **__: found})
    return {"callbacks": [kind()]}


def callbacks() -> Iterator[tuple[str, Kind]]:
    """Give callbacks of the user's."""

    def ends(value: Any) -> str:
        return "runs" if value is None else "refused"

    odd = [each for each in (*NUMBERS, *OTHERS) if not isinstance(each, bool | np.bool_)]
    for name, kind in listed(odd, ends, lambda v: callback("ends", v)).items():
        yield f"ends {name}", kind

    def columns(value: Any) -> str:
        return "runs" if isinstance(value, dict) and not value else "refused"

    for name, kind in listed(OTHERS, columns, lambda v: callback("measure", v)).items():
        yield f"measure {name}", kind
    for name in ("round", "metrics", "notes", "sha256", "", "a\nb"):
        yield f"measure {name!r}", mine(lambda name=name: callback("measure", {name: 1.0}))  # type: ignore[misc]


def metrics() -> Iterator[tuple[str, Kind]]:
    """Give metrics of the user's."""

    def one(value: Any) -> str:
        real = not isinstance(value, torch.Tensor) or (
            value.numel() == 1 and value.is_floating_point()
        )
        if isinstance(value, float) and not math.isfinite(value):
            return "either"  # a row has null
        return "runs" if any(value is each for each in NUMBERS[1:]) and real else "refused"

    def given(value: Any, **keys: Any) -> dict[str, Any]:
        return {"metrics": ["accuracy", fedraclora.Metric(lambda *_: value, True, **keys)]}

    for name, kind in listed([*NUMBERS, *OTHERS], one, given).items():
        yield f"gives {name}", kind
    for name in ("round", "loss", "metrics", "uplink_total", "a b", "a.b", "a\nb"):
        yield f"named {name!r}", mine(lambda name=name: given(1.0, name=name))  # type: ignore[misc]
    yield "raises", mine(lambda: {"metrics": [fedraclora.Metric(fails, True)]})
    each = [
        None,
        1.0,
        torch.ones(3),
        torch.ones(30, 2),
        np.ones(30),
        torch.ones(30) + 0j,
        [1.0] * 30,
    ]
    for name, kind in listed(each, lambda _: "refused", lambda v: given(v, each=True)).items():
        yield f"each {name}", kind


def losses() -> Iterator[tuple[str, Kind]]:
    """Give losses of the user's."""

    def given(make: Callable[..., Any]) -> dict[str, Any]:
        def loss(output: torch.Tensor, target: torch.Tensor) -> Any:
            return make(output, target, F.cross_entropy(output, target, reduction="none"))

        return {"loss": loss}

    for k, value in enumerate(OTHERS):
        yield f"gives {k} {type(value).__name__}", mine(lambda v=value: given(lambda *_: v))  # type: ignore[misc]
    for name, make in {
        "mean": lambda o, t, each: each.mean(),
        "detached": lambda o, t, each: each.detach(),
        "NaN": lambda o, t, each: each * math.nan,
        "whole numbers": lambda o, t, each: each.long(),
        "complex": lambda o, t, each: each + 0j,
        "too few": lambda o, t, each: each[1:],
        "numpy": lambda o, t, each: each.detach().numpy(),
        "raises": lambda o, t, each: fails(),
        "drawn": lambda o, t, each: each * torch.rand(()),
    }.items():
        yield name, mine(lambda make=make: given(make))  # type: ignore[misc]


def partitions() -> Iterator[tuple[str, Kind]]:
    """Give partitioners of the user's."""

    def given(found: Any) -> dict[str, Any]:
        from tests.campaigns.odd_objects import X, Y

        make: Any = found if callable(found) else lambda data, *, clients, seed: found
        return {"data": (X, Y), "clients": 3, "partition": make}

    odd = [None, 5, "x", [], {}, [[]] * 3, [[0], [1], ["a"]], [[0], [1], [1000]], [[0], [1], [-1]]]
    odd += [[[0], [1], [0.5]], [[0], [0], [1]], [[0, 0], [1], [2]], [[0], [1]], torch.ones(3)]
    odd += [np.array(["TEST"]), [None] * 3, [[math.nan], [1], [2]], [[10**400], [1], [2]], fails]
    yield from listed(odd, lambda _: "refused", given).items()


def rules() -> Iterator[tuple[str, Kind]]:
    """Give aggregators and server optimizers of the user's."""
    for k, value in enumerate(OTHERS):
        made: Any = lambda *_, value=value: value  # noqa: E731
        name = f"{k} {type(value).__name__}"
        yield f"aggregator {name}", mine(lambda made=made: {"aggregator": rule(made)})  # type: ignore[misc]
        yield f"optimizer {name}", mine(lambda m=made: {"server_optimizer": optimizer(m)})  # type: ignore[misc]
    for name, field in {"rows": "stacked", "weights": "weights"}.items():
        for what, change in {
            "NaN": lambda t: t * math.nan,
            "fewer": lambda t: t[1:],
            "texts": lambda t: "x",
            "an array": lambda t: t.numpy(),
        }.items():
            of: Any = changed(**{field: lambda got, f=field, c=change: c(getattr(got, f))})
            yield f"aggregator {name} {what}", mine(lambda of=of: {"aggregator": rule(of)})  # type: ignore[misc]
    yield "aggregator raises", mine(lambda: {"aggregator": rule(fails)})
    yield "optimizer raises", mine(lambda: {"server_optimizer": optimizer(fails)})
    nan: Any = lambda c, m: ({n: t * math.nan for n, t in c.items()}, m)  # noqa: E731
    yield "optimizer NaN", mine(lambda: {"server_optimizer": optimizer(nan)})
    same: Any = lambda c, m: (c, m)  # noqa: E731
    yield "optimizer of nothing", mine(lambda: {"server_optimizer": optimizer(same)}, "runs")
    yield "aggregator of nothing", mine(lambda: {"aggregator": rule(lambda got, _: got)}, "runs")


PLUG_INS: dict[str, dict[str, Kind]] = {
    "method": dict(methods()),
    "steps": dict(steps()),
    "callbacks": dict(callbacks()),
    "metrics": dict(metrics()),
    "loss": dict(losses()),
    "partition": dict(partitions()),
    "rule": dict(rules()),
}
