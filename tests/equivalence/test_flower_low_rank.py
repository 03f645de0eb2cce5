"""`fedraclora.flower` in somebody's Flower app: Flower's loop, their training, our rounds."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyClientSideAdaptiveClipping,
    DifferentialPrivacyClientSideFixedClipping,
    DifferentialPrivacyServerSideAdaptiveClipping,
    DifferentialPrivacyServerSideFixedClipping,
    FedAvg,
)
from flwr.serverapp.strategy.strategy_utils import validate_message_reply_consistency
from torch import nn
from typing_extensions import override

import fedraclora
from fedraclora import flower
from fedraclora.client import Round, Trained
from fedraclora.errors import ClientError, ConfigError, FedRacLoraError
from fedraclora.flower_internals import message_bytes
from fedraclora.protocol.link import Plan
from fedraclora.protocol.program import ClientProgram
from fedraclora.strategies.methods import METHODS
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fedavg import FedAvg as FullAverage
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from fedraclora.tree import Tree
from fedraclora.weights.files import load_tensors
from fedraclora.weights.replica import changed_file, read_stored_replica, replica_file
from tests.common import normal
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

# PEFT reads what transformers has renamed.
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is deprecated and will be removed in v6:FutureWarning"
)


class Keeping(FedAvgLora):
    """A method whose clients keep a factor."""

    client_state = True


class Programmed(FedAvgLora):
    """A method whose clients do more than plain steps."""

    @override
    def program(self, plan: Plan) -> ClientProgram:
        return ClientProgram()


def own(round_: Round) -> Trained:
    """The same training, as a function for `simulate`."""
    model = round_.install(network())
    loss = train(model, *samples(round_.client))
    return round_.read(model, samples=len(samples(round_.client)[0]), steps=STEPS, loss=loss)


@pytest.mark.parametrize(
    "method",
    [
        FedRacLora(rank=2, alpha=3),
        FedRacLora(rank=2, alpha=3, merge_every=2, train="A"),
        FedAvgLora(rank=2, alpha=3),
        pytest.param(FullAverage(), marks=pytest.mark.long),
        *(
            pytest.param(kind(rank=2, alpha=3), marks=pytest.mark.long)
            for kind in METHODS.values()
            if kind().recurs
        ),
    ],
    ids=repr,
)
def test_rounds_of_flowers_loop_have_the_bits_of_simulate(method: Any, tmp_path: Path) -> None:
    strategy, result = run(nodes_of(tmp_path), method)
    words = ("output.progress=false", "head=lora", "bias=full")
    beside = fedraclora.simulate(
        *words, model=network(), data=[samples(k) for k in range(4)], method=method, train=own,
        test=samples(9), rounds=3,
    )  # fmt: skip
    wanted = beside.weights()
    assert all(torch.equal(wanted[name], found) for name, found in weights_of(result).items())
    for row, other in zip(strategy.rounds.recorder.ledger.rows[1:], beside.rows[1:], strict=True):
        columns = ("uplink_bytes", "downlink_bytes", "train_loss", "local_steps")
        assert [row[c] for c in columns] == [other[c] for c in columns]


def test_a_node_that_was_away_fetches_links_and_all_hold_the_servers_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = iter([[0, 1], [0, 1], [2, 3], [0, 1], [0, 2]])

    def sample(there: list[int], count: int) -> list[int]:
        return [sorted(there)[k] for k in next(chosen)][:count]

    monkeypatch.setattr("random.sample", sample)
    nodes = nodes_of(tmp_path, 4)
    server: dict[int, Tree] = {}

    def measured(round_: int, arrays: ArrayRecord) -> MetricRecord:
        server[round_] = {n: torch.from_numpy(a.numpy()) for n, a in arrays.items()}
        return MetricRecord({"round": round_})

    options = {"min_available_nodes": 4, "fraction_evaluate": 0.0, "fraction_train": 0.5}
    strategy = flower.LowRank(FedRacLora(rank=1), network(), **options)
    initial = ArrayRecord(network().state_dict())
    result = strategy.start(nodes, initial, 5, evaluate_fn=measured)
    fetched = [result.train_metrics_clientapp[r]["catchup_bytes"] for r in range(1, 6)]
    whole = sum(t.nbytes for t in weights_of(result).values())
    link = (9 + 3) * 4 + 2 * 8 + (9 + 3) * 4  # B of both layers, their seeds, two biases
    # Newcomers get W; who missed links gets these, and the biases once; nobody gets W again.
    assert fetched == [2 * whole, 2 * link, 2 * whole, 2 * (2 * link - 48), 3 * link - 48]
    for folder in (tmp_path / "cache").rglob("weights.safetensors"):
        found = read_stored_replica(folder.parent)
        assert found is not None
        base, version, _ = found
        assert all(torch.equal(server[version][n], t) for n, t in base.items())


CODED = {"uplink_coding": "zstd", "downlink": "int8", "downlink_coding": "zstd"}


@pytest.mark.parametrize("more", [{}, CODED], ids=["as they are", "coded"])
def test_counted_bytes_are_the_messages_but_for_their_headers(
    more: dict[str, Any], tmp_path: Path
) -> None:
    nodes = nodes_of(tmp_path, 3)
    strategy, _ = run(nodes, FedRacLora(rank=2, alpha=3), uplink="int8", **more)
    rows = strategy.rounds.recorder.ledger.rows[1:]
    payload = sum(
        row["uplink_bytes"] + row["downlink_bytes"] + row["catchup_bytes"] for row in rows
    )
    transport = sum(row["transport_bytes"] for row in rows)
    assert payload + transport == sum(map(message_bytes, nodes.sent))
    numbers = sum(
        array.numpy().nbytes
        for message in nodes.sent
        for record in opened(message).array_records.values()
        for array in record.values()
    )
    seeds = 8 * 2 * 3 * (3 + 2)  # of two layers and three nodes, in each round, and in each link
    assert numbers + seeds == payload


def opened(message: Message) -> RecordDict:
    """A message with what is folded into it."""
    from fedraclora.engines.records import JOB, unfolded

    kept = {n: r for n, r in message.content.items() if n == JOB or isinstance(r, ArrayRecord)}
    return unfolded(RecordDict(kept))


def test_a_cache_that_is_damaged_or_lost_is_filled_in_the_same_round(tmp_path: Path) -> None:
    def harmed(message: Message, answer: Callable[[], Message]) -> Message:
        folder = tmp_path / "cache" / str(message.metadata.dst_node_id)
        for path in folder.rglob(replica_file(Path()).name):
            if message.metadata.group_id == "2" and nodes.nodes[message.metadata.dst_node_id] == 1:
                path.write_bytes(path.read_bytes()[:-9])
            if message.metadata.group_id == "3" and nodes.nodes[message.metadata.dst_node_id] == 2:
                path.unlink()
        return answer()

    nodes = nodes_of(tmp_path, 3, harmed)
    _, result = run(nodes, FedRacLora(rank=1))
    _, wanted = run(nodes_of(tmp_path / "whole", 3), FedRacLora(rank=1))
    assert all(torch.equal(weights_of(wanted)[n], t) for n, t in weights_of(result).items())
    whole = sum(t.nbytes for t in weights_of(result).values())
    for round_, lost in ((1, 0), (2, 1), (3, 1)):
        metrics, others = (r.train_metrics_clientapp[round_] for r in (result, wanted))
        assert metrics["failures"] == 0
        assert metrics["catchup_bytes"] == others["catchup_bytes"] + lost * whole


def numbers(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RecordDict], None]:
    """Change the numbers of a reply."""

    def harm(content: RecordDict) -> None:
        flat = content.array_records["arrays"]["flat"].numpy()
        content["arrays"] = ArrayRecord({"flat": Array(change(flat))})

    return harm


def told(record: str, **values: Any) -> Callable[[RecordDict], None]:
    """Change a record of a reply."""
    return lambda content: content[record].update(values)  # type: ignore[union-attr]


HARMS = {
    "NaN": numbers(lambda flat: flat * np.float32("nan")),
    "shape": numbers(lambda flat: flat[:, 1:].copy()),
    "type": numbers(lambda flat: flat.astype(np.float64)),
    "version": told("job", held=0),
    "mark": told("job", mark="1"),
    "no job": lambda content: content.pop("job"),
    "no metrics": lambda content: content.pop("metrics"),
    "no weight": lambda content: content["metrics"].pop(KEY),
    "weight": told("metrics", **{KEY: 10**12}),
    "metric": told("metrics", train_loss=float("nan")),
    "job": told("job", records=b"nothing of the kind"),
    "arrays": lambda content: content.update({"more": content["arrays"]}),
}


def test_a_bad_reply_is_left_out_by_node_and_round(
    tmp_path: Path, flower_is_heard: pytest.LogCaptureFixture
) -> None:
    harms = [*HARMS.values()]

    def harmed(message: Message, answer: Callable[[], Message]) -> Message:
        reply, client = answer(), nodes.nodes[message.metadata.dst_node_id]
        if client < len(harms) and message.metadata.group_id == "2":
            harms[client](reply.content)
        return reply

    nodes = nodes_of(tmp_path, len(HARMS) + 1, harmed)
    _, result = run(nodes, FedRacLora(rank=1), rounds=2)
    assert [result.train_metrics_clientapp[r]["failures"] for r in (1, 2)] == [0, len(HARMS)]
    lines = [m for m in flower_is_heard.messages if "left out" in m]
    named = {re.findall(r"round 2: node (\d+) is left out: .", line)[0] for line in lines}
    assert named == {str(node) for node, client in nodes.nodes.items() if client < len(HARMS)}
    assert all(t.isfinite().all() for t in weights_of(result).values())


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_node_that_is_silent_or_fails_is_named(
    kind: str, tmp_path: Path, flower_is_heard: pytest.LogCaptureFixture
) -> None:
    def fault(message: Message, answer: Callable[[], Message]) -> Message | None:
        if message.metadata.message_type == kind and nodes.nodes[message.metadata.dst_node_id] < 2:
            return None if nodes.nodes[message.metadata.dst_node_id] else raising(message)
        return answer()

    def raising(message: Message) -> Message:
        from flwr.app import Error

        return Message(
            Error(2, "<class 'ZeroDivisionError'>:<'division by zero'>"), reply_to=message
        )

    nodes = nodes_of(tmp_path, 3, fault)
    run(nodes, FedRacLora(rank=1), rounds=1, fraction_evaluate=1.0)
    lines = [m for m in flower_is_heard.messages if "left out" in m]
    first, second = sorted(nodes.nodes, key=nodes.nodes.__getitem__)[:2]
    assert any(f"round 1: node {first} " in m and "division by zero" in m for m in lines)
    assert any(f"round 1: node {second} " in m and "in time" in m for m in lines)


def test_a_round_without_any_reply_ends_by_an_error_that_names_nodes(tmp_path: Path) -> None:
    app = ClientApp()

    @app.train()
    def idle(message: Message, context: Context) -> Message:
        return flower.round(message, context, network()).reply({KEY: 3})

    nodes = nodes_of(tmp_path, 2, app=app)
    with pytest.raises(ClientError, match=rf"round 1.*nothing was trained.*{min(nodes.nodes)}"):
        run(nodes, FedRacLora(rank=1))


def test_replies_pass_the_checks_of_flowers_own_strategies(tmp_path: Path) -> None:
    nodes = nodes_of(tmp_path, 3)
    run(nodes, FedRacLora(rank=1), fraction_evaluate=1.0)
    for kind in ("train", "evaluate"):
        replies = [
            m for m in nodes.sent if m.metadata.message_type == kind and "metrics" in m.content
        ]
        assert len(replies) == 9
        validate_message_reply_consistency([m.content for m in replies], KEY, kind == "train")


def test_options_of_fedavg_go_on_to_work(
    tmp_path: Path, flower_is_heard: pytest.LogCaptureFixture
) -> None:
    app, seen = ClientApp(), list[RecordDict]()

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        assert message.content["settings"] == {"lr": 0.2, "server-round": 1}
        x, y = samples(int(context.node_config["partition-id"]))
        r = flower.round(message, context, network())
        train(r.model, x, y)
        return r.reply({"weight": len(x), "lengths": [1.0, float(len(x))]})

    def together(contents: list[RecordDict], key: str) -> MetricRecord:
        seen.extend(contents)
        return MetricRecord({"most": max(int(c.metric_records["metrics"][key]) for c in contents)})  # type: ignore[arg-type]

    nodes = nodes_of(tmp_path, 4, app=app)
    strategy = flower.LowRank(
        FedRacLora(rank=1), network(), fraction_train=0.75, fraction_evaluate=0.0,
        weighted_by_key="weight", configrecord_key="settings", train_metrics_aggr_fn=together,
    )  # fmt: skip
    initial = ArrayRecord(network().state_dict())
    result = strategy.start(nodes, initial, 1, train_config=ConfigRecord({"lr": 0.2}))
    most = result.train_metrics_clientapp[1]["most"]
    assert strategy.rounds is not None
    assert strategy.rounds.recorder.ledger.rows[1]["train_loss"] is None  # nobody said it
    assert len(seen) == 3
    assert most in {8 + 3 * k for k in range(4)}


STATE = network().state_dict()
# What is refused at the start: what it is given, and key words of the message.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "factors of clients": ({"method": Keeping(rank=1)}, "LowRank.*keeps a part"),
    "a client program": ({"method": Programmed(rank=1)}, "client program"),
    "two exchanges": ({"method": FedRacLora(rank=1, init="gradient")}, "gradient"),
    "a class": ({"method": FedRacLora}, "instance"),
    "a key of arrays": ({"arrayrecord_key": "weights"}, "arrayrecord_key"),
    "a number format": ({"uplink": "int7"}, "uplink.*int7.*int8"),
    "coded floats": ({"uplink": "int8", "downlink_coding": "zstd"}, "downlink_coding.*float32"),
    "a personal head": ({"head": "personal"}, "head=personal"),
    "an array too few": (
        {"initial": {n: t for n, t in STATE.items() if n != "0.weight"}},
        r"initial_arrays.*state_dict",
    ),
    "an array too many": ({"initial": STATE | {"x": STATE["0.bias"]}}, "initial_arrays"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_by_name(name: str, tmp_path: Path) -> None:
    options, why = REFUSED[name]
    options = {"method": FedRacLora(rank=1)} | options
    with pytest.raises(ConfigError, match=why):
        run(nodes_of(tmp_path, 2), options.pop("method"), **options)


def test_arrays_that_another_changed_between_rounds_are_refused(tmp_path: Path) -> None:
    class Changing(flower.LowRank):
        def aggregate_train(self, server_round: int, replies: Any) -> Any:
            arrays, metrics = super().aggregate_train(server_round, replies)
            return ArrayRecord(arrays.to_torch_state_dict()), metrics  # type: ignore[union-attr]

    strategy = Changing(FedRacLora(rank=1), network(), fraction_evaluate=0.0)
    with pytest.raises(ConfigError, match="round 2: the arrays"):
        strategy.start(nodes_of(tmp_path, 2), ArrayRecord(network().state_dict()), 2)


@pytest.mark.parametrize(
    "wrapper",
    [
        DifferentialPrivacyServerSideFixedClipping,
        DifferentialPrivacyClientSideFixedClipping,
        DifferentialPrivacyServerSideAdaptiveClipping,
        DifferentialPrivacyClientSideAdaptiveClipping,
    ],
)
def test_privacy_of_flower_that_would_reach_no_weight_is_refused(
    wrapper: Any, tmp_path: Path
) -> None:
    """A wrapper's noise is on arrays that `LowRank` gives, and never takes back."""
    inner = flower.LowRank(FedRacLora(rank=1), network(), fraction_evaluate=0.0)
    clipping = {"clipping_norm": 1.0} if "Fixed" in wrapper.__name__ else {}
    outer = wrapper(inner, noise_multiplier=0.1, num_sampled_clients=2, **clipping)
    given = nodes_of(tmp_path, 2), ArrayRecord(network().state_dict()), 1
    inner.start(*given)  # once by itself changes nothing
    with pytest.raises(ConfigError, match=r"another strategy.*fedraclora deploy"):
        outer.start(*given)


