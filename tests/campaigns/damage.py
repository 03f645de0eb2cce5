"""``python -m tests.campaigns.damage``: damage at every file of a run folder.

Runs of several kinds are made once. Then one file at a time is damaged in a copy of a folder: a
bit or a digit is flipped, the file is cut short, removed, or another run's takes its place. The
run must go on, and its weights must be read, either to the bits of the undamaged folder or to an
error that names the file. Pictures and locks are not trusted by anybody and left out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import shutil
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from fedraclora.commands.run_files import read_files
from fedraclora.compose.overrides import composed
from fedraclora.compose.resume import is_done
from fedraclora.errors import FedRacLoraError
from fedraclora.launch import choose
from fedraclora.rng import generator
from fedraclora.run.folder import read_summary
from fedraclora.strategies.weights import load_weights
from fedraclora.terminal.progress import RunProgress
from fedraclora.tree import digest
from fedraclora.weights.links import link_digest
from tests.common import simulated

Plain = dict[str, object]
CLIENTS, ROUNDS = 4, 4
COMMON = [
    f"rounds={ROUNDS}",
    "clients_per_round=3",
    "pretrain=none",
    "data.labels=null",
    "method.rank=2",
    "local.lr=0.05",
    "output.plots=false",
    "output.progress=false",
    "output.checkpoint_every=2",
]
SQUARES = [
    "data=least_squares",
    f"data.clients={CLIENTS}",
    "data.features=7",
    "data.outputs=5",
    "clients=null",
    "partition=given",
    "model=linear",
]
OWN = [
    "data=own",
    f"clients={CLIENTS}",
    "data.classes=3",
    "data.shape=[5]",
    "partition=given",
    "model=mlp",
    "model.hidden=[4]",
]
DIGITS = [
    "data=digits",
    f"clients={CLIENTS}",
    "partition=iid",
    "model=mlp",
    "model.hidden=[4]",
    "local.steps=2",
]
KINDS: dict[str, tuple[list[str], int | None]] = {
    # What is run, and after which row it dies; None: it comes to its end.
    "fed_rac_lora": (["method=fed_rac_lora", *SQUARES], 3),
    "carried": (["method=fedavg_lora", *SQUARES], 3),
    "private": (
        [
            "method=ffa_lora",
            *SQUARES,
            "privacy=client_level",
            "aggregation_weights=uniform",
            "privacy.delta=0.01",
            "privacy.clip=1.0",
        ],
        3,
    ),
    "local head": (["method=fed_rac_lora", *DIGITS, "head=personal"], 3),
    "own data": (["method=fedavg_lora", *OWN], 3),
    "before the first checkpoint": (["method=fed_rac_lora", *SQUARES], 1),
    "finished": (["method=fedavg_lora", *SQUARES], None),
}


class Died(BaseException):
    """Ends a run as a kill would."""


@dataclass(frozen=True)
class Specimen:
    """A run folder, the data beside it, and what an undamaged copy comes to."""

    kind: str
    root: Path
    other: Path
    wanted: tuple[object, ...] = ()
    weights: tuple[object, ...] = ()


@dataclass
class Report:
    """Counts of verdicts, and each case that went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def write_samples(folder: Path, seed: int) -> None:
    """Write the samples of every client, and those of the server."""
    rng = generator(seed, "samples")
    folder.mkdir(parents=True)
    for name in (*range(CLIENTS), "held"):
        x = rng.normal(size=(9, 5)).astype(np.float32)
        np.savez(folder / f"{name}.npz", x=x, target=rng.integers(0, 3, 9))


def run(plain: Plain, typed: list[str], stop: int | None = None) -> None:
    """Run, or go on with, what a config says; die after a row."""
    config, folder, resume = choose(plain, typed, None)
    if resume and is_done(folder, config):
        read_summary(folder)
        return

    def died(_: object, row: dict[str, object]) -> None:
        if stop is not None and row["round"] == stop:
            raise Died

    before = RunProgress.row
    RunProgress.row = died  # type: ignore[method-assign,assignment]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            simulated(config, folder, resume=resume)
    finally:
        RunProgress.row = before  # type: ignore[method-assign]


def make(kind: str, root: Path) -> Specimen:
    """Make a run of a kind, another of its kind, and learn what the undamaged one comes to."""
    words, stop = KINDS[kind]
    for name, seed in (("it", 0), ("other", 1)):
        place = root / name
        more = []
        if "data=own" in words:
            write_samples(place / "data", seed)
            more = [
                f"data.samples={root / 'at' / 'data'}",
                f"data.test_file={place / 'data/held.npz'}",
            ]
            shutil.copytree(place / "data", root / "at" / "data")
        plain = composed([*words, *COMMON, *more, f"seed={seed}", f"output.dir={place / 'run'}"])
        with contextlib.suppress(Died):
            run(plain, [], stop)
        if "data=own" in words:
            shutil.rmtree(root / "at")
    found = Specimen(kind, root / "it", root / "other")
    with undamaged(found) as at:
        weights = read(at / "run")
        wanted = finish(at / "run")
    return Specimen(kind, found.root, found.other, wanted, weights)


@contextlib.contextmanager
def undamaged(specimen: Specimen) -> Iterator[Path]:
    """Give a copy of a specimen, always at the same place."""
    at = specimen.root.parent / "at"
    shutil.copytree(specimen.root, at)
    try:
        yield at
    finally:
        shutil.rmtree(at)


_PLAIN: list[Plain] = []


