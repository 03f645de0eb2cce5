"""The largest chunk of clients that a GPU holds, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fedraclora.experiments.bench.runs import opened, trainer_of
from fedraclora.experiments.bench.workloads import Case
from fedraclora.strategies.fed_rac_lora import FedRacLora
from fedraclora.training.memory import is_out_of_memory

MOST = 1 << 20


def largest(fits: Callable[[int], bool], most: int = MOST) -> int:
    """Find the largest number that fits, to within an eighth: doubling, then halving the gap.

    Args:
        fits: Whether a number does; one that is larger than one that does not is not tried.
        most: The largest to try.

    Returns:
        The number; 0 if not even 1 fits.

    Example:
        >>> largest(lambda n: n <= 1000)
        960
    """
    good, bad = 0, 1
    while bad <= most and fits(bad):
        good, bad = bad, 2 * bad
    while bad <= most and bad - good > max(1, good // 8):
        middle = (good + bad) // 2
        good, bad = (middle, bad) if fits(middle) else (good, middle)
    return good


def largest_chunk(case: Case, precision: str) -> int:
    """Train chunks of more and more clients of a workload until memory runs out."""
    method = FedRacLora(rank=case.workload.rank)
    trainer = trainer_of(case, method, precision=precision)()
    state, downlink = opened(method, trainer, case.workload.cohort)

    def fits(clients: int) -> bool:
        ids = torch.arange(clients) % case.task.train.num_clients
        try:
            trainer.train(state.base, downlink, ids, round_=1, rate_scale=1.0)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            return False
        finally:
            if case.device.type == "cuda":
                torch.cuda.empty_cache()
        return True

    return largest(fits)
