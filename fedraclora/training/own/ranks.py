"""What several processes of one client hold of a tensor, and whether it has changed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from fedraclora.errors import ClientError
from fedraclora.tree import Tree

WIDTH = 1024  # of the table as which the words of a tensor are summed up
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor of which each rank holds a part (FSDP); every rank has to ask."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Sum up the bits of a tensor as whole numbers, by which a change shows: int64, [].

    By place: of rows and of columns, each sum times an odd number of its own, so that numbers which
    change places show, too. It runs at the speed of memory.
    """
    flat = unsharded(tensor.detach()).contiguous().flatten()
    size = flat.element_size()
    odd = (flat.numel() * size) % 8 or (flat.storage_offset() * size) % 8
    kind = WORDS[size] if odd else torch.int64
    words = flat.view(kind)
    cut = len(words) // WIDTH * WIDTH
    table, rest = words[:cut].view(-1, WIDTH), words[cut:].to(torch.int64)
    sums = torch.cat([table.sum(0, dtype=torch.int64), table.sum(1, dtype=torch.int64), rest])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum().cpu()


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
