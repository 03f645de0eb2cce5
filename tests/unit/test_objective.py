"""What a run learns: losses by hand and by transformers, and which one is meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score, jaccard_score, roc_auc_score
from torch import nn

import fedraclora
from fedraclora.data.objective import objective_of
from fedraclora.data.own_loss import IGNORED_TOKEN
from fedraclora.data.samples import Samples
from fedraclora.errors import ConfigError, DataError
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.models.built import seeded
from fedraclora.rng import generator

transformers = pytest.importorskip("transformers")

RNG = generator(5, "test objective")
WORDS, LENGTH, CLASSES = 20, 6, 3
SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": WORDS}
SIZES |= {"intermediate_size": 12, "max_position_embeddings": LENGTH, "num_labels": CLASSES}
DROPLESS = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
# Method and local settings of a round that is plain gradient descent.
PLAIN: dict[str, Any] = {"method": "fedavg", "rounds": 1, "modules_to_save": ["*"], "seed": 3}
STEPS = {"lr": 0.4, "epochs": 3, "batch_size": 0}


def bert(kind: str, **config: Any) -> Any:
    given = transformers.BertConfig(**SIZES | DROPLESS | config)
    with seeded(0, "test"):
        return getattr(transformers, kind)(given)


def texts(samples: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Token ids with padding, and how many tokens each text has."""
    lengths = RNG.integers(2, LENGTH + 1, samples)
    mask = (np.arange(LENGTH) < lengths[:, None]).astype("int64")
    return {
        "input_ids": RNG.integers(1, WORDS, (samples, LENGTH)) * mask,
        "attention_mask": mask,
    }, lengths


def tagged(samples: int) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """Texts with a class for each token; padding and some tokens beside have none."""
    inputs, _ = texts(samples)
    hidden = (inputs["attention_mask"] == 0) | (RNG.random((samples, LENGTH)) < 0.2)
    hidden[:, 0] = False
    return inputs, np.where(hidden, IGNORED_TOKEN, inputs["input_ids"] % CLASSES)


class Pixels(nn.Module):
    """A class for each pixel, by a linear layer over channels."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(2, 5), nn.Linear(5, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        wide: torch.Tensor = self.out(self.hidden(x.movedim(1, -1)).tanh())
        return wide.movedim(-1, 1)


def pixels() -> nn.Module:
    with seeded(0, "test"):
        return Pixels()


def masks(samples: int) -> tuple[np.ndarray, np.ndarray]:
    """Images [N, 2, 3, 4] with a class for each pixel, of which some have none."""
    x = RNG.normal(size=(samples, 2, 3, 4)).astype("float32")
    target = np.where(RNG.random((samples, 3, 4)) < 0.3, IGNORED_TOKEN, (x[:, 0] > 0) + 1)
    return x, target


def scores(outputs: int) -> nn.Module:
    with seeded(0, "test"):
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, outputs))


def labels(samples: int, outputs: int) -> tuple[np.ndarray, np.ndarray]:
    """Features with yes or no for every output."""
    x = RNG.normal(size=(samples, 4)).astype("float32")
    return x, (x[:, :outputs] > 0.3).astype("float32")


def run(model: nn.Module, data: Any, **keys: Any) -> fedraclora.RunResult:
    return fedraclora.simulate(
        "output.progress=false", **({"model": model, "data": data, "rounds": 1} | keys)
    )


def own_loss(model: nn.Module, inputs: Any, target: torch.Tensor) -> torch.Tensor:
    """The loss of transformers, or torch's with its usual mean."""
    if hasattr(model, "config"):
        loss: torch.Tensor = model(**inputs, labels=target).loss
        return loss
    output = model(inputs["x"])
    if target.is_floating_point():
        return F.binary_cross_entropy_with_logits(output, target)
    return F.cross_entropy(output, target)


