"""Secure aggregation in whole runs: the sum, who may leave when, and what the server sees."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from worlds import (
    FORMS,
    RAGGED,
    Run,
    World,
    assert_close_trees,
    assert_equal_trees,
    label,
    make_method,
    make_world,
    run,
    variants,
)

from fedraclora.aggregation.robust import Median
from fedraclora.attacks import ALittleIsEnough
from fedraclora.clients.worker import Worker
from fedraclora.errors import ClientError, ConfigError, WireError
from fedraclora.privacy.client_level import ClientLevel, Mechanism
from fedraclora.privacy.secagg import SecAgg
from fedraclora.privacy.secret import Secret
from fedraclora.protocol.method import Cohort, Draw
from fedraclora.run.ledger import number
from fedraclora.wire.answers import Answer, StageAnswer
from fedraclora.wire.exchange import Ask

Variant = tuple[str, dict[str, Any]]
LINEAR = [v for v in variants() if make_method(v[0], **v[1]).traits.linear]


def apart(variant: Variant) -> bool:
    """Whether clients of a method train different numbers."""
    method, small, draw = make_method(variant[0], **variant[1]), make_world(), Draw(1)
    return method.open_round(
        method.initial_state(small.base, small.plan, draw), 1, cohort_of([*range(5)]), draw
    ).apart


def cohort_of(clients: list[int]) -> Cohort:
    return Cohort(torch.tensor(clients), torch.ones(len(clients)))


SAME = [v for v in LINEAR if not apart(v)]
SIZES = (4, 9, 1, 6, 3)
TWENTY = (3, 5, 2, 4) * 5


def secure(world: World, method: Any = None, **changes: Any) -> Run:
    """A run under secure aggregation."""
    weights = changes.pop("weights", "uniform")
    settings = {"clip": 50.0, "max_weight": 9 if weights == "samples" else 1}
    settings |= changes.pop("settings", {})
    treatment = dict(secure=SecAgg(**settings), **changes.pop("beside", {}))
    method = method or make_method("fed_rac_lora")
    return run(
        world, method, RAGGED, weights=weights, treatment=treatment, **{"rounds": 1} | changes
    )


def tensors(content: RecordDict) -> list[ArrayRecord]:
    return [record for record in content.values() if isinstance(record, ArrayRecord)]


def leaving(monkeypatch: pytest.MonkeyPatch, when: dict[str, set[int]]) -> None:
    """Let clients vanish at a stage: whatever they would have said is lost."""
    whole = Worker.train

    def train(self: Worker, ask: Ask) -> Answer:
        answer = whole(self, ask)
        if not isinstance(answer, StageAnswer) or not (gone := when.get(answer.stage.name, set())):
            return answer
        stage = answer.stage
        said = {c: data for c, data in stage.data.items() if c not in gone}
        answer = replace(answer, stage=replace(stage, data=said))
        if answer.words is None:
            return answer
        keep = ~torch.isin(answer.clients, torch.tensor([*gone]))
        words = torch.from_numpy(answer.words.numpy()[keep.numpy()])
        return replace(answer, clients=answer.clients[keep], words=words)

    monkeypatch.setattr(Worker, "train", train)


# Sums are of packed vectors, laid out by the method; its variants differ in their size alone.
@pytest.mark.short(
    when=lambda variant, weights: variant[0] in FORMS and (not variant[1] or weights == "samples")
)
@pytest.mark.parametrize(
    ("variant", "weights"),
    [*((v, "uniform") for v in SAME), *((v, "samples") for v in SAME if v[0] == "fed_rac_lora")],
    ids=lambda x: x if isinstance(x, str) else label(x),
)
def test_every_linear_method_gets_the_sum(variant: Variant, weights: str, world: World) -> None:
    name, changes = variant
    plain = run(world, make_method(name, **changes), RAGGED, rounds=2, weights=weights)
    found = secure(world, make_method(name, **changes), rounds=2, weights=weights)
    assert_close_trees(found.weights, plain.weights, 1e-5)
    for row in found.rows:
        assert row["failures"] == []
        assert row["train_loss"] is None
        assert 0 < number(row, "secure", "error_bound") < 1e-5


@pytest.mark.slow
def test_the_error_of_a_round_is_within_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """20 clients, two of whom leave after they have shared their keys."""
    world = make_world(sizes=TWENTY)
    method = make_method("fed_rac_lora")
    leaving(monkeypatch, {"masked": {4, 11}})
    found = secure(world, method, max_failures=2, chunk=7, settings={"clip": 2.0})
    (row,) = found.rows
    assert [f["client"] for f in row["failures"]] == [4, 11]
    assert "secure aggregation, masked" in row["failures"][0]["reason"]
    assert row["secure"]["clients"] == 18
    monkeypatch.undo()
    rest = [c for c in range(20) if c not in {4, 11}]
    result = found.worker.trainer.train(
        world.base,
        method.open_round(
            method.initial_state(world.base, world.plan, found.strategy.draw),
            1,
            cohort_of(rest),
            found.strategy.draw,
        ),
        torch.tensor(rest),
        round_=1,
        rate_scale=1.0,
    )
    mean = {n: t.mean(dim=0) for n, t in result.trained.items()}
    bound, step = row["secure"]["error_bound"], row["secure"]["step"]
    assert step == pytest.approx(20 * 2.0 / 2**31, rel=1e-6)
    assert bound == pytest.approx(step / 2)
    gap = float((found.strategy.state.base["head.bias"] - mean["head.bias"]).abs().max())
    assert 0 < gap <= bound


@pytest.mark.slow
@pytest.mark.parametrize(
    "when",
    [
        {"keys": {1}},
        {"shares": {1}},
        {"masked": {1}},
        {"unmask": {1}},
        {"keys": {0}, "masked": {3}},
        {"shares": {6}, "unmask": {2}},
    ],
    ids=str,
)
@pytest.mark.parametrize("neighbours", [None, 6])
def test_clients_may_leave_at_every_stage(
    when: dict[str, set[int]], neighbours: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sum is that of those whose masked vectors came, whoever helps to unmask it."""
    world = make_world(sizes=(4, 9, 1, 6, 3, 2, 5, 2, 3))
    left = set().union(*(who for stage, who in when.items() if stage != "unmask"))
    leaving(monkeypatch, when)
    found = secure(world, max_failures=3, settings={"neighbours": neighbours})
    monkeypatch.undo()
    assert {f["client"] for f in found.rows[0]["failures"]} == left
    rest = [c for c in range(9) if c not in left]
    method, draw = found.strategy.method, found.strategy.draw
    state = method.initial_state(world.base, world.plan, draw)
    sent = method.open_round(state, 1, cohort_of(rest), draw)
    result = found.worker.trainer.train(
        world.base, sent, torch.tensor(rest), round_=1, rate_scale=1.0
    )
    wanted = result.trained["head.weight"].mean(dim=0)
    torch.testing.assert_close(found.strategy.state.base["head.weight"], wanted, rtol=0, atol=1e-6)


