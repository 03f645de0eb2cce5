"""Run a round of `LowRank` at a client, in your own ClientApp."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, Self, cast

import torch
from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from torch import nn

import fedraclora.strategies.methods  # noqa: F401  messages name client programs of theirs
from fedraclora.clients.cache import folder_of, make_room, on_disk
from fedraclora.clients.worker import Worker
from fedraclora.engines.asks import read_ask
from fedraclora.engines.records import JOB, folded, read_weight_update, unfolded, write_answer
from fedraclora.errors import ClientError, StaleError, WireError
from fedraclora.lowrank.layers import layer_kind, layer_view, weight_name
from fedraclora.protocol.method import Plan
from fedraclora.training.localconfig import LocalConfig
from fedraclora.training.own.places import find, inner, plain_name
from fedraclora.training.own.round import ClientTask, Round
from fedraclora.training.own.trainer import as_result, seed_of, seeded_everywhere
from fedraclora.tree import Tree, wide
from fedraclora.weights.replica import StoredReplica
from fedraclora.wire.exchange import Ask


class FlowerRound:
    """Open a message of `LowRank` to train or to evaluate: the model has the round's weights.

    As a context manager it seeds the global generators as `fedraclora.simulate` does.

    Args:
        message: The message that the ClientApp received.
        context: The context that it received. Weights are stored on the disk, in the folder
            ``cache`` of the node's configuration, else in Flower's folder.
        model: The app's model: plain, or a PeftModel with the method's rank and layers. It is
            changed in place. Create optimizer or trainer after this.
        adapter: The name of the PEFT adapter.

    Attributes:
        model: The app's model, with the weights of the round, and the tensors to train.
        round: The round in the terms of `fedraclora.client`: ``client``, ``number``, ``seed``.

    Raises:
        StaleError: If this node needs all weights; do not catch it, so that the server sends them.
        FedRacLoraError: If the message or the model differs from the server's.
    """

    def __init__(
        self, message: Message, context: Context, model: nn.Module, *, adapter: str = "default"
    ) -> None:
        job = message.content.get(JOB)
        if not isinstance(job, ConfigRecord) or "run" not in job:
            raise WireError(
                f"a message has the records {[*message.content]}, but not {JOB} of a low-rank "
                "round: use the strategy fedraclora.flower.LowRank in the ServerApp"
            )
        self._message, self._open = message, ExitStack()
        arrays = message.content.array_records
        content = unfolded(RecordDict({**arrays, JOB: job}))
        self._ask = read_ask(content)
        self._weight, self._seed = str(job["weight"]), int(cast(int, job["seed"]))
        self._partition = context.node_config.get("partition-id")
        self._run = str(job["run"])
        folder = folder_of(context, self._run, context.node_id)
        make_room(folder.parent)
        modules = ((plain_name(n, adapter)[0], m) for n, m in inner(model).named_modules())
        views = {weight_name(n): layer_view(m) for n, m in modules if layer_kind(m)}
        self._replica = StoredReplica(folder, Plan(targets=views), torch.device("cpu"))
        if job["known"]:
            self._replica.begin(_weights(model, self._ask, adapter))
        with on_disk(folder):
            if not self._replica.follow(read_weight_update(content)):
                raise StaleError(
                    f"the weights in {folder}, of version {self._replica.version}, are not those "
                    "that the server takes this node to hold; it sends them anew"
                )
        base, request, sent = self._replica.base, self._ask.request, self._ask.own
        weights, _ = sent.program.fold(base, self._replica.plan)
        asked = ClientTask(weights, sent.with_past(base), views, {})
        known = self._partition if isinstance(self._partition, int) else self._ask.clients[0]
        client = int(known)
        seed = seed_of(self._seed, request.round_, client)
        self.round = Round(client, request.round_, seed, None, request.rate_scale, _asked=asked)
        self.model = self.round.install(model, adapter)

    def reply(
        self, metrics: Mapping[str, Any], *, loss: float | None = None, steps: int = 1
    ) -> Message:
        """Write the reply: the trained tensors after training, and the metrics.

        Args:
            metrics: As in Flower's `MetricRecord`, with the client's weight under ``num-examples``
                (the strategy's ``weighted_by_key``): a number above 0, whole or not.
            loss: Mean training loss, for the ledger at the server.
            steps: Optimizer steps taken, for the ledger.

        Raises:
            ClientError: If a frozen tensor has changed, nothing was trained, or a number is not
                finite.
        """
        if self._weight not in metrics:
            raise ClientError(
                f"the metrics of a reply are {[*metrics]}, but need {self._weight!r}, the "
                "client's weight (its number of samples)"
            )
        # Numbers of numpy and torch, which Flower does not accept.
        record = MetricRecord({n: getattr(v, "item", lambda v=v: v)() for n, v in metrics.items()})
        job: dict[str, Any] = {"held": self._replica.version, "mark": str(self._replica.mark)}
        job["run"] = self._run
        if isinstance(self._partition, int):
            job["partition"] = self._partition
        found = RecordDict({"metrics": record, JOB: ConfigRecord(job)})
        if not self._message.metadata.message_type.startswith("evaluate"):
            # The weight is the one in the metrics, as in Flower.
            trained = self.round.read(self.model, samples=1, steps=steps, loss=loss)
            done: Any = SimpleNamespace(  # replaces a worker's trainer
                train=lambda *_, **__: as_result([trained]), local=LocalConfig(), seed=self._seed,
                recall=None,
            )  # fmt: skip
            # Rounding is drawn by client, and the server's number of a node differs between runs.
            asked, own = self._ask.request, torch.tensor([self.round.client])
            by_own = replace(self._ask, request=replace(asked, clients=own))
            answer = Worker(done, self._replica).train(by_own)
            named = asked.clients[: len(answer.clients)]
            why = dict(zip(asked.clients.tolist(), answer.failures.values(), strict=False))
            written = write_answer(replace(answer, clients=named, failures=why))
            arrays, written[JOB] = written.pop("arrays"), found[JOB]
            found = RecordDict({"arrays": arrays, "metrics": record, **folded(written)})
        return Message(found, reply_to=self._message)

    def __enter__(self) -> Self:
        """Seed torch, numpy and Python with the round's seed, until its end."""
        self._open.enter_context(seeded_everywhere(self.round.seed))
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


round = FlowerRound  # noqa: A001


def _weights(model: nn.Module, ask: Ask, adapter: str) -> Tree:
    """Return the weights of a fresh model, as the server holds them."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, p in find(model, {}, adapter).parameters.items():
        found.setdefault(id(p), (name, p.detach()))
    changed = {*ask.own.adapters, *ask.own.dense}
    return {n: t.to(wide(t.dtype)) if n in changed else t for n, t in found.values()}
