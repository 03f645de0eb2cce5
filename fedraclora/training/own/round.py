"""Give a user's training function one client's part of a round."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from fedraclora.errors import ClientError, ConfigError, ModelError
from fedraclora.lowrank.layers import LayerView
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.plan import some_of
from fedraclora.protocol.rank_budgets import trainable
from fedraclora.protocol.uplinks import calmer, greatest_norm
from fedraclora.rng import hash_key
from fedraclora.training.materialize import materialize
from fedraclora.training.own.places import (
    FoundTensors,
    TensorPlace,
    attach,
    bits_of,
    buffers_of,
    check_alike,
    find,
    inner,
    reset_model,
    same_bits,
    saved_whole,
    unsharded,
)
from fedraclora.training.results import Trained
from fedraclora.tree import Tree


@dataclass(eq=False)
class Round:
    """Hold one client's task in a round: `install`, train, `read`.

    Attributes:
        client: The client's id, from 0.
        number: The round, from 1.
        seed: A number in [0, 2^31), derived from the run's seed, the round and the client. The
            global generators of torch, numpy and ``random`` are seeded with it, too.
        data: The client's own samples, as the run was given them: an entry of ``data=[...]``; else
            a `fedraclora.data.samples.Samples` (``inputs``: tensors [N, ...] by name, ``target``).
        rate_scale: Factor of step sizes in this round: the factor that ``local.lr=auto`` has found,
            or ``local.lr``, times that of ``local.schedule``.
        state: A dict that the client keeps from round to round; the function may change it.
    """

    client: int
    number: int
    seed: int
    data: Any
    rate_scale: float = 1.0
    state: dict[str, Any] = field(default_factory=dict)
    _asked: ClientTask = field(kw_only=True, repr=False)
    _adapter: str = field(default="default", init=False, repr=False)
    _installed: dict[str, int | None] | None = field(default=None, init=False, repr=False)

    def install(self, model: nn.Module, adapter: str = "default") -> nn.Module:
        """Put the weights of the round, and the tensors to train, into a model.

        A model with LoRA layers of PEFT (``get_peft_model``, ``inject_adapter_in_model``,
        ``add_adapter``) receives the factors in these, with the method's scale. In any other model,
        ``W + s B A`` is a parametrization of torch (`torch.nn.utils.parametrize`), so that the
        model's own code does not change. Tensors that the method trains in full are trained in
        place. ``requires_grad`` is True for trained tensors and False for all others; gradients are
        None. Gradients beyond a client's rank budget are zero.

        Install first, then create a new optimizer or trainer, in each round. You can install the
        same model again and again. If a client has several processes, each of them installs.

        Args:
            model: Of the architecture of the run's model, by the names of its parameters; in a
                PeftModel, DDP or torch.compile, too. It is changed in place.
            adapter: Of PEFT: the name of the adapter.

        Returns:
            The model.

        Raises:
            ModelError: If the model is another, or its LoRA layers are not those of the method.
        """
        asked = self._asked
        reset_model(model)
        places = find(model, asked.downlink.adapters, adapter)
        for layer in places.layers.values():
            if layer.merged:  # before weights arrive, from which the mask would be derived
                layer.unmerge()
        installed = asked.load(model, places)
        if places.layers:
            _use_peft(places, asked.downlink, adapter)
            for saved in saved_whole(model, adapter):
                saved.enable_adapters(True)
                saved.set_adapter(adapter)
        else:
            values = asked.values | asked.frozen
            places.factors.update(attach(model, asked.downlink.adapters, values, asked.views))
        for parameter in model.parameters():
            parameter.requires_grad_(False)
            parameter.grad = None
        for name, value in (asked.values | asked.frozen).items():
            place = places.place(name)
            place.put(value)
            if not torch.equal(place.from_model(value), value):
                raise ModelError(
                    f"{name} would be rounded: the model holds it as {place.tensor.dtype}, and it "
                    f"comes as {value.dtype}. Keep what is trained in float32 (for PEFT "
                    "autocast_adapter_dtype=True)"
                )
            if name in asked.values:
                place.tensor.requires_grad_(True)
                asked.cut(name, place)
        self._adapter, self._installed = adapter, installed
        return model

    def read(
        self,
        model: nn.Module,
        *,
        samples: int,
        steps: int,
        loss: float | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> Trained:
        """Read the trained values, and check that no frozen tensor has changed.

        Args:
            model: The model of `install`.
            samples: Training samples of the client, 1 or more: its weight in the mean.
            steps: Optimizer steps taken, 1 or more.
            loss: Mean training loss, for the ledger; None: unknown.
            metrics: Further finite numbers, by name.

        Returns:
            The value that the training function returns.

        Raises:
            ClientError: If a frozen factor or weight has changed, a number is not finite, the
                adapter is merged, switched off or scaled otherwise, nothing was trained, or the
                processes of a client, which must all call this, have trained different values.
        """
        asked = self._asked
        if self._installed is None:
            raise ClientError("round.read was called before round.install: install the model first")
        places = find(model, asked.downlink.adapters, self._adapter)
        _check_active(model, places, asked.downlink, self._adapter)
        moved = asked.moved(model, places, self._installed)
        if moved and (moved[0] in asked.frozen or moved[0] in asked.base):
            does = "freezes" if moved[0] in asked.frozen else "does not train"
            raise ClientError(
                f"{moved[0]} has moved, which the method {does}: train parameters with "
                "requires_grad alone, and make the optimizer after round.install"
            )
        if moved:
            raise ClientError(
                f"the buffer {moved[0]} has changed, which does not travel: put such layers "
                "(BatchNorm) into evaluation mode with .eval()"
            )
        found = {n: places.place(n).from_model(value).clone() for n, value in asked.values.items()}
        asked.check_form(found)
        asked.check_numbers(found)
        still = {n for n, value in found.items() if torch.equal(value, asked.values[n])}
        # Factors are created by install: an optimizer created before it trains only the other
        # tensors.
        of_layers = {n for n in found if n not in asked.downlink.dense}
        if (of_layers or {*found}) <= still:
            raise ClientError(
                f"nothing was trained: {some_of(sorted(of_layers or still), 'tensor')} did not "
                "move. Make the optimizer after round.install, of parameters with requires_grad, "
                "and step it"
            )
        check_alike(found)
        for name, mask in asked.masks.items():  # weight decay also moves values beyond the budget
            found[name] = torch.where(mask, found[name], asked.values[name])
        numbers: Any = {} if metrics is None else metrics
        read = Trained(self.client, self.number, found, samples, steps, loss, numbers)
        return replace(read, seal=self._seal(read))

    def check(self, found: Trained) -> None:
        """Refuse a result that `read` did not create: its checks need the model.

        Raises:
            ClientError: If tensors or fields differ from those of `read`.
        """
        self._asked.check_form(found.tensors)
        if found.seal != self._seal(found):
            raise ClientError(
                "the training function returned tensors or numbers that are not those that "
                "round.read gave: return its result unchanged. Change an update in the model, "
                "before round.read, and give samples, steps, loss and metrics to round.read"
            )

    def _seal(self, found: Trained) -> int:
        sums = (f"{name} {int(bits_of(value))}" for name, value in found.tensors.items())
        numbers = repr((found.samples, found.steps, found.loss, found.metrics))
        return hash_key(self.seed, "read", self.client, self.number, numbers, *sums)


def _use_peft(places: FoundTensors, downlink: RoundInstructions, adapter: str) -> None:
    """Set scales and frozen factors in LoRA layers of PEFT, and activate their adapter."""
    if more := sorted(places.layers.keys() - downlink.adapters.keys()):
        raise ModelError(
            f"the model has LoRA layers on {some_of(more, 'weight')}, which the method does not "
            "adapt: name the same layers in target_modules and in targets"
        )
    for weight, asked in downlink.adapters.items():
        layer = places.layers[weight]
        if not hasattr(layer, "frozen_peft_weight_names"):
            raise ConfigError(
                "this PEFT has no way to keep a factor frozen, which set_adapter would thaw: "
                "install peft 0.20 or newer"
            )
        layer.scaling[adapter] = asked.scale  # set_scale would multiply it by alpha / r
        turned = adapter in layer.lora_embedding_A
        names = ("lora_embedding_A", "lora_embedding_B") if turned else ("lora_B", "lora_A")
        factors = zip(names, asked.factors.values(), strict=True)  # these are B, A
        frozen = tuple(name for name, factor in factors if not factor.trained)
        layer.frozen_peft_weight_names = {**layer.frozen_peft_weight_names, adapter: frozen}
        layer.enable_adapters(True)
        layer.set_adapter(adapter)


def _check_active(
    model: nn.Module, places: FoundTensors, downlink: RoundInstructions, adapter: str
) -> None:
    """Refuse an adapter of PEFT that was changed after install, or merged into W."""
    for weight, term in places.terms.items():
        _check_scale(weight, term.scale, downlink)
        if term.others != places.others[weight]:
            raise ClientError(
                f"another parametrization was put on {weight}: register it before round.install"
            )
    for weight, layer in places.layers.items():
        if layer.merged:
            raise ClientError(
                f"the adapter on {weight} is merged into its weight: read before merging"
            )
        if layer.disable_adapters or adapter not in layer.active_adapters:
            raise ClientError(
                f"the adapter {adapter!r} on {weight} is switched off: call "
                f"model.set_adapter({adapter!r}) before round.read"
            )
        if more := [name for name in layer.active_adapters if name != adapter]:
            raise ClientError(
                f"the adapter {more[0]!r} on {weight} is active, too, and does not travel: call "
                f"model.set_adapter({adapter!r}) before training and before round.read"
            )
        _check_scale(weight, layer.scaling[adapter], downlink)
    for saved in saved_whole(model, adapter):
        if saved.disable_adapters or adapter not in saved.active_adapters:
            raise ClientError(
                f"a module of modules_to_save is switched off: call model.set_adapter({adapter!r}) "
                "before round.read"
            )


def _check_scale(weight: str, now: float, downlink: RoundInstructions) -> None:
    if now != (asked := downlink.adapters[weight].scale):
        raise ClientError(
            f"the scale of {weight} is {now}, and was installed as {asked}: leave scale, "
            "layer.scaling, set_scale and lora_alpha as they are"
        )


class ClientTask:
    """Hold the tensors of one client's task.

    Args:
        base: The weights of the round, by parameter; shared with other clients.
        downlink: This client's downlink.
        views: Of adapted weights.
        buffers: Of the run's model, by name.

    Attributes:
        values: Starting values of trained tensors, by name.
        frozen: Frozen factors, by name.
        masks: Which numbers of ``values`` the client trains, if not all.
    """

    def __init__(
        self,
        base: Tree,
        downlink: RoundInstructions,
        views: Mapping[str, LayerView],
        buffers: Tree,
    ) -> None:
        self.base, self.downlink, self.views = base, downlink, views
        self.buffers, self.handles = {n: b.detach() for n, b in buffers.items()}, list[Any]()
        values, _, frozen = materialize(downlink, base, torch.zeros(1, dtype=torch.int64))
        masks, device = trainable(downlink, downlink.ranks), next(iter(base.values())).device
        self.values = {n: value[0] for n, value in values.items()}
        self.frozen = {n: f[0] if f.dim() > 2 else f for n, f in frozen.items()}
        self.masks = {n: mask[0].to(device) for n, mask in masks.items()}

    def load(self, model: nn.Module, places: FoundTensors) -> dict[str, int | None]:
        """Copy the weights of the round, and the buffers of the run's model, into a model.

        Returns:
            The checksums of frozen tensors, by name; None for a copy of the base.
        """
        there = places.parameters
        lacking = sorted(self.base.keys() - there.keys())
        known = {id(there[n]) for n in self.base.keys() & there.keys()}
        more = [n for n, p in there.items() if id(p) not in known]
        if lacking or more:
            what = [f"lacks the {some_of(lacking, 'parameter')}"] if lacking else []
            what += [f"has the {some_of(more, 'parameter')} besides"] if more else []
            raise ModelError(
                f"round.install wants the run's model, by the names of its parameters, and this "
                f"{type(inner(model)).__name__} {' and '.join(what)}: give the same architecture "
                "(where it lies inside another module, give that part of it)"
            )
        installed: dict[str, int | None] = {}
        with torch.no_grad():
            for name, parameter in (*there.items(), *places.copies):
                if name not in self.base:
                    continue  # tied to one that is trained
                if not parameter.is_floating_point():
                    raise ModelError(
                        f"{name} is quantized in the model that is installed "
                        f"({parameter.dtype}), and the weights of a round cannot be put into it: "
                        "load it in float32 or bfloat16"
                    )
                if parameter.shape != self.base[name].shape:
                    raise ModelError(
                        f"{name} has the shape {tuple(parameter.shape)} in the model that is "
                        f"installed, and {tuple(self.base[name].shape)} in the run"
                    )
                plain = type(parameter) is nn.Parameter
                if not (plain and same_bits(parameter, self.base[name])):
                    parameter.copy_(self.base[name])
                if parameter is places.parameters.get(name) and name not in self.downlink.dense:
                    installed[name] = self._sum(name, parameter)
            for name, buffer in buffers_of(model).items():
                if name in self.buffers and self.buffers[name].shape == buffer.shape:
                    buffer.copy_(self.buffers[name])
                installed[name] = int(bits_of(buffer))
        return installed

    def _sum(self, name: str, parameter: nn.Parameter) -> int | None:
        """Compute the checksum of a weight; None if it is a copy of the base, to compare with."""
        weight = self.base[name]
        apart = type(parameter) is nn.Parameter and parameter.data_ptr() != weight.data_ptr()
        return None if apart and parameter.dtype == weight.dtype else int(bits_of(parameter))

    def cut(self, name: str, place: TensorPlace) -> None:
        """Make gradients beyond the client's rank budget zero."""
        if name in self.masks:
            mask = place.to_model(self.masks[name].expand(self.values[name].shape))
            self.handles.append(place.tensor.register_hook(lambda g: g * mask.to(g)))

    def check_form(self, found: Tree) -> None:
        """Refuse tensors that differ in name or shape from the trained ones.

        Raises:
            ClientError: Naming the first.
        """
        wanted = {n: tuple(v.shape) for n, v in self.values.items()}
        if not isinstance(found, dict) or found.keys() != wanted.keys():
            raise ClientError(f"Trained.tensors has not the {some_of([*wanted], 'tensor')} alone")
        for name, value in found.items():
            if not isinstance(value, torch.Tensor) or tuple(value.shape) != wanted[name]:
                raise ClientError(f"{name} of Trained.tensors is no tensor of shape {wanted[name]}")

    def check_numbers(self, found: Tree) -> None:
        """Refuse values that are not finite, and an update that is too long.

        Raises:
            ClientError: Naming the first tensor.
        """
        for name, value in found.items():
            if not torch.isfinite(value).all():
                raise ClientError(
                    f"{name} has a NaN or an infinity after training: {calmer(own=True)}"
                )
        norms = (torch.linalg.vector_norm(v, dtype=torch.float64) for v in found.values())
        length = math.hypot(*map(float, norms))
        if found and length > greatest_norm(next(iter(found.values())).dtype):
            raise ClientError(f"its update is too long, of norm {length:.3g}: {calmer(own=True)}")

    def moved(
        self, model: nn.Module, places: FoundTensors, installed: Mapping[str, int | None]
    ) -> list[str]:
        """List the frozen factors, untrained weights and buffers that have changed."""
        rest: Tree = {**places.parameters, **buffers_of(model)}
        found = [
            n for n, v in self.frozen.items() if not torch.equal(places.place(n).from_model(v), v)
        ]
        for name, bits in installed.items():
            now = unsharded(rest[name].detach()) if name in rest else None
            if bits is None and now is not None:
                found += [] if same_bits(now, self.base[name]) else [name]
            elif now is None or int(bits_of(now)) != bits:
                found.append(name)
        return found
