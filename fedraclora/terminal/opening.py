"""Write the first lines of a run, from the facts of `strategies.facts`.

`opening_lines` are the few sentences for everybody. `details_of` is the rest, a line for each
title. It goes to the log of the run, and with ``output.verbose=true`` to the terminal.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedraclora.binding import section
from fedraclora.config.titles import method_label
from fedraclora.object_registry import NAME
from fedraclora.protocol.plan import TrainedPart, some_of
from fedraclora.run.log import LOG
from fedraclora.training.chunking import ChunkPlan

NAMED = 8  # names of a list, and notes
UNMEASURED = "none: the server has no test samples (data.test_file)"
OR_CLIENTS = " (with evaluate.clients=round clients evaluate on their own samples)"
TITLE = 13  # characters, so that what follows stands in one column
SAID = ("inputs", "weights", "precision", "new_head")  # what the task says of itself

Facts = Mapping[str, Any]


def rate_lines(facts: Facts) -> list[str]:
    """Write how the learning rate was found, in a line; none if it was set."""
    found = facts.get("found_rate")
    return [f"{found[0].upper()}{found[1:]}."] if found else []


def opening_lines(facts: Facts, plain: Mapping[str, Any], folder: Path | None) -> list[str]:
    """Write model, data, bytes and output folder of a run, in at most five lines.

    Args:
        facts: Of the run at its start.
        plain: Its config.
        folder: Its folder; None for a run in memory.
    """
    names = {key: section(plain, key).get("name") for key in ("model", "data")}
    model, data = (f"your {key}" if name == NAME else name for key, name in names.items())
    every, some = facts["clients"], facts["clients_per_round"]
    rounds, done = plain["rounds"], facts["done"]
    first = f"resumed after round {done} of {rounds}" if done else f"{rounds} round"
    first += "s" * (rounds != 1 and not done)
    what = f"{model} ({facts['trained']['total']:,} parameters) on {data}"
    samples = f"{counted}; " if (counted := _counts(facts)) else ""
    who = f"each with {some:,} of {every:,} clients"
    lines = [f"Federated learning of {what} with {method_label(plain)}: {first}, {who}."]
    lines += [f"Data: {samples}{_learnt(facts)}.", f"{_each_client(facts)}."]
    if facts["pretrained"]:
        lines.append(f"Before round 1, {_pretrained(facts['pretrained'])}.")
    lines += rate_lines(facts)
    if folder is not None:
        lines.append(
            f"Results go to {folder}; {LOG} there has details (output.verbose=true shows them)."
        )
    return lines


def details_of(facts: Facts) -> list[str]:
    """Write all facts of a run's start, except `notes_of`; a line for each title."""
    told, lines = facts["task"], introduction(facts)
    lines |= _samples(facts)
    lines |= {"texts": _texts(told["texts"])} if "texts" in told else {}
    lines |= {n.replace("_", " "): str(told[n]) for n in SAID if n in told}
    if pretrained := facts["pretrained"]:
        lines["pretrained"] = _pretrained(pretrained)
    lines |= {"steps": ", ".join(facts["steps"])} if facts["steps"] else {}
    if facts["own_samples"]:
        lines["weights"] = (
            "the samples that your function gives to round.read (or aggregation_weights=uniform)"
        )
    lines |= _measured_by(facts)
    if facts["choices"] is not None:
        lines["choices"] = _choices(facts["choices"])
    if facts["split"] != "test":
        later = " (fedraclora evaluate RUN)" if facts["tests"] else ""
        lines["measured on"] = f"validation samples; test samples are kept for the end{later}"
    chunk = ChunkPlan.of_record(facts["chunk"])
    lines |= {"chunk": str(chunk), **facts["engine"], **idle_workers(facts)}
    return [f"{title + ':':<{TITLE}}{text}" for title, text in lines.items()]


