"""Low-rank algebra: products of factors, truncated sums of products, norms, effective rank.

Nothing here forms an m x n matrix where the factors are enough.
"""

from __future__ import annotations

import torch

from fedraclora.errors import ShapeError


def stack_products(
    lefts: torch.Tensor, rights: torch.Tensor, weights: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Write ``sum_k w_k L_k R_k`` as one product ``L R``.

    Args:
        lefts: [K, m, r].
        rights: [K, r, n].
        weights: [K]; folded into the left factor only.

    Returns:
        ``L`` [m, K r] and ``R`` [K r, n] in float64.

    Raises:
        ShapeError: If the cohorts or the inner dimensions differ.

    Example:
        >>> L, R = stack_products(torch.ones(2, 3, 1), torch.ones(2, 1, 4), torch.tensor([1., 2.]))
        >>> (L @ R)[0, 0].item()
        3.0
    """
    if lefts.shape[0] != rights.shape[0] or lefts.shape[2] != rights.shape[1]:
        raise ShapeError(
            f"cannot multiply {tuple(lefts.shape)} by {tuple(rights.shape)}; "
            "need [K, m, r] and [K, r, n]"
        )
    wide = lefts.to(torch.float64) * weights.to(lefts.device, torch.float64)[:, None, None]
    left = wide.permute(1, 0, 2).reshape(lefts.shape[1], -1)
    right = rights.to(torch.float64).reshape(-1, rights.shape[2])
    return left, right


def truncated_product(
    left: torch.Tensor, right: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Best rank-``rank`` approximation of ``left @ right`` from two QRs and one small SVD.

    Costs O((m + n) q^2 + q^3) for inner dimension q, and never forms the m x n product.

    Args:
        left: [m, q].
        right: [q, n].
        rank: Singular values to keep, at least 1.

    Returns:
        ``U`` [m, k], ``S`` [k] and ``Vt`` [k, n] in float64, with k = min(rank, m, q, n).

    Raises:
        ShapeError: If the product is undefined or the rank is not positive.

    Example:
        >>> L = torch.tensor([[3.0, 0.0], [0.0, 1.0], [0.0, 0.0]])
        >>> truncated_product(L, torch.eye(2), 1)[1]
        tensor([3.], dtype=torch.float64)
    """
    if left.shape[1] != right.shape[0] or rank < 1:
        raise ShapeError(
            f"cannot truncate {tuple(left.shape)} @ {tuple(right.shape)} to rank {rank}"
        )
    ql, rl = torch.linalg.qr(left.to(torch.float64))
    qr, rr = torch.linalg.qr(right.to(torch.float64).mT)
    u, s, vt = torch.linalg.svd(rl @ rr.mT, full_matrices=False)
    keep = min(rank, s.shape[0])
    return ql @ u[:, :keep], s[:keep], vt[:keep] @ qr.mT


def product_norm(left: torch.Tensor, right: torch.Tensor) -> float:
    """Frobenius norm of ``left @ right`` (left [m, q], right [q, n]), in float64.

    Takes the cheaper of the dense product and the triangular factors of two QRs, so that a small
    norm is not the difference of large numbers.
    """
    left, right = left.to(torch.float64), right.to(torch.float64)
    (m, q), n = left.shape, right.shape[1]
    if m * n <= q * (m + n):
        return float(torch.linalg.norm(left @ right))
    rl, rr = torch.linalg.qr(left, mode="r")[1], torch.linalg.qr(right.mT, mode="r")[1]
    return float(torch.linalg.norm(rl @ rr.mT))


def effective_rank(matrix: torch.Tensor) -> float:
    """Effective rank: exp of the entropy of the normalised singular values of [m, n].

    Returns:
        A number in [1, min(m, n)]; 0 for a zero matrix.

    References:
        Roy and Vetterli, *The effective rank*, EUSIPCO 2007.

    Example:
        >>> round(effective_rank(torch.eye(3)), 6)
        3.0
    """
    s = torch.linalg.svdvals(matrix.to(torch.float64))
    total = float(s.sum())
    if total == 0:
        return 0.0
    p = s[s > 0] / total
    return float(torch.exp(-(p * p.log()).sum()))
