"""Stored weights as a model of transformers: whole, finite and of its shapes, or refused.

transformers fills what a file lacks at random and leaves out what it does not know. Here nothing
is drawn but a new head, and what a file says of its sizes is held against what it holds before a
model is built of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fedraclora.data.gguf_header import Header, Stored, read_gguf_header
from fedraclora.data.locate import GGUF, checked_source, from_pretrained, refuse_code
from fedraclora.errors import ConfigError, DataError
from fedraclora.lowrank.layers import is_head
from fedraclora.models.built import found_head

NAMES_SHOWN = 3  # names in a message


@dataclass(frozen=True)
class Source:
    """Where stored weights are.

    Attributes:
        path: As ``model.path`` has it, for messages.
        place: What ``from_pretrained`` takes.
        local: Whether they are on this machine; else nothing is known of them beforehand.
    """

    path: str
    place: str
    local: bool

    @property
    def gguf(self) -> Header | None:
        """The header, of a GGUF file."""
        if not (self.local and self.place.endswith(GGUF)):
            return None
        return read_gguf_header(Path(self.place), f"model.path={self.path}")

    def refuse(
        self, what: str, do: str = "get it again, or name a model that is whole"
    ) -> DataError:
        """Build the error for weights that are not what they say."""
        return DataError(f"model.path={self.path}: {what}; {do}")


def load_pretrained(
    kind: Any,
    path: str,
    sha256: str | None,
    prepare: Callable[[Any], None],
    *,
    attention: str,
    new_head: bool,
    **asked: object,
) -> tuple[Any, tuple[str, ...]]:
    """Load stored weights in float32 into a model that they fill.

    Args:
        kind: An Auto class of transformers.
        path: ``model.path``.
        sha256: Of the weights' file, or None.
        prepare: Changes the stored configuration to that of the model, which may have fewer layers.
        attention: As transformers names it.
        new_head: Whether a head is drawn where none, or one of other outputs, is stored.
        **asked: Further keys of the configuration.

    Returns:
        The model, and the names of the parameters that were drawn.

    Raises:
        ConfigError: If the weights are quantized, and not in a GGUF file.
        DataError: If the weights are missing, another file, damaged, not finite, or not all that
            the model has.
    """
    from transformers import AutoConfig

    source = Source(path, *checked_source(path, sha256))
    asked["attn_implementation"] = attention  # else one that the folder names: code of the hub
    with quiet():
        config = from_pretrained(AutoConfig, source.place, source.local, "model.path", **asked)
    layers = layers_of(config)
    prepare(config)
    header = source.gguf
    stored = _stored(source, header)
    _check_config(kind, source, stored, config)
    with quiet():
        model, report = from_pretrained(
            kind,
            source.place,
            source.local,
            f"model.path={path}",
            config=config,
            dtype=torch.float32,
            attn_implementation=attention,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    cut = set(map(str, range(layers_of(config), layers)))
    head = found_head(model) if new_head else ()
    if head:  # what pools the outputs of an encoder is of the head's making, wherever it lies
        head += (f"{model.base_model_prefix}.pooler",)
    drawn = _refuse_gaps(source, model, report, head, cut)
    if header is not None:
        _refuse_unread(source, model, drawn, header, cut, headless=new_head)
    _refuse_infinite(source, model)
    return made_plain(model), drawn


def _check_config(kind: Any, source: Source, stored: Mapping[str, Stored], config: Any) -> None:
    """Hold a configuration against the stored weights: their number, and what they can fill."""
    gguf = source.place.endswith(GGUF)
    if not gguf and getattr(config, "quantization_config", None) is not None:
        raise ConfigError(
            f"model.path={source.path}: its weights are quantized, and of such only GGUF files are "
            "read: dequantize them first (model.dequantize() of transformers, then save_pretrained)"
        )
    for name, value in _floats(config.to_dict()):
        if not math.isfinite(value):
            raise source.refuse(f"{name} is {value} in its configuration")
    if not stored:
        return
    if (layers := layers_of(config)) > len(stored):
        raise source.refuse(
            f"its configuration has {layers} layers, and {len(stored)} tensors are stored"
        )
    try:
        with torch.device("meta"), quiet():
            model = kind.from_config(config, trust_remote_code=False)
    except Exception as error:  # each architecture has checks, and errors, of its own
        refuse_code(error, "model.path", source.place)
        what = " ".join(str(error).split())
        raise source.refuse(f"its configuration makes no model ({what})") from error
    head = found_head(model)
    own = {n: p.numel() for n, p in model.named_parameters()}
    for name, tensor in stored.items():
        if (
            "F" not in tensor.kind
            and "Q" not in tensor.kind
            and any(n.endswith(name) or name.endswith(n) for n in own)
        ):
            raise source.refuse(f"{name} holds {tensor.kind}, expected numbers with a fraction")
    body = sum(count for n, count in own.items() if not is_head(n, head))
    if body > 2 * (held := sum(t.count for t in stored.values())):  # less is named once it is built
        raise source.refuse(
            f"a {type(model).__name__} of its configuration has {body:,} numbers, and {held:,} are "
            "stored"
        )


def _floats(config: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _floats(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", value


def _stored(source: Source, header: Header | None) -> Mapping[str, Stored]:
    """List the stored tensors; empty where that takes loading them."""
    if header is not None:
        return header.tensors
    found: dict[str, Stored] = {}
    for path in sorted(Path(source.place).glob("*.safetensors")) if source.local else ():
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    tensor = file.get_slice(name)
                    found[name] = Stored(tuple(tensor.get_shape()), tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            raise source.refuse(f"{path.name} is damaged ({error})") from error
    return found


def _refuse_gaps(
    source: Source, model: nn.Module, report: Any, head: tuple[str, ...], cut: set[str]
) -> tuple[str, ...]:
    """Refuse what the file lacks, has too much or in another shape; name what was drawn.

    A head is drawn layer by layer: one that is stored in part is damaged.
    """
    shapes = {name: (tuple(there), tuple(here)) for name, there, here in report["mismatched_keys"]}
    missing = set(report["missing_keys"])
    drawn = {
        name
        for name in missing | shapes.keys()
        if is_head(name, head) and (name in missing or shapes[name][0][1:] == shapes[name][1][1:])
    }
    for owner in {name.rpartition(".")[0] for name in drawn}:
        parts = {f"{owner}.{n}" for n, _ in model.get_submodule(owner).named_parameters()}
        if not parts <= drawn or 0 < len(parts & missing) < len(parts):
            raise source.refuse(f"of its head, {owner} is not stored whole")
    if lacking := sorted(missing - drawn):
        raise source.refuse(f"it has no {_listed(lacking)}")
    for name in sorted(shapes.keys() - drawn):
        raise source.refuse(f"{name} is {shapes[name][0]}, expected {shapes[name][1]}")
    prefix = getattr(model, "base_model_prefix", "")
    inside = {name for name, _ in getattr(model, prefix, model).named_children()}
    unread = sorted(
        name
        for name in report["unexpected_keys"]
        if not cut & set(name.split("."))
        # Beside the parts of the body lie the heads of other tasks.
        and (not head or name.removeprefix(f"{prefix}.").split(".")[0] in inside)
    )
    if unread:
        raise source.refuse(f"a {type(model).__name__} has no place for its {_listed(unread)}")
    return tuple(name for name, _ in model.named_parameters() if name in drawn)


def _refuse_unread(
    source: Source,
    model: nn.Module,
    drawn: tuple[str, ...],
    header: Header,
    cut: set[str],
    *,
    headless: bool,
) -> None:
    """Refuse what a GGUF file has and transformers passes over.

    Tensors that it does not know are in no report of transformers: their numbers are missing.
    """
    for name, value in header.fields.items():
        if name.endswith("rope.scaling.type") and value != "none" and "gpt" not in name:
            raise source.refuse(
                f"{name} is {value!r}, and transformers reads no scaling of rotary embeddings from "
                "GGUF: it would be another model"
            )
    left = {
        name: tensor.count
        for name, tensor in header.tensors.items()
        if not cut & set(name.split(".")) and not (headless and name.startswith("output."))
    }
    taken = sum(p.numel() for n, p in model.named_parameters() if n not in drawn)
    buffers = dict(model.named_buffers())
    taken += sum(buffers[n].numel() for n in model.state_dict() if n in buffers)
    if (held := sum(left.values())) != taken:
        raise source.refuse(
            f"its tensors hold {held:,} numbers, of which a {type(model).__name__} takes {taken:,} "
            f"({len(left)} tensors, the last is {[*left][-1]})"
        )


def _refuse_infinite(source: Source, model: Any) -> None:
    """Refuse weights that are not finite, or whose outputs are not."""
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise source.refuse(f"{name} has values that are not finite")
    last = getattr(model.config, "eos_token_id", None)  # which some heads look for
    ids = torch.tensor(2 * [[0, last if isinstance(last, int) and last >= 0 else 0]])
    try:
        with torch.no_grad():
            outputs = model(input_ids=ids).logits
    except Exception as error:
        what = " ".join(str(error).split())
        raise source.refuse(f"it cannot be run ({what})", "mend its configuration") from error
    if not bool(torch.isfinite(outputs).all()):
        raise source.refuse("its outputs are not finite")


def layers_of(config: Any) -> int:
    """Count the layers of a configuration; 0 where it says none."""
    return getattr(config, "num_hidden_layers", 0)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" * (len(names) > NAMES_SHOWN)
    )


def assumed(header: Header) -> list[str]:
    """Say where a model is not what a GGUF file says: keys not read, and keys that it lacks."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kind = str(header.fields.get("general.architecture"))
    known = GGUF_CONFIG_MAPPING.get(kind)
    if known is None:  # transformers has a reader of its own
        return []
    inside = {name.removeprefix(f"{kind}.") for name in header.fields}
    if "tokenizer.ggml.tokens" in inside:  # they are counted
        inside.add("vocab_size")
    others = ("general.", "tokenizer.", "split.", "attention.key_length", "attention.value_length")
    # The last two are lengths of heads, which the shapes of the tensors have.
    unread = sorted(n for n in inside if n not in known and not n.startswith(others))
    absent = sorted(n for n, read in known.items() if read is not None and n not in inside)
    said = {"not read of its header": unread, "not in its header, so by default": absent}
    return [f"{what}: {', '.join(names)}" for what, names in said.items() if names]


def made_plain(model: Any) -> Any:
    """Take off a model what says that its weights are quantized: they are float32 now."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the reports of a new head and the progress bar; both are expected."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
