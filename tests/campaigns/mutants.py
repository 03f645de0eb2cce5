"""What can become of a message: of its JSON, its arrays, its vectors and its records."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from io import BytesIO
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

Random = np.random.Generator
Change = Callable[[Random, RecordDict], None]


def deep(levels: int) -> Any:
    """A list in a list in a list."""
    value: Any = 5
    for _ in range(levels):
        value = [value]
    return value


JUNK: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 3, 5, 2**31, 2**63 - 1, 2**63, 2**64, -(2**63), 10**400),
    *(0.0, 1.0, 1.5, -2.5, 1e308, -1e308, 1e-320),
    *("", "x", "0", "1", "null", "rows", "../../etc", "\x1b[2J\n\r\x00", "\ud800", "\u202e\u2028"),
    *("a" * 100_000, "é" * 3, [], {}, [[]], {"": None}, [None], [1, 2, 3], ["a", ["b"]]),
    *({"0": "x"}, {"1": 5}, {"01": "x"}, {"-1": "x"}, {"a": {"b": {"c": []}}}, deep(50), deep(900)),
    *(
        [[1, "x"]],
        [[2, "x"]],
        [["1", "x"]],
        [[1, 5]],
        ["w", [5, 2]],
        [["w", [5, 2]]],
        [["w", [-5]]],
    ),
    *(
        ["x"] * 5000,
        [["w/B", [2**40, 2**40]]],
        {"shape": [5, 2], "start": []},
        {"drawing": {}, "coefficients": []},
    ),
]
TEXTS = [
    *(
        "",
        "{",
        "}",
        "null",
        "[]",
        "5",
        '"x"',
        "NaN",
        "{}",
        '{"round": 1}',
        "\x00",
        "é",
        "[" * 100_000,
    ),
    *('{"a":' * 100_000, '{"round": ' + "9" * 5000 + "}", "\ufeff{}", "{'round': 1}"),
]


def pick(random: Random, values: list[Any]) -> Any:
    """Choose one."""
    return values[int(random.integers(len(values)))]


def paths(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place of a JSON value."""
    found = [at]
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    if isinstance(value, dict | list):
        for key, part in inner:
            found += paths(part, (*at, key))
    return found


def header(record: str) -> Change:
    """Change a value of the JSON in a record: another in its place, one less, one more, a copy."""

    def change(random: Random, content: RecordDict) -> None:
        whole = json.loads(str(content[record]["header"]))  # type: ignore[index]
        *parents, last = pick(random, paths(whole)[1:])
        owner = whole
        for key in parents:
            owner = owner[key]
        match int(random.integers(8)):
            case 0:
                del owner[last]
            case 1 if isinstance(owner, dict):
                owner[pick(random, ["", "x", "0", "rank", "__class__", "a" * 2000])] = owner[last]
            case 1 | 2 if isinstance(owner, list):
                owner.insert(int(last), owner[last])
            case 2:
                owner[last] = [owner[last]]
            case 3 if type(owner[last]) in {int, float}:
                owner[last] = owner[last] + pick(random, [-1, 1, 0.5, 2**31, 1e300])
            case 4:
                other = whole
                for key in pick(random, paths(whole)):
                    other = other[key]
                owner[last] = json.loads(json.dumps(other))
            case _:
                owner[last] = pick(random, JUNK)
        content[record] = ConfigRecord({"header": json.dumps(whole)})

    return change


def header_text(record: str) -> Change:
    """Change the text of the JSON in a record, or what stands in its place."""

    def change(random: Random, content: RecordDict) -> None:
        old = str(content[record]["header"])  # type: ignore[index]
        cut = int(random.integers(1, len(old)))
        texts: list[Any] = [
            *TEXTS,
            *(old[:cut], old[cut:], old + old, old[:cut] + "\x00" + old[cut:]),
            *(
                old.replace(":", ": NaN,", 1),
                old.replace(": 1", ": 1e999"),
                old[:-1] + ', "round": 9}',
            ),
            *(5, 1.5, True, b"{}", [1, 2], ["{}"], old.encode()),
        ]
        name = pick(random, ["header"] * 8 + ["Header", ""])
        content[record] = ConfigRecord({name: pick(random, texts)})

    return change


def numpy_bytes(array: Any) -> bytes:
    """Bytes of an array as Flower writes them, with what it would refuse to write."""
    stream = BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


def claimed(shape: Any, dtype: str, payload: bytes) -> bytes:
    """Bytes of an array that says that it has another shape."""
    stream = BytesIO()
    described = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(stream, described)  # type: ignore[arg-type]
    return stream.getvalue() + payload


