"""Conversations to token ids, by a chat template, with labels on the answers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from fedraclora.data.conversations import Conversation
from fedraclora.data.locate import load_tokenizer, user_path
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, DataError

Piece = tuple[str, bool]  # text, and whether it is an answer


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation, and its labels: the id, or `IGNORED_TOKEN` outside answers."""

    ids: list[int]
    labels: list[int]
    choices: tuple[Choice, ...] = ()


@dataclass(frozen=True)
class Choice:
    """An answer that the last of a conversation could be: its tokens, without what ends them.

    Attributes:
        ids: Of the tokens.
        characters: Of the text.
        right: Whether it is the answer.
    """

    ids: list[int]
    characters: int
    right: bool


class Chat:
    """A tokenizer with the template that turns messages into a text.

    Args:
        tokenizer: A folder, a GGUF file, ``package:NAME/path`` or ``hub:NAME`` for
            ``transformers.AutoTokenizer``; only the last may download.
        root: The data root, or None.
        template: A Jinja template, or a file with one; None: the tokenizer's own.

    Attributes:
        tokenizer: Of transformers.

    Raises:
        ConfigError: If there is no template, or no file of this name.
        DataError: If there is no such tokenizer.
    """

    def __init__(self, tokenizer: str, *, root: str | None, template: str | None) -> None:
        self.tokenizer = load_tokenizer(tokenizer, root)
        self.template = self.tokenizer.chat_template if template is None else _template(template)
        if not self.template:
            raise ConfigError(
                f"data.tokenizer={tokenizer} has no chat template: set data.template to a Jinja "
                "template or to a file with one (docs/language-models.md has one to begin with)"
            )

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Tokenise conversations; what follows an end-of-text token in an answer has no label.

        Prompts and answers are tokenised apart, as they are where an answer is generated.

        Raises:
            DataError: If the template refuses a conversation, or rewrites what it has written.
        """
        pieces = [self.pieces(conversation) for conversation in conversations]
        texts = [text for whole in pieces for text, _ in whole]
        tokens = iter(self.tokenizer(texts, add_special_tokens=False)["input_ids"])
        found = [self._joined([(next(tokens), answer) for _, answer in whole]) for whole in pieces]
        choices = self._choices(conversations, [whole[-1][0] for whole in pieces])
        return [replace(one, choices=own) for one, own in zip(found, choices, strict=True)]

    def _choices(
        self, conversations: Sequence[Conversation], written: Sequence[str]
    ) -> list[tuple[Choice, ...]]:
        """Put each choice where the template has written the answer; none where it is not there."""
        spoken, tokens = [], dict[str, list[int]]()
        for conversation, text in zip(conversations, written, strict=True):
            answer = conversation.messages[-1]["content"].strip()
            before, _, after = text.partition(answer)
            there = len(before) + len(after) < len(text) and (
                not before.strip() or text.count(answer) == 1
            )
            own = {before + choice: choice for choice in conversation.choices if there}
            spoken.append((own, answer))
            tokens |= {written: [] for written in own}
        if tokens:
            ids = self.tokenizer([*tokens], add_special_tokens=False)["input_ids"]
            tokens = dict(zip(tokens, ids, strict=True))
        return [
            tuple(Choice(tokens[t], len(choice), choice == answer) for t, choice in own.items())
            for own, answer in spoken
        ]

    def pieces(self, conversation: Conversation) -> list[Piece]:
        """Cut the text of a conversation into prompts and answers, in turn."""
        found: list[Piece] = []
        done = ""
        for place, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            asked = self._text(conversation, place, prompt=True)
            answered = self._text(conversation, place + 1, prompt=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise DataError(
                    f"{conversation.where}: the chat template does not write an answer after its "
                    "prompt, so that the response cannot be told from the rest: set data.template "
                    "to one that adds message after message"
                )
            found += [(asked[len(done) :], False), (answered[len(asked) :], True)]
            done = answered
        if not conversation.answered:
            asked = self._text(conversation, len(conversation.messages), prompt=True)
            return [(asked, False)]
        return found

    def _text(self, conversation: Conversation, messages: int, *, prompt: bool) -> str:
        from jinja2 import TemplateError

        try:
            text: str = self.tokenizer.apply_chat_template(
                list(conversation.messages[:messages]),
                chat_template=self.template,
                add_generation_prompt=prompt,
                tokenize=False,
            )
        except TemplateError as error:
            raise DataError(f"{conversation.where}: the chat template fails: {error}") from error
        return text

    def _joined(self, pieces: list[tuple[list[int], bool]]) -> Encoded:
        ids: list[int] = []
        labels: list[int] = []
        end = self.tokenizer.eos_token_id
        for tokens, answer in pieces:
            ids += tokens
            kept = len(tokens) if answer else 0
            if answer and end in tokens:
                kept = len(tokens) - tokens[::-1].index(end)
            labels += tokens[:kept] + [IGNORED_TOKEN] * (len(tokens) - kept)
        return Encoded(ids, labels)


def _template(template: str) -> str:
    """Give the template itself, which a file may hold."""
    if "{" in template:
        return template
    path = user_path("data.template", template)
    if not path.is_file():
        raise ConfigError(
            f"data.template={template}: neither a Jinja template (it has no brace) nor a file"
        )
    return path.read_text(encoding="utf-8")


def cut_to_length(
    encoded: Sequence[Encoded],
    wheres: Sequence[str],
    max_length: int,
    *,
    drop: bool,
    answered: bool = True,
) -> tuple[list[Encoded], list[int], int]:
    """Cut conversations to a length.

    Args:
        encoded: Conversations.
        wheres: Where each comes from, for messages.
        max_length: Tokens that are kept.
        drop: Leave out conversations whose answer is cut away whole; else they are refused.
        answered: Whether they have an answer; else there must be room for one.

    Returns:
        What is left, the places of that among ``encoded``, and how many were cut.

    Raises:
        DataError: Naming the first conversation of which no answer is left.
    """
    kept, places, cut = [], [], 0
    for place, whole in enumerate(encoded):
        part = Encoded(whole.ids[:max_length], whole.labels[:max_length], whole.choices)
        none_left = all(label == IGNORED_TOKEN for label in part.labels[1:])
        if none_left if answered else len(whole.ids) >= max_length:
            if not drop:
                raise DataError(
                    f"{wheres[place]}: the prompt fills data.max_length={max_length} tokens (the "
                    f"whole has {len(whole.ids)}), so that nothing of the response is left: raise "
                    "data.max_length, or set data.cut_away=drop to leave such rows out"
                )
            continue
        cut += len(part.ids) < len(whole.ids)
        kept.append(part)
        places.append(place)
    if not kept:
        raise DataError(
            f"data.max_length={max_length} leaves no response of {len(encoded)} conversations"
        )
    return kept, places, cut


def padded(encoded: Sequence[Encoded], pad: int) -> Samples:
    """Give conversations as one table, each row padded to the longest.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 [N, T]; labels int64 [N, T]. Beside them, where
        there are choices: ``choices`` int64 [N, C, L], `IGNORED_TOKEN` behind each and where a
        question has fewer; ``characters`` int64 [N, C], -1 there, and ``right`` bool [N, C].
    """
    longest = max(len(one.ids) for one in encoded)
    ids = np.full((len(encoded), longest), pad, dtype=np.int64)
    labels, mask = np.full_like(ids, IGNORED_TOKEN), np.zeros_like(ids)
    for row, one in enumerate(encoded):
        length = len(one.ids)
        ids[row, :length], labels[row, :length], mask[row, :length] = one.ids, one.labels, 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    found = Samples({n: torch.from_numpy(v) for n, v in inputs.items()}, torch.from_numpy(labels))
    return replace(found, beside=_beside(encoded))


def _beside(encoded: Sequence[Encoded]) -> dict[str, torch.Tensor]:
    most = max(len(one.choices) for one in encoded)
    if not most:
        return {}
    size = len(encoded), most
    length = max(len(choice.ids) for one in encoded for choice in one.choices)
    choices = np.full((*size, length), IGNORED_TOKEN, dtype=np.int64)
    characters, right = np.full(size, -1, dtype=np.int64), np.zeros(size, dtype=bool)
    for row, one in enumerate(encoded):
        for place, choice in enumerate(one.choices):
            choices[row, place, : len(choice.ids)] = choice.ids
            characters[row, place], right[row, place] = choice.characters, choice.right
    tables = {"choices": choices, "characters": characters, "right": right}
    return {name: torch.from_numpy(table) for name, table in tables.items()}


def packed(
    encoded: Sequence[Encoded], owners: Sequence[str | None], max_length: int, pad: int
) -> tuple[Samples, list[str | None]]:
    """Put several conversations of one owner into a row, in their order, as many as fit.

    They do not see each other: positions begin anew with each, and transformers' attention keeps
    apart what its positions keep apart where there is no ``attention_mask``.

    Returns:
        ``input_ids`` and ``position_ids`` int64 [rows, T], T at most ``max_length``; labels int64
        [rows, T]; and the owner of each row.
    """
    rows: list[list[Encoded]] = []
    of: list[str | None] = []
    open_: dict[str | None, int] = {}  # the row of each owner that is being filled
    for one, owner in zip(encoded, owners, strict=True):
        place = open_.get(owner)
        if place is None or sum(len(e.ids) for e in rows[place]) + len(one.ids) > max_length:
            place = open_[owner] = len(rows)
            rows.append([])
            of.append(owner)
        rows[place].append(one)
    longest = max(sum(len(one.ids) for one in together) for together in rows)
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    labels, positions = np.full_like(ids, IGNORED_TOKEN), np.zeros_like(ids)
    for row, together in enumerate(rows):
        start = end = 0
        for one in together:
            start, end = end, end + len(one.ids)
            ids[row, start:end], labels[row, start:end] = one.ids, one.labels
            labels[row, start] = IGNORED_TOKEN  # what stands before it is another conversation
            positions[row, start:end] = np.arange(end - start)
        # Padding goes on: at another position 0 one more conversation would seem to begin.
        positions[row, end:] = np.arange(longest - end) + end - start
    inputs = {"input_ids": ids, "position_ids": positions}
    table = Samples({n: torch.from_numpy(v) for n, v in inputs.items()}, torch.from_numpy(labels))
    return table, of
