"""A batch of clients comes to what each comes to alone: factors that no method sends yet."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from vectorized_agreement import LOCAL, assert_agrees, base_of, foldable
from vectorized_cases import SIZES, Case, mlp, normal, reader, scaled
from vectorized_settings import A_FEW, FORMS, LAYERS, LIKE_LINEAR, adapters_of, trained_in

from fedraclora.compatibility import Features
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import RoundInstructions


@pytest.mark.short(when=lambda kind, forms: kind not in LIKE_LINEAR or forms in A_FEW)
@pytest.mark.parametrize("forms", FORMS, ids="-".join)
@pytest.mark.parametrize("kind", LAYERS)
def test_factors_of_every_form(kind: str, forms: tuple[str, ...]) -> None:
    make, names = LAYERS[kind]
    case = Case(make(), targets=",".join(n.removesuffix(".weight") for n in names), head="lora")
    plan = case.plan()
    downlink = RoundInstructions(adapters_of(forms, names, plan.targets))
    clients = torch.arange(len(SIZES))
    assert_agrees(case, plan, LOCAL, base_of(case.task), downlink, clients)


@pytest.mark.parametrize("forms", [f for f in FORMS if len(f) == 2], ids="-".join)
@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_prox_and_preconditioner_with_factors_of_every_form(
    kind: str, forms: tuple[str, ...]
) -> None:
    make, names = LAYERS[kind]
    case = Case(make(), targets=",".join(n.removesuffix(".weight") for n in names), head="full")
    plan = case.plan()
    dense = {n: to_train(plan.shapes[n], main=False) for n in plan.dense}
    downlink = RoundInstructions(adapters_of(forms, names, plan.targets), dense)
    local = replace(LOCAL, lr=0.02, prox=0.4, precondition=trained_in(forms) == 1, momentum=0.5)
    assert_agrees(case, plan, local, base_of(case.task), downlink, torch.arange(len(SIZES)))


def test_dense_tensors_may_start_at_each_client() -> None:
    case = Case(reader(), dense="norm")
    plan, K = case.plan(), len(SIZES)
    dense = {
        name: to_train(shape, 0.4 * normal(K, *shape, key=name), main=False)
        for name, shape in plan.shapes.items()
    }
    base, local = base_of(case.task), replace(LOCAL, prox=0.4)
    assert_agrees(case, plan, local, base, RoundInstructions(dense=dense), torch.arange(K))


@pytest.mark.parametrize("setting", [{"prox": 0.1}, {"precondition": True}])
def test_what_is_defined_for_two_factors_refuses_three(setting: dict[str, Any]) -> None:
    plan = Case(mlp(), targets="fc1").plan()
    sent = RoundInstructions(adapters_of(("own", "zero", "own"), ("fc1.weight",), plan.targets))
    local = replace(LOCAL, **setting)
    (key,) = setting
    found = [*Features([local, *local.added, sent], sent).conflicts()]
    assert any(f"local.{key}" in line and "three factors" in line for line in found)


@pytest.mark.parametrize(
    "forms", [("own", "starts"), ("starts", "sketched"), ("own", "zero", "own")]
)
def test_factors_of_each_client_under_vmap(forms: tuple[str, ...]) -> None:
    case = Case(scaled(), targets="inner", dense="gain")
    plan = case.plan()
    dense = {"gain": to_train((6,), 1 + 0.1 * normal(len(SIZES), 6, key="gain"))}
    downlink = RoundInstructions(adapters_of(forms, ("inner.weight",), plan.targets), dense)
    assert not foldable(case, downlink)
    assert_agrees(case, plan, LOCAL, base_of(case.task), downlink, torch.arange(len(SIZES)))
