"""Handle named tensors, and pack them into one flat vector.

A `Tree` is a plain dict from names to tensors. On the wire it is one flat array, because a
Flower deployment pays per array (500 small arrays cost 126 s a round where one costs 9).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import groupby, zip_longest
from math import prod

import numpy as np
import torch
from torch import nn

from fedraclora.errors import ShapeError
from fedraclora.narrow_weight import QuantisedWeight, in_parts

Tree = dict[str, torch.Tensor]
LARGE = 1 << 18  # numbers of a tensor from which unneeded copies are avoided
ALIGNED = 64  # bytes: the alignment of PyTorch's own allocator


@cache
def wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of trained tensors beside weights of a type: float32 or wider.

    Example:
        >>> wide(torch.bfloat16), wide(torch.float64)
        (torch.float32, torch.float64)
    """
    return torch.promote_types(dtype, torch.float32)


def join_columns(parts: Sequence[tuple[Tree, int]]) -> Tree:
    """Join columns of numbers of several groups: NaN for a group that does not have one.

    Args:
        parts: The columns of each group, float64 [K] by name, and K.
    """
    gaps = [torch.full((size,), torch.nan, dtype=torch.float64) for _, size in parts]
    each = [(columns, gap) for (columns, _), gap in zip(parts, gaps, strict=True)]
    names = dict.fromkeys(name for columns, _ in parts for name in columns)
    return {n: torch.cat([columns.get(n, gap) for columns, gap in each]) for n in names}


def parameters(base: Mapping[str, torch.Tensor]) -> Tree:
    """Select the parameters of a replica's tensors: they have no "/" in their names."""
    return {name: tensor for name, tensor in base.items() if "/" not in name}


def widened(tree: Tree) -> Tree:
    """Convert tensors to float32 or wider; wide ones are not copied."""
    return {name: tensor.to(wide(tensor.dtype)) for name, tensor in tree.items()}


def weights_of(model: nn.Module) -> Tree:
    """Return the weights of a model, sharing its memory: do not write into either.

    Weights that are not aligned to `ALIGNED` bytes, as in a memory-mapped file, are copied:
    products round by alignment.
    """
    held = {name: parameter.detach() for name, parameter in model.named_parameters()}
    return {name: t if _is_aligned(t) else t.clone() for name, t in held.items()}


def point_at(parameters: Mapping[str, torch.Tensor], weights: Tree) -> None:
    """Point the parameters of a model at weights without a copy; their old memory is released."""
    for name, parameter in parameters.items():
        weight = weights[name]
        if isinstance(parameter, QuantisedWeight) and isinstance(weight, QuantisedWeight):
            parameter.codes, parameter.scale = weight.codes, weight.scale
        else:
            parameter.data = weight


def _is_aligned(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, QuantisedWeight) or tensor.data_ptr() % ALIGNED == 0


