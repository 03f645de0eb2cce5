"""FedLoRU: its aggregation and ``merge_and_reinit`` on a convolution with a kernel of one.

Its file of the server is empty, so that an empty class stands in; ``einops`` is stood in for by
torch. Its command merges without new factors: the effective weights then jump by the product of the
factors, which stay. Ours begins them anew, as the code's other flag does.
"""

from __future__ import annotations

from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import nn

from fedraclora.experiments.authors.check import CodeCheck, Findings
from fedraclora.experiments.authors.code import Repository
from fedraclora.experiments.authors.toy import ALPHA, SIZES, M, N, R, Server, Worst, weight
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora

ROUNDS, CYCLE = 4, 2
FILES = tuple(f"src/algorithm/fedloru/{name}.py" for name in ("lorumodel", "client", "main"))
UNUSED = ("src", "einops", "fedloru.server")
PLACES = {"B": "encoder.loru_up.weight", "A": "encoder.loru_down.weight"}


def product(down: torch.Tensor, up: torch.Tensor, _: str) -> torch.Tensor:
    """Stand in for the one product that the code writes with einops."""
    return torch.einsum("rihw,oruv->oihw", down, up)


def compare(code: Repository) -> Findings:
    """Compare both factors after each round, and the weights after each merge."""
    ours, worst = Server(FedAvgLora(R, ALPHA, merge_every=CYCLE), SIZES), Worst()
    with (
        code.modules(*FILES, root="src/algorithm", unused=UNUSED) as [lorumodel, _, main],
        patch.object(lorumodel.einops, "einsum", product),
    ):
        base = nn.Sequential()
        base.add_module("encoder", nn.Conv2d(N, M, 1, bias=False))
        model = lorumodel.LoRUConv2dModel(base, R, ALPHA, target_modules=["encoder"]).double()
        layer = model.wrapped_model.encoder
        layer.weight.data = weight()[..., None, None]
        held = SimpleNamespace(server=SimpleNamespace(global_model=model), round=0)
        held.args = SimpleNamespace(algorithm="fedloru", dataset="toy")
        for number in range(1, ROUNDS + 1):
            replies = ours.replies()
            whole = model.state_dict()
            each = [
                whole | {f"wrapped_model.{PLACES[k]}": x[..., None, None] for k, x in r.items()}
                for r in replies
            ]
            clients = [SimpleNamespace(state_dict=lambda state=state: state) for state in each]
            held.clients = [SimpleNamespace(model=client) for client in clients]
            sizes = dict(enumerate(SIZES))
            main.FedLoRU._request_global_aggregate(held, [*sizes], sizes)  # noqa: SLF001
            if not number % CYCLE:
                model.merge_and_reinit()
            after = ours.close(replies)["w"]
            if not number % CYCLE:
                worst.add(W=(after, layer.weight.detach()[..., 0, 0]))
                continue
            for label, place in PLACES.items():
                theirs = model.state_dict()[f"wrapped_model.{place}"][..., 0, 0]
                worst.add(**{label: (ours.state.carried[f"w/{label}"], theirs)})
    return worst.found


CHECK = CodeCheck(
    "fedloru",
    "haemPark/fedloru_official",
    "219688b",
    f"the server's step and the merges, {ROUNDS} rounds",
    compare,
)
