"""Several hosts of one machine: namespaces joined by a bridge, for tests."""

from tests.hosts.bed import Bed, why_not
from tests.hosts.host import Host, Process

__all__ = ["Bed", "Host", "Process", "why_not"]
