"""Provide `LowRank`: Flower's `FedAvg` with low-rank rounds, for your own ServerApp."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any, Self

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, FedAvgM, Result
from flwr.serverapp.strategy.fedopt import FedOpt
from flwr.serverapp.strategy.strategy_utils import validate_message_reply_consistency
from torch import nn
from typing_extensions import override

from fedraclora.compatibility import Feature, Features, conflict, refuse
from fedraclora.config.run_config import KEEPS_HEADS
from fedraclora.config.settings import CompressionConfig
from fedraclora.devices.system import SystemConfig
from fedraclora.engines.base import Traffic
from fedraclora.errors import ClientError, ConfigError
from fedraclora.flower.arrays import LazyWeight, planned, weights_in
from fedraclora.flower.beside import OwnStep, refuse_skipped, shared_config
from fedraclora.flower.transport import FlowerTransport, NodeStore
from fedraclora.models.built import require_numbers
from fedraclora.narrow_weight import dense as written_out
from fedraclora.protocol.coding import NONE, ZSTD
from fedraclora.protocol.method import ASKS_TWICE, Cohort, Draw, Method, first_instructions
from fedraclora.protocol.plan import trained_of
from fedraclora.protocol.quantized import FULL
from fedraclora.run.folder import has_checkpoint, is_ours, locked_folder, refuse_existing, run_id
from fedraclora.run.ledger import number
from fedraclora.run.recorder import RunRecorder
from fedraclora.strategies.base import FedStrategy, taken_traffic
from fedraclora.strategies.server.device_simulator import DeviceSimulator
from fedraclora.strategies.server.exchange import Exchange
from fedraclora.strategies.server.loop import LoopConfig
from fedraclora.strategies.server.round_step import RoundStep, RunContext
from fedraclora.strategies.server.rows import Cost
from fedraclora.strategies.steps import round_steps
from fedraclora.training.localconfig import LocalConfig
from fedraclora.tree import wide
from fedraclora.weights.files import keep_private
from fedraclora.weights.update import WeightHistory
from fedraclora.wire.answers import Came, NoAnswer
from fedraclora.wire.exchange import Ask

log = logging.getLogger("flwr")

NODES = 1 << 20  # more than can ever take part
COUNTED = ("uplink_bytes", "downlink_bytes", "catchup_bytes")


class _Sampled(RoundStep):
    """Ask the clients that Flower has sampled for rows: only the server knows a client's weight."""

    individuals = True
    clients: torch.Tensor

    @override
    def cohort(self, round_: int) -> torch.Tensor:
        return self.clients


