"""Every choice composes into settings, and what can run offline runs a round."""

from __future__ import annotations

import inspect
import math
import pkgutil
import re
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from fedraclora.compose import CONF
from fedraclora.compose.choices import (
    NODES,
    choice,
    groups,
    keys_of,
    lineage,
    meaning,
    section_keys,
    sections,
)
from fedraclora.config.run_config import RunConfig, from_plain
from fedraclora.config.settings import EvaluateConfig
from fedraclora.errors import DataError
from fedraclora.experiments import choice_files
from fedraclora.experiments.choice_files import choice_texts, part_texts
from fedraclora.experiments.pages import aliases, method_of
from fedraclora.strategies.methods import METHODS
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.weights.files import flatten
from tests.common import assemble

FILES = {str(p.relative_to(CONF).with_suffix("")): p for p in sorted(CONF.rglob("*.yaml"))}
CHOICES = ["config", *(f"{group}/{name}" for group, names in groups().items() for name in names)]
# What choices build on, and no choice; `tune` is read by that command alone.
SHARED = sorted({*FILES} - {*CHOICES, "tune"})
# Files that say what differs from what they build on; the others are written from the signatures.
DIFFERENT = [n for n, p in FILES.items() if "/" in n and "\ndefaults:" in p.read_text()]

TINY = ["rounds=1", "clients=10", "clients_per_round=3"]
DIGITS = ["data=digits", "pretrain=none", *TINY]  # digits 5-9, by the root's data.labels
SMALL = ["pretrain=none", "model.hidden=12", "model.layers=1"]
ROLES = ["data=shakespeare", "data.labels=null", "partition=natural", "model=gpt", *SMALL]
SYNTHETIC = ["partition=given", "model=linear", "model.bias=false", "pretrain=none", *TINY]
TEXT = ["data=rotten_tomatoes"]  # a model of token ids does not go with data of numbers
# What a choice needs beside it to be a config at all: a warm-up shorter than a link, a file.
WITH = {
    "local/relora": ["method=fed_relora"],
    "data/text": ["data.file=mine.csv"],
    "model/hf": [*TEXT, "model.path=mine"],
    "model/causal_lm": TEXT,
    "model/minilm": TEXT,
    "model/smollm2": TEXT,
    "model/transformer": TEXT,
    "local/own": ["local.train=mine:train"],
}
# What a choice needs beside it to run a round; digits and the other defaults where it is absent.
BESIDE = {
    "config": TINY,
    "aggregator/krum": [*DIGITS, "clients_per_round=5"],
    "aggregator/multi_krum": [*DIGITS, "clients_per_round=5"],
    "privacy/client_level": [*DIGITS, "aggregation_weights=uniform"],
    "secure/secagg": [*DIGITS, "aggregation_weights=uniform"],
    "system/phones": [*DIGITS, "clients=40", "clients_per_round=10"],
    "data/digits": ["pretrain=none", *TINY],
    "data/mnist_5k": ["pretrain=none", *TINY],
    "data/mnist_5k_5_9": ["pretrain=none", *TINY],
    "data/fedprox_synthetic": ["pretrain=none", "clients=30", "clients_per_round=3", "rounds=1"],
    "data/least_squares": [*SYNTHETIC, "data.labels=null", "clients=null"],
    "data/logistic_regression": [*SYNTHETIC, "data.labels=null", "clients=null"],
    "data/virtual": ["partition=given", "pretrain=none", *TINY],
    "partition/given": [
        "data=least_squares",
        "data.labels=null",
        "model=linear",
        "pretrain=none",
        "rounds=1",
        "clients=null",
        "clients_per_round=3",
    ],
    "partition/natural": [
        "data=logistic_regression",
        "data.labels=null",
        "model=linear",
        "pretrain=none",
        "rounds=1",
        "clients=null",
        "clients_per_round=3",
    ],
    "allocation/adalora": [*DIGITS, "method=fedavg_lora"],
    "local/relora": [*DIGITS, *WITH["local/relora"]],
    "method/fedkseed": [*DIGITS, "local.lr=0.002"],  # no rate is sought here
    "partition/fedslop": [*DIGITS, "partition.empty=drop"],
    "pretrain/digits_0_4": ["data=digits", "pretrain.epochs=2", *TINY],
    "experiment/fedslop_mnist": ["rounds=1"],
    "experiment/flights": ["rounds=1", "clients_per_round=1"],
    "experiment/million": ["rounds=1"],
    "experiment/shakespeare": ["rounds=1", "clients_per_round=3", *SMALL],
    "data/shakespeare": [*ROLES, *TINY, "clients=null"],
    "model/gpt": [*ROLES, *TINY, "clients=null"],
}
# Texts and large models: slow to load, or not here; and other people's. They are composed only.
COMPOSED = {
    *(name for name in CHOICES if name.startswith(("data/glue_", "experiment/glue"))),
    "data/mnist",
    "data/newsgroups",
    "data/flights",  # in its experiment
    "data/instructions",  # in tests/language, as all language models
    *("data/arrays", "data/function", "data/table"),  # files and functions, in their own tests
    "data/own",  # a package's, in test_deploy_own.py
    "data/rotten_tomatoes",
    "data/text",
    "engine/deploy",  # by fedraclora deploy alone
    "experiment/cola_sources",
    "experiment/mrpc_dirichlet",
    "experiment/newsgroups",
    "experiment/rotten_tomatoes",
    "experiment/rte_dirichlet",
    "experiment/smollm2_instructions",
    "experiment/stsb_genres",
    "experiment/tiny_instructions",
    "local/own",  # somebody's, in test_own_training.py
    "model/causal_lm",
    "model/function",
    "model/hf",
    "model/minilm",
    "model/smollm2",
    "model/transformer",
}


