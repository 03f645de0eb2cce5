"""Faults of networks and hosts, by the hundred, in a deployment on hosts of their own.

    python -m fedraclora.experiments.faults.network_campaign out=DIR [faults=200] [seed=0]
        [faketime=LIBRARY] [alone=NUMBER]

Runs of a SuperLink and four nodes, each on a host of a bed (`fedraclora.experiments.hosts`), with
50 faults each; with ``alone`` 48, so many at once, and then none until rounds are as before: no
fault may make more than two rounds slow. Links are cut in the middle of a message, crawl and come
back; connections are reset; hosts move, stop, are killed, and have no room; in each run the
SuperLink, or its whole host, is killed, and the run is resumed; with Debian's ``libfaketime`` nodes
of one more run have clocks that are minutes and an hour off. The final weights must be, bit for
bit, those of a run in one process that leaves out whom the ledger names, and no round may last
longer than its time-outs. A run that ends by a fault is resumed, which the results say. Runs whose
results are in DIR are not run again.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fedraclora.commands.status import reported
from fedraclora.compose.words import key_values
from fedraclora.errors import ConfigError
from fedraclora.experiments.faults.links import (
    CACHE,
    HOST_FAULTS,
    RATE,
    ROOM,
    HostFault,
    drawn,
    drawn_alone,
    move,
)
from fedraclora.experiments.faults.network import SMALL
from fedraclora.experiments.faults.trials import absent, final_weights
from fedraclora.experiments.hosts import Bed
from fedraclora.experiments.hosts.deployment import Deployment, wait_for
from fedraclora.experiments.hosts.host import HOME
from fedraclora.run.folder import provenance, read_summary

# Weights whole both ways: a message has 100 kB.
WORDS = ["method=fedavg", "model.hidden=[256]", "engine.min_clients=1", "engine.retries=3"]
NODES, TOGETHER = 4, 50  # nodes, and faults of a run
ALONE = 48  # faults of a run with ``alone``
SLOW = 10.0  # seconds of a round besides those of its faults and usual ones
CALM = 2  # rounds that are not slow, after which all is as before
MOST_SLOW, ROUNDS_OF_ACT = 2, 6
MOST_ENDS = 3  # times that one act may end the run
WORDS += [f"clients={NODES}", f"clients_per_round={NODES}"]
REPLACED = {word.split("=")[0] for word in ("rounds=", *WORDS)}
TIMEOUT, WAIT = 100.0, 300.0
SLACK = 60.0  # seconds of a round that no time-out is said for, on a busy machine
PATIENCE = 1800.0
CLOCKS = ("+240", "-240", "+3600", "-3600")
KEY_REFUSED = 60.0  # seconds after a node was killed
RIGHT = "same weights"
AWAY = 20.0  # seconds after which a node that was away must stand in the ledger

Said = dict[str, object]


class Campaign:
    """One run, and what happens meanwhile.

    Args:
        bed: Its hosts.
        rounds: Of the run.
        calm: Whether rounds are waited for that are as before, after each act.

    Attributes:
        ends: Why the run ended and had to be resumed, each time.
    """

    def __init__(self, bed: Bed, rounds: int, *, calm: bool = False) -> None:
        self.calm = calm
        for owner in bed.hosts[1:]:
            owner.own(CACHE, ROOM)
        self.deployment = Deployment(bed)
        self.rounds, self.came, self.ends = rounds, list[HostFault](), list[str]()
        self.words = [w for w in SMALL if w.split("=")[0] not in REPLACED]
        self.words += [*WORDS, f"rounds={rounds}"]
        more = [f"engine.timeout={TIMEOUT:g}", f"engine.wait={WAIT:g}"]
        more += ["output.progress=false", "output.checkpoint_every=1"]
        self.run = self.deployment.begin([*self.words, *more])
        self.deployment.until(1, PATIENCE)
        self.usual = 10.0
        self.lasted: dict[int, float] = {}

    def inject(self, faults: Sequence[HostFault]) -> None:
        """Let things happen, in this round or those after, until all have come and gone."""
        waiting, at, began = list(faults), len(self.deployment.rows()), time.monotonic()
        end, first, ends = began + PATIENCE, at, len(self.ends)
        while waiting or (self.calm and not self._is_calm(faults, first, at)):
            self.deployment.supervise()
            if self.over and not self._goes_on(ends):
                break
            now = len(self.deployment.rows())
            if now != at:
                self.lasted[at] = time.monotonic() - began
                self.usual = min(self.usual, self.lasted[at])
                at, began = now, time.monotonic()
            for fault in waiting:
                fault.look(at, time.monotonic() - began, self.usual)
            waiting = [fault for fault in waiting if fault.ended is None]
            if time.monotonic() > end:
                raise TimeoutError(f"round {at} has not ended for {PATIENCE:g} s")
            time.sleep(0.03)
        for fault in faults:
            if fault.round_ is not None and fault.ended is None:
                fault.undo()
            fault.ended_run = self.ends[ends:]
        self.came += [fault for fault in faults if fault.ended is not None]
        if self.calm:
            self._count_slow(faults, range(first, at))
        print(f"{len(self.came)}: round {at}, {[f.kind for f in faults]}", flush=True)

    def _goes_on(self, ends: int) -> bool:
        """Resume a run that has ended before its last round, as its operator would.

        Args:
            ends: How often it had ended before what happens now.
        """
        if len(self.deployment.rows()) > self.rounds or len(self.ends) >= ends + MOST_ENDS:
            return False
        said = self.deployment.server.path("run.log").read_text().strip().splitlines()
        self.ends.append(said[-1][:400] if said else "without a word")
        print(f"resumed: {self.ends[-1]}", flush=True)
        self.run = self.deployment.begin([], resume=True)
        return True

    def _is_slow(self, faults: Sequence[HostFault], at: int) -> bool:
        """Tell whether a round took longer than it should, besides its faults."""
        here = [f.seconds for f in faults if f.round_ and f.round_ <= at <= (f.ended or at)]
        return self.lasted.get(at, 0.0) > SLOW + 2 * self.usual + max(here, default=0.0)

    def _is_calm(self, faults: Sequence[HostFault], first: int, at: int) -> bool:
        """Tell whether the last rounds, after all faults, were as before."""
        last = range(at - CALM, at)
        ended = max((fault.ended or at for fault in faults), default=first - 1)
        return last.start > ended and not any(self._is_slow(faults, r) for r in last)

    def _count_slow(self, faults: Sequence[HostFault], rounds: range) -> None:
        """Take down how many rounds of an act were slow."""
        for fault in faults:
            mine = [r for r in rounds if fault.round_ is not None and r >= fault.round_]
            fault.slow = sum(self._is_slow(faults, r) for r in mine)
        print([round(self.lasted.get(r, 0.0), 1) for r in rounds], flush=True)

    @property
    def over(self) -> bool:
        """Whether the run has ended, or all of its rounds."""
        return self.run.poll() is not None or len(self.deployment.rows()) > self.rounds

    def note(self, kind: str, client: int, at: int) -> None:
        """Take down what a whole act did."""
        host = self.deployment.server if client < 0 else self.deployment.owners[client]
        self.came.append(HostFault(kind, client, host, 0.0, AWAY, at, len(self.deployment.rows())))
        print(f"{len(self.came)}: round {at}, {kind}", flush=True)

    def restart_link(self, *, host: bool) -> None:
        """Kill the SuperLink, or its whole host, which moves; start it again, and resume."""
        at, server = len(self.deployment.rows()), self.deployment.server
        if host:
            server.kill()
            move(server)
        else:
            self.deployment.link.kill()
        self.deployment.link.wait()
        self.deployment.link = self.deployment.start_link()
        self.run.wait(PATIENCE)
        self.run = self.deployment.begin([], resume=True)
        self.deployment.until(at, PATIENCE)
        self.note(
            "the server's host is killed, and moves" if host else "the SuperLink is killed", -1, at
        )
        if self.calm:
            killed = self.came[-1]
            self.inject([])
            rounds = range((killed.ended or at) + 1, len(self.deployment.rows()))
            killed.slow = sum(self._is_slow([], r) for r in rounds)

    def shift_clocks(self, library: Path) -> None:
        """Start nodes again whose clocks are off; then as they were."""
        deployment = self.deployment
        for added in ({"FAKETIME_DONT_FAKE_MONOTONIC": "1"}, None):
            at = len(deployment.rows())
            for client, seconds in enumerate(CLOCKS):
                owner = deployment.owners[client]
                if added:
                    shutil.copy(library, owner.path("faketime.so"))
                wrong = {"LD_PRELOAD": f"{HOME}/faketime.so", "FAKETIME": seconds}
                deployment.added[client] = {} if added is None else {**wrong, **added}
                owner.kill()
            end = time.monotonic() + KEY_REFUSED + 30
            while time.monotonic() < end and not self.over:
                deployment.supervise()
                time.sleep(1)
            if not self.over:
                deployment.until(len(deployment.rows()), PATIENCE)
            for client, seconds in enumerate(CLOCKS if added else ()):
                self.note(f"its clock is {seconds} s off", client, at)

    def verdicts(self) -> list[Said]:
        """Wait for the end, and say of each fault what came of it."""
        ends = len(self.ends)
        wait_for(
            lambda: self.run.poll() is not None and not self._goes_on(ends),
            "the end of the run",
            PATIENCE,
        )
        rows = {int(str(row["round"])): row for row in self.deployment.rows()[1:]}
        missing = {
            at: {f["client"]: f["reason"] for f in row["failures"]}  # type: ignore[attr-defined]
            for at, row in rows.items()
        }
        found = read_summary(self.deployment.server.path("there"))["weights_digest"]
        wanted = final_weights(
            self.words, absent({at: list(m) for at, m in missing.items()}), NODES
        )
        said = []
        for fault in self.came:
            at, last = fault.round_ or 0, fault.ended or self.rounds
            here = range(at, min(last, self.rounds) + 1)
            reasons = [missing[r][fault.client] for r in here if fault.client in missing.get(r, {})]
            notes = [str(n) for r in here for n in rows[r].get("incidents", ()) if names(n, fault)]  # type: ignore[attr-defined]
            verdict = RIGHT if found == wanted else "other final weights"
            longest = max((self.lasted.get(r, 0.0) for r in here), default=0.0)
            if longest > (3 + 1) * TIMEOUT + WAIT + SLACK:
                verdict = f"a round took {longest:.0f} s"
            if (fault.slow or 0) > MOST_SLOW:
                verdict = f"{fault.slow} rounds were slow"
            if fault.ended_run:
                verdict = "the run ended, and was resumed"
            away = fault.seconds >= AWAY and fault.client >= 0
            if away and not reasons and not notes:
                verdict = "the ledger does not name it"
            said.append(
                {
                    "kind": fault.kind, "client": fault.client, "round": at, "verdict": verdict,
                    "lost": [str(r)[:200] for r in reasons], "incidents": notes,
                    "seconds": round(longest, 1), "slow": fault.slow, "ended": fault.ended_run,
                }
            )  # fmt: skip
        return said


def names(note: object, fault: HostFault) -> bool:
    """Tell whether an incident names the client of a fault."""
    text = json.dumps(note, default=str)
    named = rf"clients? \[?(?:\d+, )*{fault.client}\b"
    return re.search(named, text) is not None or f'"client": {fault.client}' in text


def network_table(said: Sequence[Said]) -> str:
    """Write what came of the faults, one row for each kind."""
    alone = any(s.get("slow") is not None for s in said)
    lines = ["| fault | injected | ended right | left out | seconds (median, most) |"]
    lines[0] += " slow rounds, most |" * alone
    lines += ["|---|---:|---:|---:|---:|" + "---:|" * alone]
    for kind in dict.fromkeys([*HOST_FAULTS, *(str(s["kind"]) for s in said)]):
        mine = [s for s in said if s["kind"] == kind]
        if not mine:
            continue
        right = sum(s["verdict"] == RIGHT for s in mine)
        lost = sum(bool(s["lost"]) for s in mine)
        seconds = sorted(float(str(s["seconds"])) for s in mine)
        took = f"{seconds[len(seconds) // 2]:.0f}, {seconds[-1]:.0f}"
        slow = f" {max(int(str(s.get('slow') or 0)) for s in mine)} |" * alone
        lines.append(f"| {kind} | {len(mine)} | {right} | {lost} | {took} |{slow}")
    right = sum(s["verdict"] == RIGHT for s in said)
    last = f"| **all** | **{len(said)}** | **{right}** | | |" + " |" * alone
    return "\n".join([*lines, last, ""])


def sitting(
    folder: Path, k: int, number: int, seed: int, clocks: Path | None, alone: int = 0
) -> list[Said]:
    """Inject so many faults into one run; say what came of each."""
    rng = np.random.default_rng([seed, k])
    with Bed(NODES + 1, rate=RATE) as bed:
        rounds = number if clocks is None else 40
        if alone:
            rounds = ROUNDS_OF_ACT * (number // alone + 2)
        run = Campaign(bed, rounds=20 + rounds, calm=bool(alone))
        try:
            acts = list(
                drawn_alone(rng, run.deployment, number, alone)
                if alone
                else drawn(rng, run.deployment, number)
            )
            print([len(faults) for faults in acts], flush=True)
            for act, faults in enumerate(acts):
                for fault in faults:
                    fault.counters = fault.host.sent(), fault.host.received()
                run.inject(faults)
                if run.over:
                    break  # what is left comes in one run more
                if act == len(acts) // 2:
                    run.restart_link(host=k % 2 == 1)
            if clocks is not None:
                run.shift_clocks(clocks)
            return run.verdicts()
        finally:
            for host in bed:
                for log in host.path("").glob("*.log"):
                    shutil.copy(log, folder / f"{k}-{host.name}-{log.name}")
            shutil.copytree(run.deployment.server.path("there"), folder / f"run{k}")


@reported
def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 if a fault ended wrong."""
    group = key_values(sys.argv[1:] if words is None else words)
    if "out" not in group or group.keys() - {"out", "faults", "seed", "faketime", "alone"}:
        raise ConfigError(
            "network_campaign takes out=DIR, faults=NUMBER, seed=, faketime=LIBRARY, alone=NUMBER"
        )
    folder = Path(str(group["out"]))
    folder.mkdir(parents=True, exist_ok=True)
    library = Path(str(group["faketime"])).resolve(strict=True) if "faketime" in group else None
    number, seed = int(str(group.get("faults", 200))), int(str(group.get("seed", 0)))
    said, alone = list[Said](), int(str(group.get("alone", 0)))

    def go_on(k: int, faults: int, clocks: Path | None) -> None:
        if not (results := folder / f"campaign{k}.jsonl").is_file():
            found = sitting(folder, k, faults, seed, clocks, alone)
            results.write_text("".join(json.dumps(s) + "\n" for s in found))
        said.extend(map(json.loads, results.read_text().splitlines()))
        (folder / "table.md").write_text(network_table(said))

    if library:
        go_on(999, 0, library)
    k = 0
    while len(said) < number:
        go_on(k, min(ALONE if alone else TOGETHER, number - len(said)), None)
        k += 1
    facts = {"faults": len(said), **provenance()}
    (folder / "facts.json").write_text(json.dumps(facts, indent=1) + "\n")
    print(network_table(said))
    return int(any(s["verdict"] != RIGHT for s in said))


if __name__ == "__main__":
    sys.exit(main())
