"""Flower's own loop, its `Strategy.start` untouched, runs the rounds of a deployment."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from flwr.app import ArrayRecord, Message
from flwr.serverapp.strategy import Result, Strategy
from typing_extensions import override

from fedraclora.config.run_config import from_plain
from fedraclora.config.settings import DeployConfig
from fedraclora.engines.deploy.grid import DeployGrid
from fedraclora.errors import ClientError, ConfigError
from fedraclora.experiments.simulate import simulate
from fedraclora.run.ledger import read_ledger
from fedraclora.strategies import METHODS
from fedraclora.strategies.assembly import assemble_with
from fedraclora.strategies.flower_strategy import FlowerStrategy
from fedraclora.strategies.server_app import OnHosts
from fedraclora.tree import digest
from fedraclora.weights.files import load_checkpoint
from tests.campaigns.faults.harms import cannot_settle, raises, stays_silent
from tests.campaigns.faults.network import Network, client, nodes_for, small


@dataclass
class Loop(Network):
    """A network that sends and waits, as Flower's grid does for Flower's loop."""

    @override
    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> list[Message]:
        names = list(self.push_messages(messages))
        return [reply for name in names for reply in self.pull_messages([name])]


def started(words: list[str], folder: Path, network: Network) -> tuple[FlowerStrategy, Result]:
    """Run by Flower's `start`."""
    plain = small(words, folder, "deploy")
    network.run_config = {"cfg-json": json.dumps(plain)}
    config = from_plain(plain, METHODS)
    assert isinstance(config.engine, DeployConfig)
    folder.mkdir()
    engine = OnHosts(network, config.engine, folder, known=True, ended=lambda: False)
    run = assemble_with(config, folder, engine_of=lambda _: engine)
    assert isinstance(run.grid, DeployGrid)
    strategy = FlowerStrategy(run.strategy, run.grid)
    return strategy, strategy.start(network, ArrayRecord(), num_rounds=3)


def inline(words: list[str], folder: Path) -> tuple[str, list[dict[str, object]]]:
    """The digest of the weights and the rows of a run in this process."""
    simulate(small(words, folder, "inline"), folder)
    digest_of = json.loads((folder / "summary.json").read_text())["weights_digest"]
    return digest_of, read_ledger(folder / "ledger.jsonl")


# LoRA-GA asks for gradients first: of the first round two exchanges.
@pytest.mark.parametrize("more", [[], ["method=fedavg_lora", "method.initial=lora_ga"]])
def test_a_run_by_flowers_own_loop_has_the_bits_of_inline(more: list[str], tmp_path: Path) -> None:
    assert FlowerStrategy.start is Strategy.start
    words = ["method=fed_rac_lora", "clients=5", "cohort=3", *more]
    strategy, result = started(words, tmp_path / "run", Loop(tmp_path / "cache", nodes_for(5)))
    wanted, beside = inline(words, tmp_path / "inline")
    assert digest({n: torch.from_numpy(a.numpy()) for n, a in result.arrays.items()}) == wanted
    rows = strategy.rounds.recorder.ledger.rows
    assert len(rows) == len(beside) == 4
    columns = ("uplink_bytes", "downlink_bytes", "metrics", "train_loss", "local_steps")
    for row, other in zip(rows[1:], beside[1:], strict=True):
        assert [row[c] for c in columns] == [other[c] for c in columns]
        round_ = int(str(row["round"]))
        assert result.train_metrics_clientapp[round_]["train-loss"] == row["train_loss"]
        assert result.evaluate_metrics_clientapp[round_] == row["metrics"]


@pytest.mark.parametrize("fault", [raises, stays_silent, cannot_settle])
def test_who_fails_is_left_out_by_name_or_ends_the_run(fault: object, tmp_path: Path) -> None:
    def guilty(message: Message) -> bool:
        return client(message) == 1 and message.metadata.group_id == "2"

    network = Loop(tmp_path / "cache", nodes_for(3), fault(guilty))  # type: ignore[operator]
    words = ["method=fed_rac_lora", "engine.min_clients=2", "engine.timeout=2"]
    strategy, result = started(words, tmp_path / "run", network)
    (failure,) = strategy.rounds.recorder.ledger.rows[2]["failures"]
    assert failure["client"] == 1
    assert result.train_metrics_clientapp[2]["failures"] == 1
    network = Loop(tmp_path / "cache2", nodes_for(3), fault(guilty))  # type: ignore[operator]
    with pytest.raises(ClientError, match=r"round 2: .*client 1"):
        started(["method=fed_rac_lora", "engine.timeout=2"], tmp_path / "again", network)
    assert load_checkpoint(tmp_path / "again" / "checkpoint")[1]["round"] == 1


def test_what_asks_in_stages_is_refused(tmp_path: Path) -> None:
    words = ["secure=secagg", "weights=uniform", "output.checkpoint_every=1"]
    with pytest.raises(ConfigError, match=r"secure=secagg .*fedraclora deploy"):
        started(words, tmp_path / "run", Loop(tmp_path / "cache", nodes_for(5)))
