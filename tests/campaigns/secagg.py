"""What clients and a server of secure aggregation may send each other that they should not.

    python -m tests.campaigns.secagg --times 2000

Half of the trials have clients that send what they like at one stage, half a server that asks what
it likes. Protocol, messages and checks are the real ones; only training is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa, x25519
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedraclora.clients.answers import ReplyCache
from fedraclora.clients.secure import answer_stage, masked_vectors, of_updates
from fedraclora.engines.asks import AskWriter, read_ask
from fedraclora.engines.records import write_answer
from fedraclora.errors import FedRacLoraError, RoundLostError
from fedraclora.experiments.faults.grid import become_a_task
from fedraclora.privacy.secagg import SecAgg, SecAggTerms
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.method import Cohort
from fedraclora.rng import generator
from fedraclora.run.client_state import ClientStore
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.steps.secure import SecureSum
from fedraclora.strategies.steps.unmask import CulpritError
from fedraclora.wire.answers import Answer, NoAnswer
from fedraclora.wire.exchange import Ask, Stage
from fedraclora.wire.secagg import (
    LARGEST,
    Words,
    as_words,
    mark,
    seal,
    shared_key,
    signed,
)
from tests.messages import answer_to, stage_in

STAGES = ("keys", "shares", "masked", "unmask")
CLIP, WEIGHT, SHAPE = 2.0, 7, (3, 2)
ROUND = 4
Random = np.random.Generator


def pem(key: Any) -> str:
    """A public key as text."""
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    found: bytes = key.public_key().public_bytes(serialization.Encoding.PEM, form)
    return found.decode()


FOREIGN_KEYS = [
    pem(ec.generate_private_key(ec.SECP256R1())),
    pem(ec.generate_private_key(ec.SECP521R1())),
    pem(ec.generate_private_key(ec.BrainpoolP384R1())),
    pem(rsa.generate_private_key(65537, 1024)),
    pem(ed25519.Ed25519PrivateKey.generate()),
    pem(x25519.X25519PrivateKey.generate()),
]


def deep(levels: int = 300) -> Any:
    """A list in a list in a list."""
    found: Any = []
    for _ in range(levels):
        found = [found]
    return found


JUNK: list[Any] = [
    None,
    0,
    -1,
    2**70,
    1.5,
    True,
    "",
    "text",
    "zz" * 40,
    "\x00" * 60,
    "ab" * 52,
    "é" * 30,
    "x" * 5000,
    [],
    {},
    [[1], [2]],
    {"mask": 1},
    {"0": "ab"},
    deep(),
    *FOREIGN_KEYS,
]


class Client:
    """One client and its disk; what it trains is a vector that it has drawn.

    Args:
        number: Its id.
        fewest: Clients that a round has at the least.
        folder: Where it keeps its answers; None: only in memory, and no answer is repeated.
    """

    def __init__(self, number: int, fewest: int, folder: Path | None = None) -> None:
        draw = generator(0, "campaign", number)
        update = torch.from_numpy(draw.standard_normal(6))
        longest = CLIP * (1 if number % 2 else 1 + 1e-7)  # as rounding may leave it
        self.number, self.weight = number, float(draw.integers(1, WEIGHT + 1))
        self.update = update / update.norm() * longest
        self.store, self.terms = (
            ClientStore(),
            SecAggTerms(SecAgg(CLIP, max_weight=WEIGHT), "samples", fewest),
        )
        self.folder = folder

    def answer(self, content: RecordDict) -> RecordDict:
        """Answer a message, as a node does."""
        ask = read_ask(content)
        if ask.stage is None:
            raise FedRacLoraError("this client masks what it sends")
        if self.folder is None:
            return write_answer(self.said(ask, ask.stage))
        once = ReplyCache(self.folder, 10, ask, "0")
        if (answer := once.stored_reply()) is None:
            once.keep(answer := self.said(ask, ask.stage))
        return write_answer(answer)

    def said(self, ask: Ask, stage: Stage) -> Answer:
        """What it answers."""
        if stage.name != "masked":
            return answer_stage(ask.request, stage, self.store, self.terms)
        weights = torch.tensor([self.weight], dtype=torch.float64)
        cut = torch.tensor([float(self.update.norm()) > CLIP])
        trained = (torch.tensor([self.number]), self.update[None], weights, cut)
        vectors = of_updates(ask.request, stage, self.terms, trained)
        return masked_vectors(ask.request, stage, self.store, vectors, {})

    def whole(self, step: float) -> Words:
        """What it hides."""
        norm = float(self.update.norm())
        update = self.update * (CLIP / norm) if norm > CLIP else self.update
        weight = torch.tensor([self.weight], dtype=torch.float64)
        cut = torch.tensor([float(norm > CLIP)])
        found: Words = as_words(torch.cat([update * self.weight / step, weight, cut])[None])[0]
        return found

    @property
    def memory(self) -> dict[str, Any]:
        """What it remembers: a hostile client may do with it what it likes."""
        found: dict[str, Any] = json.loads(self.store.secrets.get(self.number, b"{}"))
        return found


@dataclass
class Wire:
    """Carries messages to clients in this process.

    Attributes:
        clients: By id.
        bend: Does what it likes with the replies of some; None: nothing.
        asked: Every message, by stage and client.
    """

    clients: dict[int, Client]
    bend: Callable[[str, Client, Message], list[Message]] | None = None
    asked: dict[tuple[str, int], RecordDict] = field(default_factory=dict)
    ids: int = 0

    def __call__(self, asks: Iterable[Ask]) -> list[tuple[Ask, Answer | NoAnswer]]:
        came: list[tuple[Ask, Answer | NoAnswer]] = []
        for ask in asks:
            self.ids += 1
            message = Message(AskWriter().write(ask), 2, "train.cohort")
            message.metadata.__dict__["_message_id"] = str(self.ids)
            client = self.clients[ask.clients[0]]
            name = "" if ask.stage is None else ask.stage.name
            self.asked[name, client.number] = copy.deepcopy(message.content)
            try:
                found = [Message(client.answer(message.content), reply_to=message)]
            except FedRacLoraError as error:
                found = [Message(Error(2, str(error)), reply_to=message)]
            if self.bend is not None:
                found = self.bend(name, client, found[0])
            came += [(ask, heard(reply, ask)) for reply in found]
        return came


def heard(reply: Message, ask: Ask) -> Answer | NoAnswer:
    """A reply as the grid of real hosts reads it."""
    try:
        return answer_to(reply, ask)
    except Exception as error:  # as the grid does
        return NoAnswer(f"its reply is refused: {error}")


def stage_of(content: RecordDict) -> Stage:
    """The stage of a message."""
    found = stage_in(content)
    assert found is not None
    return found


def said_in(content: RecordDict, record: str) -> dict[str, Any]:
    """What the JSON of a record says, if it is there."""
    found: dict[str, Any] = json.loads(str(dict(content.get(record, {})).get("header", "{}")))
    return found


def put_stage(content: RecordDict, stage: Stage) -> None:
    """Write it in the place of the one that a message has."""
    plain: dict[str, Any] = {"name": stage.name, "settings": stage.settings}
    plain["data"] = {str(client): said for client, said in stage.data.items()}
    asked = "secure" in content
    whole = plain if asked else said_in(content, "config") | {"stage": plain}
    content["secure" if asked else "config"] = ConfigRecord({"header": json.dumps(whole)})


def exchange_of(clients: list[int]) -> Exchange:
    """A train exchange with some clients, one message each."""
    become_a_task()
    loop = LoopConfig(9, 100, len(clients), 1, 5, "samples", untrusted=True, min_clients=3)
    cohort = Cohort(torch.tensor(clients), torch.ones(len(clients)).double())
    downlink = RoundInstructions(dense={"w": to_train(SHAPE, start=torch.full(SHAPE, 0.25))})
    exchange = Exchange(downlink, ROUND, 0, cohort, cohort, loop, clip=CLIP)
    exchange.ask()
    return exchange


def sum_of(secure: SecureSum, wire: Wire) -> tuple[Exchange, Any]:
    """One attempt at the round: the exchange, and the sum or the error."""
    exchange = exchange_of(sorted(wire.clients))
    base = {"w": torch.zeros(SHAPE)}
    try:
        return exchange, secure.receive(wire, exchange, base)
    except FedRacLoraError as error:
        return exchange, error


# ---- Clients that send what they like -----------------------------------------------------------


def leaves(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where the plain values of nested JSON are."""
    if isinstance(value, dict):
        return [p for k, v in value.items() for p in leaves(v, (*path, k))] or [path]
    if isinstance(value, list):
        return [p for k, v in enumerate(value) for p in leaves(v, (*path, k))] or [path]
    return [path]


