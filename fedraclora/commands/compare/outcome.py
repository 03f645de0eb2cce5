"""Summarize a comparison in one sentence: the differences of all rows to the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedraclora.commands.compare.table import shown_number
from fedraclora.commands.run_files import Group
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.run.ledger import number

LEVEL = 2  # standard errors; a smaller difference is not decided
SAME = 0.02  # relative difference of bytes that counts as none


def outcome_sentence(
    records: Sequence[Mapping[str, object]], reference: str, groups: Sequence[Group]
) -> str:
    """Write the summary from the numbers of the table.

    Args:
        records: Records of the table.
        reference: The label of the reference row.
        groups: The runs, in the order of the sentence.
    """
    by_label = {str(record["label"]): record for record in records}
    base = by_label[reference]
    metric = str(base["metric"])
    higher = higher_is_better(
        metric, [name for g in groups for run in g.runs for name in run.lower]
    )
    others = [by_label[group.label] for group in groups if group.label != reference]
    parts = [_part(record, base, higher=higher) for record in others]
    own = f"{metric} {number(base, 'metric_mean'):.4f}, {shown_number(base, 'traffic_mb')} MB"
    text = f"Beside {reference} ({own} both ways): {'; '.join(parts)}." if parts else f"{own}."
    single_seeds = all(len(group.runs) < 2 for group in groups)
    return (
        f"{text} Of one seed: a small difference may be luck (seeds=3)." if single_seeds else text
    )


def _part(record: Mapping[str, object], base: Mapping[str, object], *, higher: bool) -> str:
    mean, difference = number(record, "metric_mean"), number(record, "difference")
    error = number(record, "difference_error")
    if not math.isfinite(mean):
        return f"{record['label']} {record['state'] or 'was not measured'}"
    difference_text = f"{abs(difference):.4f} {'better' if (difference > 0) == higher else 'worse'}"
    if difference == 0:
        difference_text = "equal to it"
    elif math.isfinite(error) and abs(difference) <= LEVEL * error:
        difference_text = (
            f"within {LEVEL} standard errors of it ({difference:+.4f} ± {error:.2g}, not decided)"
        )
    return (
        f"{record['label']} ends at {mean:.4f}, {difference_text}, with {_bytes(record, base)}"
        f"{_reached(record)}"
    )


def _reached(record: Mapping[str, object]) -> str:
    """Say after how many bytes the row was as good as the reference, and in how many runs."""
    if not math.isfinite(number(record, "target_traffic_mb")):
        return ""
    amount = f"as good after {shown_number(record, 'target_traffic_mb')} MB"
    reached, runs = (int(number(record, key)) for key in ("target_reached", "seeds"))
    return f", and is {amount}" if reached == runs else f"; {reached} of {runs} runs are {amount}"


def _bytes(record: Mapping[str, object], base: Mapping[str, object]) -> str:
    share = number(record, "traffic_mb") / number(base, "traffic_mb")
    amount = f"({shown_number(record, 'traffic_mb')} MB)"
    if abs(share - 1) <= SAME:
        return f"the same bytes {amount}"
    return (
        f"{100 * share:.3g} % of the bytes {amount}"
        if share < 1
        else f"{share:.3g} times the bytes {amount}"
    )
