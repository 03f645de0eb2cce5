"""Small worlds in which every method of `strategies.METHODS` is held to its promises.

Two ways to close a round: `play` injects random replies (algebra, no training), `run` goes the
whole way through exchanges and local training.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import RecordDict
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from fedraclora.aggregation.base import AggregationContext, Aggregator, mean
from fedraclora.attacks import Attack
from fedraclora.binding import row_of
from fedraclora.clients.engines import InProcessGrid, in_process
from fedraclora.clients.worker import Worker
from fedraclora.compose.choices import choice
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES, Task
from fedraclora.devices.system import SystemConfig
from fedraclora.engines.asks import AskWriter, read_ask
from fedraclora.engines.records import (
    add_weight_update,
    read_answer,
    read_weight_update,
    write_answer,
)
from fedraclora.experiments.pages import aliases
from fedraclora.privacy.secagg import SecAgg, SecAggTerms
from fedraclora.protocol.coding import NONE
from fedraclora.protocol.link import Plan
from fedraclora.protocol.method import Cohort, Counters, Draw, Method, RoundInstructions, State
from fedraclora.protocol.plan import make_plan
from fedraclora.protocol.rank_budgets import uploaded_mask, widen
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.run.client_state import ClientStore
from fedraclora.run.initial import read_states
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.base import FedStrategy
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fedkseed import CHANCES, SUMS, ReusedDirections
from fedraclora.strategies.methods.ferret import Ferret, ProjectUpdate, blocks
from fedraclora.strategies.methods.pool_rac_lora import PoolProgram
from fedraclora.strategies.server.callbacks import Evaluate
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.measuring import EvaluationPlan
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.strategies.shared.walking import MOVES, DirectionProgram
from fedraclora.strategies.steps import round_steps
from fedraclora.strategies.steps.private import PrivateRounds
from fedraclora.strategies.wiring import RoundsBuilder
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Tree, digest
from fedraclora.weights.chain import CatchUp, read_link
from fedraclora.weights.links import read_links
from fedraclora.weights.replica import Replica
from fedraclora.weights.update import BaseWeights, WeightHistory, WeightUpdate
from fedraclora.wire.answers import Answer
from fedraclora.wire.exchange import Ask
from tests.common import Arrange, arranged

RANK, ALPHA = 3, 5.0  # s = 5/3: a forgotten or inverted scale cannot pass
SIZES = (4, 9, 1, 6, 3)  # samples of each client: ragged, one with a single sample
OWN = os.environ.get("FEDRACLORA_METHOD", "")  # module:Class, which is tested as ours are
if OWN:
    METHODS[OWN] = row_of("method", METHODS, OWN)
FULL_BATCH = LocalSettings(lr=0.1, steps=1, batch_size=0, shuffle=False)
WALKS = {
    "seeds": 6,
    "steps": 6,
    "eps": 1e-5,
    "directions": 12,
}  # as many steps as there are anywhere below
WALKING = {"fedkseed", "decomfl", "ferret"}  # whole weights, along directions from a seed
BY_LOSSES = WALKING - {"ferret"}  # without gradients
RAGGED = LocalSettings(lr=0.1, epochs=1, batch_size=4, momentum=0.5)


# --- methods -------------------------------------------------------------------------------------


@cache
def _read(name: str) -> dict[str, Any]:
    return choice("method", name)


def yaml_of(name: str) -> dict[str, Any]:
    """The defaults that a user gets with ``method=<name>``."""
    return dict(_read(name))


def make_method(name: str, **changes: Any) -> Method:
    """A method with its YAML's defaults, at rank 3 and alpha 5 where it has them."""
    group = yaml_of(name)
    table_key = group.pop("name")
    wanted = {"rank": RANK, "alpha": ALPHA, "sparse_rounds": 2, "pool": 2, **WALKS} | changes
    asked = group | {k: v for k, v in changes.items() if k in group}  # None stays None
    known = {k: v for k, v in wanted.items() if asked.get(k) is not None}
    return METHODS[table_key](**asked | known)


def distinct() -> list[str]:
    """Names of `METHODS` without those that stand for the settings of another name."""
    return [name for name in METHODS if name not in aliases()]


POOLS = (
    {"refresh": 4, "merge_every": 2},
    {"refresh": 3, "sketch": "gaussian", "blocks": "independent"},
    {"pool": 1, "train": "A", "server_lr": 1.75},
)


