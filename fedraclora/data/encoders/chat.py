"""Tokenize conversations by a chat template, with labels on the answers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from fedraclora.data.encoders.conversations import Conversation
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
    """A possible last answer of a conversation: its tokens, without the end-of-text token.

    Attributes:
        ids: Token ids.
        characters: Length of the text.
        right: Whether it is the right answer.
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
        tokenizer: The tokenizer of transformers.

    Raises:
        ConfigError: If there is no tokenizer, no template, or no file of its name.
        DataError: If there is no such tokenizer.
    """

    def __init__(self, tokenizer: str | None, *, root: str | None, template: str | None) -> None:
        self.tokenizer = load_tokenizer(tokenizer, root)
        self.template = self.tokenizer.chat_template if template is None else _template(template)
        if not self.template:
            raise ConfigError(
                f"data.tokenizer={tokenizer} has no chat template: set data.template to a Jinja "
                "template or to a file with one (docs/language-models.md has one to begin with)"
            )

    def encode(self, conversations: Sequence[Conversation]) -> list[Encoded]:
        """Tokenize conversations; what follows an end-of-text token in an answer has no label.

        Prompts and answers are tokenized separately, as when an answer is generated.

        Raises:
            DataError: If the template refuses a conversation, or changes earlier messages.
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
        """Locate each choice in the text that the template wrote; none if it is not there."""
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
        """Split the text of a conversation into alternating prompts and answers."""
        found: list[Piece] = []
        done = ""
        for place, message in enumerate(conversation.messages):
            if message["role"] != "assistant":
                continue
            asked = self._text(conversation, place, prompt=True)
            answered = self._text(conversation, place + 1, prompt=False)
            if not asked.startswith(done) or not answered.startswith(asked):
                raise DataError(
                    f"{conversation.where}: the chat template does not write the answer after "
                    "its prompt, so the response cannot be found in the text. Set data.template "
                    "to one that appends each message."
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
    """Return the template, reading it from a file if needed."""
    if "{" in template:
        return template
    path = user_path("data.template", template)
    if not path.is_file():
        raise ConfigError(
            f"data.template={template} is neither a file nor a Jinja template (it has no brace)"
        )
    return path.read_text(encoding="utf-8")


def padded(encoded: Sequence[Encoded], pad: int) -> Samples:
    """Return conversations as one table, each row padded to the longest.

    Returns:
        ``input_ids`` and ``attention_mask`` int64 [N, T]; labels int64 [N, T]. Beside them, where
        there are choices: ``choices`` int64 [N, C, L], `IGNORED_TOKEN` behind each and where a
        question has fewer; ``characters`` int64 [N, C], -1 there, and ``right`` bool [N, C].
    """
    inputs = {
        "input_ids": _filled([one.ids for one in encoded], pad),
        "attention_mask": _filled([[1] * len(one.ids) for one in encoded], 0),
    }
    labels = _filled([one.labels for one in encoded], IGNORED_TOKEN)
    return Samples(inputs, labels, _beside(encoded))


def _filled(rows: Sequence[list[int]], fill: int) -> torch.Tensor:
    """Pad rows to the longest: int64 [N, T]."""
    numbers = [torch.tensor(row, dtype=torch.int64) for row in rows]
    return pad_sequence(numbers, batch_first=True, padding_value=fill)


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
    """Pack as many conversations of one owner into each row as fit, in their order.

    They do not see each other: positions restart at 0 with each, and without ``attention_mask``
    transformers' attention separates sequences by their positions.

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
    ids = _filled([[i for one in together for i in one.ids] for together in rows], pad)
    # The tokens before the first token of a conversation belong to another one.
    own = [[i for one in together for i in [IGNORED_TOKEN, *one.labels[1:]]] for together in rows]
    positions = []
    for *before, _ in ([len(one.ids) for one in together] for together in rows):
        # Positions continue in padding: another 0 would mark the start of a conversation.
        sizes = [*before, ids.shape[1] - sum(before)]
        positions.append([place for size in sizes for place in range(size)])
    inputs = {"input_ids": ids, "position_ids": torch.tensor(positions)}
    return Samples(inputs, _filled(own, IGNORED_TOKEN)), of
