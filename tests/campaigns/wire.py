"""What clients and a server may send each other that they should not: mutants of real messages.

    python -m tests.campaigns.wire --times 30000

Of a reply either nothing that counts has changed, and the round is the one that it says; or its
client is left out by name, nobody else is, and the round is that of the others to the bit. A
downlink is read as it says or refused. The ledger stays readable in any case.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Error, Message, RecordDict
from torch import nn
from typing_extensions import override

from fedraclora.clients.worker import Worker
from fedraclora.codec import split
from fedraclora.data.clients import ChangedClients, PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.engines.asks import COEFFICIENTS, AskWriter, read_ask
from fedraclora.engines.records import (
    UPDATE,
    UPDATE_NUMBERS,
    add_weight_update,
    read_array,
    read_weight_update,
    write_answer,
)
from fedraclora.errors import ClientError, WireError
from fedraclora.experiments.faults.grid import become_a_task
from fedraclora.flower_internals import records_from_bytes, records_to_bytes
from fedraclora.protocol.coding import NONE, ZSTD, compressed, unframed
from fedraclora.protocol.method import Cohort, Draw, RoundInstructions, State
from fedraclora.protocol.plan import make_plan
from fedraclora.protocol.quantized import FULL, encode
from fedraclora.protocol.rank_budgets import uploaded_mask
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.run.ledger import Ledger, read_ledger
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.quantized import DownlinkRounding
from fedraclora.strategies.server.rows import Cost, ledger_row
from fedraclora.strategies.steps.scaffold import open_corrected
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree
from fedraclora.weights.update import BaseWeights, WeightHistory, WeightUpdate
from fedraclora.wire.answers import Answer, NoAnswer
from fedraclora.wire.changes import ChangeCodec
from fedraclora.wire.exchange import Ask
from fedraclora.wire.fields import LONGEST
from tests.campaigns.mutants import (
    Change,
    Random,
    array_bytes,
    array_values,
    header,
    header_text,
    pick,
    records,
    vector,
)
from tests.messages import answer_to

SEED, ROUND, CLIENTS, BUSY = 7, 3, 5, 2
MOMENTUM = LocalConfig(lr=0.1, steps=2, batch_size=4, momentum=0.5, optimizer_state="merge")
PLAIN = LocalConfig(lr=0.1, steps=2, batch_size=4)


def raw(content: RecordDict) -> bytes:
    """Write a message as it goes over the wire."""
    found: bytes = records_to_bytes(content)
    return found


def read(data: bytes) -> RecordDict:
    """Read it at the other end."""
    return records_from_bytes(data)


@dataclass
class Scene:
    """A round of a run: what was asked, and what honest clients answer.

    Attributes:
        name: For the record.
        exchange: With what is asked.
        messages: The same as it is sent.
        state: Of the method before it.
        replies: Of each message, as bytes.
        fails: Clients that fail honestly.
        old: Replies of the round before.
    """

    name: str
    exchange: Exchange
    messages: list[Message]
    state: State
    replies: list[bytes]
    fails: set[int]
    old: list[bytes]
    rest: dict[int, Outcome] = field(default_factory=dict)
    honest_: list[Outcome] = field(default_factory=list)

    def honest(self) -> Outcome:
        """What comes of the round where nobody does harm."""
        if not self.honest_:
            self.honest_.append(collected(self, self.answers()))
        return self.honest_[0]

    @property
    def chunks(self) -> list[tuple[Message, list[int]]]:
        """The messages, each with its clients."""
        asks = self.exchange.asks
        return [(m, ask.clients) for m, ask in zip(self.messages, asks, strict=True)]

    def heard(self, replies: list[Message]) -> list[tuple[Any, Answer | NoAnswer]]:
        """Replies as the grid of real hosts reads them; what answers no message is dropped."""
        asks = dict(zip((m.metadata.message_id for m in self.messages), self.exchange.asks))  # noqa: B905
        found: list[tuple[Any, Answer | NoAnswer]] = []
        for reply in replies:
            if (ask := asks.get(reply.metadata.reply_to_message_id)) is None:
                continue
            try:
                found.append((ask, answer_to(reply, ask)))
            except Exception as error:  # as the grid does
                found.append((ask, NoAnswer(f"its reply is refused: {error}")))
        return found

    def fresh(self) -> Exchange:
        """The exchange, before anything has come."""
        found = replace(self.exchange, replies=[], failures=[], received=0)
        found.reduced = self.exchange.reduced
        return found

    def answers(self) -> list[Message]:
        """The honest replies."""
        pairs = zip(self.chunks, self.replies, strict=True)
        return [Message(read(data), reply_to=message) for (message, _), data in pairs]

    def without(self, place: int) -> Outcome:
        """What must come of the round where the clients of one message are left out."""
        if place not in self.rest:
            answers = self.answers()
            message = self.chunks[place][0]
            answers[place] = Message(Error(2, "left out"), reply_to=message)
            self.rest[place] = collected(self, answers)
        return self.rest[place]


@dataclass
class Outcome:
    """What came of a round: uplinks, or the error that says that too many failed."""

    exchange: Exchange
    uplinks: Uplinks | None
    error: str = ""

    def same(self, other: Outcome) -> bool:
        """Whether the next state is the same, to the bit, and so is the row of the ledger."""
        if self.uplinks is None or other.uplinks is None:
            return self.uplinks is other.uplinks
        mine, others = (
            [
                o.uplinks.clients,
                o.uplinks.weights,
                o.uplinks.places,
                o.uplinks.stacked,
                o.uplinks.summed,
                o.uplinks.versions,
            ]
            for o in (self, other)
            if o.uplinks is not None
        )
        numbers = [(o.exchange.mean_loss, o.exchange.steps) for o in (self, other)]
        return numbers[0] == numbers[1] and all(
            a is b if a is None or b is None else torch.equal(a, b)
            for a, b in zip(mine, others, strict=True)
        )


def collected(scene: Scene, answers: list[Message]) -> Outcome:
    """Hand replies to the exchange."""
    exchange = scene.fresh()
    try:
        return Outcome(exchange, exchange.collect(scene.heard(answers)))
    except ClientError as error:
        return Outcome(exchange, None, str(error))


# ---- Scenes -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A scene in words: a method, its settings, and what stands beside it."""

    method: str
    changes: dict[str, Any] = field(default_factory=dict)
    local: LocalConfig = MOMENTUM
    cohort: int = CLIENTS
    chunk: int = 1
    reduce: bool = False
    ranks: bool = False
    variates: bool = False
    dtype: torch.dtype = torch.float32
    kinds: tuple[str, str] = (FULL, FULL)
    feedback: bool = False
    coding: str = NONE
    width: int = 6


