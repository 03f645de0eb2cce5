"""The memory model: what is counted, that it is what training takes, that counting is harmless."""

from __future__ import annotations

import gc
import os
import platform
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.profiler import ProfilerActivity, profile
from typing_extensions import override

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.models.built import seeded
from fedraclora.models.hf import build_transformer
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import Cohort, Draw, RoundInstructions
from fedraclora.protocol.plan import make_plan
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.training import memory
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.localconfig import moment_kinds
from fedraclora.training.memory import LiveTensors, MemoryModel, longest, measure_memory, owned
from fedraclora.training.precision import BF16_MIXED, FLOAT32
from fedraclora.tree import Tree, digest
from tests.common import assemble

CPU = torch.device("cpu")
KB = 1024
SIZES = (20, 64, 33)  # samples of each client
WORDS, LENGTH = 30, 24

# --- counting ------------------------------------------------------------------------------------


def block(*, device: str = "cpu") -> torch.Tensor:
    """A new kilobyte."""
    return torch.zeros(256, device=device)


def test_a_tensor_counts_while_it_lives() -> None:
    with LiveTensors(CPU) as live:
        one = block()
        two = one + 1
        assert (live.now, live.peak) == (2 * KB, 2 * KB)
        del one
        assert (live.now, live.peak) == (KB, 2 * KB)
        three = two * 2
        assert (live.now, live.peak) == (2 * KB, 2 * KB)
        assert float(three.sum()) == 512
    del two, three
    assert (live.now, live.peak) == (0, 2 * KB + 4)  # the sum is a tensor, too


def test_views_and_work_in_place_cost_nothing() -> None:
    with LiveTensors(CPU) as live:
        whole = block()
        part = whole[:3]
        del whole
        assert live.now == KB  # held by its part
        part.add_(1).mul_(2)
        rows = part.expand(5, 3).T.detach()
        torch.mul(part, part, out=part)
        assert (live.now, live.peak) == (KB, KB)
        copied = rows.contiguous()
        assert live.now == KB + 60
    del part, rows, copied
    assert live.now == 0


def test_what_was_there_before_is_not_counted() -> None:
    before = block()
    with LiveTensors(CPU) as live:
        view = before.view(2, 128)
        before.add_(1)
        after = torch.cat([before, before])
        assert live.now == 2 * KB
    del before, view
    assert live.now == 2 * KB
    del after
    assert live.now == 0


def test_a_graph_counts_what_it_keeps() -> None:
    leaf = block().requires_grad_()
    with LiveTensors(CPU) as live:
        out = leaf.exp().exp().sum()
        assert live.now == 2 * KB + 4  # each product is needed for its gradient
        torch.autograd.grad(out, leaf)
        gc.collect()
        assert live.now == 4
    assert live.peak >= 3 * KB


def test_tensors_elsewhere_are_not_counted() -> None:
    with LiveTensors(torch.device("meta")) as live:
        here, there = block(), block(device="meta")
        moved = here.to("meta")
        assert live.now == 2 * KB
    del here, there, moved
    assert (live.now, live.peak) == (0, 2 * KB)


def test_counting_stops_with_the_block() -> None:
    with LiveTensors(CPU) as live:
        pass
    kept = block()
    assert live.peak == 0
    del kept


# --- the model against PyTorch's allocator -------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A trainer, and the first round of a method."""

    trainer: CohortTrainer
    base: Tree
    sent: RoundInstructions

    def model(self) -> MemoryModel:
        return measure_memory(self.trainer, self.base, self.sent, torch.arange(len(SIZES)))

    def train(self, clients: torch.Tensor) -> Tree:
        part = owned(self.sent, len(clients))
        return self.trainer.train(self.base, part, clients, round_=1, rate_scale=1.0).trained


def normal(*shape: int) -> torch.Tensor:
    return torch_normal(generator(0, "memory", *shape), *shape).float()


def divided(inputs: dict[str, torch.Tensor], classes: int) -> PartitionedData:
    target = torch.from_numpy(generator(0, "classes").integers(0, classes, sum(SIZES)))
    parts = list(np.split(np.arange(sum(SIZES)), np.cumsum(SIZES)[:-1]))
    return PartitionedData.of(Samples(inputs, target), parts)


