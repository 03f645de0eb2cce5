"""`fedraclora.simulate`: the same runs and the same errors as the command line, from Python."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

import fedraclora
from fedraclora.binding import section
from fedraclora.compose.overrides import apply_values, composed, plain_of
from fedraclora.compose.values import config_of
from fedraclora.errors import CheckpointError, ConfigError
from fedraclora.run.ledger import read_ledger, round_seconds
from fedraclora.tree import digest
from tests.common import simulated

WORDS = ("data=digits", "pretrain=none", "output.progress=false", "local.lr=0.05")
SMALL: dict[str, Any] = {"model": {"hidden": [7]}, "clients": 6, "clients_per_round": 3}
STUDY = "output=study"  # no pictures, no chain


def run(*words: str | Mapping[str, object], **keys: Any) -> fedraclora.RunResult:
    return fedraclora.simulate(*WORDS, *words, **(SMALL | {"rounds": 2} | keys))


@pytest.mark.parametrize("method", ["fed_rac_lora", "fedavg"])
def test_a_run_in_memory_is_that_of_the_command_line(method: str, tmp_path: Path) -> None:
    seen: list[object] = []
    found = run(method=method, on_round=lambda row: seen.append(row["round"]))
    words = [*WORDS, STUDY, "model.hidden=[7]", "clients=6", "clients_per_round=3", "rounds=2"]
    wanted = simulated(composed([*words, f"method={method}"]), tmp_path / "run")
    assert found.folder is None
    assert [row["round"] for row in found.rows] == seen == [0, 1, 2]
    assert found.summary["weights_digest"] == wanted["weights_digest"]
    assert digest(found.weights()) == wanted["weights_digest"]
    assert found.summary["ledger_digest"] == wanted["ledger_digest"]


def test_a_function_that_writes_into_a_row_changes_no_ledger(tmp_path: Path) -> None:
    def change(row: Any) -> None:
        row["metrics"]["accuracy"], row["uplink_total"] = 1.0, 0
        row["notes"].append("mine")

    seen: list[object] = []
    wanted = run()
    found = run(STUDY, folder=tmp_path / "run", on_round=[change, seen.append], resume=True)
    assert found.summary["ledger_digest"] == wanted.summary["ledger_digest"]
    assert found.summary["metrics"] == wanted.summary["metrics"]
    assert seen == found.rows == read_ledger(tmp_path / "run" / "ledger.jsonl")


def test_weights_are_copies() -> None:
    found = run()
    found.weights()["fc1.weight"].zero_()
    assert digest(found.weights()) == found.summary["weights_digest"]


@pytest.mark.parametrize("engine", ["vectorized", "inline"])
def test_the_engine_is_a_choice(engine: str) -> None:
    assert run(engine=engine).summary["chunk"] == {"vectorized": 3, "inline": 1}[engine]


@pytest.mark.long
def test_engines_of_many_processes_have_the_bits_of_one() -> None:
    found = run(engine={"name": "ray", "workers": 2})
    assert digest(found.weights()) == digest(run(engine="vectorized").weights())


def test_a_run_says_what_it_is_in_a_line() -> None:
    assert repr(run(rounds=1)).startswith("RunResult(rounds=1, metrics={'accuracy': ")


def test_a_run_goes_on_and_a_finished_one_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def stop(row: Mapping[str, object]) -> None:
        if row["round"] == 2:
            raise KeyboardInterrupt

    words = (STUDY, "output.checkpoint_every=1")
    with pytest.raises(KeyboardInterrupt):
        run(*words, folder=folder, rounds=3, on_round=stop)
    with pytest.raises(CheckpointError, match=r"holds a run .*resume=True"):
        run(*words, folder=folder, rounds=3)
    done = run(*words, folder=folder, resume=True, rounds=3)
    whole = run(*words, folder=tmp_path / "whole", resume=True, rounds=3)
    assert done.folder == folder
    assert [row["round"] for row in done.rows] == [0, 1, 2, 3]
    assert digest(done.weights()) == digest(whole.weights()) == whole.summary["weights_digest"]
    kept = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    again = run(*words, folder=folder, resume=True, rounds=3)
    assert again.summary["seconds"] == done.summary["seconds"]
    assert again.rows == done.rows
    assert digest(again.weights()) == digest(done.weights())
    assert {p: p.read_bytes() for p in kept} == kept
    with pytest.raises(CheckpointError, match=r"seed: 0 -> 1"):
        run(*words, folder=folder, resume=True, rounds=3, seed=1)


@pytest.mark.slow
def test_the_seconds_of_a_resumed_run_are_those_of_all_its_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(folder=tmp_path / "run", rounds=3)
    monkeypatch.setattr(
        "fedraclora.strategies.runner.time", SimpleNamespace(perf_counter=lambda: 7.0)
    )
    again = run(folder=tmp_path / "run", resume=True, rounds=4)
    earlier = sum(map(round_seconds, first.rows))
    assert again.summary["seconds"] == pytest.approx(earlier, abs=1e-3)
    assert earlier > 2e-3


def test_a_config_of_a_run_is_the_same_run() -> None:
    first = run({"method": {"name": "ffa_lora", "rank": 3}, "local": {"lr": 0.2}})
    again = fedraclora.simulate(first.config)
    other = fedraclora.simulate(first.config, rounds=1, local={"lr": 0.1})
    assert again.summary["weights_digest"] == first.summary["weights_digest"]
    assert len(other.rows) == 2
    assert other.config["method"] == first.config["method"]
    local: Any = first.config["local"]
    assert other.config["local"] == {**local, "lr": 0.1}


BAD: dict[str, tuple[tuple[Any, ...], dict[str, Any], str]] = {
    "choice": ((), {"method": "fedavgg"}, "fedavg"),
    "key": ((), {"round": 3}, "rounds"),
    "inner": (({"local": {"learning": 1.0}},), {}, "learning"),
    "value": ((), {"clients_per_round": 7}, "clients_per_round=7, but there are only 6 clients"),
    "deploy": ((), {"engine": "deploy"}, "Run `fedraclora deploy` with"),
    "object": ((), {"rounds": torch.ones(2)}, "rounds is of type Tensor"),
    "no word": ((5,), {}, "5 is of type int"),
    "no key": (({5: 1},), {}, "the key 5 of a mapping"),
    "sweep": (("seed=1,2",), {}, "sweep"),
    "resume word": (("resume=auto",), {}, "resume=True"),
    "no folder": ((), {"resume": True}, "folder"),
    "idle": (("output.chain=false",), {}, "output.chain"),
    "two folders": (("output.dir=a",), {"folder": "b"}, "give one of them"),
    "whole": (({"local": {"lr": "much"}},), {}, r"local\.lr"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_error(case: str) -> None:
    words, keys, said = BAD[case]
    with pytest.raises(ConfigError, match=said):
        run(*words, **keys)


def test_an_attribute_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'simulat'"):
        fedraclora.simulat  # noqa: B018


@pytest.mark.slow
def test_to_import_the_package_imports_nothing_heavy() -> None:
    heavy = ("torch", "flwr", "hydra", "ray", "numpy", "experiments")
    code = f"import sys, fedraclora; print([n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ---- Values beside words ------------------------------------------------------------------------

TEXT = st.text(st.characters(codec="ascii", exclude_categories=["Cc"], exclude_characters="$"))
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)


@given(value=PLAIN.filter(lambda value: value != "???"))  # which stands for what is to be given
def test_a_value_comes_into_the_config_as_it_is(value: object) -> None:
    cfg = OmegaConf.create({"group": {"key": 1}, "other": "${group.key}"})
    OmegaConf.set_struct(cfg, value=True)
    apply_values(cfg, {"group.key": value})
    assert plain_of(cfg, {}) == {"group": {"key": value}, "other": value}


def test_a_mapping_comes_into_the_config_as_it_is() -> None:
    rank = {"*": 1, "fc*.weight": 2, "0": 3, "a b": 4, "c=d": 5, "x\\y": 6, "null": 7}
    for said in ({"method": {"rank": rank}}, {"method.rank": rank}):
        plain, typed = config_of((said,), {})
        assert typed == ["method.rank"]
        assert section(plain, "method")["rank"] == rank


def test_values_of_other_libraries_are_plain_ones() -> None:
    said = {"seed": np.int64(3), "local": {"lr": np.float32(0.5)}, "output.dir": Path("/b c")}
    plain, typed = config_of((said,), {})
    assert (plain["seed"], section(plain, "local")["lr"]) == (3, 0.5)
    assert section(plain, "output")["dir"] == "/b c"
    assert typed == ["seed", "local.lr", "output.dir"]


def test_of_words_and_mappings_the_last_wins() -> None:
    first = ({"local": {"name": "adamw", "lr": 0.1}}, "local.lr=0.2", "local=momentum")
    local = section(config_of(first, {})[0], "local")
    assert (local["name"], local["lr"]) == ("momentum", 0.2)
    assert section(config_of(first, {"local": {"lr": 0.3}})[0], "local")["lr"] == 0.3


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"local": {"lrr": 0.1}}, "local.lrr.*local.lr"),
        ({"sed": 1}, "sed.*seed"),
        ({"data": {"name": "digits 2"}}, "data 'digits 2'.*digits"),
        ({"method": 5}, "method '5'"),
        ({"seed": "${"}, "seed is"),
    ],
)
def test_what_a_mapping_may_not_say_is_named(said: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        config_of((said,), {})


def test_a_written_config_is_a_whole_config(tmp_path: Path) -> None:
    first = run(STUDY, folder=tmp_path / "run", resume=True)
    stored = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    again = fedraclora.simulate(stored, folder=tmp_path / "other")
    assert again.summary["weights_digest"] == first.summary["weights_digest"]
    assert fedraclora.simulate(first.config).folder is None
