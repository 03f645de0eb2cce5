"""Export a run as a PEFT adapter: ``W_T - W_0``, with modules that were trained in full.

    adapted matrix     LoRA of the rank of its change, or truncated; the scale is 1
    magnitudes (DoRA)  PEFT's own, ``use_dora``
    its bias           ``bias="lora_only"``
    anything else      whole modules, ``modules_to_save``

PEFT itself writes the files, and reads them back before the export counts as done.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedraclora.errors import ConfigError, ModelError
from fedraclora.export.trained import (
    ChangeFactors,
    ExportRecord,
    Order,
    TrainedModel,
    factors_of_difference,
    factors_of_product,
    is_hugging_face,
)
from fedraclora.imports import import_extra
from fedraclora.lowrank.algebra import padded_to
from fedraclora.lowrank.layers import LayerView, layer_kind, layer_view
from fedraclora.tree import Tree
from fedraclora.weights.files import save_tensors

PEFT_PREFIX = "base_model.model."  # PEFT's prefix of module names
BASE = "./base"  # folder of the model to load first, beside the adapter
NEAR = 1e-5  # tolerance relative to a tensor's largest number: two ways to a sum round differently


@dataclass(frozen=True)
class Parts:
    """Which parameter goes where.

    Attributes:
        factors: Factors of adapted modules, by module name.
        modules: Modules saved in full.
        biases: Whether biases of adapted modules are saved.
    """

    factors: dict[str, ChangeFactors]
    modules: list[str]
    biases: bool


def write_peft(trained: TrainedModel, order: Order) -> ExportRecord:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors``.

    If the run did not begin from a model that others can load by name, its initial model is written
    beside the adapter: ``base/`` (a Hugging Face folder), or ``base.safetensors`` (a state dict).

    Args:
        trained: The trained model.
        order: The target; its rank bounds that of every layer, None: the rank of the change.

    Returns:
        The base, and by layer: the rank; the rank of the whole change; the relative error, which is
        the Frobenius norm of the omitted part over that of the change (with DoRA, of the change
        before rows are rescaled); if it was read back, the largest difference of a merged weight
        from W_T.

    Raises:
        ConfigError: If nothing was trained, or PEFT is not installed.
        ModelError: If PEFT does not support a layer, naming it.
    """
    import_extra("peft", "--format peft")
    folder = order.folder
    base, start = _base(trained, folder)
    parts = _parted(trained, start, order.rank)
    with _quiet():
        adapted = _adapted(trained, start, parts)
        found = str(order.place / BASE) if base == BASE else base  # none is relative in PEFT
        adapted.peft_config["default"].base_model_name_or_path = found
        adapted.save_pretrained(folder, save_embedding_layers=False)
    _order(folder / "adapter_config.json")
    merged = None
    if order.check:
        merged = _merged(trained, start, folder)
        _hold(trained, start, parts, merged)
    layers = {name: _record(trained, name, f, merged) for name, f in parts.factors.items()}
    return {"base": base, "saved_in_full": parts.modules, "layers": layers}


def _order(path: Path) -> None:
    """Sort the names in a configuration: PEFT writes sets, whose order changes."""
    config = json.loads(path.read_text())
    for key in ("target_modules", "modules_to_save"):
        if isinstance(config[key], list):
            config[key].sort()
    path.write_text(json.dumps(config, indent=2, sort_keys=True))


def _base(trained: TrainedModel, folder: Path) -> tuple[str | None, Tree]:
    """Return the name of the base model and its weights; write one without a name."""
    model = trained.model
    if trained.source is not None and is_hugging_face(model):
        found = _loaded(trained, trained.source)
        if found is not None:
            here = Path(trained.source)  # a local folder, findable from any working folder
            return str(here.resolve()) if here.is_dir() else trained.source, found
    if is_hugging_face(model):
        from fedraclora.export.whole_weights import save_model

        save_model(trained.at(trained.start), folder / BASE, trained)
        return BASE, trained.start
    tensors = trained.at(trained.start).state_dict()
    save_tensors(folder / "base.safetensors", tensors, {}, sync=False)
    return None, trained.start


def _loaded(trained: TrainedModel, source: str) -> Tree | None:
    """Load the pretrained model as a reader does; None if the run began from other weights.

    A new head may differ: a reader draws another one.
    """
    kind: Any = type(trained.model)
    labels = getattr(trained.model.config, "num_labels", 2)
    try:
        with _quiet(), torch.random.fork_rng(devices=[]):
            fresh = kind.from_pretrained(
                source,
                num_labels=labels,
                dtype=torch.float32,
                # otherwise one that the folder names, with code from the hub
                attn_implementation="eager",
                local_files_only=True,
                trust_remote_code=False,
            )
    except (OSError, ValueError):
        return None
    found = {n: p.detach() for n, p in fresh.named_parameters()}
    start = trained.start
    if found.keys() != start.keys() or any(found[n].shape != start[n].shape for n in start):
        return None
    prefix = f"{trained.model.base_model_prefix}."
    own = [n for n in start if n.startswith(prefix)]
    return found if own and all(_near(found[n], start[n]) for n in own) else None


