"""Several hosts of one machine: namespaces joined by a bridge."""

from fedraclora.experiments.hosts.bed import Bed, why_not
from fedraclora.experiments.hosts.host import Host
from fedraclora.experiments.hosts.namespaces import Process

__all__ = ["Bed", "Host", "Process", "why_not"]
