"""Coding of what is sent: nothing is lost, and nothing is taken that is not what was sent."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import zstandard
from flwr.app import RecordDict

from fedraclora.config.settings import CompressionConfig
from fedraclora.engines.asks import AskWriter, read_ask
from fedraclora.engines.records import (
    add_weight_update,
    array_record,
    read_answer,
    read_array,
    read_json,
    read_weight_update,
    write_answer,
)
from fedraclora.errors import ConfigError, WireError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.coding import ZSTD, compressed, decompressed
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.quantized import ROUNDED, decode, encode, packed_bytes
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.weights.chain import CatchUp
from fedraclora.weights.replica import Replica
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.answers import TrainedAnswer
from fedraclora.wire.changes import ChangeCodec, CodedRows
from fedraclora.wire.exchange import Ask, TrainRequest, payload_bytes
from fedraclora.wire.reply import ExpectedReply, checked
from tests.common import accepted

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


def answered(
    sent: RoundInstructions, base: dict[str, torch.Tensor]
) -> tuple[ChangeCodec, TrainedAnswer]:
    changes, coded = ChangeCodec("int4", sent, base, CLIENTS), CodedRows()
    changes.encode(torch_normal(generator(0, "rows"), 3, COUNT), 5, 7, coded)
    codes = compressed(coded.codes)
    sizes, some = torch.tensor([len(code) for code in codes]), torch.ones(3)
    answer = TrainedAnswer(
        round_=7,
        version=6,
        first=0,
        clients=CLIENTS,
        losses=some.double(),
        samples=some.long(),
        steps=some.long(),
        pieces=(torch.cat(codes),),
        rounding=torch.tensor(coded.errors, dtype=torch.float64),
        sizes=sizes,
        layout=sent.layout,
    )
    return changes, answer


def test_a_reply_that_is_damaged_names_client_and_round() -> None:
    sent, base = RoundInstructions({}, {"b": to_train((COUNT,))}), {"b": torch.zeros(COUNT)}
    changes, answer = answered(sent, base)
    request = TrainRequest(7, 6, 1.0, CLIENTS, uplink="int4", coding=ZSTD)
    ask = Ask(request, sent)
    assert read_ask(AskWriter().write(ask)).request.coding == ZSTD
    came = read_answer(write_answer(answer), ask)
    assert isinstance(came, TrainedAnswer)
    wanted = ExpectedReply(7, 6, sent.layout, decode=partial(changes.decode, dtype=torch.float32))
    assert checked(came, ask, TrainedAnswer, wanted).numbers.shape == (3, COUNT)
    wrong = came.numbers.clone()
    wrong[int(came.sizes[0]) + 40] ^= 1  # type: ignore[index]
    with pytest.raises(WireError, match=r"round 7.*client 4"):
        checked(replace(came, pieces=(wrong,)), ask, TrainedAnswer, wanted)
    for coding, reply in (("none", answer), (ZSTD, replace(answer, sizes=None))):
        with pytest.raises(WireError, match="vector sizes"):
            read_answer(write_answer(reply), replace(ask, request=replace(request, coding=coding)))


def test_without_coding_messages_are_what_they_were() -> None:
    sent = RoundInstructions({}, {"b": to_train((COUNT,))})
    ask = Ask(TrainRequest(7, 6, 1.0, CLIENTS, uplink="int4"), sent)
    assert "coding" not in read_json(AskWriter().write(ask), "config")["request"]
    _, answer = answered(sent, {"b": torch.zeros(COUNT)})
    assert "sizes" not in write_answer(replace(answer, sizes=None))["chunk"]
    assert int(packed_bytes([COUNT], "int4")) == len(packed("int4"))


def test_coding_of_full_numbers_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compression.uplink_coding=zstd has no effect"):
        accepted("compression", CompressionConfig(downlink="int8", uplink_coding=ZSTD))
    with pytest.raises(ConfigError, match=r"compression.downlink_coding=zstd has no effect"):
        accepted("compression", CompressionConfig(uplink="int8", downlink_coding=ZSTD))


def sent_down(m: int = 70, n: int = 40, own: int = 5) -> RoundInstructions:
    """A factor that all are sent, and one of each client's own."""
    shared = decode(packed("int4", m * n), [m * n], "int4").float().reshape(m, n)
    return RoundInstructions(
        {}, {"B": to_train((m, n), shared), "c": to_train((own,), torch.ones(len(CLIENTS), own))}
    )


