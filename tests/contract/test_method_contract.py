"""What every method promises, held against dense algebra; no method is named but by its fields.

Replies are random numbers, so nothing here depends on training. The suite runs over the METHODS
table and the YAML of each entry: a new method is tested with no new test.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import sys
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from math import prod
from typing import Any

import pytest
import torch
from formulas import FORMULAS, formula_of
from worlds import (
    ALPHA,
    OWN,
    Played,
    World,
    assert_close_trees,
    assert_equal_trees,
    client_weights,
    conv1d,
    distance,
    every_variant,
    goes_its_own_way,
    has_field,
    is_personal,
    label,
    linear,
    make_method,
    make_world,
    mean_weights,
    play,
    play_rounds,
    random_replies,
    some_cohort,
    stepped,
    trains_parts,
    variants,
    yaml_of,
)

from fedraclora.aggregation.base import AggregationContext, Total
from fedraclora.errors import ShapeError
from fedraclora.protocol.factor import weight_of
from fedraclora.protocol.link import apply_link
from fedraclora.protocol.method import Draw, Method
from fedraclora.protocol.rank_budgets import uploaded_numbers
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.shared.initials import STARTS
from fedraclora.tree import Tree
from tests.reference.chain import replay

Variant = tuple[str, dict[str, Any]]
LAYERS = {"linear": linear, "conv1d": conv1d}
DRAW = Draw(seed=17)

VARIANTS = list(variants())
GLOBAL = [v for v in VARIANTS if not is_personal(v)]
INEXACT = [v for v in VARIANTS if not make_method(v[0], **v[1]).traits.exact]
RESAMPLED = [
    v
    for v in VARIANTS
    if has_field(make_method(v[0]), "merge_every")
    and v[1].get("init") not in STARTS
    and not has_field(make_method(v[0]), "fresh")  # its links need the ones before them
    and not make_method(v[0]).recurs  # their sketches recur, and their links have an end
]
NAMED_LIKE_CLASS = [n for n, c in METHODS.items() if c.__name__.lower() == n.replace("_", "")]

every_global = pytest.mark.parametrize("variant", GLOBAL, ids=label)
every_method = pytest.mark.parametrize("name", sorted(METHODS))
every_file = pytest.mark.parametrize("name", sorted({*METHODS} - {OWN}))


@pytest.fixture(scope="module", params=list(LAYERS))
def world(request: pytest.FixtureRequest) -> World:
    """Three adapted matrices (one square), an averaged head and averaged biases, two layouts."""
    return make_world(LAYERS[request.param])


@pytest.fixture(scope="module")
def plain_world() -> World:
    return make_world()


def method_of(variant: Variant) -> Method:
    return make_method(variant[0], **variant[1])


def new_weights(method: Method, played: Played) -> Tree:
    return method.weights(played.after, DRAW)


def drawn(played: Played) -> list[SketchSpec]:
    """Sketches of a downlink: frozen factors, what is combined with them, and starts of others."""
    return [f.sketch for f in played.sent.named.values() if f.sketch is not None]


# --- exactness -----------------------------------------------------------------------------------


@every_global
def test_exact_methods_give_the_mean_of_the_clients_weights(variant: Variant, world: World) -> None:
    method = method_of(variant)
    for played in play_rounds(method, world, 4, DRAW):
        found = new_weights(method, played)
        wanted = stepped(method, played, mean_weights(played), DRAW)
        if method.traits.exact or not played.sent.adapters:  # a mean of the weights themselves
            assert_close_trees(found, wanted)
            continue
        targets = list(world.plan.targets)
        change = distance(wanted, method.weights(played.before, DRAW), targets)
        missed = distance(found, wanted, targets)
        assert missed > 1e-2 * change, "it equals the mean of its clients: say exact=True"


@pytest.mark.parametrize("variant", INEXACT, ids=label)
def test_inexact_methods_report_the_error_of_the_round(variant: Variant, world: World) -> None:
    method = method_of(variant)
    targets = list(world.plan.targets)
    for played in play_rounds(method, world, 3, DRAW):
        old = method.weights(played.before, DRAW)
        wanted = stepped(method, played, mean_weights(played), DRAW)
        missed = distance(new_weights(method, played), wanted, targets)
        change = distance(wanted, old, targets)
        assert played.after.report["aggregation_error"] == pytest.approx(missed / change, rel=1e-9)


@every_global
def test_a_cohort_of_one_gives_the_weights_of_that_client(variant: Variant, world: World) -> None:
    method = method_of(variant)
    if trains_parts(method):
        pytest.skip("clients have other products than the server")
    for played in play_rounds(method, world, 4, DRAW, some_cohort((3.5,))):
        wanted = stepped(method, played, client_weights(played, 0), DRAW)
        assert_close_trees(new_weights(method, played), wanted)


@every_global
@pytest.mark.parametrize("rank", [5, 6])
def test_a_rank_may_equal_a_side(variant: Variant, rank: int, plain_world: World) -> None:
    """Which factor is which is never read off a shape: here B is square, or A, or both."""
    method = make_method(variant[0], **{"rank": rank} | variant[1])
    if trains_parts(method):
        pytest.skip("clients have other products than the server")
    for played in play_rounds(method, plain_world, 3, DRAW, some_cohort((3.5,))):
        wanted = stepped(method, played, client_weights(played, 0), DRAW)
        assert_close_trees(new_weights(method, played), wanted)


@every_variant
def test_the_scale_is_alpha_over_the_rank(variant: Variant, plain_world: World) -> None:
    method = method_of(variant)
    played = play_rounds(method, plain_world, 1, DRAW)[0]
    for name, adapter in played.sent.adapters.items():
        first, *_ = adapter.factors.values()
        shape = first.shape
        if trains_parts(method):
            shape = (shape[0], method.rank_of(plain_world.plan, name))
        parts = getattr(method, "heads", getattr(method, "sketches", 1))
        # Several subspaces share E[A^T A] = I: each of them is made up for what the others have.
        shared = parts**0.5 if has_field(method, "interval") else 1.0
        shared = shared if getattr(method, "normalize", "rows") == "identity" else 1.0
        assert adapter.scale == pytest.approx(ALPHA / (shape[1] // parts) * shared, rel=1e-15)


@every_global
def test_equal_replies_give_the_weights_of_one_of_them(variant: Variant, world: World) -> None:
    method = method_of(variant)
    if goes_its_own_way(method) and not method.traits.linear:
        pytest.skip("equal replies are along other directions")
    played = play_rounds(method, world, 1, DRAW)[0]
    stacked = played.uplinks.stack()
    layout = played.uplinks.layout
    row = layout.pack({n: t[0] for n, t in stacked.items()})
    rows = row.expand(len(played.uplinks.clients), -1)
    got = replace(played.uplinks, stacked=rows)
    after = method.close_round(played.before, played.sent, got)
    same = Played(played.before, played.sent, got, after)
    wanted = stepped(method, same, client_weights(same, 2), DRAW)
    assert_close_trees(method.weights(after, DRAW), wanted)


# --- aggregation ---------------------------------------------------------------------------------


@every_variant
def test_the_scale_of_the_aggregation_weights_is_irrelevant(variant: Variant, world: World) -> None:
    method = method_of(variant)
    played = play_rounds(method, world, 1, DRAW)[0]
    wanted = new_weights(method, played)
    for scale in (2.0**-20, 1.0 / 3.0, 1e6):
        got = replace(played.uplinks, weights=played.uplinks.weights * scale)
        found = method.weights(method.close_round(played.before, played.sent, got), DRAW)
        assert_close_trees(found, wanted)


@every_variant
def test_linear_methods_need_only_the_weighted_sum(variant: Variant, world: World) -> None:
    method = method_of(variant)
    played = play_rounds(method, world, 1, DRAW)[0]
    summed = Total()(played.uplinks, AggregationContext(played.sent, 1, DRAW))
    assert summed.stacked is None
    if not method.traits.linear:
        with pytest.raises(ShapeError, match="each client's own update"):
            method.close_round(played.before, played.sent, summed)
        return
    after = method.close_round(played.before, played.sent, summed)
    assert_equal_trees(after.base, played.after.base)
    assert_equal_trees(after.carried, played.after.carried)
    assert after.counters == played.after.counters


@every_variant
def test_every_client_counts_by_its_weight(variant: Variant, plain_world: World) -> None:
    """Two clients of weight w are one client of weight 2w: no count of clients hides anywhere."""
    method = method_of(variant)
    if goes_its_own_way(method) and not method.traits.linear:
        pytest.skip("equal replies are along other directions")
    for round_, played in enumerate(play_rounds(method, plain_world, 4, DRAW), start=1):
        state = played.before
        sent = method.open_round(state, round_, some_cohort(), DRAW)
        two = random_replies(sent, some_cohort((1.0, 3.0)), torch.float64)
        assert two.stacked is not None
        split = Uplinks(
            torch.arange(3),
            torch.tensor([1.0, 1.5, 1.5], dtype=torch.float64),
            two.layout,
            two.stacked[[0, 1, 1]],
            versions=torch.zeros(3, dtype=torch.int64),
        )
        assert_close_trees(
            method.weights(method.close_round(state, sent, split), DRAW),
            method.weights(method.close_round(state, sent, two), DRAW),
        )


# --- state ---------------------------------------------------------------------------------------


@every_variant
def test_a_run_starts_from_the_base_weights(variant: Variant, world: World) -> None:
    method = method_of(variant)
    state = method.initial_state(world.base, world.plan, DRAW)
    assert_close_trees(method.weights(state, DRAW), world.base)


@every_variant
def test_what_is_carried_and_trained_is_what_is_sent_next(variant: Variant, world: World) -> None:
    """Whether a link goes on or a new one begins: nothing that was learnt is dropped on the way."""
    method = method_of(variant)
    if trains_parts(method):
        pytest.skip("clients have other products than the server")
    for played in play_rounds(method, world, 6, DRAW):
        trained = played.sent.trained()
        for name in played.before.carried.keys() & trained.keys():
            start = trained[name].numbers
            assert start is not None, f"{name} is carried, but does not start there"
            assert torch.equal(start, played.before.carried[name]), name


@every_variant
def test_nothing_of_the_state_is_changed_in_place(variant: Variant, world: World) -> None:
    method = method_of(variant)
    state = method.initial_state(world.base, world.plan, DRAW)
    for round_ in range(1, 5):
        tensors = state.base | {f"carried/{n}": t for n, t in state.carried.items()}
        kept = {n: t.clone() for n, t in tensors.items()}
        counters = state.counters.stored()
        played = play(method, world, state, round_, some_cohort(), DRAW)
        method.weights(played.after, DRAW)
        assert_equal_trees(tensors, kept)
        assert state.counters.stored() == counters
        state = played.after


@every_variant
def test_a_method_is_a_pure_function(variant: Variant, plain_world: World) -> None:
    method = method_of(variant)
    states = []
    for _ in range(2):
        again = method_of(variant)
        assert again == method
        states.append(play_rounds(again, plain_world, 4, DRAW, anew=True)[-1].after)
    assert_equal_trees(states[0].base, states[1].base)
    assert_equal_trees(states[0].carried, states[1].carried)
    assert states[0].counters == states[1].counters


@every_variant
def test_replies_close_under_the_downlink_that_asked_for_them(
    variant: Variant, plain_world: World
) -> None:
    """Sketches come from ``sent``: nothing is drawn anew from another seed when a round closes."""
    method = method_of(variant)
    played = play_rounds(method, plain_world, 1, DRAW)[0]
    sketches = set(drawn(played))
    assert played.after.link is not None
    in_link = {
        factor.sketch
        for term in played.after.link.terms.values()
        for factor in term.factors
        if factor.sketch is not None
    }
    assert in_link <= sketches


@every_variant
def test_the_base_of_a_target_changes_iff_the_method_merges(variant: Variant, world: World) -> None:
    method = method_of(variant)
    first = method.initial_state(world.base, world.plan, DRAW).base
    last = play_rounds(method, world, 6, DRAW)[-1].after
    for name in world.plan.targets:
        assert torch.equal(last.base[name], first[name]) != method.traits.merges, name


@every_variant
def test_the_links_rebuild_the_base_to_the_bit(variant: Variant, world: World) -> None:
    method = method_of(variant)
    links = []
    first = method.initial_state(world.base, world.plan, DRAW).base
    for played in play_rounds(method, world, 6, DRAW):
        if played.after.link is not None:
            links.append(played.after.link)
        assert_equal_trees(replay(first, links, world.plan), played.after.base)


@every_variant
def test_merging_rounds_once_from_float64(variant: Variant) -> None:
    world = make_world(dtype=torch.float32)
    method = method_of(variant)
    for played in play_rounds(method, world, 4, DRAW):
        link = played.after.link
        assert link is not None
        for name, old in played.before.base.items():
            new = played.after.base[name]
            assert new.dtype == torch.float32
            if name in link.terms:
                term = link.terms[name]
                left, *others = (f.draw().double() for f in term.factors)
                for other in others:
                    left = left @ other
                wide = old.double() + term.scale * left
                assert torch.equal(new, wide.float()), name
            elif name in link.dense:
                assert torch.equal(new, link.dense[name]), name
            elif walks := [walk for walk in link.moves if name in walk.names]:
                wide = old.double()
                for j, c in enumerate(walks[0].scalars.flatten().tolist()):
                    wide += c * walks[0].direction(name, old, j)
                assert torch.equal(new, wide.float()), name
            elif (weight := weight_of(name)) is not None and weight in link.terms:
                kept = link.terms[weight].kept
                assert new is old if kept is None else torch.equal(new, kept), name
            else:
                assert new is old, name


@every_variant
def test_averages_are_rounded_once_from_float64(variant: Variant) -> None:
    """In float32, what a round makes of its replies is the float64 mean, rounded once."""
    world = make_world(dtype=torch.float32)
    method = method_of(variant)
    if not method.traits.linear:
        pytest.skip("not a mean")
    for played in play_rounds(method, world, 3, DRAW):
        assert played.uplinks.stacked is not None
        weights = played.uplinks.weights[:, None]
        mean = (weights * played.uplinks.stacked.double()).sum(dim=0) / weights.sum()
        wanted = played.uplinks.layout.unpack(mean)
        step = method.traits.step
        for name in played.sent.dense:
            # Its change is in factors from here on, or it is of directions.
            if f"{name}/B" in played.after.carried or name not in played.after.base:
                continue
            if step != 1:
                old = played.before.base[name].double()
                wanted[name] = old + step * (wanted[name] - old)
            gap = (played.after.base[name].double() - wanted[name]).abs()
            # Half a unit in the last place of float32, and the rounding of the float64 sum.
            assert torch.all(gap <= wanted[name].abs() * 2.0**-24 * (1 + 1e-6)), name


# --- sketches that live for several rounds -------------------------------------------------------


@pytest.mark.parametrize("variant", RESAMPLED, ids=label)
def test_a_merge_leaves_the_effective_weights_as_they_are(variant: Variant, world: World) -> None:
    name, changes = variant
    method = make_method(name, **changes | {"merge_every": 3})
    never = make_method(name, **changes | {"merge_every": None})
    for played in play_rounds(method, world, 7, DRAW):
        merged = method.weights(played.after, DRAW)
        unmerged = never.close_round(played.before, played.sent, played.uplinks)
        assert_close_trees(merged, never.weights(unmerged, DRAW))
        due = played.after.counters.age == 0
        assert due == (not played.after.carried)


@pytest.mark.parametrize("variant", RESAMPLED, ids=label)
def test_a_sketch_lives_for_as_many_rounds_as_it_says(variant: Variant, world: World) -> None:
    """A drawing that is trained is sent as a seed where its link begins, then as it is."""
    name, changes = variant
    for every, wanted in ((1, [0, 1, 2, 3, 4, 5]), (3, [0, 0, 0, 1, 1, 1]), (None, [0] * 6)):
        method = make_method(name, **changes | {"merge_every": every})
        indices: list[int | None] = []
        for played in play_rounds(method, world, 6, DRAW):
            specs = drawn(played)
            assert len(specs) in {0, len(world.plan.targets)}
            assert len({s.index for s in specs}) <= 1
            assert len({s.seed for s in specs}) == len(specs), "two layers share a sketch"
            indices.append(specs[0].index if specs else None)
        if not has_field(method, "sketch"):
            begins = [i for i in range(6) if i % (every or 6) == 0]
            assert indices == [wanted[i] if i in begins else None for i in range(6)]
        else:
            assert indices == wanted


@every_variant
def test_the_number_of_the_link_says_whether_what_is_trained_lives_on(
    variant: Variant, world: World
) -> None:
    """Under one number frozen factors stay and trained ones go on: moments may be kept."""
    method = method_of(variant)
    if trains_parts(method):
        pytest.skip("clients have other products than the server")
    for last, now in pairwise(play_rounds(method, world, 6, DRAW)):
        frozen = [
            {f"{w}/{k}": f for w, a in p.sent.adapters.items() for k, f in a.factors.items()}
            for p in (last, now)
        ]
        if now.sent.link != last.sent.link:
            assert now.sent.link == last.sent.link + 1
            begun = now.before.carried.keys() & now.sent.trained().keys()
            assert not (has_field(method, "merge_every") and begun)
            continue
        mean = last.uplinks.mean()
        for name, factor in frozen[1].items():
            if factor.trained:
                if not factor.upload:  # it starts from what the client holds
                    continue
                assert factor.numbers is not None, name
                old = frozen[0][name].numbers
                old = torch.zeros_like(mean[name]) if old is None else old
                wanted = old + method.traits.step * (mean[name] - old)
                torch.testing.assert_close(factor.numbers, wanted, rtol=1e-12, atol=1e-12)
            else:
                assert factor.drawing == frozen[0][name].drawing
                assert torch.equal(factor.draw(), frozen[0][name].draw())


# --- floats --------------------------------------------------------------------------------------


def carried_down(played: Played) -> int:
    """Numbers that a downlink carries to one client."""
    total = 0
    for factor in played.sent.named.values():
        if factor.coefficients is not None:
            total += factor.coefficients.numel()
        elif factor.numbers is not None:
            total += prod(factor.shape)
    return total


@every_variant
def test_floats_is_what_travels(variant: Variant, world: World) -> None:
    method = method_of(variant)
    most = formula = 0
    for round_, played in enumerate(play_rounds(method, world, 6, DRAW), start=1):
        up, down = method.floats(world.plan, round_)
        assert played.uplinks.layout == played.sent.layout
        each = uploaded_numbers(played.sent, len(played.uplinks.clients))
        assert each.tolist() == [up] * len(each)
        # A factor that starts at zero does not travel: the formula is the most that does.
        assert carried_down(played) <= down
        most, formula = max(most, carried_down(played)), max(formula, down)
    assert most == formula


@every_variant
def test_what_is_counted_is_the_formula_of_the_docstring(variant: Variant, world: World) -> None:
    method = method_of(variant)
    if type(method) not in {METHODS[name] for name in FORMULAS}:
        return  # a method of somebody's own: its messages above are enough
    counted = [method.floats(world.plan, round_) for round_ in range(1, 8)]
    assert counted == [formula_of(method)(method, world.plan, round_) for round_ in range(1, 8)]


# --- form ----------------------------------------------------------------------------------------


@every_method
def test_the_fields_are_the_keys_of_the_yaml(name: str) -> None:
    group = yaml_of(name)
    target = METHODS[name]
    assert is_dataclass(target)
    assert set(group) - {"name"} == {f.name for f in fields(target)}
    assert group["name"] == name


@pytest.mark.parametrize("name", NAMED_LIKE_CLASS)
def test_defaults_are_those_of_the_class_where_the_name_is_the_class(name: str) -> None:
    """Presets of a class (ffa_lora) differ; the entry that is the class itself must not."""
    group = yaml_of(name)
    group.pop("name")
    assert METHODS[name](**group) == METHODS[name]()


@every_method
def test_a_method_is_a_frozen_dataclass_that_subclasses_method(name: str) -> None:
    target = METHODS[name]
    assert Method in target.__mro__
    method = make_method(name)
    assert hash(method) == hash(make_method(name))
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.anything = 1  # type: ignore[attr-defined]


@every_file
def test_the_docstring_says_what_a_reader_asks(name: str) -> None:
    text = sys.modules[METHODS[name].__module__].__doc__ or ""
    sections = ("- Uplink", "- Aggregation:", "- Source:", "- Departures:")
    assert [s for s in sections if s not in text] == []
    assert any(kind in text for kind in ("arXiv", "doi", "OpenReview")), "no number of the source"
    assert ("not exact" in text) == (not make_method(name).traits.exact)


@every_file
def test_every_hyperparameter_is_documented(name: str) -> None:
    target = METHODS[name]
    assert is_dataclass(target)
    # What many methods have is documented once, by the class that they have it from.
    text = "\n".join(kind.__doc__ or "" for kind in target.__mro__)
    undocumented = [f.name for f in fields(target) if f"{f.name}:" not in text]
    assert not undocumented


@every_file
def test_a_method_file_imports_neither_flower_nor_the_loop(name: str) -> None:
    source = inspect.getsource(sys.modules[METHODS[name].__module__])
    imported = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
        elif isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
    bad = [m for m in imported if m.split(".")[0] in {"flwr", "ray", "hydra", "omegaconf"}]
    loop = (
        "fedraclora.strategies.base",
        "fedraclora.strategies.server",
        "fedraclora.wire",
    )
    checks = "fedraclora.wire.fields"  # of the payload of a client program
    bad += [m for m in imported if m.startswith(loop) and m != checks]
    assert not bad


def test_links_and_cohorts_of_this_suite_have_teeth(plain_world: World) -> None:
    """The reference of the exactness law sees a forgotten scale and a forgotten transpose."""
    world = make_world(conv1d)
    method = make_method("fed_rac_lora")
    played = play_rounds(method, world, 1, DRAW)[0]
    link = played.after.link
    assert link is not None
    wanted = mean_weights(played)
    right = apply_link(world.base, link, world.plan)
    assert_close_trees(right, wanted)
    unscaled = replace(link, terms={n: replace(t, scale=1.0) for n, t in link.terms.items()})
    targets = list(world.plan.targets)
    assert distance(apply_link(world.base, unscaled, world.plan), wanted, targets) > 0.1
    square = "fc2.weight"
    turned = dict(right)
    turned[square] = world.base[square] + (right[square] - world.base[square]).T
    assert distance(turned, wanted, [square]) > 0.1


# --- scales --------------------------------------------------------------------------------------


@every_method
def test_rslora_is_alpha_over_the_root_of_the_rank(name: str, plain_world: World) -> None:
    """Everywhere: what is sent, what is merged and what is measured agree on the scale."""
    if not has_field(make_method(name), "rslora"):
        pytest.skip("it has no scale")
    small = {"rank": 2, "heads": 1, "sketches": 1, "cap": False}  # fits every layer: one rank
    rooted = make_method(name, rslora=True, **small)
    plain = make_method(name, alpha=ALPHA * 2**0.5, **small)
    rounds = [play_rounds(method, plain_world, 3, DRAW) for method in (rooted, plain)]
    for one, other in zip(*rounds, strict=True):
        for weight, adapter in one.sent.adapters.items():
            assert adapter.scale == pytest.approx(other.sent.adapters[weight].scale, rel=1e-15)
        assert_close_trees(new_weights(rooted, one), new_weights(plain, other))
