"""Export a trained model in the formats of other libraries, with a model card.

``card.md.j2`` has the text of the card.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, PackageLoader

from fedraclora.errors import ConfigError, unknown
from fedraclora.export.peft_adapter import write_peft
from fedraclora.export.trained import ExportRecord, Order, TrainedModel, is_hugging_face
from fedraclora.export.whole_weights import write_gguf, write_hf, write_state_dict
from fedraclora.limits import Count, limited
from fedraclora.models.pretrained import quiet
from fedraclora.run.folder import refuse_full, versions_of
from fedraclora.run.trusted import refuse_linked
from fedraclora.weights.files import make_folder

FACTS = "export.json"
NO_TOKENIZER = (
    "This folder has no tokenizer, since the run does not know which one made its token ids: write "
    "it beside the model (AutoTokenizer.from_pretrained(...).save_pretrained(FOLDER)), or name it "
    "in the run (data.tokenizer)."
)
OURS = ("linear", "mlp", "cnn")  # models that are defined by shape, outputs and their keys
LIBRARIES = ("transformers", "peft", "safetensors", "gguf")
FORMATS: dict[str, Callable[[TrainedModel, Order], dict[str, object]]] = {
    "peft": write_peft,
    "hf": write_hf,
    "state_dict": write_state_dict,
    "gguf": write_gguf,
}


def write_card(trained: TrainedModel, folder: Path, form: str, record: ExportRecord) -> None:
    """Write ``README.md``, ``config.yaml`` of the run as ``run.yaml``, and ``export.json``.

    Args:
        trained: What was exported.
        folder: The target folder.
        form: The format.
        record: The format's own facts.
    """
    facts = {"format": form, **trained.facts, "libraries": versions_of(LIBRARIES), **record}
    facts["warnings"] = list(trained.warnings)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, default=str) + "\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(dict(trained.config), sort_keys=False))
    (folder / "README.md").write_text(card(trained, form, record))


def card(trained: TrainedModel, form: str, record: ExportRecord) -> str:
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
    """Write the lines that rebuild a model of ours; for other models a placeholder."""
    group = dict(_mapping(trained.config.get("model")))
    shape, name = _mapping(trained.facts.get("samples")).get("shape"), group.pop("name", None)
    if name not in OURS or not isinstance(shape, list | tuple):
        return f"model = ...  # the {type(trained.model).__name__} that the run was given"
    *_, last = trained.model.parameters()  # prefix of the output layer
    given = {"shape": tuple(shape), "classes": last.shape[0], "seed": 0, **group}
    words = ", ".join(f"{key}={value!r}" for key, value in given.items())
    one = last.shape[0] == 1 and trained.facts.get("loss") == "logistic"
    note = "  # classes are outputs: one score tells two classes apart" if one else ""
    return f"from fedraclora.models import MODELS\nmodel = MODELS[{name!r}]({words}).model{note}"


def lacks_tokenizer(model: Any, folder: Path) -> bool:
    """Check whether a folder has a transformers model for text without a tokenizer."""
    reads_texts = getattr(model, "main_input_name", None) == "input_ids"
    return reads_texts and not (folder / "tokenizer_config.json").is_file()


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _spelt(group: object) -> str:
    values = _mapping(group)
    rest = ", ".join(f"{k}={v}" for k, v in values.items() if k != "name" and v is not None)
    return f"{values['name']}{f' ({rest})' if rest else ''}" if "name" in values else rest


__all__ = ["FORMATS", "TrainedModel", "export"]


@limited("")
def export(
    trained: TrainedModel, folder: Path, form: str, rank: Count | None = None, *, check: bool = True
) -> dict[str, object]:
    """Write a trained model into a new folder, with a model card; on failure nothing remains.

    The folder is written under a temporary name and renamed, so that it is complete or missing. The
    same export has the same bytes.

    Args:
        trained: The model.
        folder: The target; created if missing.
        form: A key of `FORMATS`.
        rank: With ``peft``, the largest rank of a layer.
        check: Read back the files, which takes as long again.

    Returns:
        The format's facts about the files; with ``peft``, ``layers``; and ``warnings``.

    Raises:
        ConfigError: If the format is unknown or unsuitable, or the folder is not empty, or is in a
            run folder with a symbolic link that leaves it.
        ModelError: If the format does not support a layer.
    """
    if form not in FORMATS:
        raise unknown("format", form, FORMATS)
    if rank is not None and form != "peft":
        raise ConfigError(f"--rank {rank} is of --format peft; with {form} the weights are whole")
    refuse_linked(folder)
    folder = folder.resolve()
    try:
        str(folder).encode()
    except UnicodeEncodeError as error:
        raise ConfigError(f"{str(folder)!r} is no UTF-8, as paths of safetensors are") from error
    refuse_full(folder)
    # rewrite a folder left by a killed export
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    make_folder(partial)
    try:
        with quiet():
            record = FORMATS[form](trained, Order(partial, folder, rank, check))
        record |= {"read_back": check}
        if form == "hf" and lacks_tokenizer(trained.model, partial):
            trained = replace(trained, warnings=(*trained.warnings, NO_TOKENIZER))
        write_card(trained, partial, form, record)
        # safetensors writes files that only their owner can read
        mode = partial.stat().st_mode & 0o777
        for path in partial.rglob("*"):
            path.chmod(mode if path.is_dir() else mode & 0o666)
        partial.replace(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    return record | {"warnings": [*trained.warnings]}