def variants() -> Iterator[tuple[str, dict[str, Any]]]:  # noqa: PLR0912  a list
    """Every distinct method, and what of each class changes what travels or is merged."""
    seen = set()
    for name in sorted(distinct()):
        group = yaml_of(name)
        yield name, {}
        pools = [(name, changes) for changes in POOLS if "pool" in group]
        yield from pools
        # A preset of a class that has had its variants, or what else is of the one it builds on.
        if METHODS[name] in seen or pools:
            continue
        seen.add(METHODS[name])
        if "side" in group:
            yield name, {"train": "A"}
            yield name, {"side": "auto"}
        if "merge_every" in group:
            yield name, {"merge_every": 3}
            bases = ({"pairs": True, "fresh": 0.0}, {"basis": "coordinate", "kept_scale": 0.5})
            yield from ((name, b | {"merge_every": 1}) for b in bases if "pairs" in group)
            starts = [s for s in ("pissa", "orthogonal") if group.get("init", "random") != "random"]
            yield from ((name, {"init": s, "merge_every": None}) for s in starts)
        if "blocks" in group:
            yield name, {"blocks": "cover"}
        if "sketch" in group:
            yield name, {"sketch": "gaussian", "normalize": "identity"}
        if "sketches" in group and "server_lr" in group:
            yield name, {"sketches": 2, "merge_every": 1}
            yield name, {"sketches": 2, "server_lr": 2.0, "train": "A", "merge_every": 3}
        if "probability" in group:
            yield name, {"probability": 0.0}
        if "interval" in group:
            yield name, {"sketches": 3, "interval": 2, "normalize": "identity"}
        if "gap" in group:
            yield name, {"gap": 1}
        if "residual_rank" in group:
            yield name, {"residual_rank": 2}
        if "seeds" in group:
            yield name, {"steps": 6, "pro": True}
        if "server_lr" in group and "directions" not in group:
            yield name, {"server_lr": 1.75, "merge_every": 1}


def is_personal(variant: tuple[str, dict[str, Any]]) -> bool:
    """Whether clients keep a part of the model: then there is no global one to hold to a mean."""
    return make_method(variant[0], **variant[1]).client_state


def label(variant: tuple[str, dict[str, Any]]) -> str:
    """A variant's name in test ids."""
    return "-".join([variant[0], *(f"{k}={v}" for k, v in variant[1].items())])


every_variant = pytest.mark.parametrize("variant", list(variants()), ids=label)

# In the short suite each method has its defaults alone where its settings meet no other code.
defaults_short = pytest.mark.short(when=lambda variant: not variant[1])

# Where no method has code of its own either, it has one method for each form of what is trained.
FORMS = {"fed_rac_lora", "fedavg", "fedavg_lora", "rolora", "fed_sb", "ravan", "flora_stacking"}
forms_short = pytest.mark.short(when=lambda variant: not variant[1] and variant[0] in FORMS)


def goes_its_own_way(method: Method) -> bool:
    """Whether each client draws directions of its own, so that equal clients are not alike."""
    return has_field(method, "seeds") or trains_parts(method)


def trains_parts(method: Method) -> bool:
    """Whether each client trains drawn components, under a product that is not the server's."""
    return has_field(method, "components_seed")


def sends_a_shadow(method: Method) -> bool:
    """Whether what clients send stands for their weights, and is not these."""
    return isinstance(method, Ferret)


def has_field(method: Method, name: str) -> bool:
    """Whether a method has a hyperparameter of this name."""
    return is_dataclass(method) and name in {f.name for f in fields(method)}


# --- worlds --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class World:
    """A task, its plan and its initial weights, and what has been played in it.

    Most tests of a file ask for the same rounds of the same method.
    """

    task: Task
    plan: Plan
    base: Tree
    played: dict[tuple[str, Draw], list[Played]] = field(init=False, default_factory=dict)

    @property
    def clients(self) -> int:
        """Size of the population."""
        return self.task.train.num_clients

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return next(iter(self.base.values())).dtype

    def loss(self, weights: Tree) -> float:
        """Mean training loss over all samples."""
        samples = self.task.test  # in these worlds that is the clients' own table
        output = torch.func.functional_call(
            self.task.model, weights, (samples.inputs["x"],), strict=True
        )
        losses, counts = LOSSES[self.task.loss](output, samples.target)
        return float(losses.detach().sum() / counts.sum())


def linear(out: int, in_: int) -> nn.Module:
    """A Linear layer, weight (out, in)."""
    return nn.Linear(in_, out)


