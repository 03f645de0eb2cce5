"""Read the header of a GGUF file, and check it against the file.

It is read here, not by ``gguf.GGUFReader``, since readers of GGUF trust the header: with a wrong
number they read one tensor's bytes as another's, fill missing tensors at random, or build for
minutes.

References:
    ggml, ``docs/gguf.md``: magic, version, counts; keys with their values; tensors with name,
    shape, type and offset; then the tensors, each at the next multiple of the alignment.
"""

from __future__ import annotations

import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from fedraclora.errors import DataError
from fedraclora.imports import import_extra

MAGIC, VERSIONS = b"GGUF", (2, 3)
SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}  # a type's letter of struct
TEXT, LIST = 8, 9
MOST_DIMENSIONS = 4


@dataclass(frozen=True)
class TensorEntry:
    """A tensor as the header describes it.

    Attributes:
        shape: The fastest dimension last, as in torch.
        kind: Type of its numbers, for example ``Q4_1``.
    """

    shape: tuple[int, ...]
    kind: str

    @property
    def count(self) -> int:
        """Return the number of elements."""
        return prod(self.shape)


@dataclass(frozen=True)
class Header:
    """The metadata and tensors of a GGUF file.

    Attributes:
        fields: Values by key; for a list its length.
        tensors: Tensors by name, in the order of the file.
    """

    fields: Mapping[str, object]
    tensors: Mapping[str, TensorEntry]

    @property
    def kinds(self) -> str:
        """Return the number types, the most used first, such as ``Q4_1, F32``."""
        sizes = Counter[str]()
        for tensor in self.tensors.values():
            sizes[tensor.kind] += tensor.count
        return ", ".join(kind for kind, _ in sizes.most_common())


def read_gguf_header(path: Path, key: str) -> Header:
    """Read the header of a GGUF file, and check the file against it.

    Args:
        path: The file.
        key: The configuration key, for messages.

    Raises:
        ConfigError: If the package gguf is not installed.
        DataError: If it cannot be read, or the file does not hold exactly its tensors, one after
            another.
    """
    import_extra("gguf", f"{key}={path}")
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Reader(data).header()
    except struct.error as error:
        raise DataError(f"{key}: {path} is damaged: it ends within its header") from error
    except (OSError, ValueError) as error:
        raise DataError(f"{key}: {path} cannot be read as GGUF: {error}") from error


class _Reader:
    """Read a header from start to end; a value beyond the end of the file is a `struct.error`."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data, self.at = data, 0

    def header(self) -> Header:
        if self.data[:4] != MAGIC:
            raise ValueError("it does not begin with GGUF")
        self.at = 4
        if (version := self._number("I")) not in VERSIONS:
            raise ValueError(f"its version is {version}, but must be 2 or 3, little-endian")
        tensors, keys = self._number("Q"), self._number("Q")
        fields: dict[str, object] = {}
        for _ in range(keys):
            name = self._name("key", fields)
            fields[name] = self._value(self._number("I"))
        return Header(fields, self._tensors(tensors, fields.get("general.alignment", 32)))

    def _tensors(self, count: int, alignment: object) -> dict[str, TensorEntry]:
        """Read the table of tensors, which must cover the rest of the file."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise ValueError(f"its general.alignment is {alignment!r}, but must be a power of 2")
        found: dict[str, TensorEntry] = {}
        last = end = 0  # bytes of the tensors so far, with padding
        for _ in range(count):
            name = self._name("tensor", found)
            dimensions = self._number("I")
            if not 1 <= dimensions <= MOST_DIMENSIONS:
                raise ValueError(f"{name} has {dimensions} dimensions, but must have 1 to 4")
            shape = tuple(self._number("Q") for _ in range(dimensions))[::-1]
            kind = GGMLQuantizationType(self._number("I"))
            block, size = GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % block:
                raise ValueError(f"{name} is {shape}, in blocks of {block} {kind.name} numbers")
            if (offset := self._number("Q")) != end:
                raise ValueError(f"{name} begins at byte {offset} of the tensors, not at {end}")
            found[name] = TensorEntry(shape, kind.name)
            last = end + found[name].count // block * size
            end = -(-last // alignment) * alignment
        if not found:
            raise ValueError("it holds no tensor")
        begin = -(-self.at // alignment) * alignment
        if not begin + last <= len(self.data) <= begin + end:
            raise ValueError(
                f"its header announces {last} bytes of tensors, but {len(self.data) - begin} are "
                "there: get it again"
            )
        return found

    def _number(self, letter: str) -> Any:
        (value,) = struct.unpack_from(f"<{letter}", self.data, self.at)
        self.at += struct.calcsize(f"<{letter}")
        return value

    def _text(self) -> bytes:
        size = self._number("Q")
        if size > len(self.data) - self.at:
            raise struct.error
        self.at += size
        return self.data[self.at - size : self.at]

    def _name(self, what: str, known: Mapping[str, object]) -> str:
        name = self._text().decode()
        if not name.isprintable() or not name or name in known:
            raise ValueError(f"it has a {what} {name!r} " + ("twice" if name in known else ""))
        return name

    def _value(self, kind: int) -> object:
        """Read a value; for a list its length, without a step for each of its numbers."""
        if kind == TEXT:
            return self._text().decode(errors="replace")
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != LIST:
            raise ValueError(f"it has a value of type {kind}, which GGUF does not know")
        inner, count = self._number("I"), self._number("Q")
        if inner in SCALARS:
            self.at += struct.calcsize(f"<{SCALARS[inner]}") * count
            if self.at > len(self.data):
                raise struct.error
        elif inner == TEXT:
            for _ in range(count):
                self._text()
        else:
            raise ValueError(f"it has a list of type {inner}, which is not supported")
        return count
