"""What clients measure are the weights that the server has, by whatever message they come."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import RecordDict
from worlds import (
    World,
    array_bytes,
    assert_close_trees,
    defaults_short,
    every_variant,
    make_method,
    put_on_the_wire,
    run,
    trains_parts,
)

from fedraclora.config.settings import EvaluateConfig
from fedraclora.data.task import HeldOutSamples
from fedraclora.engines.asks import AskWriter, read_ask
from fedraclora.engines.records import write_answer
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.strategies.server.measuring import EvaluationPlan
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.materialize import current_weights, for_measuring
from fedraclora.wire.exchange import DTYPES, Ask, TrainRequest

Variant = tuple[str, dict[str, Any]]
LOCAL = LocalSettings(lr=0.05, steps=2, batch_size=2)


@every_variant
@defaults_short
def test_the_start_of_a_round_has_the_weights_of_the_server(variant: Variant, world: World) -> None:
    method = make_method(variant[0], **variant[1])
    if trains_parts(method):
        pytest.skip("clients have other products than the server")
    ran = run(world, method, LOCAL, rounds=2)
    state, draw = ran.strategy.state, Draw(1)
    clients = torch.arange(world.clients)
    sent = method.open_round(state, 3, Cohort(clients, torch.ones(world.clients)), draw)
    request = TrainRequest(3, ran.strategy.catch_up.version, 1.0, clients, measure="before")
    ask = Ask(request, for_measuring(sent).to(DTYPES["float64"]), apart=True)
    heard = read_ask(AskWriter().write(ask)).own.with_past(state.base)
    names = dict(world.task.model.named_parameters())
    for own in [{}, *ran.worker.store.latest(1).values()]:
        slots = sent.trained()
        stays = {n: t for n, t in own.items() if n in slots and not slots[n].upload}
        found = current_weights(state.base, heard.of_one(0), world.plan, stays)
        wanted = method.weights(state, draw, stays) | {n: stays[n] for n in stays if n in names}
        assert_close_trees({n: found[n] for n in names}, {n: wanted[n] for n in names})


@pytest.mark.parametrize("name", ["fedavg_lora"])
def test_a_message_to_measure_is_as_long_as_is_counted(
    name: str, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = replace(world, task=replace(world.task, held=HeldOutSamples(world.task.train, 2)))
    asked = EvaluationPlan.of(EvaluateConfig(clients="all", personal=True), held.task)
    ran = run(held, make_method(name), LOCAL, rounds=2, chunk=1, measuring=asked)
    pairs = [(a, b) for a, b in ran.worker.seen if a.request.measure and a.request.round_ == 3]
    assert len(pairs) == world.clients
    told = ran.rows[-1]["clients"]
    assert told["n"] == world.clients
    came = (write_answer(answer)["arrays"] for _, answer in pairs)
    assert told["uplink_bytes"] == sum(array_bytes(RecordDict({"arrays": sums})) for sums in came)
    sent = sum(array_bytes(AskWriter().write(ask)) for ask, _ in pairs)
    seeds = sum(8 for a, _ in pairs for f in a.own.factors().values() if f.drawing is not None)
    fetched = ran.strategy.catch_up
    assert told["downlink_bytes"] >= sent + seeds
    assert (fetched.versions == fetched.version).all()
    put_on_the_wire(monkeypatch)
    heard = run(held, make_method(name), LOCAL, rounds=2, chunk=1, measuring=asked)
    assert heard.strategy.recorder.ledger.digest() == ran.strategy.recorder.ledger.digest()
