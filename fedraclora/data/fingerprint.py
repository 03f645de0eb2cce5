"""Fingerprint samples of any kind, to check that they did not change between processes.

A fingerprint has a digest for each part: tensors, arrays, lists, dicts, frames, datasets of torch
and of Hugging Face, and attributes of other objects. If there are many numbers, rows or keys, we
read a fixed random selection, so that the cost is bounded: 0.1 ms for a small client, 25 ms for any
number of samples.
"""

from __future__ import annotations

import hashlib
import logging
import random  # noqa: TID251  (the state of somebody's generator)
import time
from collections.abc import Callable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import cache, cached_property
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.rng import generator

log = logging.getLogger(__name__)
T = TypeVar("T")
LONG = 60.0  # seconds; a longer call is not repeated
Fingerprint = dict[str, str]
WHOLE = 8 << 20  # bytes that are read completely
# numbers read of a larger tensor; the same once these bytes are used up
SOME, FEW = 1 << 13, 1 << 7
FEW_ROWS = 16  # rows read of a Hugging Face dataset with large rows
MANY = 256  # entries of a list or a dict that are all read; as many of a longer one
MOST = 2048  # most parts with a digest
PLAIN = (str, bytes, int, float, complex, bool, type(None), type(...), np.generic)
CODE = (type, FunctionType, MethodType, BuiltinFunctionType, ModuleType)
# suffixes of the paths for the number of entries and the names of attributes
COUNT, NAMES = "#", ".*"
USED_UP = "an iterator"  # the digest of an object that can be read only once


def fingerprint_of(found: object, *, versions: bool = False) -> Fingerprint:
    """Return a digest for the path of each part of samples, such as ``[0]`` or ``.images[3]``.

    Args:
        found: The samples of one client, or of all. Not modified.
        versions: Whether to include torch's counters of in-place changes, so that a single changed
            number of a large tensor shows. Counters differ between processes.

    Returns:
        Without ``versions`` the same in any process.
    """
    parts = Fingerprint()
    for path, digest in _Reader(versions).parts(found, "", (), kept=False):
        parts[path] = digest
        if len(parts) >= MOST:
            break
    return parts


def what_differs(before: Fingerprint, now: Fingerprint) -> str | None:
    """Return a part that changed or is missing; None if nothing changed.

    Attributes of an object may be added, such as a cache, or a file in place of None. A new public
    attribute of the samples themselves is a difference, and so is a new entry.
    """
    paths = (*before, *(path for path in now if path.endswith(NAMES)))
    path = next((path for path in paths if now.get(path) != before.get(path)), None)
    if path is None:
        return None
    if path.endswith(COUNT):
        return f"{path.removesuffix(COUNT) or 'it'} has another number of entries than before"
    if path.endswith(NAMES):
        return f"{path.removesuffix(NAMES) or 'it'} has other attributes than before"
    return path or "it"


def call_twice(
    name: str,
    call: Callable[[], T],
    *,
    within: float = LONG,
    look: Callable[[T], object] = lambda found: found,
) -> T:
    """Call a user's function twice, and reject it if the results differ.

    Each process calls the function, and so does a resumed run: with different results, clients
    would share rows, or train on other samples.

    Args:
        name: The name of the function, for the message.
        call: Calls it.
        within: Most seconds of the first call for a second one; otherwise the log says so.
        look: Extracts the part of the result that must be the same.

    Returns:
        The first result.

    Raises:
        ConfigError: If the second result differs, or the second call changes the first.
    """
    began = time.monotonic()
    found = call()
    if (took := time.monotonic() - began) > within:
        log.warning(
            "%s took %.0f s; it is not called a second time to check that it returns the same",
            name,
            took,
        )
        return found
    first, again = fingerprint_of(look(found)), fingerprint_of(look(call()))
    pairs = ((first, again), (again, first), (first, fingerprint_of(look(found))))
    if part := next(filter(None, (what_differs(*pair) for pair in pairs)), None):
        raise ConfigError(
            f"{name} returns something else when it is called again ({part}), so the run could "
            "not be reproduced. Use a random generator with a fixed seed "
            "(torch.Generator().manual_seed(0), numpy.random.default_rng(0)), and keep no state "
            "between calls."
        )
    return found