def put(value: Any, path: tuple[Any, ...], new: Any) -> Any:
    """The same with another value at a place."""
    if not path:
        return new
    found = copy.copy(value)
    found[path[0]] = put(found[path[0]], path[1:], new)
    return found


def at(value: Any, path: tuple[Any, ...]) -> Any:
    """The value at a place."""
    for key in path:
        value = value[key]
    return value


def bent_data(said: Any, draw: Random) -> Any:  # noqa: PLR0911
    """JSON that is wrong somewhere."""
    places = leaves(said)
    place = places[draw.integers(len(places))]
    kind = draw.integers(8)
    old = at(said, place)
    if kind == 0:
        return JUNK[draw.integers(len(JUNK))]
    if kind == 1 and place:
        found = copy.deepcopy(said)
        del at(found, place[:-1])[place[-1]]
        return found
    if kind == 2 and isinstance(said, dict):
        return said | {str(draw.integers(9)): JUNK[draw.integers(len(JUNK))]}
    if kind == 3:
        return put(said, place, at(said, places[draw.integers(len(places))]))
    if kind in {4, 5} and isinstance(old, str) and old:
        i = int(draw.integers(len(old)))
        changed = [old[:i], old[:i] + chr(48 + int(draw.integers(10))) + old[i + 1 :], old + old]
        return put(said, place, changed[draw.integers(3)])
    if kind == 6 and isinstance(said, dict) and said:
        return dict(zip(said, [*list(said.values())[1:], *list(said.values())[:1]], strict=True))
    return put(said, place, JUNK[draw.integers(len(JUNK))])


