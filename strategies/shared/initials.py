"""Initialization of adapter factors beyond random and zero (``method.init``).

``pissa``: the principal part of the weight, which is subtracted from it.

    W = U S V^T;  B_0 = U_r (S_r / s)^(1/2),  A_0 = (S_r / s)^(1/2) V_r^T;  W <- W - s B_0 A_0

``orthogonal``: both factors are drawn, from two halves of one orthonormal basis, so that their
product is zero. Q is r x r and orthonormal, Q_1 its rows 1, 3, ... and Q_2 its rows 2, 4, ...;
X_1 and X_2 have independent entries N(0, 1 / 100):

    A_0 = Q_1^T X_1,  B_0 = X_2 Q_2;  B_0 A_0 = X_2 (Q_2 Q_1^T) X_1 = 0

``lora_ga``: singular vectors of the loss's gradient G at the start, the first r on the right and
the next r on the left, so that the first step follows G; the product is subtracted from the weight.

    G = U S V^T;  A_0 = c V_[1..r]^T,  B_0 = c U_[r+1..2r],  c = m^(1/4) / gamma^(1/2),  gamma = 16
    W <- W - s B_0 A_0

G is the mean of the clients' gradients over their local batches, and it is never sent: round 1
finds its range, and does not train. With q = min(4 r, m, n) and a drawn Omega (q x n):

    exchange 1: Y_k = G_k Omega^T;   Q = an orthonormal basis of sum_k p_k Y_k  (m x q)
    exchange 2: Z_k = Q^T G_k;       G ~ Q sum_k p_k Z_k, exact where the rank of G is at most q

- Effective weights at the start are the base weights: to rounding, since W - s B_0 A_0 is rounded.
- Bytes: r (m + n) numbers down to each client in the first training round, where a drawing costs a
seed. ``lora_ga`` has a round more: q (m + n) numbers up, q m and a seed down, and r (m + n) to
  catch up. W - s B_0 A_0 of ``pissa`` costs no bytes, since a client computes it by itself.
- Fits methods whose clients train both factors and continue them; after a merge a new start would
be
  needed. Rank budgets are refused, since a client would lack a part of W. So is a quantized
  ``compression.downlink``: the part of W in the factors would be rounded with them.
- Server: an SVD of each m x n weight (``pissa``), or O((m + n) q^2) (``lora_ga``).
- Sources: Meng, Wang and Zhang, *PiSSA*, NeurIPS 2024, arXiv 2404.02948. ``orthogonal``: the choice
  of that name of the PEFT library. Wang, Yu and Li, *LoRA-GA*, NeurIPS 2024, arXiv 2407.05000;
  which vectors, the scale and gamma as in its public code's defaults.
- Departures: federated, all of them are ours. An odd rank is split unevenly where PEFT refuses it.
  LoRA-GA's range finder has one pass, while its code iterates on a stored gradient.

If clients train one factor, the first frozen one may be computed from the gradient
(``method.init=gradient``):

    round 1:  no training; G ~ Q Z, the mean gradient of the clients' local batches
    link 0:   A = the leading right singular vectors of Q Z (left links: B = the left ones)

Later merge periods do not change. The probe is that of LoRA-GA: with q = min(4 r, m, n), q (m + n)
numbers up, and q m and a seed down, per matrix and client; in period 0 the factor is sent in each
round, where a drawing costs a seed. The server only needs sums.

- Source of the choice: Wang, Yu and Li, *LoRA-GA*, NeurIPS 2024, arXiv 2407.05000, for factors that
  are both trained; Ponkshe et al., *LoRA-SB*, arXiv 2411.19557, for frozen ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, ClassVar

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.errors import ConfigError, unknown
from fedraclora.limits import OneOf
from fedraclora.lowrank.algebra import Product, fix_signs, principal
from fedraclora.protocol.factor import to_train
from fedraclora.protocol.method import (
    ASKS_TWICE,
    Adapter,
    Cohort,
    Draw,
    Link,
    Plan,
    RoundInstructions,
    State,
    Term,
    apply_link,
)
from fedraclora.protocol.plan import Rank
from fedraclora.protocol.program import GRADIENT
from fedraclora.protocol.uplinks import Uplinks
from fedraclora.rng import generator, torch_normal
from fedraclora.sketch import SKETCHES, SketchSpec
from fedraclora.strategies.shared.common import closed
from fedraclora.strategies.shared.layerwise import Layer, LayerMethod
from fedraclora.tree import Tree

STARTS = ("pissa", "orthogonal", "lora_ga")
TAKEN_FROM_WEIGHTS = ("pissa", "lora_ga")  # the product of the factors of the others is 0
ORTHOGONAL_STD = 0.1
GAMMA = 16.0
OVERSAMPLED = 4  # q / r: columns of the range finder, for 2 r singular vectors


def check_start(initial: str, *, fits: bool, why: str) -> None:
    """Check ``method.init``: a drawing, or a start of this module where that fits.

    Args:
        initial: The name.
        fits: Whether both factors are trained and continued.
        why: What the factors do otherwise.

    Raises:
        ConfigError: If the name does not exist, or the start does not fit.
    """
    if initial in STARTS and not fits:
        raise ConfigError(
            f"method.init={initial}: this initialization is for two factors that are trained "
            f"in all rounds, but {why}. Use a method that docs/methods.md marks `both`, or a "
            "random initialization"
        )
    if initial not in SKETCHES and initial not in STARTS:
        raise unknown("method.init", initial, [*SKETCHES, *(STARTS if fits else ())])


def bounded(initial: str, found: Rank, plan: Plan, name: str, *, cap: bool) -> Rank:
    """Cut the rank of a layer to the limit of a start: half the smaller side for ``lora_ga``.

    Raises:
        ConfigError: If the rank is above it without ``cap``, or a side is 1.
    """
    most = min(plan.targets[name].shape) // 2
    if initial != "lora_ga" or found.value <= most:
        return found
    if not cap or not most:
        raise ConfigError(
            f"method.init=lora_ga: it needs 2 r singular vectors, but {name} has only "
            f"{min(plan.targets[name].shape)} for the rank {found.value}. Lower the rank, set "
            "method.cap=true, or leave the layer out of target_modules"
        )
    return Rank(most, f"rank of {name} capped at {most}: lora_ga needs twice as many vectors")


def orthogonal(shape: tuple[int, int], rank: int, seed: int) -> Product:
    """Draw B_0 [m, r] and A_0 [r, n], not zero, with ``B_0 A_0 = 0``; float64.

    Example:
        >>> B, A = orthogonal((5, 7), rank=4, seed=0)
        >>> bool((B @ A).abs().max() < 1e-15), float(B.abs().max()) > 0, float(A.abs().max()) > 0
        (True, True, True)
    """
    (m, n), Q = shape, SketchSpec("orthonormal", "right", rank, rank, seed, index=0).draw()
    for_A, for_B = Q[0::2], Q[1::2]
    X1 = torch_normal(generator(seed, "orthogonal", "A"), len(for_A), n)
    X2 = torch_normal(generator(seed, "orthogonal", "B"), m, len(for_B))
    return ORTHOGONAL_STD * X2 @ for_B, ORTHOGONAL_STD * for_A.mT @ X1


def gradient_factors(left: torch.Tensor, right: torch.Tensor, rank: int) -> Product:
    """Compute LoRA-GA's B_0 [m, r] and A_0 [r, n] of a gradient ``left @ right``, in float64.

    Args:
        left: Orthonormal columns [m, q] with q at least 2 r.
        right: [q, n].
        rank: r.
    """
    u, _, vt = torch.linalg.svd(right, full_matrices=False)
    u, vt = fix_signs(left @ u, vt)
    c = left.shape[0] ** 0.25 / GAMMA**0.5
    return c * u[:, rank : 2 * rank], c * vt[:rank]


def initial_factors(
    state: State, factors: Mapping[str, Product], scales: Mapping[str, float]
) -> tuple[Tree, Link]:
    """Build factors as the state carries them, and the merge that subtracts their product from W.

    Args:
        state: A state, for the precision.
        factors: B_0 and A_0 by weight.
        scales: Scales of the adapters.
    """
    carried: Tree = {}
    terms = {}
    for name, pair in factors.items():
        # Contiguous rows, as in a restored state: products round by layout.
        B, A = (t.to("cpu", state.base[name].dtype).contiguous() for t in pair)
        carried |= {f"{name}/B": B, f"{name}/A": A}
        terms[name] = Term.of((B, A), -scales[name])
    return carried, Link(terms)


def begin(
    state: State, initial: str, ranks: Mapping[str, int], scales: Mapping[str, float], draw: Draw
) -> State:
    """Build the state before the first round for a start without clients' gradients.

    Args:
        state: The state with the weights.
        initial: ``pissa`` or ``orthogonal``.
        ranks: Ranks of the adapters.
        scales: Scales of the adapters.
        draw: The method's sketches.
    """
    factors: dict[str, Product] = {}
    for name, view in state.plan.targets.items():
        if initial == "pissa":
            factors[name] = principal(view.matrix(state.base[name]), ranks[name], scales[name])
        else:
            factors[name] = orthogonal(view.shape, ranks[name], draw.sketch_seed(name))
    carried, link = initial_factors(state, factors, scales)
    base = apply_link(state.base, link, state.plan) if initial == "pissa" else state.base
    return replace(state, base=base, carried=carried)


def probe_rank(plan: Plan, name: str, rank: int) -> int:
    """Return the columns of a layer's range finder: q."""
    return min(OVERSAMPLED * rank, *plan.targets[name].shape)


