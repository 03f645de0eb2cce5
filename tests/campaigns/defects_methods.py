"""Defects of public implementations of federated low-rank methods, and what lies beside them.

Each function replaces something of the project in this process, and stands for one defect. What is
sound is called where it can be, so that a defect says what is wrong and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.nn.functional import normalize

import fedraclora.strategies.methods.fedsvd
import fedraclora.strategies.methods.frlora
import fedraclora.strategies.shared.layer
import fedraclora.strategies.shared.layerwise
from fedraclora.lowrank.algebra import (
    Product,
    balanced_factors,
    padded_to,
    stack_products,
    truncated_product,
)
from fedraclora.protocol.factor import Factor
from fedraclora.protocol.link import Link, Term
from fedraclora.protocol.method import Draw, RoundInstructions, State
from fedraclora.protocol.plan import resolve_scale
from fedraclora.protocol.program import LocalResult
from fedraclora.protocol.uplinks import Uplinks, weighted_sum
from fedraclora.run.client_state import ClientStore
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.flora_stacking import FloraStacking
from fedraclora.strategies.shared.layerwise import (
    FactorLike,
    Factors,
    Layer,
    LayerUpdate,
    Replies,
    RoundContext,
)
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.materialize import start_from
from fedraclora.training.optimizer import CohortOptimizer
from fedraclora.tree import Tree
from tests.campaigns.planting import Planting, defect, defects_of


def merged_otherwise(planting: Planting, change: Callable[[Term], Term]) -> None:
    """Change what a round merges of each matrix on its way into the base weights."""
    sound = fedraclora.strategies.shared.layerwise.closed

    def closed(state: State, link: Link, **more: Any) -> State:
        return sound(state, Link({n: change(t) for n, t in link.terms.items()}, link.dense), **more)

    planting.put(fedraclora.strategies.shared.layerwise, "closed", closed)


@defect(
    "fedavg_lora or fed_rac_lora",
    "FedIT baseline of FederatedLLM: the sum is assigned to a misspelt name",
)
def mean_of_the_first_client(planting: Planting) -> None:
    sound = Uplinks.mean

    def mean(self: Uplinks) -> Tree:
        if self.stacked is None:
            return sound(self)
        return sound(replace(self, summed=self.stacked[0].double() * self.weights[0]))

    planting.put(Uplinks, "mean", mean)


@defect("fed_rac_lora or fedsvd", "FRLoRA: sample weights overwritten by ones")
def clients_count_alike(planting: Planting) -> None:
    def alike(
        stacked: torch.Tensor, weights: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        return weighted_sum(stacked, torch.full_like(weights, float(weights.mean())), places)

    planting.function(weighted_sum, alike)


@defect("flora_stacking", "FedLLM-Factory flora.py: the products merged without alpha / r")
def stack_merged_without_the_scale(planting: Planting) -> None:
    merged_otherwise(planting, lambda term: replace(term, scale=1.0))


@defect(
    "fedex_lora or fedmomentum",
    "FedLLM-Factory fedexlora.py, fedmomentum.py: the residual added without alpha / r",
)
def residual_merged_without_the_scale(planting: Planting) -> None:
    merged_otherwise(planting, lambda term: replace(term, scale=1.0))


@defect("fedex_lora", "FedLLM-Factory fedexlora.py")
def weighted_products_and_unweighted_means(planting: Planting) -> None:
    def alike(self: Replies) -> Product | None:
        B, A, p = self.B[:-1] - self.mean("B"), self.A[:-1] - self.A[-1], self.p[:-1]
        return stack_products(B, A, torch.full_like(p, 1 / (len(p) + 1)))

    planting.put(Replies, "residual", property(alike))


@defect("flexlora", "FedLLM-Factory flexlora.py: B = U sqrt(S), A = V")
def one_root_of_the_singular_values_forgotten(planting: Planting) -> None:
    def forgetful(left: torch.Tensor, right: torch.Tensor, rank: int) -> Product:
        u, s, vt = truncated_product(left, right, rank)
        return padded_to(u * s.sqrt(), vt, rank)

    planting.function(balanced_factors, forgetful)


@defect("fedex_lora", "CERT-Lab/fedex-lora: right for Conv1D, wrong for a square Linear")
def residual_transposed(planting: Planting) -> None:
    def transposed(term: Term) -> Term:
        B, A = (factor.draw() for factor in term.factors)
        return Term.of((A.mT, B.mT), term.scale) if len(B) == A.shape[1] else term

    merged_otherwise(planting, transposed)


@defect("flora_stacking or fedmomentum", "mean of B times mean of A in place of the mean of B A")
def factors_averaged_where_a_product_is_meant(planting: Planting) -> None:
    planting.put(Replies, "product", lambda self: self.mean_factors)


@defect(
    "flora_stacking or flexlora",
    "FLoRA: p_k belongs into one factor only (FedIT scaled by p_0 squared)",
)
def weights_in_both_factors(planting: Planting) -> None:
    def twice(left: torch.Tensor, right: torch.Tensor, p: torch.Tensor) -> Product:
        return stack_products(left, p[:, None, None] * right, p)

    planting.put(fedraclora.strategies.shared.layer, "stack_products", twice)


@defect(
    "rolora or fed_rac_lora",
    "FedLLM-Factory rolora.py: the trained factor is not restored between clients",
)
def factor_runs_on_from_client_to_client(planting: Planting) -> None:
    sound = CohortTrainer.train

    def train(
        self: Any,
        base: Tree,
        sent: RoundInstructions,
        clients: torch.Tensor,
        *,
        round_: int,
        **more: Any,
    ) -> LocalResult:
        last, ran = getattr(self, "_ran", (0, {}))
        if last == round_:
            factors = {n: t for n, t in ran.items() if "/" in n}
            last_one = {n: t[-1:].expand(len(clients), *t.shape[1:]) for n, t in factors.items()}
            sent = start_from(last_one, sent)
        trial = sound(self, base, sent, clients, round_=round_, **more)
        self._ran = (round_, trial.trained)
        return trial

    planting.put(CohortTrainer, "train", train)


@defect("fedsa_lora", "FedLLM-Factory fedsalora.py: no B of each client's own")
def clients_share_what_they_keep(planting: Planting) -> None:
    sound = ClientStore.read

    def read(self: ClientStore, clients: torch.Tensor, *given: Any, **more: Any) -> Tree:
        anybody = next(iter(self.latest(1)), 0)
        return sound(self, torch.full_like(clients, anybody), *given, **more)

    planting.put(ClientStore, "read", read)


@defect("fed_rac_lora or rolora", "FLoRA: A is what has shape[0] == r, which breaks for m == r")
def factors_told_apart_by_shape(planting: Planting) -> None:
    sound = Replies.means

    def means(self: Replies, step: float = 1.0, *, drawn: bool = True) -> dict[str, FactorLike]:
        found, first = sound(self, step, drawn=drawn), next(iter(self.adapter.factors.values()))
        square = first.trained and first.shape[0] == first.shape[1]
        return dict(reversed(found.items())) if square else found

    planting.put(Replies, "means", means)


@defect(
    "fed_rac_lora or flora_stacking",
    "RACLora: multiplies by alpha; LoRA-Pro, FlexLoRA: 16 / 8 or 16 / rank written out",
)
def scale_is_alpha(planting: Planting) -> None:
    def alpha_alone(alpha: float | str, rank: int, *, rslora: bool = False) -> float:
        scale = resolve_scale(alpha, rank, rslora=rslora)
        return scale if isinstance(alpha, str) or rslora else alpha

    planting.function(resolve_scale, alpha_alone)


@defect(
    "fed_sb or fedavg_lora", "FLoRA: alpha times the largest rank at the server, 2 r_k at clients"
)
def client_and_server_scale_differently(planting: Planting) -> None:
    sound = CohortTrainer.train

    def train(
        self: CohortTrainer, base: Tree, sent: RoundInstructions, *given: Any, **more: Any
    ) -> LocalResult:
        adapters = {n: replace(a, scale=2.0) for n, a in sent.adapters.items()}
        return sound(self, base, replace(sent, adapters=adapters), *given, **more)

    planting.put(CohortTrainer, "train", train)


@defect("fed_rac_lora", "resets nothing: a factor that was merged is trained on")
def merged_and_carried_on(planting: Planting) -> None:
    sound = FedRacLora.update

    def update(self: FedRacLora, layer: Layer, replies: Replies) -> LayerUpdate:
        said = sound(self, layer, replies)
        return replace(said, carried=said.carried or replies.means(drawn=False))

    planting.put(FedRacLora, "update", update)


@defect("flora_stacking", "resets nothing: merged, and started from again")
def stacked_and_carried_on(planting: Planting) -> None:
    def update(self: FloraStacking, layer: Layer, replies: Replies) -> LayerUpdate:
        return LayerUpdate(carried=replies.means(), merged=replies.product())

    planting.put(FloraStacking, "update", update)


@defect("fed_rac_lora", "every round under one sketch (the reset that did nothing)")
def sketch_never_drawn_anew(planting: Planting) -> None:
    sound = FedRacLora.factors

    def factors(self: FedRacLora, layer: Layer, now: RoundContext) -> Factors:
        return sound(self, replace(layer, link=0), now)

    planting.put(FedRacLora, "factors", factors)


@defect("fed_rac_lora", "Fed-SB's FFA baseline: a counter reset in the loop gives all layers one A")
def layers_share_a_sketch(planting: Planting) -> None:
    sound = Draw.sketch_seed
    planting.put(Draw, "sketch_seed", lambda self, weight: sound(self, ""))


@defect("fedsvd", "FedSVD: B = U in place of U S")
def svd_without_the_singular_values(planting: Planting) -> None:
    sound = fedraclora.strategies.methods.fedsvd.turned_to_singular_vectors

    def turned(B: torch.Tensor, A: torch.Tensor) -> Product:
        left, right = sound(B, A)
        return normalize(left, dim=0), right

    planting.function(sound, turned)


@defect("frlora", "FRLoRA: B_0 A_0 added, not taken away")
def residual_of_the_wrong_sign(planting: Planting) -> None:
    planting.put(fedraclora.strategies.methods.frlora, "negated", lambda product: product)


@defect(
    "flexlora and sent_next",
    "the server's factors are factored anew, and clients begin at the ones of the start",
)
def carried_and_never_sent(planting: Planting) -> None:
    sound = Layer.trained

    def trained(self: Layer, *given: Any, **more: Any) -> Factor:
        return sound(replace(self, carried={}), *given, **more)

    planting.put(Layer, "trained", trained)


@defect("fed_rac_lora and counts_by", "the mean over clients divided by their number")
def clients_counted_in_a_mean_of_weights(planting: Planting) -> None:
    def counted(
        stacked: torch.Tensor, weights: torch.Tensor, places: torch.Tensor | None = None
    ) -> torch.Tensor:
        return weighted_sum(stacked, weights * len(weights) / 4, places)

    planting.function(weighted_sum, counted)


@defect("fed_rac_lora", "an optimizer that is not reset")
def moments_outlive_the_round(planting: Planting) -> None:
    sound, last = CohortOptimizer.step, dict[str, torch.Tensor]()

    def step(self: CohortOptimizer, gradients: Tree) -> None:
        if self.count == 0:
            held = {n: t for n, t in last.items() if n in self.values}
            fits = {n: t.clone() for n, t in held.items() if t.shape == self.values[n].shape}
            self.first.update(fits)
        sound(self, gradients)
        last.clear()
        last.update(self.first)

    planting.put(CohortOptimizer, "step", step)


METHOD_DEFECTS = defects_of(globals())
