"""Split a dataclass of tensors and plain fields into named tensors and JSON, and join them again.

Files, messages and data for other processes consist of these two parts; writers
(`fedraclora.weights.files`, a message) need not know the content. The JSON follows the type hints,
which check it when it is read:

- A dataclass is an object of its fields, except those at their defaults: fields that older files
lack
  get their defaults. If several dataclasses are possible, the names of the fields decide; in a
  family (`fedraclora.protocol.named`) the name under `IS` decides.
- A tensor is an empty list, and one of the tensors by its path: ``terms/fc1.weight/factors/0``. For
  quantized numbers the list has their kind, shape and type. A dict of tensors lists only these.

A field with ``metadata={"kind": NAME}`` has numbers of the kind in the field ``NAME`` (by name, if
that is a dict); with `OUTER` as ``NAME``, the kind of the field that contains it. One
with ``metadata={"written": False}`` is left at its default.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, TypeVar

import torch

from fedraclora.errors import WireError
from fedraclora.narrow_weight import in_parts, rejoined
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.factor import OUTER
from fedraclora.protocol.named import RegisteredByName
from fedraclora.protocol.quantized import FULL, ROUNDED, decode, encode
from fedraclora.tree import Tree, below

T = TypeVar("T")
IS = "is"  # the key of the name of a class, beside its fields
PLAIN = (bool, int, float, str)
# decoded quantized numbers
NUMBERS = {str(dtype)[6:]: dtype for dtype in (torch.float32, torch.float64)}
KINDS = NUMBERS | {"bfloat16": torch.bfloat16, "float16": torch.float16}
INTEGERS = ("int8", "int16", "int32", "int64", "uint8", "uint32", "bool")
KINDS |= {k: getattr(torch, k) for k in INTEGERS}


def split(value: object, path: str = "", *, coding: str = NONE) -> tuple[Tree, Any]:
    """Split a dataclass, or a list or a dict of such, into tensors and plain JSON.

    Args:
        value: The value. Its tensors are not copied.
        path: Prefix of the names of the tensors.
        coding: Coding of quantized numbers (`fedraclora.protocol.coding`).

    Returns:
        The tensors by path, with codes and scales in place of narrow weights, and the JSON.

    Example:
        >>> from fedraclora.protocol.link import Link, Term
        >>> tensors, plain = split(Link({"w": Term.of((torch.ones(2, 3),), 2.0)}))
        >>> list(tensors), plain["terms"]["w"]
        (['terms/w/factors/0/numbers'], {'factors': [{'numbers': [], 'shape': [2, 3]}], \
'scale': 2.0})
    """
    tensors: Tree = {}
    plain = _split(value, path, FULL, tensors, coding)
    return in_parts(tensors), plain


def join(kind: type[T], tensors: Mapping[str, torch.Tensor], plain: object, path: str = "") -> T:
    """Rebuild a value from the parts of `split`.

    Args:
        kind: A dataclass.
        tensors: Its tensors, and perhaps others.
        plain: The JSON, possibly from another machine.
        path: Prefix of the names of the tensors.

    Raises:
        ValueError: Naming the path, the found and the expected value. Checks of the dataclass raise
            their own errors.
    """
    found: T = _join(kind, rejoined(tensors), plain, path)
    return found


def to_bytes(tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, list[list[Any]]]:
    """Concatenate the bytes of tensors, [n]; return the name, type and shape of each, too."""
    raw = [t.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for t in tensors.values()]
    table = [[name, str(t.dtype)[6:], list(t.shape)] for name, t in tensors.items()]
    return torch.cat([torch.zeros(0, dtype=torch.uint8), *raw]), table


def from_bytes(raw: torch.Tensor, table: object) -> Tree:
    """Copy the tensors of `to_bytes` into memory allocated by torch.

    Matrix products round by the alignment of a matrix.

    Raises:
        ValueError: If they do not take exactly these bytes, or the table is invalid.
    """
    if raw.dim() != 1 or raw.dtype != torch.uint8:
        raise ValueError(f"{tuple(raw.shape)} numbers of {raw.dtype} came, expected a row of bytes")
    found: Tree = {}
    start = 0
    for name, kind, shape in _join(list[tuple[str, str, tuple[int, ...]]], {}, table, "tensors"):
        if kind not in KINDS or name in found or any(size < 0 for size in shape):
            raise ValueError(f"{name} is of the kind {kind} and the shape {shape}, or comes twice")
        size = prod(shape) * KINDS[kind].itemsize
        if size > len(raw) - start:
            raise ValueError(f"{name} takes {size} bytes, but only {len(raw) - start} are left")
        found[name] = torch.empty(shape, dtype=KINDS[kind])
        found[name].reshape(-1).view(torch.uint8).copy_(raw[start : start + size])
        start += size
    if start != len(raw):
        raise ValueError(f"there are {len(raw) - start} bytes more than the tensors take")
    return found


def _split(value: object, path: str, kind: Any, tensors: Tree, coding: str) -> Any:
    """Write a value: add its tensors to ``tensors``, return the rest."""
    if isinstance(value, torch.Tensor):
        if path in tensors:
            raise ValueError(f"two tensors have the path {path}")
        if kind == FULL:
            tensors[path] = value
            return []
        tensors[path] = encode(value.reshape(-1), [value.numel()], kind, coding=coding)
        return [kind, list(value.shape), str(value.dtype)[6:]]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        named = {IS: value.known_as()} if isinstance(value, RegisteredByName) else {}
        return named | {
            name: _split(inner, _at(path, name), _kind_of(value, field, kind), tensors, coding)
            for name, field in _fields(type(value)).items()
            if not _is_default(field, inner := getattr(value, name))
        }
    if isinstance(value, Mapping):
        kinds = kind if isinstance(kind, Mapping) else dict.fromkeys(value, kind)
        parts = {
            str(key): _split(inner, _at(path, key), kinds.get(key, FULL), tensors, coding)
            for key, inner in value.items()
        }
        is_tree = all(isinstance(inner, torch.Tensor) for inner in value.values())
        return {k: v for k, v in parts.items() if v} if is_tree else parts
    if isinstance(value, list | tuple):
        return [_split(inner, _at(path, i), kind, tensors, coding) for i, inner in enumerate(value)]
    return value


def _join(hint: Any, tensors: Mapping[str, torch.Tensor], plain: Any, path: str) -> Any:
    """Read a value of a type."""
    options = _options(hint)
    if torch.Tensor in options and isinstance(plain, list):
        return _tensor(tensors, plain, path)
    for option in options:
        origin, parts = typing.get_origin(option) or option, typing.get_args(option)
        if option in {object, Any} or (option is type(None) and plain is None):
            return plain
        if _is_object(option, plain):
            return _dataclass(option, tensors, plain, path)
        if origin in PLAIN and (found := _plain(origin, plain)) is not None:
            return found
        if origin in {list, Sequence, tuple} and isinstance(plain, list):
            whole = origin is tuple and parts[-1] is not Ellipsis
            if whole and len(plain) != len(parts):
                continue
            each = parts if whole else [parts[0]] * len(plain)
            pairs = enumerate(zip(each, plain, strict=True))
            listed = [_join(inner, tensors, v, _at(path, i)) for i, (inner, v) in pairs]
            return tuple(listed) if origin is tuple else listed
        if origin in {dict, Mapping} and isinstance(plain, dict):
            return _dict(parts, tensors, plain, path)
    raise ValueError(f"{path or 'it'} is {plain!s:.60}, expected {_shown(hint)}")


def _dataclass(
    kind: Any, tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], path: str
) -> Any:
    if _is_family(kind):
        kind, plain = _member(kind, plain, path)
    hints = _hints(kind)
    trees = {n for n, hint in hints.items() if hint == Tree and n in _fields(kind)}
    found = {
        name: _join(hints[name], tensors, plain.get(name, {}), _at(path, name))
        for name in _fields(kind)
        if name in plain or name in trees
    }
    return kind(**found)


def _member(
    family: type[RegisteredByName], plain: Mapping[str, Any], path: str
) -> tuple[type[Any], dict[str, Any]]:
    """Find a member of a family by its name; return it, and its fields."""
    name, said = str(plain.get(IS)), {key: v for key, v in plain.items() if key != IS}
    kind = family.known.get(name)
    if kind is None:
        raise ValueError(
            f"{path} is {name!r:.60}, which is not known here (one of {sorted(family.known)} is): "
            "run the server and the clients from one release, and define classes of yours in a "
            "module that both can import"
        )
    if not _fits(kind, said):
        raise ValueError(f"{path} is {plain!s:.60}, expected the fields of {kind.__name__}")
    return kind, said


def _dict(
    parts: Sequence[Any], tensors: Mapping[str, torch.Tensor], plain: Mapping[str, Any], path: str
) -> dict[Any, Any]:
    key_of, inner = parts
    if inner is torch.Tensor:  # for each, only quantized fields have a kind
        plain = {**{key: [] for key in below(tensors, f"{path}/" if path else "")}, **plain}
    keys = [_number(key, path) if key_of is int else key for key in plain]
    values = (_join(inner, tensors, value, _at(path, key)) for key, value in plain.items())
    return dict(zip(keys, values, strict=True))


def _number(key: str, path: str) -> int:
    """Parse a key as an integer, which must be in its canonical form."""
    number = int(key) if key.isdecimal() and len(key) < 20 else -1
    if str(number) != key:
        raise ValueError(f"{path} names {key!r:.60}, expected a number of at least 0")
    return number


def _tensor(tensors: Mapping[str, torch.Tensor], told: list[Any], path: str) -> torch.Tensor:
    """Return a tensor, decoded if its kind, shape and type are given."""
    if path not in tensors:
        raise ValueError(f"there are no numbers of {path}")
    if not told:
        return tensors[path]
    kind, shape, dtype = _join(tuple[str, tuple[int, ...], str], {}, told, path)
    if kind not in ROUNDED or dtype not in NUMBERS or any(size < 0 for size in shape):
        raise ValueError(f"{path} is {told!s:.60}, expected a kind, a shape and a type")
    try:
        return decode(tensors[path], [prod(shape)], kind).reshape(shape).to(NUMBERS[dtype])
    except WireError as error:
        raise WireError(f"{path}: {error}") from error


def _plain(kind: type, value: object) -> Any:
    """Return a plain value of a type, an integer as a float if needed; None for any other."""
    whole = type(value) is int and -(2**63) <= value < 2**64
    if kind is int or whole:
        return value if whole and kind in {int, float} else None
    fits = type(value) is kind and (kind is not float or math.isfinite(value))  # type: ignore[arg-type]
    return value if fits else None


def _is_family(option: Any) -> bool:
    return inspect.isclass(option) and issubclass(option, RegisteredByName)


def _is_object(option: Any, plain: object) -> bool:
    """Check whether an object may be a dataclass, or a member of a family."""
    if _is_family(option):
        return isinstance(plain, dict)
    return dataclasses.is_dataclass(option) and _fits(option, plain)


def _fits(kind: Any, plain: object) -> bool:
    """Check whether the keys of an object are the fields of a dataclass."""
    if not isinstance(plain, dict):
        return False
    missing = [f for name, f in _fields(kind).items() if name not in plain]
    needed = [f for f in missing if f.default is f.default_factory is dataclasses.MISSING]
    trees = [f for f in needed if _hints(kind)[f.name] == Tree]
    return plain.keys() <= _fields(kind).keys() and len(needed) == len(trees)


def _is_default(field: dataclasses.Field[Any], value: object) -> bool:
    """Check whether a field has its default, and is omitted."""
    if field.default_factory is not dataclasses.MISSING:
        return not value and value == field.default_factory()
    if isinstance(value, RegisteredByName):
        return value is field.default
    return isinstance(value, (*PLAIN, tuple, type(None))) and value == field.default


def _kind_of(value: object, field: dataclasses.Field[Any], outer: Any) -> Any:
    told = field.metadata.get("kind")
    return FULL if told is None else outer if told is OUTER else getattr(value, told)


def _at(path: str, name: object) -> str:
    return f"{path}/{name}" if path else str(name)


@functools.cache
def _fields(kind: Any) -> dict[str, dataclasses.Field[Any]]:
    return {f.name: f for f in dataclasses.fields(kind) if f.metadata.get("written", True)}


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@functools.cache
def _options(hint: Any) -> tuple[Any, ...]:
    """List the types that a hint allows."""
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        return tuple(option for inner in typing.get_args(hint) for option in _options(inner))
    return (hint,)


def _shown(hint: Any) -> str:
    return " or ".join(getattr(option, "__name__", str(option)) for option in _options(hint))
