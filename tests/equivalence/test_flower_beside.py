"""`LowRank` in one class with Flower's strategies: their steps are theirs, or they are refused."""

from __future__ import annotations

import re
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import strategy as flowers
from flwr.serverapp.strategy import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedProx, FedYogi, Strategy
from torch import nn

import fedraclora
from fedraclora import flower
from fedraclora.client import Round, Trained
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.protocol.quantized import ROUNDED
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fedavg import FedAvg as FullAverage
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from tests.flower_apps import (
    KEY,
    STEPS,
    app_of,
    network,
    nodes_of,
    run,
    samples,
    train,
    weights_of,
)

LOW_RANK = [FedRacLora(rank=2, alpha=3), FedRacLora(rank=2, merge_every=2), FedAvgLora(rank=2)]
NAMES = ["merged", "links of two rounds", "not merged"]


class WithAdam(flower.LowRank, FedAdam): ...


class WithAdagrad(flower.LowRank, FedAdagrad): ...


class WithYogi(flower.LowRank, FedYogi): ...


class WithMomentum(flower.LowRank, FedAvgM): ...


class WithProx(flower.LowRank, FedProx): ...


OPTIMIZERS: dict[Any, dict[str, float]] = {
    WithAdam: {"eta": 0.02, "beta_1": 0.8, "tau": 0.05},
    WithAdagrad: {"eta": 0.02, "tau": 0.05},
    WithYogi: {"eta": 0.02, "beta_2": 0.9, "tau": 0.05},
    WithMomentum: {"server_learning_rate": 0.5, "server_momentum": 0.7},
}


