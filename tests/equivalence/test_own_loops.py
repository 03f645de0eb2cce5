"""A training function of the user's that is plain SGD trains as the project's loop does."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import pytest
import torch
from vectorized_agreement import KINDS, method_of
from vectorized_cases import SEED, SIZES, Case, bert, cnn, gpt2, mlp

from fedraclora.aggregation.robust import Median
from fedraclora.aggregation.server_optimizers import SERVER_OPTIMIZERS
from fedraclora.attacks import AttackedOwnTrainer, AttackedTrainer, SignFlip
from fedraclora.client import Round, Trained
from fedraclora.clients.engines import in_process
from fedraclora.data.task import Task, forward, loss_function
from fedraclora.devices.distributions import Choice
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel, Mechanism
from fedraclora.privacy.secagg import SecAgg, SecAggTerms
from fedraclora.privacy.secret import KEY_BYTES, Secret
from fedraclora.protocol.method import Draw, first_instructions
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.steps import round_steps
from fedraclora.strategies.steps.private import PrivateRounds
from fedraclora.strategies.wiring import RoundsBuilder
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.own.trainer import OwnTrainer
from fedraclora.tree import Tree, weights_of

LOCAL = LocalSettings(lr=0.1, steps=2, batch_size=0, shuffle=False)
OWN = LocalSettings(lr=0.5, train="mine:train")


def descend(round_: Round, model: torch.nn.Module, task: Task) -> Trained:
    """Two steps of SGD on all samples, as `LOCAL` takes them."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LOCAL.lr)
    found = []
    for _ in range(2):
        optimizer.zero_grad()
        output = forward(model, round_.data.inputs)
        losses, counts = loss_function(task.loss)(output, round_.data.target)
        loss = losses.sum() / counts.sum()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return round_.read(model, samples=len(round_.data), steps=2, loss=sum(found) / 2)


def plain(round_: Round, task: Task) -> Trained:
    return descend(round_, round_.install(copy.deepcopy(task.model).eval()), task)


def with_peft(round_: Round, task: Task, targets: list[str], saved: list[str]) -> Trained:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=3, target_modules=targets, modules_to_save=saved, fan_in_fan_out="c_attn" in targets[0]
    )
    model: Any = get_peft_model(copy.deepcopy(task.model), config, autocast_adapter_dtype=False)
    model = round_.install(model.double().eval())
    model.set_adapter("default")  # which thaws all of an adapter, but for what stays frozen
    return descend(round_, model, task)


def run(case: Case, method: Any, train: Any = None, **more: Any) -> tuple[Tree, Any]:
    """Three rounds of four of six clients; give the effective weights, and the run."""
    given: dict[str, Any] = {"seed": SEED, "device": torch.device("cpu")}
    kind: Any = CohortTrainer
    if attack := more.pop("attack", None):
        given["attack"], kind = attack, AttackedTrainer
    if train is not None:
        given |= {"function": partial(train, task=case.task), "name": "mine:train"}
        kind = AttackedOwnTrainer if attack else OwnTrainer
    trainer = kind(case.task, case.plan(), LOCAL if train is None else OWN, **given)
    chosen, system = more.pop("chosen", {}), more.pop("system", None)
    secure = chosen.get("secure")
    weights = str(more.get("weights", "samples"))
    terms = None if secure is None else SecAggTerms(secure, weights)
    steps = round_steps({"local": trainer.local, **chosen})
    for step in steps:
        if isinstance(step, PrivateRounds):
            step.secret = Secret(bytes(KEY_BYTES))
    sizes = {"rounds": 3, "clients": len(SIZES), "cohort": 4, "chunk": 1, "seed": SEED}
    loop = LoopConfig(**sizes, dtype="float64", **more)
    parts = {"terms": terms, "steps": steps, "system": system}
    wired = RoundsBuilder(method, trainer, loop, in_process(), **parts).ready()
    try:
        wired.start()
        return wired.weights(), wired
    finally:
        wired.close()


