"""FedJAX: federated averaging; its jit backend compiles the step and takes clients in turn."""

from __future__ import annotations

import fedjax
import jax
import jax.numpy as jnp
import numpy as np

from fedraclora.experiments.bench.peers.work import Work
from fedraclora.experiments.bench.usage import Laps


def loss(weights, batch, _):
    """Mean cross-entropy of a batch."""
    hidden = jax.nn.relu(batch["x"] @ weights["fc1.weight"].T + weights["fc1.bias"])
    logits = hidden @ weights["fc2.weight"].T + weights["fc2.bias"]
    picked = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], 1)
    return -jnp.mean(picked)


def main() -> None:
    """Run the work."""
    work, laps = Work(), Laps()
    clients = [
        (str(k), fedjax.ClientDataset({"x": work.x[k], "y": work.y[k].astype(np.int32)}))
        for k in range(work.clients)
    ]
    batches = fedjax.ShuffleRepeatBatchHParams(
        batch_size=work.batch, num_epochs=1, skip_shuffle=True
    )
    algorithm = fedjax.algorithms.fed_avg.federated_averaging(
        jax.grad(loss), fedjax.optimizers.sgd(work.lr), fedjax.optimizers.sgd(1.0), batches
    )
    state = algorithm.init({n: jnp.asarray(w) for n, w in work.start.items()})
    with fedjax.for_each_client_backend("jit"):
        for round_ in range(work.rounds):
            laps.begin()
            keys = jax.random.split(jax.random.PRNGKey(round_), work.clients)
            cohort = [(*client, key) for client, key in zip(clients, keys, strict=True)]
            state, _ = algorithm.apply(state, cohort)
            jax.block_until_ready(state.params)
            laps.end()
    work.report(laps, state.params, "fedjax", "jax")


if __name__ == "__main__":
    main()
