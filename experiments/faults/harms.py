"""What a client can do to its reply, and the reason with which it is refused."""

from __future__ import annotations

import json
from collections.abc import Callable

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, RecordDict

from fedraclora.engines.replies import STALE
from fedraclora.experiments.faults.network import Fault, client, over_the_wire

Harm = Callable[[RecordDict], None]
Guilty = Callable[[Message], bool]


class Once:
    """Guilty of the first message that another rule finds guilty, however often it is looked at."""

    def __init__(self, guilty: Guilty) -> None:
        self.guilty, self.first = guilty, ""

    def __call__(self, message: Message) -> bool:
        """Tell whether this is the message."""
        if not self.first and self.guilty(message):
            self.first = message.metadata.message_id
        return self.first == message.metadata.message_id


def numbers(change: Callable[[torch.Tensor], torch.Tensor]) -> Harm:
    """Change the numbers of an update, [1, P]."""

    def harm(content: RecordDict) -> None:
        record = ArrayRecord()
        old = torch.from_numpy(content["arrays"]["flat"].numpy())  # type: ignore[union-attr]
        record["flat"] = Array(np.ascontiguousarray(change(old).numpy()))
        content["arrays"] = record

    return harm


def header(**changes: object) -> Harm:
    """Change what the header says."""

    def harm(content: RecordDict) -> None:
        old = json.loads(str(content["config"]["header"]))
        content["config"] = ConfigRecord({"header": json.dumps({**old, **changes})})

    return harm


def vector(name: str, *values: float, dtype: type = np.int64) -> Harm:
    """Change a short vector of the reply: ids, samples, steps or losses."""

    def harm(content: RecordDict) -> None:
        content["chunk"][name] = np.array(values, dtype).tobytes()  # type: ignore[assignment]

    return harm


def filled(value: float) -> Harm:
    """Change the last number of an update."""
    return numbers(lambda t: torch.cat([t[:, :-1], torch.full_like(t[:, :1], value)], dim=1))


def without(name: str) -> Harm:
    """Leave a record out."""
    return lambda content: content.__delitem__(name)


def proof(content: RecordDict) -> None:
    """Claim to have trained on other weights."""
    content["job"] = ConfigRecord({"held": 1, "mark": "123"})


# Done by client 1 in round 2 or later, of three clients: why it is refused in round 2.
HARMS: dict[str, tuple[Harm, str]] = {
    "NaN": (filled(float("nan")), "its update has a NaN or an infinity"),
    "infinity": (filled(float("inf")), "its update has a NaN or an infinity"),
    "a loss that is no number": (
        vector("losses", float("nan"), dtype=np.float64),
        "its training loss is nan",
    ),
    "too few numbers": (numbers(lambda t: t[:, 1:]), "and 1 of each"),
    "another shape": (numbers(lambda t: t.mT), "and 1 of each"),
    "two rows": (numbers(lambda t: torch.cat([t, t])), "and 1 of each"),
    "another dtype": (numbers(torch.Tensor.double), "the numbers of the reply are torch.float64"),
    "whole numbers": (numbers(torch.Tensor.int), "the numbers of the reply are torch.int32"),
    "another round": (header(round_=1), "answered for round 1 from version 1"),
    "another version": (header(version=0), "answered for round 2 from version 0"),
    "another layout": (header(layout={"shapes": [["w", [66]]]}), "w (66,), wanted is fc1"),
    "a sum": (header(**{"is": "summed"}), "the reply is 'summed'"),
    "another client": (vector("clients", 2), "the reply is from clients [2], expected [1]"),
    "two clients": (vector("clients", 1, 2), "and 2 of each"),
    "another place": (header(first=0), "the reply begins at place 0"),
    "no header": (without("config"), "expected the ConfigRecord config"),
    "no JSON": (
        lambda c: c.__setitem__("config", ConfigRecord({"header": "{"})),
        "its reply is refused",
    ),
    "no numbers": (without("arrays"), "no numbers of pieces/0"),
    "other weights": (proof, "it trained on weights of version and fingerprint (1, '123')"),
    "no proof": (without("job"), "it trained on weights of version and fingerprint (None, None)"),
    "negative samples": (
        vector("samples", -5),
        "the reply reports [-5] samples, expected 1 to 10000000",
    ),
    "no samples": (vector("samples", 0), "the reply reports [0] samples"),
    "too many samples": (
        vector("samples", 2**62),
        "the reply reports [4611686018427387904] samples",
    ),
    "samples that are no number": (
        vector("samples", float("nan"), dtype=np.float64),
        "the reply reports [9221120237041090560] samples",
    ),
    "negative steps": (vector("steps", -1), "the reply reports [-1] steps"),
    "a failure of another": (header(failures={"2": "so"}), "the reply is from clients [1, 2]"),
}


