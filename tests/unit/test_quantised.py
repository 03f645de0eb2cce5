"""Numbers in fewer bits: without bias, within their bound, in as many bytes as are counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.errors import WireError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.protocol.method import Adapter, Downlink
from fedraclora.protocol.quantised import BLOCK, LEVELS, ROUNDED, decode, encode, packed_bytes
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.weights.chain import LinkSizes, link_tensors, read_link, term_bytes
from fedraclora.wire.changes import Changes, Coded, uploaded_bytes

SIZES = st.lists(st.integers(0, 70), max_size=4)
kinds = pytest.mark.parametrize("kind", ROUNDED)


def numbers(count: int, *keys: int) -> torch.Tensor:
    """Numbers of many lengths, some of them zero."""
    rng = generator(3, "numbers", count, *keys)
    found = torch_normal(rng, count) * 10.0 ** torch.from_numpy(rng.integers(-9, 9, count))
    found[::5] = 0
    return found


def steps_of(x: torch.Tensor, kind: str) -> torch.Tensor:
    """The scale s of every number, by the formula: [P]."""
    if kind == "bfloat16":
        return 2.0 ** (x.abs().log2().floor() - 7)
    tops = [part.abs().max().expand(len(part)) for part in x.split(BLOCK)]
    return 2.0 ** (torch.cat(tops) / LEVELS[kind]).log2().ceil()


def test_by_hand() -> None:
    """Scales 2 and 1/2 for 7 * 2 and 3; the last number stands in half a byte."""
    raw = encode(torch.tensor([14.0, -6.0, 3.0]), [2, 1], "int4")
    assert raw.tolist() == [127 + 1, 127 - 1, 7 | (16 - 3) << 4, 6]
    assert decode(raw, [2, 1], "int4").tolist() == [14, -6, 3]
    assert encode(torch.tensor([127.0, 127.5]), [1, 1], "int8").tolist() == [127, 128, 127, 64]
    assert encode(torch.tensor([1.0, -2.5]), [2], "bfloat16").tolist() == [128, 63, 32, 192]


@kinds
@given(sizes=SIZES, seed=st.integers(0, 9))
def test_what_was_rounded_is_left_as_it_is(kind: str, sizes: list[int], seed: int) -> None:
    x, rng = numbers(sum(sizes), seed), np.random.default_rng(seed)
    raw = encode(x, sizes, kind, rng)
    assert len(raw) == packed_bytes(sizes, kind)
    once = decode(raw, sizes, kind)
    assert torch.equal(once.float().double(), once)
    for again in (rng, None):
        assert torch.equal(decode(encode(once, sizes, kind, again), sizes, kind), once)


@kinds
def test_rounding_has_no_bias_and_a_variance_below_its_bound(kind: str) -> None:
    x, rng, draws = torch_normal(generator(1, "x"), 90), np.random.default_rng(2), 4000
    s = steps_of(x, kind)
    sizes = [90] * draws
    found = decode(encode(x.repeat(draws), sizes, kind, rng), sizes, kind).reshape(draws, 90)
    far = (found - x).abs()
    assert (far < s).all()
    assert ((found.mean(0) - x).abs() < 5 * s / 2 / draws**0.5).all()  # 5 standard errors
    share = x / s - (x / s).floor()
    variance = (found - x).square().mean(0)
    assert torch.allclose(variance, s**2 * share * (1 - share), atol=float(s.max()) ** 2 / 40)
    bound = 2.0**-16 if kind == "bfloat16" else BLOCK / LEVELS[kind] ** 2
    assert (found - x).square().sum(1).mean() <= bound * x.square().sum()


@pytest.mark.short(when=lambda kind: kind == "int4")  # each kind draws by the same numbers
@kinds
def test_what_rounding_adds_to_a_mean_falls_with_the_cohort(kind: str) -> None:
    """ω / K of the theory: clients round alike only if they draw alike, and they do not."""
    K, rounds, weights = 5, 400, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
    clients, p = torch.arange(K), weights / weights.sum()
    changes = Changes(kind, asked(), {"b": torch.zeros(7)}, clients)
    start = changes._starts(clients)
    x = torch_normal(generator(4, "x"), 28).expand(K, 28)  # the same change at all
    errors = torch.stack([changes.encode(start + x, 5, t, Coded()) for t in range(rounds)])
    errors -= start + x
    alone = errors.square().sum(-1).mean(0)  # [K]
    together = (p[:, None] * errors).sum(1).square().sum(-1).mean()
    assert float(together / (p.square() @ alone)) == pytest.approx(1.0, abs=0.15)
    bound = 2.0**-16 if kind == "bfloat16" else BLOCK / LEVELS[kind] ** 2
    assert together <= bound * p.square().sum() * x[0].square().sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("kind", LEVELS)
def test_what_is_no_number_spoils_its_block_alone(bad: float, kind: str) -> None:
    x = torch.ones(BLOCK + 5, dtype=torch.float64)
    x[BLOCK] = bad
    found = decode(encode(x, [len(x)], kind), [len(x)], kind)
    assert torch.equal(found[:BLOCK], x[:BLOCK])
    assert found[BLOCK:].isnan().all()


@kinds
def test_other_bytes_are_refused(kind: str) -> None:
    raw = encode(numbers(40), [40], kind)
    for wrong in (raw[1:], torch.cat([raw, raw]), raw[None], raw.float()):
        with pytest.raises(WireError, match=rf"numbers of the kind {kind} came as .* are wanted"):
            decode(wrong, [40], kind)


def asked(ranks: torch.Tensor | None = None, recipe: str = "plain") -> Downlink:
    """A factor that is trained from a tensor of its own, and a bias."""
    start = torch_normal(generator(0, "start"), 7, 3)
    spec = SketchSpec("gaussian", "right", 3, 5, seed=1, index=0)
    adapter = Adapter.of({"B": to_train((7, 3), start), "A": spec}, 5 / 3)
    return Downlink({"w": adapter}, {"b": to_train((7,))}, recipe, ranks=ranks)


@pytest.mark.parametrize("ranks", [None, torch.tensor([1, 3, 2])])
@kinds
def test_the_server_reads_what_the_client_kept(kind: str, ranks: torch.Tensor | None) -> None:
    sent, base = asked(ranks), {"b": torch_normal(generator(0, "b"), 7).float()}
    clients, coded = torch.tensor([2, 4, 9]), Coded()
    changes = Changes(kind, sent, base, clients)
    rows = torch_normal(generator(0, "rows"), 3, 28)
    kept = changes.encode(rows, 5, 1, coded)
    assert [len(code) for code in coded.codes] == uploaded_bytes(sent, 3, kind).tolist()
    some = torch.tensor([0, 2])
    read = changes.decode(torch.cat([coded.codes[i] for i in some]), clients[some], torch.float64)
    if ranks is None:
        assert torch.equal(read, kept[some])
    else:
        place = torch.arange(21) % 3 < ranks[:, None]
        mask = torch.cat([place, torch.ones(3, 7, dtype=torch.bool)], dim=1)
        assert torch.equal(read, kept[some][mask[some]])
        assert torch.equal(kept[~mask], rows[~mask])
    alone = Changes(kind, sent.select(torch.tensor([1])), base, clients[1:2])
    assert torch.equal(alone.encode(rows[1:2], 5, 1, Coded())[0], kept[1])


def test_gradients_are_rounded_as_they_are() -> None:
    clients, coded = torch.tensor([0]), Coded()
    rows = torch_normal(generator(0, "rows"), 1, 28)
    Changes("int8", asked(recipe="gradient"), {"b": torch.zeros(7)}, clients).encode(
        rows, 5, 1, coded
    )
    assert (decode(coded.codes[0], [21, 7], "int8") - rows[0]).abs().max() < 0.1
    assert coded.errors[0] < 0.05


def test_a_link_in_fewer_bits_is_read_back_and_counted() -> None:
    base = {"w": torch.zeros(7, 5), "b": torch.ones(7)}
    B, change = (decode(encode(numbers(n), [n], "int4"), [n], "int4") for n in (21, 7))
    spec = SketchSpec("gaussian", "right", 3, 5, seed=1, index=0)
    link = Link(
        {
            "w": Term.of((B.float().reshape(7, 3), spec), 5 / 3, "int4"),
            "b": Term.of((change,), 1.0, "int4"),
        }
    )
    plan = Plan({"w": LayerView("linear", (7, 5))})
    again = read_link(*link_tensors(link))
    for found in (apply_link(base, each, plan) for each in (link, again)):
        assert torch.equal(found["b"], (base["b"].double() + change).float())
        wide = 5 / 3 * (B.reshape(7, 3) @ spec.draw())
        assert torch.allclose(found["w"].double(), wide)
    assert [term_bytes(term) for term in again.terms.values()] == [1 + 11 + 8, 1 + 4]
    sizes = LinkSizes(base)
    sizes.add(link)
    assert sizes.since(0).tolist() == [20, 5]
    assert sizes.followed(0) == {"w", "b"}
