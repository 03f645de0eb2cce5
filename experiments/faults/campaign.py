"""Faults by the hundred, each in a small deployment: every run ends right, or stops and goes on.

    python -m fedraclora.experiments.faults.campaign out=DIR [drills=2]

Each kind of fault under each policy, in this process; then so many drills with real processes.
What is done is not done again.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from fedraclora.commands.status import reported
from fedraclora.compose.words import key_values
from fedraclora.errors import ConfigError
from fedraclora.experiments.faults.real import LINK, drill
from fedraclora.experiments.faults.trials import FAULT_KINDS, TrialOutcome, inject
from fedraclora.run import packed
from fedraclora.run.folder import provenance

TURNS, SHIFT, LONG = 3, 5, 8  # series of all kinds, by how much they are shifted, kinds a run
DRILL_ROUNDS = 30


def faults_table(outcomes: Sequence[TrialOutcome]) -> str:
    """Write the outcomes as a table, one row for each kind."""
    lines = ["| fault | injected | ended right | reason, once |", "|---|---|---|---|"]
    for kind in dict.fromkeys(o.kind for o in outcomes):
        mine = [o for o in outcomes if o.kind == kind]
        right = sum(o.verdict == "right" for o in mine)
        reason = mine[0].reason.replace("|", "/").replace("\n", " ")[:100]
        lines.append(f"| {kind} | {len(mine)} | {right} | {reason} |")
    right = sum(o.verdict == "right" for o in outcomes)
    lines.append(f"| **all** | **{len(outcomes)}** | **{right}** | |")
    policies = Counter(o.policy for o in outcomes)
    return "\n".join([*lines, "", ", ".join(f"{n} {p}" for p, n in policies.items()), ""])


def series() -> Iterator[tuple[list[str], str]]:
    """Give the kinds of each run, one a round, with its policy."""
    for turn in range(TURNS):
        kinds = [*FAULT_KINDS[turn * SHIFT :], *FAULT_KINDS[: turn * SHIFT]]  # each in other rounds
        for start in range(0, len(kinds), LONG):
            part = kinds[start : start + LONG]
            yield part, "left out"
            # Weights whole are asked for twice: once is no fault.
            yield [k for k in part if k != "cannot settle on weights"], "run again"
    for kind in FAULT_KINDS:
        yield [kind], "stopped"


def campaign(folder: Path, drills: int) -> list[TrialOutcome]:
    """Inject what is left to inject; give all outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "campaign.jsonl"
    packed.decompress(record)
    lines = record.read_text().splitlines() if record.is_file() else []
    done = [TrialOutcome(**json.loads(line)) for line in lines]

    def keep(outcome: TrialOutcome) -> None:
        done.append(outcome)
        with record.open("a") as file:
            file.write(json.dumps(vars(outcome)) + "\n")
        print(f"{len(done)}: {outcome.kind}, {outcome.policy}: {outcome.verdict}", flush=True)

    known = {(o.kind, o.policy, o.round_) for o in done}
    for kinds, policy in series():
        if (kinds[0], policy, 2) not in known:
            for outcome in inject(kinds, policy):
                keep(outcome)
    for _ in range(drills - sum(o.kind == LINK for o in done)):
        drill(DRILL_ROUNDS, keep)
    return done


@reported
def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 if a run ended wrong."""
    group = key_values(sys.argv[1:] if words is None else words)
    if "out" not in group or group.keys() - {"out", "drills"}:
        raise ConfigError("campaign takes out=DIR and drills=NUMBER")
    folder = Path(str(group["out"]))
    done = campaign(folder, int(str(group.get("drills", 2))))
    (folder / "table.md").write_text(faults_table(done))
    facts = {"faults": len(done), **provenance()}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(o.verdict != "right" for o in done))


if __name__ == "__main__":
    sys.exit(main())
