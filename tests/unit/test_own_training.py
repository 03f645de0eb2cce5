"""A training function of the user's own: what it is given, and what is refused of it."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import signal
import threading
import time
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.utils.parametrize import register_parametrization

import fedraclora
from fedraclora.client import Round, Trained
from fedraclora.data.entries import length
from fedraclora.errors import ClientError, FedRacLoraError
from fedraclora.training.own.deadline import OutOfTimeError, call_within
from fedraclora.training.own.places import bits_of
from tests.common import normal

pytest.importorskip("peft")
SIZES = (5, 9, 7)


def net() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(3)
        return torch.nn.Sequential(
            torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3), torch.nn.Flatten()
        )


def samples(count: int, key: int) -> tuple[torch.Tensor, torch.Tensor]:
    inputs = normal(count, 6, key=key).float()
    return inputs, (inputs[:, 0] > 0).long() + (inputs[:, 1] > 0).long()


CLIENTS = [samples(size, key) for key, size in enumerate(SIZES)]


def descend(round_: Round, model: torch.nn.Module, steps: int = 2) -> Trained:
    x, y = round_.data
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return round_.read(model, samples=len(y), steps=steps, loss=sum(losses) / steps)


def plain(round_: Round) -> Trained:
    return descend(round_, round_.install(net()))


def with_peft(round_: Round) -> Trained:
    from peft import LoraConfig, get_peft_model

    adapted: Any = get_peft_model(net(), LoraConfig(r=2, target_modules=["0", "2"]))
    return descend(round_, round_.install(adapted))


def run(*words: str, method: str = "fed_rac_lora", **more: Any) -> fedraclora.RunResult:
    chosen: dict[str, Any] = {"name": method}
    if method != "fedavg":
        chosen |= {"rank": 2, "alpha": 3}
    given = {"model": net(), "data": CLIENTS, "test": samples(20, 9), "method": chosen}
    quiet = ("output.progress=false", "engine=inline", "rounds=3", "clients_per_round=2")
    quiet += ("local.lr=1",) * ("train" in more and not any("lr=" in word for word in words))
    return fedraclora.simulate(*quiet, *words, **{**given, **more})


def apart(one: fedraclora.RunResult, other: fedraclora.RunResult) -> float:
    first, second = one.weights(), other.weights()
    return max(float((first[n] - second[n]).abs().max()) for n in first)


@pytest.mark.parametrize("method", ["fed_rac_lora", "ffa_lora", "fedavg_lora", "fedavg"])
def test_a_plain_loop_is_the_projects_own(method: str) -> None:
    own = run("local.lr=0.2", "local.steps=2", "local.batch_size=0", method=method)
    assert apart(run(train=plain, method=method), own) < 1e-6


@pytest.mark.parametrize("method", ["fed_rac_lora", "ffa_lora", "fedavg_lora"])
def test_layers_of_peft_train_as_a_plain_model(method: str) -> None:
    assert apart(run(train=with_peft, method=method), run(train=plain, method=method)) < 1e-6


def thawing(round_: Round) -> Trained:
    model = round_.install(net())
    with torch.no_grad():
        dict(model.named_buffers())["0.parametrizations.weight.0.A"].mul_(2)
    return descend(round_, model)


def idle(round_: Round) -> Trained:
    return round_.read(round_.install(net()), samples=3, steps=1)


def hasty(round_: Round) -> Trained:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # before there are factors
    round_.install(model)
    x, y = round_.data
    torch.nn.functional.cross_entropy(model(x), y).backward()
    optimizer.step()
    return round_.read(model, samples=len(y), steps=1)


def diverging(round_: Round) -> Trained:
    model = round_.install(net())
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.constant_(parameter, float("nan"))
    return round_.read(model, samples=3, steps=1)


def moving(round_: Round) -> Trained:
    model: Any = round_.install(net())
    with torch.no_grad():
        model[0].parametrizations.weight.original.add_(1)
    return descend(round_, model)


@pytest.mark.parametrize(
    ("train", "told"),
    [
        (thawing, "A has moved"),
        (idle, "nothing was trained"),
        (hasty, "nothing was trained"),
        (diverging, "NaN"),
        (moving, "has moved"),
        (lambda round_: round_, "a Round"),
        (lambda _: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_what_is_wrong_is_the_clients_fault(train: Any, told: str) -> None:
    with pytest.raises(ClientError, match=rf"round 1.*client \d.*{told}"):
        run(train=train)


def test_a_function_that_draws_is_reproducible_and_leaves_the_generators_alone() -> None:
    drawn: list[torch.Tensor] = []

    def train(round_: Round) -> Trained:
        drawn.append(torch.rand(2))
        return descend(round_, round_.install(copy.deepcopy(net())))

    before = torch.get_rng_state()
    run(train=train)
    run(train=train)
    assert torch.equal(torch.get_rng_state(), before)
    half = len(drawn) // 2
    assert all(torch.equal(a, b) for a, b in zip(drawn[:half], drawn[half:], strict=True))
    assert not torch.equal(drawn[0], drawn[1])


def test_what_a_trainer_leaves_on_a_model_is_undone_by_the_next_install() -> None:
    """A model that lives on is installed in every round, and trainers wrap, hook and thaw it."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=2, target_modules=["0", "2"], lora_dropout=0.25)
    model: Any = get_peft_model(net(), config).eval()
    kept = model.base_model.model[1].register_forward_hook(lambda *_: None)
    seen = []

    def train(round_: Round) -> Trained:
        round_.install(model)
        inner = model.base_model.model
        first = inner[0].lora_dropout["default"]
        hooks = sum(len(m._forward_hooks) for m in model.modules())
        seen.append(
            (hooks, "forward" in vars(inner), first.p, [*model.peft_config], model.training)
        )
        inner.forward = inner.forward  # an attribute of its own, as a wrapper is
        inner.register_forward_hook(lambda *_: None)
        model.add_adapter("ref", config)
        model.set_adapter("ref")
        model.set_adapter("default")
        assert not any(
            layer.lora_A["default"].weight.requires_grad for layer in (inner[0], inner[2])
        )
        first.p = 0.0
        return descend(round_, model.train())

    run(train=train, method="fed_rac_lora")
    assert seen == [(1, False, 0.25, ["default"], False)] * 6
    kept.remove()
    assert not model.base_model.model[1]._forward_hooks


