"""View the weight of every kind of layer as a matrix (out, in).

torch.nn.Linear stores (out, in); Hugging Face's Conv1D stores (in, out); a convolution stores
(out, in / groups, k, k), viewed as out x (in k k); an embedding stores (tokens, width), viewed
as it is.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import nn

from fedraclora.errors import ConfigError, ModelError, unknown


@dataclass(frozen=True)
class LayerView:
    """View a stored weight as a matrix of shape (out, in)."""

    kind: str  # linear | conv1d | conv | embedding
    shape: tuple[int, int]

    def matrix(self, stored: torch.Tensor) -> torch.Tensor:
        """View a stored weight as (out, in)."""
        if self.kind == "conv1d":
            return stored.mT
        return stored.reshape(self.shape)

    def stored(self, matrix: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Convert a matrix (out, in) back to the layout of ``like``."""
        if self.kind == "conv1d":
            return matrix.mT.contiguous()
        return matrix.reshape(like.shape)


def layer_kind(module: nn.Module) -> str | None:
    """Return the kind of a module whose weight can be adapted, or None."""
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.Conv2d):
        return "conv"
    if isinstance(module, nn.Embedding):
        return "embedding"
    # transformers' Conv1D, recognized by name: the core must work without transformers.
    return "conv1d" if type(module).__name__ == "Conv1D" and hasattr(module, "nf") else None


def is_batch_norm(module: nn.Module) -> bool:
    """Check whether a module is BatchNorm, of any number of dimensions."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm)  # noqa: SLF001


def layer_view(module: nn.Module) -> LayerView:
    """Return the matrix view of a module's weight.

    Raises:
        ModelError: If the module has no weight that can be adapted.
    """
    kind = layer_kind(module)
    if kind is None:
        raise ModelError(f"a {type(module).__name__} cannot be adapted")
    shape = tuple(module.weight.shape)  # type: ignore[arg-type]
    if kind == "conv1d":
        return LayerView(kind, (shape[1], shape[0]))
    return LayerView(kind, (shape[0], prod(shape[1:])))


def is_head(name: str, head: tuple[str, ...]) -> bool:
    """Check whether a parameter or module name lies in the head."""
    return any(name == h or name.startswith(f"{h}.") for h in head)


def matches(name: str, pattern: str) -> bool:
    """Match a dotted module name against one pattern, as PEFT does.

    A pattern is a shell pattern over the whole name, or the last part(s) of the name:
    ``query`` matches ``encoder.0.attention.query``.

    Example:
        >>> matches("layer.0.attention.query", "query")
        True
        >>> matches("layer.0.attention.query", "layer.*.query")
        True
        >>> matches("layer.0.key", "query")
        False
    """
    return name == pattern or name.endswith(f".{pattern}") or fnmatch.fnmatchcase(name, pattern)


def split_patterns(patterns: str | Sequence[str]) -> list[str]:
    """Split patterns into a list, from a list or from one text with commas.

    Raises:
        ConfigError: If one is empty.

    Example:
        >>> split_patterns("query, value") == split_patterns(["query", "value"])
        True
    """
    parts = [p.strip() for p in (patterns.split(",") if isinstance(patterns, str) else patterns)]
    if "" in parts:
        raise ConfigError(
            f"the list {patterns!r} has an empty pattern, which names no layer: name layers as in "
            "[query,value]"
        )
    return parts


def find_targets(
    model: nn.Module,
    pattern: str | Sequence[str],
    head: tuple[str, ...],
    left_out: Collection[str] = (),
) -> dict[str, LayerView]:
    """Find the matrices to adapt.

    Args:
        model: The network.
        pattern: ``all-linear`` (every Linear and Conv1D outside the head), ``all`` (also
            convolutions), or patterns (see `matches`): a list, or one text with commas.
        head: Name prefixes of the head, left out here; the head policy decides on it.
        left_out: Names of parameters that are no targets (`excluded`).

    Returns:
        Weight names in model order with their views.

    Raises:
        ConfigError: If a pattern matches no adaptable layer.
        ModelError: If a target's weight is tied to another layer.
    """
    named = {n: m for n, m in model.named_modules() if layer_kind(m) and not is_head(n, head)}
    wide = {"all-linear": {"linear", "conv1d"}, "all": {"linear", "conv1d", "conv"}}
    parts = split_patterns(pattern)
    if not parts:
        raise ConfigError(
            "targets is an empty list, which adapts nothing: name layers as in [query,value], take "
            "all-linear, or null for the model's own default"
        )
    if len(parts) == 1 and parts[0] in wide:
        chosen = {n: m for n, m in named.items() if layer_kind(m) in wide[parts[0]]}
        if not chosen and not any(layer_kind(m) for m in model.modules()):
            raise ModelError(
                f"target_modules={pattern}: the model has no layer that can be adapted"
            )
    else:
        for part in parts:
            if any(matches(n, part) for n, _ in model.named_modules() if is_head(n, head)):
                if not any(matches(n, part) for n in named):
                    raise ConfigError(
                        f"target_modules={pattern}: {part} is the head; head=lora, full, "
                        "frozen or personal decides how it is trained. Leave it out, or name "
                        "another layer as model.head"
                    )
            elif not any(matches(n, part) for n in named):
                raise ConfigError(
                    f"target_modules={pattern}: {unknown('target layer', part, named)}"
                )
        chosen = {n: m for n, m in named.items() if any(matches(n, part) for part in parts)}
    views = {
        weight_name(n): layer_view(m) for n, m in chosen.items() if weight_name(n) not in left_out
    }
    refuse_tied(model, list(views))
    return views


def weight_name(module: str) -> str:
    """Return the name of a module's weight; for a model of one layer, whose name is empty, too."""
    return f"{module}.weight" if module else "weight"


def parameters_of(names: Iterable[str], pattern: str) -> set[str]:
    """Return the parameters that a pattern matches, by their own names or by their layers'."""
    return {n for n in names if matches(n.rpartition(".")[0], pattern) or matches(n, pattern)}


def excluded(model: nn.Module, patterns: str | Sequence[str] | None) -> set[str]:
    """Return all names of the parameters that ``exclude_modules`` leaves out; tied ones too.

    A pattern matches parameters, their layers, and modules that hold such layers.

    Raises:
        ConfigError: If a pattern matches nothing.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    modules = [name for name, _ in model.named_modules() if name]
    found: set[int] = set()
    for part in split_patterns(patterns or ()):
        within = tuple(f"{name}." for name in modules if matches(name, part))
        hits = parameters_of(every, part) | {n for n in every if n.startswith(within)}
        if not hits:
            layers = sorted({n.rpartition(".")[0] or n for n in every})
            raise ConfigError(f"exclude_modules={patterns}: {unknown('layer', part, layers)}")
        found |= {id(every[n]) for n in hits}
    return {n for n, p in every.items() if id(p) in found}


def refuse_tied(model: nn.Module, names: Collection[str], *, is_head: bool = False) -> None:
    """Reject a weight to be trained that another layer shares.

    Args:
        model: The network.
        names: Names of weights.
        is_head: Whether they are the head's, of which ``head`` decides; else targets.

    Raises:
        ModelError: Naming both layers, and the key that leaves the weight out.
    """
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), []).append(name)
    for group in owners.values():
        tied = [n for n in names if n in group]
        if tied and len(group) > 1:
            key = f"exclude_modules=[{tied[0].rpartition('.')[0]}]"
            raise ModelError(
                f"{tied[0]} is tied to {', '.join(n for n in group if n != tied[0])}, and training "
                f"one of these layers would untie them. Set {'head=frozen' if is_head else key}"
            )
