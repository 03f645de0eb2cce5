"""What stands beside an exported model: a model card, the config of its run, the facts as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import yaml

from fedraclora.export.trained import TrainedModel, is_hugging_face

Record = Mapping[str, object]
FACTS = "export.json"
ERROR = (
    "The relative error is the Frobenius norm of what the adapter leaves out of `W_T - W_0`, over "
    "that of `W_T - W_0`; the largest difference is that of a weight after merging, rounding in it."
)
BROUGHT = (
    "Model, data or method that a program brought are known in it by a digest alone; hand the same "
    "ones in again."
)


def write_card(trained: TrainedModel, folder: Path, form: str, record: Record) -> None:
    """Write ``README.md``, ``config.yaml`` of the run as ``run.yaml``, and ``export.json``.

    Args:
        trained: What was exported.
        folder: Where to.
        form: The format.
        record: What the format says of itself.
    """
    facts = {"format": form, **trained.facts, "libraries": libraries(), **record}
    facts["warnings"] = list(trained.warnings)
    (folder / FACTS).write_text(json.dumps(facts, indent=1, default=str) + "\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(dict(trained.config), sort_keys=False))
    (folder / "README.md").write_text(card(trained, form, record))


def libraries() -> dict[str, str]:
    """Give the versions of the libraries that an export is written with."""
    found = {}
    for package in ("transformers", "peft", "safetensors", "gguf"):
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def card(trained: TrainedModel, form: str, record: Record) -> str:
    """Write a model card, with the front matter that the Hugging Face hub reads."""
    facts, loads = trained.facts, _loading(trained, form, record)
    method, data = _named(facts.get("method")), _named(facts.get("data"))
    head: dict[str, object] = {"tags": ["federated-learning", "fedraclora", method]}
    if form == "peft":
        head |= {"library_name": "peft"}
    elif is_hugging_face(trained.model) and form == "hf":
        head |= {"library_name": "transformers"}
    if trained.source is not None and "/" in trained.source and not Path(trained.source).exists():
        head |= {"base_model": trained.source}
    rows = {
        "method": _spelt(facts.get("method")),
        "data": _spelt(facts.get("data")),
        "model": _spelt(facts.get("model")),
        "rounds": facts.get("rounds"),
        "clients": f"{facts.get('clients')}, {facts.get('cohort')} a round",
        "sent by clients, bytes": facts.get("uplink_bytes"),
        "sent to clients, bytes": facts.get("downlink_bytes"),
        "seed": facts.get("seed"),
        **{f"metric: {name}": value for name, value in _mapping(facts.get("metrics")).items()},
        "weights digest": f"`{facts.get('weights_digest')}`",
        "versions": _spelt({**_mapping(facts.get("versions")), **libraries()}),
        "revision": facts.get("git"),
    }
    lines = ["---", yaml.safe_dump(head, sort_keys=False).rstrip(), "---", ""]
    data = "Samples of a Python program" if data == "object" else data
    lines += [f"# {data}, trained by {method}", ""]
    lines += [f"> **Note.** {sentence}\n" for sentence in trained.warnings]
    lines += ["Trained across clients that kept their samples, with fedraclora.", ""]
    lines += ["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items()), ""]
    lines += ["## Load it", "", "```python", *loads, "```", ""]
    layers = _mapping(record.get("layers"))
    if layers:
        lines += [
            "## Layers",
            "",
            ERROR,
            "",
            "| layer | rank | rank of the change | relative error | largest difference |",
            "|---|---:|---:|---:|---:|",
            *(_row(name, _mapping(layer)) for name, layer in layers.items()),
            "",
        ]
    if saved := record.get("saved_in_full"):
        names = ", ".join(f"`{name}`" for name in saved) if isinstance(saved, list) else saved
        lines += [f"Trained in full, and saved whole: {names}.", ""]
    lines += [
        "## Train it again",
        "",
        "`run.yaml` is the whole config of the run:",
        "",
        "```python",
        "from pathlib import Path",
        "import fedraclora, yaml",
        'run = fedraclora.simulate(yaml.safe_load(Path("run.yaml").read_text()))',
        "```",
        "",
        BROUGHT,
        "",
    ]
    return "\n".join(lines)


def _loading(trained: TrainedModel, form: str, record: Record) -> list[str]:
    """Write the lines of Python that load an export from its folder."""
    kind = type(trained.model).__name__
    if form == "peft":
        base = record.get("base")
        if base is None:
            return [
                "from peft import PeftModel",
                "from safetensors.torch import load_file",
                f"model = ...  # the {kind} that the run was given",
                'model.load_state_dict(load_file("base.safetensors"))',
                'model = PeftModel.from_pretrained(model, ".").merge_and_unload()',
            ]
        labels = getattr(getattr(trained.model, "config", None), "num_labels", None)
        more = f", num_labels={labels}" if "Classification" in kind else ""
        return [
            "from peft import PeftModel",
            f"from transformers import {kind}",
            f"model = {kind}.from_pretrained({str(base)!r}{more})",
            'model = PeftModel.from_pretrained(model, ".").merge_and_unload()',
        ]
    if form == "gguf":
        return [
            f"from transformers import {kind}",
            f'model = {kind}.from_pretrained(".", gguf_file="model.gguf")',
        ]
    if form == "hf":
        return [f"from transformers import {kind}", f'model = {kind}.from_pretrained(".")']
    return [
        "from safetensors.torch import load_file",
        f"model = ...  # the {kind} that the run was given",
        'model.load_state_dict(load_file("model.safetensors"))',
    ]


def _row(name: str, layer: Mapping[str, object]) -> str:
    cells = [layer.get("rank"), layer.get("rank_of_change")]
    cells += [f"{layer.get(key):.2e}" for key in ("relative_error", "largest_difference")]
    return f"| `{name}` | {' | '.join(map(str, cells))} |"


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, Mapping) else {}


def _named(group: object) -> str:
    return str(_mapping(group).get("name", "unknown"))


def _spelt(group: object) -> str:
    said = _mapping(group)
    rest = ", ".join(f"{k}={v}" for k, v in said.items() if k != "name" and v is not None)
    return f"{said['name']}{f' ({rest})' if rest else ''}" if "name" in said else rest
