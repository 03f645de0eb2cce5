"""Write the change of a matrix as two factors: exact where it has their rank, else truncated."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from fedraclora.lowrank.algebra import Product, fix_signs, truncated_product


@dataclass(frozen=True)
class Factors:
    """The change of one matrix as the product of two factors.

    Attributes:
        left: [m, k], float64.
        right: [k, n], float64.
        rank: Rank of the whole change, as far as its precision shows it.
        error: Frobenius norm of what is left out, over that of the whole change.
    """

    left: torch.Tensor
    right: torch.Tensor
    rank: int
    error: float

    @property
    def kept(self) -> int:
        """Rank of the factors, k."""
        return self.left.shape[1]


def factors_of_product(change: Product, rank: int | None) -> Factors:
    """Compress a product of factors by two QRs and a small SVD; the m x n product is not formed.

    Args:
        change: [m, q] and [q, n].
        rank: Singular values to keep at most; None: all that are not rounding.
    """
    left, right = (part.to(torch.float64) for part in change)
    inner = max(1, left.shape[1])
    if not left.shape[1]:
        left, right = left.new_zeros(left.shape[0], 1), right.new_zeros(1, right.shape[1])
    u, s, vt = truncated_product(left, right, inner)
    floor = torch.finfo(torch.float64).eps * max(*left.shape, *right.shape) * float(s[0])
    return _kept(u, s, vt, floor, rank)


def factors_of_difference(new: torch.Tensor, old: torch.Tensor, rank: int | None) -> Factors:
    """Factor the difference of two matrices [m, n], of which no factors are known, by an SVD.

    Singular values below what rounding ``new`` to its precision makes are left out.
    """
    u, s, vt = torch.linalg.svd(new.double() - old.double(), full_matrices=False)
    floor = torch.finfo(new.dtype).eps * float(torch.linalg.norm(new.double()))
    return _kept(u, s, vt, floor, rank)


def _kept(
    u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, floor: float, rank: int | None
) -> Factors:
    whole = int((s > floor).sum())
    k = whole if rank is None else min(rank, whole)
    left, right = fix_signs(u[:, :k], vt[:k])
    root = s[:k].sqrt()
    left_out, size = (float(torch.linalg.vector_norm(part)) for part in (s[k:], s))
    return Factors(left * root, root[:, None] * right, whole, left_out / size if size else 0.0)
