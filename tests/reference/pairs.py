"""What the one-client loop does with pairs of factors, written to be read: 2-D, no batches.

It shares no code with `fedraclora.training.extras`, whose oracle it is: systems are solved as they
stand in the papers, and polar forms come from SVDs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from typing_extensions import override

from fedraclora.protocol.method import RoundInstructions
from fedraclora.training.extras.settings import LocalSettings
from fedraclora.tree import Tree

NOTHING = 1e-13  # of the largest eigenvalue: what float64 cannot tell from zero


def adjust_gradients(
    local: LocalSettings, downlink: RoundInstructions, values: Tree, frozen: Tree
) -> None:
    """Replace the gradients of factors by those that ``precondition`` or ``adjust`` wants.

    Args:
        local: Says which, and the damping.
        downlink: Says which adapters there are.
        values: What is trained, with its gradients.
        frozen: Factors that are not trained.
    """
    if not downlink.program.trains:
        return  # a probe sends gradients as they are
    if local.precondition:
        precondition(values, frozen)
    for weight, adapter in downlink.adapters.items() if local.adjust != "none" else ():
        s = adapter.scale
        names = f"{weight}/B", f"{weight}/A"
        B, A = (values.get(n, frozen.get(n)).detach() for n in names)  # type: ignore[union-attr]
        gB, gA = (values[n].grad if n in values else None for n in names)
        eye = torch.eye(B.shape[1], dtype=B.dtype)
        inverse_A = torch.linalg.inv(A @ A.T + local.damping * eye)
        inverse_B = torch.linalg.inv(B.T @ B + local.damping * eye)
        new_B = None if gB is None else gB @ inverse_A
        new_A = None if gA is None else inverse_B @ gA
        if local.adjust == "lora_pro":
            new_B = None if new_B is None else new_B / s**2
            new_A = None if new_A is None else new_A / s**2
            if new_B is not None and new_A is not None:
                # B^T B X + X A A^T = -new_A A^T, with X as a vector, row after row.
                system = torch.kron(B.T @ B, eye) + torch.kron(eye, A @ A.T)
                X = torch.linalg.pinv(system, hermitian=True) @ -(new_A @ A.T).flatten()
                X = X.view_as(eye)
                new_B = new_B - B @ inverse_B @ B.T @ new_B - B @ X
                new_A = new_A + X @ A
        for name, new in zip(names, (new_B, new_A), strict=True):
            if new is not None:
                values[name].grad = new


def precondition(values: Tree, frozen: Tree) -> None:
    """Multiply each factor's gradient by the pseudo-inverse of its frozen partner's Gram matrix."""
    for name, value in values.items():
        weight, _, label = name.rpartition("/")
        if value.grad is None:
            continue
        if label == "B" and f"{weight}/A" in frozen:
            A = frozen[f"{weight}/A"]
            value.grad = value.grad @ torch.linalg.pinv(A @ A.T)
        elif label == "A" and f"{weight}/B" in frozen:
            B = frozen[f"{weight}/B"]
            value.grad = torch.linalg.pinv(B.T @ B) @ value.grad


class LocalRite(torch.optim.AdamW):
    """LoRA-RITE on factors, AdamW on the rest.

    Args:
        groups: As of `torch.optim.AdamW`, with the name of each tensor as ``name``.
        frozen: Factors that are not trained, by name.
        **settings: As of `torch.optim.AdamW`.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], frozen: Tree, **settings: Any) -> None:
        super().__init__(groups, **settings)
        self.frozen = frozen
        self.moments: dict[str, dict[str, torch.Tensor]] = {}
        self.count = 0

    @override
    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.count += 1
        tensors = {group["name"]: group["params"][0] for group in self.param_groups}
        before = {name: tensor.clone() for name, tensor in (self.frozen | tensors).items()}
        for group in self.param_groups:
            weight, _, label = group["name"].rpartition("/")
            partner = before.get(f"{weight}/{'A' if label == 'B' else 'B'}")
            if partner is None:
                continue
            value = tensors[group["name"]]
            turned = label == "A"
            gradient = value.grad.T if turned else value.grad
            move = self._move(group, gradient, partner if turned else partner.T)
            value.mul_(1 - group["lr"] * group["weight_decay"])
            value.sub_(group["lr"] * (move.T if turned else move))
            value.grad = None  # AdamW passes over it
        super().step(closure)

    def _move(
        self, group: dict[str, Any], gradient: torch.Tensor, partner: torch.Tensor
    ) -> torch.Tensor:
        rows, r = gradient.shape
        left, s, right = torch.linalg.svd(partner, full_matrices=False)
        nonzero = s**2 > NOTHING * s.max() ** 2
        left, s, right = left[:, nonzero], s[nonzero], right[nonzero]
        basis, inverse = left @ right, right.T @ torch.diag(1 / s) @ right
        g = gradient @ inverse
        blank = {"M": torch.zeros(rows, r), "V": torch.zeros(r, r), "e": torch.zeros(())}
        blank = {key: value.to(g) for key, value in blank.items()}
        moments = self.moments.setdefault(group["name"], blank | {"basis": basis})
        t = self.count
        b1, b2 = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in group["betas"])
        P = basis.T @ moments["basis"]
        turned = P @ moments["V"] @ P.T
        lost = torch.linalg.eigvalsh(moments["V"]) - torch.linalg.eigvalsh(turned)
        moments["e"] = b2 * (moments["e"] + lost.abs().max())
        moments["V"] = b2 * turned + (1 - b2) * g.T @ g / rows
        values, turn = torch.linalg.eigh(moments["V"])
        values = values.clamp(min=0) + moments["e"]
        nonzero = values > NOTHING * values.max()
        turn, values = turn[:, nonzero], values[nonzero]
        whitened = g @ turn @ torch.diag(1 / (values.sqrt() + group["eps"])) @ turn.T
        moments["M"] = b1 * moments["M"] @ P.T + (1 - b1) * whitened
        moments["basis"] = basis
        move: torch.Tensor = moments["M"] @ inverse
        return move


