"""``local.lr=auto``: the rule is near what was tuned, and a search finds a rate where it is not."""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from typing_extensions import override

import fedraclora
from fedraclora.api import RunResult
from fedraclora.binding import bind, section
from fedraclora.client import Round, Trained
from fedraclora.commands import cli
from fedraclora.commands.study.entries import is_tuned, read_results, tried_values, tuned_value
from fedraclora.compose.overrides import composed
from fedraclora.config.build import resolved
from fedraclora.config.run_config import from_plain
from fedraclora.errors import CheckpointError, ClientError, ConfigError, DivergenceError
from fedraclora.protocol.factor import Factor, to_train
from fedraclora.protocol.method import Adapter, Cohort, Draw, Method, RoundInstructions, State
from fedraclora.protocol.plan import make_plan
from fedraclora.run.callback import Callback, RunStart
from fedraclora.run.digests import read_sealed
from fedraclora.run.folder import read_summary
from fedraclora.run.found_rate import RATES_FILE, FoundRate
from fedraclora.run.ledger import number, read_ledger
from fedraclora.run.recorder import checkpoint_meta
from fedraclora.strategies import rate, rate_search, runner
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.rate import FITTED, layer_rate, rate_of
from fedraclora.strategies.rate_search import RESTARTS, SHARE, find_rate
from fedraclora.strategies.server.round_step import RoundStep
from fedraclora.tree import weights_of

RESULTS = Path(__file__).parents[2] / "experiments" / "results"
SHAPES = {  # [m, n] of the layers of a block, by the choice of a model
    "hf": [(384, 384)] * 4 + [(1536, 384), (384, 1536)],
    "gpt": [(288, 96), (96, 96), (384, 96), (96, 384)],
    "causal_lm": [(576, 576)] * 2 + [(192, 576)] * 2 + [(1536, 576)] * 2 + [(576, 1536)],
    "mlp": [(128, 784), (10, 128)],
}
BLOCKS = {"hf": 6, "gpt": 3, "causal_lm": 30, "mlp": 1}
# By the kind of what clients train: one factor of two, and both.
ONE = {"fed_rac_lora", "ffa_lora", "pool_rac_lora"}
BOTH = {"fedavg_lora", "lora_fair", "fedex_lora", "flora_stacking", "lora"}


def rule(config: dict[str, Any]) -> float:
    """The rule's rate for a recorded run."""
    method: Method = bind("method", METHODS, config["method"])()
    shapes = SHAPES[config["model"]["name"]]
    model = torch.nn.Sequential(*(torch.nn.Linear(n, m, bias=False) for m, n in shapes))
    plan = make_plan(model, (), head_policy="lora")
    state = method.initial_state(weights_of(model), plan, Draw(0))
    sent = method.open_round(state, 1, Cohort(torch.arange(4), torch.ones(4)), Draw(0))
    blocks = range(BLOCKS[config["model"]["name"]])
    adapters = {f"{i}.{name}": a for i in blocks for name, a in sent.adapters.items()}
    local = config["local"]
    rate = rate_of(replace(sent, adapters=adapters), local["optimizer"], local["steps"] or 37.5)
    assert rate is not None
    return rate


def recorded(folder: str, methods: set[str]) -> Iterator[tuple[dict[str, Any], float, list[float]]]:
    """Runs of a study at their tuned rates, these, and the rates beside them in the grid."""
    study, done = read_results(RESULTS / folder)
    for row in study.rows:
        if not is_tuned(study, row, done):
            continue
        tuned, tried = tuned_value(study, row, done), sorted({*tried_values(study, row, done)})
        config = done[study.jobs("final", row, [tuned])[0].key]["config"]
        plain = config["local"]["clip"] is None and not config["local"]["momentum"]
        sided = config["method"].get("train") != "A"
        if plain and sided and config["method"]["name"] in methods:
            rank = config["method"]["rank"]
            if rank >= 1 and config["method"].get("sketches", 1) == 1:
                at = tried.index(tuned)
                yield config, tuned, tried[max(0, at - 1) : at + 2]


