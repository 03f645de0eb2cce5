"""A run that has come to its end: its figures, its weights, and what to do with them."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from torch import nn
from typing_extensions import override

from fedraclora.config.build import BuiltTask, measured_samples
from fedraclora.config.schema import section
from fedraclora.data.fit import Form, found_shape
from fedraclora.data.objects import found_target, is_frame, table_of
from fedraclora.data.tabular import named_table, new_rows
from fedraclora.errors import ConfigError
from fedraclora.evaluation.evaluate import evaluate
from fedraclora.models.narrow import dequantise
from fedraclora.models.outputs import refuse_outputs
from fedraclora.run.folder import run_title
from fedraclora.tree import Tree
from fedraclora.weights.files import save_tensors
from strategies.server.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

SPLITS = ("test", "validation")


@dataclass(frozen=True, repr=False)
class Run:
    """A run that has come to its end.

    Attributes:
        summary: Its final figures, as in ``summary.json``: ``metrics``, ``rounds``,
            ``uplink_total`` and ``downlink_total`` in bytes, ``weights_digest`` and more.
        rows: The rows of its ledger. Row 0 is what it began from, then one per round: ``round``,
            ``metrics`` by name, ``uplink_total`` and ``downlink_total`` so far in bytes,
            ``train_loss``, ``seconds`` by phase, and what the choices of the run add.
        folder: Where its files lie; None where it ran in memory.
        config: The whole config as plain values; `fedraclora.simulate` takes it for the same run.
        effective: Gives the weights for `weights`.
        built: Gives the task: the model, and what it is measured on.
    """

    summary: dict[str, object]
    rows: list[Row]
    folder: Path | None
    config: dict[str, object]
    effective: Callable[[], Tree]
    built: Callable[[], BuiltTask]

    @override
    def __repr__(self) -> str:
        shown = (f"{key}={self.summary[key]}" for key in ("rounds", "metrics"))
        return f"Run({', '.join(shown)}, folder={self.folder})"

    @cached_property
    def history(self) -> DataFrame:
        """The rows as a frame, one per round, by ``round``: a metric is a column of its name.

        What a round tells in parts stands in columns of dotted names (``seconds.train``).
        """
        import pandas as pd

        frame = pd.json_normalize([dict(row) for row in self.rows], sep=".")
        short = {name: name.removeprefix("metrics.") for name in frame.columns}
        return frame.rename(columns=short).set_index("round")

    def weights(self) -> Tree:
        """Return the effective weights after the last round, all adapters merged.

        Where clients keep a part of the model to themselves, these are the server's weights.

        Returns:
            Name of a parameter of the model -> tensor of the parameter's shape, copied to the CPU:
            ``model.load_state_dict(run.weights(), strict=False)`` takes it.

        Raises:
            CheckpointError: If they are read from the files of a run that was finished before, and
                one is missing or damaged.
        """
        return {n: t.detach().cpu().clone() for n, t in self.effective().items()}

    def model(self) -> nn.Module:
        """Build the trained model: a copy on the CPU, in evaluation mode, with `weights`."""
        model = dequantise(copy.deepcopy(self.built().task.model).cpu())
        parameters = dict(model.named_parameters())
        model.load_state_dict({n: t for n, t in self.weights().items() if n in parameters}, False)
        return model.eval()

    def evaluate(self, data: object = "test", *, target: str | None = None) -> dict[str, float]:
        """Measure the trained model.

        Args:
            data: ``"test"`` or ``"validation"``, the run's own; or samples in memory: ``(inputs,
                target)``, a dataset of torch or of Hugging Face; for a run on a table a frame of
                pandas, which is brought to the scale of the training rows.
            target: Of a frame or a Hugging Face dataset, the column to predict.

        Returns:
            The metrics of the run, by name.

        Raises:
            ConfigError: If the run has no such samples.
            DataError: If the samples are not such as the run's.
        """
        built = self.built()
        task = built.task
        if isinstance(data, str):
            if data not in SPLITS:
                raise ConfigError(f"data is {data!r}; {' or '.join(SPLITS)}, or samples are wanted")
            samples = measured_samples(task, data)
        else:
            like = task.test
            form = Form(found_shape(like), task.loss, built.classes or None)
            if is_frame(data):
                frame = named_table(data, "data")
                table = new_rows(frame, target or found_target(frame[0]), task.reading)
            else:
                table = table_of(data, "data", target)
            samples = form.fit(table, "data").to(
                built.device, next(iter(like.inputs.values())).dtype if "x" in like.inputs else None
            )
            refuse_outputs(task.model, samples, 1 + int(samples.target.max()), task.loss)
        weights = {n: t.to(built.device) for n, t in self.weights().items()}
        return evaluate(task.model, weights, samples, task.loss, task.metrics)

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the curves of the run; a notebook shows what it gives.

        Args:
            path: Where to write them as a PNG, too; None: nowhere.
        """
        from fedraclora.plots.axes import write_png
        from fedraclora.plots.run import figure_of

        figure = figure_of(self.rows, run_title(self.config))
        if path is not None:
            write_png(figure, Path(path).expanduser())
        return figure

    def export(
        self,
        folder: str | Path,
        format: str = "peft",  # noqa: A002
        rank: int | None = None,
        round: int | None = None,  # noqa: A002
    ) -> dict[str, object]:
        """Write the trained model in a form that other libraries read, with a model card.

        Args:
            folder: Made where it is missing.
            format: ``peft`` (an adapter of W_T - W_0), ``hf`` (a merged Hugging Face folder),
                ``state_dict`` (one safetensors file) or ``gguf`` (models of Llama form).
            rank: With ``peft``, the largest rank of a layer; None: the rank that its change has.
            round: Of the weights, from the chain of a run with a folder; None: those of the end.

        Returns:
            What ``export.json`` holds of it beside the run's own facts: with ``peft`` for each
            layer its ``rank``, the ``rank_of_change``, and the ``relative_error``.

        Raises:
            ConfigError: If the format does not fit the model, or the folder holds something.
            ModelError: If the format has no place for a layer.
            CheckpointError: If a file of the run is missing or damaged.
        """
        from fedraclora.export import export
        from strategies.trained import trained_model

        task, facts = self.built().task, self._facts(round)
        trained = trained_model(self.config, self.folder, task, self.effective, facts, round)
        place = Path(folder).expanduser()
        record = export(trained, place, format, rank)
        return {**record, "warnings": list(trained.warnings), "folder": str(place)}

    def _facts(self, round_: int | None) -> dict[str, object]:
        """Collect what a model card says of the run, as it was after a round."""
        last = self.rows[-1]["round"] if round_ is None else round_
        row: Mapping[str, object] = next((r for r in self.rows if r["round"] == last), {})
        return {
            **{key: section(self.config, key) for key in ("method", "data", "model")},
            **{key: self.built().task.info[key] for key in ("loss", "loss_from")},
            "wire": self.config.get("wire", {}),
            "rounds": last,
            "clients": self.built().clients,
            "cohort": self.built().cohort,
            "metrics": row.get("metrics"),
            "uplink_bytes": row.get("uplink_total"),
            "downlink_bytes": row.get("downlink_total"),
            "seed": self.config.get("seed"),
            "samples": self.built().task.reading,
        }

    def save(self, folder: str | Path) -> Path:
        """Write what the run came to: weights, history, figures, config.

        Args:
            folder: Made where it is missing. It is no run folder: a run that is to be gone on with
                is run with ``folder=...`` in the first place.

        Returns:
            The folder, with ``model.safetensors`` (`weights`), ``history.csv``, ``summary.json``
            and ``config.yaml``.

        Raises:
            ConfigError: If the folder holds something already.
        """
        place = Path(folder).expanduser()
        if place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise ConfigError(f"{place} is not empty; name a new folder")
        place.mkdir(parents=True, exist_ok=True)
        save_tensors(place / "model.safetensors", self.weights(), {}, sync=False)
        self.history.to_csv(place / "history.csv")
        (place / "summary.json").write_text(json.dumps(self.summary, indent=2) + "\n")
        (place / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))
        return place
