"""Pools of recurring sketches: parts that add up, what is fetched, and where an era ends."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import nn

import fedraclora
from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.models.built import seeded
from fedraclora.protocol.method import Cohort, Draw, Plan, RoundInstructions, State
from fedraclora.protocol.quantized import rounded
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.pool_rac_lora import Pool, PoolProgram, PoolRacLora
from fedraclora.strategies.server.quantized import RESIDUE, DownlinkRounding
from fedraclora.tree import digest, parameters
from fedraclora.weights.chain import CatchUp, link_tensors, read_link
from fedraclora.weights.replica import Replica
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.exchange import TrainRequest
from tests.common import normal
from tests.messages import pack_downlink, unpack_downlink

M, N, R, ALPHA = 3, 8, 2, 5.0
NAME, DRAW, CPU = "fc.weight", Draw(7), torch.device("cpu")
PLAN = Plan({NAME: LayerView("linear", (M, N))}, shapes={NAME: (M, N)})
SHARES = torch.tensor([1.0, 3.0], dtype=torch.float64)
COHORT = Cohort(torch.tensor([0, 4]), SHARES)


def pools_of(sent: RoundInstructions) -> dict[str, Pool]:
    """What stands beside the weights of a round."""
    return cast(PoolProgram, sent.program).pools


def begun(method: PoolRacLora | FedRacLora, dtype: torch.dtype = torch.float64) -> State:
    return method.initial_state({NAME: normal(M, N).to(dtype)}, PLAN, DRAW)


def after(method: PoolRacLora | FedRacLora, state: State, round_: int) -> State:
    """Close a round in which two clients of unequal weight send drawn numbers."""
    sent = method.open_round(state, round_, COHORT, DRAW)
    rows = drawn(sent, round_).to(state.base[NAME].dtype)
    got = Uplinks(COHORT.clients, SHARES, sent.layout, rows)
    return method.close_round(state, sent, got)


def drawn(sent: RoundInstructions, round_: int) -> torch.Tensor:
    return normal(2, sent.layout.size, key=round_)


def states(method: PoolRacLora | FedRacLora, rounds: int, dtype: torch.dtype) -> list[State]:
    found = [begun(method, dtype)]
    for round_ in range(1, rounds + 1):
        found.append(after(method, found[-1], round_))
    return found


def test_links_under_one_sketch_add_up_by_hand() -> None:
    """Two sketches, three rounds: B^(0) has rounds 1 and 3, B^(1) round 2, and W_0 stays."""
    method = PoolRacLora(rank=R, alpha=ALPHA, sketch="coordinate", pool=2)
    sketches, means = [], []
    state = begun(method)
    for round_ in (1, 2, 3):
        spec = method.open_round(state, round_, COHORT, DRAW).adapters[NAME].factors["A"]
        sketches.append(spec.draw())
        rows = normal(2, M * R, key=round_).reshape(2, M, R)
        means.append((rows[0] + 3 * rows[1]) / 4)
        state = after(method, state, round_)
    assert torch.equal(sketches[0], sketches[2])
    assert not (sketches[0] @ sketches[1].T).any()  # blocks of one basis
    torch.testing.assert_close(state.base[f"{NAME}/B.0"], means[0] + means[2])
    torch.testing.assert_close(state.base[f"{NAME}/B.1"], means[1])
    moved = (means[0] + means[2]) @ sketches[0] + means[1] @ sketches[1]
    wanted = normal(M, N) + ALPHA / R * moved
    torch.testing.assert_close(method.weights(state, DRAW)[NAME], wanted)
    assert torch.equal(state.base[NAME], normal(M, N))
    assert method.weights(state, DRAW).keys() == {NAME}


@pytest.mark.parametrize(("train", "part"), [("B", R * M), ("A", 1 * N)])
def test_an_absent_client_fetches_each_part_once(train: str, part: int) -> None:
    """After q rounds away min(q, K) parts, a newcomer all K; a left sketch has 3 rows for K r."""
    K, rounds = 3, 11
    method = PoolRacLora(rank=R if train == "B" else 1, alpha=ALPHA, train=train, pool=K)
    # n = 8 has room for three sketches of two rows, m = 3 for three of one.
    run = states(method, rounds, torch.float32)
    counted = CatchUp(run[0].base, rounds + 1)
    for held, state in enumerate(run[1:]):
        counted.add(state.link)
        if held + 1 <= rounds:
            counted.fetch(torch.arange(held + 1, rounds + 1))  # client k is last seen at version k
    missing = counted.missing(torch.arange(rounds + 1)).tolist()
    assert missing == [min(rounds - k, K) * part * 4 for k in range(rounds + 1)]
    again = CatchUp(run[0].base, rounds + 1)
    again.restore(counted.state() | {f"base/{n}": t for n, t in run[-1].base.items()})
    assert again.missing(torch.arange(rounds + 1)).tolist() == missing


@pytest.mark.parametrize("refresh", [None, 4])
def test_whoever_joins_has_the_bits_of_the_server(refresh: int | None) -> None:
    """From any version, and from a model that has never heard of parts, in float32."""
    method = PoolRacLora(rank=R, alpha=ALPHA, pool=3, refresh=refresh)
    run = states(method, 7, torch.float32)
    links = [read_link(*link_tensors(s.link)) for s in run[1:] if s.link]  # as the chain has them
    history = WeightHistory()
    history.recall(run[-1].base, enumerate(links, start=1), 7)
    for held, state in enumerate(run):
        replica = Replica(PLAN, CPU)
        replica.take(parameters(state.base) if held == 0 else state.base, held, None)
        update = history.since(held)
        assert update.start == held
        assert replica.follow(update)
        filled = {n: t for n, t in replica.base.items() if t.numel()}
        assert digest(filled) == digest({n: t for n, t in run[-1].base.items() if t.numel()})
        found = method.weights(replace(run[-1], base=replica.base), DRAW)
        assert torch.equal(found[NAME], method.weights(run[-1], DRAW)[NAME])


def test_a_refresh_moves_no_bit_and_empties_the_pool() -> None:
    kept = PoolRacLora(rank=R, alpha=ALPHA, pool=2)
    folded = replace(kept, refresh=4)
    ends = [states(m, 4, torch.float32)[-1] for m in (kept, folded)]
    weights = [m.weights(s, DRAW)[NAME] for m, s in zip((kept, folded), ends, strict=True)]
    assert torch.equal(*weights)
    assert torch.equal(ends[1].base[NAME], weights[0])
    assert not any(t.numel() for n, t in ends[1].base.items() if n != NAME)
    assert (kept.traits.merges, folded.traits.merges) == (False, True)
    sent = folded.open_round(ends[1], 5, COHORT, DRAW)
    assert (pools_of(sent), sent.adapters[NAME].factors["A"].drawing.index) == ({}, 2)  # type: ignore[union-attr]


@pytest.mark.parametrize("train", ["B", "A"])
def test_what_is_published_is_off_by_one_rounding_however_often(train: str) -> None:
    """By hand: S in float64 at the server, Q(S) everywhere else, where a pool is folded too."""
    rank = R if train == "B" else 1
    method = PoolRacLora(rank=rank, alpha=ALPHA, train=train, pool=2, refresh=6)
    rounding, kept = DownlinkRounding("int4", 5), replace(method, refresh=None)
    label, dim = ("B", 1) if train == "B" else ("A", 0)
    state, sums = begun(method, torch.float32), [0.0, 0.0]
    for round_ in range(1, 7):
        sent = method.open_round(state, round_, COHORT, DRAW)
        one, other = drawn(sent, round_).double()
        mean = (one + 3 * other) / 4
        part, place = f"{NAME}/{label}.{(round_ - 1) % 2}", (round_ - 1) % 2
        sums[place] = sums[place] + mean.reshape(sent.trained()[f"{NAME}/{label}"].shape)
        before, state = state, rounding.closed(state, after(method, state, round_), sent, round_)
        if round_ < 6:
            rng = generator(5, "downlink", round_, "link", part)
            wanted = rounded(sums[place], "int4", rng)
            assert torch.equal(state.base[part].double(), wanted)
            assert state.link is not None
            assert read_link(*link_tensors(state.link)).dense[part].dtype == torch.float32
            assert torch.equal(read_link(*link_tensors(state.link)).dense[part], state.base[part])
    rng = generator(5, "downlink", 6, "link", 0, NAME, 0 if train == "B" else 1)
    folded = rounded(torch.cat(sums, dim), "int4", rng)  # type: ignore[arg-type]
    sketches = kept.pools(before, DRAW)[NAME].frozen.draw()
    product = folded @ sketches if train == "B" else sketches @ folded
    W = (before.base[NAME].double() + ALPHA / rank * product).float()
    torch.testing.assert_close(state.base[NAME], W, rtol=0, atol=0)
    assert not any(name.startswith(RESIDUE) for name in state.moments)


def test_a_pool_that_tiles_and_is_refreshed_with_each_pass_is_a_cover() -> None:
    """K r = n, E = K: the sketches and the weights of fed_rac_lora blocks=cover."""
    cover = FedRacLora(rank=R, alpha=ALPHA, blocks="cover")
    pool = PoolRacLora(rank=R, alpha=ALPHA, pool=N // R, refresh=N // R)
    for one, other in zip(*(states(m, 9, torch.float64) for m in (cover, pool)), strict=True):
        wanted, found = cover.weights(one, DRAW)[NAME], pool.weights(other, DRAW)[NAME]
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_a_pool_reaches_the_span_of_its_sketches_and_no_more() -> None:
    """Steps of 1/L on (1/2) ||W - Y||^2: a pass ends on the floor of the theory, section 5."""
    method, target = PoolRacLora(rank=R, alpha=ALPHA, pool=3), normal(M, N, key=99)
    state = begun(method)
    loss = []
    for round_ in range(1, 7):
        sent = method.open_round(state, round_, COHORT, DRAW)
        A = sent.adapters[NAME].factors["A"].draw()
        gradient = method.weights(state, DRAW)[NAME] - target
        row = (-R / ALPHA * gradient @ A.T).reshape(1, -1)  # s B A is the projected step
        got = Uplinks(COHORT.clients, SHARES, sent.layout, row.expand(2, -1))
        state = method.close_round(state, sent, got)
        loss.append(float((method.weights(state, DRAW)[NAME] - target).square().sum() / 2))
    rows = method.pools(state, DRAW)[NAME].frozen.draw()
    outside = (normal(M, N) - target) @ (torch.eye(N).double() - rows.T @ rows)
    floor = float(outside.square().sum() / 2)
    assert loss[1] > 1.01 * floor > 0.01
    assert loss[2:] == pytest.approx([floor] * 4, rel=1e-12)


def test_a_fraction_of_one_tiles_every_layer() -> None:
    method = PoolRacLora(rank="full", pool=4)
    sent = method.open_round(states(method, 5, torch.float64)[-1], 6, COHORT, DRAW)
    drawn = pools_of(sent)[NAME].frozen.draw()
    torch.testing.assert_close(drawn.T @ drawn, torch.eye(N).double())


def test_a_message_names_the_pool_and_has_none_of_its_parts() -> None:
    method = PoolRacLora(rank=R, alpha=ALPHA, pool=3)
    state = states(method, 5, torch.float32)[-1]
    sent = method.open_round(state, 6, COHORT, DRAW)
    packed = pack_downlink(sent, TrainRequest(6, 5, 1.0, COHORT.clients), "float32")
    assert unpack_downlink(packed)[0] == sent
    assert packed["arrays"]["flat"].numpy().size == 0


# --- runs ----------------------------------------------------------------------------------------


def simulated(folder: Path, rounds: int, **keys: object) -> fedraclora.RunResult:
    x = normal(75, 12, key=50).float()
    *clients, test = [(x[k::5], (x[k::5, 0] > 0).long()) for k in range(5)]
    with seeded(0, "model"):
        model = nn.Sequential(nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 2))
    return fedraclora.simulate(
        "output.progress=false",
        "output.plots=false",
        "bias=frozen",
        model=model,
        data=clients,
        test=test,
        method={"name": "pool_rac_lora", "rank": R, "alpha": ALPHA, "pool": 3, "cap": True},
        local={"lr": 0.1, "batch_size": 5},
        clients_per_round=2,
        rounds=rounds,
        folder=folder,
        **keys,
    )


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:peft")
def test_a_run_is_one_adapter_of_rank_k_r_exactly(tmp_path: Path) -> None:
    run = simulated(tmp_path / "run", 8)
    run.export(tmp_path / "adapter")  # PEFT reads it back, and it is held against W_T
    layers = json.loads((tmp_path / "adapter" / "export.json").read_text())["layers"]
    wide = layers["0"]
    assert (wide["rank"], wide["rank_of_change"]) == (3 * R, 3 * R)
    assert wide["relative_error"] < 1e-12
    # W_T is rounded once, and so are PEFT's factors.
    assert all(layer["largest_difference"] < 1e-6 for layer in layers.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"pool": 0}, "method.pool=0: expected 1 or more"),
        ({"merge_every": None}, "changes its sketch"),
        ({"refresh": 3}, r"method\.refresh=3: .*multiple"),
        ({"merge_every": 2, "refresh": 9}, r"method.merge_every \(2\) of at least 8"),
        ({"sketch": "gaussian"}, "cover cuts orthonormal bases"),
    ],
)
def test_a_pool_that_cannot_be_is_refused(keys: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PoolRacLora(**keys)  # type: ignore[arg-type]