def conv1d(out: int, in_: int) -> nn.Module:
    """Hugging Face's Conv1D, weight (in, out)."""
    layer: nn.Module = Conv1D(out, in_)
    return layer


def make_model(layer: Callable[[int, int], nn.Module], width: int = 1) -> nn.Module:
    """7 -> 6 -> 6 -> 5 with a Linear head to 4 classes; fc2 is square, on purpose."""
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    sizes = [(6, 7), (6, 6), (5, 6)]
    for i, (out, in_) in enumerate(sizes, start=1):
        parts[f"fc{i}"] = layer(out * width, in_ * width)
        parts[f"act{i}"] = nn.Tanh()
    parts["head"] = nn.Linear(5 * width, 4)
    return nn.Sequential(parts)


def fill(model: nn.Module, seed: int, dtype: torch.dtype) -> nn.Module:
    """Set all parameters: normals over the square root of the fan-in, in (out, in) order."""
    model = model.to(dtype)
    for name, module in model.named_modules():
        if not hasattr(module, "weight"):
            continue
        transposed = isinstance(module, Conv1D)
        weight: torch.Tensor = module.weight.data.mT if transposed else module.weight.data
        drawn = torch_normal(generator(seed, "world", name), *weight.shape) / weight.shape[1] ** 0.5
        weight.copy_(drawn)  # a Conv1D so holds the transpose of the Linear of the same name
        if module.bias is not None:
            module.bias.data.copy_(torch_normal(generator(seed, "bias", name), len(module.bias)))
    return model


def divide(samples: Samples, sizes: tuple[int, ...]) -> PartitionedData:
    """Hand out consecutive rows."""
    cuts = np.cumsum([0, *sizes])
    parts = [np.arange(a, b) for a, b in pairwise(cuts)]
    return PartitionedData.of(samples, parts)


def make_world(
    layer: Callable[[int, int], nn.Module] = linear,
    *,
    sizes: tuple[int, ...] = SIZES,
    width: int = 1,
    head: str = "full",
    bias: str = "full",
    dtype: torch.dtype = torch.float64,
) -> World:
    """A classifier of 4 classes with ragged clients."""
    model = fill(make_model(layer, width), 3, dtype)
    rng = generator(5, "samples")
    total = sum(sizes)
    x = torch_normal(rng, total, 7 * width).to(dtype)
    samples = Samples({"x": x}, torch.from_numpy(rng.integers(0, 4, total)))
    task = Task(model, ("head",), "cross_entropy", ("loss",), divide(samples, sizes), samples)
    return world_of(task, head=head, bias=bias)


def world_of(task: Task, *, head: str, bias: str) -> World:
    """A world from a task under a policy for head and biases."""
    plan = make_plan(task.model, task.head, head_policy=head, bias_policy=bias)
    return World(task, plan, {n: p.detach().clone() for n, p in task.model.named_parameters()})


def equal_clients(world: World, count: int) -> World:
    """The same world where ``count`` clients all hold all of the samples."""
    data = world.task.train
    assert isinstance(data, PartitionedData)
    rows = np.arange(len(data.samples))
    train = PartitionedData.of(data.samples, [rows] * count)
    task = Task(**vars(world.task) | {"train": train})
    return World(task, world.plan, world.base)


def least_squares(sizes: tuple[int, ...] = SIZES) -> World:
    """y = W x without noise, one Linear layer (5, 7) without bias or head: a quadratic."""
    model = fill(nn.Sequential(OrderedDict(fc1=nn.Linear(7, 5, bias=False))), 3, torch.float64)
    rng = generator(5, "samples")
    x = torch_normal(rng, sum(sizes), 7)
    samples = Samples({"x": x}, x @ torch_normal(rng, 5, 7).T)
    task = Task(model, (), "squared_error", ("loss",), divide(samples, sizes), samples)
    return world_of(task, head="full", bias="frozen")


# --- one round with injected replies -------------------------------------------------------------


@dataclass(frozen=True)
class Played:
    """A round that was closed with random replies."""

    before: State
    sent: RoundInstructions
    uplinks: Uplinks
    after: State


UNEQUAL = (1.0, 2.5, 4.0, 0.125)


def some_cohort(weights: tuple[float, ...] = UNEQUAL) -> Cohort:
    """Clients with gaps between their ids and unequal weights."""
    clients = torch.arange(len(weights)) * 2 + 1
    return Cohort(clients, torch.tensor(weights, dtype=torch.float64))


