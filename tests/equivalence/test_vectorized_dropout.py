"""A batch of clients comes to what each comes to alone: with the same masks of dropout."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from vectorized_agreement import KINDS, LOCAL, base_of, method_of, run, trainer_of
from vectorized_cases import SEED, SIZES, Case, bert, classes, mlp, normal, scaled, task_of
from vectorized_settings import ALSO, WIDELY

from fedraclora.errors import ModelError
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Cohort, Draw, RoundInstructions
from fedraclora.training.cohort_layers import CohortContext, CohortDropout


@pytest.mark.short(
    when=lambda name, model: (
        name in WIDELY - {"fedavg"} or (name in WIDELY | ALSO and model == "mlp")
    )
)
@pytest.mark.parametrize("model", ["mlp", "bert"])
@pytest.mark.parametrize("name", KINDS)
def test_dropout_has_the_same_masks(name: str, model: str) -> None:
    task = mlp(dropout=0.4) if model == "mlp" else bert(dropout=0.3)
    case = Case(task, targets="all-linear" if model == "mlp" else "query,value")
    known = f"{model} with dropout"
    run(case, method_of(name), LOCAL, rounds=2, check={2}, name=known)


def test_dropout_is_on() -> None:
    plain, dropped = Case(mlp()), Case(mlp(dropout=0.4))
    method, plan, clients = method_of("fed_rac_lora"), plain.plan(), torch.arange(len(SIZES))
    state = method.initial_state(base_of(plain.task), plan, Draw(SEED))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    with_, without = (
        trainer_of(c.task, plan, LOCAL).train(state.base, sent, clients, round_=1, rate_scale=1.0)
        for c in (dropped, plain)
    )
    assert not torch.allclose(with_.losses, without.losses, atol=1e-3)


def test_masks_are_drawn_anew_for_each_client_step_round_layer_and_seed() -> None:
    inner, ones = nn.Dropout(0.25), torch.ones(2 * 50, 40)
    places: list[dict[str, int]] = [{}, {"step": 1}, {"round_": 1}, {"seed": 1}]
    masks = []
    for place in places:
        context = CohortContext(active=2, rows=100, clients=torch.tensor([3, 4]), **place)  # type: ignore[arg-type]
        masks += [CohortDropout(inner, layer, context)(ones) for layer in ("a", "b")]
    apart = [half for mask in masks for half in mask.chunk(2)]
    for i, mask in enumerate(apart):
        assert set(mask.unique().tolist()) == {0.0, float(torch.tensor(1 / 0.75))}
        assert abs(float(mask.mean()) - 1) < 0.05
        assert not any(torch.equal(mask, other) for other in apart[:i])


def test_dropout_under_vmap_is_refused_by_the_layer_s_name() -> None:
    task = scaled()
    model = nn.Sequential()
    model.add_module("body", task.model)
    model.add_module("hole", nn.Dropout(0.5))
    case = Case(replace(task, model=model), targets="body.inner", dense="body.gain")
    plan = case.plan()
    downlink = RoundInstructions(dense={"body.gain": to_train((6,))})
    trainer = trainer_of(case.task, plan, LOCAL)
    with pytest.raises(ModelError, match="hole"):
        trainer.train(base_of(case.task), downlink, torch.arange(2), round_=1, rate_scale=1.0)


@pytest.mark.parametrize("layer", [nn.Dropout2d, nn.AlphaDropout])
def test_dropout_of_another_kind_is_on_or_refused(layer: type[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, 3), nn.Tanh(), layer(0.9), nn.Flatten())
    model.add_module("fc", nn.Linear(3 * 36, 3))
    inputs = {"x": normal(sum(SIZES), 2, 8, 8)}
    case = Case(task_of(model, inputs, classes(3), head=("fc",)), targets="all")
    method, plan, clients = method_of("fed_rac_lora"), case.plan(), torch.arange(len(SIZES))
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(len(SIZES))), Draw(SEED))
    refused, losses = "", []
    try:
        for training in (True, False):
            trainer = trainer_of(replace(case.task, model=model.train(training)), plan, LOCAL)
            result = trainer.train(state.base, sent, clients, round_=1, rate_scale=1.0)
            losses.append(result.losses)
    except ModelError as error:
        refused = str(error)
    assert layer.__name__ in refused or not torch.allclose(losses[0], losses[1])


class Attentive(nn.Module):
    """A layer that drops values inside, as a function of its own."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, dropout=dropout, batch_first=True)
        self.wide = nn.Linear(4, 5)
        self.fc = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc(torch.tanh(self.wide(self.attention(x, x, x)[0].mean(dim=1))))


def test_dropout_inside_a_layer_is_refused() -> None:
    """It would be off without a word: no mask of it can be keyed by client and step."""
    for dropout in (0.0, 0.5):
        model = Attentive(dropout)
        task = task_of(model, {"x": normal(sum(SIZES), 6, 4)}, classes(3), head=("fc",))
        plan = Case(task, targets="wide").plan()
        if not dropout:
            trainer_of(task, plan, LOCAL)
            continue
        with pytest.raises(ModelError, match=r"layer 'attention' .*set its dropout to 0"):
            trainer_of(task, plan, LOCAL)
