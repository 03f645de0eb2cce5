"""Bytes of a round of MiniLM on the wire, beside the formulas.

    python -m fedraclora.experiments.wire_bytes out=DIR

Two clients and two rounds of each method, their messages written as a SuperLink writes them. In the
second round clients catch up on the first.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from fedraclora.commands.status import reported
from fedraclora.compose.overrides import composed
from fedraclora.compose.words import key_values
from fedraclora.errors import ConfigError
from fedraclora.experiments.faults.network import Network, nodes_for, rows, serve
from fedraclora.flower_internals import message_bytes
from fedraclora.run.folder import provenance, read_summary

RANK = ["method.rank=8"]
METHODS = {
    "Fed-RAC-LoRA": ["method=fed_rac_lora", *RANK],
    "FedAvg-LoRA": ["method=fedavg_lora", *RANK],
    "full FedAvg": ["method=fedavg"],
}
WORDS = [
    "data=glue_rte",
    "data.max_length=16",
    "model=minilm",
    "partition=iid",
    "pretrain=none",
    "head=full",
    "bias=frozen",
    "clients=2",
    "clients_per_round=2",
    "rounds=2",
    "local.steps=1",
    "local.batch_size=2",
    "evaluate.every=2",
    "engine=deploy",
    "output=study",
]
FLOAT = 4


def measure(words: Sequence[str]) -> dict[str, int]:
    """Run two rounds; give the bytes of the second, a client."""
    with tempfile.TemporaryDirectory() as made, redirect_stdout(StringIO()):
        folder = Path(made) / "run"
        network = Network(Path(made) / "cache", nodes_for(2))
        serve(composed([*WORDS, *words, f"output.dir={folder}"]), network)
        last, floats = rows(folder)[2], int(str(read_summary(folder)["uplink_floats"]))
        sent = [m for m in network.posted if network.is_training(m) and m.metadata.group_id == "2"]
        up = [message_bytes(m) for m in sent if m.metadata.reply_to_message_id]
        down = [message_bytes(m) for m in sent if not m.metadata.reply_to_message_id]
        payload = [int(str(last[key])) for key in ("downlink_bytes", "catchup_bytes")]
        return {
            "formula": floats * FLOAT,
            "up": int(str(last["uplink_bytes"])) // 2,
            "up_serialized": sum(up) // 2,
            "down": sum(payload) // 2,
            "down_serialized": sum(down) // 2,
        }


def wire_table(found: dict[str, dict[str, int]]) -> str:
    """Write the figures as a table, in bytes a client and round."""
    columns = ["formula", "up", "up_serialized", "down", "down_serialized"]
    lines = [
        "| method | uplink by formula | uplink | serialized | downlink | serialized |",
        "|---|---|---|---|---|---|",
    ]
    for method, row in found.items():
        lines.append(f"| {method} | " + " | ".join(f"{row[c]:,}" for c in columns) + " |")
    return "\n".join([*lines, ""])


@reported
def main(words: Sequence[str] | None = None) -> int:
    """Measure and write."""
    group = key_values(sys.argv[1:] if words is None else words)
    if group.keys() != {"out"}:
        raise ConfigError("wire_bytes takes out=DIR")
    folder = Path(str(group["out"]))
    found = {name: measure(words) for name, words in METHODS.items()}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "table.md").write_text(wire_table(found))
    record = {"words": WORDS, "methods": METHODS, "bytes": found, **provenance()}
    (folder / "bytes.json").write_text(json.dumps(record, indent=1) + "\n")
    print(wire_table(found), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
