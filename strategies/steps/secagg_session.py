"""The exchanges of secure aggregation: who is asked what, who answers, who has left."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from flwr.app import Message, RecordDict

from fedraclora.engines.local import RUN_AT_FAULT
from fedraclora.errors import ClientError, WireError
from fedraclora.privacy.secagg import LEAST_CLIENTS
from fedraclora.protocol.uplinks import Refusal, too_many
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import Ask
from fedraclora.wire.records import clients_of, read_header, read_vectors
from fedraclora.wire.secagg import (
    Stage,
    read_stage,
    read_words,
    stage_message,
    text_bytes,
)

Check = Callable[[int, Any, Any], None]
Factors = tuple[dict[int, Any], dict[int, str]]  # what clients said, and why others did not
LONGEST_REASON = 500  # characters of what a client says of its failure


@dataclass
class Texts:
    """Bytes of keys, shares and complaints in a round, all its attempts together."""

    round_: int = 0
    up: int = 0
    down: int = 0


class SecAggSession:
    """The exchanges of one round: who is still there, who left when, and what it took.

    Args:
        exchange: The train exchange, which notes the failures.
        ask: Sends messages and gives the replies that come.
        texts: Counts what is said besides.
    """

    def __init__(self, exchange: Exchange, ask: Ask, texts: Texts) -> None:
        self.exchange, self.send, self.texts = exchange, ask, texts
        self.nodes = [m.metadata.dst_node_id for m, _ in exchange.chunks]

    def ask(self, stage: str, data: dict[int, Any], check: Check) -> dict[int, Any]:
        """Ask clients for a stage in which nobody trains; give what each said.

        Args:
            stage: Its name.
            data: What each client is told, by id.
            check: Holds what a client said against what it was told; raises if it does not fit.

        Raises:
            ClientError: If too few clients are left.
        """
        self.enough(data, stage)
        answers, failures = self.collect(stage, data, check)
        self.leave(stage, data, answers, failures)
        return answers

    def collect(self, stage: str, data: dict[int, Any], check: Check) -> Factors:
        """Ask as `ask` does; whoever does not answer is nobody's business yet."""

        def read(content: RecordDict) -> Factors:
            answer = read_stage(content)
            if answer is None or answer.name != stage:
                raise WireError(
                    f"the reply is not an answer to the stage {stage} of secure aggregation"
                )
            found, bad = {}, {}
            for client in answer.data.keys() & data.keys():
                try:
                    check(client, data[client], answer.data[client])
                    found[client] = answer.data[client]
                except Exception as error:  # whatever another machine may send
                    bad[client] = f"its reply is refused: {error!r}"
            return found, bad

        round_, messages = self.exchange.round_, []
        for node, (_, chunk) in zip(self.nodes, self.exchange.chunks, strict=True):
            part = {c: data[c] for c in chunk if c in data}
            if part:
                content = stage_message(round_, Stage(stage, {}, part))
                group, ttl = str(round_), self.exchange.loop.timeout
                messages.append(Message(content, node, "train.cohort", group_id=group, ttl=ttl))
        return self._talk(messages, read)

    def masked(self, pending: dict[int, Any], settings: dict[str, Any]) -> Factors:
        """Ask clients to train; return their masked vectors, or whose shares they could not open.

        Args:
            pending: What each client is told of its neighbours, by id.
            settings: What all are told.
        """
        size = self.exchange.layout.size + 1

        def read(content: RecordDict) -> Factors:
            rows, clients = read_words(content), read_vectors(content)["clients"].tolist()
            if rows.shape != (len(clients), size):
                raise WireError(
                    f"masked vectors of shape {rows.shape} came; {(len(clients), size)} is wanted"
                )
            self.exchange.received += rows.nbytes
            stage = read_stage(content)
            found: dict[int, Any] = {}
            for client, answer in (stage.data if stage is not None else {}).items():
                closed = {int(c) for c in answer["unopened"]}
                if client in pending and closed <= {int(c) for c in pending[client]["shares"]}:
                    found[client] = closed
            return found | dict(zip(clients, rows, strict=True)), {}

        messages = []
        for message, chunk in self.exchange.chunks:
            part = {c: pending[c] for c in chunk if c in pending}
            if part:
                message.content["secure"] = Stage("masked", settings, part).record()
                messages.append(message)
        found, failures = self._talk(messages, read)
        return {c: part for c, part in found.items() if c in pending}, failures

    def _talk(self, messages: list[Message], read: Callable[[RecordDict], Factors]) -> Factors:
        """Send messages; give what clients said, and why others did not.

        What cannot be read, or comes from another client than was asked, is a failure of those
        who were asked; a second reply to a message is not looked at.

        Raises:
            ClientError: If a client met what is no client's fault.
        """
        self.texts.down += sum(text_bytes(message.content) for message in messages)
        replies = self.send(messages)  # only now a message has its id
        sent = {m.metadata.message_id: clients_of(m.content) for m in messages}
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        for reply in replies:
            asked = sent.pop(str(reply.metadata.reply_to_message_id), [])
            if reply.has_error():
                reason = str(reply.error.reason)
                if reply.error.code == RUN_AT_FAULT and not self.exchange.loop.guarded:
                    raise ClientError(f"round {self.exchange.round_} cannot be run: {reason}")
                failures |= dict.fromkeys(asked, reason)
                continue
            try:
                found, why = read(reply.content)
                why |= {int(c): str(w) for c, w in read_header(reply.content)["failures"].items()}
                self.texts.up += text_bytes(reply.content)
            except Exception as error:  # whatever another machine may send
                why, found = dict.fromkeys(asked, f"its reply is refused: {error!r}"), {}
            answers |= {c: part for c, part in found.items() if c in asked}
            failures |= {c: text[:LONGEST_REASON] for c, text in why.items() if c in asked}
        return answers, failures

    def leave(
        self,
        stage: str,
        asked: dict[int, Any],
        answers: dict[int, Any],
        failures: dict[int, str],
    ) -> None:
        """Note who left at a stage.

        Raises:
            ClientError: If more clients failed than allowed.
        """
        for client in sorted(asked.keys() - answers.keys()):
            why = failures.get(client, "no reply in time")
            self.exchange.failures.append(Refusal(client, f"secure aggregation, {stage}: {why}"))
        exchange, loop = self.exchange, self.exchange.loop
        exchange.failures.sort(key=lambda f: f.client)
        if len(exchange.all_failures) > loop.allowed(len(exchange.first.cohort)):
            raise too_many(exchange.all_failures, exchange.round_, loop.rule)

    def name(self, leaves: dict[int, str]) -> list[Refusal]:
        """Note who leaves, and why; give what was noted."""
        noted = [Refusal(c, f"secure aggregation: {why}") for c, why in sorted(leaves.items())]
        self.exchange.failures += noted
        return noted

    def enough(self, clients: Collection[int], stage: str) -> None:
        """Reject a sum of too few clients.

        Raises:
            ClientError: If fewer than `LEAST_CLIENTS` clients are left.
        """
        if len(clients) < LEAST_CLIENTS:
            raise ClientError(
                f"round {self.exchange.round_}: {len(clients)} client(s) are left for the stage "
                f"{stage} of secure aggregation; {LEAST_CLIENTS} or more are wanted"
            )