def test_a_message_of_another_strategy_is_refused_by_name(tmp_path: Path) -> None:
    nodes = nodes_of(tmp_path, 2)
    FedAvg(fraction_evaluate=0.0).start(nodes, ArrayRecord(network().state_dict()), 1)
    replies = [m for m in nodes.sent if m.has_error()]
    assert len(replies) == 2
    assert all("fedraclora.flower.LowRank" in str(m.error.reason) for m in replies)


def llama() -> Any:
    """A tiny random language model with LoRA layers of PEFT; its base is one checkpoint."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(5)  # noqa: TID251
        base = LlamaForCausalLM(settings)
    return get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))


def text_app() -> ClientApp:
    """Somebody's ClientApp for it."""
    app = ClientApp()

    def tokens(context: Context) -> torch.Tensor:
        seed = int(context.node_config["partition-id"])
        return (normal(6, 8, key=seed).abs() * 13).long() % 40

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        with flower.round(message, context, llama()) as r:
            optimizer = torch.optim.AdamW(r.model.parameters(), lr=0.1)
            loss = r.model(tokens(context), labels=tokens(context)).loss
            loss.backward()
            optimizer.step()
        return r.reply({KEY: 6, "train_loss": loss.item()})

    @app.evaluate()
    def on_evaluate(message: Message, context: Context) -> Message:
        with flower.round(message, context, llama()) as r, torch.no_grad():
            loss = r.model(tokens(context), labels=tokens(context)).loss
        return r.reply({KEY: 6, "eval_loss": loss.item()})

    return app