def finish(folder: Path) -> tuple[object, ...]:
    """Go on with a run; give the digests at its end: of weights, ledger and chain."""
    if not _PLAIN:
        _PLAIN.append(composed([]))
    run({**_PLAIN[0], "resume": str(folder)}, ["resume"])
    summary = read_summary(folder)
    read_files(folder)
    return summary["weights_digest"], summary["ledger_digest"], link_digest(folder / "chain")


def read(folder: Path) -> tuple[object, ...]:
    """Read the weights of all rounds, and of the last checkpoint."""
    last = 1 if not (folder / "checkpoint").exists() else 3
    rounds = [*range(last + 1), *([] if last == 1 else [None])]
    return tuple(digest(load_weights(folder, round_)) for round_ in rounds)


def flipped(data: bytes, rng: np.random.Generator) -> bytes:
    """Flip one bit."""
    place = int(rng.integers(len(data)))
    return data[:place] + bytes([data[place] ^ (1 << int(rng.integers(8)))]) + data[place + 1 :]


def digit(data: bytes, rng: np.random.Generator) -> bytes:
    """Make one digit another."""
    places = [i for i, byte in enumerate(data) if 48 <= byte < 58]
    if not places:
        return flipped(data, rng)
    place = int(rng.choice(places))
    new = 48 + (data[place] - 48 + int(rng.integers(1, 10))) % 10
    return data[:place] + bytes([new]) + data[place + 1 :]


def damages(times: int, seed: str) -> Iterator[tuple[str, Callable[[Path, Path], None]]]:
    """Give kinds of damage: each does it to a file, or puts the other run's in its place."""
    for i in range(times):
        for name, change in (("bit", flipped), ("digit", digit)):
            rng = generator(0, "damage", seed, name, i)
            yield (
                f"{name} {i}",
                lambda p, _, c=change, r=rng: p.write_bytes(c(p.read_bytes(), r)),  # type: ignore[misc]
            )
    for part in (0, 1, 2, 3):
        yield f"cut at {part}/4", lambda p, _, n=part: cut(p, n)  # type: ignore[misc]
    yield "last byte gone", lambda p, _: p.write_bytes(p.read_bytes()[:-1]) and None
    yield "removed", lambda p, _: p.unlink()
    yield "another run's", lambda p, other: p.write_bytes(other.read_bytes()) and None


def cut(path: Path, quarters: int) -> None:
    """Cut a file short."""
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * quarters // 4])


def files(root: Path) -> list[Path]:
    """Name what is trusted of a specimen: all but pictures and locks."""
    found = (p.relative_to(root) for p in sorted(root.rglob("*")) if p.is_file())
    return [p for p in found if p.suffix != ".png" and p.name != ".lock"]


def verdict(act: Callable[[], object], wanted: object, path: Path) -> str:
    """Say what came of a damaged folder: named, harmless, or what it should not be."""
    try:
        found = act()
    except FedRacLoraError as error:
        named = path.name in str(error) or path.stem in str(error)
        return "named" if named else f"NOT NAMED: {error}"
    except Exception:
        return f"TRACEBACK: {traceback.format_exc(limit=-3)}"
    return "harmless" if found == wanted else "SILENT"


def trial(specimen: Specimen, path: Path, what: str, harm: Callable[[Path, Path], None]) -> Report:
    """Damage one file, then read and go on."""
    report = Report()
    with undamaged(specimen) as at:
        if (at / path).read_bytes() == (specimen.other / path).read_bytes() and "another" in what:
            return report
        harm(at / path, specimen.other / path)
        # Nobody looks at the chain of a run that is finished, but who reads its weights.
        parts = 2 if KINDS[specimen.kind][1] is None else 3
        acts = {"read": lambda: read(at / "run"), "resumed": lambda: finish(at / "run")[:parts]}
        for name, act in acts.items():
            wanted = specimen.weights if name == "read" else specimen.wanted[:parts]
            said = verdict(act, wanted, path)
            report.counts[said.partition(":")[0]] += 1
            if said not in {"named", "harmless"}:
                report.wrong.append(f"{specimen.kind}: {path}, {what}, {name}: {said}")
    return report


def campaign(times: int, every: int, root: Path, kinds: Sequence[str]) -> Report:
    """Damage every file of every kind of run.

    Args:
        times: Bits and digits that are flipped in each file, one at a time.
        every: Take each so many-th case alone.
        root: An empty folder.
        kinds: Of `KINDS`.
    """
    whole, number = Report(), 0
    for kind in kinds:
        specimen = make(kind, root / kind.replace(" ", "_"))
        for path in files(specimen.root):
            for what, harm in damages(times, f"{kind} {path}"):
                number += 1
                if number % every == 0:
                    report = trial(specimen, path, what, harm)
                    whole.counts += report.counts
                    whole.wrong += report.wrong
    return whole


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 where anything was accepted in silence."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.damage", description=__doc__)
    parser.add_argument("--times", type=int, default=10, help="bits and digits for each file (10)")
    parser.add_argument("--every", type=int, default=1, help="each so many-th case alone (1)")
    parser.add_argument("--kinds", nargs="*", default=[*KINDS], help=", ".join(KINDS))
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="damage_") as name:
        report = campaign(asked.times, asked.every, Path(name), asked.kinds)
    print("\n".join(report.wrong))
    print(f"{report.counts.total()} cases: {dict(report.counts)}; {len(report.wrong)} wrong")
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
