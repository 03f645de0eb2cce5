"""Error feedback: a client adds the quantization error of its last update to its next one.

    client k sends Q(c_k + e_k),  c_k its update, and keeps
    e_k <- c_k + e_k - Q(c_k + e_k),  which is zero before its first round

Q rounds to the nearest. Error feedback corrects its bias, and its mean squared error is half that
of stochastic rounding (for uniformly distributed numbers). After q rounds the sum of the sent
updates differs from the sum of the true ones by one quantization error instead of q.

This helps if successive updates change the same tensor. The residue of a factor is dropped at a
merge, since the next factor has another frozen one beside it. With a pool of sketches a client
keeps one residue for each sketch until its next turn. Residues of tensors trained in full are kept.

References:
    Seide et al., *1-Bit stochastic gradient descent*, Interspeech 2014; Karimireddy et al., *Error
    feedback fixes SignSGD*, ICML 2019, arXiv 1901.09847.
"""

from __future__ import annotations

import torch

from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.tree import Tree

PREFIX = "residue/"
LIFE = f"{PREFIX}life"  # by place in the pool: the number of what its residues are of, and 1


def blank_residues(sent: RoundInstructions, dtype: torch.dtype) -> Tree:
    """Build zero residues of a new client, by the names under which they are stored.

    Args:
        sent: The round's instructions. A client that sends gradients keeps no residues.
        dtype: Of the stored tensors.

    Returns:
        Tensors without a client axis.
    """
    if not sent.program.trains:
        return {}
    _, count, _ = sent.frame
    found = {LIFE: torch.zeros(count, dtype=dtype)}
    for name, slot in sent.uploaded().items():
        places = range(1 if name in sent.dense else count)
        found |= {_key(name, j): torch.zeros(slot.shape, dtype=dtype) for j in places}
    return found


def to_add(stored: Tree, sent: RoundInstructions) -> torch.Tensor:
    """Return the residues to add to the updates of this round.

    Args:
        stored: By the names of `blank_residues`, [K, ...].
        sent: What is asked.

    Returns:
        In the form of rows, float64 [K, P].
    """
    place, _, number = sent.frame
    lives = stored[LIFE][:, place] == number + 1
    found = {}
    for name in sent.uploaded():
        if name in sent.dense:
            found[name] = stored[_key(name, 0)].double()
            continue
        e = stored[_key(name, place)].double()
        found[name] = torch.where(lives.reshape(-1, *[1] * (e.dim() - 1)), e, 0.0)
    return sent.layout.pack(found, lead=1)


def left_over(stored: Tree, sent: RoundInstructions, left: torch.Tensor) -> Tree:
    """Store the quantization error of this round's updates.

    Args:
        stored: As `to_add` had it. Not modified.
        sent: What was asked.
        left: In the form of rows, float64 [K, P].
    """
    place, _, number = sent.frame
    life = stored[LIFE].clone()
    life[:, place] = number + 1
    found = {**stored, LIFE: life}
    for name, e in sent.layout.unpack(left).items():
        key = _key(name, 0 if name in sent.dense else place)
        found[key] = e.to(stored[key])
    return found


def _key(name: str, place: int) -> str:
    return f"{PREFIX}{place}/{name}"
