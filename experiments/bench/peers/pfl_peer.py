"""pfl (Apple's pfl-research): FederatedAveraging over its simulated backend, one process."""

from __future__ import annotations

import numpy as np
import torch
from pfl.aggregate.simulate import SimulatedBackend
from pfl.aggregate.weighting import WeightByDatapoints
from pfl.algorithm.base import NNAlgorithmParams
from pfl.algorithm.federated_averaging import FederatedAveraging
from pfl.callback.base import TrainingProcessCallback
from pfl.data.dataset import Dataset
from pfl.data.federated_dataset import FederatedDataset
from pfl.data.sampling import get_user_sampler
from pfl.hyperparam import NNTrainHyperParams
from pfl.metrics import Metrics, Weighted
from pfl.model.pytorch import PyTorchModel

from fedraclora.experiments.bench.peers.work import Work
from fedraclora.experiments.bench.usage import Laps


class Network(torch.nn.Module):
    """The model as pfl wants it: it gives its own loss and metrics."""

    def __init__(self, work: Work) -> None:
        super().__init__()
        self.net = work.started()

    def loss(self, x, y):
        """Training loss of a batch."""
        self.train()
        return torch.nn.functional.cross_entropy(self.net(x), y)

    @torch.no_grad()
    def metrics(self, x, y):
        """Metrics of a batch."""
        self.eval()
        total = torch.nn.functional.cross_entropy(self.net(x), y, reduction="sum").item()
        return {"loss": Weighted(total, len(y))}


class Clock(TrainingProcessCallback):
    """Times the central iterations."""

    def __init__(self, laps: Laps) -> None:
        self.laps = laps

    def on_train_begin(self, *, model):
        """Begin the first round."""
        self.laps.begin()
        return Metrics()

    def after_central_iteration(self, aggregate_metrics, model, *, central_iteration):
        """End a round and begin the next."""
        self.laps.end()
        self.laps.begin()
        return False, Metrics()


def main() -> None:
    """Run the work."""
    work, laps = Work(), Laps()
    torch.set_num_threads(work.threads)
    np.random.seed(0)  # noqa: NPY002  pfl draws from numpy's global generator
    network = Network(work)
    model = PyTorchModel(
        network,
        local_optimizer_create=torch.optim.SGD,
        central_optimizer=torch.optim.SGD(network.parameters(), 1.0),
    )
    x, y = torch.from_numpy(work.x), torch.from_numpy(work.y)
    sampler = get_user_sampler("minimize_reuse", list(range(work.clients)))
    data = FederatedDataset(lambda user: Dataset([x[user], y[user]], user_id=str(user)), sampler)
    backend = SimulatedBackend(
        training_data=data, val_data=data, postprocessors=[WeightByDatapoints()]
    )
    central = NNAlgorithmParams(
        central_num_iterations=work.rounds,
        evaluation_frequency=10**9,
        train_cohort_size=work.clients,
        val_cohort_size=None,
    )
    local = NNTrainHyperParams(
        local_num_epochs=1, local_learning_rate=work.lr, local_batch_size=work.batch
    )
    FederatedAveraging().run(
        central, backend, model, local, callbacks=[Clock(laps)], send_metrics_to_platform=False
    )
    work.report(laps, network.net.state_dict(), "pfl", "torch")


if __name__ == "__main__":
    main()
