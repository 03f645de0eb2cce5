"""A trained model with all that an export says of it."""

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

ExportRecord = dict[str, object]  # what an export says of itself, in plain JSON


@dataclass(frozen=True)
class TrainedModel:
    """A model, where it began, and how it got from there to where it is.

    Attributes:
        model: With the weights W_T; on the CPU, in evaluation mode.
        start: W_0, by the names of parameters.
        targets: Adapted matrices: weight name -> its (out, in) view.
        dense: Parameters trained in full beside them (a head, biases): never truncated.
        changes: Of weights whose change is known by its factors: weight name -> ([m, q], [q, n]),
            float64. Of other weights the difference is all that is known.
        magnitudes: Row lengths M [m] by weight, where rows are rescaled (DoRA): then W_T is
            ``diag(M / ||V||) V`` with V = W_0 + change.
        source: What ``from_pretrained`` takes for the model that the run began from; None: there is
            none, or the run began elsewhere.
        tokenizer: Folder or hub name of its tokenizer, or a GGUF file; None: there is none.
        config: The config of the run, as plain values.
        facts: What the card says: JSON values by name.
        warnings: Sentences that whoever takes the model must know.
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
        """W_T, by the names of parameters."""
        return {n: p.detach() for n, p in self.model.named_parameters()}

    def at(self, weights: Mapping[str, torch.Tensor]) -> nn.Module:
        """Copy the model, with other weights where some are given."""
        model = copy.deepcopy(self.model)
        put_weights(model, weights)
        return model


@dataclass(frozen=True)
class Order:
    """How an export is to be written.

    Attributes:
        folder: Empty, to write to; it is renamed once it is whole.
        place: Where the files will be then.
        rank: With a PEFT adapter, the largest rank of a layer.
        check: Whether what was written is read back, by the library that it is for.
    """

    folder: Path
    place: Path
    rank: int | None
    check: bool


def put_weights(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Copy weights into the parameters of their names."""
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
    """Tell whether a model has the configuration and the methods of transformers' models."""
    return hasattr(model, "config") and hasattr(model, "save_pretrained")


@dataclass(frozen=True)
class ChangeFactors:
    """The change of one matrix as the product of two factors.

    Attributes:
        left: [m, k], float64.
        right: [k, n], float64.
        rank: Rank of the whole change, as far as its precision shows it.
        error: Frobenius norm of what is left out, over that of the whole change.
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
    """Compress a product of factors by two QRs and a small SVD; the m x n product is not formed.

    Args:
        change: [m, q] and [q, n].
        rank: Singular values to keep at most; None: all that are not rounding.
    """
    left, right = (part.to(torch.float64) for part in change)
    left, right = padded_to(left, right, 1)  # where there are no components
    u, s, vt = truncated_product(left, right, left.shape[1])
    floor = torch.finfo(torch.float64).eps * max(*left.shape, *right.shape) * float(s[0])
    return _kept(u, s, vt, floor, rank)


def factors_of_difference(new: torch.Tensor, old: torch.Tensor, rank: int | None) -> ChangeFactors:
    """Factor the difference of two matrices [m, n], of which no factors are known, by an SVD.

    Singular values below what rounding ``new`` to its precision makes are left out.
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
