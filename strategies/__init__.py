"""Server side: one file per method, the table of them, and the one Flower strategy (`base`)."""

from __future__ import annotations

from fedraclora.protocol.method import Method
from strategies.bernoulli_lora import BernoulliLora
from strategies.fed_rac_lora import FedRacLora
from strategies.fed_sb import FedSb
from strategies.fedavg import FedAvg
from strategies.fedavg_lora import FedAvgLora
from strategies.fedex_lora import FedExLora
from strategies.fedkrso import FedKrso
from strategies.fedmomentum import FedMomentum
from strategies.fedrot_lora import FedRotLora
from strategies.fedsa_lora import FedSaLora
from strategies.fedsvd import FedSvd
from strategies.flexlora import FlexLora
from strategies.flora_stacking import FloraStacking
from strategies.frlora import FrLora
from strategies.galore_average import GaloreAverage
from strategies.hetlora import HetLora
from strategies.lora_fair import LoraFair
from strategies.pool_rac_lora import PoolRacLora
from strategies.ravan import Ravan
from strategies.rolora import RoLora
from strategies.slora import SLora
from strategies.subspace_rac_lora import SubspaceRacLora
from strategies.xgblora import XgbLora

METHODS: dict[str, type[Method]] = {
    "fed_rac_lora": FedRacLora,
    "ffa_lora": FedRacLora,
    "fedavg": FedAvg,
    "fedavg_lora": FedAvgLora,
    "bernoulli_lora": BernoulliLora,
    "fed_sb": FedSb,
    "fedex_lora": FedExLora,
    "fedkrso": FedKrso,
    "fedmomentum": FedMomentum,
    "fedrot_lora": FedRotLora,
    "fedsa_lora": FedSaLora,
    "fedsvd": FedSvd,
    "flexlora": FlexLora,
    "flora_stacking": FloraStacking,
    "frlora": FrLora,
    "galore_average": GaloreAverage,
    "hetlora": HetLora,
    "lora_fair": LoraFair,
    "pool_rac_lora": PoolRacLora,
    "ravan": Ravan,
    "rolora": RoLora,
    "slora": SLora,
    "subspace_rac_lora": SubspaceRacLora,
    "xgblora": XgbLora,
    # Settings of methods above that have names of their own.
    "fed_cola": FedAvgLora,
    "fed_relora": FedAvgLora,
    "fedslop": FedRacLora,
    # The chain methods of one client are those above, under the names that the field gives them.
    "lora": FedAvgLora,
    "asymmetric_lora": FedRacLora,
    "cola": FedAvgLora,
    "relora": FedAvgLora,
    "rac_lora": FedRacLora,
    "full": FedAvg,
}
