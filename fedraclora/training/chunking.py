"""Decide how many clients train as one batch.

Memory grows with the chunk. On a CPU a larger chunk stops paying once its trained tensors leave the
cache. The chunk size influences rounding, so ``auto`` is resolved once and stored with the run.
Extras of the user's own must not mix the clients of a chunk; a trial step checks that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError, FedRacLoraError, ModelError
from fedraclora.imports import failure_of
from fedraclora.models.outputs import restored_generators
from fedraclora.object_registry import attribute_digests, refuse_changed
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.program import ClientProgram
from fedraclora.protocol.uplinks import SUM_BLOCK
from fedraclora.rng import generator
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.memory import (
    LESS,
    LOOKED_AT,
    MemoryModel,
    Probe,
    is_out_of_memory,
    measure_memory,
)
from fedraclora.training.program import OpenChunk
from fedraclora.tree import Tree

CLOSE = 1e-3  # relative to the largest change: rounding may differ with the rest of the batch


class Pair(Probe):
    """Let two equal clients take a step, the second from values ``away`` from the first's."""

    away = 0.0
    chunk: OpenChunk

    @override
    def open(self, *given: Any, **named: Any) -> OpenChunk:
        self.chunk = super().open(*given, **named)
        for name, value in self.chunk.values.items():
            drawn = torch.from_numpy(generator(0, name).standard_normal(value.shape[1:]))
            value[1:].add_(drawn.to(value), alpha=self.away)
        return self.chunk


def refuse_mixed_clients(
    trainer: CohortTrainer, base: Tree, downlink: RoundInstructions, chunk: int
) -> None:
    """Refuse a user's extras that mix the clients of a chunk, or that change between two calls.

    Raises:
        ConfigError: Naming them.
    """
    if not (own := [extra for extra in trainer.local.extras if isinstance(extra, ClientProgram)]):
        return
    before, names = [*map(attribute_digests, own)], " and ".join(map(trainer.local.name_of, own))
    ids, changes = torch.zeros(min(2, chunk)).long().to(trainer.device), list[Tree]()
    with restored_generators():
        for away in (0.1, 0.2, 0.1):
            pair = Pair(trainer, None)
            pair.away = away
            pair.run(base, downlink, ids)
            values, starts = pair.chunk.values, pair.chunk.starts
            changes.append({name: value[0] - starts[name][0] for name, value in values.items()})
    for extra, then in zip(own, before, strict=True):
        refuse_changed(trainer.local.name_of(extra), extra, then)
    first, other, again = changes
    if not _alike(first, again):
        raise ConfigError(
            f"{names}: the same step gives something else the second time: a part of a local step "
            "keeps nothing from call to call, and draws by the seed of its chunk alone"
        )
    if not _alike(first, other):
        raise ConfigError(
            f"{names}: what a client trains depends on the other clients of its batch (a mean over "
            "the first axis, for example): treat each row of the first axis by itself"
        )


def _alike(one: Tree, other: Tree) -> bool:
    near = {name: CLOSE * float(value.abs().max()) for name, value in one.items()}
    return all(torch.allclose(v, other[n], CLOSE, near[n], equal_nan=True) for n, v in one.items())


LARGEST_CHUNK = {"cpu": 256, "cuda": 4096}  # more bring nothing: the products are large by then
SPREAD = 8  # fewest chunks of a large round if several processes train
HOST_BYTES = 256 << 20  # of a CPU, for a whole chunk; workers share the machine
CACHE_BYTES = 12 << 20  # of a CPU, for trained tensors, which every step reads and writes
# Tokens of a chunk on a CPU. A product is at full speed with fewer, and the activations between
# products leave the cache with more.
TOKENS_OF_CHUNK = 512
FREE_SHARE = 0.8  # of a GPU's free memory; the rest is for fragmentation and kernel workspaces
PROCESS_BYTES = 512 << 20  # of a GPU, for CUDA itself, in each process


@dataclass(frozen=True)
class ChunkPlan:
    """Hold a chunk size and the reason for it.

    Attributes:
        chunk: Clients per chunk.
        reason: Why: the setting, the clients of a round, memory, or no gain from more.
        memory: The memory that it takes, if measured.
        budget: Bytes that training may take beside the base weights, if computed.
        device: Where training runs.
    """

    chunk: int
    reason: str
    memory: MemoryModel | None = None
    budget: int = 0
    device: str = ""

    @override
    def __str__(self) -> str:
        """Summarize it in one line, in MB (10^6 bytes)."""
        if self.memory is None:
            return f"{self.chunk} clients ({self.reason})"
        m = self.memory
        sizes = (m.client, m.trained, m.step, m.shared, m.training(self.chunk), self.budget)
        client, trained, step, shared, whole, budget, weights = (
            f"{size / 1e6:.3g}" for size in (*sizes, m.weights)
        )
        return (
            f"{self.chunk} clients ({self.reason}): {client} MB each ({trained} trained, {step} "
            f"for a step) and {shared} MB shared = {whole} of {budget} MB on {self.device}, beside "
            f"{weights} MB of weights"
        )

    @classmethod
    def of_record(cls, record: Mapping[str, Any]) -> ChunkPlan:
        """Read back a plan from the output of `record`."""
        known = {"chunk", "reason", "budget", "device"}
        sizes = {key: record[key] for key in record.keys() - known}
        plan = {key: record[key] for key in record.keys() & known}
        return cls(**plan, memory=MemoryModel(**sizes) if sizes else None)

    def record(self) -> dict[str, object]:
        """Convert the plan to numbers for a run's summary."""
        found: dict[str, object] = {"chunk": self.chunk, "reason": self.reason}
        if self.memory is not None:
            found |= {"budget": self.budget, **asdict(self.memory)}
        return found


