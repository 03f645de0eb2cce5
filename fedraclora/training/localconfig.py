"""Define and validate the settings of local training (config group ``local``)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Annotated, ClassVar, TypeVar

from annotated_types import Ge, Le
from typing_extensions import override

from fedraclora.binding import object_of
from fedraclora.compatibility import Feature
from fedraclora.errors import ConfigError
from fedraclora.limits import (
    AcceptsObject,
    Count,
    Fraction,
    Limit,
    Limited,
    NotNegative,
    OneOf,
    Part,
    Positive,
    Share,
    Whole,
)
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.program import ClientProgram

Extra = TypeVar("Extra", bound=ClientProgram)
ADAPTIVE_KEYS = Part("adaptive")  # keys that choices without such an optimizer do not list
MOST_STEPS = 1_000_000  # local steps or epochs of a round, which is laid out in advance
Laid = Annotated[int, Ge(0), Le(MOST_STEPS)]
AUTO = "auto"
Rate = Annotated[
    float | str,
    Limit(
        "auto, or a number above 0,",
        lambda r: r == AUTO or (not isinstance(r, str) and 0 < r < math.inf),
    ),
]


@dataclass(frozen=True)
class LocalConfig(Limited, group="local"):
    """Configure plain local training.

    A subclass adds keys to the config group, and the client programs for them to `added`.

    Attributes:
        optimizer: ``sgd`` or ``adamw``.
        optimizer_state: How long its moments are kept: for a ``round``, until a ``merge``, for the
            ``run`` (`moments`); or ``rows``: the server averages second moments of rows
            (`optimizer`).
        optimizer_state_kept: Share of them that is kept after a merge; for ``merge`` only.
        lr: Step size of the tensors that the method trains; auto: found by a few rounds at several
            rates (docs/local.md).
        full_lr: Step size of head and biases trained in full beside it; None = ``lr``.
        epochs: Local epochs, if ``steps`` is None.
        steps: Local steps, or None.
        batch_size: Samples of a step; 0 = all samples of the client.
        shuffle: Reshuffle each epoch (random reshuffling); False keeps the stored order.
        momentum: Heavy-ball momentum of ``sgd``.
        nesterov: Nesterov momentum.
        weight_decay: L2 term of ``sgd``, decoupled decay of the others.
        beta1, beta2, eps: Constants of adaptive optimizers, all but ``sgd``.
        clip: Largest norm c of a client's gradient, or None. A longer one, and one up to 1e-6
            shorter, is multiplied by c / (norm + 1e-6), as in torch.
        clip_by: Norm to clip: of ``all`` gradients together, or of each ``layer`` by itself.
        schedule: Step size over rounds: constant, cosine, linear, step.
        warmup: Rounds of linear warm-up.
        restart_every: Rounds after which the warm-up starts again, under the schedule (the jagged
            schedule of ReLoRA). None: never.
        min_lr_ratio: Factor that cosine and linear decay to, one round after the last.
        step_every, step_factor: Schedule ``step``: multiply the step size by step_factor every
            step_every rounds after the warm-up.
        extras: Client programs of your own: `fedraclora.ClientProgram` by ``module:name``, with
            parameters ``{name: module:name, key: value}``.
    """

    OPTIMIZERS: ClassVar[tuple[str, ...]] = ("sgd", "adamw")

    optimizer: Annotated[str, OneOf(OPTIMIZERS)] = "sgd"
    optimizer_state: Annotated[str, OneOf(("round", "merge", "run", "rows"))] = "round"
    optimizer_state_kept: Share = 0.0
    lr: Rate = AUTO
    full_lr: Positive | None = None
    epochs: Laid = 1
    steps: Laid | None = None
    batch_size: Whole = 16
    shuffle: bool = True
    momentum: Fraction = 0.0
    nesterov: bool = False
    weight_decay: NotNegative = 0.0
    beta1: Annotated[Fraction, ADAPTIVE_KEYS] = 0.9
    beta2: Annotated[Fraction, ADAPTIVE_KEYS] = 0.999
    eps: Annotated[Positive, ADAPTIVE_KEYS] = 1e-8
    clip: Positive | None = None
    clip_by: Annotated[str, OneOf(("all", "layer"))] = "all"
    schedule: Annotated[str, OneOf(("constant", "cosine", "linear", "step"))] = "constant"
    warmup: Whole = 0
    restart_every: Count | None = None
    min_lr_ratio: NotNegative = 0.0
    step_every: Count = 50
    step_factor: NotNegative = 0.5
    extras: Annotated[Sequence[str | Mapping[str, object] | ClientProgram], AcceptsObject()] = ()

    @property
    def added(self) -> tuple[ClientProgram, ...]:
        """List added client programs: those of keys first, then the user's own."""
        return (*self.extras,)  # type: ignore[arg-type]

    @property
    def is_own(self) -> bool:
        """Return whether a user's function replaces this loop and its keys."""
        return False

    def extra_of(self, kind: type[Extra]) -> Extra | None:
        """Return the extra of a kind; None if there is none."""
        return next((extra for extra in self.added if isinstance(extra, kind)), None)

    def name_of(self, extra: ClientProgram) -> str:
        """Name an extra for messages: a user's extra by its key and where it is defined."""
        kind, at = type(extra), [k for k, each in enumerate(self.extras) if each is extra]
        return f"local.extras{at}={kind.__module__}:{kind.__qualname__}" if at else extra.setting

    @property
    def answers_once(self) -> bool:
        """Return whether a second reply to the same round would reveal what the first one hides."""
        return any(extra.answers_once for extra in self.added)

    # What settings of a run are incompatible with these.

    @Feature(
        "local=own",
        instead="local=sgd",
        avoids={
            "control_variates=true": ("only the built-in loop subtracts them from each gradient"),
            "a method with a client program of its own": ("only the built-in loop runs it"),
            "dora=true": "your model has no parameters for the magnitudes",
            "attack=label_flip": (
                "it flips the labels of the built-in loop, and your function reads its own samples"
            ),
            "simulated devices with a speed or a network": (
                "the number of steps that your function takes is not known in advance"
            ),
            "precision=bf16-mixed": (
                "only the built-in loop reads it; your function sets its own precision"
            ),
        },
    )
    def _trains_by_own_function(self) -> bool:
        return self.is_own

    @Feature("local.steps", instead="local.steps=null", take="local.steps=1 or more")
    def _counts_steps(self) -> bool:
        return bool(self.steps)

    @Feature("local.steps=null", reads=("local.epochs",))
    def _counts_epochs(self) -> bool:
        return self.steps is None

    @Feature(
        "local.schedule=cosine or linear",
        take="local.schedule=cosine and linear",
        reads=("local.min_lr_ratio",),
    )
    def _anneals(self) -> bool:
        return self.schedule in {"cosine", "linear"}

    @Feature("local.schedule=step", reads=("local.step_every", "local.step_factor"))
    def _steps_down(self) -> bool:
        return self.schedule == "step"

    @Feature("local.optimizer=sgd", reads=("local.momentum",))
    def _takes_plain_steps(self) -> bool:
        return self.optimizer == "sgd"

    @Feature(
        "an adaptive local.optimizer",
        reads=("local.beta1", "local.beta2", "local.eps"),
    )
    def _adapts(self) -> bool:
        return self.optimizer != "sgd"

    @Feature("local.clip", reads=("local.clip_by",))
    def _clips(self) -> bool:
        return self.clip is not None

    @Feature("local.optimizer_state=merge", reads=("local.optimizer_state_kept",))
    def _keeps_until_merge(self) -> bool:
        return self.optimizer_state == "merge"

    @Feature(
        "optimizer moments that are kept after a round",
        instead="local.optimizer_state=round",
        avoids={
            "an optimizer without moments": "there are no moments to keep",
            "a client program whose moments end with the round": (
                "they mean nothing in the next round"
            ),
        },
    )
    def _keeps_beyond(self) -> str:
        kept = self.optimizer_state
        return "" if kept == "round" else f"local.optimizer_state={kept}"

    @Feature(
        "an optimizer without moments",
        instead="local=adamw, or local.momentum above 0",
    )
    def _has_no_moments(self) -> str:
        return "" if moment_kinds(self) else "local.momentum=0"

    @Feature("an optimizer without second moments", instead="local=adamw")
    def _has_no_second(self) -> str:
        return "" if "second" in moment_kinds(self) else f"local.optimizer={self.optimizer}"

    @Feature("a client program whose moments end with the round", instead="local=adamw or momentum")
    def _ends_moments(self) -> str:
        return next((extra.setting for extra in self.added if extra.ends_moments), "")

    @Feature("a client program with a step of its own", instead="local=adamw")
    def _steps_itself(self) -> str:
        own = (x for x in self.added if type(x).optimizer is not ClientProgram.optimizer)
        return next((extra.setting for extra in own), "")

    @Feature("a second optimizer for pairs of factors", instead="one of them")
    def _steps_factors_twice(self) -> str:
        rules = [extra.setting for extra in self.added if extra.takes_factor_step]
        return " and ".join(rules) if len(rules) > 1 else ""

    @Feature(
        "optimizer moments that are kept after a merge",
        instead="local.optimizer_state=round or merge, with local.optimizer_state_kept=0",
        avoids={
            "a method that trains different tensors in each round": (
                "moments of one tensor do not belong to another"
            ),
        },
    )
    def _keeps_moments(self) -> str:
        if self.optimizer_state_kept:
            return f"local.optimizer_state_kept={self.optimizer_state_kept}"
        return "local.optimizer_state=run" if self.optimizer_state == "run" else ""

    @Feature(
        "local.optimizer_state=rows",
        instead="local.optimizer_state=round or merge",
        avoids={
            "privacy=client_level": ("the noise is larger than squared gradients"),
            "secure=secagg": (
                "squared gradients are smaller than the quantization steps of its sums"
            ),
            "compression.uplink below float32": (
                "squared gradients that round to zero are divided by"
            ),
            "compression.downlink below float32": (
                "squared gradients that round to zero are divided by"
            ),
            "server_optimizer.space=factors": "it would treat second moments as parameters",
            "clients that train different parameters": (
                "the mean of a row would include parameters that a client does not train"
            ),
            "two exchanges in a round": ("only the first exchange sends second moments"),
            "system.buffer": "late replies used other second moments",
            "an optimizer without second moments": "there are no second moments to average",
            "a client program with a step of its own": "it keeps its own moments",
        },
        requires={"a trained factor A or B": "the second moments are those of their rows"},
    )
    def _averages_moments(self) -> bool:
        return self.optimizer_state == "rows"

    @Feature(
        "local.momentum",
        instead="local.momentum=0",
        take="local.momentum above 0",
        reads=("local.nesterov",),
        avoids={
            "momentum that the method keeps over rounds": (
                "the server could not repeat the clients' steps"
            ),
        },
    )
    def _has_momentum(self) -> bool:
        return self.momentum > 0

    @Feature(
        "local.weight_decay",
        instead="local.weight_decay=0",
        avoids={
            "a method that estimates gradients from losses": (
                "the trained numbers are not weights, so they must not decay"
            ),
            "a method that trains a sparse part of the full weights": (
                "decay would move the entries that are not trained"
            ),
        },
    )
    def _decays(self) -> str:
        return f"local.weight_decay={self.weight_decay}" if self.weight_decay > 0 else ""

    @Feature("local steps other than plain SGD", instead="local=sgd")
    def _beside_plain_sgd(self) -> str:
        beside = {
            "optimizer": self.optimizer != "sgd",
            "momentum": self.momentum,
            "weight_decay": self.weight_decay,
            "clip": self.clip is not None,
        }
        found = [f"local.{n}={getattr(self, n)}" for n, used in beside.items() if used]
        return next(iter([*found, *(extra.setting for extra in self.added)]), "")

    @override
    def __post_init__(self) -> None:
        """Create the user's extras; reject settings that cannot train."""
        super().__post_init__()
        own = [
            object_of(f"local.extras[{k}]", it, ClientProgram) for k, it in enumerate(self.extras)
        ]
        object.__setattr__(self, "extras", (*own,))
        self._check_warmup()

    def _check_warmup(self) -> None:
        every = self.restart_every
        if every is not None and not 0 < self.warmup < every:
            raise ConfigError(
                f"local.restart_every={every}, and local.warmup={self.warmup} rounds: with 0 "
                f"there is nothing to do again, and with {every} or more the step size never "
                "reaches local.lr; set 0 < warmup < restart_every (under local=relora that is "
                "method.merge_every), or restart_every=null"
            )

    def rate_scale(self, round_: int, rounds: int) -> float:
        """Compute the factor of the step sizes in round ``round_`` (from 1) of ``rounds``."""
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
        return ramp * (self.min_lr_ratio + (1 - self.min_lr_ratio) * shape)

    def rate(self, main: bool, rate_scale: float) -> float:
        """Return a tensor's step size: ``lr`` if the method trains it, else ``full_lr``."""
        return rate_scale * (self.step_size if main or self.full_lr is None else self.full_lr)

    @property
    def step_size(self) -> float:
        """Return ``lr``; 1 until the search has found it."""
        return 1.0 if isinstance(self.lr, str) else self.lr


