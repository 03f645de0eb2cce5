"""bf16-mixed: near to float32 on every kind of layer, with masters that lose nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from vectorized_agreement import LOCAL, base_of, method_of
from vectorized_cases import CASES, SEED, SIZES, Case, scaled

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.data.clients import PartitionedData
from fedraclora.errors import ConfigError
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.method import Cohort, Draw, RoundInstructions
from fedraclora.protocol.program import LocalResult
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.precision import BF16_MIXED, FLOAT32, PRECISIONS
from fedraclora.tree import Tree
from tests.common import assemble
from tests.reference.client import train_one

BITS = 2.0**-8  # of bfloat16: one rounding loses up to half of this share
CLIENTS = torch.arange(len(SIZES))


def single(case: Case) -> Case:
    """The same case in float32."""
    task = case.task
    assert isinstance(task.train, PartitionedData)
    data = task.train.to("cpu", torch.float32)
    return replace(case, task=replace(task, model=task.model.float(), train=data))


def sent_of(case: Case, name: str = "fed_rac_lora") -> tuple[Tree, RoundInstructions]:
    base = base_of(case.task)
    method = method_of(name)
    state = method.initial_state(base, case.plan(), Draw(SEED))
    return base, method.open_round(state, 1, Cohort(CLIENTS, torch.ones(len(SIZES))), Draw(SEED))


def trained(
    case: Case, base: Tree, sent: RoundInstructions, precision: str, **local: int
) -> LocalResult:
    settings, plan, cpu = replace(LOCAL, **local), case.plan(), torch.device("cpu")  # type: ignore[arg-type]
    trainer = CohortTrainer(case.task, plan, settings, seed=SEED, device=cpu, precision=precision)
    return trainer.train(base, sent, CLIENTS, round_=1, rate_scale=1.0)


def gap(found: Tree, wanted: Tree, start: Tree) -> float:
    """How far apart two results are, as a share of the way from the start."""
    apart = sum(float((found[n] - v).square().sum()) for n, v in wanted.items())
    way = sum(float((v - start[n]).square().sum()) for n, v in wanted.items())
    return float((apart / way) ** 0.5)


def starts(sent: RoundInstructions, base: Tree) -> Tree:
    def start(name: str, slot: Factor) -> torch.Tensor:
        return base.get(name, torch.zeros(slot.shape)) if slot.blank else slot.draw()

    return {n: start(n, s) for n, s in sent.trained().items()}


FURTHER = {"vmap": lambda: Case(scaled(), dense="gain,shift")}


@pytest.mark.parametrize("name", ["fed_rac_lora", "fedavg_lora", "fedavg"])
@pytest.mark.parametrize("case", CASES | FURTHER)
def test_a_step_is_near_to_that_in_float32(case: str, name: str) -> None:
    world = single((CASES | FURTHER)[case]())
    base, sent = sent_of(world, name)
    exact, mixed = (trained(world, base, sent, p, steps=1) for p in PRECISIONS)
    # Not nearer than a rounding of the products can be: then they would not be in bfloat16.
    assert 0.1 * BITS < gap(mixed.trained, exact.trained, starts(sent, base)) < 8 * BITS
    torch.testing.assert_close(mixed.losses, exact.losses, rtol=8 * BITS, atol=8 * BITS)


@pytest.mark.parametrize("case", ["mlp", "bert-query-value", "gpt2", "reader"])
def test_a_round_is_near_to_the_one_client_loop(case: str) -> None:
    """Dense weights are rounded after W + s B A is formed, so near is all that it can be."""
    world = single(CASES[case]())
    base, sent = sent_of(world)
    got = trained(world, base, sent, BF16_MIXED)
    start = starts(sent, base)
    for place, client in enumerate(CLIENTS.tolist()):
        wanted, loss = train_one(
            world.task,
            world.plan(),
            LOCAL,
            base,
            sent,
            client=client,
            place=place,
            round_=1,
            seed=SEED,
            precision=BF16_MIXED,
        )
        own = {n: t[place] for n, t in got.trained.items()}
        assert gap(own, wanted, start) < 16 * BITS
        assert float(got.losses[place]) == pytest.approx(loss, rel=8 * BITS)


def test_what_is_trained_stays_in_float32() -> None:
    world = single(CASES["bert-query-value"]())
    base, sent = sent_of(world)
    got = trained(world, base, sent, BF16_MIXED)
    assert {t.dtype for t in got.trained.values()} == {torch.float32}
    assert got.losses.dtype == torch.float64
    # Numbers that went through bfloat16 on their way would end in 16 zero bits.
    assert all(bool((t.view(torch.int32) & 0xFFFF).any()) for t in got.trained.values())


def test_float64_is_refused() -> None:
    case = CASES["mlp"]()
    with pytest.raises(ConfigError, match=r"precision=bf16-mixed.*fc1.* is torch"):
        CohortTrainer(
            case.task,
            case.plan(),
            LOCAL,
            seed=SEED,
            device=torch.device("cpu"),
            precision=BF16_MIXED,
        )


# --- whole runs ----------------------------------------------------------------------------------


def run(*words: str) -> RunBuilder:
    job = [
        "data=digits",
        "pretrain=none",
        "clients=12",
        "clients_per_round=3",
        "output=study",
        *words,
    ]
    done = assemble(from_plain(composed(job), METHODS), None)
    done.strategy.run(done.grid)
    return done


def metrics(done: RunBuilder, row: int) -> dict[str, float]:
    found: dict[str, float] = done.strategy.recorder.ledger.rows[row]["metrics"]  # type: ignore[assignment]
    return found


@pytest.mark.slow
def test_a_run_learns_as_well_and_is_measured_in_float32() -> None:
    words = ("method=fedavg", "rounds=6", "local.lr=0.3", "local.epochs=3")
    mixed, exact = (run(*words, f"precision={p}") for p in (BF16_MIXED, FLOAT32))
    assert metrics(mixed, 0) == metrics(exact, 0)  # bit for bit: nothing is trained yet
    assert metrics(mixed, 6)["accuracy"] == pytest.approx(metrics(exact, 6)["accuracy"], abs=0.03)
    assert metrics(mixed, 6)["accuracy"] > metrics(mixed, 0)["accuracy"] + 0.5
    assert metrics(mixed, 6) != metrics(exact, 6)


@pytest.mark.slow
def test_a_hundred_small_links_are_not_lost() -> None:
    """Each moves a weight by less than bfloat16 could hold; the sum of all arrives."""
    words = ("rounds=100", "local.steps=1", "local.lr=0.002", "evaluate.every=100")
    done = run(*words, f"precision={BF16_MIXED}")
    first = run("rounds=0").strategy.state.base
    exact = run(*words, f"precision={FLOAT32}").strategy.state.base
    name = "fc1.weight"
    way = done.strategy.state.base[name] - first[name]
    assert float((way / 100).abs().mean()) < BITS / 16 * float(first[name].abs().mean())
    apart = torch.linalg.norm(done.strategy.state.base[name] - exact[name])
    assert float(apart) < 8 * BITS * float(torch.linalg.norm(way))
