"""``python -m experiments.bench.servers``: what a round costs the server, for each method.

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

from fedraclora.config.schema import bind
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.method import Cohort, Draw, Method, Plan, State
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator
from fedraclora.sketch import SketchSpec
from fedraclora.weights.chain import SEED_BYTES
from fedraclora.wire import uplink_layout
from strategies import METHODS
from strategies.fedavg import FedAvg
from strategies.slora import SLora

TIMES = 2  # of a close: the least of them counts, since machines are shared


def replies(method: Method, state: State, round_: int, cohort: Cohort) -> tuple[Any, Uplinks]:
    """Open a round and answer it with normals in float32."""
    sent = method.open_round(state, round_, cohort, Draw(0))
    layout = uplink_layout(sent)
    drawn = generator(round_, "replies").standard_normal((len(cohort), layout.size), "float32")
    return sent, Uplinks(cohort.clients, cohort.weights, layout, torch.from_numpy(drawn))


def row(name: str, method: Method, size: int, clients: int) -> str:
    """Time one method; give its row of the table."""
    shape = (size, size)
    weight = generator(0, "weight").standard_normal(shape, "float32") / size**0.5
    plan = Plan({"w": LayerView("linear", shape)}, weights=("w",), shapes={"w": shape})
    cohort = Cohort(torch.arange(clients), torch.arange(1, clients + 1, dtype=torch.float64))
    started = time.process_time()
    state = method.init({"w": torch.from_numpy(weight)}, plan, Draw(0))
    first = time.process_time() - started
    state = method.close_round(state, *replies(method, state, 1, cohort))
    sent, got = replies(method, state, 2, cohort)
    seconds, after = [], state
    for _ in range(TIMES):
        started = time.process_time()
        after = method.close_round(state, sent, got)
        seconds.append(time.process_time() - started)
    up, down = method.floats(plan, 2)
    terms = {} if after.link is None else after.link.terms
    factors = (f for term in terms.values() for f in term.factors)
    numbers = sum(SEED_BYTES if isinstance(f, SketchSpec) else f.numel() for f in factors)
    link = min(numbers, size * size)
    return f"| {name} | {min(seconds):.2f} | {first:.2f} | {up} | {down} | {link} |"


def main() -> int:
    """Print a row for each method as it is measured."""
    keys = {"size": "4096", "rank": "16", "clients": "50"}
    keys |= dict(word.split("=", 1) for word in sys.argv[1:])
    torch.set_num_threads(1)
    wanted = keys.get("only", ",".join(METHODS)).split(",")
    lines = [
        "| method | close CPU s | init CPU s | up | down | link |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(lines), flush=True)
    seen = set()
    for name in wanted:
        kind = METHODS[name]
        if kind in seen or ("only" not in keys and issubclass(kind, FedAvg | SLora)):
            continue
        seen.add(kind)
        rank = {"rank": int(keys["rank"])} if "rank" in signature(kind).parameters else {}
        method = bind("method", METHODS, {"name": name, **rank})()
        lines.append(row(name, method, int(keys["size"]), int(keys["clients"])))
        print(lines[-1], flush=True)
    if "out" in keys:
        Path(keys["out"]).write_text("\n".join(lines) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
