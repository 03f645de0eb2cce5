"""Read GGUF files in transformers three times as fast.

Transformers parses the whole metadata whenever it loads a tokenizer, a configuration or weights
from a GGUF file. ``gguf.GGUFReader`` slices a ``numpy.memmap`` for each of the hundred thousand
strings of a vocabulary, and a slice of a memmap costs five times one of an array. The table of
tensor names is built anew for each module of a model.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

import numpy as np


@contextmanager
def quick_gguf() -> Iterator[None]:
    """Have transformers read GGUF files through plain arrays, with one table of names for a model.

    The result is the same.
    """
    import gguf

    # They are imported where they are called.
    names = cache(gguf.get_tensor_name_map)
    with (
        patch.object(gguf, "GGUFReader", _plain(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", names),
    ):
        yield


@cache
def _plain(kind: Any) -> Any:
    """Derive a reader whose bytes are a plain array: a view of the memory-mapped file."""

    def data(self: Any) -> Any:
        return self.bytes

    def take(self: Any, value: Any) -> None:
        self.bytes = np.asarray(value)

    return type("PlainReader", (kind,), {"data": property(data, take)})
