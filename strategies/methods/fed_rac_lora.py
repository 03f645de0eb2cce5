"""Fed-RAC-LoRA: one random sketch per matrix and round, shared by all clients.

Round t, right sketch, per adapted matrix W (m x n) with s = alpha / r:

    A_t ~ D (r x n), drawn from a seed;  client k: trains B_k from 0
    B_bar = sum_k p_k B_k;               W <- W + s B_bar A_t

With a left sketch the server draws B_t (m x r), and clients train A_k (r x n). With
``merge_every = k`` the trained factor is kept for k rounds; then it is merged, and a new sketch is
drawn. None never merges (FFA-LoRA).

- Uplink: r m numbers per matrix and client (left: r n).
- Downlink: a seed, and the updates that the client missed: r m numbers per merge, at most m n. If
  k > 1, the current trained factor is sent, too.
- Aggregation: exact and linear, because all clients have the same frozen factor. With
  ``server_lr`` the server moves beyond the mean by a known factor.
- ``sketches = G`` splits a round's clients at random into G groups of nearly equal size, and splits
  one drawing of G r rows into G parts: group g trains r columns under part g. The uplink is as
  above; the update has G r m numbers. With ``server_lr = G`` each column moves by the mean of its
  group, if all groups have the same weight. With fewer clients than groups some parts stay zero.
- ``server_lr = eta``: W <- W + eta (mean of the clients' weights - W), also for biases and head.
- ``init=gradient``: one additional round measures a gradient, from which the frozen factor of the
  first merge is computed (`fedraclora.strategies.shared.initials`). The same step size then makes
  more progress.
- Rank budgets: client k trains the first r_k components and sends r_k m numbers (left: r_k n). It
  downloads the whole trained factor; its other components stay as they are
  (`fedraclora.protocol.rank_budgets`). Exact.
- Source: Malinovsky et al., *Randomized Asymmetric Chain of LoRA*, 2024, arXiv 2410.08305.
  FFA-LoRA: Sun et al., *Improving LoRA in privacy-preserving federated learning*, ICLR 2024,
  arXiv 2403.12313.
- Held to: hammoudhasan/RACLora at 7354fd2: chains with AdamW, 3 merges;
  pkumelon/FedSLoP at b7af998: whole rounds with training, 3 rounds;
  Pengxin-Guo/FedSA-LoRA at fc276b5: what is trained, and the server's step, 3 rounds (FFA-LoRA);
  and the paper's Table 3: chains of one client within 1.3 points (docs/records/chains.md).
- Departures: the default sketch has orthonormal rows. They span the same space as the paper's
  Gaussian sketch, and the local step is then the step of the theory. We know the paper's federated
  algorithms only in outline, so the sampling of clients and the number of local steps are ours.
  FFA-LoRA's A has orthonormal rows, too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.limits import Chance, Count, Positive
from fedraclora.lowrank.algebra import Product
from fedraclora.protocol.factor import FactorLike, as_rows, label_of
from fedraclora.protocol.method import Cohort, Draw, Traits
from fedraclora.rng import generator
from fedraclora.sketch import Blocks, SketchSpec, check_sketch
from fedraclora.strategies.shared import past
from fedraclora.strategies.shared.factors import OTHER, Asymmetric, Label
from fedraclora.strategies.shared.initials import GradientFirst
from fedraclora.strategies.shared.layerwise import (
    Factors,
    Layer,
    LayerUpdate,
    Replies,
    RoundContext,
    drawn_of,
)
from fedraclora.tree import Tree


@dataclass(frozen=True)
class FedRacLora(GradientFirst, Asymmetric):
    """Fed-RAC-LoRA: a fresh shared sketch each round, one trained factor, exact average, merged.

    Attributes:
        train: The factor that clients train: ``B`` (A is the sketch), ``A`` (B is), or ``auto``
            (the smaller one).
        blocks: ``independent``, or ``cover`` (row blocks of one basis without replacement).
        merge_every: Rounds between merges, each with a new sketch; None = never.
        density: Share of non-zero entries; only for ``sparse_sign``.
        sketches: G, groups of a round's clients, each with rows of its own; G r is at most the
            dimension.
        server_lr: eta, the server's step size.
    """

    train: Label = "B"
    blocks: Blocks = "independent"
    merge_every: Count | None = 1
    density: Chance = 0.1
    server_lr: Positive = 1.0

    @Feature("method.sketch=sparse_sign", reads=("method.density",))
    def _draws_sparsely(self) -> bool:
        return self.sketch == "sparse_sign"

    @override
    def __post_init__(self) -> None:
        """Reject impossible hyperparameters."""
        super().__post_init__()
        check_sketch(self.sketch, self.normalize, self.blocks)

    @Feature(
        "method.blocks=cover",
        instead="method.blocks=independent",
        avoids={
            "system.buffer": (
                "each late reply ends a link of its own, and as many blocks would be left out"
            )
        },
    )
    def _covers(self) -> bool:
        return self.blocks == "cover" and self.traits.merges

    @override
    def drawn_label(self, shape: tuple[int, int]) -> str | None:
        return drawn_of(OTHER[self.train], shape)

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        drawn, trained = self.sides(layer.shape)  # A and B; under a left sketch, B and A
        sketch: FactorLike = self.drawing(layer, now)
        if drawn in layer.carried:
            sketch = full_factor(layer.carried[drawn], self.drawing(layer, now))
        return {trained: layer.trained(trained, rank=layer.rank * self.sketches), drawn: sketch}

    def drawing(self, layer: Layer, now: RoundContext) -> SketchSpec:
        """Draw the frozen factor of a link."""
        drawn, _ = self.sides(layer.shape)
        return now.sketch(
            layer,
            drawn,
            self.sketch,
            index=self.sketch_number(layer.link),
            rank=layer.rank * self.sketches,
            normalize=self.normalize,
            blocks=self.blocks,
            density=self.density,
        )

    @override
    def first_factor(self, layer: Layer, gradient: Product) -> Tree:
        drawn, _ = self.sides(layer.shape)
        count = min(layer.rank * self.sketches, len(gradient[1]))
        length = self.drawing(layer, RoundContext(1, Draw(0))).gram_scale ** 0.5  # as a drawing's
        return {drawn: past.leading(gradient, drawn, count) * length}

    def sketch_number(self, link: int) -> int:
        """Return the number of a merge's sketch; different numbers are independent drawings."""
        return link

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        factors = replies.means(self.server_lr, drawn=layer.ends)  # B_bar = sum_k p_k B_k, A_t
        if layer.ends:
            return LayerUpdate(merged=tuple(factors.values()))  # W <- W + s B_bar A_t
        return LayerUpdate(carried=factors)

    @override
    def components(self, cohort: Cohort, now: RoundContext) -> torch.Tensor | None:
        if self.sketches == 1:
            return cohort.ranks
        groups = generator(now.draw.seed, "groups", now.number)
        dealt = groups.permutation(len(cohort)) % self.sketches
        return torch.tensor([(g, self.sketches) for g in dealt.tolist()], dtype=torch.int64)

    @property
    @override
    def traits(self) -> Traits:
        merges = self.merge_every is not None
        ranks = self.sketches == 1  # else a client's components are those of its group
        return Traits(exact=True, linear=True, merges=merges, ranks=ranks, step=self.server_lr)


def full_factor(factor: torch.Tensor, drawing: SketchSpec) -> torch.Tensor:
    """Add rows of a drawing to a first factor that has fewer components than the rank.

    A gradient has no more directions than its weight has rows or columns.

    Args:
        factor: A [k, n], or B [m, k], whose components have the drawing's length. Not modified.
        drawing: Of rank k or more.
    """
    label = label_of(drawing)
    rows, length = as_rows(factor, label), drawing.gram_scale**0.5
    if len(rows) == drawing.rank:
        return factor
    drawn = as_rows(drawing.draw(), label)
    rows = past.completed(rows.to("cpu", torch.float64) / length, drawn) * length
    return as_rows(rows, label).to(factor.dtype)
