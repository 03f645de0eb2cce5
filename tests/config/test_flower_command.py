"""``fedraclora flower`` refuses before anything starts; the app's config and bundle are whole."""

from __future__ import annotations

import io
import json
import shlex
import shutil
import signal
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from flwr.cli.build import build_fab_from_disk
from flwr.cli.config_utils import load_and_validate
from flwr.common.config import flatten_dict, fuse_dicts, parse_config_args

import fedraclora
from fedraclora.clients.engines import in_process
from fedraclora.commands import cli, flower
from fedraclora.commands.app import copy_app
from fedraclora.commands.simulate import simulate
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.engines.flower.superlink import SuperLink
from fedraclora.engines.programs import TETHERED
from fedraclora.errors import ConfigError, EngineError
from fedraclora.run.ledger import Row, read_ledger
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.outcome import execute
from fedraclora.strategies.server.callbacks import own_callbacks
from fedraclora.strategies.server_app import config_from_text
from tests.common import summary_of

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    "data=digits",
    "data.labels=null",
    "pretrain=none",
    "partition=iid",
    "model.hidden=[6]",
    "method.rank=2",
    "clients=12",
    "cohort=5",
    "rounds=2",
    "output=study",
]
Called = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Called:
    """Call the command; give its status and what it wrote to stdout and stderr."""

    def call(*words: str) -> tuple[int, str, str]:
        status = cli.run("flower", [*SMALL, f"output.dir={tmp_path / 'run'}", *words])
        return (status, *capsys.readouterr())

    return call


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if a SuperLink is started."""

    def fail(self: SuperLink) -> None:
        raise AssertionError("a SuperLink was started")

    monkeypatch.setattr(SuperLink, "__enter__", fail)


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["engine=ray"], "engine is ray, but Flower started this process: use engine=flower"),
        (["engine=flowr"], "did you mean 'flower'?"),
        (["engine.chunk=2"], "trains one client at a time"),
        (["engine.workers=0"], "engine.workers is 0"),
        (["engine.workers=1000"], "Flower serves at most"),
        (["engine.gpus=99"], "engine.gpus is 99 for each process"),
        (["clints=3"], "unknown key 'clints'; did you mean 'clients'?"),
        (["method.rnk=3"], "rnk"),
        (["method=fed_rac_lorra"], "did you mean 'fed_rac_lora'?"),
        (["data.name=digit"], "did you mean 'digits'?"),
        (["resume=nowhere"], "nowhere is no run folder"),
        (["--write", "run.txt"], "a file named *.toml"),
    ],
)
def test_what_cannot_run_is_refused_in_one_message(
    words: list[str], said: str, call: Called, tmp_path: Path
) -> None:
    status, out, err = call(*words)
    assert status == 1
    assert out == ""
    assert err.startswith("error: ")
    assert said in err
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("started")
def test_a_run_that_is_there_is_not_written_over(call: Called, tmp_path: Path) -> None:
    words = [*SMALL, "engine=inline", f"output.dir={tmp_path / 'run'}"]
    simulate(composed(words), tmp_path / "run")
    status, _, err = call()
    assert status == 1
    assert "holds a run already" in err
    status, out, _ = call("resume=auto")
    assert status == 0
    assert "is finished already" in out
    status, _, err = call("resume=auto", "seed=1")
    assert status == 1
    assert "seed: 0 -> 1" in err


@pytest.mark.usefixtures("started")
def test_what_is_written_is_what_the_app_reads(call: Called, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    folder = tmp_path / "it's \\ [é]"  # quotes and slashes of JSON, TOML and the shell
    quoted = "output.dir='" + str(folder).replace("'", r"\'") + "'"
    status, out, _ = call("--write", str(file), quoted, "engine.workers=1")
    assert status == 0
    program, verb, app, *rest = shlex.split(out)
    assert (program, verb, app) == ("flwr", "run", str(ROOT))
    assert rest[:3] == ["--stream", "-c", str(file)]
    options = parse_config_args([rest[4]])
    assert options["num-supernodes"] == 12
    assert options["client-resources-num-gpus"] == 0.0
    assert options["init-args-num-cpus"] == 1
    # As Flower reads it: a key that pyproject.toml does not have is refused.
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["flwr"]["app"]
    found = fuse_dicts(flatten_dict(project["config"]), parse_config_args([str(file)]))
    assert found["resume"] is False
    config = config_from_text(str(found["cfg-json"]))
    assert config.output.dir == str(folder)
    wanted = composed([*SMALL, "engine=flower", "engine.workers=1", f"output.dir={tmp_path}/run"])
    assert config.digested == config_from_text(json.dumps(wanted)).digested


@pytest.mark.usefixtures("started")
def test_relative_folders_are_those_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert flower.prepare([*SMALL, "output.dir=here"]).folder == tmp_path / "here"
    request = flower.prepare(SMALL)
    assert request.folder.is_absolute()
    assert request.config.output.dir == str(request.folder)
    assert request.folder.is_relative_to(tmp_path / "runs")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", r"cfg-json, .* is empty.*fedraclora flower --write"),
        ("", "cfg-json is no JSON"),
        ("{'a': 1}", "cfg-json is no JSON"),
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
        ("engine=inline", "engine is inline"),
        ("output.dir=null", "output.dir is None, .* an absolute path"),
        ("output.dir=here", "output.dir is here, .* an absolute path"),
    ],
)
def test_a_config_of_another_place_is_refused(word: str, said: str) -> None:
    plain = composed([*SMALL, "engine=flower", "output.dir=/tmp/run", word])
    with pytest.raises(ConfigError, match=said):
        config_from_text(json.dumps(plain))


# ---- The bundle ---------------------------------------------------------------------------------

PACKAGES = ("fedraclora", "strategies", "clients")
DOORS = ("commands", "compose", "terminal", "tuning")


# Of Flower's own, about a library that it uses.
quiet = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")


def names(folder: Path) -> set[str]:
    with zipfile.ZipFile(io.BytesIO(build_fab_from_disk(folder))) as bundle:
        return set(bundle.namelist())


def test_a_run_of_the_engine_that_simulate_had_goes_on_with_another(tmp_path: Path) -> None:
    """As a release wrote it in which `simulate` had Flower's runtime among its engines."""
    old, whole = tmp_path / "old", tmp_path / "whole"
    words = [*SMALL, "output.checkpoint_every=1"]

    def stop(row: Row) -> None:
        if row["round"] == 1:
            raise KeyboardInterrupt

    config = from_plain(composed([*words, "engine=flower"]), METHODS)
    with pytest.raises(KeyboardInterrupt):
        execute(config, old, lambda _: in_process(), callbacks=own_callbacks("callbacks", stop))
    assert [row["round"] for row in read_ledger(old / "ledger.jsonl")] == [0, 1]
    with pytest.raises(ConfigError, match=r"engine=flower .* engine=ray .* inline"):
        fedraclora.simulate(*words, "engine=flower", folder=old, resume=True)
    fedraclora.simulate(*words, "engine=inline", folder=old, resume=True)
    fedraclora.simulate(*words, "engine=inline", folder=whole)
    found, wanted = (summary_of(f) for f in (old, whole))
    assert found["weights_digest"] == wanted["weights_digest"]
    assert found["ledger_digest"] == wanted["ledger_digest"]


@quiet
def test_the_bundle_holds_the_code_and_nothing_else(tmp_path: Path) -> None:
    code = [path for name in PACKAGES for path in ROOT.glob(f"{name}/**/*.py")]
    own = {path.relative_to(ROOT).as_posix().removeprefix("fedraclora/") for path in code}
    own = {name for name in own if not name.startswith(DOORS)}
    own |= {"strategies/steps/conflicts.yaml"}
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


def test_flower_finds_the_apps_of_the_bundle(tmp_path: Path) -> None:
    copy_app(tmp_path)
    config, warnings = load_and_validate(tmp_path / "pyproject.toml", check_module=True)
    assert warnings == []
    components = config["tool"]["flwr"]["app"]["components"]
    assert set(components) == {"serverapp", "clientapp"}


# ---- The SuperLink ------------------------------------------------------------------------------


def test_a_superlink_that_does_not_start_says_why(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program = tmp_path / "flower-superlink"
    program.write_text("import sys; sys.exit('no such port')\n")
    monkeypatch.setattr(shutil, "which", lambda name, path: str(program))
    link = SuperLink()
    with pytest.raises(EngineError, match=r"SuperLink did not start.*no such port"), link:
        pass
    assert not link.home.exists()


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
