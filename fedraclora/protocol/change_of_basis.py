"""Convert trained factors from one frozen factor to another.

A change of the trained factor B under A represents the change s B A of the weight. Under another
factor it becomes the nearest possible change:

    B_new = B A_old A_new^T (A_new A_new^T)^+          for orthonormal rows: B A_old A_new^T
    A_new = (B_new^T B_new)^+ B_new^T B_old A          if A is trained under B

The part outside the span of the new factor is lost: all but a share r/n of the energy for a fresh
sketch of r rows in n dimensions.
"""

from __future__ import annotations

import torch

from fedraclora.lowrank.algebra import Product
from fedraclora.protocol.instructions import Adapter


def held_beside(adapter: Adapter) -> tuple[str, torch.Tensor] | None:
    """Return the trained factor of an adapter of two factors, and its frozen partner.

    Returns:
        The label of the trained factor, and the other as a float64 matrix on the CPU; None if both
        are trained, there are three, or each client has its own frozen factor.
    """
    if not adapter.trains_beside_shared:
        return None
    (label,) = (label for label, f in adapter.factors.items() if f.trained)
    (frozen,) = (f for f in adapter.factors.values() if not f.trained)
    return label, frozen.draw().to("cpu", torch.float64)


def as_product(label: str, trained: torch.Tensor, beside: torch.Tensor) -> Product:
    """Order a trained factor and the frozen one as B, A."""
    return (trained, beside) if label == "B" else (beside, trained)


def transported(
    label: str, trained: torch.Tensor, old: torch.Tensor, new: torch.Tensor
) -> torch.Tensor:
    """Convert a change of a trained factor beside ``old`` to one beside ``new``.

    Args:
        label: The trained factor, ``B`` or ``A``.
        trained: [m, r] or [r, n], float64. Not modified.
        old: The old frozen factor, [r, n] or [m, r].
        new: The new frozen factor; its rank may differ.

    Returns:
        A new tensor.

    Example:
        >>> A = torch.eye(2, 3, dtype=torch.float64)
        >>> transported("B", torch.tensor([[1.0, 2.0]]).double(), A, A.roll(1, dims=1))
        tensor([[2., 0.]], dtype=torch.float64)
    """
    if label == "A":
        return transported("B", trained.T, old.T, new.T).T
    inverse: torch.Tensor = torch.linalg.pinv(new @ new.T, hermitian=True)
    return trained @ (old @ new.T) @ inverse
