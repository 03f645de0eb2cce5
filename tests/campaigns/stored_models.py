"""``python -m tests.campaigns.stored_models``: damage to GGUF files and to folders of models.

Small models are stored once. Then one thing at a time is damaged in a copy: tensors that are
missing, too many, of another shape or not finite; keys of a header or a configuration; bytes of
either. What is built is the whole model to the bit, or an error names the file; where a key that
no file can contradict has changed (a base of frequencies, say) what is built may be another.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from fedraclora.data.gguf_header import read_gguf_header
from fedraclora.errors import FedRacLoraError
from fedraclora.models.built import seeded
from fedraclora.models.hf import build_causal_lm, build_hf
from fedraclora.models.pretrained import assumed
from fedraclora.rng import generator

SECONDS, BYTES = 20, 8 << 30  # of one case; of memory
NUMBERS: tuple[object, ...] = (0, 1, 3, 7, 64, 100000, 2**31 - 1)
FLOATS = (float("nan"), float("inf"), 0.0, -1.0, 3.0)
ODD: tuple[object, ...] = (None, True, "x", "", [], {}, [1, 2], -1, 0, 10**6, 1.5, float("nan"))
# What a file cannot contradict: a value that may be another's, too.
FREE = ("freq_base", "epsilon", "context_length", "general.", "tokenizer.")
SIZES = {"vocab_size": 20, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
         "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": None}  # fmt: skip
Rng = np.random.Generator
Tensors = dict[str, torch.Tensor]


@dataclass
class Report:
    """Counts of verdicts, and each case that went wrong."""

    counts: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)

    def add(self, case: str, said: str) -> None:
        """Add a case."""
        word = said.partition(":")[0]
        self.counts[word] += 1
        if word.isupper():
            self.wrong.append(f"{case}: {said}")


@dataclass(frozen=True)
class Specimen:
    """A stored model, what builds it, and the outputs and weights of the whole one."""

    path: Path
    build: Callable[[Path], nn.Module]
    wanted: Tensors


class LateError(Exception):
    """A case took too long."""


def llama(*, tied: bool) -> nn.Module:
    """Draw a small Llama."""
    sizes = {**SIZES, "num_key_value_heads": 2, "rope_theta": 5e4, "rms_norm_eps": 1e-5}
    ends = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.LlamaConfig(**sizes, **ends, tie_word_embeddings=tied)
    with seeded(0, "model"):
        return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    """Draw a small BERT that has no head."""
    with seeded(0, "model"):
        return transformers.BertModel(transformers.BertConfig(**SIZES))


def gguf_of(model: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Describe a Llama as GGUF does: keys and tensors."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    keys = {
        "llama.vocab_size": config.vocab_size,
        "llama.context_length": config.max_position_embeddings,
        "llama.embedding_length": config.hidden_size,
        "llama.block_count": config.num_hidden_layers,
        "llama.feed_forward_length": config.intermediate_size,
        "llama.attention.head_count": config.num_attention_heads,
        "llama.attention.head_count_kv": config.num_key_value_heads,
        "llama.rope.dimension_count": head,
        "llama.rope.freq_base": 5e4,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
    }
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tensors = {
        str(names.get_name(name, try_suffixes=(".weight",))): p.detach().numpy()
        for name, p in model.named_parameters()
    }
    return keys, tensors


def write_gguf(path: Path, keys: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """Write a GGUF file of keys and tensors, whatever they are."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in keys.items():
        kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
    writer.add_tokenizer_model("no_vocab")
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def changed(value: np.ndarray, how: str, rng: Rng) -> np.ndarray:
    """Damage a tensor."""
    value = value.copy()
    if how == "cut":
        return value[: max(1, len(value) // 2)]
    if how == "turned":
        return value[..., None] if value.ndim < 2 else np.ascontiguousarray(value.T)
    if how == "whole numbers":
        return value.astype(np.int32)
    value.reshape(-1)[int(rng.integers(value.size))] = np.nan if how == "nan" else np.inf
    return value


HOWS = ("missing", "cut", "turned", "nan", "inf", "whole numbers", "renamed", "twice")


def damaged(tensors: dict[str, np.ndarray], name: str, how: str, rng: Rng) -> dict[str, np.ndarray]:
    """Damage one of many tensors."""
    rest = {n: t for n, t in tensors.items() if n != name}
    if how == "missing":
        return rest
    if how == "renamed":
        return {**rest, name.replace("weight", "wieght"): tensors[name]}
    if how == "twice":
        return {**tensors, name.replace("weight", "other.weight"): tensors[name]}
    return {n: changed(t, how, rng) if n == name else t for n, t in tensors.items()}


def square(value: np.ndarray) -> bool:
    """Tell whether a matrix has no other shape when it is turned."""
    return value.ndim == 2 and value.shape[0] == value.shape[1]


def gguf_cases(path: Path, model: nn.Module, seed: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Give damages of a GGUF file; each writes it anew."""
    keys, tensors = gguf_of(model)
    rng = generator(seed, "gguf", str(len(tensors)))
    for name in tensors:
        for how in HOWS:
            # A file without an output layer says that it is tied, and what is square may be turned.
            if (how == "turned" and square(tensors[name])) or (how, name) == (
                "missing",
                "output.weight",
            ):
                continue
            found = damaged(tensors, name, how, rng)
            yield f"{name} {how}", lambda t=found: write_gguf(path, keys, t)
    yield "no tensors", lambda: write_gguf(path, keys, {})
    for key, value in keys.items():
        others: tuple[object, ...] = (*(NUMBERS if isinstance(value, int) else FLOATS), "x", True)
        for other in (v for v in others if v != value):
            yield f"{key}={other}", lambda k=key, v=other: write_gguf(path, {**keys, k: v}, tensors)
        rest = {k: v for k, v in keys.items() if k != key}
        yield f"no {key}", lambda r=rest: write_gguf(path, r, tensors)
    more = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    yield "scaled", lambda: write_gguf(path, {**keys, **more}, tensors)
    write_gguf(path, keys, tensors)
    whole = path.read_bytes()
    header = len(whole) - sum(-(-t.nbytes // 32) * 32 for t in tensors.values())
    yield from byte_cases(path, whole, header, rng)


def byte_cases(
    path: Path, whole: bytes, header: int, rng: Rng, times: int = 150
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Give damages of bytes: bits of the header, numbers in it, ends of the file."""
    for _ in range(times):
        place, bit = int(rng.integers(header)), int(rng.integers(8))
        data = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
        yield f"bit {bit} of byte {place}", lambda d=data: path.write_bytes(d) and None
        number = int(rng.choice([0, 1, 2**31, 2**40, 2**63]))
        place = min(place - place % 4, header - 8)
        data = whole[:place] + number.to_bytes(8, "little") + whole[place + 8 :]
        yield f"{number} at byte {place}", lambda d=data: path.write_bytes(d) and None
    for end in (0, 3, 8, 24, header // 2, header, (header + len(whole)) // 2, len(whole) - 1):
        yield f"cut at {end}", lambda e=end: path.write_bytes(whole[:e]) and None
    yield "longer", lambda: path.write_bytes(whole + bytes(64)) and None


def folder_cases(folder: Path, seed: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Give damages of a folder of transformers."""
    path, place = folder / "model.safetensors", folder / "config.json"
    whole, text = path.read_bytes(), place.read_text()
    tensors = {n: t.numpy() for n, t in load_file(path).items()}
    rng = generator(seed, "folder", folder.name)

    def write(found: dict[str, np.ndarray]) -> None:
        save_file({n: torch.from_numpy(t.copy()) for n, t in found.items()}, path, {"format": "pt"})

    def describe(config: object) -> None:
        path.write_bytes(whole)
        place.write_text(json.dumps(config))

    for name, value in tensors.items():
        for how in HOWS:
            # Another head is drawn anew where it has other outputs, or none.
            if name.startswith("classifier") or (how == "turned" and square(value)):
                continue
            found = damaged(tensors, name, how, rng)
            yield f"{name} {how}", lambda t=found: write(t)
    yield "no tensors", lambda: write({})
    yield from byte_cases(path, whole, int.from_bytes(whole[:8], "little") + 8, rng, 40)
    config = json.loads(text)
    for key, value in config.items():
        for other in (v for v in ODD if v != value):
            yield f"{key}={other!r}", lambda k=key, v=other: describe({**config, k: v})
        yield f"no {key}", lambda k=key: describe({n: v for n, v in config.items() if n != k})
    for end in (0, 1, len(text) // 2):
        yield f"config cut at {end}", lambda e=end: place.write_text(text[:e]) and None
    yield "a list", lambda: describe([config])


def causal(path: Path) -> nn.Module:
    """Build a causal model of what is stored."""
    return build_causal_lm(shape=(), classes=20, seed=0, path=str(path)).model


def classes(path: Path) -> nn.Module:
    """Build a classifier of what is stored, with a new head."""
    return build_hf(shape=(), classes=3, seed=0, path=str(path)).model


def tensors_of(model: nn.Module) -> Tensors:
    """Collect what a model is: parameters, buffers, and outputs."""
    found = {n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()]}
    with torch.no_grad():
        found["outputs"] = model.eval()(input_ids=torch.arange(6)[None]).logits
    return found


def same(found: Tensors, wanted: Tensors) -> bool:
    """Compare what two models are, to the bit."""
    return found.keys() == wanted.keys() and all(torch.equal(found[n], wanted[n]) for n in wanted)


def specimens(root: Path) -> Iterator[tuple[Specimen, Iterator[tuple[str, Callable[[], None]]]]]:
    """Store the models; give each with its damages."""
    for name, tied in (("tied", True), ("untied", False)):
        path, model = root / f"{name}.gguf", llama(tied=tied)
        write_gguf(path, *gguf_of(model))
        for build in (causal, classes) if tied else (causal,):
            whole = Specimen(path, build, tensors_of(build(path)))
            yield whole, gguf_cases(path, model, int(tied))
            write_gguf(path, *gguf_of(model))
    for name, model, build in (("llama", llama(tied=False), causal), ("bert", bert(), classes)):
        model.save_pretrained(root / name)
        yield (
            Specimen(root / name, build, tensors_of(build(root / name))),
            folder_cases(root / name, 0),
        )


def verdict(specimen: Specimen, case: str, before: list[str]) -> str:
    """Say what came of damage: named, harmless, another model that may be, or what should not."""
    try:
        with contextlib.redirect_stderr(io.StringIO()), within(SECONDS):
            found = tensors_of(specimen.build(specimen.path))
    except FedRacLoraError as error:
        said = str(error)
        return "named" if specimen.path.name in said and "\n" not in said else f"UNCLEAR: {said}"
    except LateError:
        return "LATE"
    except Exception:
        return f"TRACEBACK: {traceback.format_exc(limit=-3)}"
    if same(found, specimen.wanted):
        return "harmless"
    if not specimen.path.is_dir() and assumed(read_gguf_header(specimen.path, "path")) != before:
        return "noted"
    return "another" if is_free(specimen.path, case) else "SILENT"


_WHOLE: dict[str, dict[str, object]] = {}


def is_free(path: Path, case: str) -> bool:
    """Tell whether what has changed is nothing that the file can contradict."""
    if path.is_dir():  # a configuration of the right kind is one of another model
        return "=" in case or case.startswith(("no ", "config"))
    fields = read_gguf_header(path, "path").fields
    whole = _WHOLE[path.name]
    apart = {k for k in fields.keys() | whole.keys() if fields.get(k) != whole.get(k)}
    return bool(apart) and all(any(word in key for word in FREE) for key in apart)


@contextlib.contextmanager
def within(seconds: int) -> Iterator[None]:
    """Raise where what is done inside takes longer."""

    def late(*_: object) -> None:
        raise LateError

    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def campaign(every: int, root: Path, kinds: Sequence[str] = ()) -> Report:
    """Damage every model.

    Args:
        every: Take each so many-th case alone.
        root: An empty folder.
        kinds: Names of what is stored; empty: all.
    """
    report = Report()
    for specimen, cases in specimens(root):
        if kinds and specimen.path.name not in kinds:
            continue
        before: list[str] = []
        if not specimen.path.is_dir():
            header = read_gguf_header(specimen.path, "path")
            before, _WHOLE[specimen.path.name] = assumed(header), dict(header.fields)
        kept = specimen.path.with_suffix(".kept")
        copy = shutil.copytree if specimen.path.is_dir() else shutil.copyfile
        copy(specimen.path, kept)
        for number, (case, harm) in enumerate(cases):
            if number % every == 0:
                harm()
                name = f"{specimen.path.name}, {specimen.build.__name__}: {case}"
                report.add(name, verdict(specimen, case, before))
                if specimen.path.is_dir():
                    shutil.rmtree(specimen.path)
                copy(kept, specimen.path)
    return report


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 where anything was accepted in silence."""
    parser = argparse.ArgumentParser("python -m tests.campaigns.stored_models", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="each so many-th case alone (1)")
    parser.add_argument(
        "--kinds", nargs="*", default=(), help="tied.gguf, untied.gguf, llama, bert"
    )
    asked = parser.parse_args(words)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    with tempfile.TemporaryDirectory(prefix="stored_models_") as name:
        report = campaign(asked.every, Path(name), asked.kinds)
    print("\n".join(report.wrong))
    print(f"{report.counts.total()} cases: {dict(report.counts)}; {len(report.wrong)} wrong")
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