@pytest.mark.parametrize("method", [FedRacLora(rank=2, alpha=3), FedAvgLora(rank=2, alpha=3)])
def test_a_peft_model_begins_from_its_checkpoint_and_is_sent_no_weights(
    method: Any, tmp_path: Path
) -> None:
    from peft import get_peft_model_state_dict

    nodes, own_model = nodes_of(tmp_path, 2, app=text_app()), llama()
    strategy = flower.LowRank(method, own_model)
    initial = ArrayRecord(get_peft_model_state_dict(own_model))

    def measured(round_: int, arrays: ArrayRecord) -> MetricRecord | None:
        if round_:  # into the very model that the strategy was given
            own_model.get_base_model().load_state_dict(
                {n.replace("_proj.weight", "_proj.base_layer.weight") if n[-13] in "qv" else n: t
                 for n, t in arrays.to_torch_state_dict().items()}, strict=False,
            )  # fmt: skip
        return None

    result = strategy.start(nodes, initial, 3, evaluate_fn=measured)
    metrics = result.train_metrics_clientapp
    assert [metrics[r]["failures"] for r in (1, 2, 3)] == [0, 0, 0]
    assert metrics[1]["catchup_bytes"] == 0
    every = [*metrics.values(), *result.evaluate_metrics_clientapp.values()]
    assert max(float(str(each["catchup_bytes"])) for each in every) < 1000  # links, no weights
    assert metrics[3]["train_loss"] < metrics[1]["train_loss"]
    untrained = dict(flower.load(llama(), initial).named_parameters())
    assert all(torch.equal(untrained[n], p) for n, p in llama().unload().named_parameters())
    model = flower.load(llama(), result.arrays)
    assert not [n for n, _ in model.named_parameters() if "lora" in n]
    before = dict(llama().unload().named_parameters())
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {f"model.layers.0.self_attn.{k}_proj.weight" for k in "qv"}
    found = [float(result.evaluate_metrics_clientapp[r]["eval_loss"]) for r in (1, 2, 3)]
    tokens = [(normal(6, 8, key=k).abs() * 13).long() % 40 for k in (0, 1)]
    with torch.no_grad():
        own = sum(float(model(t, labels=t).loss) for t in tokens) / 2
    assert found[2] == pytest.approx(own, rel=1e-5)


