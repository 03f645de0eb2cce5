"""Choose which parameters a run trains, and at which rank; the same for all methods.

`head` and `bias` influence GLUE comparisons as much as the method does, and public repositories
treat them differently, so they are set once for all methods of a comparison.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from torch import nn
from typing_extensions import override

from fedraclora.errors import ConfigError, unknown
from fedraclora.lowrank.layers import (
    excluded,
    find_targets,
    is_head,
    layer_kind,
    layer_view,
    matches,
    parameters_of,
    refuse_tied,
    split_patterns,
    weight_name,
)
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.method import Plan

HEAD_POLICIES = ("lora", "full", "frozen", "personal")
BIAS_POLICIES = ("full", "frozen")
SHOWN, FORMS = 8, 3  # layers listed by name; more are grouped by the form of their names
FULL_RANK = "full"
Ranks = int | float | str | Mapping[str, int | float | str]


def make_plan(
    model: nn.Module,
    head: tuple[str, ...],
    *,
    target_modules: str | Sequence[str] = "all-linear",
    head_policy: str = "full",
    bias_policy: str = "frozen",
    modules_to_save: str | Sequence[str] | None = None,
    exclude_modules: str | Sequence[str] | None = None,
) -> Plan:
    """Choose which parameters are adapted and which are trained in full.

    Args:
        model: The network.
        head: Name prefixes of its final layer.
        target_modules: Pattern of adapted layers (`fedraclora.lowrank.layers.find_targets`).
        head_policy: ``lora`` (the head's weights are adapted like any target), ``full``
            (weights and biases of the head trained in full and averaged), ``frozen``, ``personal``
            (trained in full, and kept by each client).
        bias_policy: ``full`` (biases of adapted layers trained in full) or ``frozen``.
        modules_to_save: Patterns of further layers trained in full (convolutions, norms).
        exclude_modules: Patterns of layers that are neither adapted nor trained in full.

    Returns:
        The plan.

    Raises:
        ConfigError: For a frozen head if only one layer could be adapted, a personal head if there
            is none, or a pattern that matches nothing.
        ModelError: If a target, or a head that is trained, is tied to another layer.
    """
    if head_policy == "personal" and not head:
        raise ConfigError("head is personal, but this model has no head; use head=lora")
    modules = dict(model.named_modules())
    if head_policy == "frozen" and not head and len([*filter(layer_kind, modules.values())]) == 1:
        raise ConfigError(
            "head is frozen, but one layer alone can be adapted, and would be trained: use "
            "head=lora, or say which layer is the head with model.head=[NAME]"
        )
    parameters = [n for n, _ in model.named_parameters()]
    left_out = excluded(model, exclude_modules)
    views = find_targets(model, target_modules, head, left_out)
    if head_policy == "lora":
        heads = {n: m for n, m in modules.items() if is_head(n, head) and layer_kind(m)}
        views |= {weight_name(n): layer_view(m) for n, m in heads.items()}
    if head_policy != "frozen":
        every = [n for n, _ in model.named_parameters(remove_duplicate=False)]
        heads_all = [n for n in every if is_head(n, head) and n not in left_out]
        refuse_tied(model, heads_all, is_head=True)
    heads_own = {n for n in parameters if is_head(n, head)}
    local = heads_own if head_policy == "personal" else set()
    full = set(heads_own) if head_policy == "full" else set()
    if bias_policy == "full":
        full |= {n for n in parameters if n.endswith("bias") and f"{n[:-4]}weight" in views}
    if modules_to_save is not None:
        full |= _matching_parameters(parameters, modules_to_save) - local
    full, local = full - left_out, local - left_out
    views = {n: views[n] for n in parameters if n in views and n not in {*full, *left_out}}
    if not (views or full):
        raise ConfigError(
            f"nothing is left to train with target_modules={target_modules}, head={head_policy}, "
            f"bias={bias_policy}, modules_to_save={modules_to_save}: head=lora trains the head, "
            "target_modules=all adapts "
            "convolutions too, target_modules=[NAME] an embedding, modules_to_save=[NAME] trains "
            "a layer in full"
        )
    weights = [
        n
        for n in parameters
        if not (n in full or n in left_out or n.endswith("bias"))
        and not (is_head(n, head) and n not in views)
    ]
    shapes = {n: tuple(p.shape) for n, p in model.named_parameters()}
    return Plan(
        targets=views,
        dense=tuple(n for n in parameters if n in full),
        local=tuple(n for n in parameters if n in local),
        weights=tuple(weights),
        shapes=shapes,
    )


def _matching_parameters(parameters: list[str], patterns: str | Sequence[str]) -> set[str]:
    """Return the parameters of the layers that patterns match."""
    found: set[str] = set()
    for part in split_patterns(patterns):
        if not (hits := parameters_of(parameters, part)):
            layers = sorted({n.rpartition(".")[0] for n in parameters})
            raise ConfigError(f"modules_to_save={patterns}: {unknown('layer', part, layers)}")
        found |= hits
    return found


@dataclass(frozen=True)
class Rank:
    """Hold the rank of one layer, with a note if it differs from the requested one."""

    value: int
    note: str | None = None


def check_rank(ranks: Ranks) -> None:
    """Reject a ``method.rank`` that is invalid for every layer.

    Raises:
        ConfigError: If a number is not positive, a fraction is 1 or more, or a mapping is empty.
    """
    if ranks == {}:
        raise ConfigError("method.rank={}: expected ranks by layer")
    for rank in ranks.values() if isinstance(ranks, Mapping) else [ranks]:
        resolve_rank(rank, 1, "any layer", cap=True)


def check_patterns(ranks: Ranks, targets: Iterable[str]) -> None:
    """Reject a mapping of ranks with a pattern that matches no adapted layer.

    Raises:
        ConfigError: Naming the pattern.
    """
    names = [name.removesuffix(".weight") for name in targets]
    for pattern in ranks if isinstance(ranks, Mapping) else ():
        if not any(pattern == f"{name}.weight" or matches(name, pattern) for name in names):
            raise ConfigError(f"method.rank: {unknown('adapted layer', pattern, names)}")


def own_rank(ranks: Mapping[str, int | float | str], name: str) -> int | float | str:
    """Return a layer's rank from a mapping: by its weight's name, else by the first match.

    Args:
        ranks: By weight name, or by pattern as in `fedraclora.lowrank.layers.matches`.
        name: The weight's name.

    Raises:
        ConfigError: If no pattern matches the layer.

    Example:
        >>> own_rank({"query": 4, "*": 2}, "layer.0.query.weight")
        4
    """
    if name in ranks:
        return ranks[name]
    layer = name.removesuffix(".weight")
    for pattern, rank in ranks.items():
        if matches(layer, pattern):
            return rank
    whole = ", ".join(f"{pattern}: {rank}" for pattern, rank in [*ranks.items(), ("*", rank)])
    raise ConfigError(
        f"method.rank has no pattern that fits the layer {layer}; there are {', '.join(ranks)}: "
        f"add one for all others, as in 'method.rank={{{whole}}}'"
    )


def rank_notes(ranks: Iterable[Rank]) -> tuple[str, ...]:
    """Collect the notes on ranks that differ from the requested ones."""
    return tuple(rank.note for rank in ranks if rank.note is not None)


def resolve_rank(
    rank: Ranks, dim: int, name: str, *, cap: bool, parts: int = 1, of: str = "parts"
) -> Rank:
    """Convert ``method.rank`` to the rank of one layer.

    Args:
        rank: An integer, ``full`` (the drawn side's dimension), or a fraction of that (a float
            below 1); or these by layer (`own_rank`).
        dim: The drawn side's dimension (n for a right sketch, m for a left one).
        name: The layer, for messages.
        cap: Cut an integer rank at ``dim`` with a note, rather than refuse it.
        parts: Number of factors of this rank that share the dimension, an equal part each.
        of: A description of the parts, and the keys of their number, for messages.

    Returns:
        The rank, at least 1 and at most ``dim // parts``.

    Raises:
        ConfigError: If the rank is not positive, or above ``dim // parts`` without ``cap``.

    Example:
        >>> resolve_rank(112, 784, "fc1", cap=True).value
        112
        >>> resolve_rank(0.25, 10, "fc2", cap=True).value
        2
        >>> resolve_rank("full", 10, "fc2", cap=True).value
        10
    """
    if isinstance(rank, Mapping):
        rank = own_rank(rank, name)
    whole, dim = dim, dim // parts
    if rank == FULL_RANK:
        return Rank(max(1, dim))
    if isinstance(rank, str | bool) or not math.isfinite(rank) or rank <= 0:
        raise ConfigError(
            f"method.rank={rank!r}: expected a positive integer, a fraction below 1 or full"
        )
    if isinstance(rank, float):
        if rank >= 1:
            raise ConfigError(
                f"method.rank={rank}: a number with a dot is a fraction below 1. Write a rank "
                "without a dot, or method.rank=full for full rank"
            )
        return Rank(max(1, round(rank * dim)))
    shared = f": its {whole} dimensions are shared by {parts} {of}" if parts > 1 else ""
    if rank > dim and not cap:
        fewer = ", take fewer of them," if shared else ""
        raise ConfigError(
            f"method.rank={rank}, but {name} has only {dim} on the drawn side{shared}; "
            f"lower the rank{fewer} or set method.cap=true"
        )
    if rank > dim:
        return Rank(dim, f"rank of {name} capped at {dim} (asked: {rank}){shared}")
    return Rank(rank)


def resolve_scale(alpha: float | str, rank: int, *, rslora: bool = False) -> float:
    """Compute the scale of an adapter: ``alpha / rank``, or ``alpha / sqrt(rank)``.

    Args:
        alpha: A number, or ``auto``: s = 1 whatever the rank.
        rank: The adapter's rank.
        rslora: Divide by the root, so that an adapter's update does not shrink as its rank grows.

    Raises:
        ConfigError: If alpha is not positive and finite.

    References:
        Kalajdzievski, *A rank stabilization scaling factor for fine-tuning with LoRA*, 2023,
        arXiv 2312.03732.

    Example:
        >>> resolve_scale(8.0, 16), resolve_scale(8.0, 16, rslora=True)
        (0.5, 2.0)
    """
    if alpha == "auto":
        return 1.0
    if isinstance(alpha, str) or not math.isfinite(alpha) or alpha <= 0:
        raise ConfigError(f"method.alpha={alpha}: expected a positive finite number or auto")
    if rslora:
        return alpha / math.sqrt(rank)
    return alpha / rank


def untrained(model: nn.Module, trained: Collection[str]) -> tuple[list[str], list[str]]:
    """Return what a run does not train: whole layers, and single parameters of other layers.

    Args:
        model: The network.
        trained: Names of the parameters that are trained or adapted (`trained_names`). A tied
            parameter counts as trained by either of its names.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
        >>> untrained(model, {"2.weight"})
        (['0'], ['2.bias'])
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    moved = {id(p) for n, p in every.items() if n in trained}
    layers, parameters = [], []
    for name, layer in model.named_modules():
        own = dict(layer.named_parameters(prefix=name, recurse=False))
        still = [n for n, p in own.items() if id(p) not in moved]
        if name and still and len(still) == len(own):
            layers.append(name)
        else:
            parameters += still
    return layers, parameters


def trained_names(sent: RoundInstructions, plan: Plan) -> set[str]:
    """Return the parameters that clients adapt or train, by the instructions of the first round."""
    within = sent.program.trained_model(sent, plan)  # directions move weights that are not sent
    return {*plan.targets, *plan.local, *within.adapters, *within.dense}


def thawed(model: nn.Module, plan: Plan) -> list[str]:
    """Return the parameters that a run trains although their ``requires_grad`` is False.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2)).requires_grad_(False)
        >>> thawed(model, make_plan(model, ("1",), head_policy="frozen"))
        ['0.weight']
    """
    trained = {*plan.targets, *plan.dense, *plan.local}
    return [n for n, p in model.named_parameters() if n in trained and not p.requires_grad]


@dataclass(frozen=True)
class TrainedPart:
    """Summarize what clients train of a model; its string is for people.

    Attributes:
        layers: Names of adapted layers.
        ranks: The least and the greatest rank among them, or both as one.
        dense: Names of parameters that are trained in full.
        everything: Whether these are all.
        numbers: Numbers that a client trains.
        total: Numbers of the model.
    """

    layers: Sequence[str]
    ranks: Sequence[int]
    dense: Sequence[str]
    everything: bool
    numbers: int
    total: int

    @override
    def __str__(self) -> str:
        parts = []
        if self.layers:
            ranks = " to ".join(map(str, self.ranks))
            parts.append(f"rank {ranks} of {some_of(self.layers, 'layer')}")
        if self.dense:
            whole = "all of it" if self.everything else some_of(self.dense, "parameter")
            parts.append(f"in full {whole}")
        count = f"{self.numbers:,} numbers a client, the model has {self.total:,}"
        return f"{'; '.join(parts)}: {count}"


def trained_of(sent: RoundInstructions, shapes: Mapping[str, tuple[int, ...]]) -> TrainedPart:
    """Summarize what clients train in the first round: ranks, layers, and how many numbers.

    Args:
        sent: Of the round.
        shapes: Of the model's parameters, by name.

    Example:
        >>> from fedraclora.protocol.instructions import Adapter
        >>> from fedraclora.protocol.factor import to_train
        >>> adapter = Adapter({"B": to_train((6, 2)), "A": to_train((2, 4))}, 1.0)
        >>> sent = RoundInstructions({"fc.weight": adapter}, {"fc.bias": to_train((6,))})
        >>> str(trained_of(sent, {"fc.weight": (6, 4), "fc.bias": (6,)}))
        'rank 2 of layer fc; in full parameter fc.bias: 26 numbers a client, the model has 30'
    """
    ranks = {}
    for weight, adapter in sent.adapters.items():
        first, *others = adapter.factors.values()
        if any(factor.trained for factor in (first, *others)):
            # Components, possibly more than the dimension of the weight.
            ranks[weight.removesuffix(".weight")] = [first.shape[1], *(f.shape[0] for f in others)]
    ends = [min(map(min, ranks.values())), max(map(max, ranks.values()))] if ranks else []
    return TrainedPart(
        [*ranks],
        [*dict.fromkeys(ends)],
        [*sent.dense],
        shapes.keys() == {*sent.dense},
        sum(prod(slot.shape) for slot in sent.trained().values()),
        sum(map(prod, shapes.values())),
    )


def some_of(names: Sequence[str], what: str) -> str:
    """List names for a message; long lists are grouped by names that differ in numbers only.

    Args:
        names: One or more.
        what: Their kind, since a name may be a number, as in `torch.nn.Sequential`.

    Example:
        >>> some_of(["0", "2"], "layer")
        'layers 0, 2'
        >>> some_of([f"block.{k}.{name}" for k in range(12) for name in ("q", "v")], "layer")
        '24 layers in block.*.q, block.*.v'
    """
    several = what if len(names) == 1 else f"{what}s"
    if len(names) <= SHOWN:
        return f"{several} {', '.join(names)}"
    forms = [*dict.fromkeys(re.sub(r"\d+", "*", name) for name in names)]
    return (
        f"{len(names)} {several} in "
        + ", ".join(forms[:FORMS])
        + (", ..." if forms[FORMS:] else "")
    )