def random_replies(
    sent: RoundInstructions, cohort: Cohort, dtype: torch.dtype, *keys: int
) -> Uplinks:
    """What no training would give: independent normals for all that clients send.

    Under rank budgets the server knows the rest: it is as it started.
    """
    layout = sent.layout
    rows = torch_normal(generator(11, "replies", *keys), len(cohort), layout.size).to(dtype)
    places = torch.arange(len(cohort))
    mask = uploaded_mask(sent, places)
    rows = rows if mask is None else widen(rows[mask], sent, places)
    versions = torch.zeros(len(cohort), dtype=torch.int64)
    return Uplinks(cohort.clients, cohort.weights, layout, rows, versions=versions)


def play(
    method: Method,
    world: World,
    state: State,
    round_: int,
    cohort: Cohort,
    draw: Draw,
    *,
    aggregator: Aggregator = mean,
) -> Played:
    """Open a round, answer each of its exchanges at random, close it."""
    sent = method.open_round(state, round_, cohort, draw)
    exchange = 0
    while True:
        replies = random_replies(sent, cohort, world.dtype, round_, exchange)
        got = aggregator(replies, AggregationContext(sent, round_, draw, state.base))
        again = method.next_exchange(state, sent, got)
        if again is None:
            return Played(state, sent, got, method.close_round(state, sent, got))
        sent, exchange = again, exchange + 1


def play_rounds(
    method: Method,
    world: World,
    rounds: int,
    draw: Draw,
    cohort: Cohort | None = None,
    *,
    anew: bool = False,
) -> list[Played]:
    """Several such rounds in a row; ``anew``: not those that were played before."""
    key = (repr(method), draw)  # the fields of some cannot be hashed
    kept = [] if anew or cohort else world.played.setdefault(key, [])
    state = kept[-1].after if kept else method.initial_state(world.base, world.plan, draw)
    for round_ in range(len(kept) + 1, rounds + 1):
        kept.append(play(method, world, state, round_, cohort or some_cohort(), draw))
        state = kept[-1].after
    return kept[:rounds]


def with_pools(played: Played) -> Tree:
    """Base weights of a round with s sum_j B^(j) A_j, part by part; a second opinion as below."""
    base = dict(played.before.base)
    program = played.sent.program
    for weight, pool in program.pools.items() if isinstance(program, PoolProgram) else ():
        for j in range(pool.count):
            drawn = replace(pool.first, index=pool.first.index + j)
            right = drawn.side == "right"
            part = base[f"{weight}/{'B' if right else 'A'}.{j}"]
            product = part @ drawn.draw() if right else drawn.draw() @ part
            transposed = played.before.plan.targets[weight].kind == "conv1d"
            base[weight] = base[weight] + pool.scale * (product.T if transposed else product)
    return base


def walked(played: Played, k: int, base: Tree) -> Tree:
    """Weights of a client that sends numbers along directions: each of these, times its number."""
    program, out = played.sent.program, dict(base)
    if not isinstance(program, DirectionProgram):
        return out
    walk, moves = program.walk, played.uplinks.stack()[MOVES][k].double().flatten()
    sums, along = base.get(SUMS, torch.zeros(0)).double(), torch.arange(len(moves))
    if isinstance(program, ReusedDirections) and not program.sums:
        chances = base[CHANCES] if CHANCES in base else torch.zeros(0)
        chances = chances if len(chances) else torch.ones(program.seeds)
        who = played.uplinks.clients[k : k + 1]
        along = program.visited(who, len(moves), chances)[0]
    parts = [(walk.names, len(moves))]
    if isinstance(program, ProjectUpdate):
        parts = blocks({n: tuple(base[n].shape) for n in walk.names}, program.directions)
        along = torch.cat([torch.arange(count) for _, count in parts])
    for names, count in parts:
        for name in names:
            each = [
                *enumerate(sums.tolist()),
                *zip(along.tolist()[:count], moves.tolist(), strict=False),
            ]
            z = [c * walk.direction(name, base[name], j) for j, c in each]
            out[name] = base[name] + torch.stack(z).sum(dim=0).to(base[name])
        along, moves = along[count:], moves[count:]
    return out


