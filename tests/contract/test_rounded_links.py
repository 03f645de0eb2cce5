"""Every method with numbers in fewer bits, by links of one round and of several.

What a client holds and starts from is what `tests.reference.follower` makes, in NumPy, of what it
was sent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_quantized_rounds import IN_FULL
from typing_extensions import override
from worlds import (
    RAGGED,
    Run,
    assert_equal_trees,
    is_personal,
    label,
    make_method,
    make_world,
    run,
    variants,
)

from fedraclora.protocol.method import Cohort, RoundInstructions, State
from fedraclora.protocol.quantized import ROUNDED
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.rebuild import weights_at
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.strategies.shared.initials import STARTS
from fedraclora.tree import Tree
from fedraclora.weights.update import WeightHistory
from tests.reference.follower import Follower, array

Variant = tuple[str, dict[str, Any]]
ROUNDS = 6
WALKED = "links are steps along drawn directions, of which no number goes down in fewer bits"
NUMBERS: list[Variant] = [  # of frozen factors whose numbers are sent
    ("subspace_rac_lora", {"merge_every": 1}),
    ("subspace_rac_lora", {"merge_every": 2, "basis": "coordinate"}),
    ("subspace_rac_lora", {"merge_every": 3, "init": "gradient"}),
    ("fed_rac_lora", {"merge_every": 2, "init": "gradient"}),
    ("fed_rac_lora", {"merge_every": 3, "init": "gradient", "train": "A"}),
]
VARIANTS = [*variants(), *NUMBERS]
SHORT = {label(v) for v in VARIANTS if v[0] in {"subspace_rac_lora", "slora"} or v in NUMBERS}
SHORT |= {"fed_rac_lora", "fed_rac_lora-merge_every=3", "fedavg_lora", "fedsvd", "rolora"}
SHORT |= {"pool_rac_lora-refresh=4-merge_every=2", "decomfl"}
WARM: list[Variant] = [*NUMBERS[3:], ("fedavg_lora", {}), ("fed_rac_lora", {"merge_every": 3})]
WARM += [("pool_rac_lora", {"refresh": 4, "merge_every": 2}), ("fed_sb", {})]
WAYS = [(variant, (kind, False)) for variant in VARIANTS for kind in ROUNDED]
WAYS += [(variant, (kind, True)) for variant in WARM for kind in ("int8", "eden2")]

every_way = pytest.mark.parametrize(
    ("variant", "way"),
    WAYS,
    ids=[f"{label(v)}-{kind}{'-feedback' * feedback}" for v, (kind, feedback) in WAYS],
)
short = pytest.mark.short(
    when=lambda variant, way: label(variant) in SHORT and way in {("int8", False), ("eden2", True)}
)


class Seen(RoundStep):
    """Keeps the state before each round, and what was asked in it last."""

    individuals = True

    def __init__(self) -> None:
        self.rounds: list[tuple[State, RoundInstructions]] = []

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        self.rounds.append((state, exchange.downlink))
        return close(uplinks)


@dataclass(frozen=True)
class Done:
    """A run, and what was seen of it: states from the first to that after the last round."""

    run: Run
    states: list[State]
    sent: list[RoundInstructions]


Finish = Callable[[Variant, tuple[str, bool]], Done]


@pytest.fixture(scope="module")
def finished() -> Finish:
    """Run each variant once for all laws; what would hold a part of W goes down in full."""
    made: dict[tuple[str, tuple[str, bool]], Done] = {}

    def give(variant: Variant, way: tuple[str, bool]) -> Done:
        if (key := (label(variant), way)) not in made:
            (name, changes), (kind, feedback) = variant, way
            whole = name in IN_FULL or changes.get("init") in STARTS
            bits = {"uplink": kind, "downlink": "float32" if whole else kind}
            world = make_world(width=8 if kind.startswith("eden") else 1)
            method, seen = make_method(name, **changes), Seen()
            more: dict[str, Any] = bits | {"feedback": feedback}
            done = run(world, method, RAGGED, rounds=ROUNDS, cohort=3, steps=[seen], **more)
            states = [*(state for state, _ in seen.rounds), done.strategy.state]
            made[key] = Done(done, states, [sent for _, sent in seen.rounds])
        return made[key]

    return give


def assert_near(found: dict[str, Any], wanted: Tree) -> None:
    for name, value in wanted.items():
        gap = np.abs(found[name] - array(value)).max(initial=0.0)
        size = 1.0 + np.abs(array(value)).max(initial=0.0)
        assert gap <= 1e-12 * size, f"{name} is off by {gap}"


@short
@every_way
def test_what_is_sent_twice_has_the_same_bits(
    variant: Variant, way: tuple[str, bool], finished: Finish
) -> None:
    """Frozen factors of one link; what the server carries; and a round that is run again."""
    done = finished(variant, way)
    strategy = done.run.strategy
    for (last, now), state in zip(pairwise(done.sent), done.states[1:], strict=False):
        for name, factor in now.factors().items():
            before = last.factors().get(name)
            if before is None or before.trained or factor.trained or now.link != last.link:
                pass
            elif last.program.trains:  # a probe has factors of its own
                assert torch.equal(factor.draw(), before.draw()), name
            goes_on = factor.trained and factor.upload and not factor.per_client
            if goes_on and name in state.carried:
                assert torch.equal(factor.draw(), state.carried[name]), name
    some = Cohort(torch.arange(2), torch.ones(2, dtype=torch.float64))
    asked = strategy.method.open_round(strategy.state, ROUNDS + 1, some, strategy.draw)
    first, again = (strategy.rounding.sent(asked, ROUNDS + i).factors() for i in (1, 2))
    for name, factor in first.items():
        if not factor.per_client:
            assert torch.equal(factor.draw(), again[name].draw()), name


@short
@every_way
def test_a_client_starts_from_the_weights_that_the_server_measures(
    variant: Variant, way: tuple[str, bool], finished: Finish
) -> None:
    """Within a link, too: W, and what the factors add to it, as they were sent."""
    if is_personal(variant):
        pytest.skip("clients keep a factor that the server does not have")
    done = finished(variant, way)
    if any(sent.program.moves_weights for sent in done.sent):
        pytest.skip(WALKED)
    method, draw = done.run.strategy.method, done.run.strategy.draw
    for state, sent in zip(done.states, done.sent, strict=False):
        if any(factor.per_client for factor in sent.named.values()):
            continue
        held = {name: array(value) for name, value in state.base.items()}
        assert_near(Follower(state.plan, held).start(sent), method.weights(state, draw))


@short
@every_way
def test_a_clients_weights_after_a_link_are_the_servers(
    variant: Variant, way: tuple[str, bool], finished: Finish
) -> None:
    """Whoever was there in each round, or away for one, two or all of them."""
    done = finished(variant, way)
    states, history = done.states, WeightHistory()
    if any(sent.program.moves_weights for sent in done.sent):
        pytest.skip(WALKED)
    every: dict[int, Follower] = {}
    for version, state in enumerate(states):
        history.publish(state.base, version, state.link if version else None)
        for rest in (1, 2, 3, ROUNDS):
            if version == 0:
                held = {name: array(value) for name, value in state.base.items()}
                every[rest] = Follower(state.plan, held)
            elif version % rest == 0:
                every[rest].take(history.since(version - rest))
                assert_near(every[rest].held, state.base)
    for (last, sent), state in zip(pairwise(done.sent), states[2:], strict=False):
        ends = state.counters.sketch != sent.link
        for name, adapter in sent.adapters.items() if ends and last.link == sent.link else ():
            term = (state.link.terms if state.link else {}).get(name)
            for label_, factor in adapter.factors.items():
                if term is not None and not sent.program.frame and not factor.trained:
                    merged = term.factors["BA".index(label_)]
                    assert torch.equal(merged.draw(), last.adapters[name].factors[label_].draw())


@pytest.mark.short(when=lambda links, kind: kind == "int8")
@pytest.mark.parametrize("kind", ["int8", "eden2"])
@pytest.mark.parametrize("links", [v for v in NUMBERS if v[1]["merge_every"] > 1], ids=label)
def test_files_have_a_frozen_factor_as_it_was_sent(
    links: Variant, kind: str, tmp_path: Path
) -> None:
    """Weights of each round within a link, and a run that goes on in the middle of one."""
    method, seen = make_method(links[0], **links[1]), Seen()
    more: dict[str, Any] = {"cohort": 3, "uplink": kind, "downlink": kind, "steps": [seen]}
    whole = run(make_world(width=8), method, RAGGED, rounds=ROUNDS, **more).strategy
    for stop in (3, ROUNDS):  # of links of three rounds the first stops in the middle
        more |= {"folder": tmp_path, "resume": stop == ROUNDS}
        run(make_world(width=8), method, RAGGED, rounds=stop, **more)
    states = [*(state for state, _ in seen.rounds[:ROUNDS]), whole.state]
    for round_, state in enumerate(states):
        found = weights_at(tmp_path, round_, method, whole.draw)
        assert_equal_trees(found, method.weights(state, whole.draw))
