"""Server side: one file per method, the table of them, and the one Flower strategy (`base`)."""

from __future__ import annotations

from fedraclora.method import Method
from strategies.fed_rac_lora import FedRacLora
from strategies.fedavg import FedAvg
from strategies.fedavg_lora import FedAvgLora
from strategies.fedex_lora import FedExLora
from strategies.fedmomentum import FedMomentum
from strategies.flexlora import FlexLora
from strategies.flora_stacking import FloraStacking
from strategies.frlora import FrLora
from strategies.hetlora import HetLora
from strategies.lora_fair import LoraFair

METHODS: dict[str, type[Method]] = {
    "fed_rac_lora": FedRacLora,
    "ffa_lora": FedRacLora,
    "fedavg": FedAvg,
    "fedavg_lora": FedAvgLora,
    "fedex_lora": FedExLora,
    "fedmomentum": FedMomentum,
    "flexlora": FlexLora,
    "flora_stacking": FloraStacking,
    "frlora": FrLora,
    "hetlora": HetLora,
    "lora_fair": LoraFair,
    # The chain methods of one client are those above, under the names that the field gives them.
    "lora": FedAvgLora,
    "asymmetric_lora": FedRacLora,
    "cola": FedAvgLora,
    "relora": FedAvgLora,
    "rac_lora": FedRacLora,
    "full": FedAvg,
}