TASKS = {
    "MNIST": "traffic_mnist",
    "STS-B": "stsb_links",
    "CoLA": "cola_links",
    "Rotten Tomatoes": "rotten_tomatoes_links",
    "Shakespeare": "shakespeare_links",
    "SmolLM2": "smollm2",
    "SmolLM2, tuned again": "smollm2_choices",
}


@pytest.mark.parametrize("methods", [ONE, BOTH], ids=["one factor", "both factors"])
@pytest.mark.parametrize("task", TASKS)
def test_the_rule_is_within_a_factor_of_two_of_what_was_tuned(task: str, methods: set[str]) -> None:
    """The median over rows is; each row is so of the tuned rate or of the next one of its grid."""
    found = [(rule(c), tuned, near) for c, tuned, near in recorded(TASKS[task], methods)]
    assert found
    assert abs(math.log2(median(rate / tuned for rate, tuned, _ in found))) <= 1
    assert all(any(0.5 <= rate / x <= 2 for x in near) for rate, _, near in found)


@pytest.mark.parametrize(
    "folder", ["cola_sources", "rotten_tomatoes", "mrpc_dirichlet", "rte_dirichlet"]
)
def test_the_rate_of_whole_weights_is_within_a_factor_of_two_of_what_was_tuned(folder: str) -> None:
    study, done = read_results(RESULTS / folder)
    tuned = tuned_value(study, "Full FedAvg", done)
    encoder = torch.nn.Sequential(*(torch.nn.Linear(n, m) for m, n in SHAPES["hf"]))
    assert 0.5 <= rate.dense_rate(encoder) / tuned <= 2


def test_other_constants_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FITTED, "adamw", {key: 4 * c for key, c in FITTED["adamw"].items()})
    with pytest.raises(AssertionError):
        test_the_rule_is_within_a_factor_of_two_of_what_was_tuned("CoLA", ONE)


def test_layers_narrower_than_any_that_was_tuned_have_no_higher_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = {"method": {"name": "ffa_lora", "rank": 2}, "model": {"name": "mlp"}}
    local = {"optimizer": "adamw", "steps": 4}
    found = []
    for shapes in ([(96, 97)], [(12, 9)]):
        monkeypatch.setitem(SHAPES, "mlp", shapes)
        found.append(rule({**config, "local": local}))
    assert found[0] == found[1] == pytest.approx(55 / (2 * 96 * 2))


TASK = ("data=digits", "model.hidden=[12]", "clients=8", "clients_per_round=4", "pretrain=none")
LENGTH = ("rounds=160", "evaluate.every=160", "output.progress=false")
FAST = ("output.sync=false", "output.plots=false")
WORDS = (*TASK, *LENGTH)


def test_a_search_over_whole_weights_begins_lower_for_wider_layers() -> None:
    words = ["local.optimizer=adamw", "model=mlp", "pretrain=none", "data=digits"]

    def first(*more: str) -> float:
        run = RunBuilder(from_plain(resolved(composed([*words, *more])), METHODS))
        known = rate.rule_rate(run.config, run.built)
        return rate.first_rate(run.config, run.built) if known is None else known

    narrow, wide = (first("method=fedavg", f"model.hidden=[{n}]") for n in (32, 256))
    assert narrow == pytest.approx(rate.DENSE / 48, rel=0.02)  # of 64 and 32 inputs
    assert wide == pytest.approx(rate.DENSE / 160, rel=0.02)
    assert first("method=fed_rac_lora", "local.clip=1.0") == rate.FIRST_ADAPTIVE


@pytest.mark.parametrize(("optimizer", "power"), [("adamw", 1), ("sgd", 2)])
def test_factors_of_longer_rows_have_a_lower_rate(optimizer: str, power: int) -> None:
    """Steps of B act through A's rows, those of A through B's columns."""

    def known(B: Factor, A: Factor) -> float:
        found = layer_rate(Adapter({"B": B, "A": A}, scale=0.5), optimizer, steps=4)
        assert found is not None
        return found

    B, A = torch.eye(120, 3), torch.eye(3, 110)
    drawn = known(to_train((120, 3)), to_train((3, 110)))
    assert known(to_train((120, 3), 6 * B), to_train((3, 110), 2 * A)) == pytest.approx(
        drawn / 4**power
    )
    alone = known(to_train((120, 3)), Factor.of(A))
    assert known(to_train((120, 3)), Factor.of(5 * A)) == pytest.approx(alone / 5**power)


