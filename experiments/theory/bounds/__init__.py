r"""Convergence bounds of chains of random projections, as functions of named constants.

A round with sketches H (block diagonal over layers, ``H = H^2 = H^T``), drawn anew and
independently of the past, moves the weights by ``-step H g``; where a part of H is known from the
past, all holds given that past (`spectrum.beside_kept`). Every theorem here is one inequality, with
f the objective and t the round,

    E f(W^{t+1}) <= E f(W^t) - progress E ||grad f(W^t)||^2 + error,                       (*)

and its two consequences, for T rounds and Delta = f(W^0) - f*:

    (1/T) sum_{t<T} E ||grad f(W^t)||^2 <= Delta / (progress T) + error / progress
    E f(W^T) - f* <= q^T Delta + (1 - q^T) error / (1 - q),   q = 1 - 2 mu progress

The second needs the Polyak-Lojasiewicz inequality ``||grad f||^2 >= 2 mu (f - f*)`` at every
iterate: put into (*) it gives ``e_{t+1} <= q e_t + error``. `Descent` holds (progress, error), and
each theorem is a function that gives one.

What is the paper's (Malinovsky et al., arXiv 2410.08305) and what was derived here is said by each
function; all proofs are in docs/records/theory.md. None covers momentum, adaptive steps, several
local epochs, clients of unequal weight or number of steps, or rank budgets. Where a sketch lives
for several rounds, (*) is about its whole link.
"""
