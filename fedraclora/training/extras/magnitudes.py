"""DoRA in local training: outputs take the trained lengths of rows (`fedraclora.lowrank.dora`)."""

from __future__ import annotations

import torch
from typing_extensions import override

from fedraclora.lowrank.dora import magnitude_of, rescaled, row_lengths
from fedraclora.training.extra import Scaling, Term


class Magnitudes(Scaling):
    """Rows have the lengths that are trained beside them, whatever their adapter adds."""

    @override
    def name_of(self, weight: str) -> str:
        return magnitude_of(weight)

    @override
    def outputs(self, own: torch.Tensor, matrix: torch.Tensor, term: Term | None) -> torch.Tensor:
        with torch.no_grad():  # they are constants in the gradient
            lengths = row_lengths(matrix, *(term or ()))
        return own / lengths

    @override
    def rows(self, own: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        return rescaled(matrix, own)