def resealed(client: Client, said: Any, draw: Random) -> Any:
    """Shares that open and have the right marks, but are of no secret, or of another."""
    memory, found = client.memory, {}
    some = draw.integers(1, len(said) + 1)
    for place, (other, sealed) in enumerate(said.items()):
        found[other] = sealed
        if place < some:
            garbage = ["".join(f"{b:02x}" for b in draw.bytes(n)) for n in (52, 68)]
            garbage = garbage if draw.integers(2) else ["aa", "zz"]
            key = shared_key(memory["box"], memory["keys"][other]["box"])
            text = seal(key, client.number, int(other), garbage)
            found[other] = [text, *map(mark, garbage)]
    return found


@dataclass
class Bender:
    """Bends the replies of hostile clients at one stage.

    Attributes:
        hostile: Who they are.
        stage: Where.
        draw: What they do.
        shift: What they have added to masked vectors, modulo 2^32.
        did: Words for the report.
    """

    hostile: set[int]
    stage: str
    draw: Random
    shift: Words = field(default_factory=lambda: np.zeros(8, dtype=np.uint32))
    did: list[str] = field(default_factory=list)

    def __call__(self, stage: str, client: Client, message: Message) -> list[Message]:
        """What comes instead of a reply."""
        if client.number not in self.hostile or stage != self.stage or message.has_error():
            return [message]
        ways = [self.twice, self.silent, self.error, self.header, self.others, self.records]
        ways += [self.words] * 6 if stage == "masked" else [self.data] * 12
        ways += [self.complain] * 4 if stage == "masked" else []
        way = ways[self.draw.integers(len(ways))]
        self.did.append(f"{stage} {way.__name__}")
        return way(client, message)

    def said(self, message: Message) -> Stage:
        """What a reply says."""
        return stage_of(message.content)

    def data(self, client: Client, message: Message) -> list[Message]:
        """JSON that is wrong somewhere, or right and of no secret."""
        stage = self.said(message)
        for number, said in stage.data.items():
            if stage.name == "shares" and not self.draw.integers(3):
                stage.data[number] = resealed(client, said, self.draw)
            elif stage.name == "shares" and not self.draw.integers(3):
                some = int(self.draw.choice([1, 2, len(said), len(said)]))
                bad = {c: ["garbage", *said[c][1:]] for c in [*said][:some]}
                stage.data[number] = said | bad
            else:
                stage.data[number] = bent_data(said, self.draw)
        put_stage(message.content, stage)
        if not self.draw.integers(8):
            text = ["no json", "[" * 5000, "NaN", 5][self.draw.integers(4)]
            message.content["config"] = ConfigRecord({"header": text})  # type: ignore[dict-item]
        return [message]

    def twice(self, client: Client, message: Message) -> list[Message]:
        """The same reply twice."""
        return [message, message]

    def silent(self, client: Client, message: Message) -> list[Message]:
        """No reply."""
        return []

    def error(self, client: Client, message: Message) -> list[Message]:
        """An error of any code."""
        error = Error(int(self.draw.choice([0, 2, 5, 1000])), "it is the fault of client 1")
        return [Message(error, reply_to=message)]

    def header(self, client: Client, message: Message) -> list[Message]:
        """A header that blames others, or is none."""
        whole = said_in(message.content, "config")
        texts = [
            json.dumps(whole | {"failures": {str(c): "blamed" for c in range(9)}}),
            json.dumps(whole | {"round_": 1}),
            json.dumps(whole | {"failures": 5}),
            json.dumps(whole | {"is": "trained"}),
            json.dumps({"failures": {"x": []}}),
            "no json",
            "[]",
        ]
        message.content["config"]["header"] = texts[self.draw.integers(len(texts))]
        return [message]

    def others(self, client: Client, message: Message) -> list[Message]:
        """The answer of another client, or for all of them."""
        stage = self.said(message)
        mine = next(iter(stage.data.values()), {"unopened": [1]})
        stage.data.update(dict.fromkeys(range(9), mine))
        put_stage(message.content, stage)
        return [message]

    def records(self, client: Client, message: Message) -> list[Message]:
        """Without a record."""
        names = list(message.content)
        del message.content[names[self.draw.integers(len(names))]]
        return [message]

    def words(self, client: Client, message: Message) -> list[Message]:
        """Masked vectors of other numbers, types, shapes and clients."""
        if "arrays" not in message.content:
            return [message]
        row: Words = message.content["arrays"]["flat"].numpy()
        if not len(row):
            return [message]
        kind, flat = int(self.draw.integers(8)), row
        if kind == 0:
            flat = self.draw.integers(0, 2**32, row.shape).astype(np.uint32)
            self.shift = self.shift + (flat - row)[0]
        elif kind == 1:
            flat = row + np.uint32(1)
            self.shift = self.shift + (flat - row)[0]
        elif kind == 2:
            flat = row.astype([np.int64, np.float32, np.uint8, np.float64][self.draw.integers(4)])
        elif kind == 3:
            flat = [row[0], row[:, 1:], row[None], row[:0]][self.draw.integers(4)]
        elif kind == 4:
            flat = np.concatenate([row, row])
            ids = [[client.number] * 2, [client.number, 1]][self.draw.integers(2)]
            message.content["chunk"]["clients"] = np.array(ids, np.int64).tobytes()
        elif kind == 5:
            message.content["chunk"]["clients"] = np.array([1], np.int64).tobytes()
        elif kind == 6:
            message.content["chunk"]["clients"] = [b"", b"abc", "text", 7][self.draw.integers(4)]
        else:
            message.content["arrays"] = ArrayRecord()
            return [message]
        record = ArrayRecord()
        record["flat"] = Array(np.ascontiguousarray(flat))
        message.content["arrays"] = record
        return [message]

    def complain(self, client: Client, message: Message) -> list[Message]:
        """A complaint about whomever, with or without a vector."""
        near = [c for c in range(9) if c != client.number]
        closed = [near, near[:1], [client.number], ["a"], 5, [], {"a": 1}, [1.5]]
        stage = Stage("masked", {}, {client.number: {"unopened": closed[self.draw.integers(8)]}})
        put_stage(message.content, stage)
        if self.draw.integers(2):
            record = ArrayRecord()
            record["flat"] = Array(np.zeros((0, 7), dtype=np.uint32))
            message.content["arrays"] = record
            message.content["chunk"]["clients"] = b""
        return [message]