@dataclass
class _Reader:
    """Read samples; less of each tensor once much was read.

    Attributes:
        versions: As in `fingerprint_of`.
        left: Bytes that may still be read completely.
    """

    versions: bool
    left: int = WHOLE

    def parts(
        self, found: Any, path: str, above: tuple[int, ...], *, kept: bool
    ) -> Iterator[tuple[str, str]]:
        """Digest the parts of a value; ``kept`` says that it is an attribute of an object."""
        if id(found) in above or isinstance(found, CODE) or (kept and found is None):
            return
        above = (*above, id(found))
        if (own := self._leaf(found)) is not None:
            yield path, own
            yield from () if kept else _names_of(found, path, values=True)
        elif (entries := _entries(found)) is not None:
            if not kept or _is_frame(found):
                yield f"{path}{COUNT}", str(entries[0])
                yield from _names_of(found, path, values=True)
            for key, value in entries[1]:
                yield from self.parts(value, f"{path}[{key!r:.40}]", above, kept=kept)
        elif hasattr(found, "__next__"):
            if not kept:
                yield path, USED_UP
        else:
            if not kept or isinstance(found, torch.utils.data.Dataset):
                yield f"{path}{COUNT}", _length(found)
            yield from () if kept else _names_of(found, path, values=False)
            for name, value in _attributes(found):
                yield from self.parts(value, f"{path}.{name}", above, kept=True)

    def _leaf(self, found: Any) -> str | None:
        """Digest a value without parts."""
        if isinstance(found, PLAIN):
            text = repr(found)
            return text if len(text) < 40 else _hash(text.encode())
        if isinstance(found, torch.Tensor):
            return self._tensor(found)
        if isinstance(found, np.ndarray) and found.dtype != object:
            some = found[self._places(found.shape, found.nbytes)]
            return f"{found.dtype} {found.shape} {_hash(np.ascontiguousarray(some).tobytes())}"
        state = _state_of(found)
        return None if state is None else _hash(state)

    def _tensor(self, found: torch.Tensor) -> str:
        counts = self.versions and not found.is_inference()
        text = f"{found.dtype} {tuple(found.shape)} {found._version if counts else ''}"  # noqa: SLF001
        plain = found.detach()
        if plain.layout != torch.strided or plain.is_meta or plain.is_quantized:
            return text
        places = self._places(tuple(plain.shape), plain.numel() * plain.element_size())
        some = plain[tuple(map(torch.from_numpy, places)) if places else ()].cpu().contiguous()
        bits = some.reshape(-1).view(torch.uint8) if some.numel() else some
        return f"{text} {_hash(bits.numpy().tobytes())}"

    def _places(self, shape: tuple[int, ...], size: int) -> tuple[npt.NDArray[np.int64], ...]:
        """Choose the numbers to read; empty: all."""
        if size <= self.left // 2:
            self.left -= size
            return ()
        self.left -= WHOLE // 32
        return _drawn_places(shape, SOME if self.left > 0 else FEW)


def _state_of(found: Any) -> bytes | None:
    """Return the state of a random generator, or the bytes of a PIL image; None for others."""
    if isinstance(found, torch.Generator):
        return found.get_state().numpy().tobytes()
    if isinstance(found, random.Random):
        return repr(found.getstate()).encode()
    if isinstance(found, np.random.Generator):
        return repr(found.bit_generator.state).encode()
    if isinstance(found, np.random.RandomState):
        return repr(found.get_state()).encode()
    return found.tobytes() if hasattr(found, "getbands") and hasattr(found, "tobytes") else None


