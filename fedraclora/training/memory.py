"""Measure the memory that a chunk takes to train, and recognize out-of-memory errors.

Nothing is estimated from layer shapes: we run the first steps of one client and of two, and count
the bytes of all live tensors. The difference is the cost of a client; the rest is shared. Tensors
that layers keep for the backward pass are therefore included. Memory that kernels allocate
themselves (workspaces of cuBLAS, fragments of the allocator) is not.
"""

from __future__ import annotations

import ctypes
import os
import platform
import sys
import weakref
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from fedraclora.data.clients import ClientData
from fedraclora.narrow_weight import QuantisedWeight
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.program import Hook, Optimizer
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.materialize import start_from
from fedraclora.training.moments import moment_shapes
from fedraclora.training.program import OpenChunk
from fedraclora.training.schedule import StepBatch
from fedraclora.tree import Tree

LESS = (  # advice if one client is too large
    "lower local.batch_size, the size of a sample (data.max_length) or the model, or set "
    "precision=bf16-mixed"
)
LOOKED_AT = 10_000  # clients among whom the largest is looked for
TOGETHER = 256  # of these, clients whose samples are examined at once
LARGEST_KEPT, KEPT = 32 << 20, 256 << 20  # bytes of one freed piece, and of all, that are kept
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt
# Messages of PyTorch's errors without an exception class: the CPU's allocator, CUDA's libraries.
_STARVED = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def keep_freed_memory() -> bool:
    """Tell the C library to keep freed memory for the next chunk; return whether it does.

    By default it returns large pieces to the system, which clears every page again when it is next
    used. Only glibc is changed, and not if the environment configures it (``MALLOC_...``,
    ``GLIBC_TUNABLES``). Pieces of `LARGEST_KEPT` or more are still returned.

    References:
        mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    configured = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if configured or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(_TRIM_THRESHOLD, KEPT))


def is_out_of_memory(error: Exception) -> bool:
    """Check whether an error of PyTorch means that memory ran out.

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
    """Count the bytes of live tensors that are created on a device under this mode.

    Args:
        device: Tensors on other devices are not counted.

    Attributes:
        now: Live bytes.
        peak: The largest value of ``now`` so far.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device.type
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # live storages, by address

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
        if QuantisedWeight in types:
            # the base class dequantizes first, by operators that are counted here
            return NotImplemented
        named = kwargs or {}
        # An input that no operator created existed before.
        self._see((*args, *named.values()), counted=False)
        out = func(*args, **named)
        self._see(out, counted=True)
        return out

    def _see(self, value: object, *, counted: bool) -> None:
        """Record the tensors that enter or leave an operator, in sequences of any depth."""
        if isinstance(value, list | tuple):
            for part in value:
                self._see(part, counted=counted)
        elif isinstance(value, torch.Tensor):
            storage = value.untyped_storage()
            address = storage._cdata  # noqa: SLF001  a storage has no other cheap name
            if address not in self._seen:
                size = storage.nbytes() if counted and value.device.type == self.device else 0
                self._seen[address] = weakref.ref(storage, partial(self._free, address, size))
                self.now += size
                self.peak = max(self.peak, self.now)

    def _free(self, address: int, size: int, _: object) -> None:
        del self._seen[address]
        self.now -= size


@dataclass(frozen=True)
class MemoryModel:
    """Model the bytes that local training takes; those of a client are proportional to the chunk.

    Attributes:
        weights: The base weights.
        shared: Other tensors that all clients of a chunk share: frozen factors, copies of weights
            in another precision.
        trained: Per client: trained tensors, their starts, gradients, optimizer moments, and the
            order of samples.
        step: Per client: its batch, tensors kept for the backward pass, and temporaries of a step.
        tokens: Most tokens of a client in a step, padding included; 0 if samples have none.
    """

    weights: int
    shared: int
    trained: int
    step: int
    tokens: int = 0

    @property
    def client(self) -> int:
        """Return the bytes of one more client in a chunk."""
        return self.trained + self.step

    def training(self, clients: int) -> int:
        """Return the bytes that a chunk takes beside the base weights."""
        return self.shared + clients * self.client

    def fitting(self, budget: int) -> int:
        """Count the most clients whose training fits into a budget of bytes; 0 if none does."""
        return max(0, budget - self.shared) // max(1, self.client)


def measure_memory(
    trainer: CohortTrainer, base: Tree, downlink: RoundInstructions, clients: torch.Tensor
) -> MemoryModel:
    """Measure a memory model: run the first steps of one and two clients, lay out three and four.

    The result is a little high, by less than a third in the tests: if operators are intercepted,
    PyTorch does not add the gradients of two paths in place.

    Args:
        trainer: The run's trainer. Its weights and random draws do not change.
        base: The base weights.
        downlink: A round's downlink; per-client values for two clients or more.
        clients: Some of the population, int64 [K]. We take their longest sample and the batch of
            the largest client.

    Returns:
        The model.
    """
    clients = clients.to(trainer.device)
    sizes = trainer.data.sizes(clients)
    largest = clients[sizes.argmax()]
    length = longest(trainer.data, clients, sizes)
    # cached tensors belong to no client
    trainer.open(base, owned(downlink, 1), largest[None], round_=1)

    def count(k: int, *, steps: bool = True) -> Probe:
        probe = Probe(trainer, length, steps=steps)
        with uncompiled(), probe.live:
            probe.run(base, downlink, largest.expand(k))
        return probe

    one, two, three, four = count(1), count(2), count(3, steps=False), count(4, steps=False)
    gradients = [slot.shape for slot in downlink.trained().values()]
    moments = moment_shapes(trainer.local, downlink).values()
    own = sum(torch.Size(shape).numel() for shape in (*gradients, *moments))
    trained = two.resident - one.resident + own * trainer.dtype.itemsize - one.at_once
    # Each stretch by itself: a peak made by shared tensors would hide the cost of a client.
    stretches = [(one.formed, two.formed), (one.stepped, two.stepped)]
    more = [with_two - with_one for with_one, with_two in stretches]
    client = max(four.laid_out - three.laid_out, *more, trained)
    alone = max(one.laid_out, one.formed, one.stepped) - client
    return MemoryModel(
        weights=sum(t.nbytes for t in base.values()),
        shared=max(0, alone, four.laid_out - 4 * client),
        trained=trained,
        step=client - trained,
        tokens=(length or 0) * min(trainer.local.batch_size or int(sizes.max()), int(sizes.max())),
    )


def uncompiled() -> AbstractContextManager[None]:
    """Disable compiled functions: the compiler would compile the counting, too."""
    # nothing is compiled here, and importing the compiler takes seconds
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


class ProbeFinished(Exception):  # noqa: N818  it is no error
    """Signal that a `Probe` has seen enough."""


class Probe(CohortTrainer):
    """Train until memory has peaked, counting bytes; then raise `ProbeFinished`.

    Args:
        trainer: The trainer to imitate.
        length: Tokens of the longest sample, to which batches are padded; None without padding.
        steps: Whether to take steps, or to stop before the first.

    Attributes:
        live: The counting mode; enter it around `train`.
        laid_out: The peak before the first step.
        formed: The peak until gradients are formed.
        stepped: The peak in hooks and the optimizer step.
        resident: Live bytes before the first step.
        at_once: Bytes of gradients that are never all alive (`FeedForward.descend`).
    """

    def __init__(self, trainer: CohortTrainer, length: int | None, *, steps: bool = True) -> None:
        vars(self).update(vars(trainer))
        self.length, self.steps = length, steps
        self.live = LiveTensors(trainer.device)
        self.laid_out = self.resident = self.at_once = self.formed = self.stepped = 0

    def run(self, base: Tree, downlink: RoundInstructions, clients: torch.Tensor) -> None:
        """Train some clients until enough is counted; build their downlink with `owned`."""
        with suppress(ProbeFinished):
            own = owned(downlink, len(clients))
            self.train(base, own, clients, round_=1, rate_scale=1.0)

    @override
    def _step(
        self, chunk: OpenChunk, step: int, batch: StepBatch, optimizer: Optimizer, hooks: list[Hook]
    ) -> torch.Tensor:
        def formed(gradients: Tree, _: Tree) -> Tree:
            self.formed = self._lap(self.formed)
            return gradients

        self.resident, self.laid_out = self.live.now, self._lap(0)
        self.at_once = 0 if chunk.network is None else chunk.network.at_once
        for _ in range(min(2, int(chunk.schedule.steps.max())) if self.steps else 0):
            # The same batch twice, so that none is wider.
            full = StepBatch(batch.active, batch.width, self.length or batch.length)
            super()._step(chunk, step, full, optimizer, [formed, *hooks])
            self.stepped = self._lap(self.stepped)
            if self.live.now == self.resident:
                break  # the first left nothing (moments, buffers) alive beside the second
        raise ProbeFinished

    def _lap(self, most: int) -> int:
        """End a stretch; return its peak, or an earlier one if higher."""
        peak, self.live.peak = self.live.peak, self.live.now
        return max(most, peak)


def longest(data: ClientData, clients: torch.Tensor, sizes: torch.Tensor) -> int | None:
    """Count the tokens of the longest sample of some clients; None if nothing is padded."""
    found = 0
    for ids, counts in zip(clients.split(TOGETHER), sizes.split(TOGETHER), strict=True):
        every = torch.arange(int(counts.max()), device=ids.device).expand(len(ids), -1)
        lengths = data.lengths(ids, every)
        if lengths is None:
            return None
        found = max(found, int((lengths * (every < counts[:, None])).max()))
    return found


def owned(downlink: RoundInstructions, clients: int) -> RoundInstructions:
    """Cut a downlink to a number of clients, each starting personal tensors at its own values."""
    sent = downlink.select(torch.arange(clients) % 2)
    stays = {n: s for n, s in sent.trained().items() if not s.upload and not s.per_client}
    return start_from({n: torch.zeros(clients, *s.shape) for n, s in stays.items()}, sent)
