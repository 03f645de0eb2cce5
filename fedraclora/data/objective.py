"""Choose the loss: the given one, that of the model, or one guessed from the targets.

Ambiguous targets are refused, naming the choices: training with a wrong loss gives no error.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import nn

from fedraclora.data.dataset import DataSet
from fedraclora.data.own_loss import OwnLoss, is_own, named_loss
from fedraclora.data.samples import Samples
from fedraclora.data.task import LOSSES, forward, is_binary
from fedraclora.errors import ConfigError, DataError, unknown

INPUT_IDS = "input_ids"
OF_SAMPLES = ("cross_entropy", "squared_error", "multi_label", "logistic")
# The losses for whose labels transformers classes have their own `forward`, by parts of class
# names.
CLASSES = {
    r"For\w*CausalLM|LMHead\w*Model": ("next_token",),
    r"For(Token|AudioFrame)Classification|ForMaskedLM": ("token_classes",),
    r"ForSemanticSegmentation": ("pixel_classes",),
    r"For(Sequence|Image|Video|Audio)Classification": OF_SAMPLES,
    r"ForMultipleChoice|ForNextSentencePrediction": ("cross_entropy",),
}
PROBLEM_LOSSES = {  # `problem_type` of their configurations
    "single_label_classification": ("cross_entropy",),
    "multi_label_classification": ("multi_label", "logistic"),
    "regression": ("squared_error",),
}
OF_CHOICES = {"causal_lm": ("next_token",), "gpt": ("next_token",)}  # choices of model=


def check_names(loss: object, metrics: object) -> tuple[str | None, tuple[str, ...] | None]:
    """Check a program's loss and metrics; return their names.

    Raises:
        ConfigError: If they do not exist, naming the existing losses.
    """
    if loss is not None and not isinstance(loss, str | Mapping):
        raise ConfigError(
            f"loss is {loss!r:.100}, of type {type(loss).__name__}. Give a loss by name "
            f"({choices(LOSSES)}), a function of your own, or its 'module:function' "
            "(docs/own.md)."
        )
    if isinstance(metrics, str | Mapping):
        metrics = [metrics]
    listed = isinstance(metrics, Sequence) and all(isinstance(n, str | Mapping) for n in metrics)
    if metrics is not None and not (listed and metrics):
        raise ConfigError(
            f"metrics is {metrics!r:.100}. Give a list of metrics with the most important first, "
            "such as ['accuracy', 'loss']."
        )
    names = None if metrics is None else tuple(map(named_loss, metrics))  # type: ignore[call-overload]
    return None if loss is None else named_loss(loss), names


def like_of_loss(loss: str) -> str:
    """Return the ``like`` of a user's loss; empty if there is none.

    Raises:
        ConfigError: If its attribute ``like`` is no loss of the project's.
    """
    function: object = OwnLoss.of(loss).function if is_own(loss) else None
    like = getattr(getattr(function, "func", function), "like", "")  # of a partial
    if like and like not in LOSSES:
        raise unknown(f"like of the loss {loss}", like, LOSSES)
    return str(like)


def usual_metrics(loss: str, target: torch.Tensor) -> tuple[str, ...]:
    """Return the usual metrics of a loss; for a user's loss, those of its targets."""
    if known := LOSSES.get(like_of_loss(loss) or loss):
        return known.metrics
    return ("accuracy", "loss") if has_classes(loss, target) else ("loss",)


def has_classes(loss: str, target: torch.Tensor) -> bool:
    """Return whether each sample has one class; with a user's loss, if targets are integers."""
    known = (like_of_loss(loss) or loss) in {*LOSSES} - {"cross_entropy", "logistic"}
    whole = not target.is_floating_point() and target[:1].numel() == len(target[:1])
    return whole and not known


def with_labels(data: DataSet) -> DataSet:
    """Add the label column, by which a partition divides, to a data set with classes."""
    rows = data.train.target
    if "label" in data.columns or data.on_demand or not data.train.inputs:
        return data
    if not has_classes(data.like or data.loss, rows):
        return data
    return replace(data, columns={**data.columns, "label": rows.flatten().numpy()})


def count_classes(data: DataSet) -> int:
    """Count the classes if outputs are class scores; else 0."""
    labelled = "label" in with_labels(data).columns and data.classes > 1
    return data.classes if labelled and (data.like or data.loss) == "cross_entropy" else 0


def judged_by(data: DataSet, loss: object, metrics: object) -> DataSet:
    """Replace loss and metrics of a data set by the given ones; None keeps them."""
    if loss is not None and (name := named_loss(loss)) != data.loss:
        if not is_own(name):
            raise ConfigError(
                f"data.loss={name}, but these data are for {data.loss}. Leave data.loss out, or "
                "name a loss of your own, module:function."
            )
        usual = usual_metrics(name, data.train.target)
        like = like_of_loss(name) or data.loss
        data = replace(data, loss=name, like=like, metrics=usual, optimum=None)
    named = map(named_loss, metrics) if isinstance(metrics, list | tuple) else data.metrics
    return replace(data, metrics=tuple(named))


