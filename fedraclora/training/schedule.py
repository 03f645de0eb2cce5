"""Lay out which sample each client of a chunk sees at which local step."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch

from fedraclora.models.packed_layout import bucket_tops
from fedraclora.rng import cohort_permutations
from fedraclora.training.localconfig import LocalConfig


class StepBatch(NamedTuple):
    """Describe the size of one local step of a chunk; known on the host before the round.

    Attributes:
        active: Clients that still train at this step.
        width: Samples of the widest of their batches.
        length: Tokens of their longest sample; 0 where samples have none, or no padding.
        real: Tokens of all their samples without padding; 0 where all are to be computed.
        longest: The same of the client that has most.
        tops: Tokens of the longest sample of each bucket
            (`fedraclora.models.packed_layout.bucket_tops`).
    """

    active: int
    width: int
    length: int = 0
    real: int = 0
    longest: int = 0
    tops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Schedule:
    """Hold which sample each client sees when: positions and validity, [K, steps, width]."""

    positions: torch.Tensor
    valid: torch.Tensor
    steps: torch.Tensor  # int64 [K]

    def select(self, order: torch.Tensor) -> Schedule:
        """Select the clients at these positions, int64, in their order."""
        return Schedule(self.positions[order], self.valid[order], self.steps[order])

    def until(self, most: int) -> Schedule:
        """Drop the local steps after the first ``most`` of each client."""
        return Schedule(self.positions[:, :most], self.valid[:, :most], self.steps.clamp(max=most))

    def plan(self, lengths: torch.Tensor | None) -> list[StepBatch]:
        """Compute for every step how much of the batch is active.

        It is copied from the device once a round: a read in every step would stall a GPU.

        Args:
            lengths: Tokens of the sample at each of the positions, or None.
        """
        widths = self.valid.sum(dim=2)
        alive = (widths > 0).sum(dim=0)
        columns = [alive, widths.amax(dim=0)]
        if lengths is None:
            return [StepBatch(*row) for row in torch.stack(columns, dim=1).tolist()]
        counted = lengths * self.valid
        own = counted.sum(dim=2)
        columns += [counted.amax(dim=(0, 2)), own.sum(dim=0), own.amax(dim=0)]
        sorted_ = counted.transpose(0, 1).flatten(1).sort(dim=1, descending=True).values
        whole = torch.cat([torch.stack(columns, dim=1), sorted_], dim=1).tolist()
        batches = []
        for alive_, widest, length, real, longest, *tokens in whole:
            tops = bucket_tops(tokens[: alive_ * widest])
            batches.append(StepBatch(alive_, widest, length, real, longest, tops))
        return batches

    @classmethod
    def of(
        cls, clients: torch.Tensor, sizes: torch.Tensor, local: LocalConfig, key: int
    ) -> Schedule:
        """Lay out the local steps: epochs in turn, each reshuffled, the last batch short.

        Args:
            clients: int64 [K].
            sizes: Samples per client, int64 [K], all positive.
            local: Batch size, epochs or steps, shuffling.
            key: Of the round's shuffles.

        Returns:
            The schedule.
        """
        largest = int(sizes.max())
        width = min(local.batch_size or largest, largest)
        batch = local.batch_size or sizes[:, None]  # of all samples: an epoch is one step
        per_epoch = (sizes[:, None] + batch - 1) // batch  # [K, 1]
        fixed = None if local.steps is None else torch.full_like(sizes, local.steps)
        steps = per_epoch[:, 0] * local.epochs if fixed is None else fixed
        count = int(steps.max())
        step = torch.arange(count, device=sizes.device)
        epoch = step // per_epoch  # [K, steps]
        place = torch.arange(width, device=sizes.device)
        position = (step % per_epoch * batch)[..., None] + place
        inside = position < sizes[:, None, None]
        valid = inside & (step < steps[:, None])[..., None]
        if local.shuffle and count:
            last = (steps - 1) // per_epoch[:, 0]
            position = _shuffled(position, epoch, last, clients, sizes, key)
        return cls(torch.where(valid, position, 0), valid, steps)


def _shuffled(
    position: torch.Tensor,
    epoch: torch.Tensor,
    last: torch.Tensor,
    clients: torch.Tensor,
    sizes: torch.Tensor,
    key: int,
) -> torch.Tensor:
    """Replace positions by each client's shuffled order of that epoch.

    Epochs that the same clients reach are drawn together, as wide as the largest client: a client
    of few samples beside a large one may train many epochs, or finish long before it.

    Args:
        position: In the order of the data, [K, steps, width]; those that no client trains on may
            lie beyond its samples, and become anything.
        epoch: Of each step, [K, steps].
        last: The last epoch of each client, [K].
        clients: int64 [K].
        sizes: Samples per client, int64 [K].
        key: Of the round's shuffles.
    """
    ends = sorted(set((last + 1).tolist()))
    starts = torch.zeros(len(clients), ends[-1], dtype=torch.int64, device=sizes.device)
    drawn: list[torch.Tensor] = []
    total = 0
    for begin, end in pairwise((0, *ends)):
        here = (last >= begin).nonzero()[:, 0]
        rows, epochs = here, begin
        if end > begin + 1:
            rows = here.repeat_interleave(end - begin)
            epochs = torch.arange(begin, end, device=sizes.device).repeat(len(here))
        shuffles = cohort_permutations(key, clients[rows], sizes[rows], epochs)
        first = torch.arange(len(rows), device=sizes.device) * shuffles.shape[1] + total
        starts[here, begin:end] = first.reshape(len(here), -1)
        drawn.append(shuffles.flatten())
        total += shuffles.numel()
    flat = starts.gather(1, epoch.clamp(max=ends[-1] - 1))[..., None] + position
    return torch.cat(drawn).take(flat.clamp_(max=total - 1))
