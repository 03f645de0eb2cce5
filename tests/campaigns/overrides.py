"""Random override sets: each runs, or is refused in one message; nothing in between.

    python -m tests.campaigns.overrides --times 10000 --seed 0

Each set goes through the code of the command line in a forked process of its own, which has limits
of time and of memory. A share of them runs a round; the others end where the run would start. What
can be wrong is

    traceback   an error that nobody foresaw
    words       a refusal that is not one message
    signs       a sign in what is printed that a terminal obeys
    folder      a refusal that leaves a run folder
    dropped     a key that was accepted and is not in the config of the run
    unknown     a group or key of the top that no schema knows, accepted
    hung        no end within the limit of time
    died        a process that was killed, or ended without a word

and is printed with few words that still show it. The status is non-zero if there is any.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import pytest
import yaml
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import OmegaConf

from fedraclora.commands.cli import main
from fedraclora.compose.choices import CONF, NODES
from fedraclora.compose.choices import choice as choice_of
from fedraclora.compose.choices import groups as all_groups
from fedraclora.rng import generator
from fedraclora.strategies.base import FedStrategy
from fedraclora.weights.files import flatten

T = TypeVar("T")
SMALL = (
    *("data=digits", "data.labels=null", "pretrain=none", "partition=iid", "model.hidden=[6]"),
    *("clients=8", "clients_per_round=4", "rounds=1", "output=study", "output.sync=false"),
    "local.lr=0.1",
)
CHOSEN = {"data": "digits", "pretrain": "none", "partition": "iid", "output": "study"}
SECONDS = 10  # of the processor, for one set
BYTES = 4 << 30  # of memory, beside what the parent has
RUNS = 0.15  # share of the sets that run a round
BUG = "this is a bug of fedraclora"
# Choices that start processes, or load libraries and data for seconds: not of this campaign.
SLOW = {"engine": {"ray", "flower"}, "model": {"hf", "minilm"}, "data": {"virtual"}}
BOUNDARY: tuple[object, ...] = (0, 1, -1, 2, 3, 0.5, 1.0, -0.5, 1e-12)
ABSURD: tuple[object, ...] = (
    *(2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 1e308, -1e308, 1e-308, 3e38, -0.0),
    *(math.inf, -math.inf, math.nan, None, True, False),
    *([], [0], [None], [[]], [10**8], [1] * 50, {}, {"a": 1}, {"name": [0]}, {"name": "x"}),
    *("", "x", "auto", "null", "all", "*", "~", "é", "日本語", "\u202ex", "a b", "x" * 3000),
    *("../x", "2024-01-01", "1e3", "0x10", "1_000", "math:sqrt", "os:getcwd", "/dev/null"),
)
# Signs that terminals, rich and file systems read: in values, and in the names of folders.
HOSTILE = (
    *("[/y]z", "b[/red]x", "[red]", "[link=x]y", "[/]", "[[x]]", "a\\[b", ":smile:", "[bold"),
    *("\x1b[2Jx", "\x1b]0;x\x07", "\x9b31m", "a\nerror: b", "a\r\nb", "a\tb", "\u2028x"),
    *("<b>x</b>", "a|b", "`x`", "$(id)", "%s%n", "{x}", "{0.__class__}", "a;b", "a&b", "\udcff"),
    *(
        " x ",
        ".",
        "..",
        "-x",
        "~",
        "~nobody-has-this",
        "a/../b",
        "a//b",
        "con",
        "x" * 300,
        "\u0301",
    ),
)
PLACES = ("output.dir", "output.dir", "output.dir", "resume", "init_from", "data.root")
RAW = (
    *("${foo}", "${seed}", "${oc.env:HOME}", "${oc.env:NIX}", "???"),
    *("${", "[1,", "'", "{a:", "1,2", "choice(1,2)"),
)


@dataclass(frozen=True)
class Ended:
    """How a set ended.

    Attributes:
        status: Of the process; the name of a signal that ended it.
        said: What it wrote to stderr.
        config: That of the run, where it was accepted.
        left: Whether there is a run folder.
    """

    status: int | str
    said: str
    config: dict[str, Any] | None
    left: bool


class Started(BaseException):
    """Ends a set that is only checked, where its run would start."""


# ---- Drawing ------------------------------------------------------------------------------------


class Schema(NamedTuple):
    """Keys of the top, choices of each group, keys of each choice, the choice where none is set."""

    top: dict[str, Any]
    groups: dict[str, list[str]]
    keys: dict[tuple[str, str], dict[str, Any]]
    chosen: dict[str, str]


@cache
def schema() -> Schema:
    """Read what can be set."""
    top = yaml.safe_load((CONF / "config.yaml").read_text())
    groups: dict[str, list[str]] = defaultdict(list)
    keys = {}
    for group, choices in all_groups().items():
        for choice in choices:
            if group != "experiment" and choice not in SLOW.get(group, ()):
                groups[group].append(choice)
                keys[group, choice] = flatten(choice_of(group, choice))
    defaults = {
        k: v for entry in top["defaults"] if isinstance(entry, dict) for k, v in entry.items()
    }
    chosen = {group: defaults[group] for group in groups if group not in CHOSEN} | CHOSEN
    return Schema(flatten(NODES["run"]), dict(groups), keys, chosen)


def pick(rng: np.random.Generator, options: Sequence[T]) -> T:
    """Draw one of some things."""
    return options[int(rng.integers(len(options)))]


def drawn(seed: int, number: int) -> tuple[list[str], bool]:
    """Draw the words of a set, and whether it runs."""
    rng = generator(seed, "override sets", number)
    top, groups, keys_of, default = schema()
    chosen = dict(default)
    words = []
    for _ in range(pick(rng, (0, 0, 1, 1, 2, 3))):
        group = pick(rng, sorted(groups))
        chosen[group] = pick(rng, groups[group])
        words.append(f"{group}={chosen[group]}")
    for _ in range(pick(rng, (0, 1, 1, 1, 2, 3))):
        group = pick(rng, ("", *sorted(groups)))
        keys = keys_of[group, chosen[group]] if group else top
        if keys:
            words.append(word(f"{group}." if group else "", keys, rng))
    if rng.random() < 0.2:
        key = pick(rng, PLACES)
        words.append(f"{'+' * (key == 'data.root')}{key}={written(f'made/{pick(rng, HOSTILE)}')}")
    return words, bool(rng.random() < RUNS)


def word(prefix: str, keys: Mapping[str, Any], rng: np.random.Generator) -> str:
    """Draw a key, sometimes one that nobody knows, and what it is set to."""
    name = pick(rng, sorted(keys))
    values = (
        lambda: written(near(keys[name], rng)),
        lambda: written(pick(rng, BOUNDARY)),
        lambda: written(pick(rng, ABSURD)),
        lambda: written(pick(rng, HOSTILE)),
        lambda: pick(rng, RAW),
    )
    value = values[int(rng.choice(5, p=(0.28, 0.18, 0.37, 0.1, 0.07)))]()
    if rng.random() < 0.12:
        place = int(rng.integers(len(name) + 1))
        name = name[:place] + pick(rng, "xq_.") + name[place:]
    if rng.random() < 0.03:
        return f"~{prefix}{name}"
    return f"{pick(rng, ('', '', '', '', '', '+', '++'))}{prefix}{name}={value}"


def near(value: object, rng: np.random.Generator) -> object:
    """Draw a value of the type of a default."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return pick(rng, (value, value + 1, max(0, value - 1), 2 * value, 1, 2))
    if isinstance(value, float):
        return pick(rng, (value, value / 2, value * 2, 0.1, 0.9))
    return value


