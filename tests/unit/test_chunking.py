"""How many clients train as one batch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fedraclora.config.settings import RayConfig
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ConfigError, ModelError
from fedraclora.protocol.method import Cohort, Draw, RoundInstructions
from fedraclora.protocol.plan import make_plan
from fedraclora.protocol.uplinks import SUM_BLOCK
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.training import chunking
from fedraclora.training.chunking import FREE_SHARE, PROCESS_BYTES, ChunkPlan, budget_of, plan_chunk
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.memory import MemoryModel, measure_memory
from fedraclora.tree import Tree

CPU, CARD = torch.device("cpu"), torch.device("cuda")
MODEL = MemoryModel(weights=5000, shared=300, trained=20, step=80)  # 100 bytes a client


@pytest.fixture
def trainer() -> CohortTrainer:
    """7 -> 6 -> 4, two clients of three samples and of two."""
    model = nn.Sequential(OrderedDict(fc=nn.Linear(7, 6), act=nn.ReLU(), head=nn.Linear(6, 4)))
    samples = Samples({"x": torch.ones(5, 7)}, torch.zeros(5, dtype=torch.int64))
    data = PartitionedData.of(samples, [np.arange(3), np.arange(3, 5)])
    task = Task(model, ("head",), "cross_entropy", ("loss",), data, samples)
    return CohortTrainer(task, make_plan(model, ("head",)), LocalConfig(lr=0.5), seed=0, device=CPU)


def start_of(trainer: CohortTrainer) -> tuple[Tree, RoundInstructions]:
    base = {n: p.detach().clone() for n, p in trainer.task.model.named_parameters()}
    method = FedRacLora(rank=2)
    state = method.initial_state(base, trainer.plan, Draw(0))
    return base, method.open_round(state, 1, Cohort(torch.arange(2), torch.ones(2)), Draw(0))


def plan(trainer: CohortTrainer, chunk: int | str, cohort: int) -> ChunkPlan:
    return plan_chunk(chunk, trainer, *start_of(trainer), cohort)


Planner = Callable[..., ChunkPlan]


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> Planner:
    """Plan ``auto`` for a device that has so many bytes and clients that take `MODEL`."""
    monkeypatch.setattr(chunking, "measure_memory", lambda *_: MODEL)

    def make(
        budget: int, cohort: int, device: torch.device = CARD, *, spread: bool = False
    ) -> ChunkPlan:
        monkeypatch.setattr(chunking, "budget_of", lambda *_: budget)
        population = SimpleNamespace(num_clients=cohort)
        stub: Any = SimpleNamespace(device=device, data=population, local=LocalConfig(lr=0.5))
        return plan_chunk("auto", stub, {}, RoundInstructions(), cohort, spread=spread)

    return make


# --- what decides --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("chunk", "cohort", "wanted", "reason"),
    [
        (3, 10, 3, "engine.chunk"),
        (10, 10, 10, "the cohort"),
        (30, 10, 10, "the cohort"),
        (1, 1, 1, "the cohort"),
        ("auto", 1, 1, "the cohort"),
    ],
)
def test_what_needs_no_measuring_is_not_measured(
    trainer: CohortTrainer,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int | str,
    cohort: int,
    wanted: int,
    reason: str,
) -> None:
    monkeypatch.setattr(chunking, "measure_memory", lambda *_: pytest.fail("measured"))
    found = plan(trainer, chunk, cohort)
    assert found == ChunkPlan(wanted, reason)
    assert str(found) == f"{wanted} clients ({reason})"
    assert found.record() == {"chunk": wanted, "reason": reason}


@pytest.mark.parametrize(
    ("budget", "cohort", "wanted", "reason"),
    [
        (10**9, 20, 20, "the cohort"),
        (10**9, 10**6, chunking.LARGEST_CHUNK["cuda"], "more bring nothing on a cuda"),
        (300 + 20 * 100, 21, 20, "memory"),  # below a block: as many as fit
        (300 + 31 * 100 + 99, 1000, 31, "memory"),
        (300 + 32 * 100, 1000, 32, "memory"),
        (300 + 95 * 100, 1000, 64, "memory"),  # whole blocks, where one fits
        (300 + 95 * 100, 96, 64, "memory"),
        (300 + 95 * 100, 95, 95, "the cohort"),  # the cohort in one piece
        (300 + 99, 1000, 1, "memory"),  # too little even for one: it may fit all the same
        (0, 1000, 1, "memory"),
    ],
)
def test_a_gpu_holds_as_many_as_its_memory(
    planned: Planner, budget: int, cohort: int, wanted: int, reason: str
) -> None:
    found = planned(budget, cohort)
    assert (found.chunk, found.reason) == (wanted, reason)
    assert (found.memory, found.budget, found.device) == (MODEL, budget, "cuda")
    assert wanted < SUM_BLOCK or wanted in (cohort, wanted // SUM_BLOCK * SUM_BLOCK)


def test_a_cpu_has_a_cache(planned: Planner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunking, "CACHE_BYTES", 70 * MODEL.trained)
    monkeypatch.setattr(chunking, "LARGEST_CHUNK", {"cpu": 1000, "cuda": 1000})
    found = planned(10**9, 10**4, CPU)
    assert (found.chunk, found.reason) == (64, "the cache")
    assert planned(300 + 40 * 100, 10**4, CPU).reason == "memory"
    assert "bring nothing on a cuda" in planned(10**9, 10**4).reason
    monkeypatch.setattr(chunking, "CACHE_BYTES", 1)
    assert planned(10**9, 10**4, CPU).chunk == 1


@pytest.mark.parametrize(("tokens", "wanted"), [(100, 5), (10**4, 1), (1, 40)])
def test_on_a_cpu_a_chunk_holds_the_tokens_that_fill_a_product(
    planned: Planner, monkeypatch: pytest.MonkeyPatch, tokens: int, wanted: int
) -> None:
    texts = replace(MODEL, tokens=tokens)
    monkeypatch.setattr(chunking, "measure_memory", lambda *_: texts)
    found = planned(10**9, 40, CPU)
    assert (found.chunk, found.memory) == (wanted, texts)
    assert planned(10**9, 40).chunk == 40  # a GPU wants more


@pytest.mark.parametrize(
    ("cohort", "wanted", "reason"),
    [
        (20, 20, "the cohort"),
        (SUM_BLOCK, SUM_BLOCK, "the cohort"),
        (100, SUM_BLOCK, "the workers"),  # a block, though there are not as many chunks
        (1000, 128, "the workers"),  # eight chunks, or fewer that are whole blocks
        (10**5, 4096, "more bring nothing on a cuda"),
    ],
)
def test_a_large_cohort_is_left_in_chunks_for_several_workers(
    planned: Planner, cohort: int, wanted: int, reason: str
) -> None:
    found = planned(10**9, cohort, spread=True)
    assert (found.chunk, found.reason) == (wanted, reason)
    assert planned(300 + 10 * 100, cohort, spread=True).chunk == 10


def test_the_plan_is_of_the_run_itself(
    trainer: CohortTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = measure_memory(trainer, *start_of(trainer), torch.arange(2))
    monkeypatch.setattr(chunking, "CACHE_BYTES", 10**9)
    monkeypatch.setattr(chunking, "HOST_BYTES", model.training(17) + 1)
    found = plan(trainer, "auto", 1000)
    assert (found.chunk, found.reason, found.memory) == (17, "memory", model)
    assert plan(trainer, "auto", 9).chunk == 9
    assert plan(trainer, "auto", 1000) == found


def test_the_plan_is_said_in_megabytes() -> None:
    memory = MemoryModel(weights=90_800_000, shared=1_350_000, trained=2_700_000, step=28_200_000)
    found = ChunkPlan(8, "memory", memory, 256 << 20, "cpu")
    assert str(found) == (
        "8 clients (memory): 30.9 MB each (2.7 trained, 28.2 for a step) and 1.35 MB shared = 249 "
        "of 268 MB on cpu, beside 90.8 MB of weights"
    )
    assert found.record() == {
        "chunk": 8,
        "reason": "memory",
        "budget": 256 << 20,
        "weights": 90_800_000,
        "shared": 1_350_000,
        "trained": 2_700_000,
        "step": 28_200_000,
        "tokens": 0,
    }


# --- the budget of a card ------------------------------------------------------------------------


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU of 80 GB: 60 are free, and PyTorch has 6 of the others, 4 of them in use."""
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (60 * 10**9, 80 * 10**9))
    monkeypatch.setattr("torch.cuda.memory_reserved", lambda _: 6 * 10**9)
    monkeypatch.setattr("torch.cuda.memory_allocated", lambda _: 4 * 10**9)


