"""Answer requests to clients: train them in batches, and find the clients that fail."""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from fedraclora.aggregation.robust import shortened
from fedraclora.clients.client_state import keep, restore
from fedraclora.clients.measure import Measurer
from fedraclora.clients.secure import MEASUREMENTS, answer_stage, masked_vectors, of_updates
from fedraclora.errors import OF_THE_RUN, ClientError, ConfigError, WireError
from fedraclora.imports import as_user_error
from fedraclora.privacy.secagg import SecAggTerms
from fedraclora.protocol.coding import NONE, compressed
from fedraclora.protocol.cohorts import client_weights
from fedraclora.protocol.instructions import opening_rows
from fedraclora.protocol.method import RoundInstructions
from fedraclora.protocol.program import ClientProgram, LocalResult
from fedraclora.protocol.quantized import ROUNDED
from fedraclora.protocol.rank_budgets import uploaded_mask
from fedraclora.protocol.uplinks import SUM_BLOCK, block_sums, check_rows
from fedraclora.run.client_state import ClientStore
from fedraclora.training.cohort import CohortTrainer
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.memory import LESS, is_out_of_memory
from fedraclora.training.results import join_results
from fedraclora.tree import Layout, Tree
from fedraclora.weights.update import BaseWeights
from fedraclora.wire.answers import Answer, StageAnswer, SummedAnswer, TrainedAnswer, TrainingAnswer
from fedraclora.wire.changes import ChangeCodec, CodedRows
from fedraclora.wire.exchange import Ask, Stage, TrainRequest
from fedraclora.wire.feedback import left_over, to_add
from fedraclora.wire.fields import printable

log = logging.getLogger(__name__)


