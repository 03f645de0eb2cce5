"""What a round of a deployment costs, by nodes and by clients; all of it runs on this machine.

    python -m fedraclora.experiments.bench.nodes nodes=2,4,8 clients=8,100,1000
    python -m fedraclora.experiments.bench.nodes nodes=3 clients=3 unpatched=none,fork,all

Each pair is a deployment of its own, in which all clients take part in each round. Seconds are
the median of the rounds after the first, by the ledger; processor seconds of the SuperLink, and
requests to it, are means of these rounds. Other words are those of ``fedraclora deploy``. Keys:

  nodes=    numbers of SuperNodes, with commas (2,4,8)
  clients=  numbers of clients, with commas (8,100,1000)
  rounds=   of each (6)
  unpatched=  patches of Flower to leave out, one in each deployment: their names, ``all`` or
            ``none`` (none)
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from itertools import pairwise, product
from pathlib import Path
from typing import Any

from fedraclora.commands import deploy
from fedraclora.commands.status import reported
from fedraclora.compose.words import part
from fedraclora.engines.deploy.local import LocalDeployment
from fedraclora.engines.flower_patches import ALL, UNPATCHED
from fedraclora.errors import EngineError
from fedraclora.experiments.bench.usage import cpu
from fedraclora.run.ledger import read_ledger
from fedraclora.terminal.tables import TextTable

WORDS = ["data=digits", "data.labels=null", "pretrain=none", "partition=iid", "method.rank=2"]
WORDS += ["output=study", "output.progress=false"]
NONE = "none"  # no patch is left out
PAUSE = 0.1  # seconds between looks at the ledger


def row(
    nodes: int, clients: int, rounds: int, words: list[str], unpatched: str = NONE
) -> dict[str, object]:
    """Run one deployment without one patch, or with all; give its row of the table.

    Raises:
        EngineError: If its run ends before its last round.
    """
    ends = [clients * k // nodes for k in range(nodes + 1)]
    served = [list(range(*span)) for span in pairwise(ends)]
    running = LocalDeployment(served, patched=unpatched != ALL)
    running.environ["FLWR_LOG_LEVEL"] = "DEBUG"  # the SuperLink then writes down each request
    if unpatched not in {ALL, NONE}:
        running.environ[UNPATCHED] = unpatched
    with tempfile.TemporaryDirectory() as made, running:
        folder = Path(made) / "run"
        sizes = [f"clients={clients}", f"clients_per_round={clients}", f"rounds={rounds}"]
        request = deploy.prepare([*WORDS, *sizes, *words, f"output.dir={folder}"], nodes)
        run, ledger = deploy.submit(request, running.connection), folder / "ledger.jsonl"
        link = running.link
        marks, rows = list[tuple[float, int]](), list[dict[str, Any]]()
        while link is not None and len(marks) < 2:
            time.sleep(PAUSE)
            rows = read_ledger(ledger) if ledger.is_file() else []
            if len(rows) > (rounds if marks else 1):
                requests = link.file.read_text(errors="replace").count("HTTP/1.1")
                marks.append((cpu(link.process.pid), requests))
            elif not rows and running.connection.status(run).ended:
                raise EngineError(f"the run ended: {link.last_words}")
    (before, first), (after, last) = marks
    seconds = [sum(each["seconds"].values()) for each in rows[2:]]
    return {
        "nodes": nodes,
        "clients": clients,
        "without": unpatched,
        "seconds a round": f"{statistics.median(seconds):.2f}",
        "SuperLink's": f"{(after - before) / (rounds - 1):.2f}",
        "requests": round((last - first) / (rounds - 1)),
    }


@reported
def main() -> int:
    """Run one deployment after another, each shown as it ends; print the table."""
    own, words = part(sys.argv[1:], ("nodes", "clients", "rounds", "unpatched"))
    keys = {"nodes": "2,4,8", "clients": "8,100,1000", "rounds": 6, "unpatched": NONE, **own}
    many, counts = ([int(n) for n in str(keys[key]).split(",")] for key in ("nodes", "clients"))
    without = str(keys["unpatched"]).split(",")
    records = []
    for nodes, clients, name in ((n, c, w) for n, c, w in product(many, counts, without) if n <= c):
        records.append(row(nodes, clients, int(str(keys["rounds"])), words, name))
        print(*records[-1].values(), flush=True)
    print(TextTable.of(records).markdown())
    return 0


if __name__ == "__main__":
    sys.exit(main())