def hostile_clients(seed: int) -> str:
    """One round with one or two clients that send what they like; say what came of it.

    Raises:
        AssertionError: If an honest client is blamed, or a sum is not that of those in it.
    """
    draw = generator(seed, "hostile clients")
    clients = {
        int(c): Client(int(c), 3) for c in draw.choice(9, draw.integers(5, 8), replace=False)
    }
    hostile = {int(c) for c in draw.choice(sorted(clients), 1 + draw.integers(2), replace=False)}
    bend = Bender(hostile, STAGES[draw.integers(4)], draw)
    secure = SecureSum(SecAgg(CLIP, max_weight=WEIGHT))
    wire = Wire(clients, bend)
    for _ in range(3):
        exchange, got = sum_of(secure, wire)
        blamed = {f.client for f in exchange.failures} | {*secure.banned}
        assert blamed <= hostile, f"{bend.did}: {exchange.failures}, {secure.banned}"
        if isinstance(got, RoundLostError) or not isinstance(got, Exception):
            break
        if draw.integers(2):  # it was a passing fault
            wire.bend = None
    if isinstance(got, Exception):
        assert isinstance(got, FedRacLoraError)
        if isinstance(got, CulpritError):
            assert got.client in hostile
        return f"{type(got).__name__}"
    members = got.clients.tolist()
    step = secure.config.step(len(clients), CLIP, LARGEST)
    total = np.sum([clients[c].whole(step) for c in members], axis=0, dtype=np.uint32) + bend.shift
    whole = signed(total.astype(np.uint32))
    start = torch.full((6,), 0.25, dtype=torch.float64)
    wanted = start * float(whole[-2]) + whole[:-2].double() * step
    assert torch.equal(got.summed, wanted), bend.did
    assert {*clients} - hostile <= {*members}, f"{bend.did}: {exchange.failures}"
    return "the sum"


