"""``python -m tests.campaigns.file_kills``: a process that dies at every file operation of a run.

Each trial is a process of its own, which ends without any cleaning up (``os._exit``) before the
n-th operation on a file, right after it, or with half of it done. Another process then gives the
same command again, and must come to the digests of the run that nothing disturbed. Flushes to the
disk are counted and not made: what dies here is a process, not a machine.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from fedraclora.commands.compact import compact
from fedraclora.commands.simulate import run_one
from fedraclora.compose.overrides import composed
from fedraclora.run.folder import read_summary
from fedraclora.strategies.weights import load_weights
from fedraclora.tree import digest
from fedraclora.weights import files as checkpoint
from fedraclora.weights.links import link_digest

Plain = dict[str, object]
DEAD = 9  # status of a process that was killed here
MODES = ("before", "after", "torn")
JOB = [
    "data=least_squares",
    "data.clients=4",
    "data.features=7",
    "data.outputs=5",
    "data.labels=null",
    "clients=null",
    "clients_per_round=3",
    "partition=given",
    "model=linear",
    "pretrain=none",
    "method.rank=2",
    "local.lr=0.05",
    "output.plots=false",
    "output.progress=false",
    "output.checkpoint_every=2",
    "resume=auto",
]
KINDS: dict[str, list[list[str]]] = {
    # The commands of a user, of which the last one is disturbed.
    "fed_rac_lora": [["method=fed_rac_lora", "rounds=3"]],
    "carried": [["method=fedavg_lora", "rounds=3"]],
    "moments": [["method=cola", "local=adamw", "local.optimizer_state=run", "rounds=3"]],
    "private": [
        [
            "method=ffa_lora",
            "rounds=3",
            "privacy=client_level",
            "aggregation_weights=uniform",
            "privacy.delta=0.01",
            "privacy.clip=1.0",
        ]
    ],
    "extended": [["method=fedavg_lora", "rounds=2"], ["method=fedavg_lora", "rounds=4"]],
    "compacted": [["method=fed_rac_lora", "rounds=5"], ["compact"]],
}


def fatal(at: int, mode: str, log: list[str]) -> None:
    """Let this process die at the n-th operation on a file; 0 never."""

    def watch(
        name: str, call: Callable[..., Any], writes: Callable[..., bool] = lambda *_, **__: True
    ) -> Callable[..., Any]:
        def watched(*given: Any, **named: Any) -> Any:
            if not writes(*given, **named):
                return call(*given, **named)
            log.append(name)
            mine = len(log) == at
            if mine and mode == "before":
                os._exit(DEAD)
            found = call(*given, **named)
            if mine and mode == "torn":
                tear(name, given)
            if mine:
                os._exit(DEAD)
            return found

        return watched

    for name in ("replace", "mkdir", "unlink"):
        setattr(os, name, watch(name, getattr(os, name)))
    os.fsync = watch("fsync", lambda _: None)
    os.open = watch("open", os.open, lambda _, flags, *__: bool(flags & os.O_CREAT))
    io.open = watch("open", io.open, lambda _, mode="r", *__, **___: "r" not in mode)  # type: ignore[assignment]
    checkpoint.save_file = watch("save_file", checkpoint.save_file)
    os.urandom = lambda count: bytes(range(count))  # one key for all: runs are held to each other


def tear(name: str, given: tuple[Any, ...]) -> None:
    """Take half of what was written away; of a ledger, whose lines are written one by one, less."""
    path = Path(given[1]) if name == "save_file" else Path(str(given[0]))
    if name == "fsync":
        path = Path(f"/proc/self/fd/{given[0]}").resolve()
    if name in {"save_file", "fsync"} and path.is_file():
        size = path.stat().st_size
        os.truncate(path, size - 20 if path.name == "ledger.jsonl" else size // 2)


def command(words: Sequence[str], folder: Path) -> Plain:
    """Give the config of a command that runs in a folder, or goes on there."""
    return composed([*JOB, *words, f"output.dir={folder}"])


def job(words: Sequence[str], folder: Path) -> Callable[[], object]:
    """Give what a command does in a folder."""
    if words != ["compact"]:
        return partial(run_one, command(words, folder), [], None)
    return partial(compacted, folder)


def compacted(folder: Path) -> None:
    """Compact a run, whose last weights must be those that it measured, before and after."""
    summary = read_summary(folder)
    for again in (True, False):
        weights = digest(load_weights(folder, int(str(summary["rounds"]))))
        if weights != summary["weights_digest"]:
            raise AssertionError("the chain gives other weights")
        if again:
            compact(folder, 2)


def started(work: Callable[[], object], at: int = 0, mode: str = "before") -> tuple[int, list[str]]:
    """Do a job in a process of its own that dies at an operation; its status and its words.

    The words are the operations that it came to, or the error where it failed by itself.
    """
    read, write = os.pipe()
    if not (child := os.fork()):
        log: list[str] = []
        with os.fdopen(write, "w") as pipe:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            fatal(at, mode, log)
            try:
                work()
            except BaseException as error:
                pipe.write(json.dumps([f"{type(error).__name__}: {error}"]))
                pipe.flush()
                os._exit(1)
            pipe.write(json.dumps(log))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), json.loads(said or "[]")


def end_of(folder: Path) -> tuple[object, ...]:
    """What must come out the same: weights, ledger and chain, and which files it has."""
    summary, chain = read_summary(folder), folder / "chain"
    names = tuple(sorted(path.name for path in chain.glob("[!.]*")))
    return summary["weights_digest"], summary["ledger_digest"], link_digest(chain), names


def trials(kind: str, root: Path, every: int, counts: Counter[str]) -> list[str]:
    """Disturb a kind of run at each operation, in each mode; give what went wrong.

    Args:
        kind: Of `KINDS`.
        root: An empty folder.
        every: Take each so many-th case alone.
        counts: Takes the number of cases, of those that died, and of operations.
    """
    before, last = KINDS[kind][:-1], KINDS[kind][-1]
    for words in before:
        started(job(words, root / "ready"))
    at = root / "at"
    work = job(last, at)

    def fresh() -> None:
        shutil.rmtree(at, ignore_errors=True)
        if before:
            shutil.copytree(root / "ready", at)

    fresh()
    status, log = started(work)
    if status:
        return [f"{kind}: not even undisturbed: {log}"]
    wanted, wrong, number = end_of(at), [], 0
    counts["operations"] += len(log)
    for n, name in enumerate(log, start=1):
        for mode in MODES:
            number += 1
            if number % every or (mode == "torn" and name not in {"save_file", "fsync"}):
                continue
            fresh()
            status, _ = started(work, n, mode)
            counts["died" if status == DEAD else f"ended with {status}"] += 1
            status, said = started(work)
            where = f"{kind}: {mode} operation {n} ({name})"
            if status:
                wrong.append(f"{where}: does not go on: {said}")
            elif end_of(at) != wanted:
                wrong.append(f"{where}: ends with other digests")
    return wrong


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 where a run did not go on to the same end."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.campaigns.file_kills", description=__doc__
    )
    parser.add_argument("--every", type=int, default=1, help="each so many-th case alone (1)")
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], help=", ".join(KINDS))
    asked = parser.parse_args(words)
    counts: Counter[str] = Counter()
    wrong = []
    for kind in asked.kinds:
        with tempfile.TemporaryDirectory(prefix="file_kills_") as name:
            wrong += trials(kind, Path(name), asked.every, counts)
    print("\n".join(wrong))
    print(f"{dict(counts)}; {len(wrong)} wrong")
    return int(bool(wrong) or not counts["died"])


if __name__ == "__main__":
    sys.exit(main())
