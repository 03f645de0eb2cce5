"""Say in a sentence what the rows of a comparison gain or lose beside its reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from fedraclora.commands.compare.table import shown_number
from fedraclora.commands.run_files import Group
from fedraclora.evaluation.metrics import higher_is_better
from fedraclora.run.ledger import number

LEVEL = 2  # standard errors within which a difference is none
SAME = 0.02  # of the bytes, within which they are the same


def outcome_sentence(
    records: Sequence[Mapping[str, object]], reference: str, groups: Sequence[Group]
) -> str:
    """Write the sentence, from the numbers of the table.

    Args:
        records: Of the table.
        reference: The label of the row that the others are held against.
        groups: The runs, in the order in which rows are told.
    """
    by_label = {str(record["label"]): record for record in records}
    held = by_label[reference]
    metric = str(held["metric"])
    higher = higher_is_better(
        metric, [name for g in groups for run in g.runs for name in run.lower]
    )
    others = [by_label[group.label] for group in groups if group.label != reference]
    parts = [_part(record, held, higher=higher) for record in others]
    own = f"{metric} {number(held, 'metric_mean'):.4f}, {shown_number(held, 'traffic_mb')} MB"
    text = f"Beside {reference} ({own} both ways): {'; '.join(parts)}." if parts else f"{own}."
    alone = all(len(group.runs) < 2 for group in groups)
    return f"{text} Of one seed: a small difference may be luck (seeds=3)." if alone else text


def _part(record: Mapping[str, object], held: Mapping[str, object], *, higher: bool) -> str:
    mean, difference = number(record, "metric_mean"), number(record, "difference")
    error = number(record, "difference_error")
    if not math.isfinite(mean):
        return f"{record['label']} {record['state'] or 'was not measured'}"
    how = f"{abs(difference):.4f} {'better' if (difference > 0) == higher else 'worse'}"
    if difference == 0 or (math.isfinite(error) and abs(difference) <= LEVEL * error):
        how = f"level with it ({difference:+.4f} ± {error:.2g})" if difference else "level with it"
    there = number(record, "target_traffic_mb")
    soon = f", and is as good after {shown_number(record, 'target_traffic_mb')} MB"
    text = f"{record['label']} ends at {mean:.4f}, {how}, with {_bytes(record, held)}"
    return text + soon if math.isfinite(there) else text


def _bytes(record: Mapping[str, object], held: Mapping[str, object]) -> str:
    share = number(record, "traffic_mb") / number(held, "traffic_mb")
    sent = f"({shown_number(record, 'traffic_mb')} MB)"
    if abs(share - 1) <= SAME:
        return f"the same bytes {sent}"
    return (
        f"{100 * share:.3g} % of the bytes {sent}"
        if share < 1
        else f"{share:.3g} times the bytes {sent}"
    )
