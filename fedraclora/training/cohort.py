"""Train a whole chunk of clients locally as one batch.

All clients of a chunk share the frozen weights and differ only in their trained tensors, so K
clients train as one batch: see `fedraclora.training.cohort_layers`. The result equals that of K
runs of the one-client loop in `tests/reference/client.py` (to 1e-10 in float64; a batched product
rounds differently).
"""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from itertools import pairwise

import torch
from torch import nn

from fedraclora.data.clients import ClientData
from fedraclora.data.own_loss import OwnLoss
from fedraclora.data.samples import Samples
from fedraclora.data.task import Task, forward, loss_function
from fedraclora.data.token_losses import output_layer, token_losses
from fedraclora.errors import ClientError, ConfigError
from fedraclora.imports import as_user_error
from fedraclora.protocol.link import Link, Terms, apply_link, matrices
from fedraclora.protocol.method import Plan, RoundInstructions
from fedraclora.protocol.program import (
    ClientProgram,
    GradientStage,
    Hook,
    LocalResult,
    Optimizer,
    mean_losses,
)
from fedraclora.protocol.rank_budgets import cut_gradients, hold, trainable
from fedraclora.protocol.uplinks import UNSAID
from fedraclora.rng import generator, hash_key
from fedraclora.schema import of_project
from fedraclora.training.feedforward import FeedForward
from fedraclora.training.gradients import gradients_of
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.materialize import arrange, materialize
from fedraclora.training.optimizer import (
    ROW_SLOT,
    CohortOptimizer,
    GradientMean,
    clip_per_client,
    correcting,
    taken_rows,
)
from fedraclora.training.precision import FLOAT32, check_precision, products_in
from fedraclora.training.program import (
    CohortProgram,
    OpenChunk,
    refuse_mixing,
    written_out_gradients,
)
from fedraclora.training.schedule import Schedule, StepBatch
from fedraclora.training.vmapped import vmapped_forward
from fedraclora.tree import Tree, parameters, wide, widened

PROGRAMS_KEPT = 4  # each entry holds the base weights that it last trained from


