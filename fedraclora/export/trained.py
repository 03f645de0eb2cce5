"""Hold a trained model with the facts that an export needs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedraclora.lowrank.algebra import Product, fix_signs, padded_to, truncated_product
from fedraclora.lowrank.layers import LayerView
from fedraclora.tree import Tree

ExportRecord = dict[str, object]  # facts of an export, as plain JSON


@dataclass(frozen=True)
class TrainedModel:
    """Hold a model, its initial weights, and the change between the two.

    Attributes:
        model: With the weights W_T; on the CPU, in evaluation mode.
        start: W_0, by the names of parameters.
        targets: Adapted matrices: weight name -> its (out, in) view.
        dense: Parameters trained in full beside them (a head, biases): never truncated.
        changes: Changes known by their factors: weight name -> ([m, q], [q, n]), float64. For other
            weights only the difference is known.
        magnitudes: Row lengths M [m] by weight, if rows are rescaled (DoRA): then W_T is
            ``diag(M / ||V||) V`` with V = W_0 + change.
        source: Argument of ``from_pretrained`` for the model that the run began from; None: there
            is none, or the run began elsewhere.
        tokenizer: Folder or hub name of its tokenizer, or a GGUF file; None: none.
        config: The config of the run, as plain values.
        facts: Facts for the card: JSON values by name.
        warnings: Sentences that every user of the model must know.
    """

    model: nn.Module
    start: Tree
    targets: Mapping[str, LayerView]
    dense: tuple[str, ...] = ()
    changes: Mapping[str, Product] = field(default_factory=dict)
    magnitudes: Tree = field(default_factory=dict)
    source: str | None = None
    tokenizer: str | None = None
    config: Mapping[str, object] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def weights(self) -> Tree:
        """Return W_T, by the names of parameters."""
        return {n: p.detach() for n, p in self.model.named_parameters()}

    def at(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """Copy the model, with other weights if given."""
        model = copy.deepcopy(self.model)
        put_weights(model, weights)
        return model


@dataclass(frozen=True)
class Order:
    """Hold the target and options of an export.

    Attributes:
        folder: An empty folder to write to; it is renamed when it is complete.
        place: The final place of the files.
        rank: With a PEFT adapter, the largest rank of a layer.
        check: Whether the files are read back by the library that they are for.
    """

    folder: Path
    place: Path
    rank: int | None
    check: bool


def put_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into the parameters with these names."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in weights.items():
            parameters[name].copy_(value)


def name_classes(model: nn.Module, classes: object) -> None:
    """Write the names of the classes, in their order, into the config of a transformers model."""
    config: Any = getattr(model, "config", None)
    if isinstance(classes, list) and getattr(config, "num_labels", None) == len(classes):
        config.id2label = dict(enumerate(map(str, classes)))
        config.label2id = {name: k for k, name in config.id2label.items()}


def is_hugging_face(model: nn.Module) -> bool:
    """Check whether a model has the configuration and methods of a transformers model."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


@dataclass(frozen=True)
class ChangeFactors:
    """The change of one matrix as the product of two factors.

    Attributes:
        left: [m, k], float64.
        right: [k, n], float64.
        rank: Rank of the whole change, to its precision.
        error: Frobenius norm of the omitted part, over that of the whole change.
    """

    left: torch.Tensor
    right: torch.Tensor
    rank: int
    error: float

    @property
    def kept(self) -> int:
        """Rank of the factors, k."""
        return self.left.shape[1]


def factors_of_product(change: Product, rank: int | None) -> ChangeFactors:
    """Compress a product of factors by two QRs and a small SVD, without the m x n product.

    Args:
        change: [m, q] and [q, n].
        rank: Most singular values to keep; None: all above rounding.
    """
    left, right = (part.to(torch.float64) for part in change)
    left, right = padded_to(left, right, 1)  # if there are no components
    u, s, vt = truncated_product(left, right, left.shape[1])
    floor = torch.finfo(torch.float64).eps * max(*left.shape, *right.shape) * float(s[0])
    return _kept(u, s, vt, floor, rank)


def factors_of_difference(new: torch.Tensor, old: torch.Tensor, rank: int | None) -> ChangeFactors:
    """Factor the difference of two matrices [m, n] by an SVD.

    Singular values below the rounding of ``new`` to its precision are omitted.
    """
    u, s, vt = torch.linalg.svd(new.double() - old.double(), full_matrices=False)
    floor = torch.finfo(new.dtype).eps * float(torch.linalg.norm(new.double()))
    return _kept(u, s, vt, floor, rank)


def _kept(
    u: torch.Tensor, s: torch.Tensor, vt: torch.Tensor, floor: float, rank: int | None
) -> ChangeFactors:
    whole = int((s > floor).sum())
    k = whole if rank is None else min(rank, whole)
    left, right = fix_signs(u[:, :k], vt[:k])
    root = s[:k].sqrt()
    left_out, size = (float(torch.linalg.vector_norm(part)) for part in (s[k:], s))
    return ChangeFactors(
        left * root, root[:, None] * right, whole, left_out / size if size else 0.0
    )