@pytest.mark.parametrize("clients", [1, 3])
def test_an_ask_is_coded_and_counted_as_it_is_sent(clients: int) -> None:
    """What is a client's own is not: it would have another size for each."""
    sent, request = sent_down(), TrainRequest(7, 6, 1.0, CLIENTS[:clients])
    ask = Ask(request, sent.select(torch.arange(clients)), "int4", coding=ZSTD)
    content = AskWriter().write(ask)
    count = sum(read_array(content, name).nbytes for name in ("arrays", "own"))
    assert count == payload_bytes(sent, 3, "int4", clients, ZSTD)
    assert count < payload_bytes(sent, 3, "int4", clients) - 100
    assert torch.equal(read_ask(content).own.dense["B"].draw(), sent.dense["B"].draw())
    plain = AskWriter().write(replace(ask, coding="none"))
    assert content["config"] == plain["config"]
    assert torch.equal(read_array(content, "own"), read_array(plain, "own"))


def test_an_ask_that_is_damaged_names_clients_and_round() -> None:
    ask = Ask(TrainRequest(7, 6, 1.0, CLIENTS), sent_down(), "int4", apart=True, coding=ZSTD)
    content = AskWriter().write(ask)
    frame = read_array(content, "arrays")
    for damaged in (flipped(frame, 60), frame[:-1], frame[1:], torch.cat([frame, frame[:1]])):
        wrong = RecordDict({**content, "arrays": array_record(damaged)})
        with pytest.raises(WireError, match=r"round 7, clients \[2, 4, 9\].*int4"):
            read_ask(wrong)


def flipped(frame: torch.Tensor, place: int) -> torch.Tensor:
    found = frame.clone()
    found[place] ^= 4
    return found


def linked(rounds: int, m: int = 60, n: int = 50) -> tuple[WeightHistory, CatchUp, Plan]:
    """Links of a few large numbers and many zeros, which coding makes very short."""
    B = torch.zeros(m, 4)
    B[0] = torch.tensor([1.0, -2.0, 0.5, 4.0])
    spec = SketchSpec("gaussian", "right", 4, n, seed=1, index=0)
    link = Link({"w": Term.of((B, spec), 0.75, "int8")})
    plan, base = Plan({"w": LayerView("linear", (m, n))}), {"w": torch.ones(m, n)}
    history, counted = WeightHistory(), CatchUp(base, 2, ZSTD)
    history.coding = ZSTD
    history.publish(base, 0)
    for version in range(1, rounds + 1):
        base = apply_link(base, link, plan)
        history.publish(base, version, link)
        counted.add(link)
    return history, counted, plan


def test_links_are_coded_counted_and_chosen_by_their_size_without() -> None:
    history, counted, plan = linked(3)
    update, client = history.since(0), torch.tensor([0])
    add_weight_update(content := RecordDict(), update)
    count = len(read_array(content, "update-numbers")) + 3 * 8
    assert int(counted.missing(client)[0]) == update.payload_bytes == count < 3 * 60
    assert int(counted.missing(client, coded=False)[0]) == 3 * (240 + 8 + 8)
    found = read_weight_update(content)
    assert found.coding == ZSTD
    assert found.payload_bytes == count
    replica = Replica(plan, torch.device("cpu"))
    replica.take({"w": torch.ones(60, 50)}, 0, None)
    assert replica.follow(found)
    # 47 links are 12,032 bytes without coding, and the weight is 12,000: it is sent whole.
    history, counted, _ = linked(47)
    assert not history.since(0).links
    assert int(counted.missing(client)[0]) == history.since(0).payload_bytes == 12_000
    again = CatchUp({"w": torch.ones(60, 50)}, 2, ZSTD)
    again.restore(counted.state())
    assert np.array_equal(again.sums, counted.sums)


def test_a_link_that_is_damaged_is_named_with_clients_and_round() -> None:
    history, _, _ = linked(2)
    ask = Ask(TrainRequest(7, 6, 1.0, CLIENTS), RoundInstructions())
    content = AskWriter().write(ask)
    add_weight_update(content, history.since(0))
    raw = read_array(content, "update-numbers")
    for place in (20, len(raw) - 2):  # of the first, and the second
        wrong = RecordDict({**content, "update-numbers": array_record(flipped(raw, place))})
        with pytest.raises(WireError, match=r"round 7, clients \[2, 4, 9\]: links/./1/terms/w"):
            read_weight_update(wrong)
