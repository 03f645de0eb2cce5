"""Certificates and keys of a deployment are renewed while its run goes on."""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import pytest

from fedraclora.engines.deploy.federation import FederationFiles, Wishes
from fedraclora.engines.deploy.local import make_node_key
from fedraclora.experiments.faults.links import reset
from fedraclora.experiments.faults.network import SMALL
from fedraclora.experiments.faults.trials import final_weights
from fedraclora.experiments.hosts import Bed
from fedraclora.experiments.hosts.deployment import COMMAND, ENVIRONMENT, Deployment, wait_for
from fedraclora.experiments.hosts.host import HOME
from tests.common import summary_of

FAKETIME = [*Path("/usr/lib").glob("*/faketime/libfaketime.so.1")]
DAY, LEFT = 86_400, 60  # seconds; how long a certificate is still valid
OTHERS = {"clients", "clients_per_round", "rounds"}
WORDS = [
    *(word for word in SMALL if word.split("=")[0] not in OTHERS),
    *["clients=2", "clients_per_round=2", "method=fedavg", "rounds=12"],
]
MORE = ["output.progress=false", "engine.wait=300"]


def two_days(seconds: int) -> dict[str, str]:
    """The environment in which a certificate of two days ends after so many seconds."""
    moved = f"{seconds - 2 * DAY:+d}"
    return {"DAYS": "2", "LD_PRELOAD": str(FAKETIME[0]), "FAKETIME": moved}


class Trial:
    """A run of two nodes behind a proxy, which stands still while nothing is tried."""

    def __init__(self, bed: Bed) -> None:
        self.deployment = Deployment(bed, proxy=True)
        self.folder = self.deployment.server.path("flower")
        self.pause(wanted=True)
        self.run = self.deployment.begin([*WORDS, *MORE])

    def pause(self, *, wanted: bool) -> None:
        """Have the run wait before its next round, or go on."""
        files = FederationFiles.of({"FLWR_HOME": str(self.folder)})
        assert files is not None
        files.wish(Wishes(paused=wanted))

    def go_on(self, rounds: int = 1) -> None:
        """Break all connections of the nodes, which connect anew, and wait for further rounds."""
        for owner in self.deployment.owners:
            reset(owner)
        done = len(self.deployment.rows()) - 1
        self.pause(wanted=False)
        self.deployment.until(max(done, 0) + rounds)
        self.pause(wanted=True)

    def status(self) -> str:
        """What an operator is told."""
        line = [*COMMAND, "federation", "status", "connection=house"]
        return self.deployment.server.run(line, env=ENVIRONMENT, timeout=120)

    def renew_key(self, k: int) -> None:
        """Give a node another key, as the page says."""
        owner, node = self.deployment.owners[k], self.deployment.nodes[k]
        make_node_key(owner.path("new"))
        shutil.copy(owner.path("new.pub"), self.deployment.keys / "new.pub")
        line = f"flwr supernode register {HOME}/keys/new.pub house"
        self.deployment.server.run(line.split(), env=ENVIRONMENT, timeout=120)
        node.terminate()
        node.wait()
        owner.path("new").replace(owner.path("node"))
        self.deployment.nodes[k] = self.deployment.start_node(k)


@pytest.mark.long
@pytest.mark.skipif(not FAKETIME, reason="needs libfaketime")
def test_certificates_and_keys_are_renewed_while_a_run_goes_on(beds: type[Bed]) -> None:
    with beds(3) as bed:
        trial = Trial(bed)
        deployment, nodes = trial.deployment, [*trial.deployment.nodes]
        trial.go_on(2)
        said = trial.status()
        assert "expire" not in said
        assert all(owner.name in said for owner in deployment.owners)

        deployment.renew_certificate(two_days(LEFT))
        end = time.time() + LEFT
        assert "server.pem expires" in trial.status()
        trial.go_on()
        deployment.renew_certificate({"DAYS": "200"})
        time.sleep(max(0.0, end + 1 - time.time()))
        trial.go_on()
        assert "expire" not in trial.status()
        trial.renew_key(1)
        trial.go_on()
        assert deployment.nodes[0] is nodes[0]  # it has not ended
        assert not any(row["failures"] for row in deployment.rows()[1:])

        nodes = [*deployment.nodes]
        deployment.renew_certificate(two_days(-DAY))
        for host in deployment.owners:
            reset(host)
        logs = [host.path("node.log") for host in deployment.owners]
        wait_for(lambda: all("expired" in log.read_text() for log in logs), "the owners are told")
        assert "server.pem has expired" in trial.status()
        deployment.renew_certificate({})
        trial.pause(wanted=False)
        deployment.until(12)
        trial.run.wait(60)
        assert deployment.nodes == nodes  # nobody had to start one again
        assert trial.run.returncode == 0, deployment.server.path("run.log").read_text()
        digest = summary_of(deployment.server.path("there"))["weights_digest"]
    assert digest == final_weights(WORDS, None, clients=2)
