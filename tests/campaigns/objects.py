"""Python objects of all kinds through `fedraclora.simulate`: each runs right, or is refused.

    python -m tests.campaigns.objects --times 400 --seed 0
    python -m tests.campaigns.objects --plug-ins

Models, samples, callbacks, folders and settings are drawn by a seeded generator, most of them good
and some odd, and given to `simulate` in a forked process with limits of time and memory. Of many it
is known that they must be refused, of others that they must run, and then the figures of the run
are held against plain torch, and its weights against those of the same samples as plain arrays.
What can be wrong is

    traceback   an error that is none of `fedraclora.errors`
    words       a refusal that is no sentence
    silent      what must be refused, or named, was taken without a word
    refused     what must run was refused
    numbers     a figure that is not that of what was given
    changed     an object of the caller's that is another afterwards
    hung, died  no end within the limit of time, or none with a word

and is printed with few parts that still show it. The status is non-zero if there is any.
"""

from __future__ import annotations

import argparse
import copy
import gc
import io
import logging
import os
import pickle
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

import fedraclora
from fedraclora.errors import FedRacLoraError
from fedraclora.rng import generator
from fedraclora.run.ledger import read_ledger
from tests.campaigns.odd_objects import (
    PARTS,
    PLAIN,
    QUIET,
    TEST,
    GuardedHooks,
    Kind,
    Raised,
    in_folder,
)
from tests.campaigns.odd_plugins import PLUG_INS

SECONDS = 20  # of the processor, for one case
BYTES = 4 << 30  # of memory, beside what the parent has
USUAL = {part: next(iter(kinds)) for part, kinds in PARTS.items()}
Parts = dict[str, str]


@dataclass(frozen=True)
class Ended:
    """How a case ended.

    Attributes:
        error: Type and text of what was raised; None: the run came to its end.
        known: Whether that is of `fedraclora.errors`.
        said: What was printed.
        wrong: What the checks of a run found; empty if nothing.
        status: Of the process, where it ended by itself without a word; 0 otherwise.
    """

    error: tuple[str, str] | None = None
    known: bool = False
    said: str = ""
    wrong: str = ""
    status: int | str = 0


# ---- Drawing ------------------------------------------------------------------------------------


def drawn(seed: int, number: int) -> Parts:
    """Draw which kind each part of a case has: odd in up to three of them."""
    rng = generator(seed, "objects", number)

    def pick(options: Sequence[str]) -> str:
        return options[int(rng.integers(len(options)))]

    parts = dict(USUAL)
    for part in ("model", "data"):  # good ones of these are of many kinds
        parts[part] = pick([name for name, kind in PARTS[part].items() if kind.ends == "runs"])
    for _ in range(int(rng.choice([0, 1, 1, 1, 2, 2, 3, 3]))):
        part = pick([*PARTS, "model", "data", "data"])
        parts[part] = pick([*PARTS[part]])
    return parts


def kinds_of(parts: Parts) -> dict[str, Kind]:
    """Look up the kinds of a case."""
    return {part: kind_of(part, name) for part, name in parts.items()}


def kind_of(part: str, name: str) -> Kind:
    """Look up a kind of a part, or of a plug-in object."""
    return {**PARTS.get(part, {}), **PLUG_INS.get(part, {})}[name]


def wanted(parts: Parts) -> str:
    """Say how a case must end: ``runs``, ``refused``, or ``either`` where nobody knows."""
    kinds = kinds_of(parts)
    ends = {kind.ends for kind in kinds.values()}
    if "refused" in ends:
        return "refused"
    fits = [kind.task for kind in kinds.values() if kind.task]
    return "runs" if ends == {"runs"} and len({*fits}) < 2 else "either"


# ---- Trying -------------------------------------------------------------------------------------


def attempt(parts: Parts, home: Path) -> Ended:
    """Give a case to `simulate`, in a process of its own and in an empty folder."""
    shutil.rmtree(home, ignore_errors=True)
    home.mkdir()
    sys.stdout.flush()
    child = os.fork()
    if not child:
        _in_child(parts, home)
    status: int | str = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if isinstance(status, int) and status < 0:
        return Ended(status=signal.Signals(-status).name)
    told = home / "ended"
    found: Ended = pickle.loads(told.read_bytes()) if told.exists() else Ended(status=status or 1)
    return found