def composed(name: str, beside: list[str]) -> dict[str, object]:
    """The resolved config with one file chosen."""
    group, _, choice = name.rpartition("/")
    words = [f"{group}={choice}"] if group else []
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        cfg = compose("config", overrides=[*words, *beside])
    plain = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def words_of(name: str) -> list[str]:
    """What stands beside a choice in both tests: a list of files is merged once."""
    if name in COMPOSED or name.startswith("method/"):
        return WITH.get(name, [])
    group = name.partition("/")[0]
    return [word for word in BESIDE.get(name, DIGITS) if not word.startswith(f"{group}=")]


def text_of(name: str) -> str:
    """The file of a choice; empty for one that code has by itself."""
    return FILES[name].read_text() if name in FILES else ""


def stored(name: str) -> dict[str, object]:
    """What a choice says, with all that it builds on."""
    return choice(*name.split("/"))


# Methods compose in `test_config`, too, and the tasks of GLUE differ in a name.
@pytest.mark.short(when=lambda name: not re.match("method/|(data|experiment)/glue_", name))
@pytest.mark.parametrize("name", CHOICES)
def test_every_choice_composes_into_settings(name: str) -> None:
    plain = composed(name, words_of(name))
    config = from_plain(plain, METHODS)
    silent = [key for key in flatten(plain) if not key.endswith("name") and not meaning(key, plain)]
    assert silent == []  # of each there is a line of help
    assert set(plain) == set(inspect.signature(RunConfig).parameters) - {"plain"}
    group, _, chosen = name.rpartition("/")
    if group == "method":
        assert isinstance(config.method, METHODS[chosen])
    if group:  # what is read without Hydra is what Hydra composes
        whole = group not in plain or "@package _global_" in text_of(name)
        said, found = flatten(stored(name) if whole else {group: stored(name)}), flatten(plain)
        free = {key for key, value in said.items() if "${" in str(value)}
        free |= {word.partition("=")[0] for word in words_of(name)}
        kept = {k: v for k, v in said.items() if not free & {k, k.partition(".")[0]}}
        assert {k: v for k, v in kept.items() if found.get(k, ...) != v} == {}
        assert whole or set(stored(name)) == set(plain[group])  # type: ignore[call-overload]


