"""Rounds and uplink to a given accuracy, by rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from fedraclora.experiments.theory.verdict import Judged

SERIES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Slowdown:
    """One problem at several ranks, the smallest first; ranks that did not get there are left out.

    Attributes:
        panel: Of the cases.
        accuracy: Gap that is left, over the first, in the mean over seeds.
        shares: r / dim.
        rounds: Until the mean gap is that small.
        uplink: Bytes that all clients sent by then.
    """

    panel: str
    accuracy: float
    shares: list[float]
    rounds: list[int]
    uplink: list[float]


def slowdowns(judged: Sequence[Judged]) -> list[Slowdown]:
    """Read rounds and uplink to an accuracy off the mean gaps."""
    found = []
    for panel, accuracy in SERIES.items():
        shares, rounds, uplink = [], [], []
        sides = {"right", "left"} if panel.endswith("left") else {"right"}
        cases = [j for j in judged if j.case.panel == panel and j.case.side in sides]
        for j in sorted(cases, key=lambda j: j.descent.given.lambda_min):
            there = np.flatnonzero(j.gaps <= accuracy * j.gaps[0])
            if there.size:
                shares.append(j.descent.given.lambda_min)
                rounds.append(int(there[0]))
                uplink.append(float(j.uplink[there[0]]))
        found.append(Slowdown(panel, accuracy, shares, rounds, uplink))
    return found
