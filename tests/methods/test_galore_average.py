"""GaLore as the optimizer of whole weights: its formula, its moments, what they outlive."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import pytest
import torch

from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.methods.galore_average import (
    GaLore,
    ProjectGradients,
    Projection,
    leading_vectors,
    low_rank_svd,
)
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.moments import begin_moments, blank_moments, moment_shapes
from fedraclora.tree import Tree
from tests.reference.galore import LocalGalore

SHAPES = {"wide": (4, 7), "tall": (6, 5), "turned": (7, 4), "kernel": (3, 4, 2, 2), "bias": (4,)}
SHAPES |= {"square": (5, 5)}  # projected from the left
RANKS = {"wide": 2, "tall": 3, "turned": 2, "square": 3, "kernel": 3}
PROGRAM = ProjectGradients(2, 0.25, RANKS, ("turned",))
SENT = RoundInstructions(
    dense={n: to_train(shape, main=n != "bias") for n, shape in SHAPES.items()},
    program=PROGRAM,
)
ADAMW = {"optimizer": "adamw", "lr": 0.05, "full_lr": 0.01}
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"lr": 0.1, "weight_decay": 0.3},
    "momentum": {"lr": 0.1, "momentum": 0.8, "weight_decay": 0.3},
    "nesterov": {"lr": 0.1, "momentum": 0.8, "nesterov": True},
    "adamw": ADAMW,
    "adamw-decay": ADAMW | {"weight_decay": 0.3, "beta1": 0.7, "beta2": 0.9, "eps": 1e-4},
}


def normals(*keys: int | str, K: int = 3) -> Tree:
    rng = generator(0, "galore", *keys)
    return {name: torch_normal(rng, K, *shape) for name, shape in SHAPES.items()}


def made(
    local: LocalSettings,
    values: Tree,
    rates: dict[str, float],
    stored: Tree,
    sent: RoundInstructions = SENT,
) -> GaLore:
    """The optimizer of clients that are asked for what is sent."""
    program = cast(ProjectGradients, sent.program)
    return GaLore(local, values, rates, stored, program, program.projections(sent))


def rates(local: LocalSettings) -> dict[str, float]:
    return {n: local.rate(s.main, 1.0) for n, s in SENT.trained().items()}


@pytest.mark.parametrize("setting", SETTINGS)
def test_steps_are_those_of_the_formula_over_rounds(setting: str) -> None:
    """Two rounds of unequal clients, who count their gaps each for itself."""
    local = LocalSettings(**{"lr": 0.5, **SETTINGS[setting]})
    if setting != "sgd":
        local = replace(local, optimizer_state="run")
    start, counts = normals("start"), ([5, 3, 1], [4, 3, 3])  # who finishes first stands last
    values = {n: v.clone() for n, v in start.items()}
    own = [{n: v[k].clone().requires_grad_() for n, v in start.items()} for k in range(3)]
    alone = [LocalGalore(local, tensors, SENT, 1.0) for tensors in own]
    blank = blank_moments(local, SENT, torch.float64)
    stored = {n: t.expand(3, *t.shape).clone() for n, t in blank.items()}
    for round_, steps in enumerate(counts[: 2 if stored else 1]):
        optimizer = made(local, values, rates(local), begin_moments(stored, local, 0))
        for j in range(max(steps)):
            gradients = normals("gradient", round_, j)
            active = sum(s > j for s in steps)
            optimizer.step({n: g[:active] for n, g in gradients.items()})
            for k in range(active):
                for name, value in own[k].items():
                    value.grad = gradients[name][k].clone()
                alone[k].step()
        stored = optimizer.moments(torch.tensor(steps))
    for k in range(3):
        for name, value in own[k].items():
            gap = values[name][k] - value.detach()
            assert float(gap.abs().max()) < 1e-12, name
    assert all(float((values[n] - v).abs().max()) > 0.01 for n, v in start.items())


def test_moments_have_the_rank_in_the_place_of_the_smaller_side() -> None:
    shapes = moment_shapes(LocalSettings(**{"lr": 0.5, **ADAMW}), SENT)
    coordinates = {"wide": (2, 7), "tall": (6, 3), "turned": (2, 7), "kernel": (3, 16)}
    coordinates |= {"square": (3, 5)}
    for name, shape in (coordinates | {"bias": (4,)}).items():
        assert shapes[f"first/{name}"] == shapes[f"second/{name}"] == shape
    bases = {"wide": (4, 2), "tall": (5, 3), "turned": (4, 2), "kernel": (3, 3)}
    bases |= {"square": (5, 3)}
    assert {n: s for n, s in shapes.items() if "basis" in n} == {
        f"basis/{n}": shape for n, shape in bases.items()
    }
    optimizer = made(
        LocalSettings(**{"lr": 0.5, **ADAMW}), normals("start"), rates(LocalSettings(lr=0.5)), {}
    )
    optimizer.step(normals("gradient"))
    for kind, held in (("first", optimizer.first), ("second", optimizer.second)):
        assert {n: tuple(t.shape[1:]) for n, t in held.items()} == {
            n: shapes[f"{kind}/{n}"] for n in SHAPES
        }


def test_nothing_else_is_projected() -> None:
    assert PROGRAM.projections(SENT).keys() == SHAPES.keys() - {"bias"}


def test_directions_that_a_gradient_lacks_are_left_out_until_the_next_basis() -> None:
    """A gradient of rank one leaves the other singular vectors to the library's choice."""
    rng = generator(0, "galore", "one")
    local = LocalSettings(lr=1.0)
    sent = RoundInstructions(
        dense={"w": to_train((4, 7))},
        program=ProjectGradients(2, 1.0, {"w": 3}),
    )
    one = torch_normal(rng, 1, 4, 1) @ torch_normal(rng, 1, 1, 7)
    values = {"w": torch.zeros(1, 4, 7, dtype=torch.float64)}
    optimizer = made(local, values, {"w": 1.0}, {}, sent)
    optimizer.step({"w": one})
    torch.testing.assert_close(values["w"], -one, rtol=1e-12, atol=1e-12)
    for rank in (1, 4):  # one direction still, then three of a new basis beside it
        optimizer.step({"w": torch_normal(rng, 1, 4, 7)})
        assert int(torch.linalg.matrix_rank(values["w"][0])) == rank
    optimizer.step({"w": torch.zeros(1, 4, 7, dtype=torch.float64)})