def test_uplink_bytes_are_those_of_the_words(world: World) -> None:
    """Words have 4 bytes, and there are two more than a client trains numbers."""
    found = secure(world, rounds=1, chunk=1)
    sent = [
        record["flat"].numpy().nbytes
        for content in found.worker.answered
        for record in tensors(content)
        if record["flat"].numpy().dtype == np.uint32
    ]
    assert len(sent) == 5
    assert sum(sent) == 5 * 4 * (updates_of(found, world).shape[1] + 2)
    assert found.rows[0]["uplink_bytes"] == sum(sent)


def test_no_unmasked_update_is_given(world: World) -> None:
    """A server that asks plainly where the config says secure sums, or the other way round."""
    found, plain = secure(world), run(world, make_method("fed_rac_lora"), RAGGED, rounds=1)
    for worker, (ask, _) in (
        (found.worker, plain.worker.seen[0]),
        (plain.worker, found.worker.seen[0]),
    ):
        with pytest.raises(WireError, match="config updates are"):
            worker.train(ask)


def test_the_server_sees_no_client(world: World) -> None:
    """No message of the server's holds a client's numbers, in the clear or as quantized words."""
    found = secure(world, rounds=1, chunk=1)
    (row,) = found.rows
    step, seen = row["secure"]["step"], 0
    updates = updates_of(found, world)
    for content in (*found.worker.asked, *found.worker.answered):
        for record in tensors(content):
            for array in record.values():
                values = array.numpy().astype(np.float64).reshape(-1)
                if values.size < updates.shape[1]:
                    continue
                seen += 1
                clear = torch.from_numpy(values[: updates.shape[1]])
                for update in updates:
                    assert not torch.allclose(clear, update, atol=1e-3)
                    whole = torch.round(update / step).remainder(2**32)
                    share = float(((clear - whole).abs() < 2).double().mean())
                    assert share < 0.05
    assert seen == 5  # the masked vectors, and nothing else of that size


