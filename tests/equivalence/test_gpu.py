"""The same code on a GPU: near to the CPU, the same bits again, bounded by the card's memory.

Every test runs on a pretended card (`pretend`), where the bits are the CPU's; those marked ``gpu``
are the same tests on a real one.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from pretend import FREE, Card, pretend_card
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from typing_extensions import override
from vectorized_agreement import base_of, method_of
from vectorized_cases import CASES, SEED, SIZES, Case, scaled

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.data.clients import PartitionedData
from fedraclora.protocol import link
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.protocol.program import LocalResult
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.training.chunking import FREE_SHARE
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.memory import LiveTensors, measure_memory
from fedraclora.tree import Tree, digest
from tests.common import assemble

JOB = [
    "data=digits",
    "pretrain=none",
    "clients=12",
    "clients_per_round=6",
    "rounds=4",
    "local.lr=0.1",
    "output=study",
    "output.checkpoint_every=2",
]
CLIENTS = torch.arange(len(SIZES))
BITS = 2.0**-8  # of bfloat16


def job(*words: str, folder: Path | None = None, resume: bool = False) -> RunBuilder:
    config = from_plain(composed([*JOB, *words]), METHODS)
    return assemble(config, folder, resume=resume)


def run(*words: str) -> RunBuilder:
    done = job(*words)
    with closing(done.grid):
        done.strategy.run(done.grid)
    return done


def weights(done: RunBuilder) -> Tree:
    return done.strategy.method.weights(done.strategy.state, done.strategy.draw)


# --- the CPU's numbers ---------------------------------------------------------------------------

RUNS = {
    "head stays at the clients": ("head=personal", "local=adamw"),
    "rank budgets": ("system=mixed_ranks", "method.rank=4"),
    "carried": ("method.merge_every=3", "aggregator=sum"),
    "sums of blocks": ("clients=40", "clients_per_round=40", "engine.chunk=32"),
    "left, clipped, pulled": ("method.train=A", "local.clip=1.0", "local.prox=0.1"),
    "projected": ("method.sketch=gaussian", "local.precondition=true"),
    "one by one": ("engine=inline",),
    "rows of trained lengths": (
        "method=fedavg_lora",
        "dora=true",
        "model=cnn",
        "target_modules=all",
    ),
    "made on demand": ("data=virtual", "partition=given", "data.features=6", "rounds=2"),
}


RATE = dict.fromkeys(METHODS, ()) | {"fedkseed": ("local.lr=0.002",)}  # it diverges at JOB's
# Each way to train, on either kind of model.
ONE_EACH = {("fed_rac_lora", "mlp"), ("fedavg_lora", "cnn"), ("fedavg", "mlp")}


@pytest.mark.slow
@pytest.mark.short(when=lambda method, model: (method, model) in ONE_EACH)
@pytest.mark.parametrize(
    ("method", "model"),
    [*product(METHODS, ["mlp"]), *product(["fed_rac_lora", "fedavg_lora", "fedavg"], ["cnn"])],
)
def test_every_method_agrees_with_the_cpu(method: str, model: str, card: Card) -> None:
    words = (f"method={method}", f"model={model}", "engine.chunk=4", "rounds=2", *RATE[method])
    there, here = (weights(run(*words, f"device={d}")) for d in ("cuda", "cpu"))
    card.assert_near(there, here, 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_agrees_with_the_cpu(name: str, card: Card) -> None:
    there, here = (run(*RUNS[name], f"device={d}") for d in ("cuda", "cpu"))
    card.assert_near(weights(there), weights(here), 1e-3)
    if card.pretended:
        assert there.strategy.recorder.ledger.digest() == here.strategy.recorder.ledger.digest()


def moved(case: Case, device: str) -> Case:
    task = case.task
    model = copy.deepcopy(task.model).to(device)
    data, test = task.train.to(device), task.test.to(device)
    return replace(case, task=replace(task, model=model, train=data, test=test))


def trained(case: Case, device: str, name: str, local: LocalConfig, **settings: Any) -> LocalResult:
    """Train all clients of a case for a round."""
    there = moved(case, device)
    plan, draw, base = there.plan(), Draw(SEED), base_of(there.task)
    method = method_of(name)
    cohort = Cohort(CLIENTS, torch.ones(len(SIZES)))
    sent = method.open_round(method.initial_state(base, plan, draw), 1, cohort, draw)
    trainer = CohortTrainer(
        there.task, plan, local, seed=SEED, device=torch.device(device), **settings
    )
    return trainer.train(base, sent, CLIENTS, round_=1, rate_scale=1.0)


FURTHER = {"vmap": lambda: Case(scaled(), dense="gain,shift")}
LOCAL = LocalConfig(lr=0.2, batch_size=4, epochs=2, momentum=0.5)


@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg"])
@pytest.mark.parametrize("case", CASES | FURTHER)
def test_every_model_trains_as_on_the_cpu(case: str, name: str, card: Card) -> None:
    """In float64, so that a real card has nothing but rounding to differ by."""
    if case == "vmap" and card.pretended:
        pytest.skip("what torch.func.vmap gives back does not say where it lies")
    world = (CASES | FURTHER)[case]()
    there, here = (trained(world, device, name, LOCAL) for device in ("cuda", "cpu"))
    card.assert_near(there.trained, here.trained, 1e-9)
    torch.testing.assert_close(there.losses, here.losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", ["mlp", "cnn-full", "bert-query-value", "gpt"])
def test_training_again_gives_the_same_bits(case: str, card: Card) -> None:
    world = CASES[case]()
    again = [digest(trained(world, "cuda", "fed_rac_lora", LOCAL).trained) for _ in range(3)]
    assert len(set(again)) == 1


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, card: Card) -> None:
    whole = job("device=cuda", folder=tmp_path / "whole")
    whole.strategy.run(whole.grid)
    part = job("device=cuda", folder=tmp_path / "part")
    part.strategy.run(part.grid, last=2)
    rest = job("device=cuda", folder=tmp_path / "part", resume=True)
    rest.strategy.run(rest.grid)
    assert digest(rest.strategy.state.base) == digest(whole.strategy.state.base)


@pytest.mark.parametrize("words", [(), ("model=cnn",), ("head=personal",), ("system=mixed_ranks",)])
def test_no_step_waits_for_the_host(
    words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A round reads the card, but no more often for more local steps of an epoch."""
    reads = []
    for batch in (16, 5):
        with monkeypatch.context() as patches, pretend_card(patches) as pretended:
            steps = ("rounds=1", "engine.chunk=3", f"local.batch_size={batch}")
            run("device=cuda", *words, *steps)
        reads.append(pretended.reads)
    assert reads[0] == reads[1]


