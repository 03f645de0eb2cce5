"""What several processes of one client hold of a tensor, and whether it has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fedraclora.errors import ClientError
from fedraclora.rng import generator
from fedraclora.tree import Tree

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
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


def same_bits(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Check whether two tensors have the same type and bits, the sign of zero and NaN included."""
    if tensor.dtype != other.dtype:
        return False
    words = (t.detach().view(WORDS[t.element_size()]) for t in (tensor, other.to(tensor.device)))
    return torch.equal(*words)


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
