"""The synthetic classification task of FedProx: clients that differ in labels and in inputs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import numpy as np
import torch

from fedraclora.data.dataset import (
    FLOAT_TYPES,
    NUMERIC,
    OF_RUN,
    Clients,
    DataSet,
    Dtype,
    classification,
)
from fedraclora.data.samples import Samples
from fedraclora.limits import Fraction, NotNegative, limited

FEATURES, CLASSES = 60, 10


@NUMERIC
@limited("data")
def fedprox_synthetic(
    *,
    clients: Annotated[Clients, OF_RUN],
    alpha: NotNegative | None = 1.0,
    beta: NotNegative | None = 1.0,
    test_fraction: Fraction = 0.1,
    seed: int = 0,
    dtype: Dtype = "float32",
) -> DataSet:
    r"""Draw Synthetic(alpha, beta) of Li et al.; their model is model=linear.

    .. math::
        y = \arg\max(W_k^\top x + b_k), \quad W_k, b_k \sim N(u_k, 1), \quad
        x \sim N(v_k, \mathrm{diag}(j^{-1.2})), \quad v_k \sim N(B_k, 1)

    with :math:`u_k \sim N(0, \alpha^2)` and :math:`B_k \sim N(0, \beta^2)`: as in the authors'
    code; in the paper alpha and beta are variances. Draws equal those of that code after
    ``numpy.random.seed(seed)``. The code sets no seed, so that its published files are other draws
    of the same distribution. It shuffles samples before the last ones become the test; we do not,
    since they have no order.

    Args:
        clients: Number of clients; 30 in the paper. Each has 50 samples, and exp(N(4, 2^2)) more.
        alpha: How far the clients' labels differ; None: one W and b for all, drawn with u = 0.
        beta: How far the clients' inputs differ; None: v_k = 0. Both None: Synthetic-IID.
        test_fraction: Fraction of each client's samples, the last ones, that are held out.
        seed: Seed of the problem; independent of the run's seed.
        dtype: ``float32`` or ``float64``.

    Returns:
        Inputs ``"x"`` [N, 60] and ten classes; ``parts`` are the clients.

    Raises:
        ConfigError: If a number is out of range, naming the key.

    References:
        Li et al., *Federated Optimization in Heterogeneous Networks*, arXiv:1812.06127, section 5;
        ``data/synthetic_1_1/generate_synthetic.py`` and ``data/synthetic_iid`` of their code.
    """
    rng = np.random.RandomState(seed)  # the generator of the authors' code
    sizes = rng.lognormal(4, 2, clients).astype(np.int64) + 50
    means = np.zeros((clients, FEATURES))
    labels_about = np.zeros(clients) if alpha is None else rng.normal(0, alpha, clients)
    if beta is not None:
        inputs_about = rng.normal(0, beta, clients)
        means = np.stack([rng.normal(about, 1, FEATURES) for about in inputs_about])
    shared = _labeller(rng, 0.0) if alpha is None else None
    deviation = np.arange(1, FEATURES + 1) ** -0.6
    x, y = [], []
    for client, count in enumerate(sizes):
        weight, bias = shared or _labeller(rng, labels_about[client])
        x.append(means[client] + rng.standard_normal((count, FEATURES)) * deviation)
        y.append((x[-1] @ weight + bias).argmax(axis=1))
    kept = (sizes * (1 - test_fraction)).astype(np.int64)

    def table(parts: list[slice]) -> Samples:
        inputs = np.concatenate([own[part] for own, part in zip(x, parts, strict=True)])
        target = np.concatenate([own[part] for own, part in zip(y, parts, strict=True)])
        samples = Samples({"x": torch.from_numpy(inputs)}, torch.from_numpy(target))
        return samples.to("cpu", FLOAT_TYPES[dtype])

    data = classification(
        table([slice(count) for count in kept]),
        table([slice(count, None) for count in kept]),
        CLASSES,
        {"source": f"FedProx synthetic, alpha {alpha}, beta {beta}"},
    )
    rows = np.split(np.arange(kept.sum()), kept.cumsum()[:-1])
    owners = np.repeat(np.arange(clients), kept)
    return replace(data, parts=rows, columns=data.columns | {"client": owners})


def _labeller(rng: np.random.RandomState, mean: float) -> tuple[np.ndarray, np.ndarray]:
    """Draw W [60, 10] and b [10] of a client."""
    return rng.normal(mean, 1, (FEATURES, CLASSES)), rng.normal(mean, 1, CLASSES)
