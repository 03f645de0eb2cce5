"""Overrides that cannot be: named with the nearest that can, whatever Hydra says of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fedraclora.compose.overrides import composed, flags_first, searched
from fedraclora.config.run_config import from_plain
from fedraclora.errors import ConfigError
from fedraclora.protocol.plan import own_rank
from fedraclora.strategies.methods import METHODS

pytestmark = pytest.mark.usefixtures("users_hydra")

OWN = """# @package _global_
defaults:
  - override /local: mine
rounds: 3
"""


@pytest.fixture
def configs(tmp_path: Path) -> Path:
    """A folder of a user's own configs."""
    for name, text in (
        ("experiment/mine", OWN),
        ("local/mine", "defaults: [sgd, _self_]\nname: mine\nlr: 0.3\n"),
        ("local/nameless", "defaults: [sgd, _self_]\n"),
    ):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lr=0.1"], ["unknown key 'lr'; did you mean 'local.lr' or 'pretrain.lr'?"]),
        (["local.learning_rate=1"], ["'local.learning_rate'; did you mean 'local.lr'?"]),
        (["clints=3", "local.bach_size=4"], ["mean 'clients'?", "mean 'local.batch_size'?"]),
        (["~locl.lr"], ["unknown key 'locl.lr'; did you mean 'local.lr'?"]),
        (["local.lr.x=3"], ["unknown key 'local.lr.x'"]),
        (["+local.lr=3"], ["the config has the key local.lr already: write it without the +"]),
        (["attack.scale=5"], ["attack=none has no key scale", "sign_flip, scaled_noise"]),
        (["method=fedavg", "method.rank=3"], ["method=fedavg has no key rank", "++method.rank=3"]),
        (["local=null"], ["local=null: a group is chosen by the name"]),
        (["local=adam"], ["unknown local 'adam'; did you mean 'adamw'?"]),
        (
            ["target_modules=query,value"],
            ["needs -m", "a list is written 'target_modules=[query,value]'"],
        ),
        (["output.dir=a, b: c"], ["needs -m", """a text 'output.dir="a, b: c"'"""]),
        (["output.dir=lr=0.5 (best)"], ["""quotes of its own, 'output.dir="lr=0.5 (best)"'"""]),
        (["seed=range(3)"], ["needs -m: fedraclora simulate -m 'seed=range(3)'"]),
        (['method.rank={"*": 2}'], ["cannot be read as key=value", "{a: 1, *: 2}"]),
        (["rounds=???", "seed=???"], ["rounds, seed: ???", "set rounds=VALUE seed=VALUE"]),
        (["local.name=adamw"], ["local=sgd", "Write local=adamw"]),
        (["pretrain.name=foo"], ["pretrain.name='foo'"]),
        (["output.name=foo"], ["output.name='foo'"]),
        (["system.name=[3]"], ["system.name=[3]"]),
        (["hydra.searchpath=[/nowhere]"], ["a folder that does not exist", "/nowhere"]),
        (["--config-dir", "/nowhere"], ["--config-dir '/nowhere': "]),
    ],
    ids=" ".join,
)
def test_what_does_not_compose_is_said_in_plain_words(words: list[str], said: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        composed(words)
    missing = [part for part in said if part not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    assert "append to your config" not in str(caught.value)


@pytest.mark.parametrize("word", ["target_modules=[query,value]", "target_modules='query,value'"])
def test_patterns_are_a_list_or_a_text(word: str) -> None:
    assert composed([word])["target_modules"] in (["query", "value"], "query,value")


def test_the_pattern_that_an_error_suggests_can_be_pasted() -> None:
    with pytest.raises(ConfigError) as caught:
        own_rank({"fc1": 2, "layer.0.q*": 3}, "fc3.weight")
    suggested = re.search(r"'(method\.rank=.*)'", str(caught.value))
    assert suggested is not None
    method = composed([suggested[1]])["method"]
    assert isinstance(method, dict)
    assert method["rank"] == {"fc1": 2, "layer.0.q*": 3, "*": 3}


# --- configs of a user's own ---------------------------------------------------------------------


@pytest.mark.parametrize("how", ["flag", "flag=", "path"])
def test_own_configs_are_found(configs: Path, how: str) -> None:
    first = {
        "flag": ["--config-dir", str(configs)],
        "flag=": [f"--config-dir={configs}"],
        "path": [f"hydra.searchpath=[{configs}]"],
    }[how]
    plain = composed([*first, "experiment=mine", "seed=4"])
    assert (plain["rounds"], plain["seed"]) == (3, 4)
    assert from_plain(plain, METHODS).local.lr == 0.3
    with pytest.raises(ConfigError, match=r"experiment 'min'.*'mine'"):
        composed([*first, "experiment=min"])
    with pytest.raises(ConfigError, match=r"unknown key 'round'.*'rounds'"):
        composed([*first, "experiment=mine", "round=3"])


def test_a_name_is_that_of_its_file(configs: Path) -> None:
    with pytest.raises(ConfigError, match=r"local.name='sgd', .*local=nameless"):
        composed(["--config-dir", str(configs), "local=nameless"])


def test_both_ways_to_name_folders_go_together(configs: Path) -> None:
    words = ["hydra.searchpath=[/a,/b]", "--config-dir", str(configs), "seed=1"]
    assert searched(words) == ["seed=1", f"hydra.searchpath=[file://{configs},/a,/b]"]


def test_overrides_may_stand_on_both_sides_of_a_flag() -> None:
    words = ["seed=1", "-m", "--config-dir", "mine", "~local.dp", "a.b=2"]
    assert flags_first(words) == ["-m", "--config-dir", "mine", "seed=1", "~local.dp", "a.b=2"]


# --- words with ++, which may be of no use -------------------------------------------------------


@pytest.mark.parametrize(
    ("beside", "word"),
    [
        ("method=fedavg", "++method.rank=3"),  # it has no such key
        ("attack=none", "++attack.scale=5"),
        ("model=linear", "++model.dropout=0.1"),
        ("method=ffa_lora", "++method.density=0.3"),  # it does not read it
        ("local.schedule=constant", "++local.min_lr_ratio=0.3"),
    ],
)
def test_a_word_of_no_use_is_left_out_and_named(
    beside: str, word: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert composed([beside, word, "seed=3"]) == composed([beside, "seed=3"])
    key = word.lstrip("+").partition("=")[0]
    assert capsys.readouterr().err == f"note: {key} has no effect here: {word} is left out\n"


def test_a_word_of_use_stays(capsys: pytest.CaptureFixture[str]) -> None:
    plain = composed(["attack=sign_flip", "++attack.scale=5", "++method.rank=3"])
    attack, method = plain["attack"], plain["method"]
    assert isinstance(attack, dict)
    assert isinstance(method, dict)
    assert (attack["scale"], method["rank"]) == (5, 3)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("word", ["++method.rnak=3", "++lr=0.1", "++attack.skale=3"])
def test_a_key_that_no_choice_has_is_no_word_of_use(word: str) -> None:
    with pytest.raises(ConfigError, match="unknown key"):
        composed([word])


@pytest.mark.slow
def test_a_key_of_two_parts_is_explained_by_the_choice_that_has_it() -> None:
    with pytest.raises(ConfigError, match=r"local=sgd .*dp\.clip.*dp_sgd"):
        composed(["local.dp.clip=0.5"])
    with pytest.raises(ConfigError, match="unknown key") as found:
        composed(["local=dp_sgd", "local.dp.target_epsilon=2"])
    assert "'targets'" not in str(found.value)
