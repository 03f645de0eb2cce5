"""Random override sets: each runs, or is refused in one message; nothing in between.

    python -m tests.campaigns.overrides --times 10000 --seed 0

Each set goes through the code of the command line in a forked process of its own, which has limits
of time and of memory. A share of them runs a round; the others end where the run would start. What
is wrong is one of

    traceback   an error that nobody foresaw
    words       a refusal that is not one message, or a status that does not fit
    folder      a refusal that leaves a run folder
    dropped     a key that was accepted and is not in the config of the run
    unknown     a key that no schema knows, accepted
    hung        no end within the limit
    died        a process that was killed, or ended without a word

and is printed with the fewest words that still show it. The status is non-zero if there is any.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.config_repository import ConfigRepository
from hydra._internal.hydra import Hydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.plugins.config_source import ConfigResult
from hydra.types import RunMode
from omegaconf import OmegaConf

from experiments.choices import CONF
from experiments.cli import main
from fedraclora.checkpoint import flatten
from strategies.base import FedStrategy

SMALL = [
    *("data=digits", "data.labels=null", "pretrain=none", "partition=iid", "model.hidden=[6]"),
    *("clients=8", "cohort=4", "rounds=1", "output=study", "output.sync=false"),
]
SECONDS = 8  # of the processor, for one set
BYTES = 4 << 30  # of memory, beside what the parent has
RUN_SHARE = 0.15
MARK = "this is a bug of fedraclora"
# Choices that start processes, or load libraries for seconds: other campaigns have those.
SLOW = {"engine": {"ray", "flower"}, "model": {"hf", "minilm"}, "data": {"virtual"}}
NO_GROUPS = {"experiment"}
BOUNDARY: list[object] = [0, 1, -1, 2, 3, 0.5, 1.0, -0.5, 1e-12]
ABSURD: list[object] = [
    *(2**31, 2**63 - 1, 2**63, -(2**63), 10**30, 1e308, -1e308, 1e-308, 3e38),
    *(math.inf, -math.inf, math.nan, -0.0),
    *(None, True, False, [], [0], [None], [[]], {}, {"a": 1}, {"name": [0]}, {"name": "x"}),
    *(
        "",
        "x",
        "auto",
        "null",
        "all",
        "*",
        "é",
        "日本語",
        "\u202ex",
        "a b",
        "x" * 3000,
        "../x",
        "~",
    ),
    *(
        [10**8],
        [1] * 50,
        "2024-01-01",
        "1e3",
        "0x10",
        "1_000",
        "math:sqrt",
        "os:getcwd",
        "/dev/null",
    ),
]
RAW = [
    "${foo}",
    "${seed}",
    "${oc.env:HOME}",
    "${oc.env:NIX}",
    "???",
    "${",
    "[1,",
    "'",
    "{a:",
    "1,2",
    "choice(1,2)",
]


@dataclass(frozen=True)
class Ended:
    """How a set ended: its status, what it said, and the config that it was accepted with."""

    status: int | str
    said: str
    config: dict[str, Any] | None
    left: bool


class Started(BaseException):
    """Ends a set that is only checked, where its run would start."""


def schema() -> tuple[dict[str, Any], dict[str, list[str]], dict[tuple[str, str], dict[str, Any]]]:
    """Read the keys of a run, the choices of each group, and the keys of each choice."""
    top = yaml.safe_load((CONF / "config.yaml").read_text())
    own = {
        k: v for k, v in flatten(top).items() if k.partition(".")[0] not in {"defaults", "hydra"}
    }
    groups: dict[str, list[str]] = defaultdict(list)
    keys = {}
    for path in sorted(CONF.glob("*/*.yaml")):
        group, choice = path.parent.name, path.stem
        if group in NO_GROUPS or choice in SLOW.get(group, ()):
            continue
        groups[group].append(choice)
        keys[group, choice] = flatten(yaml.safe_load(path.read_text()) or {})
    return own, dict(groups), keys


TOP, GROUPS, KEYS = schema()


def written(value: object) -> str:
    """Write a value as a word of the command line."""
    if isinstance(value, str):
        return value if re.fullmatch(r"[\w./:-]+", value) else json.dumps(value, ensure_ascii=False)
    if isinstance(value, list):
        return "[" + ",".join(map(written, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{k}:{written(v)}" for k, v in value.items()) + "}"
    return (
        {None: "null", True: "true", False: "false"}.get(value, str(value))
        # type: ignore[call-overload]
        if (value is None or isinstance(value, bool))
        else str(value)
    )


def near(value: object, rng: random.Random) -> object:
    """Give a value of the same type as a default."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return rng.choice([value, value + 1, max(0, value - 1), 2 * value, 1, 2])
    if isinstance(value, float):
        return rng.choice([value, value / 2, value * 2, 0.1, 0.9])
    return value


