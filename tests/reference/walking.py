"""What one client does that walks along drawn directions, as the oracle writes it out."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.walk import CHANCES, blocks, visited
from fedraclora.tree import Tree


def numbers(sent: Downlink, held: Tree, client: int, size: int) -> list[int]:
    """The direction of each number that a client sends, or that it takes step by step."""
    pool = int(sent.arguments["pool"])
    if not pool:
        return [*range(size)]
    chances = held.get(CHANCES, torch.zeros(0))
    chances = chances if len(chances) else torch.ones(pool)
    count = size if sent.arguments["pairs"] else 64
    turn = int(sent.arguments["round"])
    drawn = visited(sent.directions.seed, turn, torch.tensor([client]), count, chances)
    return [int(j) for j in drawn[0]]


def room(sent: Downlink) -> int | None:
    """The most local steps of a client; None where any number of them fits."""
    pairs = sent.arguments["pairs"]
    return sent.layout.size // int(sent.arguments["directions"]) if pairs else None


def along(sent: Downlink, held: Tree, client: int, size: int, step: int) -> list[tuple[int, int]]:
    """Which numbers a local step trains, and the directions of these."""
    drawn, P = numbers(sent, held, client, size), int(sent.arguments["directions"])
    places = range(step * P, (step + 1) * P)
    sums = sent.arguments["pool"] and not sent.arguments["pairs"]
    return [(drawn[at] if sums else at, drawn[at]) for at in places]


def slopes(
    sent: Downlink, weights: Tree, at: list[tuple[int, int]], there: Callable[[Tree, float], float]
) -> tuple[torch.Tensor, float]:
    """The gradient of the numbers, and the mean loss around where the client is."""
    size = torch.Size(next(iter(sent.dense.values())).shape).numel()
    gradient, seen = torch.zeros(size, dtype=torch.float64), list[float]()
    eps = float(sent.arguments["eps"])
    for place, j in at:
        z = {n: torch.zeros_like(w) for n, w in weights.items()}
        z |= {n: sent.directions.direction(n, weights[n], j) for n in sent.directions.names}
        seen += [there(z, eps), there(z, -eps)]
        gradient[place] += (seen[-2] - seen[-1]) / (2 * eps * len(at))
    return gradient, sum(seen) / len(seen)


def gone(sent: Downlink, held: Tree, base: Tree, client: int, moves: torch.Tensor) -> Tree:
    """Weights of a client: those from which it went, and what it has moved along each direction."""
    flat = moves.flatten().tolist()
    sums = sent.arguments["pool"] and not sent.arguments["pairs"]
    drawn = [*range(len(flat))] if sums else numbers(sent, held, client, len(flat))
    out = dict(base)
    for name in sent.directions.names:
        for j, by in zip(drawn, flat, strict=True):
            if by:
                out[name] = out[name] + by * sent.directions.direction(name, base[name], j)
    return out


def shadow(sent: Downlink, base: Tree, after: Tree) -> torch.Tensor:
    """Products of a client's change with the directions of each block, over their number."""
    walk, found = sent.directions, list[torch.Tensor]()
    shapes = {n: tuple(base[n].shape) for n in walk.names}
    for names, count in blocks(shapes, int(sent.arguments["directions"])):
        for j in range(count):
            each = [(walk.direction(n, base[n], j) * (after[n] - base[n])).sum() for n in names]
            found.append(torch.stack(each).sum() / count)
    return torch.stack(found)
