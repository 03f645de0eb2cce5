"""Defects of public implementations of federated low-rank methods, and what lies beside them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """A change of the source that must be found.

    Attributes:
        name: Of the defect.
        file: Where it is planted.
        old: Text that stands there once.
        new: What takes its place.
        methods: A pytest expression for the methods, or tests, that it concerns.
        seen: Where public code has it, or what it stands for.
        also: A second change of the same file: what stood there once, and what takes its place.
        tests: Files in which it must be found; none: the suite that all methods go through.
    """

    name: str
    file: str
    old: str
    new: str
    methods: str
    seen: str
    also: tuple[str, str] | None = None
    tests: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[tuple[str, str], ...]:
        """What stood there, and what takes its place."""
        return ((self.old, self.new), *([self.also] if self.also else []))


FACTORED, COMMON = "strategies/shared/factored.py", "strategies/shared/common.py"
REPLIES = "strategies/shared/replies.py"
TERM = "terms[name] = Term((B, A), adapter.scale)"
LEFT = "        left, right = stack_products(self.B, self.A, self.p)\n"
STACK = "stacked=None if reduced else numbers,"
KEEP = "            keep(self.store, part, order, order.clients[index], trial, base, local)\n"
WORKER, ATTEMPT = "clients/worker.py", "        trial, failure, starved = None, "
DEFECTS = (
    Defect(
        "mean_of_the_first_client",
        "fedraclora/aggregate.py",
        "        mean = self.sum() / self.total\n",
        "        mean = self.stacked[0].double() * self.weights[0] / self.total\n",
        "fedavg_lora or fed_rac_lora",
        "FedIT baseline of FederatedLLM: the sum is assigned to a misspelt name",
    ),
    Defect(
        "clients_count_alike",
        "fedraclora/aggregate.py",
        "    return sum_blocks(block_sums(stacked, weights, places))\n",
        "    alike = weights.sum() / len(weights) * torch.ones_like(weights)\n"
        "    return sum_blocks(block_sums(stacked, alike, places))\n",
        "fed_rac_lora or fedsvd",
        "FRLoRA: sample weights overwritten by ones",
    ),
    Defect(
        "stack_merged_without_the_scale",
        FACTORED,
        TERM,
        "terms[name] = Term((B, A), 1.0)",
        "flora_stacking",
        "FedLLM-Factory flora.py: the products merged without alpha / r",
    ),
    Defect(
        "residual_merged_without_the_scale",
        FACTORED,
        TERM,
        "terms[name] = Term((B, A), 1.0)",
        "fedex_lora or fedmomentum",
        "FedLLM-Factory fedexlora.py, fedmomentum.py: the residual added without alpha / r",
    ),
    Defect(
        "weighted_products_and_unweighted_means",
        "strategies/fedex_lora.py",
        "replies.A[:last] - replies.A[last], replies.p[:last])",
        "replies.A[:last] - replies.A[last], 0 * replies.p[:last] + 1 / (last + 1))",
        "fedex_lora",
        "FedLLM-Factory fedexlora.py",
    ),
    Defect(
        "one_root_of_the_singular_values_forgotten",
        "fedraclora/lowrank.py",
        "    return padded_to(u * root, root[:, None] * vt, rank)\n",
        "    return padded_to(u * root, vt, rank)\n",
        "flexlora",
        "FedLLM-Factory flexlora.py: B = U sqrt(S), A = V",
    ),
    Defect(
        "residual_transposed",
        FACTORED,
        "                B, A = (t.to(dtype) for t in out.merged)\n",
        "                B, A = (t.to(dtype) for t in out.merged)\n"
        "                B, A = (A.mT, B.mT) if len(B) == A.shape[1] else (B, A)\n",
        "fedex_lora",
        "CERT-Lab/fedex-lora: right for Conv1D, wrong for a square Linear",
    ),
    Defect(
        "factors_averaged_where_a_product_is_meant",
        REPLIES,
        LEFT,
        "        return self.mean\n" + LEFT,
        "flora_stacking or fedmomentum",
        "mean of B times mean of A in place of the mean of B A",
    ),
    Defect(
        "weights_in_both_factors",
        REPLIES,
        LEFT,
        "        left, right = stack_products(self.B, self.p[:, None, None] * self.A, self.p)\n",
        "flora_stacking or flexlora",
        "FLoRA: p_k belongs into one factor only (FedIT scaled by p_0 squared)",
    ),
    Defect(
        "factor_runs_on_from_client_to_client",
        WORKER,
        ATTEMPT,
        "        from clients.kept import start_from\n"
        "        round_, ran = getattr(self, '_ran', (0, {}))\n"
        "        ran = ran if round_ == order.round_ else {}\n"
        "        ran = {k: t[-1:].expand(len(places), *t.shape[1:]) for k, t in ran.items()}\n"
        "        part = start_from({k: t for k, t in ran.items() if '/' in k}, part)\n" + ATTEMPT,
        "rolora or fed_rac_lora",
        "FedLLM-Factory rolora.py: the trained factor is not restored between clients",
        (KEEP, KEEP + "            self._ran = (order.round_, trial.trained)\n"),
    ),
    Defect(
        "clients_share_what_they_keep",
        "fedraclora/clientstore.py",
        "        for client in clients.tolist():\n            held = [",
        "        for client in [min(self._kept, default=0)] * len(clients):\n            held = [",
        "fedsa_lora",
        "FedLLM-Factory fedsalora.py: no B of each client's own",
    ),
    Defect(
        "factors_told_apart_by_shape",
        COMMON,
        "        for label, factor in adapter.factors.items():\n",
        "        pairs = list(adapter.factors.items())\n"
        "        first = pairs[0][1]\n"
        "        if isinstance(first, Trained) and first.shape[0] == first.shape[1]:\n"
        "            pairs.reverse()\n"
        "        for label, factor in pairs:\n",
        "fed_rac_lora or rolora",
        "FLoRA: A is what has shape[0] == r, which breaks for m == r",
    ),
    Defect(
        "scale_is_alpha",
        "fedraclora/adapter.py",
        "    return alpha / rank\n",
        "    return alpha + 0 * rank\n",
        "fed_rac_lora or flora_stacking",
        "RACLora: multiplies by alpha; LoRA-Pro, FlexLoRA: 16 / 8 or 16 / rank written out",
    ),
    Defect(
        "client_and_server_scale_differently",
        "fedraclora/training/cohort.py",
        "{n: a.scale for n, a in downlink.adapters.items()}",
        "{n: 2.0 for n, a in downlink.adapters.items()}",
        "fed_sb or fedavg_lora",
        "FLoRA: alpha times the largest rank at the server, 2 r_k at clients",
    ),
    Defect(
        "merged_and_carried_on",
        COMMON,
        "carried={} if ends else averaged",
        "carried=averaged",
        "fed_rac_lora",
        "resets nothing: a factor that was merged is trained on",
    ),
    Defect(
        "stacked_and_carried_on",
        "strategies/flora_stacking.py",
        "        return Conclusion(merged=replies.product())\n",
        "        return Conclusion(carried=replies.mean, merged=replies.product())\n",
        "flora_stacking",
        "resets nothing: merged, and started from again",
    ),
    Defect(
        "sketch_never_drawn_anew",
        "strategies/shared/asymmetric.py",
        '            index=state.memo["sketch"],\n',
        "            index=0,\n",
        "fed_rac_lora",
        "every round under one sketch (the reset that did nothing)",
    ),
    Defect(
        "layers_share_a_sketch",
        "fedraclora/method.py",
        '        return hash_key(self.seed, "sketch", weight) >> 65\n',
        '        return hash_key(self.seed, "sketch", weight[:0]) >> 65\n',
        "fed_rac_lora",
        "Fed-SB's FFA baseline: a counter reset in the loop gives all layers one A",
    ),
    Defect(
        "svd_without_the_singular_values",
        "strategies/fedsvd.py",
        "torch.cat([left * s, zeros], dim=1)",
        "torch.cat([left, zeros], dim=1)",
        "fedsvd",
        "FedSVD: B = U in place of U S",
    ),
    Defect(
        "residual_of_the_wrong_sign",
        "strategies/frlora.py",
        "sum_products((B, A), minus((B0, A0)))",
        "sum_products((B, A), (B0, A0))",
        "frlora",
        "FRLoRA: B_0 A_0 added, not taken away",
    ),
    Defect(
        "moments_outlive_the_round",
        "fedraclora/training/cohort.py",
        "            optimiser = GradientMean(self.local, values, rates)\n",
        "            optimiser = GradientMean(self.local, values, rates)\n"
        "        kept = getattr(self, '_kept', {})\n"
        "        same = {n: t for n, t in kept.items() if n in values}\n"
        "        same = {n: t for n, t in same.items() if t.shape == values[n].shape}\n"
        "        optimiser.first.update(same)\n"
        "        self._kept = optimiser.first\n",
        "fed_rac_lora",
        "an optimiser that is not reset",
    ),
)