def _near(found: torch.Tensor, wanted: torch.Tensor, tolerance: float = 1e-6) -> bool:
    if found.dtype == wanted.dtype and torch.equal(found, wanted):  # so are most, and it is fast
        return True
    apart, scale = (found.double() - wanted).abs().max(), float(wanted.abs().max())
    return bool(apart <= tolerance * max(scale, 1.0))


def _parted(trained: TrainedModel, start: Tree, rank: int | None) -> Parts:
    """Decide how each parameter is saved."""
    weights, modules = trained.weights, dict(trained.model.named_modules())
    views = dict(trained.targets)
    if rank is not None:  # layers that were trained in full are truncated, too, except the head
        views |= _further(trained, modules)
    factors: dict[str, ChangeFactors] = {}
    rest = [n for n in weights if not torch.equal(weights[n], start[n])]
    for name in list(views):
        module = name.rpartition(".")[0]
        known_start = _near(start[name], trained.start[name])
        if not known_start or (name not in rest and name not in trained.magnitudes):
            continue
        found = _factored(trained, name, views[name], rank)
        if found.kept or name in trained.magnitudes:
            factors[_adaptable(module, modules)] = found
            rest = [other for other in rest if other != name]
    biases = [n for n in rest if n.endswith("bias") and n.rpartition(".")[0] in factors]
    owners = dict.fromkeys(n.rpartition(".")[0] for n in rest if n not in biases)
    for owner in owners:
        if not owner or any(name.startswith(f"{owner}.") or name == owner for name in factors):
            raise ModelError(
                f"PEFT has no place for the parameters of {owner or 'the model itself'}, which "
                "were trained in full: they lie beside adapted layers. Take --format state_dict"
                + (" or hf" if is_hugging_face(trained.model) else "")
            )
    if not factors:
        raise ConfigError(
            "there is no layer whose change has factors: nothing was trained, or all of it in full "
            "(then give --rank K, which truncates it, or take --format state_dict)"
        )
    return Parts(factors, list(owners), bool(biases))


def _further(trained: TrainedModel, modules: dict[str, nn.Module]) -> dict[str, LayerView]:
    """List matrices that were trained in full though they are not adapted."""
    return {
        f"{name}.weight": layer_view(module)
        for name, module in modules.items()
        if layer_kind(module) in {"linear", "conv1d", "conv"}
        and f"{name}.weight" not in trained.dense
    }


def _adaptable(name: str, modules: dict[str, nn.Module]) -> str:
    """Refuse a layer that PEFT does not support."""
    if name and getattr(modules[name], "groups", 1) == 1:
        return name
    whole = "is the whole model, and PEFT adapts layers inside one"
    why = "is a convolution in groups" if name else whole
    raise ModelError(f"layer {name!r} {why}: take --format state_dict")


def _factored(trained: TrainedModel, name: str, view: LayerView, rank: int | None) -> ChangeFactors:
    if name in trained.magnitudes and name not in trained.changes:
        matrix = view.matrix(trained.start[name])
        return factors_of_product((matrix[:, :0], matrix[:0]), rank)
    if name in trained.changes:
        return factors_of_product(trained.changes[name], rank)
    new, old = view.matrix(trained.weights[name]), view.matrix(trained.start[name])
    return factors_of_difference(new, old, rank)


