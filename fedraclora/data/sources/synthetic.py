"""Draw convex problems with a known optimum, for any number of clients.

The test samples are the training samples: the metric is the training objective, and
``loss - optimum`` is the gap that theory bounds. All clients have the same number of samples, so
the mean over samples is the mean over clients. The model is ``linear`` without bias.
"""

from __future__ import annotations

import math
from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
from annotated_types import Ge, Lt

from fedraclora.data.dataset import FLOAT_TYPES, NO_CLASSES, NUMERIC, Clients, DataSet, Dtype
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError
from fedraclora.limits import Count, NotNegative, limited
from fedraclora.rng import generator

Matrix = npt.NDArray[np.float64]
Condition = Annotated[float, Ge(1), Lt(math.inf)]

_GRADIENT = 1e-12  # Newton stops here: about the rounding error of the mean gradient
_FLAT = 1e-10  # the condition of a Hessian without a minimum in float64


@NUMERIC
@NO_CLASSES
@limited("data")
def least_squares(
    *,
    clients: Clients = 100,
    samples: Count = 20,
    features: Count = 50,
    outputs: Count = 10,
    noise: NotNegative = 0.1,
    heterogeneity: NotNegative = 0.1,
    condition: Condition = 10.0,
    seed: int = 0,
    dtype: Dtype = "float32",
) -> DataSet:
    r"""Draw linear regressions with a known optimum (model=linear model.bias=false).

    Client k has :math:`y = W_k x + \text{noise}`, where :math:`W_k = W + h E_k` with standard
    normal entries in :math:`W` and :math:`E_k`; the covariance of x has eigenvalues from 1 down to
    1 / condition along random directions.

    Args:
        clients: Number of clients.
        samples: Samples of each client.
        features: Length of x.
        outputs: Length of y.
        noise: Standard deviation of the noise of each output.
        heterogeneity: Standard deviation of the clients' own part of the weights, h.
        condition: Condition number of the covariance of x, at least 1.
        seed: Seed of the problem; apart from the seed of the run.
        dtype: ``float32`` or ``float64``.

    Returns:
        Inputs ``"x"`` [clients * samples, features], targets [clients * samples, outputs].
        ``optimum`` is the least mean of ``0.5 * ||W x - y||^2``, by least squares in float64
        over the samples as they are stored. ``info`` has ``smoothness`` and
        ``strong_convexity``, the extreme eigenvalues of the Hessian.

    Raises:
        ConfigError: If a number is out of range, naming the key.
    """
    x = _features(clients, samples, features, condition, seed)
    weights = _weights(clients, outputs, features, heterogeneity, seed)
    y = np.einsum("kni,koi->kno", x, weights)
    y += noise * generator(seed, "synthetic", "noise").standard_normal(y.shape)
    table = _table(x.reshape(-1, features), y.reshape(-1, outputs), dtype)
    wide_x, wide_y = _wide(table.inputs["x"]), _wide(table.target)
    solution = np.linalg.lstsq(wide_x, wide_y, rcond=None)[0]
    gap = wide_x @ solution - wide_y
    curvature = np.linalg.eigvalsh(wide_x.T @ wide_x / len(table))
    info = {"smoothness": float(curvature[-1]), "strong_convexity": float(curvature[0])}
    optimum = float(0.5 * (gap * gap).sum() / len(table))
    return _problem("least squares", table, clients, "squared_error", optimum, info)


@NUMERIC
@limited("data")
def logistic_regression(
    *,
    clients: Clients = 100,
    samples: Count = 20,
    features: Count = 50,
    flip: Annotated[float, Ge(0), Lt(0.5)] = 0.1,
    heterogeneity: NotNegative = 0.1,
    condition: Condition = 10.0,
    seed: int = 0,
    dtype: Dtype = "float32",
) -> DataSet:
    r"""Draw binary classifications with a known optimum (model=linear model.bias=false).

    Client k labels by the sign of :math:`w_k^\top x`, with weights and features as in
    `least_squares`. Labels are flipped at random, for without wrong labels the classes are
    separable and the logistic loss has no minimum.

    Args:
        clients: Number of clients.
        samples: Samples of each client.
        features: Length of x.
        flip: Probability that a label is flipped, in [0, 0.5).
        heterogeneity: Standard deviation of the clients' own part of the weights.
        condition: Condition number of the covariance of x, at least 1.
        seed: Seed of the problem; apart from the seed of the run.
        dtype: ``float32`` or ``float64``.

    Returns:
        Inputs ``"x"`` [clients * samples, features], labels 0 and 1 [clients * samples].
        ``optimum`` is the least mean logistic loss, by Newton's method in float64 to a gradient
        of 1e-12. ``info`` has ``smoothness``, the bound on the Hessian, and ``curvature``, its
        least eigenvalue at the optimum.

    Raises:
        ConfigError: If a number is out of range, or the samples are separable.
    """
    x = _features(clients, samples, features, condition, seed)
    weights = _weights(clients, 1, features, heterogeneity, seed)
    labels = np.einsum("kni,koi->kno", x, weights)[..., 0] > 0
    labels ^= generator(seed, "synthetic", "flip").random(labels.shape) < flip
    table = _table(x.reshape(-1, features), labels.reshape(-1).astype(np.int64), dtype)
    wide = _wide(table.inputs["x"])
    optimum, curvature = logistic_optimum(wide, table.target.numpy())
    smoothness = float(np.linalg.eigvalsh(wide.T @ wide / len(table))[-1] / 4)
    info = {"smoothness": smoothness, "curvature": curvature}
    return _problem("logistic regression", table, clients, "logistic", optimum, info)