def assert_equal(one: Tree, other: Tree) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=0, atol=1e-10)


@pytest.mark.short(when=lambda name: name in {"fed_rac_lora", "fedavg", "fedsa_lora", "fed_sb"})
@pytest.mark.parametrize("name", KINDS)
def test_every_plain_method_trains_as_by_the_projects_loop(name: str) -> None:
    case = Case(mlp(), bias="full")
    method = method_of(name)
    base, draw = weights_of(case.task.model), Draw(SEED)
    state = method.initial_state(base, case.plan(), draw)
    if not first_instructions(method, state, draw, 4).program.plain:
        with pytest.raises(ConfigError, match=r"local=own.*client program"):
            run(case, method, plain)
        return
    own, wired = run(case, method, plain)
    native, known = run(case, method)
    assert_equal(own, native)
    rows = wired.strategy.recorder.ledger.rows, known.strategy.recorder.ledger.rows
    for one, other in [*zip(*rows, strict=True)][1:]:
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-10)
        same = ("uplink_total", "downlink_total", "local_steps", "cohort")
        assert [one[k] for k in same] == [other[k] for k in same]


CHOSEN: dict[str, dict[str, Any]] = {
    "int8": {"uplink": "int8"},
    "int4": {"uplink": "int4"},
    "secagg": {"chosen": {"secure": SecAgg()}, "weights": "uniform"},
    "private": {
        "chosen": {"privacy": ClientLevel(clip=0.1)},
        "weights": "uniform",
    },
    "median": {"chosen": {"aggregator": Median()}},
    "adam": {"chosen": {"server_optimizer": SERVER_OPTIMIZERS["adam"]()}},
    "budgets": {"system": SystemConfig(rank_budget=Choice([0.4, 0.7, 1.0]))},
    "attack": {"attack": SignFlip(share=0.34)},
}


@pytest.mark.parametrize("name", CHOSEN)
def test_what_is_chosen_besides_is_as_by_the_projects_loop(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mechanism, "noisy_sum", lambda self, total, *rest: total)
    case, method = Case(mlp()), method_of("fed_rac_lora")
    assert_equal(run(case, method, plain, **CHOSEN[name])[0], run(case, method, **CHOSEN[name])[0])


@pytest.mark.slow
@pytest.mark.short(when=lambda name: name in {"cnn", "gpt2"})
@pytest.mark.parametrize("name", ["cnn", "gpt2", "bert", "embeddings"])
def test_every_kind_of_layer_trains_as_by_the_projects_loop(name: str) -> None:
    case = LAYERS[name]()
    for method in (method_of("fed_rac_lora"), method_of("fedavg_lora"), method_of("fedavg")):
        assert_equal(run(case, method, plain)[0], run(case, method)[0])


LAYERS = {
    "cnn": lambda: Case(cnn(), targets="all"),
    "gpt2": lambda: Case(gpt2(), head="full"),
    "bert": lambda: Case(bert(), head="full", dense="*LayerNorm"),
    "embeddings": lambda: Case(bert(), targets=["query", "word_embeddings"], head="full"),
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
@pytest.mark.short(when=lambda train: train == "B")
@pytest.mark.parametrize("train", ["B", "A"])
@pytest.mark.parametrize("name", ["cnn", "gpt2", "embeddings"])
def test_layers_of_peft_train_as_by_the_projects_loop(name: str, train: str) -> None:
    pytest.importorskip("peft")
    case = LAYERS[name]()
    targets = [w.removesuffix(".weight") for w in case.plan().targets]
    saved = [*case.task.head] if case.head == "full" else []
    layers = partial(with_peft, targets=targets, saved=saved)
    for method in (method_of("fed_rac_lora", train=train), method_of("fedavg_lora")):
        assert_equal(run(case, method, layers)[0], run(case, method)[0])
