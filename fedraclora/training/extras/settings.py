"""Define the config group ``local``: plain local training and the keys of its additions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Annotated, ClassVar

import torch
from typing_extensions import override

from fedraclora.compatibility import Feature
from fedraclora.limits import NotNegative, OneOf, Part, Positive, Seconds
from fedraclora.privacy.sample_level import SampleNoise, answer_keys, seed_key
from fedraclora.protocol.program import (
    ClientChunk,
    ClientProgram,
    Forward,
    LocalResult,
    mean_losses,
)
from fedraclora.protocol.rank_budgets import cut_gradients
from fedraclora.training.extras.gates import Gates
from fedraclora.training.extras.lora_rite import LoraRite
from fedraclora.training.extras.pairs import ADJUSTMENTS, Adjustment, Precondition
from fedraclora.training.extras.prox import Prox
from fedraclora.training.gradients import gradients_of
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree


@Feature(
    "local.dp",
    instead="local.dp=null",
    avoids={
        "a method that estimates gradients from losses": (
            "there are no gradients of single samples to clip"
        ),
        "two exchanges in a round": ("the privacy account covers one exchange in a round"),
    },
)
@dataclass(frozen=True)
class SampleLevel(ClientProgram):
    """Apply DP-SGD to the trained tensors of a client.

    Attributes:
        noise: Clip and noise.
    """

    noise: SampleNoise
    form: ClassVar[str] = "local.dp={noise}"
    forms_gradients: ClassVar[bool] = True
    answers_once: ClassVar[bool] = True

    @override
    def gradients(
        self, chunk: ClientChunk, forward: Forward, active: int, width: int, step: int
    ) -> tuple[torch.Tensor, Tree]:
        """See `ClientProgram.gradients`.

        Every sample is treated as a client of its own: trained tensors are repeated for each
        sample, so that each sample has its own gradient.
        """

        def apart(tensor: torch.Tensor) -> torch.Tensor:
            return tensor[:active].repeat_interleave(width, dim=0)

        leaves = {n: apart(v).detach().requires_grad_() for n, v in chunk.values.items()}
        frozen = {n: apart(f) if f.dim() == 3 else f for n, f in chunk.frozen.items()}
        losses, counts, valid = forward(leaves, frozen)
        each = (losses / counts.clamp(min=1)) * valid.to(losses.dtype)
        own = gradients_of(each, leaves)
        own = cut_gradients(own, {n: apart(mask) for n, mask in chunk.masks.items()})
        like = {n: v[:active] for n, v in chunk.values.items()}
        key = seed_key(chunk.seed) if chunk.key is None else chunk.key
        keys = answer_keys(key, chunk.round_, chunk.clients[:active])
        noise = self.noise.noise(like, keys, step)
        total = mean_losses(losses.detach(), counts, valid)
        return total, self.noise.gradients(own, valid, noise)

    @override
    def sent(self, result: LocalResult) -> LocalResult:
        # No noise covers a loss, so the client does not send it.
        return replace(result, losses=torch.zeros_like(result.losses))


OWN_KEYS = Part("own")  # keys that choices with the project's loop do not list


@dataclass(frozen=True)
class LocalSettings(LocalConfig):
    """Configure plain local SGD and its additions (config group ``local``).

    Attributes:
        optimizer: ``sgd``, ``adamw`` or ``lora_rite`` (`fedraclora.training.extras.lora_rite`).
        dp: Noise on the gradients of single samples (`fedraclora.privacy.sample_level`), or None.
        prox: FedProx constant mu, a pull of the effective weights to the round's start.
        precondition: Right preconditioner (A A^T)^+ (left: (B^T B)^+): projected SGD.
        adjust: ``none``, ``riemannian`` or ``lora_pro`` (`fedraclora.training.extras.pairs`).
        damping: Of what ``adjust`` inverts.
        gate_penalty: lambda of SoRA's gates (`fedraclora.training.extras.gates`), or None: none.
        train: Your own training: ``package.module:function`` (`fedraclora.client`).
        parameters: Arguments of that function beside the round, by name.
        timeout: Seconds that it may take for one client; None: any.
    """

    OPTIMIZERS: ClassVar[tuple[str, ...]] = (*LocalConfig.OPTIMIZERS, "lora_rite")

    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "sgd"
    dp: SampleNoise | None = None
    prox: NotNegative = 0.0
    precondition: bool = False
    adjust: Annotated[str, OneOf(("none", *ADJUSTMENTS))] = "none"
    damping: Positive = 1e-6
    gate_penalty: Positive | None = None
    train: Annotated[str | None, OWN_KEYS] = None
    parameters: Annotated[Mapping[str, object] | None, OWN_KEYS] = None
    timeout: Annotated[Seconds | None, OWN_KEYS] = None

    @property
    @override
    def is_own(self) -> bool:
        return self.train is not None

    def trains_in_loop(self) -> bool:
        """Return whether clients train by the loop of this project."""
        return not self.is_own

    @Feature("local.adjust", reads=("local.damping",))
    def _adjusts(self) -> bool:
        return self.adjust != "none"

    @property
    @override
    def added(self) -> tuple[ClientProgram, ...]:
        return (
            *([SampleLevel(self.dp)] if self.dp is not None else ()),
            *([Prox(self.prox)] if self.prox else ()),
            *([Adjustment(self.adjust, self.damping)] if self.adjust != "none" else ()),
            *([Precondition()] if self.precondition else ()),
            *([LoraRite(self)] if self.optimizer == "lora_rite" else ()),
            *([Gates(self.gate_penalty, self)] if self.gate_penalty is not None else ()),
            *super().added,
        )


# What is told to a user's training function, the step sizes' scale over rounds among it.
READ_BY_OWN = {"lr", "train", "parameters", "timeout", "schedule", "warmup", "restart_every"} | {
    "min_lr_ratio",
    "step_every",
    "step_factor",
}
Feature(
    "the built-in training loop",
    take="the built-in training loop, but with local=own your function trains instead",
    reads=[f"local.{each.name}" for each in fields(LocalSettings) if each.name not in READ_BY_OWN],
)(LocalSettings.trains_in_loop)
