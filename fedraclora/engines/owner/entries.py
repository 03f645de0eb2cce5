"""Define an entry of a node's history: one message, or the sum of older ones."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

TRAIN = "train"  # how Flower's kinds of messages begin in which clients train
DATE = len("2026-12-31")
IN, OUT, REFUSED = "in", "out", "refused"
DOWNLOAD = "bundle"  # the way of an app's bundle, which is downloaded
# The way of all that the node has sent and received by HTTP since the last such entry.
WIRE = "wire"


@dataclass(frozen=True)
class Entry:
    """One message.

    Attributes:
        time: When it came or went, ISO 8601 in UTC.
        way: `IN`, `OUT`, or `REFUSED`: it came, and no code of the run has seen it; or `DOWNLOAD`,
            or `WIRE`, in which messages and bundle are contained.
        digest: The digest of the run.
        run: Flower's number of the run.
        node: Flower's number of this node.
        round: The round; empty for a message outside of rounds.
        kind: Flower's type of the message, as ``train.cohort``.
        bytes: Bytes of its content; of `WIRE` both ways, with headers, without TLS.
        records: Bytes of each kind of record in it.
        seconds: Of a reply: since its message came.
        samples: Of a reply of training: on how many samples, as the run's code says.
        why: Of a refused message.
        of: Of a sum: how many messages; round and kind are empty, ``time`` is that of the first,
            and ``samples`` those of the largest round.
        rounds: Of a sum: in how many rounds this node trained.
    """

    time: str
    way: str
    digest: str
    run: int
    node: int
    round: str
    kind: str
    bytes: int = 0
    records: dict[str, int] | None = None
    seconds: float | None = None
    samples: int | None = None
    why: str | None = None
    of: int | None = None
    rounds: int | None = None

    @property
    def is_training(self) -> bool:
        """Return whether it is a message for which this node trained."""
        return self.way == IN and self.kind.startswith(TRAIN)


def now() -> str:
    """Return the time of an entry."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")