def client_weights(played: Played, k: int) -> Tree:
    """Dense effective weights of the client at place ``k``: W + scale F_1 F_2, written out.

    Written without `fedraclora.protocol.link` and `LayerView`, so that it is a second opinion.
    """
    base, plan = with_pools(played), played.before.plan
    rows = played.uplinks.stack()
    out = walked(played, k, base)
    for weight, adapter in played.sent.adapters.items():
        product: torch.Tensor | None = None
        for name, factor in adapter.factors.items():
            if factor.trained:
                matrix = rows[f"{weight}/{name}"][k]
            else:
                matrix = factor.draw()[k] if factor.per_client else factor.draw()
            matrix = matrix.to(torch.float64)
            product = matrix if product is None else product @ matrix
        assert product is not None
        transposed = plan.targets[weight].kind == "conv1d"
        out[weight] = base[weight] + adapter.scale * (product.T if transposed else product)
    return out | {name: rows[name][k] for name in played.sent.dense if name in out}


def mean_weights(played: Played) -> Tree:
    """Weighted mean of the clients' dense effective weights."""
    shares = (played.uplinks.weights / played.uplinks.weights.sum()).tolist()
    each = [client_weights(played, k) for k in range(len(shares))]
    return {
        name: torch.stack([p * w[name] for p, w in zip(shares, each, strict=True)]).sum(dim=0)
        for name in played.before.base
    }


def stepped(method: Method, played: Played, reached: Tree, draw: Draw) -> Tree:
    """Old weights + step (reached - old), the step that the method says the server takes."""
    old, step = method.weights(played.before, draw), method.traits.step
    return {n: w + step * (reached[n] - w) for n, w in old.items()}


def distance(left: Tree, right: Tree, names: list[str]) -> float:
    """Frobenius norm of the difference over some weights together."""
    gaps = [(left[n] - right[n]).double().reshape(-1) for n in names]
    return float(torch.linalg.norm(torch.cat(gaps)))


def assert_equal_trees(left: Tree, right: Tree) -> None:
    """Equal to the bit, names included."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def assert_close_trees(left: Tree, right: Tree, tolerance: float = 1e-12) -> None:
    """Equal up to rounding in float64, names included."""
    assert left.keys() == right.keys()
    for name, value in left.items():
        gap = float((value - right[name]).abs().max()) if value.numel() else 0.0
        size = 1.0 + float(right[name].abs().max()) if value.numel() else 1.0
        assert value.shape == right[name].shape, name
        assert gap <= tolerance * size, f"{name} differs by {gap}"


# --- whole runs ----------------------------------------------------------------------------------


class RecordingWorker(Worker):
    """Keeps what it is asked and what it answers."""

    def __init__(
        self,
        trainer: CohortTrainer,
        replica: BaseWeights,
        store: ClientStore,
        terms: SecAggTerms | None,
    ) -> None:
        super().__init__(trainer, replica, store, terms)
        self.seen: list[tuple[Ask, Answer]] = []

    @override
    def train(self, ask: Ask) -> Answer:
        """Answer, and remember both."""
        answer = super().train(ask)
        self.seen.append((ask, answer))
        return answer

    @property
    def asked(self) -> list[RecordDict]:
        """What it was asked, as messages."""
        return [AskWriter().write(ask) for ask, _ in self.seen]

    @property
    def answered(self) -> list[RecordDict]:
        """What it answered, as messages."""
        return [write_answer(answer) for _, answer in self.seen]


def put_on_the_wire(patch: pytest.MonkeyPatch) -> None:
    """Let clients of this process get Flower's records, and answer with some."""
    whole = Worker.train

    def train(self: Worker, ask: Ask) -> Answer:
        heard = read_ask(AskWriter().write(ask))
        answer = write_answer(whole(self, heard))
        return read_answer(answer, ask)

    patch.setattr(Worker, "train", train)


