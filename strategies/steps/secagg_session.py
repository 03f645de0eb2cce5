"""Run the exchanges of secure aggregation, and track which clients reply or leave."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import torch

from fedraclora.errors import ClientError, WireError
from fedraclora.privacy.secagg import LEAST_CLIENTS
from fedraclora.protocol.uplinks import Refusal
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import Send
from fedraclora.wire.answers import NoAnswer, StageAnswer
from fedraclora.wire.exchange import Ask, Stage
from fedraclora.wire.reply import ExpectedReply, checked

Check = Callable[[int, Any, Any], None]
Said = tuple[dict[int, Any], dict[int, str]]  # the clients' replies, and reasons of failures
NOTHING: Mapping[str, Any] = {}
LONGEST_REASON = 500  # most characters of a client's failure message


@dataclass
class Texts:
    """Count bytes of keys, shares and complaints in a round, over all its attempts."""

    round_: int = 0
    up: int = 0
    down: int = 0


class SecAggSession:
    """Run the exchanges of one round, and record clients that leave, and the cost.

    Args:
        exchange: The train exchange, which records failures.
        send: Sends requests, and returns replies.
        texts: Counts the bytes of other messages.

    Attributes:
        settings: Settings for all clients in each stage.
    """

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, exchange: Exchange, send: Send, texts: Texts) -> None:
        self.exchange, self.send, self.texts = exchange, send, texts

    def size(self, _answer: StageAnswer) -> int:
        """Return the number of words in a reply's vectors."""
        return self.exchange.layout.size + 2

    def ask(self, stage: str, data: dict[int, Any], check: Check) -> dict[int, Any]:
        """Ask clients for a stage without training; return each reply.

        Args:
            stage: Its name.
            data: The data for each client, by id.
            check: Checks a client's reply against its data; raises if it does not fit.

        Raises:
            ClientError: If too few clients are left.
        """
        self.enough(data, stage)
        answers, failures = self.collect(stage, data, check)
        self.leave(stage, data, answers, failures)
        return answers

    def collect(self, stage: str, data: dict[int, Any], check: Check) -> Said:
        """Ask like `ask`; missing replies are not recorded yet."""

        def read(said: dict[int, Any], _answer: StageAnswer) -> Said:
            found, bad = {}, {}
            for client in said.keys() & data.keys():
                try:
                    check(client, data[client], said[client])
                    found[client] = said[client]
                except Exception as error:  # another machine may send anything
                    bad[client] = f"its reply is refused: {error!r}"
            return found, bad

        return self._talk(stage, data, read)

    def masked(self, pending: dict[int, Any], settings: dict[str, Any]) -> Said:
        """Ask clients to train; return masked vectors, or senders of undecryptable shares.

        Args:
            pending: Data on its neighbours for each client, by id.
            settings: Settings for all clients.
        """

        def read(said: dict[int, Any], answer: StageAnswer) -> Said:
            clients = answer.clients.tolist()
            rows = np.zeros((0, 0), np.uint32) if answer.words is None else answer.words.numpy()
            wanted = (len(clients), self.size(answer)) if clients else rows.shape
            if rows.shape != wanted:
                raise WireError(
                    f"the masked vectors have the shape {rows.shape}, expected {wanted}"
                )
            self.exchange.received += rows.nbytes
            found: dict[int, Any] = {}
            for client, words in said.items():
                closed = {int(c) for c in words["unopened"]}
                if client in pending and closed <= {int(c) for c in pending[client]["shares"]}:
                    found[client] = closed
            return found | dict(zip(clients, rows, strict=True)), {}

        found, failures = self._talk("masked", pending, read, settings)
        return {c: part for c, part in found.items() if c in pending}, failures

    def _talk(
        self,
        name: str,
        data: dict[int, Any],
        read: Callable[[dict[int, Any], StageAnswer], Said],
        settings: Mapping[str, Any] = NOTHING,
    ) -> Said:
        """Ask clients; return their replies, and reasons of failures.

        An unreadable reply, or one from other clients, counts as a failure of the asked clients; a
        second reply to a request is ignored.

        Raises:
            ClientError: For an error that is no client's fault.
        """
        asks = []
        for ask in self.exchange.asks:
            if part := {c: data[c] for c in ask.clients if c in data}:
                stage = Stage(name, {**self.settings, **settings}, part).through_json
                alone = Ask(replace(ask.request, clients=torch.tensor([*part])), stage=stage)
                asks.append(replace(ask, stage=stage) if name == "masked" else alone)
                self.texts.down += stage.length
        left = {id(ask): ask.clients for ask in asks}
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        wanted = ExpectedReply(self.exchange.round_, self.exchange.version)
        for ask, answer in self.send(asks):
            asked = left.pop(id(ask), [])
            if isinstance(answer, NoAnswer):
                failures |= dict.fromkeys(asked, self.exchange.failed(answer))
                continue
            try:
                staged = checked(answer, ask, StageAnswer, wanted)
                found, why = read(staged.stage.data, staged)
                why |= staged.failures
                self.texts.up += staged.stage.length
            except Exception as error:  # another machine may send anything
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
        """Record clients that left at a stage.

        Raises:
            ClientError: If more clients failed than allowed.
        """
        left = {c: failures.get(c, "no reply in time") for c in asked.keys() - answers.keys()}
        stage_name = f"secure aggregation, {stage}"
        self.exchange.fail(Refusal(c, f"{stage_name}: {why}") for c, why in left.items())

    def name(self, leaves: dict[int, str]) -> list[Refusal]:
        """Record leaving clients with their reasons; return the record."""
        noted = [Refusal(c, f"secure aggregation: {why}") for c, why in sorted(leaves.items())]
        self.exchange.failures += noted
        return noted

    def enough(self, clients: Collection[int], stage: str) -> None:
        """Reject a sum over too few clients.

        Raises:
            ClientError: If fewer than `LEAST_CLIENTS` clients are left.
        """
        if len(clients) < LEAST_CLIENTS:
            raise ClientError(
                f"round {self.exchange.round_}: {len(clients)} client(s) are left for the "
                f"stage {stage} of secure aggregation. At least {LEAST_CLIENTS} are needed"
            )
