"""What a secure sum of measurements may tell: nothing of few clients, the open numbers of enough.

    python -m tests.campaigns.secure_measuring --times 2000

One to six clients, of whom any hold samples out, any have an AUC, and any leave at any stage; one
to three metrics, at one or both points of a round; all are neighbours, or four of them. Protocol,
messages and checks are the real ones; only what is measured is drawn.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message, RecordDict

from fedraclora.clients.secure import answer_stage, masked_vectors
from fedraclora.config.settings import EvaluateConfig
from fedraclora.engines.asks import read_ask
from fedraclora.engines.records import write_answer
from fedraclora.evaluation.clients import (
    AFTER,
    BINS,
    OF_ONE,
    SummedMeasure,
    spread,
    values_of,
    write_sizes,
)
from fedraclora.evaluation.metrics import Measure
from fedraclora.experiments.faults.grid import become_a_task
from fedraclora.privacy.secagg import LEAST_CLIENTS, SecAgg, SecAggTerms
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.method import Cohort
from fedraclora.rng import generator
from fedraclora.run.client_state import ClientStore
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.measuring import EvaluationPlan, Measurement
from fedraclora.strategies.steps.secure import SecureSum
from fedraclora.tree import Layout, Tree
from tests.campaigns.secagg import ROUND, SHAPE, STAGES, Client, Random, Wire, stage_of

METRICS = (("accuracy",), ("accuracy", "loss"), ("accuracy", "loss", "auc"))
CLIP = 2.0
TOLD = {"texts_up", "texts_down", "withheld", "lost"}


@dataclass
class World:
    """Who measures what.

    Attributes:
        measure: The metrics.
        points: What is before the names of each point of a round.
        samples: That each client holds out; 0: none.
        sent: What they measured, [K, q] by name.
        least: Clients below which nothing is released.
        neighbours: Of each client; None: all others.
        leaves: At which stage clients leave that do.
    """

    measure: Measure
    points: tuple[str, ...]
    samples: torch.Tensor
    sent: Tree
    least: int
    neighbours: int | None
    leaves: dict[int, str]
    gave: list[int] = field(default_factory=list)

    @classmethod
    def drawn(cls, draw: Random) -> World:
        """Draw one."""
        count = int(draw.integers(1, 7))
        measure = Measure.of(METRICS[draw.integers(3)], "logistic")
        points = ("", AFTER) if draw.integers(2) else ("",)
        holding = draw.uniform(size=count) < draw.choice([0.3, 0.7, 0.9, 1.0])
        samples = draw.integers(1, 90, count) * holding
        n = samples.astype(np.float64)
        sent: Tree = {}
        for point in points:
            area = draw.uniform(size=count)
            area[draw.uniform(size=count) < draw.choice([0.0, 0.5])] = np.nan
            loss = draw.uniform(0.01, 900.0, count) * n
            right = np.floor(draw.uniform(size=count) * (n + 1))
            columns = {"correct": (right, n), "loss": (loss, n), f"{OF_ONE}auc": (area,)}
            wanted = {sum_.name for sum_ in measure.counts if sum_.sums}
            wanted |= {OF_ONE + name for name in measure.metrics if name == "auc"}
            sent |= {
                point + name: torch.from_numpy(np.stack(columns[name], axis=1))
                for name in columns
                if name in wanted
            }
        share = draw.choice([0.0, 0.0, 0.2])
        leaves = {c: STAGES[draw.integers(4)] for c in range(count) if draw.uniform() < share}
        near = None if draw.integers(3) else 4
        return cls(measure, points, torch.from_numpy(samples), sent, int(draw.integers(3, 6)), near,
                   leaves)  # fmt: skip

    @property
    def layout(self) -> Layout:
        """Of what a client sends of one point."""
        return Layout.of({n: t for n, t in self.sent.items() if not n.startswith(AFTER)}, skip=1)

    @property
    def config(self) -> SecAgg:
        """The settings of the sums."""
        return SecAgg(CLIP, neighbours=self.neighbours)

    def of(self, clients: list[int], point: str) -> Tree:
        """What some clients measured at a point, by its names there."""
        return {n: t[clients] for n, t in self.sent.items() if n.startswith(AFTER) == bool(point)}

    def measurement(self) -> Measurement:
        """What the server asks."""
        become_a_task()
        count = len(self.samples)
        asked = EvaluateConfig(clients="all", min_clients=self.least, personal=len(self.points) > 1)
        loop = LoopConfig(9, 100, count, 1, 5, "uniform", untrusted=True, min_clients=1)
        cohort = Cohort(torch.arange(count), torch.ones(count).double())
        downlink = RoundInstructions(dense={"w": to_train(SHAPE, start=torch.full(SHAPE, 0.25))})
        return Measurement(
            EvaluationPlan(asked, self.measure), downlink, cohort, ROUND, 0, loop, 1.0
        )


class Owner(Client):
    """A client that measures.

    Args:
        number: Its id.
        world: What it measured, and holds out.
    """

    def __init__(self, number: int, world: World) -> None:
        self.number, self.world, self.store = number, world, ClientStore()
        terms = SecAggTerms(world.config, "uniform", LEAST_CLIENTS, world.least)
        self.terms = terms

    def answer(self, content: RecordDict) -> RecordDict:
        """Answer a message, as a node does."""
        ask, world = read_ask(content), self.world
        assert ask.stage is not None
        if ask.stage.name != "masked":
            holding = [self.number] if world.samples[self.number] else []
            said = answer_stage(ask.request, ask.stage, self.store, self.terms, holding)
            if ask.stage.name == "unmask" and said.stage.data:
                world.gave.append(self.number)
            return write_answer(said)
        k, summed = self.number, SummedMeasure(world.measure, world.layout, world.points)
        sent = {n: t[k : k + 1] for n, t in world.sent.items()}
        words = {k: lambda: summed.words(sent, world.samples[k : k + 1])[0]}
        told = {"layout": write_sizes(world.layout)}
        answer = masked_vectors(ask.request, ask.stage, self.store, words, {}, told=told)
        return write_answer(answer)


def trial(seed: int) -> str:
    """One measurement; what came of it.

    Raises:
        AssertionError: If something is told of fewer clients than is set, a client gave shares of
            such a sum, or what is told of enough is not what they measured.
    """
    world = World.drawn(generator(seed, "secure measuring"))
    count, stages = len(world.samples), list(STAGES)

    def bend(stage: str, client: Client, message: Message) -> list[Message]:
        if not message.has_error():
            assert stage_of(message.content).name == stage
        at = world.leaves.get(client.number)
        return [] if at and stages.index(stage) >= stages.index(at) else [message]

    wire = Wire({k: Owner(k, world) for k in range(count)}, bend)
    measurement = world.measurement()
    secure = SecureSum(world.config)
    assert secure.measure(wire, measurement)
    row: Any = measurement.summed
    inside = [k for k in range(count) if world.leaves.get(k, "unmask") == "unmask"]
    holding = [k for k in inside if world.samples[k]]
    if len(holding) < world.least:
        assert {*row} <= TOLD, f"{len(holding)} of {world.least}: {row}"
        said = row.get("withheld", "").replace(f"evaluate.min_clients={world.least}", "")
        assert not any(map(str.isdigit, said)), said
        assert world.neighbours or not [k for k in world.gave if k in inside], world.gave
        assert not any("samples" in failure.reason for failure in measurement.failures)
        return "nothing of too few"
    if "n" not in row:
        left = bool(world.leaves) or count < LEAST_CLIENTS
        assert {*row} <= TOLD
        assert left or world.neighbours, row
        return "lost: too many left" if left else "nothing, since neighbours have too few"
    exactly(world, holding, row)
    return "the sum, but for a metric of too few" if "withheld" in row else "the sum"


def exactly(world: World, holding: list[int], row: Any) -> None:
    """The row is that of the open numbers, of each metric that enough have; of others is none."""
    assert (row["n"], row["samples"]) == (len(holding), int(world.samples[holding].sum()))
    for point in world.points:
        values, pooled = values_of(world.measure, world.of(holding, point), point)
        for metric, value in values.items():
            if np.isfinite(value).sum() < world.least:
                assert point + metric not in row
                continue
            wanted, found = spread(metric, value, pooled[metric]), row[point + metric]
            for key in ("mean", "std", "pooled"):
                assert found[key] == pytest.approx(wanted[key], rel=1e-8, abs=1e-8, nan_ok=True)
            for key in ("min", "median", "max", "worst10", "best10"):
                width = 2 / BINS * (1 + abs(wanted[key])) ** 2
                assert wanted[key] - 2 * width < found[key] <= wanted[key] + 1e-9


def campaign(times: int, first: int = 0) -> Counter[str]:
    """Run a number of trials; count what came of them.

    Args:
        times: Trials.
        first: The seed of the first.

    Raises:
        AssertionError: Of the first trial in which something does not hold, with its seed.
    """
    found = Counter[str]()
    for seed in range(first, first + times):
        try:
            found[trial(seed)] += 1
        except Exception as error:
            raise AssertionError(f"trial {seed}: {error!r}") from error
    return found


def main() -> None:
    """Run it from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--times", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    with suppress(AttributeError):
        os.fsync = lambda handle: None  # type: ignore[assignment]  # nothing is killed here
    for text, count in sorted(campaign(given.times, given.first).items()):
        sys.stdout.write(f"{count:6d}  {text}\n")


if __name__ == "__main__":
    main()
