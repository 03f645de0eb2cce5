"""What cannot be folded into one batch is trained otherwise, or refused by name."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from typing_extensions import override
from vectorized_agreement import KINDS, LOCAL, base_of, foldable, method_of, run, trainer_of
from vectorized_cases import SEED, SIZES, Case, classes, normal, reader, scaled, task_of
from vectorized_settings import ALSO, WIDELY

from fedraclora.errors import ModelError
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Cohort, Draw, RoundInstructions
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fedavg import FedAvg
from fedraclora.strategies.shared.walking import DirectionMethod
from fedraclora.training.extras.settings import LocalSettings

# Methods whose factors are of each kind: a layer does not see what else they do.
of_each_kind = pytest.mark.short(when=lambda name: name in WIDELY | ALSO)


@pytest.mark.parametrize("local", [LOCAL, replace(LOCAL, prox=0.3, momentum=0.9, clip=0.5)])
def test_tied_weights_fall_back_to_vmap(local: LocalSettings) -> None:
    case = Case(reader(tied=True), targets="mix", head="frozen", dense="norm")
    method = method_of("fedavg")
    plan = case.plan()
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    cohort = Cohort(torch.arange(2), torch.ones(2))
    assert not foldable(case, method.open_round(state, 1, cohort, Draw(SEED)))
    run(case, method, local, rounds=2, check={2})


@of_each_kind
@pytest.mark.parametrize(
    "name", [n for n, k in METHODS.items() if not issubclass(k, FedAvg | DirectionMethod)]
)
def test_tied_weights_that_stay_frozen_are_folded(name: str) -> None:
    case = Case(reader(tied=True), targets="mix", head="frozen", dense="norm")
    method = method_of(name)
    plan = case.plan()
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    cohort = Cohort(torch.arange(2), torch.ones(2))
    assert foldable(case, method.open_round(state, 1, cohort, Draw(SEED)))
    run(case, method, LOCAL, rounds=2, check={2})


def test_a_head_that_shares_the_table_of_words_is_not_trained_apart() -> None:
    with pytest.raises(ModelError, match=r"head\.weight .*words\.weight.*head=frozen"):
        Case(reader(tied=True), targets="mix").plan()


@of_each_kind
@pytest.mark.parametrize("name", METHODS)
def test_bare_parameters_fall_back_to_vmap(name: str) -> None:
    case, method = Case(scaled(), targets="inner", dense="gain,shift"), method_of(name)
    plan = case.plan()
    state = method.initial_state(base_of(case.task), plan, Draw(SEED))
    cohort = Cohort(torch.arange(2), torch.ones(2))
    assert not foldable(case, method.open_round(state, 1, cohort, Draw(SEED)))
    local = replace(LOCAL, precondition=name in {"fed_rac_lora", "ffa_lora", "rolora"})
    run(case, method, local, rounds=2, check={2}, name="scaled")


class Choosy(nn.Module):
    """Looks at its data to decide what to do, which torch.func.vmap cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(6))
        self.inner = nn.Linear(6, 4)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x * self.gain
        x = nn.functional.dropout(x, 0.5, self.training)  # which no seed would fix: it stays off
        mixed: torch.Tensor = self.inner(x if bool((x * x).sum() >= 0) else -x)
        return mixed


@pytest.mark.parametrize("dp", [None, SampleNoise(0.2, 0.5)])
def test_what_vmap_cannot_run_trains_one_client_after_another(
    dp: SampleNoise | None, caplog: pytest.LogCaptureFixture
) -> None:
    task = task_of(Choosy().train(), {"x": normal(sum(SIZES), 6)}, classes(4))
    case = Case(task, targets="inner", dense="gain")
    run(case, method_of("fedavg_lora"), replace(LOCAL, dp=dp), rounds=1, check={1})
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1  # of one trainer, once
    assert said[0].startswith("Choosy cannot train several clients as one batch")


def test_an_error_of_the_model_is_not_taken_for_one_of_vmap() -> None:
    case = Case(scaled(), targets="inner", dense="gain")
    narrow = replace(case.task.train.samples, inputs={"x": normal(sum(SIZES), 5)})
    case = replace(case, task=replace(case.task, train=replace(case.task.train, samples=narrow)))
    downlink = RoundInstructions(dense={"gain": to_train((6,))})
    trainer = trainer_of(case.task, case.plan(), LOCAL)
    with pytest.raises(RuntimeError, match="must match the size"):
        trainer.train(base_of(case.task), downlink, torch.arange(2), round_=1, rate_scale=1.0)


def test_batch_norm_is_refused_by_the_layer_s_name() -> None:
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(7, 6))
    model.add_module("middle", nn.BatchNorm1d(6))
    model.add_module("fc2", nn.Linear(6, 3))
    task = task_of(model, {"x": normal(sum(SIZES), 7)}, classes(3), head=("fc2",))
    plan = Case(task).plan()
    with pytest.raises(ModelError, match=r"'middle' \(BatchNorm1d\)"):
        trainer_of(task, plan, LOCAL)


@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg"])
def test_batch_norm_with_fixed_statistics_is_served(name: str) -> None:
    norm = nn.BatchNorm1d(6).eval()
    norm.running_mean, norm.running_var = normal(6, key="mean"), normal(6, key="var").square()
    model = nn.Sequential(nn.Linear(7, 6), norm, nn.Tanh(), nn.Linear(6, 3))
    task = task_of(model, {"x": normal(sum(SIZES), 7)}, classes(3), head=("3",))
    run(Case(task), method_of(name), LOCAL, rounds=2, check={2})


def test_batch_norm_without_statistics_of_its_own_is_refused() -> None:
    # In evaluation mode too, it has nothing but the batch to normalize by.
    layer = nn.BatchNorm1d(6, track_running_stats=False).eval()
    model = nn.Sequential(nn.Linear(7, 6), layer, nn.Tanh(), nn.Linear(6, 3))
    task = task_of(model, {"x": normal(sum(SIZES), 7)}, classes(3), head=("3",))
    with pytest.raises(ModelError, match="BatchNorm1d"):
        trainer_of(task, Case(task).plan(), LOCAL)


class TimeFirst(nn.Module):
    """Mixes along [time, samples, width]: the first axis is not that of the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 4)
        self.head = nn.Linear(4, 3)

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mixed = torch.tanh(self.mix(x.transpose(0, 1)))
        read: torch.Tensor = self.head(mixed.mean(dim=0))
        return read


@of_each_kind
@pytest.mark.parametrize("name", KINDS)
def test_a_layer_that_does_not_see_samples_first_is_right_or_refused(name: str) -> None:
    task = task_of(TimeFirst(), {"x": normal(sum(SIZES), 6, 5)}, classes(3), head=("head",))
    refused = ""
    try:
        run(Case(task), method_of(name), LOCAL, rounds=1, check={1})
    except ModelError as error:
        refused = str(error)
    assert not refused or "mix" in refused


@of_each_kind
@pytest.mark.parametrize("name", METHODS)
def test_layers_of_other_kinds_fall_back_to_vmap(name: str) -> None:
    model = nn.Sequential(
        nn.Conv1d(3, 4, 2), nn.GroupNorm(2, 4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3)
    )
    task = task_of(model, {"x": normal(sum(SIZES), 3, 5)}, classes(3), head=("4",))
    case = Case(task, dense="0,1")
    run(case, method_of(name), LOCAL, rounds=2, check={2}, name="other kinds")
