"""Frozen factors computed from the last link: at the server, in messages, at a replica."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import ConfigRecord
from worlds import Run, assert_equal_trees, assert_updates_lead_on, make_world, run

from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.allocation import HeteroLora
from fedraclora.devices.asynchronous import PendingClient
from fedraclora.errors import ConfigError, WireError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.change_of_basis import held_beside
from fedraclora.protocol.factor import Factor, combined, weight_of
from fedraclora.protocol.method import (
    Adapter,
    Cohort,
    Draw,
    Plan,
    RoundInstructions,
    State,
    apply_link,
)
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.run.rebuild import state_at
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.buffered import ReplyBatch, read_batches, write_batches
from fedraclora.strategies.methods.subspace_rac_lora import SubspaceRacLora
from fedraclora.strategies.server.quantized import DownlinkRounding
from fedraclora.strategies.wrappers.allocated import allocated
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.materialize import materialize
from fedraclora.tree import digest
from fedraclora.weights.chain import CatchUp, link_tensors, read_link
from fedraclora.weights.replica import Replica
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.exchange import TrainRequest, payload_bytes
from tests.messages import pack_downlink, unpack_downlink

M, N, R, ALPHA = 30, 40, 3, 7.0
METHOD = SubspaceRacLora(rank=R, alpha=ALPHA, merge_every=1, fresh=0.3)  # k = 2
DRAW, CPU = Draw(3), torch.device("cpu")
PLAN = Plan({"w": LayerView("linear", (M, N))}, weights=("w",), shapes={"w": (M, N)})
COHORT = Cohort(torch.arange(2), torch.tensor([1.0, 3.0], dtype=torch.float64))
REQUEST = TrainRequest(2, 1, 1.0, COHORT.clients)
COEFFICIENTS = 8 * R * (R + R)


def played(
    rounds: int, method: SubspaceRacLora = METHOD, wire: str = "float32"
) -> list[tuple[State, RoundInstructions]]:
    """Close rounds of drawn replies: the state before each, and what it sent; then the last."""
    rounding = DownlinkRounding(wire, seed=3)
    state = method.initial_state({"w": torch.zeros(M, N)}, PLAN, DRAW)
    found = []
    for round_ in range(1, rounds + 1):
        sent = method.open_round(state, round_, COHORT, DRAW)
        sent = rounding.sent(sent, round_)
        found.append((state, sent))
        layout = sent.layout
        rows = torch_normal(generator(0, "replies", round_), 2, layout.size).float()
        got = Uplinks(COHORT.clients, COHORT.weights, layout, rows)
        state = rounding.closed(state, method.close_round(state, sent, got), sent, round_)
    return [*found, (state, RoundInstructions())]


def computed(sent: RoundInstructions) -> Factor:
    (found,) = (f for f in sent.factors().values() if not f.trained)
    assert found.coefficients is not None
    return found


def test_rows_of_its_span_are_written_as_they_are() -> None:
    drawing = SketchSpec("gaussian", "left", 2, 9, seed=1, index=4)
    past = torch_normal(generator(1, "past"), 9, 3).float()
    wanted = torch_normal(generator(2, "C"), 4, 5)
    rows = wanted @ torch.cat([past.double().mT, drawing.draw().mT])
    found = combined(rows, past, drawing)
    assert found.coefficients is not None
    torch.testing.assert_close(found.coefficients, wanted)
    torch.testing.assert_close(found.draw(), rows.mT)
    assert found.exact_bytes == 8 + 8 * 4 * 5


def test_a_link_is_built_on_the_last_one_and_on_a_drawing() -> None:
    (_, first), (before, second), *_ = played(2)
    assert first.factors()["w/A"].drawing is not None
    B, found = computed(second).draw(), computed(second)
    assert found.floats == R * 2 * R
    lengths = torch.linalg.vector_norm(B, dim=0)
    c = METHOD.length(R, M)
    torch.testing.assert_close(lengths, torch.tensor([c, c, 1.0]).double())
    unit = B / lengths
    torch.testing.assert_close(unit.mT @ unit, torch.eye(R).double())
    u = torch.linalg.svd(before.base["w"].double())[0][:, :2]
    torch.testing.assert_close((unit[:, :2].mT @ u).abs(), torch.eye(2).double())


@pytest.mark.parametrize("wire", ["float32", "int8", "int4"])
def test_a_client_computes_what_the_server_froze(wire: str) -> None:
    """From the message, the links that it fetched and nothing else; also of rounded links."""
    states = played(4, wire=wire)
    replica = Replica(PLAN, CPU)
    replica.take({"w": torch.zeros(M, N)}, 0, None)
    history = WeightHistory()
    for version, (state, sent) in enumerate(states[:-1]):
        history.publish(state.base, version, state.link)
        link = None if state.link is None else read_link(*link_tensors(state.link))
        if link is not None:
            replica.take(apply_link(replica.base, link, PLAN), version, None)
        assert digest(replica.base) == digest(state.base)
        got, _ = unpack_downlink(pack_downlink(sent, REQUEST, "float32"))
        there = got.with_past(replica.at(version, version + 1))
        for name, factor in sent.factors().items():
            if factor.coefficients is not None:
                other = there.factors()[name]
                assert other.coefficients is not None
                assert torch.equal(other.draw(), factor.draw())
        frozen = [materialize(d, state.base, COHORT.clients)[2] for d in (sent, there)]
        assert all(torch.equal(frozen[0][name], frozen[1][name]) for name in frozen[0])
    # Whoever fetches the weight whole has what the last link trained beside it.
    late = Replica(PLAN, CPU)
    assert late.follow(history.since(None))
    assert digest(late.base) == digest(states[-2][0].base)


def test_coefficients_are_all_that_is_sent_and_counted() -> None:
    states = played(3)
    sent = [down for _, down in states[:-1]]
    assert [payload_bytes(down, 2, "float32") for down in sent] == [8] + [8 + COEFFICIENTS] * 2
    assert [METHOD.floats(PLAN, i) for i in (1, 2)] == [(R * M, 0), (R * N, 2 * R * R)]
    counted = CatchUp({"w": torch.zeros(M, N)}, 3)
    for state, _ in states[1:]:
        counted.add(state.link)
    each = [4 * R * M + 8, 4 * R * N + COEFFICIENTS + 8, 4 * R * M + COEFFICIENTS + 8]
    assert int(counted.missing(torch.tensor([0]))[0]) == sum(each)
    counted.versions[:] = [0, 1, 2]
    assert counted.missing(torch.arange(3)).tolist() == [sum(each), sum(each[1:]), each[2]]
    assert counted.whole.tolist() == [[4 * M * N + 4 * R * M]]
    again = CatchUp({"w": torch.zeros(M, N)}, 3)
    again.restore(counted.state())
    assert again.whole.tolist() == counted.whole.tolist()


def test_what_a_link_did_not_train_is_drawn() -> None:
    """Rows of a trained factor that is zero, or has a lower rank, are left to the drawing."""
    state = METHOD.initial_state({"w": torch.zeros(M, N)}, PLAN, DRAW)
    sent = METHOD.open_round(state, 1, COHORT, DRAW)
    layout = sent.layout
    one = torch_normal(generator(0, "one"), M)[:, None] * torch.tensor([1.0, 2.0, 0.0])
    for B, kept in ((torch.zeros(M, R), False), (one, True)):
        rows = layout.pack({"w/B": B.double()}).expand(2, -1)
        got = Uplinks(COHORT.clients, COHORT.weights, layout, rows)
        after = METHOD.close_round(state, sent, got)
        found = computed(METHOD.open_round(after, 2, COHORT, DRAW))
        F, c = found.draw(), METHOD.length(R, M)
        torch.testing.assert_close(F.mT @ F, torch.tensor([c, c, 1.0]).double().square().diag())
        along = (one[:, 0].double() @ F[:, 0]).abs() / (one[:, 0].double().norm() * c)
        assert float(along) == pytest.approx(1.0) if kept else float(along) < 0.9


def test_a_factor_of_a_short_side_is_sent_since_that_is_no_more_bytes() -> None:
    plan = replace(PLAN, targets={"w": LayerView("linear", (4 * R, N))}, shapes={"w": (4 * R, N)})
    state = METHOD.initial_state({"w": torch.zeros(4 * R, N)}, plan, DRAW)
    sent = METHOD.open_round(state, 1, COHORT, DRAW)
    rows = torch_normal(generator(0, "replies", 1), 2, sent.layout.size).float()
    got = Uplinks(COHORT.clients, COHORT.weights, sent.layout, rows)
    after = METHOD.close_round(state, sent, got)
    assert METHOD.open_round(after, 2, COHORT, DRAW).factors()["w/B"].numbers is not None
    assert METHOD.floats(plan, 2) == (R * N, R * 4 * R)


def test_what_stands_beside_a_derived_factor_is_known() -> None:
    _, sent = played(2)[1]
    found = held_beside(sent.adapters["w"])
    assert found is not None
    assert found[0] == "A"
    assert torch.equal(found[1], computed(sent).draw())


def test_a_replica_without_the_last_link_says_so() -> None:
    _, sent = played(2)[1]
    got, _ = unpack_downlink(pack_downlink(sent, REQUEST, "float32"))
    with pytest.raises(WireError, match="the last link trained"):
        computed(got.with_past({"w": torch.zeros(M, N)})).draw()
    with pytest.raises(WireError, match="3 rows of 30 numbers"):
        computed(got.with_past({"w/past": torch.zeros(R, N)})).draw()


def told_of(shapes: list[Any]) -> list[tuple[str, str, Any]]:
    """Weight, label and shape of each."""
    return [(*name.split("/"), shape) for name, shape in shapes]


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ([], "w/factors/B/coefficients"),
        ([["w/B", [R, R]]], r"coefficients .* \(18,\)"),
        ([["w/B", [R * R * 2]]], r"coefficients of w/B .*no matrix"),
        ([["w/B", [R * R, 2]]], "columns than the 3"),
    ],
)
def test_damaged_coefficients_are_refused(shapes: list[Any], told: str) -> None:
    _, sent = played(2)[1]
    content = pack_downlink(sent, REQUEST, "float32")
    config = content["config"]
    assert isinstance(config, ConfigRecord)
    named = [[f"adapters/{w}/factors/{f}/coefficients", s] for w, f, s in told_of(shapes)]
    header = json.loads(str(config["header"])) | {"coefficients": named}
    config["header"] = json.dumps(header)
    with pytest.raises(WireError, match=told):
        unpack_downlink(content)


def test_what_waits_for_a_buffered_round_keeps_its_coefficients() -> None:
    _, sent = played(2)[1]
    flights = (PendingClient(1.5, 0, 2), PendingClient(2.5, 1, 2))
    rows = torch.zeros(2, sent.layout.size)
    stored = write_batches([ReplyBatch(2, sent, flights, rows, torch.ones(2))], (), "float32")
    waiting = read_batches(State({}, PLAN, moments=stored))
    (again,), lost = waiting.batches, waiting.lost
    assert (again.flights, lost) == (flights, ())
    assert torch.equal(computed(again.sent).coefficients, computed(sent).coefficients)


@pytest.mark.parametrize("rounds", [5, 6])
@pytest.mark.parametrize("wire", ["float32", "int8"])
def test_a_server_step_on_weights_leaves_the_basis_as_long_as_its_link(
    wire: str, rounds: int, tmp_path: Path
) -> None:
    """No term then says what stays beside a weight; it goes with the values, rounded once."""
    method = replace(METHOD, rank=2, merge_every=2)
    rule = {"server_optimizer": Momentum(lr=0.5)}
    world, local = make_world(width=3), LocalSettings(lr=0.01, steps=2, batch_size=2)
    more: dict[str, Any] = {"cohort": 2, "downlink": wire, "treatment": rule}
    done = run(world, method, local, rounds=rounds, folder=tmp_path, **more)
    states = [state_at(tmp_path, t).base for t in range(rounds + 1)]
    beside = [{n: t for n, t in base.items() if weight_of(n)} for base in states]
    assert beside[0] == beside[1] == {}
    for first in (2, 4):
        assert beside[first]
        assert_equal_trees(beside[first], beside[first + 1])
    assert_equal_trees(states[-1], done.strategy.state.base)
    assert any(f.coefficients is not None for f in opened(done).values())
    assert_updates_lead_on(tmp_path)
    half = tmp_path / "half"
    run(world, method, local, rounds=3, folder=half, **more)
    again = run(world, method, local, rounds=rounds, folder=half, resume=True, **more)
    assert_equal_trees(again.strategy.state.base, done.strategy.state.base)


def opened(done: Run) -> dict[str, Any]:
    """The factors of the round after the last."""
    strategy = done.strategy
    cohort = Cohort(torch.arange(2), torch.ones(2))
    round_ = strategy.done + 1
    sent = strategy.method.open_round(strategy.state, round_, cohort, strategy.draw)
    return dict(sent.factors())


def test_an_allocation_that_leaves_layers_out_for_a_while_is_refused() -> None:
    method = allocated(replace(METHOD, rank=2), HeteroLora(share=0.67, every=1))
    local = LocalSettings(lr=0.01, steps=2, batch_size=2)
    with pytest.raises(ConfigError, match=r"allocation\.every .*needs more than the weights"):
        run(make_world(width=3), method, local, rounds=6, cohort=2)


def test_the_scale_and_the_labels_are_the_adapters() -> None:
    adapter = played(2)[1][1].adapters["w"]
    assert isinstance(adapter, Adapter)
    assert [*adapter.factors] == ["B", "A"]
    assert adapter.scale == ALPHA / R