def written(value: object) -> str:
    """Write a value as the command line has it."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./:-]+", value) else quoted(value)
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{written(v)}" for k, v in value.items()) + "}"
    return str(value)


def quoted(text: str) -> str:
    """Quote a text as Hydra reads it; every other sign stands for itself."""
    escaped = re.sub(r"(\\*)('|\Z)", lambda m: m[1] * 2 + (m[2] and r"\'"), text)
    return f"'{escaped}'"


# ---- Trying -------------------------------------------------------------------------------------


def warm(folder: Path) -> None:
    """Run a small job, so that the forked processes have libraries, data and Hydra's files.

    Hydra reads thirty files for each command, and composes twice where it is not told the mode.
    """
    files: dict[str, ConfigResult | None] = {}
    load = ConfigRepository.load_config

    def remember(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        if config_path not in files:
            files[config_path] = copy.deepcopy(load(self, config_path))
        return load(self, config_path)

    def recall(self: ConfigRepository, config_path: str) -> ConfigResult | None:
        return files[config_path] if config_path in files else load(self, config_path)

    patch = pytest.MonkeyPatch()
    patch.setattr(ConfigRepository, "load_config", remember)
    with redirect_stdout(sys.stderr), pytest.raises(SystemExit):
        main(["simulate", *SMALL, f"output.dir={folder}"])
    patch.setattr(ConfigRepository, "load_config", recall)  # a fork may change what it is given
    patch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)
    gc.freeze()


def attempt(words: Sequence[str], *, runs: bool, home: Path) -> Ended:
    """Push a set through the command line, in a process of its own and in an empty folder."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _in_child(words, runs=runs, home=home)
    status: int | str = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if isinstance(status, int) and status < 0:
        status = signal.Signals(-status).name
    said, config = home / "said", home / "accepted.yaml"
    return Ended(
        status,
        said.read_text(errors="replace") if said.exists() else "",
        yaml.safe_load(config.read_text()) if config.is_file() else None,
        (home / "run").exists(),
    )


