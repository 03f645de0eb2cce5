"""Compute losses of a causal language model only at tokens with a label.

The outputs of all tokens, [N, T, vocabulary], are by far the largest tensor of a step: SmolLM2 has
49,152 of them a token, which is 25 MB for 128 tokens, and several times that with gradients. The
hidden states of labelled tokens are selected before the last layer, and turned into losses piece by
piece; the backward pass recomputes the outputs of a piece.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.data.task import forward

MANY_OUTPUTS = 1024  # number of outputs from which it pays
PIECE = 32 << 20  # bytes of outputs that are computed at a time
PLAIN_MODELS = WeakSet[nn.Module]()  # models that do not change the outputs of their last layer


def output_layer(model: nn.Module, loss: str) -> nn.Linear | None:
    """Return the last layer of a language model, if skipping some of its outputs pays.

    Args:
        model: Any network.
        loss: A key of `fedraclora.data.task.LOSSES`.

    Returns:
        None for other losses, small vocabularies, and a last layer that is trained per client,
        whose outputs belong to whole samples.
    """
    found = getattr(model, "get_output_embeddings", None)
    layer = found() if loss == "next_token" and callable(found) else None
    return layer if type(layer) is nn.Linear and layer.out_features >= MANY_OUTPUTS else None


@dataclass(frozen=True)
class LabelledTokens:
    """Hold the labelled tokens of a batch.

    Attributes:
        states: Inputs of the last layer, [tokens, width].
        wanted: Their labels, int64 [tokens].
        kept: Mask of labelled tokens, bool [N, T - 1].
        outputs: Computes outputs [tokens, vocabulary] from states.
    """

    states: torch.Tensor
    wanted: torch.Tensor
    kept: torch.Tensor
    outputs: Callable[[torch.Tensor], torch.Tensor]

    @classmethod
    def of(cls, model: nn.Module, head: nn.Linear, samples: Samples) -> LabelledTokens:
        """Run a model up to its last layer."""
        wanted = samples.target[:, 1:]
        kept = wanted != IGNORED_TOKEN
        if model not in PLAIN_MODELS:
            found, outputs = _run(model, head, samples, lambda states: states[:, :1])
            with torch.no_grad():
                if torch.equal(head(found[:, :1]), outputs) and _hands_on(model, head, samples):
                    PLAIN_MODELS.add(model)
        else:  # this call reads no weight of the last layer, which bf16-mixed would cast
            found = _states(model, head, samples)
        if model in PLAIN_MODELS:
            return cls(found[:, :-1][kept], wanted[kept], kept, head)
        # If the model changes its outputs (a soft cap, a scale), it changes those of labelled
        # tokens.
        _, outputs = _run(model, head, samples, lambda states: states[:, :-1][kept][None])
        return cls(outputs[0], wanted[kept], kept, lambda given: given)

    def pieces(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Split states and labels so that the outputs of a piece take at most `PIECE` bytes."""
        width = getattr(self.outputs, "out_features", self.states.shape[-1])
        rows = max(1, PIECE // (width * self.states.element_size()))
        yield from zip(self.states.split(rows), self.wanted.split(rows), strict=True)


def _hands_on(model: nn.Module, head: nn.Linear, samples: Samples) -> bool:
    """Check that a model returns the last layer's outputs unchanged; soft caps keep small ones."""
    made: list[torch.Tensor] = []

    def answer(_module: nn.Module, _given: object, outputs: torch.Tensor) -> torch.Tensor:
        sizes = torch.logspace(-3, 4, outputs.shape[-1], device=outputs.device)
        sizes[::2] *= -1
        made.append(sizes.to(outputs.dtype).expand_as(outputs))
        return made[0]

    hook = head.register_forward_hook(answer)
    try:
        _, outputs = _run(model, head, samples, lambda states: states[:, :1])
    finally:
        hook.remove()
    return torch.equal(made[0], outputs)


class _LastLayerReached(Exception):  # noqa: N818 - no error
    """Signal that the last layer was reached."""


def _states(model: nn.Module, head: nn.Linear, samples: Samples) -> torch.Tensor:
    """Run a model up to its last layer; return the layer's input."""
    seen: list[torch.Tensor] = []

    def stop(states: torch.Tensor) -> torch.Tensor:
        seen.append(states)
        raise _LastLayerReached

    with suppress(_LastLayerReached):
        _run(model, head, samples, stop)
    return seen[0]


def _run(
    model: nn.Module,
    head: nn.Linear,
    samples: Samples,
    chosen: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run a model whose last layer sees selected states; return all states, and its outputs."""
    seen: list[torch.Tensor] = []

    def choose(_module: nn.Module, given: tuple[Any, ...]) -> tuple[torch.Tensor]:
        seen.append(given[0])
        return (chosen(given[0]),)

    hook = head.register_forward_pre_hook(choose)
    try:
        outputs = forward(model, samples.inputs)
    finally:
        hook.remove()
    return seen[0], outputs


def token_losses(
    model: nn.Module, head: nn.Linear, samples: Samples, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute loss and number of labelled tokens of each sample, like `next_token`.

    Args:
        model: A causal language model.
        head: Its last layer (`output_layer`).
        samples: [N, T] tokens, with labels as target.
        dtype: Type in which losses are computed.

    Returns:
        Sums of losses [N], int64 [N].
    """
    labelled = LabelledTokens.of(model, head, samples)

    def losses(states: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(labelled.outputs(states).to(dtype), wanted, reduction="none")

    pieces = [*labelled.pieces()]
    if len(pieces) == 1 or not torch.is_grad_enabled():
        found = [losses(*piece) for piece in pieces]
    else:
        found = [checkpoint(losses, *piece, use_reentrant=False) for piece in pieces]
    each = torch.zeros(labelled.kept.shape, dtype=dtype, device=labelled.kept.device)
    each = each.masked_scatter(labelled.kept, torch.cat(found))
    return each.sum(dim=1), labelled.kept.sum(dim=1)