@pytest.mark.usefixtures("card")
def test_what_is_free_on_a_card_is_what_nobody_uses() -> None:
    assert budget_of(CARD) == pytest.approx(FREE_SHARE * 62e9)
    # A process beside others has its own weights and data, as large as those of this one.
    assert budget_of(CARD, 1.0) == pytest.approx(FREE_SHARE * 62e9 - 4e9 - PROCESS_BYTES)
    assert budget_of(CARD, 0.5) == pytest.approx(FREE_SHARE * 31e9 - 4e9 - PROCESS_BYTES)
    assert budget_of(CARD, 0.01) == 0
    assert budget_of(CPU) == budget_of(CPU, 0.5) == chunking.HOST_BYTES


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        (RayConfig(), 1.0),
        (RayConfig(gpus=0.5, workers=2), 0.5),
        (RayConfig(gpus=2.0), 1.0),  # one process trains on one card
        (RayConfig(gpus=0.0, workers=4), 0.25),  # nobody counts, all are on the card
    ],
)
def test_the_share_of_a_worker(settings: RayConfig, wanted: float) -> None:
    assert settings.share == wanted


# --- memory that runs out at once ----------------------------------------------------------------


def starve(monkeypatch: pytest.MonkeyPatch, error: Exception, clients: int) -> None:
    step = CohortTrainer._step

    def starved(self: CohortTrainer, chunk: Any, number: int, batch: Any, *rest: Any) -> Any:
        if batch[0] >= clients:
            raise error
        return step(self, chunk, number, batch, *rest)

    monkeypatch.setattr(CohortTrainer, "_step", starved)


