"""Log to MLflow: to a tracking server, or to the store that its environment names."""

from __future__ import annotations

import os
from collections.abc import Mapping

import mlflow
from mlflow.entities import Metric, Param, RunStatus
from mlflow.utils.time import get_current_time_millis

from fedraclora.run.callback import RunStart
from fedraclora.weights.files import flatten

PROJECT = "fedraclora"
LONGEST = 6000  # most characters of a parameter's value
AT_ONCE = 100  # most parameters of one request


class MLflowLogger:
    """Logs to ``MLFLOW_TRACKING_URI``, in the experiment ``MLFLOW_EXPERIMENT_NAME``."""

    def begin(self, run: RunStart, known: str | None) -> str | None:
        """Create a run, with every setting as a parameter, or resume it."""
        self.client = mlflow.MlflowClient()
        if known is not None:
            self.id = known
            self.client.update_run(self.id, status=RunStatus.to_string(RunStatus.RUNNING))
            return self.id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = self.client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self.client.create_experiment(name)
        self.id = self.client.create_run(number, run_name=run.title).info.run_id
        params = [Param(k, str(v)[:LONGEST]) for k, v in flatten(run.config).items()]
        for first in range(0, len(params), AT_ONCE):
            self.client.log_batch(self.id, params=params[first : first + AT_ONCE])
        return self.id

    def row(self, round_: int, values: Mapping[str, float]) -> None:
        """Log numbers as metrics, the round as their step."""
        now = get_current_time_millis()
        self.client.log_batch(self.id, [Metric(n, v, now, round_) for n, v in values.items()])

    def end(self, summary: Mapping[str, float], *, failed: bool) -> None:
        """Set the status of the run."""
        del summary
        status = RunStatus.FAILED if failed else RunStatus.FINISHED
        self.client.set_terminated(self.id, RunStatus.to_string(status))