@Feature(
    "fedraclora.flower.LowRank",
    instead="`fedraclora deploy`",
    avoids={
        "a method that keeps a part of the model at each client": "Flower's nodes do not store it",
        "head=personal": "Flower's nodes do not store it",
        "two exchanges in a round": "Flower sends one message in a round",
        "a method with a client program of its own": "clients train with your code",
    },
)
class LowRank(FedAvg):
    """Run Flower's FedAvg with the factors of a low-rank method instead of full weights.

    Flower samples nodes as in `FedAvg`, and its loop runs the rounds. A node receives seeds, and
    the updates that it missed. The weights are kept here, from the model or ``initial_arrays``;
    each `start` begins a new run, or resumes from ``checkpoint``. The result of `start` and the
    input of ``evaluate_fn`` are the effective weights, under the names of ``initial_arrays`` if
    these are a state dict, else under those of the model; `load` puts them into a model.

    A class of it and one of Flower's server optimizers (``class Mine(LowRank, FedAdam)``, also
    FedAdagrad, FedYogi or FedAvgM) applies that optimizer's own code to the mean of a round; nodes
    then download full weights. FedProx sends clients ``proximal-mu``. A class in which code of
    another strategy would be skipped is refused (`fedraclora.flower.beside`).

    Args:
        method: A method of `fedraclora.strategies`, with its hyperparameters. A method whose
            clients need more than plain local training, or keep a personal factor, is refused.
        model: The app's model. The layers of a PeftModel's adapter are adapted, and its other
            trained parameters are averaged; for any other module, ``target_modules``, ``head``,
            ``bias``, ``modules_to_save`` and ``exclude_modules`` decide, as in
            `fedraclora.simulate`.
        target_modules, head, bias, modules_to_save, exclude_modules: See
            `fedraclora.protocol.plan.make_plan`.
        seed: Seed of all sketches, and of the clients' seeds.
        uplink, downlink: Number formats: ``float32``, or a quantized one, a key of
            `fedraclora.protocol.quantized.ROUNDED`.
        uplink_coding, downlink_coding: ``zstd``: lossless coding of quantized numbers; ``none``.
        min_clients: Fewest nodes that must reply in a round.
        same_start: Whether each client's own model has the server's initial weights, for example
            from the same checkpoint: then they are not sent. None: if the model is a PeftModel and
            ``initial_arrays`` are its adapter. A client with other weights receives them.
        timeout: Seconds to wait for a node that needs all weights.
        checkpoint: A folder. Each round is written there, and if it has rounds already, `start`
            resumes after them, up to ``num_rounds`` in all. None: no files are written.
        options: Options of `FedAvg`. ``arrayrecord_key`` is refused: no arrays of the app are sent.

    Attributes:
        rounds: The round loop of this project, with ``method``, ``state`` and the ledger
            (``rounds.recorder.ledger.rows``); None before `start`.

    Raises:
        ConfigError: If an argument is invalid, naming it.
        ModelError: For a layer that cannot be adapted.
    """

    def __new__(cls, *_: Any, **__: Any) -> Self:
        """Refuse a class in which code would be skipped, before any ``__init__`` is called."""
        refuse_skipped(cls, LowRank)
        return super().__new__(cls)

    def __init__(
        self,
        method: Method,
        model: nn.Module,
        *,
        target_modules: str | Sequence[str] = "all-linear",
        head: str = "lora",
        bias: str = "full",
        modules_to_save: str | Sequence[str] | None = None,
        exclude_modules: str | Sequence[str] | None = None,
        seed: int = 0,
        uplink: str = FULL,
        downlink: str = FULL,
        uplink_coding: str = NONE,
        downlink_coding: str = NONE,
        min_clients: int = 1,
        same_start: bool | None = None,
        timeout: float = 3600.0,
        checkpoint: str | Path | None = None,
        **options: Any,
    ) -> None:
        if "arrayrecord_key" in options:
            raise ConfigError(
                "arrayrecord_key has no effect: LowRank sends merged updates, not arrays. Leave "
                "it out."
            )
        super().__init__(**options)
        if Method not in type(method).__mro__:
            raise ConfigError(
                f"method={method!r:.80}: give an instance, such as FedRacLora(rank=8)"
            )
        wire = CompressionConfig(uplink, downlink, False, uplink_coding, downlink_coding)
        require_numbers(model, "model")
        self.method, self.seed, self.timeout, self.same_start = method, seed, timeout, same_start
        codings = {key: how for key, how in vars(wire).items() if how == ZSTD}
        self.wire = {"uplink": uplink, "downlink": downlink, "min_clients": min_clients, **codings}
        self.folder = None if checkpoint is None else Path(checkpoint)
        settings = {
            "target_modules": target_modules,
            "head_policy": head,
            "bias_policy": bias,
            "modules_to_save": modules_to_save,
            "exclude_modules": exclude_modules,
        }
        self._base, self._names, self._plan, self._peft = planned(model, settings)
        self._buffers = {*dict(model.named_buffers())}
        self._server = OwnStep(self, self._stepped) if isinstance(self, FedOpt | FedAvgM) else None
        features = Features([self, method, wire])
        values = {f"compression.{f.name}": (getattr(wire, f.name), f.default) for f in fields(wire)}
        refuse([*features.idle(values).values(), *features.conflicts()])
        self.rounds: FedStrategy | None = None
        self._given = self._shape = ArrayRecord()
        self._exchange: Exchange | None = None
        self._before = 0  # the last round of the checkpoint from which `start` resumed
        self._running = False

    @override
    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run rounds as `FedAvg` does; rounds in the checkpoint are skipped."""

        def measured(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
            return evaluate_fn(round_, arrays) if evaluate_fn and round_ >= self._before else None

        self._running = True
        try:
            with nullcontext() if self.folder is None else locked_folder(self.folder):
                self._before = self._at(1, initial_arrays, grid).done if self.folder else 0
                if num_rounds < self._before:
                    raise ConfigError(
                        f"num_rounds={num_rounds}, but {self.folder} has {self._before} rounds. "
                        "Ask for as many or more, or give a new checkpoint folder."
                    )
                configs = train_config, evaluate_config, measured if evaluate_fn else None
                return super().start(grid, initial_arrays, num_rounds, timeout, *configs)
        finally:
            self._running = False

    @override
    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        if not self._running:
            raise ConfigError(
                "LowRank is wrapped in another strategy, whose changes to arrays and replies "
                "(such as Flower's differential privacy) would not reach the weights. Call "
                "LowRank's own start; for privacy use `fedraclora deploy`."
            )
        self._exchange = None
        if server_round <= self._before:
            return []
        nodes = [*super().configure_train(server_round, arrays, config, grid)]
        rounds = self._at(server_round, arrays, grid)
        self._sampled.clients = self._transport.address(m.metadata.dst_node_id for m in nodes)
        if not nodes:
            return []
        self._exchange = rounds.open(rounds.done + 1)
        told = shared_config(nodes, self, arrays)
        return self._transport.write(self._exchange.asks, MessageType.TRAIN, told)

    @override
    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        exchange, rounds = self._exchange, self.rounds
        if exchange is None or rounds is None:
            return self._given if server_round <= self._before else None, None
        self._exchange, self._round = None, server_round

        def send(asks: Sequence[Ask]) -> Came:
            if asks is not exchange.asks:
                raise conflict(LowRank, ASKS_TWICE)
            return self._transport.read_all(replies)

        try:
            rounds.close(exchange, send, self._transport, Cost())
        except ClientError as error:
            nodes = ", ".join(f"client {c} is node {n}" for c, n in self._transport.names.items())
            raise type(error)(f"{error} ({nodes})") from error
        row = rounds.recorder.ledger.rows[-1]
        self._transport.incidents += row.get("incidents", [])  # type: ignore[arg-type]
        failed = {int(f["client"]): f["reason"] for f in row["failures"]}  # type: ignore[attr-defined]
        counted = {key: number(row, key) for key in COUNTED} | {"failures": len(failed)}
        metrics = self._aggregated(server_round, failed, self.train_metrics_aggr_fn, counted)
        self._given = self._arrays(rounds)
        return self._given, metrics

    @override
    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        self._exchange = None
        if server_round < self._before:
            return []
        nodes = [*super().configure_evaluate(server_round, arrays, config, grid)]
        if not nodes:
            return []
        rounds = self._at(server_round, arrays, grid)
        clients = self._transport.address(m.metadata.dst_node_id for m in nodes)
        # The next round starts from the present weights, factors included.
        cohort = Cohort(clients, torch.ones(len(clients)))
        asked = rounds.method.open_round(rounds.state, rounds.done + 1, cohort, rounds.draw)
        asked, version = rounds.rounding.sent(asked, rounds.done + 1), rounds.catch_up.version
        self._exchange = Exchange(asked, server_round, version, cohort, cohort, rounds.loop)
        told = shared_config(nodes, self, arrays)
        return self._transport.write(self._exchange.ask(), MessageType.EVALUATE, told)

    @override
    def aggregate_evaluate(
        self, server_round: int, replies: Iterable[Message]
    ) -> MetricRecord | None:
        exchange = self._exchange
        if exchange is None:
            return None
        found = self._transport.read_all(replies)
        failed = dict.fromkeys(self._transport.names, "no reply in time")
        failed |= {ask.clients[0]: a.reason for ask, a in found if isinstance(a, NoAnswer)}
        failed = {c: reason for c, reason in failed.items() if c not in self._transport.contents}
        traffic = taken_traffic(self._transport) or Traffic()
        down = exchange.payload_bytes() * len(traffic.sent)
        counted = {"downlink_bytes": down, "catchup_bytes": traffic.fetched}
        return self._aggregated(server_round, failed, self.evaluate_metrics_aggr_fn, counted)

    @KEEPS_HEADS
    def _keeps_heads(self) -> bool:
        return bool(self._plan.local)

    def _stepped(self, mean: Message) -> ArrayRecord:
        """Let the combined strategy aggregate a mean, without clients' metrics."""
        together, self.train_metrics_aggr_fn = self.train_metrics_aggr_fn, lambda *_: MetricRecord()
        try:
            arrays, _ = super().aggregate_train(self._round, [mean])
        finally:
            self.train_metrics_aggr_fn = together
        return arrays or ArrayRecord()

    @override
    def _check_and_log_replies(
        self, replies: Iterable[Message], is_train: bool, validate: bool = True
    ) -> tuple[list[Message], list[Message]]:
        return [*replies], []  # only the mean comes here (`_stepped`)

    @override
    def summary(self) -> None:
        log.info("\t├──> %s, seed %d, %s", self.method, self.seed, self.wire)
        super().summary()

    def _aggregated(
        self, round_: int, failed: dict[int, str], together: Any, counted: Mapping[str, float]
    ) -> MetricRecord | None:
        """Aggregate clients' metrics as Flower does, and log the excluded clients."""
        for client, reason in failed.items():
            node = self._transport.names[client]
            log.warning("round %d: node %d is left out: %s", round_, node, reason)
        for line in self._transport.incidents:
            log.warning("round %d: %s", round_, line)
        self._transport.incidents.clear()
        contents = [r for c, r in sorted(self._transport.contents.items()) if c not in failed]
        if not contents:
            return None
        validate_message_reply_consistency(contents, self.weighted_by_key, check_arrayrecord=False)
        return MetricRecord({**counted, **together(contents, self.weighted_by_key)})

    def _at(self, round_: int, arrays: ArrayRecord, grid: Grid) -> FedStrategy:
        """Begin a run at its first round; later, check that the weights are the server's."""
        if self.rounds is None or (round_ == 1 and arrays is not self._given):
            self.rounds = self._begun(arrays, grid)
            self._given = self._arrays(self.rounds) if self.rounds.done else arrays
        elif arrays is not self._given:
            raise ConfigError(
                f"round {round_}: the arrays are not those that LowRank returned in the last "
                "round. LowRank keeps the weights itself: do not change them between rounds."
            )
        self._transport.grid = grid
        return self.rounds

    def _begun(self, arrays: ArrayRecord, grid: Grid) -> FedStrategy:
        """Start from the app's arrays, or, if these are an adapter's, from the model."""
        method, draw, plan = self.method, Draw(self.seed), self._plan
        given, is_adapter = weights_in(arrays, self._base, self._names, self._buffers)
        self._shape = ArrayRecord() if is_adapter else arrays
        # Copies, since the app may still use its model, for example for evaluation.
        base = {n: given[n] if n in given else t.clone() for n, t in self._base.items()}
        asked = first_instructions(method, method.initial_state(base, plan, draw), draw, 1)
        refuse(Features([self, method, asked, asked.program], asked).conflicts())
        changed = (*asked.adapters, *asked.dense)
        base |= {n: base[n].to(wide(base[n].dtype)) for n in changed}
        dtype = "float64" if any(base[n].dtype == torch.float64 for n in changed) else "float32"
        local, history, self._sampled = LocalConfig(), WeightHistory(), _Sampled()
        loop = LoopConfig(
            rounds=NODES, clients=NODES, cohort=1, chunk=1, seed=self.seed, dtype=dtype,
            untrusted=True, **self.wire,
        )  # fmt: skip
        run = RunContext(method, local, loop, DeviceSimulator(SystemConfig(), self.seed, local))
        known = is_adapter if self.same_start is None else self.same_start
        facts = {"seed": self.seed, "weight": self.weighted_by_key, "known": known}
        resume, name = self._found()
        self._transport = FlowerTransport(
            grid, history, self.configrecord_key, facts, self.timeout, name
        )
        trained = str(trained_of(asked, plan.shapes))
        fixed = {"method": str(method), "seed": self.seed, "trained": trained, **self.wire}
        chosen = {} if self._server is None else {"server_optimizer": self._server}
        fixed |= {key: step.settings for key, step in chosen.items()}
        recorder = RunRecorder(
            self.folder,
            fixed=fixed,
            every=1,
            store=NodeStore(self._transport),
            free=["min_clients"],
        )
        state = method.initial_state(base, plan, draw)
        steps = round_steps(chosen, [self._sampled]) if chosen else [self._sampled]
        rounds = FedStrategy(run, state, replica=history, recorder=recorder, steps=steps)
        if resume:
            restored, done = recorder.restore(state, rounds.catch_up)
            rounds.resume(restored, done)
            history.recall(restored.base, recorder.links(), rounds.catch_up.version)
            log.info("\t├──> Resumes after round %d of %s", done, self.folder)
        rounds.begin(self._transport)
        held = "begin at these weights" if known else "are sent the weights when first asked"
        log.info("\t├──> Clients train %s; they %s", trained, held)
        if self._peft and method.traits.merges:
            log.info("\t└──> Arrays are whole weights: fedraclora.flower.load, not an adapter's")
        return rounds

    def _found(self) -> tuple[bool, str]:
        """Check whether the folder has a checkpoint, and name the run for the nodes' caches."""
        if self.folder is None:
            return False, os.urandom(8).hex()
        if not is_ours(self.folder):
            refuse_existing(self.folder)
        resume = has_checkpoint(self.folder, 1)
        ledger = self.folder / "ledger.jsonl"
        ledger.touch()  # this file marks the folder as a run's
        keep_private(ledger)
        return resume, run_id(self.folder)

    def _arrays(self, rounds: FedStrategy) -> ArrayRecord:
        """Return the present effective weights under the names of the app."""
        method, state, draw = self.method, rounds.state, rounds.draw
        weights = cache(lambda: written_out(method.weights(state, draw)))
        found: dict[str, Array] = {n: LazyWeight(n, t, weights) for n, t in self._base.items()}
        names = self._names
        if self._shape:  # buffers stay
            found = {n: found[names[n]] if n in names else a for n, a in self._shape.items()}
        given = ArrayRecord()
        given.update(found)  # its constructor would read each weight
        return given
