"""List the federated methods, one file each, in the table `METHODS`."""

from __future__ import annotations

from fedraclora.protocol.method import Method
from fedraclora.strategies.methods.bernoulli_lora import BernoulliLora
from fedraclora.strategies.methods.decomfl import DeComFl
from fedraclora.strategies.methods.fed_rac_lora import FedRacLora
from fedraclora.strategies.methods.fed_sb import FedSb
from fedraclora.strategies.methods.fedavg import FedAvg
from fedraclora.strategies.methods.fedavg_lora import FedAvgLora
from fedraclora.strategies.methods.fedex_lora import FedExLora
from fedraclora.strategies.methods.fedkrso import FedKrso
from fedraclora.strategies.methods.fedkseed import FedKSeed
from fedraclora.strategies.methods.fedmomentum import FedMomentum
from fedraclora.strategies.methods.fedrot_lora import FedRotLora
from fedraclora.strategies.methods.fedsa_lora import FedSaLora
from fedraclora.strategies.methods.fedsvd import FedSvd
from fedraclora.strategies.methods.ferret import Ferret
from fedraclora.strategies.methods.flexlora import FlexLora
from fedraclora.strategies.methods.flora_stacking import FloraStacking
from fedraclora.strategies.methods.frlora import FrLora
from fedraclora.strategies.methods.fslora import FsLora
from fedraclora.strategies.methods.galore_average import GaloreAverage
from fedraclora.strategies.methods.hetlora import HetLora
from fedraclora.strategies.methods.lora_fair import LoraFair
from fedraclora.strategies.methods.pool_rac_lora import PoolRacLora
from fedraclora.strategies.methods.ravan import Ravan
from fedraclora.strategies.methods.rolora import RoLora
from fedraclora.strategies.methods.slora import SLora
from fedraclora.strategies.methods.subspace_rac_lora import SubspaceRacLora
from fedraclora.strategies.methods.xgblora import XgbLora

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
    "fslora": FsLora,
    "galore_average": GaloreAverage,
    "hetlora": HetLora,
    "lora_fair": LoraFair,
    "pool_rac_lora": PoolRacLora,
    "ravan": Ravan,
    "rolora": RoLora,
    "slora": SLora,
    "subspace_rac_lora": SubspaceRacLora,
    "xgblora": XgbLora,
    # Settings of the methods above under names of their own.
    "fed_cola": FedAvgLora,
    "fed_relora": FedAvgLora,
    "fedloru": FedAvgLora,
    "fedslop": FedRacLora,
    # The sequential methods for one client are those above, under their names in the literature.
    "lora": FedAvgLora,
    "asymmetric_lora": FedRacLora,
    "cola": FedAvgLora,
    "relora": FedAvgLora,
    "rac_lora": FedRacLora,
    "full": FedAvg,
}
