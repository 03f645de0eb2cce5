"""The round loop, which runs any method on any grid."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from fedraclora.aggregation.base import AggregationContext
from fedraclora.engines.base import Grid, Traffic
from fedraclora.errors import ClientError, ConfigError, DivergenceError, RoundLostError
from fedraclora.imports import as_user_error
from fedraclora.protocol.cohorts import client_weights
from fedraclora.protocol.method import Cohort, RoundInstructions, State
from fedraclora.protocol.uplinks import Uplinks, calmer
from fedraclora.run.callback import Callback
from fedraclora.run.ledger import Row, number
from fedraclora.run.recorder import RunRecorder, Stopwatch
from fedraclora.strategies.server.callbacks import Callbacks, in_round, joined
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.guard import hold_to_traits, largest, overflowing
from fedraclora.strategies.server.measuring import Measurement
from fedraclora.strategies.server.quantized import DownlinkRounding
from fedraclora.strategies.server.round_step import RoundStep, RoundSteps, RunContext, Send
from fedraclora.strategies.server.rows import Cost, ledger_row
from fedraclora.training.localconfig import effective_step
from fedraclora.training.materialize import for_measuring
from fedraclora.tree import point_at
from fedraclora.weights.chain import CatchUp
from fedraclora.weights.update import BaseWeights


class FedStrategy:
    """Run a method round by round.

    Args:
        run: Method, local settings (for the step size in the ledger and in requests), settings of
            the loop, and devices.
        state: The method's state before the next round.
        replica: Where new base weights are published.
        recorder: Ledger, merges and checkpoints.
        steps: The steps of a round, in the order in which updates pass them.
        callbacks: The callbacks that watch the run, or end it early.
        model: A model of this run only, which receives the weights of each round, so that its
            initial ones are released. None: there is none, or other runs begin from it.

    Attributes:
        divisible: Whether a round can be closed again without a client, if the steps allow it.
        rate_scale: Gives the factor of the step sizes in a round, of so many rounds.
    """

    divisible = True

    def __init__(
        self,
        run: RunContext,
        state: State,
        *,
        replica: BaseWeights,
        recorder: RunRecorder,
        steps: Sequence[RoundStep] = (),
        callbacks: Sequence[Callback] = (),
        model: nn.Module | None = None,
    ) -> None:
        self.method, self.state, self.local, self.loop = run.method, state, run.local, run.loop
        self.devices, self.sizes, self.examples = run.devices, run.sizes, run.examples
        self.draw = run.draw
        self.rate_scale: Callable[[int, int], float] = run.local.rate_scale
        self.replica, self.recorder, self.callbacks = replica, recorder, Callbacks(callbacks)
        self.measuring = run.measuring
        self.parameters = {} if model is None else dict(model.named_parameters())
        self.rounding = DownlinkRounding(self.loop.downlink, self.loop.seed, self.loop.feedback)
        self.steps = RoundSteps(steps, run, state)
        coding = replica.coding = self.loop.downlink_coding
        self.catch_up, self.done = CatchUp(state.base, self.loop.clients, coding), 0

    def resume(self, state: State, done: int) -> None:
        """Resume after round ``done`` from a restored state (`catch_up` is restored in place)."""
        self.state, self.done = state, done
        if self.devices.system.timed:
            self.devices.now = number(self.recorder.ledger.rows[-1], "virtual_seconds")

    def run(self, grid: Grid, last: int | None = None) -> None:
        """Run the remaining rounds; the weights are not written out.

        Args:
            grid: Where clients run.
            last: The last round, instead of ``loop.rounds``.

        Raises:
            ClientError: If more clients failed than allowed, after a checkpoint.
        """
        self.begin(grid)
        last = self.loop.rounds if last is None else last
        for round_ in range(self.done + 1, last + 1):
            try:
                with in_round(round_):
                    if self.callbacks.ends(self.recorder.ledger.rows):
                        break
                    self._attempt(grid, round_)
            except Exception as error:
                # A checkpoint ahead of the ledger, whose row failed, could not be resumed.
                whole = number(self.recorder.ledger.rows[-1], "round") == self.done
                # One of weights that were spoilt before they diverged would be of no use.
                spoilt = isinstance(error, DivergenceError) and self.recorder.is_spoilt(self.done)
                if whole and not spoilt:
                    self.recorder.save(self.state, self.done, self.catch_up)
                raise
        self.recorder.save(self.state, self.done, self.catch_up)

    def begin(self, grid: Grid) -> None:
        """Publish the initial weights of the next round; write row 0 if it is missing."""
        self.steps.open(self.recorder, self.done)
        self.replica.publish(self.state.base, self.catch_up.version)
        point_at(self.parameters, self.state.base)
        if not self.recorder.ledger.rows:
            self.recorder.begin(self.state)
            with in_round(0):
                cost, send = Cost(), partial(grid.ask, timeout=self.loop.timeout)
                row: Row = {"round": 0} | self._measured()
                row |= self._by_clients(send, grid, lambda: self.steps.cohort(1), cost)
                row |= {"notes": list(self.state.notes)}
                row |= {"uplink_total": cost.up, "downlink_total": cost.down + cost.fetched}
                self._publish_row(row | self.devices.clock)

    def _attempt(self, grid: Grid, round_: int) -> None:
        """Run one round; repeat it if too few clients replied, since it changed nothing.

        Raises:
            ClientError: The error of the last attempt.
        """
        cost, send = Cost(), partial(grid.ask, timeout=self.loop.timeout)
        for left in reversed(range(self.loop.retries + 1)):
            try:
                exchange = self.open(round_)
                cost.watch.lap("open")
                self.close(exchange, send, grid, cost)
                return
            except ClientError as error:
                if not left:
                    raise
                grid.tell(f"run again: {error}")

    def close(self, exchange: Exchange, send: Send, grid: Grid, cost: Cost) -> None:
        """Run an opened round to its end.

        Exchanges follow until the method closes it; then it is evaluated and recorded.

        Args:
            exchange: Its first exchange.
            send: Sends requests, and returns replies.
            grid: The grid, with traffic and incidents.
            cost: Counts the cost of the round, over all attempts.
        """
        watch, round_ = cost.watch, exchange.round_
        while True:
            try:
                raw, uplinks = self._exchanged(send, exchange, cost, grid.traffic)
            except RoundLostError as lost:
                if not self.loop.untrusted:
                    raise
                self._give_up(exchange, grid, str(lost), cost)
                return
            again = self.method.next_exchange(self.state, exchange.downlink, uplinks)
            if again is None:
                break
            exchange = self._exchange_of(again, exchange.survivors(), round_, exchange)
        after = self._sound(exchange, raw, uplinks)
        columns = self.steps.columns(exchange, uplinks)
        # Only now: after a failed round clients must not count as caught up.
        cost.fetch(self.catch_up, exchange, taken_traffic(grid))
        self._close(exchange, after)
        watch.lap("close")
        due = round_ % self.loop.evaluate_every == 0 or round_ == self.loop.rounds
        measured = self._measured() if due else {"metrics": {}}
        measured |= self._by_clients(send, grid, lambda: exchange.survivors().clients, cost)
        watch.lap("evaluate")
        step = effective_step(exchange.downlink, self.local, exchange.rate_scale)
        row = ledger_row(exchange, self.state, measured, cost, self.recorder.totals())
        row |= self.rounding.columns
        if self.devices.system.enabled:
            dropped = [vars(refusal) for refusal in exchange.dropped]
            row |= {"asked": len(exchange.first.asked), "dropped": dropped, **self.devices.clock}
        for extra in (*self.local.added, exchange.downlink.program):
            name = self.local.name_of(extra)
            with as_user_error(ConfigError, f"{name}: ", "computing its columns of the ledger"):
                row = joined(row, extra.columns(exchange.downlink, uplinks), name)
        self.recorder.link(round_, self.state)
        watch.lap("write")
        self._write(self.steps.added(row, columns), step, watch, grid)

    def _exchanged(
        self, send: Send, exchange: Exchange, cost: Cost, traffic: Traffic | None
    ) -> tuple[Uplinks, Uplinks]:
        """Send requests; return raw and processed replies, and count their cost in any case."""
        try:
            raw = self.steps.receive(send, exchange, self.state.base)
            return raw, self._treated(raw, exchange)
        finally:
            cost.watch.lap("train")
            cost.count(exchange, traffic)

    def _give_up(self, exchange: Exchange, grid: Grid, why: str, cost: Cost) -> None:
        """Skip a round that real clients cannot repeat; the weights stay unchanged."""
        round_ = exchange.round_
        cost.fetch(self.catch_up, exchange, taken_traffic(grid))
        self.done = round_
        row = ledger_row(exchange, self.state, {"metrics": {}}, cost, self.recorder.totals())
        row["notes"] = [why]
        row = self.steps.added(row, self.steps.columns(exchange, None))
        self._write(row, 0.0, cost.watch, grid)

    def _write(self, row: Row, step: object, watch: Stopwatch, grid: Grid) -> None:
        """Publish the row of a round, and save a checkpoint if one is due."""
        incidents = {"incidents": [*grid.incidents]} if grid.incidents else {}
        grid.incidents.clear()
        self._publish_row(row | {"effective_step": step} | watch.columns | incidents)
        # After the row: a checkpoint that is ahead of the ledger could not be resumed.
        if self.recorder.due(self.done):
            self.recorder.save(self.state, self.done, self.catch_up)

    def _setting(self, exchange: Exchange) -> AggregationContext:
        return AggregationContext(exchange.downlink, exchange.round_, self.draw, self.state.base)

    def _treated(self, uplinks: Uplinks, exchange: Exchange) -> Uplinks:
        return self.steps.treat(uplinks, self._setting(exchange))

    def _next(self, exchange: Exchange, uplinks: Uplinks) -> State:
        """Compute the method's next state; nothing is stored yet."""

        def own(uplinks: Uplinks) -> State:
            after = self.method.close_round(self.state, exchange.downlink, uplinks)
            return hold_to_traits(self.method, self.state, after, exchange.downlink)

        return self.steps.close(own, self.state, exchange, uplinks)

    def _sound(self, exchange: Exchange, raw: Uplinks, uplinks: Uplinks) -> State:
        """Compute the next state, and check that it is finite: if not, a client has failed.

        Args:
            exchange: The round's last exchange.
            raw: The raw updates.
            uplinks: The updates after all steps.

        Raises:
            ClientError: Naming the client with the largest update, if it may not be left out; a
                DivergenceError if no client can be named.
        """
        after = self._next(exchange, uplinks)
        while names := overflowing(after, self.state):
            what = f"the merged weights are too large ({', '.join(names[:3])})"
            found = (
                largest(raw, self._setting(exchange)) if raw.has_individuals else exchange.longest
            )
            if found is None or not (self.divisible and self.steps.repeatable):
                raise DivergenceError(
                    f"round {exchange.round_}: {what}, after updates of clients "
                    f"{raw.clients.tolist()}; {calmer(own=self.local.is_own)}"
                )
            client, norm = found
            advice = calmer(own=self.local.is_own)
            reason = f"{what}, and its update is the largest, of norm {norm:.3g}; {advice}"
            raw = exchange.without(raw, client, reason)
            after = self._next(exchange, self._treated(raw, exchange))
        return after

    def _close(self, exchange: Exchange, after: State) -> None:
        """Store the next state, and publish its weights."""
        self.state = self.rounding.closed(self.state, after, exchange.downlink, exchange.round_)
        self.catch_up.add(self.state.link)
        self.replica.publish(self.state.base, self.catch_up.version, self.state.link)
        point_at(self.parameters, self.state.base)
        self.done = exchange.round_

    def _measured(self) -> Row:
        weights = partial(self.method.weights, self.state, self.draw)
        return self.callbacks.measure(weights, self.done)

    def _by_clients(
        self, send: Send, grid: Grid, cohort: Callable[[], torch.Tensor], cost: Cost
    ) -> Row:
        """Let clients evaluate the new weights if that is due; return the columns for the row."""
        measuring, loop, round_ = self.measuring, self.loop, self.done + 1
        if measuring is None or not measuring.due(self.done, loop.rounds):
            return {}
        if (clients := self.steps.measurers(self.done)) is None:
            everybody = measuring.asked.clients == "all"
            clients = torch.arange(loop.clients) if everybody else cohort()
            if not len(clients):
                return {}
        asked = Cohort(clients, client_weights(loop.weights, self.examples(clients)))
        sent = self.method.open_round(self.state, round_, asked, self.draw)
        trains = measuring.asked.personal
        sent = self.steps.send(sent, self.state) if trains else for_measuring(sent)
        sent, version = self.rounding.sent(sent, round_), self.catch_up.version
        rate_scale = self.rate_scale(min(round_, loop.rounds), loop.rounds)
        measurement = Measurement(measuring, sent, asked, round_, version, loop, rate_scale)
        self.steps.measure(send, measurement)
        part = Cost()
        part.count(measurement, grid.traffic)
        part.fetch(self.catch_up, measurement, taken_traffic(grid))
        return measurement.columns(self.recorder, cost.add(part))

    def _publish_row(self, row: Row) -> None:
        self.recorder.append(self.callbacks.own_columns(row))
        self.callbacks.row(self.recorder.ledger.rows[-1])

    def open(self, round_: int) -> Exchange:
        """Sample the clients of a round and open it: return its first exchange."""
        loop = self.loop
        clients = self.steps.cohort(round_)
        weights = client_weights(loop.weights, self.examples(clients))
        cohort = Cohort(clients, weights, self.devices.ranks(clients, self.method))
        downlink = self.method.open_round(self.state, round_, cohort, self.draw)
        return self._exchange_of(self.steps.send(downlink, self.state), cohort, round_, None)

    def _exchange_of(
        self, downlink: RoundInstructions, cohort: Cohort, round_: int, before: Exchange | None
    ) -> Exchange:
        """Open an exchange with the clients whose replies will be used."""
        downlink = self.rounding.sent(downlink, round_)
        in_time, downlink, timeline = self.devices.race(
            round_, cohort, downlink, self.sizes, None if before else self.catch_up, self.loop
        )
        clip, reduce = self.steps.bound(first=before is None), self.steps.sums_are_enough
        more = {"clip": clip, "reduce": reduce, "before": before, "timeline": timeline}
        return self._asked(downlink, round_, in_time, cohort, **more)

    def _asked(
        self, sent: RoundInstructions, round_: int, counted: Cohort, asked: Cohort, **more: Any
    ) -> Exchange:
        """Build an exchange of this run; ``more`` are attributes of it."""
        version, rate_scale = self.catch_up.version, self.rate_scale(round_, self.loop.rounds)
        more |= {"rate_scale": rate_scale, "base": self.state.base}
        exchange = Exchange(sent, round_, version, counted, asked, self.loop, **more)
        exchange.ask()
        return exchange


def taken_traffic(grid: Grid) -> Traffic | None:
    """Return the traffic of a grid since the last call; None if no messages are sent."""
    found = grid.traffic
    grid.traffic = None if found is None else Traffic()
    return found