class CohortTrainer:
    """Train chunks of clients of one task; the rewritten model is kept between rounds.

    Args:
        task: Model, loss and client data. The model is copied, never changed.
        plan: Views of the adapted matrices.
        local: Local settings.
        seed: Of the run.
        device: Where to train.
        precision: One of `fedraclora.training.precision.PRECISIONS`.

    Raises:
        ConfigError: If the model or the device does not have this precision.
        ModelError: If a layer mixes the samples of a batch.
    """

    def __init__(
        self,
        task: Task,
        plan: Plan,
        local: LocalConfig,
        *,
        seed: int,
        device: torch.device,
        precision: str = FLOAT32,
    ) -> None:
        self.task, self.plan, self.local, self.seed = task, plan, local, seed
        self.device, self.precision = device, precision
        self.data: ClientData = task.train
        self.loss = loss_function(task.loss)
        self.dtype = wide(next(task.model.parameters()).dtype)
        self.answer_key: bytes | None = None  # a real client replaces this with its own
        # Reads the clients' stored state.
        self.recall: Callable[[int, int], bytes] | None = None
        self.check(precision)
        self.gradient_function = next((e for e in local.added if e.forms_gradients), None)
        self._programs: dict[tuple[str, ...], CohortProgram] = {}
        self._known: tuple[Tree, ClientProgram, tuple[Tree, Terms]] | None = None

    def check(self, precision: str) -> None:
        """Refuse a model that cannot be trained in this precision; raises as the class does."""
        refuse_mixing(self.task.model)
        check_precision(precision, self.task.model, self.device)

    def train(
        self,
        base: Tree,
        downlink: RoundInstructions,
        clients: torch.Tensor,
        *,
        round_: int,
        rate_scale: float,
        moments: Tree | None = None,
    ) -> LocalResult:
        """Train a chunk of clients from the round's downlink.

        Args:
            base: The replica's weights.
            downlink: What to train. Per-client values are [K, ...] in the order of ``clients``.
            clients: Ids, int64 [K], each with at least one sample.
            round_: From 1; keys the shuffles.
            rate_scale: Of the step sizes (`LocalConfig.rate_scale`).
            moments: Initial optimizer moments, [K, ...] in the order of ``clients``; none: they
                begin at zero and end with the round.

        Returns:
            The results, in the order of ``clients``.
        """
        asked, rows = taken_rows(downlink)
        chunk = self.open(base, asked, clients, round_=round_)
        downlink, method = chunk.downlink, asked.program
        schedule, order, values = chunk.schedule, chunk.order, chunk.values
        rates = {n: self.local.rate(s.main, rate_scale) for n, s in downlink.trained().items()}
        carried = {n: t.to(self.device)[order] for n, t in (moments or {}).items()}
        chunk = replace(chunk, moments=carried)
        hooks = self._hooks(chunk)
        kind = CohortOptimizer if method.trains else GradientMean
        plain = kind(self.local, values, rates, carried, rows)
        programs = (*self.local.added, downlink.program) if method.trains else ()
        own = (program.optimizer(chunk, rates) for program in programs)
        optimizer: Optimizer = next(filter(None, own), plain)
        if chunk.network is not None and not hooks and optimizer is plain and plain.is_plain:
            chunk.network.descend(rates)
        losses = torch.zeros(len(order), dtype=torch.float64, device=self.device)
        lengths = self.data.lengths(chunk.clients, schedule.positions)
        try:
            for step, batch in enumerate(schedule.plan(lengths)):
                losses[: batch.active] += self._step(chunk, step, batch, optimizer, hooks)
        finally:
            chunk.program.pack(None)
            chunk.program.context.clear()
        if isinstance(optimizer, GradientMean):
            values = optimizer.means(schedule.steps)
        else:
            values = self._uploads(chunk, asked, values)
        losses[losses == UNSAID] = math.nan  # this call has already computed the result
        moments = optimizer.moments(schedule.steps)
        values = values | {ROW_SLOT + n: row for n, row in plain.rows(schedule.steps).items()}
        return LocalResult(
            trained={name: chunk.in_request_order(value) for name, value in values.items()},
            losses=chunk.in_request_order(losses / schedule.steps.clamp(min=1)).cpu(),
            steps=chunk.in_request_order(schedule.steps).cpu(),
            samples=chunk.in_request_order(self.data.examples(chunk.clients)).cpu(),
            moments={n: chunk.in_request_order(t) for n, t in moments.items()},
        )

    def _uploads(self, chunk: OpenChunk, asked: RoundInstructions, values: Tree) -> Tree:
        """Return the clients' uploads, computed by the round's client programs.

        Raises:
            ClientError: If a program raises or omits a requested tensor; the error names the
                program.
        """
        for program in (*self.local.added, asked.program):
            name = f"{self.local.name_of(program)}: "
            with as_user_error(ClientError, name, "building what clients send (upload)"):
                values = program.upload(chunk, chunk.program.base, values)
        if lost := asked.uploaded().keys() - values.keys():
            raise ClientError(
                f"{self.local.name_of(asked.program)}: upload gives no {', '.join(sorted(lost))}, "
                "which the server asked for: return it with the others"
            )
        return values

    def open(
        self, base: Tree, downlink: RoundInstructions, clients: torch.Tensor, *, round_: int
    ) -> OpenChunk:
        """Lay out the local steps of a chunk and create its trained tensors; see `train`."""
        held, method, inner = (
            base,
            downlink.program,
            downlink.program.trained_model(downlink, self.plan),
        )
        base, narrow = self._folded(base, downlink)
        downlink = downlink if method.forms_gradients else inner
        clients = clients.to(self.device)
        sizes = self.data.sizes(clients)
        key = hash_key(self.seed, "shuffle", round_)
        schedule = Schedule.of(clients, sizes, self.local, key)
        if (most := method.most_steps(downlink)) is not None:
            schedule = schedule.until(most)
        order, back = torch.argsort(schedule.steps, descending=True, stable=True), None
        if not torch.equal(order, places := torch.arange(len(order)).to(order)):
            back = torch.empty_like(order).index_copy_(0, order, places)
            clients, sizes, schedule = clients[order], sizes[order], schedule.select(order)
        values, starts, frozen = materialize(downlink, base, order)
        program = self._program(inner, base)
        if narrow and not program.folded:  # these weights are dense in any case
            program.base = apply_link(widened(base), Link(narrow), self.plan)
        program.context.beside = {
            name: [t.to(self.device, wide(base[name].dtype)) for t in matrices(term)]
            for name, term in narrow.items()
        }
        program.context.seed, program.context.round_ = self.seed, round_
        program.context.scales = {n: a.scale for n, a in downlink.adapters.items()}
        plain, network = program.plain, None
        special = self.precision != FLOAT32 or self.gradient_function is not None or narrow
        if plain is not None and not special and not method.forms_gradients:
            network = FeedForward(plain, downlink, program.base, frozen)
        ranks = None if downlink.ranks is None else downlink.ranks.to(self.device)[order]
        chunk = OpenChunk(
            downlink=downlink,
            clients=clients,
            seed=self.seed,
            round_=round_,
            key=self.answer_key,
            values=values,
            starts=starts,
            frozen=frozen,
            ranks=ranks,
            masks=trainable(downlink, ranks),
            program=program,
            schedule=schedule,
            sizes=sizes,
            order=order,
            back=back,
            network=network,
            gradient_function=self.gradient_function,
            local=self.local,
        )
        if not method.forms_gradients:
            return chunk
        gradient_function = method.gradient_function(
            chunk, held | program.base, int(schedule.steps.max())
        )
        return replace(chunk, gradient_function=gradient_function)

    def _hooks(self, chunk: OpenChunk) -> list[Hook]:
        """List the hooks that change the gradients of a step, in order; the core's come first."""
        downlink, masks = chunk.downlink, chunk.masks
        largest, by = self.local.clip, self.local.clip_by
        method = downlink.program
        found: list[tuple[GradientStage, Hook]] = []
        if downlink.extras:
            correct = correcting(downlink, chunk.order)
            found.append((GradientStage.PROGRAM, lambda gradients, _: correct(gradients)))
        found += method.hooks(chunk).items()
        if masks:
            found.append(
                (GradientStage.BUDGET, lambda gradients, _: cut_gradients(gradients, masks))
            )
        if largest is not None and method.trains:
            found.append(
                (GradientStage.CLIP, lambda gradients, _: clip_per_client(gradients, largest, by))
            )
        for extra in self.local.added:
            found += extra.hooks(chunk).items()
        return [hook for _, hook in sorted(found, key=lambda pair: pair[0])]

    def _step(
        self, chunk: OpenChunk, step: int, batch: StepBatch, optimizer: Optimizer, hooks: list[Hook]
    ) -> torch.Tensor:
        """Take one local step of the active clients; return their losses, [active]."""
        network = chunk.network
        leaves = chunk.leaves(batch.active) if network is None else chunk.trained(batch.active)
        if chunk.gradient_function is not None:
            model = chunk.downlink.program.trained_model(chunk.downlink, self.plan)
            held = replace(chunk, downlink=model)
            run = partial(self._forward, held, step, batch)
            loss, gradients = chunk.gradient_function.gradients(
                chunk, run, batch.active, batch.width, step
            )
        elif network is not None:
            loss, gradients = written_out_gradients(network, self.task, chunk, leaves, step, batch)
        else:
            loss = self.losses(chunk, leaves, step, batch)
            gradients = gradients_of(loss, leaves)
        with torch.no_grad():
            for hook in hooks:
                given = shapes_of(gradients) if step == 0 else None
                gradients = hook(gradients, leaves)
                if given is not None:
                    refuse_other(gradients, given)
            optimizer.step(gradients)
            hold(chunk.values, chunk.starts, chunk.masks, batch.active)
        return loss.detach()

    def losses(self, chunk: OpenChunk, leaves: Tree, step: int, batch: StepBatch) -> torch.Tensor:
        """Compute the mean loss of each active client on its batch, [active].

        Args:
            chunk: Of `open`.
            leaves: Trained tensors of the active clients, [active, ...].
            step: The local step, from 0.
            batch: Of `Schedule.plan`.
        """
        return mean_losses(*self._forward(chunk, step, batch, leaves, chunk.frozen))

    def _forward(
        self, chunk: OpenChunk, step: int, batch: StepBatch, leaves: Tree, frozen: Tree
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Compute loss, count and validity of each sample, [active, width]."""
        program, downlink = chunk.program, chunk.downlink
        samples, valid = chunk.samples(self.data, step, batch)
        context, active = program.context, len(next(iter(leaves.values())))
        if context.layout is not None and context.layout.clients != active:
            program.pack(None)  # every sample counts as a client of its own
        context.active = active
        products = products_in(self.precision, self.device)
        if not program.folded:
            output = vmapped_forward(
                program, downlink, self.plan, leaves, frozen, samples, products
            )
        else:
            context.rows = len(samples)
            context.factors, context.dense = arrange(downlink, leaves, frozen, active)
            head = output_layer(program.copied, self.task.loss)
            with products:
                if head is not None:
                    losses, counts = token_losses(program.copied, head, samples, self.dtype)
                    return losses.reshape(valid.shape), counts.reshape(valid.shape), valid
                output = forward(program.copied, samples.inputs)
        # Outside of the context, so that the loss is formed as precisely on any device.
        losses, counts = self.loss(output.to(self.dtype), samples.target)
        return losses.reshape(valid.shape), counts.reshape(valid.shape), valid

    def blamed(self, error: BaseException) -> str:
        """Name the user's loss or extras that raised an error, for messages; empty if none did."""
        frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
        for caller, frame in pairwise(frames):
            by, of = (str(f.f_globals.get("__name__")) for f in (caller, frame))
            if by == OwnLoss.__module__ != of:
                return f"data.loss={self.task.loss.partition('@')[0]}: "
            own = [extra for extra in self.local.added if type(extra).__module__ == of]
            if own and by.startswith("fedraclora.training.") and not of_project(type(own[0])):
                name = frame.f_code.co_qualname
                inside = [extra for extra in own if name.startswith(type(extra).__qualname__)]
                return " or ".join(map(self.local.name_of, inside or own)) + ": "
        return ""

    def _folded(self, base: Tree, downlink: RoundInstructions) -> tuple[Tree, Terms]:
        """Compute the weights from which clients train, once for all chunks of a round."""
        program, known = downlink.program, self._known
        if type(program).fold is ClientProgram.fold:
            return parameters(base), {}
        if known is None or known[0] is not base or known[1] != program:
            self._known = known = (base, program, program.fold(base, self.plan))
        return known[2]

    def _program(self, downlink: RoundInstructions, base: Tree) -> CohortProgram:
        """Return the rewritten model for what is trained, holding these base weights."""
        adapted = (f"{w}/{label}" for w, a in downlink.adapters.items() for label in a.factors)
        names = (*adapted, "|", *downlink.dense)
        if names not in self._programs:
            if len(self._programs) == PROGRAMS_KEPT:
                del self._programs[next(iter(self._programs))]
            self._programs[names] = CohortProgram.build(self.task, downlink, self.device)
        self._programs[names].load(base)
        return self._programs[names]


def shapes_of(gradients: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Return the shapes of gradients by name; for a value that is no tensor, that of a number."""
    return {name: tuple(getattr(each, "shape", ())) for name, each in gradients.items()}


def refuse_other(gradients: object, wanted: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse gradients from a part of a local step whose names or shapes are not the expected ones.

    Args:
        gradients: The returned gradients.
        wanted: The shapes of the gradients that it was given; a large weight that took its step
            while its gradient was formed is not among them.

    Raises:
        ConfigError: Naming both shapes: torch would broadcast or ignore the difference.
    """
    found: object = type(gradients).__name__
    if isinstance(gradients, dict):
        found = shapes_of(gradients)
    if found != wanted:
        raise ConfigError(
            f"a part of the local step (local.extras) gives {found!s:.200}, "
            "expected the gradients that it "
            f"was given, by name, with an axis of clients first: {wanted!s:.200}"
        )


def pretrain(model: nn.Module, train: Samples, loss: str, local: LocalConfig, seed: int) -> None:
    """Train every weight of ``model`` in place, with the cohort loop and one client.

    AdamW gives the same bits as `torch.optim.AdamW`, whose import loads torch's compiler and costs
    a second of every start.

    Args:
        model: The network.
        train: The training samples.
        loss: A key of `fedraclora.data.task.LOSSES`.
        local: The optimizer, its step size, the samples of a step and the passes over ``train``.
        seed: Of the run; orders the samples.
    """
    cohort = {n: p.detach()[None] for n, p in model.named_parameters()}
    optimizer = CohortOptimizer(local, cohort, dict.fromkeys(cohort, local.step_size))
    for epoch in range(local.epochs):
        order = torch.from_numpy(generator(seed, "pretrain", epoch).permutation(len(train)))
        for rows in order.split(local.batch_size):
            batch = train.take(rows).trim()
            losses, counts = loss_function(loss)(forward(model, batch.inputs), batch.target)
            model.zero_grad()
            (losses.sum() / counts.sum()).backward()
            found = {n: p.grad[None] for n, p in model.named_parameters() if p.grad is not None}
            optimizer.step(found)
