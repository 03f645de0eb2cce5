"""Instructions with their answers, for causal language models: the loss is on the answers alone."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge

from fedraclora.data.chat import Chat, Encoded, packed, padded
from fedraclora.data.conversations import Conversation, RowForm, read_conversations
from fedraclora.data.dataset import DataSet, Read
from fedraclora.data.locate import Root, check_file, resolve
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.split import holdout_of
from fedraclora.errors import DataError
from fedraclora.limits import Composed, Count, Fraction, OneOf, limited
from fedraclora.rng import generator

log = logging.getLogger(__name__)

ANSWER_METRICS = ("perplexity", "token_accuracy", "loss")


Tokenizer = Annotated[str | None, Composed("${model.path}")]
SampleLength = Annotated[int, Ge(2)]  # a token to read and one to predict


@limited("data")
def load_instructions(
    *,
    file: str | None = None,
    tokenizer: Tokenizer = None,
    root: Root = None,
    test_file: str | None = None,
    prompt: str | None = None,
    response: str | None = None,
    answers: Mapping[str, object] | None = None,
    choices: str | Sequence[str] | None = None,
    header: bool = True,
    client: str | int | None = None,
    template: str | None = None,
    max_length: SampleLength = 512,
    packing: bool = False,
    cut_away: Annotated[str, OneOf(("error", "drop"))] = "error",
    metrics: Sequence[str] | None = None,
    test_fraction: Fraction | None = None,
    split_seed: int = 0,
    subsample: Count | None = None,
    sha256: str | None = None,
    test_sha256: str | None = None,
) -> DataSet:
    """Load and tokenise conversations (.jsonl, .parquet, .csv or .tsv).

    Args:
        file: Training rows: a path (also relative to ``root``) or ``package:NAME/path``, with the
            columns ``messages``, or ``prompt`` and ``response``, or ``instruction``, ``input`` and
            ``output``.
        tokenizer: A folder, a GGUF file, ``package:NAME/path`` or ``hub:NAME``; only the last may
            download.
        root: The folder that paths may be relative to, or None.
        test_file: Test rows, or None to hold some of ``file`` out.
        prompt: A column, or a text with columns in braces; None: by the columns above.
        response: The same for the answer.
        answers: What the values of ``response`` are written as, or None.
        choices: The answers that a response could be, or the column that lists them, for
            evaluate.choices; None: the texts of ``answers``.
        header: Whether the first row of a .csv or .tsv names the columns; else 0, 1, ...
        client: The column of the natural client, or None.
        template: A Jinja chat template, or a file with one; None: the tokenizer's own.
        max_length: Tokens of a sample; longer conversations are cut, and counted.
        packing: Put several training conversations of a client (of any, where there is no column
            ``client``) into one sample.
        cut_away: What becomes of a conversation whose response does not fit: error or drop.
        metrics: Names of metrics, the headline first; None: perplexity, token_accuracy, loss.
        test_fraction: Fraction of the rows (of each client) held out; None: 0.2 without
            ``test_file``.
        split_seed: Seed of that split, and of ``subsample``.
        subsample: Training rows to draw, or None for all.
        sha256: SHA-256 of ``file``, or None.
        test_sha256: SHA-256 of ``test_file``, or None.

    Returns:
        Inputs ``input_ids`` and ``attention_mask`` (packed: ``position_ids``), int64 [N, T]; labels
        int64 [N, T], -100 outside answers. The number of outputs is that of the tokens.

    Raises:
        ConfigError: If a key is wrong, naming it, or there is no chat template.
        DataError: If a file or a tokenizer is missing, or a row cannot be used, which is named.
    """
    chat = Chat(tokenizer, root=root, template=template)
    texts = None if answers is None else {str(k): str(v) for k, v in answers.items()}
    owner = None if client is None else str(client)
    form = RowForm(prompt, response, texts, owner, choices=choices)
    reader = InstructionReader(form, header, chat, max_length, cut_away == "drop")

    def read(spelling: str, key: str, pin: str | None, form: RowForm) -> list[Conversation]:
        path = check_file(resolve(spelling, key=key, root=root), pin)
        return read_conversations(path, form, header=header)

    whole = read(str(file or ""), "data.file", sha256, form)
    everyone = np.array([str(one.client) for one in whole])
    holdout = holdout_of(test_fraction, split_seed, test_file=test_file)
    if holdout is None:
        held = read(str(test_file), "data.test_file", test_sha256, replace(form, client=None))
    else:
        # The same fraction of each client.
        owners = None if client is None else everyone
        kept, out = holdout.split(len(whole), labels=owners)
        whole, held = [whole[row] for row in kept], [whole[row] for row in out]
    if subsample is not None:
        drawn = generator(split_seed, "split", "subsample").permutation(len(whole))[:subsample]
        whole = [whole[row] for row in np.sort(drawn)]
    data = reader.data_set(whole, held, metrics, {"source": str(file)}, packing=packing)
    if client is None:
        return data
    columns = {str(client): data.columns["client"], **data.columns}
    return replace(data, columns=columns, clients=everyone)


@dataclass(frozen=True)
class InstructionReader:
    """Reads conversations as a run reads its own; see `fedraclora.data.dataset.SampleReader`.

    Attributes:
        form: How a row is read.
        header: Whether a .csv or .tsv names its columns.
        chat: Turns messages into tokens.
        max_length: Tokens that are kept.
        drop: Whether conversations are left out of which no answer is left; else they are refused.
    """

    form: RowForm
    header: bool
    chat: Chat
    max_length: int
    drop: bool

    def __call__(self, found: Any, reading: Mapping[str, Any], *, target: bool = True) -> Read:
        """Read a file, a frame, a list of dicts, or a list of prompts."""
        del reading  # tokenizer and template are those of the run
        form = replace(self.form, client=None, answered=target)
        conversations = read_conversations(found, form, header=self.header)
        rows, places, cut = self.fit(conversations)
        _say_cut(self.max_length, cut, len(conversations), len(conversations) - len(rows))
        return Read(padded(rows, self.pad), np.array(places), len(conversations))

    def data_set(
        self,
        train: Sequence[Conversation],
        test: Sequence[Conversation],
        metrics: Sequence[str] | None,
        source: dict[str, object],
        *,
        packing: bool,
    ) -> DataSet:
        """Tokenise conversations into a data set; see `load_instructions`.

        Args:
            train: Conversations to train on; either all have a client or none has.
            test: Conversations to measure on; they are never packed.
            metrics: Names of metrics, the headline first; None: the usual ones.
            source: Facts for the summary, to which what was cut and left out is added.
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
        """The token that fills rows up."""
        pad, end = (getattr(self.chat.tokenizer, f"{kind}_token_id") for kind in ("pad", "eos"))
        return int((end or 0) if pad is None else pad)

    def fit(self, conversations: Sequence[Conversation]) -> tuple[list[Encoded], list[int], int]:
        """Tokenise conversations, and cut them to `max_length`.

        Returns:
            What is left, the places of that among them, and how many were cut.

        Raises:
            DataError: Naming the first conversation of which no answer is left, or in which there
                is no room for one that is to be generated.
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
                        f"(the whole has {size}), so that nothing of the response is left: raise "
                        "data.max_length, or set data.cut_away=drop to leave such rows out"
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
    """Say aloud how many conversations were cut or left out, if any."""
    if cut or lost:
        log.warning(
            "data.max_length=%d: %d of %d conversations were cut, and %d more left out, of whose "
            "response nothing would have been left",
            *(max_length, cut, total, lost),
        )
