"""Clients made on demand train as they do one by one, and cost what the cohort costs."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch.utils._python_dispatch import TorchDispatchMode
from typing_extensions import override

from fedraclora.config.run_config import from_plain
from fedraclora.data.clients import ClientData
from fedraclora.data.partitioners import bootstrap
from fedraclora.data.sources.digits import load_digits
from fedraclora.data.sources.virtual import virtual
from fedraclora.data.task import Task
from fedraclora.models.networks import build_mlp
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.protocol.plan import make_plan
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extras.settings import LocalSettings
from tests.common import assemble
from tests.reference.client import train_one

CONF = Path(__file__).resolve().parents[2] / "conf"
MANY = 10**6
SMALL = [
    "model.hidden=[8]",
    "pretrain=none",
    "clients_per_round=20",
    "rounds=3",
    "output.checkpoint_every=1",
]
MADE = {
    "virtual": ["data=virtual", "data.features=8", "data.held_out=50", "partition=given"],
    "bootstrap": ["data=digits", "data.labels=null", "partition=bootstrap"],
}


def job(clients: int, *words: str, folder: Path | None = None) -> RunBuilder:
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[f"clients={clients}", *SMALL, *words])
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return assemble(from_plain({str(k): v for k, v in plain.items()}, METHODS), folder)


def mixture() -> ClientData:
    parts = virtual(clients=MANY, samples=7, features=6, held_out=5, dtype="float64").parts
    assert not isinstance(parts, list | None)
    return parts


def rows_of_digits() -> ClientData:
    digits = load_digits()
    made = bootstrap(digits, clients=MANY, seed=0, samples=7, alpha=0.5, sizes="pareto", spread=0.5)
    return made.to("cpu", torch.float64)


@pytest.mark.parametrize(("make", "features"), [(mixture, 6), (rows_of_digits, 64)])
def test_a_chunk_trains_as_its_clients_do_one_by_one(make: object, features: int) -> None:
    data = make()  # type: ignore[operator]
    built = build_mlp(shape=(features,), classes=10, seed=0, hidden=(5,))
    few = data.gather(torch.arange(2), torch.arange(2).expand(2, -1))
    task = Task(built.model.double(), built.head, "cross_entropy", ("loss",), data, few)
    plan, local = make_plan(task.model, task.head), LocalSettings(lr=0.2, batch_size=4, epochs=2)
    clients = draw_cohort(1, 1, MANY, 6)
    assert len(data.sizes(clients).unique()) > 1
    method, base = FedRacLora(rank=2), dict(task.model.named_parameters())
    base = {n: p.detach().clone() for n, p in base.items()}
    state = method.initial_state(base, plan, Draw(0))
    downlink = method.open_round(state, 1, Cohort(clients, torch.ones(6)), Draw(0))
    trainer = CohortTrainer(task, plan, local, seed=5, device=torch.device("cpu"))
    result = trainer.train(base, downlink, clients, round_=1, rate_scale=1.0)
    for place, client in enumerate(clients.tolist()):
        alone, loss = train_one(
            task, plan, local, base, downlink, client=client, place=place, round_=1, seed=5
        )
        assert float(result.losses[place]) == pytest.approx(loss, abs=1e-10)
        for name, value in alone.items():
            assert float(value.abs().max()) > 0
            torch.testing.assert_close(result.trained[name][place], value, rtol=0, atol=1e-10)


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operator makes."""

    numel = 0

    @override
    def __torch_dispatch__(  # type: ignore[no-untyped-def]
        self, func, types, args=(), kwargs=None
    ):
        out = func(*args, **(kwargs or {}))
        made = out if isinstance(out, tuple | list) else [out]
        self.numel = max([self.numel, *(t.numel() for t in made if isinstance(t, torch.Tensor))])
        return out


@contextmanager
def heap() -> Iterator[list[int]]:
    """Peak bytes of Python's and numpy's own heap inside the block."""
    peak = [0]
    tracemalloc.start()
    try:
        yield peak
        peak[0] = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_a_round_of_a_million_clients_looks_at_its_cohort_alone(name: str, tmp_path: Path) -> None:
    """Checkpoints, evaluation and the labels that are plotted included."""
    cost: dict[int, tuple[int, int]] = {}
    for clients in (999, 1000, MANY):  # the first one imports what is imported when it is used
        run = job(clients, *MADE[name], folder=tmp_path / str(clients))
        with heap() as peak, Largest() as seen:
            run.strategy.run(run.grid)
            run.built.label_counts(torch.arange(20))
        assert [row["round"] for row in run.strategy.recorder.ledger.rows] == [0, 1, 2, 3]
        cost[clients] = (seen.numel, peak[0])
    # Clients differ in size, so cohorts do a little: by less than a factor of two.
    # Rows are added up over blocks of 2 ** 17 numbers, which is the largest tensor here.
    assert cost[MANY][0] < 2 * cost[1000][0] < MANY // 3
    assert cost[MANY][1] < 2 * cost[1000][1] < 4 * MANY


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_a_million_clients_are_built_from_four_bytes_each(name: str) -> None:
    peaks = []
    for clients in (1000, MANY):
        with heap() as peak:
            run = job(clients, *MADE[name])
        assert run.built.task.train.num_clients == clients
        peaks.append(peak[0])
    assert peaks[1] - peaks[0] < 4 * MANY + (1 << 20)


def test_a_cohort_is_drawn_without_a_list_of_the_population() -> None:
    with heap() as peak:
        drawn = draw_cohort(0, 1, 10**12, 1000)
    assert len(drawn.unique()) == 1000
    assert peak[0] < 1 << 20
