"""Error feedback: clients keep what rounding left, as long as it is of what they train."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from typing_extensions import override
from worlds import (
    RAGGED,
    Run,
    assert_equal_trees,
    make_method,
    make_world,
    put_on_the_wire,
    run,
)

from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.config.settings import CompressionConfig
from fedraclora.errors import ConfigError, WireError
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.secret import Secret
from fedraclora.protocol.method import RoundInstructions, State
from fedraclora.protocol.quantized import encode, rounded
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.quantized import RESIDUE
from fedraclora.strategies.server.round_step import CloseRound, RoundStep
from fedraclora.tree import Tree, below
from fedraclora.wire.changes import ChangeCodec, CodedRows
from fedraclora.wire.exchange import TrainRequest
from fedraclora.wire.feedback import PREFIX
from tests.common import accepted
from tests.messages import pack_downlink, unpack_downlink

BITS: dict[str, Any] = {"uplink": "int4", "downlink": "int8", "feedback": True}


def finished(name: str, method: dict[str, object] | None = None, **more: Any) -> Run:
    more = {"rounds": 6, "cohort": 3, "local": RAGGED, **BITS, **more}
    return run(make_world(), make_method(name, **(method or {})), more.pop("local"), **more)


@dataclass
class Seen:
    """What a client was about to send, what was added, what it sent, and beside which factor."""

    client: int
    round_: int
    change: torch.Tensor
    added: torch.Tensor
    sent: torch.Tensor
    asked: RoundInstructions

    def part(self, row: torch.Tensor, *, dense: bool) -> torch.Tensor:
        """Take what is trained in full of a row, or the factors."""
        found = self.asked.layout.unpack(row)
        some = [t.flatten() for n, t in found.items() if (n in self.asked.dense) == dense]
        return torch.cat([*some, torch.zeros(0, dtype=row.dtype)])


@dataclass
class Wiretap:
    """Listens to what clients round."""

    seen: list[Seen] = field(default_factory=list)

    def listen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        whole = ChangeCodec.encode

        def encoded(
            changes: ChangeCodec,
            rows: torch.Tensor,
            seed: int,
            round_: int,
            coded: CodedRows,
            residues: torch.Tensor | None = None,
        ) -> torch.Tensor:
            assert residues is not None
            added = residues.clone()
            found = whole(changes, rows, seed, round_, coded, residues)
            start = changes._starts(changes.clients)
            for i, client in enumerate(changes.clients.tolist()):
                args = (client, round_, rows[i] - start[i], added[i], found[i] - start[i])
                self.seen.append(Seen(*args, changes.sent))
            return found

        monkeypatch.setattr(ChangeCodec, "encode", encoded)

    def of_clients(self) -> Iterator[list[Seen]]:
        for client in sorted({s.client for s in self.seen}):
            yield [s for s in self.seen if s.client == client]


@pytest.fixture
def wiretap(monkeypatch: pytest.MonkeyPatch) -> Wiretap:
    tap = Wiretap()
    tap.listen(monkeypatch)
    return tap


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.short(when=lambda name: name in {"fedavg_lora", "fedsa_lora"})
@pytest.mark.parametrize("name", ["ffa_lora", "fedavg_lora", "fedsa_lora", "fedavg"])
def test_what_was_sent_in_all_is_off_by_one_rounding(name: str, wiretap: Wiretap) -> None:
    finished(name, rounds=8)
    assert max(map(len, wiretap.of_clients())) > 3
    for rounds in wiretap.of_clients():
        e = torch.zeros_like(rounds[0].change)
        for seen in rounds:
            close(seen.added, e)
            e = seen.change + e - seen.sent
        assert float(e.abs().max()) > 0
        total = sum((s.change for s in rounds), torch.zeros_like(e))
        close(sum((s.sent for s in rounds), torch.zeros_like(e)) + e, total)


def test_the_bytes_are_those_of_the_change_and_the_residue(wiretap: Wiretap) -> None:
    """To the nearest: what a draw would decide is made up for."""
    done = finished("ffa_lora", chunk=1)
    for seen, reply in zip(wiretap.seen, done.worker.answered, strict=True):
        wanted = encode(seen.change + seen.added, seen.asked.layout.sizes, "int4")
        assert wanted.numpy().tobytes() == reply["arrays"]["flat"].numpy().tobytes()


def test_a_residue_of_a_factor_ends_with_its_link(wiretap: Wiretap) -> None:
    finished("fed_rac_lora", {"merge_every": 2}, cohort=None)
    for rounds in wiretap.of_clients():
        for number, seen in enumerate(rounds):
            of_factors = seen.part(seen.added, dense=False)
            assert bool(of_factors.any()) == (number % 2 == 1)
            assert bool(seen.part(seen.added, dense=True).any()) == (number > 0)


@pytest.mark.parametrize("refresh", [None, 4])
def test_residues_of_a_pool_wait_for_their_sketch(refresh: int | None, wiretap: Wiretap) -> None:
    finished("pool_rac_lora", {"pool": 2, "refresh": refresh}, rounds=7)
    for rounds in wiretap.of_clients():
        left: dict[tuple[int, ...], torch.Tensor] = {}
        for seen in rounds:
            era, turn = divmod(seen.round_ - 1, refresh) if refresh else (0, seen.round_ - 1)
            sketch = (era, turn % 2)
            added = seen.part(seen.added, dense=False)
            close(added, left.get(sketch, torch.zeros_like(added)))
            left[sketch] = seen.part(seen.change + seen.added - seen.sent, dense=False)


@pytest.mark.short(when=lambda name: name == "pool_rac_lora")
@pytest.mark.parametrize("name", ["ffa_lora", "pool_rac_lora", "fedavg_lora"])
def test_runs_that_are_cut_or_are_written_have_the_same_bits(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = finished(name).weights
    assert_equal_trees(finished(name, chunk=2).weights, whole)
    put_on_the_wire(monkeypatch)
    assert_equal_trees(finished(name).weights, whole)


def test_moments_of_a_link_end_and_residues_of_dense_tensors_do_not(wiretap: Wiretap) -> None:
    local, moving = replace(RAGGED, optimizer_state="merge"), {"rounds": 6, "cohort": None, **BITS}
    run(make_world(), make_method("fed_rac_lora", merge_every=3), local, **moving)
    last = [rounds[3] for rounds in wiretap.of_clients()]
    assert all(s.part(s.added, dense=True).any() for s in last)
    assert not any(s.part(s.added, dense=False).any() for s in last)


@dataclass
class Rounds(RoundStep):
    """Keeps each round as the method closed it and as the server left it."""

    individuals = True
    closed: list[State] = field(default_factory=list)

    @override
    def close(self, close: CloseRound, state: State, exchange: Exchange, uplinks: Uplinks) -> State:
        self.closed.append(after := close(uplinks))
        return after


def left(done: Run) -> Tree:
    return below(done.strategy.state.moments, RESIDUE)


@pytest.mark.slow
@pytest.mark.short(when=lambda name: name == "fedex_lora")
@pytest.mark.parametrize("name", ["ffa_lora", "fedavg_lora", "fedex_lora"])
def test_the_server_sends_a_factor_that_lives_on_off_by_one_rounding(name: str) -> None:
    """The changes of all rounds add up to what clients start from, and what rounding left of it."""
    rounds = Rounds()
    done = finished(name, steps=[rounds])
    assert left(done).keys() >= done.strategy.state.carried.keys() != set()
    for n, value in done.strategy.state.carried.items():
        total = rounds.closed[0].carried[n].double()
        for number, after in enumerate(rounds.closed[1:], 1):
            began = finished(name, rounds=number).strategy.state.carried[n]
            total = total + after.carried[n].double() - began.double()
        close(value.double() + left(done)[n], total)


def test_the_server_merges_what_rounding_left_at_the_end_of_a_link() -> None:
    rounds = Rounds()
    method: dict[str, object] = {"merge_every": 2}
    done = finished("fed_rac_lora", method, rounds=2, steps=[rounds], downlink="int4")
    mid = finished("fed_rac_lora", method, rounds=1, downlink="int4")
    assert not [n for n in left(done) if "/" in n]
    (link,) = done.strategy.state.link.parts() if done.strategy.state.link else ()
    (as_closed,) = rounds.closed[1].link.parts() if rounds.closed[1].link else ()
    for name, term in link.terms.items():
        if name not in as_closed.terms:  # trained in full
            continue
        e = left(mid)[f"{name}/B"]
        assert float(e.abs().max()) > 0
        wanted = as_closed.terms[name].factors[0].draw().double() + e
        rng = generator(1, "downlink", 2, "link", 0, name, 0)
        assert torch.equal(term.factors[0].draw().double(), rounded(wanted, "int4", rng))


def test_the_sum_of_a_pool_has_what_rounding_left_within_its_links() -> None:
    rounds, method = Rounds(), {"pool": 2, "merge_every": 2}
    done = finished("pool_rac_lora", method, rounds=2, steps=[rounds])
    mid = finished("pool_rac_lora", method, rounds=1)
    parts = [n for n in left(done) if n.endswith("/B.0")]
    assert parts
    for part in parts:
        e = left(mid)[part.removesuffix(".0")]
        base = done.strategy.state.base[part].double()
        close(base + left(done)[part], rounds.closed[1].base[part].double() + e)


def test_a_frozen_factor_is_merged_as_it_was_sent() -> None:
    """One that comes of gradients was rounded, too, and clients trained under what was left."""
    method: dict[str, object] = {"init": "gradient", "merge_every": 2}
    done = finished("fed_rac_lora", method, rounds=3, downlink="int4", chunk=3)
    sent, _ = unpack_downlink(done.worker.asked[-1])
    (link,) = done.strategy.state.link.parts() if done.strategy.state.link else ()
    for weight, adapter in sent.adapters.items():
        assert torch.equal(link.terms[weight].factors[1].draw(), adapter.factors["A"].draw())


@pytest.mark.parametrize("train", ["B", "A"])
def test_a_pool_is_folded_with_what_rounding_left_of_every_link(train: str) -> None:
    """Also of the last one: the sum of all that means have moved is rounded, and once."""
    rounds = Rounds()
    method: dict[str, object] = {"pool": 2, "merge_every": 2, "refresh": 4, "train": train}
    more: dict[str, Any] = {"downlink": "int4", "uplink": "float32"}
    done = finished("pool_rac_lora", method, rounds=4, steps=[rounds], **more)
    began = [finished("pool_rac_lora", method, rounds=n, **more).strategy.state for n in (1, 3)]
    folds = [state.link.terms for state in (rounds.closed[3], done.strategy.state) if state.link]
    label, at, axis = ("B", 0, 1) if train == "B" else ("A", 1, 0)
    for weight, as_closed in folds[0].items():
        term, name = folds[1][weight], f"{weight}/{label}"
        ends = rounds.closed[1].base[f"{name}.0"], as_closed.factors[at].draw().chunk(2, axis)[1]
        sums = [
            rounds.closed[first].carried[name].double() + end - state.carried[name].double()
            for first, end, state in zip((0, 2), ends, began, strict=True)
        ]
        rng = generator(1, "downlink", 4, "link", 0, weight, at)
        wanted = rounded(torch.cat(sums, axis), "int4", rng)
        assert torch.equal(term.factors[at].draw().double(), wanted)


def test_only_the_end_that_rounds_keeps_what_it_left() -> None:
    down = finished("ffa_lora", uplink="float32")
    assert left(down)
    assert not [n for n in down.strategy.recorder.store.state() if PREFIX in n]
    up = finished("ffa_lora", downlink="float32")
    assert not left(up)
    assert [n for n in up.strategy.recorder.store.state() if PREFIX in n]


def test_what_is_kept_is_no_part_of_a_clients_model() -> None:
    with_it, without = (finished("fedsa_lora", feedback=f).worker.store for f in (True, False))
    names = [own.keys() for own in with_it.latest(7).values()]
    assert names == [own.keys() for own in without.latest(7).values()]
    assert len(names) > 3


def test_without_it_nothing_is_kept() -> None:
    done = finished("ffa_lora", feedback=False)
    assert not left(done)
    assert not [n for n in done.strategy.recorder.store.state() if PREFIX in n]


@pytest.mark.parametrize(
    ("name", "method", "reason"),
    [
        ("fed_rac_lora", {}, r"merges after every round.*next frozen"),
        ("flexlora", {}, "merges after every round"),
        ("subspace_rac_lora", {}, "trains different tensors"),
        ("fed_rac_lora", {"sketches": 2, "merge_every": 2}, "train different parameters"),
    ],
)
def test_what_it_is_of_no_use_to_is_refused(
    name: str, method: dict[str, object], reason: str
) -> None:
    with pytest.raises(ConfigError, match=f"compression.feedback=true .*{reason}"):
        finished(name, method)


def test_a_private_run_refuses_it() -> None:
    level = ClientLevel(clip=0.05, noise_multiplier=0.5, delta=1e-3)
    private = {"privacy": level, "secret": Secret(bytes(range(32)))}
    with pytest.raises(ConfigError, match=r"compression\.feedback=true .* privacy="):
        finished("ffa_lora", treatment=private, weights="uniform")


def test_control_variates_refuse_it() -> None:
    chosen = {"control_variates": True}
    with pytest.raises(ConfigError, match=r"compression\.feedback=true .* control_var"):
        finished("ffa_lora", treatment=chosen, local=replace(RAGGED, steps=2, momentum=0.0))


def test_a_step_in_whole_weights_refuses_it_where_links_end() -> None:
    chosen: dict[str, Any] = {"treatment": {"server_optimizer": Momentum()}, "rounds": 2}
    with pytest.raises(ConfigError, match=r"compression\.feedback=true .* a method that merges"):
        finished("fed_rac_lora", {"merge_every": 2}, **chosen)
    for name in ("ffa_lora", "fedex_lora", "pool_rac_lora"):
        finished(name, **chosen)


def test_feedback_of_numbers_that_are_not_rounded_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compression.feedback=True has no effect"):
        accepted("compression", CompressionConfig(feedback=True))


@pytest.mark.parametrize(
    "turn", [[0], [0, 2], "soon", [2, 2, 0], [0, 0, 0], [-1, 2, 0], [0, 10**9, 0], [0.5, 2, 0]]
)
def test_a_turn_that_no_pool_has_is_refused(turn: object, wiretap: Wiretap) -> None:
    finished("pool_rac_lora", {"pool": 2}, rounds=1)
    sent = pack_downlink(wiretap.seen[0].asked, TrainRequest(1, 0, 1.0, torch.arange(3)), "float64")
    header = json.loads(str(sent["config"]["header"]))
    header["downlink"]["program"]["turn"] = turn
    sent["config"] = ConfigRecord({"header": json.dumps(header)})
    with pytest.raises(WireError, match="turn"):
        unpack_downlink(sent)
