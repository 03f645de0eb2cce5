"""FedLab: its standalone pipeline; clients in turn in one process, each with a DataLoader."""

from __future__ import annotations

import torch
from fedlab.contrib.algorithm.basic_client import SGDSerialClientTrainer
from fedlab.contrib.algorithm.basic_server import SyncServerHandler
from fedlab.core.standalone import StandalonePipeline

from fedraclora.experiments.bench.peers.work import Work
from fedraclora.experiments.bench.usage import Laps


class Data:
    """Clients' data as DataLoaders."""

    def __init__(self, work: Work) -> None:
        self.x, self.y = torch.from_numpy(work.x), torch.from_numpy(work.y)

    def get_dataloader(self, client, batch):
        """Yield the batches of a client, in order."""
        data = torch.utils.data.TensorDataset(self.x[client], self.y[client])
        return torch.utils.data.DataLoader(data, batch_size=batch)


class Silent:
    """A logger that says nothing."""

    def info(self, *_):
        """Drop a message."""


class Pipeline(StandalonePipeline):
    """Times the rounds: FedLab calls `evaluate` at the end of each."""

    laps = Laps()

    def evaluate(self):
        """End a round and begin the next."""
        self.laps.end()
        self.laps.begin()


def main() -> None:
    """Run the work."""
    work = Work()
    torch.set_num_threads(work.threads)
    model = work.started()
    trainer = SGDSerialClientTrainer(model, work.clients, cuda=False, logger=Silent())
    trainer.setup_dataset(Data(work))
    trainer.setup_optim(1, work.batch, work.lr)
    handler = SyncServerHandler(model, work.rounds, 1.0, logger=Silent())
    pipeline = Pipeline(handler, trainer)
    pipeline.laps.begin()
    pipeline.main()
    work.report(pipeline.laps, handler.model.state_dict(), "fedlab", "torch")


if __name__ == "__main__":
    main()
