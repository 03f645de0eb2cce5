"""What a round costs the server, for each method: its CPU seconds.

    python -m fedraclora.experiments.bench.servers

One adapted matrix, random replies, one thread: CPU seconds of `Method.close_round` in the second
round (the first has nothing to carry), of `Method.init`, and the numbers that travel. Full-weight
methods, and SLoRA, which begins as one, are left out unless they are named: they cost a mean of K
dense matrices, which take gigabytes at this size. Keys:

  only=     names of methods, with commas
  size=     rows and columns of the matrix (4096)
  rank=     (16)
  clients=  of a round (50)
  out=      a file to write the table to, in Markdown
"""

from __future__ import annotations

import sys
import time
from inspect import signature
from pathlib import Path
from typing import Any

import torch

from fedraclora.binding import bind, row_of
from fedraclora.commands.status import reported
from fedraclora.compose.words import key_values
from fedraclora.limits import Count
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Method, Plan, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from fedraclora.strategies.methods import METHODS
from fedraclora.terminal.tables import TextTable

TIMES = 2  # of a close: the least of them counts, since machines are shared


def replies(method: Method, state: State, round_: int, cohort: Cohort) -> tuple[Any, Uplinks]:
    """Open a round and answer it with normals in float32."""
    sent = method.open_round(state, round_, cohort, Draw(0))
    layout = sent.layout
    drawn = generator(round_, "replies").standard_normal((len(cohort), layout.size), "float32")
    return sent, Uplinks(cohort.clients, cohort.weights, layout, torch.from_numpy(drawn))


def one_matrix(size: int) -> Plan:
    """Build the plan of a model of one square matrix."""
    shape = (size, size)
    return Plan({"w": LayerView("linear", shape)}, weights=("w",), shapes={"w": shape})


def row(name: str, method: Method, size: int, clients: int) -> dict[str, object]:
    """Time one method; give its row of the table."""
    plan, shape = one_matrix(size), (size, size)
    weight = generator(0, "weight").standard_normal(shape, "float32") / size**0.5
    cohort = Cohort(torch.arange(clients), torch.arange(1, clients + 1, dtype=torch.float64))
    started = time.process_time()
    state = method.initial_state({"w": torch.from_numpy(weight)}, plan, Draw(0))
    first = time.process_time() - started
    state = method.close_round(state, *replies(method, state, 1, cohort))
    sent, uplinks = replies(method, state, 2, cohort)
    seconds, after = [], state
    for _ in range(TIMES):
        started = time.process_time()
        after = method.close_round(state, sent, uplinks)
        seconds.append(time.process_time() - started)
    up, down = method.floats(plan, 2)
    terms = {} if after.link is None else after.link.terms
    factors = (f for term in terms.values() for f in term.factors)
    numbers = sum(f.floats + f.exact_bytes for f in factors)
    link = min(numbers, size * size)
    times = {"close CPU s": f"{min(seconds):.2f}", "init CPU s": f"{first:.2f}"}
    return {"method": name, **times, "up": up, "down": down, "link": link}


@reported
def main() -> int:
    """Time what the words ask for."""
    bind("bench", {"servers": measure}, {"name": "servers", **key_values(sys.argv[1:])})()
    return 0


def measure(
    size: Count = 4096, rank: Count = 16, clients: Count = 50, only: str = "", out: str = ""
) -> None:
    """Time one method after another, each named as it is measured; print the table."""
    torch.set_num_threads(1)
    records: dict[type[Method], dict[str, object]] = {}
    for name in (only or ",".join(METHODS)).split(","):
        kind = row_of("method", METHODS, name)
        if kind in records:
            continue
        given = {"rank": rank} if "rank" in signature(kind).parameters else {}
        method = bind("method", METHODS, {"name": name, **given})()
        if not only and method.floats(one_matrix(size))[0] >= size * size:
            continue  # it sends whole weights, many times what the others do
        records[kind] = row(name, method, size, clients)
        print(*records[kind].values(), flush=True)
    text = TextTable.of(list(records.values())).markdown()
    print(text)
    if out:
        Path(out).write_text(text)


if __name__ == "__main__":
    sys.exit(main())
