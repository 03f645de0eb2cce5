"""Read GGUF files in transformers fast.

Transformers parses the whole metadata whenever it loads a tokenizer, a configuration or weights
from a GGUF file; here what it found without weights is remembered. ``gguf.GGUFReader`` slices a
``numpy.memmap`` for each of the hundred thousand strings of a vocabulary, and a slice of a memmap
costs five times one of an array. The table of tensor names is built anew for each module of a
model.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np


@contextmanager
def quick_gguf() -> Iterator[None]:
    """Have transformers read GGUF files through plain arrays, with one table of names for a model.

    Metadata without weights is parsed once for each state of a file. The result is the same.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as reading

    # They are imported where they are called.
    names = cache(gguf.get_tensor_name_map)
    with (
        patch.object(gguf, "GGUFReader", _plain(gguf.GGUFReader)),
        patch.object(gguf, "get_tensor_name_map", names),
        patch.object(reading, "load_gguf_checkpoint", _once(reading.load_gguf_checkpoint)),
    ):
        yield


@cache
def _once(load: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Wrap transformers' reader, so that it parses the metadata of a file once."""

    @lru_cache(maxsize=1)
    def parsed(path: str, _changed: int, _size: int) -> bytes:  # callers change what they get
        return pickle.dumps(load(path))

    def read(path: Any, return_tensors: bool = False, **given: Any) -> dict[str, Any]:
        if return_tensors:
            return load(path, return_tensors=True, **given)
        state = Path(path).stat()
        raw = parsed(str(path), state.st_mtime_ns, state.st_size)
        found: dict[str, Any] = pickle.loads(raw)  # noqa: S301  pickled above
        return found

    return read


@cache
def _plain(kind: Any) -> Any:
    """Derive a reader whose bytes are a plain array: a view of the memory-mapped file."""

    def data(self: Any) -> Any:
        return self.bytes

    def take(self: Any, value: Any) -> None:
        self.bytes = np.asarray(value)

    return type("PlainReader", (kind,), {"data": property(data, take)})
