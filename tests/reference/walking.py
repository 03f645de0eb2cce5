"""What one client does that walks along drawn directions, as the oracle writes it out."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch

from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.strategies.methods.fedkseed import CHANCES, ReusedDirections
from fedraclora.strategies.methods.ferret import ProjectUpdate, blocks
from fedraclora.strategies.shared.walking import FiniteDifferences, walk_of
from fedraclora.tree import Tree


def numbers(sent: RoundInstructions, held: Tree, client: int, size: int) -> list[int]:
    """The direction of each number that a client sends, or that it takes step by step."""
    program = sent.program
    if not isinstance(program, ReusedDirections):
        return [*range(size)]
    chances = held.get(CHANCES, torch.zeros(0))
    chances = chances if len(chances) else torch.ones(program.seeds)
    drawn = program.visited(torch.tensor([client]), 64 if program.sums else size, chances)
    return [int(j) for j in drawn[0]]


def looking(sent: RoundInstructions) -> FiniteDifferences:
    """How clients look along directions."""
    return cast(FiniteDifferences, sent.program)


def room(sent: RoundInstructions) -> int | None:
    """The most local steps of a client; None where any number of them fits."""
    program = looking(sent)
    return None if program.by_direction else sent.layout.size // program.directions


def along(
    sent: RoundInstructions, held: Tree, client: int, size: int, step: int
) -> list[tuple[int, int]]:
    """Which numbers a local step trains, and the directions of these."""
    drawn, P = numbers(sent, held, client, size), looking(sent).directions
    places = range(step * P, (step + 1) * P)
    sums = looking(sent).by_direction
    return [(drawn[at] if sums else at, drawn[at]) for at in places]


def slopes(
    sent: RoundInstructions,
    weights: Tree,
    at: list[tuple[int, int]],
    there: Callable[[Tree, float], float],
) -> tuple[torch.Tensor, float]:
    """The gradient of the numbers, and the mean loss around where the client is."""
    size = torch.Size(next(iter(sent.dense.values())).shape).numel()
    gradient, seen = torch.zeros(size, dtype=torch.float64), list[float]()
    eps = looking(sent).eps
    for place, j in at:
        z = {n: torch.zeros_like(w) for n, w in weights.items()}
        z |= {n: walk_of(sent).direction(n, weights[n], j) for n in walk_of(sent).names}
        seen += [there(z, eps), there(z, -eps)]
        gradient[place] += (seen[-2] - seen[-1]) / (2 * eps * len(at))
    return gradient, sum(seen) / len(seen)


def applied_moves(
    sent: RoundInstructions, held: Tree, base: Tree, client: int, moves: torch.Tensor
) -> Tree:
    """Weights of a client: those from which it went, and what it has moved along each direction."""
    flat = moves.flatten().tolist()
    sums = looking(sent).by_direction
    drawn = [*range(len(flat))] if sums else numbers(sent, held, client, len(flat))
    out = dict(base)
    for name in walk_of(sent).names:
        for j, by in zip(drawn, flat, strict=True):
            if by:
                out[name] = out[name] + by * walk_of(sent).direction(name, base[name], j)
    return out


def shadow(sent: RoundInstructions, base: Tree, after: Tree) -> torch.Tensor:
    """Products of a client's change with the directions of each block, over their number."""
    walk, found = walk_of(sent), list[torch.Tensor]()
    shapes = {n: tuple(base[n].shape) for n in walk.names}
    for names, count in blocks(shapes, cast(ProjectUpdate, sent.program).directions):
        for j in range(count):
            each = [(walk.direction(n, base[n], j) * (after[n] - base[n])).sum() for n in names]
            found.append(torch.stack(each).sum() / count)
    return torch.stack(found)
