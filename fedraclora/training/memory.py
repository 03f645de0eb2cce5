"""Where memory goes when a chunk trains, and what it looks like when there is too little.

The model is not an estimate from layer shapes: the first steps of one client and of two are run,
and the bytes of the tensors that live meanwhile are counted. The difference is what a client costs,
the rest is shared. So whatever a layer keeps for its backward pass is in it. What a kernel takes
for itself (workspaces of cuBLAS, fragments of the allocator) is not.
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

LESS = (  # what to do where one client is too large
    "lower local.batch_size, the size of a sample (data.max_length) or the model, or set "
    "precision=bf16-mixed"
)
LOOKED_AT = 10_000  # clients among whom the largest is looked for
TOGETHER = 256  # of them whose samples are looked at in one go
LARGEST_KEPT, KEPT = 32 << 20, 256 << 20  # bytes of a piece, and of all, that are kept when freed
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt
# What PyTorch says where it has no exception of its own: the CPU's allocator, CUDA's libraries.
_STARVED = ("can't allocate memory", "out of memory", "ALLOC_FAILED")


def keep_freed_memory() -> bool:
    """Have the C library keep what is freed for the next chunk; whether it does.

    It gives large pieces back to the system otherwise, and every page of them is cleared anew when
    it is next touched. Of glibc alone: other libraries, and a process whose environment says how
    (``MALLOC_...``, ``GLIBC_TUNABLES``), stay as they are. Pieces of `LARGEST_KEPT` or more are
    given back.

    References:
        mallopt(3), M_TRIM_THRESHOLD and M_MMAP_THRESHOLD.
    """
    said = any(name.startswith(("MALLOC_", "GLIBC_TUNABLES")) for name in os.environ)
    if said or platform.libc_ver()[0] != "glibc":
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
    """Counts the bytes of the tensors of a device that are made under it, while they live.

    Args:
        device: Whose memory; tensors elsewhere are not counted.

    Attributes:
        now: Bytes that live.
        peak: The most there have been.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.device = device.type
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}  # by address, while it lives

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
            return NotImplemented  # it dequantizes first, by operators that are counted here
        named = kwargs or {}
        # What comes in without having come out of anything was there before.
        self._see((*args, *named.values()), counted=False)
        out = func(*args, **named)
        self._see(out, counted=True)
        return out

    def _see(self, value: object, *, counted: bool) -> None:
        """Record the tensors that go into an operator or come out: it nests sequences alone."""
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
    """Bytes that local training takes; those of a client are proportional to the chunk.

    Attributes:
        weights: The base weights.
        shared: What else all clients of a chunk share: frozen factors, copies of weights in
            another precision.
        trained: Of a client: what it trains, where it starts, gradients and moments of the
            optimizer, and which sample comes when.
        step: Of a client: its batch, what the forward pass keeps for the backward pass, and
            whatever else comes and goes in a step.
        tokens: Of a client in a step, at most, padding included; 0 where samples have none.
    """

    weights: int
    shared: int
    trained: int
    step: int
    tokens: int = 0

    @property
    def client(self) -> int:
        """Bytes of one more client in a chunk."""
        return self.trained + self.step

    def training(self, clients: int) -> int:
        """Bytes that a chunk takes beside the base weights."""
        return self.shared + clients * self.client

    def fitting(self, budget: int) -> int:
        """Count the most clients whose training fits into so many bytes; 0 if none does."""
        return max(0, budget - self.shared) // max(1, self.client)


def measure_memory(
    trainer: CohortTrainer, base: Tree, downlink: RoundInstructions, clients: torch.Tensor
) -> MemoryModel:
    """Run the first steps of one client and of two, and count; three and four are laid out only.

    It comes out a little high, by less than a third in the tests: where the gradients of two paths
    meet, PyTorch adds them in place only while nobody watches.

    Args:
        trainer: Of the run. Its weights and random draws are not touched.
        base: The base weights.
        downlink: Of a round, with what is trained; per-client values of two clients or more.
        clients: Some of the population, int64 [K]. Their longest sample and the batch of the
            largest of them are taken.

    Returns:
        The model.
    """
    clients = clients.to(trainer.device)
    sizes = trainer.data.sizes(clients)
    largest = clients[sizes.argmax()]
    length = longest(trainer.data, clients, sizes)
    trainer.open(base, owned(downlink, 1), largest[None], round_=1)  # what is cached is no client's

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
    # Each stretch by itself: where what is shared makes the peak, it hides what a client adds.
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
    """Run what somebody has compiled as it was before: the compiler would compile the counting."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and importing it takes seconds
        return nullcontext()
    stance: AbstractContextManager[None] = torch.compiler.set_stance("force_eager")
    return stance


class Enough(Exception):  # noqa: N818  it is no error
    """Ends the training of a `Probe`."""


class Probe(CohortTrainer):
    """Trains until memory has been as full as it gets, and counts; then it raises `Enough`.

    Args:
        trainer: What it does the same as.
        length: Tokens of the longest sample, which the batch takes; None without padding.
        steps: Whether to take steps, or to stop before the first.

    Attributes:
        live: Counts; to be entered around `train`.
        laid_out: The peak before the first step.
        formed: The peak until gradients are formed.
        stepped: The peak of what hooks and the optimizer make of them.
        resident: Bytes that live before the first step.
        at_once: Bytes of gradients that never live beside what is trained (`FeedForward.descend`).
    """

    def __init__(self, trainer: CohortTrainer, length: int | None, *, steps: bool = True) -> None:
        vars(self).update(vars(trainer))
        self.length, self.steps = length, steps
        self.live = LiveTensors(trainer.device)
        self.laid_out = self.resident = self.at_once = self.formed = self.stepped = 0

    def run(self, base: Tree, downlink: RoundInstructions, clients: torch.Tensor) -> None:
        """Train some clients until enough is counted; `owned` says from which downlink."""
        with suppress(Enough):
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
            # The same batch twice: none is wider.
            full = StepBatch(batch.active, batch.width, self.length or batch.length)
            super()._step(chunk, step, full, optimizer, [formed, *hooks])
            self.stepped = self._lap(self.stepped)
            if self.live.now == self.resident:
                break  # the first left nothing (moments, buffers) that lies beside the second
        raise Enough

    def _lap(self, most: int) -> int:
        """End a stretch; return its peak, or that of one before it where that was higher."""
        peak, self.live.peak = self.live.peak, self.live.now
        return max(most, peak)


def longest(data: ClientData, clients: torch.Tensor, sizes: torch.Tensor) -> int | None:
    """Count the tokens of the longest sample of some clients; None where nothing is padded."""
    found = 0
    for ids, counts in zip(clients.split(TOGETHER), sizes.split(TOGETHER), strict=True):
        every = torch.arange(int(counts.max()), device=ids.device).expand(len(ids), -1)
        lengths = data.lengths(ids, every)
        if lengths is None:
            return None
        found = max(found, int((lengths * (every < counts[:, None])).max()))
    return found


def owned(downlink: RoundInstructions, clients: int) -> RoundInstructions:
    """Cut a downlink to so many clients, each of which starts what stays with it at its own."""
    sent = downlink.select(torch.arange(clients) % 2)
    stays = {n: s for n, s in sent.trained().items() if not s.upload and not s.per_client}
    return start_from({n: torch.zeros(clients, *s.shape) for n, s in stays.items()}, sent)
