"""Read conversations from a file: chat messages, prompts with responses, or Alpaca's columns.

One row is one conversation. The columns determine its form: ``messages`` (a list of roles and
contents), ``instruction``, ``input`` and ``output`` (Alpaca), or ``prompt`` and ``response``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedraclora.data.tables import Table
from fedraclora.errors import ConfigError, DataError, unknown

Message = dict[str, str]

ROLES = ("system", "user", "assistant")
_SHAREGPT = {"human": "user", "gpt": "assistant"}  # with `from` and `value` for role and content
_PLACE = re.compile(r"\{([^{}]+)\}")


@dataclass(frozen=True)
class Conversation:
    """Messages that end with an answer of the assistant, or before it.

    Attributes:
        messages: Each with a ``role`` of `ROLES` and a ``content``.
        where: File and row, for errors.
        client: Its client, or None.
        answered: Whether it includes the last answer; else that will be generated.
        choices: Possible last answers, the right one among them; empty if unknown.
    """

    messages: tuple[Message, ...]
    where: str
    client: str | None = None
    answered: bool = True
    choices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject a conversation without anything to learn."""
        if [m for m in self.messages if m["role"] == "assistant" and not m["content"].strip()]:
            raise DataError(
                f"{self.where}: the response is empty, which would teach the model to answer "
                "nothing. Leave the row out or fill it."
            )
        if not self.messages or self.messages[0]["role"] == "assistant":
            raise DataError(f"{self.where}: the conversation does not begin with a prompt")
        if self.answered and self.messages[-1]["role"] != "assistant":
            raise DataError(f"{self.where}: the conversation does not end with a response")


@dataclass(frozen=True)
class RowForm:
    """Define how a row is read.

    Attributes:
        prompt: A column, or a text with columns in braces (``"Review: {sentence}"``); None: chosen
            by the existing columns.
        response: The same for the answer.
        answers: Texts for the values of ``response`` (``{"0": "negative"}``), or None.
        client: The column that names the client, or None.
        answered: Whether the last answer is read; else it may be missing.
        choices: Possible answers, or the column that lists those of a row; None: the texts of
            ``answers``, if any.
    """

    prompt: str | None = None
    response: str | None = None
    answers: Mapping[str, str] | None = None
    client: str | None = None
    answered: bool = True
    choices: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        """Reject a prompt without a response, or the reverse."""
        if (self.prompt is None) != (self.response is None):
            raise ConfigError(
                f"data.prompt={self.prompt}, data.response={self.response}: set both. Leave both "
                "unset for files with the columns messages, prompt and response, or instruction "
                "and output."
            )

    def read(self, row: Mapping[str, Any], where: str) -> Conversation:
        """Create a conversation from a row.

        Raises:
            ConfigError: If a column that is named does not exist.
            DataError: Naming file and row, if a value cannot be used.
        """
        client = None if self.client is None else text_of(row, self.client, "data.client", where)
        if client == "":
            raise DataError(
                f"{where}: the column {self.client} (data.client) is empty, so the row belongs "
                "to no client. Fill it or leave the row out."
            )
        messages = tuple(self._messages(row, where))
        choices = self._choices(row, messages[-1:], where) if self.answered else ()
        return Conversation(messages, where, client, self.answered, choices)

    def _choices(
        self, row: Mapping[str, Any], answer: Sequence[Message], where: str
    ) -> tuple[str, ...]:
        """Return the possible last answers, each once, in order."""
        found: Any = (self.answers or {}).values() if self.choices is None else self.choices
        if isinstance(self.choices, str):
            listed = text_of(row, self.choices, "data.choices", where)  # there is such a column
            found = row[self.choices]
            with suppress(ValueError):
                found = json.loads(listed) if isinstance(found, str) else found
            if isinstance(found, str | Mapping) or not hasattr(found, "__iter__"):
                raise DataError(
                    f"{where}: {self.choices} (data.choices) is {listed[:60]!r}, but must be a "
                    "list of answers (as JSON in a .csv or .tsv)"
                )
        choices = tuple(dict.fromkeys(str(text).strip() for text in found))
        if self.choices is not None and answer and answer[0]["content"].strip() not in choices:
            raise DataError(
                f"{where}: the response {answer[0]['content'][:60]!r} is none of the choices "
                f"{', '.join(map(repr, choices))[:200]} (data.choices). Give the text of a "
                "choice, not its number or letter."
            )
        return choices

    def _messages(self, row: Mapping[str, Any], where: str) -> list[Message]:
        if self.prompt is not None and self.response is not None:
            prompt = filled_in(self.prompt, row, "data.prompt", where)
            return _pair(prompt, self._answer(row, where) if self.answered else None)
        if not is_missing(row.get("messages")):
            return read_messages(row["messages"], where, answered=self.answered)
        for first, last in (("instruction", "output"), ("prompt", "response")):
            if first in row and (last in row or not self.answered):
                more = ("input",) if first == "instruction" and "input" in row else ()
                parts = [text_of(row, key, "data", where) for key in (first, *more)]
                answer = text_of(row, last, "data", where) if self.answered else None
                return _pair("\n\n".join(filter(None, parts)), answer)
        wanted = "prompt and response, or instruction and output are"
        raise ConfigError(
            f"{where} has the columns {', '.join(map(str, row))}; messages, or "
            f"{wanted if self.answered else 'prompt, or instruction is'} wanted: name yours with "
            "data.prompt and data.response"
        )

    def _answer(self, row: Mapping[str, Any], where: str) -> str:
        found = filled_in(str(self.response), row, "data.response", where)
        if self.answers is None:
            return found
        if found not in self.answers:
            error = unknown("value", found, self.answers)
            raise DataError(f"{where}: data.answers has no text for it: {error}")
        return self.answers[found]


