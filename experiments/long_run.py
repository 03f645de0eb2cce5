"""A thousand rounds of a deployment: memory, handles, sockets, processes and files along the run.

    python -m fedraclora.experiments.long_run out=DIR [rounds=1000]

It runs ``fedraclora deploy nodes=2`` with a tiny model and histories of the owners, looks at all
its processes and files every few seconds, and writes ``samples.jsonl`` and
``table.md``: what each kind of process held at a tenth of the run and at its end, and the slope of
a line through all that was seen in between, by 100 rounds.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from fedraclora.commands.status import reported
from fedraclora.compose.words import key_values
from fedraclora.engines.flower_patches import OWNED
from fedraclora.errors import ConfigError
from fedraclora.experiments.faults.network import RANK

WORDS = [
    *["data=digits", "data.labels=null", "pretrain=none", "model.hidden=[12]", "local.lr=0.1"],
    *["output.plots=false", "output.chain=false", "evaluate.every=50", "local.steps=1"],
]
PAUSE = 10.0  # seconds between looks
# Of a command line, what it is; the first that is found.
KINDS = {
    "fedraclora.clients.resident": "resident",
    "flwr-serverapp": "server",
    "flower-superexec": "SuperExec and messages",
    "flower-supernode": "SuperNode",
    "flower-superlink": "SuperLink",
    "deploy": "command",
}
Held = dict[str, float]
# Files of the measurement, by pattern: sockets, logs and caches; logs alone; histories; the run's.
FOLDERS = {
    "Flower's files and caches": "tmp/**/*",
    "logs of all programs": "**/*log",
    "histories": "state/**/*",
    "run folder": "run/**/*",
}


def below(pid: int) -> Iterator[int]:
    """Yield a process and all that it has started, in turn."""
    yield pid
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                yield from below(int(child))


def held(pid: int) -> tuple[str, Held] | None:
    """Give the kind of a process and what it holds; None if it is gone, or is none of these."""
    with suppress(OSError, StopIteration, ValueError):
        line = Path(f"/proc/{pid}/cmdline").read_text()
        kind = next(kind for word, kind in KINDS.items() if word in line)
        said = Path(f"/proc/{pid}/status").read_text()
        anonymous = float(said.partition("RssAnon:")[2].split()[0]) / 1e3
        files = [str(f.readlink()) for f in Path(f"/proc/{pid}/fd").iterdir()]
        sockets = sum(file.startswith("socket") for file in files)
        return kind, {"processes": 1, "MB": anonymous, "handles": len(files), "sockets": sockets}
    return None


def look(pid: int) -> dict[str, Held]:
    """Add up what the processes of each kind hold: all of the groups that a process has begun.

    A resident's parent ends with its first message; its group is that of its node.
    """
    groups = {os.getpgid(each) for each in below(pid)} - {os.getpgid(pid)}
    found: dict[str, Held] = {}
    for each in (int(p.name) for p in Path("/proc").iterdir() if p.name.isdigit()):
        with suppress(ProcessLookupError):
            if (each == pid or os.getpgid(each) in groups) and (seen := held(each)) is not None:
                mine = found.setdefault(seen[0], dict.fromkeys(seen[1], 0.0))
                found[seen[0]] = {key: mine[key] + value for key, value in seen[1].items()}
    return found


def stored(folder: Path, pattern: str) -> Held:
    """Count the files below a folder whose path matches a pattern, and their megabytes."""
    sizes = []
    for path in folder.glob(pattern):
        with suppress(OSError):  # it has just been removed
            sizes.append(path.lstat().st_size)
    return {"files": len(sizes), "MB": sum(sizes) / 1e6}


def table(samples: Sequence[Mapping[str, object]]) -> str:
    """Write what was held at a tenth of the run and at its end, and the slope by 100 rounds.

    Between looks a process of a message comes and goes: at both ends stands the median of five.
    """
    rounds = np.array([float(str(s["round"])) for s in samples])
    kept = [s["held"] for s, r in zip(samples, rounds, strict=True) if r >= rounds[-1] / 10]
    rounds = rounds[rounds >= rounds[-1] / 10]
    lines = [
        "| kind | what | start | end | most | slope by 100 rounds |",
        "|---|---|---|---|---|---|",
    ]
    kinds: dict[str, Sequence[str]] = dict.fromkeys(
        KINDS.values(), ("processes", "MB", "handles", "sockets")
    )
    kinds |= dict.fromkeys(FOLDERS, ("files", "MB"))
    for kind, whats in kinds.items():
        for what in whats:
            curve = np.array([each.get(kind, {}).get(what, 0.0) for each in kept])  # type: ignore[attr-defined]
            slope = 100 * np.polyfit(rounds, curve, 1)[0]
            ends = [np.median(curve[:5]), np.median(curve[-5:]), curve.max()]
            shown = [f"{x:.1f}" if what == "MB" else f"{x:.0f}" for x in ends]
            lines.append(f"| {kind} | {what} | {' | '.join(shown)} | {slope:+.2f} |")
    return "\n".join(
        [f"Rounds {rounds[0]:.0f} to {rounds[-1]:.0f}, {len(kept)} looks.", "", *lines, ""]
    )


def run(folder: Path, rounds: int) -> None:
    """Run, and look meanwhile."""
    words = [*WORDS, *RANK, f"rounds={rounds}", f"output.dir={folder / 'run'}"]
    command = [sys.executable, "-m", "fedraclora.commands.cli", "deploy", "nodes=2", *words]
    (folder / "tmp").mkdir()
    owned = json.dumps({"policy": None, "state": str(folder / "state")})
    environ = {**os.environ, "TMPDIR": str(folder / "tmp"), OWNED: owned}
    ledger, samples = folder / "run" / "ledger.jsonl", list[dict[str, object]]()
    with (
        (folder / "log").open("w") as log,
        subprocess.Popen(command, stdout=log, stderr=log, env=environ) as process,
        (folder / "samples.jsonl").open("w") as record,
    ):
        while process.poll() is None:
            time.sleep(PAUSE)
            done = max(0, ledger.read_bytes().count(b"\n") - 1) if ledger.is_file() else 0
            if not done:
                continue
            seen = look(process.pid)
            seen |= {kind: stored(folder, pattern) for kind, pattern in FOLDERS.items()}
            samples.append({"round": done, "seconds": time.monotonic(), "held": seen})
            record.write(json.dumps(samples[-1]) + "\n")
            record.flush()
            if len(samples) > 20:
                (folder / "table.md").write_text(table(samples[:-1]))  # the last may be an end
    if process.returncode:
        raise ConfigError(f"the run ended with {process.returncode}: see {folder / 'log'}")


@reported
def main(words: Sequence[str] | None = None) -> int:
    """Run, and print the table."""
    group = key_values(sys.argv[1:] if words is None else words)
    if "out" not in group or group.keys() - {"out", "rounds"}:
        raise ConfigError("long_run takes out=DIR and rounds=NUMBER")
    folder = Path(str(group["out"])).resolve()
    folder.mkdir(parents=True)
    run(folder, int(str(group.get("rounds", 1000))))
    print((folder / "table.md").read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
