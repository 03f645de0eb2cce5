"""One adapted matrix as a method sees it: what it has, what clients get, what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedraclora.errors import ConfigError
from fedraclora.lowrank.algebra import Product
from fedraclora.protocol.derived import Derived
from fedraclora.protocol.method import Draw, Factor, Trained
from fedraclora.rng import generator
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree

# A matrix, a drawing by its seed, or what is computed from the last link.
Value = torch.Tensor | SketchSpec | Derived
Factors = dict[str, Factor]  # of a layer, by label
LABELS = ("B", "R", "A")  # of factors, in the order of their product


def known(label: str, labels: Sequence[str] = LABELS) -> str:
    """Return the label of a factor.

    Raises:
        ConfigError: If no factor has it: nothing would read what it names.
    """
    if label in labels:
        return label
    raise ConfigError(
        f"a method speaks of the factor {label!r}; there are {', '.join(labels)}, of a product in "
        "this order"
    )


@dataclass(frozen=True)
class Layer:
    """One adapted matrix W, as a method sees it.

    Attributes:
        name: Of its weight.
        shape: (m, n): outputs and inputs.
        rank: r.
        scale: s.
        carried: The factors that live on from the last round, by label, in W's precision.
        link: Number of the link in progress.
        ends: Whether the link ends with this round.
        dtype: Precision of W.
        past: The factor that the last link trained, where that said so (`LayerUpdate.keep`), as
            replicas hold it.
    """

    name: str
    shape: tuple[int, int]
    rank: int
    scale: float
    carried: Tree
    link: int
    ends: bool
    dtype: torch.dtype
    past: torch.Tensor | None = None

    @property
    def m(self) -> int:
        """Outputs: the rows of W and of B."""
        return self.shape[0]

    @property
    def n(self) -> int:
        """Inputs: the columns of W and of A."""
        return self.shape[1]

    def trained(
        self,
        label: str,
        start: torch.Tensor | SketchSpec | None = None,
        *,
        rank: int | None = None,
        upload: bool = True,
    ) -> Trained:
        """Ask clients to train a factor.

        Args:
            label: ``B`` [m, r], ``A`` [r, n] or ``R`` [r, r].
            start: Where it starts if it is not carried; None: at zero.
            rank: r, if it is not that of the layer.
            upload: False for a factor that stays at the client.
        """
        r = self.rank if rank is None else rank
        shape = {"B": (self.m, r), "R": (r, r), "A": (r, self.n)}[known(label)]
        return Trained(shape, self.carried.get(label, start), upload=upload)


@dataclass(frozen=True)
class Round:
    """The round that is opened, and its drawings.

    Attributes:
        number: From 1.
        draw: The run's randomness.
    """

    number: int
    draw: Draw

    def generator(self, purpose: str, *keys: str | int) -> np.random.Generator:
        """Return a generator of the run's seed tree, for draws that the server alone makes."""
        return generator(self.draw.seed, purpose, *keys)

    def sketch(
        self,
        layer: Layer,
        label: str,
        kind: str,
        *,
        index: int = 0,
        rank: int | None = None,
        normalise: str = "none",
        blocks: str = "independent",
        density: float = 0.1,
        seed: int | None = None,
    ) -> SketchSpec:
        """Draw a factor of a layer: A [r, n], or B [m, r].

        Args:
            layer: The layer.
            label: ``A`` or ``B``.
            kind: A key of `fedraclora.sketch.SKETCHES`.
            index: Number of the drawing: another one is independent.
            rank: r, if it is not that of the layer.
            normalise: How rows are scaled (`fedraclora.sketch`).
            blocks: ``independent``, or ``cover`` (row blocks of one basis).
            density: Share of non-zero entries, of ``sparse_sign`` alone.
            seed: None: the layer's own.
        """
        return SketchSpec(
            kind=kind,
            side="right" if known(label, "BA") == "A" else "left",
            rank=layer.rank if rank is None else rank,
            dim=layer.n if label == "A" else layer.m,
            seed=self.draw.sketch_seed(layer.name) if seed is None else seed,
            index=index,
            blocks=blocks,
            normalise=normalise,
            density=density,
        )


@dataclass(frozen=True)
class LayerUpdate:
    """What a round makes of one layer. Products are without the scale s.

    Attributes:
        carried: Factors that live on, by label; drawings need not be carried.
        merged: Factors whose product is folded into W, times s; None: nothing is.
        aggregate: What stands for the mean of the clients' products in the error of the round;
            None: what is carried and what is merged, together.
        keep: Label, ``B`` or ``A``, of the merged factor from which the next link takes its frozen
            one (`fedraclora.protocol.derived`): a matrix, no drawing; None: it does not.
    """

    carried: Mapping[str, Value] = field(default_factory=dict)
    merged: tuple[Value, ...] | None = None
    aggregate: Product | None = None
    keep: str | None = None
