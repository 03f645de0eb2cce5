"""Flower: Message API, FedAvg, its simulation runtime on Ray with two actors.

A round lasts from the end of one aggregation to the end of the next.
"""

from __future__ import annotations

import logging

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

from fedraclora.experiments.bench.peers.flower_client import client_app
from fedraclora.experiments.bench.peers.work import Work
from fedraclora.experiments.bench.usage import Laps

work, laps = Work(), Laps()
server_app = ServerApp()


class Timed(FedAvg):
    """FedAvg that times its rounds, and reports at the last one."""

    def aggregate_train(self, server_round, replies):
        """Count the replies: Flower passes over a client that failed."""
        replies = list(replies)
        failed = [message.error.reason for message in replies if message.has_error()]
        if failed or len(replies) != work.clients:
            raise RuntimeError(
                f"{len(failed)} of Flower's clients failed, the first with {failed[:1]}; "
                f"{len(replies)} replied"
            )
        arrays, metrics = super().aggregate_train(server_round, replies)
        laps.end()
        if server_round == work.rounds:
            # Here, while the actors are alive: their memory counts.
            final = arrays.to_torch_state_dict()
            work.report(laps, final, "flwr", "ray", "torch")
        laps.begin()
        return arrays, metrics


@server_app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the rounds."""
    strategy = Timed(
        fraction_train=1.0,
        fraction_evaluate=0.0,
        min_train_nodes=work.clients,
        min_available_nodes=work.clients,
    )
    arrays = ArrayRecord(work.started().state_dict())
    laps.begin()
    strategy.start(grid=grid, initial_arrays=arrays, num_rounds=work.rounds)


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    quiet = {"num_cpus": 2, "logging_level": logging.ERROR, "log_to_driver": False}
    run_simulation(
        server_app,
        client_app,
        num_supernodes=work.clients,
        backend_config={
            "client_resources": {"num_cpus": 1.0, "num_gpus": 0.0},
            "init_args": quiet,
        },
    )