SETTINGS = {
    "rows": Setting("fed_rac_lora", {"rank": 2, "alpha": 3.0}),
    "links of two rounds": Setting("fed_rac_lora", {"rank": 2, "merge_every": 3}),
    "rank budgets": Setting("fed_rac_lora", {"rank": 3}, ranks=True),
    "parts of a sketch": Setting("fed_rac_lora", {"rank": 2, "sketches": 2}),
    "both factors": Setting("fedavg_lora", {"rank": 2, "alpha": 3.0}),
    "own factors": Setting("fedsa_lora", {"rank": 2}),
    "three factors": Setting("fed_sb", {"rank": 2}),
    "own starts": Setting("hetlora", {"rank": 2}, ranks=True),
    "full weights": Setting("fedavg", dtype=torch.float64),
    "variates": Setting("fed_rac_lora", {"rank": 2}, local=PLAIN, variates=True),
    "a sum of one": Setting("fed_rac_lora", {"rank": 2}, cohort=1, reduce=True),
    "computed from the last link": Setting(
        "subspace_rac_lora", {"rank": 1, "merge_every": 1, "fresh": 0.0}
    ),
    "fewer bits": Setting("fed_rac_lora", {"rank": 2, "merge_every": 3}, kinds=("int8", "int4")),
    "budgets in fewer bits": Setting(
        "hetlora", {"rank": 2}, ranks=True, kinds=("int4", "bfloat16")
    ),
    "feedback of a pool": Setting(
        "pool_rac_lora", {"rank": 2, "pool": 2}, kinds=("int4", "int8"), feedback=True
    ),
    "after a rotation": Setting(
        "fed_rac_lora", {"rank": 6, "merge_every": 3}, kinds=("eden3", "eden2")
    ),
    "rotated, of a pool": Setting(
        "pool_rac_lora", {"rank": 3, "pool": 2}, kinds=("eden1", "eden4"), feedback=True
    ),
    "coded": Setting(
        "fed_rac_lora", {"rank": 3}, cohort=3, width=400, kinds=("int4", "int8"), coding=ZSTD
    ),
    "coded, both factors": Setting(
        "fedavg_lora", {"rank": 3}, cohort=3, width=200, kinds=("bfloat16", "int4"), coding=ZSTD
    ),
    "coded, of a pool": Setting(
        "pool_rac_lora",
        {"rank": 3, "pool": 2},
        cohort=3,
        width=400,
        kinds=("eden4", "int4"),
        coding=ZSTD,
    ),
    "sums of blocks": Setting("fed_rac_lora", {"rank": 2}, cohort=70, chunk=32, reduce=True),
}


