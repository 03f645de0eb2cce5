"""Clients measure on samples of their own: the split, the sums, and the row of a round."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch

import fedraclora
from fedraclora.commands.compare.table import compare_runs
from fedraclora.commands.report.figures import figures_of
from fedraclora.commands.report.page import page_of, read_shown
from fedraclora.config import pretraining
from fedraclora.data.client_split import hold_out_of_clients
from fedraclora.data.clients import ChangedClients, PartitionedData
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.evaluation.clients import spread
from fedraclora.evaluation.evaluate import class_accuracies, evaluate
from fedraclora.evaluation.metrics import higher_is_better
from tests.common import FIXED, normal

SIZES = (1, 3, 10, 40)


def clients_of(sizes: tuple[int, ...] = SIZES) -> PartitionedData:
    """Clients of unequal sizes, whose rows are told apart by their numbers."""
    rows = np.random.default_rng(0).permutation(sum(sizes))
    table = Samples({"x": torch.arange(sum(sizes)).double()[:, None]}, torch.arange(sum(sizes)))
    return PartitionedData.of(table, np.split(rows, np.cumsum(sizes)[:-1]))


def rows_of(data: Any, client: int) -> list[int]:
    """The rows of the table that a client has."""
    size = int(data.sizes(torch.tensor([client])))
    found: list[int] = data.gather(torch.tensor([client]), torch.arange(size)[None]).target.tolist()
    return found


@pytest.mark.parametrize("split", ["test", "validation"])
def test_what_is_held_out_is_never_trained_on_and_is_of_seed_and_client_alone(
    split: str,
) -> None:
    whole = clients_of()
    train, held = hold_out_of_clients(whole, 0.2, 5, split)
    lazy = hold_out_of_clients(ChangedClients(whole), 0.2, 5, split)
    for client, size in enumerate(SIZES):
        own = rows_of(train, client), rows_of(held, client)
        assert len(own[0]) >= 1
        assert not {*own[0]} & {*own[1]}
        assert {*own[0], *own[1]} <= {*rows_of(whole, client)}
        assert split == "validation" or len(own[0]) + len(own[1]) == size
        assert tuple(map(sorted, own)) == tuple(sorted(rows_of(part, client)) for part in lazy)
    assert rows_of(held, 0) == []
    other = hold_out_of_clients(whole, 0.2, 6, split)[1]
    assert rows_of(other, 3) != rows_of(held, 3)
    if split == "validation":  # what the test is measured on is left alone
        test = hold_out_of_clients(whole, 0.2, 5)[1]
        assert not {*rows_of(test, 3)} & {*rows_of(train, 3), *rows_of(held, 3)}


def moons(clients: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Clients of unequal sizes with two classes."""
    found = []
    for k in range(clients):
        g = torch.Generator().manual_seed(k)
        x = torch.randn(5 + 7 * k, 3, generator=g, dtype=torch.float64)
        found.append((x, (x[:, 0] + 0.3 * k > x[:, 1]).long()))
    return found


