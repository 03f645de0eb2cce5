"""The exchanges of secure aggregation: who is asked what, who answers, who has left."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from flwr.app import Message

from fedraclora.aggregate import Refusal, too_many
from fedraclora.engines.local import RUN_AT_FAULT
from fedraclora.errors import ClientError
from fedraclora.secagg import LEAST
from fedraclora.wire.records import clients_of, read_header, read_vectors
from fedraclora.wire.secagg import (
    Stage,
    Words,
    read_stage,
    read_words,
    stage_message,
    text_bytes,
)
from strategies.exchange import Exchange

Ask = Callable[[Iterable[Message]], Iterable[Message]]


class Talk:
    """The exchanges of one round: who is still there, who left when, and what it took.

    Args:
        exchange: The train exchange, which notes the failures.
        ask: Sends messages and gives the replies that come.
    """

    def __init__(self, exchange: Exchange, ask: Ask) -> None:
        self.exchange, self.send = exchange, ask
        self.nodes = [m.metadata.dst_node_id for m, _ in exchange.chunks]
        self.up = self.down = 0

    def ask(self, stage: str, data: dict[int, Any], *, used: bool = False) -> dict[int, Any]:
        """Ask clients for a stage in which nobody trains; give what each said.

        Args:
            stage: Its name.
            data: What each client is told, by id.
            used: Whether a client that does not answer has sent its part already.
        """
        if not used:
            self._enough(data, stage)
        round_, messages = self.exchange.round_, []
        for node, (_, chunk) in zip(self.nodes, self.exchange.chunks, strict=True):
            part = {c: data[c] for c in chunk if c in data}
            if part:
                content = stage_message(round_, Stage(stage, {}, part))
                self.down += text_bytes(content)
                group = str(round_)
                ttl = self.exchange.loop.timeout
                messages.append(Message(content, node, "train.cohort", group_id=group, ttl=ttl))
        said: dict[int, Any] = {}
        failures: dict[int, str] = {}
        for reply in self._answers(messages, failures):
            answer = read_stage(reply.content)
            if answer is None or answer.name != stage:
                continue
            self.up += text_bytes(reply.content)
            said |= {c: d for c, d in answer.data.items() if c in data}
            failures |= {int(c): w for c, w in read_header(reply.content)["failures"].items()}
        if not used:
            self._leave(stage, data, said, failures)
        return said

    def masked(self, inbox: dict[int, Any], settings: dict[str, Any]) -> dict[int, Words]:
        """Have clients train; give their masked vectors."""
        self._enough(inbox, "masked")
        messages = []
        for message, chunk in self.exchange.chunks:
            part = {c: inbox[c] for c in chunk if c in inbox}
            if part:
                message.content["secure"] = Stage("masked", settings, part).record()
                self.down += text_bytes(message.content)
                messages.append(message)
        words: dict[int, Words] = {}
        failures: dict[int, str] = {}
        size = self.exchange.layout.size + 1
        for reply in self._answers(messages, failures):
            if read_stage(reply.content) is None:
                continue
            rows = read_words(reply.content)
            clients = read_vectors(reply.content)["clients"].tolist()
            if rows.shape == (len(clients), size):
                words |= {c: row for c, row in zip(clients, rows, strict=True) if c in inbox}
            failures |= {int(c): w for c, w in read_header(reply.content)["failures"].items()}
        self._leave("masked", inbox, words, failures)
        self._enough(words, "unmask")
        return words

    def _answers(self, messages: list[Message], failures: dict[int, str]) -> Iterator[Message]:
        """Send messages; give the replies that are no errors, and note those that are.

        Raises:
            ClientError: If a client met what is no client's fault.
        """
        replies = self.send(messages)  # only now a message has its id
        sent = {m.metadata.message_id: clients_of(m.content) for m in messages}
        for reply in replies:
            if not reply.has_error():
                yield reply
                continue
            reason = str(reply.error.reason)
            if reply.error.code == RUN_AT_FAULT:
                raise ClientError(f"round {self.exchange.round_} cannot be run: {reason}")
            asked = sent.get(str(reply.metadata.reply_to_message_id), [])
            failures |= dict.fromkeys(asked, reason)

    def _leave(
        self,
        stage: str,
        asked: dict[int, Any],
        said: dict[int, Any],
        failures: dict[int, str],
    ) -> None:
        """Note who left at a stage.

        Raises:
            ClientError: If more clients failed than allowed.
        """
        for client in sorted(asked.keys() - said.keys()):
            why = failures.get(client, "no reply in time")
            self.exchange.failures.append(Refusal(client, f"secure aggregation, {stage}: {why}"))
        found, allowed = self.exchange.all_failures, self.exchange.loop.max_failures
        if len(found) > allowed:
            raise too_many(found, self.exchange.round_, allowed)

    def _enough(self, clients: dict[int, Any], stage: str) -> None:
        if len(clients) < LEAST:
            raise ClientError(
                f"round {self.exchange.round_}: {len(clients)} client(s) are left for the stage "
                f"{stage} of secure aggregation; {LEAST} or more are wanted"
            )
