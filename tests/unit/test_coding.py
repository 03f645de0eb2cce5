"""Coding of what goes up: nothing is lost, and nothing is taken that is not what was sent."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import zstandard

from fedraclora.config.settings import WireConfig
from fedraclora.errors import ConfigError, WireError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Downlink
from fedraclora.protocol.quantised import ROUNDED, encode, packed_bytes
from fedraclora.rng import generator, torch_normal
from fedraclora.wire.changes import Changes, Coded
from fedraclora.wire.coding import ZSTD, compressed, decompressed
from fedraclora.wire.downlink import HEADER, AskReader, AskWriter
from fedraclora.wire.exchange import Answer, Ask, TrainRequest
from fedraclora.wire.records import read_json
from fedraclora.wire.reply import checked, read_answer, write_answer

COUNT, CLIENTS = 3000, torch.tensor([2, 4, 9])
kinds = pytest.mark.parametrize("kind", ROUNDED)


def packed(kind: str, count: int = COUNT) -> torch.Tensor:
    rng = generator(5, "numbers", count)
    return encode(torch_normal(rng, count), [count], kind, rng, again=False)


def read(frame: bytes, size: int, client: int = 4) -> torch.Tensor:
    raw = torch.from_numpy(np.frombuffer(frame, np.uint8).copy())
    return decompressed(raw, torch.tensor([len(raw)]), torch.tensor([client]), [size])


@kinds
def test_what_is_coded_is_read_back_and_never_longer(kind: str) -> None:
    parts = [packed(kind), packed(kind, 5), packed(kind, 0), torch.zeros(90, dtype=torch.uint8)]
    codes, clients = compressed(parts), torch.arange(4)
    lengths = torch.tensor([len(code) for code in codes])
    assert all(len(code) <= len(raw) for code, raw in zip(codes, parts, strict=True))
    assert len(codes[3]) < 30
    back = decompressed(torch.cat(codes), lengths, clients, [len(raw) for raw in parts])
    assert torch.equal(back, torch.cat(parts))


@pytest.mark.parametrize(("kind", "most"), [("int8", 7.6), ("int4", 3.3), ("eden4", 3.9)])
def test_few_bits_of_normal_numbers_get_fewer(kind: str, most: float) -> None:
    raw = packed(kind, 30_000)
    assert len(compressed([raw])[0]) * 8 / 30_000 < most < len(raw) * 8 / 30_000


def test_a_damaged_frame_is_refused_by_the_name_of_its_client() -> None:
    raw, rng = packed("int4"), generator(6, "damage")
    frame = compressed([raw])[0].numpy().tobytes()
    assert len(frame) < len(raw)
    for place in [*range(40), *rng.integers(len(frame), size=200).tolist(), len(frame) - 1]:
        wrong = bytearray(frame)
        wrong[place] ^= 1 << int(rng.integers(8))
        for damaged in (bytes(wrong), frame[:place], frame[:place] + frame[place + 1 :]):
            try:
                back = read(damaged, len(raw))
            except WireError as error:
                assert "client 4" in str(error)  # noqa: PT017
            else:  # a bit that means nothing, as one of those that are reserved
                assert torch.equal(back, raw)


def test_a_frame_of_another_size_is_refused_unread() -> None:
    def made(size: int, **more: bool) -> bytes:
        more = {"write_checksum": True} | more
        return zstandard.ZstdCompressor(**more).compress(bytes(size))

    assert torch.equal(read(made(900), 900), torch.zeros(900, dtype=torch.uint8))
    bomb = made(1 << 29)  # of some kilobytes
    for frame in (
        *(bomb, made(899), made(901), made(900, write_checksum=False)),
        *(made(900, write_content_size=False), made(900) + b"0", made(900) + made(900)),
        *(made(450) + made(450), bytes(901), b"", b"0"),
    ):
        with pytest.raises(WireError, match="client 4"):
            read(frame, max(900, 900 if len(frame) < 900 else len(frame) - 1))


@pytest.mark.parametrize("lengths", [[5, 6], [11, -1], [-1, 11], [10], [4, 4, 2], [2**62, 2**62]])
def test_lengths_are_those_of_the_bytes(lengths: list[int]) -> None:
    with pytest.raises(WireError):
        decompressed(
            torch.zeros(10, dtype=torch.uint8), torch.tensor(lengths), torch.tensor([1, 2]), [5, 5]
        )


def answered(sent: Downlink, base: dict[str, torch.Tensor]) -> tuple[Changes, Answer]:
    changes, coded = Changes("int4", sent, base, CLIENTS), Coded()
    changes.encode(torch_normal(generator(0, "rows"), 3, COUNT), 5, 7, coded)
    codes = compressed(coded.codes)
    sizes, some = torch.tensor([len(code) for code in codes]), torch.ones(3)
    answer = Answer(
        *(7, 6, 0, CLIENTS, some.double(), some.long(), some.long(), (torch.cat(codes),)),
        rounding=torch.tensor(coded.errors, dtype=torch.float64),
        sizes=sizes,
        layout=sent.layout,
    )
    return changes, answer


def test_a_reply_that_is_damaged_names_client_and_round() -> None:
    sent, base = Downlink({}, {"b": to_train((COUNT,))}), {"b": torch.zeros(COUNT)}
    changes, answer = answered(sent, base)
    request = TrainRequest(7, 6, 1.0, CLIENTS, uplink="int4", coding=ZSTD)
    ask = Ask(request, sent)
    assert AskReader().read(AskWriter().write(ask)).request.coding == ZSTD
    came = read_answer(write_answer(answer), ask)
    decode = partial(changes.decode, dtype=torch.float32)
    assert checked(came, sent.layout, read=decode).numbers.shape == (3, COUNT)
    wrong = came.numbers.clone()
    wrong[int(came.sizes[0]) + 40] ^= 1  # type: ignore[index]
    with pytest.raises(WireError, match=r"round 7.*client 4"):
        checked(replace(came, pieces=(wrong,)), sent.layout, read=decode)
    for coding, reply in (("none", answer), (ZSTD, replace(answer, sizes=None))):
        with pytest.raises(WireError, match="vectors"):
            read_answer(write_answer(reply), replace(ask, request=replace(request, coding=coding)))


def test_without_coding_messages_are_what_they_were() -> None:
    sent = Downlink({}, {"b": to_train((COUNT,))})
    ask = Ask(TrainRequest(7, 6, 1.0, CLIENTS, uplink="int4"), sent)
    assert read_json(AskWriter().write(ask), "config").keys() == HEADER
    _, answer = answered(sent, {"b": torch.zeros(COUNT)})
    assert "sizes" not in write_answer(replace(answer, sizes=None))["chunk"]
    assert int(packed_bytes([COUNT], "int4")) == len(packed("int4"))


def test_coding_of_full_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"wire.uplink_coding.*wire.uplink=float32"):
        WireConfig(downlink="int8", uplink_coding=ZSTD)
