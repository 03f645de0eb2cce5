"""PiSSA: the script ``init_pissa.py``, which calls PEFT, on a model of one layer, beside our start.

The script reads a language model from a hub: it is given the layer in its place.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

from safetensors.torch import load_file
from torch import nn

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ALPHA, PLACE, SCALE, M, N, R, Server, Worst, weight
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora


class Saved(nn.Sequential):
    """A model of one layer w, which the script asks to save itself."""

    def save_pretrained(self, folder: str) -> None:
        """Leave it where it is."""


def compare(code: Repository) -> Findings:
    """Compare the product of the factors, and the residual weight."""
    model, worst = Saved(), Worst()
    layer = nn.Linear(N, M, bias=False)
    layer.weight.data = weight().float()
    model.add_module("w", layer)
    with tempfile.TemporaryDirectory() as folder:
        given: dict[str, Any] = {"base_model_path": "toy", "output_dir": folder, "bits": "fp32"}
        given |= {"lora_r": R, "lora_alpha": int(ALPHA), "target_modules": "w"}
        words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
        with (
            patch.object(sys, "argv", ["init_pissa.py", *words]),
            patch("transformers.AutoTokenizer.from_pretrained"),
            patch("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: model),
            code.modules("utils/init_pissa.py", root="utils") as [module],
        ):
            rest = module.peft_model.w.weight.detach()
        saved = load_file(Path(folder, "pissa_init", "adapter_model.safetensors"))
    B, A = (saved[f"{PLACE}lora_{label}.weight"] for label in ("B", "A"))
    ours = Server(FedAvgLora(R, ALPHA, init="pissa"))
    start = ours.open()
    worst.add(product=(start["B"] @ start["A"], B @ A))
    worst.add(W=(weight() - SCALE * start["B"] @ start["A"], rest))
    return worst.found


CHECK = CodeCheck(
    "method.init=pissa",
    "GraphPKU/PiSSA",
    "87f4db6",
    "the product of the factors, and the residual weight",
    compare,
)
