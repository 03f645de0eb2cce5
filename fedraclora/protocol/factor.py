"""Describe a factor of an adapter: its value, and whether clients train it.

A frozen factor, or the start of a trained one, is one of

    numbers     that are sent: a matrix, or [K, rows, cols] with one for each client
    a drawing   from a seed, of which 8 bytes are sent
    computed    F = C [T; D]: T the factor that the last link trained, D a drawing; rows of F, T, D

C is small, r x (p + r) for a T of p rows; F would be r d numbers. Every copy of the base weights
has T from the last merge: `Term.keep` says which factor stays beside the weight, and a copy that
fetches the whole weight receives T, too. So a basis that the server computes from earlier merges
costs only C, and a singular value decomposition, which rounds differently on other machines, is
computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field, replace

import torch

from fedraclora.errors import ConfigError, WireError
from fedraclora.sketch import SketchSpec
from fedraclora.tree import Tree

LABELS = ("B", "R", "A")  # factors in the order of their product
SEED_BYTES = 8
OUTER = "outer"  # metadata of a field: its numbers have the kind of the object that contains it
PAST = "/past"
FROZEN = "frozen/"  # prefix of kept factors; the rest is the name of the factor


@dataclass(frozen=True)
class Factor:
    """Describe one factor of a product, or another trained tensor; see `of` and `to_train`.

    Attributes:
        numbers: The sent numbers: [*shape], or [K, *shape].
        sketch: The drawing; for a computed factor D, with the factor's side.
        count: Consecutive drawings from that one on, rows below rows (left: columns by columns).
        coefficients: C, float64 [r, p + rank of the drawing].
        past: T, [p, n] of a right factor or [m, p] of a left one; None after reading from a message
            or a file, until base weights provide it (`beside`).
        shape: Shape without the axis of clients.
        trained: Whether clients train it; without a given start, a factor starts at zero and a
            parameter at the replica's value.
        main: True for the method's own tensors (step size ``local.lr``), False for the head and
            biases beside them (``local.full_lr``).
        upload: False for personal tensors, which stay at the client.
    """

    numbers: torch.Tensor | None = field(default=None, metadata={"kind": OUTER})
    sketch: SketchSpec | None = None
    count: int = 1
    coefficients: torch.Tensor | None = None
    past: torch.Tensor | None = field(default=None, metadata={"written": False})
    shape: tuple[int, ...] = ()
    trained: bool = False
    main: bool = True
    upload: bool = True

    def __post_init__(self) -> None:
        """Set the shape of a frozen factor; trained ones have it already."""
        if self.trained or self.shape:
            return
        shape: tuple[int, ...] = ()
        if self.numbers is not None:
            shape = tuple(self.numbers.shape[1:] if self.numbers.dim() == 3 else self.numbers.shape)
        elif self.sketch is not None:
            C, rows, dim = self.coefficients, self.sketch.rank * self.count, self.sketch.dim
            rows = rows if C is None else len(C)
            shape = (rows, dim) if self.sketch.side == "right" else (dim, rows)
        object.__setattr__(self, "shape", shape)

    @classmethod
    def of(cls, given: FactorLike) -> Factor:
        """Build a factor from a tensor, which is sent, or a sketch, which is sent as its seed.

        Raises:
            ConfigError: If it is neither.

        Example:
            >>> Factor.of(torch.ones(2, 3)).floats, Factor.of(torch.ones(2, 3)).exact_bytes
            (6, 0)
            >>> drawn = Factor.of(SketchSpec("gaussian", "right", rank=2, dim=3, seed=7, index=0))
            >>> drawn.shape, drawn.floats, drawn.exact_bytes
            ((2, 3), 0, 8)
        """
        match given:
            case Factor():
                return given
            case SketchSpec():
                return cls(sketch=given)
            case torch.Tensor():
                return cls(given)
        raise ConfigError(
            f"a method gave a {type(given).__name__} for a factor, expected a tensor, a drawing "
            "(now.sketch) or what clients train (layer.trained)"
        )

    @property
    def per_client(self) -> bool:
        """Return whether each client has its own value, along a leading axis K."""
        return self.numbers is not None and self.numbers.dim() > len(self.shape)

    @property
    def blank(self) -> bool:
        """Return whether no starting value is given."""
        return self.numbers is None and self.sketch is None

    @property
    def drawing(self) -> SketchSpec | None:
        """Return the sketch of a frozen factor; None if it is not only drawn from a seed."""
        return None if self.trained or self.coefficients is not None else self.sketch

    @property
    def floats(self) -> int:
        """Return the number of floats sent for it; a seed has none."""
        sent = self.numbers if self.coefficients is None else self.coefficients
        return 0 if sent is None else sent.numel()

    @property
    def exact_bytes(self) -> int:
        """Return the bytes sent without quantization: a seed and coefficients."""
        seed = 0 if self.sketch is None else SEED_BYTES
        return seed + (0 if self.coefficients is None else self.coefficients.nbytes)

    def with_numbers(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Factor:
        """Return a copy with its numbers, if any, replaced."""
        return self if self.numbers is None else replace(self, numbers=change(self.numbers))

    def with_past(self, past: torch.Tensor | None) -> Factor:
        """Fill in T, the factor of the last merge, if it is needed and missing."""
        known = self.coefficients is None or self.past is not None
        return self if known else replace(self, past=past)

    def opening(self) -> torch.Tensor | None:
        """Return the starting value, as `draw` does; None if none is given."""
        return None if self.blank else self.draw()

    def draw(self) -> torch.Tensor:
        """Compute the value, which you must not modify.

        Returns:
            Given numbers unchanged; else float64 on the CPU.

        Raises:
            WireError: If T is missing, or its shape does not fit the coefficients.
        """
        if self.numbers is not None:
            return self.numbers
        if self.sketch is None:
            return torch.zeros(self.shape, dtype=torch.float64)
        if self.coefficients is not None:
            return self._computed(self.coefficients, self.sketch)
        if self.count == 1:
            return self.sketch.draw()
        first = self.sketch
        each = [replace(first, index=first.index + j).draw() for j in range(self.count)]
        return torch.cat(each, dim=0 if first.side == "right" else 1)

    def _computed(self, coefficients: torch.Tensor, drawing: SketchSpec) -> torch.Tensor:
        if self.past is None:
            raise WireError(
                "a frozen factor is to be computed from what the last link trained, but the base "
                "weights here came without that; they must be sent whole"
            )
        past, drawn = _rows(self.past, drawing)
        wanted = coefficients.shape[1] - len(drawn), drawn.shape[1]
        if tuple(past.shape) != wanted:
            raise WireError(
                f"a frozen factor is to be computed from {wanted[0]} rows of {wanted[1]} "
                f"numbers that the last link trained, but it trained {tuple(past.shape)}"
            )
        rows = coefficients @ torch.cat([past, drawn])
        return rows if drawing.side == "right" else rows.mT.contiguous()


FactorLike = torch.Tensor | SketchSpec | Factor


def to_train(
    shape: tuple[int, ...],
    start: FactorLike | None = None,
    *,
    main: bool = True,
    upload: bool = True,
) -> Factor:
    """Describe a tensor that clients train.

    Args:
        shape: Its shape, without the axis of clients.
        start: Where it starts; None: a factor at zero, a parameter at the replica's value.
        main: As in `Factor`.
        upload: As in `Factor`.
    """
    known = Factor() if start is None else Factor.of(start)
    return replace(known, shape=shape, trained=True, main=main, upload=upload)


def combined(rows: torch.Tensor, past: torch.Tensor, drawing: SketchSpec) -> Factor:
    """Write rows [r, d], float64, in the span of T and D as their linear combination.

    If T and D are linearly dependent, C is the solution of least norm.
    """
    basis = torch.cat(_rows(past, drawing)).mT
    found: torch.Tensor = torch.linalg.lstsq(basis, rows.mT, driver="gelsd").solution
    return Factor(sketch=drawing, coefficients=found.mT.contiguous(), past=past)


def past_name(weight: str) -> str:
    """Return the name in the base weights of the factor that the last merge trained."""
    return weight + PAST


def weight_of(name: str) -> str | None:
    """Return the weight that a name from `past_name` belongs to; None for any other name."""
    return name.removesuffix(PAST) if name.endswith(PAST) else None


def adapted_weight(name: str, weights: Container[str]) -> str | None:
    """Return the weight that a factor's name belongs to; None if it is not a factor.

    Example:
        >>> adapted_weight("fc.weight/B", ["fc.weight"]), adapted_weight("fc.magnitude", [""])
        ('fc.weight', None)
    """
    weight, _, label = name.rpartition("/")
    return weight if weight in weights and label in LABELS else None


def as_rows(matrix: torch.Tensor, label: str) -> torch.Tensor:
    """Transpose B so that its components are rows, as those of A are; and back."""
    return matrix.mT if label == "B" else matrix


def label_of(drawing: SketchSpec) -> str:
    """Return the label of a factor from the side of its sketch."""
    return "A" if drawing.side == "right" else "B"


def _rows(past: torch.Tensor, drawing: SketchSpec) -> tuple[torch.Tensor, torch.Tensor]:
    """Return T and D with their components as rows, float64, on the CPU."""
    label = label_of(drawing)
    return as_rows(past.to("cpu", torch.float64), label), as_rows(drawing.draw(), label)


def pasts(base: Mapping[str, torch.Tensor]) -> Tree:
    """Return the factors of the last merge from base weights, by weight."""
    found = ((weight_of(name), tensor) for name, tensor in base.items())
    return {weight: tensor for weight, tensor in found if weight is not None}
