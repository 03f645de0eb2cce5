"""Hold samples as tables of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import Any, Self

import torch


@dataclass(frozen=True)
class TensorContainer:
    """Base of objects that hold tensors, directly, in dicts or in other such objects."""

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> Self:
        """Move every tensor to a device; floating ones take ``dtype`` when given."""

        def moved(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: moved(each) for name, each in value.items()}
            if isinstance(value, torch.Tensor):
                return value.to(device, dtype if value.is_floating_point() else None)
            return value.to(device, dtype) if isinstance(value, TensorContainer) else value

        return replace(self, **{f.name: moved(getattr(self, f.name)) for f in fields(self)})


@dataclass(frozen=True)
class Samples(TensorContainer):
    """A table of samples held as tensors.

    ``inputs`` maps the model's argument names to tensors [N, ...]; the single name ``"x"`` is
    passed by position. ``target`` is [N] (classes, int64) or [N, ...] (regression, tokens).
    ``beside`` holds tensors that no model receives, [N, ...]: the possible answers to a question
    (`fedraclora.data.encoders.chat.padded`).
    """

    inputs: dict[str, torch.Tensor]
    target: torch.Tensor
    beside: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.target.shape[0])

    @classmethod
    def join(cls, parts: Sequence[Samples]) -> Samples:
        """Concatenate tables of the same inputs."""
        names = parts[0].inputs
        inputs = {name: torch.cat([part.inputs[name] for part in parts]) for name in names}
        return cls(inputs, torch.cat([part.target for part in parts]))

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Inputs by name, and the target as ``"target"``."""
        return self.inputs | {"target": self.target}

    def mapped(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Samples:
        """Apply a function to every tensor."""
        inputs, beside = (
            {n: change(t) for n, t in of.items()} for of in (self.inputs, self.beside)
        )
        return Samples(inputs, change(self.target), beside)

    def take(self, rows: torch.Tensor) -> Samples:
        """Select rows (int64 [n]) into a new table."""
        return self.mapped(lambda t: t.index_select(0, rows))

    @cached_property
    def lengths(self) -> torch.Tensor | None:
        """Return the length of each sample without padding at its end, int64 [N].

        From ``attention_mask`` [N, T]; None without one, since padding is then unknown.
        """
        mask = self.inputs.get("attention_mask")
        if mask is None or mask.dim() != 2:
            return None
        place = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        return (place * (mask != 0)).amax(dim=1)

    @cached_property
    def packed(self) -> torch.Tensor | None:
        """Count the conversations in each sample, int64 [N], each of which begins at position 0.

        From ``position_ids`` [N, T]; None without them: then a sample is one conversation.
        """
        places = self.inputs.get("position_ids")
        return None if places is None else (places == 0).flatten(1).sum(dim=1).clamp(min=1)

    @property
    def padded(self) -> int:
        """Return the tokens of every sample with padding; 0 without ``attention_mask``."""
        mask = self.inputs.get("attention_mask")
        return 0 if mask is None or mask.dim() != 2 else mask.shape[1]

    def trim(self, length: int | None = None) -> Samples:
        """Cut every sample to its first ``length`` tokens (views, nothing is copied).

        None: the length of the longest of these samples, for which the device is waited for.

        The removed tokens must be padding, or belong to samples that the caller masks: then the cut
        changes outputs only by rounding, since attention gives padding a weight of exactly zero.
        """
        whole = self.padded
        if length is None:
            length = 0 if self.lengths is None else int(self.lengths.max())
        if not 0 < length < whole:
            return self
        inputs = {
            k: v[:, :length] if v.dim() > 1 and v.shape[1] == whole else v
            for k, v in self.inputs.items()
        }
        tokens = self.target.dim() == 2 and self.target.shape[1] == whole
        tokens = tokens and not self.target.is_floating_point()
        return Samples(inputs, self.target[:, :length] if tokens else self.target, self.beside)

    def clone(self) -> Samples:
        """Copy into memory allocated by torch, whose alignment is always the same.

        numpy's is not, and matrix products round by alignment: a metric could differ in its last
        digit from one process to the next.
        """
        return self.mapped(torch.clone)
