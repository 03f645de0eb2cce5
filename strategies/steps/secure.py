"""Run the server's side of secure aggregation: four exchanges that end in a sum."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature, conflict
from fedraclora.errors import CheckpointError, ClientError, ConfigError, RoundLostError, WireError
from fedraclora.evaluation.clients import (
    BINS,
    MOST_CLIENTS,
    SummedMeasure,
    read_sizes,
    sums_named,
    usual,
)
from fedraclora.privacy.secagg import FEW, LEAST_CLIENTS, SecAgg
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import ASKS_TWICE
from fedraclora.protocol.uplinks import Refusal, Uplinks
from fedraclora.run.ledger import Row
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.measuring import Measurement
from fedraclora.strategies.server.round_step import CohortOf, RoundStep, Send
from fedraclora.strategies.steps.secagg_session import Check, Said, SecAggSession, Texts
from fedraclora.strategies.steps.unmask import CulpritError, Session, check_keys, check_sealed
from fedraclora.tree import Layout, Tree
from fedraclora.weights.files import write_text
from fedraclora.wire.answers import StageAnswer
from fedraclora.wire.secagg import LARGEST, signed

FILE = "masked.round"  # file key: the last round that asked real clients for vectors
SLACK = 1 + 1e-4  # tolerance of norms: updates are rounded to the precision of messages


class MeasureSession(SecAggSession):
    """Run the exchanges that sum clients' measurements.

    Clients report the layout of their sums, which a server without samples cannot know. Clients
    with another layout than most are left out.

    Args:
        measurement: The measurement.
        send: As for `SecAggSession`.
    """

    settings: ClassVar[dict[str, Any]] = {"measured": True}

    def __init__(self, measurement: Measurement, send: Send) -> None:
        super().__init__(measurement, send, Texts())
        self.measure, self.points = measurement.measuring.measure, (*measurement.when.values(),)
        self.layouts: dict[int, Layout] = {}
        self.layout: Layout | None = None
        self.least = measurement.measuring.asked.min_clients
        self.few = FEW.format(self.least)
        self.withheld = False

    @property
    def summed(self) -> SummedMeasure:
        """Return the decoder of the sum."""
        return SummedMeasure(self.measure, self.layout or Layout(()), self.points)

    @override
    def size(self, answer: StageAnswer) -> int:
        sizes = read_sizes(answer.stage.settings.get("layout"))
        if [name for name, _ in sizes.shapes] != (names := sums_named(self.measure, [""])):
            raise WireError(f"it measured {sizes.shapes}, expected {names}")
        self.layouts |= dict.fromkeys(answer.clients.tolist(), sizes)
        return SummedMeasure(self.measure, sizes, self.points).size

    @override
    def collect(self, stage: str, data: dict[int, Any], check: Check) -> Said:
        found, failures = super().collect(stage, data, check)
        self.withheld |= stage == "unmask" and self.few in failures.values()
        return found, failures

    @override
    def masked(self, pending: dict[int, Any], settings: dict[str, Any]) -> Said:
        found, failures = super().masked(pending, settings)
        senders = [c for c, part in found.items() if not isinstance(part, set)]
        if senders and self.layout is None:
            self.layout = usual([self.layouts[c] for c in senders])
        for client in senders:
            if self.layouts[client] != self.layout:
                failures[client] = "it reports other metrics than most clients"
                del found[client]
        return found, failures


@dataclass
class SecureSum(RoundStep):
    """Request the sum over a round's clients, without seeing single updates.

    Attributes:
        config: Clip, neighbours, threshold, greatest weight.
        row: The ledger's figures for the last sum.
        session: A round that failed after clients were asked for masked vectors; None: none.
        texts: Bytes of other messages in a round.
        banned: Clients that are not asked any more, with reasons.
        answered: The last round for which an earlier process may have asked clients for masked
            vectors.
        counts: Whether clients report if their updates were longer than the clip.
        file: Its file; None in a simulation, whose clients end with the process.
    """

    config: SecAgg
    row: Row = field(default_factory=dict)
    session: Session | None = None
    texts: Texts = field(default_factory=Texts)
    banned: dict[int, str] = field(default_factory=dict)
    answered: int = 0
    counts: bool = False
    file: Path | None = None

    @Feature("clients_per_round of 1 or 2", instead="clients_per_round=3 or more")
    def _asks_few(self) -> str:
        cohort = self.run.loop.cohort
        return f"clients_per_round={cohort}" if cohort < LEAST_CLIENTS else ""

    @override
    def open(self, recorder: RunRecorder, done: int, cohort_of: CohortOf) -> None:
        """Read the progress of earlier processes of a run.

        Raises:
            CheckpointError: If the file in the folder is damaged.
        """
        folder, real = recorder.folder, self.run.loop.untrusted
        for row in recorder.ledger.rows:
            if isinstance(lost := row.get("secure"), dict) and "culprit" in lost:
                self.banned[int(lost["culprit"])] = str(lost["lost"])
        self.file = folder / FILE if real and folder is not None else None
        if self.file is not None and self.file.is_file():
            text = self.file.read_text().strip()
            if not text.isdecimal():
                raise CheckpointError(
                    f"{self.file} holds {text[:50]!r}, expected the number of the last round "
                    "that asked for masked vectors. Restore the file from a copy"
                )
            self.answered = int(text)

    @override
    def bound(self, *, first: bool) -> float:
        if not first:
            raise conflict(SecAgg, ASKS_TWICE)
        self.counts = True  # with the clip of privacy=client_level clients do not report it
        return self.config.clip

    @override
    def receive(self, send: Send, exchange: Exchange, base: Tree) -> Uplinks | None:
        """Run the stages and return the sum; None if no client is asked.

        Raises:
            ClientError: If too few clients stay.
            RoundLostError: If the sum is lost, or is no possible sum of valid updates.
        """
        if not len(exchange.cohort):
            return None
        clip = self.config.clip if exchange.clip is None else exchange.clip
        if self.texts.round_ != exchange.round_:
            self.texts = Texts(exchange.round_)
        talk, session = SecAggSession(exchange, send, self.texts), self.session
        if session is None or session.round_ != exchange.round_:
            if exchange.round_ <= self.answered:
                why = (
                    "the run was stopped after it had asked clients for masked vectors, and "
                    "a client sends one in a round"
                )
                self.row = {"lost": why}
                raise RoundLostError(f"round {exchange.round_}: {why}")
            session = self._agree(exchange, talk, clip)
        else:
            exchange.failures += session.left
        self.session = session
        try:
            if self.file is not None and not session.asked:
                write_text(self.file, f"{session.round_}\n")
            self._gather(session, talk)
            uplinks = self._checked(talk, session, clip, base)
        except CulpritError as lost:
            self.banned[lost.client] = lost.why
            self.row = {"lost": lost.why, "culprit": lost.client}
            raise
        except RoundLostError as lost:
            self.row = {"lost": str(lost)}
            raise
        self.session = None
        return uplinks

    @override
    def columns(self, exchange: Exchange, uplinks: Uplinks | None) -> Row:
        lost = {"up": self.texts.up, "down": self.texts.down} if "lost" in self.row else {}
        return {"train_loss": None, "secure": self.row | lost}

    def _agree(self, exchange: Exchange, talk: SecAggSession, clip: float) -> Session:
        """Exchange keys and shares between clients."""
        cohort = exchange.cohort.clients.tolist()
        out = {c: self.banned[c] for c in cohort if c in self.banned}
        exchange.failures += [Refusal(c, f"left out since a sum was lost: {out[c]}") for c in out]
        asked: dict[int, Any] = {c: None for c in cohort if c not in out}
        keys = talk.ask("keys", asked, check_keys)
        graph = self.config.graph(sorted(keys), exchange.loop.seed, exchange.round_)
        pairs = {c: {name: keys[c][name] for name in ("mask", "box")} for c in keys}
        messages = {c: {str(n): pairs[n] for n in graph[c]} for c in graph}
        sealed = talk.ask("shares", messages, check_sealed)
        inbox: dict[int, Any] = {
            c: {"shares": {str(n): sealed[n][str(c)] for n in graph[c] if n in sealed}}
            for c in sealed
        }
        session = Session(
            exchange.round_,
            keys,
            self.config.shares(min(map(len, graph.values()))),
            self.config.step(len(exchange.cohort), clip, LARGEST),
            {c: {**shares, "without": []} for c, shares in inbox.items()},
            [],
        )
        leaves = session.drop_isolated()
        talk.enough(session.messages, "masked")
        talk.name(leaves)
        session.left = list(exchange.failures)
        return session

    @override
    def measure(self, send: Send, measurement: Measurement) -> bool:
        """Sum what clients measured, in a session of its own: other keys, and other masks.

        A lost sum is not requested again; the row says why it is missing. Clients refuse a sum over
        fewer than ``evaluate.min_clients`` clients with samples to measure on.
        """
        if (clients := len(measurement.cohort)) > MOST_CLIENTS:
            raise ConfigError(
                f"evaluate.clients: {clients} clients would evaluate, but secure aggregation "
                f"can sum at most {MOST_CLIENTS}. Set evaluate.clients=round"
            )
        talk = MeasureSession(measurement, send)
        try:
            session = self._agree(measurement, talk, self.config.clip)
            self._gather(session, talk)
            K = len(session.words)
            row = talk.summed.row(session.total(), K, talk.least)
            row |= {"in_sum": K, "histogram": BINS} if "n" in row else {}
        except (ClientError, WireError) as lost:
            expected = talk.withheld or isinstance(lost, RoundLostError)
            if not (expected or measurement.loop.untrusted):
                raise
            if isinstance(lost, CulpritError):
                self.banned[lost.client] = lost.why
            row = {"withheld": talk.few} if talk.withheld else {"lost": str(lost)}
        measurement.summed = row | {"texts_up": talk.texts.up, "texts_down": talk.texts.down}
        return True

    def _gather(self, session: Session, talk: SecAggSession) -> None:
        """Collect masked vectors, and the shares that remove the masks from their sum."""
        if not session.asked:
            self._mask(session, talk)
        missing = session.ask_for_shares()
        found, failures = talk.collect("unmask", missing, session.check_shares)
        session.shares |= found
        session.notes += [
            f"client {c} gave no shares: {failures.get(c, 'no reply in time')}"
            for c in sorted(missing.keys() - found.keys())
        ]

    def _mask(self, session: Session, talk: SecAggSession) -> None:
        """Collect the masked vectors, with a second exchange if shares cannot be decrypted."""
        settings = {"step": session.step}
        waiting = {c: message for c, message in session.messages.items() if c not in session.words}
        failures: dict[int, str] = {}
        for again in (False, True):
            answers, more = talk.masked(waiting, settings)
            failures |= more
            complaints = {c: part for c, part in answers.items() if isinstance(part, set)}
            session.words |= {c: part for c, part in answers.items() if c not in complaints}
            if again or not complaints:
                break
            session.notes += [
                f"client {c} cannot open the shares of {sorted(of)}" for c, of in complaints.items()
            ]
            session.left += talk.name(session.settle(complaints))
            leaves = session.drop_isolated()
            talk.enough(session.messages, "masked")
            session.left += talk.name(leaves)
            waiting = {c: session.messages[c] for c in complaints if c in session.messages}
        talk.leave("masked", session.messages, session.words, failures)
        talk.enough(session.words, "unmask")

    def _checked(self, talk: SecAggSession, session: Session, clip: float, base: Tree) -> Uplinks:
        """Return the sum after all possible checks."""
        exchange, whole = talk.exchange, signed(session.total())
        clients, step = sorted(session.words), session.step
        K, weight, cut = len(clients), int(whole[-2]), int(whole[-1])
        update = whole[:-2].double() * step
        norm = float(update.norm())
        if not K <= weight <= K * self.config.max_weight or norm > weight * clip * SLACK:
            raise RoundLostError(
                f"round {exchange.round_}: the sum of {K} clients has the weight {weight} and the "
                f"norm {norm:.4g}; {K} to {K * self.config.max_weight} and at most "
                f"{weight * clip:.4g} are possible: some client broke the protocol"
            )
        if not 0 <= cut <= K:
            raise RoundLostError(
                f"round {exchange.round_}: in a sum of {K} clients {cut} say that their updates "
                "were longer than the clip: some client broke the protocol"
            )
        self.row = {
            "clients": K,
            **({"clipped": cut} if self.counts else {}),
            "step": step,
            "error_bound": K * step / 2 / weight,
            "up": self.texts.up,
            "down": self.texts.down,
            **({"notes": session.notes} if session.notes else {}),
        }
        ids = torch.tensor(clients, dtype=torch.int64)
        places = torch.searchsorted(exchange.cohort.clients, ids)
        start = opening_rows(exchange.downlink, base, exchange.layout, places)
        return Uplinks(
            ids,
            torch.full((K,), weight / K, dtype=torch.float64),
            exchange.layout,
            summed=start * weight + update,
            versions=torch.full_like(ids, exchange.version),
            places=places,
            denominator=float(weight),
        )