def mlp() -> Task:
    with seeded(0, "memory"):
        layers = OrderedDict(fc1=nn.Linear(50, 40), act=nn.ReLU(), head=nn.Linear(40, 10))
    data = divided({"x": normal(sum(SIZES), 50)}, 10)
    return Task(nn.Sequential(layers), ("head",), "cross_entropy", ("loss",), data, data.samples)


def cnn() -> Task:
    with seeded(0, "memory"):
        layers = OrderedDict(
            conv=nn.Conv2d(3, 8, 3), act=nn.ReLU(), flat=nn.Flatten(), head=nn.Linear(288, 10)
        )
    data = divided({"x": normal(sum(SIZES), 3, 8, 8)}, 10)
    return Task(nn.Sequential(layers), ("head",), "cross_entropy", ("loss",), data, data.samples)


def transformer(longest_client: int = 0, long: int = 1) -> Task:
    """Samples are short, but so many of the named client."""
    built = build_transformer(
        shape=(),
        classes=3,
        seed=0,
        hidden=32,
        layers=2,
        heads=4,
        intermediate=64,
        vocab=WORDS,
        max_length=LENGTH,
    )
    lengths = torch.full((sum(SIZES),), 9)
    lengths[sum(SIZES[:longest_client]) :][:long] = LENGTH
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.from_numpy(generator(0, "words").integers(1, WORDS, (sum(SIZES), LENGTH)))
    data = divided({"input_ids": ids, "attention_mask": mask}, 3)
    return Task(built.model, built.head, "cross_entropy", ("loss",), data, data.samples)


class Shifted(nn.Module):
    """A bare parameter, which clients can train under vmap only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(50, 10)
        self.shift = nn.Parameter(torch.zeros(10))

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.inner(x) + self.shift
        return out


def shifted() -> Task:
    data = divided({"x": normal(sum(SIZES), 50)}, 10)
    with seeded(0, "memory"):
        model = Shifted()
    return Task(model, (), "cross_entropy", ("loss",), data, data.samples)


def world(
    task: Task,
    name: str = "fed_rac_lora",
    *,
    precision: str = FLOAT32,
    head: str = "lora",
    dense: str | None = None,
    **local: Any,
) -> World:
    method = METHODS[name](**({} if name == "fedavg" else {"rank": 3}))
    plan = make_plan(task.model, task.head, head_policy=head, modules_to_save=dense)
    settings = LocalSettings(lr=0.5, **{"batch_size": 8, "epochs": 2, **local})
    trainer = CohortTrainer(task, plan, settings, seed=1, device=CPU, precision=precision)
    base = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    state = method.initial_state(base, plan, Draw(1))
    cohort = Cohort(torch.arange(20), torch.ones(20))
    return World(trainer, base, method.open_round(state, 1, cohort, Draw(1)))


def allocated(run: Callable[[], object]) -> int:
    """The peak of what PyTorch's allocator gives out: of kernels, too, and known to no mode."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    assert found.profiler is not None
    events = found.profiler.kineto_results.events()
    sizes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return int(np.cumsum([size for _, size in sorted(sizes, key=lambda s: s[0])]).max())


WORLDS: dict[str, Callable[[], World]] = {
    "mlp": lambda: world(mlp()),
    "mlp-full-batch": lambda: world(mlp(), batch_size=0),
    "mlp-one-step": lambda: world(mlp(), steps=1, momentum=0.9),
    "mlp-many-steps": lambda: world(mlp(), epochs=8, batch_size=1),
    "mlp-both-factors": lambda: world(mlp(), "fedavg_lora", head="full"),
    "mlp-local-head": lambda: world(mlp(), head="personal"),
    "full-momentum": lambda: world(mlp(), "fedavg", momentum=0.9),
    "full-adamw": lambda: world(mlp(), "fedavg", optimizer="adamw"),
    "full-clipped": lambda: world(mlp(), "fedavg", clip=1.0, prox=0.1),
    "cnn": lambda: world(cnn(), dense="conv"),
    # All samples are long, as a batch may be: of others less is computed than is counted.
    "transformer": lambda: world(transformer(1, SIZES[1])),
    "transformer-adamw": lambda: world(transformer(1, SIZES[1]), optimizer="adamw"),
    "transformer-mixed": lambda: world(transformer(1, SIZES[1]), precision=BF16_MIXED),
    "vmap": lambda: world(shifted(), dense="shift", optimizer="adamw"),
}


