"""Compute products of factors, truncated sums of products, norms and effective rank.

No function forms an m x n matrix if the factors are enough.
"""

from __future__ import annotations

import torch

from fedraclora.errors import ShapeError

Product = tuple[torch.Tensor, torch.Tensor]  # [m, q] and [q, n], representing their product


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
    """Compute the best rank-``rank`` approximation of ``left @ right`` by two QRs and a small SVD.

    It costs O((m + n) q^2 + q^3) for inner dimension q, and never forms the m x n product. Signs
    are fixed (`fix_signs`), since libraries choose those of a singular pair freely.

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
            f"cannot truncate {tuple(left.shape)} @ {tuple(right.shape)} to rank {rank}, "
            "expected matrices "
            "[m, r] and [r, n], and a rank of 1 or more"
        )
    ql, rl = torch.linalg.qr(left.to(torch.float64))
    qr, rr = torch.linalg.qr(right.to(torch.float64).mT)
    u, s, vt = torch.linalg.svd(rl @ rr.mT, full_matrices=False)
    keep = min(rank, s.shape[0])
    left, right = fix_signs(ql @ u[:, :keep], vt[:keep] @ qr.mT)
    return left, s[:keep], right


def fix_signs(left: torch.Tensor, right: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalize the sign of each pair (column of ``left``, row of ``right``); the product stays.

    The entry of largest magnitude in each column of ``left`` becomes positive (the first of them
    in a tie).

    Args:
        left: [m, q]. Not modified.
        right: [q, n]. Not modified.

    Example:
        >>> fix_signs(torch.tensor([[1.0], [-2.0]]), torch.tensor([[3.0]]))
        (tensor([[-1.],
                [ 2.]]), tensor([[-3.]]))
    """
    if not left.numel():
        return left, right
    peaks = left.gather(0, left.abs().argmax(dim=0, keepdim=True))
    signs = torch.where(peaks < 0, -1.0, 1.0).to(left)
    return left * signs, right * signs.mT


def balanced_factors(
    left: torch.Tensor, right: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute ``U sqrt(S)`` [m, rank], ``sqrt(S) V^T`` [rank, n] of the product, cut to a rank.

    Components that the product does not have are zero. Arguments as in `truncated_product`.

    Example:
        >>> B, A = balanced_factors(torch.tensor([[4.0], [0.0]]), torch.tensor([[1.0, 0.0]]), 2)
        >>> B.shape, A.shape, float((B @ A)[0, 0])
        (torch.Size([2, 2]), torch.Size([2, 2]), 4.0)
    """
    u, s, vt = truncated_product(left, right, rank)
    root = s.sqrt()
    return padded_to(u * root, root[:, None] * vt, rank)


def principal(matrix: torch.Tensor, rank: int, scale: float) -> Product:
    """Compute ``U (S / scale)^(1/2)`` and ``(S / scale)^(1/2) V^T``, cut to a rank; on the CPU."""
    u, s, vt = torch.linalg.svd(matrix.to("cpu", torch.float64), full_matrices=False)
    u, vt = fix_signs(u[:, :rank], vt[:rank])
    root = (s[:rank] / scale).sqrt()
    return u * root, root[:, None] * vt


def padded_to(
    left: torch.Tensor, right: torch.Tensor, rank: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Append zero components to factors [m, q] and [q, n] up to an inner dimension."""
    more = max(0, rank - left.shape[1])
    return (
        torch.nn.functional.pad(left, (0, more)),
        torch.nn.functional.pad(right, (0, 0, 0, more)),
    )


def sum_products(*terms: Product) -> Product:
    """Write a sum of products ``L_i R_i`` as one product.

    Args:
        terms: Pairs of [m, q_i] and [q_i, n], at least one.

    Example:
        >>> one = (torch.ones(2, 1), torch.ones(1, 3))
        >>> L, R = sum_products(one, negated(one))
        >>> float((L @ R).abs().max())
        0.0
    """
    return torch.cat([t[0] for t in terms], dim=1), torch.cat([t[1] for t in terms])


def negated(product: Product) -> Product:
    """Negate a product of two factors."""
    return -product[0], product[1]


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


def sylvester(left: torch.Tensor, right: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Solve ``left X + X right = target`` for symmetric positive semidefinite matrices.

    Args:
        left: [..., r, r].
        right: [..., r, r].
        target: [..., r, r].

    Returns:
        X, [..., r, r]; zero in the null directions of both sides, where X is arbitrary.
    """
    (a, U), (b, V) = torch.linalg.eigh(left), torch.linalg.eigh(right)
    sums = a[..., :, None] + b[..., None, :]
    least = sums.amax(dim=(-2, -1), keepdim=True) * torch.finfo(sums.dtype).eps * sums.shape[-1]
    turned = torch.where(sums > least, (U.mT @ target @ V) / sums, 0)
    X: torch.Tensor = U @ turned @ V.mT
    return X