def budget_of(device: torch.device, share: float | None = None) -> int:
    """Compute the bytes that training may take beside weights and data.

    Args:
        device: Where training runs. Weights and data are there already.
        share: This process's share of the GPU if several processes train on it, each with its own
            weights and data; None: this process trains alone.
    """
    if device.type != "cuda":
        return HOST_BYTES
    free, _ = torch.cuda.mem_get_info(device)
    allocated = torch.cuda.memory_allocated(device)
    free += torch.cuda.memory_reserved(device) - allocated
    if share is None:
        return int(FREE_SHARE * free)
    return max(0, int(FREE_SHARE * free * share) - allocated - PROCESS_BYTES)


def plan_chunk(
    chunk: int | str,
    trainer: CohortTrainer,
    base: Tree,
    downlink: RoundInstructions,
    cohort: int,
    *,
    share: float | None = None,
    spread: bool = False,
    elsewhere: bool = False,
) -> ChunkPlan:
    """Turn ``engine.chunk`` into a number of clients.

    Args:
        chunk: A number, or ``auto``: as many as the budget of the device holds, in whole
            summation blocks where it holds one.
        trainer: Of the run.
        base: The base weights.
        downlink: Of a round, for ``cohort`` clients.
        cohort: Clients per round, the most a chunk can hold.
        share: See `budget_of`.
        elsewhere: Whether clients train on other machines: then nothing is measured here.
        spread: Whether several processes train: then ``auto`` leaves chunks for several of them.
            The chunk does not depend on their number, so that results do not either.

    Returns:
        The plan.

    Raises:
        ConfigError: If memory runs out with two clients, or with a chunk of one.
    """
    if isinstance(chunk, int) or cohort == 1:
        most = cohort if chunk == "auto" else int(chunk)
        if not elsewhere:  # nothing is measured here, so refuse impossible settings at once
            with _explained(trainer, "one client", LESS):
                one = torch.zeros(1, dtype=torch.int64, device=trainer.device)
                Probe(trainer, None).run(base, downlink, one)
                refuse_mixed_clients(trainer, base, downlink, most)
        return ChunkPlan(min(most, cohort), "engine.chunk" if most < cohort else "the cohort")
    population = torch.arange(min(trainer.data.num_clients, LOOKED_AT))
    advice = "set engine.chunk=1, or lower local.batch_size"
    with _explained(trainer, "two clients in a batch", advice):
        memory = measure_memory(trainer, base, downlink, population)
        refuse_mixed_clients(trainer, base, downlink, cohort)
    device = trainer.device.type
    budget = budget_of(trainer.device, share)
    bounds = {
        "the cohort": cohort,
        f"more bring nothing on a {device}": LARGEST_CHUNK[device],
        "memory": max(1, memory.fitting(budget)),
    }
    if device == "cpu":
        bounds["the cache"] = max(1, CACHE_BYTES // max(1, memory.trained))
        if memory.tokens:
            bounds["tokens that fill a product"] = max(1, TOKENS_OF_CHUNK // memory.tokens)
    if spread:
        bounds["the workers"] = -(-cohort // (SPREAD * SUM_BLOCK)) * SUM_BLOCK
    reason = min(bounds, key=lambda name: bounds[name])
    found = bounds[reason]
    if SUM_BLOCK <= found < cohort:
        found -= found % SUM_BLOCK
    return ChunkPlan(found, reason, memory, budget, device)


@contextmanager
def _explained(trainer: CohortTrainer, clients: str, advice: str) -> Iterator[None]:
    """Turn out-of-memory errors and failures of the trial step into errors that say what to do.

    Args:
        trainer: Takes the step.
        clients: Who takes the step, for the message.
        advice: What to do if memory runs out.
    """
    try:
        yield
    except FedRacLoraError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise ConfigError(f"memory runs out with {clients} ({error}); {advice}") from error
        failure = failure_of(error, "the first training step of a client")
        if blamed := trainer.blamed(error):
            raise ConfigError(f"{blamed}{failure}") from error
        raise ModelError(
            f"{failure}. Check that the model "
            "takes inputs of the data's shape, and gives what its loss takes (docs/data.md)"
        ) from error
