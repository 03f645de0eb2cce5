"""The grid of real SuperNodes: every message brings its client's base weights up to date."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid as FlowerGrid
from flwr.supercore.inflatable.inflatable_utils import pull_objects
from typing_extensions import override

from fedraclora.config.settings import DeployConfig
from fedraclora.engines.base import Traffic
from fedraclora.engines.deploy.roster import Roster
from fedraclora.engines.post import PostedGrid
from fedraclora.engines.records import folded, from_records, message_bytes, unfolded
from fedraclora.engines.replies import STALE, UNREADABLE
from fedraclora.errors import ClientError
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.exchange import Answer, Ask, Came, NoAnswer
from fedraclora.wire.fields import printable, shown
from fedraclora.wire.records import Content, Fields
from fedraclora.wire.reply import read_answer
from fedraclora.wire.weight_update import add_weight_update

Answered = tuple[Ask, Answer | NoAnswer]
Reply = tuple[str, Message | NoAnswer]  # a reply, with the number of the message it answers
NODE_UNAVAILABLE = 5  # Flower's code for a node that is not there
PAUSE = 0.1  # seconds between looks for replies: each is a request


@dataclass(frozen=True)
class Letter:
    """An ask as a message to its client's node; ``fetched``: payload of its weight update."""

    ask: Ask
    node: int
    message: Message
    fetched: int


