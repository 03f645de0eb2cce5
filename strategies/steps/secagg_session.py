"""The exchanges of secure aggregation: who is asked what, who answers, who has left."""

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
from fedraclora.wire.answers import NoAnswer, Staged
from fedraclora.wire.exchange import Ask, Stage
from fedraclora.wire.reply import Wanted, checked

Check = Callable[[int, Any, Any], None]
Said = tuple[dict[int, Any], dict[int, str]]  # what clients said, and why others did not
NOTHING: Mapping[str, Any] = {}
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
        send: Asks clients, and gives what comes.
        texts: Counts what is said besides.

    Attributes:
        settings: What all clients are told in each stage.
    """

    settings: ClassVar[dict[str, Any]] = {}

    def __init__(self, exchange: Exchange, send: Send, texts: Texts) -> None:
        self.exchange, self.send, self.texts = exchange, send, texts

    def size(self, _answer: Staged) -> int:
        """Return how many words the vectors of an answer must have."""
        return self.exchange.layout.size + 2

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

    def collect(self, stage: str, data: dict[int, Any], check: Check) -> Said:
        """Ask as `ask` does; whoever does not answer is nobody's business yet."""

        def read(said: dict[int, Any], _answer: Staged) -> Said:
            found, bad = {}, {}
            for client in said.keys() & data.keys():
                try:
                    check(client, data[client], said[client])
                    found[client] = said[client]
                except Exception as error:  # whatever another machine may send
                    bad[client] = f"its reply is refused: {error!r}"
            return found, bad

        return self._talk(stage, data, read)

    def masked(self, pending: dict[int, Any], settings: dict[str, Any]) -> Said:
        """Ask clients to train; return their masked vectors, or whose shares they could not open.

        Args:
            pending: What each client is told of its neighbours, by id.
            settings: What all are told.
        """

        def read(said: dict[int, Any], answer: Staged) -> Said:
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
        read: Callable[[dict[int, Any], Staged], Said],
        settings: Mapping[str, Any] = NOTHING,
    ) -> Said:
        """Ask clients; give what they said, and why others did not.

        What cannot be read, or comes from another client than was asked, is a failure of those
        who were asked; a second answer to an ask is not looked at.

        Raises:
            ClientError: If a client met what is no client's fault.
        """
        asks = []
        for ask in self.exchange.asks:
            if part := {c: data[c] for c in ask.clients if c in data}:
                stage = Stage(name, {**self.settings, **settings}, part).heard
                alone = Ask(replace(ask.request, clients=torch.tensor([*part])), stage=stage)
                asks.append(replace(ask, stage=stage) if name == "masked" else alone)
                self.texts.down += stage.length
        left = {id(ask): ask.clients for ask in asks}
        answers: dict[int, Any] = {}
        failures: dict[int, str] = {}
        wanted = Wanted(self.exchange.round_, self.exchange.version)
        for ask, answer in self.send(asks):
            asked = left.pop(id(ask), [])
            if isinstance(answer, NoAnswer):
                failures |= dict.fromkeys(asked, self.exchange.failed(answer))
                continue
            try:
                staged = checked(answer, ask, Staged, wanted)
                found, why = read(staged.stage.data, staged)
                why |= staged.failures
                self.texts.up += staged.stage.length
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
        left = {c: failures.get(c, "no reply in time") for c in asked.keys() - answers.keys()}
        said = f"secure aggregation, {stage}"
        self.exchange.fail(Refusal(c, f"{said}: {why}") for c, why in left.items())

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
                f"round {self.exchange.round_}: {len(clients)} client(s) are left for the "
                f"stage {stage} of secure aggregation. At least {LEAST_CLIENTS} are needed"
            )
