"""Methods that send numbers along drawn directions, held against plain numpy, from their rules."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from worlds import (
    SIZES,
    LocalSettings,
    Run,
    World,
    assert_close_trees,
    assert_updates_lead_on,
    make_world,
    run,
)

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.devices.system import SystemConfig
from fedraclora.errors import ConfigError
from fedraclora.privacy.client_level import ClientLevel, Mechanism
from fedraclora.privacy.secagg import SecAgg
from fedraclora.privacy.secret import Secret
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.method import Cohort, Method
from fedraclora.rng import cohort_bits, generator, hash_key
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.decomfl import DeComFl
from fedraclora.strategies.methods.fedkseed import SUMS, FedKSeed
from fedraclora.strategies.methods.ferret import Ferret
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.wrappers import method_of
from tests.common import accepted

Array = npt.NDArray[np.float64]
Weights = dict[str, Array]
SEED, ROUNDS, COHORT, LR = 1, 4, 3, 0.2
SAMPLES = np.cumsum([0, *SIZES])
STEPS, STEPS2 = (LocalSettings(lr=LR, steps=steps, batch_size=0, shuffle=False) for steps in (3, 2))


def begun(world: World) -> Weights:
    return {n: t.numpy().copy() for n, t in world.base.items()}


def loss(world: World, W: Weights, client: int) -> float:
    """Mean cross entropy of a client's samples under a network of three hidden layers."""
    first, end = SAMPLES[client : client + 2]
    h = world.task.test.inputs["x"].numpy()[first:end]
    for i in (1, 2, 3):
        h = np.tanh(h @ W[f"fc{i}.weight"].T + W[f"fc{i}.bias"])
    logits = h @ W["head.weight"].T + W["head.bias"]
    own = logits[np.arange(len(h)), world.task.test.target.numpy()[first:end]]
    return float(np.mean(np.log(np.exp(logits).sum(axis=1)) - own))


def direction(W: Weights, number: int) -> Weights:
    """z of the whole model, N(0, I): a drawing for each weight."""
    walk = hash_key(SEED, "sketch", "directions") >> 65
    found = {}
    for name, w in W.items():
        leaf = hash_key(walk, "direction", name) >> 65
        found[name] = generator(leaf, "block", number).standard_normal(w.size).reshape(w.shape)
    return found


def moved(W: Weights, z: Weights, by: float) -> Weights:
    return {n: w + by * z[n] for n, w in W.items()}


def slope(world: World, W: Weights, z: Weights, client: int, eps: float) -> float:
    up, down = (loss(world, moved(W, z, side), client) for side in (eps, -eps))
    return (up - down) / (2 * eps)


def cohorts() -> Iterator[tuple[int, list[int], Array]]:
    """Rounds with their clients, some of whom come back after a while, and their weights."""
    for round_ in range(1, ROUNDS + 1):
        clients = draw_cohort(SEED, round_, len(SIZES), COHORT).tolist()
        p = np.array([SIZES[k] for k in clients], dtype=np.float64)
        yield round_, clients, p / p.sum()


def assert_reached(done: Run, W: Weights, tolerance: float = 1e-9) -> None:
    assert done.weights.keys() == W.keys()
    for name, found in done.weights.items():
        np.testing.assert_allclose(found.numpy(), W[name], rtol=0, atol=tolerance)
    start = make_world().base
    assert max(float((done.weights[n] - start[n]).abs().max()) for n in start) > 0.05


