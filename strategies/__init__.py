"""Server side: one file per method, the table of them, and the one round loop (`base`)."""

from __future__ import annotations

from fedraclora.protocol.method import Method
from fedraclora.strategies.bernoulli_lora import BernoulliLora
from fedraclora.strategies.decomfl import DeComFl
from fedraclora.strategies.fed_rac_lora import FedRacLora
from fedraclora.strategies.fed_sb import FedSb
from fedraclora.strategies.fedavg import FedAvg
from fedraclora.strategies.fedavg_lora import FedAvgLora
from fedraclora.strategies.fedex_lora import FedExLora
from fedraclora.strategies.fedkrso import FedKrso
from fedraclora.strategies.fedkseed import FedKSeed
from fedraclora.strategies.fedmomentum import FedMomentum
from fedraclora.strategies.fedrot_lora import FedRotLora
from fedraclora.strategies.fedsa_lora import FedSaLora
from fedraclora.strategies.fedsvd import FedSvd
from fedraclora.strategies.ferret import Ferret
from fedraclora.strategies.flexlora import FlexLora
from fedraclora.strategies.flora_stacking import FloraStacking
from fedraclora.strategies.frlora import FrLora
from fedraclora.strategies.galore_average import GaloreAverage
from fedraclora.strategies.hetlora import HetLora
from fedraclora.strategies.lora_fair import LoraFair
from fedraclora.strategies.pool_rac_lora import PoolRacLora
from fedraclora.strategies.ravan import Ravan
from fedraclora.strategies.rolora import RoLora
from fedraclora.strategies.slora import SLora
from fedraclora.strategies.subspace_rac_lora import SubspaceRacLora
from fedraclora.strategies.xgblora import XgbLora

METHODS: dict[str, type[Method]] = {
    "fed_rac_lora": FedRacLora,
    "ffa_lora": FedRacLora,
    "fedavg": FedAvg,
    "fedavg_lora": FedAvgLora,
    "bernoulli_lora": BernoulliLora,
    "decomfl": DeComFl,
    "fed_sb": FedSb,
    "fedex_lora": FedExLora,
    "fedkrso": FedKrso,
    "fedkseed": FedKSeed,
    "fedmomentum": FedMomentum,
    "ferret": Ferret,
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
