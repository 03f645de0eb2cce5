"""What happens to updates between the checks of an exchange and the next state."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import torch
from flwr.app import Message

from fedraclora.aggregation.base import AggregationContext, Aggregator, Mean, rows_of
from fedraclora.aggregation.server_optimisers import ServerOptimiser
from fedraclora.attacks.attack import Attack
from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel, Privacy
from fedraclora.privacy.secagg import Open, SecAgg
from fedraclora.privacy.secret import Secret
from fedraclora.protocol.method import Cohort, Downlink, Draw, Method, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.recorder import RunRecorder
from fedraclora.training.extras.sample_level import SampleLevel
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree
from strategies.server.account import SampleAccount, Sizes
from strategies.server.device_simulator import DeviceSimulator
from strategies.server.exchange import Exchange
from strategies.server.fedopt import check_optimiser, close_optimised
from strategies.server.fits import check_fits
from strategies.server.loop import LoopConfig
from strategies.server.private import PrivateRounds
from strategies.server.rows import Row
from strategies.server.scaffold import check_scaffold, check_seen, close_corrected, open_corrected
from strategies.server.secagg_session import Ask
from strategies.server.secure import SecureSum


@dataclass
class Treatment:
    """The attack of a simulation, then privacy or the aggregator.

    Attributes:
        aggregator: What the method sees of the updates.
        attack: What some clients do to harm the run.
        privacy: What a round may tell of a client.
        secret: Where its noise comes from; None: the run folder's own key.
        security: What the server sees of a cohort.
        optimiser: What the server makes of the mean of a round.
        variates: Whether clients' drift is corrected by control variates.
        lifted: Whether these are dense estimates; by `begin`, None without.
        secure: Secure aggregation in the rounds, by `begin`; None without.
        attackers: Their ids, int64; by `begin`.
        private: Privacy of clients in the rounds, by `begin`; None without.
        samples: The account of the privacy of samples, by `begin`; None without.
    """

    aggregator: Aggregator = field(default_factory=Mean)
    attack: Attack = field(default_factory=Attack)
    privacy: Privacy = field(default_factory=Privacy)
    secret: Secret | None = None
    security: Open = field(default_factory=Open)
    optimiser: ServerOptimiser = field(default_factory=ServerOptimiser)
    variates: bool = False
    lifted: bool | None = None
    secure: SecureSum | None = None
    private: PrivateRounds | None = None
    samples: SampleAccount | None = None
    attackers: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def begin(
        self, method: Method, state: State, loop: LoopConfig, devices: DeviceSimulator, sizes: Sizes
    ) -> None:
        """Refuse what cannot be together, and draw who attacks.

        Raises:
            ConfigError: Saying why.
        """
        self.aggregator.check(method.traits, loop.cohort)
        check_fits(method, state, devices.local, self.privacy, Draw(loop.seed))
        check_optimiser(self.optimiser, method, state, Draw(loop.seed))
        if self.variates:
            check_seen(self.aggregator, self.privacy)
            self.lifted = check_scaffold(method, state, devices.local, Draw(loop.seed))
        if loop.guarded and self.attack.share:
            raise ConfigError(
                f"attack={self.attack.name} is for simulations; real clients need nobody's leave"
            )
        self.attackers = self.attack.attackers(loop.seed, loop.clients)
        if isinstance(self.security, SecAgg):
            if self.aggregator.individuals or self.attack.colludes:
                raise ConfigError(
                    f"aggregator={self.aggregator.name} or attack={self.attack.name} looks at "
                    "single updates, which secure=secagg hides; take aggregator=mean, or "
                    "secure=none"
                )
            self.secure = SecureSum(self.security)
            self.secure.check(method, loop.weights, loop.cohort)
        if (level := devices.local.extra_of(SampleLevel)) is not None:
            none = torch.zeros(loop.clients, dtype=torch.int64)
            self.samples = SampleAccount(level.noise, devices.local, sizes, none)
        if not isinstance(self.privacy, ClientLevel):
            return
        if devices.enabled or not isinstance(self.aggregator, Mean):
            raise ConfigError(
                "privacy=client_level draws its cohorts and takes its mean itself, so system=none "
                f"and aggregator=mean are wanted; aggregator is {self.aggregator.name}"
            )
        if self.secure is not None and self.privacy.quantile is not None:
            raise ConfigError(
                "privacy.quantile counts short updates one by one, which secure=secagg hides; set "
                "it to null, or secure=none"
            )
        self.private = PrivateRounds.begin(self.privacy, method, loop, self.secret)

    def open(
        self, recorder: RunRecorder, done: int, loop: LoopConfig, devices: DeviceSimulator
    ) -> None:
        """Fetch what a private run keeps, before its first round or the one after ``done``."""
        if self.private is not None:
            self.private.open(recorder.folder, recorder.ledger.rows)
        if self.secure is not None:
            self.secure.open(recorder.folder, recorder.ledger.rows, real=loop.guarded)
        if self.samples is not None:
            for round_ in range(1, done + 1):
                self._count(round_, loop, devices)

    def _count(self, round_: int, loop: LoopConfig, devices: DeviceSimulator) -> None:
        """Count a round in the account of samples; where devices differ, as if all took part."""
        if self.samples is not None:
            everyone = torch.arange(loop.clients)
            asked = everyone if devices.enabled else self.ask(round_, loop, devices)
            self.samples.add(asked)

    def ask(self, round_: int, loop: LoopConfig, devices: DeviceSimulator) -> torch.Tensor:
        """Draw whom a round asks; ids in ascending order, int64."""
        if self.private is not None:
            return self.private.ask(round_, loop.clients)
        return devices.ask(round_, loop.clients, loop.cohort)

    def clip(self, *, first: bool) -> float | None:
        """Give the greatest norm of an update that clients are told to send; None: any.

        Args:
            first: Whether this exchange opens the round.

        Raises:
            ConfigError: For a later exchange of a private round, which would cost as much again.
        """
        if not first and (self.private or self.samples or self.secure):
            raise ConfigError(
                "privacy is accounted for one exchange a round, but this method asks for another; "
                "choose another method, or privacy=none, local.dp=null and secure=none"
            )
        if self.private is not None:
            return self.private.clip
        return None if self.secure is None else self.secure.config.clip

    def receive(
        self, ask: Ask, exchange: Exchange, messages: Iterable[Message], base: Tree
    ) -> Uplinks:
        """Send the messages of an exchange and give what came, checked.

        Args:
            ask: Sends messages and gives the replies that come.
            exchange: Which wrote the messages.
            messages: To send.
            base: What clients train from.
        """
        if self.secure is None or exchange.clip is None or not len(exchange.cohort):
            return exchange.collect(ask(messages))
        return self.secure.receive(ask, exchange, base, exchange.clip)

    def sums_are_enough(self, method: Method) -> bool:
        """Tell whether nobody looks at a single client's update."""
        traits = method.traits
        looks = method.looks_at_clients or self.aggregator.individuals or self.attack.colludes
        return traits.linear and not looks and self.private is None

    def treat(self, got: Uplinks, setting: AggregationContext) -> Uplinks:
        """Give what the method sees of what came."""
        if self.attack.colludes:
            agreed = self.attack.colluded(rows_of(got), torch.isin(got.clients, self.attackers))
            got = replace(got, stacked=agreed)
        return self.private.treat(got, setting) if self.private else self.aggregator(got, setting)

    def opened(self, sent: Downlink, state: State) -> Downlink:
        """Give what goes down for what the method asks."""
        return sent if self.lifted is None else open_corrected(sent, state, lifted=self.lifted)

    def close(
        self,
        method: Method,
        state: State,
        exchange: Exchange,
        got: Uplinks,
        draw: Draw,
        local: LocalConfig,
    ) -> State:
        """Give the next state: the method's, where the server has no optimiser of its own."""
        sent = exchange.downlink
        after = close_optimised(self.optimiser, method, state, sent, got, draw)
        if self.lifted is None or not len(got.clients):
            return after
        scale, share = exchange.rate_scale, len(got.clients) / exchange.loop.clients
        rates = {n: local.rate(s.main, scale) for n, s in sent.uploaded().items()}
        moments = close_corrected(state, sent, got, rates, local.steps or 1, share)
        return replace(after, moments=after.moments | moments)

    def give_up(self, round_: int) -> None:
        """Count a round that releases nothing as if it had."""
        if self.private is not None:
            self.private.note(round_, self.private.clip)

    def columns(
        self, round_: int, cohort: Cohort, loop: LoopConfig, devices: DeviceSimulator
    ) -> Row:
        """What the ledger says of a round: attackers in the cohort, and what privacy it cost.

        The mean training loss of a private round is left out: no noise covers it.
        """
        found: Row = {}
        if self.attack.share:
            found["attackers"] = int(torch.isin(cohort.clients, self.attackers).sum())
        if self.private is not None:
            found |= {"train_loss": None, "privacy": self.private.row}
        if self.secure is not None:
            found |= {"train_loss": None, "secure": self.secure.row}
        if self.samples is not None:
            self._count(round_, loop, devices)
            found |= {"train_loss": None, "sample_privacy": self.samples.row()}
        return found
