"""Train clients one after another with a function of the user's."""

from __future__ import annotations

import copy
import io
import logging
import math
import os
import random  # noqa: TID251  (a function of the user's may draw from it)
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from typing_extensions import override

from fedraclora.data.fingerprint import USED_UP, Fingerprint, fingerprint_of, what_differs
from fedraclora.errors import ClientError, FedRacLoraError
from fedraclora.imports import failure_of
from fedraclora.models.outputs import restored_generators
from fedraclora.narrow_weight import dense
from fedraclora.protocol.link import Link, apply_link
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.program import LocalResult
from fedraclora.protocol.uplinks import UNSAID
from fedraclora.rng import hash_key
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.memory import is_out_of_memory
from fedraclora.training.own.deadline import OutOfTimeError, call_within
from fedraclora.training.own.round import ClientTask, Round
from fedraclora.training.results import Trained
from fedraclora.tree import Tree, widened

log = logging.getLogger(__name__)
FIRST = 256  # clients whose samples are checked before any client trains
MOST_PARTS = 300_000  # of samples that are remembered: about 50 MB
Train = Callable[[Round], Trained]


class OwnTrainer(CohortTrainer):
    """Train each client with a user's function.

    Args:
        function: The user's function.
        name: Its name, for messages.
        timeout: Time limit for one client in seconds; None: no limit.
        most: The most samples that a client may report.

    The others are those of `CohortTrainer`.
    """

    def __init__(
        self,
        *given: Any,
        function: Train,
        name: str,
        timeout: float | None = None,
        most: int = 2**63 - 1,
        **named: Any,
    ) -> None:
        super().__init__(*given, **named)
        self.function, self.timeout, self.most = function, timeout, most
        self.folded: tuple[object, Tree] = None, {}  # what is folded into it, and the base with it
        self.warned = False  # that clients say more samples than they have
        self.fingerprints = SampleFingerprints()
        self.name = name.partition("@")[0]  # of an object of a program, without its digest

    @override
    def check(self, precision: str) -> None:
        pass  # the function decides how it computes, and its batches belong to one client

    @override
    def train(
        self,
        base: Tree,
        downlink: RoundInstructions,
        clients: torch.Tensor,
        *,
        round_: int,
        **given: Any,
    ) -> LocalResult:
        base, narrow = self._folded(base, downlink)
        if narrow and narrow is not self.folded[0]:  # once for all clients of a round
            self.folded = narrow, apply_link(widened(base), Link(narrow), self.plan)
        base = dense(self.folded[1] if narrow else base)
        if self.task.brought is not None and not self.fingerprints.of:
            self._look_at_objects()
        scale = self.local.rate(main=True, rate_scale=float(given["rate_scale"]))
        states, found = dict[int, bytes](), list[Trained]()
        for place, client in enumerate(clients.tolist()):
            own = downlink.select(torch.tensor([place]))
            one, kept = self._one(base, own, client, round_, scale)
            found.append(one)
            states |= {} if kept is None else {client: kept}
        return as_result(found, states)

    def _look_at_objects(self) -> None:
        """Fingerprint the program's objects: clients may share their memory."""
        if self.data.table is None:  # a function gives each client its own object
            return
        for client in range(min(FIRST, self.data.num_clients)):
            self.fingerprints.note(client, self._data_of(client))

    def _one(
        self, base: Tree, downlink: RoundInstructions, client: int, round_: int, rate_scale: float
    ) -> tuple[Trained, bytes | None]:
        """Train one client; return its trained values and its state."""
        buffers = dict(self.task.model.named_buffers())
        asked = ClientTask(base, downlink, self.plan.targets, buffers)
        seed = seed_of(self.seed, round_, client)
        kept = b"" if self.recall is None else self.recall(client, round_)
        data = self._data_of(client)
        first = self.fingerprints.first(client, data)
        given = Round(
            client, round_, seed, apart(data), rate_scale, unpacked_state(kept), _asked=asked
        )
        try:
            with seeded_everywhere(seed), torch.enable_grad():
                found: Any = call_within(self.timeout, self.function, given)
        except (FedRacLoraError, KeyboardInterrupt):
            raise
        except OutOfTimeError as error:
            raise ClientError(
                f"the training function {self.name} took longer than local.timeout={self.timeout} "
                "seconds: raise it, or have it take fewer steps"
            ) from error
        except BaseException as error:  # the function may want to end the process
            if isinstance(error, Exception) and is_out_of_memory(error):
                raise
            raise ClientError(failure_of(error, f"the training function {self.name}")) from error
        finally:
            for handle in asked.handles:
                handle.remove()
        if not isinstance(found, Trained) or (found.client, found.number) != (client, round_):
            other = f"a {type(found).__name__}"
            if isinstance(found, Trained):
                other = f"what client {found.client} trained in round {found.number}"
            raise ClientError(
                f"the training function {self.name} returned {other}, "
                "expected what round.read gives in "
                "this call"
            )
        given.check(found)
        self._check_counts(found, client)
        if part := what_differs(first, fingerprint_of(data, versions=True)):
            raise ClientError(
                f"the training function {self.name} has changed round.data in place ({part}), so "
                "that the client's rounds would train on other samples: let it work on a copy, and "
                "keep what lasts in round.state"
            )
        return found, packed_state(given.state) if given.state or kept else None

    def _check_counts(self, found: Trained, client: int) -> None:
        """Refuse impossible counts; warn once if the data have fewer samples than reported."""
        reported = found.samples
        for name, count in (("samples", reported), ("steps", found.steps)):
            if count > self.most:
                raise ClientError(f"{name}={count} is more than engine.max_samples, {self.most}")
        there = int(self.data.examples(torch.tensor([client], device=self.device)))
        if reported > there and not self.warned:
            self.warned, text = True, "client %d says samples=%d to round.read, and has %d: it is "
            log.warning(
                text + "weighted by what it says (or aggregation_weights=uniform)",
                client,
                reported,
                there,
            )

    def _data_of(self, client: int) -> Any:
        """Return the samples of one client."""
        if self.task.brought is not None:
            return self.task.brought(client)
        size = int(self.data.sizes(torch.tensor([client], device=self.device)))
        places = torch.arange(size, device=self.device)[None]
        return self.data.gather(torch.tensor([client], device=self.device), places)


