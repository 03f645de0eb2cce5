"""What `FedKrso` says of itself, against dense algebra."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fedraclora.errors import ConfigError
from fedraclora.strategies.methods.fedkrso import CyclicTraining, FedKrso
from tests.methods.one_matrix import ALPHA, M, N, Played, R, S, changed


def test_the_subspaces_of_fedkrso_are_those_of_the_run() -> None:
    played = Played(FedKrso(R, ALPHA, sketches=2))
    A = [r.sent.adapters["w"].factors["A"] for r in (played, played.next(2))]
    assert A[0] == A[1]
    assert A[0].drawing is not None
    assert A[0].draw().shape == (2 * R, N)
    one = Played(FedKrso(R, ALPHA, sketches=2, normalize="identity")).sent.adapters["w"]
    grams = []
    for seed in range(400):
        spec = replace(one.factors["A"].drawing, seed=seed)  # type: ignore[type-var]
        part = spec.draw()[:R] * one.scale / S
        grams.append(part.mT @ part)
    mean = torch.stack(grams).mean(0)
    assert float((mean - torch.eye(N).double()).abs().max()) < 0.5
    assert float(mean.diagonal().mean()) == pytest.approx(1.0, abs=0.05)


def test_impossible_hyperparameters_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"method\.interval\b"):
        FedKrso(interval=0)


def test_parts_of_a_factor_are_trained_in_turn() -> None:
    gradient = torch.ones(1, M, 4)
    found = changed(CyclicTraining(2, 3), *[{"w/B": gradient, "bias": gradient}] * 8)
    turns = [each["w/B"][0, 0].tolist() for each in found]
    first, second = [1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0]
    assert turns == [first] * 3 + [second] * 3 + [first] * 2
    assert all(torch.equal(each["bias"], gradient) for each in found)
