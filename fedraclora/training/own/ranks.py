"""What several processes of one client hold of a tensor, and whether it has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils.weak import WeakTensorKeyDictionary
from typing_extensions import override

from fedraclora.errors import ClientError
from fedraclora.rng import generator
from fedraclora.tree import Tree

WIDTH = 1024  # of the table as which the words of a tensor are summed up
DRAWN = generator(0, "bits of a tensor").integers(2**62, size=WIDTH)
FACTORS = torch.from_numpy(DRAWN) * 2 + 1  # of the columns of this table
SLAB = 4096  # rows of it that are multiplied at once, where torch has no product of whole numbers


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor of which each rank holds a part (FSDP); every rank has to ask."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Sum up the bits of a tensor as whole numbers, by which a change shows: int64, [].

    By place: each word of 8 bytes times an odd number of its own, of which those of a row are
    drawn. So a change of one word always shows, and words that change places do. It runs at the
    speed of memory.
    """
    flat = unsharded(tensor.detach()).contiguous().flatten()
    if (flat.storage_offset() * flat.element_size()) % 8:
        flat = flat.clone()
    data, factors = flat.view(torch.uint8), FACTORS.to(flat.device)
    words, end = data[: len(data) // 8 * 8].view(torch.int64), data[len(data) // 8 * 8 :]
    table, rest = words[: len(words) // WIDTH * WIDTH], words[len(words) // WIDTH * WIDTH :]
    rows = [_times(part, factors) for part in table.view(-1, WIDTH).split(SLAB)]
    sums = torch.cat([*rows, _times(rest[None], factors[: len(rest)]), end.to(torch.int64)])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum().cpu()


def _times(table: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return table @ factors if table.device.type == "cpu" else (table * factors).sum(1)


class Sums:
    """Sums of the bits of tensors into which nothing was written since, as torch counts that."""

    def __init__(self) -> None:
        self.known = WeakTensorKeyDictionary()

    @override
    def __reduce__(self) -> tuple[Any, ...]:
        """Be empty in another process: its tensors are others."""
        return Sums, ()

    def of(self, tensor: torch.Tensor) -> int:
        """Return the sum of a tensor, formed once."""
        if (found := self.pop(tensor)) is None:
            found = int(bits_of(tensor))
        self.put(tensor, found)
        return found

    def put(self, tensor: torch.Tensor, bits: int) -> None:
        """Keep the sum of a tensor as it is now."""
        self.known[tensor] = (tensor.data_ptr(), tensor._version, bits)  # noqa: SLF001

    def pop(self, tensor: torch.Tensor) -> int | None:
        """Forget the sum of a tensor; give it, if it is still that of the tensor."""
        place, version, bits = self.known.pop(tensor, (0, 0, 0))
        now = tensor.data_ptr(), tensor._version  # noqa: SLF001
        return bits if (place, version) == now else None


def check_alike(found: Tree) -> None:
    """Refuse what the processes of one client (DDP, FSDP) have trained apart from each other.

    Raises:
        ClientError: Naming the ranks that have other numbers than rank 0.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    sums = [int(bits_of(value)) for value in found.values()]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, sums)
    if apart := [str(rank) for rank, other in enumerate(every) if other != every[0]]:
        raise ClientError(
            f"rank {', '.join(apart)} of {len(every)} has trained other numbers than rank 0: wrap "
            "the model in DistributedDataParallel or fully_shard after round.install, and call "
            "round.read on every rank"
        )