def choices(losses: Iterable[str]) -> str:
    """List losses with the targets that each expects."""
    return ", ".join(f"{name} ({LOSSES[name].meaning})" for name in losses)


def losses_of_model(model: object) -> tuple[tuple[str, ...], str]:
    """Return the losses that a model is made for, and where it says so; none for most models.

    Args:
        model: A module, or the name of a choice of ``model=``.
    """
    if not isinstance(model, nn.Module):
        return OF_CHOICES.get(str(model), ()), f"model={model}"
    config = getattr(model, "config", None)
    problem = getattr(config, "problem_type", None)
    for kind in type(model).__mro__:
        for pattern, losses in CLASSES.items():
            if config is not None and re.search(pattern, kind.__name__):
                if losses is OF_SAMPLES and problem in PROBLEM_LOSSES:
                    return PROBLEM_LOSSES[problem], f"problem_type={problem} of the model's config"
                return losses, f"the model's class, {kind.__name__}"
    return (), ""


def objective_of(chosen: str | None, tables: Sequence[Samples], model: object) -> tuple[str, str]:
    """Return the loss of samples, and where it comes from.

    Args:
        chosen: The name that the caller gave, or None.
        tables: The raw samples, all of one kind.
        model: As for `losses_of_model`.

    Returns:
        A loss, and its source as text.

    Raises:
        DataError: If the targets are ambiguous, naming the choices.
    """
    if chosen is not None:
        return chosen, "said"
    from_model, source = losses_of_model(model)
    if from_model and from_model is not OF_SAMPLES:
        return from_model[0], f"guessed from {source}"
    targets = [table.target for table in tables]
    first = targets[0]
    flat, binary = first[0].numel() == 1, all(map(is_binary, targets))
    found = f"{first.dtype} of shape {tuple(first.shape)}".removeprefix("torch.")
    if not any(target.is_floating_point() for target in targets):
        if flat:
            return "cross_entropy", "guessed from the targets: a whole number for each sample"
        axes, tokens = first.dim(), INPUT_IDS in tables[0].inputs
        meant = ["token_classes"] * (axes == 2) + ["pixel_classes"] * (axes == 3)
        meant += ["next_token"] * (axes == 2 and tokens) + ["multi_label"] * binary
    elif binary:
        found = f"{found}, all 0 or 1"
        meant = ["logistic" if flat else "multi_label"]
    elif all(bool((target == target.round()).all()) for target in targets):
        found, meant = f"{found}, all whole numbers", []
    else:
        return "squared_error", "guessed from the targets: fractions"
    classes = "of one-hot rows target.argmax(1) is one class a sample"
    if flat:
        classes = "if they are classes, give them as whole numbers (int64)"
    raise DataError(
        f"the targets are {found}, from which no loss can be guessed. Give loss=..., one of "
        f"{choices([*meant, 'squared_error'])}; {classes}"
    )


def refuse_contradiction(model: nn.Module, loss: str) -> str | None:
    """Reject a loss that contradicts the model.

    An export keeps the problem type, and other libraries read it, so that a wrong one is refused. A
    contradiction to the model's class only gives a warning, since labels may already be shifted.

    Returns:
        A warning, or None if nothing contradicts.

    Raises:
        ConfigError: If the configuration of the model names another problem type.
    """
    from_model, source = losses_of_model(model)
    if not from_model or is_own(loss) or loss in from_model:
        return None
    if source.startswith("problem_type"):
        right = next((name for name, losses in PROBLEM_LOSSES.items() if loss in losses), None)
        raise ConfigError(
            f"loss={loss}, but {source} is for {' or '.join(from_model)}. Use that loss, or set "
            f"model.config.problem_type to {right!r} first"
        )
    return f"loss={loss}, but {source}, is for {' or '.join(from_model)}"


def takes_whole(model: object, tables: Sequence[Samples]) -> bool:
    """Return whether a model needs integers as ``x``, as an embedding does.

    Bytes may be images: they stay integers only if the model does not accept fractions.

    Raises:
        DataError: If some tables hold bytes, and others do not.
    """
    if not isinstance(model, nn.Module) or set(tables[0].inputs) != {"x"}:
        return False
    given = [table.inputs["x"] for table in tables if "x" in table.inputs]
    if len({x.dtype == torch.uint8 for x in given}) > 1:
        raise DataError(
            "x holds bytes, which are divided by 255, in one table and other numbers in "
            "another: use one type in all"
        )
    if any(x.is_floating_point() for x in given):
        return False
    first = given[0][:1]
    fractions = first.dtype == torch.uint8 and _takes(model, first / 255.0)
    return not fractions and _takes(model, first.long())


def _takes(model: nn.Module, x: torch.Tensor) -> bool:
    """Check whether a copy of a model accepts ``x``; an index error means that it read integers."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            forward(copy.deepcopy(model).cpu().eval(), {"x": x.cpu()})
    except IndexError:
        return True
    except Exception:  # other errors are reported by the probe of the model
        return False
    return True