# --- bf16-mixed ----------------------------------------------------------------------------------


class Dtypes(TorchDispatchMode):
    """Notes the types of the numbers that are computed under it."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: set[torch.dtype] = set()

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        tree_map_only(torch.Tensor, lambda t: self.seen.add(t.dtype), out)
        return out


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fed_rac_lora", "fedavg_lora", "fedavg"])
def test_mixed_precision_ends_with_the_products(
    method: str, card: Card, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clients multiply in bfloat16; nothing of it reaches masters, links or the merge."""
    training, merging = Dtypes(), Dtypes()
    train, close = CohortTrainer.train, METHODS[method].close_round

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        with training:
            return train(self, *args, **kwargs)

    def merged(self: Any, *args: Any) -> Any:
        with merging:
            return close(self, *args)

    monkeypatch.setattr(CohortTrainer, "train", watched)
    monkeypatch.setattr(METHODS[method], "close_round", merged)
    done = run(f"method={method}", "device=cuda", "precision=bf16-mixed", "local.lr=0.01")
    assert torch.bfloat16 in training.seen
    assert torch.bfloat16 not in merging.seen
    assert torch.float64 in merging.seen
    state = done.strategy.state
    assert {t.dtype for t in state.base.values()} == {torch.float32}
    made = link.matrices(next(iter(state.link.terms.values()))) if state.link.terms else ()  # type: ignore[union-attr]
    assert all(t.dtype == torch.float64 for t in made)
    # A number that went through bfloat16 on its way would end in 16 zero bits.
    first = weights(run(f"method={method}", "device=cuda", "rounds=0"))
    for name, value in weights(done).items():
        changed = value.cpu() != first[name].cpu()
        low = value.cpu().view(torch.int32)[changed] & 0xFFFF
        assert float((low != 0).double().mean()) > 0.9, name


