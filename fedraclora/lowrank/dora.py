"""DoRA: train the length of every row of an adapted matrix, and its direction by an adapter.

    V = W + s F_1 F_2 ...        W [m, n]: a row for each output
    W' = diag(M / ||V||) V       M [m]: the magnitudes; ||V||: the lengths of the rows of V

M starts as the lengths of the rows of W, so that W' = W. The gradient treats the lengths of V as
constants (section 4.3 of the paper). Then, with G the gradient of W',

    g_M = rowsum(G * V) / ||V||        the gradient of V is diag(M / ||V||) G

References:
    Liu et al., *DoRA: weight-decomposed low-rank adaptation*, ICML 2024, arXiv 2402.09353.

Departures: the paper writes the norm over the columns of a d x k matrix; here, as in its public
code, it is taken over the inputs of each output.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

import torch

from fedraclora.compatibility import Feature

DORA = Feature(
    "dora=true",
    instead="dora=false",
    avoids={
        "a method that merges updates into the weights": (
            "a rescaled weight does not have the form W + s B A"
        ),
        "rank allocation": ("only adapted layers have magnitudes, and it changes which those are"),
        "clients that send gradients": "factors can begin from gradients, and magnitudes cannot",
    },
)


def magnitude_of(weight: str) -> str:
    """Name the magnitude of an adapted weight: a tensor of the same layer.

    Example:
        >>> magnitude_of("fc1.weight")
        'fc1.magnitude'
    """
    return f"{weight.removesuffix('weight')}magnitude"


def magnitudes(adapted: Iterable[str], dense: Container[str]) -> dict[str, str]:
    """List the magnitudes among fully trained tensors, by the weight whose rows they scale.

    Args:
        adapted: Names of adapted weights.
        dense: Names of fully trained tensors.
    """
    return {w: name for w in adapted if (name := magnitude_of(w)) in dense}


def rescaled(matrix: torch.Tensor, magnitude: torch.Tensor) -> torch.Tensor:
    """Scale the rows of ``matrix`` to these lengths.

    Args:
        matrix: V, [m, n], without a row of zeros. No gradient goes through its lengths.
        magnitude: M, [m].

    Example:
        >>> rescaled(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.tensor([10.0, 1.0]))
        tensor([[6., 8.],
                [0., 1.]])
    """
    return (magnitude / row_lengths(matrix.detach()))[:, None] * matrix


def row_lengths(
    matrix: torch.Tensor, factors: Sequence[torch.Tensor] = (), scale: float = 1.0
) -> torch.Tensor:
    """Compute the lengths of the rows of ``matrix + scale F_1 F_2 ...`` without forming the sum.

    The squares are summed from products with the factors. If the term almost cancels a row, its
    length has few correct digits.

    Args:
        matrix: [m, n].
        factors: Each 2-D, or 3-D with one for each of K clients; none: the rows of ``matrix``.
        scale: Of the product.

    Returns:
        [m], or [K, m] where a factor has clients.

    Example:
        >>> W, B, A = torch.zeros(1, 2), torch.ones(3, 1, 1), torch.tensor([[3.0, 4.0]])
        >>> row_lengths(W, [B, A], scale=2.0).tolist()
        [[10.0], [10.0], [10.0]]
    """
    squares = matrix.square().sum(dim=-1)
    if factors:
        *first, right = factors
        left = first[0]
        for factor in first[1:]:
            left = left @ factor
        squares = squares + 2 * scale * ((matrix @ right.mT) * left).sum(dim=-1)
        squares = squares + scale**2 * ((left @ (right @ right.mT)) * left).sum(dim=-1)
    return squares.sqrt()