def probe_floats(plan: Plan, ranks: Mapping[str, int]) -> tuple[int, int]:
    """Count the numbers (up, down) of the two exchanges of a probe, per client."""
    up = down = 0
    for name, rank in ranks.items():
        (m, n), q = plan.targets[name].shape, probe_rank(plan, name, rank)
        up, down = up + q * (m + n), down + q * m
    return up, down


def first_probe(
    plan: Plan, ranks: Mapping[str, int], draw: Draw, purpose: str
) -> RoundInstructions:
    """Request ``G_k Omega^T``: the gradient of B = 0 under A = Omega, with the scale 1.

    Args:
        plan: The run's plan.
        ranks: Number of vectors for each layer.
        draw: The method's sketches.
        purpose: `GradientProbeMethod.purpose`.
    """
    adapters = {}
    for name, rank in ranks.items():
        (m, n), q = plan.targets[name].shape, probe_rank(plan, name, rank)
        omega = SketchSpec("orthonormal", "right", q, n, draw.sketch_seed(name + purpose), index=0)
        adapters[name] = Adapter.of({"B": to_train((m, q)), "A": omega}, 1.0)
    return RoundInstructions(adapters, program=GRADIENT)


def second_probe(sent: RoundInstructions, uplinks: Uplinks) -> RoundInstructions | None:
    """Request ``Q^T G_k``, Q from the first probe; None if that was the second."""
    adapters, mean = {}, uplinks.mean()
    for name, adapter in sent.adapters.items():
        omega = adapter.factors["A"]
        if omega.trained:
            return None
        Q = torch.linalg.qr(mean[f"{name}/B"].to("cpu"))[0]
        A = to_train((Q.shape[1], omega.shape[1]))
        adapters[name] = Adapter.of({"B": Q, "A": A}, 1.0)
    return RoundInstructions(adapters, program=GRADIENT)


