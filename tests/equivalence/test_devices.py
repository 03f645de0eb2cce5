"""Whole runs on mixed devices: who counts, what travels, how long it takes, and going on."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch

from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.errors import ClientError
from fedraclora.protocol.method import Cohort
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.training.cohort import CohortTrainer
from fedraclora.tree import Layout, Tree, digest
from tests.common import assemble

WORDS = (
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "model.hidden=[12]",
    "output=study",
    "output.checkpoint_every=2",
    "clients=30",
    "clients_per_round=8",
    "rounds=6",
    "local.lr=0.1",
    "local.epochs=2",
    "method.rank=4",
    "engine.chunk=3",
)
STEADY = {  # nobody is lost: what takes time can be written down
    "speed": {"name": "constant", "value": 40.0},
    "downlink": {"name": "constant", "value": 0.01},
    "uplink": {"name": "constant", "value": 0.002},
}
ROUGH = {
    "speed": {"name": "lognormal", "median": 40.0, "sigma": 0.7},
    "downlink": {"name": "lognormal", "median": 0.05, "sigma": 1.0},
    "uplink": {"name": "lognormal", "median": 0.02, "sigma": 1.0},
    "rank_budget": {"name": "choice", "values": [0.25, 0.5, 1.0], "probabilities": None},
    "availability": {"name": "diurnal", "share": 0.6, "chance": 0.8, "day": 5.0},
    "drop_out": 0.15,
    "jitter": 0.3,
    "deadline": 4.0,
    "over_select": 2.0,
}


def job(system: dict[str, Any], *words: str, folder: Path | None = None, **more: Any) -> RunBuilder:
    plain = composed([*WORDS, *words])
    group = plain["system"]
    assert isinstance(group, dict)
    return assemble(from_plain({**plain, "system": group | system}, METHODS), folder, **more)


def played(done: RunBuilder) -> RunBuilder:
    with closing(done.grid):
        done.strategy.run(done.grid)
    return done


def rows(done: RunBuilder) -> list[dict[str, Any]]:
    return list(done.strategy.recorder.ledger.rows[1:])


def bits(done: RunBuilder) -> tuple[str, str]:
    return digest(done.strategy.state.base), done.strategy.recorder.ledger.digest()


def test_a_round_takes_what_its_slowest_client_takes() -> None:
    """Everyone is asked in every round, so everyone fetches the same: the last link."""
    done = played(job(STEADY, "clients_per_round=30"))
    slowest = int(done.built.task.train.sizes(torch.arange(30)).max())
    assert slowest > 1
    now = 0.0
    for row in rows(done):
        down = (row["downlink_bytes"] + row["catchup_bytes"]) / 30 / 1e6
        now += down / 0.01 + 2 * slowest / 40.0 + row["uplink_bytes"] / 30 / 1e6 / 0.002
        assert row["virtual_seconds"] == pytest.approx(now, rel=1e-12)
    assert rows(done)[-1]["catchup_bytes"] > 0


def test_everyone_asked_is_in_the_ledger_once_and_was_sent_the_downlink() -> None:
    done = played(job(ROUGH))
    each, before = set(), 0.0
    for row in rows(done):
        lost = [d["client"] for d in row["dropped"]]
        assert len(set(lost)) == len(lost)
        assert row["asked"] == row["cohort"] + len(lost)
        assert row["failures"] == []
        assert 0 < row["virtual_seconds"] - before <= 4.0
        each.add(row["downlink_bytes"] / row["asked"])
        before = row["virtual_seconds"]
    assert len(each) == 1
    reasons = {d["reason"].split()[0] for row in rows(done) for d in row["dropped"]}
    assert reasons == {"dropped", "late:", "not"}


def test_who_was_asked_has_caught_up_dropped_or_not() -> None:
    done = played(job(ROUGH))
    strategy = done.strategy
    now = float(rows(done)[-2]["virtual_seconds"])
    asked = strategy.devices.system.ask(done.config.seed, 6, 30, 8, now)
    assert len(asked) == rows(done)[-1]["asked"] > rows(done)[-1]["cohort"]
    assert len(set(strategy.catch_up.missing(asked).tolist())) == 1
    others = torch.tensor([k for k in range(30) if k not in asked.tolist()])
    assert min(strategy.catch_up.missing(others)) > max(strategy.catch_up.missing(asked))


def test_the_merge_is_that_of_the_clients_that_answered_with_their_budgets() -> None:
    done = played(job(ROUGH, "rounds=1"))
    (row,) = rows(done)
    strategy, task, config = done.strategy, done.built.task, done.config
    asked = strategy.devices.system.ask(config.seed, 1, 30, 8, 0.0).tolist()
    lost = {d["client"] for d in row["dropped"]}
    kept = torch.tensor([k for k in asked if k not in lost])
    assert 1 < len(kept) < len(asked)
    ranks = strategy.devices.ranks(kept, config.method)
    assert ranks is not None
    assert len(set(ranks.tolist())) > 1
    base = {n: p.detach().clone() for n, p in task.model.named_parameters()}
    state = config.method.initial_state(base, done.plan, strategy.draw)
    sizes = task.train.sizes(kept).double()
    sent = config.method.open_round(state, 1, Cohort(kept, sizes, ranks), strategy.draw)
    trainer = CohortTrainer(
        task, done.plan, config.local, seed=config.seed, device=torch.device("cpu")
    )
    trained: dict[str, list[torch.Tensor]] = {}
    scale = config.local.rate_scale(1, 1)
    for place, client in enumerate(kept):  # one by one, as the chunks were other ones
        one = sent.select(torch.tensor([place]))
        result = trainer.train(base, one, client[None], round_=1, rate_scale=scale)
        for name, value in result.trained.items():
            trained.setdefault(name, []).append(value)
    stacked = {name: torch.cat(values) for name, values in trained.items()}
    layout = Layout.of(stacked, skip=1)
    got = Uplinks(kept, sizes, layout, layout.pack(stacked, lead=1))
    wanted = config.method.close_round(state, sent, got).base
    assert_close(strategy.state.base, wanted, base)


def assert_close(found: Tree, wanted: Tree, start: Tree) -> None:
    """Equal to 1e-5 of what the round changed: chunks round differently in float32."""
    for name, weight in wanted.items():
        moved = float((weight - start[name]).abs().max())
        assert float((found[name] - weight).abs().max()) <= 1e-5 * moved + 1e-7, name


def test_a_round_in_which_nobody_answers_ends_the_run_with_a_checkpoint(tmp_path: Path) -> None:
    slow = {"speed": {"name": "constant", "value": 0.001}, "deadline": 1.0}
    with pytest.raises(ClientError, match=r"round 1: .*0 of 8.*deadline is 1 s"):
        played(job(slow, folder=tmp_path))
    assert (tmp_path / "checkpoint" / "checkpoint.safetensors").is_file()