class LocalGates:
    """SoRA's gates around a torch optimizer: the gradients of C and z come from autograd.

    Args:
        local: The penalty.
        values: What is trained. B of each adapter (A where that alone is trained) becomes the
            product of a factor and a gate that are trained in its place.
        downlink: Says which adapters there are.
        make: Makes the torch optimizer of named parameters; a gate is named after its factor.
    """

    def __init__(
        self,
        local: LocalSettings,
        values: Tree,
        downlink: RoundInstructions,
        make: Callable[[list[tuple[str, torch.Tensor]]], torch.optim.Optimizer],
    ) -> None:
        self.values, self.own, named = values, dict[str, tuple[torch.Tensor, torch.Tensor]](), []
        for name, value in values.items():
            weight, _, label = name.rpartition("/")
            alone = f"{weight}/B" not in values
            if weight in downlink.adapters and (label == "B" or alone):
                factor = value.detach().clone().requires_grad_()
                gate = torch.ones(value.shape[label == "B"], dtype=value.dtype, requires_grad=True)
                self.own[name] = factor, gate
                named += [(name, factor), (name, gate)]
            else:
                named.append((name, value))
        self.optimizer, self.penalty = make(named), local.gate_penalty or 0.0

    def product(self, name: str) -> torch.Tensor:
        """Compute the gated factor as the model sees it."""
        factor, gate = self.own[name]
        return factor * gate if name.endswith("/B") else gate[:, None] * factor

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.optimizer.zero_grad()
        for name in self.own:
            self.values[name].grad = None

    def step(self) -> None:
        """Take one step of the optimizer, then close gates a little."""
        for name in self.own:
            self.product(name).backward(self.values[name].grad)
        self.optimizer.step()
        rates = {id(g["params"][0]): g["lr"] for g in self.optimizer.param_groups}
        with torch.no_grad():
            for name, (_, gate) in self.own.items():
                shrunk = gate.abs() - rates[id(gate)] * self.penalty
                gate.copy_(gate.sign() * shrunk.clamp(min=0))
                self.values[name].copy_(self.product(name))