@pytest.mark.slow
@pytest.mark.short(
    when=lambda name: name not in {"transformer-adamw", "transformer-mixed"}
)  # each is there beside the other
@pytest.mark.parametrize("name", WORLDS)
def test_the_model_is_what_training_takes(name: str) -> None:
    """For as many clients as one likes: never too little, and less than a third too much."""
    chosen = WORLDS[name]()
    model = chosen.model()
    for clients in (1, 3, 8, 20):
        ids = torch.full((clients,), 1)  # the client with most samples
        taken = allocated(lambda ids=ids: chosen.train(ids))  # type: ignore[misc]
        # What a kernel takes for itself is not in it: 1.8 kB of a convolution of one client.
        assert 0.95 * taken <= model.training(clients) <= 1.3 * taken, clients
    assert model.weights == sum(t.nbytes for t in chosen.base.values())


@pytest.mark.parametrize("local", [{"momentum": 0.9}, {"optimizer": "adamw"}])
def test_projected_moments_take_what_they_say(local: dict[str, Any]) -> None:
    """Of many clients: an SVD works on one at a time, in room of its own."""
    whole, projected = (world(mlp(), name, **local) for name in ("fedavg", "galore_average"))
    models = [chosen.model() for chosen in (whole, projected)]
    kinds = len(moment_kinds(projected.trainer.local))
    r, shapes = 3, [(40, 50), (10, 40)]
    saved = 4 * sum(kinds * m * n - kinds * r * n - m * r for m, n in shapes)
    assert models[0].trained - models[1].trained == saved
    for clients in (8, 20):
        runs = [partial(chosen.train, torch.full((clients,), 1)) for chosen in (whole, projected)]
        taken = [allocated(run) for run in runs]
        assert 0.95 * taken[1] <= models[1].training(clients) <= 1.3 * taken[1]
    assert taken[0] - taken[1] > 0.95 * saved * clients


def test_what_somebody_has_compiled_is_counted_as_it_was_before() -> None:
    compiled, task = list[object](), mlp()

    def watched(graph: torch.fx.GraphModule, _: object) -> Callable[..., Any]:
        compiled.append(graph)
        return graph.forward

    plain = world(task).model()
    task.model.act.compile(backend=watched)
    assert world(task).model() == plain
    assert not compiled


@pytest.mark.slow
def test_no_other_clients_take_more() -> None:
    chosen = world(transformer(longest_client=0))  # its longest sample lies with a small client
    model = chosen.model()
    ids = torch.tensor([0, 1, 2])
    assert allocated(lambda: chosen.train(ids)) <= 1.02 * model.training(3)
    short = world(transformer(longest_client=1)).model()
    assert model == short


def test_padding_is_looked_for_a_few_clients_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    data, clients = transformer(2).train, torch.arange(3)
    asked = []
    lengths = PartitionedData.lengths

    def watched(
        self: PartitionedData, ids: torch.Tensor, places: torch.Tensor
    ) -> torch.Tensor | None:
        asked.append(tuple(places.shape))
        return lengths(self, ids, places)

    monkeypatch.setattr(PartitionedData, "lengths", watched)
    monkeypatch.setattr(memory, "TOGETHER", 2)
    assert longest(data, clients, data.sizes(clients)) == LENGTH
    assert asked == [(2, 64), (1, 33)]
    assert longest(data, clients[:2], data.sizes(clients[:2])) == 9
    assert longest(mlp().train, clients, torch.tensor(SIZES)) is None


def test_what_stays_at_a_client_starts_at_its_own() -> None:
    sent = world(mlp(), head="personal").sent
    kept = {n for n, s in sent.trained().items() if not s.upload}
    assert kept == {"head.weight", "head.bias"}
    found = owned(sent, 2).trained()
    assert {n for n, s in found.items() if s.per_client} == kept
    assert tuple(found["head.weight"].draw().shape) == (2, 10, 40)


def test_per_client_values_of_others_are_left_out() -> None:
    own = to_train((2, 3), start=torch.zeros(50, 2, 3))
    found = owned(RoundInstructions(dense={"a": own}, ranks=torch.arange(50)), 2)
    assert tuple(found.dense["a"].draw().shape) == (2, 2, 3)
    assert found.ranks is not None
    assert found.ranks.tolist() == [0, 1]


