"""Whose code a config may name: judged before anything of it is imported or called."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import fedraclora
from fedraclora.binding import object_of
from fedraclora.commands import cli
from fedraclora.commands.check import check_node
from fedraclora.compose.overrides import composed
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.imports import import_object
from fedraclora.protocol.program import ClientProgram
from fedraclora.run.digests import write_digests
from fedraclora.strategies.weights import load_weights
from fedraclora.trust import VARIABLE, foreign, names_in, restricted_imports, trust, trusting
from tests.common import FIXED

SMALL = ("data=digits", "data.labels=null", "pretrain=none", "partition=iid", "model.hidden=[6]")
SMALL += (
    "clients=4",
    "clients_per_round=4",
    "rounds=1",
    "output=study",
    "output.sync=false",
    *FIXED,
)
MINE = """
import functools, os, pathlib, subprocess
from os import system
from subprocess import Popen
import torch
from torch.nn.functional import mse_loss

def mark(name):
    with open(os.environ["CANARY"], "a") as file:
        file.write(name + " ")

mark(__name__)

def loss(output, target, weight=1.0):
    mark("loss")
    return weight * torch.nn.functional.cross_entropy(output, target, reduction="none")

def factory(by):
    return loss

def number(by) -> int:
    mark("number")
    return by

class Silent:
    def __init__(self, by=1):
        mark("Silent")

part = functools.partial(loss, weight=2.0)
"""


@pytest.fixture
def canary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """Give what modules of the user's, in the working folder, have left since the last call."""
    work, file = tmp_path / "work", tmp_path / "canary"
    work.mkdir()
    (work / "trust_mine.py").write_text(MINE)
    (work / "trust_other.py").write_text(MINE)
    monkeypatch.setenv("CANARY", str(file))
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.chdir(work)

    def left() -> str:
        text = file.read_text() if file.exists() else ""
        file.unlink(missing_ok=True)
        return text

    yield left  # type: ignore[misc]  # as a fixture
    for name in ("trust_mine", "trust_other", "trust_evil"):
        sys.modules.pop(name, None)


def command(*words: str) -> int:
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    return int(end.value.code or 0)


# ---- Where it lies ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("subprocess:Popen", {"args": ["touch", "X"]}),
        ("os:system", {"command": "touch X"}),
        ("builtins:exec", {"source": "open('X', 'w')"}),
        ("_io:open", {"file": "X", "mode": "w"}),
        ("numpy:save", {"file": "X.npy", "arr": [1]}),
        ("yaml:unsafe_load", {"stream": "!!python/object/apply:os.mkdir [X]"}),
        ("torch:save", {"obj": 1, "f": "X"}),
        ("torch.hub:load", {"repo_or_dir": ".", "model": "x", "source": "local"}),
        ("torch.utils.cpp_extension:load", {"sources": ["x.cpp"]}),
        ("torch.utils.cpp_extension:subprocess", {}),
        ("torch.nn.functional:importlib", {}),
        ("torch.nn.functional:relu", {}),
        ("torch.nn.modules.module:torch", {}),
        ("torchmetrics.functional:accuracy", {}),
        ("flwr_datasets.partitioner:Mapping", {}),
        ("fedraclora.run.folder:make", {"folder": "X"}),
        ("fedraclora.run.folder:subprocess", {}),
        ("trust_mine:Popen", {"args": ["touch", "X"]}),
        ("trust_mine:system", {"command": "touch X"}),
        ("trust_mine:subprocess", {}),
        ("trust_mine:Silent", {"by": 2}),
        ("trust_linked:Popen", {"args": ["touch", "X"]}),
    ],
)
@pytest.mark.parametrize("key", ["data.loss", "data.metrics", "callbacks[0]", "local.extras[0]"])
def test_nothing_of_others_or_of_another_kind_is_called(
    key: str, name: str, parameters: dict[str, Any], canary: Callable[[], str]
) -> None:
    Path("trust_linked.py").symlink_to(Path(subprocess.__file__).resolve())
    kind = ClientProgram if key.startswith("local") else None
    before = {*Path().iterdir()}
    with pytest.raises(ConfigError, match=name.partition(":")[2]):
        object_of(key, {"name": name, **parameters}, kind)
    assert {*Path().iterdir()} - before <= {Path("__pycache__")}
    assert canary() in {"", "trust_mine "}