def _problem(
    name: str, table: Samples, clients: int, loss: str, optimum: float, info: dict[str, float]
) -> DataSet:
    """Build the data set of a problem: clients one after another, with equal sizes."""
    parts = np.arange(len(table), dtype=np.int64).reshape(clients, -1)
    labels = {"label": table.target.numpy()} if loss == "logistic" else {}
    return DataSet(
        train=table,
        test=table,
        classes=table.target[0].numel(),
        loss=loss,
        metrics=("loss",),
        columns=labels | {"client": np.repeat(np.arange(clients), parts.shape[1])},
        sample_shape=tuple(table.inputs["x"].shape[1:]),
        parts=[*parts],
        optimum=optimum,
        info={"source": f"synthetic {name}", **info},
    )


def logistic_optimum(x: Matrix, labels: npt.NDArray[np.int64]) -> tuple[float, float]:
    """Find the least mean logistic loss of a linear score without bias, by Newton's method.

    Args:
        x: Features, float64 [N, d].
        labels: 0 or 1, [N].

    Returns:
        The least mean loss, in nats, and the least eigenvalue of the Hessian there.

    Raises:
        ConfigError: If there is no finite minimizer (separable classes, dependent features).
    """
    signed = np.where(labels[:, None] == 1, x, -x)
    w = np.zeros(x.shape[1])
    loss = float(np.log(2.0))
    for _ in range(100):
        margin = signed @ w
        if (margin > 0).all():
            break
        wrong = 1 / (1 + np.exp(np.clip(margin, -500, 500)))
        gradient = -(signed * wrong[:, None]).mean(axis=0)
        hessian = (signed * (wrong * (1 - wrong))[:, None]).T @ signed / len(x)
        curvature = np.linalg.eigvalsh(hessian)
        if curvature[0] <= _FLAT * curvature[-1]:
            break
        if np.abs(gradient).max() <= _GRADIENT:
            return loss, float(curvature[0])
        w, loss = _newton_step(signed, w, loss, gradient, hessian)
    raise ConfigError(
        f"the logistic loss of {len(x)} samples with {x.shape[1]} features has no finite minimum "
        "because the classes are separable. Raise data.flip or data.samples, or lower "
        "data.features."
    )


def _newton_step(
    signed: Matrix, w: Matrix, loss: float, gradient: Matrix, hessian: Matrix
) -> tuple[Matrix, float]:
    """Take a Newton step, halved until the loss does not rise beyond rounding."""
    direction = np.linalg.solve(hessian, gradient)
    size = 1.0
    while True:
        stepped = w - size * direction
        reached = float(np.logaddexp(0.0, -(signed @ stepped)).mean())
        if reached <= loss + 1e-15 or size < 1e-6:
            return stepped, reached
        size /= 2


def _features(clients: int, samples: int, features: int, condition: float, seed: int) -> Matrix:
    """Draw x [clients, samples, features]."""
    rng = generator(seed, "synthetic", "features")
    directions = np.linalg.qr(rng.standard_normal((features, features)))[0]
    scales = np.geomspace(1.0, condition**-0.5, features)
    drawn: Matrix = rng.standard_normal((clients, samples, features))
    rotated: Matrix = (drawn * scales) @ directions.T
    return rotated


def _weights(clients: int, outputs: int, features: int, heterogeneity: float, seed: int) -> Matrix:
    """Draw the clients' weights [clients, outputs, features]."""
    shared = generator(seed, "synthetic", "weights").standard_normal((outputs, features))
    rng = generator(seed, "synthetic", "clients")
    own: Matrix = rng.standard_normal((clients, outputs, features))
    weights: Matrix = shared + heterogeneity * own
    return weights


def _table(x: Matrix, target: Matrix | npt.NDArray[np.int64], dtype: str) -> Samples:
    samples = Samples({"x": torch.from_numpy(np.ascontiguousarray(x))}, torch.from_numpy(target))
    return samples.to("cpu", FLOAT_TYPES[dtype])


def _wide(tensor: torch.Tensor) -> Matrix:
    wide: Matrix = tensor.to(torch.float64).numpy()
    return wide
