"""A batch of clients comes to what each comes to alone: gradients of samples, and noise."""

from __future__ import annotations

from dataclasses import replace

import pytest
from vectorized_agreement import LOCAL, method_of, run
from vectorized_cases import CASES, Case, mlp

from fedraclora.privacy.sample_level import SampleNoise


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg"])
def test_gradients_of_samples_on_every_model(name: str, case: str) -> None:
    local = replace(LOCAL, dp=SampleNoise(0.2, 0.5))
    run(CASES[case](), method_of(name), local, rounds=2, check={2})


def test_gradients_of_samples_under_dropout() -> None:
    local = replace(LOCAL, dp=SampleNoise(0.2, 0.5))
    run(Case(mlp(dropout=0.4), targets="all-linear"), method_of("fed_rac_lora"), local, 2, {2})
