"""Rounds in which clients fail, stay away or answer nonsense: nothing is skipped in silence."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typing_extensions import override
from worlds import (
    RAGGED,
    Run,
    World,
    assert_equal_trees,
    make_method,
    make_world,
    run,
)

from fedraclora.data.clients import ChangedClients, PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.errors import ClientError, WireError
from fedraclora.run.ledger import read_ledger
from fedraclora.strategies.server import exchange
from fedraclora.weights.files import load_checkpoint
from fedraclora.wire.answers import NumericAnswer

METHOD = make_method("fed_rac_lora")


@dataclass(frozen=True)
class Faulty(ChangedClients):
    """Client data where some clients raise and some hold NaN, from a round of our choice on."""

    raising: tuple[int, ...] = ()
    poisoned: tuple[int, ...] = ()

    @override
    def gather(self, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        """Samples by position, or an error."""
        bad = sorted(set(clients.tolist()) & set(self.raising))
        if bad:
            raise OSError("the disk is gone")
        batch = self.data.gather(clients, positions)
        poisoned = torch.isin(clients, torch.tensor(self.poisoned, dtype=torch.int64))
        rows = poisoned.repeat_interleave(positions.shape[1])
        x = batch.inputs["x"].masked_fill(rows[:, None], float("nan"))
        return Samples({"x": x}, batch.target)


def faulty(raising: tuple[int, ...] = (), poisoned: tuple[int, ...] = ()) -> World:
    world = make_world()
    data = world.task.train
    assert isinstance(data, PartitionedData)
    return replace(world, task=replace(world.task, train=Faulty(data, raising, poisoned)))


def without_client(world: World, client: int) -> World:
    """The same world where one client has no samples, and so is never to be asked."""
    data = world.task.train
    assert isinstance(data, PartitionedData)
    parts = [
        data.rows[a:b].numpy() for a, b in zip(data.offsets[:-1], data.offsets[1:], strict=True)
    ]
    kept = [p for k, p in enumerate(parts) if k != client]
    return replace(world, task=replace(world.task, train=PartitionedData.of(data.samples, kept)))


def failures(done: Run) -> list[list[dict[str, object]]]:
    return [row["failures"] for row in done.rows]


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_a_client_that_raises_stops_the_run_with_its_id_and_round(chunk: int) -> None:
    with pytest.raises(ClientError) as caught:
        run(faulty(raising=(3,)), METHOD, RAGGED, rounds=2, chunk=chunk)
    text = str(caught.value)
    assert "round 1: 1 client(s) failed, max_failures=0" in text
    assert "client 3: OSError" in text


def test_a_client_with_nan_stops_the_run_with_advice() -> None:
    with pytest.raises(ClientError, match=r"client 2.* nan.*local\.lr"):
        run(faulty(poisoned=(2,)), METHOD, RAGGED, rounds=2)


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
@pytest.mark.parametrize("kind", ["raising", "poisoned"])
def test_the_others_go_on_where_that_is_allowed(kind: str, chunk: int) -> None:
    """The survivors' rows are averaged as if the failed client had not been asked."""
    world = make_world()
    broken = faulty(raising=(4,)) if kind == "raising" else faulty(poisoned=(4,))
    done = run(broken, METHOD, RAGGED, weights="uniform", rounds=3, chunk=chunk, max_failures=1)
    assert [[f["client"] for f in row] for row in failures(done)] == [[4]] * 3
    left = without_client(world, 4)
    alone = run(left, METHOD, RAGGED, weights="uniform", rounds=3, chunk=1)
    for name, value in alone.weights.items():
        torch.testing.assert_close(done.weights[name], value, rtol=1e-11, atol=1e-11)


def huge(patch: pytest.MonkeyPatch, client: int, size: float) -> None:
    """Let a client's numbers be of a size, whatever it has trained."""
    check = exchange.checked

    def checked(*given: Any) -> NumericAnswer:
        reply = check(*given)
        rows = reply.clients == client
        return replace(reply, pieces=(reply.numbers.masked_fill(rows[:, None], size),))

    patch.setattr(exchange, "checked", checked)


