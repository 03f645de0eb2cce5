"""Run models whose trained tensors cannot be folded into the batch with torch.func.vmap.

This is slower (every client has its own dense effective weight), but supports any module: tied
weights, bare parameters, unknown layers. A model with data-dependent control flow cannot run under
vmap; its clients run one after another.
"""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.func import functional_call, vmap

from fedraclora.data.samples import Samples
from fedraclora.lowrank.dora import magnitude_of, rescaled
from fedraclora.protocol.method import Plan, RoundInstructions
from fedraclora.training.program import CohortProgram
from fedraclora.tree import Tree

log = logging.getLogger(__name__)

# Prefixes that tell errors of vmap from errors of the model.
REFUSED = ("vmap: ", "Batching rule not implemented", "accessing `data` under vmap")


def effective_weights(
    base: Tree, downlink: RoundInstructions, plan: Plan, values: Tree, frozen: Tree
) -> Tree:
    """Compute the dense effective weights of one client.

    Args:
        base: The replica's weights.
        downlink: Says which terms there are.
        plan: Views of the adapted matrices.
        values: Trained tensors of the client, without a client axis.
        frozen: Frozen factors of the client, 2-D.

    Returns:
        Every parameter by name, in stored layout; differentiable in ``values``.
    """
    out, dense = dict(base), {n: values[n] for n in downlink.dense}
    known = frozen | values
    for weight, adapter in downlink.adapters.items():
        names = [f"{weight}/{label}" for label in adapter.factors]
        term = torch.linalg.multi_dot([known[n] for n in names])
        view = plan.targets[weight]
        out[weight] = view.stored(view.matrix(base[weight]) + adapter.scale * term, base[weight])
        if (lengths := dense.pop(magnitude_of(weight), None)) is not None:
            out[weight] = view.stored(rescaled(view.matrix(out[weight]), lengths), base[weight])
    return out | dense


def vmapped_forward(
    program: CohortProgram,
    downlink: RoundInstructions,
    plan: Plan,
    leaves: Tree,
    frozen: Tree,
    batch: Samples,
    products: torch.autocast,
) -> torch.Tensor:
    """Compute the outputs of all samples, [K * b, ...], with one dense weight set per client.

    The weights are formed in their own precision, the forward pass in that of ``products``.
    """
    K = next(iter(leaves.values())).shape[0]

    inputs = {n: t.reshape(K, -1, *t.shape[1:]) for n, t in batch.inputs.items()}
    per_client = {n: f[:K] for n, f in frozen.items() if f.dim() == 3}
    shared = {n: f for n, f in frozen.items() if f.dim() == 2}

    def one(values: Tree, own: Tree, inputs: Tree) -> torch.Tensor:
        weights = effective_weights(program.base, downlink, plan, values, shared | own)
        plain = set(inputs) == {"x"}
        with products:
            output = functional_call(
                program.copied,
                weights,
                (inputs["x"],) if plain else (),
                None if plain else inputs,
            )
        logits: torch.Tensor = getattr(output, "logits", output)
        return logits

    if not program.in_turn:
        try:
            with masks_written_out(), warnings.catch_warnings():
                # A kernel of attention is still fastest if called client by client.
                warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
                return vmap(one)(leaves, per_client, inputs).flatten(0, 1)
        except RuntimeError as error:
            if not str(error).startswith(REFUSED):
                raise
            program.in_turn = True  # so that later steps do not try in vain
            log.warning(
                "%s cannot train several clients as one batch, they train one after another: %s",
                type(program.copied).__name__,
                str(error).partition(". ")[0],
            )
    rows = [
        [{n: t[k] for n, t in tree.items()} for tree in (leaves, per_client, inputs)]
        for k in range(K)
    ]
    return torch.cat([one(*row) for row in rows])


@contextmanager
def masks_written_out() -> Iterator[None]:
    """Make transformers models build an attention mask for every padded batch.

    They check whether a batch is padded, to leave out a mask without effect; under vmap, values
    cannot be checked. Attention is the same with and without such a mask. Models without
    ``attention_mask`` are not affected.
    """
    masking: Any = sys.modules.get("transformers.masking_utils")
    if masking is None:  # then no model is from transformers, which need not be installed
        yield
        return
    table = masking.ALL_MASK_ATTENTION_FUNCTIONS
    kinds = {name: table[name] for name in ("sdpa", "eager")}

    def written_out(plain: Callable[..., Any]) -> Callable[..., Any]:
        def mask(*args: Any, **given: Any) -> Any:
            if given.get("attention_mask") is not None:
                given |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
            return plain(*args, **given)

        return mask

    for name, plain in kinds.items():
        table[name] = written_out(plain)  # in this instance's own entries, before the class's
    try:
        yield
    finally:
        for name in kinds:
            del table[name]
