"""Turn conversations into samples of a causal language model, with the loss on answers only."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from fedraclora.data.dataset import DataSet, EncodedSamples
from fedraclora.data.encoders.chat import Chat, Encoded, packed, padded
from fedraclora.data.encoders.conversations import Conversation, RowForm, read_conversations
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.errors import DataError
from fedraclora.limits import HydraDefault

log = logging.getLogger(__name__)
ANSWER_METRICS = ("perplexity", "token_accuracy", "loss")
Tokenizer = Annotated[str | None, HydraDefault("${model.path}")]
SampleLength = Annotated[int, Ge(2)]  # a token to read and one to predict


@dataclass(frozen=True)
class InstructionReader:
    """Read conversations as a run reads its own; see `fedraclora.data.dataset.SampleReader`.

    Attributes:
        form: How a row is read.
        header: Whether a .csv or .tsv names its columns.
        chat: Turns messages into tokens.
        max_length: Most tokens to keep.
        drop: Whether to drop conversations without any answer left; else they are refused.
    """

    form: RowForm
    header: bool
    chat: Chat
    max_length: int
    drop: bool

    def __call__(
        self, found: Any, reading: Mapping[str, Any], *, target: bool = True
    ) -> EncodedSamples:
        """Read a file, a frame, a list of dicts, or a list of prompts."""
        del reading  # tokenizer and template are the run's
        form = replace(self.form, client=None, answered=target)
        conversations = read_conversations(found, form, header=self.header)
        rows, places, cut = self.fit(conversations)
        _say_cut(self.max_length, cut, len(conversations), len(conversations) - len(rows))
        return EncodedSamples(padded(rows, self.pad), np.array(places), len(conversations))

    def data_set(
        self,
        train: Sequence[Conversation],
        test: Sequence[Conversation],
        metrics: Sequence[str] | None,
        source: dict[str, object],
        *,
        packing: bool,
    ) -> DataSet:
        """Tokenize conversations into a data set; see `load_instructions`.

        Args:
            train: Conversations to train on; either all have a client or none has.
            test: Conversations to measure on; they are never packed.
            metrics: Names of metrics, the primary one first; None: the usual ones.
            source: Facts for the summary; the numbers of cut and dropped conversations are added.
            packing: Whether training samples hold several conversations.
        """
        (rows, places, cut), (held, held_places, held_cut) = self.fit(train), self.fit(test)
        cut, total = cut + held_cut, len(train) + len(test)
        lost = total - len(places) - len(held_places)
        owners: list[str | None] = [train[place].client for place in places]
        if packing:
            table, owners = packed(rows, owners, self.max_length, self.pad)
        else:
            table = padded(rows, self.pad)
        labels = int((table.target >= 0).sum())
        info = {**source, "conversations": len(rows), "response_tokens": labels}
        info |= {"truncated": cut, "cut_away": lost}
        if packing:
            info["packed"] = f"{len(rows)} conversations in {len(table)} samples"
        _say_cut(self.max_length, cut, total, lost)
        return DataSet(
            train=table,
            test=padded(held, self.pad),
            classes=len(self.chat.tokenizer),
            loss="next_token",
            metrics=tuple(metrics or ANSWER_METRICS),
            columns={} if owners[0] is None else {"client": np.array(owners)},
            sample_shape=(),
            tokenizer=self.chat.tokenizer,
            info=info,
            reader=self,
        )

    @property
    def pad(self) -> int:
        """Return the padding token."""
        pad, end = (getattr(self.chat.tokenizer, f"{kind}_token_id") for kind in ("pad", "eos"))
        return int((end or 0) if pad is None else pad)

    def fit(self, conversations: Sequence[Conversation]) -> tuple[list[Encoded], list[int], int]:
        """Tokenize conversations, and cut them to `max_length`.

        Returns:
            The kept conversations, their indices, and how many were cut.

        Raises:
            DataError: Naming the first conversation without any answer left, or without room for
                the answer to generate.
        """
        kept, places, cut = [], [], 0
        for place, whole in enumerate(self.chat.encode(conversations)):
            one, size = conversations[place], len(whole.ids)
            labels = whole.labels[: self.max_length]
            unlabelled = all(label == IGNORED_TOKEN for label in labels[1:])
            if unlabelled if one.answered else size >= self.max_length:
                if not self.drop:
                    raise DataError(
                        f"{one.where}: the prompt fills data.max_length={self.max_length} tokens "
                        f"(the conversation has {size}), so no response is left. Raise "
                        "data.max_length, or set data.cut_away=drop to leave such rows out."
                    )
                continue
            cut += size > self.max_length
            kept.append(replace(whole, ids=whole.ids[: self.max_length], labels=labels))
            places.append(place)
        if not kept:
            raise DataError(
                f"data.max_length={self.max_length} leaves no response of {len(conversations)} "
                "conversations"
            )
        return kept, places, cut


def _say_cut(max_length: int, cut: int, total: int, lost: int) -> None:
    """Warn how many conversations were cut or dropped, if any."""
    if cut or lost:
        log.warning(
            "data.max_length=%d: %d of %d conversations were cut, and %d more were left out "
            "because their prompt leaves no room for a response",
            *(max_length, cut, total, lost),
        )