def test_what_is_of_another_kind_is_not_made(canary: Callable[[], str]) -> None:
    import_object("data.loss", "trust_mine:loss")
    canary()
    for name, kind in (("Silent", None), ("Silent", ClientProgram), ("number", ClientProgram)):
        with pytest.raises(ConfigError):
            object_of("data.loss", {"name": f"trust_mine:{name}", "by": 1}, kind)
        assert not canary(), name


def test_a_module_of_others_is_not_even_imported(
    canary: Callable[[], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "lib" / "site-packages"
    place.mkdir(parents=True)
    (place / "trust_evil.py").write_text(MINE)
    monkeypatch.syspath_prepend(place)
    with pytest.raises(ConfigError, match="trust=trust_evil"):
        import_object("data.loss", "trust_evil:loss")
    assert not canary()
    assert "trust_evil" not in sys.modules
    with trusting(["trust_evil"]):
        assert import_object("data.loss", "trust_evil:loss").__name__ == "loss"
        with pytest.raises(ConfigError, match="subprocess:Popen"):
            import_object("data.loss", "trust_evil:Popen")
    assert canary() == "trust_evil "


def test_what_may_be_named_is_found(canary: Callable[[], str]) -> None:
    for name in ("trust_mine:loss", "trust_mine:part", "trust_mine:mse_loss"):
        assert callable(object_of("data.loss", name))
    assert object_of("data.loss", {"name": "trust_mine:loss", "weight": 2.0}).keywords
    names = ("torch.nn:L1Loss", "torch.nn.functional:cross_entropy", "torchmetrics:MeanMetric")
    for name in (*names, "flwr_datasets.partitioner:LinearPartitioner"):
        assert import_object("data.loss", name).__name__ == name.partition(":")[2]
    assert isinstance(object_of("data.loss", "torch.nn:L1Loss"), torch.nn.Module)
    assert canary()


@pytest.mark.parametrize("module", ["os", "_io", "builtins", "json.decoder", "numpy", "torch.hub"])
def test_modules_of_python_and_of_packages_are_foreign(module: str) -> None:
    assert foreign(module)


def test_what_is_trusted_are_names_of_modules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "")
    with pytest.raises(ConfigError, match="name of a module"):
        trust(["../evil"])
    with trusting("math"):
        assert import_object("data.loss", "math:sqrt")(4.0) == 2.0
    with pytest.raises(ConfigError, match="standard library"):
        import_object("data.loss", "math:sqrt")


# ---- Who says it --------------------------------------------------------------------------------


def test_a_command_imports_what_its_words_name(canary: Callable[[], str]) -> None:
    with restricted_imports(["data.loss={name:trust_mine:loss,weight:2}"]):
        import_object("data.loss", "trust_mine:loss")
        for name in ("trust_mine:factory", "trust_other:loss"):
            with pytest.raises(ConfigError, match=name):
                import_object("data.loss", name)
    assert canary() == "trust_mine "
    for word in ("resume=runs/trust_mine:loss", "a.trust_mine:loss", "trust_mine:loss/b"):
        with restricted_imports([word]), pytest.raises(ConfigError, match="trust=trust_mine"):
            import_object("data.loss", "trust_mine:loss")


def test_names_are_those_of_keys_that_take_code() -> None:
    config = {
        "data": {
            "loss": 'mine:f {"a": 1}',
            "metrics": ["accuracy", {"name": "mine:g", "x": "y:z"}],
            "features": ["height:cm"],
        },
        "model": {"name": "function", "function": "mine:net", "path": "hub:name"},
        "callbacks": ["mine:watch"],
        "local": [],
    }
    assert names_in(config) == {
        "model.function": "mine:net",
        "data.loss": "mine:f",
        "data.metrics[1].name": "mine:g",
        "callbacks[0]": "mine:watch",
    }


@pytest.fixture
def theirs(tmp_path: Path, canary: Callable[[], str]) -> Path:
    """A run folder of somebody's, which names two functions of modules that are here."""
    folder = tmp_path / "theirs"
    fedraclora.simulate(*SMALL, folder=folder)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config["data"]["loss"] = "trust_mine:loss"
    config["callbacks"] = [{"name": "trust_other:factory", "by": 1}]
    text = yaml.safe_dump(config, sort_keys=False)
    write_digests(folder, text, None)
    (folder / "config.yaml").write_text(text)
    assert not canary()
    return folder


@pytest.mark.parametrize(
    "words",
    [
        ("evaluate", "{}"),
        ("predict", "{}", "--data", "test"),
        ("export", "{}"),
        ("simulate", "resume={}", "rounds=2"),
        ("deploy", "nodes=2", "resume={}"),
    ],
)
def test_commands_run_nothing_of_a_folder_and_list_all_it_names(
    words: tuple[str, ...],
    theirs: Path,
    canary: Callable[[], str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert command(*(word.format(theirs) for word in words)) == 1
    said = capsys.readouterr().err
    assert "data.loss=trust_mine:loss" in said
    assert "callbacks[0].name=trust_other:factory" in said
    assert "trust=trust_mine,trust_other" in said
    assert not canary()


@pytest.mark.parametrize("words", [("compare", "{}"), ("report", "{}"), ("compact", "{}")])
def test_commands_that_only_read_import_nothing(
    words: tuple[str, ...], theirs: Path, canary: Callable[[], str]
) -> None:
    command(*(word.format(theirs) for word in words))
    assert not canary()


def test_python_runs_nothing_of_a_folder(theirs: Path, canary: Callable[[], str]) -> None:
    for read in (fedraclora.read_run, load_weights):
        with pytest.raises(ConfigError, match="trust_other:factory"):
            read(theirs)
    with pytest.raises(FedRacLoraError, match="trust_other:factory"):
        fedraclora.simulate(*SMALL, folder=theirs, resume=True, rounds=2)
    assert not canary()


def test_a_folder_is_read_where_its_modules_are_trusted(
    theirs: Path, canary: Callable[[], str]
) -> None:
    assert command("evaluate", str(theirs), "trust=[trust_mine, trust_other]") == 0
    assert "loss" in canary()
    assert command("evaluate", str(theirs)) == 1  # another command trusts nothing
    run = fedraclora.read_run(theirs, trust=["trust_mine", "trust_other"])
    assert run.evaluate() != {}


def test_the_environment_trusts_modules_for_all_commands(
    theirs: Path, canary: Callable[[], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, "trust_mine")
    assert command("evaluate", str(theirs)) == 1  # one of two
    monkeypatch.setenv(VARIABLE, "trust_mine,trust_other")
    assert command("evaluate", str(theirs)) == 0
    assert "loss" in canary()
    assert command("export", str(theirs), "--format", "state_dict") == 0


@pytest.mark.parametrize("words", [("evaluate",), ("predict",), ("export",), ()])
def test_help_says_how_code_of_a_folder_is_trusted(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    if words:
        command(*words, "--help")
    else:
        cli.main(["--help"])
    assert "trust=" in capsys.readouterr().out


def test_weights_are_loaded_where_the_modules_of_their_run_are_trusted(
    theirs: Path, canary: Callable[[], str]
) -> None:
    with pytest.raises(ConfigError, match="trust_other:factory"):
        load_weights(theirs, trust=["trust_mine"])
    found = load_weights(theirs, trust=["trust_mine", "trust_other"])
    assert {*found} == {*fedraclora.read_run(theirs).weights()}


def test_a_run_of_ones_own_goes_on_by_the_words_it_was_begun_with(
    canary: Callable[[], str], tmp_path: Path
) -> None:
    words = [*SMALL, "data.loss=trust_mine:loss", f"output.dir={tmp_path / 'run'}"]
    assert command("simulate", *words) == 0
    assert command("simulate", f"resume={tmp_path / 'run'}", "rounds=2") == 1
    assert command("simulate", *words[:-1], f"output.dir={tmp_path / 'run'}", "resume=auto") == 0
    again = [f"resume={tmp_path / 'run'}", "rounds=2", "data.loss=trust_mine:loss"]
    assert command("simulate", *again) == 0
    assert command("simulate", *again[:1], "rounds=3", "trust=trust_mine") == 0
    own = fedraclora.simulate(
        *SMALL, loss="trust_mine:loss", folder=tmp_path / "run", resume=True, rounds=4
    )
    assert own.rows[-1]["round"] == 4
    assert canary()


def test_a_check_of_a_node_imports_nothing_of_the_operators_file(
    canary: Callable[[], str], tmp_path: Path
) -> None:
    config = {**composed([*SMALL]), "callbacks": ["trust_other:factory"]}
    config["data"] = {**config["data"], "loss": "trust_mine:loss"}  # type: ignore[dict-item]
    file = tmp_path / "check.yaml"
    file.write_text(yaml.safe_dump({"versions": {}, "config": config}))
    words = ["--superlink", "127.0.0.1:9", "--insecure", "--node-config", "partition-id=0"]
    with pytest.raises(ConfigError, match=r"trust_other:factory.*|trust_mine:loss.*"):
        check_node(words, str(file))
    assert not canary()


PRESET = """# @package _global_
defaults: [{override /partition: "trust_other:part"}]
data: {loss: "trust_mine:loss"}
"""


def preset(folder: Path, text: str) -> list[str]:
    (folder / "experiment").mkdir(parents=True)
    (folder / "experiment" / "p.yaml").write_text(text)
    return ["--config-dir", str(folder), "experiment=p", *SMALL[3:]]


def test_a_preset_is_the_users_own_in_the_working_folder_alone(
    canary: Callable[[], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = preset(tmp_path / "there", PRESET)
    Path("linked").symlink_to(tmp_path / "there")
    for folder in (str(tmp_path / "there"), "linked"):
        assert command("simulate", "--config-dir", folder, *words[2:], "--cfg", "job") == 1
        said = capsys.readouterr().err
        assert "trust_other:part" in said
        assert "data.loss=trust_mine:loss" in said
    with pytest.raises(ConfigError, match="trust_other:part"):
        composed(words)
    assert not canary()
    own = PRESET.replace("trust_other:part", "auto")
    words = [*preset(Path("conf"), own), "data=digits", "pretrain=none"]
    assert command("simulate", *words, f"output.dir={tmp_path / 'run'}") == 0
    assert "loss" in canary()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("hydra: {callbacks: {x: {_target_: trust_mine.Silent}}}\n", "keys of Hydra"),
        ("hydra: {job_logging: {version: 1, handlers: {x: {(): trust_mine.mark}}}}\n", "Hydra"),
        ("seed: !!python/object/apply:os.mkdir [X]\n", "cannot be read"),
        ("output: {dir: '${oc.env:CANARY}'}\n", "oc.env"),
    ],
)
def test_a_preset_makes_no_objects_and_takes_nothing_of_the_environment(
    text: str, said: str, canary: Callable[[], str], tmp_path: Path
) -> None:
    words = preset(tmp_path / "there", f"# @package _global_\n{text}")
    with pytest.raises(ConfigError, match=said):
        composed(words)
    assert command("simulate", *words) == 1
    assert command("deploy", "nodes=2", *words) == 1
    assert not canary()
    assert not Path("X").exists()


def test_hydra_itself_makes_nothing_of_files_in_the_working_folder(
    canary: Callable[[], str],
) -> None:
    target = "# @package _global_\nhydra: {callbacks: {x: {_target_: trust_mine.Silent}}}\n"
    assert command("simulate", *preset(Path("conf"), target)) == 1
    Path("conf/hydra/launcher").mkdir(parents=True)
    Path("conf/hydra/launcher/evil.yaml").write_text("_target_: trust_mine.Silent\n")
    chosen = "# @package _global_\ndefaults: [{override /hydra/launcher: evil}]\n"
    Path("conf/experiment/p.yaml").write_text(chosen)
    assert command("simulate", "-m", "--config-dir", "conf", "experiment=p", "seed=0,1") == 1
    assert not canary()
