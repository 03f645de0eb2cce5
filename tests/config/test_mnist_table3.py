"""The study of the paper's MNIST table trains what the paper's counts of parameters say."""

from __future__ import annotations

import pytest

from fedraclora.commands.study.file import Study
from fedraclora.compose import CONF
from fedraclora.compose.overrides import composed
from fedraclora.config.run_config import from_plain
from fedraclora.protocol.plan import make_plan
from fedraclora.strategies.methods import METHODS

pytestmark = pytest.mark.usefixtures("users_hydra")

STUDY = Study.read(CONF.parent / "experiments" / "studies" / "mnist_table3.yaml")
# A: 784 + 64 + 64 numbers, B: 64 + 64 + 5.
COUNTS = {
    "LoRA, A drawn": 1045,
    "LoRA, B drawn": 1045,
    "COLA, A drawn": 1045,
    "COLA, B drawn": 1045,
    "AsymmLoRA, A drawn": 133,
    "AsymmLoRA, B drawn": 912,
    "RAC-LoRA, A drawn": 133,
    "RAC-LoRA, B drawn": 912,
    "FPFT": 54725,
}


def test_the_study_has_the_cells_of_the_table() -> None:
    assert set(STUDY.rows) == set(COUNTS) == set(STUDY.reported)


@pytest.mark.parametrize("row", COUNTS)
def test_a_cell_trains_as_many_numbers_as_the_paper_says(row: str) -> None:
    (job,) = STUDY.jobs("final", row, [2e-4])[:1]
    config = from_plain(composed(job.overrides), METHODS)
    built = config.model(shape=(784,), classes=5, seed=0)
    plan = make_plan(built.model, built.head, head_policy=config.head, bias_policy=config.bias)
    assert config.method.floats(plan)[0] == COUNTS[row]
    assert (config.clients, config.clients_per_round, config.local.batch_size) == (1, 1, 128)
    assert (config.local.optimizer, config.local.lr, config.stop.patience) == ("adamw", 2e-4, 10)
