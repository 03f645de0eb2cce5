"""Clients that move whole weights and send numbers along drawn directions (`protocol.walk`).

``forwards``: what is trained is the numbers c themselves, by differences of losses and no backward
pass. Local step t of a client looks along P directions, of which it trains the numbers:

    g_p = (L(W + eps z_p) - L(W - eps z_p)) / (2 eps)      the gradient of c_p is g_p / P
    W <- W + sum_j (c_j - c_j before) z_j                  (with V between, under momentum)

The optimiser takes its step on c: SGD and its momentum on c are those on W. All clients of a chunk
look at once, in two forward passes a direction, with the same dropout in both. The loss that is
reported is the mean of the two, up to eps^2 that of W.

``projected_update``: plain local training; what is sent is its change D = W_new - W, by blocks:

    gamma_j = <D, z_j> / n for the n directions of the block: sum_j gamma_j z_j is unbiased for D
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.factor import past_name, to_train
from fedraclora.protocol.method import Plan
from fedraclora.protocol.recipes import RECIPES
from fedraclora.protocol.walk import MOVES, blocks, chances_in, visited
from fedraclora.training.extra import ClientChunk, Forward, mean_losses
from fedraclora.tree import Tree


def as_held(downlink: Downlink, plan: Plan) -> Downlink:
    """Say what clients hold who walk, as a downlink: whole weights; any other as it is."""
    if not RECIPES[downlink.recipe].walks:
        return downlink
    names = downlink.directions.names
    dense = {n: to_train(plan.shapes[n], main=n in plan.weights) for n in names}
    return replace(downlink, dense=dense, recipe="plain", arguments={})


class Forwards:
    """Stands in the place of gradients of the loss: those of the numbers along directions.

    Args:
        chunk: Of clients, of the recipe ``forwards``; its values are the numbers.
        base: The weights from which they go, with what stands beside them.
        steps: The most local steps of a client.
    """

    def __init__(self, chunk: ClientChunk, base: Tree, steps: int) -> None:
        walk, arguments = chunk.downlink.directions, chunk.downlink.arguments
        self.walk = walk
        self.eps, self.count = float(arguments["eps"]), int(arguments["directions"])
        values = chunk.values[MOVES]
        K, size = len(values), int(values[0].numel())
        self.pool, self.pairs = int(arguments["pool"]), bool(arguments["pairs"])
        # The direction of each number: [1, size] where clients share them.
        self.numbers = torch.arange(size)[None]
        self.drawn = self.numbers
        if self.pool:
            chances = chances_in(base, self.pool)
            who, turn = chunk.clients, int(arguments["round"])
            self.drawn = visited(walk.seed, turn, who, size if self.pairs else steps, chances)
            self.numbers = self.drawn if self.pairs else self.numbers
        self.weights = {n: base[n].expand(K, *base[n].shape).clone() for n in walk.names}
        self.moving: Tree = {}
        if walk.momentum:
            zeros = {n: torch.zeros_like(base[n]) for n in walk.names}
            past = {n: base.get(past_name(n), zeros[n]) for n in walk.names}
            self.moving = {n: t.expand(K, *t.shape).clone() for n, t in past.items()}
        self.seen = values.flatten(1).clone()

    def gradients(
        self, chunk: ClientChunk, forward: Forward, active: int, width: int, step: int
    ) -> tuple[torch.Tensor, Tree]:
        """Compute losses and gradients, as `LocalExtra.gradients` does; then weights move."""
        del width
        values = chunk.values[MOVES]
        if step:
            self._follow(values.flatten(1)[:active])
        gradient = torch.zeros_like(self.seen[:active])
        total = torch.zeros(active, dtype=gradient.dtype, device=gradient.device)
        for p in range(self.count):
            places = step * self.count + p
            drawn = self.drawn[:active, places] if self.pool else torch.tensor([places])
            at = drawn if self.pool and not self.pairs else torch.full_like(drawn, places)
            z = {n: self._stacked(n, drawn) for n in self.walk.names}
            up, down = (self._losses(forward, z, active, side) for side in (self.eps, -self.eps))
            slope = (up - down) / (2 * self.eps * self.count)
            at = at.to(gradient.device).expand(active)[:, None]
            gradient.scatter_(1, at, slope[:, None].to(gradient))
            total += (up + down) / (2 * self.count)
        return total, {MOVES: gradient.view(active, *values.shape[1:])}

    def _losses(self, forward: Forward, z: Tree, active: int, eps: float) -> torch.Tensor:
        """Compute the mean loss of each client on its batch, eps along its direction."""
        with torch.no_grad():
            there = {n: torch.add(w[:active], z[n], alpha=eps) for n, w in self.weights.items()}
            return mean_losses(*forward(there, {}))

    def _stacked(self, name: str, drawn: torch.Tensor) -> torch.Tensor:
        """Draw a direction of a weight for each client, [active or 1, ...]."""
        weight = self.weights[name]
        each = {j: self.walk.direction(name, weight[0], j) for j in set(drawn.tolist())}
        return torch.stack([each[j] for j in drawn.tolist()]).to(weight)

    def _follow(self, now: torch.Tensor) -> None:
        """Move weights by what the optimiser made of the numbers."""
        active = len(now)
        moved, self.seen = (now - self.seen[:active]).cpu(), now.clone()
        columns = moved.any(dim=0).nonzero().flatten().tolist()
        for name, weight in self.weights.items():
            part, like = weight[:active], (-1, *[1] * (weight.dim() - 1))
            if self.moving:
                self.moving[name][:active] *= self.walk.momentum
            for column in columns:
                drawn = self.numbers[: active if len(self.numbers) > 1 else 1, column]
                step = self._stacked(name, drawn) * moved[:, column].view(like).to(weight)
                (self.moving[name][:active] if self.moving else part).add_(step)
            if self.moving:
                part.add_(self.moving[name][:active])


def shadows(downlink: Downlink, before: Tree, after: Tree) -> Tree:
    """Compute what clients send of the change of their weights, by name, [K, ...].

    Args:
        downlink: Of the recipe ``projected_update``.
        before: Whole weights from which they went.
        after: Where they are, [K, ...].
    """
    walk = downlink.directions
    found, shapes = list[torch.Tensor](), {n: tuple(before[n].shape) for n in walk.names}
    changes = {n: (after[n] - before[n]).flatten(1) for n in walk.names}
    for names, count in blocks(shapes, int(downlink.arguments["directions"])):
        for j in range(count):
            z = {n: walk.direction(n, before[n], j).reshape(-1) for n in names}
            along = sum(changes[n] @ z[n].to(changes[n]) for n in names)
            found.append(torch.as_tensor(along) / count)
    return {MOVES: torch.stack(found, dim=1)}
