"""Find the tensors of a round in a user's model, plain or with LoRA layers of PEFT.

A model is searched again each time: trainers wrap models and replace their parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from hashlib import blake2b
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.utils import parametrize

from fedraclora.errors import ClientError, ModelError
from fedraclora.lowrank.layers import LayerView, weight_name
from fedraclora.protocol.instructions import Adapter
from fedraclora.rng import generator
from fedraclora.training.own.term import LowRankTerm
from fedraclora.tree import Tree

WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes
WIDTH = 1024  # of the table as which the words of a tensor are summed up
DRAWN = generator(0, "bits of a tensor").integers(2**62, size=WIDTH)
FACTORS = torch.from_numpy(DRAWN) * 2 + 1  # of the columns of this table
SMALL = 1 << 14  # bytes of a tensor up to which hashing them is faster than some torch calls
SLAB = 4096  # rows of it that are multiplied at once, where torch has no product of whole numbers


def unsharded(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that is sharded over ranks (FSDP); every rank has to call this."""
    gather: Callable[[], torch.Tensor] | None = getattr(tensor, "full_tensor", None)
    return tensor if gather is None else gather()


def bits_of(tensor: torch.Tensor) -> torch.Tensor:
    """Compute a checksum of a tensor's bits, int64, [].

    Each word of 8 bytes is multiplied by an odd number that depends on its position, so that a
    change of one word, or of the order of words, always shows. It runs at the speed of memory. A
    small tensor is hashed instead, which takes a fifth of the time.
    """
    flat = unsharded(tensor.detach()).contiguous().flatten()
    if flat.nbytes <= SMALL:
        hashed = blake2b(flat.cpu().view(torch.uint8).numpy().tobytes(), digest_size=8).digest()
        return torch.tensor(int.from_bytes(hashed, "big", signed=True))
    if (flat.storage_offset() * flat.element_size()) % 8:
        flat = flat.clone()
    data, factors = flat.view(torch.uint8), FACTORS.to(flat.device)
    words, end = data[: len(data) // 8 * 8].view(torch.int64), data[len(data) // 8 * 8 :]
    table, rest = words[: len(words) // WIDTH * WIDTH], words[len(words) // WIDTH * WIDTH :]
    rows = [_times(part, factors) for part in table.view(-1, WIDTH).split(SLAB)]
    sums = torch.cat([*rows, _times(rest[None], factors[: len(rest)]), end.to(torch.int64)])
    return (sums * torch.arange(1, 2 * len(sums), 2, device=sums.device)).sum().cpu()


def _times(table: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    return table @ factors if table.device.type == "cpu" else (table * factors).sum(1)


def same_bits(tensor: torch.Tensor, other: torch.Tensor) -> bool:
    """Check whether two tensors have the same type and bits, the sign of zero and NaN included."""
    if tensor.dtype != other.dtype:
        return False
    words = (t.detach().view(WORDS[t.element_size()]) for t in (tensor, other.to(tensor.device)))
    return torch.equal(*words)


def check_alike(found: Tree) -> None:
    """Refuse processes of one client (DDP, FSDP) that have trained different values.

    Raises:
        ClientError: Naming the ranks whose values differ from rank 0.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    sums = [int(bits_of(value)) for value in found.values()]
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, sums)
    if apart := [str(rank) for rank, other in enumerate(every) if other != every[0]]:
        raise ClientError(
            f"rank {', '.join(apart)} of {len(every)} has trained other numbers than rank 0: wrap "
            "the model in DistributedDataParallel or fully_shard after round.install, and call "
            "round.read on every rank"
        )


# Parts that wrappers insert into names: PEFT, torch.compile, FSDP, activation checkpointing.
WRAPPERS = {"base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
ORIGINAL = ("parametrizations", "weight", "original")


@dataclass(frozen=True)
class TensorPlace:
    """A tensor in the user's model that holds one of ours.

    Attributes:
        tensor: A parameter, or a buffer where it is frozen.
        turned: Whether it is the transpose of ours, as in an embedding of PEFT.
    """

    tensor: torch.Tensor
    turned: bool = False

    def to_model(self, ours: torch.Tensor) -> torch.Tensor:
        """Convert a value of ours to this tensor's form."""
        return (ours.mT if self.turned else ours).reshape(self.tensor.shape)

    def put(self, ours: torch.Tensor) -> None:
        """Copy a value of ours into this tensor."""
        with torch.no_grad():
            self.tensor.copy_(self.to_model(ours))

    def from_model(self, like: torch.Tensor) -> torch.Tensor:
        """Return this tensor's value in our form, detached; copied only if needed."""
        value = unsharded(self.tensor.detach())
        return (value.mT if self.turned else value.reshape(like.shape)).to(like)


@dataclass(frozen=True)
class FoundTensors:
    """Hold the tensors that were found in a model.

    Attributes:
        parameters: By the name that the server's model has for them.
        copies: The original parameters of modules that PEFT trains in full.
        factors: By ``"<weight>/<label>"``.
        layers: LoRA layers of PEFT, by weight; none in a plain model.
        terms: Our low-rank terms in a plain model, by weight.
        others: Other parametrizations of a weight, by weight.
    """

    parameters: dict[str, nn.Parameter] = field(default_factory=dict)
    copies: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    factors: dict[str, TensorPlace] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    terms: dict[str, LowRankTerm] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)

    def place(self, name: str) -> TensorPlace:
        """Return the place of a tensor of ours: a factor, or one that is trained in full.

        Raises:
            ClientError: If it is not there any more.
        """
        if name in self.factors:
            return self.factors[name]
        if name not in self.parameters:
            raise ClientError(
                f"{name} is not in the model any more: read the model that was installed, before "
                "merging, unloading or removing anything"
            )
        return TensorPlace(self.parameters[name])


def inner(model: nn.Module) -> nn.Module:
    """Return the network inside wrappers of PEFT, DDP and torch.compile."""
    found: Any = model
    if hasattr(model, "get_base_model") and hasattr(model, "peft_config"):
        return inner(found.get_base_model())
    wrapped = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
    found = getattr(model, "module" if wrapped else "_orig_mod", None)
    return inner(found) if isinstance(found, nn.Module) else model


@cache
def plain_name(name: str, adapter: str) -> tuple[str, bool]:
    """Return the server's name of a parameter, and whether it is PEFT's copy of a module.

    Example:
        >>> plain_name("h.0.fc.base_layer.weight", "default")
        ('h.0.fc.weight', False)
        >>> plain_name("head.modules_to_save.default.weight", "default")
        ('head.weight', False)
        >>> plain_name("fc.parametrizations.weight.original", "default")
        ('fc.weight', False)
        >>> plain_name("head.modules_to_save", "default")  # which holds one for each adapter
        ('head', True)
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    if tuple(parts[-3:]) == ORIGINAL:
        parts[-3:] = ["weight"]
    copied = "original_module" in parts
    if "modules_to_save" in parts:
        at = parts.index("modules_to_save")
        copied = parts[at + 1 : at + 2] != [adapter]
        del parts[at : at + 2]
    return ".".join(part for part in parts if part != "original_module"), copied


def reset_model(model: nn.Module) -> None:
    """Undo changes that trainers of earlier rounds left in a model.

    Trainers wrap ``forward`` each time, add hooks and adapters, set dropout to zero, or switch
    checkpointing on. The model returns to its state at its first install. Weights are not changed.

    Args:
        model: The user's. It is changed in place, and remembers its first state.
    """
    modules = {name: module.__dict__ for name, module in model.named_modules()}
    adapters = {*getattr(model, "peft_config", ())}
    if "_as_given" not in model.__dict__:
        kept = {n: {k: _kept(v) for k, v in o.items() if _is_left(k)} for n, o in modules.items()}
        model.__dict__["_as_given"] = kept, adapters
        return
    first, its_own = model.__dict__["_as_given"]
    for name in first.keys() & modules.keys():
        own, given = modules[name], first[name]
        for key in filter(_is_left, own.keys() - given.keys()):
            del own[key]
        for key, value in given.items():
            if "_hooks" not in key:
                own[key] = value
            elif own[key] or value:  # in place: handles of hooks refer to this dict
                own[key].clear()
                own[key].update(value)
    for name in adapters - its_own:
        (getattr(model, "delete_adapter", None) or model.delete_adapters)(name)  # type: ignore[operator]


def _kept(value: Any) -> Any:
    return value.copy() if isinstance(value, dict) else value  # of hooks, or a flag or a function


@cache
def _is_left(key: str) -> bool:
    """Check whether trainers change an attribute of a module."""
    return "_hooks" in key or key in {"forward", "training", "p", "gradient_checkpointing"}


def find(model: nn.Module, adapters: Mapping[str, Adapter], adapter: str) -> FoundTensors:
    """Find all tensors of a round in a model.

    Args:
        model: The user's.
        adapters: What the method adapts, by weight.
        adapter: Name of the adapter of PEFT.

    Raises:
        ModelError: If it has LoRA layers that are not those of the method.
    """
    root, found = inner(model), FoundTensors()
    modules = dict(root.named_modules())
    found.layers.update(_lora_layers(modules, adapter))
    own = (part for layer in found.layers.values() for part in layer.named_children())
    beside = {id(p) for name, part in own if name != "base_layer" for p in part.parameters()}
    for name, parameter in root.named_parameters(remove_duplicate=False):
        module = modules.get(name.rpartition(".")[0])
        if id(parameter) in beside or isinstance(module, LowRankTerm):
            continue
        plain, copied = plain_name(name, adapter)
        if copied:
            found.copies.append((plain, parameter))
        else:
            found.parameters[plain] = parameter
    for weight, asked in adapters.items():
        if found.layers:
            found.factors.update(_of_peft(found.layers, weight, asked, adapter))
        elif term := term_on(modules, weight):
            found.terms[weight], found.others[weight] = term, _others(modules, weight)
            found.factors.update(_of_term(weight, term))
    return found


def _lora_layers(modules: Mapping[str, nn.Module], adapter: str) -> Iterator[tuple[str, Any]]:
    """Find the LoRA layers of PEFT with this adapter, by the weight that they adapt."""
    for name, module in modules.items():
        layer: Any = module
        # `hasattr` of a module that lacks a name raises and catches an error.
        if not {"lora_A", "base_layer"} <= module._modules.keys():  # noqa: SLF001
            continue
        if adapter in layer.lora_A or adapter in layer.lora_embedding_A:
            yield f"{plain_name(name, adapter)[0]}.weight", layer


def saved_whole(model: nn.Module, adapter: str) -> Iterator[Any]:
    """Find the modules that PEFT has copied to train them in full beside an adapter."""
    for module in model.modules():
        found: Any = module
        if hasattr(found, "original_module") and adapter in getattr(found, "modules_to_save", ()):
            yield found


def _of_peft(
    layers: Mapping[str, Any], weight: str, asked: Adapter, adapter: str
) -> dict[str, TensorPlace]:
    if weight not in layers:
        raise ModelError(
            f"the method adapts {weight}, but the model has LoRA layers of PEFT on "
            f"{', '.join(layers)} alone: name the same layers in target_modules and in targets; "
            "the last layer stands apart (head=full or frozen leaves it without factors)"
        )
    if [*asked.factors] != ["B", "A"]:
        raise ModelError(
            f"the method has the factors {' '.join(asked.factors)}, and a LoRA layer of PEFT has "
            "two, B A: install a plain model (without PEFT), or take another method"
        )
    layer = layers[weight]
    if getattr(layer, "use_dora", {}).get(adapter) or adapter in getattr(
        layer, "lora_magnitude_vector", {}
    ):
        raise ModelError(f"the LoRA layer of {weight} is one of DoRA: set use_dora=False")
    if adapter in layer.lora_embedding_A:  # PEFT stores the factors of an embedding transposed
        left, right = layer.lora_embedding_A[adapter], layer.lora_embedding_B[adapter]
        found = {"B": TensorPlace(left, turned=True), "A": TensorPlace(right, turned=True)}
    else:
        if layer.lora_B[adapter].bias is not None:
            raise ModelError(f"the LoRA layer of {weight} has a bias: set lora_bias=False")
        if getattr(layer.base_layer, "groups", 1) != 1:
            raise ModelError(f"{weight} is a convolution in groups: leave it out of the targets")
        found = {
            "B": TensorPlace(layer.lora_B[adapter].weight),
            "A": TensorPlace(layer.lora_A[adapter].weight),
        }
    rank = asked.factors["B"].shape[1]
    if layer.r[adapter] != rank:
        raise ModelError(
            f"the LoRA layer of {weight} has the rank {layer.r[adapter]}, and the method has "
            f"{rank} there: set r={rank} in LoraConfig (rank_pattern, where layers differ), or "
            f"method.rank={layer.r[adapter]}"
        )
    return {f"{weight}/{label}": place for label, place in found.items()}


def term_on(modules: Mapping[str, nn.Module], weight: str) -> LowRankTerm | None:
    """Return our low-rank term on a weight; None if there is none."""
    module = modules.get(weight.rpartition(".")[0])
    if module is None or not parametrize.is_parametrized(module, "weight"):
        return None
    terms: Any = module.parametrizations
    return next((term for term in terms.weight if isinstance(term, LowRankTerm)), None)


def _others(modules: Mapping[str, nn.Module], weight: str) -> int:
    terms: Any = modules[weight.rpartition(".")[0]].parametrizations
    return len(terms.weight) - 1


def _of_term(weight: str, term: LowRankTerm) -> dict[str, TensorPlace]:
    return {f"{weight}/{k}": TensorPlace(getattr(term, k)) for k in term.labels}


def attach(
    model: nn.Module,
    adapters: Mapping[str, Adapter],
    values: Tree,
    views: Mapping[str, LayerView],
) -> dict[str, TensorPlace]:
    """Put low-rank terms on the weights of a plain model, replacing those of another round or form.

    Args:
        model: The user's.
        adapters: What the method adapts, by weight.
        values: Of all factors, by ``"<weight>/<label>"``.
        views: Of the weights.

    Returns:
        Where the factors lie, by ``"<weight>/<label>"``.
    """
    modules = {plain_name(n, "")[0]: m for n, m in inner(model).named_modules()}
    places = dict[str, TensorPlace]()
    forms = {
        n: {k: (f.shape, f.trained) for k, f in a.factors.items()} for n, a in adapters.items()
    }
    for name, module in modules.items():
        term = term_on(modules, weight_name(name))
        if term is not None and term.form != forms.get(weight_name(name)):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
    for weight, asked in adapters.items():
        if (term := term_on(modules, weight)) is None:
            module = modules[weight.rpartition(".")[0]]
            factors = {k: values[f"{weight}/{k}"].to(module.weight.device) for k in asked.factors}
            trained = {k for k, factor in asked.factors.items() if factor.trained}
            term = LowRankTerm(views[weight], factors, trained, asked.scale)
            parametrize.register_parametrization(module, "weight", term, unsafe=True)
        term.scale, term.others = asked.scale, _others(modules, weight)
        places |= _of_term(weight, term)
    return places


def buffers_of(model: nn.Module) -> Tree:
    """List the buffers in a state dict by name, without the factors of our terms."""
    return {
        f"{name}.{key}" if name else key: buffer
        # a state dict would shard the tensors of FSDP again
        for name, module in inner(model).named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if key not in module._non_persistent_buffers_set  # noqa: SLF001
        and not isinstance(module, LowRankTerm)
    }
