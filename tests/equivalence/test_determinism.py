"""The same seed gives the same bits: twice, in any order of replies, stopped and gone on with."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from itertools import permutations
from pathlib import Path

import pytest
import torch
from flwr.app import Message
from vectorized_settings import ALSO, WIDELY

from fedraclora.commands.simulate import run_one
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.data.clients import PartitionedData
from fedraclora.errors import ClientError
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.method import Cohort
from fedraclora.protocol.program import LocalResult
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.run.ledger import NONDETERMINISTIC
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.training.cohort import CohortTrainer
from fedraclora.tree import Tree, digest
from tests.common import arranged, assemble

ROUNDS, CLIENTS, COHORT = 6, 9, 5
SMALL = [
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "partition=dirichlet",
    "local=momentum",
    "local.schedule=cosine",
    "local.batch_size=64",
    "model.hidden=[6]",
    "output=study",
    "output.chain=true",
    "engine.chunk=2",
    f"clients={CLIENTS}",
    f"clients_per_round={COHORT}",
    f"rounds={ROUNDS}",
]
# Every method, and sketches that live over the places where runs are cut.
RUNS = {name: [f"method={name}"] for name in METHODS} | {
    "fedkseed": ["method=fedkseed", "local.lr=0.002"],  # it diverges at the others' rate
    "carried": ["method=fed_rac_lora", "method.merge_every=4"],
    "pool": ["method=pool_rac_lora", "method.pool=2", "method.refresh=3", "method.train=A"],
    "left cover": ["method=fed_rac_lora", "method.train=A", "method.blocks=cover"],
    "moments": [
        "method=cola",
        "method.merge_every=3",
        "local=adamw",
        "local.optimizer_state=merge",
        "local.optimizer_state_kept=0.1",
    ],
    "moments of groups": [
        "method=fed_rac_lora",
        "method.sketches=2",
        "method.merge_every=3",
        "local=adamw",
        "local.optimizer_state=run",
    ],
    "projected moments": [
        "method=galore_average",
        "method.gap=3",
        "method.scale=0.5",
        "local=adamw",
        "local.optimizer_state=run",
    ],
    "adamw": ["method=fedavg_lora", "local=adamw"],
    "moments of rows": ["method=subspace_rac_lora", "local=adamw", "local.optimizer_state=rows"],
    "pool in fewer bits": ["method=pool_rac_lora", "method.refresh=4", "compression.downlink=int8"],
    "fewer bits": [
        "method=fed_rac_lora",
        "method.merge_every=4",
        "compression.uplink=int8",
        "compression.feedback=true",
        "compression.downlink=int4",
    ],
}
few = pytest.mark.short(when=lambda name: name in {"fed_rac_lora", "fedavg", "adamw", "fewer bits"})
# Each method by its defaults is in the contract suite.
settings = pytest.mark.short(when=lambda name: name in WIDELY or name not in METHODS)

Plain = dict[str, object]
Whole = Callable[[str], RunBuilder]


class Configs(dict[str, Plain]):
    """Composes the config of a run where it is first read."""

    def __missing__(self, name: str) -> Plain:
        words = RUNS[name]
        known = {f.name for f in fields(METHODS[name])} if name in METHODS else {"rank"}
        rank = ["method.rank=2"] if "rank" in known else []
        self[name] = composed([*words[:1], *SMALL, *rank, *words[1:]])
        return self[name]


@pytest.fixture(scope="module")
def configs() -> Configs:
    return Configs()


@pytest.fixture(scope="module")
def whole(configs: Configs) -> Whole:
    """The run of a config that nothing ever stopped."""
    return cache(lambda name: finished(configs[name]))


def changed(plain: Plain, **values: object) -> Plain:
    """The config with some keys set, ``__`` for the dot."""
    new = copy.deepcopy(plain)
    for key, value in values.items():
        node = new
        *groups, leaf = key.split("__")
        for group in groups:
            inner = node[group]
            assert isinstance(inner, dict)
            node = inner
        assert leaf in node
        node[leaf] = value
    return new


def prepared(plain: Plain, folder: Path | None = None, *, resume: bool = False) -> RunBuilder:
    if folder is not None:
        folder.mkdir(exist_ok=True)
    return assemble(from_plain(plain, METHODS), folder, resume=resume)


def finished(plain: Plain) -> RunBuilder:
    run = prepared(plain)
    run.strategy.run(run.grid)
    return run


def weights_of(run: RunBuilder) -> Tree:
    return run.strategy.method.weights(run.strategy.state, run.strategy.draw)


def digests(run: RunBuilder) -> tuple[str, str]:
    return digest(weights_of(run)), run.strategy.recorder.ledger.digest()


def fixed_rows(run: RunBuilder) -> list[Plain]:
    rows = run.strategy.recorder.ledger.rows
    return [{k: v for k, v in row.items() if k not in NONDETERMINISTIC} for row in rows]


def assert_same(found: RunBuilder, wanted: RunBuilder) -> None:
    """Equal to the bit: effective weights, base, carried tensors, and the ledger."""
    for left, right in (
        (weights_of(found), weights_of(wanted)),
        (found.strategy.state.base, wanted.strategy.state.base),
        (found.strategy.state.carried, wanted.strategy.state.carried),
    ):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[n], right[n]) for n in left)
    assert found.strategy.state.counters == wanted.strategy.state.counters
    assert fixed_rows(found) == fixed_rows(wanted)
    assert digests(found) == digests(wanted)


# ---- The seed and nothing else ------------------------------------------------------------------


@settings
@pytest.mark.parametrize("name", RUNS)
def test_the_same_seed_gives_the_same_run(configs: Configs, whole: Whole, name: str) -> None:
    assert_same(finished(configs[name]), whole(name))


@few
@pytest.mark.parametrize("name", RUNS)
def test_another_seed_gives_another_run(configs: Configs, whole: Whole, name: str) -> None:
    one, two = digests(whole(name)), digests(finished(changed(configs[name], seed=1)))
    assert one[0] != two[0]
    assert one[1] != two[1]


@settings
@pytest.mark.parametrize("name", RUNS)
def test_the_order_of_replies_changes_no_bit(configs: Configs, whole: Whole, name: str) -> None:
    orders = list(permutations(range(-(-COHORT // 2))))  # three messages a round, chunks of two

    def shuffle(replies: list[Message]) -> list[Message]:
        assert len(replies) == 3
        orders.append(orders.pop(0))
        return [replies[i] for i in orders[0]]

    run = prepared(configs[name])
    arranged(run.grid, shuffle)
    run.strategy.run(run.grid)
    assert_same(run, whole(name))


# ---- At its end ---------------------------------------------------------------------------------


def test_a_finished_run_is_not_run_again(configs: Configs, tmp_path: Path) -> None:
    plain = changed(configs["fed_rac_lora"], output__dir=str(tmp_path / "run"), resume="auto")
    once = run_one(plain, [], None)
    before = (tmp_path / "run" / "ledger.jsonl").read_bytes()
    assert run_one(plain, [], None)["weights_digest"] == once["weights_digest"]
    assert (tmp_path / "run" / "ledger.jsonl").read_bytes() == before


# ---- Clients that fail --------------------------------------------------------------------------


def break_client(monkeypatch: pytest.MonkeyPatch, client: int, round_: int) -> None:
    """Let one client raise in one round, whoever shares its chunk."""
    whole = CohortTrainer.train

    def train(
        self: CohortTrainer, base: Tree, downlink: object, clients: torch.Tensor, **rest: object
    ) -> LocalResult:
        if rest["round_"] == round_ and client in clients.tolist():
            raise RuntimeError("its disk is full")
        return whole(self, base, downlink, clients, **rest)  # type: ignore[arg-type]

    monkeypatch.setattr(CohortTrainer, "train", train)


def poison_client(run: RunBuilder, client: int) -> None:
    """Put a NaN into one sample of a client."""
    data = run.built.task.train
    assert isinstance(data, PartitionedData)
    data.samples.inputs["x"][data.rows[data.offsets[client]]] = float("nan")


def ledger_failures(run: RunBuilder, round_: int) -> list[Plain]:
    failures = run.strategy.recorder.ledger.rows[round_]["failures"]
    assert isinstance(failures, list)
    return failures


def someone(round_: int, *, not_in: tuple[int, ...] = ()) -> int:
    """A client of the cohort of a round that is in no cohort of the rounds ``not_in``."""
    others = {c for r in not_in for c in draw_cohort(0, r, CLIENTS, COHORT).tolist()}
    cohort: list[int] = draw_cohort(0, round_, CLIENTS, COHORT).tolist()
    return next(c for c in cohort if c not in others)


def test_a_client_that_raises_is_named_with_its_round(
    configs: Configs, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = someone(3)
    break_client(monkeypatch, client, 3)
    run = prepared(configs["fed_rac_lora"])
    with pytest.raises(ClientError, match=rf"round 3: 1 client.*client {client}: .*disk is full"):
        run.strategy.run(run.grid)
    assert run.strategy.done == 2


def test_a_nan_loss_is_named_with_its_client_and_round(configs: Configs) -> None:
    run = prepared(changed(configs["fed_rac_lora"], seed=0))
    client = someone(2, not_in=(1,))
    poison_client(run, client)
    with pytest.raises(ClientError, match=rf"round 2: 1 client.*client {client}: .*loss is nan"):
        run.strategy.run(run.grid)
    assert run.strategy.done == 1


@pytest.mark.parametrize(("how", "weights"), [("raises", "samples"), ("nan", "uniform")])
@pytest.mark.short(when=lambda name: name in WIDELY | ALSO)  # factors of every form
@pytest.mark.parametrize("name", METHODS)
def test_a_tolerated_failure_leaves_the_exact_mean_of_the_rest(
    configs: Configs,
    name: str,
    how: str,
    weights: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = prepared(changed(configs[name], max_failures=1, aggregation_weights=weights))
    strategy, start = run.strategy, run.strategy.state
    rest = draw_cohort(0, 1, CLIENTS, COHORT).tolist()
    client = rest.pop(1)
    clients = torch.tensor(rest)
    sent = strategy.method.open_round(
        start, 1, Cohort(clients, torch.ones(len(rest))), strategy.draw
    )
    trainer = CohortTrainer(
        run.built.task, run.plan, run.config.local, seed=0, device=torch.device("cpu")
    )
    factor = run.config.local.rate_scale(1, ROUNDS)
    result = trainer.train(start.base, sent, clients, round_=1, rate_scale=factor)
    layout = sent.layout
    rows = layout.pack({n: result.trained[n] for n, _ in layout.shapes}, lead=1)
    shares = result.samples.double() if weights == "samples" else torch.ones(len(rest)).double()
    closed = strategy.method.close_round(start, sent, Uplinks(clients, shares, layout, rows))
    wanted = strategy.method.weights(closed, strategy.draw)

    if how == "raises":
        break_client(monkeypatch, client, 1)
    else:
        poison_client(run, client)
    strategy.run(run.grid, last=1)
    for name_, value in weights_of(run).items():
        # To float32, for a chunk that was cut rounds its products in another way.
        torch.testing.assert_close(value, wanted[name_], rtol=1e-5, atol=1e-6)
    (failure,) = ledger_failures(run, 1)
    assert failure["client"] == client
    assert strategy.done == 1
    loss = float(result.losses.double() @ shares / shares.sum())  # with the weights of the mean
    assert strategy.recorder.ledger.rows[1]["train_loss"] == pytest.approx(loss, rel=1e-5)