def _in_child(parts: Parts, home: Path) -> None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * resource.getpagesize() + BYTES
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        work = home / "work"
        work.mkdir()
        with (
            (home / "said").open("w", errors="backslashreplace") as said,
            redirect_stderr(said),
            redirect_stdout(said),
        ):
            logging.basicConfig(stream=said, force=True)
            ended = tried(parts, work)
        text = (home / "said").read_text()
        found = Ended(ended.error, ended.known, text, ended.wrong)
        (home / "ended").write_bytes(pickle.dumps(found))
    finally:
        os._exit(0 if (home / "ended").exists() else 97)


def tried(parts: Parts, work: Path) -> Ended:
    """Make the objects of a case, run it, and check what came."""
    warnings.simplefilter("ignore")  # of other libraries, of what odd objects do
    told = GuardedHooks()
    keys: dict[str, Any] = {"test": TEST}
    with in_folder(work):
        try:
            for kind in kinds_of(parts).values():
                keys |= kind.make(told)
            words, kept = keys.pop("choices", ()), told.copies(keys)
            run = fedraclora.simulate(*words, **keys)
        except Raised:  # by a callback, which stops the run with what it raises
            return Ended(wrong="" if told.raises else "numbers: nobody raises that")
        except BaseException as error:
            known = isinstance(error, FedRacLoraError)
            return Ended((type(error).__name__, str(error)), known)
        return Ended(wrong=next(faults(run, parts, keys, told, kept), ""))


# ---- Judging ------------------------------------------------------------------------------------


def faults(
    run: Any, parts: Parts, keys: Mapping[str, Any], told: GuardedHooks, kept: object
) -> Iterator[str]:
    """Hold a run against what was given; say what is wrong."""
    kinds, rows, rounds = kinds_of(parts), run.rows, int(keys.get("rounds", 1))
    if (odd := told.changes(keys, kept)) is not None:
        yield f"changed: {odd}"
    if [row["round"] for row in rows] != [*range(rounds + 1)]:
        yield f"numbers: {len(rows)} rows of {rounds} rounds"
    sent = sum(int(row.get("uplink_bytes", 0)) for row in rows)
    if run.summary["uplink_total"] != sent or (rounds and sent <= 0):
        yield f"numbers: uplink of {run.summary['uplink_total']}, and {sent} by rows"
    if told.rows and told.rows != rows:
        yield "numbers: a callback saw other rows"
    if run.folder is not None and read_ledger(run.folder / "ledger.jsonl") != rows:
        yield "numbers: the ledger in the folder is another"
    if told.clients and run.summary["clients"] != told.clients:
        yield f"numbers: {run.summary['clients']} clients of {told.clients}"
    if wanted(parts) != "runs":
        return
    if any(not bool(torch.isfinite(t).all()) for t in run.weights().values()):
        yield "numbers: weights that are not finite"
    if differs(run.evaluate(), rows[-1]["metrics"]):
        yield "numbers: evaluate() is not the last row"
    if keys["test"] is TEST:
        pairs = ((told.model, rows[0]), (run.model(), rows[-1]))
        yield from (
            f"numbers: row {row['round']} has {row['metrics']}, torch {measured(model)}"
            for model, row in pairs
            if differs(measured(model), row["metrics"])
        )
    if kinds["data"].same and run.summary["weights_digest"] != plainly(keys, told):
        yield "numbers: other weights than of the same samples as arrays"


def plainly(keys: Mapping[str, Any], told: GuardedHooks) -> object:
    """Give the digest of the weights after a run on the same samples as plain arrays."""
    alone = dict.fromkeys(("clients", "partition", "client", "on_round", "folder"))
    like = {**keys, **alone, "data": PLAIN, "model": told.model, "resume": False}
    return fedraclora.simulate(*QUIET, **like).summary["weights_digest"]


def measured(model: torch.nn.Module) -> dict[str, float]:
    """Measure a model on the test samples in plain torch."""
    x, y = (torch.tensor(part) for part in TEST)
    with torch.no_grad():
        found = copy.deepcopy(model).float().eval()(x)
        output = getattr(found, "logits", found)
    right = (output.argmax(dim=1) == y).double().mean()
    return {"accuracy": float(right), "loss": float(F.cross_entropy(output, y))}