# ---- A server that asks what it likes -----------------------------------------------------------


@dataclass
class Victim:
    """What one honest client has given away.

    Attributes:
        client: The client.
        vectors: Its masked vectors of the round.
        shares: Of each neighbour, the kinds of shares that it gave.
    """

    client: Client
    vectors: set[bytes] = field(default_factory=set)
    shares: dict[str, set[str]] = field(default_factory=dict)

    def ask(self, content: RecordDict) -> str:
        """Ask it once more, and note what it gives.

        Raises:
            AssertionError: If it gives what must not be given.
        """
        try:
            reply = self.client.answer(content)
        except Exception:  # a node answers with an error, whatever it is
            return "refused"
        said = stage_of(reply)
        if said.name == "masked":
            self.vectors |= {row.tobytes() for row in reply["arrays"]["flat"].numpy()}
        for data in said.data.values() if said.name == "unmask" else ():
            for kind, given in data.items():
                for owner in given:
                    self.shares.setdefault(owner, set()).add(kind)
        for data in said.data.values() if said.name == "shares" else ():
            assert len(data) >= self.client.terms.neighbours
        assert len(self.vectors) <= 1, "two masked vectors of one round"
        assert all(len(kinds) == 1 for kinds in self.shares.values()), "two kinds of shares"
        return "answered" if said.data or said.name == "masked" else "refused"


def bent_question(content: RecordDict, others: list[RecordDict], draw: Random) -> RecordDict:  # noqa: PLR0911
    """A message of the server's that is not what it should be."""
    found = copy.deepcopy(content)
    stage = stage_of(found)
    kind = int(draw.integers(9))
    if kind == 0:
        return found  # the very same
    if kind == 1:
        return copy.deepcopy(others[draw.integers(len(others))])
    if kind == 2:
        header = json.loads(str(found["config"]["header"]))
        header["request"]["round_"] = int(draw.choice([-1, 0, 1, ROUND - 1, ROUND, ROUND + 1, 11]))
        found["config"]["header"] = json.dumps(header)
        return found
    if kind == 3 and "arrays" in found:
        record = ArrayRecord()
        record["flat"] = Array(found["arrays"]["flat"].numpy() + np.float32(1))
        found["arrays"] = record
        return found
    if kind == 4:
        settings = dict(stage.settings) | {"step": float(draw.choice([1e-30, 1.0, 1e9]))}
        put_stage(found, Stage(stage.name, settings, stage.data))
        return found
    if kind == 5:
        put_stage(found, Stage(STAGES[draw.integers(4)], stage.settings, stage.data))
        return found
    data = {c: swapped(said, draw) for c, said in stage.data.items()}
    put_stage(found, Stage(stage.name, stage.settings, data))
    return found


