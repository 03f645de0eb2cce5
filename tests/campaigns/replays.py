"""Replies that answer another question than theirs, by the thousand: none counts, each is named.

    python -m tests.campaigns.replays --times 5000

A run of each setting has the replies of some clients replaced by what answered another run, another
round, another client or a question of another kind, or by the question itself; honest ones come
twice and in another order, and nodes are asked twice, or what they were asked long ago. Then each
row of the ledger and the weights are those of a run without these clients, to the bit, and each is
left out by name.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import lru_cache
from io import StringIO
from pathlib import Path
from typing import Any

from flwr.app import Error, Message, RecordDict

from fedraclora.engines.asks import read_ask
from fedraclora.experiments.faults.network import Network, deploy, nodes_for, over_the_wire, rows
from fedraclora.rng import generator
from fedraclora.wire.exchange import Ask
from tests.campaigns.mutants import Random, pick
from tests.campaigns.wire import must, only_errors, raw
from tests.common import summary_of

CLIENTS, SEED = 8, 11
MOST = {0: 0, 1: 2, 5: 6}  # clients of a round that lose replies, by the share of these
CODED = ["compression.uplink=int4", "compression.uplink_coding=zstd", "compression.downlink=int8"]
CODED += ["compression.downlink_coding=zstd"]
SECURE = ["secure=secagg", "aggregation_weights=uniform", "output.checkpoint_every=1"]
# Of each run; the number of replies that are replaced among ten, where a sum needs most of them.
SETTINGS: dict[str, tuple[list[str], int]] = {
    "coded": ([*CODED], 5),
    "coded, links of two rounds": (
        [*CODED, "compression.feedback=true", "method.merge_every=2"],
        5,
    ),
    "rotated": (
        [
            "compression.uplink=eden3",
            "compression.uplink_coding=zstd",
            "compression.downlink=eden2",
        ],
        5,
    ),
    "both factors, coded": (["method=fedavg_lora", *CODED], 5),
    "of a pool, coded": (["method=pool_rac_lora", "method.pool=2", *CODED], 5),
    "measured, coded": ([*CODED, "evaluate.clients=round"], 5),
    "moments": (["local=momentum", "local.optimizer_state=merge", "method.merge_every=3"], 5),
    "plain": (["head=full"], 5),
    "secure": (SECURE, 1),
}
WORDS = [
    f"clients={CLIENTS}",
    f"clients_per_round={CLIENTS}",
    "engine.min_clients=1",
    "engine.retries=0",
]
WORDS += ["engine.timeout=2", "partition=iid"]
LEFT_OUT = ("answered another run", "answered another round", "answered another client")
LEFT_OUT += ("answered another kind", "the question")
HONEST = ("as it came", "twice", "another's follows", "asked twice", "asked of old")
ANEW = ("train keys", "train shares")  # are drawn anew, whoever asks
Key = tuple[str, int, str]  # round, client, kind of question


def asked_by(message: Message) -> Ask:
    """Read what a message asks."""
    return read_ask(message.content)


def key_of(message: Message) -> Key:
    """Name a question within its run."""
    ask = asked_by(message)
    kind = f"{ask.request.measure or 'train'} {'' if ask.stage is None else ask.stage.name}"
    return message.metadata.group_id, ask.clients[0], kind


@dataclass
class Replays:
    """What a network does to the replies of one run.

    Attributes:
        random: Chooses.
        share: Replies of ten that are replaced.
        others: Replies of another run, by question.
        mine: Those of this run so far.
        calls: Ask a node the same again.
        replaced: What was done to whose reply.
        honest: How often what was done to replies that count.
    """

    random: Random
    share: int
    others: Mapping[Key, RecordDict]
    mine: dict[Key, RecordDict] = field(default_factory=dict)
    calls: dict[Key, Callable[[], Message]] = field(default_factory=dict)
    replaced: dict[Key, str] = field(default_factory=dict)
    honest: Counter[str] = field(default_factory=Counter)

    def __call__(self, message: Message, call: Callable[[], Message]) -> list[Message]:
        """Answer a message, or with something else."""
        reply, key = call(), key_of(message)
        must(not reply.has_error(), f"an honest client fails: {reply}")
        content = over_the_wire(reply.content)
        others = self._pool(message, key)
        self.mine[key], self.calls[key] = content, call
        kind = pick(self.random, [kind for kind in LEFT_OUT if others.get(kind)] or [""])
        gone = len({one[1] for one in self.replaced if one[0] == key[0]} | {key[1]})
        if kind and gone <= MOST[self.share] and int(self.random.integers(10)) < self.share:
            self.replaced[key] = kind
            found = pick(self.random, others[kind])
            return [Message(over_the_wire(found), reply_to=message)]
        return self._honest(message, call, reply, [r for each in others.values() for r in each])

    def _pool(self, message: Message, key: Key) -> dict[str, list[RecordDict]]:
        """List what this question did not get as its answer, by what it is."""
        round_, client, kind = key
        said = {name: [] for name in LEFT_OUT}  # type: dict[str, list[RecordDict]]
        said["the question"] = [message.content]
        if key in self.others:
            said["answered another run"] = [self.others[key]]
        for (other, who, what), found in self.mine.items():
            differs = (other != round_, who != client, what != kind)
            name = {
                (True, False, False): "answered another round",
                (False, True, False): "answered another client",
                (False, False, True): "answered another kind",
                (True, False, True): "answered another kind",
            }.get(differs)
            if name is not None:
                said[name].append(found)
        return said

    def _honest(
        self,
        message: Message,
        call: Callable[[], Message],
        reply: Message,
        others: Sequence[RecordDict],
    ) -> list[Message]:
        """Give the honest reply, with more behind it, or after its node was asked twice."""
        kind = pick(self.random, HONEST)
        self.honest[kind] += 1
        if kind == "twice":
            return [reply, Message(over_the_wire(reply.content), reply_to=message)]
        if kind == "another's follows" and others:
            again = over_the_wire(pick(self.random, list(others)))
            return [Message(again, reply_to=message), reply]  # the network turns them round
        if kind == "asked twice" and key_of(message)[2] not in ANEW:
            again, first = call().content, reply.content
            must(raw(again) == raw(first), "a node answers otherwise when it is asked again")
        mine = [k for k in self.calls if k[1] == key_of(message)[1] and k[2] not in ANEW]
        if kind == "asked of old" and mine:
            self.calls[pick(self.random, mine)]()
        return [reply]


def trial(name: str, number: int, rounds: int) -> Counter[str]:
    """Run a setting with replays, and hold it against one without these clients.

    Raises:
        AssertionError: Saying what is wrong.
    """
    words, share = SETTINGS[name]
    words, others = [*WORDS, *words, f"rounds={rounds}"], replies_of_another_run(name, rounds)
    with tempfile.TemporaryDirectory() as made, redirect_stdout(StringIO()):
        folder = Path(made)
        replays = Replays(generator(SEED, name, number), share, others)
        deploy(words, folder / "run", _network(folder, "run", replays))

        def lost(message: Message, call: Callable[[], Message]) -> list[Message]:
            reply = call()  # what it keeps of the round it keeps here, too
            gone = key_of(message) in replays.replaced
            return [Message(Error(2, "lost"), reply_to=message) if gone else reply]

        deploy(words, folder / "control", _network(folder, "control", lost))
        found, wanted = (rows(folder / each) for each in ("run", "control"))
        for mine, plain in zip(found, wanted, strict=True):
            one, two = figures(mine), figures(plain)
            differ = {k: (one.get(k), two.get(k)) for k in one | two if one.get(k) != two.get(k)}
            must(not differ, f"round {mine['round']} is another one: {differ}")
        digests = [summary_of(folder / each)["weights_digest"] for each in ("run", "control")]
        must(digests[0] == digests[1], "the weights are others")
    return Counter(replays.replaced.values()) + replays.honest


@lru_cache(maxsize=len(SETTINGS))
def replies_of_another_run(name: str, rounds: int) -> dict[Key, RecordDict]:
    """Record the replies of a run that begins from the same weights, and learns more slowly."""
    other = Replays(generator(SEED, name, "other"), 0, {})
    words = [*WORDS, *SETTINGS[name][0], f"rounds={rounds}", "local.lr=0.05"]
    with tempfile.TemporaryDirectory() as made, redirect_stdout(StringIO()):
        deploy(words, Path(made) / "other", _network(Path(made), "other", other))
    return other.mine


def _network(folder: Path, name: str, fault: Any) -> Network:
    return Network(folder / f"cache-{name}", nodes_for(CLIENTS), fault)


# What a refused reply costs, or is counted by the clock.
COSTS = (
    "seconds", "_bytes", "_total", "transport", "incidents", "peak_memory", "secure", "sha256",
)  # fmt: skip


def figures(row: Mapping[str, object]) -> dict[str, object]:
    """Select what a row of the ledger says but for costs and the words of reasons."""
    found = {k: v for k, v in row.items() if not any(cost in k for cost in COSTS)}
    for name in ("failures", "clients"):
        value: Any = found.get(name)
        if name == "clients" and isinstance(value, dict):
            found[name] = figures(value)
        elif name == "failures" and value:
            found[name] = [failure["client"] for failure in value]
    return found


def campaign(times: int, names: Sequence[str] = tuple(SETTINGS), *, rounds: int = 9, first: int = 0,
             tell: bool = False) -> Counter[str]:  # fmt: skip
    """Run settings in turn until so many messages were replayed or repeated; count what was done.

    Args:
        times: How many messages.
        names: Of `SETTINGS`.
        rounds: Of each run.
        first: Number of the first run.
        tell: Whether to print how far it is and what is wrong, and go on.
    """
    counts, number = Counter[str](), first
    with only_errors("fedraclora.clients.worker", "flwr"):
        while counts.total() - counts["as it came"] < times:
            name = names[number % len(names)]
            try:
                counts += trial(name, number, rounds)
            except Exception as error:
                if not tell:
                    raise
                sys.stdout.write(f"run {number} ({name}): {type(error).__name__}: {error}\n")
                counts["wrong"] += 1
            number += 1
            if tell:
                sys.stdout.write(f"{number - first} runs, {counts.total()} messages\n")
                sys.stdout.flush()
    counts["runs"] = number - first
    return counts


def main() -> int:
    """Run the campaign; the status is 1 if a run came out wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=5000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--only", default="", help="what the names of settings begin with")
    words = parser.parse_args()
    names = [name for name in SETTINGS if name.startswith(words.only)]
    counts = campaign(words.times, names, first=words.first, tell=True)
    told = ", ".join(f"{what}: {n}" for what, n in sorted(counts.items()))
    sys.stdout.write(f"{told}\n")
    return int(counts["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
