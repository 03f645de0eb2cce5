"""``python -m tests.campaigns.adapters``: odd adapters of PEFT as the beginning of a run.

One thing at a time is changed in the two files of an adapter: a key of the configuration, a tensor,
bytes of either. What is merged is what PEFT itself merges, to the bit, and each value is of the
type that PEFT's own configuration says; else a sentence names the folder.
"""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn

from fedraclora.errors import FedRacLoraError
from fedraclora.models.adapter import CONFIG, WEIGHTS, merge_adapter
from fedraclora.models.built import seeded
from fedraclora.rng import generator
from tests.campaigns.stored_models import LateError, Report, within

SECONDS = 20  # of one case
ODD: tuple[object, ...] = (
    *(None, True, False, 0, 1, 2, 3, -1, 10**9, 1.5, float("nan"), float("inf"), 1e308),
    *(
        "",
        "text",
        "0",
        "(",
        "all-linear",
        [],
        ["0"],
        ["4"],
        [0],
        [[0, 9**9]],
        {},
        {"0": 5},
        {"x": 2},
    ),
)
# What one file cannot contradict: another scale, or a kind of beginning that changes the base.
FREE = {"lora_alpha", "use_rslora", "alpha_pattern", "init_lora_weights"}


def net() -> nn.Module:
    """Draw a small model."""
    with seeded(0, "model"):
        return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 9), nn.Linear(9, 2))


def write(folder: Path) -> None:
    """Store an adapter of two ranks, with a layer that is saved whole."""
    config = LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=["0", "2"],
        rank_pattern={"2": 2},
        alpha_pattern={"2": 5},
        modules_to_save=["3"],
    )
    with seeded(1, "adapter"):
        adapted = get_peft_model(net(), config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name or "modules_to_save" in name:
                nn.init.normal_(parameter)
    adapted.save_pretrained(folder)


def cases(folder: Path, times: int) -> Iterator[tuple[str, str, Callable[[], object]]]:
    """Give changes: what, of which key of the configuration, and what makes it."""
    config, path = json.loads((folder / CONFIG).read_text()), folder / WEIGHTS
    tensors = load_file(path)

    def describe(said: object) -> None:
        (folder / CONFIG).write_text(json.dumps(said))

    for key in config:
        for odd in ODD:
            yield f"{key}={odd!r}", key, lambda k=key, v=odd: describe({**config, k: v})
        yield f"no {key}", key, lambda k=key: describe({n: v for n, v in config.items() if n != k})
    for key in ("lora_alfa", "layers"):
        yield f"{key} is not known", key, lambda k=key: describe({**config, k: 1})
    for odd in ([], "x", 5, None, [config]):
        yield f"the whole is {odd!r}", "", lambda v=odd: describe(v)
    changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "whole numbers": lambda t: t.round().long(),
        "truths": lambda t: t > 0,
        "complex": lambda t: t.to(torch.complex64),
        "halves": lambda t: t.half(),
        "nan": lambda t: t * torch.nan,
        "turned": lambda t: t.mT.contiguous() if t.dim() > 1 else t[:, None],
        "cut": lambda t: t[:-1],
        "longer": lambda t: torch.cat([t, t]),
        "a number": lambda t: t.sum(),
        "empty": lambda t: t[:0],
    }
    for name, tensor in tensors.items():
        for what, change in changes.items():
            found = {**tensors, name: change(tensor)}
            yield f"{name} {what}", "", lambda t=found: save_file(t, path)
        rest = {n: t for n, t in tensors.items() if n != name}
        yield f"no {name}", "", lambda t=rest: save_file(t, path)
        renamed = {**rest, name.replace("lora", "lroa").replace("3", "1"): tensor}
        yield f"{name} renamed", "", lambda t=renamed: save_file(t, path)
        more = {**tensors, f"{name}.more": tensor.clone()}
        yield f"{name} twice", "", lambda t=more: save_file(t, path)
    rng = generator(0, "adapters")
    for file in (path, folder / CONFIG):
        whole = file.read_bytes()
        head = int.from_bytes(whole[:8], "little") + 8 if file == path else len(whole)
        for _ in range(times):
            place, bit = int(rng.integers(head)), int(rng.integers(8))
            data = whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :]
            yield (
                f"{file.name}: bit {bit} of byte {place}",
                "bytes",
                lambda f=file, d=data: f.write_bytes(d),
            )
        for end in (0, 9, len(whole) // 2, len(whole) - 1):
            cut = whole[:end]
            yield f"{file.name} ends at {end}", "", lambda f=file, d=cut: f.write_bytes(d)


def of_peft(folder: Path) -> nn.Module:
    """Merge an adapter as PEFT does."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        merged: nn.Module = PeftModel.from_pretrained(net(), folder).merge_and_unload()
    return merged


def same(found: nn.Module, wanted: nn.Module) -> bool:
    """Compare two models to the bit."""
    left, right = found.state_dict(), wanted.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[n], right[n]) for n in left)


def verdict(folder: Path, key: str, whole: nn.Module) -> str:
    """Say what came of an odd adapter."""
    model = net()
    before = copy.deepcopy(model)
    try:
        with within(SECONDS):
            merge_adapter(model, folder)
    except FedRacLoraError as error:
        said = str(error)
        if str(folder) not in said or "\n" in said:
            return f"UNCLEAR: {said}"
        return "named" if same(model, before) else f"HALF: {said}"
    except LateError:
        return "LATE"
    except Exception:
        return f"TRACEBACK: {traceback.format_exc(limit=-3)}"
    return "harmless" if same(model, whole) else compared(folder, key, model)


def compared(folder: Path, key: str, model: nn.Module) -> str:
    """Compare another model than the whole adapter's with what PEFT makes of the odd one."""
    config = json.loads((folder / CONFIG).read_text())
    typed = type(config.get("use_rslora", False)) is bool
    fair = key in FREE | {"", "bytes"} and typed and same(model, of_peft(folder))
    return "as PEFT has it" if fair else "SILENT"


def campaign(every: int, folder: Path, times: int = 60) -> Report:
    """Change everything, one thing at a time; each so many-th case alone is tried."""
    report = Report()
    write(folder)
    whole, kept = of_peft(folder), folder.with_suffix(".kept")
    shutil.copytree(folder, kept)
    for number, (what, key, change) in enumerate(cases(folder, times)):
        if number % every == 0:
            change()
            report.add(what, verdict(folder, key, whole))
            shutil.copytree(kept, folder, dirs_exist_ok=True)
    return report


def main(words: Sequence[str] | None = None) -> int:
    """Run the campaign; the status is 1 where anything was merged in silence."""
    parser = argparse.ArgumentParser("python -m tests.campaigns.adapters", description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="each so many-th case alone (1)")
    parser.add_argument("--times", type=int, default=200, help="bits flipped in each file (200)")
    asked = parser.parse_args(words)
    with tempfile.TemporaryDirectory(prefix="adapters_") as name:
        report = campaign(asked.every, Path(name) / "adapter", asked.times)
    print("\n".join(report.wrong))
    print(f"{report.counts.total()} cases: {dict(report.counts)}; {len(report.wrong)} wrong")
    return int(bool(report.wrong))


if __name__ == "__main__":
    sys.exit(main())