@dataclass(frozen=True)
class Failing(ChangedClients):
    """Data of clients, one of whom has lost them."""

    client: int

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Samples by position, or an error."""
        if self.client in clients.tolist():
            raise OSError("no disk\nat all")
        return self.data.gather(clients, positions)


def task_of(clients: int, dtype: torch.dtype, width: int) -> Task:
    """7 -> width -> 4 with tanh; a client has two samples or three."""
    model = nn.Sequential(nn.Linear(7, width), nn.Tanh(), nn.Linear(width, 4)).to(dtype)
    for name, parameter in model.named_parameters():
        drawn = torch_normal(generator(SEED, name), *parameter.shape) / 2
        parameter.data.copy_(drawn)
    sizes = [2 + k % 2 for k in range(clients)]
    labels = torch.from_numpy(generator(SEED, "labels").integers(0, 4, sum(sizes)))
    x = torch_normal(generator(SEED, "x"), sum(sizes), 7).to(dtype)
    ends = np.cumsum([0, *sizes])
    parts = [np.arange(a, b) for a, b in pairwise(ends)]
    samples = Samples({"x": x}, labels)
    data: Any = PartitionedData.of(samples, parts)
    if clients > 1:
        data = Failing(data, clients - 1)
    return Task(model, ("2",), "cross_entropy", ("loss",), data, samples)


def scene_of(name: str) -> Scene:
    """Run the rounds before the one that is attacked, and have honest clients answer it."""
    setting = SETTINGS[name]
    method = METHODS[setting.method](**setting.changes)
    task = task_of(setting.cohort, setting.dtype, setting.width)
    plan = make_plan(task.model, task.head, head_policy="full", bias_policy="full")
    base = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    loop = LoopConfig(
        rounds=9, clients=setting.cohort, cohort=setting.cohort, chunk=setting.chunk, seed=SEED,
        dtype=str(setting.dtype).removeprefix("torch."), untrusted=True, min_clients=1,
        uplink=setting.kinds[0], downlink=setting.kinds[1], feedback=setting.feedback,
        uplink_coding=setting.coding, downlink_coding=setting.coding,
    )  # fmt: skip
    replica = BaseWeights(base)
    trainer = CohortTrainer(task, plan, setting.local, seed=SEED, device=torch.device("cpu"))
    worker, draw = Worker(trainer, replica), Draw(SEED)
    clients = torch.arange(setting.cohort)
    ranks = 1 + clients % 3 if setting.ranks else None
    cohort = Cohort(clients, torch.ones(len(clients), dtype=torch.float64), ranks)
    state, scene = method.initial_state(base, plan, draw), None
    rounding = DownlinkRounding(loop.downlink, SEED, loop.feedback)
    for round_ in range(1, ROUND + 1):
        sent = method.open_round(state, round_, cohort, draw)
        if setting.variates:
            sent = open_corrected(sent, state, lifted=True)
        sent = rounding.sent(sent, round_)
        replica.publish(state.base, round_ - 1)
        exchange = Exchange(
            sent, round_, round_ - 1, cohort, cohort, loop, reduce=setting.reduce, base=state.base
        )
        messages, writer = [], AskWriter()
        for i, ask in enumerate(exchange.ask()):
            content = writer.write(ask)
            messages.append(Message(content, 2, "train.cohort", group_id=str(round_)))
            messages[-1].metadata.__dict__["_message_id"] = f"{round_}/{i}"
        replies = [answered(worker, raw(m.content)) for m in messages]
        fails = {setting.cohort - 1} - {0}
        old = scene.replies if scene else replies
        scene = Scene(name, exchange, messages, state, replies, fails, old)
        outcome = collected(scene, scene.answers())
        if outcome.uplinks is None:
            raise RuntimeError(f"{name}: honest clients fail: {outcome.error}")
        if round_ < ROUND:
            after = method.close_round(state, sent, outcome.uplinks)
            state = rounding.closed(state, after, sent, round_)
    assert scene is not None  # there is more than one round
    return scene


def answered(worker: Worker, data: bytes) -> bytes:
    """What a client answers to a message, as bytes."""
    ask = read_ask(read(data))
    return raw(write_answer(worker.train(ask)))


# ---- Replies ------------------------------------------------------------------------------------

REPLY: dict[str, Change] = {
    "a value of the header": header("config"),
    "another value of the header": header("config"),
    "the text of the header": header_text("config"),
    "values of the array": array_values("arrays"),
    "bytes of the array": array_bytes("arrays"),
    "a vector": vector,
    "records": records,
}


@dataclass(frozen=True)
class Case:
    """A round in which one message is answered otherwise than by an honest client.

    Attributes:
        kind: What was done.
        place: Of the message.
        answers: All replies.
        content: What the reply became; None where it is another altogether.
    """

    kind: str
    place: int
    answers: list[Message]
    content: RecordDict | None = None


def changed(changes: list[Change], random: Random, content: RecordDict) -> RecordDict:
    """Make changes one after another, as long as what is left can go over a wire."""
    first = data = raw(content)
    for _ in range(20):
        for change in changes:
            try:
                change(random, content)
                data = raw(content)
            except Exception:  # an earlier change has broken what this one changes; or protobuf's
                break
        content = read(data)
        if data != first:
            break
    return content


def attack(scene: Scene, random: Random) -> Case:
    """Let the reply to one message become something else."""
    place = int(random.integers(len(scene.replies)))
    answers = scene.answers()
    message, _ = scene.chunks[place]
    kind = pick(random, [*REPLY, *REPLY, *REPLY, *WHOLE])
    content = None
    if kind in REPLY:
        changes = [REPLY[kind]] * pick(random, [1, 1, 1, 2, 3])
        content = changed(changes, random, answers[place].content)
        answers[place] = Message(content, reply_to=message)
    else:
        answers[place : place + 1] = WHOLE[kind](random, scene, place)
    if random.random() < 0.5:
        answers.reverse()
    return Case(kind, place, answers, content)


def error_reply(random: Random, scene: Scene, place: int) -> list[Message]:
    """An error, in words of any length and kind."""
    words = ["", "x" * 10**6, "no disk\n\x1b[2J\x00", "\ud800\u202e", "{}", "%s {0}"]
    error = Error(pick(random, [0, 2, 5, 1000, 1001, -1, 2**31]), pick(random, words))
    return [Message(error, reply_to=scene.chunks[place][0])]


def of_another(random: Random, scene: Scene, place: int) -> list[Message]:
    """The reply of another client, or its own of the round before."""
    data = pick(random, [scene.old[place], scene.replies[place - 1], scene.old[place - 1]])
    return [Message(read(data), reply_to=scene.chunks[place][0])]


def twice(random: Random, scene: Scene, place: int) -> list[Message]:
    """The same reply twice, and once as if it answered nobody's message."""
    found = [Message(read(scene.replies[place]), reply_to=scene.chunks[place][0]) for _ in range(3)]
    found[2].metadata.__dict__["_reply_to_message_id"] = pick(random, ["", "9/9", "x" * 5000])
    return found


