"""Recipes: what clients do beyond plain local steps, each named and tested by itself.

A recipe is a bundle of hooks that both the vectorised trainer and the one-client oracle call at
the same places. Gradients and values carry a leading client axis [K, ...] (K = 1 in the oracle).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from fedraclora.protocol.downlink import Downlink
from fedraclora.protocol.rank_budgets import within
from fedraclora.rng import generator
from fedraclora.tree import Tree

GradientHook = Callable[[Tree], Tree]
Arguments = Mapping[str, float | int]
Prepare = Callable[[Tree, Arguments, torch.Tensor | None], GradientHook]


def keep_gradient(gradients: Tree) -> Tree:
    """Leave the gradients as they are."""
    return gradients


def projected(
    frozen: Tree, _arguments: Arguments | None = None, ranks: torch.Tensor | None = None
) -> GradientHook:
    """Precondition by the frozen factor's Gram matrix: g_B (A A^T)^+, or (B^T B)^+ g_A.

    Plain SGD on the trained factor is then projected SGD on the weight, W - gamma G H_A with
    gamma = lr s^2, for any sketch. A tensor with no frozen partner keeps its gradient. A client
    with a rank budget projects on the components that it trains.

    Args:
        frozen: Frozen factors by "<weight>/<label>": A [r, n] or [K, r, n], B [m, r] or [K, m, r].
        ranks: Which components each client trains, as in `fedraclora.protocol.rank_budgets.spans`,
            or None.

    Returns:
        The hook for the round; the inverses are formed once, in float64.

    References:
        Zhang et al., *LoRA-FA*, arXiv 2308.03303; Malinovsky et al., arXiv 2410.08305, eq. (4).
    """
    inverses: Tree = {}
    for name, factor in frozen.items():
        weight, _, label = name.rpartition("/")
        wide = factor.to(torch.float64)
        gram = wide @ wide.mT if label == "A" else wide.mT @ wide
        partner = f"{weight}/{'B' if label == 'A' else 'A'}"
        budget = None if ranks is None else within(ranks, gram.shape[-1]).to(gram)
        if budget is not None and not bool(budget.all()):
            # The pseudo-inverse of a padded block is the padded pseudo-inverse of the block.
            gram = gram * budget[:, :, None] * budget[:, None, :]
        inverses[partner] = torch.linalg.pinv(gram, hermitian=True).to(factor.dtype)

    def change(name: str, gradient: torch.Tensor) -> torch.Tensor:
        inverse = inverses[name]
        if inverse.dim() == 3:  # one factor per client: those still training come first
            inverse = inverse[: len(gradient)]
        return gradient @ inverse if name.endswith("/B") else inverse @ gradient

    def hook(gradients: Tree) -> Tree:
        return {n: change(n, g) if n in inverses else g for n, g in gradients.items()}

    return hook


def part_of(gradient: torch.Tensor, parts: int) -> torch.Tensor:
    """Number the columns of a gradient [K, m, r] by the part they belong to, of equal ones: [r]."""
    columns = gradient.shape[-1]
    return torch.arange(columns, device=gradient.device) * parts // columns


def block_diagonal(_frozen: Tree, arguments: Arguments, *_: object) -> GradientHook:
    """Train the diagonal blocks of the middle factor "R" alone; what is beside them stays.

    Args:
        arguments: ``blocks``: how many; it divides the rows of R.
    """
    blocks = int(arguments["blocks"])

    def cut(gradient: torch.Tensor) -> torch.Tensor:
        block = part_of(gradient, blocks)
        return gradient.masked_fill(block[:, None] != block, 0)

    def hook(gradients: Tree) -> Tree:
        return {n: cut(g) if n.endswith("/R") else g for n, g in gradients.items()}

    return hook


def in_turn(_frozen: Tree, arguments: Arguments, *_: object) -> GradientHook:
    """Train one part of the columns of each B at a time, the parts in turn.

    Args:
        arguments: ``parts``, how many; ``interval``, local steps of a turn.

    Returns:
        The hook for the round: it counts its calls, one for each local step.
    """
    parts, interval = int(arguments["parts"]), int(arguments["interval"])
    calls = iter(range(2**63))

    def hook(gradients: Tree) -> Tree:
        turn = next(calls) // interval % parts
        return {
            n: g.masked_fill(part_of(g, parts) != turn, 0) if n.endswith("/B") else g
            for n, g in gradients.items()
        }

    return hook


def as_matrices(stored: torch.Tensor, *, turned: bool) -> torch.Tensor:
    """View weights [K, ...] as [K, out, in]; ``turned`` where they are stored (in, out)."""
    return stored.mT if turned else stored.reshape(*stored.shape[:2], -1)


def sparse(_frozen: Tree, arguments: Arguments, *_: object) -> GradientHook:
    """Train a random share of the entries of full weights; one mask for all clients, for good.

    Args:
        arguments: ``density``, the chance of an entry to be trained; ``seed/<weight>``, of the mask
            of each weight that has one; ``turned/<weight>`` for those stored (in, out), whose mask
            is turned, too.
    """
    masks: Tree = {}

    def mask(name: str, gradient: torch.Tensor) -> torch.Tensor:
        if name not in masks:
            like = as_matrices(gradient[:1], turned=f"turned/{name}" in arguments)
            drawn = generator(int(arguments[f"seed/{name}"]), "mask").random(tuple(like.shape[1:]))
            chosen = torch.from_numpy(drawn < arguments["density"])
            chosen = chosen.mT if f"turned/{name}" in arguments else chosen
            masks[name] = chosen.reshape(gradient.shape[1:]).to(gradient)
        return masks[name]

    def hook(gradients: Tree) -> Tree:
        return {n: g * mask(n, g) if f"seed/{n}" in arguments else g for n, g in gradients.items()}

    return hook


@dataclass(frozen=True)
class Recipe:
    """Hooks of one client behaviour, prepared once a round.

    Attributes:
        gradient: Makes the hook from the frozen factors, the recipe's arguments and the clients'
            rank budgets.
        steps: Whether clients take local steps; False: they send the mean of their gradients, and
            stay where they are (`fedraclora.training.optimiser`).
        fixes: Whether some entries of what is trained have no gradient, ever: they stay as they
            are, unless something else than a gradient moves them.
        projects: Whether the optimiser projects the gradients of whole weights
            (`fedraclora.training.moments`). Its arguments are ``gap``, the local steps that a
            projection serves; ``scale``, of what is projected back; ``rank/<weight>`` for each
            weight that is projected; ``turned/<weight>`` for those stored (in, out).
        walks: Whether clients move the whole weights that `Downlink.walk` names, and send numbers
            along its directions in their place (`fedraclora.training.walks`).
        forwards: Whether these numbers are what is trained, by differences of losses alone. The
            arguments are then ``eps``; ``directions`` of a local step; ``pool``, how many
            directions there are for all rounds, or 0; ``pairs``, whether a number is sent for each
            local step, of which there are no more then, or for each direction; ``round``.
    """

    gradient: Prepare = lambda *_: keep_gradient
    steps: bool = True
    fixes: bool = False
    projects: bool = False
    walks: bool = False
    forwards: bool = False


RECIPES: dict[str, Recipe] = {
    "plain": Recipe(),
    "projected": Recipe(gradient=projected),
    "block_diagonal": Recipe(gradient=block_diagonal, fixes=True),
    "in_turn": Recipe(gradient=in_turn),
    "sparse": Recipe(gradient=sparse, fixes=True),
    "galore": Recipe(projects=True),
    "gradient": Recipe(steps=False),
    "forwards": Recipe(walks=True, forwards=True),
    "projected_update": Recipe(walks=True),
}


def most_steps(sent: Downlink) -> int | None:
    """Return the most local steps of a client, where a number is sent for each; None: no bound.

    Those that its epochs or ``local.steps`` do not give are not taken, and their numbers are zeros.
    """
    if not (RECIPES[sent.recipe].forwards and sent.arguments["pairs"]):
        return None
    return sent.layout.size // int(sent.arguments["directions"])
