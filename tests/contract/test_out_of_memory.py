"""Memory that runs out: nobody's fault, batches are halved, and the ledger says so."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from typing_extensions import override
from worlds import RAGGED, Run, assert_equal_trees, make_method, make_world, run

from fedraclora.data.clients import ChangedClients
from fedraclora.data.samples import Samples
from fedraclora.errors import ClientError
from fedraclora.protocol.program import LocalResult
from fedraclora.training.cohort import CohortTrainer

METHOD = make_method("fed_rac_lora")
CARD = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
HOST = RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes")
LIBRARY = RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")
KINDS = pytest.mark.parametrize("error", [CARD, HOST, LIBRARY], ids=["card", "host", "library"])


@pytest.fixture(scope="module", autouse=True)
def few_objects() -> None:
    """Let the collections after each halved batch walk only what these tests make."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def memory_for(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Let a trainer fail above so many clients; gives the sizes of all batches it was asked for."""
    train: Callable[..., LocalResult] = CohortTrainer.train
    asked: list[int] = []

    def limit(clients: int, error: Exception = CARD) -> list[int]:
        def starved(
            self: CohortTrainer, base: Any, down: Any, ids: torch.Tensor, **k: Any
        ) -> LocalResult:
            asked.append(len(ids))
            if len(ids) > clients:
                raise error
            return train(self, base, down, ids, **k)

        monkeypatch.setattr(CohortTrainer, "train", starved)
        return asked

    return limit


@dataclass(frozen=True)
class Raising(ChangedClients):
    """Client data where one client raises."""

    client: int

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Samples by position, or an error."""
        if self.client in clients.tolist():
            raise OSError("the disk is gone")
        return self.data.gather(clients, positions)


def notes(done: Run) -> list[list[str]]:
    return [row["notes"] for row in done.rows]


@pytest.mark.short(when=lambda error, chunk, fits: (error is CARD) == (chunk == 4))
@KINDS
@pytest.mark.parametrize(("chunk", "fits", "then"), [(4, 2, 2), (5, 2, 2), (4, 3, 2), (5, 1, 1)])
def test_the_result_is_that_of_the_smaller_chunk(
    chunk: int, fits: int, then: int, error: Exception, memory_for: Callable[..., list[int]]
) -> None:
    wanted = run(make_world(), METHOD, RAGGED, rounds=3, chunk=then)
    memory_for(fits, error)
    done = run(make_world(), METHOD, RAGGED, rounds=3, chunk=chunk)
    assert_equal_trees(done.weights, wanted.weights)
    assert all(row["failures"] == [] for row in done.rows)


def test_what_fits_is_remembered_and_noted_once(
    memory_for: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    asked = memory_for(1)
    with caplog.at_level(logging.WARNING):
        done = run(make_world(), METHOD, RAGGED, rounds=3, chunk=5)
    assert asked == [5, 2, *[1] * 15]
    first = [
        f"round 1: out of memory with {many} clients a batch. Batches hold at most {half} "
        "clients from now on, so results may differ in the last bits"
        for many, half in [(5, 2), (2, 1)]
    ]
    assert notes(done) == [first, [], []]
    assert done.worker.limit == 1
    said = [r.getMessage() for r in caplog.records if r.name == "fedraclora.clients.worker"]
    assert said == [f"{note} (OutOfMemoryError: {CARD})" for note in first]


def test_a_client_that_is_too_large_alone_ends_the_run_with_advice(
    memory_for: Callable[..., list[int]],
) -> None:
    memory_for(0)
    with pytest.raises(ClientError, match=r"client 0 .*memory.*local\.batch_size"):
        run(make_world(), METHOD, RAGGED, rounds=1, max_failures=4)  # it is not the client's fault


def test_a_client_at_fault_is_still_found(memory_for: Callable[..., list[int]]) -> None:
    world = make_world()
    broken = replace(world, task=replace(world.task, train=Raising(world.task.train, 3)))
    asked = memory_for(3)
    done = run(broken, METHOD, RAGGED, rounds=1, chunk=5, max_failures=1)
    # 5 are too many; of 2, 2 and 1 the second two hold the client that raises.
    assert asked == [5, 2, 2, 1, 1, 1]
    assert [f["client"] for f in done.rows[0]["failures"]] == [3]
    assert [note.split(":")[1].split(" ")[1] for note in notes(done)[0]] == ["out", "a"]
