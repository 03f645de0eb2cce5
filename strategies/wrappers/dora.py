"""Wrap a method so that adapted rows have trained lengths (``dora=true``).

    V_k = W + s B_k A_k as the method has it;  client k: local steps on what it trains, and on M_k
    W'_k = diag(M_k / ||V_k||) V_k;   M <- sum_k p_k M_k;   V as the method makes it
    effective weight W' = diag(M / ||V||) V;  M = the lengths of the rows of W at the start

- Uplink and downlink: those of the method, and m numbers each way per matrix and client.
- Aggregation: **not exact**, whatever the method: M is averaged exactly, and V as the method
  averages it, but the mean of the clients' W' is not the W' of the means. What a method reports of
  its own error (``aggregation_error``) is that of V.
- For methods that never merge an update into W: no low-rank term could update a client's W from one
W' to the
  next. Clients with personal factors share M.
- Refused: embeddings, where a row of the table is no output of the layer; rows of zeros, which have
no
  direction; starts from gradients (``lora_ga``); an `allocation`; and a quantized
  ``compression.downlink``, which would round M.
- Source: Liu et al., *DoRA: weight-decomposed low-rank adaptation*, ICML 2024, arXiv 2402.09353.
- Departures: the federated form is ours. The rest is in `fedraclora.lowrank.dora`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.lowrank.dora import DORA, magnitude_of, magnitudes, rescaled, row_lengths
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Cohort, Draw, Method, Plan, RoundInstructions, State, Traits
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.shared.common import server_step
from fedraclora.strategies.wrappers.around import MethodWrapper
from fedraclora.tree import Tree


@DORA
@dataclass(frozen=True)
class Dora(MethodWrapper):
    """Add trained magnitudes to a method."""

    @property
    @override
    def traits(self) -> Traits:
        return replace(self.inner.traits, exact=False)

    @property
    @override
    def rank(self) -> Any:
        return self.inner.rank

    @override
    def initial_state(self, base: Tree, plan: Plan, draw: Draw) -> State:
        state = self.inner.initial_state(base, plan, draw)
        return replace(state, carried=state.carried | self._lengths(state, draw))

    def _lengths(self, state: State, draw: Draw) -> Tree:
        """Compute the row lengths of the method's effective weights, by magnitude's name."""
        weights, found = self.inner.weights(state, draw), {}
        for name, view in state.plan.targets.items():
            if view.kind == "embedding":
                raise ConfigError(
                    f"dora=true: {name} is an embedding, whose rows are not outputs of a "
                    "layer. Leave it out of target_modules, or set dora=false"
                )
            lengths = row_lengths(view.matrix(weights[name]).double())
            if not lengths.all():
                raise ConfigError(
                    f"dora=true: row {int(lengths.argmin())} of {name} is zero and has no "
                    "direction. Leave the layer out of target_modules, or set dora=false"
                )
            found[magnitude_of(name)] = lengths.to("cpu", state.base[name].dtype)
        return found

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        return self._with_magnitudes(state, super().open_round(state, round_, cohort, draw))

    @override
    def next_exchange(
        self, state: State, sent: RoundInstructions, uplinks: Uplinks
    ) -> RoundInstructions | None:
        again = super().next_exchange(state, sent, uplinks)
        return None if again is None else self._with_magnitudes(state, again)

    @override
    def at(self, state: State) -> tuple[Method, State]:
        """Return the method, and the state without magnitudes."""
        names = {magnitude_of(name) for name in state.plan.targets}
        carried = {n: t for n, t in state.carried.items() if n not in names}
        return self.inner, replace(state, carried=carried)

    def _with_magnitudes(self, state: State, sent: RoundInstructions) -> RoundInstructions:
        if not sent.program.trains:
            return sent  # which is refused: there are no lengths to train
        starts = {n: state.carried[n] for n in map(magnitude_of, sent.adapters)}
        slots = {n: to_train(tuple(start.shape), start) for n, start in starts.items()}
        return replace(sent, dense=sent.dense | slots)

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        after = self.inner.close_round(self.at(state)[1], sent, uplinks)
        mean, step = uplinks.mean(), self.traits.step
        new = {
            n: server_step(state.carried[n], mean[n], step).to(state.carried[n])
            for n in magnitudes(sent.adapters, sent.dense).values()
        }
        return replace(after, carried=after.carried | new)

    @override
    def weights(self, state: State, draw: Draw, own: Tree | None = None) -> Tree:
        weights = dict(super().weights(state, draw, own))
        for name, view in state.plan.targets.items():
            V = view.matrix(weights[name]).double()
            W = rescaled(V, state.carried[magnitude_of(name)].to(V))
            weights[name] = view.stored(W.to(weights[name].dtype), weights[name])
        return weights

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        up, down = self.inner.floats(plan, round_)
        rows = sum(view.shape[0] for view in plan.targets.values())
        return up + rows, down + rows
