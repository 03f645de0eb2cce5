"""Engines and the one wiring: who owns what, and what is ended where a run is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from typing_extensions import override

from fedraclora.clients.engines import engine_of, in_process
from fedraclora.compose.overrides import composed
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.config.settings import DeployConfig, EngineConfig, WaitPolicy
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.devices.distributions import Constant
from fedraclora.devices.system import SystemConfig
from fedraclora.engines.base import Engine, Grid
from fedraclora.errors import ConfigError, EngineError
from fedraclora.protocol.plan import make_plan
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.buffered import BufferedStrategy
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.wiring import RoundsBuilder
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.weights.update import BaseWeights, WeightHistory

LOOP = LoopConfig(rounds=1, clients=3, cohort=2, chunk=2, seed=4)


def config(*words: str) -> RunConfig:
    return from_plain(composed(["data=digits", "pretrain=none", *words]), METHODS)


def trainer() -> CohortTrainer:
    model = nn.Sequential(nn.Linear(5, 3))
    samples = Samples({"x": torch.ones(6, 5)}, torch.tensor([0, 1, 2, 0, 1, 2]))
    train = PartitionedData.of(samples, list(np.arange(6).reshape(3, 2)))
    task = Task(model, ("0",), "cross_entropy", ("loss",), train, samples)
    plan = make_plan(model, ("0",), head_policy="lora", bias_policy="frozen")
    local = LocalConfig(lr=0.1, steps=1)
    return CohortTrainer(task, plan, local, seed=4, device=torch.device("cpu"))


class Watched(Engine):
    """An engine of this process that notes its end, and starts only where it is told to."""

    def __init__(self, *, starts: bool = True) -> None:
        inner = in_process()
        super().__init__(inner.replica, inner.make_grid)
        self.starts, self.ended = starts, 0

    @override
    def start(self, *given: Any) -> Grid:
        if not self.starts:
            raise EngineError("nobody is there")
        return super().start(*given)

    @override
    def close(self) -> None:
        super().close()
        self.ended += 1


def wired(engine: Watched, **more: object) -> RoundsBuilder:
    method = FedRacLora(rank=2, alpha=3.0)
    return RoundsBuilder(method, trainer(), LOOP, engine, **more).ready()


def test_a_wired_run_runs_and_is_ended_by_who_has_it() -> None:
    engine = Watched()
    run = wired(engine)
    run.start()
    assert (run.strategy.done, engine.ended) == (1, 0)
    assert {n: tuple(t.shape) for n, t in run.weights().items()} == {
        "0.weight": (3, 5),
        "0.bias": (3,),
    }
    run.close()
    assert engine.ended == 1


def test_devices_decide_on_the_strategy() -> None:
    buffered = SystemConfig(speed=Constant(1.0), buffer=1)
    assert type(wired(Watched()).strategy) is FedStrategy
    assert type(wired(Watched(), system=buffered).strategy) is BufferedStrategy


def test_an_engine_that_does_not_start_is_ended() -> None:
    engine = Watched(starts=False)
    with pytest.raises(EngineError, match="nobody is there"):
        wired(engine)
    assert engine.ended == 1


def test_an_engine_of_a_run_that_is_refused_is_ended() -> None:
    engine = Watched()
    with pytest.raises(ConfigError, match=r"targets|zzz"):
        RunBuilder(config("target_modules=[zzz]"), engine=engine).ready()
    assert engine.ended == 1


@pytest.mark.parametrize(("name", "command"), [("deploy", "deploy")])
def test_what_is_not_of_this_process_is_refused_with_its_command(name: str, command: str) -> None:
    with pytest.raises(ConfigError, match=rf"engine={name}: .*fedraclora {command}"):
        engine_of(TaskBuilder(config(f"engine={name}")))


def test_an_engine_owns_the_replica_that_its_workers_follow() -> None:
    found = engine_of(TaskBuilder(config("engine=ray", "engine.gpus=0.5")))
    assert isinstance(found.replica, WeightHistory)
    assert (found.spread, found.share) == (True, 0.5)
    here = engine_of(TaskBuilder(config("engine=inline")))
    assert type(here.replica) is BaseWeights
    assert (here.spread, here.share) == (False, None)


def test_settings_say_how_the_loop_waits() -> None:
    assert EngineConfig().waiting(5) == WaitPolicy()
    real = DeployConfig(min_clients=3, timeout=7.0, retries=4, max_samples=9)
    assert real.waiting(5) == WaitPolicy(
        timeout=7.0, untrusted=True, min_clients=3, max_samples=9, retries=4
    )
    with pytest.raises(ConfigError, match=r"min_clients=3.*2 clients"):
        real.waiting(2)
    assert [real.fewest(n, 1) for n in (2, 5)] == [2, 3]
    assert EngineConfig().fewest(5, 1) == 4