def _entries(found: Any) -> tuple[int, Iterator[tuple[object, Any]]] | None:
    """Count the entries of a container, and list them by key; a selection if there are many."""
    if isinstance(found, Samples):
        found = found.tensors
    if hasattr(found, "column_names") and hasattr(found, "with_format"):  # of Hugging Face
        table = found.with_format("arrow")[_drawn(len(found))]  # nothing is decoded
        some = table if table.nbytes < WHOLE else table[:FEW_ROWS]
        return len(found), ((name, repr(rows)) for name, rows in some.to_pydict().items())
    if _is_frame(found):
        return len(found), _frame_entries(found)
    if isinstance(found, Mapping):
        keys = [*found]
        return len(keys), ((keys[k], found[keys[k]]) for k in _drawn(len(keys)))
    if isinstance(found, Set):
        every = sorted(map(repr, found))
        return len(every), ((k, every[k]) for k in _drawn(len(every)))
    if isinstance(found, list | tuple | np.ndarray):
        return len(found), ((k, found[k]) for k in _drawn(len(found)))
    return None


def _is_frame(found: Any) -> bool:
    """Check whether this is a frame or a series of pandas or a similar library."""
    return hasattr(found, "to_numpy") and (hasattr(found, "columns") or hasattr(found, "dtype"))


def _frame_entries(found: Any) -> Iterator[tuple[object, Any]]:
    """List names, types and index of a frame or a series beside the values."""
    names = [*getattr(found, "columns", ())]
    yield "its columns", repr(names)
    types = map(str, found.dtypes) if names else [getattr(found, "dtype", "")]
    yield "its types", repr([*types])
    yield "its attrs", getattr(found, "attrs", {})
    index = getattr(found, "index", ())  # a range index is no array, and would become one
    yield "its index", repr(index) if hasattr(index, "step") else np.asarray(index)
    if names:
        yield from ((name, found[name].to_numpy()) for name in names)
    else:
        yield "its values", found.to_numpy() if hasattr(found, "dtype") else ()


def _attributes(found: Any) -> Iterator[tuple[str, Any]]:
    """List an object's attributes, except private plain values, which it may use as counters."""
    slots = {n for kind in type(found).__mro__ for n in _names(vars(kind).get("__slots__", ()))}
    own = {n: getattr(found, n) for n in sorted(slots) if n[:2] != "__" and hasattr(found, n)}
    for name, value in {**own, **getattr(found, "__dict__", {})}.items():
        if not (name.startswith("_") and isinstance(value, PLAIN)):
            yield name, value


def _names_of(found: Any, path: str, *, values: bool) -> Iterator[tuple[str, str]]:
    """Digest the names of public attributes and their plain values, except cached results."""
    if isinstance(found, random.Random) or hasattr(found, "getbands"):  # read by `_state_of`
        return
    own, kind = getattr(found, "__dict__", {}), type(found)
    names = sorted(n for n in own if n[:1] != "_" and not _is_cached(kind, n))
    if names:
        plain = [own[n] for n in names if values and isinstance(own[n], PLAIN)]
        yield f"{path}{NAMES}", _hash(repr((names, plain)).encode())


def _is_cached(kind: type, name: str) -> bool:
    return isinstance(getattr(kind, name, None), cached_property)


def _names(slots: Any) -> tuple[str, ...]:
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _length(found: Any) -> str:
    try:
        return str(len(found)) if hasattr(type(found), "__len__") else ""
    except Exception:  # a loader whose dataset has none
        return ""


@cache
def _drawn(count: int) -> list[int]:
    """List all numbers below a count; a selection if there are many, with both ends, in order."""
    if count <= MANY:
        return [*range(count)]
    drawn = generator(0, "fingerprint", count).choice(count, MANY - 2, replace=False)
    return sorted({0, count - 1, *map(int, drawn)})


@cache
def _drawn_places(shape: tuple[int, ...], some: int) -> tuple[npt.NDArray[np.int64], ...]:
    count = int(np.prod(shape, dtype=np.int64))
    drawn = generator(0, "fingerprint of numbers", count).integers(count, size=some)
    return np.unravel_index(np.unique([0, count - 1, *drawn.tolist()]), shape)


def _hash(found: bytes) -> str:
    return hashlib.sha256(found).hexdigest()[:16]