# The short suite runs methods in test_determinism, from the same files, and Ray in test_ray_engine.
@pytest.mark.slow
@pytest.mark.short(when=lambda name: name != "engine/ray" and not name.startswith("method/"))
@pytest.mark.parametrize("name", [n for n in CHOICES if n not in COMPOSED])
def test_what_is_here_runs_a_round(name: str) -> None:
    # A source of data that needs a file is composed above, and run in its own tests.
    assert name in BESIDE or not name.startswith("data/"), f"say in BESIDE what {name} needs"
    config = from_plain(composed(name, BESIDE.get(name, DIGITS)), METHODS)
    try:
        run = assemble(config, None)
    except DataError as error:
        pytest.skip(f"composed only: {error}")
    with closing(run.grid):
        run.strategy.run(run.grid)
    rows = run.strategy.recorder.ledger.rows
    assert [row["round"] for row in rows] == [0, 1]
    for row in rows:
        metrics = row["metrics"]
        assert isinstance(metrics, Mapping)
        assert metrics
        assert all(math.isfinite(value) for value in metrics.values())


def test_the_lists_above_name_choices_that_exist() -> None:
    assert set(BESIDE) <= set(CHOICES)
    assert set(CHOICES) >= COMPOSED


def test_every_method_is_a_choice_of_its_name() -> None:
    assert {*groups()["method"]} == {*METHODS}


def test_a_class_in_python_is_what_its_choice_composes() -> None:
    """``LocalSettings()`` trains as ``local=sgd``, ``FedRacLora()`` is ``method=fed_rac_lora``."""
    assert from_plain(composed("config", []), METHODS).local == LocalSettings()
    for name, kind in METHODS.items():
        assert method_of(name) == kind() or f"method/{name}" in DIFFERENT


def test_a_number_of_an_adaptive_optimizer_is_a_key_of_choices_that_have_one() -> None:
    of_moments = {"beta1", "beta2", "eps"}
    for name in groups()["local"]:
        keys = stored(f"local/{name}")
        assert (of_moments & set(keys) == of_moments) == (keys["optimizer"] != "sgd")
        apart = of_moments | ({"train", "parameters", "timeout"} - set(keys))
        assert (name == "own") == ("train" in keys)
        assert set(keys) - of_moments - {"name"} == set(vars(LocalSettings())) - apart


BY_HAND = ("experiment/", "sentences", "texts", "tune")  # all of it


def bare(name: str, folder: Path) -> dict[str, object]:
    """What a file composes to without its own keys: by its list of defaults alone."""
    group, _, choice = name.rpartition("/")
    own = OmegaConf.to_container(OmegaConf.load(FILES[name]))
    assert isinstance(own, dict)
    head = "# @package _global_\n" if "@package _global_" in text_of(name) else ""
    kept = {key: own[key] for key in ("defaults", "name") if key in own}
    file = folder / group / f"{choice}__bare.yaml"
    file.parent.mkdir(exist_ok=True)
    file.write_text(head + yaml.safe_dump(kept, sort_keys=False))
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        path = f"hydra.searchpath=[file://{folder}]"
        cfg = compose("config", overrides=[f"{group}={choice}__bare", path])
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    return {str(k): v for k, v in plain.items()}


def test_writing_the_files_anew_changes_nothing() -> None:
    texts = choice_texts() | part_texts()
    assert [str(path) for path, text in texts.items() if path.read_text() != text] == []
    assert {*FILES.values()} - {*texts} == {FILES[n] for n in FILES if n.startswith(BY_HAND)}


def test_a_default_that_changed_a_key_that_is_gone_and_a_comment_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONF, tmp_path / "conf")
    monkeypatch.setattr(choice_files, "CONF", tmp_path / "conf")
    mlp, gone = tmp_path / "conf" / "model" / "mlp.yaml", tmp_path / "conf" / "model" / "gone.yaml"
    text, top = mlp.read_text(), (tmp_path / "conf" / "config.yaml").read_text()
    gone.write_text(text)
    mlp.write_text(text.replace("dropout: 0.0", "dropout: 0.5").replace("bias: true", "skew: 1"))
    changed = top.replace("rounds: 150", "rounds: 15")
    assert changed != top
    (tmp_path / "conf" / "config.yaml").write_text(changed)
    choice_files.main()
    assert mlp.read_text() == text
    assert (tmp_path / "conf" / "config.yaml").read_text() == top
    assert not gone.exists()