def silence(random: Random, scene: Scene, place: int) -> list[Message]:
    """No reply."""
    del random, scene, place
    return []


WHOLE: dict[str, Callable[[Random, Scene, int], list[Message]]] = {
    "an error": error_reply,
    "another's reply": of_another,
    "the same reply twice": twice,
    "silence": silence,
}


def judged(scene: Scene, case: Case, ledger: Ledger) -> str:
    """Hold what came of a round against what must.

    Returns:
        ``refused`` or ``taken``.

    Raises:
        AssertionError: Saying what is wrong; any other exception is wrong, too.
    """
    outcome = collected(scene, case.answers)
    suspects = set(scene.chunks[case.place][1])
    failures = {f.client: f.reason for f in outcome.exchange.all_failures}
    must(failures.keys() <= suspects | scene.fails, f"others are blamed: {failures}")
    for text in [*failures.values(), *outcome.exchange.notes, outcome.error]:
        must(text.isprintable() and len(text) < 12 * LONGEST, f"a text is {text[:99]!r}")
    if outcome.uplinks is not None:
        row = ledger_row(outcome.exchange, scene.state, {"metrics": {}}, Cost(1, 2, 3), (0, 0))
        ledger.append(row | {"round": len(ledger.rows)}, sync=False)
    if suspects - scene.fails <= failures.keys() or "no client replied in time" in outcome.error:
        must(outcome.same(scene.without(case.place)), "the others' result is another one")
        return "refused"
    if case.content is None:
        must(outcome.same(scene.honest()), "what was no answer has changed the result")
    else:
        check_taken(scene, case.place, outcome, case.content)
    return "taken"


