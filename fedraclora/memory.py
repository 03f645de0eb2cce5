"""Where memory goes when a chunk trains, and what it looks like when there is too little.

The model is not an estimate from layer shapes: a local step of one client and of two is run, and
the bytes of the tensors that live meanwhile are counted. The difference is what a client costs,
the rest is shared. So whatever a layer keeps for its backward pass is in it. What a kernel takes
for itself (workspaces of cuBLAS, fragments of the allocator) is not.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import WeakIdKeyDictionary
from typing_extensions import override

from fedraclora.cohort import CohortTrainer
from fedraclora.downlink import Downlink
from fedraclora.optimiser import LocalConfig
from fedraclora.tree import Tree

LOOKED_AT = 10_000  # clients among whom the largest is looked for
# What PyTorch says where it has no exception of its own: the CPU's allocator, CUDA's libraries.
_STARVED = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def is_out_of_memory(error: Exception) -> bool:
    """Tell whether an error of PyTorch means that memory ran out.

    Example:
        >>> is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
        True
        >>> is_out_of_memory(RuntimeError("shapes cannot be multiplied"))
        False
    """
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _STARVED)


class LiveTensors(TorchDispatchMode):
    """Counts the bytes of the tensors that are made under it, while they live; on any device.

    Attributes:
        now: Bytes that live.
        peak: The most there have been.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0
        self._seen = WeakIdKeyDictionary()

    @classmethod
    @override
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and importing the compiler takes seconds

    @override
    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        # What comes in without having come out of anything was there before.
        tree_map_only(torch.Tensor, lambda t: self._see(t, made=False), (args, kwargs))
        out = func(*args, **kwargs)
        tree_map_only(torch.Tensor, lambda t: self._see(t, made=True), out)
        return out

    def _see(self, tensor: torch.Tensor, *, made: bool) -> None:
        storage = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = made
        if made:
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage.nbytes()).atexit = False

    def _free(self, size: int) -> None:
        self.now -= size


@dataclass(frozen=True)
class MemoryModel:
    """Bytes that local training takes; those of a client are proportional to the chunk.

    Attributes:
        weights: The base weights.
        shared: What else all clients of a chunk share: frozen factors, copies of weights in
            another precision.
        trained: Of a client: what it trains, where it starts, gradients and moments of the
            optimiser, and which sample comes when.
        activations: Of a client: what the forward pass keeps for the backward pass.
        workspace: Of a client: what comes and goes in a step.
    """

    weights: int
    shared: int
    trained: int
    activations: int
    workspace: int

    @property
    def client(self) -> int:
        """Bytes of one more client in a chunk."""
        return self.trained + self.activations + self.workspace

    def training(self, clients: int) -> int:
        """Bytes that a chunk takes beside the base weights."""
        return self.shared + clients * self.client

    def fitting(self, budget: int) -> int:
        """Give the most clients whose training fits into so many bytes; 0 if none does."""
        return max(0, budget - self.shared) // max(1, self.client)


def measure(
    trainer: CohortTrainer, base: Tree, downlink: Downlink, clients: torch.Tensor
) -> MemoryModel:
    """Run a local step of one client and of two, and count.

    Args:
        trainer: Of the run. Its weights and random draws are not touched.
        base: The base weights.
        downlink: Of a round, with what is trained; per-client values of two clients or more.
        clients: Some of the population, int64 [K]. Their longest sample and the batch of the
            largest of them are taken.

    Returns:
        The model.
    """
    data = trainer.data
    clients = clients.to(trainer.device)
    sizes = data.sizes(clients)
    largest = clients[sizes.argmax()]
    every = torch.arange(int(sizes.max()), device=clients.device).expand(len(clients), -1)
    lengths = data.lengths(clients, every)
    inside = every < sizes[:, None]
    longest = 0 if lengths is None else int((lengths * inside).max())
    trainer.open(base, downlink, largest[None], round_=1)  # what is cached is not a client's
    one, two = (_step(trainer, base, downlink, largest.expand(k), longest) for k in (1, 2))
    opened, kept, step, whole = (b - a for a, b in zip(one, two, strict=True))
    own = sum(
        torch.Size(s.shape).numel() * trainer.dtype.itemsize for s in downlink.trained().values()
    )
    # From the second step on, moments lie beside the activations.
    held = own * moments(trainer.local)
    client = max(step + held, whole)
    trained = opened + own + held
    return MemoryModel(
        weights=sum(t.nbytes for t in base.values()),
        shared=max(0, one[2] - step, one[3] - whole),
        trained=trained,
        activations=kept,
        workspace=max(0, client - trained - kept),
    )


def moments(local: LocalConfig) -> int:
    """Give how many tensors an optimiser holds beside each that it trains."""
    if local.optimiser == "adamw":
        return 2
    return 1 if local.momentum else 0


def _step(
    trainer: CohortTrainer, base: Tree, downlink: Downlink, clients: torch.Tensor, length: int
) -> tuple[int, int, int, int]:
    """Count the bytes of a first step.

    Returns:
        Bytes once a chunk is opened, those that its forward pass keeps, the peak of forward and
        backward pass, and the peak of a whole training of one step.
    """
    with LiveTensors() as live:
        chunk = trainer.open(base, downlink, clients, round_=1)
        leaves = chunk.leaves(len(clients))
        opened, kept = live.now, 0
        steps, width = chunk.schedule.positions.shape[1:]
        if steps:
            loss = trainer.losses(chunk, leaves, 0, (len(clients), width, length))
            kept = live.now - opened
            torch.autograd.grad(loss.sum(), list(leaves.values()))
    chunk.program.context.clear()
    del chunk, leaves
    short = copy(trainer)
    short.local = replace(trainer.local, steps=min(steps, 1))
    with LiveTensors() as training:
        short.train(base, downlink, clients, round_=1, rate_scale=1.0)
    return opened, kept, live.peak, training.peak