@given(st.integers(0, 10**6), st.integers(0, 10**4), st.integers(1, 10**4), st.integers(0, 10**8))
def test_what_fits_fits_and_one_more_does_not(
    shared: int, trained: int, step: int, budget: int
) -> None:
    model = MemoryModel(0, shared, trained, step)
    fit = model.fitting(budget)
    assert fit == 0 or model.training(fit) <= budget
    assert model.training(fit + 1) > budget


# --- measuring is harmless, and short ------------------------------------------------------------


@pytest.mark.parametrize("name", ["mlp", "full-adamw", "transformer", "vmap", "mlp-local-head"])
def test_measuring_changes_nothing(name: str) -> None:
    chosen, untouched = WORLDS[name](), WORLDS[name]()
    ids = torch.arange(3)
    before, state = digest(chosen.base), torch.get_rng_state()
    own = {n: p.detach().clone() for n, p in chosen.trainer.task.model.named_parameters()}
    model = chosen.model()
    assert torch.equal(torch.get_rng_state(), state)
    assert digest(chosen.base) == before
    after = dict(chosen.trainer.task.model.named_parameters())
    assert all(torch.equal(after[n], t) and after[n].grad is None for n, t in own.items())
    assert digest(chosen.train(ids)) == digest(untouched.train(ids))
    assert chosen.model() == model  # and training changes no measurement


@pytest.mark.parametrize(
    ("task", "local", "wanted"),
    [
        (transformer, {}, [1, 2]),  # a step leaves nothing behind: the second is as the first
        (transformer, {"momentum": 0.5}, [1, 1, 2, 2]),
        (mlp, {}, [1, 1, 2, 2]),  # written out by hand: a step leaves its inputs behind
        (mlp, {"steps": 1}, [1, 2]),
    ],
)
def test_two_steps_of_three_clients_are_all_that_is_run(
    monkeypatch: pytest.MonkeyPatch,
    task: Callable[[], Task],
    local: dict[str, Any],
    wanted: list[int],
) -> None:
    step = CohortTrainer._step
    clients: list[int] = []

    def counted(self: CohortTrainer, chunk: Any, number: int, batch: Any, *rest: Any) -> Any:
        clients.append(batch[0])
        return step(self, chunk, number, batch, *rest)

    monkeypatch.setattr(CohortTrainer, "_step", counted)
    world(task(), **local).model()
    assert clients == wanted


def run(*words: str) -> RunBuilder:
    job = [
        "data=digits",
        "pretrain=none",
        "clients=12",
        "clients_per_round=6",
        "rounds=2",
        "output=study",
    ]
    done = assemble(from_plain(composed([*job, *words]), METHODS), None)
    done.strategy.run(done.grid)
    return done


@pytest.mark.parametrize("words", [(), ("head=personal",), ("local=adamw", "method=fedavg")])
def test_a_run_that_was_measured_ends_as_one_that_was_not(words: tuple[str, ...]) -> None:
    measured = run("engine.chunk=auto", *words)
    plain = run(f"engine.chunk={measured.chunk.chunk}", *words)
    assert measured.chunk.memory is not None
    assert plain.chunk.memory is None
    assert digest(measured.strategy.state.base) == digest(plain.strategy.state.base)


def test_clients_that_take_no_step_are_measured() -> None:
    model = world(mlp(), steps=0).model()
    assert model.client > 0
    assert replace(model, trained=0).client < model.client


ROUND = """
import resource, torch
from fedraclora.training.memory import keep_freed_memory

def chunk() -> None:
    [torch.ones(6, 1 << 19) for _ in range(3)]  # 12 MB each

print(keep_freed_memory())
chunk()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    chunk()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
@pytest.mark.parametrize("said", [{}, {"MALLOC_TRIM_THRESHOLD_": "0"}])
def test_freed_memory_is_kept_unless_the_environment_says_how(said: dict[str, str]) -> None:
    plain = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    run = subprocess.run(
        [sys.executable, "-c", ROUND], env=plain | said, capture_output=True, text=True, check=True
    )
    kept, faults = run.stdout.split()
    assert kept == str(not said)
    assert said or int(faults) < 500  # of 9,216 pages each time
