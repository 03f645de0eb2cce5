"""What a run says first: what it learns, how, and which numbers of the model it trains.

Each line is an assumption about somebody's model and data that nothing else would show.
"""

from __future__ import annotations

from fedraclora.config.run_config import RunConfig
from fedraclora.protocol.plan import frozen_layers, some_of, thawed
from fedraclora.strategies.assembly import Assembled

NAMED = 8  # notes of a run that begins
TITLE = 13  # characters, so that what follows stands in one column


def opening_lines(run: Assembled) -> list[str]:
    """Say what a run begins with, beside `notes_of`."""
    config, model, lines = run.config, run.built.task.model, dict(introduction(run))
    told = run.built.task.info
    known = ("inputs", "weights", "new_head")
    lines |= {n.replace("_", " "): str(told[n]) for n in known if n in told}
    if config.own_model and (frozen := frozen_layers(model, run.plan)):
        lines["not trained"] = (
            f"{some_of(frozen, 'layer')} (targets=all adds convolutions and embeddings, "
            "dense=[NAME] trains a layer in full)"
        )
    if epochs := config.pretrain.epochs:
        of = config.pretrain.labels
        classes = "" if of is None else f" on the classes {', '.join(map(str, of))}"
        lines["pretrained"] = (
            f"all weights, {epochs} epochs in one place{classes}, before the clients begin "
            "(pretrain=none leaves it out)"
        )
    lines |= {"steps": ", ".join(config.steps)} if config.steps else {}
    lines["chunk"] = str(run.chunk)
    return [f"{title + ':':<{TITLE}}{text}" for title, text in lines.items()]


def introduction(run: Assembled) -> dict[str, str]:
    """Name loss, metrics, optimiser and what is trained, by title: for the summary, too."""
    task = run.built.task
    return {
        "loss": f"{task.loss} ({task.info['loss_from']})",
        "metrics": ", ".join(task.metrics),
        "optimiser": optimiser_of(run.config),
        "trained": run.trained,
    }


def notes_of(run: Assembled) -> list[str]:
    """Say what is not as it was asked for, such as a rank that was cut, where a run begins."""
    notes = [] if run.strategy.recorder.ledger.rows else list(run.strategy.state.notes)
    if more := notes[NAMED:]:
        notes = [*notes[:NAMED], f"{len(more)} more such notes are in the ledger"]
    if run.config.own_model and (names := thawed(run.built.task.model, run.plan)):
        notes.append(
            f"requires_grad=False of {some_of(names, 'parameter')} is not read: these are trained "
            "or adapted, as targets, head and dense say (targets=[NAME] adapts that layer alone, "
            "head=frozen)"
        )
    warning = run.built.task.info.get("loss_warning")
    return [*([str(warning)] if warning else []), *notes]


def optimiser_of(config: RunConfig) -> str:
    """Say how clients take their steps, and what the server makes of their mean."""
    local, server = config.local, config.server_optimiser
    steps = local.epochs if local.steps is None else local.steps
    unit = ("epoch" if local.steps is None else "step") + ("s" if steps != 1 else "")
    size = f"batches of {local.batch_size}" if local.batch_size else "one batch"
    parts = [local.optimiser, f"learning rate {local.lr:g}"]
    parts += [f"{local.dense_lr:g} beside adapters"] if local.dense_lr is not None else []
    parts += [f"momentum {local.momentum:g}"] if local.momentum else []
    parts += [f"weight decay {local.weight_decay:g}"] if local.weight_decay else []
    parts += [f"schedule {local.schedule}"] if local.schedule != "constant" else []
    parts += [f"{steps} {unit} of {size}", *(extra.setting for extra in local.extras)]
    parts += [f"{server.name} at the server"] if server.name != "none" else []
    return ", ".join(parts)
