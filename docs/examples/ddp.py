"""Several processes for one client: DDP, or FSDP, over ranks that the launcher of torchrun starts.

Every rank installs the round and trains on its share of each batch. Every rank reads, where it is
checked that all have the same; what rank 0 has read is the answer. Ranks come from a fork server
that holds torch already: half a second a client and round, where a spawned process takes several.

    python ddp.py
"""

from __future__ import annotations

import gc
import multiprocessing

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.fsdp import fully_shard
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel

import fedraclora
from fedraclora.client import Round, Trained

RANKS, STEPS, BATCH, RATE, SHARDED = 2, 4, 16, 0.1, False
HELD = ["fedraclora.client", "torch._dynamo", "torch.distributed.fsdp"]  # before a rank starts
HERE = {"rdzv_backend": "c10d", "rdzv_endpoint": "localhost:0", "max_restarts": 0}
HERE |= {"start_method": "forkserver", "monitor_interval": 0.02}


def network() -> nn.Module:
    """Build the model; `Round.install` brings its weights."""
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 2))


def train(round: Round) -> Trained:
    """Start the ranks of one client, and answer with what rank 0 has read."""
    multiprocessing.set_forkserver_preload(HELD)
    ranks = LaunchConfig(1, 1, RANKS, run_id=f"client-{round.client}", **HERE)
    try:
        return elastic_launch(ranks, on_rank)(round, SHARDED)[0]
    except ChildFailedError as error:
        rank, found = error.get_first_failure()
        why = found.message["message"] if isinstance(found.message, dict) else found.message
        raise RuntimeError(f"rank {rank}, status {found.exitcode}: {why}") from error


def on_rank(round: Round, sharded: bool) -> Trained:
    """Join the others, train, and part: only when all that `on_data` made has gone.

    A DDP that outlives its group destroys it, and that waits without end for a thread of gloo that
    waits for Python's lock.
    """
    dist.init_process_group("gloo")
    try:
        return on_data(round, sharded)
    finally:
        gc.collect()
        dist.destroy_process_group()


def on_data(round: Round, sharded: bool) -> Trained:
    """Train on one rank; gradients are means over the ranks."""
    torch.manual_seed(round.seed)  # the same on each rank
    model = round.install(network())
    wrapped = fully_shard(model) if sharded else DistributedDataParallel(model)
    wanted = [p for p in wrapped.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(wanted, lr=RATE * round.rate_scale)
    (x, y), total = round.data, torch.zeros(())
    for rows in torch.randperm(len(x)).split(BATCH)[:STEPS]:
        own = rows[dist.get_rank() :: RANKS]
        loss = F.cross_entropy(wrapped(x[own]), y[own])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        total += loss.detach() / STEPS / RANKS
    dist.all_reduce(total)
    # Every rank reads; of FSDP it gathers the parts.
    return round.read(model, samples=len(x), steps=STEPS, loss=total)


if __name__ == "__main__":
    x = torch.randn(600, 20, generator=torch.Generator().manual_seed(0))
    y, sizes = (x[:, 0] > 0).long(), [100, 240, 160, 100]
    *clients, test = zip(x.split(sizes), y.split(sizes), strict=True)
    run = fedraclora.simulate(
        model=network(), data=clients, test=test, train=train, method="fed_rac_lora", rounds=4
    )
    print(run.history[["loss", "accuracy"]])