def swapped(said: Any, draw: Random) -> Any:
    """Other neighbours, fewer of them, or who is in the sum told otherwise; or junk."""
    found, kind = copy.deepcopy(said), int(draw.integers(4))
    if isinstance(found, dict) and "alive" in found and kind < 3:
        found["alive"], found["gone"] = [
            (found["gone"], found["alive"]),
            (found["alive"][1:], found["gone"] + found["alive"][:1]),
            (found["alive"][:2], found["gone"]),
        ][kind]
        return found
    if isinstance(found, dict) and "shares" in found and kind < 3 and found["shares"]:
        first = next(iter(found["shares"]))
        del found["shares"][first]
        found["without"] += [int(first)] if kind else []
        return found
    if isinstance(found, dict) and found and kind < 2:
        return dict(list(found.items())[: draw.integers(len(found))])
    return bent_data(found, draw)


def hostile_server(seed: int, folder: Path) -> str:
    """One client that is asked for a round, and again and again for other ones.

    Raises:
        AssertionError: If it gives two vectors of a round, two kinds of shares of one neighbour,
            shares of its secrets to fewer neighbours than it insists on, or anything but an error
            on purpose.
    """
    draw = generator(seed, "hostile server")
    number = 5
    clients = {c: Client(c, number, folder / str(c) if c == 2 else None) for c in range(number)}
    wire, until = Wire(clients), int(draw.integers(5))
    reached: list[str] = []

    def stops(stage: str, client: Client, message: Message) -> list[Message]:
        """The round as it should be, up to some stage."""
        if stage not in reached:
            reached.append(stage)
        return [message] if len(reached) <= until else []

    wire.bend = stops
    victim = Victim(clients[2])
    plain = Client.answer

    def watched(self: Client, content: RecordDict) -> RecordDict:
        reply = plain(self, content)
        if self.number == 2 and (said := stage_of(reply)):
            if said.name == "masked":
                victim.vectors.update(row.tobytes() for row in reply["arrays"]["flat"].numpy())
            for data in said.data.values() if said.name == "unmask" else ():
                for kind, given in data.items():
                    for owner in given:
                        victim.shares.setdefault(owner, set()).add(kind)
        return reply

    clients[2].answer = watched.__get__(clients[2])  # type: ignore[method-assign]
    sum_of(SecureSum(SecAgg(CLIP, max_weight=WEIGHT)), wire)
    del clients[2].answer  # type: ignore[method-assign]
    seen = [content for (_, client), content in wire.asked.items() if client == 2]
    before = {*victim.vectors}
    said = Counter[str]()
    for _ in range(int(draw.integers(1, 5))):
        said[victim.ask(bent_question(seen[draw.integers(len(seen))], seen, draw))] += 1
    if before:
        assert victim.vectors == before, "another masked vector of a round"
        assert victim.ask(wire.asked["masked", 2]) == "answered", "its answer is not repeated"
    return "answered" if said["answered"] else "refused"


# ---- The campaign -------------------------------------------------------------------------------


def campaign(times: int, first: int = 0) -> Counter[str]:
    """Run a number of trials; count what came of them.

    Args:
        times: Trials.
        first: The seed of the first.

    Raises:
        AssertionError: Of the first trial in which something does not hold, with its seed.
    """
    found = Counter[str]()
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + times):
            try:
                if seed % 2:
                    found[f"hostile clients: {hostile_clients(seed)}"] += 1
                else:
                    found[f"hostile server: {hostile_server(seed, Path(folder) / str(seed))}"] += 1
            except Exception as error:
                raise AssertionError(f"trial {seed}: {error!r}") from error
    return found


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    with suppress(AttributeError):
        os.fsync = lambda handle: None  # type: ignore[assignment]  # nothing is killed here
    for text, count in sorted(campaign(given.times, given.first).items()):
        sys.stdout.write(f"{count:6d}  {text}\n")


if __name__ == "__main__":
    main()