def array_values(record: str, key: str = "flat") -> Change:
    """Change values, shape or kind of an array; where the record has no such one, of its first."""

    def change(random: Random, content: RecordDict) -> None:
        arrays = dict(content[record])  # type: ignore[arg-type]
        name = key if key in arrays else "flat"
        old = arrays[name].numpy()  # type: ignore[attr-defined]
        at = tuple(int(random.integers(n)) for n in old.shape) if old.size else ()
        new = old.copy()
        if old.size and old.dtype.kind == "f":
            # A number that is not the one that was there: else nothing has changed.
            with np.errstate(all="ignore"):
                new[at] = pick(random, [np.nan, np.inf, -np.inf, 3e38, -3e38, 1e-45, 7.5])
        if old.size and old.dtype == np.uint8:
            new[at] ^= pick(random, [1, 16, 127, 128, 255])
        shapes = [
            old.reshape(-1),
            old.T,
            old[None],
            old[..., None],
            old[..., :-1],
            old[:0],
            old[1:],
        ]
        shapes += [np.concatenate([old, old]), np.asfortranarray(np.atleast_2d(old)), np.float32(1)]
        kinds = [
            "f2",
            "f8",
            "f4",
            ">f4",
            ">f8",
            "i4",
            "i8",
            "u1",
            "u4",
            "?",
            "c8",
            "O",
            "U3",
            "V4",
            "M8[s]",
        ]
        with np.errstate(all="ignore"):
            choices = [
                lambda: new,
                lambda: pick(random, shapes),
                lambda: _as(old, pick(random, kinds)),
            ]
            found = pick(random, choices)()
        content[record] = ArrayRecord({**arrays, name: stored(numpy_bytes(found))})

    return change


def _as(array: Any, kind: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return array.astype(kind)
    except (TypeError, ValueError):
        return array.astype("O")


def stored(data: bytes, stype: str = "numpy.ndarray") -> Array:
    """An array with any bytes."""
    return Array("float32", (1,), stype, data)


def array_bytes(record: str) -> Change:
    """Change the bytes of an array, or the record that holds it."""

    def change(random: Random, content: RecordDict) -> None:
        old = content[record]["flat"].data  # type: ignore[index, union-attr]
        cut, head = int(random.integers(len(old))), int(random.integers(min(128, len(old))))
        flipped = bytearray(old)
        flipped[pick(random, [cut, head])] ^= 1 << int(random.integers(8))
        packed = BytesIO()
        np.savez(packed, flat=np.ones(3))
        data = [
            *(
                old[:cut],
                old + b"\x00",
                old[cut:],
                b"",
                bytes(flipped),
                bytes(flipped),
                bytes(flipped),
            ),
            *(packed.getvalue(), b"\x80\x04K\x05.", b"\x93NUMPY", b"\x93NUMPY\x09\x00" + old[8:]),
            *(
                claimed(s, "<f4", old[128:])
                for s in [(10**12,), (2**62, 4), (0, 10**18), (-1, 4), ()]
            ),
        ]
        records: list[Any] = [
            ArrayRecord({"flat": stored(pick(random, data))}),
            ArrayRecord({"flat": stored(pick(random, data))}),
            ArrayRecord({"flat": stored(pick(random, data))}),
            ArrayRecord({"flat": stored(old, pick(random, ["", "torch", "pickle"]))}),
            ArrayRecord({pick(random, ["Flat", "", "a" * 5000]): stored(old)}),
            ArrayRecord(),
            ConfigRecord({"flat": old}),
            MetricRecord({"flat": 1.0}),
        ]
        content[record] = pick(random, records)

    return change


def vector(random: Random, content: RecordDict) -> None:
    """Change a short vector, or the place of the first client."""
    chunk: Any = content["chunk"]
    name = pick(random, list(chunk))
    old = chunk[name]
    if name == "first":
        wrong = [0, 1, 2, 3, -1, 7, 2**40, 0.0, "0", b"", [0], True]
        value = pick(random, wrong)
    else:
        kind = np.float64 if name == "losses" else np.int64
        numbers = np.frombuffer(old, kind).copy()
        odd = [0, 1, 2, 3, -1, 5, 2**31, 2**62, -(2**63), 10_000_001]
        odd = [np.nan, np.inf, -np.inf, 1e308, 0.0] if name == "losses" else odd
        if len(numbers):
            numbers[int(random.integers(len(numbers)))] = pick(random, odd)
        long = np.concatenate([numbers, numbers])
        with np.errstate(all="ignore"):
            short = numbers.astype("f4")
        values = [numbers, numbers, numbers, long, numbers[:0], numbers[::-1], short]
        raw = [v.tobytes() for v in values] + [
            old[:-1],
            old + b"\x00",
            "x",
            5,
            1.5,
            [1],
            ["x"],
            True,
        ]
        value = pick(random, raw)
    new = {k: v for k, v in chunk.items() if k != name}
    if random.random() < 0.9:
        new[pick(random, [name] * 20 + ["", "x" * 3000, "Clients"])] = value
    content["chunk"] = ConfigRecord(new)


def records(random: Random, content: RecordDict) -> None:
    """Leave records out, rename or swap them, or add others."""
    names = list(content)
    name = pick(random, names)
    match int(random.integers(6)):
        case 0:
            del content[name]
        case 1:
            content[pick(random, ["", "Config", "x" * 3000, *names])] = content.pop(name)
        case 2:
            other = pick(random, names)
            content[name], content[other] = content[other], content[name]
        case 3:
            kinds: list[Any] = [
                ConfigRecord(),
                ArrayRecord(),
                MetricRecord(),
                MetricRecord({"a": [1]}),
            ]
            content[name] = pick(random, kinds)
        case 4:
            for each in names:
                del content[each]
        case _:
            extra = {"header": "{}", "flat": [1, 2], "x": b"\x00", "stage": "masked"}
            content[pick(random, ["extra", "own", "secure", "job", "parcel", ""])] = ConfigRecord(
                extra
            )
