"""The ClientApp of the Flower peer.

In a module of its own: an app defined in the script that is run is pickled by value for every
message, which makes Flower look twice as slow.
"""

from __future__ import annotations

from functools import cache

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from fedraclora.experiments.bench.peers.work import Work

client_app = ClientApp()


@cache
def work() -> Work:
    """Read the data once per actor."""
    found = Work()
    torch.set_num_threads(found.threads)
    return found


@client_app.train()
def train(message: Message, context: Context) -> Message:
    """Train the client of this node from the global weights, with a model of its own."""
    model = work().network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    work().train(model, int(context.node_config["partition-id"]))
    metrics = MetricRecord({"num-examples": work().samples})
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
    return Message(content, reply_to=message)
