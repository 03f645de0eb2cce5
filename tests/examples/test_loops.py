"""The examples of training of one's own: each runs, repeats, resumes, and trains its part alone."""

from __future__ import annotations

import copy
import gc
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.errors import ClientError
from tests.common import normal

pytestmark = pytest.mark.slow

pytest.importorskip("peft")
EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
QUIET = ("output.progress=false", "pretrain=none", "local.lr=1")  # whose calls are counted
SIZES = (24, 40)


@pytest.fixture
def example(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """One of the examples, as a module that other processes can import too."""
    name = str(request.param)
    pytest.importorskip(
        {"lightning_loop": "lightning", "diffusion": "diffusers"}.get(name, "torch")
    )
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    del sys.modules[name]


def vectors(count: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = normal(count, 20, key=key).float()
    return x, (x[:, 0] > 0).long()


def given(module: ModuleType) -> dict[str, Any]:
    """Model, data and choices of a run of an example, small."""
    torch.default_generator.manual_seed(0)
    if hasattr(module, "Denoiser"):
        clients = [module.samples(n) for n in SIZES]
        model, test = module.Denoiser(), module.samples(8, noisy=True)
        layers = {"target_modules": module.TARGETS, "head": "frozen", "bias": "frozen"}
        return {"model": model, "data": clients, "test": test, "loss": "squared_error", **layers}
    clients = [vectors(n, key) for key, n in enumerate(SIZES)]
    return {"model": module.network(), "data": clients, "test": vectors(8, 9)}


def run(module: ModuleType, folder: Path, rounds: int, **more: Any) -> fedraclora.RunResult:
    method = {"name": "fed_rac_lora", "rank": 2, "alpha": 3.0}
    found = given(module) | {"train": module.train, "method": method} | more
    return fedraclora.simulate(*QUIET, folder=folder, rounds=rounds, **found)


STEPS = {"plain": (3, 4), "lightning_loop": (6, 6), "diffusion": (2, 2)}


@pytest.mark.short(when=lambda example: example != "diffusion")
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of Lightning, from torch
@pytest.mark.parametrize("example", STEPS, indirect=True)
def test_an_example_repeats_resumes_and_moves_nothing_else(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, steps = Round.read, []

    def spy(round_: Round, model: torch.nn.Module, **numbers: Any) -> Trained:
        found = read(round_, model, **numbers)
        fresh = dict(copy.deepcopy(model).state_dict())
        round_.install(model)
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        moved = {n for n, t in model.state_dict().items() if not torch.equal(fresh[n], t)}
        assert moved
        assert moved <= trained
        steps.append(found.steps)
        return found

    monkeypatch.setattr(Round, "read", spy)
    monkeypatch.setattr(example, "STEPS", STEPS[example.__name__][0], raising=False)
    monkeypatch.chdir(tmp_path)
    whole = run(example, tmp_path / "whole", 2).weights()
    assert tuple(steps) == STEPS[example.__name__] * 2
    run(example, tmp_path / "parts", 1)
    parts = run(example, tmp_path / "parts", 2, resume=True).weights()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "parts"}


def alone(module: ModuleType, round_: Round) -> Trained:
    """What the ranks of ``ddp.py`` do, in one process."""
    torch.default_generator.manual_seed(round_.seed)
    model = round_.install(module.network())
    wanted = [p for p in model.parameters() if p.requires_grad]
    optimizer, (x, y), total = torch.optim.SGD(wanted, lr=module.RATE), round_.data, 0.0
    for rows in torch.randperm(len(x)).split(module.BATCH)[: module.STEPS]:
        loss = torch.nn.functional.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.item() / module.STEPS
    return round_.read(model, samples=len(x), steps=module.STEPS, loss=total)


RANK = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "0"}


@pytest.mark.long
@pytest.mark.parametrize(("ranks", "sharded"), [(1, False), (1, True), (2, False), (2, True)])
@pytest.mark.parametrize("example", ["ddp"], indirect=True)
def test_ranks_train_as_one_process(
    example: ModuleType, ranks: int, sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "SHARDED", sharded)
    monkeypatch.syspath_prepend(EXAMPLES)  # ranks import the example
    train = example.train
    if ranks == 1:  # the one rank is this process
        for name, value in RANK.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(example, "RANKS", 1)
        train = partial(example.on_rank, sharded=sharded)
    found = run(example, tmp_path / "ranks", 1, train=train)
    one = run(example, tmp_path / "one", 1, train=lambda round_: alone(example, round_))
    first, second = found.weights(), one.weights()
    assert all(torch.allclose(first[n], second[n], rtol=0, atol=1e-6) for n in first)
    losses = [each.rows[-1]["train_loss"] for each in (found, one)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def be_the_one_rank(example: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be the one rank of a client."""
    for name, value in RANK.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(example, "RANKS", 1)


@pytest.mark.long
@pytest.mark.parametrize("example", ["ddp"], indirect=True)
def test_ranks_that_have_trained_apart_are_named(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_the_one_rank(example, monkeypatch)

    def gather(every: list[Any], own: list[int]) -> None:
        every[:] = [own, [0] * len(own)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    with pytest.raises(ClientError, match=r"client 0.*rank 1 of 2 .*DistributedDataParallel"):
        run(example, tmp_path / "run", 1, train=partial(example.on_rank, sharded=False))


@pytest.mark.long
@pytest.mark.parametrize("example", ["ddp"], indirect=True)
def test_no_ddp_outlives_its_group(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it destroys the group with Python's lock held, which a thread of gloo may wait for."""
    be_the_one_rank(example, monkeypatch)
    alive, left = weakref.WeakSet[Any](), list[int]()
    wrap, destroy = example.DistributedDataParallel, torch.distributed.destroy_process_group

    def wrapped(model: torch.nn.Module) -> torch.nn.Module:
        alive.add(found := wrap(model))
        return found  # type: ignore[no-any-return]

    def destroyed() -> None:
        left.append(len(alive))
        gc.collect()
        destroy()

    monkeypatch.setattr(example, "DistributedDataParallel", wrapped)
    monkeypatch.setattr(torch.distributed, "destroy_process_group", destroyed)
    run(example, tmp_path / "run", 1, train=partial(example.on_rank, sharded=False))
    assert left == [0] * len(SIZES)


def failing(round_: Round, sharded: bool) -> Trained:
    """In every rank; one of them is the first."""
    raise ValueError("no such thing")


@pytest.mark.long
@pytest.mark.parametrize("example", ["ddp"], indirect=True)
def test_a_rank_that_fails_is_named(
    example: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example, "on_rank", failing)
    with pytest.raises(ClientError, match=r"client 0.*rank \d, status 1: ValueError: no such"):
        run(example, tmp_path / "run", 1)