def opened(found: Run, world: World) -> tuple[Any, torch.Tensor]:
    method, draw = found.strategy.method, found.strategy.draw
    state = method.initial_state(world.base, world.plan, draw)
    return method.open_round(state, 1, cohort_of([*range(5)]), draw), torch.arange(5)


def updates_of(found: Run, world: World) -> torch.Tensor:
    """What the five clients of the first round train, in the clear."""
    result = found.worker.trainer.train(
        world.base,
        *opened(found, world),
        round_=1,
        rate_scale=1.0,
    )
    each = [t - world.base.get(n, torch.zeros(1)) for n, t in result.trained.items()]
    return torch.cat([update.reshape(5, -1) for update in each], dim=1)


def test_masked_words_are_uniform(world: World) -> None:
    found = secure(world, rounds=3, chunk=1)
    words = np.concatenate(
        [
            record["flat"].numpy().reshape(-1)
            for content in found.worker.answered
            for record in tensors(content)
            if record["flat"].numpy().dtype == np.uint32
        ]
    )
    assert words.size > 1000
    counts = np.bincount(words >> 28, minlength=16) / words.size
    assert np.abs(counts - 1 / 16).max() < 5 * np.sqrt(1 / 16 / words.size)


def test_no_client_says_two_things_about_one_neighbour(world: World) -> None:
    """Asked once more, for the other kind of shares: refused, and the keys are gone."""
    asked: list[Ask] = []
    whole = Worker.train

    def train(self: Worker, ask: Ask) -> Answer:
        if ask.stage is not None and ask.stage.name == "unmask":
            asked.append(ask)
        return whole(self, ask)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Worker, "train", train)
        found = secure(world)
    (ask, *_) = asked
    answer = found.worker.train(ask)
    assert isinstance(answer, StageAnswer)
    assert answer.stage.data == {}
    assert all("answers a stage once" in why for why in answer.failures.values())
    assert set(found.worker.store.secrets.values()) == {b'{"answered": 1}'}


def test_what_a_client_checks_itself(world: World) -> None:
    with pytest.raises(ClientError, match=r"secure\.max_weight=8: .*whole number"):
        secure(world, weights="samples", settings={"max_weight": 8})
    found = secure(world, weights="samples", settings={"max_weight": 8}, max_failures=1)
    assert [f["client"] for f in found.rows[0]["failures"]] == [1]
    short = secure(world, settings={"clip": 1e-3})
    moved = short.strategy.state.base["head.bias"] - world.base["head.bias"]
    assert 0 < float(moved.norm()) <= 1e-3


@pytest.mark.slow
def test_a_row_says_how_many_updates_the_clip_shortened(world: World) -> None:
    norms = sorted(updates_of(secure(world), world).norm(dim=1).tolist())
    for shortened, between in enumerate([*pairwise(norms)][::-1], start=1):
        (row,) = secure(world, settings={"clip": math.fsum(between) / 2}).rows
        assert row["secure"]["clipped"] == shortened
    noisy = {"privacy": ClientLevel(clip=1e-3, delta=1e-3), "secret": Secret(bytes(32))}
    assert "clipped" not in secure(world, beside=noisy).rows[0]["secure"]  # no noise would cover it


