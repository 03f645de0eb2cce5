"""The plain loop on PEFT: Fed-RAC-LoRA as one writes it by hand around a Hugging Face model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from fedraclora.experiments.bench.runs import opened, trainer_of
from fedraclora.experiments.bench.workloads import LR, Case
from fedraclora.sketch import SketchSpec
from fedraclora.strategies.fed_rac_lora import FedRacLora
from fedraclora.training.precision import FLOAT32, products_in
from fedraclora.tree import Tree

DEFAULT = "default"  # PEFT's name of the one adapter


class PeftLoop:
    """One model with one adapter, one client after another, a running sum, a merge.

    Args:
        case: Whose local work is done, under the sketches of the vectorised row.
        precision: Of the matrix products.
    """

    def __init__(self, case: Case, precision: str = FLOAT32) -> None:
        import peft

        self.case, self.precision, self.done = case, precision, 0
        method = FedRacLora(rank=case.workload.rank)
        _, downlink = opened(method, trainer_of(case, method)(), case.workload.cohort)
        self.sketches: dict[str, SketchSpec] = {}
        self.scales: dict[str, float] = {}
        for weight, adapter in downlink.adapters.items():
            name, spec = weight.removesuffix(".weight"), adapter.factors["A"]
            if isinstance(spec, SketchSpec):
                self.sketches[name], self.scales[name] = spec, adapter.scale
        config = peft.LoraConfig(
            target_modules=[*self.sketches],
            rank_pattern={name: spec.rank for name, spec in self.sketches.items()},
            alpha_pattern={n: self.scales[n] * spec.rank for n, spec in self.sketches.items()},
        )
        inner = case.model.train()
        self.model: Any = peft.get_peft_model(inner, config)  # it replaces layers of `inner`
        self.layers: dict[str, Any] = {name: inner.get_submodule(name) for name in self.sketches}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_("lora_B" in name)

    def weights(self) -> Tree:
        """Return the weights after the last round."""
        merged = {f"{n}.weight": layer.base_layer.weight for n, layer in self.layers.items()}
        return dict(self.case.task.model.named_parameters()) | merged

    def round(self) -> None:
        """Draw A, train B from zero at each client in turn, average, and merge."""
        data, workload = self.case.task.train, self.case.workload
        B = {name: layer.lora_B[DEFAULT].weight for name, layer in self.layers.items()}
        sums = {name: torch.zeros_like(factor) for name, factor in B.items()}
        with torch.no_grad():
            for name, spec in self.sketches.items():
                drawn = replace(spec, index=self.done).draw()
                self.layers[name].lora_A[DEFAULT].weight.copy_(drawn)
        places = torch.arange(workload.samples, device=self.case.device).split(workload.batch)
        for client in torch.arange(workload.clients, device=self.case.device).split(1):
            with torch.no_grad():
                for factor in B.values():
                    factor.zero_()
            optimiser = torch.optim.SGD(B.values(), lr=LR)
            for place in places:
                batch = data.gather(client, place[None]).trim()  # to its own longest text
                optimiser.zero_grad()
                with products_in(self.precision, self.case.device):
                    loss = self.model(**batch.inputs, labels=batch.target).loss
                loss.backward()
                optimiser.step()
            for name, factor in B.items():
                sums[name] += factor.detach()
        with torch.no_grad():
            for name, layer in self.layers.items():
                A, mean = layer.lora_A[DEFAULT].weight, sums[name] / workload.clients
                layer.base_layer.weight.addmm_(mean, A, alpha=self.scales[name])
        self.done += 1