@dataclass(frozen=True)
class Layout:
    """Names and shapes of a tree, in packing order."""

    shapes: tuple[tuple[str, tuple[int, ...]], ...]

    @classmethod
    def of(cls, tree: Mapping[str, torch.Tensor], skip: int = 0) -> Layout:
        """Read the layout of ``tree``, leaving out the first ``skip`` axes (1 for a cohort)."""
        return cls(tuple((name, tuple(t.shape[skip:])) for name, t in tree.items()))

    @cached_property
    def size(self) -> int:
        """Numbers in the flat vector."""
        return sum(self.sizes)

    @cached_property
    def sizes(self) -> list[int]:
        """Numbers of each tensor."""
        return [prod(shape) for _, shape in self.shapes]

    def pack(self, tree: Mapping[str, torch.Tensor], lead: int = 0) -> torch.Tensor:
        """Concatenate the tensors of ``tree`` into [*leading axes, size].

        Args:
            tree: Tensors with the names of the layout and its shapes after ``lead`` axes.
            lead: Number of leading axes that are kept (1 for a cohort [K, ...]).

        Returns:
            A new tensor; its dtype is that of the first tensor.

        Raises:
            ShapeError: If the names or the shapes differ from the layout.
        """
        if Layout.of(tree, lead) != self:
            raise ShapeError(f"cannot pack: {difference(Layout.of(tree, lead), self)}")
        if not self.shapes:
            return torch.empty(0)
        first = next(iter(tree.values()))
        leading = first.shape[:lead]
        packed = first.new_empty(*leading, self.size)
        # Copies each tensor once; reshaping and joining would copy it twice.
        parts = packed.split(self.sizes, dim=-1)
        for part, tensor in zip(parts, tree.values(), strict=True):
            part.view((*leading, *tensor.shape[lead:])).copy_(tensor)
        return packed

    def pieces(self, tree: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """Return the columns that `pack` joins, side by side; large tensors are not copied.

        Args:
            tree: As for `pack`, with one leading axis [K, ...].

        Returns:
            One [K, p] or more; pieces of several tensors are new.

        Raises:
            ShapeError: If the names or the shapes differ from the layout.
        """
        if Layout.of(tree, 1) != self:
            raise ShapeError(f"cannot pack: {difference(Layout.of(tree, 1), self)}")
        found = []
        for large, group in groupby(self.shapes, lambda pair: prod(pair[1]) >= LARGE):
            part = Layout(tuple(group))
            own = {name: tree[name] for name, _ in part.shapes}
            if large:
                columns = zip(own.values(), part.sizes, strict=True)
                found += [t.reshape(len(t), size) for t, size in columns]
            else:
                found.append(part.pack(own, lead=1))
        return tuple(found) or (torch.empty(0),)

    def unpack(self, flat: torch.Tensor) -> Tree:
        """Cut [*leading axes, size] into named views; the inverse of `pack`.

        Raises:
            ShapeError: If the last axis does not have ``size`` numbers.
        """
        if not self.shapes:
            return {}
        if flat.shape[-1] != self.size:
            raise ShapeError(
                f"cannot unpack numbers of shape {tuple(flat.shape)}: the last axis must have "
                f"{self.size}"
            )
        parts = flat.split(self.sizes, dim=-1)
        lead = flat.shape[:-1]
        return {
            name: part.reshape((*lead, *shape))
            for (name, shape), part in zip(self.shapes, parts, strict=True)
        }


def difference(found: Layout, expected: Layout) -> str:
    """Describe the first difference of a layout from the expected one, and count the differences.

    Example:
        >>> one = Layout((("w", (5, 2)), ("b", (5,))))
        >>> print(difference(one, Layout((("w", (2, 7)), ("b", (5,))))))
        w (5, 2), wanted is w (2, 7) (1 of 2 tensors differ)
    """
    pairs = list(zip_longest(found.shapes, expected.shapes))
    differ = [pair for pair in pairs if pair[0] != pair[1]]
    if not differ:
        return "nothing differs"
    came, asked = ("nothing" if each is None else f"{each[0]} {each[1]}" for each in differ[0])
    return f"{came}, wanted is {asked} ({len(differ)} of {len(pairs)} tensors differ)"


def below(tensors: Mapping[str, torch.Tensor], prefix: str) -> Tree:
    """Select the tensors whose names begin with a prefix, and strip it."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def to_numpy(tensor: torch.Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    """Copy a tensor on any device to a contiguous numpy array."""
    array: np.ndarray[tuple[int, ...], np.dtype[np.generic]] = (
        tensor.detach().cpu().contiguous().numpy()
    )
    return array


def digest(tree: Mapping[str, torch.Tensor]) -> str:
    """Hash names, dtypes, shapes and bytes of a tree (SHA-256, hexadecimal).

    Example:
        >>> digest({"w": torch.zeros(2)}) == digest({"w": torch.zeros(2)})
        True
        >>> digest({"w": torch.zeros(2)}) == digest({"w": torch.zeros(1, 2)})
        False
    """
    h = hashlib.sha256()
    for name, tensor in sorted(in_parts(tree).items()):
        h.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)  # any dtype
        h.update(raw.numpy().tobytes())
    return h.hexdigest()


def fingerprint(tree: Mapping[str, torch.Tensor]) -> int:
    """Sum the bits of all tensors as integers, mixed with their names, for a fast equality check.

    It runs at the speed of memory, on any device, in any order of sums. Trees that differ by
    accident (one last bit) have different fingerprints except with a chance of 2^-64 per tensor.
    Empty tensors do not count. `digest` also detects intended changes.

    Example:
        >>> one = torch.ones(2)
        >>> fingerprint({"w": one}) == fingerprint({"w": one.clone()})
        True
        >>> fingerprint({"w": one}) == fingerprint({"w": one * (1 + 2**-23)})
        False
    """
    total = 0
    for name, tensor in sorted(in_parts(tree).items()):
        if not tensor.numel():
            continue
        raw = tensor.detach().contiguous().reshape(-1)
        narrow = torch.int8 if raw.nbytes % 4 else torch.int32
        words = raw.view(torch.int64 if raw.element_size() == 8 else narrow)
        key = f"{name}|{raw.dtype}|{tuple(tensor.shape)}|{int(words.sum(dtype=torch.int64))}"
        total ^= int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big")
    return total