@pytest.mark.parametrize("case", ["mlp", "bert-query-value", "cnn-adapted"])
def test_mixed_precision_is_near_to_that_of_the_cpu(case: str, card: Card) -> None:
    world = CASES[case]()
    data = world.task.train
    assert isinstance(data, PartitionedData)
    data = data.to("cpu", torch.float32)
    single = replace(world, task=replace(world.task, model=world.task.model.float(), train=data))
    local = replace(LOCAL, steps=1)
    there, here = (
        trained(single, device, "fed_rac_lora", local, precision="bf16-mixed").trained
        for device in ("cuda", "cpu")
    )
    for name, value in here.items():
        assert there[name].dtype == torch.float32
        gap = torch.linalg.norm(there[name].cpu() - value)
        assert float(gap) <= (0 if card.pretended else 8 * BITS) * float(torch.linalg.norm(value))


# --- memory --------------------------------------------------------------------------------------


def test_the_chunk_is_planned_from_the_memory_of_the_card(card: Card) -> None:
    done = job("device=cuda", "clients=200", "clients_per_round=100", "model.hidden=[50]")
    plan = done.chunk
    assert (plan.chunk, plan.device) == (100, "cuda")
    assert str(plan).startswith("100 clients (the cohort): ")
    assert "MB on cuda, beside" in str(plan)
    assert plan.memory is not None
    if card.pretended:
        assert plan.budget == int(FREE_SHARE * FREE)
        here = job(
            "device=cpu", "clients=200", "clients_per_round=100", "model.hidden=[50]"
        ).chunk.memory
        assert plan.memory == here
    else:
        assert 0 < plan.budget < torch.cuda.get_device_properties(0).total_memory


@pytest.mark.parametrize("case", ["mlp", "bert-query-value"])
def test_the_model_is_what_a_card_takes(case: str, card: Card) -> None:
    """By the allocator of a real card, whose blocks hold 512 bytes or a multiple."""
    there = moved(CASES[case](), "cuda")
    plan, draw, base = there.plan(), Draw(SEED), base_of(there.task)
    method, device = method_of("fed_rac_lora"), torch.device("cuda")
    cohort = Cohort(torch.arange(64), torch.ones(64))
    sent = method.open_round(method.initial_state(base, plan, draw), 1, cohort, draw)
    trainer = CohortTrainer(there.task, plan, LOCAL, seed=SEED, device=device)
    model = measure_memory(trainer, base, sent, CLIENTS)
    ids = torch.full((64,), 2)  # the largest client
    live = LiveTensors(device)
    if card.pretended:
        with live:
            trainer.train(base, sent, ids, round_=1, rate_scale=1.0)
        assert live.peak == pytest.approx(model.training(64), rel=0.01)
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    trainer.train(base, sent, ids, round_=1, rate_scale=1.0)
    taken = torch.cuda.max_memory_allocated() - before
    assert 0.8 * taken <= model.training(64) + (1 << 20)
    assert model.training(64) <= 1.3 * taken


class Bounded(LiveTensors):
    """Memory that runs out."""

    def __init__(self, size: int) -> None:
        super().__init__(torch.device("cpu"))
        self.size = size

    @override
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if self.now > self.size:
            raise torch.OutOfMemoryError(f"CUDA out of memory: {self.now} of {self.size} bytes")
        return out


@contextmanager
def bounded(card: Card, size: int) -> Iterator[None]:
    """Let training have no more than so many bytes."""
    if card.pretended is None:
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + size) / whole)
        yield
        torch.cuda.set_per_process_memory_fraction(1.0)
        return
    train = CohortTrainer.train

    def starved(self: Any, *args: Any, **kwargs: Any) -> Any:
        with Bounded(size):
            return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(CohortTrainer, "train", starved)
        yield


@pytest.mark.slow
def test_a_chunk_that_is_too_large_is_halved(card: Card, caplog: pytest.LogCaptureFixture) -> None:
    words = ("device=cuda", "clients=64", "clients_per_round=64", "rounds=2", "model.hidden=[2048]")
    words += ("method=fedavg", "data.labels=null", "partition=iid")
    memory = job(*words).chunk.memory
    assert memory is not None
    done = job(*words, "engine.chunk=64")
    with bounded(card, memory.training(40)), caplog.at_level(logging.WARNING):
        done.strategy.run(done.grid)
    first, second = ([*row["notes"]] for row in done.strategy.recorder.ledger.rows[1:])  # type: ignore[misc]
    assert "out of memory with 64 clients a batch" in first[0]
    assert "at most 32 clients" in first[0]
    assert second == []
    assert any("out of memory with 64" in record.getMessage() for record in caplog.records)
    assert digest(weights(done)) == digest(weights(run(*words, "engine.chunk=32")))