def plain_app() -> ClientApp:
    """An app of full weights that steps down the same gradients, and knows nothing of `LowRank`."""
    app = ClientApp()

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        x, y = samples(int(context.node_config["partition-id"]))
        model = network()
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())  # type: ignore[union-attr]
        descend(model, x, y)
        found = {"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord({KEY: len(x)})}
        return Message(RecordDict(found), reply_to=message)  # type: ignore[arg-type]

    return app


def low_rank_app() -> ClientApp:
    app = ClientApp()

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        x, y = samples(int(context.node_config["partition-id"]))
        with flower.round(message, context, network()) as r:
            descend(r.model, x, y)
        return r.reply({KEY: len(x)})

    return app


def descend(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> None:
    """Draw nothing: a round of `LowRank` seeds otherwise than an app of Flower."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.slow
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_full_weights_are_those_of_flowers_own_strategy(kind: Any, tmp_path: Path) -> None:
    """They were plain means, whatever the optimizer."""
    own, settings = kind.__mro__[2], OPTIMIZERS[kind]
    alone = own(min_available_nodes=3, fraction_evaluate=0.0, **settings)
    nodes = nodes_of(tmp_path / "plain", 3, app=plain_app())
    wanted = alone.start(nodes, ArrayRecord(network().state_dict()), 4)
    nodes = nodes_of(tmp_path, 3, app=low_rank_app())
    _, found = run(nodes, FullAverage(), rounds=4, kind=kind, **settings)
    _, mean = run(nodes_of(tmp_path / "mean", 3, app=low_rank_app()), FullAverage(), rounds=4)
    for name, other in weights_of(wanted).items():
        tensor = other.float()  # Adam's arrays are float64
        torch.testing.assert_close(weights_of(found)[name], tensor, rtol=1e-4, atol=1e-6)
        assert not torch.allclose(weights_of(mean)[name], tensor, rtol=1e-2)


@pytest.mark.parametrize("method", LOW_RANK, ids=NAMES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_of_low_rank_is_flowers_step_from_the_mean(
    kind: Any, method: Any, tmp_path: Path
) -> None:
    settings, start = OPTIMIZERS[kind], ArrayRecord(network().state_dict())
    _, mean = run(nodes_of(tmp_path / "mean", 3), method, rounds=1)
    _, found = run(nodes_of(tmp_path, 3), method, rounds=1, kind=kind, **settings)
    alone = kind.__mro__[2](fraction_train=0.0, **settings)
    alone.configure_train(1, start, ConfigRecord(), None)
    reply = RecordDict({"arrays": mean.arrays, "metrics": MetricRecord({KEY: 1})})
    wanted, _ = alone.aggregate_train(1, [Message(reply, 0, "train")])
    for name, tensor in weights_of(found).items():
        expected = torch.from_numpy(wanted[name].numpy()).to(tensor)
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("method", LOW_RANK, ids=NAMES)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_learning_rate_of_nothing_moves_nothing(kind: Any, method: Any, tmp_path: Path) -> None:
    """It moved weights by 0.095."""
    zero = {"server_learning_rate" if kind is WithMomentum else "eta": 0.0}
    _, found = run(nodes_of(tmp_path, 3), method, kind=kind, **zero)
    for name, tensor in network().state_dict().items():
        torch.testing.assert_close(weights_of(found)[name], tensor, rtol=0, atol=2e-7)


def test_momentum_of_nothing_is_the_mean_to_the_bit(tmp_path: Path) -> None:
    _, wanted = run(nodes_of(tmp_path / "mean", 3), LOW_RANK[0])
    _, found = run(nodes_of(tmp_path, 3), LOW_RANK[0], kind=WithMomentum)
    assert all(torch.equal(weights_of(wanted)[n], t) for n, t in weights_of(found).items())


@pytest.mark.slow
@pytest.mark.parametrize("kind", [WithAdam, WithMomentum])
def test_a_server_optimizer_goes_on_from_a_checkpoint_to_the_same_bits(
    kind: Any, tmp_path: Path
) -> None:
    settings, method = OPTIMIZERS[kind], LOW_RANK[0]
    _, wanted = run(nodes_of(tmp_path / "whole", 3), method, rounds=4, kind=kind, **settings)
    nodes, options = nodes_of(tmp_path, 3), {"checkpoint": tmp_path / "run", "kind": kind}
    run(nodes, method, rounds=2, **options, **settings)
    _, found = run(nodes, method, rounds=4, **options, **settings)
    assert all(torch.equal(weights_of(wanted)[n], t) for n, t in weights_of(found).items())
    for other in ({"kind": flower.LowRank}, {"kind": kind} | dict.fromkeys([*settings][:1], 0.9)):
        with pytest.raises(FedRacLoraError, match="server_optimizer"):
            run(nodes, method, rounds=5, checkpoint=tmp_path / "run", **other)


def test_options_that_another_strategy_tells_clients_reach_them(tmp_path: Path) -> None:
    class Slower(FedAdam):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            own = ConfigRecord({**config, "lr": 1 / server_round})
            return super().configure_train(server_round, arrays, own, grid)

    class Mine(flower.LowRank, FedProx, Slower): ...

    told, app = list[Any](), ClientApp()

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        told.append(dict(message.content["config"]))  # type: ignore[arg-type]
        x, y = samples(int(context.node_config["partition-id"]))
        with flower.round(message, context, network()) as r:
            train(r.model, x, y)
        return r.reply({KEY: len(x)})

    run(nodes_of(tmp_path, 2, app=app), LOW_RANK[0], rounds=2, kind=Mine, proximal_mu=0.3)
    assert [t["lr"] for t in told] == [1.0, 1.0, 0.5, 0.5]
    assert {t["proximal-mu"] for t in told} == {0.3}


def test_metrics_of_clients_are_their_own_and_no_line_counts_the_mean(
    tmp_path: Path, flower_is_heard: pytest.LogCaptureFixture
) -> None:
    seen = list[int]()

    def together(contents: list[RecordDict], key: str) -> MetricRecord:
        seen.append(len(contents))
        return MetricRecord({"sum": sum(float(c["metrics"]["train_loss"]) for c in contents)})  # type: ignore[arg-type,index,call-overload]

    options = {"train_metrics_aggr_fn": together, "kind": WithAdam}
    strategy, result = run(nodes_of(tmp_path, 3), LOW_RANK[0], rounds=2, **options)
    assert seen == [3, 3]
    assert result.train_metrics_clientapp[2]["sum"] > 0
    assert not any("Received 1 results" in line for line in flower_is_heard.messages)
    assert strategy.train_metrics_aggr_fn is together


PAGE = (Path(__file__).parents[2] / "docs" / "flower.md").read_text()
ROWS = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \| (\w+)", PAGE, re.MULTILINE)
SAID = {n: word for names, word in ROWS for n in re.findall(r"\w+", names) if hasattr(flowers, n)}


@pytest.mark.parametrize("name", sorted({*flowers.__all__} - {"Result", "Strategy", "FedAvg"}))
def test_every_strategy_of_flower_is_served_or_refused_as_the_page_says(name: str) -> None:
    other = getattr(flowers, name)
    served = other in {FedAdagrad, FedAdam, FedAvgM, FedProx, FedYogi}
    assert SAID.get(name, "refused") == ("works" if served else "refused")
    assert name in SAID or name.startswith("DifferentialPrivacy")
    if served:
        assert made(flower.LowRank, other).method == LOW_RANK[0]
        with pytest.raises(ConfigError, match=rf"{name} comes before.*LowRank, {name}\)"):
            made(other, flower.LowRank)
        return
    for bases in ((flower.LowRank, other), (other, flower.LowRank)):
        with pytest.raises(ConfigError, match=r"Mine: \w+\.aggregate_train.*FedAdam.*deploy"):
            made(*bases)


def test_the_class_of_the_page_is_one(tmp_path: Path) -> None:
    (code,) = [b for b in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "FedAdam" in b]
    names: dict[str, Any] = {}
    exec(compile(code, "flower.md", "exec"), names)
    strategy, _ = run(nodes_of(tmp_path, 2), LOW_RANK[0], kind=names["LowRankAdam"], eta=0.01)
    whole = sum(t.nbytes for t in network().parameters())
    fetched = [row["catchup_bytes"] for row in strategy.rounds.recorder.ledger.rows[1:]]
    assert fetched == [2 * whole] * 3  # each node downloads all that has changed


def made(*bases: Any) -> Any:
    return types.new_class("Mine", bases)(LOW_RANK[0], network())


class Robust(FedAdam):
    def aggregate_train(self, server_round: int, replies: Any) -> Any:
        return super().aggregate_train(server_round, [*replies][:1])


class Judge(FedAvg):
    def aggregate_evaluate(self, server_round: int, replies: Any) -> Any:
        return None


class Checks(FedAvg):
    def _check_and_log_replies(self, *_: Any, **__: Any) -> Any:
        return [], []


class Picks:
    def configure_train(self, *_: Any) -> Any:
        return []


@pytest.mark.parametrize(
    ("other", "method"),
    [
        (Robust, "aggregate_train"),
        (Judge, "aggregate_evaluate"),
        (Checks, "_check_and_log_replies"),
        (Picks, "configure_train"),
    ],
)
def test_own_classes_are_refused_by_the_method_that_would_be_skipped(
    other: type, method: str
) -> None:
    with pytest.raises(ConfigError, match=rf"{other.__name__}\.{method} would be skipped"):
        made(flower.LowRank, other)
    if other is Picks:  # in front it is called
        assert made(Picks, flower.LowRank).configure_train() == []


def test_two_server_optimizers_are_refused() -> None:
    with pytest.raises(ConfigError, match="two server optimizers"):
        made(flower.LowRank, FedAvgM, FedAdam)


@pytest.mark.parametrize("change", ["more records", "arrays", "a config for each"])
def test_messages_that_another_strategy_changes_are_refused(change: str, tmp_path: Path) -> None:
    class Other(FedAvg):
        def configure_train(self, server_round: int, arrays: Any, config: Any, grid: Any) -> Any:
            if change == "arrays":
                arrays = ArrayRecord({"0.bias": Array(np.ones(9, np.float32))})
            messages = [*super().configure_train(server_round, arrays, config, grid)]
            for k, message in enumerate(messages):
                more = {"extra": ConfigRecord({"k": k})} if change == "more records" else {}
                own = {"config": ConfigRecord({"k": k})} if change == "a config for each" else {}
                message.content = RecordDict({**message.content, **more, **own})
            return messages

    class Mine(flower.LowRank, Other): ...

    with pytest.raises(ConfigError, match=r"Mine changes the messages.*into config"):
        run(nodes_of(tmp_path, 2), LOW_RANK[0], kind=Mine)


def test_replies_may_be_left_out_by_a_class_derived_from_it(tmp_path: Path) -> None:
    class Mine(flower.LowRank):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            return super().aggregate_train(server_round, [*replies][:2])

    _, result = run(nodes_of(tmp_path, 3), LOW_RANK[0], rounds=1, kind=Mine)
    assert result.train_metrics_clientapp[1]["failures"] == 1


@pytest.mark.parametrize("share", [0.25, 1 / 997, 12.5])
def test_weights_that_are_fractions_are_taken_as_flower_takes_them(
    share: float, tmp_path: Path
) -> None:
    _, wanted = run(nodes_of(tmp_path / "whole", 3), LOW_RANK[0])
    nodes = nodes_of(tmp_path, 3, app=app_of(share=share))
    _, found = run(nodes, LOW_RANK[0])
    for name, tensor in weights_of(wanted).items():
        torch.testing.assert_close(weights_of(found)[name], tensor, rtol=1e-5, atol=1e-6)
    metrics = [each.train_metrics_clientapp[3] for each in (wanted, found)]
    assert metrics[1]["failures"] == 0
    assert metrics[1]["train_loss"] == pytest.approx(metrics[0]["train_loss"], rel=1e-5)


def trained(round_: Round) -> Trained:
    model = round_.install(network())
    loss = train(model, *samples(round_.client))
    return round_.read(model, samples=len(samples(round_.client)[0]), steps=STEPS, loss=loss)


@pytest.mark.slow
@pytest.mark.short(when=lambda uplink: uplink in {"int8", "eden2"})
@pytest.mark.parametrize("uplink", ROUNDED)
def test_rounding_is_drawn_by_partition_whatever_the_ids_of_nodes(
    uplink: str, tmp_path: Path
) -> None:
    """And so a run under a fixed seed has the bits of another, and of `simulate`."""
    one, other = (
        weights_of(run(nodes, LOW_RANK[0], uplink=uplink)[1])
        for nodes in (nodes_of(tmp_path), nodes_of(tmp_path / "turned", turned=True))
    )
    assert all(torch.equal(other[name], tensor) for name, tensor in one.items())
    words = ("output.progress=false", "head=lora", "bias=full", f"compression.uplink={uplink}")
    beside = fedraclora.simulate(
        *words, model=network(), data=[samples(k) for k in range(4)], method=LOW_RANK[0],
        train=trained, test=samples(9), rounds=3,
    )  # fmt: skip
    assert all(torch.equal(tensor, one[name]) for name, tensor in beside.weights().items())


def test_a_node_without_a_partition_is_told_of(
    tmp_path: Path, flower_is_heard: pytest.LogCaptureFixture
) -> None:
    app = ClientApp()

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        x, y = samples(int(context.node_config.pop("partition-id")))
        with flower.round(message, context, network()) as r:
            train(r.model, x, y)
        return r.reply({KEY: len(x)})

    run(nodes_of(tmp_path, 2, app=app), LOW_RANK[0], rounds=2)
    # Once for all nodes and rounds; a test before may have left Flower's logger a second handler.
    assert len({line for line in flower_is_heard.messages if "partition-id" in line}) == 1


def test_a_strategy_of_ones_own_from_nothing_is_refused() -> None:
    class Bare(Strategy):
        def configure_train(self, *_: Any) -> Any: ...
        def aggregate_train(self, *_: Any) -> Any: ...
        def configure_evaluate(self, *_: Any) -> Any: ...
        def aggregate_evaluate(self, *_: Any) -> Any: ...
        def summary(self) -> None: ...

    with pytest.raises(ConfigError, match=r"Bare\.\w+ would be skipped"):
        made(flower.LowRank, Bare)
