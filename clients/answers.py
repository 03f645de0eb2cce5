"""Store a client's one reply per round on its disk, and repeat it bit for bit.

Privacy protection covers one reply per round: one noisy update, one masked vector, one set of
shares. A server that repeats a request (it was resumed, a reply was lost, or it wants to subtract
two replies) receives the same bytes; for a different request it receives none.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from fedraclora.clients.cache import on_disk
from fedraclora.clients.secure import MEASUREMENTS
from fedraclora.codec import from_bytes, join, split, to_bytes
from fedraclora.errors import ClientError
from fedraclora.tree import digest
from fedraclora.weights.files import load_tensors, save_tensors
from fedraclora.wire.answers import Answer, StageAnswer
from fedraclora.wire.exchange import Ask, Stage

# Kinds of requests that are answered once per round.
ONCE = ("train", "masked", "unmask", f"{MEASUREMENTS}-masked", f"{MEASUREMENTS}-unmask")


def kind_of(stage: Stage | None) -> str:
    """Return the kind of a request: ``train``, or a stage of secure aggregation, for either sum."""
    if stage is None:
        return "train"
    return f"{MEASUREMENTS}-{stage.name}" if MEASUREMENTS in stage.settings else stage.name


def is_given(answer: Answer) -> bool:
    """Check whether an answer has results, not only the reason of a failure."""
    if isinstance(answer, StageAnswer) and answer.stage.name == "unmask":
        return bool(answer.stage.data)
    return bool(len(answer.clients))


class ReplyCache:
    """Cache a client's last reply, so that a repeated request is not computed twice.

    Args:
        folder: The folder of the client in a run.
        rounds: The last round of the run.
        ask: The request.
        version: The version of the base weights that come with it.
    """

    def __init__(self, folder: Path, rounds: int, ask: Ask, version: str) -> None:
        self.folder, self.rounds, self.ask = folder / "answers", rounds, ask
        self.kind, self.round_ = kind_of(ask.stage), ask.request.round_
        self.path = self.folder / f"{self.kind}.safetensors"
        tensors, plain = split(ask)
        asked = f"{version}|{digest(tensors)}|{json.dumps(plain, sort_keys=True)}"
        self.digest = hashlib.sha256(asked.encode()).hexdigest()

    def stored_reply(self) -> Answer | None:
        """Return the stored answer to the same request; None if the request is new.

        Raises:
            ClientError: If another request of this round, or of a later one, was answered, or the
                run has no such round.
        """
        # Weights of the last round are measured before a round that does not take place.
        if not 1 <= self.round_ <= self.rounds + self.kind.startswith(MEASUREMENTS):
            raise ClientError(
                f"round {self.round_}: the server asked for a round that the run does not "
                f"have (it has 1 to {self.rounds}). Run the server and the clients under one "
                "config"
            )
        if self.kind not in ONCE or not self.path.is_file():
            return None
        tensors, meta = load_tensors(self.path, "restore it, or remove the folder of this run")
        answered = int(str(meta["round"]))
        if answered == self.round_ and meta["question"] == self.digest:
            return join(Answer, from_bytes(tensors["reply"], meta["tensors"]), meta["answer"])
        if answered >= self.round_:
            raise ClientError(
                f"client {self.ask.clients[0]}: the server sent a second, different request "
                f"in round {self.round_}, after the client answered round {answered}. A "
                "client answers a round once, since the difference of two answers could "
                "reveal its data"
            )
        return None

    def keep(self, answer: Answer) -> None:
        """Store a reply on the disk before it is sent.

        Raises:
            ClientError: If it cannot be stored.
        """
        if self.kind not in ONCE or not is_given(answer):
            return
        tensors, plain = split(answer.packed())
        raw, table = to_bytes(tensors)
        with on_disk(self.folder):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            meta = {"round": self.round_, "question": self.digest}
            meta |= {"tensors": table, "answer": plain}
            save_tensors(self.path, {"reply": raw}, meta, sync=True)
            self.path.chmod(0o600)