def with_saved_head() -> Any:
    """The network with LoRA layers of PEFT, and its last layer among ``modules_to_save``."""
    from peft import LoraConfig, get_peft_model

    *layers, head = [n for n, m in network().named_modules() if isinstance(m, nn.Linear)]
    config = LoraConfig(r=1, target_modules=layers, modules_to_save=[head])
    return get_peft_model(network(), config)


def test_layers_that_peft_trains_in_full_are_trained_so(tmp_path: Path) -> None:
    nodes = nodes_of(tmp_path, 2, app=app_of(with_saved_head))
    strategy, result = run(nodes, FedRacLora(rank=1), rounds=2, model=with_saved_head())
    assert [result.train_metrics_clientapp[r]["failures"] for r in (1, 2)] == [0, 0]
    before, after = dict(network().named_parameters()), weights_of(result)
    moved = {n for n, t in after.items() if not torch.equal(t, before[n])}
    assert moved == {"0.weight", "2.weight", "2.bias"}
    assert strategy.rounds.done == 2


def test_clients_whose_own_model_is_another_are_sent_the_weights(tmp_path: Path) -> None:
    app = app_of(
        lambda: network().apply(lambda m: isinstance(m, nn.Linear) and m.reset_parameters())
    )
    _, result = run(nodes_of(tmp_path, 2, app=app), FedRacLora(rank=1), same_start=True)
    whole = 2 * sum(t.nbytes for t in weights_of(result).values())
    assert result.train_metrics_clientapp[1]["catchup_bytes"] == whole
    assert result.train_metrics_clientapp[1]["failures"] == 0
    _, wanted = run(nodes_of(tmp_path / "more", 2), FedRacLora(rank=1), same_start=True)
    assert wanted.train_metrics_clientapp[1]["catchup_bytes"] == 0
    assert all(torch.equal(weights_of(wanted)[n], t) for n, t in weights_of(result).items())


