"""Sums that workers form of whole blocks of clients are, to the bit, the server's own."""

from __future__ import annotations

import pytest
import torch

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.data.clients import PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.run.ledger import NONDETERMINISTIC
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.server import exchange as exchange_module
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.tree import digest
from fedraclora.wire.answers import SummedAnswer, TrainingAnswer
from fedraclora.wire.reply import checked
from tests.common import assemble

WORDS = [
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "model.hidden=[6]",
    "output=study",
    "clients=80",
    "clients_per_round=80",
    "rounds=3",
    "max_failures=9",
    "partition.alpha=5.0",
]
WHOLE = [32, 64, 80, 128]  # chunks that no block crosses


def finished(*words: str) -> RunBuilder:
    run = assemble(from_plain(composed([*WORDS, *words]), METHODS), None)
    run.strategy.run(run.grid)
    return run


def bits(run: RunBuilder) -> tuple[str, list[dict[str, object]]]:
    """Weights, and every fixed column of the ledger."""
    strategy = run.strategy
    weights = strategy.method.weights(strategy.state, strategy.draw)
    rows = [
        {k: v for k, v in row.items() if k not in NONDETERMINISTIC}
        for row in strategy.recorder.ledger.rows
    ]
    return digest(weights), rows


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some clients raise, some hold NaN: at the ends of blocks and in the middle."""
    good = PartitionedData.gather

    def gather(self: PartitionedData, clients: torch.Tensor, positions: torch.Tensor) -> Samples:
        if set(clients.tolist()) & {3, 40}:
            raise OSError("the disk is gone")
        batch = good(self, clients, positions)
        bad = torch.isin(clients, torch.tensor([0, 35, 77])).repeat_interleave(positions.shape[1])
        return Samples(
            {"x": batch.inputs["x"].masked_fill(bad[:, None], float("nan"))}, batch.target
        )

    monkeypatch.setattr(PartitionedData, "gather", gather)


def replies_of(monkeypatch: pytest.MonkeyPatch) -> list[TrainingAnswer]:
    """Every reply that a strategy reads from now on."""
    seen: list[TrainingAnswer] = []

    def read(*arguments: object) -> TrainingAnswer:
        seen.append(checked(*arguments))  # type: ignore[arg-type]
        return seen[-1]

    monkeypatch.setattr(exchange_module, "checked", read)
    return seen


def rows_again(monkeypatch: pytest.MonkeyPatch, *words: str) -> object:
    """The same run where the server gets every client's own row."""
    monkeypatch.setattr(LoopConfig, "whole_blocks", lambda *_: False)
    return bits(finished(*words))


@pytest.mark.parametrize("chunk", WHOLE)
@pytest.mark.parametrize("method", ["fed_rac_lora", "fedavg"])
def test_sums_of_blocks_are_those_of_rows(
    method: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = [f"method={method}", f"engine.chunk={chunk}"]
    words += ["method.rank=2"] if method != "fedavg" else []
    seen = replies_of(monkeypatch)
    summed = bits(finished(*words))
    assert all(isinstance(reply, SummedAnswer) for reply in seen)
    assert (
        sum(len(reply.numbers) for reply in seen) == 3 * 3
    )  # blocks of 32, 32 and 16; three rounds
    seen.clear()
    assert rows_again(monkeypatch, *words) == summed
    assert not any(isinstance(reply, SummedAnswer) for reply in seen)


@pytest.mark.parametrize(
    "words", [["engine.chunk=31"], ["engine.chunk=1"], ["method=fedavg_lora", "engine.chunk=32"]]
)
def test_rows_come_where_a_block_is_cut_or_a_method_looks_at_clients(
    words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = replies_of(monkeypatch)
    finished(*words, "rounds=1")
    assert [isinstance(r, SummedAnswer) for r in seen] == [False] * len(seen)


@pytest.mark.slow
@pytest.mark.short(when=lambda chunk, weights: weights == "samples" or chunk == WHOLE[0])
@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize("weights", ["samples", "uniform"])
@pytest.mark.parametrize("chunk", WHOLE)
def test_failed_clients_leave_the_same_gaps(
    chunk: int, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (f"engine.chunk={chunk}", f"aggregation_weights={weights}")
    seen = replies_of(monkeypatch)
    summed = bits(finished(*words))
    assert all(isinstance(reply, SummedAnswer) for reply in seen)
    assert {f["client"] for f in summed[1][1]["failures"]} == {0, 3, 35, 40, 77}  # type: ignore[attr-defined]
    assert rows_again(monkeypatch, *words) == summed