def changed(harm: Harm, guilty: Guilty) -> Fault:
    """Change the reply to each message that is guilty."""

    def fault(message: Message, call: Callable[[], Message]) -> list[Message]:
        reply = call()
        if guilty(message):
            harm(reply.content)
        return [reply]

    return fault


def raises(guilty: Guilty) -> Fault:
    """Reply with an error."""
    return instead(guilty, lambda m: [Message(Error(2, "OSError: no disk"), reply_to=m)])


def is_misconfigured(guilty: Guilty) -> Fault:
    """Reply with an error that in a simulation would be everyone's."""
    return instead(guilty, lambda m: [Message(Error(1000, "ConfigError: no file"), reply_to=m)])


def stays_silent(guilty: Guilty) -> Fault:
    """Never reply."""
    return instead(guilty, lambda _: [])


def cannot_settle(guilty: Guilty) -> Fault:
    """Ask for every base weight, again and again."""
    stale = ConfigRecord({"held": 0})
    return instead(guilty, lambda m: [Message(RecordDict({STALE: stale}), reply_to=m)])


def trains_and_stays_silent(guilty: Guilty) -> Fault:
    """Train, keep the new weights, and never reply."""

    def fault(message: Message, call: Callable[[], Message]) -> list[Message]:
        reply = call()
        return [] if guilty(message) else [reply]

    return fault


def plays_an_old_reply(guilty: Guilty) -> Fault:
    """Reply with what was right in the first round."""
    old: dict[int, RecordDict] = {}

    def fault(message: Message, call: Callable[[], Message]) -> list[Message]:
        reply = call()
        old.setdefault(client(message), over_the_wire(reply.content))
        return [Message(old[client(message)], reply_to=message)] if guilty(message) else [reply]

    return fault


def replies_twice(guilty: Guilty) -> Fault:
    """Reply with the same twice: the second is ignored."""

    def fault(message: Message, call: Callable[[], Message]) -> list[Message]:
        reply = call()
        again = Message(over_the_wire(reply.content), reply_to=message)
        return [reply, again] if guilty(message) else [reply]

    return fault


def instead(guilty: Guilty, say: Callable[[Message], list[Message]]) -> Fault:
    """Say something else to what is guilty."""
    return lambda message, call: say(message) if guilty(message) else [call()]


# And why it is left out.
BEHAVIOURS: dict[str, tuple[Callable[[Guilty], Fault], str]] = {
    "raises": (raises, "OSError: no disk"),
    "is misconfigured": (is_misconfigured, "ConfigError: no file"),
    "stays silent": (stays_silent, "no reply in time"),
    "trains and stays silent": (trains_and_stays_silent, "no reply in time"),
    "cannot settle on weights": (cannot_settle, "it asked for every base weight twice"),
    "plays an old reply": (plays_an_old_reply, "it trained on weights of version and fingerprint"),
}


def fault_of(kind: str, guilty: Guilty) -> Fault:
    """Make a fault by its name, of `HARMS` or `BEHAVIOURS`."""
    if kind in HARMS:
        return changed(HARMS[kind][0], guilty)
    return BEHAVIOURS[kind][0](guilty)
