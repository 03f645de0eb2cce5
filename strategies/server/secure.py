"""The server's side of secure aggregation: four exchanges that end in a sum."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fedraclora.errors import CheckpointError, ConfigError, RoundLostError
from fedraclora.privacy.secagg import LEAST, SecAgg
from fedraclora.protocol.downlink import opening_rows
from fedraclora.protocol.method import Method
from fedraclora.protocol.uplinks import Refusal, Uplinks
from fedraclora.tree import Tree
from fedraclora.weights.files import write_text
from fedraclora.wire.secagg import LARGEST, signed
from strategies.server.exchange import Exchange
from strategies.server.rows import Row
from strategies.server.secagg_session import Ask, SecAggSession
from strategies.server.unmask import CulpritError, Session, check_keys, check_sealed

FILE = "masked.round"  # the last round that asked real clients for vectors
WORD = 4  # bytes of a number
SLACK = 1 + 1e-4  # of norms: updates are rounded to the wire's precision


@dataclass
class SecureSum:
    """Asks for the sum of a cohort, and sees nothing else of its updates.

    Attributes:
        config: Clip, neighbours, threshold, greatest weight.
        row: What the ledger says of the last sum.
        session: A round that failed after clients were asked for masked vectors; None: none did.
        banned: Clients that are asked no more, and why.
        answered: The last round of which clients of an earlier process may have been asked for
            masked vectors.
        file: Where this is kept; None in a simulation, whose clients end with the process.
    """

    config: SecAgg
    row: Row = field(default_factory=dict)
    session: Session | None = None
    banned: dict[int, str] = field(default_factory=dict)
    answered: int = 0
    file: Path | None = None

    def check(self, method: Method, weights: str, cohort: int) -> None:
        """Refuse what needs more than a sum.

        Raises:
            ConfigError: Saying why.
        """
        if cohort < LEAST:
            raise ConfigError(
                f"secure=secagg hides a client among {LEAST} or more, but a round asks {cohort}; "
                f"set cohort to {LEAST} or more, or secure=none"
            )
        traits = method.traits
        if not traits.linear:
            raise ConfigError(
                "secure=secagg gives the method a sum only, but this one needs each client's own "
                "update; choose another method, or secure=none"
            )
        if weights == "uniform" and self.config.max_weight != 1:
            raise ConfigError("under weights=uniform every weight is 1; set secure.max_weight=1")
        if weights != "uniform" and self.config.max_weight == 1:
            raise ConfigError(
                "weights is examples: set secure.max_weight to the most samples that a client may "
                "have, or weights=uniform"
            )

    def open(self, folder: Path | None, rows: Sequence[Row], *, real: bool) -> None:
        """Learn what earlier processes of a run have done.

        Args:
            folder: The run folder.
            rows: Of its ledger.
            real: Whether clients are real, and remember what they have answered.

        Raises:
            CheckpointError: If what the folder says of it is damaged.
        """
        for row in rows:
            if isinstance(said := row.get("secure"), dict) and "culprit" in said:
                self.banned[int(said["culprit"])] = str(said["lost"])
        self.file = folder / FILE if real and folder is not None else None
        if self.file is not None and self.file.is_file():
            text = self.file.read_text().strip()
            if not text.isdecimal():
                raise CheckpointError(
                    f"{self.file} holds {text[:50]!r}, but the number of the last round that asked "
                    "clients for masked vectors is wanted; restore the file from a copy"
                )
            self.answered = int(text)

    def receive(self, ask: Ask, exchange: Exchange, base: Tree, clip: float) -> Uplinks:
        """Run the stages and give the sum.

        Args:
            ask: Sends messages and gives the replies that come.
            exchange: The train exchange, whose messages have been written.
            base: What clients train from.
            clip: The greatest norm of an update.

        Raises:
            ClientError: If too few clients stay.
            RoundLostError: If the sum cannot be had any more, or cannot be one of what clients may
                send.
            ConfigError: If clients start apart.
        """
        if exchange.downlink.apart:
            raise ConfigError("secure=secagg needs all clients to train the same numbers")
        talk, session = SecAggSession(exchange, ask), self.session
        if session is None or session.round_ != exchange.round_:
            session = self._agree(exchange, talk, clip)
        else:
            exchange.failures += session.left
        self.session = session
        try:
            if not session.asked:
                self._mask(session, talk)
            missing = session.ask_for_shares()
            found, failures = talk.collect("unmask", missing, session.check_shares)
            session.shares |= found
            session.notes += [
                f"client {c} gave no shares: {failures.get(c, 'no reply in time')}"
                for c in sorted(missing.keys() - found.keys())
            ]
            whole = signed(session.total())
            got = self._checked(exchange, session, whole, clip, base, talk)
        except CulpritError as lost:
            self.banned[lost.client] = lost.why
            self.row = {"lost": lost.why, "culprit": lost.client}
            raise
        except RoundLostError as lost:
            self.row = {"lost": str(lost)}
            raise
        self.session = None
        return got

    def _agree(self, exchange: Exchange, talk: SecAggSession, clip: float) -> Session:
        """Have clients exchange keys and shares."""
        if exchange.round_ <= self.answered:
            why = "the run was ended after clients had been asked for masked vectors; they give one"
            self.row = {"lost": why}
            raise RoundLostError(f"round {exchange.round_}: {why}")
        cohort = exchange.cohort.clients.tolist()
        out = {c: self.banned[c] for c in cohort if c in self.banned}
        exchange.failures += [Refusal(c, f"left out since a sum was lost: {out[c]}") for c in out]
        asked: dict[int, Any] = {c: None for c in cohort if c not in out}
        keys = talk.ask("keys", asked, check_keys)
        graph = self.config.graph(sorted(keys), exchange.loop.seed, exchange.round_)
        pairs = {c: {name: keys[c][name] for name in ("mask", "box")} for c in keys}
        told = {c: {str(n): pairs[n] for n in graph[c]} for c in graph}
        sealed = talk.ask("shares", told, check_sealed)
        inbox: dict[int, Any] = {
            c: {"shares": {str(n): sealed[n][str(c)] for n in graph[c] if n in sealed}}
            for c in sealed
        }
        session = Session(
            exchange.round_,
            keys,
            sealed,
            self.config.shares(min(map(len, graph.values()))),
            self.config.step(len(exchange.cohort), clip, LARGEST),
            {c: {**shares, "without": []} for c, shares in inbox.items()},
            [],
        )
        leaves = session.thin_out()
        talk.enough(session.told, "masked")
        talk.name(leaves)
        session.left = list(exchange.failures)
        return session

    def _mask(self, session: Session, talk: SecAggSession) -> None:
        """Gather the masked vectors, in a second exchange where shares cannot be opened."""
        if self.file is not None:
            write_text(self.file, f"{session.round_}\n")
        settings = {"step": session.step}
        waiting = {c: told for c, told in session.told.items() if c not in session.words}
        said, failures = talk.masked(waiting, settings)
        complaints = {c: part for c, part in said.items() if isinstance(part, set)}
        session.words |= {c: part for c, part in said.items() if c not in complaints}
        if complaints:
            session.notes += [
                f"client {c} cannot open the shares of {sorted(of)}" for c, of in complaints.items()
            ]
            session.left += talk.name(session.settle(complaints))
            leaves = session.thin_out()
            talk.enough(session.told, "masked")
            session.left += talk.name(leaves)
            again = {c: session.told[c] for c in complaints if c in session.told}
            said, more = talk.masked(again, settings)
            failures |= more
            session.words |= {c: part for c, part in said.items() if not isinstance(part, set)}
        talk.leave("masked", session.told, session.words, failures)
        talk.enough(session.words, "unmask")

    def _checked(
        self,
        exchange: Exchange,
        session: Session,
        whole: torch.Tensor,
        clip: float,
        base: Tree,
        talk: SecAggSession,
    ) -> Uplinks:
        """Check what can be checked on a sum, and give it."""
        clients, step = sorted(session.words), session.step
        K, weight = len(clients), int(whole[-1])
        update = whole[:-1].double() * step
        norm = float(update.norm())
        if not K <= weight <= K * self.config.max_weight or norm > weight * clip * SLACK:
            raise RoundLostError(
                f"round {exchange.round_}: the sum of {K} clients has the weight {weight} and the "
                f"norm {norm:.4g}; {K} to {K * self.config.max_weight} and at most "
                f"{weight * clip:.4g} are possible: some client sent what it may not"
            )
        exchange.sent_bytes = K * len(whole) * WORD
        self.row = {
            "clients": K,
            "step": step,
            "error_bound": K * step / 2 / weight,
            "up": talk.up,
            "down": talk.down,
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
