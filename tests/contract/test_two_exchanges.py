"""A round of two exchanges: who fails in the first is not asked again, and nothing is forgotten."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from test_round_failures import faulty, without_client
from worlds import RAGGED, assert_equal_trees, make_method, make_world, run

from fedraclora.errors import ClientError
from fedraclora.protocol.method import RoundInstructions, State
from fedraclora.protocol.program import LocalSteps
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from tests.messages import unpack_downlink


@dataclass(frozen=True)
class SecondPass(LocalSteps):
    """Plain local steps, once more."""

    name = "second_pass"

    @property
    def stream(self) -> str:
        return "plain"


@dataclass(frozen=True)
class TwoPasses(FedRacLora):
    """Fed-RAC-LoRA that asks for the same once more; the stage is read off what was sent."""

    def next_exchange(
        self, state: State, sent: RoundInstructions, uplinks: Uplinks
    ) -> RoundInstructions | None:
        return None if isinstance(sent.program, SecondPass) else replace(sent, program=SecondPass())


METHOD = TwoPasses(rank=3, alpha=5.0)
ONE = make_method("fed_rac_lora")


def test_both_passes_are_counted_and_the_second_one_closes_the_round() -> None:
    once, twice = (run(make_world(), m, RAGGED, rounds=2) for m in (ONE, METHOD))
    assert_equal_trees(twice.weights, once.weights)
    for left, right in zip(once.rows, twice.rows, strict=True):
        for key in ("uplink_bytes", "downlink_bytes", "local_steps"):
            assert right[key] == 2 * left[key]
        assert right["catchup_bytes"] == left["catchup_bytes"]


def test_a_client_that_failed_is_not_asked_again_and_stays_in_the_ledger() -> None:
    world = faulty(raising=(4,))
    done = run(world, METHOD, RAGGED, rounds=1, weights="uniform", max_failures=1, chunk=1)
    (row,) = done.rows
    assert [f["client"] for f in row["failures"]] == [4]
    assert row["cohort"] == 5
    asked = [unpack_downlink(content)[1].clients.tolist() for content in done.worker.asked]
    assert asked == [[0], [1], [2], [3], [4], [0], [1], [2], [3]]
    alone = run(
        without_client(make_world(), 4), METHOD, RAGGED, rounds=1, weights="uniform", chunk=1
    )
    for name, value in alone.weights.items():
        torch.testing.assert_close(done.weights[name], value, rtol=1e-11, atol=1e-11)


def test_failures_of_both_passes_count_against_the_limit() -> None:
    """One client fails in each pass: one is allowed, two are not."""
    passes: list[int] = []

    def lose_one_more(messages: list[object]) -> list[object]:
        passes.append(len(messages))
        return messages[1:]

    with pytest.raises(ClientError, match=r"2 client\(s\) failed, max_failures=1"):
        run(make_world(), METHOD, RAGGED, rounds=1, chunk=1, max_failures=1, arrange=lose_one_more)  # type: ignore[arg-type]
    assert passes == [5, 4]