@dataclass(frozen=True)
class GradientProbeMethod(LayerMethod):
    """Base of methods that may begin with a round for the gradient only, in two exchanges."""

    purpose: ClassVar[str] = ""
    """Name of the probe's draws, different from other draws of a layer."""

    @property
    def probe_rounds(self) -> int:
        """Count the rounds that ask for the gradient: 0 or 1."""
        raise NotImplementedError

    def started(self, state: State, gradients: Mapping[str, Product]) -> State:
        """Build the state after the probe.

        Args:
            state: The state before it.
            gradients: The gradient of each weight, as a product [m, q] [q, n] in float64, on the
                CPU.
        """
        raise NotImplementedError

    def probes(self, state: State) -> bool:
        """Return whether the next round asks for gradients."""
        begun = state.counters.sketch or state.counters.age or state.carried
        return bool(self.probe_rounds) and not begun

    @override
    def open_round(
        self, state: State, round_: int, cohort: Cohort, draw: Draw
    ) -> RoundInstructions:
        if not self.probes(state):
            return super().open_round(state, round_, cohort, draw)
        return first_probe(state.plan, self.ranks_and_scales(state.plan)[0], draw, self.purpose)

    @override
    def next_exchange(
        self, state: State, sent: RoundInstructions, uplinks: Uplinks
    ) -> RoundInstructions | None:
        return second_probe(sent, uplinks) if self.probes(state) else None

    @override
    def close_round(self, state: State, sent: RoundInstructions, uplinks: Uplinks) -> State:
        if not self.probes(state):
            return super().close_round(state, sent, uplinks)
        mean, found = uplinks.mean(), dict[str, Product]()
        for name, adapter in sent.adapters.items():
            Q = adapter.factors["B"].draw().to("cpu", torch.float64)
            found[name] = Q, mean[f"{name}/A"].to("cpu")
        return self.started(state, found)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        if self.probe_rounds and round_ == 1:
            return probe_floats(plan, self.ranks_and_scales(plan)[0])
        return super().floats(plan, round_)


