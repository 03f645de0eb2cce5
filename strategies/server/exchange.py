"""Run one exchange with the clients: build its requests, and check the replies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial

import torch

from fedraclora.devices.timeline import Timeline
from fedraclora.errors import ClientError, FedRacLoraError, WireError
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.cohorts import client_weights
from fedraclora.protocol.method import Cohort, RoundInstructions
from fedraclora.protocol.quantized import FULL
from fedraclora.protocol.rank_budgets import check_budgets, uploaded_numbers, widen
from fedraclora.protocol.uplinks import (
    UNSAID,
    Refusal,
    Uplinks,
    check_rows,
    failures_error,
    mean_reported,
    sum_blocks,
)
from fedraclora.strategies.server.cohort_sum import CohortSum
from fedraclora.strategies.server.guard import check_reply
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.tree import Tree, join_columns
from fedraclora.wire.answers import (
    Answer,
    Came,
    NoAnswer,
    NumericAnswer,
    SummedAnswer,
    TrainedAnswer,
    TrainingAnswer,
)
from fedraclora.wire.changes import ChangeCodec, uploaded_bytes
from fedraclora.wire.exchange import DTYPES, Ask, TrainRequest, payload_bytes, sent_tensors
from fedraclora.wire.fields import printable
from fedraclora.wire.reply import ExpectedReply, checked


@dataclass
class Exchange:
    """Hold one downlink and its replies.

    Attributes:
        downlink: The instructions.
        round_: From 1.
        version: Version of the base weights from which the clients train.
        cohort: The clients whose replies are used.
        asked: All asked clients, including stragglers and dropouts.
        loop: Settings of the round loop.
        rate_scale: Factor of the step sizes.
        reduce: Whether sums of clients are enough for the next steps.
        replies: In ascending order of client, once collected.
        failures: Clients whose reply is not used.
        received: Bytes of the clients' numbers, also of refused clients whose replies could be
            read.
        sizes: The bytes of each client, by id, if they are coded.
        asks: The request of each chunk of clients.
        before: The exchange before this one in the same round.
        mean_loss: Mean training loss over the clients whose replies are used, with their
            aggregation weights.
        metrics: Means of metrics of their training functions, weighted like the loss, by name.
        steps: Local steps of these clients.
        timeline: The exchange on the virtual clock, or None.
        clip: The largest norm of an update that clients may send; None: any.
        reduced: Whether sums were requested.
        sum: Sum of the arrived rows, if it is enough; None: the rows are kept.
        base: The weights from which clients train, to decode quantized changes.
        rounding: Mean rounding error of these clients' changes, each relative to its norm; None if
            they are not quantized.
        measure: As in the request.
    """

    downlink: RoundInstructions
    round_: int
    version: int
    cohort: Cohort
    asked: Cohort
    loop: LoopConfig
    rate_scale: float = 1.0
    reduce: bool = False
    before: Exchange | None = None
    replies: list[NumericAnswer] = field(default_factory=list)
    failures: list[Refusal] = field(default_factory=list)
    received: int = 0
    sizes: dict[int, int] = field(default_factory=dict)
    asks: list[Ask] = field(default_factory=list)
    mean_loss: float = float("nan")
    metrics: dict[str, float] = field(default_factory=dict)
    steps: int = 0
    timeline: Timeline | None = None
    clip: float | None = None
    reduced: bool = False
    sum: CohortSum | None = None
    base: Tree = field(default_factory=dict)
    rounding: float | None = None
    measure: str | None = None

    def __post_init__(self) -> None:
        """Set the layout of the uplink, and check that the method obeys the rank budgets."""
        check_budgets(self.downlink, self.cohort)
        self.layout = self.downlink.layout
        # If a client may fail, a round may have to be closed again without its row.
        if self.reduce and not self.loop.untrusted and not self.loop.max_failures:
            self.sum = CohortSum(self.downlink, self.cohort, self.loop.weights, self.layout.size)

    def ask(self) -> list[Ask]:
        """Build the request for each chunk of the cohort."""
        loop, clients = self.loop, self.cohort.clients
        coding = NONE if loop.uplink == FULL else loop.uplink_coding
        # Sums of blocks: only if no block is in two chunks, and no bytes must be counted.
        self.reduced = self.reduce and coding == NONE and loop.whole_blocks(len(clients))
        request = TrainRequest(
            self.round_,
            self.version,
            self.rate_scale,
            clients,
            reduce=loop.weights if self.reduced else None,
            clip=self.clip,
            uplink=loop.uplink,
            feedback=loop.feedback and loop.uplink != FULL,
            measure=self.measure,
            coding=coding,
            lr=loop.lr,
        )
        downlink = self.downlink.to(DTYPES[loop.dtype])
        own = any(each for _, each in sent_tensors(downlink).values())
        apart = own or downlink.ranks is not None
        self.asks = [
            Ask(
                replace(request, clients=clients[first : first + loop.chunk], first=first),
                downlink,
                loop.downlink,
                apart,
                coding=loop.downlink_coding,
            )
            for first in range(0, len(clients), loop.chunk)
        ]
        return self.asks

    def payload_bytes(self, clients: int = 1) -> int:
        """Count the payload of one message to this many of its clients."""
        (_, kind), coding = self.loop.kinds, self.loop.downlink_coding
        return payload_bytes(self.downlink, len(self.cohort), kind, clients, coding)

    def collect(self, came: Came) -> Uplinks:
        """Read, check and sort the replies.

        Args:
            came: The replies, in any order.

        Returns:
            The uplinks of the clients that passed, in ascending order of id.

        Raises:
            ClientError: If more clients failed than allowed, or none is left; or for an error that
                is no client's fault, which `max_failures` does not cover.
            WireError: If a reply is of another round, another layout or another client; for
                untrusted clients, that is a failure of the client.
        """
        try:
            self._read_all(came)
            return self._used()
        except FedRacLoraError:
            raise
        except Exception as error:
            if not self.loop.untrusted:
                raise
            # Messages of other machines must lead to a clear error and a checkpoint, whatever they
            # contain.
            reason = printable(f"{type(error).__name__}: {error}")
            raise ClientError(
                f"round {self.round_}: the replies cannot be used ({reason})"
            ) from error

    def _used(self) -> Uplinks:
        """Return the uplinks of the clients that pass; raises as `collect` does."""
        if not len(self.cohort):  # Poisson sampling may choose no client
            none = torch.zeros(0, dtype=torch.int64)
            return Uplinks(none, none.double(), self.layout, torch.zeros(0, self.layout.size))
        if not self.replies and self.failures:
            raise failures_error(self.all_failures, self.round_, self.loop.rule)
        if not self.replies:
            raise ClientError(f"round {self.round_}: no client replied in time")
        self.replies.sort(key=lambda r: r.first)
        clients, losses = (self._joined(name) for name in ("clients", "losses"))
        weights = client_weights(self.loop.weights, self._joined("samples"))
        self._check_ids(clients.tolist())
        places = torch.searchsorted(self.cohort.clients, clients)
        summed = self.sum is not None or isinstance(self.replies[0], SummedAnswer)
        numbers = self._joined("numbers")
        if self.sum is not None and numbers.numel():
            raise WireError(f"round {self.round_}: the replies answer messages to other clients")
        if not summed:
            numbers = widen(numbers, self.downlink, places)
        rows = clients, weights, losses, [numbers]
        refused = [] if summed else check_rows(*rows, layout=self.layout)
        self.fail(refused, nobody=len(refused) == len(clients))
        total = sum_blocks(numbers) if summed and self.sum is None else None
        uplinks = Uplinks(
            clients,
            weights,
            self.layout,
            stacked=None if summed else numbers,
            summed=total if self.sum is None else self.sum.value(),
            versions=torch.full_like(clients, self.version),
            places=places,
        )
        if refused:
            uplinks = uplinks.select(
                ~torch.isin(clients, torch.tensor([r.client for r in refused]))
            )
        self._measure(uplinks.clients, uplinks.weights)
        return uplinks

    def fail(self, refused: Iterable[Refusal], *, nobody: bool = False) -> None:
        """Record clients whose replies are not used; ``nobody``: the error if no client is left.

        Raises:
            ClientError: If more clients failed than allowed, or none is left.
        """
        self.failures = sorted([*self.failures, *refused], key=lambda f: f.client)
        if nobody or len(self.all_failures) > self.loop.allowed(len(self.first.cohort)):
            raise failures_error(self.all_failures, self.round_, self.loop.rule)

    def _joined(self, name: str) -> torch.Tensor:
        """Join one field of all replies, in their order."""
        parts = [getattr(reply, name) for reply in self.replies]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _bytes_of(self, reply: TrainingAnswer, refused: Sequence[Refusal]) -> int:
        """Count the bytes of the numbers in a reply, including those that a sum excludes."""
        out = torch.tensor([f.client for f in refused], dtype=torch.int64)
        senders = torch.cat([reply.clients, out])
        if isinstance(reply, TrainedAnswer) and reply.sizes is not None:
            return sum(self.sizes[client] for client in senders.tolist())
        if self.downlink.ranks is None:  # each client sends the same number
            return len(senders) * int(self._each[0])
        return int(self._each[torch.searchsorted(self.cohort.clients, senders)].sum())

    @cached_property
    def _each(self) -> torch.Tensor:
        """Return the bytes sent by each client; of one client if all send the same number."""
        up, _ = self.loop.kinds
        cohort = 1 if self.downlink.ranks is None else len(self.cohort)
        return uploaded_bytes(self.downlink, cohort, up)

    def _measure(self, clients: torch.Tensor, weights: torch.Tensor) -> None:
        """Compute the figures of the clients whose replies are used; ``weights`` are theirs."""
        came = self._joined("clients")
        used = slice(None) if len(came) == len(clients) else torch.isin(came, clients)

        def of(name: str) -> torch.Tensor:
            return self._joined(name)[used]

        self.mean_loss = mean_reported(of("losses"), weights, UNSAID)
        trained = [each for each in self.replies if isinstance(each, TrainingAnswer)]
        metrics = join_columns([(each.metrics, len(each.clients)) for each in trained])
        for name in sorted(metrics):
            self.metrics[name] = mean_reported(metrics[name][used], weights, math.nan)
        self.steps = int(of("steps").sum())
        if self.loop.uplink != FULL:
            self.rounding = float(of("rounding").mean())

    @property
    def longest(self) -> tuple[int, float] | None:
        """Return the client whose row has the largest norm, and the norm; None if rows are kept."""
        return None if self.sum is None else self.sum.longest

    @cached_property
    def counts(self) -> torch.Tensor:
        """Return how many numbers each client sends, int64 [K]."""
        return uploaded_numbers(self.downlink, len(self.cohort))

    def _read_all(self, came: Came) -> None:
        """Read each reply, and record which request it answers."""
        left = {id(ask) for ask in self.asks}
        for ask, answer in came:
            clients, asked = ask.clients, id(ask) in left
            if self.sum is not None and asked:
                for added, refused in self.sum.take(ask, self._read(ask, answer, clients)):
                    self._take(added, refused)
            elif not self.loop.untrusted:
                self._take(self._read(ask, answer, clients if asked else []))
            elif asked:
                left.remove(id(ask))  # any other reply is a repetition
                try:
                    reply = self._read(ask, answer, clients)
                    if reply is not None:
                        check_reply(reply, ask, self.loop, self.counts[ask.request.order])
                except Exception as error:  # another machine may send anything
                    why = printable(f"its reply is refused: {error}")
                    self.failures += [Refusal(c, why) for c in clients]
                else:
                    self._take(reply)
        for added, refused in () if self.sum is None else self.sum.rest():
            self._take(added, refused)

    def failed(self, answer: NoAnswer) -> str:
        """Record why clients have no result.

        Raises:
            ClientError: For an error that is no client's fault.
        """
        if answer.of_the_run and not self.loop.untrusted:
            raise ClientError(f"round {self.round_} cannot be run: {answer.reason}")
        return answer.reason

    def _read(
        self, ask: Ask, answer: Answer | NoAnswer, asked: Sequence[int]
    ) -> TrainingAnswer | None:
        """Check a reply; None if it is a failure, which is recorded."""
        if isinstance(answer, NoAnswer):
            why = printable(self.failed(answer))
            self.failures += [Refusal(c, why) for c in asked]
            return None
        decode = None
        if self.loop.uplink != FULL:
            changes = ChangeCodec(self.loop.uplink, self.downlink, self.base, self.cohort.clients)
            decode = partial(changes.decode, dtype=DTYPES[self.loop.dtype])
        wanted = ExpectedReply(self.round_, self.version, self.layout, self.downlink.ranks, decode)
        reply = checked(answer, ask, TrainingAnswer, wanted)
        if isinstance(reply, TrainedAnswer) and reply.sizes is not None:
            self.sizes |= dict(zip(reply.clients.tolist(), reply.sizes.tolist(), strict=True))
        return reply

    def _take(self, reply: TrainingAnswer | None, refused: Sequence[Refusal] = ()) -> None:
        if reply is not None:
            out = [*(reply.refused if isinstance(reply, SummedAnswer) else ()), *refused]
            self.received += self._bytes_of(reply, out)
            self.replies.append(reply)
            self.failures += [*(Refusal(c, r) for c, r in reply.failures.items()), *out]

    def _check_ids(self, clients: Sequence[int]) -> None:
        """Check that each asked client replied at most once, and no others; record missing ones."""
        answered = sorted([*clients, *(f.client for f in self.failures)])
        asked = self.cohort.clients.tolist()
        if answered == asked:
            return
        if len(answered) != len(set(answered)) or not set(answered) <= set(asked):
            raise WireError(
                f"round {self.round_}: clients {answered} answered, expected each of {asked} once"
            )
        missing = sorted(set(asked) - set(answered))
        self.failures += [Refusal(c, "no reply in time") for c in missing]

    def without(self, uplinks: Uplinks, client: int, reason: str) -> Uplinks:
        """Remove a client from the collected updates: it failed.

        Raises:
            ClientError: If more clients failed than allowed, or none is left.
        """
        self.fail([Refusal(client, reason)], nobody=len(uplinks.clients) == 1)
        uplinks = uplinks.select(uplinks.clients != client)
        self._measure(uplinks.clients, uplinks.weights)
        return uplinks

    def survivors(self) -> Cohort:
        """Return the clients whose replies were used, which the next exchange asks."""
        failed = torch.tensor([f.client for f in self.failures], dtype=torch.int64)
        kept = ~torch.isin(self.cohort.clients, failed)
        return self.cohort.select(kept)

    @property
    def so_far(self) -> list[Exchange]:
        """Return the exchanges of this round, this one last."""
        return [self] if self.before is None else [*self.before.so_far, self]

    @property
    def first(self) -> Exchange:
        """Return the exchange that opened the round."""
        return self.so_far[0]

    @property
    def dropped(self) -> list[Refusal]:
        """Return clients that were asked in this round and did not reply in time."""
        clocks = [each.timeline for each in self.so_far if each.timeline is not None]
        return [refusal for clock in clocks for refusal in clock.dropped]

    @property
    def all_failures(self) -> list[Refusal]:
        """Return the clients that have failed in this round."""
        return [refusal for each in self.so_far for refusal in each.failures]

    @property
    def local_steps(self) -> int:
        """Return the local steps of this round so far."""
        return sum(each.steps for each in self.so_far)

    @property
    def notes(self) -> list[str]:
        """Return the notes of the workers in this round so far."""
        sources = [source for each in self.so_far for source in (each.timeline, *each.replies)]
        return [note for source in sources if source is not None for note in source.notes]
