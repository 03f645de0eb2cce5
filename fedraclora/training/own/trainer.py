"""Local training by a function of the user's, one client after another."""

from __future__ import annotations

import ctypes
import io
import math
import os
import random  # noqa: TID251  (a function of the user's may draw from it)
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from fedraclora.data.samples import Samples
from fedraclora.data.task import Task
from fedraclora.errors import ClientError, FedRacLoraError
from fedraclora.imports import failure_of
from fedraclora.narrow_weight import dense
from fedraclora.protocol.link import Link, apply_link
from fedraclora.protocol.method import Downlink, Plan
from fedraclora.protocol.uplinks import UNSAID
from fedraclora.rng import hash_key
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.extra import LocalResult
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.memory import is_out_of_memory
from fedraclora.training.own.ranks import Sums
from fedraclora.training.own.round import Asked, Round
from fedraclora.training.own.trained import Trained
from fedraclora.tree import Tree, widened

Train = Callable[[Round], Trained]


class OwnTrainer(CohortTrainer):
    """Has a function of the user's train each client.

    Args:
        task: Model and client data.
        plan: Views of the adapted matrices.
        local: Settings; its loop is not used.
        seed: Of the run.
        device: Where the weights are.
        function: The user's.
        name: Of the function, for messages.
        timeout: Seconds that it may take for one client; None: any.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        local: LocalConfig,
        *,
        seed: int,
        device: torch.device,
        function: Train,
        name: str,
        timeout: float | None = None,
    ) -> None:
        super().__init__(task, plan, local, seed=seed, device=device)
        self.function, self.timeout = function, timeout
        self.sums = 0, Sums()  # of a round
        self.came: dict[int, list[int]] = {}  # by client, `versions` of its samples
        self.name = name.partition("@")[0]  # of one that a program lends, without its digest

    @override
    def check(self, precision: str) -> None:
        pass  # how it computes is for the function to say, and batches of it are one client's

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
        base, narrow = self._with_pools(base, downlink)
        base = dense(apply_link(widened(base), Link(narrow), self.plan) if narrow else base)
        states: dict[int, bytes] = {}
        found = [
            self._one(base, downlink.select(place[None]), client, round_, rate_scale, states)
            for place, client in zip(torch.arange(len(clients)), clients.tolist(), strict=True)
        ]
        return as_result(found, states)

    def _one(
        self,
        base: Tree,
        downlink: Downlink,
        client: int,
        round_: int,
        rate_scale: float,
        states: dict[int, bytes],
    ) -> Trained:
        """Train one client; ``states`` takes what it keeps."""
        if self.sums[0] != round_:
            self.sums = round_, Sums()
        buffers = dict(self.task.model.named_buffers())
        asked = Asked.of(base, downlink, self.plan.targets, buffers, self.sums[1])
        seed = seed_of(self.seed, round_, client)
        kept = b"" if self.recall is None else self.recall(client, round_)
        given = Round(
            client, round_, seed, self._data_of(client), rate_scale, state_of(kept), _asked=asked
        )
        self._unchanged(given)
        try:
            with seeded_everywhere(seed), torch.enable_grad(), at_most(self.timeout):
                found: Any = self.function(given)
        except (FedRacLoraError, KeyboardInterrupt):
            raise
        except OutOfTimeError as error:
            raise ClientError(
                f"the training function {self.name} took longer than local.timeout="
                f"{self.timeout:g} seconds: raise it, or have it take fewer steps"
            ) from error
        except BaseException as error:  # it may want to end the process
            if isinstance(error, Exception) and is_out_of_memory(error):
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
        asked.check(found.tensors)
        self._unchanged(given)
        if given.state or kept:
            states[client] = told_of(given.state)
        return found

    def _unchanged(self, given: Round) -> None:
        """Refuse samples that are not as they came first; tensors are looked at."""
        now = versions(given.data)
        if now != self.came.setdefault(given.client, now):
            raise ClientError(
                f"the training function {self.name} has changed round.data in place, so that the "
                "client's rounds would train on other samples: let it work on a copy"
            )

    def _data_of(self, client: int) -> Any:
        """Return the samples of one client."""
        if self.task.brought is not None:
            return self.task.brought(client)
        size = int(self.data.sizes(torch.tensor([client], device=self.device)))
        places = torch.arange(size, device=self.device)[None]
        return self.data.gather(torch.tensor([client], device=self.device), places)


def as_result(found: Sequence[Trained], states: dict[int, bytes] | None = None) -> LocalResult:
    """Stack what clients have trained; ``states`` is what they keep."""
    losses = [UNSAID if one.loss is None else one.loss for one in found]
    names = sorted({name for one in found for name in one.metrics})
    told = {n: [one.metrics.get(n, math.nan) for one in found] for n in names}
    return LocalResult(
        trained={n: torch.stack([one.tensors[n] for one in found]) for n in found[0].tensors},
        losses=torch.tensor(losses, dtype=torch.float64),
        steps=torch.tensor([one.steps for one in found]),
        samples=torch.tensor([one.samples for one in found]),
        states=states or {},
        metrics={n: torch.tensor(each, dtype=torch.float64) for n, each in told.items()},
    )


def seed_of(run: int, number: int, client: int) -> int:
    """Give the seed of a client in a round, from that of its run."""
    return hash_key(run, "own", number, client) % 2**31


def versions(found: Any) -> list[int]:
    """Count the changes in place of the tensors among samples, as torch counts them."""
    if isinstance(found, torch.Tensor):
        return [found._version]  # noqa: SLF001
    each = found.tensors if isinstance(found, Samples) else found
    if not isinstance(each, dict | list | tuple):
        return []
    return [n for v in (each.values() if isinstance(each, dict) else each) for n in versions(v)]


def state_of(told: bytes) -> dict[str, Any]:
    """Read what `told_of` wrote."""
    found = torch.load(io.BytesIO(told), weights_only=True) if told else {}
    return dict(found)


def told_of(state: object) -> bytes:
    """Write what a client keeps: it may come back in another process, from a checkpoint.

    Raises:
        ClientError: If it is no dict of what can be read again safely.
    """
    try:
        written = io.BytesIO()
        torch.save(state, written)
        state_of(written.getvalue())
    except Exception as error:
        raise ClientError(
            "round.state holds what cannot be kept: a dict of tensors, numbers, texts, lists and "
            "dicts is wanted, as of optimiser.state_dict()"
        ) from error
    return written.getvalue()


class OutOfTimeError(BaseException):
    """The time of a client is over; a function that catches every Exception does not catch it."""


@contextmanager
def at_most(seconds: float | None) -> Iterator[None]:
    """Interrupt what takes longer; what is in C is interrupted where it comes back to Python.

    Raises:
        OutOfTimeError: If it did.
    """
    if seconds is None:
        yield
        return
    if threading.current_thread() is threading.main_thread() and hasattr(signal, "setitimer"):
        before = signal.signal(signal.SIGALRM, _out_of_time)  # it wakes what sleeps, too
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        return
    raise_in, here = ctypes.pythonapi.PyThreadState_SetAsyncExc, threading.get_ident()
    timer = threading.Timer(
        seconds, raise_in, (ctypes.c_ulong(here), ctypes.py_object(OutOfTimeError))
    )
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        raise_in(ctypes.c_ulong(here), None)  # one that came too late to be raised


def _out_of_time(*_: object) -> None:
    raise OutOfTimeError


@contextmanager
def seeded_everywhere(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python, and put them back afterwards.

    So are what torch computes with, and the working folder.
    """
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    numpy_state, python_state = np.random.get_state(), random.getstate()  # noqa: NPY002
    dtype, threads, folder = torch.get_default_dtype(), torch.get_num_threads(), Path.cwd()
    with torch.random.fork_rng(devices=devices):
        # `torch.manual_seed` keeps the stack of its call for each GPU library that is not there.
        seeding = torch.cuda.is_available()
        (torch.manual_seed if seeding else torch.default_generator.manual_seed)(seed)  # noqa: TID251
        np.random.seed(seed)  # noqa: NPY002, TID251
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(numpy_state)  # noqa: NPY002
            random.setstate(python_state)
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            os.chdir(folder)