@pytest.mark.parametrize("clients", [1, 2])
def test_two_clients_that_do_not_fit_are_an_error_with_advice(
    trainer: CohortTrainer, monkeypatch: pytest.MonkeyPatch, clients: int
) -> None:
    starve(monkeypatch, torch.OutOfMemoryError("CUDA out of memory. Tried 2 GiB"), clients)
    with pytest.raises(
        ConfigError, match=r"two clients .*Tried 2 GiB.*engine\.chunk=1.*batch_size"
    ):
        plan(trainer, "auto", 10)
    if clients == 2:
        assert plan(trainer, 1, 10).chunk == 1  # the advice can be followed
        return
    with pytest.raises(ConfigError, match=r"one client .*Tried 2 GiB.*local\.batch_size"):
        plan(trainer, 1, 10)


@pytest.mark.parametrize("chunk", ["auto", 1])
def test_a_model_that_does_not_take_the_samples_says_where(
    trainer: CohortTrainer, monkeypatch: pytest.MonkeyPatch, chunk: int | str
) -> None:
    starve(monkeypatch, RuntimeError("shapes cannot be multiplied"), 1)
    said = r"training step .* RuntimeError: shapes .*\(test_chunking\.py, line \d+"
    with pytest.raises(ModelError, match=said):
        plan(trainer, chunk, 10)
