"""Settings of local training (config group ``local``), which refuse what cannot train."""

from __future__ import annotations

import math
from dataclasses import dataclass

from fedraclora.errors import ConfigError, unknown
from fedraclora.privacy.sample_level import SampleNoise
from fedraclora.training.pairs import ADJUSTMENTS, refuse_together

SCHEDULES = ("constant", "cosine", "linear", "step")
OPTIMISERS = ("sgd", "adamw", "lora_rite")
MOMENTS = ("round", "link", "run")
LEAST = dict.fromkeys(("epochs", "steps", "batch_size", "warmup"), 0)
LEAST |= dict.fromkeys(("step_every", "restart_every"), 1)
MOST = 1_000_000  # local steps or epochs of a round, all of which are laid out before it
BELOW = dict.fromkeys(("prox", "weight_decay", "final", "step_factor"), math.inf)
BELOW |= dict.fromkeys(("momentum", "beta1", "beta2"), 1)
# What an optimiser would pass over: a run would not be what its config says.
USED_BY: dict[str, tuple[str, ...]] = {"momentum": ("sgd",)}
USED_BY |= dict.fromkeys(("beta1", "beta2", "eps"), ("adamw", "lora_rite"))


@dataclass(frozen=True)
class LocalConfig:
    """Settings of local training (config group ``local``).

    Attributes:
        optimiser: ``sgd``, ``adamw`` or ``lora_rite`` (`fedraclora.training.lora_rite`).
        moments: How long its moments live: ``round``, ``link`` or ``run`` (`moments`).
        moments_kept: Share of them that outlives a link; for ``link`` only.
        lr: Step size of what the method trains.
        dense_lr: Step size of head and biases trained in full beside it; None = ``lr``.
        epochs: Local epochs, if ``steps`` is None.
        steps: Local steps, or None.
        batch_size: Samples of a step; 0 = all samples of the client.
        shuffle: Reshuffle each epoch (random reshuffling); False keeps the stored order.
        momentum: Heavy-ball momentum of ``sgd``.
        nesterov: Nesterov momentum.
        weight_decay: L2 term of ``sgd``, decoupled decay of the others.
        beta1, beta2, eps: Constants of ``adamw`` and ``lora_rite``.
        clip: Largest global gradient norm per client, or None.
        dp: Noise on the gradients of single samples (`fedraclora.privacy.sample_level`), or None.
        prox: FedProx constant mu, a pull of the effective weights to the round's start.
        precondition: Right preconditioner (A A^T)^+ (left: (B^T B)^+): projected SGD.
        adjust: ``none``, ``riemannian`` or ``lora_pro`` (`fedraclora.training.pairs`).
        damping: Of what ``adjust`` inverts.
        gate_penalty: lambda of SoRA's gates (`fedraclora.training.gates`), or None: no gates.
        schedule: Step size over rounds: constant, cosine, linear, step.
        warmup: Rounds of linear warm-up.
        restart_every: Rounds after which the warm-up is done again, under the schedule: the jagged
            schedule of ReLoRA. None: never.
        final: Factor that cosine and linear fall to: the round after the last would have it.
        step_every, step_factor: Schedule ``step``: multiply by the factor every so many rounds, the
            warm-up not counted.
    """

    optimiser: str = "sgd"
    moments: str = "round"
    moments_kept: float = 0.0
    lr: float = 0.1
    dense_lr: float | None = None
    epochs: int = 1
    steps: int | None = None
    batch_size: int = 32
    shuffle: bool = True
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    clip: float | None = None
    dp: SampleNoise | None = None
    prox: float = 0.0
    precondition: bool = False
    adjust: str = "none"
    damping: float = 1e-6
    gate_penalty: float | None = None
    schedule: str = "constant"
    warmup: int = 0
    restart_every: int | None = None
    final: float = 0.0
    step_every: int = 50
    step_factor: float = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that cannot train."""
        choices = {"optimiser": OPTIMISERS, "schedule": SCHEDULES, "adjust": ("none", *ADJUSTMENTS)}
        for key, known in choices.items():
            if getattr(self, key) not in known:
                raise unknown(f"local.{key}", getattr(self, key), known)
        self._check_moments()
        for key in ("lr", "dense_lr", "clip", "eps", "damping", "gate_penalty"):
            value = getattr(self, key)
            if value is not None and not 0 < value < math.inf:
                raise ConfigError(f"local.{key} is {value}; a positive finite number is wanted")
        for key, least in LEAST.items():
            number = getattr(self, key)
            if number is not None and number < least:
                every = "0 (all)" if key == "batch_size" else least
                raise ConfigError(f"local.{key} is {number}; {every} or more is wanted")
        if max(self.epochs, self.steps or 0) > MOST:
            key = "steps" if self.epochs <= MOST else "epochs"
            raise ConfigError(f"local.{key} is {getattr(self, key)}; {MOST} or fewer are wanted")
        for key, end in BELOW.items():
            if not 0 <= getattr(self, key) < end:
                raise ConfigError(f"local.{key} is {getattr(self, key)}; it must lie in [0, {end})")
        if self.nesterov and self.momentum == 0:
            raise ConfigError("local.nesterov=true needs local.momentum above 0")
        for key, users in USED_BY.items():
            value, default = getattr(self, key), getattr(LocalConfig, key)
            if value != default and self.optimiser not in users:
                raise ConfigError(
                    f"local.{key} is {value}, which {self.optimiser} makes no use of; it is for "
                    f"{' and '.join(users)}: leave it at {default}"
                )
        refuse_together(self.adjust, self.precondition, self.optimiser, self.gate_penalty)
        self._check_warmup()

    def _check_warmup(self) -> None:
        every = self.restart_every
        if every is not None and not 0 < self.warmup < every:
            raise ConfigError(
                f"local.restart_every is {every}, and local.warmup is {self.warmup} rounds: with 0 "
                f"there is nothing to do again, and with {every} or more the step size never "
                "reaches local.lr; set 0 < warmup < restart_every (under local=relora that is "
                "method.resample_every), or restart_every=null"
            )

    def _check_moments(self) -> None:
        if self.moments not in MOMENTS:
            raise unknown("local.moments", self.moments, MOMENTS)
        if self.moments != "round" and (self.optimiser == "lora_rite" or self.gate_penalty):
            raise ConfigError(
                f"local.moments is {self.moments}, but what those of lora_rite and of gates speak "
                "of ends with the round; leave it at round"
            )
        if self.moments != "round" and not moment_kinds(self):
            raise ConfigError(
                f"local.moments is {self.moments}, but sgd without momentum has none; "
                "set local.momentum, take local=adamw, or leave it at round"
            )
        if not 0 <= self.moments_kept <= 1:
            raise ConfigError(
                f"local.moments_kept is {self.moments_kept}; a share in [0, 1] is wanted"
            )
        if self.moments_kept and self.moments != "link":
            raise ConfigError(
                f"local.moments_kept is {self.moments_kept}, but with local.moments="
                f"{self.moments} nothing is reset at the end of a link; set local.moments=link"
            )

    def rate_scale(self, round_: int, rounds: int) -> float:
        """Factor of the step sizes in round ``round_`` (from 1) of ``rounds``."""
        age = (round_ - 1) % self.restart_every if self.restart_every else round_ - 1
        ramp = min(1.0, (age + 1) / (self.warmup + 1))
        if round_ <= self.warmup:
            return ramp
        since = round_ - 1 - self.warmup
        if self.schedule == "step":
            return ramp * float(self.step_factor ** (since // self.step_every))
        if self.schedule == "constant":
            return ramp
        done = since / max(1, rounds - self.warmup)
        shape = 0.5 * (1 + math.cos(math.pi * done)) if self.schedule == "cosine" else 1 - done
        return ramp * (self.final + (1 - self.final) * shape)

    def rate(self, main: bool, rate_scale: float) -> float:
        """Step size of a trained tensor: ``lr`` for the method's own, ``dense_lr`` beside it."""
        return rate_scale * (self.lr if main or self.dense_lr is None else self.dense_lr)


def moment_kinds(local: LocalConfig) -> tuple[str, ...]:
    """Name what an optimiser holds beside each tensor that it trains."""
    if local.optimiser == "sgd":
        return ("first",) if local.momentum else ()
    return ("first", "second")
