"""Every byte that the ledger charges a method is held against the messages that moved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, RecordDict
from worlds import (
    FULL_BATCH,
    Run,
    World,
    assert_equal_trees,
    assert_updates_lead_on,
    defaults_short,
    forms_short,
    label,
    make_method,
    make_world,
    run,
    sends_a_shadow,
    variants,
)

from fedraclora.flower_internals import records_from_bytes, records_to_bytes
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.protocol.factor import SEED_BYTES
from fedraclora.protocol.link import Link
from fedraclora.strategies.shared.walking import DirectionProgram
from fedraclora.weights.chain import read_link
from fedraclora.weights.links import read_links
from tests.messages import unpack_downlink

Variant = tuple[str, dict[str, Any]]
VARIANTS = list(variants())
ITEM = 8  # bytes of a float64
COHORT, ROUNDS = 3, 6


def finished(variant: Variant, chunk: int = 1, width: int = 1, folder: Path | None = None) -> Run:
    method = make_method(variant[0], **variant[1])
    world = make_world(width=width)
    return run(world, method, FULL_BATCH, rounds=ROUNDS, cohort=COHORT, chunk=chunk, folder=folder)


@pytest.fixture(scope="module", params=VARIANTS, ids=label)
def variant(request: pytest.FixtureRequest) -> Variant:
    found: Variant = request.param
    return found


@pytest.fixture(scope="module")
def folder(variant: Variant, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("run")


@pytest.fixture(scope="module")
def done(variant: Variant, folder: Path) -> Run:
    """A run of the variant, one client in each message: whatever is counted in it, it is one."""
    return finished(variant, folder=folder)


def serialized(content: RecordDict) -> RecordDict:
    """A message as it arrives elsewhere: written, serialized and read back."""
    raw = records_to_bytes(content)
    return records_from_bytes(raw)


def array_bytes(content: RecordDict) -> int:
    """Bytes of the numbers in a message: flat arrays, without numpy's own header."""
    record, own = content["arrays"], content.get("own", ArrayRecord())
    assert isinstance(record, ArrayRecord)
    assert isinstance(own, ArrayRecord)
    assert ["flat"] <= [*record] <= ["flat", "coefficients"]
    arrays = [array.numpy() for array in (*record.values(), *own.values())]
    assert all(array.itemsize == ITEM or array.size == 0 for array in arrays)
    return sum(int(array.nbytes) for array in arrays)


def message_bytes(content: RecordDict) -> int:
    """Bytes of a message by Flower's own count."""
    return sum(record.count_bytes() for record in content.values())


def seeds(content: RecordDict) -> int:
    downlink, _ = unpack_downlink(content)
    drawn = sum(f.sketch is not None for f in downlink.named.values())
    return drawn + isinstance(downlink.program, DirectionProgram)


def test_the_uplink_of_the_ledger_is_the_formula_and_the_message(done: Run, world: World) -> None:
    replies = [done.worker.answered[i : i + COHORT] for i in range(0, ROUNDS * COHORT, COHORT)]
    total = 0
    for round_, (row, contents) in enumerate(zip(done.rows, replies, strict=True), start=1):
        up, _ = done.strategy.method.floats(world.plan, round_)
        total += row["uplink_bytes"]
        assert row["uplink_bytes"] == up * ITEM * COHORT
        assert row["uplink_bytes"] == sum(array_bytes(c) for c in contents)
        assert array_bytes(serialized(contents[0])) == array_bytes(contents[0])
        assert row["uplink_total"] == total


def test_the_downlink_of_the_ledger_is_the_message(done: Run, world: World) -> None:
    asked = [done.worker.asked[i : i + COHORT] for i in range(0, ROUNDS * COHORT, COHORT)]
    total = most = formula = 0
    for round_, (row, contents) in enumerate(zip(done.rows, asked, strict=True), start=1):
        _, down = done.strategy.method.floats(world.plan, round_)
        numbers = sum(array_bytes(c) for c in contents)
        assert array_bytes(serialized(contents[0])) == array_bytes(contents[0])
        charged = numbers + SEED_BYTES * sum(seeds(c) for c in contents)
        total += row["downlink_bytes"] + row["catchup_bytes"]
        assert row["downlink_bytes"] == charged
        assert row["downlink_total"] == total
        assert numbers <= down * ITEM * COHORT
        most, formula = max(most, numbers), max(formula, down * ITEM * COHORT)
    assert most == formula


