"""A trial of the user's own parts of a local step: in them no clients meet, and nothing stays."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from typing_extensions import override

from fedraclora.errors import ConfigError
from fedraclora.models.outputs import nothing_drawn
from fedraclora.objects import held, refuse_changed
from fedraclora.protocol.downlink import Downlink
from fedraclora.rng import generator
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extra import LocalExtra
from fedraclora.training.memory import Enough, Probe, owned
from fedraclora.training.program import OpenChunk
from fedraclora.tree import Tree

CLOSE = 1e-3  # of the largest change: what is computed beside other numbers may round otherwise


class Pair(Probe):
    """Has two equal clients take a step, the second one from values ``away`` from the first's."""

    away = 0.0
    chunk: OpenChunk

    @override
    def open(self, *given: Any, **named: Any) -> OpenChunk:
        self.chunk = super().open(*given, **named)
        for name, value in self.chunk.values.items():
            drawn = torch.from_numpy(generator(0, name).standard_normal(value.shape[1:]))
            value[1:].add_(drawn.to(value), alpha=self.away)
        return self.chunk


def refuse_meeting(trainer: CohortTrainer, base: Tree, downlink: Downlink, chunk: int) -> None:
    """Refuse extras of the user's own in which clients of a chunk meet, or which change.

    Raises:
        ConfigError: Naming them.
    """
    if not (own := [extra for extra in trainer.local.extras if isinstance(extra, LocalExtra)]):
        return
    before, said = [*map(held, own)], " and ".join(map(trainer.local.told, own))
    ids, changes = torch.zeros(min(2, chunk)).long().to(trainer.device), list[Tree]()
    with nothing_drawn():
        for away in (0.1, 0.2, 0.1):
            pair = Pair(trainer, None)
            pair.away = away
            with suppress(Enough):
                pair.train(base, owned(downlink, len(ids)), ids, round_=1, rate_scale=1.0)
            values, starts = pair.chunk.values, pair.chunk.starts
            changes.append({name: value[0] - starts[name][0] for name, value in values.items()})
    for extra, then in zip(own, before, strict=True):
        refuse_changed(trainer.local.told(extra), extra, then)
    first, other, again = changes
    if not _alike(first, again):
        raise ConfigError(
            f"{said}: the same step gives something else the second time: a part of a local step "
            "keeps nothing from call to call, and draws by the seed of its chunk alone"
        )
    if not _alike(first, other):
        raise ConfigError(
            f"{said}: what a client trains depends on the other clients of its batch (a mean over "
            "the first axis, for example): treat each row of the first axis by itself"
        )


def _alike(one: Tree, other: Tree) -> bool:
    near = {name: CLOSE * float(value.abs().max()) for name, value in one.items()}
    return all(torch.allclose(v, other[n], CLOSE, near[n], equal_nan=True) for n, v in one.items())
