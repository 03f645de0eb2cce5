"""SoRA: gate each component of an adapter; a penalty closes gates that do not pay.

    weight        W + s C diag(z) A,   C from B and z from 1 at the start of a round
    local steps   on C, z (and A), by the optimizer; then z <- soft(z, lr lambda)
    uplink        B = C diag(z): a component whose gate has closed is a column of zeros

soft(z, t) = sign(z) max(|z| - t, 0) is the proximal step of the penalty lambda |z|_1. Where A alone
is trained, it is the gated factor: diag(z) C. Since the product is what is sent and averaged, the
aggregation of the method is as exact as without gates, and no extra bytes are sent; zeros are
sent like other numbers. Clipping, a proximal term and noise act on the gradient of the product C
diag(z).

A client holds z, C and their moments beside the factor. The ledger's ``pruned`` is the share of
components that no client kept.

References:
    Ding et al., *Sparse low-rank adaptation of pre-trained language models*, EMNLP 2023,
    arXiv 2311.11696.

Departures: gates live for a round and begin at 1, where the paper's live for the whole training
(its public code draws them at random), so that a component that was closed may come back in the
next round; the threshold is lr lambda, where that code takes lambda alone; its schedule of lambda
is left out. Weight decay acts on gates, too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from typing_extensions import override

from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.program import ClientChunk, Rates
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.training.extras.pairs import FactorStep, Pair
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.optimizer import CohortOptimizer
from fedraclora.tree import Tree


@dataclass(frozen=True)
class Gates(FactorStep):
    """Gates on the components of adapters.

    Attributes:
        penalty: lambda.
        local: Settings of the optimizer.
    """

    penalty: float
    local: LocalConfig
    form: ClassVar[str] = "local.gate_penalty={penalty}"
    ends_moments: ClassVar[bool] = True

    @override
    def optimizer(self, chunk: ClientChunk, rates: Rates) -> CohortOptimizer:
        return CohortGates(self.local, chunk.values, rates, self.pairs(chunk), self.penalty)

    @override
    def columns(self, sent: RoundInstructions, uplinks: Uplinks) -> dict[str, float]:
        """Compute the share of components that no client kept, over all adapters: ``pruned``."""
        mean = uplinks.mean()  # one that no client closed is enough
        closed = total = 0
        for weight in sent.adapters:
            name = next(n for n in (f"{weight}/B", f"{weight}/A") if n in sent.trained())
            if name in mean:
                empty = (along_gate(name, mean[name]) == 0).all(dim=-1)
                closed, total = closed + int(empty.sum()), total + empty.numel()
        return {"pruned": closed / total} if total else {}


class CohortGates(CohortOptimizer):
    """Run SGD or AdamW on gated factors, their gates, and other trained tensors.

    Args:
        config: Local settings.
        values: The tensors that are trained, [K, ...], with the products of factors and gates;
            updated in place by `step`.
        rates: Step size of each; a gate has that of its factor.
        pairs: The adapters.
        penalty: lambda.
    """

    def __init__(
        self,
        config: LocalConfig,
        values: Tree,
        rates: dict[str, float],
        pairs: list[Pair],
        penalty: float,
    ) -> None:
        self.penalty = penalty
        # The gated factor is B, or A if only A is trained.
        gated = [next(n for n in pair.names if n in values) for pair in pairs]
        self.products = {name: values[name] for name in gated}
        self.gates = {name: f"{name}/gate" for name in gated}
        raw = values | {name: values[name].clone() for name in gated}
        for name, gate in self.gates.items():
            raw[gate] = torch.ones_like(along_gate(name, values[name])[..., 0])
        super().__init__(config, raw, rates | {g: rates[n] for n, g in self.gates.items()})

    @override
    def step(self, gradients: Tree) -> None:
        own = dict(gradients)
        for name, gate in self.gates.items():
            slope = along_gate(name, gradients[name])
            active = len(slope)
            factor, z = along_gate(name, self.values[name][:active]), self.values[gate][:active]
            own[name] = along_gate(name, slope * z[..., None])
            own[gate] = (slope * factor).sum(dim=-1)
        super().step(own)
        for name, gate in self.gates.items():
            active = len(gradients[name])
            z = self.values[gate][:active]
            z.copy_(F.softshrink(z, self.rates[gate] * self.penalty))
            product = along_gate(name, self.values[name][:active]) * z[..., None]
            self.products[name][:active] = along_gate(name, product)


def along_gate(name: str, factor: torch.Tensor) -> torch.Tensor:
    """Turn a factor [..., m, r] named B so that components come first; leave A unchanged."""
    return factor.mT if name.endswith("/B") else factor