# float64: a row of 1e80 is too long itself, one of 1e60 only where two factors are multiplied.
@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("fed_rac_lora", 1e80, ".* too long"),
        ("fedavg_lora", 1e60, r".*weights .* too large"),
        ("fedex_lora", 1e60, r".*weights .* too large"),
    ],
)
def test_a_huge_finite_update_is_not_merged_and_the_run_goes_on_without_it(
    name: str, size: float, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, method = make_world(), make_method(name)
    run(world, method, RAGGED, rounds=2, chunk=1, weights="uniform", folder=tmp_path)
    with monkeypatch.context() as patch:
        huge(patch, 4, size)
        with pytest.raises(ClientError, match=f"round 3: 1 client.*client 4: {said}.*norm"):
            run(
                world,
                method,
                RAGGED,
                rounds=4,
                chunk=1,
                weights="uniform",
                folder=tmp_path,
                resume=True,
            )
        rest = run(
            world,
            method,
            RAGGED,
            rounds=4,
            chunk=1,
            weights="uniform",
            folder=tmp_path,
            resume=True,
            max_failures=1,
        )
    assert [[f["client"] for f in row] for row in failures(rest)] == [[], [], [4], [4]]
    assert all(t.isfinite().all() for t in rest.weights.values())
    whole = run(world, method, RAGGED, rounds=2, chunk=1, weights="uniform")
    left = run(without_client(world, 4), method, RAGGED, rounds=4, chunk=1, weights="uniform")
    assert whole.rows[-1]["train_loss"] == rest.rows[1]["train_loss"]
    assert rest.rows[-1]["local_steps"] == left.rows[-1]["local_steps"]


def test_a_round_that_nobody_survives_stops_the_run() -> None:
    with pytest.raises(ClientError, match=r"round 1: 5 client\(s\) failed, max_failures=9"):
        run(faulty(raising=tuple(range(5))), METHOD, RAGGED, rounds=1, max_failures=9)


def test_more_failures_than_allowed_stop_the_run() -> None:
    with pytest.raises(ClientError, match=r"2 client\(s\) failed, max_failures=1"):
        run(faulty(raising=(0,), poisoned=(1,)), METHOD, RAGGED, rounds=1, max_failures=1)


# With the refused replies in it, one NaN client would make the loss of the round null.
def test_the_training_loss_is_that_of_the_clients_whose_replies_were_used() -> None:
    done = run(faulty(poisoned=(2,)), METHOD, RAGGED, rounds=1, max_failures=1)
    assert done.rows[0]["train_loss"] is not None


def test_a_reply_that_was_refused_has_been_sent_and_is_counted() -> None:
    whole = run(make_world(), METHOD, RAGGED, rounds=1)
    done = run(faulty(poisoned=(2,)), METHOD, RAGGED, rounds=1, max_failures=1)
    assert done.rows[0]["uplink_bytes"] == whole.rows[0]["uplink_bytes"]


# Where one part alone succeeded, the chunk was cut as well, and bits may differ.
@pytest.mark.parametrize("bad", [(3,), (2, 3)])
def test_a_chunk_that_was_cut_is_noted(bad: tuple[int, ...]) -> None:
    done = run(faulty(raising=bad), METHOD, RAGGED, rounds=1, chunk=4, max_failures=4)
    assert any("a chunk was cut" in note for note in done.rows[0]["notes"])


# --- replies -------------------------------------------------------------------------------------


def test_a_client_that_does_not_reply_is_a_failure() -> None:
    def lose(messages: list[Any]) -> list[Any]:
        return messages[1:]

    with pytest.raises(ClientError, match=r"client 0.*no reply"):
        run(make_world(), METHOD, RAGGED, rounds=1, chunk=1, arrange=lose)
    done = run(make_world(), METHOD, RAGGED, rounds=1, chunk=1, arrange=lose, max_failures=1)
    assert failures(done) == [[{"client": 0, "reason": "no reply in time"}]]


def test_a_round_without_any_reply_stops_the_run() -> None:
    with pytest.raises(ClientError, match="round 1: no client replied"):
        run(make_world(), METHOD, RAGGED, rounds=1, arrange=lambda _: [], max_failures=9)


def test_a_client_that_answers_twice_is_refused() -> None:
    with pytest.raises(WireError, match=r"round 1: clients \[0, 0, 1.*expected .* once"):
        run(make_world(), METHOD, RAGGED, rounds=1, chunk=1, arrange=lambda m: [m[0], *m])


def test_a_reply_of_another_round_is_refused() -> None:
    kept: list[Any] = []

    def late(messages: list[Any]) -> list[Any]:
        kept.extend(messages)
        return kept[: len(messages)]  # in round 2 the replies of round 1 come again

    with pytest.raises(WireError, match=r"answered for round 1.*round 2 from version 1"):
        run(make_world(), METHOD, RAGGED, rounds=2, arrange=late)


def test_a_reply_of_another_client_is_refused() -> None:
    def pretend(came: list[Any]) -> list[Any]:
        (ask, answer), *others = came
        return [(ask, replace(answer, clients=torch.tensor([77]))), *others]

    with pytest.raises(WireError, match=r"clients \[1, 2, 3, 4, 77\] answered"):
        run(make_world(), METHOD, RAGGED, rounds=1, chunk=1, arrange=pretend)


# --- stopping ------------------------------------------------------------------------------------


def test_a_run_that_stops_leaves_a_checkpoint_of_the_last_good_round(tmp_path: Path) -> None:
    run(make_world(), METHOD, RAGGED, rounds=2, folder=tmp_path)
    with pytest.raises(ClientError):
        run(faulty(raising=(1,)), METHOD, RAGGED, rounds=4, folder=tmp_path, resume=True)
    _, meta = load_checkpoint(tmp_path / "checkpoint")
    assert meta["round"] == 2
    done = run(make_world(), METHOD, RAGGED, rounds=4, folder=tmp_path, resume=True)
    whole = run(make_world(), METHOD, RAGGED, rounds=4)
    assert_equal_trees(done.weights, whole.weights)
    assert [row["round"] for row in read_ledger(tmp_path / "ledger.jsonl")] == [0, 1, 2, 3, 4]


# The checkpoint of a run that stops must not hold the clients of the failed round as caught up:
# the round that takes its place after a resume would charge them nothing.
def test_a_round_that_failed_charges_nothing_and_forgives_nothing(tmp_path: Path) -> None:
    run(make_world(), METHOD, RAGGED, rounds=2, folder=tmp_path)
    with pytest.raises(ClientError):
        run(faulty(raising=(1,)), METHOD, RAGGED, rounds=4, folder=tmp_path, resume=True)
    done = run(make_world(), METHOD, RAGGED, rounds=4, folder=tmp_path, resume=True)
    whole = run(make_world(), METHOD, RAGGED, rounds=4)
    wanted = [row["catchup_bytes"] for row in whole.rows]
    assert [row["catchup_bytes"] for row in done.rows] == wanted


# Its checkpoint is of round 0 and its ledger has row 0 already, which is not to be written again.
def test_a_run_that_stops_in_its_first_round_can_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ClientError):
        run(faulty(raising=(1,)), METHOD, RAGGED, rounds=2, folder=tmp_path)
    done = run(make_world(), METHOD, RAGGED, rounds=2, folder=tmp_path, resume=True)
    whole = run(make_world(), METHOD, RAGGED, rounds=2)
    assert_equal_trees(done.weights, whole.weights)


def test_no_rounds_means_no_rounds() -> None:
    done = run(make_world(), METHOD, RAGGED, rounds=1)
    done.strategy.loop = replace(done.strategy.loop, rounds=3)
    done.strategy.run(None, last=0)  # type: ignore[arg-type]
    assert done.strategy.done == 1
