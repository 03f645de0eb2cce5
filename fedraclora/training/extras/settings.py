"""The config group ``local``: plain local training, and the keys of what may be added to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from typing import ClassVar

from typing_extensions import override

from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.training.extra import LocalExtra
from fedraclora.training.extras.gates import Gates
from fedraclora.training.extras.lora_rite import LoraRite
from fedraclora.training.extras.pairs import ADJUSTMENTS, Adjustment, Precondition
from fedraclora.training.extras.prox import Prox
from fedraclora.training.extras.sample_level import SampleLevel
from fedraclora.training.localconfig import LocalConfig


@dataclass(frozen=True)
class LocalSettings(LocalConfig):
    """Settings of local training (config group ``local``), those of `LocalConfig` and these.

    Attributes:
        optimiser: ``lora_rite`` (`fedraclora.training.extras.lora_rite`), too.
        dp: Noise on the gradients of single samples (`fedraclora.privacy.sample_level`), or None.
        prox: FedProx constant mu, a pull of the effective weights to the round's start.
        precondition: Right preconditioner (A A^T)^+ (left: (B^T B)^+): projected SGD.
        adjust: ``none``, ``riemannian`` or ``lora_pro`` (`fedraclora.training.extras.pairs`).
        damping: Of what ``adjust`` inverts.
        gate_penalty: lambda of SoRA's gates (`fedraclora.training.extras.gates`), or None: none.
    """

    dp: SampleNoise | None = None
    prox: float = 0.0
    precondition: bool = False
    adjust: str = "none"
    damping: float = 1e-6
    gate_penalty: float | None = None

    CHOICES: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **LocalConfig.CHOICES,
        "optimiser": (*LocalConfig.CHOICES["optimiser"], "lora_rite"),
        "adjust": ("none", *ADJUSTMENTS),
    }
    POSITIVE: ClassVar[tuple[str, ...]] = (*LocalConfig.POSITIVE, "damping", "gate_penalty")
    BELOW: ClassVar[Mapping[str, float]] = {**LocalConfig.BELOW, "prox": inf}

    @property
    @override
    def extras(self) -> tuple[LocalExtra, ...]:
        return (
            *([SampleLevel(self.dp)] if self.dp is not None else ()),
            *([Prox(self.prox)] if self.prox else ()),
            *([Adjustment(self.adjust, self.damping)] if self.adjust != "none" else ()),
            *([Precondition()] if self.precondition else ()),
            *([LoraRite(self)] if self.optimiser == "lora_rite" else ()),
            *([Gates(self.gate_penalty, self)] if self.gate_penalty is not None else ()),
        )
