"""Server side: one file per method, the table of them, and the one Flower strategy (`base`)."""

from __future__ import annotations

from fedraclora.method import Method
from strategies.fed_rac_lora import FedRacLora
from strategies.fedavg import FedAvg
from strategies.fedavg_lora import FedAvgLora

METHODS: dict[str, type[Method]] = {
    "fed_rac_lora": FedRacLora,
    "ffa_lora": FedRacLora,
    "fedavg": FedAvg,
    "fedavg_lora": FedAvgLora,
}
