"""Where memory goes when a chunk trains, and what it looks like when there is too little."""

from __future__ import annotations

import torch

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