def must(right: bool, what: str) -> None:
    """Raise an AssertionError that says what is wrong."""
    if not right:
        raise AssertionError(what)


def check_taken(scene: Scene, place: int, outcome: Outcome, content: RecordDict) -> None:
    """See that a reply that was taken says what was asked, and counts for what it says."""
    got, honest = outcome.uplinks, scene.honest().uplinks
    if got is None or honest is None:
        raise AssertionError(f"too many failed, though the reply was taken: {outcome.error}")
    (told, chunk, numbers), (wanted, asked, _) = plain(content), plain(read(scene.replies[place]))
    must(all(isinstance(note, str) for note in told.pop("notes", [])), "notes")
    wanted.pop("notes", None)
    must(told.pop("failures", {}).keys() == wanted.pop("failures", {}).keys(), "others' failures")
    must(json.dumps(told) == json.dumps(wanted), f"the header says {told}")
    must(chunk["clients"] == asked["clients"], "of others")
    mine = torch.isin(got.clients, torch.tensor(np.frombuffer(chunk["clients"], np.int64)))
    samples = np.frombuffer(chunk["samples"], np.int64)
    must(np.array_equal(got.weights[mine].numpy(), samples), "other weights")
    exchange = scene.exchange
    if exchange.loop.uplink != FULL:
        clients = exchange.cohort.clients
        changes = ChangeCodec(exchange.loop.uplink, exchange.downlink, exchange.base, clients)
        raw_, who = torch.from_numpy(numbers), got.clients[mine]
        sizes = chunk.get("sizes") if exchange.loop.uplink_coding == ZSTD else None
        lengths = None if sizes is None else torch.from_numpy(np.frombuffer(sizes, np.int64).copy())
        numbers = changes.decode(raw_, who, got.rows().dtype, lengths).numpy()
    must(bool(np.isfinite(numbers).all()), "numbers that are none")
    if scene.exchange.reduced:
        blocks = [plain(read(data))[2] for data in scene.replies]
        blocks[place] = numbers
        total = np.concatenate(blocks).sum(axis=0)
        must(np.allclose(got.sum().numpy(), total, rtol=1e-9, atol=1e-9), "another sum")
        return
    must(torch.equal(got.rows()[~mine], honest.rows()[~mine]), "rows of others")
    mask = uploaded_mask(scene.exchange.downlink, torch.nonzero(mine).flatten())
    sent = got.rows()[mine] if mask is None else got.rows()[mine][mask]
    must(np.array_equal(sent.numpy().reshape(-1), numbers.reshape(-1)), "other numbers")


def plain(content: RecordDict) -> tuple[dict[str, Any], dict[str, Any], Any]:
    """Read header, vectors and numbers of a reply without the code that is tested."""
    config: Any = content["config"]
    arrays: Any = content["arrays"]
    chunk: Any = content["chunk"]
    return json.loads(config["header"]), dict(chunk), np.load(BytesIO(arrays["flat"].data))


