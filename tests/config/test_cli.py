"""Bad input ends in one clear message and a non-zero exit, never in a traceback."""

from __future__ import annotations

import gc
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from rich.table import Table as RichTable

from fedraclora.commands.cli import COMMANDS, imported, main
from fedraclora.commands.status import UNREAD
from fedraclora.compose.choices import choice
from fedraclora.compose.overrides import composed
from fedraclora.compose.resume import explaining_resume
from fedraclora.config.run_config import from_plain
from fedraclora.protocol.cohorts import draw_cohort
from fedraclora.run.folder import resume_word
from fedraclora.run.ledger import read_ledger
from fedraclora.strategies.builder import RunBuilder
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.runner import execute
from fedraclora.terminal.progress import RunProgress, console_for_tables, plain_console
from fedraclora.weights.files import flatten
from tests.common import SMALL_RUN as SMALL
from tests.common import summary_of

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def logs() -> Iterator[None]:
    """Put the root logger back: Hydra gives it a handler on the stream of this test."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, logs: None) -> Run:
    """Call the console script in this process; give its exit status and what it wrote to stderr."""

    def call(*words: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["fedraclora"])  # it hands Hydra its words this way
        status: object = 0
        try:
            main(words)
        except SystemExit as end:
            status = end.code
        assert status is None or isinstance(status, int)
        return status or 0, unusual(capsys.readouterr().err)

    return call


@pytest.fixture
def simulate(command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run ``fedraclora simulate`` on a small job in ``run`` under the test's folder."""
    monkeypatch.delenv("FEDRACLORA_DATA", raising=False)  # a folder of the reader's has the files

    def call(*words: str) -> tuple[int, str]:
        return command("simulate", *SMALL, f"output.dir={tmp_path / 'run'}", *words)

    return call


def unusual(said: str) -> str:
    """Leave out what every run says first."""
    return "".join(line for line in said.splitlines(True) if not line.startswith("INFO "))


def assert_refused(found: tuple[int, str], *said: str) -> None:
    status, error = found
    assert status != 0
    assert "Traceback" not in error
    assert error.startswith("error: "), error
    missing = [part for part in said if part not in error]
    assert not missing, f"{missing} not in: {error}"