@dataclass(frozen=True)
class Run:
    """A run that has ended."""

    strategy: FedStrategy
    worker: RecordingWorker

    @property
    def weights(self) -> Tree:
        """Effective weights at the end: the server's, or those of a client that keeps a part."""
        weights = self.strategy.method.weights(self.strategy.state, self.strategy.draw)
        return personal(self.strategy, self.worker.store, weights)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The ledger, without row 0."""
        return list(self.strategy.recorder.ledger.rows[1:])


def array_bytes(content: RecordDict) -> int:
    """Bytes of the numbers in a message of Flower's, without numpy's own header."""
    records = content.array_records.values()
    return sum(int(array.numpy().nbytes) for r in records for array in r.values())


def seeds_of(update: WeightUpdate) -> int:
    """Count the seeds in an update."""
    parts = [part for _, link in update.links for part in link.parts()]
    terms = (term for part in parts for term in part.terms.values())
    drawn = sum(f.sketch is not None for term in terms for f in term.factors)
    return drawn + sum(len(part.moves) for part in parts)


def assert_updates_lead_on(folder: Path, coding: str = NONE) -> Tree:
    """Hold the updates of a run against its weights, and their bytes against what `CatchUp` says.

    As they are written, from every version that a client may hold to the last; give its base.
    """
    links = [read_link(t, meta) for round_, t, meta in read_links(folder / "chain") if round_]
    states = [state for _, state, _ in read_states(folder, Counters)]
    start, count, base = states[0], len(links), states[-1].base
    history, counted = WeightHistory(), CatchUp(start.base, count + 1, coding)
    history.coding = coding
    history.recall(base, enumerate(links, start=1), count)
    for version, link in enumerate(links, start=1):
        counted.add(link)
        counted.fetch(torch.arange(version, count + 1))  # client k is last seen at version k
    for held in range(count + 1):
        update = history.since(held)
        assert update.start == held
        assert update.payload_bytes == counted.missing(torch.tensor([held])).sum()
        add_weight_update(content := RecordDict(), update)
        assert update.payload_bytes == array_bytes(content) + 8 * seeds_of(update)
        update = read_weight_update(content)
        replica = Replica(start.plan, torch.device("cpu"))
        replica.take(states[held].base, held, None)
        assert replica.follow(update)
        assert digest(replica.at(count, count + 1)) == digest(base)
    return base


def personal(strategy: FedStrategy, store: ClientStore, weights: Tree) -> Tree:
    """The weights of the client that trained last, where clients keep a part of the model."""
    if not strategy.method.client_state:
        return weights
    for own in store.latest(1).values():
        return strategy.method.weights(strategy.state, strategy.draw, own)
    return weights


def run(
    world: World,
    method: Method,
    local: LocalSettings,
    *,
    rounds: int,
    cohort: int | None = None,
    chunk: int = 3,
    seed: int = 1,
    weights: str = "samples",
    aggregator: Aggregator = mean,
    attack: Attack | None = None,
    arrange: Arrange | None = None,
    folder: Path | None = None,
    resume: bool = False,
    max_failures: int = 0,
    treatment: dict[str, Any] | None = None,
    system: SystemConfig | None = None,
    kind: type[FedStrategy] | None = None,
    steps: Sequence[RoundStep] = (),
    measuring: EvaluationPlan | None = None,
    **numbers: str,
) -> Run:
    """Run a method from start to end as `fedraclora simulate` does, with its one strategy.

    ``numbers``: How they travel, ``uplink`` and ``downlink``.
    """
    loop = LoopConfig(
        rounds=rounds,
        clients=world.clients,
        cohort=cohort or world.clients,
        chunk=chunk,
        seed=seed,
        weights=weights,
        dtype=str(world.dtype).removeprefix("torch."),
        max_failures=max_failures,
        **numbers,  # type: ignore[arg-type]
    )
    engine = in_process()
    device = torch.device("cpu")
    trainer = CohortTrainer(world.task, world.plan, local, seed=seed, device=device)
    treatment = treatment or {"aggregator": aggregator, "attack": attack or Attack()}
    security = treatment.get("secure")
    terms = SecAggTerms(security, weights) if isinstance(security, SecAgg) else None
    store = ClientStore()
    chosen = round_steps({**treatment, "local": local}, steps)
    for step in chosen:
        if isinstance(step, PrivateRounds):
            step.secret = treatment.get("secret")

    def loss(weights: Tree) -> dict[str, float]:
        return {"loss": world.loss(personal(wired.strategy, store, weights))}

    wired = RoundsBuilder(
        method,
        trainer,
        loop,
        engine,
        store=store,
        terms=terms,
        initial_state=method.initial_state(world.base, world.plan, Draw(seed)),
        callbacks=[Evaluate(loss)],
        recorder=RunRecorder(folder, every=1, sync=False, store=store),
        resume=resume,
        steps=chosen,
        measuring=measuring,
        system=system,
        kind=kind,
    ).ready()
    assert isinstance(wired.grid, InProcessGrid)
    wired.grid.worker = worker = RecordingWorker(trainer, engine.replica, store, terms)
    if arrange is not None:
        arranged(wired.grid, arrange)
    wired.start()
    return Run(wired.strategy, worker)
