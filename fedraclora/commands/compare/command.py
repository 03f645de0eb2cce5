"""Run methods under equal conditions and compare them, or compare finished runs.

Run methods and compare them:

    fedraclora compare method=A,B,... [KEY=VALUE ...] [NAME:KEY=VALUE ...] [seeds=N]

KEY=VALUE, as for simulate, applies to all methods; NAME:KEY=VALUE[,KEY=VALUE...] to one of them. If
NAME is not a method, it adds a row: big:method=fed_rac_lora big:method.rank=64. seeds=3 runs each
method with the seeds 0, 1, 2 (starting at seed=...); reference=NAME is the method to compare with
(default: the first), metric=NAME the metric. If local.lr is auto, each method gets its own learning
rate. Results go to output.dir (runs/compare): the same command resumes and skips finished runs. It
writes table.md, table.csv, compare.png and report.html; watch=true opens a live page.

Compare and rank existing runs, each RUN being the folder of a run or of a sweep:

    fedraclora compare RUN [RUN ...] [--out DIR] [--metric NAME] [--target X] [--by KEY[,KEY]]

--out is the folder for table.md, table.csv and compare.png (runs/compare), --metric the metric (the
runs' first one), --target a value of it to reach; --by names the config keys to group runs by
(default: all keys that differ).

Tune all rows of a study on the same grid, run them, and rank them:

    fedraclora compare study=STUDY [KEY=VALUE ...]
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from pathlib import Path

from fedraclora.commands.compare.run import OUT, compare
from fedraclora.commands.compare.table import compare_runs
from fedraclora.commands.study.leaderboard import compare_study, is_study
from fedraclora.commands.watch import watched
from fedraclora.compose.overrides import key_of
from fedraclora.compose.words import key_values
from fedraclora.data.locate import user_path
from fedraclora.errors import ConfigError

# Settings of one row: its name, and one or more overrides separated by commas.
OF_ROW = re.compile(r"(?P<name>[^=]+):(?P<words>[~+]*[\w./@]+=.*)", re.DOTALL)
NEXT = re.compile(r",(?=[~+]*[A-Za-z_][\w./@]*=)")
SETTING = re.compile(r"[~+]*[A-Za-z_][\w.@/]*=.*", re.DOTALL)
OWN = ("seeds", "reference", "metric")


def main(words: Sequence[str]) -> None:
    """Compare methods, the rows of a study, or run folders."""
    if is_study(words):
        compare_study(words)
    elif names_methods(words):
        compare_methods(words)
    else:
        compare_folders(words)


def names_methods(words: Sequence[str]) -> bool:
    """Check whether the arguments name methods; an existing path is a run folder."""
    keys = [word for word in words if not Path(word).exists()]
    return any(word.startswith("method=") or OF_ROW.fullmatch(word) for word in keys)


def compare_methods(words: Sequence[str]) -> None:
    """Run the methods of the command line, and compare them.

    Raises:
        ConfigError: If an argument belongs to no row, a row has no method, or seeds are listed.
    """
    rows: dict[str, list[str]] = {}
    of_rows = [found for word in words if (found := OF_ROW.fullmatch(word))]
    rest = [word for word in words if not OF_ROW.fullmatch(word)]
    for word in rest:
        if key_of(word) == "method":
            rows |= {name.strip(): [] for name in word.partition("=")[2].split(",")}
    named = {*rows}
    for found in of_rows:
        rows.setdefault(found["name"], []).extend(NEXT.split(found["words"]))
    for name in rows.keys() - named:
        if not any(key_of(word) == "method" for word in rows[name]):
            others = ", ".join(named)
            raise ConfigError(
                f"{name}:{rows[name][0]} is for a row that is not compared; the rows are {others}. "
                f"Add {name} to method=..., or say {name}:method=... too."
            )
    own = key_values([word for word in rest if key_of(word) in OWN])
    shared = [word for word in rest if key_of(word) not in {*OWN, "method"}]
    for word in rest:
        if key_of(word) in {"seed", "seeds"} and {*word} & {*",[("}:
            raise ConfigError(
                f"{word} lists seeds; compare takes consecutive ones: seed=0 seeds=3 runs each "
                "method with the seeds 0, 1 and 2"
            )
    dirs = [word.partition("=")[2] for word in shared if key_of(word) == "output.dir"]
    with watched(user_path("output.dir", dirs[-1] if dirs else OUT)):
        compare(*shared, methods=rows, **own)  # type: ignore[arg-type]


def compare_folders(words: Sequence[str]) -> None:
    """Compare run folders.

    Raises:
        ConfigError: If there are no arguments, or settings without methods.
    """
    settings = [word for word in words if SETTING.fullmatch(word) and not Path(word).exists()]
    if settings or not words:
        named = f"{settings[0]} is a setting" if settings else "nothing is named"
        raise ConfigError(
            f"{named}, but no methods to compare; add method=A,B, or give the folders of runs "
            "(fedraclora compare --help)."
        )
    parser = argparse.ArgumentParser(prog="fedraclora compare", add_help=False)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    parser.add_argument("--out", type=Path, default=Path(OUT))
    parser.add_argument("--metric")
    parser.add_argument("--target", type=float)
    parser.add_argument("--by", default="", metavar="KEY[,KEY]")
    chosen = parser.parse_args(words)
    by = [key.strip() for key in chosen.by.split(",") if key.strip()]
    table = compare_runs(chosen.runs, chosen.out, chosen.metric, chosen.target, by)
    table.print()
    print(f"written: {chosen.out}/table.md, table.csv, compare.png")  # with every column
