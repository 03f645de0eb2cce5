"""Faults by the hundred, each in a small deployment: every run ends right, or stops and goes on.

``python -m experiments.fault_campaign out=DIR [drills=2]``: each kind of fault under each policy in
two rounds, in this process; then so many drills with real processes. What is done is not done
again.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from experiments.faults.real import drill
from experiments.faults.trials import KINDS, POLICIES, Outcome, inject
from experiments.words import key_values
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.runfolder import provenance

WHEN = (2, 3)
DRILL_ROUNDS = 14


def table(outcomes: Sequence[Outcome]) -> str:
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


def campaign(folder: Path, drills: int) -> list[Outcome]:
    """Inject what is left to inject; give all outcomes."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "campaign.jsonl"
    lines = record.read_text().splitlines() if record.is_file() else []
    done = [Outcome(**json.loads(line)) for line in lines]

    def keep(outcome: Outcome) -> None:
        done.append(outcome)
        with record.open("a") as file:
            file.write(json.dumps(vars(outcome)) + "\n")
        print(f"{len(done)}: {outcome.kind}, {outcome.policy}: {outcome.verdict}", flush=True)

    known = {(o.kind, o.policy, o.round_) for o in done}
    for kind in KINDS:
        for policy in POLICIES:
            for round_ in WHEN:
                if (kind, policy, round_) not in known:
                    keep(inject(kind, policy, round_))
    real = sum(o.policy == "processes" for o in done)
    for _ in range(drills - real // 6):
        drill(DRILL_ROUNDS, keep)
    return done


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 if a run ended wrong."""
    group = key_values(sys.argv[1:] if words is None else words)
    try:
        if "out" not in group or group.keys() - {"out", "drills"}:
            raise ConfigError("fault_campaign takes out=DIR and drills=NUMBER")
        folder = Path(str(group["out"]))
        done = campaign(folder, int(str(group.get("drills", 2))))
    except FedRacLoraError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    (folder / "table.md").write_text(table(done))
    facts = {"faults": len(done), **provenance()}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    return int(any(o.verdict != "right" for o in done))


if __name__ == "__main__":
    sys.exit(main())
