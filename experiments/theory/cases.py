"""What ``fedraclora theory`` runs: one case is one curve and its bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from fedraclora.experiments.theory.bounds.spectrum import beside_kept, of_downlink, paired
from fedraclora.experiments.theory.bounds.theorems import local_step_limit, rounding
from fedraclora.experiments.theory.problems import Problem, problem
from fedraclora.experiments.theory.runs import first_downlink
from fedraclora.protocol.quantised import FULL
from fedraclora.sketch import SKETCHES, Constants
from fedraclora.strategies.fed_rac_lora import FedRacLora
from fedraclora.strategies.subspace_rac_lora import SubspaceRacLora
from fedraclora.training.extras.settings import LocalSettings

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
        side: Of the sketch.
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
    side: str = "right"
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
                resample_every=self.link,
                fresh=self.fresh,
                kept_scale=self.kept_scale,
                pairs=self.pairs,
            )
        return FedRacLora(
            rank=self.rank,
            alpha=SCALE * self.rank,
            sketch=self.sketch,
            side=self.side,
            blocks="cover" if self.theorem == "cover" else "independent",
            resample_every=self.link,
            density=0.25,
            cap=False,
        )

    @property
    def period(self) -> int:
        """J, rounds that a bound takes as one: those of a cover, or of a link."""
        if self.theorem != "cover":
            return self.link
        m, n = next(problem(self.problem).task.model.parameters()).shape
        return (n if self.side == "right" else m) // self.rank

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
        found = [of_downlink(first_downlink(task, method))]
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
