"""Adapters as products of two factors: how far a round is from the mean, the nearest product."""

from __future__ import annotations

import torch

from fedraclora.lowrank.algebra import Product, fix_signs, minus, product_norm, sum_products


class RoundError:
    """Distance of a round's result from the mean of the clients, relative to the mean change."""

    def __init__(self) -> None:
        self.missed = self.change = 0.0

    def add(self, mean: Product, old: Product | None, new: Product, scale: float) -> None:
        """Count one weight: mean of the clients' terms, the term before, and what came of it."""
        self.missed += (scale * product_norm(*sum_products(new, minus(mean)))) ** 2
        moved = mean if old is None else sum_products(mean, minus(old))
        self.change += (scale * product_norm(*moved)) ** 2

    def report(self) -> dict[str, float]:
        """Compute the figure for the ledger, ``aggregation_error``."""
        return {"aggregation_error": (self.missed / self.change) ** 0.5 if self.change else 0.0}


def principal(matrix: torch.Tensor, rank: int, scale: float) -> Product:
    """Compute ``U (S / scale)^(1/2)`` and ``(S / scale)^(1/2) V^T``, cut to a rank; on the CPU."""
    u, s, vt = torch.linalg.svd(matrix.to("cpu", torch.float64), full_matrices=False)
    u, vt = fix_signs(u[:, :rank], vt[:rank])
    root = (s[:rank] / scale).sqrt()
    return u * root, root[:, None] * vt