@defaults_short
def test_bytes_do_not_depend_on_the_chunk(variant: Variant, done: Run) -> None:
    """A chunk is a unit of work: each of its clients is charged as if it stood alone."""
    columns = ("uplink_bytes", "downlink_bytes", "catchup_bytes", "downlink_total")
    together = finished(variant, chunk=3)
    for left, right in zip(done.rows, together.rows, strict=True):
        assert [left[c] for c in columns] == [right[c] for c in columns]


@forms_short
def test_what_a_message_holds_beside_its_numbers_does_not_grow(variant: Variant, done: Run) -> None:
    large = finished(variant, width=8)
    for kind in ("asked", "answered"):
        pairs = zip(getattr(done.worker, kind), getattr(large.worker, kind), strict=True)
        for few, many in pairs:
            computed = seeds(many) - seeds(few) if kind == "asked" else 0
            # Of blocks that are a smaller share of the largest one fewer numbers are sent.
            fewer = sends_a_shadow(done.strategy.method)
            assert array_bytes(many) >= array_bytes(few) or computed or fewer
            extra = [message_bytes(c) - array_bytes(c) for c in (few, many)]
            assert extra[0] < 6000
            # Shapes and dims have a few digits more, and a larger plan the same names; a small
            # factor that is sent has no seed, which a large one that is computed has.
            assert extra[1] - extra[0] < 100 + 250 * computed


def test_catch_up_is_the_links_a_client_missed_or_the_dense_weight(done: Run, folder: Path) -> None:
    stored = list(read_links(folder / "chain"))
    dense = {n: t.numel() * ITEM for n, t in stored[0][1].items()}
    links = [read_link(tensors, meta) for _, tensors, meta in stored[1:]]

    def size(link: Link, name: str) -> int:
        total = link.dense[name].numel() * ITEM if name in link.dense else 0
        for factor in link.terms[name].factors if name in link.terms else ():
            total += SEED_BYTES if factor.numbers is None else factor.numbers.numel() * ITEM
            total += factor.coefficients.numel() * 8 if factor.coefficients is not None else 0
        return total

    def beside(name: str, until: int) -> int:
        """What the last link before a round left beside a weight, which comes with it whole."""
        terms = [link.terms[name] for link in links[:until] if name in link.terms]
        kept = [term.kept for term in terms if term.kept is not None]
        return kept[-1].numel() * ITEM if kept else 0

    # Weights that walk together share the numbers, and are followed or fetched together.
    walks = [walk for link in links for walk in link.moves]
    shared = {walk.names: 0 for walk in walks}
    apart = [n for n in dense if not any(n in names for names in shared)]

    def walked(link: Link, names: tuple[str, ...]) -> int:
        gone = [walk.scalars for walk in link.moves if walk.names == names]
        return sum(SEED_BYTES + c.numel() * ITEM for c in gone if c is not None)

    held: dict[int, int] = {}
    for round_, row in enumerate(done.rows, start=1):
        wanted = 0
        before = [link.dense for link in links[: round_ - 1]]
        dense |= {n: t.numel() * ITEM for given in before for n, t in given.items()}
        for client in draw_cohort(1, round_, 5, COHORT).tolist():
            missed = links[held.get(client, 0) : round_ - 1]
            whole = {n: dense[n] + beside(n, round_ - 1) for n in dense}
            names = (*apart, *(dense.keys() - {*apart} - {n for g in shared for n in g}))
            wanted += sum(min(sum(size(k, n) for k in missed), whole[n]) for n in names)
            for group in shared:
                need = sum(walked(link, group) for link in missed)
                wanted += min(need, sum(whole[n] for n in group))
            held[client] = round_ - 1
        assert row["catchup_bytes"] == wanted


def test_an_update_is_what_is_counted_and_leads_to_the_weights(done: Run, folder: Path) -> None:
    """And the chain on disk leads to the bits that the server holds."""
    assert_equal_trees(assert_updates_lead_on(folder), done.strategy.state.base)
