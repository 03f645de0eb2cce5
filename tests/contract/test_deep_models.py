"""Every method, and what is put around one, on a model of twelve layers whose names are numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import worlds
from torch import nn
from worlds import SIZES, divide, fill, has_field, make_method, variants, world_of

from fedraclora.allocation import AdaLora, HeteroLora
from fedraclora.compatibility import Features, refuse
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import Method, State
from fedraclora.protocol.uplinks import greatest_norm
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.server.guard import overflowing
from fedraclora.strategies.wrappers.allocated import allocated
from fedraclora.strategies.wrappers.dora import Dora
from fedraclora.training.extras.settings import LocalSettings

DEPTH, SIDES = 12, (60, 64)
GENTLE = LocalSettings(lr=0.01, epochs=1, batch_size=4)
WRAPPED = {
    "dora": Dora,
    "heterolora": lambda method: allocated(method, HeteroLora(share=0.5)),
    "heterolora-every": lambda method: allocated(method, HeteroLora(share=0.5, every=1)),
    "adalora": lambda method: allocated(method, AdaLora(target=1.0, begin=1, end=3)),
}


@pytest.fixture(scope="module")
def deep() -> worlds.World:
    """Twelve square-ish layers, ``0`` to ``22``, and a head; one name begins with another."""
    parts: list[nn.Module] = []
    for i in range(DEPTH):
        parts += [nn.Linear(SIDES[i % 2], SIDES[(i + 1) % 2]), nn.Tanh()]
    model = fill(nn.Sequential(*parts, nn.Linear(SIDES[0], 4)), 3, torch.float32)
    rng = generator(5, "samples")
    x = torch_normal(rng, sum(SIZES), SIDES[0]).float()
    samples = Samples({"x": x}, torch.from_numpy(rng.integers(0, 4, sum(SIZES))))
    head = (str(2 * DEPTH),)
    task = Task(model, head, "cross_entropy", ("loss",), divide(samples, SIZES), samples)
    return world_of(task, head="full", bias="full")


def methods() -> Iterator[tuple[str, str]]:
    """Every method by itself, and inside of whatever takes it."""
    for name, changes in variants():
        if changes:
            continue
        yield name, ""
        inner = make_method(name)
        for around, wrap in WRAPPED.items():
            try:
                refuse(Features([inner, wrap(inner)]).conflicts())
            except ConfigError:
                continue
            yield name, around


FEW = {"fedavg_lora", "fed_rac_lora", "fed_sb", "slora", "fedkseed"}


@pytest.mark.short(when=lambda name, around: name in FEW)
@pytest.mark.parametrize(("name", "around"), list(methods()))
def test_rounds_of_a_deep_model_are_sound(name: str, around: str, deep: worlds.World) -> None:
    method: Method = make_method(name)
    method = WRAPPED[around](method) if around else method
    try:
        done = worlds.run(deep, method, GENTLE, rounds=3, cohort=2)
    except ConfigError:
        if not around.startswith("hetero"):
            raise
        pytest.skip("what a rule does not fit it says in round 1")
    moved = [n for n, w in done.weights.items() if not torch.equal(w.float(), deep.base[n])]
    chosen = around.startswith("hetero") or has_field(method, "layers")  # in each round some
    adapted = [n for n in moved if n in deep.plan.targets]
    assert DEPTH // 2 <= len(adapted) <= DEPTH if chosen else len(adapted) == DEPTH
    assert all(torch.isfinite(w).all() for w in done.weights.values())
    assert [row["failures"] for row in done.rows] == [[]] * 3


def test_layers_are_too_large_by_themselves(deep: worlds.World) -> None:
    """Factors of one layer are multiplied; those of different layers, and other tensors, not."""
    state = State(deep.base, deep.plan)
    most = greatest_norm(torch.float32)
    large, larger = (torch.full((1, 1), share * most) for share in (0.9, 1.1))
    some = [*deep.plan.targets][:2]
    many = {f"{i}.magnitude": large for i in range(DEPTH)}
    each = {f"{name}/B": large for name in some}
    for carried, wanted in (
        (many | each | {"counts": torch.tensor([3])}, []),
        ({f"{some[0]}/A": large, **each}, some[:1]),
        (many | {"0.magnitude": larger}, ["0.magnitude"]),
        ({f"{some[0]}/B": torch.full((1, 1), float("nan"))}, [f"{some[0]}/B"]),
    ):
        assert overflowing(replace(state, carried=carried), state) == wanted
