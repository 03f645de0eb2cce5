"""Links, their merge, their bytes, and what an absent client has to fetch."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.factor import SEED_BYTES
from fedraclora.protocol.link import Link, Plan, Term, apply_link, matrices
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree
from fedraclora.weights.chain import (
    CatchUp,
    link_tensors,
    read_link,
    term_bytes,
)
from tests.common import normal
from tests.reference.chain import replay

M, N, R, SCALE = 5, 7, 2, 1.5
SPEC = SketchSpec("orthonormal", "right", R, N, seed=4, index=3)
PLAN = Plan(
    {
        "lin": LayerView("linear", (M, N)),
        "turned": LayerView("conv1d", (M, N)),
        "conv": LayerView("conv", (4, 8)),
    }
)


def weights(dtype: torch.dtype = torch.float64) -> Tree:
    base = {"lin": normal(M, N), "turned": normal(N, M), "conv": normal(4, 2, 2, 2)}
    return {n: t.to(dtype) for n, t in (base | {"bias": normal(M)}).items()}


def some_link(seed: int = 0) -> Link:
    B = normal(M, R, seed=seed)
    return Link(
        {
            "lin": Term.of((B, SPEC), SCALE),
            "turned": Term.of((B, normal(R, R), normal(R, N)), SCALE),
            "conv": Term.of((normal(4, 1), normal(1, 8)), 0.5),
        },
        {"bias": normal(M, seed=7 + seed)},
    )


# --- merging -------------------------------------------------------------------------------------


def test_a_merge_is_the_dense_sum_in_every_layout() -> None:
    base, link = weights(), some_link()
    new = apply_link(base, link, PLAN)
    B = normal(M, R)
    torch.testing.assert_close(new["lin"], base["lin"] + SCALE * B @ SPEC.draw())
    core = SCALE * B @ normal(R, R) @ normal(R, N)
    torch.testing.assert_close(new["turned"], base["turned"] + core.T, rtol=1e-12, atol=1e-12)
    kernels = 0.5 * (normal(4, 1) @ normal(1, 8)).reshape(4, 2, 2, 2)
    torch.testing.assert_close(new["conv"], base["conv"] + kernels, rtol=1e-12, atol=1e-12)
    assert torch.equal(new["bias"], link.dense["bias"])
    assert all(new[n].is_contiguous() for n in new)


def test_a_merge_leaves_the_old_weights_and_shares_the_untouched() -> None:
    base = weights()
    kept = {n: t.clone() for n, t in base.items()}
    new = apply_link(base, Link({"lin": Term.of((normal(M, R), SPEC), SCALE)}), PLAN)
    assert all(torch.equal(base[n], t) for n, t in kept.items())
    assert new["conv"] is base["conv"]
    assert apply_link(base, Link(), PLAN) == base


def test_a_merge_into_float32_is_rounded_once() -> None:
    base, B = weights(torch.float32), normal(M, R).float()
    new = apply_link(base, Link({"lin": Term.of((B, SPEC), SCALE)}), PLAN)
    wide = base["lin"].double() + SCALE * (B.double() @ SPEC.draw())
    assert torch.equal(new["lin"], wide.float())
    assert new["lin"].dtype == torch.float32


def test_a_hundred_merges_in_float32_lose_less_than_a_thousandth() -> None:
    """Small links, as late in a run: a bfloat16 master would lose most of them."""
    base = weights(torch.float32)
    wide = {n: t.double() for n, t in base.items()}
    current = base
    for i in range(100):
        B = 1e-4 * normal(M, R, seed=1 + i % 3)
        link = Link({"lin": Term.of((B.float(), SPEC), SCALE)})
        current, wide = apply_link(current, link, PLAN), apply_link(wide, link, PLAN)
    change = torch.linalg.norm(wide["lin"] - base["lin"].double())
    lost = torch.linalg.norm(current["lin"].double() - wide["lin"])
    assert float(lost / change) < 1e-3


def test_a_term_gives_float64_matrices() -> None:
    left, right = matrices(Term.of((normal(M, R).float(), SPEC), 1.0))
    assert left.dtype == right.dtype == torch.float64
    assert torch.equal(right, SPEC.draw())


def test_replaying_is_merging_link_by_link() -> None:
    links = [some_link(seed) for seed in range(3)]
    current = weights()
    for link in links:
        current = apply_link(current, link, PLAN)
    rebuilt = replay(weights(), links, PLAN)
    assert all(torch.equal(rebuilt[n], t) for n, t in current.items())
    assert replay(weights(), [], PLAN).keys() == current.keys()


# --- on disk -------------------------------------------------------------------------------------


def test_a_link_comes_back_from_tensors_and_json() -> None:
    link = some_link()
    tensors, meta = link_tensors(link)
    back = read_link(tensors, json.loads(json.dumps(meta)))
    assert back.terms.keys() == link.terms.keys()
    for name, term in link.terms.items():
        assert back.terms[name].scale == term.scale
        for found, wanted in zip(back.terms[name].factors, term.factors, strict=True):
            assert (found.drawing, found.shape) == (wanted.drawing, wanted.shape)
            assert torch.equal(found.draw(), wanted.draw())
    assert back.dense.keys() == link.dense.keys()
    assert torch.equal(back.dense["bias"], link.dense["bias"])
    rebuilt, wanted_base = replay(weights(), [back], PLAN), replay(weights(), [link], PLAN)
    assert all(torch.equal(rebuilt[n], t) for n, t in wanted_base.items())


def test_an_empty_link_comes_back() -> None:
    assert read_link(*link_tensors(Link())) == Link()


# --- bytes ---------------------------------------------------------------------------------------


def test_a_term_costs_its_matrices_and_eight_bytes_per_seed() -> None:
    assert SEED_BYTES == 8
    assert term_bytes(Term.of((normal(M, R).float(), SPEC), 1.0)) == M * R * 4 + 8
    assert term_bytes(Term.of((normal(M, R), normal(R, N)), 1.0)) == (M + N) * R * 8
    assert term_bytes(Term.of((SPEC, SPEC), 1.0)) == 16


def test_catching_up_by_hand() -> None:
    """5 x 7 float32 weight: 140 bytes dense, 48 a link; three links cost less, four do not."""
    base = {"lin": torch.zeros(M, N), "bias": torch.zeros(M)}
    catch_up = CatchUp(base, 4)
    link = Link({"lin": Term.of((torch.zeros(M, R), SPEC), 1.0)})
    everyone = torch.arange(4)
    assert catch_up.fetch(everyone).tolist() == [0, 0, 0, 0]
    catch_up.add(link)
    assert catch_up.version == 1
    assert catch_up.fetch(torch.tensor([0])).tolist() == [48]
    catch_up.add(Link(dense={"bias": torch.zeros(M)}))
    catch_up.add(link)
    assert catch_up.fetch(torch.tensor([0, 1])).tolist() == [48 + 20, 96 + 20]
    catch_up.add(None)
    assert catch_up.version == 4
    assert catch_up.fetch(torch.tensor([0, 1])).tolist() == [0, 0]
    catch_up.add(link)
    assert catch_up.fetch(torch.tensor([2, 3])).tolist() == [140 + 20, 140 + 20]
    assert catch_up.fetch(everyone).tolist() == [48, 48, 0, 0]
    assert catch_up.fetch(everyone).tolist() == [0, 0, 0, 0]


@dataclass(frozen=True)
class Event:
    """A round that closed with a link of this rank (0: none), or clients that fetch.

    ``dense`` is how many numbers the bias has from then on, as a part of a pool that fills.
    """

    rank: int = 0
    dense: int | None = None
    fetching: frozenset[int] = frozenset()

    @property
    def link(self) -> Link | None:
        """The link; None for a round that changed nothing."""
        if not self.rank and self.dense is None:
            return None
        terms = {"lin": Term.of((torch.zeros(M, self.rank), SPEC), 1.0)} if self.rank else {}
        return Link(terms, {} if self.dense is None else {"bias": torch.zeros(self.dense)})


rounds = st.builds(Event, rank=st.integers(0, 3), dense=st.none() | st.integers(0, 3))
fetches = st.builds(Event, fetching=st.frozensets(st.integers(0, 4), min_size=1))


@given(st.lists(rounds | fetches, max_size=20))
def test_a_client_fetches_the_links_it_missed_or_the_dense_weight(events: list[Event]) -> None:
    catch_up = CatchUp({"lin": torch.zeros(M, N), "bias": torch.zeros(M)}, 5)
    history: list[Event] = []
    held, size = dict.fromkeys(range(5), 0), M
    for event in events:
        if not event.fetching:
            catch_up.add(event.link)
            history.append(event)
            size = size if event.dense is None else event.dense
            continue
        wanted = []
        for client in sorted(event.fetching):
            missed = history[held[client] :]
            lin = sum(M * e.rank * 4 + 8 for e in missed if e.rank)
            bias = sum(e.dense * 4 for e in missed if e.dense)
            wanted.append(min(lin, M * N * 4) + min(bias, size * 4))
            held[client] = len(history)
        assert catch_up.fetch(torch.tensor(sorted(event.fetching))).tolist() == wanted
        assert catch_up.version == len(history)


def test_what_was_caught_up_survives_a_checkpoint() -> None:
    base = weights()
    first = CatchUp(base, 3)
    first.add(some_link())
    first.fetch(torch.tensor([1]))
    first.add(some_link(1))
    second = CatchUp(base, 3)
    stored = {n: t.clone() for n, t in first.state().items()}
    second.restore(stored)
    assert second.version == 2
    assert second.fetch(torch.arange(3)).tolist() == first.fetch(torch.arange(3)).tolist()
    assert stored["catch_up/clients"].tolist() == [1]
    assert stored["catch_up/versions"].tolist() == [1]
    np.testing.assert_array_equal(second.sums, first.sums)


def test_what_is_kept_does_not_grow_with_the_rounds() -> None:
    """Three links of 48 bytes cost less than 140: whoever missed four needs the weight whole."""
    catch_up, again = (
        CatchUp({"lin": torch.zeros(M, N), "bias": torch.zeros(M)}, 99) for _ in "ab"
    )
    link = Link({"lin": Term.of((torch.zeros(M, R), SPEC), 1.0)})
    kept = []
    for round_ in range(60):
        catch_up.add(link)
        catch_up.fetch(torch.tensor([round_]))
        kept.append(sum(t.numel() for t in catch_up.state().values()))
    assert (catch_up.version, catch_up.floor, len(set(kept[10:]))) == (60, 57, 1)
    again.restore(catch_up.state())
    costs = catch_up.missing(torch.arange(99))
    assert costs[55:61].tolist() == [140, 140, 96, 48, 0, 140]
    np.testing.assert_array_equal(again.missing(torch.arange(99)), costs)


def test_a_checkpoint_holds_the_clients_that_took_part_and_no_others() -> None:
    catch_up = CatchUp(weights(), 10**6)
    for round_ in range(1, 4):
        catch_up.add(some_link())
        catch_up.fetch(torch.tensor([7, 10**6 - round_]))
    assert sum(t.numel() for t in catch_up.state().values()) < 50
    assert catch_up.versions.nbytes == 4 * 10**6
    again = CatchUp(weights(), 10**6)
    again.fetch(torch.tensor([3]))
    again.add(some_link())
    again.fetch(torch.tensor([0, 1]))
    again.restore(catch_up.state())
    np.testing.assert_array_equal(again.versions, catch_up.versions)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_number_costs_what_it_is_stored_in(dtype: torch.dtype) -> None:
    catch_up = CatchUp(weights(dtype), 1)
    catch_up.add(Link({"lin": Term.of((normal(M, R).to(dtype), SPEC), 1.0)}))
    assert catch_up.fetch(torch.tensor([0])).tolist() == [M * R * dtype.itemsize + 8]
