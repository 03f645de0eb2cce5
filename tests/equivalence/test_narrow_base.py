"""Clients on a quantized base train as one batch what they train alone, and on it dequantized."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from causal_cases import CONFIGS, LLAMA, causal_case
from vectorized_agreement import LOCAL, base_of, method_of, run, trainer_of
from vectorized_cases import SEED, Case

from fedraclora.models.built import dequantize
from fedraclora.narrow_weight import QuantisedWeight, base_name
from fedraclora.protocol.method import Cohort, Draw

WIDE = {
    "llama": {**LLAMA, "hidden_size": 32, "intermediate_size": 64},
    "gpt2": {**CONFIGS["gpt2"], "n_embd": 32},
}


@pytest.fixture(params=["int8", "int4"])
def base(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=WIDE)
def case(request: pytest.FixtureRequest, base: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    monkeypatch.setitem(CONFIGS, request.param, WIDE[request.param])
    found = causal_case(request.param, base=base)
    held = base_of(found.task)
    narrow = {n for n, w in held.items() if isinstance(w, QuantisedWeight)}
    assert {base_name(held[n]) for n in narrow} == {base}
    assert set(found.plan().targets) < narrow
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ffa_lora", "fedavg_lora"])
def test_a_batch_of_clients_comes_to_what_each_comes_to_alone(
    case: Case, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(case, method_of(name), LOCAL, rounds=2, check={1, 2})
    assert not caplog.records  # not one client after another


def test_training_is_that_on_the_dequantized_base(case: Case) -> None:
    """Exactly: the same products of the same numbers."""
    method, clients = method_of("fedavg_lora"), torch.tensor([0, 2, 3])
    wide = replace(case.task, model=dequantize(copy.deepcopy(case.task.model)))
    found = []
    for task in (case.task, wide):
        base = base_of(task)
        state = method.initial_state(base, case.plan(), Draw(SEED))
        sent = method.open_round(state, 1, Cohort(clients, torch.ones(3)), Draw(SEED))
        trainer = trainer_of(task, case.plan(), LOCAL)
        found.append(trainer.train(base, sent, clients, round_=1, rate_scale=1.0).trained)
    assert all(float(t.abs().max()) > 1e-4 for t in found[0].values())
    for name, value in found[0].items():
        assert torch.equal(value, found[1][name]), name
