"""SCAFFOLD over methods: whole runs against dense algebra, and who keeps what.

The reference knows effective weights and gradients of full weights alone: with P the projection on
what a round trains (times its scale), a local step is ``W <- W - eta P(G + C - C_k)``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from typing_extensions import override
from worlds import (
    RAGGED,
    Run,
    World,
    assert_close_trees,
    assert_equal_trees,
    divide,
    label,
    least_squares,
    make_method,
    make_world,
    run,
)

from fedraclora.aggregation.robust import Krum, Median, NormBound
from fedraclora.aggregation.server_optimizers import Momentum
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES
from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.privacy.secagg import SecAgg
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.method import Cohort, Draw, Method, RoundInstructions, State
from fedraclora.rng import generator, torch_normal
from fedraclora.strategies.steps.scaffold import ControlVariates
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.training.extras.variates import with_variates
from fedraclora.tree import Tree
from fedraclora.wire.exchange import payload_bytes
from tests.reference.client import train_one

Variant = tuple[str, dict[str, Any]]
STEPS = LocalSettings(lr=0.03, steps=3, batch_size=0, shuffle=False)
COHORT, SEED = 3, 1
VARIANTS: list[Variant] = [
    ("fedavg", {}),
    ("ffa_lora", {}),
    ("fed_rac_lora", {}),
    ("fed_rac_lora", {"train": "A", "sketch": "gaussian"}),
    ("fed_rac_lora", {"merge_every": 2, "sketch": "gaussian"}),
    ("rolora", {}),
    ("bernoulli_lora", {}),
]


def corrected(world: World, method: Method, rounds: int, **more: Any) -> Run:
    local = more.pop("local", STEPS)
    treatment = dict(**more.pop("beside", {}), control_variates=True)
    return run(
        world, method, local, rounds=rounds, cohort=COHORT, seed=SEED, treatment=treatment, **more
    )


def directions(sent: RoundInstructions, weight: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """How a step moves the effective weight, the part of C that is seen, and whether on the left.

    Right: W <- W - eta (..) s^2 A^T A, and C on the row space of A.
    """
    if weight not in sent.adapters:
        eye = torch.eye(sent.dense[weight].shape[1]).double()
        return eye, eye, False
    adapter = sent.adapters[weight]
    left = adapter.factors["A"].trained
    frozen = adapter.factors["B" if left else "A"]
    F = frozen.draw().double()
    if left:
        return adapter.scale**2 * F @ F.T, F @ torch.linalg.pinv(F), True
    return adapter.scale**2 * F.T @ F, torch.linalg.pinv(F) @ F, False


@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_a_run_is_scaffold_on_the_weights_that_it_trains(variant: Variant) -> None:
    """Five clients of unequal sizes, three a round; W, C and C_k dense, gradients written out."""
    world = least_squares()
    method, name = make_method(variant[0], **variant[1]), "fc1.weight"
    data = world.task.train
    N = world.clients
    W = world.base[name].clone()
    C, own = torch.zeros_like(W), [torch.zeros_like(W) for _ in range(N)]
    plain = run(world, method, STEPS, rounds=4, cohort=COHORT, seed=SEED).weights[name]
    for t in range(1, 5):
        state = corrected(world, method, t - 1).strategy.state
        cohort = draw_cohort(SEED, t, N, COHORT)
        sizes = data.sizes(cohort)
        sent = method.open_round(state, t, Cohort(cohort, sizes.double()), Draw(SEED))
        moves, sees, left = directions(sent, name)
        ends, changes = [], []
        for k, size in zip(cohort.tolist(), sizes.tolist(), strict=True):
            batch = data.gather(torch.tensor([k]), torch.arange(size)[None])
            x, y = batch.inputs["x"], batch.target
            now, total = W.clone(), torch.zeros_like(W)
            for _ in range(3):
                leaf = now.clone().requires_grad_()
                loss = world_loss(world, x, y, leaf)
                (G,) = torch.autograd.grad(loss, leaf)
                step = G + C - own[k]
                now = now - 0.03 * (moves @ step if left else step @ moves)
                total += G / 3
            gap = total - own[k]
            changes.append(sees @ gap if left else gap @ sees)
            ends.append(now)
            own[k] = own[k] + changes[-1]
        p = sizes.double() / sizes.sum()
        W = sum(q * end for q, end in zip(p, ends, strict=True))  # type: ignore[assignment]
        mean = sum(q * change for q, change in zip(p, changes, strict=True))
        C = C + COHORT / N * mean
        found = corrected(world, method, t).weights[name]
        torch.testing.assert_close(found, W, rtol=0, atol=1e-10)
    assert float((W - plain).abs().max()) > 1e-3, "the correction does nothing"


def world_loss(
    world: World, x: torch.Tensor, y: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    losses, counts = LOSSES[world.task.loss](x @ weight.T, y)
    return losses.sum() / counts.sum()


def test_a_fixed_sketch_has_the_same_run_in_either_form() -> None:
    """FFA-LoRA keeps r m numbers a client; kept dense it would come to the same weights."""
    world = make_world()
    method = make_method("ffa_lora")
    small = corrected(world, method, 4)

    class Dense(ControlVariates):
        @override
        def begin(self, state: State) -> None:
            self.lifted = True

    large = run(world, method, STEPS, rounds=4, cohort=COHORT, seed=SEED, steps=[Dense()])
    assert_close_trees(small.weights, large.weights, tolerance=1e-10)
    held = [
        sum(t.numel() for n, t in done.strategy.state.moments.items() if n.startswith("variates/"))
        for done in (small, large)
    ]
    assert held[0] < held[1]


@pytest.mark.parametrize("per_client", [False, True])
@pytest.mark.parametrize("name", ["fedavg_lora", "fed_rac_lora", "fedavg"])
def test_the_batch_of_clients_adds_what_the_one_client_loop_adds(
    name: str, per_client: bool
) -> None:
    world = make_world()
    method, clients = make_method(name), torch.tensor([0, 1, 3, 4])
    state = method.initial_state(world.base, world.plan, Draw(2))
    sent = method.open_round(state, 1, Cohort(clients, torch.ones(4).double()), Draw(2))
    rng = generator(4, "variates")
    lead = (4,) if per_client else ()
    variates = {n: torch_normal(rng, *lead, *s.shape) for n, s in sent.trained().items()}
    sent = with_variates(sent, variates, lifted=False)
    local = replace(RAGGED, momentum=0.0)
    trainer = CohortTrainer(world.task, world.plan, local, seed=2, device=torch.device("cpu"))
    result = trainer.train(world.base, sent, clients, round_=1, rate_scale=1.0)
    for place, client in enumerate(clients.tolist()):
        wanted, _ = train_one(
            world.task, world.plan, local, world.base, sent, client=client, place=place, round_=1,
            seed=2,
        )  # fmt: skip
        for key, value in wanted.items():
            torch.testing.assert_close(result.trained[key][place], value, rtol=0, atol=1e-10)
    part = trainer.train(
        world.base, sent.select(torch.tensor([2])), clients[2:3], round_=1, rate_scale=1.0
    )
    for key, value in part.trained.items():
        torch.testing.assert_close(value[0], result.trained[key][2], rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["ffa_lora", "fed_rac_lora", "fedavg_lora"])
def test_replies_may_come_in_any_order(name: str) -> None:
    world, method = make_world(dtype=torch.float32), make_method(name)
    beside = {"server_optimizer": Momentum(beta=0.5)}
    whole = corrected(world, method, 3, beside=beside)
    turned = corrected(world, method, 3, beside=beside, arrange=lambda m: m[::-1])
    assert_equal_trees(turned.strategy.state.base, whole.strategy.state.base)
    assert_equal_trees(turned.strategy.state.moments, whole.strategy.state.moments)
    assert_equal_trees(turned.worker.store.state(), whole.worker.store.state())


def test_what_comes_down_is_counted_and_what_goes_up_is_the_methods() -> None:
    world, method = make_world(), make_method("fed_rac_lora")
    with_, without = (
        corrected(world, method, 2),
        run(world, method, STEPS, rounds=2, cohort=COHORT, seed=SEED),
    )
    state = method.initial_state(world.base, world.plan, Draw(SEED))
    sent = method.open_round(state, 1, Cohort(torch.arange(3), torch.ones(3)), Draw(SEED))
    trained = sum(torch.Size(s.shape).numel() for s in sent.uploaded().values())
    for one, two in zip(with_.rows, without.rows, strict=True):
        assert one["uplink_bytes"] == two["uplink_bytes"]
        assert one["downlink_bytes"] == two["downlink_bytes"] + COHORT * 8 * trained
    assert payload_bytes(sent, 3, "float64") * COHORT == without.rows[0]["downlink_bytes"]


def population_mean(done: Run) -> Tree:
    """The mean of what clients keep, over all of them; those who keep nothing count as zero."""
    moments, store = done.strategy.state.moments, done.worker.store
    blank = {n: torch.zeros_like(t) for n, t in moments.items() if n.startswith("variates/")}
    kept = store.read(torch.arange(done.strategy.loop.clients), 99, blank)
    return {n: t.mean(dim=0) for n, t in kept.items()}


def servers(done: Run) -> Tree:
    return {n: t for n, t in done.strategy.state.moments.items() if n.startswith("variates/")}


CLIP = 0.02  # of the longest updates here it leaves a tenth


@pytest.mark.short(when=lambda variant, secure: not secure or variant[0] == "fed_rac_lora")
@pytest.mark.parametrize("secure", [False, True], ids=["plain", "secagg"])
@pytest.mark.parametrize("variant", VARIANTS, ids=label)
def test_the_servers_variate_is_the_mean_of_the_clients(variant: Variant, secure: bool) -> None:
    """Also where clients clip what they send: c_k is that of the update which the server saw."""
    world, method = make_world(), make_method(variant[0], **variant[1])
    beside: dict[str, Any] = {}
    if secure:
        beside = {"secure": SecAgg(clip=CLIP, max_weight=1, neighbours=2, threshold=0.6)}
    treatment = dict(**beside, control_variates=True)
    done = run(
        world, method, STEPS, rounds=5, cohort=COHORT, weights="uniform", treatment=treatment
    )
    found = servers(done)
    assert max(float(t.abs().max()) for t in found.values()) > 1e-3
    # RoLoRA's dense estimates go through the pseudoinverse of a B that is hardly there yet.
    tolerance = 1e-10 if variant[0] == "rolora" else 1e-12
    assert_close_trees(found, population_mean(done), tolerance)
    if secure:
        free = run(
            world, method, STEPS, rounds=5, cohort=COHORT, weights="uniform",
            treatment={"control_variates": True},
        )  # fmt: skip
        gaps = [float((found[n] - t).abs().max()) for n, t in servers(free).items()]
        assert max(gaps) > 1e-2, "the clip does nothing"


@pytest.mark.parametrize(
    "variant", [("ffa_lora", {}), ("fedavg", {}), ("fed_rac_lora", {})], ids=label
)
def test_in_fewer_bits_variates_are_of_what_was_sent(variant: Variant) -> None:
    """Both ways: clients have taken steps with the c that went down, which was rounded."""
    world, method = make_world(), make_method(variant[0], **variant[1])
    done = corrected(world, method, 5, weights="uniform", uplink="int4", downlink="int8")
    assert all(row["rounding_up"] > 0.05 for row in done.rows)
    assert_close_trees(servers(done), population_mean(done), 1e-9)


def test_a_client_whose_masked_update_does_not_go_out_keeps_what_it_had() -> None:
    """The one with nine samples may not send a weight above eight: the sum is without it."""
    secure = SecAgg(clip=CLIP, max_weight=8, neighbours=4, threshold=0.6)
    treatment = {"secure": secure, "control_variates": True}
    world = make_world()
    more: dict[str, Any] = {"rounds": 3, "max_failures": 1, "treatment": treatment}
    done = run(world, make_method("fed_rac_lora"), STEPS, **more)
    assert [[f["client"] for f in row["failures"]] for row in done.rows] == [[1]] * 3
    assert {client for client, _ in done.worker.store.state()["store/keys"].tolist()} == {
        0,
        2,
        3,
        4,
    }


@pytest.mark.parametrize(
    ("beside", "told"),
    [
        ({"aggregator": NormBound(bound=0.5)}, "aggregator=norm_bound.*unchanged"),
        ({"aggregator": Median()}, "aggregator=median.*unchanged"),
        ({"aggregator": Krum(attackers=0)}, "aggregator=krum.*unchanged"),
        ({"privacy": ClientLevel(clip=0.5, delta=0.01)}, "privacy=client_level: the noise"),
        (
            {"privacy": ClientLevel(clip=0.5, delta=0.01, quantile=0.5)},
            "privacy=client_level: the noise",
        ),
    ],
    ids=lambda v: str(v)[:40],
)
def test_what_changes_updates_at_the_server_is_refused(beside: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        corrected(make_world(), make_method("fed_rac_lora"), 1, beside=beside, weights="uniform")


@pytest.mark.parametrize(
    ("name", "changes", "local", "told"),
    [
        ("fed_rac_lora", {}, RAGGED, "local.steps=1 or more"),
        ("fed_rac_lora", {}, replace(STEPS, momentum=0.5), "local.momentum=0.5"),
        ("fed_rac_lora", {}, replace(STEPS, clip=1.0), "local.clip=1.0"),
        ("fed_rac_lora", {}, replace(STEPS, optimizer="adamw"), "local.optimizer=adamw"),
        ("fed_rac_lora", {}, replace(STEPS, dp=SampleNoise(0.2, 0.5)), "local.dp="),
        ("fed_rac_lora", {}, replace(STEPS, prox=0.1), "local.prox=0.1"),
        ("fedavg_lora", {}, replace(STEPS, adjust="riemannian"), "local.adjust=riemannian"),
        ("fedavg_lora", {}, replace(STEPS, gate_penalty=0.5), "local.gate_penalty=0.5"),
        ("fed_rac_lora", {"sketches": 2}, STEPS, "other factors for each"),
        ("fedsa_lora", {}, STEPS, "part of the model at each client"),
        ("flora_stacking", {}, STEPS, "its server changes the factors"),
        ("fedavg_lora", {"merge_every": 3}, STEPS, "restarted its trained factors"),
        ("frlora", {}, STEPS, "restarted its trained factors"),
        ("slora", {}, STEPS, "client program sparse"),
    ],
    ids=lambda v: str(v)[:24],
)
def test_what_control_variates_are_not_defined_for_is_refused(
    name: str, changes: dict[str, Any], local: LocalSettings, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        corrected(make_world(), make_method(name, **changes), 1, local=local)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fedavg", "fed_rac_lora"])
def test_drift_of_unlike_clients_is_taken_out(name: str) -> None:
    """Each client has a target of its own: plain local steps end beside the common optimum."""
    world = least_squares((6, 6, 6, 6, 6))
    samples = world.task.test
    shifts = torch_normal(generator(8, "shifts"), 5, 5).repeat_interleave(6, dim=0)
    x, y = samples.inputs["x"], samples.target
    moved = Samples({"x": x}, y + shifts * x[:, :1])
    task = replace(world.task, train=divide(moved, (6,) * 5), test=moved)
    world = replace(world, task=task)
    best = torch.linalg.lstsq(x, moved.target).solution.T
    optimum = world.loss({"fc1.weight": best})
    gaps = [
        world.loss(
            run(
                world,
                make_method(name),
                replace(STEPS, steps=20),
                rounds=30,
                weights="uniform",
                treatment={"control_variates": on},
            ).weights
        )
        - optimum
        for on in (False, True)
    ]
    assert gaps[1] < 0.05 * gaps[0]