def test_a_basis_does_not_depend_on_the_signs_of_an_svd() -> None:
    G = torch_normal(generator(0, "galore", "sign"), 5, 8)
    projection = Projection(5, 8, 3, turned=False)
    P = leading_vectors(G, projection)
    torch.testing.assert_close(P, leading_vectors(-G, projection), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(P.mT @ P, torch.eye(3).double(), rtol=1e-12, atol=1e-12)
    assert all(column[column.abs().argmax()] > 0 for column in P.T)
    assert not leading_vectors(torch.zeros(5, 8), projection).any()


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (40, 500)])
@pytest.mark.parametrize("rank", [0, 3, 60, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_svd_of_a_matrix_of_any_rank(
    shape: tuple[int, int], rank: int, dtype: torch.dtype
) -> None:
    rng = generator(0, "low rank", *shape, rank)
    left, right = torch_normal(rng, shape[0], rank), torch_normal(rng, rank, shape[1])
    matrix = (left @ right).to(dtype)
    u, s, vt = low_rank_svd(matrix)
    slack = 50 * torch.finfo(dtype).eps
    scale = float(torch.linalg.norm(matrix)) or 1.0
    assert float(torch.linalg.norm(u * s @ vt - matrix)) <= slack * scale
    eye = torch.eye(len(s), dtype=dtype)
    torch.testing.assert_close(u.mT @ u, eye, rtol=0, atol=slack)
    torch.testing.assert_close(vt @ vt.mT, eye, rtol=0, atol=slack)
    whole = torch.linalg.svdvals(matrix)[: len(s)]
    torch.testing.assert_close(s, whole, rtol=0, atol=slack * scale)


def test_the_svd_of_a_matrix_of_low_rank_is_a_small_one(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    svd = torch.linalg.svd
    monkeypatch.setattr(
        torch.linalg, "svd", lambda m, **given: seen.append(m.shape) or svd(m, **given)
    )
    rng = generator(0, "low rank", "small")
    low_rank_svd(torch_normal(rng, 300, 9) @ torch_normal(rng, 9, 200))
    low_rank_svd(torch_normal(rng, 300, 40) @ torch_normal(rng, 40, 200))
    assert [*map(tuple, seen)] == [(32, 300), (200, 300)]