class DeployGrid(PostedGrid):
    """Sends each client its messages, with what its base weights lack.

    Args:
        grid: Flower's own.
        history: The versions of the base weights, published by the strategy.
        run_id: Of the run folder: under it clients keep weights and state.
        settings: Seconds to wait, and how many clients are enough.
        known: Whether clients can make the initial weights themselves.
        ended: Tells whether the runtime has ended.
        pause: Seconds between looks for replies.

    Attributes:
        roster: Who is where, and holds which version.
        one_by_one: Whether replies are asked for one by one: once one could not be decoded.
    """

    def __init__(
        self,
        grid: FlowerGrid,
        history: WeightHistory,
        run_id: str,
        settings: DeployConfig,
        *,
        known: bool,
        ended: Callable[[], bool] = lambda: False,
        pause: float = PAUSE,
    ) -> None:
        super().__init__(grid, ended=ended, pause=pause)
        self.history, self.run_id, self.settings = history, run_id, settings
        self.first = 0 if known else None  # what a client holds that holds nothing
        self.traffic: Traffic = Traffic()
        self.roster = Roster(self)
        self.one_by_one = False

    @override
    def ask(self, asks: Sequence[Ask], timeout: float | None = None) -> Came:
        """Ask clients, each by a message of its own.

        Raises:
            ClientError: If too few of the clients are connected in time.
            EngineError: If the runtime ended.
        """
        seconds = self.settings.timeout if timeout is None else timeout
        letters, found = self.letters(asks, seconds)
        waiting = {self._push(letter): letter for letter in letters}
        return found + self.receive(waiting, time.monotonic() + seconds)

    def letters(self, asks: Sequence[Ask], seconds: float) -> tuple[list[Letter], list[Answered]]:
        """Write a message for each client that is connected; for the others say so."""
        nodes = self.roster.gather([client for ask in asks for client in ask.clients])
        letters, absent = [], list[Answered]()
        for ask in asks:
            (client,) = ask.clients
            if client in nodes:
                version = self.roster.versions.get((nodes[client], client))
                version = self.first if version is None else version
                letters.append(self._letter(ask, nodes[client], version, seconds))
            else:
                absent.append((ask, NoAnswer("it is not connected")))
        return letters, absent

    def receive(
        self, waiting: dict[str, Letter], end: float, came: Sequence[Reply] = ()
    ) -> list[Answered]:
        """Wait for replies; whoever asks for every weight gets them, once.

        Args:
            waiting: What was sent, by Flower's number of it.
            end: When to give up.
            came: Replies that are here already.
        """
        found, again = list[Answered](), set[str]()
        while waiting:
            came = came or self._pulled(waiting)
            for name, reply in came:
                if isinstance(reply, Message):
                    self.traffic.serialised += message_bytes(reply)
                letter = waiting.pop(name, None)
                if letter is None:
                    self.incidents.append("a second reply to a message was ignored")
                    continue
                answer = self.read(reply, letter) if isinstance(reply, Message) else reply
                if answer is not None:
                    found.append((letter.ask, answer))
                elif name in again:
                    found.append((letter.ask, NoAnswer("it asked for every base weight twice")))
                else:
                    (client,), left = letter.ask.clients, max(1.0, end - time.monotonic())
                    self.incidents.append(f"client {client} was sent every base weight")
                    letter = self._letter(letter.ask, letter.node, None, left)
                    again.add(new := self._push(letter))
                    waiting[new] = letter
            if time.monotonic() > end:
                break
            if waiting and not came:
                self.wait("all clients had replied")
            came = ()
        return found

    def _pulled(self, waiting: Mapping[str, Letter]) -> list[Reply]:
        """Pull the replies that have arrived, each with the number of the message it answers.

        Flower decodes them together: if one is damaged it gives none back, and does not say whose
        it is. Then the round is run again and replies are asked for one by one, so that a damaged
        one is the failure of its client.

        Raises:
            ClientError: The first time that a reply cannot be decoded.
        """
        found = list[Reply]()
        for names in ([name] for name in waiting) if self.one_by_one else [list(waiting)]:
            try:
                came = list(self.grid.pull_messages(names))
            except UNREADABLE as error:
                why = printable(str(error))
                if self.one_by_one:
                    found.append((names[0], NoAnswer(f"its reply cannot be decoded: {why}")))
                    continue
                self.one_by_one = True
                raise ClientError(
                    f"a client's reply cannot be decoded ({why}); from here on replies are asked "
                    "for one by one, so that such a client is left out by name"
                ) from error
            found += [(reply.metadata.reply_to_message_id, reply) for reply in came]
        return found

    def _letter(self, ask: Ask, node: int, version: int | None, seconds: float) -> Letter:
        """Write a message with what brings its client from ``version`` to the newest."""
        update = self.history.since(version)
        more: Content = {"job": self.job()}
        add_weight_update(more, update)
        message = self.message(ask, node, more, seconds)
        message.content = self.wrapped(folded(message.content))
        return Letter(ask, node, message, update.payload_bytes)

    def job(self) -> Fields:
        """Say what a client must know beside what it is asked."""
        return Fields(run=self.run_id)

    def wrapped(self, content: RecordDict) -> RecordDict:
        """Put what is written of a message into the shape in which it is sent."""
        return content

    def _push(self, letter: Letter) -> str:
        """Send a message; give Flower's number of it."""
        (name,) = self.grid.push_messages([letter.message])
        self.count(letter)
        return name

    def count(self, letter: Letter) -> None:
        """Count a message that is sent."""
        self.traffic.serialised += message_bytes(letter.message)
        self.traffic.sent.append(letter.ask)
        self.traffic.fetched += letter.fetched

    def read(self, reply: Message, letter: Letter) -> Answer | NoAnswer | None:
        """Read a reply, check it against the weights, and note the version its client has now.

        Returns:
            What came; None where the client asks for every base weight whole.
        """
        if reply.has_error():
            if reply.error.code == NODE_UNAVAILABLE:
                self.roster.forget(letter.node)
            return self.answer(reply, letter.ask)
        if not reply.has_content():
            return NoAnswer("its reply is empty")
        try:
            content = unfolded(reply.content)
            if STALE in content:
                return None
            newest, job = self.history.since(self.history.version), content.get("job")
            proof = (job.get("held"), job.get("mark")) if isinstance(job, ConfigRecord) else None
            if proof != (expected := (newest.version, str(newest.mark))):
                came = "None" if proof is None else f"({', '.join(map(shown, proof))})"
                return NoAnswer(
                    f"it trained on weights of version and fingerprint {came}, wanted are "
                    f"{expected}"
                )
            (client,) = letter.ask.clients
            self.roster.versions[letter.node, client] = newest.version
            return self.answered(content, letter)
        except Exception as error:  # whatever another machine may send
            return NoAnswer(f"its reply is refused: {error}")

    def answered(self, content: RecordDict, letter: Letter) -> Answer:
        """Read what a client answers, whose weights are those of the server."""
        return read_answer(from_records(content), letter.ask)


def look_again_soon() -> None:
    """Shorten the pause after which Flower looks again for parts of a reply, in this process.

    Flower 1.42 gives a reply out as soon as it is announced, before its parts have come, and then
    pauses for a second or more; no option changes that.
    """
    from flwr.superlink.grid import http_grid

    http_grid.pull_objects = partial(pull_objects, initial_backoff=PAUSE)  # type: ignore[attr-defined]