def test_a_small_inner_factor_has_a_higher_rate_under_adamw() -> None:
    """Its steps reach 120 outputs through 3 columns of unit length."""
    B, A = Factor.of(torch.eye(120, 3)), Factor.of(2 * torch.eye(3, 110))
    beside = layer_rate(Adapter({"B": to_train((120, 3)), "A": A}, 0.5), "adamw", 4)
    inner = layer_rate(Adapter({"B": B, "R": to_train((3, 3)), "A": A}, 0.5), "adamw", 4)
    assert beside is not None
    assert inner == pytest.approx(beside * 40**0.5)
    assert layer_rate(Adapter({"B": B, "R": to_train((3, 3))}, 0.5), "adamw", 4) is None


def test_a_method_that_trains_two_factors_by_turns_has_the_rate_of_both() -> None:
    def known(method: str) -> float | None:
        words = [*TASK, "local.optimizer=adamw", f"method={method}"]
        run = RunBuilder(from_plain(resolved(composed(words)), METHODS))
        return rate.rule_rate(run.config, run.built)

    assert known("rolora") == known("fedavg_lora") != known("ffa_lora")


@pytest.mark.parametrize(("optimizer", "share"), [("sgd", 1.0), ("adamw", 0.5)])
@pytest.mark.parametrize("probability", [0.2, 0.8])  # the first rounds train B; they train A
def test_factors_that_are_trained_by_turns_beside_drawings_have_the_lower_rate_of_one(
    optimizer: str, share: float, probability: float
) -> None:
    def known(*method: str) -> float:
        drawn = ["method.sketch=gaussian", "method.normalize=none"]  # longer columns than rows
        words = [*TASK, f"local.optimizer={optimizer}", "local.lr=auto", *method, *drawn]
        run = RunBuilder(from_plain(resolved(composed(words)), METHODS))
        found = rate.rule_rate(run.config, run.built)
        assert found is not None
        return found

    one = [known("method=fed_rac_lora", f"method.train={side}") for side in "BA"]
    turns = known("method=bernoulli_lora", f"method.probability={probability}")
    assert turns == pytest.approx(share * min(one), rel=0.05)


def rate_used(run: RunResult) -> float:
    """The learning rate of a run."""
    return float(str(section(run.config, "local")["lr"]))


def rates(folder: Path) -> dict[str, Any]:
    """How the run of a folder found its rate."""
    return read_sealed(folder / RATES_FILE)


@pytest.mark.slow
def test_a_run_finds_its_rate_and_is_that_of_the_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fedraclora.simulate(*WORDS[:-1], *FAST, folder=tmp_path / "a")
    rate = rate_used(run)
    assert f"earning rate {rate:g}, found in" in capsys.readouterr().err
    told = fedraclora.simulate(*WORDS, f"local.lr={rate}")
    assert told.summary["weights_digest"] == run.summary["weights_digest"]
    found = rates(tmp_path / "a")
    assert found["rate"] == rate
    tried = {rung["rate"]: rung for rung in found["ladder"]}
    furthest = max(max(map(int, rung["losses"]), default=0) for rung in tried.values())
    last = {r: rung["losses"].get(str(furthest), math.inf) for r, rung in tried.items()}
    assert rate == min((r for r in last if "failed" not in tried[r]), key=last.__getitem__)


def test_a_resumed_run_keeps_its_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_rate", lambda _: FoundRate(0.21, "search"))
    fedraclora.simulate(*WORDS, *FAST, "rounds=1", folder=tmp_path)
    monkeypatch.setattr(runner, "find_rate", None)
    again = fedraclora.simulate(*WORDS, *FAST, "rounds=2", folder=tmp_path, resume=True)
    assert rate_used(again) == 0.21


@pytest.mark.slow
def test_a_search_is_deterministic_and_stays_within_its_share() -> None:
    config = from_plain(composed([*WORDS, "output.dir=null"]), METHODS)
    one, other = (find_rate(RunBuilder(config)) for _ in range(2))
    assert (one.rate, one.ladder) == (other.rate, other.ladder)
    assert 0 < one.share <= SHARE
    assert one.trained == round(one.share * 640)


