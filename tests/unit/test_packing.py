"""Products over real tokens alone: the same where it counts, zero elsewhere, gradients too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fedraclora.data.samples import Samples
from fedraclora.models.packed_layout import Places, real_tokens
from fedraclora.rng import generator
from fedraclora.training.adapted import BatchTerm, adapted_linear
from fedraclora.training.cohort_layers import CohortContext, CohortLinear
from fedraclora.training.schedule import Schedule, StepBatch

MASK = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0], [1, 1, 0, 0]])
REAL = torch.tensor([0, 1, 2, 3, 4, 8, 9])
PLACES = Places(
    torch.tensor([*REAL.tolist(), 5]), torch.tensor([0, 1, 2, 3, 4, 7, 7, 7, 5, 6, 7, 7])
)


def drawn(*shape: int) -> torch.Tensor:
    return torch.from_numpy(generator(0, "drawn", *shape).standard_normal(shape))


def batch(mask: torch.Tensor | None) -> Samples:
    inputs = {"ids": torch.ones(3, 4)} | ({} if mask is None else {"attention_mask": mask})
    return Samples(inputs, torch.zeros(3))


def test_places_are_those_of_real_tokens() -> None:
    found = real_tokens(batch(MASK), torch.ones(1, 3, dtype=torch.bool), 7)
    assert found is not None
    for a, b in zip(found, PLACES, strict=True):
        assert torch.equal(a, b)


def test_a_sample_that_does_not_count_has_none() -> None:
    found = real_tokens(batch(MASK), torch.tensor([[True, False, True]]), 6)
    assert found is not None
    assert found.real[:-1].tolist() == [0, 1, 2, 3, 8, 9]


def test_tokens_up_to_the_last_real_one_are_real() -> None:
    mask = torch.tensor([[0, 1, 0, 0], [1, 0, 0, 0], [0, 0, 1, 0]])  # padded on the left, too
    found = real_tokens(batch(mask), torch.ones(3, 1, dtype=torch.bool), 6)
    assert found is not None
    assert found.real[:-1].tolist() == [0, 1, 4, 8, 9, 10]


@pytest.mark.parametrize(
    ("mask", "real"), [(None, 7), (torch.ones(3, 4), 12), (MASK, 0), (torch.ones(3, 4, 4), 7)]
)
def test_batches_with_little_to_save_are_left_alone(mask: torch.Tensor | None, real: int) -> None:
    assert real_tokens(batch(mask), torch.ones(3, 1, dtype=torch.bool), real) is None


def test_the_plan_counts_the_tokens_of_samples_that_count() -> None:
    valid = torch.tensor([[[True, True]], [[True, False]]])
    plan = Schedule(
        torch.zeros(2, 1, 2, dtype=torch.int64), valid, torch.ones(2, dtype=torch.int64)
    )
    assert plan.plan(torch.tensor([[[3, 1]], [[2, 9]]])) == [StepBatch(2, 2, 3, 6, 4, (3,))]
    assert plan.plan(None) == [StepBatch(2, 2)]


# Factors of a low-rank term [6, 5] for 3 clients, those of "K" one for each.
FORMS: dict[str, list[tuple[int | str, ...]]] = {
    "none": [],
    "B": [("K", 6, 2), (2, 5)],
    "A": [(6, 2), ("K", 2, 5)],
    "B and A": [("K", 6, 2), ("K", 2, 5)],
    "inner": [(6, 2), ("K", 2, 2), (2, 5)],
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_layer_and_gradients_are_those_of_autograd_at_real_tokens(
    form: str, packed: bool, bias: bool
) -> None:
    x, weight = drawn(3, 4, 5).requires_grad_(), drawn(6, 5).requires_grad_()
    shapes = [[3 if side == "K" else int(side) for side in shape] for shape in FORMS[form]]
    factors = [drawn(*shape).requires_grad_(len(shape) == 3) for shape in shapes]
    shift = drawn(6).requires_grad_() if bias else None
    slope = drawn(3, 4, 6) * MASK[..., None]  # padding reaches no loss
    leaves = [t for t in (x, weight, shift, *factors) if t is not None and t.requires_grad]
    plain = F.linear(x, weight, shift)
    if factors:
        product = torch.eye(6, dtype=torch.float64)
        for factor in factors:
            product = product @ factor
        plain = plain + 0.7 * (x @ product.mT)
    term = BatchTerm(3, 0.7, PLACES if packed else None)
    found = adapted_linear(x, weight, shift, term, *factors)
    real = MASK.bool()
    assert torch.allclose(plain[real], found[real], rtol=0, atol=1e-13)
    assert factors or not packed or not found[~real].any()
    wanted = torch.autograd.grad((plain * slope).sum(), leaves)
    given = torch.autograd.grad((found * slope).sum(), leaves)
    for a, b in zip(wanted, given, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("dense", [False, True])
def test_a_layer_packs_its_tokens_and_nothing_else(dense: bool) -> None:
    inner = torch.nn.Linear(5, 6).double()
    context = CohortContext(active=1, rows=3, tokens=4, places=PLACES)
    if dense:  # one client that trains the whole weight
        context.dense = {"fc.weight": drawn(1, 6, 5)}
    layer = CohortLinear(inner, "fc", context)
    weight = context.dense["fc.weight"][0] if dense else inner.weight
    x, pooled = drawn(3, 4, 5), drawn(3, 5)
    packed = layer(x)
    assert torch.allclose(
        packed, F.linear(x, weight, inner.bias) * MASK[..., None], rtol=0, atol=1e-14
    )
    assert torch.allclose(layer(pooled), F.linear(pooled, weight, inner.bias), rtol=0, atol=1e-14)
