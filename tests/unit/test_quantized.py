"""Numbers in fewer bits: without bias, within their bound, in as many bytes as are counted."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedraclora.aggregation.robust import shortened
from fedraclora.errors import WireError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.kinds import BLOCK
from fedraclora.protocol.link import Link, Plan, Term, apply_link
from fedraclora.protocol.method import Adapter, RoundInstructions
from fedraclora.protocol.program import GRADIENT, PLAIN, ClientProgram
from fedraclora.protocol.quantized import ROUNDED, ROUNDINGS, decode, encode, packed_bytes
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SketchSpec
from fedraclora.weights.chain import LinkSizes, link_tensors, read_link, term_bytes
from fedraclora.wire.changes import ChangeCodec, CodedRows, uploaded_bytes

SIZES = st.lists(st.integers(0, 140), max_size=4)
LEVELS = {"int8": 127, "int4": 7}
ROTATED = {"eden4": 0.0096, "eden3": 0.036, "eden2": 0.133, "eden1": 0.571}  # the papers' errors
kinds = pytest.mark.parametrize("kind", ROUNDED)
each_alone = pytest.mark.parametrize("kind", [k for k in ROUNDED if k not in ROTATED])


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


@each_alone
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
@each_alone
def test_what_rounding_adds_to_a_mean_falls_with_the_cohort(kind: str) -> None:
    """ω / K of the theory: clients round alike only if they draw alike, and they do not."""
    K, rounds, weights = 5, 400, torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]).double()
    clients, p = torch.arange(K), weights / weights.sum()
    changes = ChangeCodec(kind, asked(), {"b": torch.zeros(7)}, clients)
    start = changes._starts(clients)
    x = torch_normal(generator(4, "x"), 28).expand(K, 28)  # the same change at all
    errors = torch.stack([changes.encode(start + x, 5, t, CodedRows()) for t in range(rounds)])
    errors -= start + x
    alone = errors.square().sum(-1).mean(0)  # [K]
    together = (p[:, None] * errors).sum(1).square().sum(-1).mean()
    assert float(together / (p.square() @ alone)) == pytest.approx(1.0, abs=0.15)
    bound = 2.0**-16 if kind == "bfloat16" else BLOCK / LEVELS[kind] ** 2
    assert together <= bound * p.square().sum() * x[0].square().sum()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e300])
@pytest.mark.parametrize("kind", [*LEVELS, *ROTATED])
@pytest.mark.parametrize("place", [0, BLOCK])
def test_what_is_no_number_spoils_its_block_alone(bad: float, kind: str, place: int) -> None:
    x = torch.ones(BLOCK + 5, dtype=torch.float64)
    x[place] = bad
    raw = encode(x, [len(x)], kind)
    found = decode(raw, [len(x)], kind)
    assert torch.equal(found.isnan(), (torch.arange(BLOCK + 5) < BLOCK) == (place < BLOCK))
    again = decode(encode(found, [len(x)], kind), [len(x)], kind)
    assert torch.equal(again.nan_to_num(7.0), found.nan_to_num(7.0))


@kinds
def test_other_bytes_are_refused(kind: str) -> None:
    raw = encode(numbers(40), [40], kind)
    for wrong in (raw[1:], torch.cat([raw, raw]), raw[None], raw.float()):
        with pytest.raises(WireError, match=rf"numbers of the kind {kind} came as .* expected"):
            decode(wrong, [40], kind)


def sylvester(length: int) -> torch.Tensor:
    found = torch.ones(1, 1, dtype=torch.int64)
    while len(found) < length:
        found = torch.cat([torch.cat([found, found], 1), torch.cat([found, -found], 1)])
    return found


def signs_of(turn: int, length: int) -> torch.Tensor:
    raw = np.frombuffer(generator(0, "signs", turn).bytes(128), np.uint8)
    return torch.from_numpy(np.unpackbits(raw)[:length].astype(np.int64)) * 2 - 1


def test_rotated_by_hand() -> None:
    """x = 4 e_1 is s D H q of s = 1/8 and of signs q, all of them that of D_1."""
    x, ends = torch.zeros(BLOCK, dtype=torch.float64), 255 if signs_of(0, 1) > 0 else 0
    x[0] = 4
    assert encode(x, [BLOCK], "eden1").tolist() == [0, 0, 139, 128, *[ends] * 4]


@pytest.mark.parametrize("kind", ROTATED)
@pytest.mark.parametrize("sizes", [[32], [64 + 5, 1024], [3, 512 + 256 + 1, 0, 128]])
def test_rotated_numbers_are_whole_ones_in_any_order(kind: str, sizes: list[int]) -> None:
    """What a code stands for by the formula, summed in whole numbers: one block, and the others."""
    bits, rng = int(kind[-1]), np.random.default_rng(len(sizes))
    levels = {1: (1,), 2: (3, 10), 3: (7, 22, 39, 63), 4: (3, 9, 15, 22, 29, 37, 48, 63)}[bits]
    values = torch.tensor([*(-v for v in levels[::-1]), *levels])
    x = torch.from_numpy(rng.laplace(size=sum(sizes)))
    raw = encode(x, sizes, kind, rng)
    found = decode(raw, sizes, kind)
    tensors = [n for n in sizes if n >= BLOCK]
    turns = raw[: 2 * len(tensors)].view(torch.int16).tolist()
    wanted, blocks = {}, []
    for length in (1024, 512, 256, 128, 64, 32):
        for tensor, n in enumerate(tensors):
            above = n % (2 * length) if length < 1024 else n
            blocks += [(tensor, length)] * (above // length)
    scales = raw[2 * len(tensors) :][: 2 * len(blocks)].reshape(-1, 2).tolist()
    packed = raw[2 * len(tensors) + 2 * len(blocks) :].numpy()
    ones = np.unpackbits(packed, bitorder="little")[: sum(b for _, b in blocks) * bits]
    codes = torch.from_numpy(ones.reshape(-1, bits) @ (1 << np.arange(bits)))
    for (tensor, length), (exponent, whole) in zip(blocks, scales, strict=True):
        q, codes = values[codes[:length].long()], codes[length:]
        each = whole * signs_of(turns[tensor], length) * (sylvester(length) @ q)
        assert int(each.abs().max()) < 2**24
        wanted.setdefault(tensor, []).append(each * 2.0 ** (exponent - 149))
    parts = [t[: len(t) - len(t) % BLOCK] for t in found.split(sizes) if len(t) >= BLOCK]
    for tensor, part in enumerate(parts):
        assert torch.equal(part, torch.cat(wanted[tensor]))
    assert torch.equal(encode(found, sizes, kind), raw)  # each code has one form


@pytest.mark.parametrize("draw", ["normal", "laplace"])
@pytest.mark.parametrize("kind", ROTATED)
def test_rotated_numbers_have_the_error_of_the_papers(kind: str, draw: str) -> None:
    rng, n = np.random.default_rng(5), 1 << 16
    x = torch.from_numpy(getattr(rng, draw)(size=n))
    found = {}
    for nearest in (False, True):
        y = decode(encode(x, [n], kind, rng, nearest=nearest, again=False), [n], kind, again=False)
        found[nearest] = float((y - x).square().sum() / x.square().sum())
        along = float(y @ x / x.square().sum())  # what the scale is chosen for
        assert along == pytest.approx(1 - found[True] if nearest else 1, rel=2e-3)
    assert found[False] == pytest.approx(ROTATED[kind], rel=0.03)
    least = ROTATED[kind] / (1 + ROTATED[kind])
    assert found[True] == pytest.approx(least, rel=0.03)
    kept = decode(encode(x, [n], kind, rng), [n], kind)
    assert float((kept - x).square().sum() / x.square().sum()) == pytest.approx(least, rel=0.03)
    assert ROUNDINGS[kind].added == pytest.approx(found[False], rel=0.06)


@pytest.mark.parametrize("kind", ROTATED)
def test_the_mean_over_signs_is_what_was_rotated(kind: str) -> None:
    """And of several clients, who draw others each, errors fall with their number."""
    draws, n = 400, 256 + 64
    x = torch.from_numpy(np.random.default_rng(3).laplace(size=n))
    rngs = [generator(k, "uplink") for k in range(draws)]
    found = decode(
        encode(x.repeat(draws, 1), [n], kind, rngs, again=False), [n], kind, 2, again=False
    )
    alone = (found - x).square().sum(1).mean()
    together = (found.mean(0) - x).square().sum()
    assert float(together * draws / alone) == pytest.approx(1.0, abs=0.6)
    some = found.reshape(-1, 5, n).mean(1)
    assert float((some - x).square().sum(1).mean() * 5 / alone) == pytest.approx(1.0, abs=0.1)


def drawn(x: torch.Tensor, kind: str, count: int = 600) -> torch.Tensor:
    """What clients send of a tensor, each with other draws: [count, P]."""
    rngs, sizes = [generator(k, "uplink") for k in range(count)], [len(x)]
    sent = encode(x.repeat(count, 1), sizes, kind, rngs, again=False)
    return decode(sent, sizes, kind, 2, again=False)


def beside_one(length: float, count: int) -> torch.Tensor:
    """Normal numbers behind one that is so many times as long as all of them."""
    x = torch.from_numpy(np.random.default_rng(3).normal(size=count))
    x[0] = length * x[1:].norm()
    return x


def three_of(count: int) -> torch.Tensor:
    x = torch.zeros(count, dtype=torch.float64)
    x[:: count // 3][:3] = torch.tensor([1.0, 0.5, 0.25])
    return x


@pytest.mark.parametrize("count", [64, 1024])
@pytest.mark.parametrize(
    ("made", "bias"),
    [
        (lambda n: torch.from_numpy(np.random.default_rng(1).normal(size=n)), (0.02, 0.01, 0, 0)),
        (partial(beside_one, 1.0), (0.17, 0.03, 0, 0)),
        (partial(beside_one, 3.0), (0.32, 0.10, 0, 0)),
        (three_of, (0.56, 0.23, 0.10, 0.08)),
    ],
    ids=["normal", "one as long", "one of three times", "three"],
)
def test_a_mean_over_draws_is_off_where_few_numbers_outweigh_the_others(
    made: Callable[[int], torch.Tensor], bias: tuple[float, ...], count: int
) -> None:
    """By what the docstring of `rotated` says; kinds that round each number by itself are not."""
    x = made(count)
    told = dict(zip(("eden1", "eden2", "eden3", "eden4"), bias, strict=True))
    for kind, wanted in (told | {"int8": 0, "int4": 0, "bfloat16": 0}).items():
        error = drawn(x, kind) - x
        chance = float(error.var(dim=0).sum()) / len(error)  # of a mean of so many draws
        found = math.sqrt(max(0.0, float(error.mean(dim=0).square().sum()) - chance))
        assert found / float(x.norm()) == pytest.approx(wanted, abs=0.025)


@pytest.mark.parametrize("kind", ROTATED)
def test_equal_blocks_of_a_tensor_have_equal_errors(kind: str) -> None:
    x = torch.from_numpy(np.random.default_rng(2).normal(size=3072))
    x[1024:2048] = x[:1024]
    one, equal, other = (drawn(x, kind, 40) - x).split(1024, dim=1)
    along = [float((one * e).sum() / (one.norm() * e.norm())) for e in (equal, other)]
    assert along == pytest.approx([1.0, 0.0], abs=0.02)


LOST = {"eden1": 0.20, "eden2": 0.06, "eden3": 0.02, "eden4": 0.005}
LOST |= {"int4": 0.02, "int8": 0.0, "bfloat16": 0.0}


@pytest.mark.parametrize(("kind", "lost"), LOST.items())
def test_who_clips_what_was_clipped_and_rounded_cuts_some_of_it_away(
    kind: str, lost: float
) -> None:
    """As client-level privacy does, by what its page says."""
    x = torch.from_numpy(np.random.default_rng(4).normal(size=2048))
    x /= x.norm()
    again = shortened(drawn(x, kind, 100), torch.zeros(2048).double(), 1.0)
    assert 1 - float(again.mean(dim=0) @ x) == pytest.approx(lost, abs=0.005)


@pytest.mark.parametrize("scale", [(0, 0), (1, 127), (255, 129), (255, 0)])
def test_a_scale_that_no_code_has_is_refused(scale: tuple[int, int]) -> None:
    raw = encode(torch.ones(BLOCK), [BLOCK], "eden2")
    raw[2], raw[3] = scale
    if scale == (0, 0):
        assert not decode(raw, [BLOCK], "eden2").any()
        return
    with pytest.raises(WireError, match=r"scale .*eden2"):
        decode(raw, [BLOCK], "eden2")


def test_signs_that_are_not_tried_again_are_refused_of_what_is_sent_on() -> None:
    raw = encode(torch.ones(BLOCK), [BLOCK], "eden2")
    raw[0] = 16
    decode(raw, [BLOCK], "eden2", again=False)
    with pytest.raises(WireError, match=r"signs above 15"):
        decode(raw, [BLOCK], "eden2")


@kinds
def test_rows_are_rounded_as_each_alone(kind: str) -> None:
    sizes, rows = [40, 3, 70], torch.stack([numbers(113, k) for k in range(3)])
    rngs = [[generator(k, "rows") for k in range(3)] for _ in range(2)]
    raw = encode(rows, sizes, kind, rngs[0], again=False)
    for row, packed, rng in zip(rows, raw, rngs[1], strict=True):
        assert torch.equal(encode(row, sizes, kind, rng, again=False), packed)
    read = decode(raw, sizes, kind, 2, again=False)
    assert torch.equal(read[1], decode(raw[1], sizes, kind, again=False))


def asked(ranks: torch.Tensor | None = None, program: ClientProgram = PLAIN) -> RoundInstructions:
    """A factor that is trained from a tensor of its own, and a bias."""
    start = torch_normal(generator(0, "start"), 7, 3)
    spec = SketchSpec("gaussian", "right", 3, 5, seed=1, index=0)
    adapter = Adapter.of({"B": to_train((7, 3), start), "A": spec}, 5 / 3)
    return RoundInstructions({"w": adapter}, {"b": to_train((7,))}, program, ranks=ranks)


@pytest.mark.parametrize("ranks", [None, torch.tensor([1, 3, 2])])
@kinds
def test_the_server_reads_what_the_client_kept(kind: str, ranks: torch.Tensor | None) -> None:
    sent, base = asked(ranks), {"b": torch_normal(generator(0, "b"), 7).float()}
    clients, coded = torch.tensor([2, 4, 9]), CodedRows()
    changes = ChangeCodec(kind, sent, base, clients)
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
    alone = ChangeCodec(kind, sent.select(torch.tensor([1])), base, clients[1:2])
    assert torch.equal(alone.encode(rows[1:2], 5, 1, CodedRows())[0], kept[1])


def test_gradients_are_rounded_as_they_are() -> None:
    clients, coded = torch.tensor([0]), CodedRows()
    rows = torch_normal(generator(0, "rows"), 1, 28)
    ChangeCodec("int8", asked(program=GRADIENT), {"b": torch.zeros(7)}, clients).encode(
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
    assert sizes.since(0).tolist() == [[20, 5]]
    assert sizes.followed(0) == {"w", "b"}