def switched(round_: Round) -> Trained:
    """A model that lives on, merged and switched off by whoever used it between rounds."""
    model = ADAPTED[round_.client]
    model.merge_adapter()
    model.disable_adapter_layers()
    return descend(round_, round_.install(model))


ADAPTED: list[Any] = []


def test_a_model_that_was_merged_and_switched_off_trains_as_a_fresh_one() -> None:
    from peft import LoraConfig, get_peft_model

    config = {"r": 2, "target_modules": ["0"], "modules_to_save": ["2"]}
    ADAPTED[:] = [get_peft_model(net(), LoraConfig(**config)) for _ in SIZES]  # type: ignore[arg-type]
    words = ("head=full", "model.head=['2']")
    assert apart(run(*words, train=switched), run(*words, train=plain)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
@pytest.mark.parametrize("size", [1, 7, 2**14 + 5])
def test_the_sum_of_bits_sees_one_number_and_two_that_change_places(
    dtype: torch.dtype, size: int
) -> None:
    given = (normal(size, key=1) * 50).to(dtype)
    found = int(bits_of(given))
    assert found == int(bits_of(torch.cat([given[:1], given])[1:]))  # wherever it lies
    rows = 2**13 // given.element_size()
    for one, other in ((0, 1), (1, rows), (rows + 3, 8), (2 * rows - 8, rows)):
        if max(one, other) < size and given[one] != given[other]:
            swapped = given.clone()
            swapped[[one, other]] = given[[other, one]]
            assert int(bits_of(swapped)) != found
    for place in {0, size // 2, size - 1}:
        for bit in (0, 7):  # with the sign
            changed = given.clone()
            changed[place : place + 1].view(torch.uint8)[-1] ^= 1 << bit
            assert int(bits_of(changed)) != found


def original(model: Any) -> Any:
    return model[0].parametrizations.weight.original


def with_all_trained(model: Any) -> None:
    model.requires_grad_(True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 6)).sum().backward()
    optimizer.step()


def with_another(model: Any) -> None:
    moved = torch.nn.Parameter(original(model).detach() + 1)
    model[0].parametrizations.weight.original = moved


SPOILING: dict[str, Any] = {
    "nothing": lambda _: None,
    "in place": lambda m: original(m).detach().add_(1),
    "by .data": lambda m: original(m).data.mul_(-1),
    "data": lambda m: setattr(original(m), "data", original(m).detach() * 2),
    "to and fro": lambda m: m.bfloat16().float(),
    "state dict": lambda m: m.load_state_dict({n: t + 1 for n, t in m.state_dict().items()}),
    "an optimizer": with_all_trained,
    "another parameter": with_another,
}
SPOILING["one number, by .data"] = lambda m: original(m).data[:, 3].neg_()


@pytest.mark.parametrize("way", [*SPOILING])
def test_a_model_that_lives_on_is_as_a_fresh_one_whatever_was_done_to_it(way: str) -> None:
    model = net()

    def train(round_: Round) -> Trained:
        read = descend(round_, round_.install(model))
        SPOILING[way](model)
        return read

    assert apart(run(train=train), run(train=plain)) == 0


@pytest.mark.parametrize("way", [*SPOILING][1:])
def test_a_client_that_moves_a_weight_fails_alone(way: str) -> None:
    model = net()

    def train(round_: Round, *, raises: bool = False) -> Trained:
        if round_.client == 1 and raises:
            raise ValueError("the reference")
        round_.install(model)
        if round_.client == 1:
            SPOILING[way](model)
        return descend(round_, model)

    words = ("clients_per_round=3", "max_failures=1")
    wanted = run(*words, train=lambda round_: train(round_, raises=True))
    assert apart(run(*words, train=train), wanted) == 0


def test_the_weights_of_a_round_are_written_into_a_model_once() -> None:
    model, written = net(), []

    def train(round_: Round) -> Trained:
        before = original(model)._version if written else 0
        round_.install(model)
        written.append(original(model)._version - before)
        return descend(round_, model)

    run(train=train)
    assert [bool(count) for count in written] == [True, False] * 3


def test_a_round_goes_to_another_process() -> None:
    def train(round_: Round) -> Trained:
        there = pickle.loads(pickle.dumps(round_))
        return descend(there, there.install(net()))

    assert apart(run(train=train), run(train=plain)) == 0


class Rows(torch.utils.data.Dataset[Any]):
    """Samples of a dataset of torch, which keeps a cache."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor) -> None:
        self.x, self.y, self.cache, self.file = x, y, dict[int, Any](), None

    def __len__(self) -> int:
        return len(self.y)

    def __getitem__(self, k: int) -> Any:
        self.file, self._calls = self.file or {"open": 1}, k
        return self.cache.setdefault(k, (self.x[k], self.y[k]))


def as_arrays(x: torch.Tensor, y: torch.Tensor) -> Any:
    return {"x": x.clone().numpy(), "y": y.clone().numpy()}


def as_list(x: torch.Tensor, y: torch.Tensor) -> Any:
    return {"rows": [{"x": row.tolist(), "y": int(label)} for row, label in zip(x, y, strict=True)]}


def as_frame(x: torch.Tensor, y: torch.Tensor) -> Any:
    return pd.DataFrame({f"x{k}": x[:, k].numpy() for k in range(6)} | {"y": y.numpy()})


def as_series(x: torch.Tensor, y: torch.Tensor) -> Any:
    return {"x": x.clone().numpy(), "y": pd.Series(y.numpy())}


def tensors_of(data: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if isinstance(data, Rows):
        pairs = [data[k] for k in range(len(data))]
        return torch.stack([x for x, _ in pairs]), torch.stack([y for _, y in pairs])
    if isinstance(data, pd.DataFrame):
        x, y = data.iloc[:, :6].to_numpy(), data["y"].to_numpy()
        return torch.as_tensor(np.array(x, order="C")), torch.as_tensor(np.array(y))
    if isinstance(data, dict) and "rows" in data:
        rows = data["rows"]
        return torch.tensor([r["x"] for r in rows]), torch.tensor([r["y"] for r in rows])
    x, y = (data["x"], data["y"]) if isinstance(data, dict) else data
    return torch.as_tensor(x), torch.as_tensor(y)


def as_pair(x: torch.Tensor, y: torch.Tensor) -> Any:
    return x.clone(), y.clone()


CHANGES: dict[str, tuple[Any, Any]] = {
    "a view": (as_pair, lambda data: data[0][:2].mul_(2)),
    "by .data": (as_pair, lambda data: data[0].data.mul_(2)),
    "by numpy": (as_pair, lambda data: np.multiply(data[0].numpy(), 2, out=data[0].numpy())),
    "the labels": (as_pair, lambda data: data[1].data.zero_()),
    "arrays of a dict": (as_arrays, lambda data: np.negative(data["x"], out=data["x"])),
    "another array": (as_arrays, lambda data: data.update(x=data["x"] * 2)),
    "rows of a list": (as_list, lambda data: data["rows"][0].update(y=0, x=[9.0] * 6)),
    "a list that grows": (as_list, lambda data: data["rows"].append(data["rows"][0])),
    "tensors of a dataset": (Rows, lambda data: data.x.data.mul_(2)),
    "another tensor": (Rows, lambda data: setattr(data, "x", data.x * 2)),
    "a new column": (as_frame, lambda data: data.__setitem__("seen", 1)),
    "a column": (as_frame, lambda data: data.__setitem__("x0", 2 * data["x0"])),
    "an index": (as_frame, lambda data: setattr(data, "index", [*range(1, 1 + len(data))])),
    "an attribute of a frame": (as_frame, lambda data: setattr(data, "cache", 5)),
    "a series": (as_series, lambda data: data["y"].__setitem__(0, 2 - data["y"][0] // 2)),
    "an attribute of an object": (Rows, lambda data: setattr(data, "seen", 5)),
    "a frame of an object": (
        lambda x, y: setattr(rows := Rows(x, y), "table", as_frame(x, y)) or rows,
        lambda data: data.table.__setitem__("seen", 1),
    ),
    "a generator": (
        lambda x, y: {"x": x.numpy(), "y": y.numpy(), "rng": np.random.default_rng(0)},
        lambda data: data["rng"].normal(),
    ),
}


def trains_on(change: Any) -> Any:
    def train(round_: Round) -> Trained:
        model, (x, y) = round_.install(net()), tensors_of(round_.data)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2)
        torch.nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        change(round_.data)
        return round_.read(model, samples=len(y), steps=1)

    return train


@pytest.mark.parametrize("way", [*CHANGES])
def test_samples_changed_in_place_are_refused_whatever_holds_them(way: str) -> None:
    """They were taken, and a run that went on trained on others: two digests for one seed."""
    form, change = CHANGES[way]
    data = [form(*client) for client in CLIENTS]
    with pytest.raises(ClientError, match=r"round 1.*client \d.*round\.data in place"):
        run(train=trains_on(change), data=data, loss="cross_entropy")


@pytest.mark.parametrize("form", [as_pair, as_arrays, as_list, as_frame, as_series, Rows])
def test_samples_that_are_read_alone_may_be_of_any_kind_and_keep_a_cache(form: Any) -> None:
    data = [form(*client) for client in CLIENTS]
    found = run(train=trains_on(lambda _: None), data=data, loss="cross_entropy")
    assert apart(found, run(train=trains_on(lambda _: None))) == 0


def test_a_client_whose_memory_another_one_changes_is_refused() -> None:
    base = torch.cat([x for x, _ in CLIENTS]).clone()
    shared = [*zip(base.split(SIZES), [y for _, y in CLIENTS], strict=True)]

    def train(round_: Round) -> Trained:
        if round_.client == 0:
            base.data.mul_(2)
        return plain(round_)

    with pytest.raises(ClientError, match=r"client 1: .*in place \(\[0\]\).*client 2: .*in place"):
        run("clients_per_round=3", "max_failures=2", train=train, data=shared)


def test_an_iterator_is_refused_before_a_round_uses_it_up() -> None:
    data = [{"rows": iter(rows)} for rows in ([1, 2], [3], [4, 5])]
    with pytest.raises(ClientError, match=r"round 1.*client \d.*an iterator"):
        run(train=plain, data=data, loss="cross_entropy")


def test_a_dataset_of_hugging_face_may_be_set_up_anew_in_each_round() -> None:
    from datasets import Dataset

    data = [Dataset.from_dict({"x": x.tolist(), "y": y.tolist()}) for x, y in CLIENTS]

    def train(round_: Round) -> Trained:
        assert round_.data.format["type"] is None
        round_.data.set_format("torch")
        return trains_on(lambda _: None)(
            dataclasses.replace(round_, data=(round_.data["x"][:], round_.data["y"][:]))
        )

    run(train=train, data=data, loss="cross_entropy")


class Hundredfold(torch.nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 100 * weight


SCALED: dict[str, Any] = {
    "times 100": lambda model: setattr(model[0].parametrizations.weight[0], "scale", 150.0),
    "another parametrization": lambda model: register_parametrization(
        model[0], "weight", Hundredfold()
    ),
}


@pytest.mark.parametrize("way", [*SCALED])
def test_an_adapter_of_a_plain_model_keeps_its_scale(way: str) -> None:
    def train(round_: Round) -> Trained:
        model = round_.install(net())
        SCALED[way](model)
        return descend(round_, model)

    with pytest.raises(ClientError, match=r"scale of 0\.weight is 150|put on 0\.weight"):
        run(train=train)


def test_a_second_adapter_beside_that_of_the_run_is_refused() -> None:
    from peft import LoraConfig, get_peft_model

    def train(round_: Round) -> Trained:
        config = LoraConfig(r=2, target_modules=["0", "2"])
        model: Any = round_.install(get_peft_model(net(), config))
        model.add_adapter("b", config)
        model.base_model.set_adapter(["default", "b"])
        return descend(round_, model)

    with pytest.raises(ClientError, match=r"'b'.*0\.weight is active, too"):
        run(train=train)


def by_hand(round_: Round) -> Trained:
    ones = {n: torch.ones_like(t) for n, t in plain(round_).tensors.items()}
    return Trained(round_.client, round_.number, ones, 3, 1)


def doubled(round_: Round) -> Trained:
    found = plain(round_)
    return dataclasses.replace(found, tensors={n: 2 * t for n, t in found.tensors.items()})


def in_place(round_: Round) -> Trained:
    found = plain(round_)
    next(iter(found.tensors.values())).mul_(2)
    return found


def with_other_numbers(**numbers: Any) -> Any:
    return lambda round_: dataclasses.replace(plain(round_), **numbers)


def with_metrics_after(round_: Round) -> Trained:
    found = plain(round_)
    found.metrics["f1"] = 1.0
    return found


OTHER = [with_other_numbers(samples=9_000_000, loss=-5.0, steps=1)]
OTHER += [with_other_numbers(**{k: v}) for k, v in (("samples", 4), ("steps", 1), ("loss", 0.5))]


@pytest.mark.parametrize("train", [by_hand, doubled, in_place, with_metrics_after, *OTHER])
def test_what_is_returned_is_what_round_read_gave(train: Any) -> None:
    """What is made by hand has passed none of its checks."""
    with pytest.raises(ClientError, match=r"client \d.*that round\.read gave"):
        run(train=train)


def swallowing() -> None:
    while True:
        try:  # noqa: SIM105
            time.sleep(0.001)
        except BaseException:
            pass


def swallowing_once() -> None:
    try:  # noqa: SIM105
        time.sleep(60)
    except:  # noqa: E722
        pass


def without_alarm() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    time.sleep(0.3)


@pytest.mark.parametrize("late", [swallowing, swallowing_once, without_alarm])
def test_a_function_that_swallows_the_end_of_its_time_has_failed(late: Any) -> None:
    """One alarm was caught by a bare except, and the result of a client that was late was taken."""
    handler, fails = signal.getsignal(signal.SIGALRM), {"ran": 0}

    def train(round_: Round) -> Trained:
        if round_.client == 1:
            late()
            fails["ran"] += 1
        return plain(round_)

    local = {"train": train, "local": {"timeout": 0.2}}
    with pytest.raises(ClientError, match=r"round 1.*client 1.*local\.timeout=0\.2"):
        run("clients_per_round=3", **local)
    assert signal.getsignal(signal.SIGALRM) == handler
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_function_on_another_thread_that_is_late_has_failed() -> None:
    said: list[str] = []

    def late() -> None:
        until = time.monotonic() + 0.3
        while time.monotonic() < until:
            try:  # noqa: SIM105
                time.sleep(0.01)
            except BaseException:
                pass

    def inside() -> None:
        for seconds, function in ((0.1, late), (60, lambda: said.append("ran"))):
            try:
                call_within(seconds, function)
            except OutOfTimeError:
                said.append("late")

    thread = threading.Thread(target=inside)
    thread.start()
    thread.join()
    assert said == ["late", "ran"]


@pytest.mark.parametrize("steps", [2**62, 2**63 - 1, 10**7 + 1])
def test_steps_that_nobody_can_take_are_refused(steps: int) -> None:
    """Four clients with 2**62 came to no step at all in the ledger."""

    def train(round_: Round) -> Trained:
        model = round_.install(net())
        descend(round_, model)
        return round_.read(model, samples=len(round_.data[1]), steps=steps)

    words = ("output.progress=false", "rounds=1")
    with pytest.raises(ClientError, match=rf"steps={steps} .*engine\.max_samples, 10000000"):
        fedraclora.simulate(*words, model=net(), data=CLIENTS, train=train)


@pytest.mark.parametrize("count", ["samples", "steps"])
def test_a_count_that_is_too_large_is_refused_with_its_limit(count: str) -> None:
    """2**64 was refused as no whole number of 1 or more."""

    def train(round_: Round) -> Trained:
        model = round_.install(net())
        descend(round_, model)
        return round_.read(model, **({"samples": 3, "steps": 2} | {count: 2**64}))

    with pytest.raises(ClientError, match=rf"{count} is {2**64}, .* {2**63 - 1}"):
        run(train=train)


def test_a_dict_of_columns_has_as_many_samples_as_these() -> None:
    """A client's dict of 40 texts and 40 labels was reported as 2 samples."""
    seen: list[int] = []

    def train(round_: Round) -> Trained:
        seen.append(len(round_.data["text"]))
        model = round_.install(net())
        for value in (p for p in model.parameters() if p.requires_grad):
            value.data += 0.1
        return round_.read(model, samples=len(round_.data["label"]), steps=1)

    words = ("output.progress=false", "rounds=1", "local.lr=1")
    given: dict[str, Any] = {"model": net(), "test": 0, "train": train}
    data = [{"text": ["a"] * n, "label": [*range(n)]} for n in (40, 7)]
    run = fedraclora.simulate(*words, data=data, **given)
    told: Any = run.summary["task"]
    assert (told["partition"]["samples_min"], told["partition"]["samples_max"]) == (7, 40)
    assert sorted(seen) == [7, 40]
    with pytest.raises(FedRacLoraError, match=r"'text': 3, 'label': 2"):
        fedraclora.simulate(*words, data=[{"text": ["a"] * 3, "label": [1, 2]}], **given)
    assert length((["a"] * 5, [1] * 5)) == 5
    assert length({"path": "a.csv", "seed": 3}) == length(object()) == 1
    assert (length("abc"), length([1, 2])) == (3, 2)