def _in_child(words: Sequence[str], *, runs: bool, home: Path) -> None:
    """Try a set, and end the process with its status."""
    run = FedStrategy.run

    def begin(self: FedStrategy, *rest: Any, **more: Any) -> Any:
        if self.recorder.folder is None:  # a round that tries a learning rate
            return run(self, *rest, **more)
        shutil.copyfile(self.recorder.folder / "config.yaml", home / "accepted.yaml")
        if not runs:
            raise Started
        return run(self, *rest, **more)

    status: object = 99
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        FedStrategy.run = begin  # type: ignore[method-assign]
        os.chdir(home)
        said, out = home / "said", home / "out"
        with (
            said.open("w", errors="backslashreplace") as stderr,
            out.open("w", errors="backslashreplace") as stdout,
            redirect_stderr(stderr),
            redirect_stdout(stdout),
        ):
            try:
                main(["simulate", *SMALL, f"output.dir={home / 'run'}", *words])
            except Started:
                status = 0
            except SystemExit as end:
                status = end.code or 0
            except BaseException as error:
                stderr.write(f"Traceback\n{type(error).__name__}: {error}\n")
    finally:
        os._exit(status if isinstance(status, int) else 98)


# ---- Judging ------------------------------------------------------------------------------------


def judged(words: Sequence[str], ended: Ended) -> str | None:
    """Say what is wrong with how a set ended; None if nothing is."""
    if ended.status in {"SIGXCPU", "SIGKILL"}:
        return "hung"
    if "Traceback" in ended.said or BUG in ended.said:
        errors = re.findall(r"^(\w[\w.]*: .{0,70})", ended.said, flags=re.MULTILINE)
        named = [line for line in errors if not line.startswith("error: ")]
        return f"traceback: {named[-1] if named else ended.said[-80:]}"
    if found := re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", ended.said):
        return f"signs: {found[0]!r}"
    if ended.status in {1, 2}:
        return refused(ended)
    if ended.status or ended.config is None:
        return f"died: {ended.status}"
    return accepted(words, ended.config, ended.said)