def moment_kinds(local: LocalConfig) -> tuple[str, ...]:
    """List the kinds of state that an optimizer keeps for each trained tensor."""
    if local.optimizer == "sgd":
        return ("first",) if local.momentum else ()
    return ("first", "second")


def effective_step(
    downlink: RoundInstructions, local: LocalConfig, rate_scale: float
) -> dict[str, float]:
    """Compute the step gamma inside the sketch, W <- W - gamma G H, over all sketched layers.

    gamma = lr s^2 c if A A^T is about c I (with two frozen factors c is the product of theirs),
    unless an extra of local training defines it otherwise. Unlike the raw learning rate, gamma is
    comparable between sketches, ranks and scales. It is the step of a gradient, without momentum;
    adaptive optimizers have no such factor.

    Args:
        downlink: The round's.
        local: Gives the step size of the trained factor.
        rate_scale: Of the step sizes in this round.

    Returns:
        ``lr`` (of the trained factor), and under SGD the least and largest gamma if layers are
        sketched; empty if a user's function trains.
    """
    if local.is_own:
        return {}
    rate = local.rate(main=True, rate_scale=rate_scale)
    if local.optimizer != "sgd":
        return {"lr": rate}
    gammas = []
    for adapter in downlink.adapters.values():
        specs = [spec for f in adapter.factors.values() if (spec := f.drawing)]
        if specs:
            scale, gram = adapter.scale, prod(spec.gram_scale for spec in specs)
            for extra in local.added:
                scale, gram = extra.step_in_weights(scale, gram)
            gammas.append(rate * scale**2 * gram)
    if not gammas:
        return {"lr": rate}
    return {"lr": rate, "gamma_min": min(gammas), "gamma_max": max(gammas)}
