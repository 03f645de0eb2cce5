"""The engines compute what `experiments/one_round.py` says in plain torch."""

from __future__ import annotations

import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import fedraclora
from fedraclora.experiments import one_round as reader
from fedraclora.experiments.one_round import Settings, Tree, catch_up, main, one_round
from fedraclora.rng import generator, torch_normal

RUN = Settings(seed=5, rank=2, alpha=3.0, lr=0.4, steps=3)
ROOT = Path(__file__).resolve().parents[2]
SIZES = [7, 4, 2]
ROUNDS = 3


def normal(*shape: int) -> torch.Tensor:
    return torch_normal(generator(0, "one_round", *shape), *shape).float()


def model() -> nn.Module:
    net = nn.Sequential(nn.Linear(5, 6, bias=False), nn.ReLU(), nn.Linear(6, 3, bias=False))
    net.load_state_dict({"0.weight": normal(6, 5), "2.weight": normal(3, 6)})
    return net


def weights() -> Tree:
    return {name: tensor.detach().clone() for name, tensor in model().named_parameters()}


X, Y = normal(sum(SIZES), 5), torch.arange(sum(SIZES)) % 3
CLIENTS = [*zip(X.split(SIZES), Y.split(SIZES), strict=True)]


@pytest.mark.parametrize("engine", ["inline", "vectorized"])
def test_an_engine_computes_the_round_in_plain_torch(engine: str) -> None:
    round_, W = partial(one_round, clients=CLIENTS, run=RUN), weights()
    for t in range(1, ROUNDS + 1):
        W, _ = round_(W, t=t)
    found = fedraclora.simulate(
        "head=lora",
        "output.progress=false",
        model=model(),
        data=CLIENTS,
        test=(X + 1, Y),
        engine=engine,
        seed=RUN.seed,
        rounds=ROUNDS,
        method={"name": "fed_rac_lora", "rank": RUN.rank, "alpha": RUN.alpha},
        local={"lr": RUN.lr, "steps": RUN.steps, "batch_size": max(SIZES)},
    ).weights()
    assert found.keys() == W.keys()
    for name, w in W.items():
        moved = float((w - weights()[name]).abs().max())
        assert moved > 0.05
        torch.testing.assert_close(found[name], w, rtol=0, atol=1e-6 * moved)


def test_a_late_client_comes_to_the_bits_of_the_server() -> None:
    W, chain = weights(), list[Tree]()
    for t in range(1, ROUNDS + 1):
        W, B = one_round(W, CLIENTS, t, RUN)
        chain.append(B)
    late = catch_up(weights(), chain, RUN)
    assert all(torch.equal(late[name], w) for name, w in W.items())


def test_the_command_prints_losses_and_bytes(capsys: pytest.CaptureFixture[str]) -> None:
    main()
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 12
    assert float(said[9].split()[-1]) < float(said[0].split()[-1])
    assert said[-1].endswith("True")


def test_each_step_names_the_files_in_which_the_project_does_it() -> None:
    steps = inspect.getmembers(reader, inspect.isfunction)
    own = {n: f for n, f in steps if f.__module__ == reader.__name__ and f is not main}
    for name, step in own.items():
        found = re.findall(r"`([\w/]+\.py)`", inspect.getdoc(step) or "")
        assert found, name
        assert all((ROOT / file).is_file() for file in found), name
