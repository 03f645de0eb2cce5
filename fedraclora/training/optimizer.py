"""Run local optimizers on a whole chunk of clients at once.

State tensors carry the client axis [K, ...]. Unless `fedraclora.training.moments` says otherwise
they are reset in each round: moments refer to the round's sketch and would be meaningless under the
next one (axolotl PR 1414 shows the cost of a reset that silently does nothing).

Second moments of rows outlive sketches (``local.optimizer_state=rows``): the server averages them.
Under a right sketch B has the gradient g = s G A^T, with G that of the weight. Where the rows a_j
of A are uniform on the sphere, E[a_j a_j^T] = I / n, so that whatever the draw

    E[g_ij^2] = s^2 ||G_i||^2 / n                (left sketches: s^2 ||column j of G||^2 / m)

An entry of B means another thing under each sketch, but the second moments of its rows go on. m of
them stand for the m r of AdamW:

    client k:  v_k <- v in all entries of a row, then AdamW's steps;  sends the mean over each row
    server:    v <- sum_k p_k v_k,   w <- sum_k p_k w_k

The first moment, which has the sketch's coordinates, begins at zero in each round. w is the moving
average of the constant 1, ``w <- beta2 w + 1 - beta2`` at each step of v: what v has to be divided
by so that its mean is that of the squares, v / w. It takes the place of ``1 - beta2^t`` in AdamW's
correction and is equal to it for one client. Since it is averaged with v, squares count alike
whichever round they are of and however many steps a client takes, until 1 / (1 - beta2) steps have
been seen; after a start without correction the first round's would count more for as long.

Tensors that are trained in full begin each round without moments. Uplink: m + 1 numbers per factor
more; the same for the downlink from the second round on.

References:
    Start and average of second moments by blocks: *FedAdamW*, arXiv 2510.27486 (its abstract).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from typing_extensions import override

from fedraclora.protocol.factor import Factor, to_train
from fedraclora.protocol.instructions import RoundInstructions
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import Tree

ROW_SLOT = "rows/"  # prefix of slots and moments; the rest is the name of the factor


def row_slots(sent: RoundInstructions, kept: Tree) -> dict[str, Factor]:
    """Build the slots that carry the row moments of trained factors, m + 1 numbers for B.

    Args:
        sent: The method's downlink.
        kept: Moments so far, by the names of the slots; zero if missing.
    """
    found = {}
    for name, slot in sent.factors().items():
        if slot.trained and slot.upload and name.endswith(("/A", "/B")):
            rows = slot.shape[_axis(name) ^ 1]
            found[ROW_SLOT + name] = to_train((rows + 1,), kept.get(ROW_SLOT + name), main=False)
    return found


def taken_rows(sent: RoundInstructions) -> tuple[RoundInstructions, Tree]:
    """Split the slots of `row_slots` from a downlink.

    Returns:
        The rest, and moments by the names of factors.
    """
    slots = {n: slot for n, slot in sent.dense.items() if n.startswith(ROW_SLOT)}
    if not slots:
        return sent, {}
    dense = {n: slot for n, slot in sent.dense.items() if n not in slots}
    rows = {}
    for name, slot in slots.items():
        start = slot.opening()
        rows[name.removeprefix(ROW_SLOT)] = torch.zeros(slot.shape) if start is None else start
    return replace(sent, dense=dense), rows


def _axis(name: str) -> int:
    """Return the axis of a factor's components: the second one of B, the first one of A."""
    return 1 if name.endswith("/B") else 0


