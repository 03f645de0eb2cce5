"""Collect facts of a run at its start, as plain values; `terminal.opening` prints them."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import torch

from fedraclora.config.build import measured_samples
from fedraclora.config.run_config import RunConfig
from fedraclora.evaluation.choices import Questions
from fedraclora.evaluation.clients import scored
from fedraclora.evaluation.metrics import Measure
from fedraclora.protocol.plan import thawed, trained_names, untrained
from fedraclora.strategies.builder import RunBuilder

Facts = dict[str, Any]  # JSON values
FLOATS = 100  # most rounds over which the numbers that a client sends are averaged at the start


def facts_of(run: RunBuilder) -> Facts:
    """Collect the facts of a run at its start, as JSON values."""
    config, task, built = run.config, run.task, run.built
    samples = measured_samples(task, config.evaluate.split)
    own = config.own_model
    return {
        **learning_facts(run),
        "done": run.strategy.done,
        "sends": {
            "numbers": mean_floats(run, min(config.rounds, FLOATS))[0],
            "as": config.compression.uplink,
        },
        "task": task.info,
        "clients": built.clients,
        "clients_per_round": built.cohort,
        "untrained": untrained_facts(run) if own else {"layers": [], "parameters": []},
        "thawed": [*thawed(task.model, run.plan)] if own else [],
        "pretrained": config.pretrain.epochs and vars(config.pretrain),
        "steps": [*map(str, config.steps)],
        "own_samples": config.local.is_own and config.aggregation_weights == "samples",
        "measured_by": held_facts(run),
        "choices": None if task.choices is None else choice_facts(Questions.of(task, samples)),
        "split": config.evaluate.split,
        "tests": len(task.test),
        "chunk": {**run.chunk.record(), "device": run.chunk.device},
        "workers": run.grid.workers,
        "engine": run.grid.facts,
        "state": [] if run.recorder.ledger.rows else [*run.strategy.state.notes],
    }


def untrained_facts(run: RunBuilder) -> Facts:
    """Name the layers that no client trains, and single parameters of other layers."""
    names = trained_names(run.first_instructions, run.plan)
    layers, parameters = untrained(run.task.model, names)
    return {"layers": layers, "parameters": parameters}


def mean_floats(run: RunBuilder, rounds: int) -> tuple[float, float]:
    """Count the numbers that a client sends and receives in a round, averaged over some rounds.

    They differ from round to round where a first round begins from seeds, or factors take turns.
    """
    strategy = run.strategy
    method, state = strategy.method.in_effect(strategy.state)
    each = [method.floats(state.plan, round_) for round_ in range(1, max(1, rounds) + 1)]
    means = [sum(numbers) / len(each) for numbers in zip(*each, strict=True)]
    up, down = (int(mean) if mean == int(mean) else round(mean, 1) for mean in means)
    return up, down


def learning_facts(run: RunBuilder) -> Facts:
    """Collect facts on task and training, also for the summary."""
    task, config = run.task, run.config
    wide = math.prod(task.test.target.shape[1:]) if task.loss == "squared_error" else 1
    known = len(measured_samples(task, config.evaluate.split)) or task.held
    return {
        "loss": {
            "name": task.loss.partition("@")[0],
            "from": task.info["loss_from"],
            "numbers": wide,
            "like": task.like,
        },
        "metrics": [*task.measured] if known else [],
        "clients_could_measure": not task.train.opaque,
        "optimizer": optimizer_facts(config),
        "trained": asdict(run.trained),
        "found_rate": run.found and run.found.described(factor=config.local.is_own),
    }


def optimizer_facts(config: RunConfig) -> Facts:
    """Collect facts on the clients' optimizer and the server's."""
    local, server = config.local, config.server_optimizer
    keys = ("lr", "full_lr", "momentum", "weight_decay", "schedule", "epochs", "steps")
    return {
        "name": local.optimizer,
        **{key: getattr(local, key) for key in (*keys, "batch_size")},
        "train": None if local.train is None else local.train.partition("@")[0],
        "most": config.method.most_steps,  # one number is sent for each
        "extras": [extra.setting for extra in local.added],
        "server": server.name,
    }


def choice_facts(asked: Questions) -> Facts:
    """Collect the number of multiple-choice questions, and the answers of the first ones."""
    return {"questions": len(asked.characters), "answers": [*asked.answers]}


def held_facts(run: RunBuilder) -> Facts:
    """Collect facts on which clients evaluate, and on which samples."""
    task, asked, held = run.task, run.config.evaluate, run.task.held
    found: Facts = {"own": task.info.get("tests_of_clients", 0), "clients": None}
    if held is None:
        return found
    found |= {"clients": asked.clients, "portion": asked.portion}
    found |= {"own_tests": asked.source["own_tests"], "least": None, "rows": None}
    if run.config.veiled:  # the number of clients that hold samples out is secret
        found["least"] = asked.min_clients
    elif held.data.table is not None:  # other clients are created or read on demand
        sizes = held.data.sizes(torch.arange(run.built.clients))
        found |= {"rows": int(sizes.sum()), "without": torch.nonzero(sizes == 0).flatten().tolist()}
    return found | {"unscored": [*scored(Measure.of_task(task))]}
