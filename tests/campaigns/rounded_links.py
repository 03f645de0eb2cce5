"""Links in fewer bits, drawn at random, and each client of a run followed in NumPy.

    python -m tests.campaigns.rounded_links --times 700

Method, rounds of a link, kinds of numbers both ways, feedback, layers, their size and the cohort
are drawn by a seeded generator. Of each run every client is followed by what it was sent alone
(`tests.reference.follower`): updates of the base when it is asked, for as many rounds as it was
away, and the downlink, both read from messages. What can be wrong is

    factor    a frozen factor of one link was sent with other bits than before
    start     a client starts from other weights than the server measures
    after     a client's weights after the rounds it missed are not the server's
    error     the run fails by what is no refusal

and is printed with what was drawn. The status is non-zero if there is any.
"""

from __future__ import annotations

import argparse
import logging
import sys
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flwr.app import RecordDict
from typing_extensions import override

from fedraclora.engines.records import add_weight_update, read_weight_update
from fedraclora.errors import ConfigError
from fedraclora.protocol.method import State
from fedraclora.protocol.quantized import FULL, ROUNDED
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.tree import Tree
from fedraclora.weights.update import WeightHistory, WeightUpdate
from tests.contract import worlds
from tests.messages import unpack_downlink
from tests.reference.follower import Follower, Matrix, array

REFUSED = "refused"
CHANGES: dict[str, dict[str, list[Any]]] = {  # what is drawn of some methods beside their rank
    "subspace_rac_lora": {
        "merge_every": [1, 2, 3, 5],
        "basis": ["singular", "coordinate"],
        "first": ["drawn", "gradient"],
        "fresh": [0.0, 0.25, 0.5],
        "pairs": [False, True],
    },
    "fed_rac_lora": {
        "merge_every": [1, 2, 3, None],
        "first": ["drawn", "gradient"],
        "train": ["B", "A", "auto"],
    },
    "fed_cola": {"merge_every": [1, 2, 3]},
    "pool_rac_lora": {"merge_every": [1, 2], "refresh": [None, 4, 6]},
    "slora": {"sparse_rounds": [1, 2, 3]},
}


@dataclass(frozen=True)
class Case:
    """What is drawn.

    Attributes:
        method, changes: Its name, and hyperparameters.
        bits: How numbers travel.
        layer: Of the model.
        width: Times which its layers are wide.
        cohort, rounds, seed: Of the run.
    """

    method: str
    changes: dict[str, Any]
    bits: dict[str, Any]
    layer: str
    width: int
    cohort: int
    rounds: int
    seed: int


def drawn(seed: int, number: int) -> Case:
    """Draw one case; every other one is of a method whose links have a length."""
    rng = generator(seed, "rounded links", number)

    def one(of: Any) -> Any:
        return of[int(rng.integers(len(of)))]

    method = one([*CHANGES]) if number % 2 else one(sorted(worlds.distinct()))
    changes = {key: one(values) for key, values in CHANGES.get(method, {}).items()}
    bits = {"downlink": one([*ROUNDED, FULL]), "uplink": one([*ROUNDED, FULL])}
    bits |= {"feedback": one([False, False, True])}
    rest = {"width": one([1, 3, 8]), "cohort": one([1, 2, 3, 5]), "rounds": one([4, 6, 8])}
    return Case(method, changes, bits, one(["linear", "conv1d"]), seed=number, **rest)


@dataclass
class Watched(RoundStep):
    """Keeps the state before each round.

    Attributes:
        states: They.
    """

    individuals = True
    states: list[State] = field(default_factory=list)

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        self.states.append(state)
        return close(uplinks)


def judged(case: Case) -> str:
    """Run a case; say what is wrong, that it is refused, or nothing."""
    world = worlds.make_world(getattr(worlds, case.layer), width=case.width)
    watched = Watched()
    try:
        method = worlds.make_method(case.method, **case.changes)
        done = worlds.run(
            world,
            method,
            worlds.RAGGED,
            rounds=case.rounds,
            cohort=case.cohort,
            seed=case.seed,
            steps=[watched],
            **case.bits,
        )
    except ConfigError as error:
        return f"{REFUSED}: {error}"
    except Exception as error:
        return f"error: {type(error).__name__}: {error}"
    states = [*watched.states, done.strategy.state]
    return watch(done, states) or after_all(states)


def watch(done: worlds.Run, states: list[State]) -> str:
    """Follow each client to every ask, and hold what it was sent against the server."""
    history, everyone, known = WeightHistory(), dict[int, Follower](), Tree()
    version, link = -1, -1
    for content in done.worker.asked:
        sent, request = unpack_downlink(content)
        state = states[request.round_ - 1]
        while version < request.round_ - 1:
            version += 1
            history.publish(
                states[version].base, version, states[version].link if version else None
            )
        if sent.program.moves_weights:
            continue  # steps along drawn directions, of which no number goes down in fewer bits
        if sent.link != link or not sent.program.trains:
            known, link = Tree(), -1 if not sent.program.trains else sent.link
        for name, factor in sent.factors().items():
            if factor.trained or factor.per_client or factor.coefficients is not None:
                known.pop(name, None)  # trained in this round, it may be another in the next
            elif not torch.equal(known.setdefault(name, factor.draw()), factor.draw()):
                return f"factor: {name} in round {request.round_}"
        for client in request.clients.tolist():
            if client not in everyone:
                held = {name: array(value) for name, value in states[0].base.items()}
                everyone[client] = Follower(state.plan, held)
            follower = everyone[client]
            follower.take(told(history.since(follower.version)))
            if said := off(follower.held, state.base):
                return f"after: {said} at client {client} in round {request.round_}"
        apart = any(factor.per_client for factor in sent.named.values())
        if not apart and not done.strategy.method.client_state:
            measured = done.strategy.method.weights(state, done.strategy.draw)
            if said := off(follower.start(sent), measured):
                return f"start: {said} in round {request.round_}"
    return ""


def after_all(states: list[State]) -> str:
    """Hold whoever was away from the start on, or for one round, against the last weights."""
    history = WeightHistory()
    for version, state in enumerate(states):
        history.publish(state.base, version, state.link if version else None)
        if any(part.moves for part in (state.link.parts() if version and state.link else ())):
            return ""
    for start in (0, len(states) - 2):
        held = {name: array(value) for name, value in states[start].base.items()}
        follower = Follower(states[0].plan, held, start)
        follower.take(told(history.since(start)))
        if said := off(follower.held, states[-1].base):
            return f"after: {said} from version {start} on"
    return ""


def told(update: WeightUpdate) -> WeightUpdate:
    """Read an update from the records of its message."""
    add_weight_update(content := RecordDict(), update)
    return read_weight_update(content)


def off(found: dict[str, Matrix], wanted: Tree) -> str:
    """Name what is another than wanted, and by how much; nothing where all is as it should be."""
    for name, value in wanted.items():
        there = array(value)
        gap = np.abs(found[name] - there).max(initial=0.0)
        if not gap <= 1e-11 * (1.0 + np.abs(there).max(initial=0.0)):
            return f"{name} by {gap:.3g}"
    return ""


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--times", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    logging.disable(logging.CRITICAL)
    wrong = refused = 0
    for number in range(asked.times):
        case = drawn(asked.seed, number)
        said = judged(case)
        refused += said.startswith(REFUSED)
        if said and not said.startswith(REFUSED):
            wrong += 1
            print(number, case, said, flush=True)
    print(f"{asked.times} cases, {refused} refused, {wrong} failures")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