def start(method: Any, folder: Path | None = None, **keys: Any) -> Run:
    return run(make_world(), method, STEPS, rounds=ROUNDS, cohort=COHORT, folder=folder, **keys)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_decomfl_is_its_rules_and_absent_clients_take_the_same_steps(
    momentum: float, tmp_path: Path
) -> None:
    """Clients and server go with one V, which lives on; who was away replays scalars."""
    world, K, P, eps = make_world(), 3, 2, 1e-2
    done = start(DeComFl(steps=K, directions=P, eps=eps, momentum=momentum), tmp_path)
    W, V = begun(world), {n: np.zeros_like(w) for n, w in begun(world).items()}
    for round_, clients, p in cohorts():
        z = {
            (k, i): direction(W, ((round_ - 1) * K + k) * P + i) for k in range(K) for i in range(P)
        }
        sent = np.zeros((len(clients), K, P))
        for at, client in enumerate(clients):
            w, v = W, V
            for k in range(K):
                for i in range(P):
                    sent[at, k, i] = -LR * slope(world, w, z[k, i], client, eps) / P
                v = {
                    n: momentum * v[n] + sum(sent[at, k, i] * z[k, i][n] for i in range(P))
                    for n in v
                }
                w = moved(w, v, 1.0)
        mean = np.tensordot(p, sent, 1)
        for k in range(K):
            V = {n: momentum * V[n] + sum(mean[k, i] * z[k, i][n] for i in range(P)) for n in V}
            W = moved(W, V, 1.0)
    assert_reached(done, W, 1e-8)
    assert_updates_lead_on(tmp_path)
    whole = sum(w.nbytes for w in W.values()) * (2 if momentum else 1)
    assert whole > ROUNDS * (8 * K * P + 8)  # or nobody would replay
    held: dict[int, int] = {}
    for row, (round_, clients, _) in zip(done.rows, cohorts(), strict=True):
        missed = [round_ - 1 - held.get(client, 0) for client in clients]
        held |= dict.fromkeys(clients, round_ - 1)
        assert row["uplink_bytes"] == len(clients) * 8 * K * P
        assert row["downlink_bytes"] == len(clients) * 8
        assert row["catchup_bytes"] == sum(missed) * (8 * K * P + 8)


@pytest.mark.parametrize("form", ["sums", "pairs", "pro"])
def test_fedkseed_is_its_rules_and_costs_k_numbers_however_long_away(
    form: str, tmp_path: Path
) -> None:
    world, K, tau, eps = make_world(), 5, 3, 1e-3
    steps, pro = (None if form == "sums" else tau), form == "pro"
    done = start(FedKSeed(seeds=K, steps=steps, eps=eps, pro=pro), tmp_path)
    W0, C, chances = begun(world), np.zeros(K), np.full(K, 1.0 / K)
    histories = [[0.0] for _ in range(K)]
    z = [direction(W0, j) for j in range(K)]
    walk = hash_key(SEED, "sketch", "directions") >> 65

    def rebuilt() -> Weights:
        return {n: w + sum(C[j] * z[j][n] for j in range(K)) for n, w in W0.items()}

    for round_, clients, p in cohorts():
        W, change, seen = rebuilt(), np.zeros(K), list[tuple[int, float]]()
        for client, share in zip(clients, p, strict=True):
            key, w = hash_key(walk, "visited", round_), W
            bits = cohort_bits(key, torch.tensor([client]), tau)[0].numpy()
            for j in np.searchsorted(chances.cumsum(), (bits + 0.5) / 2**32):
                step = -LR * slope(world, w, z[j], client, eps)
                w = moved(w, z[j], step)
                change[j] += share * step
                seen.append((j, abs(step)))
        C = C + change
        for j, length in seen:
            histories[j].append(length)
        if pro:
            mean = np.array([np.mean(h) for h in histories])
            scaled = np.exp((mean - mean.min()) / (mean.max() - mean.min()))
            chances = scaled / scaled.sum()
    assert_reached(done, rebuilt())
    np.testing.assert_allclose(done.strategy.state.base[SUMS].numpy(), C, atol=1e-10)
    assert_updates_lead_on(tmp_path)
    for row, (round_, clients, _) in zip(done.rows, cohorts(), strict=True):
        assert row["uplink_bytes"] == len(clients) * 8 * (K if steps is None else tau)
        # A newcomer, and one that missed a round or ten, fetch the sums as they are now, once.
        assert row["catchup_bytes"] == (round_ > 1) * len(clients) * 8 * K * (2 if pro else 1)


