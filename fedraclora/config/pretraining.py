"""Pretrain the initial model of a run centrally."""

from __future__ import annotations

import torch

from fedraclora.config.run_config import TaskConfig
from fedraclora.data import DataSet, select_labels
from fedraclora.errors import ConfigError, FedRacLoraError
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.models.built import seeded
from fedraclora.training.cohort import pretrain
from fedraclora.training.localconfig import LocalConfig

KEPT = 8  # models in one process
_MADE: dict[str, tuple[dict[str, torch.Tensor], dict[str, float]]] = {}


def pretrain_model(config: TaskConfig, whole: DataSet, model: torch.nn.Module) -> dict[str, float]:
    """Pretrain on chosen labels or on held-out samples; return the test metrics.

    The newest results are kept in this process, since the runs of a study share few of them.
    """
    asked = config.pretrain
    if whole.aside is None and config.choices["pretrain"] == "aside":
        raise ConfigError(
            f"pretrain=aside, but data={config.data.name} sets no samples aside. Set "
            "data.aside if it has that key, or pretrain=none."
        )
    if not len(whole.train):
        raise ConfigError(
            f"data={config.data.name}: the clients bring all training samples, so the server "
            "has none to pretrain on. Set pretrain=none (your own model may have trained "
            "weights)."
        )
    try:
        part = whole if asked.labels is None else select_labels(whole, asked.labels)
    except FedRacLoraError as error:
        raise ConfigError(f"pretrain.labels: {error}; pretrain=none leaves it out") from error
    made_by = (asked, config.data, config.clients, config.model, config.seed)
    held = (config.evaluate, config.partition) if config.evaluate.by_clients else ()
    key = repr((*made_by, *held, torch.get_num_threads()))
    if key not in _MADE:
        train, test = part.aside or (part.train, part.test)
        with seeded(config.seed, "pretrain"):  # dropout draws from torch's global generator
            adamw = LocalConfig(
                optimizer="adamw",
                weight_decay=0.01,
                lr=asked.lr,
                epochs=asked.epochs,
                batch_size=asked.batch_size,
            )
            pretrain(model, train, part.loss, adamw, config.seed)
        weights = {n: p.detach() for n, p in model.named_parameters()}
        given = (test, part.loss, part.metrics)
        metrics = evaluate(model, weights, *given, like=part.like) if len(test) else {}
        state = {n: t.detach().clone() for n, t in model.state_dict().items()}
        _MADE[key] = state, metrics
        while len(_MADE) > KEPT:
            del _MADE[next(iter(_MADE))]
    state, metrics = _MADE[key]
    model.load_state_dict(state)
    return dict(metrics)
