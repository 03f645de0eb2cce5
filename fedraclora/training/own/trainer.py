"""Local training by a function of the user's, one client after another."""

from __future__ import annotations

import random  # noqa: TID251  (a function of the user's may draw from it)
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from fedraclora.data.task import Task
from fedraclora.errors import ClientError, FedRacLoraError
from fedraclora.imports import failure_of
from fedraclora.protocol.method import Downlink, Plan
from fedraclora.protocol.rank_budgets import trainable
from fedraclora.rng import hash_key
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extra import LocalResult
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.materialise import materialise
from fedraclora.training.memory import is_out_of_memory
from fedraclora.training.own.round import Asked, Round, Trained
from fedraclora.tree import Tree

Train = Callable[[Round], Trained]


class OwnTrainer(CohortTrainer):
    """Has a function of the user's train each client.

    Args:
        task: Model and client data.
        plan: Views of the adapted matrices.
        local: Settings; its loop is not used.
        seed: Of the run.
        device: Where the weights are.
        train: The function.
        name: Of the function, for messages.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        local: LocalConfig,
        *,
        seed: int,
        device: torch.device,
        train: Train,
        name: str,
    ) -> None:
        super().__init__(task, plan, local, seed=seed, device=device)
        self.function, self.name = train, name

    @override
    def train(
        self,
        base: Tree,
        downlink: Downlink,
        clients: torch.Tensor,
        *,
        round_: int,
        rate_scale: float,
        moments: Tree | None = None,
    ) -> LocalResult:
        base, _ = self._with_pools(base, downlink)
        found = [
            self._one(base, downlink.select(place[None]), int(client), round_, rate_scale)
            for place, client in zip(torch.arange(len(clients)), clients, strict=True)
        ]
        losses = [float("nan") if one.loss is None else one.loss for one in found]
        return LocalResult(
            trained={n: torch.stack([one.tensors[n] for one in found]) for n in found[0].tensors},
            losses=torch.tensor(losses, dtype=torch.float64),
            steps=torch.tensor([one.steps for one in found]),
            samples=torch.tensor([one.samples for one in found]),
        )

    def _one(
        self, base: Tree, downlink: Downlink, client: int, round_: int, rate_scale: float
    ) -> Trained:
        """Train one client."""
        seed = hash_key(self.seed, "own", round_, client) % 2**31
        values, _, frozen = materialise(downlink, base, torch.zeros(1, dtype=torch.int64))
        masks = trainable(downlink, downlink.ranks)
        asked = Asked(
            downlink=downlink,
            base=base,
            buffers={n: b.detach() for n, b in self.task.model.named_buffers()},
            values={n: value[0] for n, value in values.items()},
            frozen={n: f[0] if f.dim() > 2 else f for n, f in frozen.items()},
            masks={n: mask[0].to(self.device) for n, mask in masks.items()},
            views=self.plan.targets,
        )
        given = Round(client, round_, seed, self._data_of(client), rate_scale, _asked=asked)
        try:
            with seeded_everywhere(seed), torch.enable_grad():
                found: Any = self.function(given)
        except FedRacLoraError:
            raise
        except SystemExit as error:
            raise ClientError(f"the training function {self.name} ends the process") from error
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise ClientError(failure_of(error, f"the training function {self.name}")) from error
        finally:
            for handle in asked.handles:
                handle.remove()
        if not isinstance(found, Trained) or (found.client, found.number) != (client, round_):
            came = f"a {type(found).__name__}"
            if isinstance(found, Trained):
                came = f"what client {found.client} trained in round {found.number}"
            raise ClientError(
                f"the training function {self.name} returned {came}; what round.read gives in "
                "this call is wanted"
            )
        return found

    def _data_of(self, client: int) -> Any:
        """Return the samples of one client."""
        if self.task.brought is not None:
            return self.task.brought(client)
        size = int(self.data.sizes(torch.tensor([client], device=self.device)))
        places = torch.arange(size, device=self.device)[None]
        return self.data.gather(torch.tensor([client], device=self.device), places)


@contextmanager
def seeded_everywhere(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python, and put them back afterwards."""
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)  # noqa: TID251
        np.random.seed(seed)  # noqa: NPY002, TID251
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