def test_what_is_written_is_what_the_signatures_say() -> None:
    for name in {*FILES} & {*NODES} - {*DIFFERENT} - {"local/own"}:
        assert OmegaConf.to_container(OmegaConf.load(FILES[name])) == NODES[name]
    top = OmegaConf.to_container(OmegaConf.load(FILES["config"]))
    assert isinstance(top, dict)
    assert {k: v for k, v in top.items() if k not in {"defaults", "hydra"}} == NODES["run"]


@pytest.mark.parametrize("name", DIFFERENT)
def test_no_default_stands_twice(name: str, tmp_path: Path) -> None:
    """A file says what differs from what it builds on, in code and in other files."""
    group = name.partition("/")[0]
    own = OmegaConf.to_container(OmegaConf.load(FILES[name]))
    assert isinstance(own, dict)
    keys = flatten(own if "@package _global_" in text_of(name) else {group: own})
    if group == "experiment":  # which chooses other files beside it
        before = flatten(bare(name, tmp_path))
    else:
        before = flatten(OmegaConf.to_container(OmegaConf.merge(NODES["run"], *lineage(name)[:-1])))
    again = [key for key, value in keys.items() if repr(before.get(key, ...)) == repr(value)]
    assert [key for key in again if not key.endswith("name")] == []


def test_a_default_that_stands_twice_is_found(tmp_path: Path) -> None:
    before = flatten(bare("experiment/million", tmp_path))
    assert before["evaluate.every"] == EvaluateConfig().every == 1
    assert before["local.lr"] == LocalSettings().lr


ALIASES = {
    "fedslop": "fed_rac_lora",
    "asymmetric_lora": "ffa_lora",
    "full": "fedavg",
    "lora": "fedavg_lora",
    "cola": "fed_cola",
    "relora": "fed_relora",
}


@pytest.mark.parametrize("name", ALIASES)
def test_another_name_of_a_method_has_no_settings_of_its_own(name: str) -> None:
    own = yaml.safe_load(FILES[f"method/{name}"].read_text())
    assert own == {"defaults": [ALIASES[name]], "name": name}
    assert METHODS[name] is METHODS[ALIASES[name]]


def test_no_method_has_its_settings_twice() -> None:
    assert aliases() == ALIASES


def test_what_choices_share_is_used() -> None:
    lists = " ".join(path.read_text() for path in FILES.values())
    assert [name for name in SHARED if f"- /{name}" in lists] == SHARED


@pytest.mark.parametrize("name", FILES)
def test_the_first_comment_says_what_the_choice_is(name: str) -> None:
    lines = FILES[name].read_text().splitlines()
    first = next(line for line in lines if "@package" not in line)
    assert first.startswith("# ")
    assert len(first) > 10
    group, _, choice = name.rpartition("/")
    if group:
        assert groups()[group][choice] == first.removeprefix("# ")


def test_what_the_help_of_keys_names_is_there() -> None:
    told = [keys_of(group, name) for group, names in groups().items() for name in names]
    told += map(section_keys, sections())
    found = {name for text in told for name in re.findall(r"\bfedraclora(?:\.\w+)+", text)}
    assert "fedraclora.RoundStep" in found
    for name in found:
        assert pkgutil.resolve_name(name)


@pytest.mark.parametrize("data", ["text", "glue_stsb", "shakespeare", "least_squares", "table"])
def test_only_digits_are_pretrained_on_unless_it_is_asked_for(data: str) -> None:
    """Or the server would train on what is the clients', before the first round."""
    plain = composed(f"data/{data}", WITH.get(f"data/{data}", []))
    assert plain["pretrain"] == choice("pretrain", "none")
