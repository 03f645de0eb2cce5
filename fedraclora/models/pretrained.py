"""Load stored weights into a transformers model, and refuse incomplete or damaged ones.

transformers fills missing weights at random and ignores unknown ones. Here only a new head is drawn
at random, and the sizes in a file's configuration are checked against its weights before a model is
built.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from fedraclora.data.gguf_header import Header, TensorEntry, read_gguf_header
from fedraclora.data.locate import GGUF, checked_source, from_pretrained, refuse_code
from fedraclora.errors import ConfigError, DataError
from fedraclora.lowrank.layers import is_head
from fedraclora.models.built import found_head

NAMES_SHOWN = 3  # most names in a message


@dataclass(frozen=True)
class Source:
    """The location of stored weights.

    Attributes:
        path: The value of ``model.path``, for messages.
        place: The argument of ``from_pretrained``.
        local: Whether they are on this machine; otherwise they cannot be checked in advance.
    """

    path: str
    place: str
    local: bool

    @property
    def gguf(self) -> Header | None:
        """Return the header of a GGUF file; None for other files."""
        if not (self.local and self.place.endswith(GGUF)):
            return None
        return read_gguf_header(Path(self.place), f"model.path={self.path}")

    def refuse(
        self, what: str, do: str = "get it again, or name a model that is whole"
    ) -> DataError:
        """Build the error for damaged or wrong weights."""
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
    """Load stored weights in float32 into a model, and check that they are complete.

    Args:
        kind: An Auto class of transformers.
        path: ``model.path``.
        sha256: SHA-256 of the weights' file, or None.
        prepare: Changes the stored configuration to that of the model, which may have fewer layers.
        attention: As transformers names it.
        new_head: Whether to draw a head if none, or one with other outputs, is stored.
        **asked: Further keys of the configuration.

    Returns:
        The model, and the names of the parameters that were drawn.

    Raises:
        ConfigError: If the weights are quantized, and not in a GGUF file.
        DataError: If the weights are missing, damaged, incomplete, not finite, or from another
            file.
    """
    from transformers import AutoConfig

    source = Source(path, *checked_source(path, sha256))
    # otherwise one that the folder names, with code from the hub
    asked["attn_implementation"] = attention
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
    if head:  # an encoder's pooler belongs to the head, wherever it is
        head += (f"{model.base_model_prefix}.pooler",)
    drawn = _refuse_gaps(source, model, report, head, cut)
    if header is not None:
        _refuse_unread(source, model, drawn, header, cut, headless=new_head)
    _refuse_infinite(source, model)
    return made_plain(model), drawn


def _check_config(
    kind: Any, source: Source, stored: Mapping[str, TensorEntry], config: Any
) -> None:
    """Check a configuration against the stored weights: their number and shapes."""
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
    except Exception as error:  # each architecture has its own checks and errors
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
    # other gaps are reported once the model is built
    if body > 2 * (held := sum(t.count for t in stored.values())):
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


def _stored(source: Source, header: Header | None) -> Mapping[str, TensorEntry]:
    """List the stored tensors; empty if that requires loading them."""
    if header is not None:
        return header.tensors
    found: dict[str, TensorEntry] = {}
    for path in sorted(Path(source.place).glob("*.safetensors")) if source.local else ():
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118  it is no mapping
                    tensor = file.get_slice(name)
                    found[name] = TensorEntry(tuple(tensor.get_shape()), tensor.get_dtype())
        except (OSError, SafetensorError) as error:
            raise source.refuse(f"{path.name} is damaged ({error})") from error
    return found


def _refuse_gaps(
    source: Source, model: nn.Module, report: Any, head: tuple[str, ...], cut: set[str]
) -> tuple[str, ...]:
    """Refuse missing, additional or wrongly shaped weights; return the names of drawn ones.

    A head is drawn layer by layer; a partly stored layer is damaged.
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
        # Heads of other tasks are stored beside the body.
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
    """Refuse tensors of a GGUF file that transformers ignores.

    transformers does not report unknown tensors, whose values would be missing.
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
    """Refuse weights or outputs that are not finite."""
    for name, value in model.state_dict().items():
        if not bool(torch.isfinite(value).all()):
            raise source.refuse(f"{name} has values that are not finite")
    last = getattr(model.config, "eos_token_id", None)  # some heads look for this token
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
    """Count the layers in a configuration; 0 if it does not say."""
    return getattr(config, "num_hidden_layers", 0)


def _listed(names: list[str]) -> str:
    return ", ".join(names[:NAMES_SHOWN]) + (
        f" and {len(names) - NAMES_SHOWN} more" * (len(names) > NAMES_SHOWN)
    )


def assumed(header: Header) -> list[str]:
    """List differences between a GGUF file and the model: unread and missing keys."""
    from transformers.integrations.ggml import GGUF_CONFIG_MAPPING

    kind = str(header.fields.get("general.architecture"))
    known = GGUF_CONFIG_MAPPING.get(kind)
    if known is None:  # transformers has its own reader for these
        return []
    inside = {name.removeprefix(f"{kind}.") for name in header.fields}
    if "tokenizer.ggml.tokens" in inside:  # they are counted instead
        inside.add("vocab_size")
    others = ("general.", "tokenizer.", "split.", "attention.key_length", "attention.value_length")
    # The last two are sizes of heads, which the shapes of tensors contain.
    unread = sorted(n for n in inside if n not in known and not n.startswith(others))
    absent = sorted(n for n, read in known.items() if read is not None and n not in inside)
    keys = {"not read of its header": unread, "not in its header, so by default": absent}
    return [f"{what}: {', '.join(names)}" for what, names in keys.items() if names]


def made_plain(model: Any) -> Any:
    """Remove a model's marks of quantization: its weights are float32 now."""
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
        model.is_quantized, model.hf_quantizer = False, None
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silence expected output: reports of a new head, and progress bars."""
    from transformers import modeling_gguf_pytorch_utils as gguf
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    drawn: Any = gguf.tqdm  # the bar of GGUF files heeds no switch
    gguf.tqdm = partial(drawn, disable=True)
    try:
        yield
    finally:
        gguf.tqdm = drawn
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
