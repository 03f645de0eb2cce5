"""A deployment on hosts of its own: what the campaign on networks does by the hundred, once."""

from __future__ import annotations

import time

import pytest

from fedraclora.engines.deploy.node_registry import PATIENCE
from fedraclora.experiments.faults.links import HostFault
from fedraclora.experiments.faults.network import SMALL
from fedraclora.experiments.faults.trials import final_weights
from fedraclora.experiments.hosts import Bed
from fedraclora.experiments.hosts.deployment import Deployment, wait_for
from tests.common import summary_of

WORDS = [
    *(word for word in SMALL if word.split("=")[0] not in {"clients", "cohort"}),
    *["clients=2", "clients_per_round=2", "method=fedavg", "model.hidden=[256]"],
]


@pytest.mark.long
def test_a_link_that_is_cut_in_the_middle_of_a_reply_changes_no_bit(beds: type[Bed]) -> None:
    with beds(3, rate="20mbit") as bed:
        deployment = Deployment(bed)
        run = deployment.begin([*WORDS, "output.progress=false", "engine.retries=0"])
        deployment.until(1)
        host = deployment.owners[1]
        fault = HostFault("cut as its reply leaves", 1, host, 0.0, 2.0)
        fault.counters = host.sent(), host.received()
        while run.poll() is None:
            fault.look(len(deployment.rows()), 0.0, 0.0)
            time.sleep(0.01)
        assert run.returncode == 0, deployment.server.path("run.log").read_text()
        assert fault.round_ is not None
        assert [row["failures"] for row in deployment.rows()[1:]] == [[], [], []]
        digest = summary_of(deployment.server.path("there"))["weights_digest"]
    assert digest == final_weights(WORDS, None, clients=2)


@pytest.mark.long
def test_after_the_host_of_the_superlink_died_a_run_goes_on_with_all_nodes(beds: type[Bed]) -> None:
    """Nobody restarts a node by hand: an answer that a dead SuperLink took is asked for again."""
    words = [*WORDS, "rounds=6"]
    with beds(3, rate="20mbit") as bed:
        deployment = Deployment(bed)
        deployment.begin([*words, "output.progress=false", "output.checkpoint_every=1"])
        deployment.until(2)
        deployment.server.cut()
        deployment.server.kill()
        deployment.server.heal()
        deployment.link = deployment.start_link()
        run = deployment.begin([], resume=True)
        wait_for(lambda: deployment.supervise() or run.poll() is not None, "the end of the run")
        assert run.returncode == 0, deployment.server.path("run.log").read_text()
        done = deployment.rows()[1:]
        assert [row["failures"] for row in done] == [[]] * 6
        assert all(sum(row["seconds"].values()) < PATIENCE for row in done[-2:])
        digest = summary_of(deployment.server.path("there"))["weights_digest"]
    assert digest == final_weights(words, None, clients=2)