FIRST = ("random", "gradient")


@dataclass(frozen=True, kw_only=True)
class GradientFirst(GradientProbeMethod):
    """Hyperparameters of methods that may compute their first frozen factor from the gradient.

    Attributes:
        init: Source of the first frozen factor: ``random``, or ``gradient``.
    """

    purpose = "/probe"

    init: Annotated[str, OneOf(FIRST)] = "random"

    @Feature(
        "method.init=gradient",
        instead="method.init=random",
        avoids={
            "a method whose frozen factors recur": "they are drawn again from their seeds",
        },
    )
    def _begins_from_gradient(self) -> bool:
        return self.init == "gradient"

    @ASKS_TWICE
    def _asks_twice(self) -> str:
        return f"method.init={self.init}" if self.probe_rounds else ""

    def first_factor(self, layer: Layer, gradient: Product) -> Tree:
        """Compute the factors of the first merge period, by label.

        Args:
            layer: The layer.
            gradient: The gradient of its weight, as a product [m, q] [q, n].
        """
        raise NotImplementedError

    @property
    @override
    def probe_rounds(self) -> int:
        return int(self.init == "gradient")

    @override
    def started(self, state: State, gradients: Mapping[str, Product]) -> State:
        carried: Tree = {}
        for layer in self.layers_of(state):
            found = self.first_factor(layer, gradients[layer.name])
            carried |= {f"{layer.name}/{k}": t.to(layer.dtype) for k, t in found.items()}
        return replace(closed(state, Link(), carried=carried), counters=state.counters)

    @override
    def floats(self, plan: Plan, round_: int = 1) -> tuple[int, int]:
        if not self.probe_rounds or round_ == 1:
            return super().floats(plan, round_)
        drawn = replace(self, init="random")
        up, down = LayerMethod.floats(drawn, plan, round_ - 1)
        if self.link_rounds is None or round_ - 1 <= self.link_rounds:
            adapters = (drawn.new_factors(plan, name, 1) for name in plan.targets)
            frozen = (f for adapter in adapters for f in adapter.factors.values() if f.drawing)
            down += sum(prod(f.shape) for f in frozen)
        return up, down