# ---- Downlinks ----------------------------------------------------------------------------------

DOWN: dict[str, Change] = REPLY | {
    "a coefficient": array_values("arrays", COEFFICIENTS),
    "what clients do not share": array_values("own"),
    "a value of an update": header(UPDATE),
    "the text of an update": header_text(UPDATE),
    "values of an update": array_values(UPDATE_NUMBERS),
    "bytes of an update": array_bytes(UPDATE_NUMBERS),
}


FRAMES = {f"{what} of {i}" for what in ("values", "bytes") for i in ("the array", "an update")}


def check_instructions(scene: Scene, random: Random) -> str:
    """Let a message to a client become something else: it is refused, or means what it says.

    Returns:
        ``refused`` or ``taken``, each of a downlink.
    """
    place = int(random.integers(len(scene.chunks)))
    message, _ = scene.chunks[place]
    content = read(raw(message.content))
    history = WeightHistory()
    history.coding = scene.exchange.loop.downlink_coding
    history.publish(scene.state.base, 0)
    history.publish(scene.state.base, 1, scene.state.link)
    update = history.since(pick(random, [None, 0]))
    add_weight_update(content, update)
    kind = pick(random, list(DOWN))
    content = changed([DOWN[kind]] * pick(random, [1, 1, 2]), random, content)
    try:
        ask = read_ask(content)
        found = update
        if UPDATE in content:
            found = read_weight_update(content)
    except WireError as error:
        must(str(error).isprintable() and len(str(error)) < 12 * LONGEST, "the error's text")
        return "refused"
    if kind in FRAMES:
        check_frames(scene.exchange.asks[place], ask, update, found)
    loop = scene.exchange.loop
    again = AskWriter().write(ask)
    for record in ("config", "chunk"):
        came, back = (dict(c[record]) for c in (content, again))  # type: ignore[arg-type]
        if record == "config":
            came, back = ({"header": json.loads(str(c["header"]))} for c in (came, back))
        must(says(came, back), f"{record}: {came} is read as {back}")
    if loop.downlink != FULL:  # a scale may be larger than it need be
        read_again = read_ask(again).own
        pairs = zip(tensors(ask.own), tensors(read_again), strict=True)
        same = (np.array_equal(came, back, equal_nan=True) for came, back in pairs)
        must(all(same), "numbers are read as others")
        return "taken"
    for record in ("arrays", "own"):
        for key in again.get(record, ()):
            came, back = (c[record][key].numpy() for c in (content, again))  # type: ignore[index, union-attr]
            same = np.array_equal(came.astype(back.dtype), back, equal_nan=True)
            must(same, f"{record} is read as another one")
    return "taken"


def says(came: Any, back: Any) -> bool:
    """Whether what was read says all that came; what has its default is left out."""
    if isinstance(came, dict) and isinstance(back, dict):
        left = [came[key] for key in came.keys() - back.keys()]
        alike = all(key in came and says(came[key], value) for key, value in back.items())
        return alike and all(isinstance(each, bytes) or each in DEFAULTS for each in left)
    return bool(came == back)


DEFAULTS: list[Any] = [None, True, False, 0, 1, [], {}, FULL, NONE]


def check_frames(honest: Ask, found: Ask, sent: WeightUpdate, came: WeightUpdate) -> None:
    """See that what was sent as a frame is what was read, where no header has changed."""
    for coding, whole, now in (
        (honest.coding, *(written(replace(ask, coding=NONE)) for ask in (honest, found))),
        (sent.coding, *(split(update)[0] for update in (sent, came))),
    ):
        frames = written(honest) if whole.keys() == {"flat"} else split(sent, coding=coding)[0]
        for name, frame in frames.items():
            if len(frame) < len(whole[name]):
                must(torch.equal(whole[name], now[name]), f"a frame of {name} is read as another")


def written(ask: Ask) -> Tree:
    """The array that clients share."""
    return {"flat": read_array(AskWriter().write(ask), "arrays")}