# Model, samples of one client, what is said.
CASES: dict[str, Any] = {
    "token classes": (lambda: bert("BertForTokenClassification"), lambda: tagged(7), {}),
    "labels of transformers": (
        lambda: bert("BertForSequenceClassification", problem_type="multi_label_classification"),
        lambda: (texts(7)[0], RNG.integers(0, 2, (7, CLASSES)).astype("float32")),
        {},
    ),
    "labels": (lambda: scores(3), lambda: labels(9, 3), {"loss": "multi_label"}),
    "one logit": (lambda: scores(1), lambda: labels(9, 1), {"loss": "multi_label"}),
    "pixels": (pixels, lambda: masks(5), {"loss": "pixel_classes"}),
}


# That clients one after another train alike is shown below, of each.
@pytest.mark.short(when=lambda case, engine: engine == "vectorized" or case == "labels")
@pytest.mark.parametrize("engine", ["vectorized", "inline"])
@pytest.mark.parametrize("case", CASES)
def test_a_round_of_one_client_is_a_plain_training_loop(case: str, engine: str) -> None:
    build, draw, said = CASES[case]
    inputs, target = draw()
    found = run(
        build(), [(inputs, target)], test=draw(), local=STEPS, engine=engine, **PLAIN, **said
    )
    model = build()
    named = inputs if isinstance(inputs, dict) else {"x": inputs}
    tensors = {name: torch.as_tensor(value) for name, value in named.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=STEPS["lr"])
    for _ in range(STEPS["epochs"]):
        optimizer.zero_grad()
        loss = own_loss(model, tensors, torch.as_tensor(target))
        loss.backward()
        optimizer.step()
    trained = dict(model.named_parameters())
    for name, value in found.weights().items():
        torch.testing.assert_close(value, trained[name].detach(), rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("case", CASES)
def test_clients_train_alike_in_one_batch_and_one_after_another(case: str) -> None:
    build, draw, said = CASES[case]
    inputs, target = draw()
    few = {n: v[:2] for n, v in inputs.items()} if isinstance(inputs, dict) else inputs[:2]
    clients = [draw(), (few, target[:2]), draw()]  # one of them smaller
    keys = {"method": "ffa_lora", "rounds": 2, "local": {"lr": 0.3, "batch_size": 3}, **said}
    test = draw()
    one, other = (
        run(build(), clients, test=test, engine=e, **keys) for e in ("vectorized", "inline")
    )
    for name, value in one.weights().items():
        torch.testing.assert_close(value, other.weights()[name], rtol=1e-5, atol=1e-6)
    assert one.rows[-1]["metrics"] == pytest.approx(other.rows[-1]["metrics"], rel=1e-5)


class Given(nn.Module):
    """Gives the rows of a table: the outputs are chosen by the test."""

    def __init__(self, outputs: torch.Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.table[x]


def measure(outputs: Any, target: Any, loss: str, *names: str) -> dict[str, float]:
    given, wanted = torch.as_tensor(outputs), torch.as_tensor(target)
    samples = Samples({"x": torch.arange(len(wanted))}, wanted)
    return evaluate(Given(given), {"table": given}, samples, loss, names, batch_size=4)


def test_figures_of_labels_are_those_of_scikit_learn() -> None:
    outputs, target = RNG.normal(size=(11, 3)), RNG.integers(0, 2, (11, 3)).astype(float)
    target[:, 1] = 0  # an output that is never true has no area
    found = measure(outputs, target, "multi_label", "loss", "f1_micro", "f1_macro", "auc")
    areas = [roc_auc_score(target[:, k], outputs[:, k]) for k in (0, 2)]
    mean = F.binary_cross_entropy_with_logits(torch.tensor(outputs), torch.tensor(target))
    assert found["loss"] == pytest.approx(float(mean))
    assert found["auc"] == pytest.approx(np.mean(areas))
    for average in ("micro", "macro"):
        wanted = f1_score(target, outputs > 0, average=average, zero_division=0.0)
        assert found[f"f1_{average}"] == pytest.approx(wanted)
    one = measure(outputs[:, :1], target[:, 0].astype(int), "logistic", "auc")
    assert one["auc"] == pytest.approx(areas[0])


def test_figures_of_tokens_and_pixels_count_what_has_a_label() -> None:
    logits = RNG.normal(size=(9, LENGTH, CLASSES))
    _, target = tagged(9)
    counted, predicted = target != IGNORED_TOKEN, logits.argmax(-1)
    found = measure(logits, target, "token_classes", "loss", "accuracy", "f1")
    mean = F.cross_entropy(torch.tensor(logits).transpose(1, 2), torch.tensor(target))
    assert found["loss"] == pytest.approx(float(mean))
    assert found["accuracy"] == (predicted == target)[counted].mean()
    wanted = f1_score(target[counted], predicted[counted], average="macro")
    assert found["f1"] == pytest.approx(wanted)
    logits = RNG.normal(size=(9, 4, 3, 4))
    logits[:, 3] = -9  # a class that neither occurs nor is predicted counts nowhere
    _, target = masks(9)
    counted, predicted = target != IGNORED_TOKEN, logits.argmax(1)
    found = measure(logits, target, "pixel_classes", "loss", "accuracy", "mean_iou")
    assert found["loss"] == pytest.approx(
        float(F.cross_entropy(torch.tensor(logits), torch.tensor(target)))
    )
    assert found["accuracy"] == (predicted == target)[counted].mean()
    wanted = jaccard_score(target[counted], predicted[counted], average="macro")
    assert found["mean_iou"] == pytest.approx(wanted)


IDS, TAGS = tagged(12)
X, YES = labels(12, 3)
GUESSED: dict[str, tuple[Any, Any, str]] = {
    "a token classifier": (
        lambda: bert("BertForTokenClassification"),
        (IDS, TAGS),
        "token_classes",
    ),
    "a masked language model": (lambda: bert("BertForMaskedLM"), (IDS, TAGS), "token_classes"),
    "a causal model": (
        lambda: bert("BertLMHeadModel", is_decoder=True),
        (IDS, TAGS),
        "next_token",
    ),
    "labels of a problem type": (
        lambda: bert("BertForSequenceClassification", problem_type="multi_label_classification"),
        (IDS, YES),
        "multi_label",
    ),
    "scores of a problem type": (
        lambda: bert("BertForSequenceClassification", problem_type="regression", num_labels=1),
        (IDS, YES[:, 0]),
        "squared_error",
    ),
    "whole numbers": (lambda: scores(3), (X, (X[:, 0] > 0).astype(int)), "cross_entropy"),
    "fractions": (lambda: scores(3), (X, X[:, :3]), "squared_error"),
}


@pytest.mark.parametrize("case", GUESSED)
def test_a_loss_is_guessed_where_nothing_else_is_possible(case: str) -> None:
    build, (inputs, target), loss = GUESSED[case]
    named = inputs if isinstance(inputs, dict) else {"x": inputs}
    tensors = {name: torch.as_tensor(value) for name, value in named.items()}
    found, source = objective_of(None, [Samples(tensors, torch.as_tensor(target))], build())
    assert found == loss
    assert source.startswith("guessed")


# One by the model, and one by the targets.
@pytest.mark.short(when=lambda case: case in {"a token classifier", "fractions"})
@pytest.mark.parametrize("case", GUESSED)
def test_a_config_names_the_loss_that_was_guessed(case: str) -> None:
    build, data, loss = GUESSED[case]
    found = run(build(), [data], rounds=0, head="frozen")
    assert found.config["data"]["loss"] == loss  # type: ignore[index]
    task: Any = found.summary["task"]
    assert task["loss"] == loss
    assert task["loss_from"].startswith("guessed")
    again = fedraclora.simulate(found.config, model=build(), data=[data])
    assert again.config == found.config


OPEN: dict[str, tuple[Any, Any, list[str]]] = {
    "ids beside a model that does not tell": (
        lambda: bert("BertForSequenceClassification"),
        (IDS, TAGS),
        ["token_classes", "next_token"],
    ),
    "yes and no without a problem type": (
        lambda: bert("BertForSequenceClassification"),
        (IDS, YES),
        ["multi_label", "squared_error"],
    ),
    "yes and no": (lambda: scores(1), (X, YES[:, 0]), ["logistic", "squared_error"]),
    "classes as fractions": (
        lambda: scores(3),
        (X, np.arange(12.0) % 3),
        ["squared_error", "int64"],
    ),
    "masks": (pixels, masks(4), ["pixel_classes", "squared_error"]),
    "rows of whole numbers": (lambda: scores(3), (X, YES.astype(int)), ["multi_label", "argmax"]),
}


@pytest.mark.parametrize("case", OPEN)
def test_what_could_mean_several_things_is_refused_with_the_choices(case: str) -> None:
    build, data, named = OPEN[case]
    with pytest.raises(DataError) as error:
        run(build(), [data])
    assert all(name in str(error.value) for name in ["loss=", *named])


def test_yes_and_no_as_fractions_may_be_scores_of_a_single_logit() -> None:
    data = [(X, YES[:, 0])]
    rate = {"local.lr": 0.1}
    one = run(scores(1), data, loss="logistic", metrics=["accuracy", "auc", "loss"], **rate)
    whole = run(scores(1), [(X, YES[:, :1].astype(int))], loss="logistic", metrics=["loss"], **rate)
    both = run(scores(1), data, loss="multi_label", metrics=["loss"], **rate)
    for other in (whole, both):
        assert other.rows[-1]["metrics"]["loss"] == one.rows[-1]["metrics"]["loss"]  # type: ignore[index]


def said(kind: type[Exception], words: str, **keys: Any) -> None:
    with pytest.raises(kind, match=words):
        run(**({"model": scores(3), "data": [(X, (X[:, 0] > 0).astype(int))]} | keys))


@pytest.mark.parametrize("loss", [5, ["logistic"]])
def test_what_is_no_name_of_a_loss_is_refused_with_the_names(loss: Any) -> None:
    said(ConfigError, r"loss is .*token_classes", loss=loss)


@pytest.mark.parametrize("metrics", [5, [], [5]])
def test_what_is_no_list_of_metrics_is_refused(metrics: Any) -> None:
    said(ConfigError, "metrics is", metrics=metrics)


def test_a_word_is_a_metric_and_a_key_of_the_config_a_loss() -> None:
    found = run(scores(3), [(X, (X[:, 0] > 0).astype(int))], metrics="f1", rounds=0)
    assert [*found.rows[0]["metrics"]] == ["f1"]
    found = fedraclora.simulate(
        "output.progress=false", "data.loss=multi_label", model=scores(3), data=[(X, YES)], rounds=0
    )
    assert found.config["data"]["loss"] == "multi_label"  # type: ignore[index]
    with pytest.raises(ConfigError, match=r"data\.shape has no effect"):
        fedraclora.simulate("data.shape=[4]", model=scores(3), data=[(X, YES)], loss="multi_label")


def test_a_loss_against_the_problem_type_is_refused_and_against_the_class_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = bert("BertForSequenceClassification", problem_type="multi_label_classification")
    classes = TAGS[:, 0] % 2
    said(ConfigError, "problem_type", model=model, data=[(IDS, classes)], loss="cross_entropy")
    model = bert("BertForTokenClassification")
    found = run(model, [(IDS, TAGS)], loss="next_token", rounds=0)
    assert "token_classes" in found.summary["task"]["loss_warning"]  # type: ignore[index]
    assert any("token_classes" in record.message for record in caplog.records)


def test_a_softmax_before_the_loss_and_an_area_of_one_class_are_said(
    capsys: pytest.CaptureFixture[str],
) -> None:
    x, y = np.float32(RNG.normal(size=(20, 6))), np.arange(20) % 2
    two, one = nn.Linear(6, 2), nn.Linear(6, 1)
    for model, said in ((two, False), (nn.Sequential(two, nn.Softmax(dim=1)), True)):
        fedraclora.simulate(model=model, data=[(x, y)], rounds=0)
        assert ("leave the softmax out" in capsys.readouterr().err) == said
    for test, said in ((y, False), (y * 0 + 1, True)):
        keys: dict[str, Any] = {"loss": "logistic", "metrics": ["accuracy", "auc"]}
        fedraclora.simulate(model=one, data=[(x, y)], test=(x + 1, test), rounds=0, **keys)
        assert ("auc is nan" in capsys.readouterr().err) == said


WRONG: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "a function": (ConfigError, "loss mean.*TypeError", {"loss": np.mean}),
    "-1 and 1": (
        DataError,
        "logistic needs 0 or 1",
        {"loss": "logistic", "y": np.float32([-1, 1] * 5)},
    ),
    "yes as a fraction": (
        DataError,
        r"one of logistic \([^)]*\), squared_error",
        {"y": np.float32([0, 1] * 5)},
    ),
    "255": (
        DataError,
        "-100 in a target has no loss, where yours has 255",
        {
            "loss": "pixel_classes",
            "model": nn.Conv2d(3, 2, 1),
            "x": np.zeros((10, 3, 2, 2), np.float32),
            "y": np.full((10, 2, 2), 255),
        },
    ),
    "the head": (ConfigError, "1 is the head", {"target_modules": ["0", "1"]}),
    "a convolution alone": (
        ConfigError,
        "target_modules=all adapts",
        {
            "loss": "pixel_classes",
            "model": nn.Conv2d(3, 2, 1),
            "x": np.zeros((10, 3, 2, 2), np.float32),
            "y": np.zeros((10, 2, 2), np.int64),
        },
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_with_what_to_do(case: str) -> None:
    kind, words, keys = WRONG[case]
    given = {"x": np.float32(RNG.normal(size=(10, 6))), "y": np.arange(10) % 2} | keys
    data = [(given.pop("x"), given.pop("y"))]
    model = given.pop("model", nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 2)))
    with pytest.raises(kind, match=words):
        run(model, data, **given)


def test_targets_that_no_loss_reads_are_refused_by_client() -> None:
    tagger = bert("BertForTokenClassification")
    short = IDS | {"attention_mask": IDS["attention_mask"] * (np.arange(LENGTH) < 1)}
    good = (IDS, TAGS)
    said(DataError, "client 1.*padding", model=tagger, data=[good, (short, TAGS)])
    said(DataError, "client 1.*-100", model=tagger, data=[good, (IDS, TAGS * 0 - 100)])
    said(
        DataError,
        "client 1.*from -3",
        model=tagger,
        data=[good, (IDS, TAGS - 1 + 98 * (TAGS == -100))],
    )
    said(DataError, "class for each token", model=tagger, data=[(IDS, TAGS[:, 0])])
    said(DataError, "output of shape", model=tagger, data=[(IDS, TAGS[:, :4])])
    said(DataError, "output of shape", model=tagger, data=[(IDS, np.where(TAGS == 2, 7, TAGS))])
    said(DataError, "has no values", data=[(X, TAGS[:, :0])])
    said(DataError, "0.5", data=[(X, YES / 2)], loss="multi_label")
    said(DataError, "as many outputs", data=[(X, YES[:, :2])], loss="multi_label")
    said(DataError, "for each pixel", data=[(X, YES)], loss="pixel_classes")


def test_new_samples_are_measured_by_the_loss_of_the_run_and_exports_name_it(tmp_path: Any) -> None:
    found = run(scores(3), [(X, YES)], loss="multi_label")
    x, target = labels(20, 3)
    with torch.no_grad():
        outputs = found.model()(torch.as_tensor(x))
    mean = F.binary_cross_entropy_with_logits(outputs, torch.as_tensor(target))
    assert found.evaluate((x, target))["loss"] == pytest.approx(float(mean), rel=1e-5)
    with pytest.raises(DataError, match="as many outputs"):
        found.evaluate((x, target[:, :2]))
    found.export(tmp_path / "out", "state_dict")
    assert "| loss | multi_label (said) |" in (tmp_path / "out" / "README.md").read_text()