def _pair(prompt: str, response: str | None) -> list[Message]:
    answer = [] if response is None else [{"role": "assistant", "content": response}]
    return [{"role": "user", "content": prompt}, *answer]


def filled_in(text: str, row: Mapping[str, Any], key: str, where: str) -> str:
    """Fill columns into a text with braces; a text without braces is a column's name.

    Example:
        >>> filled_in("Is this good? {0}", {"0": "a dull film"}, "data.prompt", "row 1")
        'Is this good? a dull film'
        >>> filled_in("label", {"label": 1}, "data.response", "row 1")
        '1'
    """
    if not _PLACE.search(text):
        return text_of(row, text, key, where)
    return _PLACE.sub(lambda found: text_of(row, found[1], key, where), text)


def text_of(row: Mapping[str, Any], column: str, key: str, where: str) -> str:
    """Return a value as text without surrounding space; a missing value is empty.

    Raises:
        ConfigError: If there is no such column.
    """
    if column not in row:
        raise ConfigError(f"{key}: {where}: {unknown('column', column, [*map(str, row)])}")
    return "" if is_missing(row[column]) else str(row[column]).strip()


def is_missing(value: object) -> bool:
    """Return whether a cell is missing: None or NaN."""
    return value is None or (isinstance(value, float) and value != value)  # noqa: PLR0124


def read_messages(value: Any, where: str, *, answered: bool = True) -> list[Message]:
    """Check a list of messages (JSON in a CSV file), and drop those after the last answer.

    If the answer will be generated (``answered`` is False), one at the end is removed.

    Raises:
        DataError: Naming file and row, and what is wrong.
    """
    wanted = f"a list of messages with role ({', '.join(ROLES)}) and content"
    try:
        messages = json.loads(value) if isinstance(value, str) else list(value)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"{where}: messages is {str(value)[:60]!r}, but must be {wanted}"
        ) from error
    found = []
    for message in messages:
        if not isinstance(message, Mapping):
            raise DataError(
                f"{where}: a message is {str(message)[:60]!r}, but messages must be {wanted}"
            )
        role = str(message.get("role", message.get("from")))
        role, content = _SHAREGPT.get(role, role), message.get("content", message.get("value"))
        if role not in ROLES or not isinstance(content, str):
            raise DataError(f"{where}: a message is {dict(message)}, but messages must be {wanted}")
        found.append({"role": role, "content": content})
    if not answered:
        return found[:-1] if found and found[-1]["role"] == "assistant" else found
    answers = [place for place, message in enumerate(found) if message["role"] == "assistant"]
    return found[: answers[-1] + 1] if answers else found


def read_conversations(found: Any, form: RowForm, *, header: bool = True) -> list[Conversation]:
    """Read every conversation of a file, or of rows in memory.

    Args:
        found: A file for `Table.read`, or an input of `program_rows`.
        form: How rows are read.
        header: Whether the first row of a .csv or .tsv names the columns; else they are 0, 1, ...

    Raises:
        ConfigError: If the kind of file is not known, or a column does not exist.
        DataError: If the file cannot be read, or a row cannot be used, naming it.
    """
    file = isinstance(found, Path)
    where = str(found) if file else "data"
    rows = (
        Table.read(found, words=None, header=header).rows() if file else program_rows(found, form)
    )
    conversations = [form.read(row, f"{where}, row {n}") for n, row in enumerate(rows, 1)]
    if not conversations:
        raise DataError(f"{where} holds no rows")
    return conversations


def program_rows(found: Any, form: RowForm) -> list[Mapping[str, Any]]:
    """Return rows from a frame, a list of dicts, or a list of prompts to answer.

    Raises:
        DataError: If they are something else.
    """
    if hasattr(found, "iloc"):
        return Table.of(found, "data").rows()
    texts = isinstance(found, list) and all(isinstance(row, str) for row in found)
    columns = ["prompt"] if form.prompt is None else _PLACE.findall(form.prompt) or [form.prompt]
    if texts and not form.answered and len(set(columns)) == 1:
        return [{columns[0]: text} for text in found]
    if isinstance(found, list) and all(isinstance(row, Mapping) for row in found):
        return found
    raise DataError(
        f"data is a {type(found).__name__}, but must be a file, a frame or a list of dicts with "
        "the columns of the run's data" + ("" if form.answered else ", or a list of prompts")
    )