def differs(found: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Compare metrics that both have."""
    pairs = [(found[name], other[name]) for name in found if name in other]
    return not pairs or not all(a == b or abs(a - b) <= 1e-4 * max(1.0, abs(b)) for a, b in pairs)


def judged(parts: Parts, ended: Ended) -> str | None:
    """Say what is wrong with how a case ended; None if nothing is."""
    if ended.status:
        return "hung" if ended.status in {"SIGXCPU", "SIGKILL"} else f"died: {ended.status}"
    if ended.error is not None:
        return refused(parts, *ended.error, known=ended.known)
    if wanted(parts) == "refused":
        odd = [f"{p}={n}" for p, n in parts.items() if kind_of(p, n).ends == "refused"]
        return f"silent: {', '.join(odd)}"
    unsaid = [
        f"silent: {part}={parts[part]}"
        for part, kind in kinds_of(parts).items()
        if kind.said not in ended.said
    ]
    return next(iter(unsaid), ended.wrong or None)


def refused(parts: Parts, kind: str, text: str, *, known: bool) -> str | None:
    """Say what is wrong with a refusal."""
    if not known:
        return f"traceback: {kind}: {text[:90]}"
    if not is_sentence(text):
        return f"words: {text[:90]}"
    return f"refused: {text[:120]}" if wanted(parts) == "runs" else None


def is_sentence(text: str) -> bool:
    """Tell whether a message is one for people: a few words, no page, no trace of a stack."""
    words = re.findall(r"[A-Za-z]{2,}", text)
    return len(words) >= 3 and len(text) < 2500 and "Traceback" not in text and "0x7f" not in text


# ---- All of it ----------------------------------------------------------------------------------


def shortened(parts: Parts, kind: str, home: Path) -> Parts:
    """Make parts usual as long as the rest still shows the same."""
    for part in parts:
        fewer = {**parts, part: USUAL[part]}
        if fewer != parts and judged(fewer, attempt(fewer, home)) == kind:
            parts = fewer
    return {part: name for part, name in parts.items() if name != USUAL[part]}


def plug_ins() -> list[Parts]:
    """List the usual case with each plug-in object alone."""
    return [USUAL | {part: name} for part, kinds in PLUG_INS.items() for name in kinds]


def campaign(cases: Sequence[tuple[int, Parts]]) -> Iterator[tuple[str, Parts]]:
    """Try and judge cases, each with its number; give each failure with its parts."""
    began, seen, ends = time.monotonic(), set[str](), Counter[str]()
    with tempfile.TemporaryDirectory(prefix="fedraclora-objects-") as made:
        home = Path(made) / "case"
        for done, (number, parts) in enumerate(cases, 1):
            ended = attempt(parts, home)
            ends["refused" if ended.error else "ran"] += 1
            if (kind := judged(parts, ended)) is not None:
                if kind not in seen and kind != "hung" and parts.keys() <= USUAL.keys():
                    parts = shortened(parts, kind, home)  # noqa: PLW2901
                seen.add(kind)
                print(f"case {number}: {kind}: {parts}", flush=True)
                yield kind, parts
            if done % 100 == 0 or done == len(cases):
                print(f"{done} cases in {time.monotonic() - began:.0f} s: {dict(ends)}", flush=True)


def warm() -> None:
    """Run once, so that the forked processes have libraries and the files of the config."""
    with tempfile.TemporaryDirectory() as made, redirect_stderr(io.StringIO()):
        ended = tried(dict(USUAL), Path(made))
    if ended != Ended():
        raise RuntimeError(f"the usual case does not run: {ended}")
    gc.freeze()


def run(argv: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--times", type=int, default=400, help="cases")
    parser.add_argument("--first", type=int, default=0, help="number of the first of them")
    parser.add_argument("--seed", type=int, default=0)
    alone = "each plug-in object alone, in the place of drawn cases"
    parser.add_argument("--plug-ins", action="store_true", help=alone)
    asked = parser.parse_args(argv)
    warm()
    found: dict[str, list[Parts]] = defaultdict(list)
    numbers = range(asked.first, asked.first + asked.times)
    cases = [(number, drawn(asked.seed, number)) for number in numbers]
    if asked.plug_ins:
        cases = [*enumerate(plug_ins())]
    for kind, parts in campaign(cases):
        found[kind].append(parts)
    count = sum(map(len, found.values()))
    print(f"{len(cases)} cases, {count} failures of {len(found)} kinds")
    for kind, cases in sorted(found.items(), key=lambda entry: -len(entry[1])):
        print(f"{len(cases):6d}  {kind}: {min(cases, key=len)}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(run())
