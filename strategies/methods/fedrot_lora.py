"""FedRot-LoRA: FedAvg-LoRA, with clients' factors rotated towards the last mean before averaging.

    client k: trains (B_k, A_k) from (B, A)
    R_k = argmin ||R^T A_k - A||_F  or  argmin ||B_k R - B||_F  over rotations, the rounds in turn
        = U V^T of  A_k A^T = U S V^T,  or of  B_k^T B = U S V^T  (last column negated if det = -1)
    R_k <- the rotation nearest to (1 - strength) I + strength R_k
    B <- sum_k p_k B_k R_k;   A <- sum_k p_k R_k^T A_k;   effective weight W + s B A

Many pairs of factors have the same product B_k A_k, and the mean of factors depends on the pair.
R_k selects the pair nearest to the factors from which all clients started. The server aligns A in
the second round, B in the third, and so on. It aligns nothing in the first round, in which one
factor starts at zero.

- Uplink: r (m + n) numbers per matrix and client. Downlink: the same after the first round.
- Aggregation: **not exact**, because factors are averaged separately. The ledger has the error of
  each round (``aggregation_error``). The server needs each client's own factors.
- Server: K SVDs of r x r matrices and products of O(K (m + n) r^2).
- Source: Zhang et al., *FedRot-LoRA: mitigating rotational misalignment in federated LoRA*, ICML
  2026, arXiv 2602.23638; the rule is that of its code, ``rotation_align_optimization_soft``.
- Held to: haoran-zh/FedRot-LoRA at 36a67ef: the alignment and the mean, 4 rounds, full and half.
- Departures: the server rotates the factors; in the paper clients do before they send. The means
  are the same, but the server must see each client's own factors. If the nearest rotation is not
  unique (a singular value is zero), the library decides, as in the code. ``strength`` is the code's
  ``rotate_lambda`` up to 1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.limits import Chance
from fedraclora.protocol.method import Traits
from fedraclora.strategies.shared.factors import Factored
from fedraclora.strategies.shared.layerwise import Layer, LayerUpdate, Replies


@dataclass(frozen=True)
class FedRotLora(Factored):
    """FedRot-LoRA: FedAvg-LoRA with factors rotated towards the last ones before averaging.

    Attributes:
        strength: How far to rotate factors: 1 fully; 0, which is refused, would be FedAvg-LoRA.
    """

    traits = Traits(exact=False, linear=False, merges=False)

    strength: Chance = 1.0

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        Bs, As, p = replies.B, replies.A, replies.p[:, None, None]
        R = eye = torch.eye(layer.rank).to(Bs).expand(len(Bs), -1, -1)
        if replies.carried is not None and layer.link:
            B, A = (factor.to(Bs) for factor in replies.carried)
            R = rotations(As @ A.mT if layer.link % 2 else Bs.mT @ B)
        if self.strength < 1:
            R = rotations((1 - self.strength) * eye + self.strength * R)
        return LayerUpdate(carried={"B": (p * (Bs @ R)).sum(0), "A": (p * (R.mT @ As)).sum(0)})


def rotations(matrices: torch.Tensor) -> torch.Tensor:
    """Compute the rotation R with the largest trace of R^T M for each matrix M: the nearest one.

    Args:
        matrices: [K, r, r]. Not modified.

    Returns:
        [K, r, r]: orthogonal, of determinant 1.
    """
    u, _, vt = torch.linalg.svd(matrices)
    last = vt[:, -1:] * torch.linalg.det(u @ vt).sign()[:, None, None]
    return torch.bmm(u, torch.cat([vt[:, :-1], last], dim=1))
