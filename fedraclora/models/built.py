"""Define a model builder's result, and draw and quantize initial weights.

Dropout without effect is refused: masks are keyed by seed, round, client and step. A module
(`torch.nn.Dropout`) can receive its mask from outside; a function cannot, and is off in local
training.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from typing import Annotated, Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.parameter import is_lazy
from torch.overrides import TorchFunctionMode
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.data.task import forward
from fedraclora.errors import ConfigError, ModelError
from fedraclora.limits import OneOf
from fedraclora.lowrank.layers import is_batch_norm, is_head, layer_kind
from fedraclora.narrow_weight import BITS, QuantisedWeight, base_name, is_narrow, quantized
from fedraclora.rng import hash_key
from fedraclora.tree import Tree

Attention = Annotated[str, OneOf(("sdpa", "eager"))]  # one fused kernel, or plain products
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Base = Annotated[str, OneOf((*FLOATS, *BITS))]  # narrow weights are never merged into
READS_NUMBERS = Feature(
    "a model of numbers",
    instead="model=transformer, hf, gpt or causal_lm",
    avoids={"data of texts": "its inputs are token ids"},
)
READS_TOKENS = Feature(
    "a model of token ids",
    instead="model=mlp, cnn or linear",
    avoids={"data of numbers": "its inputs are not token ids"},
)
ROUNDED = "most of such a change would be rounded away"
NARROW = Feature(
    "model.base below float32",
    instead="model.base=float32",
    avoids={
        "a method that merges updates into the weights": ROUNDED,
        "a method that takes its first factors out of the weights": ROUNDED,
        "a method whose clients send gradients first": (
            "factors that begin from gradients are taken out of the weights, and " + ROUNDED
        ),
        "dora=true": f"it rescales the weights, and {ROUNDED}",
        "server_optimizer.space=weights": ROUNDED,
        "a weight below float32 that is trained in full": ROUNDED,
    },
)
QUANTIZED = Feature(
    "model.base=int8 or int4",
    instead="model.base=float32 or bfloat16",
    avoids={
        "pretraining": "quantized weights cannot be trained",
        "init_from": f"the weights of another run are merged into its own, and {ROUNDED}",
    },
)
BFLOAT16 = Feature(
    "model.base=bfloat16",
    instead="model.base=float32",
    avoids={"precision=float32": "its matrix products are in bfloat16"},
)


@dataclass(frozen=True)
class BuiltModel:
    """Hold a network and the facts that other parts need.

    Attributes:
        model: The network, float32, with its initial weights; in training mode.
        head: Name prefixes of the final layer; empty if the model has only one layer.
        targets: The default pattern of adapted layers (`fedraclora.lowrank.layers.find_targets`).
        narrow: Whether weights are narrower than float32, and stay so.
        drawn: Parameters drawn at random because the stored model lacks them: a new head.
    """

    model: nn.Module
    head: tuple[str, ...]
    targets: str
    narrow: bool = False
    drawn: tuple[str, ...] = ()


@dataclass(frozen=True)
class InitialWeights:
    """The base weights of a run, as a part of it.

    Attributes:
        weights: By name.
        in_full: Names of those that are trained themselves.
    """

    weights: Tree
    in_full: Collection[str]

    @NARROW
    def _is_narrow(self) -> str:
        found = (base_name(w) for w in self.weights.values() if is_narrow(w))
        return next((f"model.base={name}" for name in found), "")

    @Feature(
        "a weight below float32 that is trained in full",
        instead="head=frozen, bias=frozen and modules_to_save=null",
    )
    def _trains_narrow(self) -> str:
        return next((n for n in self.in_full if is_narrow(self.weights[n])), "")


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Seed torch's global generator from the seed tree while modules are constructed.

    Modules draw their initial weights from torch's global generator; it is restored at the end.

    Args:
        seed: The seed of the run.
        purpose: The name of the draw, for example ``"model"``.

    Example:
        >>> def weights():
        ...     with seeded(1, "model"):
        ...         return torch.rand(3)
        >>> bool((weights() == weights()).all())
        True
    """
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(hash_key(seed, purpose) >> 65)
        yield


def require_input(name: str, shape: tuple[int, ...], classes: int, *, text: bool) -> int:
    """Check that a model fits the data; return the size of one input.

    Args:
        name: Of the model, for messages.
        shape: Shape of one input of the data; empty for token ids.
        classes: Number of outputs.
        text: Whether the model reads token ids.

    Raises:
        ConfigError: If the data are of the other kind, or have nothing to predict.
    """
    if text and shape:
        raise ConfigError(
            f"model={name} reads token ids, but this data set has inputs of shape "
            f"{tuple(shape)}: use model=mlp, model=cnn or model=linear"
        )
    if not text and not shape:
        raise ConfigError(
            f"model={name} reads numbers, but this data set has token ids: "
            "use model=transformer or model=hf"
        )
    if classes < 1:
        raise ConfigError(f"the number of outputs is {classes}, expected 1 or more")
    return prod(shape)