class CohortOptimizer:
    """Run SGD or AdamW on tensors [K, ...], with the update rules of ``torch.optim``.

    Args:
        config: Local settings.
        values: The tensors that are trained, [K, ...]; updated in place by `step`.
        rates: Step size of each.
        stored: Initial moments, by the names of `fedraclora.training.moments`; none: zero.
        rows: Initial second moments of rows, by name (`fedraclora.training.optimizer`).
    """

    def __init__(
        self,
        config: LocalConfig,
        values: Tree,
        rates: dict[str, float],
        stored: Tree | None = None,
        rows: Tree | None = None,
    ) -> None:
        self.config, self.values, self.rates = config, values, rates
        self.stored = stored or {}
        self.count = 0
        self.before: torch.Tensor | None = None  # steps of each client in earlier rounds
        self.room: torch.Tensor | None = None  # of `_scratch`
        self.first = self._of_kind("first")
        self.second = self._of_kind("second")
        self.unseen: dict[str, float] = {}  # 1 - w of initial second moments that are not zero
        for name, row in (rows or {}).items():
            v = row[:-1].to(values[name]).unsqueeze(_axis(name))
            self.second[name] = v.expand_as(values[name]).clone()
            self.unseen[name] = 1 - float(row[-1])
        if self.stored:
            steps = self.stored["moments/steps"].to(torch.float64)
            alike = bool((steps == steps[0]).all())
            self.count, self.before = (int(steps[0]), None) if alike else (0, steps)

    @property
    def is_plain(self) -> bool:
        """Return whether a step is just the gradient times its rate."""
        config, derived = self.config, type(self) is not CohortOptimizer
        return config.optimizer == "sgd" and not (config.momentum or config.weight_decay or derived)

    def _of_kind(self, kind: str) -> Tree:
        prefix = f"moments/{kind}/"
        return {n.removeprefix(prefix): t for n, t in self.stored.items() if n.startswith(prefix)}

    def moments(self, steps: torch.Tensor) -> Tree:
        """Return the current moments under the names of ``stored``; empty if none were given.

        Args:
            steps: Steps that each client has taken since, int64 [K].
        """
        return {n: t + steps if n == "moments/steps" else t for n, t in self.stored.items()}

    def rows(self, steps: torch.Tensor) -> Tree:
        """Return the current second moments of rows, [K, m + 1] by the names of ``rows``.

        Args:
            steps: Steps that each client has taken, int64 [K].
        """
        if not self.unseen:
            return {}
        left, found = self.config.beta2 ** steps.to(torch.float64), Tree()
        for name, unseen in self.unseen.items():
            v = self.second[name].mean(dim=_axis(name) + 1)
            found[name] = torch.cat([v, (1 - unseen * left).to(v)[:, None]], dim=1)
        return found

    def step(self, gradients: Tree) -> None:
        """Take one step for the active clients: the first rows of each tensor.

        Args:
            gradients: [active, ...] for each trained tensor.
        """
        self.count += 1
        for name, gradient in gradients.items():
            self._take(name, self.values[name][: gradient.shape[0]], gradient)

    def _take(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> None:
        """Take the step of one tensor, [active, ...], with the moments of this name, in place."""
        if self.config.optimizer == "sgd":
            self._sgd(name, value, gradient)
        else:
            self._adamw(name, value, gradient)

    def _sgd(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> None:
        config = self.config
        if config.weight_decay:
            gradient = gradient.add(value, alpha=config.weight_decay)
        if config.momentum:
            if name not in self.first:
                self.first[name] = torch.zeros_like(self.values[name])
            buffer = self.first[name][: gradient.shape[0]]
            buffer.mul_(config.momentum).add_(gradient)
            gradient = gradient.add(buffer, alpha=config.momentum) if config.nesterov else buffer
        value.add_(gradient, alpha=-self.rates[name])

    def _adamw(self, name: str, value: torch.Tensor, gradient: torch.Tensor) -> None:
        config, rate = self.config, self.rates[name]
        if name not in self.first:
            self.first[name] = torch.zeros_like(self.values[name])
        if name not in self.second:
            self.second[name] = torch.zeros_like(self.values[name])
        active = gradient.shape[0]
        first, second = self.first[name][:active], self.second[name][:active]
        if config.weight_decay:
            value.mul_(1 - rate * config.weight_decay)
        first.lerp_(gradient, 1 - config.beta1)
        second.mul_(config.beta2).addcmul_(gradient, gradient, value=1 - config.beta2)
        if self.before is not None:
            counts = (self.before[:active] + self.count).reshape(-1, *[1] * (gradient.dim() - 1))
            root2, step = (1 - config.beta2**counts).sqrt(), rate / (1 - config.beta1**counts)
            scale = (second.sqrt() / root2.to(second)).add_(config.eps)
            value.sub_(step.to(value) * first / scale)
            return
        # All active clients have taken the same number of steps.
        correction1 = 1 - config.beta1**self.count
        correction2 = 1 - self.unseen.get(name, 1.0) * config.beta2**self.count
        scale = torch.sqrt(second, out=self._scratch(second))
        scale.div_(math.sqrt(correction2)).add_(config.eps)
        value.addcdiv_(first, scale, value=-rate / correction1)

    def _scratch(self, like: torch.Tensor) -> torch.Tensor:
        """Return a reused buffer of a tensor's shape: fresh memory costs more than writing."""
        if self.room is None or self.room.numel() < like.numel():
            self.room = like.new_empty(like.numel())
        return self.room[: like.numel()].view(like.shape)


class GradientMean(CohortOptimizer):
    """Sum gradients instead of taking optimizer steps.

    Clients send the gradient at their start, and take no step (`MeanGradient`):

        g_k = (1 / T_k) sum_tau grad L(w_0; batch tau of client k),  T_k its local steps

    The batches are those of its local training. The mean over the clients of a round is the
    gradient of the server's loss, up to the batches; it has the size of the trained tensors.
    """

    @override
    def step(self, gradients: Tree) -> None:
        self.count += 1
        for name, gradient in gradients.items():
            if name not in self.first:
                self.first[name] = torch.zeros_like(self.values[name])
            self.first[name][: gradient.shape[0]] += gradient

    def means(self, steps: torch.Tensor) -> Tree:
        """Return the mean gradient of each client, [K, ...] by name.

        Args:
            steps: That each client took, int64 [K], in the order of the values.
        """
        counts = steps.clamp(min=1)
        shapes = {n: (-1, *[1] * (t.dim() - 1)) for n, t in self.first.items()}
        return {n: t / counts.reshape(shapes[n]).to(t) for n, t in self.first.items()}


def clip_per_client(gradients: Tree, largest: float, by: str = "all") -> Tree:
    """Scale each client's gradients to a norm of at most ``largest``, as new tensors.

    Args:
        gradients: [K, ...] by name.
        largest: The norm c. A departure from min(1, c / norm), by which papers write it: as in
            torch's ``clip_grad_norm_`` the factor is c / (norm + 1e-6).
        by: ``all``: the norm is that of all of them; ``layer``: each module has its own, over the
            factors of its weights and its bias.
    """
    squares: Tree = {}
    # The module of a trained tensor: ``fc`` of ``fc.weight/B``.
    layers = {n: n.partition("/")[0].rpartition(".")[0] for n in gradients}
    owners = layers if by == "layer" else dict.fromkeys(gradients, "")
    for name, gradient in gradients.items():
        square = gradient.reshape(gradient.shape[0], -1).square().sum(dim=1)
        before = squares.get(owners[name])
        squares[owners[name]] = square if before is None else before + square
    factors = {o: (largest / (s.sqrt() + 1e-6)).clamp(max=1.0) for o, s in squares.items()}
    return {
        n: g * factors[owners[n]].reshape(-1, *[1] * (g.dim() - 1)) for n, g in gradients.items()
    }


def correcting(sent: RoundInstructions, order: torch.Tensor) -> Callable[[Tree], Tree]:
    """Build the hook that adds a round's corrections to the gradients.

    Args:
        sent: The downlink with the corrections, for all clients or [K, ...].
        order: Places of the clients in the order of the gradients, int64 [K]; those that still
            train come first.
    """
    slots = sent.trained()
    added = {
        n: t.to(order.device)[order] if t.dim() > len(slots[n].shape) else t.to(order.device)[None]
        for extra in sent.extras.values()
        for n, t in extra.items()
    }

    def hook(gradients: Tree) -> Tree:
        out = dict(gradients)
        for name, value in added.items():
            gradient = gradients[name]
            out[name] = gradient + value[: len(gradient)].to(gradient)
        return out

    return hook


def mean_gradients(start: Tree, end: Tree, steps: int, rates: dict[str, float]) -> Tree:
    """Average the directions of plain SGD steps: (start - end) / (steps rate), float64."""
    return {n: (start[n].double() - end[n].double()) / (steps * rates[n]) for n in end}
