"""``fedraclora tune``: find the Pareto-optimal settings of a task in metric and bytes.

    fedraclora tune [tune.KEY=VALUE ...] [OVERRIDE ...]

The other words are those of simulate: the task, and what is not to be tuned. What is tried, within
which budget, and what never is stands in conf/tune.yaml. Everything is kept in output.dir
(runs/tune where none is named): the same command goes on, and several at a time share the work.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedraclora.commands.watch import watched
from fedraclora.compose import CONF
from fedraclora.compose.overrides import composed, is_override, key_of
from fedraclora.tuning.task import tune_folder, tune_task


def main(words: Sequence[str]) -> None:
    """Tune what the words ask for."""
    if {"-h", "--help"} & {*words}:
        print(__doc__, (CONF / "tune.yaml").read_text(encoding="utf-8"), sep="\n", end="")
        return
    own = [word for word in words if word.startswith("tune.")]
    rest = [word for word in words if word not in own]
    plain = composed(rest)
    with watched(tune_folder(plain)):
        tune_task(plain, {key_of(word) for word in rest if is_override(word)}, own)