def drawn(seed: int, number: int) -> list[str]:
    """Draw the words of a set."""
    rng = random.Random(f"{seed}/{number}")
    chosen = {
        "data": "digits",
        "partition": "iid",
        "pretrain": "none",
        "output": "study",
        "model": "mlp",
    }
    chosen |= {"method": "fed_rac_lora", "local": "sgd", "engine": "vectorised"}
    words = []
    for group in rng.sample(sorted(GROUPS), rng.choice([0, 0, 1, 1, 2, 3])):
        chosen[group] = rng.choice(GROUPS[group])
        words.append(f"{group}={chosen[group]}")
    for _ in range(rng.choice([0, 1, 1, 1, 2, 3])):
        group = rng.choice([None, *GROUPS])
        if group is None:
            keys, prefix = TOP, ""
        else:
            keys, prefix = (
                KEYS[
                    group,
                    chosen.get(group, "none" if "none" in GROUPS[group] else GROUPS[group][0]),
                ],
                f"{group}.",
            )
        if not keys:
            continue
        words.append(word(prefix, keys, rng))
    return words


def word(prefix: str, keys: dict[str, Any], rng: random.Random) -> str:
    """Draw one key and what it is set to."""
    name = rng.choice(sorted(keys))
    kind = rng.random()
    value = (
        written(near(keys[name], rng))
        if kind < 0.3
        else written(rng.choice(BOUNDARY))
        if kind < 0.5
        else rng.choice(RAW)
        if kind > 0.93
        else written(rng.choice(ABSURD))
    )
    mark = rng.choice(["", "", "", "", "", "+", "++"])
    if rng.random() < 0.12:  # a key that nobody knows
        place = rng.randrange(len(name) + 1)
        name = name[:place] + rng.choice("xq_.") + name[place:]
    if rng.random() < 0.03:
        return f"~{prefix}{name}"
    return f"{mark}{prefix}{name}={value}"


