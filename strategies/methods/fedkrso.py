"""FedKRSO: local steps in several shared random subspaces, one after another.

    P_j (r x n) drawn once for j = 1..G
    client k: B_jk = 0; local step t moves B_jk for j = (t // interval) mod G alone, under the
    effective weight W + s sum_j B_jk P_j
    W <- W + s sum_j (sum_k p_k B_jk) P_j

- Uplink: G r m numbers per matrix and client.
- Downlink: a seed, and the updates that the client missed: G r m numbers per round, at most m n.
- Aggregation: exact and linear, because all clients have the same subspaces.
- Server: one mean and a merge of 2 m n G r operations.
- Source: *FedKRSO*, INFOCOM 2026, arXiv 2602.03019.
- Departures: the rows of all P_j are one drawing, of unit length in expectation. In the paper
  E[P_j^T P_j] = I (``normalize=identity``), for which stable steps are n / r times smaller. Under
  momentum or weight decay B_jk also moves after the steps of its subspace. If a client has fewer
  than G ``interval`` local steps, it sends zeros for the subspaces that it does not reach. We
  assume that the P_j last for the run and that all clients take them in turn, so that one order
  serves all, and the update of an absent client is a sum. By a summary, the paper's server draws
  them anew in each round, and each client chooses one at random for each interval; the numbers of
  subspaces and of steps are open settings there and here.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count

import torch
from typing_extensions import override

from fedraclora.limits import Count
from fedraclora.protocol.method import Plan, Traits
from fedraclora.protocol.program import ClientChunk, ClientProgram, GradientStage, Hook
from fedraclora.sketch import Sketch
from fedraclora.strategies.shared.common import column_parts
from fedraclora.strategies.shared.factors import Asymmetric
from fedraclora.strategies.shared.layerwise import (
    Factors,
    Layer,
    LayerUpdate,
    Replies,
    RoundContext,
)
from fedraclora.tree import Tree


@dataclass(frozen=True)
class CyclicTraining(ClientProgram, group="method"):
    """Let clients train one part of the columns of each B at a time, the parts in turn.

    Attributes:
        parts: The number of parts, all of the same size.
        interval: Local steps before the next part is trained.
    """

    name = "in_turn"

    parts: Count
    interval: Count

    @override
    def hooks(self, chunk: ClientChunk) -> dict[GradientStage, Hook]:
        calls = count()  # one for each local step

        def cut(gradient: torch.Tensor, turn: int) -> torch.Tensor:
            return gradient.masked_fill(column_parts(gradient, self.parts) != turn, 0)

        def hook(gradients: Tree, _: Tree) -> Tree:
            turn = next(calls) // self.interval % self.parts
            return {n: cut(g, turn) if n.endswith("/B") else g for n, g in gradients.items()}

        return {GradientStage.PROGRAM: hook}


@dataclass(frozen=True)
class FedKrso(Asymmetric):
    """FedKRSO: local steps in several shared random subspaces, one after another.

    The rank is that of one subspace.

    Attributes:
        sketch: How the P_j are drawn, a key of `fedraclora.sketch.SKETCHES`.
        sketches: G, subspaces of the rank each.
        interval: Local steps of a turn.
    """

    traits = Traits(exact=True, linear=True, merges=True)

    sketch: Sketch = "gaussian"
    sketches: int = 2
    interval: Count = 1

    @override
    def factors(self, layer: Layer, now: RoundContext) -> Factors:
        rows = layer.rank * self.sketches
        P = now.sketch(layer, "A", self.sketch, rank=rows, normalize=self.normalize)  # drawn once
        return {"B": layer.trained("B", rank=rows), "A": P}

    @override
    def update(self, layer: Layer, replies: Replies) -> LayerUpdate:
        return LayerUpdate(merged=(replies.mean("B"), replies["A"]))  # W + s sum_j B_bar_j P_j

    @override
    def program(self, plan: Plan) -> CyclicTraining:
        return CyclicTraining(self.sketches, self.interval)
