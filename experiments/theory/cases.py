"""What ``fedraclora theory`` runs: one case is one curve and its bound."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fedraclora.errors import ConfigError
from fedraclora.experiments.theory.bounds import local_step_limit, rounding
from fedraclora.experiments.theory.problems import Problem, problem, round_1
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.protocol.quantized import FULL
from fedraclora.sketch import SKETCHES, Constants, SketchSpec, constants
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.subspace_rac_lora import SubspaceRacLora
from fedraclora.training.extras.settings import LocalSettings


def over_layers(specs: Iterable[SketchSpec], *, dense: bool = False) -> Constants:
    """Combine the extreme eigenvalues of E[H] over layers: the least and the greatest of theirs.

    H is block diagonal over the layers, so it stays a projection and everything holds with these
    (derived here). A constant rank on layers of unequal width makes ``lambda_max / lambda_min``
    exceed 1, and the bounds' floors grow by that factor; a rank written as a fraction does not.

    Args:
        specs: One sketch for each sketched layer.
        dense: Whether further layers are trained in full, with eigenvalue 1.

    Returns:
        The constants.

    Raises:
        ConfigError: If nothing is trained.

    Example:
        >>> wide = SketchSpec("orthonormal", "right", rank=2, dim=16, seed=0, index=0)
        >>> over_layers([wide, SketchSpec("gaussian", "left", rank=2, dim=4, seed=0, index=0)])
        Constants(lambda_min=0.125, lambda_max=0.5)
    """
    found = [constants(spec) for spec in specs] + [Constants(1.0, 1.0)] * dense
    if not found:
        raise ConfigError("no layer is trained, so there is no E[H]; give at least one sketch")
    return Constants(min(c.lambda_min for c in found), max(c.lambda_max for c in found))


def beside_kept(
    rank: int, kept: int, dim: int, length: float = 1.0, *, local: bool = False
) -> Constants:
    """Compute the constants of a link k of whose rows are known from the past, given that past.

    With orthonormal kept rows K of length c, and fresh ones uniform in their complement, a step is
    ``W - gamma D g`` with ``D = c^2 K^T K + F^T F <= I``. Progress needs the least eigenvalue of
    E[D]; noise needs the greatest of E[D^2], and under local steps that of E[D]
    (docs/records/theory.md, section 9):

        E[D] = c^2 K^T K + (r - k) / (d - k) (I - K^T K),    E[D^2] likewise with c^4

    Args:
        rank: r.
        kept: k, at most r.
        dim: d, at least r.
        length: c.
        local: Whether clients take several steps of a round.

    Example:
        >>> beside_kept(rank=4, kept=2, dim=12)
        Constants(lambda_min=0.2, lambda_max=1.0)
    """
    share = (rank - kept) / (dim - kept) if dim > kept else 1.0
    if not kept:
        return Constants(share, share)
    return Constants(min(length**2, share), max(length ** (2 if local else 4), share))


def paired(rank: int, dim: int) -> Constants:
    """Compute the constants of links in pairs: one drawn, the next on the range of the last change.

    The second of a pair makes no progress that is proved, and takes in all noise (lambda_max 1).
    Together they have the progress of one and the noise of both (docs/records/theory.md, section
    9); these are the means over both. A curve above its floor of noise stays below what one bound
    with the means says: of two rounds with progress x and none, ``1 - x <= (1 - x/2)^2``.

    Args:
        rank: r.
        dim: d, of the drawn rows.

    Example:
        >>> paired(rank=4, dim=16)
        Constants(lambda_min=0.125, lambda_max=0.625)
    """
    share = rank / dim
    return Constants(share / 2, (share + 1) / 2)


def of_downlink(downlink: RoundInstructions) -> Constants:
    """Compute the extreme eigenvalues of E[H] of a round from what the cohort is sent.

    Args:
        downlink: Of a method that draws its sketches anew in each round.

    Returns:
        The constants over its layers; 1 for tensors that are trained in full.

    Where groups train parts of one drawing these are the constants of the whole drawing.

    Raises:
        ConfigError: If an adapter is not one sketched and one trained factor, or clients have
            rank budgets: the step is then no projected gradient step.
    """
    parts = downlink.ranks is not None and downlink.ranks.dim() == 2
    if downlink.ranks is not None and not parts:
        raise ConfigError("clients have rank budgets, which no theorem here covers; leave them out")
    specs = []
    for name, adapter in downlink.adapters.items():
        drawn = [spec for f in adapter.factors.values() if (spec := f.drawing)]
        if len(drawn) != 1 or len(adapter.factors) != 2:
            raise ConfigError(
                f"the adapter of {name} has the factors {sorted(adapter.factors)}, of which "
                f"{len(drawn)} are sketched; the theorems need one sketched and one trained"
            )
        if parts and SKETCHES[drawn[0].kind].basis is None:
            raise ConfigError(
                f"{name} has several {drawn[0].kind!r} sketches, which are not orthogonal to one "
                "another; the theorems need a kind with orthonormal rows"
            )
        specs += drawn
    return over_layers(specs, dense=bool(downlink.dense))


SCALE = 1.5  # s = alpha / r of every case, so that lr and the step in weight space differ


@dataclass(frozen=True)
class TheoryCase:
    """One curve.

    Attributes:
        panel: Figure and panel that show it.
        label: Its line in the panel.
        problem: A key of `fedraclora.experiments.theory.problems.PROBLEMS`.
        theorem: ``gd``, ``gd_link``, ``sgd``, ``reshuffling``, ``federated`` or ``cover``.
        rank: r.
        rounds: T.
        train: The factor that clients train: B or A.
        sketch: Kind of the sketch.
        batch: Samples of a step; 0: all of a client's.
        cohort: Clients of a round; None: all of them.
        share: Step over the largest that the theorem allows.
        fresh: Share of fresh rows where links are built on those before them; None: they are not.
        kept_scale: Length of the kept rows there.
        pairs: Whether every other link there is drawn whole.
        link: Rounds of a link.
        kind: How numbers go up and down.
    """

    panel: str
    label: str
    problem: str
    theorem: str
    rank: int
    rounds: int
    train: str = "B"
    sketch: str = "orthonormal"
    batch: int = 0
    cohort: int | None = None
    share: float = 1.0
    fresh: float | None = None
    kept_scale: float | str = 1.0
    pairs: bool = False
    link: int = 1
    kind: str = FULL

    @property
    def name(self) -> str:
        """Panel and label."""
        return f"{self.panel}: {self.label}"

    @property
    def method(self) -> FedRacLora | SubspaceRacLora:
        """Fed-RAC-LoRA with this sketch, or on the links before."""
        if self.fresh is not None:
            return SubspaceRacLora(
                rank=self.rank,
                alpha=SCALE * self.rank,
                cap=False,
                merge_every=self.link,
                fresh=self.fresh,
                kept_scale=self.kept_scale,
                pairs=self.pairs,
            )
        return FedRacLora(
            rank=self.rank,
            alpha=SCALE * self.rank,
            sketch=self.sketch,
            train=self.train,
            blocks="cover" if self.theorem == "cover" else "independent",
            merge_every=self.link,
            density=0.25,
            cap=False,
        )

    @property
    def period(self) -> int:
        """J, rounds that a bound takes as one: those of a cover, or of a link."""
        if self.theorem != "cover":
            return self.link
        m, n = next(problem(self.problem).task.model.parameters()).shape
        return (n if self.train == "B" else m) // self.rank

    @property
    def local_steps(self) -> int:
        """N, local steps of a round."""
        samples = problem(self.problem).each.shape[1]
        return samples // self.batch if self.theorem in {"reshuffling", "federated"} else 1

    @property
    def step(self) -> float:
        """The step in weight space, gamma."""
        ground = problem(self.problem)
        if self.local_steps == 1:
            return self.share / (ground.smoothness * (1 + rounding(self.kind, self.kind)))
        smoothness = self.smoothness(ground)
        cohort = self.taking_part
        return self.share * local_step_limit(smoothness, self.local_steps, ground.clients, cohort)

    @property
    def taking_part(self) -> int:
        """K, clients of a round."""
        return self.cohort or problem(self.problem).clients

    def spectrum(self) -> Constants:
        """Compute the constants of every link: of the first, and of those built on the last."""
        task, method, local = problem(self.problem).task, self.method, self.local_steps > 1
        if self.pairs:
            return paired(self.rank, next(task.model.parameters()).shape[1])
        found = [of_downlink(round_1(task, method))]
        if isinstance(method, SubspaceRacLora):
            shape, kept = next(task.model.parameters()).shape, method.kept(self.rank, 1)
            rows = [(self.rank, kept, d, method.length(self.rank, d)) for d in shape]
            found += [beside_kept(*row, local=local) for row in rows]
        least, greatest = min(c.lambda_min for c in found), max(c.lambda_max for c in found)
        return Constants(least, greatest)

    def smoothness(self, ground: Problem) -> float:
        """The L that the theorem asks for."""
        whole = self.theorem not in {"reshuffling", "federated"}
        return ground.smoothness if whole else ground.batch_smoothness(self.batch)

    @property
    def local(self) -> LocalSettings:
        """Local settings; sketches whose rows are not orthonormal need the preconditioner."""
        return LocalSettings(
            lr=self.step / SCALE**2,
            batch_size=self.batch,
            steps=1 if self.local_steps == 1 else None,
            shuffle=self.batch > 0,
            precondition=SKETCHES[self.sketch].basis is None,
        )


def expanded(row: Mapping[str, Any]) -> Iterator[TheoryCase]:
    """Make the curves of a panel: one for each place of its lists, or the only one."""
    lists = {key: value for key, value in row.items() if isinstance(value, list)}
    for values in zip(*lists.values(), strict=True):
        fields = {**row, **dict(zip(lists, values, strict=True))}
        yield TheoryCase(**fields | {"label": fields["label"].format(**fields)})


def all_cases(size: str = "full") -> list[TheoryCase]:
    """Every case that has a bound; ``small``: the first of every panel, a few rounds of it."""
    panels = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    cases = [case for panel in panels for case in expanded(panel)]
    if size == "full":
        return cases
    first = {case.panel: case for case in reversed(cases)}
    return [replace(c, rounds=max(c.period, c.rounds // 12, 2)) for c in first.values()]
