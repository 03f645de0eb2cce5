"""``fedraclora tune``: find the Pareto-optimal settings of a task in metric and bytes.

    fedraclora tune [tune.KEY=VALUE ...] [OVERRIDE ...]

The overrides are those of simulate: the task, and the settings that stay fixed. conf/tune.yaml
defines the search space and the budget. Everything is stored in output.dir (default: runs/tune):
the same command resumes the search, and several processes can share it.
"""

from __future__ import annotations

from collections.abc import Sequence

from fedraclora.commands.watch import watched
from fedraclora.compose import CONF
from fedraclora.compose.overrides import composed, is_override, key_of
from fedraclora.tuning.task import tune_folder, tune_task


def main(words: Sequence[str]) -> None:
    """Tune a task, or print the help text."""
    if {"-h", "--help"} & {*words}:
        print(__doc__, (CONF / "tune.yaml").read_text(encoding="utf-8"), sep="\n", end="")
        return
    own = [word for word in words if word.startswith("tune.")]
    rest = [word for word in words if word not in own]
    plain = composed(rest)
    with watched(tune_folder(plain)):
        tune_task(plain, {key_of(word) for word in rest if is_override(word)}, own)
