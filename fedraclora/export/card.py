"""What stands beside an exported model: a model card, the config of its run, the facts as JSON.

The text of the card is ``card.md.j2``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import yaml
from jinja2 import Environment, PackageLoader

from fedraclora.export.trained import TrainedModel, is_hugging_face
from fedraclora.run.folder import versions_of

Record = Mapping[str, object]
FACTS = "export.json"
OURS = ("linear", "mlp", "cnn")  # models that shape, outputs and their keys make
LIBRARIES = ("transformers", "peft", "safetensors", "gguf")


def write_card(trained: TrainedModel, folder: Path, form: str, record: Record) -> None:
    """Write ``README.md``, ``config.yaml`` of the run as ``run.yaml``, and ``export.json``.

    Args:
        trained: What was exported.
        folder: Where to.
        form: The format.
        record: What the format says of itself.
    """
    facts = {"format": form, **trained.facts, "libraries": versions_of(LIBRARIES), **record}
    facts["warnings"] = list(trained.warnings)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, default=str) + "\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(dict(trained.config), sort_keys=False))
    (folder / "README.md").write_text(card(trained, form, record))


def card(trained: TrainedModel, form: str, record: Record) -> str:
    """Write a model card, with the front matter that the Hugging Face hub reads."""
    facts, model, kind = trained.facts, trained.model, type(trained.model).__name__
    method, data = (_mapping(facts.get(key)).get("name", "unknown") for key in ("method", "data"))
    head: dict[str, object] = {"tags": ["federated-learning", "fedraclora", str(method)]}
    if form == "peft":
        head |= {"library_name": "peft"}
    elif is_hugging_face(model) and form == "hf":
        head |= {"library_name": "transformers"}
    if trained.source is not None and "/" in trained.source and not Path(trained.source).exists():
        head |= {"base_model": trained.source}
    samples = _mapping(facts.get("samples"))
    count = getattr(getattr(model, "config", None), "num_labels", None)
    labels = f", num_labels={count}" if "Classification" in kind else ""
    classes = samples.get("classes")
    if labels and isinstance(classes, list) and len(classes) == count:
        names = dict(enumerate(map(str, classes)))
        labels = f", id2label={names}, label2id={ {name: k for k, name in names.items()} }"
    environment = Environment(  # noqa: S701  it is Markdown
        loader=PackageLoader("fedraclora.export", "."), trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters |= {"spelt": _spelt, "quoted": repr}
    return environment.get_template("card.md.j2").render(
        head=yaml.safe_dump(head, sort_keys=False).rstrip(),
        method=method,
        data=data,
        warnings=trained.warnings,
        facts=facts,
        versions={**_mapping(facts.get("versions")), **versions_of(LIBRARIES)},
        form=form,
        record={"base": None, **record},
        kind=kind,
        built=_built(trained),
        labels=labels,
        samples=samples,
        logits=is_hugging_face(model),
    )


def _built(trained: TrainedModel) -> str:
    """Write the lines that build a model of ours anew; for others a place to put them."""
    group = dict(_mapping(trained.config.get("model")))
    shape, name = _mapping(trained.facts.get("samples")).get("shape"), group.pop("name", None)
    if name not in OURS or not isinstance(shape, list | tuple):
        return f"model = ...  # the {type(trained.model).__name__} that the run was given"
    *_, last = trained.model.parameters()  # of the layer that gives the outputs
    given = {"shape": tuple(shape), "classes": last.shape[0], "seed": 0, **group}
    words = ", ".join(f"{key}={value!r}" for key, value in given.items())
    return f"from fedraclora.models import MODELS\nmodel = MODELS[{name!r}]({words}).model"


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _spelt(group: object) -> str:
    said = _mapping(group)
    rest = ", ".join(f"{k}={v}" for k, v in said.items() if k != "name" and v is not None)
    return f"{said['name']}{f' ({rest})' if rest else ''}" if "name" in said else rest
