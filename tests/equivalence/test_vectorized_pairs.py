"""A batch of clients comes to what each comes to alone: optimizers of pairs of factors."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vectorized_agreement import LOCAL, method_of, run
from vectorized_cases import CASES
from vectorized_settings import PAIRED, PAIRED_METHODS

# Each setting on both factors, some of every kind on each choice of what is trained.
PAIRED_SHORT = {"riemannian-prox-clip", "lora-pro-dp", "lora-rite-decay-prox", "gates-adamw-prox"}


@pytest.mark.short(when=lambda trained, setting: trained == "both" or setting in PAIRED_SHORT)
@pytest.mark.parametrize("setting", PAIRED)
@pytest.mark.parametrize("trained", PAIRED_METHODS)
def test_optimizers_of_pairs_of_factors(trained: str, setting: str) -> None:
    name, changes = PAIRED_METHODS[trained]
    local = replace(LOCAL, **PAIRED[setting])  # type: ignore[arg-type]
    # A factor that begins at zero is soon all but singular at rank 3, and LoRA-RITE divides by it.
    method = method_of(name, **{"rank": 2} | changes)
    run(CASES["mlp"](), method, local, rounds=2, check={1, 2})


@pytest.mark.parametrize("setting", ["riemannian", "lora-pro", "lora-rite"])
@pytest.mark.parametrize("case", ["cnn-adapted", "gpt2", "bert-query-value"])
def test_optimizers_of_pairs_on_other_layers(case: str, setting: str) -> None:
    local = replace(LOCAL, **PAIRED[setting] | {"lr": 0.01})  # type: ignore[arg-type]
    run(CASES[case](), method_of("fedavg_lora", rank=2), local, rounds=1, check={1})