class SampleFingerprints:
    """Remember the fingerprint of each client's samples at its first request."""

    def __init__(self) -> None:
        self.of: dict[int, Fingerprint] = {}
        self.size = 0

    def note(self, client: int, data: Any) -> Fingerprint:
        """Fingerprint a client's samples, and remember the first."""
        now = fingerprint_of(data, versions=True)
        if client not in self.of:
            # with very many clients, changes are only detected within a round
            if self.size > MOST_PARTS:
                self.of, self.size = {}, 0
            self.of[client], self.size = now, self.size + len(now)
        return now

    def first(self, client: int, data: Any) -> Fingerprint:
        """Return the first fingerprint of a client's samples, and check that they still match it.

        Raises:
            ClientError: If they have changed, or can be read only once.
        """
        now = self.note(client, data)
        if USED_UP in now.values():
            raise ClientError(
                "round.data is or holds an iterator, which the first round would use up: give the "
                "client a list, a dataset or an object that can be read again"
            )
        if part := what_differs(self.of[client], now):
            raise ClientError(
                f"round.data has been changed in place ({part}) since this client was first asked: "
                "have the training function work on a copy, also where clients share memory"
            )
        return self.of[client]


def apart(data: Any) -> Any:
    """Copy a data set of Hugging Face so that ``set_format`` changes only the copy."""
    return copy.deepcopy(data) if hasattr(data, "with_format") else data


def as_result(found: Sequence[Trained], states: dict[int, bytes] | None = None) -> LocalResult:
    """Stack the results of clients; ``states`` are the states that they keep."""
    losses = [UNSAID if one.loss is None else one.loss for one in found]
    names = sorted({name for one in found for name in one.metrics})
    metrics = {n: [one.metrics.get(n, math.nan) for one in found] for n in names}
    return LocalResult(
        trained={n: torch.stack([one.tensors[n] for one in found]) for n in found[0].tensors},
        losses=torch.tensor(losses, dtype=torch.float64),
        steps=torch.tensor([one.steps for one in found]),
        samples=torch.tensor([one.samples for one in found]),
        states=states or {},
        metrics={n: torch.tensor(each, dtype=torch.float64) for n, each in metrics.items()},
    )


def seed_of(run: int, number: int, client: int) -> int:
    """Derive the seed of a client in a round from the run's seed."""
    return hash_key(run, "own", number, client) % 2**31


def unpacked_state(packed: bytes) -> dict[str, Any]:
    """Read a client's state from the bytes of `packed_state`."""
    return dict(torch.load(io.BytesIO(packed), weights_only=True) if packed else {})


def packed_state(state: object) -> bytes:
    """Write a client's state to bytes: it may be resumed in another process, from a checkpoint.

    Raises:
        ClientError: If it is no dict of values that can be read back safely.
    """
    try:
        written = io.BytesIO()
        torch.save(state, written)
        unpacked_state(written.getvalue())
    except Exception as error:
        raise ClientError(
            "round.state holds what cannot be kept: a dict of tensors, numbers, texts, lists and "
            "dicts is wanted, as of optimizer.state_dict()"
        ) from error
    return written.getvalue()


@contextmanager
def seeded_everywhere(seed: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python, and restore them afterwards.

    Torch's numerical settings and the working folder are restored, too.
    """
    devices = [*range(torch.cuda.device_count())] if torch.cuda.is_initialized() else []
    dtype, threads, folder = torch.get_default_dtype(), torch.get_num_threads(), Path.cwd()
    forked = torch.random.fork_rng(devices=devices) if devices else nullcontext()
    with restored_generators(), forked:
        # `torch.manual_seed` keeps the stack trace of its call for each missing GPU library.
        seeding = torch.cuda.is_available()
        (torch.manual_seed if seeding else torch.default_generator.manual_seed)(seed)  # noqa: TID251
        np.random.seed(seed)  # noqa: NPY002, TID251
        random.seed(seed)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)
            torch.set_num_threads(threads)
            os.chdir(folder)
