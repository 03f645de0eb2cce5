"""One federated round comes to what a plain loop over clients on PEFT itself comes to."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from causal_cases import CONFIGS, TARGETS, causal_case
from vectorized_agreement import ATOL, base_of, method_of, trainer_of
from vectorized_cases import SEED, SIZES

from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.task import Task
from fedraclora.models.built import dequantize
from fedraclora.narrow_weight import dense
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Layout, Tree
from tests.reference.client import batches, own_tensors

RANK, ALPHA = 3, 2.0
LOCALS = {
    "sgd": LocalConfig(lr=0.2, batch_size=4, epochs=2),
    "adamw": LocalConfig(optimizer="adamw", lr=0.03, batch_size=3, steps=5, weight_decay=0.01),
}


def adapted(task: Task, kind: str, starts: Tree) -> Any:
    """PEFT's model, whose adapters begin as ours do."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear" if TARGETS[kind] == "all-linear" else TARGETS[kind].split(","),
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(dequantize(copy.deepcopy(task.model)), config).double()
    put(model, starts)
    return model


def put(model: Any, values: Tree) -> None:
    with torch.no_grad():
        for name, parameter in adapters(model).items():
            parameter.copy_(values[name])


def adapters(model: Any) -> dict[str, torch.nn.Parameter]:
    """Parameters of PEFT by the names that we have for them."""
    found = {}
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            layer, _, factor = name.removeprefix("base_model.model.").partition(".lora_")
            found[f"{layer}.weight/{factor[0]}"] = parameter
    return found


def train(model: Any, task: Task, client: int, local: LocalConfig, trained: str) -> Tree:
    """The plain loop: batches in our order, the mean loss over the batch's answer tokens."""
    own = adapters(model)
    for name, parameter in own.items():
        parameter.requires_grad_(name.rpartition("/")[2] in trained)
    free = [p for p in own.values() if p.requires_grad]
    if local.optimizer == "sgd":
        optimizer: torch.optim.Optimizer = torch.optim.SGD(free, lr=local.lr)
    else:
        optimizer = torch.optim.AdamW(free, lr=local.lr, weight_decay=local.weight_decay)
    samples = task.train.client(client)  # type: ignore[attr-defined]
    for rows in batches(len(samples), client, local, SEED, 1):
        batch = samples.take(rows)
        output = model(**batch.inputs, labels=batch.target)
        loss = F.cross_entropy(
            output.logits[:, :-1].flatten(0, 1),
            batch.target[:, 1:].flatten(),
            ignore_index=IGNORED_TOKEN,
        )
        # What transformers' Trainer minimizes; it forms the loss in float32.
        assert float(loss.detach()) == pytest.approx(float(output.loss.detach()), rel=1e-5)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in own.items()}


@pytest.mark.filterwarnings("ignore:.*is deprecated and will be removed in v6:FutureWarning")
@pytest.mark.short(
    when=lambda kind, trained, optimizer: (
        (trained == "AB") == (optimizer == "adamw") or kind == "llama"
    )
)
@pytest.mark.parametrize("optimizer", LOCALS)
@pytest.mark.parametrize(("name", "trained"), [("fedavg_lora", "AB"), ("ffa_lora", "B")])
@pytest.mark.parametrize(
    ("kind", "held"), [*((k, "float32") for k in CONFIGS), ("llama", "int8"), ("gpt2", "int8")]
)
def test_a_round_is_that_of_a_loop_on_peft(
    kind: str, held: str, name: str, trained: str, optimizer: str
) -> None:
    """Of a quantized base: on the same weights, dequantized."""
    case, local = causal_case(kind, base=held), LOCALS[optimizer]
    task, plan, method, draw = case.task, case.plan(), method_of(name), Draw(SEED)
    base, clients = base_of(task), torch.tensor([0, 2, 3, 5])
    sizes = torch.tensor([SIZES[client] for client in clients], dtype=torch.float64)
    state = method.initial_state(base, plan, draw)
    sent = method.open_round(state, 1, Cohort(clients, sizes), draw)
    values, frozen = own_tensors(sent, base, 0)

    trainer = trainer_of(task, plan, local)
    ours = trainer.train(state.base, sent, clients, round_=1, rate_scale=1.0).trained
    layout = Layout(tuple((n, s.shape) for n, s in sent.uploaded().items()))
    rows = layout.pack({n: ours[n] for n, _ in layout.shapes}, lead=1)
    state = method.close_round(state, sent, Uplinks(clients, sizes, layout, rows))
    weights = dense(method.weights(state, draw))

    plain = adapted(task, kind, values | frozen)
    assert set(adapters(plain)) == {*values, *frozen}
    theirs = []
    for place, client in enumerate(clients.tolist()):
        put(plain, values | frozen)
        theirs.append(train(plain, task, client, local, trained))
        for factor, tensor in theirs[-1].items():
            if factor in ours:
                gap = float((ours[factor][place] - tensor).abs().max())
                assert gap <= ATOL, f"{factor} of client {client} is off by {gap}"
    share = sizes / sizes.sum()
    put(
        plain, {n: sum(p * one[n] for p, one in zip(share, theirs, strict=True)) for n in theirs[0]}
    )
    merged = dict(plain.merge_and_unload().named_parameters())
    assert merged.keys() == weights.keys()
    moved = 0.0
    for name_, weight in weights.items():
        torch.testing.assert_close(weight, merged[name_].detach(), rtol=0, atol=ATOL)
        moved = max(moved, float((weight - base[name_]).abs().max()))
    assert moved > 1e-3