def refused(ended: Ended) -> str | None:
    """Say what is wrong with a refusal: one message, and no folder but that of a run."""
    messages = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if ended.status == 2 and ended.said.startswith("usage:"):
        return None
    if len(messages) != 1:
        return f"words: {ended.said[:60]}"
    return "folder" if ended.left and not messages[0].startswith("error: round ") else None


def accepted(words: Sequence[str], config: Mapping[str, Any], said: str) -> str | None:
    """Say which key of an accepted set is not in the config of its run, or in no schema.

    What is left out of a word with ``++`` is said, and so is not dropped in silence.
    """
    parsed = OverridesParser.create().parse_overrides([*words])
    last = {str(override.key_or_group): override for override in parsed}
    top, groups, *_ = schema()
    tops = {key.partition(".")[0] for key in top} | {*groups, "experiment"}
    for key, override in last.items():
        if key.partition(".")[0] not in tops | {"hydra"}:
            return f"unknown: {key.partition('.')[0]}"
        inside = any(
            o != key and (o.startswith(f"{key}.") or key.startswith(f"{o}.")) for o in last
        )
        if override.is_delete() or key in groups or inside:
            continue
        if f"note: {key} has no effect here" in said:
            continue
        found: Any = config
        for part in key.split("."):
            found = found.get(part, KeyError) if isinstance(found, dict) else KeyError
        text = str(override.input_line)
        if found is KeyError or ("${" not in text and not same(override.value(), found)):
            return f"dropped: {key}"
    return None


def same(asked: object, found: object) -> bool:
    """Tell whether a config has what was asked for; mappings are merged, and so not compared."""
    wanted = OmegaConf.to_container(OmegaConf.create({"value": asked}))["value"]  # type: ignore[index, call-overload]
    return isinstance(wanted, dict) or repr(wanted) == repr(found)


# ---- All of it ----------------------------------------------------------------------------------


def shortened(words: list[str], kind: str, *, runs: bool, home: Path) -> list[str]:
    """Leave out words as long as the rest still shows the same."""
    for one in list(words):
        fewer = [other for other in words if other is not one]
        if judged(fewer, attempt(fewer, runs=runs, home=home)) == kind:
            words = fewer
    return words


def campaign(numbers: Sequence[int], seed: int) -> Iterator[tuple[str, list[str]]]:
    """Draw, try and judge sets; give each failure with its words."""
    began, seen, ends = time.monotonic(), set[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fedraclora-overrides-") as made:
        home = Path(made) / "set"
        for done, number in enumerate(numbers, 1):
            words, runs = drawn(seed, number)
            ended = attempt(words, runs=runs, home=home)
            ends["refused" if ended.status else "ran" if runs else "accepted"] += 1
            if (kind := judged(words, ended)) is not None:
                if kind not in seen and kind != "hung":
                    words = shortened(words, kind, runs=runs, home=home)
                seen.add(kind)
                print(f"set {number}: {kind}: {words}", flush=True)
                yield kind, words
            if done % 200 == 0 or done == len(numbers):
                print(f"{done} sets in {time.monotonic() - began:.0f} s: {dict(ends)}", flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--times", type=int, default=10_000, help="sets")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args(argv)
    os.environ.pop("FEDRACLORA_DATA", None)  # what is refused here is refused everywhere
    with tempfile.TemporaryDirectory() as made:
        warm(Path(made) / "run")
    found: dict[str, list[list[str]]] = defaultdict(list)
    for kind, words in campaign(range(asked.first, asked.first + asked.times), asked.seed):
        found[kind].append(words)
    print(f"{asked.times} sets, {sum(map(len, found.values()))} failures of {len(found)} kinds")
    for kind, cases in sorted(found.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(cases):6d}  {kind}: {min(cases, key=len)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(run())