def _adapted(trained: TrainedModel, start: Tree, parts: Parts) -> Any:
    """Let PEFT wrap the model, and fill in the factors."""
    from peft import LoraConfig, get_peft_model

    views = {f"{name}.weight": name for name in parts.factors}
    model = trained.at({weight: start[weight] for weight in views})
    modules = dict(model.named_modules())
    ranks = {name: max(1, f.kept) for name, f in parts.factors.items()}
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    pattern = {_pattern(n, modules): r for n, r in ranks.items() if r != common}
    turned = [layer_kind(modules[name]) == "conv1d" for name in ranks]
    config = LoraConfig(
        r=common,
        lora_alpha=common,  # the scale is 1
        rank_pattern=pattern,
        alpha_pattern=dict(pattern),
        target_modules=_targets(list(ranks), modules),
        modules_to_save=list(parts.modules) or None,  # PEFT may extend the list
        bias="lora_only" if parts.biases else "none",
        use_dora=bool(trained.magnitudes),
        fan_in_fan_out=sum(turned) * 2 > len(turned),
        task_type=_task(model, parts.modules),
    )
    with torch.random.fork_rng(devices=[]):
        adapted: Any = get_peft_model(model, config)
    for name, layer in adapted.named_modules():
        if (module := name.removeprefix(PEFT_PREFIX)) in parts.factors and hasattr(layer, "lora_A"):
            _fill(layer, parts.factors[module], ranks[module])
            if f"{module}.weight" in trained.magnitudes:
                own = layer.lora_magnitude_vector["default"].weight
                own.data.copy_(trained.magnitudes[f"{module}.weight"].reshape(own.shape))
    return adapted


def _fill(layer: Any, factors: ChangeFactors, rank: int) -> None:
    """Copy factors into a layer of PEFT; with rank 0 the product stays zero."""
    left, right = padded_to(factors.left, factors.right, rank)
    with torch.no_grad():
        if "default" in layer.lora_embedding_A:
            layer.lora_embedding_A["default"].copy_(left.mT)
            layer.lora_embedding_B["default"].copy_(right.mT)
            return
        for target, value in ((layer.lora_A, right), (layer.lora_B, left)):
            weight = target["default"].weight
            weight.copy_(value.reshape(weight.shape))


def _pattern(name: str, modules: dict[str, nn.Module]) -> str:
    """Write a module as a key of ``rank_pattern``, which matches names by their ends."""
    return f"^{name}" if any(other.endswith(f".{name}") for other in modules) else name


def _targets(names: list[str], modules: dict[str, nn.Module]) -> list[str] | str:
    """Write the adapted modules: as a list, or as an expression if a list would match others."""
    import re

    ends = tuple(f".{name}" for name in names)
    if any(other.endswith(ends) and other not in names for other in modules):
        return "|".join(re.escape(name) for name in names)
    return names


def _task(model: nn.Module, saved: list[str]) -> str | None:
    """Return PEFT's task type, if it only changes the class of the wrapper."""
    kind = type(model).__name__
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        return "CAUSAL_LM"
    if kind.endswith("ForSequenceClassification"):
        heads = {n for n in ("classifier", "score") if hasattr(model, n)}
        return "SEQ_CLS" if heads and heads <= set(saved) else None
    return None


def _merged(trained: TrainedModel, start: Tree, folder: Path) -> Tree:
    """Read the adapter back as another user would, and merge it."""
    from peft import PeftModel

    with _quiet():
        model: Any = PeftModel.from_pretrained(trained.at(start), folder).merge_and_unload()
    return {n: p.detach() for n, p in model.named_parameters(remove_duplicate=False)}


def _hold(trained: TrainedModel, start: Tree, parts: Parts, merged: Tree) -> None:
    """Compare the merged adapter with the trained weights.

    Raises:
        ModelError: If they differ.
    """
    wanted = {n: p.detach() for n, p in trained.model.named_parameters(remove_duplicate=False)}
    for name, factors in parts.factors.items():
        weight = f"{name}.weight"
        view = layer_view(dict(trained.model.named_modules())[name])
        V = view.matrix(start[weight]).double() + factors.left @ factors.right
        if weight in trained.magnitudes:
            lengths = torch.linalg.vector_norm(V, dim=1)
            V = (trained.magnitudes[weight].double() / lengths)[:, None] * V
        wanted[weight] = view.stored(V.to(start[weight].dtype), start[weight])
    if merged.keys() != wanted.keys():
        odd = sorted(merged.keys() ^ wanted.keys())
        raise ModelError(f"PEFT gives a model of other parameters ({', '.join(odd)})")
    for name, value in wanted.items():
        if not _near(merged[name], value, NEAR):
            raise ModelError(
                f"PEFT does not give {name} back as it was written, as happens where weights are "
                "tied or one layer's name is the end of another's: take --format state_dict"
            )


def _record(
    trained: TrainedModel, name: str, factors: ChangeFactors, merged: Tree | None
) -> ExportRecord:
    """Record how close an adapter is to W_T: the omitted part, and the merged difference."""
    weight = f"{name}.weight"
    found: ExportRecord = {
        "rank": factors.kept,
        "rank_of_change": factors.rank,
        "relative_error": factors.error,
    }
    if merged is not None:
        apart = (trained.weights[weight].double() - merged[weight].double()).abs().max()
        found["largest_difference"] = float(apart)
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings of PEFT and transformers on layouts and new heads, which are expected."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