def attempt(words: Sequence[str], *, runs: bool, home: Path) -> Ended:
    """Push a set through the command line in a process of its own."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _in_child(words, runs=runs, home=home)
    _, how = os.waitpid(child, 0)
    said = (home / "said").read_text(errors="replace") if (home / "said").exists() else ""
    config = home / "accepted.yaml"
    status: int | str = os.waitstatus_to_exitcode(how)
    if isinstance(status, int) and status < 0:
        status = signal.Signals(-status).name
    return Ended(
        status,
        said,
        yaml.safe_load(config.read_text()) if config.is_file() else None,
        (home / "run").exists(),
    )


def _in_child(words: Sequence[str], *, runs: bool, home: Path) -> None:
    """Run a set and end the process with its status."""
    status: object = 99
    try:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, used + BYTES))
        spent = math.ceil(time.process_time())
        resource.setrlimit(resource.RLIMIT_CPU, (spent + SECONDS, spent + SECONDS))
        start = FedStrategy.start

        def begin(self: FedStrategy, *rest: Any, **more: Any) -> Any:
            shutil.copyfile(home / "run" / "config.yaml", home / "accepted.yaml")
            if not runs:
                raise Started
            return start(self, *rest, **more)

        FedStrategy.start = begin  # type: ignore[method-assign]
        os.chdir(home)
        place = [f"output.dir={home / 'run'}"]
        with (home / "said").open("w", errors="backslashreplace") as said, redirect_stderr(said):
            with (home / "out").open("w") as out, redirect_stdout(out):
                try:
                    main(["simulate", *SMALL, *place, *words])
                except Started:
                    status = 0
                except SystemExit as end:
                    status = end.code or 0
                except BaseException as error:
                    print(f"Traceback: {type(error).__name__}: {error}", file=sys.stderr)
    finally:
        os._exit(status if isinstance(status, int) else 98)


def judged(words: Sequence[str], ended: Ended) -> str | None:
    """Say what is wrong with how a set ended; None if nothing is."""
    if ended.status in {"SIGXCPU", "SIGKILL"}:
        return "hung"
    if isinstance(ended.status, str):
        return f"died: {ended.status}"
    if "Traceback" in ended.said or MARK in ended.said:
        found = re.findall(
            r"^(\w[\w.]*(?:Error|Exception|Value|Interrupt|Exit|Warning)\b.{0,60})",
            ended.said,
            flags=re.MULTILINE,
        )
        return f"traceback: {found[-1] if found else ended.said[-80:]}"
    errors = [line for line in ended.said.splitlines() if line.startswith("error: ")]
    if ended.status in {1, 2} and ended.said.startswith("usage:"):
        return None
    if ended.status == 1:
        if len(errors) != 1:
            return "words: " + ended.said[:60]
        trained = errors[0].startswith("error: round ")
        return "folder" if ended.left and not trained else None
    if ended.status:
        return f"died: status {ended.status}"
    if ended.config is None:
        return "died: without a run"
    return accepted(words, ended.config)


def accepted(words: Sequence[str], config: dict[str, Any]) -> str | None:
    """Say what of an accepted set is not in the config of its run, or in no schema."""
    parsed = OverridesParser.create().parse_overrides([*words])
    last = {override.key_or_group: override for override in parsed}
    for key, override in last.items():
        if override.is_delete() or key in GROUPS or key is None:
            continue
        value: Any = config
        for part in key.split("."):
            if not isinstance(value, dict) or part not in value:
                return f"dropped: {key}"
            value = value[part]
        asked = OmegaConf.create({"v": override.value()})
        if "${" not in str(override.input_line):
            wanted = OmegaConf.to_container(asked)["v"]  # type: ignore[index, call-overload]
            if not isinstance(wanted, dict) and not _same(wanted, value) and not _under(key, last):
                return f"dropped: {key}"
        group = key.partition(".")[0]
        known = key in TOP or any(
            key.removeprefix(f"{group}.") in keys for (g, _), keys in KEYS.items() if g == group
        )
        if not known and group in config and not any(k.startswith(f"{key}.") for k in TOP):
            fields = group in GROUPS and isinstance(config[group], dict)
            if not fields:
                return f"unknown: {key.partition('.')[0]}"
    return None


def _under(key: str, others: dict[str, Any]) -> bool:
    return any(
        other and (other.startswith(f"{key}.") or key.startswith(f"{other}."))
        for other in others
        if other != key
    )


def _same(left: object, right: object) -> bool:
    if isinstance(left, float) and isinstance(right, float) and math.isnan(left):
        return math.isnan(right)
    return left == right


def shortened(words: list[str], kind: str, *, runs: bool, home: Path) -> list[str]:
    """Leave out words as long as the rest still shows the same."""
    for one in list(words):
        fewer = [w for w in words if w is not one]
        if judged(fewer, attempt(fewer, runs=runs, home=home)) == kind:
            words = fewer
    return words


def campaign(numbers: Sequence[int], seed: int, *, shown: bool) -> Iterator[tuple[str, list[str]]]:
    """Draw and judge sets; give each failure with its words."""
    with tempfile.TemporaryDirectory(prefix="fedraclora-overrides-") as made:
        home = Path(made) / "set"
        began, seen, ends = time.monotonic(), set(), Counter[str]()
        for done, number in enumerate(numbers, 1):
            words = drawn(seed, number)
            runs = random.Random(f"{seed}/{number}/runs").random() < RUN_SHARE
            ended = attempt(words, runs=runs, home=home)
            ends["accepted" if ended.status == 0 else "refused"] += 1
            if (kind := judged(words, ended)) is not None:
                if kind not in seen and kind != "hung":
                    seen.add(kind)
                    words = shortened(words, kind, runs=runs, home=home)
                if shown:
                    print(f"{number}: {kind}: {words}", flush=True)
                yield kind, words
            if shown and done % 100 == 0:
                print(f"{done} sets, {dict(ends)}, {time.monotonic() - began:.0f} s", flush=True)


def run(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--times", type=int, default=10_000, help="sets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first set")
    asked = parser.parse_args(argv)
    os.environ.pop("FEDRACLORA_DATA", None)  # a refusal here is a refusal everywhere
    with tempfile.TemporaryDirectory() as made:
        warm(Path(made) / "run")
    found: dict[str, list[list[str]]] = defaultdict(list)
    numbers = range(asked.first, asked.first + asked.times)
    for kind, words in campaign(numbers, asked.seed, shown=True):
        found[kind].append(words)
    print(f"{asked.times} sets, {sum(map(len, found.values()))} failures of {len(found)} kinds")
    for kind, cases in sorted(found.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(cases):6d}  {kind}: {min(cases, key=len)}")
    return 1 if found else 0


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
    with pytest.raises(SystemExit):
        main(["simulate", *SMALL, f"output.dir={folder}"])
    patch.setattr(ConfigRepository, "load_config", recall)  # a fork may change what it is given
    patch.setattr(Hydra, "get_mode", lambda *_, **__: RunMode.RUN)
    gc.freeze()


if __name__ == "__main__":
    sys.exit(run())