def introduction(facts: Facts) -> dict[str, str]:
    """Name loss, metrics, optimizer and trained tensors, by title."""
    loss, hint = facts["loss"], OR_CLIENTS if facts["clients_could_measure"] else ""
    wide, like = loss["numbers"], loss["like"]
    return {
        "loss": f"{loss['name']} ({loss['from']})"
        + (f", summed over the {wide} numbers of a target" if wide > 1 else "")
        + (f", its outputs read as those of {like}" if like else ""),
        "metrics": ", ".join(facts["metrics"]) or UNMEASURED + hint,
        "optimizer": _optimizer(facts["optimizer"]),
        "trained": str(TrainedPart(**facts["trained"])),
    }


def notes_of(facts: Facts) -> list[str]:
    """List differences from the config at the start of a run, such as a reduced rank."""
    told, notes = facts["task"], facts["state"]
    if more := notes[NAMED:]:
        notes = [*notes[:NAMED], f"{len(more)} more such notes are in the ledger"]
    if still := _untrained(facts["untrained"]):
        notes = [*notes, still]
    if names := facts["thawed"]:
        text = (
            f"requires_grad=False of {some_of(names, 'parameter')} is ignored: target_modules, "
            "head and modules_to_save choose what is trained or adapted (target_modules=[NAME] "
            "adapts only that layer; see also head=frozen)"
        )
        notes = [*notes, text]
    warning, duplicates = told.get("loss_warning"), told.get("duplicates")
    said = [*duplicates.values()] if isinstance(duplicates, dict) else []
    said += similar if isinstance(similar := told.get("similar_names"), list) else []
    return [*([str(warning)] if warning else []), *said, *notes]


def _untrained(found: Facts) -> str:
    """Name what is not trained, and the keys that train it; empty if all is."""
    layers, parameters = found["layers"], found["parameters"]
    named = [some_of(layers, "layer")] if layers else []
    named += [some_of(parameters, "parameter")] if parameters else []
    keys = ["target_modules=all adds convolutions", "target_modules=[NAME] adapts an embedding"]
    keys = keys if layers else []
    if any(name.endswith("bias") for name in parameters):
        keys.append("modules_to_save=[bias] trains all biases")
    keys.append("modules_to_save=[NAME] trains a layer, such as a norm, or a parameter in full")
    return f"not trained: {'; '.join(named)} ({', '.join(keys)})" if named else ""