@dataclass
class Job:
    """Hold a training request and its progress.

    Attributes:
        request: The request.
        base: The weights from which clients start.
        downlink: The instructions, with the clients' own state.
        moments: Initial moments of their optimizers, [K, ...] by name.
        residues: Residues of their last quantized updates, [K, ...] by name; empty if not kept.
        hidden: Whether updates are rounded and masked, so that only then is it known who sends.
        places, results: Of the trained clients, part after part.
        failures: Why other clients failed, by id.
        notes: Sentences for the ledger.
        cut: Whether each update was longer than the clip, if there is one.
        coded: Their quantized rows; None if rows are not quantized.
    """

    request: TrainRequest
    base: Tree
    downlink: RoundInstructions
    moments: Tree
    residues: Tree
    hidden: bool
    places: list[int] = field(default_factory=list)
    results: list[LocalResult] = field(default_factory=list)
    failures: dict[int, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    cut: list[bool] = field(default_factory=list)
    coded: CodedRows | None = None

    def parts(self) -> Iterator[tuple[list[int], LocalResult]]:
        """Yield the result of each chunk with the places of its clients."""
        start = 0
        for result in self.results:
            end = start + len(result.losses)
            yield self.places[start:end], result
            start = end

    def shorten(self, bound: float, rows: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
        """Clip updates to a norm, and record which were longer."""
        found = shortened(rows, start, bound)
        self.cut += (found != rows).any(dim=1).tolist()
        return found

    def note(self, text: str) -> None:
        """Add a sentence for the ledger, once."""
        if text not in self.notes:
            self.notes.append(text)


@dataclass(eq=False)
class Worker:
    """Train clients on one replica.

    Attributes:
        trainer: Trains a chunk as one batch.
        replica: The base weights.
        store: Its clients' state between rounds.
        terms: Its clients' conditions for secure aggregation; None without it.
        limit: The most clients of a batch after memory ran out; None before.
    """

    trainer: CohortTrainer
    replica: BaseWeights
    store: ClientStore = field(default_factory=ClientStore)
    terms: SecAggTerms | None = None
    limit: int | None = field(default=None, init=False)

    @cached_property
    def measurer(self) -> Measurer:
        """The evaluator, built when it is first needed."""
        return Measurer(self.trainer)

    def train(self, ask: Ask) -> Answer:
        """Answer a training request.

        A chunk that raises is halved until the failing clients are isolated: they are reported by
        id, and the others' results are used. If memory runs out, no client is at fault: from then
        on
        batches have half as many clients.

        Raises:
            WireError: If a run with secure aggregation is asked for more than sums, or the other
                way round.
        """
        if (rate := ask.request.lr) is not None and self.trainer.local.lr != rate:
            self.trainer.local = replace(self.trainer.local, lr=rate)
        stage = ask.stage
        if (stage is None) != (self.terms is None):
            raise WireError(
                f"the server asks for {'plain' if self.terms else 'masked'} updates, but by "
                f"the clients' config updates are{'' if self.terms else ' not'} masked "
                "(secure aggregation). Run the server and the clients under one config"
            )
        if stage is not None and self.terms is not None and stage.name != "masked":
            asks = stage.name == "keys" and MEASUREMENTS in stage.settings
            holding = self.measurer.holding(ask.request.clients) if asks else []
            return answer_stage(ask.request, stage, self.store, self.terms, holding)
        if stage is not None and (MEASUREMENTS in stage.settings) != (
            ask.request.measure is not None
        ):
            raise WireError(
                "the server asks clients to "
                f"{'train' if ask.request.measure is None else 'evaluate'}, but they agreed on "
                "their masks for the other task"
            )
        request = ask.request
        base = self.replica.at(request.version, request.round_)
        if request.measure is not None:
            answer = self.measurer.answer(ask, base, self.store)
            if stage is None:
                return answer
            vectors, told = self.measurer.vectors(request, answer)
            return masked_vectors(request, stage, self.store, vectors, {}, told=told)
        self.trainer.recall = self.store.recall
        held = restore(self.store, ask.own.with_past(base), request, base, self.trainer.local)
        job = Job(request, base, *held, hidden=stage is not None)
        job.coded = CodedRows() if request.uplink in ROUNDED else None
        waiting = [list(range(len(request.clients)))]
        while waiting:
            places = waiting.pop()
            again = parts(places, self.limit)
            if len(again) == 1:
                again = self._attempt(job, places)
            waiting += reversed(again)
        if stage is not None and self.terms is not None:
            return self._masked(job, stage, self.terms)
        return self._reply(job)

    def _attempt(self, job: Job, places: list[int]) -> list[list[int]]:
        """Train the clients at ``places`` as one batch; return the parts to try again."""
        request, base = job.request, job.base
        part, clients = job.downlink, request.clients
        moments, residues = job.moments, job.residues
        if len(places) < len(clients):
            index = torch.tensor(places)
            part, clients = part.select(index), clients[index]
            moments = {n: t[index] for n, t in moments.items()}
            residues = {n: t[index] for n, t in residues.items()}
        result, failure, starved = None, "", False
        try:
            result = self.trainer.train(
                base,
                part,
                clients,
                round_=request.round_,
                rate_scale=request.rate_scale,
                moments=moments,
            )
        except OF_THE_RUN:
            raise
        except Exception as error:  # an error of a model or data set counts as the client's
            failure = f"{self.trainer.blamed(error)}{type(error).__name__}: {error}"
            starved = is_out_of_memory(error)
            if not starved:  # errors of a user's training function need no traceback
                shown = not isinstance(error, ClientError) or error.__cause__ is not None
                log.warning("round %d: clients failed", request.round_, exc_info=shown)
        # Outside the handler: the error's traceback would keep the attempt's memory alive.
        if result is not None:
            local = self.trainer.local
            for client, state in result.states.items():
                self.store.remember(client, request.round_, state)
            if request.clip is not None:  # first, since clients keep the values that they send
                result = sending(partial(job.shorten, request.clip), result, part, base)
            if job.coded is not None:
                changes = ChangeCodec(request.uplink, part, base, clients)
                left = to_add(residues, part) if residues else None
                to = (self.trainer.seed, request.round_, job.coded, left)
                result = sending(lambda rows, _: changes.encode(rows, *to), result, part, base)
                residues = {} if left is None else left_over(residues, part, left)
            if not job.hidden:
                keep(self.store, part, request, clients, result, base, local, residues=residues)
            job.places += places
            job.results.append(leaving(local, part.program, result))
            return []
        if starved:
            return self._shrink(job, places, failure)
        if len(places) == 1:
            job.failures[int(request.clients[places[0]])] = printable(failure)
            return []
        job.note(f"round {request.round_}: a chunk was cut because clients failed in it")
        return parts(places, -(-len(places) // 2))

    def _shrink(self, job: Job, places: list[int], failure: str) -> list[list[int]]:
        """Halve the largest batch for the rest of the run, and split these clients accordingly.

        Raises:
            ConfigError: If a single client does not fit.
        """
        round_ = job.request.round_
        gc.collect()
        torch.cuda.empty_cache()
        if len(places) == 1:
            own = self.trainer.local.is_own
            raise ConfigError(
                f"round {round_}: client {int(job.request.clients[places[0]])} alone does not fit "
                f"into memory ({failure}); "
                + ("have your training function take smaller batches" if own else LESS)
            )
        self.limit = len(places) // 2
        text = (
            f"round {round_}: out of memory with {len(places)} clients a batch. Batches hold "
            f"at most {self.limit} clients from now on, so results may differ in the last bits"
        )
        log.warning("%s (%s)", text, failure)
        job.note(text)
        return parts(places, self.limit)

    def _masked(self, job: Job, stage: Stage, terms: SecAggTerms) -> StageAnswer:
        """Mask the clients' updates; see `fedraclora.clients.secure`."""
        request, downlink, base, local = job.request, job.downlink, job.base, self.trainer.local
        places, layout = torch.tensor(job.places, dtype=torch.int64), downlink.layout
        updates, weights = torch.zeros(0, layout.size).double(), torch.zeros(0).double()
        if (result := join_results(job.results)) is not None:
            rows = sent_rows(result, layout)
            updates = rows - opening_rows(downlink, base, layout, places)
            weights = client_weights(terms.weights, result.samples)
        cut = torch.tensor(job.cut or [False] * len(places))
        trained = (request.clients[places], updates, weights, cut)
        vectors = of_updates(request, stage, terms, trained)
        reply = masked_vectors(request, stage, self.store, vectors, job.failures, job.notes)
        sent, step = reply.clients, stage.settings["step"]
        for part_places, result in job.parts():
            index = torch.tensor(part_places)
            part, clients = downlink.select(index), request.clients[index]
            own = weights[torch.isin(places, index)]
            whole = partial(in_steps, weights=own, step=float(step))
            words, kept = sending(whole, result, part, base), torch.isin(clients, sent)
            keep(self.store, part, request, clients, words, base, local, among=kept)
        return reply

    @staticmethod
    def _reply(job: Job) -> TrainingAnswer:
        downlink, request = job.downlink, job.request
        places = torch.tensor(job.places, dtype=torch.int64)
        return answer_of(
            join_results(job.results),
            request,
            request.clients[places],
            downlink.layout,
            job.failures,
            job.notes,
            uploaded_mask(downlink, places) if request.reduce is None else None,
            job.coded,
        )


def answer_of(
    result: LocalResult | None,
    request: TrainRequest,
    clients: torch.Tensor,
    layout: Layout,
    failures: Mapping[int, str],
    notes: list[str],
    mask: torch.Tensor | None = None,
    coded: CodedRows | None = None,
) -> TrainingAnswer:
    """Build the reply of a chunk from its results.

    Args:
        result: The result of the trained clients, or None if none trained.
        request: The request. With ``reduce``, rows are checked and summed here, so that the size of
            the reply does not grow with the chunk.
        clients: The trained clients, int64 [k], a part of ``request.clients``.
        layout: Layout of each client's update.
        failures: Why a client trained nothing, by id.
        notes: Sentences for the ledger.
        mask: Which numbers of its row each client sends, bool [k, P]; None: all.
        coded: The quantized rows, if ``result`` has them as decoded; None: rows are not quantized.
    """
    if result is None:  # every client of the chunk failed
        none = torch.zeros(0, dtype=torch.int64)
        result = LocalResult(
            {n: torch.empty(0, *s) for n, s in layout.shapes}, none.double(), none, none
        )
    trained = {n: result.trained[n] for n, _ in layout.shapes}
    fields: dict[str, Any] = {
        "round_": request.round_,
        "version": request.version,
        "first": request.first,
        "clients": clients,
        "losses": result.losses,
        "samples": result.samples,
        "steps": result.steps,
        "metrics": result.metrics,
        "failures": {client: printable(reason) for client, reason in failures.items()},
        "notes": [printable(note) for note in notes],
        "rounding": None if coded is None else torch.tensor(coded.errors, dtype=torch.float64),
        "layout": layout,
    }
    if request.reduce is not None:
        numbers = layout.pack(trained, lead=1)
        return summed(SummedAnswer(**fields, pieces=(numbers,)), request)
    sizes, pieces = None, layout.pieces(trained) if coded is None and mask is None else ()
    if coded is not None:
        codes = coded.codes
        if request.coding != NONE:
            codes = compressed(codes)
            sizes = torch.tensor([*map(len, codes)], dtype=torch.int64)
        pieces = (torch.cat([torch.zeros(0, dtype=torch.uint8), *codes]),)
    elif mask is not None:
        numbers = layout.pack(trained, lead=1)
        pieces = (numbers[mask.to(numbers.device)],)
    return TrainedAnswer(
        **fields, sizes=sizes, pieces=tuple(each.detach().cpu() for each in pieces)
    )


def summed(answer: SummedAnswer, request: TrainRequest) -> SummedAnswer:
    """Replace the rows of a reply by weighted sums of blocks, without unusable rows.

    Args:
        answer: Whose numbers are the rows of its clients, [k, P].
        request: What was asked.
    """
    numbers = answer.numbers
    weights = client_weights(str(request.reduce), answer.samples)
    refused = check_rows(answer.clients, weights, answer.losses, [numbers], layout=answer.layout)
    if refused:
        kept = ~torch.isin(answer.clients, torch.tensor([r.client for r in refused]))
        numbers, weights = numbers[kept.to(numbers.device)], weights[kept]
        answer = replace(answer.select(kept), refused=refused)
    whole = len(numbers) == len(request.clients)
    places = None if whole else torch.searchsorted(request.clients, answer.clients)
    sums = block_sums(numbers, weights, places)
    missing = -(-len(request.clients) // SUM_BLOCK) - len(sums)
    sums = F.pad(sums, (0, 0, 0, missing)) if missing else sums
    return replace(answer, pieces=(sums.detach().cpu(),))


def leaving(local: LocalConfig, program: ClientProgram, result: LocalResult) -> LocalResult:
    """Select the tensors that clients send, as defined by the round's programs."""
    for each in (*local.added, program):
        with as_user_error(ClientError, f"{local.name_of(each)}: ", "selecting what is sent"):
            result = each.sent(result)
    return result


def sent_rows(result: LocalResult, layout: Layout) -> torch.Tensor:
    """Flatten the tensors that clients send into rows, float64 [k, P]."""
    return layout.pack({n: result.trained[n].cpu().double() for n, _ in layout.shapes}, lead=1)


def sending(
    change: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    result: LocalResult,
    downlink: RoundInstructions,
    base: Tree,
) -> LocalResult:
    """Replace the uploaded rows by ``change(rows, start)``."""
    layout = downlink.layout
    rows = sent_rows(result, layout)
    new = change(rows, opening_rows(downlink, base, layout, torch.arange(len(rows))))
    sent = {n: t.to(result.trained[n]) for n, t in layout.unpack(new).items()}
    return replace(result, trained=result.trained | sent)


def in_steps(
    rows: torch.Tensor, start: torch.Tensor, weights: torch.Tensor, step: float
) -> torch.Tensor:
    """Round rows as secure aggregation does: weighted updates, to integer steps."""
    each = weights[:, None]
    return start + torch.round((rows - start) * each / step) * step / each


def parts(places: list[int], size: int | None) -> list[list[int]]:
    """Split a list into parts of at most ``size`` places; None: one part."""
    step = size or len(places)
    return [places[i : i + step] for i in range(0, len(places), step)]