def tensors(downlink: RoundInstructions) -> list[torch.Tensor]:
    """Every tensor that is sent."""
    return [f.numbers for f in downlink.named.values() if f.numbers is not None]


# ---- The campaign -------------------------------------------------------------------------------


@contextmanager
def only_errors(*loggers: str) -> Iterator[None]:
    """Keep warnings of these loggers away: of honest failures, of records in others' places."""
    before = {name: logging.getLogger(name).level for name in loggers}
    for name in before:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)


def campaign(
    times: int, names: Sequence[str] = tuple(SETTINGS), first: int = 0, tell: bool = False
) -> Counter[str]:
    """Try mutants, of replies and (every fifth) of downlinks; give how many were what.

    Args:
        times: How many.
        names: Of `SETTINGS`, in turn.
        first: Number of the first mutant: each is drawn from its own.
        tell: Whether to print what is wrong, and go on.
    """
    become_a_task()
    scenes = [scene_of(name) for name in names]
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as made, only_errors("fedraclora.clients.worker", "flwr"):
        ledger = Ledger(Path(made) / "ledger.jsonl")
        for number in range(first, first + times):
            scene, random = scenes[number % len(scenes)], generator(SEED, "mutant", number)
            case = None
            try:
                if number // len(scenes) % 5 == 4:
                    verdict = f"downlink {check_instructions(scene, random)}"
                else:
                    case = attack(scene, random)
                    verdict = f"reply {judged(scene, case, ledger)}"
            except Exception:
                if not tell:
                    raise
                what = "a downlink" if case is None else case.kind
                sys.stdout.write(
                    f"mutant {number} ({scene.name}, {what}): {traceback.format_exc()}"
                )
                verdict = "wrong"
            counts[verdict] += 1
        rows = read_ledger(Path(made) / "ledger.jsonl")
        must(len(rows) == len(ledger.rows), "the ledger has lost rows")
        must(all(b" " <= bytes([b]) <= b"~" for b in set(ledger_bytes(made))), "control characters")
    return counts


def frames(times: int, count: int = 6000) -> Counter[str]:
    """Change bytes of coded numbers: they are refused, or still the same; give how many were what.

    Args:
        times: How many.
        count: Of numbers.
    """
    counts: Counter[str] = Counter()
    for number in range(times):
        kind = ("bfloat16", "int8", "int4", "eden4")[number % 4]
        frame, whole = (made.numpy() for made in frame_of(kind, count))
        random, damaged = generator(SEED, "frame", number), frame
        for _ in range(pick(random, [1, 1, 1, 2, 5])):
            at = int(random.integers(min(len(damaged), pick(random, [40, len(damaged)]))))
            byte, piece = np.uint8(random.integers(256)), frame[int(random.integers(len(frame))) :]
            change = int(random.integers(4))
            middle = (damaged[at : at + 1] ^ byte, damaged[:0], [byte], piece[:40])[change]
            end = damaged[at + (1, 1, 0, 40)[change] :]
            damaged = np.concatenate([damaged[:at], middle, end]).astype(np.uint8)
        try:
            found = unframed(torch.from_numpy(damaged), len(whole)).numpy()
        except WireError:
            counts["frame refused"] += 1
        else:
            must(len(damaged) == len(whole) or np.array_equal(found, whole), f"frame {number}")
            counts["frame taken"] += 1
    return counts


@cache
def frame_of(kind: str, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Normal numbers, coded and not."""
    rng = generator(SEED, kind)
    whole = encode(torch_normal(rng, count), [count], kind, rng, again=False)
    return compressed([whole])[0], whole


def ledger_bytes(folder: str) -> bytes:
    """The bytes of a ledger, but for the ends of its lines."""
    return (Path(folder) / "ledger.jsonl").read_bytes().replace(b"\n", b"")


def main() -> int:
    """Run the campaign; the status is 1 if a mutant came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=30_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="what the names of settings begin with")
    words = parser.parse_args()
    names = [name for name in SETTINGS if name.startswith(words.only)]
    counts = campaign(words.times, names, words.first, tell=True) + frames(words.times)
    told = ", ".join(f"{what}: {count}" for what, count in sorted(counts.items()))
    sys.stdout.write(f"{told}\n")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