def net() -> torch.nn.Module:
    layers = torch.nn.Linear(3, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    for i in (0, 2):
        layers[i].weight.data = normal(*layers[i].weight.shape, key=i) / 2  # type: ignore[union-attr]
        layers[i].bias.data.zero_()  # type: ignore[union-attr]
    return torch.nn.Sequential(*layers).double()


def simulated(*words: str, **given: Any) -> Any:
    """Run three rounds in which clients measure."""
    settings = {"method": "fed_rac_lora", "rounds": 3, "clients_per_round": 4} | given
    settings = {key: value for key, value in settings.items() if value is not None}
    share = ["evaluate.share=0.4"] if any("evaluate.clients=" in word for word in words) else []
    common = (*share, *FIXED, "output.progress=false")
    return fedraclora.simulate(*common, *words, model=net(), data=moons(), **settings)


@pytest.mark.parametrize(
    "method", ["fed_rac_lora", "fedavg_lora", "ffa_lora", "fedavg", "flora_stacking"]
)
def test_the_metrics_of_clients_pooled_are_those_of_their_samples_together(method: str) -> None:
    run = simulated("evaluate.clients=all", "engine.chunk=2", method=method)
    task = run.builder.built.task
    sizes = task.held.data.sizes(torch.arange(6)).tolist()
    own = [
        task.held.data.gather(torch.tensor([k]), torch.arange(n)[None]) for k, n in enumerate(sizes)
    ]
    assert len(set(sizes)) > 3
    weights, metrics = run.weights(), ("accuracy", "loss")
    whole = evaluate(task.model, weights, Samples.join(own), task.loss, metrics)
    each = [evaluate(task.model, weights, samples, task.loss, metrics) for samples in own]
    column = run.rows[-1]["clients"]
    # The model is float32, and a row's product may depend on the rows beside it.
    for name in metrics:
        assert column[name]["pooled"] == pytest.approx(whole[name], abs=1e-6)
        values = [found[name] for found in each]
        assert column[name]["mean"] == pytest.approx(np.mean(values), abs=1e-6)
        assert column[name]["max"] == pytest.approx(max(values), abs=1e-6)
    assert (column["n"], column["samples"]) == (6, sum(sizes))


def furthest(output: torch.Tensor, target: torch.Tensor) -> float:
    return float((output.flatten() - target).abs().amax())


def area(score: Any, target: Any) -> float:
    """The share of pairs of both classes whose scores are in order."""
    pairs = score[target == 1][:, None] - score[target == 0]
    return float(((pairs > 0) + 0.5 * (pairs == 0)).mean())


@pytest.mark.parametrize("secure", ["none", "secagg"])
def test_a_server_without_samples_has_no_metric_that_is_not_of_all_samples(
    secure: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It had the mean over clients, whatever their sizes, under the name of the metric."""
    caplog.set_level("INFO", "fedraclora.terminal.progress")
    scorer = torch.nn.Linear(3, 1)
    scorer.weight.data, scorer.bias.data = normal(1, 3, key="scorer").float(), torch.zeros(1)
    own = fedraclora.Metric(furthest, higher_is_better=False)
    metrics = ["auc", "accuracy", own, "pearson", "spearman", "f1", "loss"]
    words = ("evaluate.clients=all", "evaluate.share=0.4", "output.progress=false")
    words += ("aggregation_weights=uniform", f"secure={secure}")
    given: dict[str, Any] = {"metrics": metrics, "loss": "logistic", "test": 0, "rounds": 1}
    run = fedraclora.simulate(*words, "local.lr=0.1", model=scorer, data=moons(), **given)
    row, held = run.rows[1], run.builder.built.task.held
    assert [*row["metrics"]] == ["accuracy", "f1", "loss"]
    model, every = run.model(), []
    for client, size in enumerate(held.data.sizes(torch.arange(6)).tolist()):
        samples = held.data.gather(torch.tensor([client]), torch.arange(size)[None])
        score = model(samples.inputs["x"])[:, 0].detach().numpy()
        every.append((score, samples.target.numpy()))
    score, target = map(np.concatenate, zip(*every, strict=True))
    said = score > 0
    assert row["metrics"]["accuracy"] == pytest.approx((said == target).mean(), abs=1e-9)
    f1 = 2 * (said & (target == 1)).sum() / (said.sum() + target.sum())
    assert row["metrics"]["f1"] == pytest.approx(f1, abs=1e-9)
    loss = np.logaddexp(0, score) - target * score
    assert row["metrics"]["loss"] == pytest.approx(loss.mean(), abs=1e-6)
    known = [area(*each) for each in every if len({*each[1].tolist()}) == 2]
    assert row["clients"]["auc"]["mean"] == pytest.approx(np.mean(known), abs=1e-6)
    assert row["clients"]["auc"]["mean"] != pytest.approx(area(score, target), abs=1e-3)
    assert {"auc", "furthest", "pearson", "spearman"} <= {*row["clients"]}
    assert "auc, furthest, pearson, spearman" in caplog.text


def test_the_spread_has_the_worst_tenth_by_the_direction_of_the_metric() -> None:
    values = np.array([*range(1, 12), np.nan], dtype=float)
    score, loss = spread("accuracy", values, 0.5), spread("loss", values, 0.5)
    assert (score["worst10"], score["best10"]) == (1.5, 10.5)  # two of eleven
    assert (loss["worst10"], loss["best10"]) == (10.5, 1.5)
    assert (score["mean"], score["median"], score["pooled"]) == (6.0, 6.0, 0.5)
    assert score["std"] == pytest.approx(np.std(np.arange(1, 12)))
    assert score["n"] == 11  # the row's is 12
    assert "n" not in spread("accuracy", values[:-1], 0.5)


def test_clients_columns_and_their_file_survive_a_stop(tmp_path: Path) -> None:
    words = ("evaluate.clients=round", "output.checkpoint_every=1", "output.plots=false")
    whole = simulated(*words, folder=tmp_path / "whole")
    part = simulated(*words, folder=tmp_path / "part", rounds=2)
    assert part.clients["round"].max() == 2
    again = simulated(*words, folder=tmp_path / "part", resume=True)
    assert again.summary["ledger_digest"] == whole.summary["ledger_digest"]
    stored = pd.read_parquet(tmp_path / "part" / "clients.parquet")
    pd.testing.assert_frame_equal(stored, whole.clients)
    assert [*whole.clients.columns[:5]] == ["round", "client", "samples", "steps", "when"]
    assert [*whole.clients.groupby("round").size()] == [4, 4, 4, 4]
    own = whole.clients[whole.clients["round"] == 3]
    told = whole.rows[3]["clients"]["accuracy"]
    assert told["mean"] == pytest.approx(own["accuracy"].mean(), abs=1e-12)
    assert whole.history["clients.accuracy.pooled"][3] == told["pooled"]
    weighted = np.average(own["accuracy"], weights=own["samples"])
    assert told["pooled"] == pytest.approx(weighted, abs=1e-12)


def test_a_metric_of_clients_stops_a_run_and_is_a_metric_like_any(tmp_path: Path) -> None:
    words = ("evaluate.clients=all", "evaluate.clients_every=2", "stop.patience=1")
    metric = "stop.metric=clients.accuracy.worst10"
    run = simulated(*words, metric, "stop.min_delta=1", rounds=9, folder=tmp_path / "a")
    assert run.summary["rounds"] == 2
    assert [row["round"] for row in run.rows if "clients" in row] == [0, 2]
    assert "clients" in run.summary["best"]
    with pytest.raises(ConfigError, match=r"clients.accuracy.p50.*median"):
        simulated(*words, "stop.metric=clients.accuracy.p50")
    with pytest.raises(ConfigError, match=r"evaluate.clients=round"):
        simulated(metric, "stop.patience=1")
    table = compare_runs([tmp_path / "a"], tmp_path / "out", metric="clients.loss.mean")
    last = run.rows[2]["clients"]["loss"]["mean"]
    assert table.records[0]["metric_mean"] == pytest.approx(last)
    assert higher_is_better("clients.accuracy.worst10")
    assert not higher_is_better("clients.finetuned_loss.p90")
    assert not higher_is_better("clients.personal_loss.p90")  # its name in ledgers of before
    assert not higher_is_better("clients.accuracy.std")


def test_what_is_measured_after_local_training_is_what_each_client_trained() -> None:
    run = simulated(
        "evaluate.clients=all", "evaluate.personal=true", method="ffa_lora", clients_per_round=6
    )
    last = run.rows[-1]["clients"]
    assert last["finetuned_loss"]["mean"] < last["loss"]["mean"]
    assert {*run.clients["when"]} == {"before", "after"}
    assert (run.clients["steps"][run.clients["when"] == "after"] > 0).all()
    plain = simulated("evaluate.clients=all", method="ffa_lora", clients_per_round=6)
    assert plain.summary["weights_digest"] == run.summary["weights_digest"]


def test_the_personal_accuracy_is_that_of_the_clients_own_models_alone() -> None:
    """Clients gave the name to what they measured after training, round 0 to another mean."""
    words = ("evaluate.clients=all", "evaluate.personal=true")
    test = moons(7)[6]
    run = simulated(*words, method="fedsa_lora", clients_per_round=6, test=test)
    names = [{*row["metrics"]} for row in run.rows]
    assert names == [{"personal_accuracy"}] * 4
    assert {"accuracy", "finetuned_accuracy"} <= {*run.rows[-1]["clients"]}
    assert not [n for row in run.rows for n in row["clients"] if n.startswith("personal_")]
    task, counts = run.builder.built.task, run.builder.built.label_counts(torch.arange(6))
    found = class_accuracies(task.model, {}, task.test, 2, 100)
    wanted = np.mean([(count / count.sum()) @ found for count in counts])
    assert run.rows[0]["metrics"]["personal_accuracy"] == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("words", [("head=personal",), ("method=fedsa_lora",)])
def test_clients_measure_the_models_of_their_own(words: tuple[str, ...]) -> None:
    run = simulated("evaluate.clients=all", *words, method=None, clients_per_round=6)
    mixed = run.rows[-1]["clients"]
    assert mixed["loss"]["mean"] < run.rows[0]["clients"]["loss"]["mean"]


def test_no_pretraining_sees_what_clients_hold_out(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    monkeypatch.setattr(pretraining, "pretrain", lambda _model, train, *_: seen.append(train))
    run = simulated("evaluate.clients=all", "pretrain.epochs=1", rounds=0)
    task = run.builder.built.task
    held = [rows_of(task.held.data, client) for client in range(6)]
    hidden = {tuple(row) for k in range(6) for row in features(task.held.data, k)}
    assert sum(map(len, held)) == len(hidden) > 10
    assert not hidden & {tuple(row) for row in seen[0].inputs["x"].tolist()}
    trained = {tuple(row) for k in range(6) for row in features(task.train, k)}
    assert trained == {tuple(row) for row in seen[0].inputs["x"].tolist()}


def features(data: Any, client: int) -> list[list[float]]:
    """The inputs of a client."""
    place = torch.arange(int(data.sizes(torch.tensor([client]))))[None]
    found: list[list[float]] = data.gather(torch.tensor([client]), place).inputs["x"].tolist()
    return found


def test_a_client_too_small_to_hold_any_out_is_named(caplog: pytest.LogCaptureFixture) -> None:
    data = [*moons(3), (torch.ones(2, 3).double(), torch.tensor([0, 1]))]
    words = ("evaluate.clients=all", "evaluate.share=0.2", "output.progress=false")
    with caplog.at_level("INFO"):
        run = fedraclora.simulate(*words, model=net(), data=data, rounds=1, clients_per_round=2)
    (failed,) = run.rows[1]["clients"]["failures"]
    assert failed["client"] == 3
    assert "evaluate.share" in failed["reason"]
    assert run.rows[1]["clients"]["n"] == 3
    assert "1 of 4" in caplog.text
    with pytest.raises(ConfigError, match=r"evaluate.share=0.01"):
        fedraclora.simulate(*words, "evaluate.share=0.01", model=net(), data=data)


def test_the_report_has_figures_by_the_size_of_clients(tmp_path: Path) -> None:
    run = simulated("evaluate.clients=all", "output.plots=false", folder=tmp_path / "run", rounds=1)
    last = run.clients[run.clients["round"] == 1].sort_values("samples", kind="stable")
    told = figures_of(tmp_path / "run", run.rows)["accuracy"]
    assert told["worst10"] == last["accuracy"].min()
    worst = int(told["worst client (partition id)"])
    assert worst == last.set_index("client")["accuracy"].idxmin()
    page = page_of([read_shown(tmp_path / "run")])
    assert re.search(rf"partition id.*<td[^>]*>{worst}</td>", page, re.DOTALL)
    assert told["quarter 1"] == pytest.approx(last["accuracy"][:2].mean())
    rho = scipy.stats.spearmanr(last["samples"], last["accuracy"]).statistic
    assert told["rank correlation with size"] == pytest.approx(rho)


def two_steps(round_: Any) -> Any:
    """A training function that keeps what it was given."""
    x, y = (torch.as_tensor(each) for each in round_.data)
    SEEN.setdefault(round_.client, []).append(x)
    model = round_.install(net())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
    return round_.read(model, samples=len(x), steps=2, loss=loss.item())


SEEN: dict[int, list[torch.Tensor]] = {}


def of_client(client: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The samples of a client, as a function of the user's gives them."""
    x, y = moons()[client]
    return x.numpy(), y.numpy()


@pytest.mark.parametrize("source", ["objects", "own"])
def test_a_training_function_never_sees_what_its_client_holds_out(source: str) -> None:
    SEEN.clear()
    words, given = ["evaluate.clients=all", "evaluate.share=0.4"], {"data": moons()}
    if source == "own":
        own = {
            "name": "own",
            "samples": f"{__name__}:of_client",
            "test_fraction": 0.2,
            "classes": 2,
        }
        given = {"data": own, "clients": 6}
    run = fedraclora.simulate(
        *words, model=net(), train=two_steps, rounds=1, clients_per_round=6, **given
    )
    held = run.builder.built.task.held
    assert run.rows[1]["clients"]["n"] == 6
    for client, seen in SEEN.items():
        hidden = {tuple(np.float32(row)) for row in features(held.data, client)}
        trained = {tuple(row) for x in seen for row in x.float().numpy()}
        assert hidden
        assert not hidden & trained
    with pytest.raises(ConfigError, match=r"evaluate.clients=none"):
        fedraclora.simulate(*words, model=net(), train=two_steps, data=[Opaque()] * 4)


class Opaque:
    """Data of which no tensors can be made."""

    def __len__(self) -> int:
        return 4


def with_tests(client: int) -> object:
    """A client's samples, with test samples of its own for some."""
    x, y = of_client(client)
    return {"train": (x, y), "test": (x[:2] + 50, y[:2])} if client % 2 else (x, y)


@pytest.mark.parametrize("source", ["function", "folder", "list"])
def test_a_client_measures_on_the_test_samples_that_it_brings(source: str, tmp_path: Path) -> None:
    for client in range(6):
        x, y = of_client(client)
        np.savez(tmp_path / f"{client}.npz", x=x, target=y)
        if client % 2:
            np.savez(tmp_path / f"{client}.test.npz", x=x[:2] + 50, target=y[:2])
    samples = f"{__name__}:with_tests" if source == "function" else str(tmp_path)
    data: Any = {"name": "own", "samples": samples, "test_fraction": 0.2, "classes": 2}
    data = [with_tests(client) for client in range(6)] if source == "list" else data
    words = ["evaluate.clients=all", "output.progress=false"]
    given = {"model": net(), "data": data, "clients": 6, "clients_per_round": 3}
    run = fedraclora.simulate(*words, **given, rounds=1)
    task, alone = run.builder.built.task, fedraclora.simulate(*words[1:], **given, rounds=0)
    for client in range(6):
        held, size = (
            features(task.held.data, client),
            len(features(alone.builder.built.task.train, client)),
        )
        if client % 2:
            assert (np.array(held) > 40).all()
            assert len(features(task.train, client)) == size
        else:
            assert len(features(task.train, client)) + len(held) == size
    last = run.clients[run.clients["round"] == 1]
    assert [*last["samples"][last["client"] % 2 == 1]] == [2, 2, 2]
    share = fedraclora.simulate(*words, "evaluate.share=0.3", **given, rounds=0)
    assert all(np.max(features(share.builder.built.task.held.data, k)) < 40 for k in range(1, 6))


def test_tests_of_clients_in_a_list_are_told_kept_apart_and_refused_where_they_cannot_be_used(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def run(*words: str, **changed: Any) -> Any:
        given = {"data": [with_tests(client) for client in range(6)], "test": 0, "rounds": 1}
        return fedraclora.simulate("output.progress=false", *words, **given | changed, model=net())

    caplog.set_level("INFO")
    alone = run()
    assert "test samples that 3 bring" in caplog.text
    SEEN.clear()
    own = run("evaluate.clients=all", train=two_steps, clients_per_round=6)
    assert "3 on test samples of their own" in caplog.text
    assert all(float(x.max()) < 40 for seen in SEEN.values() for x in seen)
    assert [len(SEEN[client][0]) for client in (1, 3)] == [12, 26]
    assert own.rows[1]["metrics"]["loss"] == own.rows[1]["clients"]["loss"]["pooled"]
    swapped = [with_tests(client) for client in range(6)]
    swapped[0], swapped[1] = {**swapped[1], "train": swapped[0]}, swapped[1]["train"]  # type: ignore[call-overload, dict-item]
    assert run(data=swapped).config["data"]["digest"] != alone.config["data"]["digest"]
    few = run("evaluate.clients=all", "data.labels=[1,0]")
    assert len(features(few.builder.built.task.held.data, 3)) == 2
    wide = [*swapped[:5], {"train": of_client(5), "test": (np.zeros((2, 4)), np.zeros(2, int))}]
    for said, changed in (
        ("keys train and test", {"data": with_tests(1)}),
        ("partition=iid divides all rows anew", {"partition": "iid", "clients": 6}),
        (r"client 5, test.*\(4,\)", {"data": wide}),
    ):
        with pytest.raises(FedRacLoraError, match=said):
            run(**changed)


def test_clients_validate_where_the_server_has_nothing_to_validate_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "fedraclora.terminal.progress")
    words = ("evaluate.clients=all", "evaluate.split=validation")
    run = simulated(*words, "stop.patience=2", "stop.metric=clients.loss.mean", rounds=1)
    assert "measured on: validation" in caplog.text
    assert run.rows[1]["metrics"]["loss"] == run.rows[1]["clients"]["loss"]["pooled"]
    with pytest.raises(ConfigError, match=r"data.validation=0.*clients.accuracy.mean"):
        simulated(*words, "stop.patience=2")
    none = fedraclora.simulate("evaluate.clients=none", model=net(), data=moons(), rounds=0)
    assert "clients" not in none.rows[0]


def test_clients_of_a_table_measure_on_the_rows_that_its_column_of_splits_gives_them(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "fedraclora.terminal.progress")
    x = np.asarray(normal(40, 3, key="table"))
    frame = pd.DataFrame(x, columns=["a", "b", "c"]).assign(label=np.where(x[:, 0] > 0, "y", "n"))
    frame["site"] = [f"site {k % 3}" for k in range(40)]
    frame["fold"] = np.where(np.arange(40) % 4 == 0, "test", "train")
    words = ("evaluate.clients=all", "data.split=fold", "output.progress=false", "pretrain=none")
    run = fedraclora.simulate(*words, data=frame, client="site", model="mlp", rounds=0)
    held = frame[frame.fold == "test"].groupby("site").size()
    assert run.clients["samples"].tolist() == held.tolist()
    assert "3 on test samples of their own, others on a held-out share of 0.2" in caplog.text
