"""A deployment on hosts of its own: what the campaign on networks does by the hundred, once."""

from __future__ import annotations

import time

import pytest

from tests.campaigns.faults.links import Fault
from tests.campaigns.faults.network import SMALL
from tests.campaigns.faults.trials import final_weights
from tests.common import summary_of
from tests.hosts import Bed
from tests.hosts.deployment import Deployment

WORDS = [
    *(word for word in SMALL if word.split("=")[0] not in {"clients", "cohort"}),
    *["clients=2", "cohort=2", "method=fedavg", "model.hidden=[256]"],
]


@pytest.mark.slow
def test_a_link_that_is_cut_in_the_middle_of_a_reply_changes_no_bit(beds: type[Bed]) -> None:
    with beds(3, rate="20mbit") as bed:
        deployment = Deployment(bed)
        run = deployment.begin([*WORDS, "output.progress=false", "engine.retries=0"])
        deployment.until(1)
        host = deployment.owners[1]
        fault = Fault("cut as its reply leaves", 1, host, 0.0, 2.0)
        fault.counters = host.sent(), host.received()
        while run.poll() is None:
            fault.look(len(deployment.rows()), 0.0, 0.0)
            time.sleep(0.01)
        assert run.returncode == 0, deployment.server.path("run.log").read_text()
        assert fault.round_ is not None
        assert [row["failures"] for row in deployment.rows()[1:]] == [[], [], []]
        digest = summary_of(deployment.server.path("there"))["weights_digest"]
    assert digest == final_weights(WORDS, None, clients=2)