def test_a_sum_that_cannot_be_is_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that adds to its masked vector what it likes moves the sum out of what can be."""
    whole = Worker.train

    def train(self: Worker, ask: Ask) -> Answer:
        answer = whole(self, ask)
        if isinstance(answer, StageAnswer) and answer.words is not None:
            words = answer.words.numpy().copy()
            words[:, :-2] += np.uint32(2**30)
            return replace(answer, words=torch.from_numpy(words))
        return answer

    monkeypatch.setattr(Worker, "train", train)
    with pytest.raises(ClientError, match="broke the protocol"):
        secure(world, settings={"clip": 1.0})


def test_a_client_that_raises_is_named_with_what_it_said(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Worker.train

    def train(self: Worker, ask: Ask) -> Answer:
        if ask.stage is not None and ask.stage.name == "shares" and 3 in ask.stage.data:
            raise ValueError("no more entropy")
        return whole(self, ask)

    monkeypatch.setattr(Worker, "train", train)
    found = secure(world, max_failures=1, chunk=1)
    (failure,) = found.rows[0]["failures"]
    assert failure["client"] == 3
    assert "shares: ValueError" in failure["reason"]


def test_too_few_clients_are_refused(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    leaving(monkeypatch, {"keys": {0, 1, 2}})
    with pytest.raises(ClientError, match=r"2 client\(s\) .*stage shares"):
        secure(world, max_failures=5)
    monkeypatch.undo()
    leaving(monkeypatch, {"unmask": {0, 1, 2, 3}})
    with pytest.raises(ClientError, match="too many clients dropped out"):
        secure(world, max_failures=5)
    monkeypatch.undo()
    leaving(monkeypatch, {"masked": {2}})
    with pytest.raises(ClientError, match="1 client"):
        secure(world, max_failures=0)


@pytest.mark.slow
def test_the_bits_are_those_of_the_seed(world: World, tmp_path: Path) -> None:
    """Keys are drawn anew, masks cancel exactly: the same run, in chunks or not, resumed or not."""
    first = secure(world, rounds=4)
    again = secure(world, rounds=4)
    assert_equal_trees(first.weights, again.weights)

    def shuffled(messages: list[Any]) -> list[Any]:
        return messages[::-1]

    assert_equal_trees(secure(world, rounds=4, arrange=shuffled).weights, first.weights)
    secure(world, rounds=2, folder=tmp_path)
    assert_equal_trees(secure(world, rounds=4, folder=tmp_path, resume=True).weights, first.weights)


@pytest.mark.slow
def test_noise_goes_on_the_secure_sum(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClientLevel(clip=50.0, noise_multiplier=0.5, delta=1e-3)

    def beside() -> dict[str, Any]:
        return {"privacy": config, "secret": Secret(bytes(32))}

    noisy = secure(world, rounds=2, beside=beside())
    assert number(noisy.rows[1], "privacy", "epsilon") > 0
    monkeypatch.setattr(Mechanism, "noisy_sum", lambda self, total, *rest: total)
    silent = secure(world, rounds=2, beside=beside())
    plain = secure(world, rounds=2)
    assert_close_trees(silent.weights, plain.weights, 1e-9)
    gap = noisy.weights["fc1.weight"] - plain.weights["fc1.weight"]
    assert float(gap.abs().max()) > 1e-3


def test_what_looks_at_clients_is_refused_beside_it(world: World) -> None:
    with pytest.raises(ConfigError, match=r"each client's update .aggregator=median"):
        secure(world, beside={"aggregator": Median()})
    with pytest.raises(ConfigError, match=r"whose clients collude .attack=a_little_is_enough"):
        secure(world, beside={"attack": ALittleIsEnough(0.4)})
    privacy = ClientLevel(quantile=0.5, noise_multiplier=2.0, delta=1e-3, count_noise=2.0)
    with pytest.raises(ConfigError, match=r"privacy\.quantile .* secure=secagg"):
        secure(world, beside={"privacy": privacy})
    with pytest.raises(ConfigError, match=r"secure\.max_weight .*samples"):
        secure(world, weights="samples", settings={"max_weight": 1})
    for variant in variants():
        method = make_method(variant[0], **variant[1])
        if not method.traits.linear:
            with pytest.raises(ConfigError, match="needs each client's"):
                secure(world, method)
        elif variant not in SAME:
            with pytest.raises(ConfigError, match="different parameters"):
                secure(world, method)


@pytest.mark.parametrize("masked", [False, True])
def test_in_one_process_nothing_of_flowers_messages_is_made(
    masked: bool, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(*_: object, **__: object) -> None:
        raise AssertionError("a record or a message was made")

    for kind in (Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict, Message):
        monkeypatch.setattr(kind, "__init__", made)
    done = secure(world) if masked else run(world, make_method("fed_rac_lora"), RAGGED, rounds=2)
    assert not any(row["failures"] for row in done.rows)
