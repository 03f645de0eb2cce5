"""The app that `fedraclora deploy` gives to Flower: its config and its bundle are whole."""

from __future__ import annotations

import io
import json
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from fedraclora.commands.app import copy_app
from fedraclora.compose.overrides import composed
from fedraclora.engines.programs import TETHERED
from fedraclora.errors import ConfigError
from fedraclora.strategies.server_app import config_from_text
from tests.common import SMALL_RUN as SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", r"cfg-json, .* is empty.*fedraclora deploy"),
        ("", "cfg-json is not JSON"),
        ("{'a': 1}", "cfg-json is not JSON"),
        ("[1]", "cfg-json, .* is empty"),
        ('{"seed": 0}', "method"),
    ],
)
def test_a_config_that_is_none_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config_from_text(text)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("engine=inline", "engine=inline"),
        ("output.dir=null", "output.dir=None: .* an absolute path"),
        ("output.dir=here", "output.dir=here: .* an absolute path"),
    ],
)
def test_a_config_of_another_place_is_refused(word: str, said: str) -> None:
    plain = composed([*SMALL, "engine=deploy", "output.dir=/tmp/run", word])
    with pytest.raises(ConfigError, match=said):
        config_from_text(json.dumps(plain))


# ---- The bundle ---------------------------------------------------------------------------------

PACKAGES = ("fedraclora", "strategies", "clients")
DOORS = ("commands", "compose", "launch", "terminal", "tuning")


# Of Flower's own, about a library that it uses.
quiet = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def names(folder: Path) -> set[str]:
    from flwr.cli.build import build_fab_from_disk

    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        return set(bundle.namelist())


@quiet
def test_the_bundle_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    code = [path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py")]
    own = {path.relative_to(ROOT).as_posix().removeprefix("fedraclora/") for path in code}
    own = {name for name in own if not name.startswith(DOORS)}
    rest = {"pyproject.toml", ".info/CONTENT"}
    copy_app(tmp_path / "copy")
    assert names(tmp_path / "copy") == {f"fedraclora/{name}" for name in own} | rest
    # From a checkout, where folders lie beside `fedraclora`, and other things beside them.
    shutil.copytree(tmp_path / "copy", tmp_path / "checkout")
    for name in ("strategies", "clients"):
        shutil.move(tmp_path / "checkout" / "fedraclora" / name, tmp_path / "checkout" / name)
    beside = {name if name.startswith(PACKAGES[1:]) else f"fedraclora/{name}" for name in own}
    for name in (
        "experiments/one_round.py",
        "tests/test_a.py",
        "conf/config.yaml",
        "runs/a/summary.json",
    ):
        (tmp_path / "checkout" / name).parent.mkdir(parents=True)
        (tmp_path / "checkout" / name).write_text("{}")
    assert names(tmp_path / "checkout") == beside | rest


@pytest.mark.slow
def test_flower_finds_the_apps_of_the_bundle(tmp_path: Path) -> None:
    from flwr.cli.config_utils import load_and_validate

    copy_app(tmp_path)
    config, warnings = load_and_validate(tmp_path / "pyproject.toml", check_module=True)
    assert warnings == []
    components = config["tool"]["flwr"]["app"]["components"]
    assert set(components) == {"serverapp", "clientapp"}


@pytest.mark.slow
def test_a_program_on_a_tether_ends_with_its_starter(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys, time; print(*sys.argv[1:], flush=True); time.sleep(300)\n")
    process = subprocess.Popen(
        [sys.executable, "-P", str(TETHERED), str(program), "a", "b"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.readline() == b"a b\n"
        assert process.poll() is None
        process.stdin.close()
        assert process.wait(timeout=60) == -signal.SIGTERM