def test_an_adapter_that_has_been_trained_is_refused_as_a_start(tmp_path: Path) -> None:
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(llama())
    name = next(n for n in state if "lora_B" in n)
    initial = ArrayRecord(state | {name: torch.ones_like(state[name])})
    with pytest.raises(ConfigError, match="merge_and_unload"):
        flower.LowRank(FedRacLora(rank=2), llama()).start(nodes_of(tmp_path, 2), initial, 1)


@pytest.mark.slow
@pytest.mark.parametrize("method", [FedRacLora(rank=2, alpha=3), FedAvgLora(rank=2, alpha=3)])
def test_a_run_that_was_killed_goes_on_to_the_same_bits(method: Any, tmp_path: Path) -> None:
    """A kill in round 3: the strategy is another, nodes still hold what they held."""
    _, wanted = run(nodes_of(tmp_path / "whole", 3), method, rounds=4)
    nodes = nodes_of(tmp_path, 3)

    def killed(message: Message, answer: Callable[[], Message]) -> Message:
        kind, settings = message.metadata.message_type, message.content["config"]
        if (kind, settings["server-round"]) == ("train", 3):
            raise KeyboardInterrupt
        return answer()

    measured: list[int] = []
    options = {"checkpoint": tmp_path / "run", "fraction_evaluate": 1.0}
    nodes.fault = killed
    with pytest.raises(KeyboardInterrupt):
        run(nodes, method, rounds=4, **options)
    nodes.fault = None
    strategy = flower.LowRank(method, network(), min_available_nodes=3, **options)
    initial = ArrayRecord({n: t + 1 for n, t in network().state_dict().items()})  # drawn anew
    found = strategy.start(nodes, initial, 4, evaluate_fn=lambda t, _: measured.append(t))
    assert measured == [2, 3, 4]
    assert sorted(found.train_metrics_clientapp) == [3, 4]
    assert all(torch.equal(weights_of(wanted)[n], t) for n, t in weights_of(found).items())
    assert [row["round"] for row in strategy.rounds.recorder.ledger.rows] == [0, 1, 2, 3, 4]
    whole = sum(t.nbytes for t in weights_of(found).values())
    assert all(m["catchup_bytes"] < whole for m in found.train_metrics_clientapp.values())
    again = flower.LowRank(method, network(), min_available_nodes=3, **options)
    there = again.start(nodes, initial, 4)
    assert all(torch.equal(weights_of(wanted)[n], t) for n, t in weights_of(there).items())
    for other, rounds, why in (
        (method, 2, "has 4 rounds"),
        (FedRacLora(rank=1), 4, r"method: .*rank=1"),
    ):
        with pytest.raises(FedRacLoraError, match=why):
            flower.LowRank(other, network(), **options).start(nodes, initial, rounds)


