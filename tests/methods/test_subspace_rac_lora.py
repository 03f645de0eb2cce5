"""Subspace RAC-LoRA: what of a link the next one is built on, by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from fedraclora.errors import ConfigError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.link import Term
from fedraclora.protocol.method import Cohort, Draw, Plan, RoundInstructions, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.subspace_rac_lora import SubspaceRacLora, chosen, energies
from fedraclora.strategies.shared.past import completed

M, N, RANK, ALPHA = 9, 12, 4, 6.0  # frozen factors are sent: coefficients would be more bytes
DRAW = Draw(3)
PLAN = Plan({"w": LayerView("linear", (M, N))}, weights=("w",), shapes={"w": (M, N)})
COHORT = Cohort(torch.arange(2), torch.tensor([1.0, 3.0], dtype=torch.float64))


def opened(method: SubspaceRacLora, state: State, round_: int) -> RoundInstructions:
    return method.open_round(state, round_, COHORT, DRAW)


def played(
    method: SubspaceRacLora, rounds: int, gradient: torch.Tensor | None = None
) -> list[tuple[State, RoundInstructions]]:
    """Close rounds with one step of SGD by a constant gradient, or random replies."""
    state = method.initial_state({"w": torch.zeros(M, N, dtype=torch.float64)}, PLAN, DRAW)
    found = []
    for round_ in range(1, rounds + 1):
        sent = opened(method, state, round_)
        layout = sent.layout
        rows = torch_normal(generator(0, "replies", round_), 2, layout.size)
        if gradient is not None:
            (label,) = (k for k, f in sent.adapters["w"].factors.items() if f.trained)
            (other,) = (f for f in sent.adapters["w"].factors.values() if not f.trained)
            frozen = other.draw()
            step = gradient @ frozen.mT if label == "B" else frozen.mT @ gradient
            rows = layout.pack({f"w/{label}": -0.1 * step}).expand(2, -1)
        state = method.close_round(
            state, sent, Uplinks(COHORT.clients, COHORT.weights, layout, rows)
        )
        found.append((state, sent))
    return found


def frozen(sent: RoundInstructions, label: str) -> torch.Tensor:
    factor = sent.adapters["w"].factors[label]
    assert factor.numbers is not None
    return factor.numbers


def drawn(sent: RoundInstructions) -> dict[str, torch.Tensor]:
    factors = sent.adapters["w"].factors.items()
    return {label: f.draw() for label, f in factors if f.drawing}


def test_a_link_keeps_the_leading_singular_vectors_of_the_change_of_the_last() -> None:
    method = SubspaceRacLora(rank=RANK, alpha=ALPHA, merge_every=1, fresh=0.5, kept_scale=0.5)
    (first, _), (second, left), (_, right) = played(method, 3)
    zero = torch.zeros(M, N, dtype=torch.float64)
    u = torch.linalg.svd(first.base["w"] - zero)[0][:, :2]  # B trained: the left ones
    vt = torch.linalg.svd(second.base["w"] - first.base["w"])[2][:2]
    B, A = frozen(left, "B"), frozen(right, "A")
    for rows, kept in ((B.mT, u.mT), (A, vt)):
        torch.testing.assert_close((rows[:2] @ kept.mT).abs(), 0.5 * torch.eye(2).double())
        lengths = torch.tensor([0.25, 0.25, 1.0, 1.0], dtype=torch.float64)
        torch.testing.assert_close(rows @ rows.mT, lengths.diag())
        assert float((rows[2:] @ kept.mT).abs().max()) < 1e-12


def test_the_basis_and_what_is_trained_last_as_long_as_the_link() -> None:
    method = SubspaceRacLora(rank=RANK, alpha=ALPHA, merge_every=2)
    states = played(method, 6)
    assert [sorted(state.carried) for state, _ in states] == [
        ["w/B"],
        [],
        ["w/A"],
        [],
        ["w/B"],
        [],
    ]
    # What was trained stays beside the weight for as long as the next link.
    ends = [states[i][0].link.terms["w"].kept for i in (1, 3, 5)]  # type: ignore[union-attr]
    beside = [state.base.get("w/past") for state, _ in states]
    for after, kept in zip(beside[1:], [ends[0]] * 2 + [ends[1]] * 2 + [ends[2]], strict=True):
        assert after is not None
        assert torch.equal(after, kept)  # type: ignore[arg-type]
    assert beside[0] is None
    assert [tuple(kept.shape) for kept in ends] == [(M, RANK), (RANK, N), (M, RANK)]  # type: ignore[union-attr]
    (third, sent), (_, again) = states[2], states[3]
    assert torch.equal(frozen(sent, "B"), frozen(again, "B"))
    assert torch.equal(again.trained()["w/A"].draw(), third.carried["w/A"])
    moved = ALPHA / RANK * frozen(again, "B") @ third.carried["w/A"]
    torch.testing.assert_close(method.weights(third, DRAW)["w"], third.base["w"] + moved)


def test_with_all_rows_fresh_links_are_those_of_drawings_by_turns() -> None:
    method = SubspaceRacLora(rank=RANK, alpha=ALPHA, merge_every=1, fresh=1.0)
    for state, sent in played(method, 4):
        link = state.counters.sketch - 1
        plain = METHODS["bernoulli_lora"](rank=RANK, alpha=ALPHA).training(
            "B" if link % 2 == 0 else "A"
        )
        before = replace(state, counters=replace(state.counters, sketch=link))
        asked, wanted = drawn(sent), drawn(plain.open_round(before, link + 1, COHORT, DRAW))
        assert asked.keys() == wanted.keys()
        assert all(torch.equal(asked[label], wanted[label]) for label in wanted)
        assert (state.carried, [*state.base]) == ({}, ["w"])
        # Nothing is kept: the share seen is that of a drawing, whatever came.
        assert state.report["energy_seen"] == pytest.approx(RANK / (N if link % 2 == 0 else M))


def test_pairs_draw_every_even_link() -> None:
    method = SubspaceRacLora(rank=RANK, alpha=ALPHA, merge_every=1, fresh=0.0, pairs=True)
    states = played(method, 4)
    for i, (state, sent) in enumerate(states):
        even = i % 2 == 0
        assert bool(sent.adapters["w"].factors["A" if even else "B"].drawing) == even
        assert ("energy_seen" in state.report) == even  # beside kept rows alone nothing is known
    # The second of a pair has the range of the first.
    B, first = frozen(states[1][1], "B"), states[0][0].base["w"]
    B = B / torch.linalg.vector_norm(B, dim=0)
    torch.testing.assert_close(B @ (B.mT @ first), first)


def test_a_steady_gradient_of_low_rank_is_soon_seen_whole() -> None:
    """Subspace iteration: kept rows turn to the two directions that the gradient has."""
    left, right = (torch_normal(generator(1, "low", side), n, 2) for side, n in ((0, M), (1, N)))
    method = SubspaceRacLora(rank=RANK, alpha=ALPHA, merge_every=1, fresh=0.5)
    seen = [s.report["energy_seen"] for s, _ in played(method, 5, left @ right.mT)]
    assert seen[0] == pytest.approx(RANK / N)
    assert seen[1:] == pytest.approx([1.0] * 4, abs=1e-9)


@pytest.mark.slow
def test_fresh_rows_are_uniform_beside_kept_ones() -> None:
    """E[H] = K^T K + f/(d - k) (I - K^T K): the constants of docs/records/theory.md, section 9."""
    kept = torch.linalg.qr(torch_normal(generator(2, "kept"), N, 2))[0].mT
    mean = torch.zeros(N, N, dtype=torch.float64)
    for i in range(3000):
        rows = completed(kept, SketchSpec("orthonormal", "right", 5, N, 7, i).draw())
        torch.testing.assert_close(rows[:2], kept)
        mean += rows.mT @ rows / 3000
    outside = torch.eye(N).double() - kept.mT @ kept
    wanted = kept.mT @ kept + 3 / (N - 2) * outside
    assert float((mean - wanted).abs().max()) < 0.04  # four standard deviations of an entry


def test_energy_is_counted_by_hand() -> None:
    """One kept row of length 1/2; two fresh ones stand for five dimensions."""
    A = torch.eye(6).double()[:3] * torch.tensor([[0.5], [1.0], [1.0]]).double()
    B = torch.tensor([[3.0, 0.0, 2.0], [0.0, 1.0, 0.0]]).double()
    seen, whole = energies(Term.of((B, A), 2.0), "B", 1).tolist()
    assert seen == pytest.approx((9 / 0.25 + 1 + 4) / 4)
    assert whole == pytest.approx((9 / 0.25 + 5 / 2 * 5) / 4)
    turned = energies(Term.of((A.mT, B.mT), 2.0), "A", 1)
    assert turned.tolist() == pytest.approx([seen, whole])


def test_coordinates_are_drawn_by_what_the_last_link_moved() -> None:
    weights = torch.tensor([0.0, 1.0, 3.0, 0.0]).double()
    counts = torch.zeros(4)
    for i in range(2000):
        counts += chosen(weights, 1, generator(5, "u", i))[0]
        both = chosen(weights, 2, generator(5, "u", i))
        assert sorted(both.argmax(dim=1).tolist()) == [1, 2]
    assert counts[[0, 3]].tolist() == [0, 0]
    assert float(counts[2]) / 2000 == pytest.approx(0.75, abs=0.04)


def test_coordinate_links_have_unit_rows_without_repetition() -> None:
    method = SubspaceRacLora(
        rank=RANK, alpha=ALPHA, merge_every=1, basis="coordinate", kept_scale=1.0
    )
    for i, (_, sent) in enumerate(played(method, 5)[1:], start=1):
        rows = frozen(sent, "B").mT if i % 2 else frozen(sent, "A")
        assert set(rows.unique().tolist()) == {0.0, 1.0}
        torch.testing.assert_close(rows @ rows.mT, torch.eye(RANK).double())


def test_the_scale_of_kept_rows_gives_noise_no_more_than_a_drawing_does() -> None:
    method = SubspaceRacLora(rank=8)
    assert method.length(8, 384) ** 4 == pytest.approx(8 / 384)
    assert SubspaceRacLora(kept_scale=0.5).length(8, 384) == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"basis": "random"}, "basis"),
        ({"merge_every": 0}, "expected 1 or more"),
        ({"merge_every": None}, "method.merge_every=None"),
        ({"fresh": 1.5}, r"a number in \[0, 1\]"),
        ({"fresh": math.nan}, r"a number in \[0, 1\]"),
        ({"kept_scale": 0.0}, "auto, or a number"),
        ({"kept_scale": "large"}, "auto, or a number"),
    ],
)
def test_impossible_settings_are_refused(changes: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        SubspaceRacLora(**changes)  # type: ignore[arg-type]
