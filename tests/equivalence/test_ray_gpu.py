"""Ray workers that share a GPU.

On the CPU Ray is told of a GPU that is not there: it counts shares without looking. The tests
marked ``gpu`` are the same on a real one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing

import pytest
import ray
import torch

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.engines.ray import Cluster
from fedraclora.engines.ray.session import RaySession
from fedraclora.errors import ConfigError
from fedraclora.experiments.bench.runs import RAY_WORKERS, ray_settings
from fedraclora.experiments.bench.workloads import WORKLOADS, Case
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.tree import digest
from tests.common import assemble

pytestmark = pytest.mark.long

WORDS = (
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "model.hidden=[12]",
    "output=study",
    "clients=80",
    "clients_per_round=70",
    "rounds=3",
    "local.lr=0.1",
    "method.rank=2",
)
HALVES = ("engine=ray", "engine.gpus=0.5")  # so that there are two workers


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    """A cluster with one GPU, real or told of, and where clients train."""
    with closing(RaySession()):
        ray.init(
            address="local",
            num_cpus=6,
            num_gpus=1,
            include_dashboard=False,
            logging_level="ERROR",
            log_to_driver=False,
        )
        yield str(request.param)


def job(*words: str) -> RunBuilder:
    return assemble(from_plain(composed([*WORDS, *words]), METHODS), None)


def bits(done: RunBuilder) -> tuple[str, str]:
    with closing(done.grid):
        done.strategy.run(done.grid)
    return digest(done.strategy.state.base), done.strategy.recorder.ledger.digest()


def all_is_taken() -> bool:
    """Whether nothing is left of the GPU; Ray's books are a moment behind."""
    deadline = time.monotonic() + 30
    while ray.available_resources().get("GPU", 0.0) > 0 and time.monotonic() < deadline:
        time.sleep(0.05)
    return time.monotonic() < deadline


def test_two_workers_share_a_card_and_give_the_same_bits(device: str) -> None:
    where = f"device={device}"
    alone = bits(job(where, "engine.chunk=32"))
    shared = job(where, *HALVES, "engine.chunk=32")
    assert len(shared.grid.pool.slots) == 2  # type: ignore[union-attr]
    assert all_is_taken()
    assert bits(shared) == alone
    if device == "cuda":
        plan = job(where, *HALVES).chunk
        assert 0 < plan.budget < torch.cuda.get_device_properties(0).total_memory / 2


def test_no_more_workers_than_shares(device: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.workers=3.*engine\.gpus=0\.5.* for 2"):
        job(f"device={device}", *HALVES, "engine.workers=3")


def test_the_ray_rows_of_the_benchmark_fit_on_one_card(device: str) -> None:
    settings = ray_settings(RAY_WORKERS, torch.device("cuda"))
    assert Cluster(settings, "cuda").workers == RAY_WORKERS
    assert ray_settings(2, torch.device("cpu")).gpus is None
    if device == "cuda":
        from fedraclora.experiments.bench.command import timed

        case = Case(WORKLOADS["A"], torch.device("cuda"))
        found = timed(["ray idle", "ray x1", "ray x2"], case, 1, lambda _: 0.0)
        assert all(row["seconds"] > 0 for row in found.values())