NAMES = "There are: "
# What the command adds to the refusals of the schema, which tests/unit/test_config.py has.
BAD: dict[str, tuple[list[str], list[str]]] = {
    "method": (
        ["method=fed_rac_lorra"],
        ["'fed_rac_lorra'", "did you mean 'fed_rac_lora'?", NAMES],
    ),
    "experiment": (["experiment=fedslop"], ["did you mean 'fedslop_mnist'?", NAMES]),
    "ranks of layers": (["method.rank={fc9: 3, fc*: 2}"], ["'fc9'", "did you mean"]),
    "allocation of a drawing": (
        ["allocation=adalora"],
        ["method=fed_rac_lora", "marks `both`", "allocation=none"],
    ),
    "allocation in a buffer": (
        ["allocation=heterolora", "system=buffered"],
        ["system.buffer does not go with rank allocation", "mixes replies"],
    ),
    "start of factors": (
        ["method.init=pissa", "method=fed_cola"],
        ["method.init=pissa", "begin anew", "docs/methods.md"],
    ),
    "rank above the layer": (
        ["method.rank=65", "method.cap=false"],
        ["method.rank=65", "fc1.weight has only 64", "lower the rank", "method.cap=true"],
    ),
    "rank above the layer, left": (
        ["method.rank=7", "method.cap=false", "method.train=A"],
        ["method.rank=7", "fc1.weight has only 6", "lower the rank"],
    ),
    "rank above the layer, fedavg_lora": (
        ["method=fedavg_lora", "method.rank=65", "method.cap=false"],
        ["method.rank=65", "fc1.weight has only 64", "lower the rank"],
    ),
    "cohort above the population": (
        ["clients_per_round=13"],
        ["clients_per_round=13", "12 clients", "lower clients_per_round"],
    ),
    "cohort above what is left": (
        [
            "partition=fedslop",
            "partition.alpha=0.01",
            "partition.empty=drop",
            "clients=60",
            "clients_per_round=59",
        ],
        ["clients_per_round=59", "clients (after empty ones are dropped)", "choose 1 to "],
    ),
    "targets": (["target_modules=fc9"], ["target_modules=fc9", "did you mean 'fc1'?", NAMES]),
    "no targets": (["target_modules=[]"], ["targets is an empty list", "null for the model's own"]),
    "empty pattern": (["target_modules=[fc1,'']"], ["has an empty pattern, which names no layer"]),
    "key that is added": (["+lr=0.1"], ["unknown key 'lr'; did you mean 'local.lr'"]),
    "key that nothing reads": (["attack.share=0.3"], ["attack.share=0.3 has no effect here"]),
    "metric of other data": (
        ["stop.metric=pearson", "stop.patience=2", "data.validation=0.1"],
        ["'pearson'", "There are: accuracy, loss"],
    ),
    "dense": (["modules_to_save=conv*"], ["modules_to_save=conv*", NAMES, "fc1"]),
    "empty client": (
        ["partition=fedslop", "partition.alpha=0.01", "clients=60"],
        ["of 60 clients without samples", "partition.empty=drop", "fewer clients"],
    ),
    "more clients than samples": (["clients=5000"], ["clients=5000", "1346 samples"]),
    "missing data": (["data=mnist"], ["data.root is not set", "Get the files with: npm pack"]),
    "missing file": (
        ["data=mnist", "data.root=nowhere"],
        [
            "there is no train-images-idx3-ubyte",
            "nowhere/MNIST/raw",
            "Get the files with: npm pack",
        ],
    ),
    "missing table": (
        ["data=table", "data.file=mine.tsv", "data.label=y", "model=mlp"],
        ["there is no mine.tsv", "set data.root"],
    ),
    "model of another kind": (
        ["model=transformer", "model.hidden=8", "model.heads=2"],
        ["a model of token ids", "model=mlp"],
    ),
    "no validation samples": (["evaluate.split=validation"], ["data.validation=0", "above 0"]),
    "resume from nowhere": (["resume=nowhere"], ["nowhere is not a run folder", "config.yaml"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused_with_what_to_do(simulate: Run, case: str, tmp_path: Path) -> None:
    words, said = BAD[case]
    assert_refused(simulate(*words), *said)
    # Else the same command, put right, would find a run in its way.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "words",
    [
        ["method=fedavg"],  # the job sets method.rank, which FedAvg has not
        ["data.validation=some"],
        ["data.validation=2"],
        ["data.labels=[42]"],
        ["model.hidden=[]"],
        ["partition=given"],
    ],
    ids=" ".join,
)
def test_no_bad_value_ends_in_a_traceback(simulate: Run, words: list[str]) -> None:
    status, error = simulate(*words)
    assert status != 0
    assert "Traceback" not in error
    key = words[-1].partition("=")[0].rpartition(".")[2]
    assert key in error or "rank" in error
    assert "training loss" not in error  # refused before it trains


def test_a_command_leaves_the_command_line_of_its_process(tmp_path: Path) -> None:
    before = [*sys.argv]
    with pytest.raises(SystemExit):
        main(["simulate", *SMALL, "rounds=0", f"output.dir={tmp_path / 'run'}"])
    assert sys.argv == before


# ---- A run that diverges ------------------------------------------------------------------------


def test_a_nan_loss_names_clients_and_round(simulate: Run, tmp_path: Path) -> None:
    found = simulate("local.lr=1e30")
    assert_refused(
        found, "round 1: 5 client(s) failed", "training loss is nan", "lower local.lr", "local.clip"
    )
    for client in draw_cohort(0, 1, 12, 5).tolist():
        assert f"client {client}:" in found[1]
    assert not (tmp_path / "run" / "summary.json").exists()


# ---- Run folders --------------------------------------------------------------------------------


def test_a_run_folder_that_exists_is_not_written_over(simulate: Run, tmp_path: Path) -> None:
    assert simulate()[0] == 0
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert_refused(simulate(), "holds a run already", "another output.dir", f"resume={tmp_path}")
    after = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    assert after == before


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds, without the summary that would make it a finished one."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    execute(RunBuilder(from_plain(composed([*SMALL, f"output.dir={folder}"]), METHODS), folder))
    (folder / "summary.json").unlink()
    return folder.rename(folder.with_name("kept"))


@pytest.fixture
def run(whole: Path) -> Path:
    """The same in the place where it ran, to be spoilt."""
    shutil.rmtree(whole.with_name("run"), ignore_errors=True)
    return Path(shutil.copytree(whole, whole.with_name("run")))


@pytest.mark.parametrize("damage", ["cut", "flipped", "other", "empty"])
def test_a_corrupt_checkpoint_is_refused(run: Path, command: Run, damage: str) -> None:
    path = run / "checkpoint" / "checkpoint.safetensors"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-5] ^= 1
    path.write_bytes(
        {"cut": whole[:-40], "flipped": bytes(flipped), "other": b"hello", "empty": b""}[damage]
    )
    found = command("simulate", f"resume={run}")
    assert_refused(found, str(path), "damaged", "restore the file from a copy", "without resume")


def test_a_corrupt_ledger_is_refused(run: Path, command: Run) -> None:
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    (run / "ledger.jsonl").write_text(lines[0] + "hello\n" + lines[2])
    found = command("simulate", f"resume={run}")
    assert_refused(found, "ledger.jsonl, line 2 is damaged", "restore the file from a copy")


@pytest.mark.parametrize("rows", [0, 1, 2])
def test_a_ledger_behind_its_checkpoint_is_refused(run: Path, command: Run, rows: int) -> None:
    lines = (run / "ledger.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == 3
    (run / "ledger.jsonl").write_text("".join(lines[:rows]))
    assert_refused(command("simulate", f"resume={run}"), "ledger")


def test_a_lost_checkpoint_does_not_cost_the_ledger(
    simulate: Run, command: Run, tmp_path: Path
) -> None:
    assert simulate("output.checkpoint_every=1")[0] == 0
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    (run / "checkpoint" / "checkpoint.safetensors").unlink()
    kept = (run / "ledger.jsonl").read_bytes()  # three rows: a kill leaves two at most
    assert_refused(command("simulate", f"resume={run}"), "checkpoint")
    assert (run / "ledger.jsonl").read_bytes() == kept


@pytest.mark.parametrize("text", ["", "method: 3\n", "method: [open"])
def test_a_corrupt_config_is_refused(run: Path, command: Run, text: str) -> None:
    (run / "config.yaml").write_text(text)
    assert_refused(command("simulate", f"resume={run}"), "config")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["method.rank=3"], "method.rank: 2 -> 3"),
        (["seed=1"], "seed: 0 -> 1"),
        (["local.lr=0.1"], "-> 0.1"),
        (["model.hidden=[5]"], "model.hidden: [6] -> [5]"),
        (["method=ffa_lora"], 'method.name: "fed_rac_lora" -> "ffa_lora"'),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
@pytest.mark.parametrize("how", ["auto", "folder"])
def test_resume_under_another_config_is_refused(
    run: Path, command: Run, how: str, words: list[str], said: str
) -> None:
    kept = (run / "ledger.jsonl").read_bytes()
    if how == "auto":
        found = command("simulate", *SMALL, f"output.dir={run}", "resume=auto", *words)
    else:
        found = command("simulate", f"resume={run}", *words)
    assert_refused(found, str(run), "with another config", said)
    assert (run / "ledger.jsonl").read_bytes() == kept


def test_resume_under_the_same_config_goes_on(run: Path, command: Run) -> None:
    assert command("simulate", f"resume={run}", "seed=0", "method.rank=2")[0] == 0
    summary = summary_of(run)
    assert summary["rounds"] == 2


# ---- The script itself --------------------------------------------------------------------------


def test_an_unknown_command_is_refused(command: Run) -> None:
    assert_refused(
        command("simulat"), "'simulat'", "did you mean 'simulate'?", "bench, compact, compare"
    )


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize(
    ("every", "said"),
    [(2, "with a checkpoint after round 2: 1 will be run again"), (9, "before its first check")],
)
def test_an_interrupt_says_where_the_run_stands_and_how_it_goes_on(
    simulate: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sign: signal.Signals,
    every: int,
    said: str,
) -> None:
    def row(self: RunProgress, row: dict[str, object]) -> None:
        if row["round"] == 3:
            signal.raise_signal(sign)

    words = ["rounds=4", "output.sync=false", f"output.checkpoint_every={every}"]
    with monkeypatch.context() as patch:
        patch.setattr(RunProgress, "row", row)
        status, error = simulate(*words)
    hint = resume_word(tmp_path / "run")
    assert (status, error.splitlines()[-1][:30]) == (130, "interrupted after round 3 of 4")
    assert said in error
    assert error.endswith(f"fedraclora simulate {hint}\n")
    elsewhere = explaining_resume(tmp_path / "run", "deploy connection=x", there=lambda: None)
    with pytest.raises(KeyboardInterrupt) as ended, elsewhere:
        raise KeyboardInterrupt
    (note,) = ended.value.__notes__
    last = 3 - 3 % every
    assert note.startswith("after round 3 of 4, and goes on there if the server could save it")
    assert f" after round {last}, its last regular checkpoint" in note
    assert note.endswith(f"fedraclora deploy connection=x {hint}")
    known = explaining_resume(tmp_path / "run", "deploy connection=x", there=lambda: 2)
    with pytest.raises(KeyboardInterrupt) as ended, known:  # the server has named its checkpoint
        raise KeyboardInterrupt
    assert "after round 3 of 4, with a checkpoint after round 2: 1 " in ended.value.__notes__[0]
    assert simulate(*words, f"resume={tmp_path / 'run'}") == (0, "")
    noted = {
        r["round"]: r["incidents"]
        for r in read_ledger(tmp_path / "run" / "ledger.jsonl")
        if "incidents" in r
    }
    first = last + 1 if last else 0
    assert noted == {
        first: [f"the run resumed after round {last}: rounds {last + 1} to 3 were run again"]
    }


def test_help_lists_the_groups_with_one_line_each(
    command: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for words in ((), ("--help",), ("simulate", "--help")):
        main(words)
        printed = capsys.readouterr().out
        assert "fed_rac_lora" in printed
        assert "a fresh shared sketch each round" in printed
        assert all(f"  {group}=" in printed for group in ("method", "data", "engine", "experiment"))
        assert all(
            f"\n  {name} " in printed for name in (*COMMANDS, "evaluate", "stop", "compression")
        )


def test_help_with_a_section_explains_its_keys(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("compression", "compression.uplink=int8", "++compression.uplink=int8"):
        main(["simulate", word, "--help"])
        printed = capsys.readouterr().out
        lines = [" ".join(line.split()) for line in printed.splitlines()]
        assert printed.startswith("compression\n  ")
        assert [line for line in lines if line.startswith("compression.uplink=float32 ")]
        assert "float32, bfloat16, int8, int4, eden4, eden3, eden2, eden1" in " ".join(lines)
        assert "groups:" not in printed
    main(["simulate", "evaluate.every=2", "local=momentum", "evaluate.split=test", "--help"])
    parts = capsys.readouterr().out.split("\n\n")
    assert [part.split("\n")[0] for part in parts[::2]] == ["evaluate", "local=momentum"]
    assert "evaluate.split=test" in parts[1]


def test_help_with_a_choice_explains_its_keys_wherever_they_stand(
    command: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main(["simulate", "local=relora", "seed=1", "method=fedslop", "--help"])
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    for wanted in (
        "local=relora",
        "ReLoRA's AdamW (method=relora): 1 % of the moments outlives a link, then a new warm-up.",
        "local.warmup=1 Rounds of linear warm-up.",
        "local.optimizer_state_kept=0.01 Share of them that is kept after a merge; for merge only.",
        "method.name=fedslop",
        "method.alpha=auto Numerator of the scale s = alpha / r, or auto (s = 1).",
    ):
        assert wanted in lines
    keys = {line.partition("=")[0] for line in lines if re.match(r"(local|method)\.\w+=", line)}
    assert keys == set(flatten({"local": choice("local", "relora")})) | set(
        flatten({"method": choice("method", "fed_rac_lora")})
    )
    (tmp_path / "local").mkdir()
    own = "# Mine.\ndefaults: [momentum]\nname: mine\nlr: 0.1\n"
    (tmp_path / "local/mine.yaml").write_text(own)
    main(["simulate", "--config-dir", str(tmp_path), "local=mine", "--help"])
    printed = capsys.readouterr().out
    assert "  Mine.\n" in printed
    assert re.search(
        r"local\.lr=0\.1 +Step size of the tensors that the method trains; auto", printed
    )
    assert re.search(r"local\.momentum=0\.9 +Heavy-ball", printed)
    # A file of one group that builds on one of the whole config: each has its own place.
    (tmp_path / "data").mkdir()
    (tmp_path / "data/mine.yaml").write_text("# Mine.\ndefaults: [own]\nsamples: mine:samples\n")
    main(["simulate", "--config-dir", str(tmp_path), "data=mine", "--help"])
    lines = [(line.split() or [""])[0] for line in capsys.readouterr().out.splitlines()]
    assert {"clients=null", "data.name=own", "data.samples=mine:samples"} <= {*lines}
    assert not any(line.startswith("data.data.") for line in lines)
    assert_refused(command("simulate", "local=momentun", "--help"), "did you mean 'momentum'?")


def test_the_version_is_that_of_the_package(
    command: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"fedraclora {metadata.version('fedraclora')}\n"


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("fedraclora ", {"simulate", "deploy", "compare"}),
        ("fedraclora si", {"simulate"}),
        ("fedraclora simulate eng", {"engine="}),
        ("fedraclora simulate -m seed=1,2 method=fedavg", {"method=fedavg", "method=fedavg_lora"}),
        (
            "fedraclora deploy nodes=3 method=fedavg local.optimizer_st",
            {"local.optimizer_state=", "local.optimizer_state_kept="},
        ),
        ("fedraclora deploy nodes=3 local=ad", {"local=adamw"}),
        ("fedraclora deploy nodes=3 local=dp_sgd local.dp.c", {"local.dp.clip="}),
        ("fedraclora simulate --config-dir {own} experiment=mi", {"experiment=mine"}),
        ("fedraclora compare ", set()),
    ],
)
def test_tab_completes_commands_and_configs(
    command: Run,
    line: str,
    found: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 3\n")
    monkeypatch.setenv("COMP_LINE", line.format(own=tmp_path))
    main(["-sc", "query=bash"])
    printed = set(capsys.readouterr().out.split())
    assert found <= printed
    assert bool(found) == bool(printed)
    assert not any(name.startswith("aggregator") for name in printed)


def test_completion_is_installed_for_the_script(
    command: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["-sc", "install=bash"])
    assert capsys.readouterr().out.endswith("-F hydra_bash_completion fedraclora\n")


def test_what_flower_would_run_is_printed(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["deploy", "seed=3", "--cfg", "job", "clients=7", "clients_per_round=2"])
    assert ended.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["engine"]["name"], printed["seed"], printed["clients"]) == ("deploy", 3, 7)


def test_deploy_prints_a_client_for_each_node(
    command: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["deploy", "nodes=3", "--cfg", "job", "-p", "clients"])
    assert capsys.readouterr().out == "3\n"


@pytest.mark.slow
def test_a_sweep_over_choices_may_have_keys_of_some(command: Run, tmp_path: Path) -> None:
    own = tmp_path / "own" / "experiment" / "mine.yaml"
    own.parent.mkdir(parents=True)
    own.write_text("# @package _global_\nrounds: 0\n")
    sweep = ["attack=none,sign_flip", "++attack.scale=5", f"output.dir={tmp_path / 'runs'}"]
    words = [word for word in SMALL if not word.startswith("rounds")]
    first = ["-m", "--config-dir", str(own.parents[1]), "experiment=mine"]
    status, error = command("simulate", *words, *first, *sweep)
    assert (status, error) == (
        0,
        "note: attack.scale has no effect here: ++attack.scale=5 is left out\n",
    )
    configs = [yaml.safe_load(p.read_text()) for p in (tmp_path / "runs").glob("*/config.yaml")]
    attacks = sorted((c["attack"] for c in configs), key=lambda attack: str(attack["name"]))
    assert [a.get("scale") for a in attacks] == [None, 5]
    assert {c["rounds"] for c in configs} == {0}


def console(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    script = shutil.which("fedraclora", path=str(Path(sys.executable).parent))
    assert script is not None, "the console script is not installed: run `make install`"
    return subprocess.run([script, *words], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.smoke
def test_the_installed_script_refuses_in_one_line(tmp_path: Path) -> None:
    done = console("simulate", "method=fed_rac_lorra", folder=tmp_path)
    assert done.returncode != 0
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: unknown method 'fed_rac_lorra'")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--help"], ["simulate", "method=fed_rac_lora", "--help"]])
def test_a_reader_that_stops_reading_ends_a_command_in_silence(words: list[str]) -> None:
    """What `fedraclora --help | head` does, with a head that reads nothing."""
    read, written = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "fedraclora.commands.cli", *words]
    done = subprocess.run(command, stdout=written, stderr=subprocess.PIPE, text=True, check=False)
    os.close(written)
    assert (done.returncode, done.stderr) == (UNREAD, "")


MARKED = "b[/red]x [bold] :smile: $\\foo$"  # what rich and matplotlib take for markup


@pytest.mark.slow
def test_no_name_of_a_users_is_markup(
    command: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FEDRACLORA_DATA", raising=False)
    monkeypatch.chdir(tmp_path)
    for words in (
        ["simulate", *SMALL, f"output.dir='{MARKED}'", "output.plots=true", "output.chain=true"],
        ["simulate", f"resume='{MARKED}'"],
        ["export", MARKED, "--out", f"{MARKED} export"],
        ["export", MARKED, "--out", f"{MARKED} export"],
        ["compare", MARKED, "--out", f"{MARKED} table"],
        ["report", MARKED, "--out", f"{MARKED}.html", "--title", MARKED],
        ["compact", MARKED],
    ):
        status, said = command(*words)
        assert "Traceback" not in said
        assert status == ("is not empty" in said), said
    assert Path(f"{MARKED} export", "README.md").is_file()
    assert Path(f"{MARKED}.html").is_file()


def test_names_are_printed_as_they_are(command: Run, capsys: pytest.CaptureFixture[str]) -> None:
    console_for_tables().print(RichTable(MARKED, title=MARKED))
    plain_console().print(f"written to {MARKED}")
    assert capsys.readouterr().out.count(MARKED) == 3
    assert command(MARKED)[0] == 1


@pytest.mark.long  # in this process, see above
def test_the_installed_script_ends_a_diverging_run(tmp_path: Path) -> None:
    done = console("simulate", *SMALL, "output.dir=run", "local.lr=1e30", folder=tmp_path)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert unusual(done.stderr).startswith("error: round 1: 5 client(s) failed")
    assert (tmp_path / "run" / "checkpoint" / "checkpoint.safetensors").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


@pytest.mark.slow
def test_a_run_imports_nothing_that_it_does_not_need(tmp_path: Path) -> None:
    """The main job, with pretraining and a partition of flwr-datasets; plots come at its end."""
    heavy = ["flwr", "matplotlib", "mlflow", "ray", "scipy", "seaborn", "sklearn", "sympy"]
    heavy += ["torch._dynamo", "transformers"]
    words = ["simulate", "rounds=1", "pretrain.epochs=1", "output.plots=false"]
    words += [f"output.dir={tmp_path / 'run'}"]
    code = f"from fedraclora.commands import cli\ntry: cli.main({words})\n"
    code += "except SystemExit: pass\n"
    code += f"import sys; print('found', [n for n in {heavy} if n in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("found []\n"), done.stdout
    assert (tmp_path / "run" / "summary.json").is_file()


def test_the_garbage_collector_leaves_the_imports_of_a_command_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what the command does it searches as before."""
    (tmp_path / "imports_a_lot.py").write_text("import gc\nwas = gc.isenabled()\n")
    monkeypatch.syspath_prepend(tmp_path)
    try:
        assert imported("imports_a_lot").was is False
        assert gc.isenabled()
        assert gc.get_freeze_count()
    finally:
        gc.unfreeze()