def check_fit(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Check that a text model's vocabulary and length cover the data.

    Without the check, torch would report an index error in an embedding.

    Args:
        model: A network; one without ``config`` passes.
        inputs: Inputs of a data set; those without token ids [N, length] pass.

    Raises:
        ConfigError: If a token id or the length is beyond the model's embeddings.
    """
    config, ids = getattr(model, "config", None), inputs.get("input_ids", inputs.get("x"))
    if config is None or ids is None or ids.is_floating_point() or ids.dim() != 2:
        return
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise ConfigError(
            f"the data have token id {int(ids.max())}, but the model knows {vocabulary} tokens: "
            "set model.vocab to the size of the tokenizer's vocabulary, or use the model's own "
            "tokenizer"
        )
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and ids.shape[1] > longest:
        raise ConfigError(
            f"data.max_length={ids.shape[1]}, but the model reads {longest} tokens at most: "
            "lower data.max_length, or take a model that reads more (one with random weights has "
            "model.max_length)"
        )


def require_heads(hidden: int, heads: int) -> None:
    """Check that the number of attention heads divides the width of a transformer.

    Raises:
        ConfigError: If they do not.
    """
    if hidden % heads:
        raise ConfigError(f"model.hidden={hidden} is not a multiple of model.heads={heads}")


def take_module(model: object, where: str) -> nn.Module:
    """Check a user's module, and put it in training mode except for frozen BatchNorm.

    Args:
        model: The module.
        where: Where it comes from, for messages.

    Raises:
        ConfigError: If it is no module.
        ModelError: If a frozen layer of BatchNorm has never seen a batch, or a weight holds no
            plain finite numbers.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{where} gives a {type(model).__name__}, expected a torch.nn.Module")
    require_numbers(model, where)
    frozen = {n: m for n, m in model.named_modules() if is_batch_norm(m) and not m.training}
    model.train()
    for name, layer in frozen.items():
        if is_blank(layer.eval()):
            raise ModelError(
                f"{where}: layer {name!r} ({type(layer).__name__}) is frozen before it has seen a "
                "batch: with a mean of 0 and a variance of 1 it normalizes nothing. Load "
                "pretrained weights, or use GroupNorm or LayerNorm"
            )
    return model


def require_numbers(model: nn.Module, where: str) -> None:
    """Reject a module whose weights are frozen, not materialized, or not finite numbers.

    Args:
        model: The user's module.
        where: Where it comes from, for messages.

    Raises:
        ModelError: Naming the layer or the weight.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and [*module.parameters()]:
            raise ModelError(
                f"{where}: {f'layer {name!r}' if name else 'the model'} was compiled by torch.jit, "
                "and its weights cannot be put in place for each client: give the module that "
                "torch.jit.script or torch.jit.trace was given"
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        weight = isinstance(tensor, nn.Parameter)
        if is_lazy(tensor):
            wrong = "has no shape yet (a lazy layer): call the model once with a batch"
        elif tensor.is_meta:
            wrong = "is on the device meta, without numbers: load or draw its weights"
        elif tensor.layout != torch.strided:
            wrong = f"is sparse ({tensor.layout}): make it dense"
        elif weight and not tensor.is_floating_point():
            wrong = f"holds {tensor.dtype} numbers, expected floating ones, or a buffer"
        elif weight and not bool(torch.isfinite(tensor).all()):
            wrong = "holds NaN or an infinity: nothing can be learnt from there"
        else:
            continue
        raise ModelError(f"{where}: {name} {wrong}")


def is_blank(layer: nn.Module) -> bool:
    """Check whether the running statistics of a layer still have their initial values."""
    mean, variance = layer.running_mean, layer.running_var
    if not isinstance(mean, torch.Tensor) or not isinstance(variance, torch.Tensor):
        return False  # it has none, and is refused for that elsewhere
    return bool((mean == 0).all() and (variance == 1).all())


def found_head(model: nn.Module) -> tuple[str, ...]:
    """Find the final layer: the module beside an encoder, or the last layer with weights."""
    prefix = getattr(model, "base_model_prefix", "")
    if prefix and hasattr(model, prefix):  # of Hugging Face
        beside = (n for n, m in model.named_children() if n != prefix)
        return tuple(n for n in beside if [*model.get_submodule(n).parameters()])
    adaptable = [name for name, module in model.named_modules() if layer_kind(module)]
    if len(adaptable) < 2:
        return ()
    return (adaptable[-1],)


def found_targets(model: nn.Module, *patterns: str) -> str:
    """Choose the first pattern whose names the model has; else all linear layers."""
    names = {name.rpartition(".")[2] for name, _ in model.named_modules()}
    return next((p for p in patterns if names.issuperset(p.split(","))), "all-linear")


def held_in(built: BuiltModel, base: str) -> BuiltModel:
    """Convert the weights of a model to a precision, in place.

    Args:
        built: The model, float32.
        base: ``float32``, ``bfloat16``; or ``int8``, ``int4``: the weights of linear layers only,
            without the head and shared weights. The rest stays float32.

    Raises:
        ConfigError: If nothing can be quantized, or a row does not divide.
    """
    if base in FLOATS:
        built.model.to(FLOATS[base])
    else:
        _quantize(built.model, built.head, base)
    return replace(built, narrow=base != "float32")


def _quantize(model: nn.Module, head: tuple[str, ...], base: str) -> None:
    """Quantize the weights of linear layers; those of Conv1D by columns, the outputs."""
    every = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    count = 0
    for name, module in model.named_modules():
        kind = layer_kind(module)
        if kind not in {"linear", "conv1d"} or is_head(name, head):
            continue
        weight: nn.Parameter = module.weight
        if every.count(id(weight)) > 1:
            continue
        matrix = weight.detach().mT if kind == "conv1d" else weight.detach()
        found = quantized(matrix.contiguous(), base, f"{name}.weight")
        held = found.mT if kind == "conv1d" else found
        module.weight = nn.Parameter(held, requires_grad=False)
        count += 1
    if not count:
        raise ConfigError(
            f"model.base={base}, which is for the weights of linear layers, but this "
            f"{type(model).__name__} has none beside its head: take model.base=float32"
        )


def dequantize(model: nn.Module) -> nn.Module:
    """Replace quantized weights by dense ones; return the model."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, QuantisedWeight):
            module.weight = nn.Parameter(weight.dequantized(), requires_grad=False)
    return model


# Dropout functions: the argument of the rate, and whether they are on: name, position, default.
_RATE = ("p", 1, 0.5)
_ON = ("training", 2, True)
_DROPS: dict[Callable[..., Any], tuple[tuple[str, int, float], tuple[str, int, bool]]] = {
    functional.dropout: (_RATE, _ON),
    functional.dropout1d: (_RATE, _ON),
    functional.dropout2d: (_RATE, _ON),
    functional.dropout3d: (_RATE, _ON),
    functional.alpha_dropout: (_RATE, ("training", 2, False)),
    functional.feature_alpha_dropout: (_RATE, ("training", 2, False)),
    torch.dropout: (_RATE, ("train", 2, True)),
    functional.scaled_dot_product_attention: (("dropout_p", 4, 0.0), ("", 99, True)),
}


def refuse_idle_rate(model: nn.Module, dropout: float) -> None:
    """Reject a ``model.dropout`` that no module of the model uses.

    Raises:
        ConfigError: Naming the model.
    """
    if dropout and not any(isinstance(m, nn.Dropout) and m.p > 0 for m in model.modules()):
        raise ConfigError(
            f"model.dropout={dropout}, but {type(model).__name__} has no torch.nn.Dropout that "
            "takes it: it drops nothing, or by a function, which stays off in local training; "
            "leave it at 0.0"
        )


def refuse_functions(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> None:
    """Reject a model that applies dropout as a function, detected in one forward pass.

    Args:
        model: In training mode. Not modified.
        inputs: Of samples; nothing is checked without any.

    Raises:
        ConfigError: Naming the function and its rate.
    """
    sample = {name: values[:1].clone() for name, values in inputs.items()}
    if not sample or any(not len(values) for values in sample.values()):
        return
    copied = copy.deepcopy(model)
    for module in copied.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    watch = _Watch()
    with watch, torch.no_grad(), torch.random.fork_rng(devices=[]):
        try:
            forward(copied, sample)
        except Exception:  # other errors of the model are reported by `fedraclora.models.outputs`
            return
    if watch.found:
        raise ConfigError(
            f"model.function: the model drops values by {watch.found}, which stays off in local "
            "training; use the module torch.nn.Dropout in its place, or set the rate to 0"
        )


class _Watch(TorchFunctionMode):
    """Record a dropout function that is called; empty if there is none."""

    found = ""

    @override
    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: object,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        named = kwargs or {}
        if func in _DROPS:
            rate, on = (
                named.get(name, args[place] if len(args) > place else default)
                for name, place, default in _DROPS[func]
            )
            if rate > 0 and on:
                self.found = f"{func.__name__} (rate {rate})"
        return func(*args, **named)
