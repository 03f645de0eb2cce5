"""A batch of clients comes to what each comes to alone: causal language models with adapters."""

from __future__ import annotations

import pytest
import torch
from causal_cases import CONFIGS, causal_case, causal_task
from vectorized_agreement import LOCAL, base_of, method_of, run
from vectorized_cases import Case

from fedraclora.data import token_losses
from fedraclora.data.samples import Samples
from fedraclora.data.task import next_token
from fedraclora.errors import ModelError
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.program import CohortProgram

ADAMW = LocalSettings(optimizer="adamw", lr=0.05, batch_size=3, epochs=2)
METHODS = ("fed_rac_lora", "ffa_lora", "fedavg_lora", "fedsa_lora", "fed_sb")


@pytest.fixture
def labels_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs at labelled tokens alone, of which three pieces at least are formed."""
    monkeypatch.setattr(token_losses, "MANY_OUTPUTS", 1)
    monkeypatch.setattr(token_losses, "PIECE", 10 * 8 * 23)


@pytest.mark.usefixtures("labels_alone")
# Each method on one kind of model, and both factors on each kind.
@pytest.mark.short(when=lambda kind, name: name == "fedavg_lora" or kind == "llama")
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_causal_models_train_as_one_batch(
    kind: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    run(causal_case(kind), method_of(name), LOCAL, rounds=2, check={1, 2})
    assert not caplog.records  # not one client after another


@pytest.mark.parametrize("kind", CONFIGS)
def test_all_outputs_give_the_same(kind: str) -> None:
    run(causal_case(kind), method_of("fedavg_lora"), ADAMW, rounds=1, check={1})


@pytest.mark.usefixtures("labels_alone")
@pytest.mark.parametrize("kind", CONFIGS)
def test_blocks_computed_again_give_the_same(kind: str) -> None:
    case = causal_case(kind, checkpointing=True)
    run(case, method_of("fedavg_lora"), ADAMW, rounds=1, check={1})


def test_a_checkpointed_model_keeps_its_blocks_inputs_alone() -> None:
    """What the backward pass of a step keeps is counted, with and without checkpointing."""
    kept = {}
    for checkpointing in (False, True):
        case = causal_case("llama", checkpointing=checkpointing)
        sent = method_of("fedavg_lora").open_round(
            method_of("fedavg_lora").initial_state(base_of(case.task), case.plan(), Draw(1)),
            1,
            Cohort(torch.arange(1), torch.ones(1)),
            Draw(1),
        )
        program = CohortProgram.build(case.task, sent, torch.device("cpu"))
        assert program.folded
        sizes: list[int] = []
        inputs = case.task.test.inputs
        program.context.rows, program.context.active = len(case.task.test), 1
        program.context.factors = {
            name: [torch.ones(1, *f.shape, dtype=torch.float64, requires_grad=True)
                   for f in adapter.factors.values()]
            for name, adapter in sent.adapters.items()
        }  # fmt: skip
        program.context.scales = dict.fromkeys(sent.adapters, 1.0)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, sizes=sizes: sizes.append(t.nbytes) or t, lambda t: t
        ):
            program.copied(**inputs)
        kept[checkpointing] = sum(sizes)
    assert kept[True] < kept[False] / 3


def test_checkpointing_needs_layers_that_fold() -> None:
    """Under vmap a block would be computed again with the base weights, and be wrong in silence."""
    task = causal_task("llama", checkpointing=True)
    case = Case(task, targets="q_proj", head="frozen", bias="frozen", dense="embed_tokens")
    with pytest.raises(ModelError, match=r"model.checkpointing is true"):
        run(case, method_of("fedavg_lora"), LOCAL, rounds=1, check={1})


@pytest.mark.usefixtures("labels_alone")
@pytest.mark.parametrize("kind", CONFIGS)
def test_losses_at_labels_are_those_of_all_outputs(kind: str) -> None:
    task = causal_task(kind)
    head = token_losses.output_layer(task.model, "next_token")
    assert head is not None
    output = task.model(**task.test.inputs).logits
    wanted = next_token(output, task.test.target)
    found = token_losses.token_losses(task.model, head, task.test, torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert int(found[1].min()) >= 1
    parameters = list(task.model.parameters())
    slopes = [
        torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
        for losses in (found[0], wanted[0])
    ]
    torch.testing.assert_close(*slopes, rtol=0, atol=1e-11)


@pytest.mark.usefixtures("labels_alone")
def test_what_a_model_does_to_its_outputs_is_done_to_those_at_labels() -> None:
    """Gemma 2 caps its outputs softly, behind its last layer."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1, "head_dim": 4}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 23}
    model = Gemma2ForCausalLM(Gemma2Config(**sizes, final_logit_softcapping=0.5)).double().eval()
    samples: Samples = causal_task("llama").test
    head = token_losses.output_layer(model, "next_token")
    assert head is not None
    own = head.weight.detach().clone()
    with torch.no_grad():  # outputs of zero are the same with a cap and without
        head.weight.zero_()
        token_losses.token_losses(model, head, samples, torch.float64)
        head.weight.copy_(own)
    wanted = next_token(model(**samples.inputs).logits, samples.target)
    found = token_losses.token_losses(model, head, samples, torch.float64)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def test_metrics_at_labels_are_those_of_all_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = causal_task("llama")
    given = (task.model, base_of(task), task.test, "next_token")
    names = ("perplexity", "token_accuracy", "loss")
    wanted = evaluate(*given, names, batch_size=7)
    monkeypatch.setattr(token_losses, "MANY_OUTPUTS", 1)
    monkeypatch.setattr(token_losses, "PIECE", 10 * 8 * 23)
    assert evaluate(*given, names, batch_size=7) == pytest.approx(wanted, rel=1e-12)
    output = task.model(**task.test.inputs).logits[:, :-1].detach()
    labels = task.test.target[:, 1:]
    counted = labels >= 0
    right = (output.argmax(-1) == labels)[counted].double().mean()
    assert wanted["token_accuracy"] == pytest.approx(float(right))
    mean = torch.nn.functional.cross_entropy(output[counted], labels[counted])
    assert wanted["perplexity"] == pytest.approx(float(mean.exp()))
