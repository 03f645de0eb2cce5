"""Frozen factors that whoever holds the last link computes from it, by a few coefficients.

    F = C [T; D]        T the factor that the last link trained, D a drawing; rows of F, T, D

C is small, r x (p + r) for a T of p rows: it is sent where F would be r d numbers. Whoever follows
the base weights has T, since it stood in the link that led there: `Term.keep` says which factor
stays beside the weight, and whoever fetches the weight whole is sent it, too. So a basis that the
server takes from the chain costs clients C, and what a singular value decomposition rounds
differently elsewhere is decided in one place.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch

from fedraclora.errors import WireError
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree

PAST = "/past"


def past_name(weight: str) -> str:
    """Name, in base weights, what the last link trained; parameters have no "/" in their names."""
    return weight + PAST


def weight_of(name: str) -> str | None:
    """Return the weight that a name of `past_name` belongs to; None for any other name."""
    return name.removesuffix(PAST) if name.endswith(PAST) else None


def as_rows(factor: torch.Tensor, label: str) -> torch.Tensor:
    """Turn B so that its components are rows, as those of A are; and back."""
    return factor.mT if label == "B" else factor


def label_of(drawing: SketchSpec) -> str:
    """Return the label of a factor by the side of its drawing."""
    return "A" if drawing.side == "right" else "B"


@dataclass(frozen=True, eq=False)
class Derived:
    """A frozen factor whose rows (of B: columns) combine those of the last link and of a drawing.

    Attributes:
        coefficients: C, float64 [r, p + rank of the drawing].
        drawing: D; its side is that of the factor.
        past: T, [p, n] of a right factor or [m, p] of a left one; None in what was read from a
            message or a file, until base weights give it (`beside`).
    """

    coefficients: torch.Tensor
    drawing: SketchSpec
    past: torch.Tensor | None = field(default=None, metadata={"written": False})

    @classmethod
    def of(cls, rows: torch.Tensor, past: torch.Tensor, drawing: SketchSpec) -> Derived:
        """Write rows [r, d], float64, in the span of T and D as a combination of theirs.

        Where they depend on one another the least C is taken.
        """
        basis = torch.cat(_rows(past, drawing)).mT
        found: torch.Tensor = torch.linalg.lstsq(basis, rows.mT, driver="gelsd").solution
        return cls(found.mT.contiguous(), drawing, past)

    @property
    def nbytes(self) -> int:
        """Bytes of the coefficients."""
        return self.coefficients.nbytes

    def beside(self, past: torch.Tensor | None) -> Derived:
        """Fill in T, where it is not known yet."""
        return self if self.past is not None else replace(self, past=past)

    def draw(self) -> torch.Tensor:
        """Compute the factor: float64 [r, n] (right) or [m, r] (left), on the CPU.

        Raises:
            WireError: If T is not there, or has another shape than the coefficients ask for.
        """
        if self.past is None:
            raise WireError(
                "a frozen factor is to be computed from what the last link trained, but the base "
                "weights here came without that; they must be sent whole"
            )
        past, drawn = _rows(self.past, self.drawing)
        wanted = self.coefficients.shape[1] - len(drawn), drawn.shape[1]
        if tuple(past.shape) != wanted:
            raise WireError(
                f"a frozen factor is to be computed from {wanted[0]} rows of {wanted[1]} "
                f"numbers that the last link trained, but it trained {tuple(past.shape)}"
            )
        rows = self.coefficients @ torch.cat([past, drawn])
        return rows if self.drawing.side == "right" else rows.mT.contiguous()


def _rows(past: torch.Tensor, drawing: SketchSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return T and D with their components as rows, float64, on the CPU."""
    label = label_of(drawing)
    return as_rows(past.to("cpu", torch.float64), label), as_rows(drawing.draw(), label)


def pasts(base: Mapping[str, torch.Tensor]) -> Tree:
    """Select what the last link trained from base weights, by weight."""
    found = ((weight_of(name), tensor) for name, tensor in base.items())
    return {weight: tensor for weight, tensor in found if weight is not None}
