"""The answers that a real client gives once, on its disk: repeated word for word, or refused.

What protects a client covers one answer a round: one noisy update, one masked vector, one set of
shares. A server that asks again (it was restored, a reply was lost, or it hopes to subtract two
answers) gets the very same bytes if it asks the very same, and nothing if it asks anything else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from flwr.app import RecordDict
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as ProtoRecordDict

from fedraclora.clients.cache import on_disk
from fedraclora.clients.secure import MEASUREMENTS
from fedraclora.engines.records import from_records
from fedraclora.errors import ClientError
from fedraclora.weights.files import load_tensors, save_tensors
from fedraclora.wire.records import Content, clients_of, round_of
from fedraclora.wire.secagg import read_stage

ASKS = ("config", "arrays", "own", "chunk", "secure")  # records of a message that it answers
# What is answered once in a round.
ONCE = ("train", "masked", "unmask", f"{MEASUREMENTS}-masked", f"{MEASUREMENTS}-unmask")


def kind_of(content: Content) -> str:
    """Name what a message asks for: ``train``, or a stage of secure aggregation, of either sum."""
    stage = read_stage(content)
    if stage is None:
        return "train"
    return f"{MEASUREMENTS}-{stage.name}" if MEASUREMENTS in stage.settings else stage.name


def is_given(reply: Content) -> bool:
    """Check whether a reply says more than why there is none."""
    stage = read_stage(reply)
    return bool(stage.data if stage is not None and stage.name == "unmask" else clients_of(reply))


class Answers:
    """What a client has answered last, by kind.

    Args:
        folder: Of the client in a run.
        rounds: The last round of the run.
    """

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder, self.rounds = folder / "answers", rounds

    def once(
        self, content: RecordDict, version: str, compute: Callable[[], RecordDict]
    ) -> RecordDict:
        """Return the answer to a message: the one that was sent before, or a new one.

        Args:
            content: The message.
            version: Of the base weights that it comes with.
            compute: Gives a new answer, once the client has noted on its disk that it did.

        Raises:
            ClientError: If another message of this round or of a later one was answered, or the
                run has no such round; or if the answer cannot be kept.
        """
        asked, mine = from_records(content), question(content, version)
        kind, round_ = kind_of(asked), round_of(asked)
        # What the last round has made is measured before a round that will not be.
        if not 1 <= round_ <= self.rounds + kind.startswith(MEASUREMENTS):
            raise ClientError(
                f"round {round_} was asked for; the run has rounds 1 to {self.rounds}"
            )
        if kind not in ONCE:
            return compute()
        path = self.folder / f"{kind}.safetensors"
        if path.is_file():
            tensors, meta = load_tensors(path, "restore it, or remove the folder of this run")
            answered = int(str(meta["round"]))
            if answered == round_ and meta["question"] == mine:
                raw = tensors["reply"].numpy().tobytes()
                return recorddict_from_proto(ProtoRecordDict.FromString(raw))
            if answered >= round_:
                raise ClientError(
                    f"{clients_of(asked)} of this node answered round {answered} before, and "
                    f"another question of round {round_} came: a client answers a round once, "
                    "since two answers could be subtracted"
                )
        reply = compute()
        if is_given(from_records(reply)):  # it is kept before anybody gets it
            raw = recorddict_to_proto(reply).SerializeToString()
            numbers = torch.from_numpy(np.frombuffer(raw, np.uint8).copy())
            with on_disk(self.folder):
                path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                meta = {"round": round_, "question": mine}
                save_tensors(path, {"reply": numbers}, meta, sync=True)
                path.chmod(0o600)
        return reply


def question(content: RecordDict, version: str) -> str:
    """Digest what a message asks (SHA-256): how base weights travel is left out."""
    asked = RecordDict({name: content[name] for name in ASKS if name in content})
    raw = recorddict_to_proto(asked).SerializeToString(deterministic=True)
    return hashlib.sha256(f"{version}|".encode() + raw).hexdigest()