def idle_workers(facts: Facts) -> dict[str, str]:
    """Describe idle workers, if smaller chunks would keep them busy."""
    chunk, workers, cohort = facts["chunk"]["chunk"], facts["workers"], facts["clients_per_round"]
    chunks, smaller = -(-cohort // chunk), -(-cohort // workers)
    if chunks >= workers or smaller >= chunk:
        return {}
    text = f"{workers - chunks} of {workers} workers, as {cohort} clients a round are {chunks} "
    text += f"chunk{'s' * (chunks > 1)}; engine.chunk={smaller} gives work to more, with other"
    return {"idle": f"{text} last bits"}


def _pretrained(pretrained: Facts) -> str:
    of = pretrained["labels"]
    classes = "" if of is None else f" on the classes {', '.join(map(str, of))}"
    return (
        f"all weights are trained centrally for {pretrained['epochs']} epochs{classes} "
        "(pretrain=none: off)"
    )


def _counts(facts: Facts) -> str:
    """Count the samples at clients and server; empty if only clients know theirs."""
    told = facts["task"]
    if "train" not in told:
        return ""
    kept = f"{told['test']:,} test samples"
    return f"{told['train']:,} training samples of {facts['clients']:,} clients, {kept}"


def _each_client(facts: Facts) -> str:
    """Describe what a client trains and sends in a round."""
    part, sent = facts["trained"], facts["sends"]
    in_few = "" if sent["as"] == "float32" else f" in {sent['as']}"
    ranks = f" (rank {' to '.join(map(str, part['ranks']))})" if part["ranks"] else ""
    return (
        f"Each round, a client trains {part['numbers']:,} parameters{ranks} with "
        f"{_optimizer(facts['optimizer'])}, and sends {sent['numbers']:,} numbers{in_few}"
    )


def _learnt(facts: Facts) -> str:
    """Name loss and metrics, and how the loss was found if it was not configured."""
    told = introduction(facts)
    validation = " on validation samples" if facts["split"] != "test" else ""
    return f"loss {told['loss']}, metrics {told['metrics']}{validation}"


def _samples(facts: Facts) -> dict[str, str]:
    """Count training and test samples; empty if only clients know theirs."""
    if not (text := _counts(facts)):
        return {}
    told = facts["task"]
    if share := told.get("held_out"):
        text += f" ({share:g} of all, held out by a seed)"
    for title, key in (("features", "features"), ("left out", "columns_left_out")):
        if isinstance(names := told.get(key), list):
            more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
            text += f"; {title} {', '.join(map(str, names[:NAMED]))}{more}"
    return {"data": text}


def _texts(lengths: Facts) -> str:
    """Describe the length limit of texts, and how many have that length and may be truncated."""
    return (
        f"up to {lengths['max_length']} tokens each, of which {lengths['full']} of "
        f"{lengths['texts']} have as many: what is longer is cut (data.max_length)"
    )


def _choices(asked: Facts) -> str:
    """Describe the number of questions, and their answers."""
    answers = " or ".join(map(repr, asked["answers"]))
    return (
        f"{asked['questions']} questions, each by the likeliest of its answers, such as {answers}, "
        "without what ends them"
    )


def _measured_by(facts: Facts) -> dict[str, str]:
    """Describe which clients evaluate on which samples; empty if none does."""
    held = facts["measured_by"]
    own = held["own"]
    if held["clients"] is None:
        idle = f"no clients: set evaluate.clients=all to use the test samples that {own} bring"
        return {"measured by": idle} if own else {}
    who = "the cohort" if held["clients"] == "round" else "all clients"
    rest = f" on a held-out share of {held['portion']:g} of its samples"
    text = f"{who}, each{rest}"
    if own and held["own_tests"]:
        text = f"{who}, {own} on test samples of their own, others{rest}"
    if held["least"] is not None:
        text += (
            f"; metrics of fewer than {held['least']} clients are not released "
            "(evaluate.min_clients)"
        )
    elif held["rows"] is not None:
        text += f": {held['rows']} in all"
        if none := held["without"]:
            some = ", ".join(map(str, none[:NAMED])) + ("..." if none[NAMED:] else "")
            text += f"; {len(none)} of {facts['clients']} have too few to hold any out ({some})"
    if unknown := ", ".join(held["unscored"]):
        text += f"; {unknown} over all samples is unknown, since it needs every output"
    return {"measured by": text}


def _rate(rate: float | str) -> str:
    """Write a learning rate; ``auto`` before it is found."""
    return rate if isinstance(rate, str) else f"{rate:g}"


def _optimizer(local: Facts) -> str:
    """Describe the clients' optimizer, and the server's."""
    at_server = [f"{local['server']} at the server"] if local["server"] != "none" else []
    if (name := local["train"]) is not None:
        said = f"your own training function {name} (its optimizer, loss and steps)"
        return ", ".join([said, *at_server])
    steps = local["epochs"] if local["steps"] is None else local["steps"]
    unit = ("epoch" if local["steps"] is None else "step") + ("s" if steps != 1 else "")
    size = f"batches of {local['batch_size']}" if local["batch_size"] else "one batch"
    parts = [local["name"], f"learning rate {_rate(local['lr'])}"]
    parts += [f"{local['full_lr']:g} beside adapters"] if local["full_lr"] is not None else []
    parts += [f"momentum {local['momentum']:g}"] if local["momentum"] else []
    parts += [f"weight decay {local['weight_decay']:g}"] if local["weight_decay"] else []
    parts += [f"schedule {local['schedule']}"] if local["schedule"] != "constant" else []
    bound = f", {local['most']} steps at most" if local["most"] else ""
    parts += [f"{steps} {unit} of {size}{bound}", *local["extras"]]
    return ", ".join([*parts, *at_server])