def test_a_number_of_the_users_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_rate", None)
    run = fedraclora.simulate(*WORDS, "local.lr=0.37", "rounds=1")
    assert rate_used(run) == 0.37


@pytest.mark.parametrize("first", [pytest.param(1e-4, marks=pytest.mark.slow), 300.0])
def test_a_first_rate_far_off_is_left(first: float, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [*WORDS, "rounds=200", "output.dir=null"]
    run = RunBuilder(from_plain(composed(words), METHODS))
    monkeypatch.setattr(rate_search, "rule_rate", lambda *_: first)
    assert 0.05 < find_rate(run).rate < 10


LEFT = (["method=bernoulli_lora"], ["method=fed_rac_lora", "method.train=A"])


@pytest.mark.parametrize("method", LEFT, ids=["by turns", "always"])
@pytest.mark.parametrize("rounds", [160, 40])
def test_rounds_of_left_sketches_keep_the_rate_of_the_rule(
    method: list[str], rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bernoulli-LoRA took a third of the best rate on digits, and ended eight points lower."""
    words = [*WORDS, f"rounds={rounds}", "output.dir=null", *method]
    run = RunBuilder(from_plain(composed(words), METHODS))
    monkeypatch.setattr(rate_search, "rule_rate", lambda *_: 2.0)
    assert find_rate(run).rate == 2.0
    monkeypatch.setattr(rate_search, "falls_late", lambda *_: False)
    assert find_rate(run).rate < 2.0


def test_rounds_of_left_sketches_have_another_rate_if_that_of_the_rule_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [*WORDS, "output.dir=null", "method=fed_rac_lora", "method.train=A"]
    run = RunBuilder(from_plain(composed(words), METHODS))
    monkeypatch.setattr(rate_search, "rule_rate", lambda *_: 100.0)
    assert 0.05 < find_rate(run).rate < 10


def test_a_short_run_leaves_a_rate_at_which_the_loss_rises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ferret on SmolLM2 kept the rate of whole weights, and ended at ten times its first loss."""
    few = ["method=ferret", "method.directions=2", "output.dir=null"]
    run = RunBuilder(from_plain(composed([*WORDS, *few, "rounds=3"]), METHODS))
    monkeypatch.setattr(rate_search, "first_rate", lambda *_: 1.2)
    found = find_rate(run)
    ladder: Any = found.ladder
    taken, left = ladder
    assert (found.rate, left["rate"]) == (taken["rate"], 1.2)
    assert "risen" in left["failed"]
    assert left["losses"][2] > 2 * left["losses"][1]


@pytest.mark.slow
def test_test_samples_are_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunBuilder(from_plain(composed([*WORDS, "output.dir=null"]), METHODS))
    rate = find_rate(run).rate
    run.task.test.target.zero_()
    for each in run.task.test.inputs.values():
        each.zero_()
    assert find_rate(run).rate == rate


def network() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Linear(12, 3))


def own_run(train: Callable[[Round], Trained]) -> RunResult:
    """A run of three classes, trained by a function of the user's."""
    x = torch.randn(160, 6, generator=torch.Generator().manual_seed(0))
    data = [(part, part[:, :3].argmax(1)) for part in x.split(20)]
    words = ("rounds=40", "evaluate.every=40", "output.progress=false", "clients_per_round=4")
    return fedraclora.simulate(*words, model=network(), data=data, train=train)


@pytest.mark.slow
def test_a_function_of_the_users_gets_the_rate_by_rate_scale() -> None:
    def train(round_: Round) -> Trained:
        return plain_steps(round_, 30.0 * round_.rate_scale)

    run = own_run(train)
    assert rate_used(run) < 1
    begins: Any = run.summary["begins"]
    assert "factor" in begins["found_rate"]
    metrics = run.summary["metrics"]
    assert metrics["loss"] < 0.8  # type: ignore[index]  # untrained 1.1


@pytest.mark.slow
def test_a_function_that_reads_no_rate_scale_is_left_alone() -> None:
    def train(round_: Round) -> Trained:
        return plain_steps(round_, 0.1)

    run = own_run(train)
    assert rate_used(run) == 1.0


def test_under_privacy_the_rule_gives_it_or_a_number_is_asked_for() -> None:
    private = [
        *WORDS,
        "privacy=client_level",
        "privacy.noise_multiplier=1.0",
        "aggregation_weights=uniform",
        "output.dir=null",
    ]
    found = find_rate(RunBuilder(from_plain(composed(private), METHODS)))
    assert (found.rate, found.ladder) == (pytest.approx(1.1, rel=0.05), ())
    with pytest.raises(ConfigError, match=r"local\.lr=auto.*local\.lr=NUMBER"):
        find_rate(RunBuilder(from_plain(composed([*private, "method=fedavg"]), METHODS)))


def test_under_secure_aggregation_no_round_is_tried() -> None:
    """It asked two clients for a sum, which secure aggregation refuses."""
    few = ["clients=5", "clients_per_round=5", "rounds=1"]
    secure = ["secure=secagg", "aggregation_weights=uniform"]
    run = fedraclora.simulate(*WORDS, *few, *secure)
    assert rate_used(run) == pytest.approx(1.1, rel=0.05)


class Stuck(torch.nn.Module):
    """A network that learns nothing: its outputs are its inputs' or zeros, whatever is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = torch.nn.Linear(6, 12), torch.nn.Linear(12, 3, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.last(torch.relu(self.first(x) - 1e6))
        return output


@pytest.mark.parametrize("kind", ["learns", "stuck", "random"])
def test_a_run_that_stays_where_it_began_says_so_and_no_other(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1600, 6, generator=generator)
    drawn = torch.randint(3, (1600,), generator=generator)
    target = drawn if kind == "random" else x[:, :3].argmax(1)
    data = [*zip(x.split(200), target.split(200), strict=True)]
    model = Stuck() if kind == "stuck" else network()
    found = fedraclora.simulate("evaluate.every=12", model=model, data=data, rounds=12)
    assert ("unmoved" in found.summary) == (kind != "learns")
    assert ("training did not move" in capsys.readouterr().err) == (kind != "learns")


def test_where_nothing_trains_it_says_so() -> None:
    def train(round_: Round) -> Trained:
        raise ValueError("never")

    with pytest.raises(ClientError, match="never"):
        own_run(train)


def plain_steps(round_: Round, rate: float) -> Trained:
    """Train a client by three steps of SGD on all its samples."""
    model = round_.install(network())
    inputs, target = round_.data
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = list[float]()
    for _ in range(3):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(inputs), target)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return round_.read(model, samples=len(target), steps=3, loss=sum(losses) / 3)


def test_after_few_rounds_the_rule_of_adaptive_optimizers_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MiniLM took a third of the rule's rate by two rounds, and ended ten points lower."""
    words = [*TASK, "rounds=20", "local=adamw", "output.dir=null"]
    run = RunBuilder(from_plain(composed(words), METHODS))
    monkeypatch.setattr(rate_search, "rule_rate", lambda *_: 1e-4)
    found = find_rate(run)
    ladder: Any = found.ladder
    assert max(n for rung in ladder for n in rung["losses"]) < 4
    assert min(ladder, key=lambda rung: min(rung["losses"].values()))["rate"] != 1e-4
    assert found.rate == 1e-4


LATE = (*TASK, "method=fedavg_lora", "rounds=14", "evaluate.every=14")


def diverging(rate: float) -> Callable[[RunBuilder], FoundRate]:
    """A search that finds a rate at which training diverges, at 0.56 in round 10."""
    return lambda _: FoundRate(rate, "search")


@pytest.mark.parametrize("where", [pytest.param("folder", marks=pytest.mark.slow), "memory"])
def test_a_run_that_diverges_at_the_rate_it_found_begins_anew_lower(
    where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "find_rate", diverging(0.56))
    begun, folder = list[dict[str, Any]](), tmp_path / "a" if where == "folder" else None

    class Begun(Callback):
        def begin(self, run: RunStart) -> None:
            begun.append(dict(run.facts))

    run = fedraclora.simulate(*LATE, folder=folder, callbacks=[Begun()])
    assert len(begun) == 2
    shown = capsys.readouterr().err
    assert "at 0.56" in shown
    assert shown.count("Federated learning of") == 1
    told = fedraclora.simulate(*LATE, "local.lr=0.31", "output.progress=false")
    assert rate_used(run) == 0.31
    assert told.summary["weights_digest"] == run.summary["weights_digest"]
    assert [row["round"] for row in run.rows] == [*range(15)]
    if folder is not None:
        assert rates(folder)["diverged"] == [0.56]
        stored = read_ledger(folder / "ledger.jsonl")
        assert [row["round"] for row in stored] == [*range(15)]
        again = fedraclora.simulate(*LATE, "rounds=15", folder=folder, resume=True)
        assert rate_used(again) == 0.31


def test_a_run_whose_loss_rises_far_above_its_first_begins_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """DeComFL ended with a loss of 5e23, and no number that was not finite."""
    monkeypatch.setattr(runner, "find_rate", diverging(1.0))
    words = (*TASK, "method=decomfl", "rounds=12", "evaluate.every=12", "output.progress=false")
    run = fedraclora.simulate(*words)
    assert rate_used(run) < 1
    assert all(number(row, "train_loss") < 25 for row in run.rows[1:])


def test_a_run_that_diverges_at_every_rate_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_rate", diverging(1e12))
    begun = list[RunStart]()

    class Begun(Callback):
        def begin(self, run: RunStart) -> None:
            begun.append(run)

    with pytest.raises(DivergenceError, match=r"local\.lr"):
        fedraclora.simulate(*LATE, "output.progress=false", callbacks=[Begun()])
    assert len(begun) == 1 + RESTARTS


def test_a_run_begins_anew_with_the_users_steps_as_new(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "find_rate", diverging(0.56))

    class Counting(RoundStep):
        rounds = 0

        @override
        def send(self, sent: RoundInstructions, state: State) -> RoundInstructions:
            self.rounds += 1
            assert self.rounds <= 14  # of 24, if it went on counting
            return sent

    run = fedraclora.simulate(*LATE, "output.progress=false", steps=[Counting()])
    assert rate_used(run) == 0.31


@pytest.mark.slow
def test_rates_that_do_not_differ_leave_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that hardly moves in a few rounds took the smallest rate, and learnt nothing."""
    config = from_plain(composed([*WORDS, "method=decomfl", "output.dir=null"]), METHODS)
    monkeypatch.setattr(rate_search, "rule_rate", lambda *_: 1e-4)
    assert find_rate(RunBuilder(config)).rate == 1e-4


def test_a_run_that_diverges_under_an_attack_names_a_rule_against_it(tmp_path: Path) -> None:
    words = ("rounds=30", "output.progress=false", *TASK, *FAST, "local.lr=1e6")
    for name, more in (("a", ("attack=sign_flip",)), ("b", ())):
        with pytest.raises(DivergenceError) as raised:
            fedraclora.simulate(*words, *more, folder=tmp_path / name)
        (note,) = raised.value.__notes__
        assert note.startswith("in round 1")
        assert ("aggregator=geometric_median" in note) is bool(more)


@pytest.mark.slow
def test_a_run_that_diverges_goes_on_from_its_last_good_round(tmp_path: Path) -> None:
    """It offers the words, and they work: the rate may change, which it may not otherwise."""
    words = ("method=fedmomentum", "rounds=30", "output.progress=false", *TASK, *FAST)
    folder = tmp_path / "a"
    with pytest.raises(DivergenceError) as raised:
        fedraclora.simulate(*words, "local.lr=0.5", "evaluate.every=30", folder=folder)
    (note,) = raised.value.__notes__
    kept = checkpoint_meta(folder)["round"]
    assert f"round {kept}" in note
    offered = shlex.split(note.partition("fedraclora simulate ")[2])
    with pytest.raises(SystemExit) as ended:
        cli.main(["simulate", *offered])
    assert not ended.value.code
    rows = read_ledger(folder / "ledger.jsonl")
    assert [row["round"] for row in rows] == [*range(31)]
    assert read_summary(folder)["rounds"] == 30
    with pytest.raises(CheckpointError, match=r"local\.lr"):
        fedraclora.simulate(*words, "local.lr=0.1", folder=folder, resume=True)
