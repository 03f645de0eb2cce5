"""A chunk of clients trained as one batch held against the one-client loop, the oracle."""

from __future__ import annotations

import hashlib
import io
import pickle
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from typing_extensions import override
from vectorized_cases import SEED, SIZES, Case

from fedraclora.binding import bind
from fedraclora.compose.choices import choice
from fedraclora.data.task import Task
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.method import Cohort, Draw, Method, Plan, RoundInstructions
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.methods import METHODS
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.program import CohortProgram
from fedraclora.tree import Layout, Tree
from tests.reference.client import train_one

ATOL = 1e-10
CHUNKS = 3, len(SIZES)


KINDS = list({kind: name for name, kind in reversed(METHODS.items())}.values())  # one of a class


LOCAL = LocalSettings(lr=0.2, full_lr=0.1, batch_size=4, epochs=2)


read = cache(choice)


def method_of(name: str, **changes: object) -> Method:
    """The method as its YAML has it, but with alpha apart from a rank that fits small layers."""
    group = read("method", name)
    wanted = {"rank": 3, "alpha": 2.0, "directions": 3, "eps": 1e-2, **changes}
    if "directions" in group and "server_lr" in group:
        wanted["server_lr"] = 0.02  # few directions for many weights
    if group.get("steps") is not None:  # of which numbers are sent
        wanted["steps"] = 16
    return bind("method", METHODS, group | {k: v for k, v in wanted.items() if k in group})()


def base_of(task: Task) -> Tree:
    return {n: p.detach().clone() for n, p in task.model.named_parameters()}


def trainer_of(task: Task, plan: Plan, local: LocalSettings) -> CohortTrainer:
    return CohortTrainer(task, plan, local, seed=SEED, device=torch.device("cpu"))


def assert_agrees(
    case: Case,
    plan: Plan,
    local: LocalSettings,
    base: Tree,
    downlink: RoundInstructions,
    clients: torch.Tensor,
    *,
    round_: int = 1,
    rate_scale: float = 1.0,
) -> Tree:
    """Hold the trainer, at every chunk size, against the oracle; give the trained tensors."""
    alone = [
        train_one(
            case.task,
            plan,
            local,
            base,
            downlink,
            client=client,
            place=place,
            round_=round_,
            seed=SEED,
            rate_scale=rate_scale,
        )
        for place, client in enumerate(clients.tolist())
    ]
    wanted = {n: torch.stack([tree[n] for tree, _ in alone]) for n in downlink.trained()}
    losses = torch.tensor([loss for _, loss in alone], dtype=torch.float64)
    trainer = trainer_of(case.task, plan, local)
    for size in CHUNKS:
        for places in torch.arange(len(clients)).split(size):
            part = downlink.select(places)
            got = trainer.train(base, part, clients[places], round_=round_, rate_scale=rate_scale)
            assert got.trained.keys() == wanted.keys()
            for name, value in got.trained.items():
                gap = float((value - wanted[name][places]).abs().max())
                assert gap <= ATOL, f"{name} is off by {gap} in chunks of {size}"
            torch.testing.assert_close(got.losses, losses[places], rtol=0, atol=ATOL)
    return wanted


class Content(pickle.Pickler):
    """Writes tensors as their bytes: where equal ones lie in memory makes no difference."""

    @override
    def reducer_override(self, value: object) -> Any:
        if not isinstance(value, torch.Tensor):
            return NotImplemented
        return str, (value.numpy().tobytes(), str((value.shape, value.dtype)))

    @classmethod
    def digest(cls, value: object) -> bytes:
        file = io.BytesIO()
        pickler = cls(file)
        pickler.fast = True  # no references to what came before: equal is equal, shared or not
        pickler.dump(value)
        return hashlib.sha256(file.getvalue()).digest()


AGREED: dict[tuple[str, bytes], Tree] = {}


def agreed(name: str, case: Case, *given: Any, **more: Any) -> Tree:
    """`assert_agrees` for a case of this name, once for all methods that ask the same of it.

    Many send the same downlink in their first round, to the byte; a later round has factors of
    its own.
    """
    key = name, Content.digest((given, more))
    if key not in AGREED:
        AGREED[key] = assert_agrees(case, *given, **more)
    return AGREED[key]


def run(
    case: Case, method: Method, local: LocalSettings, rounds: int, check: set[int], name: str = ""
) -> None:
    """Run a method for some rounds and hold the rounds of ``check`` against the oracle.

    Args:
        case: What is trained.
        method: Of the run.
        local: How.
        rounds: How long.
        check: Rounds that are held against the oracle, and go on from what it gives.
        name: Of the case, if it is always the same under this name.
    """
    plan, draw = case.plan(), Draw(SEED)
    if hasattr(method, "eps"):  # along a direction slopes are as large as it is long
        local, name = replace(local, lr=local.lr / 100, full_lr=None), ""
    state = method.initial_state(base_of(case.task), plan, draw)
    trainer = trainer_of(case.task, plan, local)
    for round_ in range(1, rounds + 1):
        clients = draw_cohort(SEED, round_, len(SIZES), 5)
        sent = method.open_round(state, round_, Cohort(clients, torch.ones(5)), draw)
        if round_ in check:
            holds = partial(agreed, name) if name else assert_agrees
            trained = holds(case, plan, local, state.base, sent, clients, round_=round_)
            assert all(float(t.abs().max()) > 1e-4 for t in trained.values())
        else:
            trained = trainer.train(
                state.base, sent, clients, round_=round_, rate_scale=1.0
            ).trained
        layout = Layout(tuple((n, s.shape) for n, s in sent.uploaded().items()))
        rows = layout.pack({n: trained[n] for n, _ in layout.shapes}, lead=1)
        weights = case.task.train.sizes(clients).to(torch.float64)
        state = method.close_round(state, sent, Uplinks(clients, weights, layout, rows))


def foldable(case: Case, downlink: RoundInstructions) -> bool:
    return CohortProgram.build(case.task, downlink, torch.device("cpu")).folded