def test_ferret_is_its_rules() -> None:
    world, directions, rate = make_world(), 8, 0.7
    done = start(Ferret(directions=directions, server_lr=rate))
    W, names = begun(world), list(world.plan.weights) + list(world.plan.dense)
    sizes = [W[n].size for n in names]
    blocks, room = list[list[str]](), 0.0
    for name in names:
        if blocks and W[name].size <= room:
            blocks[-1].append(name)
        else:
            blocks.append([name])
            room = np.floor(0.9 * np.median(sizes))
        room -= W[name].size
    largest = max(sum(W[n].size for n in block) for block in blocks)
    counts = [max(directions * sum(W[n].size for n in b) // largest, 2) for b in blocks]
    assert len(blocks) > 1
    assert sum(counts) == done.strategy.method.floats(world.plan)[0]
    walk = hash_key(SEED, "sketch", "directions") >> 65
    for round_, clients, p in cohorts():
        mean = {n: np.zeros_like(w) for n, w in W.items()}
        for client, share in zip(clients, p, strict=True):
            after = trained(world, W, client)
            mean = {n: mean[n] + share * (after[n] - W[n]) for n in W}
        for block, count in zip(blocks, counts, strict=True):
            moves = {n: np.zeros_like(W[n]) for n in block}
            for j in range(count):
                number, z = (round_ - 1) * sum(counts) + j, dict[str, Array]()
                for n in block:  # uniform, of variance 1
                    drawn = generator(hash_key(walk, "direction", n) >> 65, "block", number)
                    bits = drawn.bit_generator.random_raw(W[n].size) >> np.uint64(11)
                    z[n] = ((2 * bits * 2.0**-53 - 1) * 3**0.5).reshape(W[n].shape)
                gamma = sum(float((mean[n] * z[n]).sum()) for n in block) / count
                moves = {n: moves[n] + rate * gamma * z[n] for n in block}
            W = W | moved({n: W[n] for n in block}, moves, 1.0)
    assert_reached(done, W)


def trained(world: World, W: Weights, client: int) -> Weights:
    """Three plain gradient steps on the samples of a client."""
    values = {n: torch.tensor(w, requires_grad=True) for n, w in W.items()}
    first, end = SAMPLES[client : client + 2]
    x, y = (t[first:end] for t in (world.task.test.inputs["x"], world.task.test.target))
    for _ in range(3):
        output = torch.func.functional_call(world.task.model, values, (x,))
        grads = torch.autograd.grad(
            torch.nn.functional.cross_entropy(output, y), [*values.values()]
        )
        values = {
            n: (v - LR * g).detach().requires_grad_()
            for (n, v), g in zip(values.items(), grads, strict=True)
        }
    return {n: v.detach().numpy() for n, v in values.items()}


@pytest.mark.parametrize("chunk", [1, 3])
def test_bits_do_not_depend_on_the_chunk(chunk: int) -> None:
    method = FedKSeed(seeds=5, steps=3, pro=True)
    whole, cut = start(method, chunk=COHORT), start(method, chunk=chunk)
    for name, value in cut.weights.items():
        # A loss whose last bit differs, over the 1e-3 of a finite difference, is 1e-13 of a slope.
        torch.testing.assert_close(value, whole.weights[name], rtol=0, atol=1e-10)


def test_local_training_ends_where_there_are_no_more_numbers() -> None:
    few, none = (run(make_world(), DeComFl(steps=2), local, rounds=2) for local in (STEPS, STEPS2))
    for name, value in few.weights.items():
        assert torch.equal(value, none.weights[name])


@pytest.mark.parametrize(
    "method",
    [DeComFl(steps=2, directions=2, momentum=0.9), FedKSeed(seeds=5), Ferret(directions=3)],
    ids=["decomfl", "fedkseed", "ferret"],
)
def test_sums_of_scalars_may_be_secret_and_private(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the noise they are the plain mean; single steps are refused, with what to take."""
    monkeypatch.setattr(Mechanism, "noisy_sum", lambda self, total, *rest: total)
    secure, private = SecAgg(clip=50.0), ClientLevel(clip=50.0, noise_multiplier=2.0, delta=1e-3)
    both = {"secure": secure, "privacy": private, "secret": Secret(bytes(32))}
    world, keys = make_world(), {"rounds": 2, "weights": "uniform"}
    plain = run(world, method, STEPS, **keys)
    found = run(world, method, STEPS, **keys, treatment=both)
    assert_close_trees(found.weights, plain.weights, 1e-5)
    for row in found.rows:
        assert row["privacy"]["epsilon"] > 0
        assert row["secure"]["clients"] == len(SIZES)
        assert row["train_loss"] is None
    for treatment in ({"secure": secure}, {"privacy": private}):
        with pytest.raises(ConfigError, match=r"method=fedkseed"):
            run(world, FedKSeed(seeds=5, steps=2), STEPS, **keys, treatment=treatment)


@pytest.mark.parametrize(
    ("method", "most"),
    [
        (DeComFl(steps=3, directions=4), 3),
        (FedKSeed(seeds=5, steps=2), 2),
        (FedKSeed(seeds=5), None),
        (Ferret(), None),
    ],
)
def test_steps_are_an_upper_bound_and_the_clock_counts_those_that_are_taken(
    method: Method, most: int | None
) -> None:
    world, gentle = make_world(), LocalSettings(lr=1e-3, epochs=1, batch_size=4)
    batches = [-(-size // 4) for size in SIZES]  # of an epoch
    taken = batches if most is None else [min(most, count) for count in batches]
    done = run(world, method, gentle, rounds=1)
    answered = torch.cat([answer.steps for _, answer in done.worker.seen])
    assert answered.tolist() == taken
    strategy, everyone = done.strategy, torch.arange(len(SIZES))
    sent = method.open_round(strategy.state, 2, Cohort(everyone, everyone.double()), strategy.draw)
    clock, sizes = DeviceSimulator(SystemConfig(), 0, gentle), torch.tensor(SIZES)
    load = clock.load(everyone, sent, lambda clients: sizes[clients], None, strategy.loop)
    wanted = [min(4 * steps, size) for steps, size in zip(taken, SIZES, strict=True)]
    assert load.passes.tolist() == wanted


def test_what_does_not_go_with_walking_is_refused() -> None:
    with pytest.raises(ConfigError, match="weight_decay"):
        run(
            make_world(),
            DeComFl(steps=3),
            LocalSettings(lr=0.5, steps=3, weight_decay=0.1),
            rounds=1,
        )
    for name in ("decomfl", "fedkseed"):
        words = [f"method={name}", "method.steps=3", "local.steps=2", "data=digits"]
        with pytest.raises(ConfigError, match=r"local\.steps=2.*local\.steps=null"):
            method_of(from_plain(composed([*words, "pretrain=none"]), METHODS))
    with pytest.raises(ConfigError, match="momentum"):
        run(
            make_world(),
            DeComFl(steps=3, momentum=0.9),
            LocalSettings(lr=0.5, steps=3, momentum=0.5),
            rounds=1,
        )
    with pytest.raises(ConfigError, match="random directions"):
        run(make_world(), Ferret(), LocalSettings(lr=0.5), rounds=1, downlink="int8")
    with pytest.raises(ConfigError, match="head=personal"):
        from_plain(composed(["method=fedkseed", "head=personal"]), METHODS)
    with pytest.raises(ConfigError, match=r"method\.steps"):
        accepted("method", FedKSeed(pro=True))