def test_a_folder_of_something_else_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "letters.txt").write_text("kept")
    with pytest.raises(ConfigError, match=r"letters\.txt"):
        run(nodes_of(tmp_path / "nodes", 2), FedRacLora(rank=1), checkpoint=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"letters.txt", ".lock"}


def test_weights_are_computed_and_written_when_they_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And then they are those of their round, however late that is."""
    asked, kept = list[int](), dict[int, ArrayRecord]()
    original = FedAvgLora.weights

    def counted(self: Any, state: Any, draw: Any) -> Tree:
        asked.append(1)
        return original(self, state, draw)

    monkeypatch.setattr(FedAvgLora, "weights", counted)
    nodes = nodes_of(tmp_path, 2)
    strategy = flower.LowRank(FedAvgLora(rank=1), network(), fraction_evaluate=0.0)
    initial = ArrayRecord(network().state_dict())
    strategy.start(nodes, initial, 3, evaluate_fn=lambda t, a: kept.update({t: a}))  # type: ignore[func-returns-value]
    assert len(asked) == 1  # Flower's last lines say how large the last are
    for rounds in (1, 2, 3):
        _, wanted = run(nodes_of(tmp_path / str(rounds), 2), FedAvgLora(rank=1), rounds=rounds)
        assert all(
            np.array_equal(a.numpy(), wanted.arrays[n].numpy()) for n, a in kept[rounds].items()
        )
        assert kept[rounds].count_bytes() == wanted.arrays.count_bytes()


def test_of_one_node_the_mean_is_its_own_whatever_it_weighs(tmp_path: Path) -> None:
    options = {"head": "frozen", "bias": "frozen", "fraction_evaluate": 0.0}
    options |= {"min_available_nodes": 1, "min_train_nodes": 1}
    ends = []
    for share in (0, 0.5, 3.0):
        nodes = nodes_of(tmp_path / str(share), 1, app=app_of(share=share))
        strategy = flower.LowRank(FedRacLora(rank=1), network(), **options)
        found = strategy.start(nodes, ArrayRecord(network().state_dict()), 1).arrays
        ends.append(found["0.weight"].numpy())
        assert abs(ends[-1] - network()[0].weight.detach().numpy()).max() > 1e-3
    assert (ends[0] == ends[1]).all()
    assert (ends[0] == ends[2]).all()


def test_a_node_writes_what_a_round_has_changed_alone(tmp_path: Path) -> None:
    """Of a method that merges nothing no weight, of another what it trains."""

    def wide() -> nn.Module:
        model = nn.Sequential(network(), nn.Linear(3, 400))
        nn.init.constant_(model[1].weight, 0.1)
        nn.init.zeros_(model[1].bias)
        return model

    options = {"model": wide(), "target_modules": ["0.0"], "head": "frozen", "bias": "frozen"}
    sizes = {}
    for method in (FedRacLora(rank=1), FedAvgLora(rank=1)):
        nodes = nodes_of(tmp_path / type(method).__name__, 1, app=app_of(wide))
        options["min_train_nodes"] = options["min_evaluate_nodes"] = 1
        strategy = flower.LowRank(method, min_available_nodes=1, fraction_evaluate=0.0, **options)
        strategy.start(nodes, ArrayRecord(wide().state_dict()), 3)
        (folder,) = {path.parent for path in nodes.cache.rglob("weights.safetensors")}
        found = read_stored_replica(folder)
        assert found is not None
        assert found[1] == 2
        sizes[type(method)] = {
            n: t.nbytes for n, t in load_tensors(changed_file(folder), "")[0].items()
        }
    assert sizes == {FedRacLora: {"0.0.weight": 9 * 7 * 4}, FedAvgLora: {}}
