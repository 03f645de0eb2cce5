"""Use a finished run: metrics, weights, evaluation, prediction and export."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import yaml
from torch import nn
from typing_extensions import override

from fedraclora.binding import section
from fedraclora.config.build import answering_of, measured_samples
from fedraclora.config.builder import TaskBuilder
from fedraclora.config.run_config import RunConfig
from fedraclora.data.dataset import EncodedSamples
from fedraclora.data.locate import user_path
from fedraclora.errors import ConfigError, DataError
from fedraclora.evaluation.choices import measure_of
from fedraclora.evaluation.evaluate import Prediction, predict
from fedraclora.models.built import check_fit, dequantize
from fedraclora.models.outputs import refuse_outputs
from fedraclora.run.folder import refuse_full
from fedraclora.run.ledger import Row
from fedraclora.run.recorder import Columns
from fedraclora.run.trusted import refuse_linked
from fedraclora.strategies.weights import load_weights
from fedraclora.tree import Tree
from fedraclora.weights.files import make_folder, save_tensors, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

SPLITS = ("test", "validation")


@dataclass(frozen=True, repr=False)
class RunResult:
    """Hold the result of a finished run.

    Attributes:
        summary: Its final figures, as in ``summary.json``: ``metrics``, ``rounds``,
            ``uplink_total`` and ``downlink_total`` in bytes, ``weights_digest`` and more.
        rows: The rows of its ledger: row 0 for the initial weights, then one per round: ``round``,
            ``metrics`` by name, ``uplink_total`` and ``downlink_total`` so far in bytes,
            ``train_loss``, ``seconds`` by phase, and further columns of the run's choices.
        folder: The run folder; None if it ran in memory.
        settings: Its checked settings.
        effective: Returns the weights for `weights`.
        builder: Builds the task: model and samples.
        by_clients: Returns the columns of `clients`.
    """

    summary: dict[str, object]
    rows: list[Row]
    folder: Path | None
    settings: RunConfig
    effective: Callable[[], Tree]
    builder: TaskBuilder
    by_clients: Callable[[], Columns] = dict

    @override
    def __repr__(self) -> str:
        shown = (f"{key}={self.summary[key]}" for key in ("rounds", "metrics"))
        return f"RunResult({', '.join(shown)}, folder={self.folder})"

    @cached_property
    def config(self) -> dict[str, object]:
        """Return the whole config as plain values, which `fedraclora.simulate` accepts."""
        return dict(self.settings.plain)

    @cached_property
    def clients(self) -> DataFrame:
        """Return the clients' metrics (``evaluate.clients``), a row for each round and client.

        Columns: ``round``, ``client``, ``samples`` (measured), local ``steps`` in between, ``when``
        (before or after these), and each metric; empty if no client measured.
        """
        import pandas as pd

        return pd.DataFrame(self.by_clients())

    @cached_property
    def history(self) -> DataFrame:
        """Return the ledger as a frame, indexed by ``round``, with a column for each metric.

        Nested values have columns with dotted names (``seconds.train``).
        """
        import pandas as pd

        frame = pd.json_normalize([dict(row) for row in self.rows], sep=".")
        short = {name: name.removeprefix("metrics.") for name in frame.columns}
        free = {name: new for name, new in short.items() if new not in frame.columns}
        return frame.rename(columns=free).set_index("round")

    def weights(self, round: int | None = None) -> Tree:  # noqa: A002
        """Return the effective weights after the last round, all adapters merged.

        If clients keep a personal part of the model, these are the server's weights.

        Args:
            round: Another round, from the stored merges of a run with a folder.

        Returns:
            Name of a parameter of the model -> tensor of the parameter's shape, copied to the CPU,
            for ``model.load_state_dict(run.weights(), strict=False)``.

        Raises:
            ConfigError: If the run is in memory and the round is not the last.
            CheckpointError: If they are read from files, and one is missing or damaged.
        """
        if round is not None and self.folder is None:
            raise ConfigError(
                f"round={round}: a run in memory keeps only its last weights. Run it with "
                "folder=..."
            )
        if round is None:
            found = self.effective()
        else:
            found = load_weights(Path(str(self.folder)), round, own=self.config)
        return {n: t.detach().cpu().clone() for n, t in found.items()}

    def model(self) -> nn.Module:
        """Build the trained model: a copy on the CPU, in evaluation mode, with `weights`."""
        model = dequantize(copy.deepcopy(self.builder.task.model).cpu())
        parameters = dict(model.named_parameters())
        model.load_state_dict({n: t for n, t in self.weights().items() if n in parameters}, False)
        return model.eval()

    def evaluate(
        self,
        data: object = "test",
        *,
        target: str | None = None,
        round: int | None = None,  # noqa: A002
    ) -> dict[str, float]:
        """Measure the trained model.

        Args:
            data: As for `read`.
            target: As for `read`.
            round: The round of the weights, from the stored merges of a run with a folder; None:
                the end.

        Returns:
            The metrics of the run, by name; for its own samples, those in that round's row.

        Raises:
            ConfigError: If the run has no such samples, or no complete model, since clients keep a
                part.
            DataError: If the samples have another form than the run's.
            CheckpointError: If a file of the run is missing or damaged.
        """
        weights, asked, task = self._whole(round), self.settings.evaluate, self.builder.task
        read = self.read(data, target=target)
        found = measure_of(task, read.samples, asked.batch_size)(weights)
        if (answering := answering_of(asked, task, read.samples)) is not None:
            found |= answering.columns(weights)[0]
        return found

    def predict(self, data: object, *, round: int | None = None) -> DataFrame:  # noqa: A002
        """Predict with the trained model.

        Args:
            data: As for `read`; a target is not needed, and ignored.
            round: As for `evaluate`.

        Returns:
            One row for each row of the data, in order, with a frame's index. For classes,
            ``prediction`` has the target's value (the class name, or its number, an int), and
            ``probability.NAME`` the probability of each; for numbers, ``prediction`` is on the raw
            scale; for conversations, it is the answer. Rows that the run's own data would leave out
            (``data.missing=drop``, an empty text) have none.

        Raises:
            ConfigError: As `evaluate`.
            DataError: If the samples have another form than the run's.
            CheckpointError: If a file of the run is missing or damaged.
        """
        import pandas as pd

        weights, asked, task = self._whole(round), self.settings.evaluate, self.builder.task
        read = self.read(data, measured=False)
        if task.loss == "next_token" and task.tokenizer is not None:
            every = replace(asked, generate=1, answers=len(read.samples))
            answering = answering_of(every, task, read.samples)
            texts = [] if answering is None else answering.texts(weights)
            words: list[Prediction] = [{"prediction": text} for text in texts]
        else:
            given = read.samples, task.reads, task.reading, asked.batch_size
            words = predict(task.model, weights, *given)
        rows: list[Prediction] = [{} for _ in range(read.total)]
        for row, found in zip(read.rows.tolist(), words, strict=True):
            rows[row] = found
        frame = pd.json_normalize(rows, sep=".")
        if int in {type(row.get("prediction")) for row in rows} and len(words) < len(rows):
            answers = [row.get("prediction", np.nan) for row in rows]
            # beside NaN, integers became floats
            frame["prediction"] = pd.Series(answers, dtype=object)
        index = getattr(data, "index", None)
        return frame.set_axis(index) if isinstance(index, pd.Index) else frame

    def read(
        self, data: object, *, target: str | None = None, measured: bool = True
    ) -> EncodedSamples:
        """Encode samples as the run encoded its own: columns, classes, scale, tokens, template.

        Args:
            data: ``"test"`` or ``"validation"``, the run's own; the path of a file of the same kind
                as the run's training data (for arrays a ``.npz`` file); or samples in memory: for a
                run on a table or on texts a pandas frame; ``(inputs, target)``, or only inputs if
                nothing is measured, raw like the run's; a data set of torch or Hugging Face; a list
                of texts, of prompts, or of dicts that are conversations.
            target: The column to predict of a frame or a Hugging Face data set; None: as in the
                run.
            measured: Whether there must be a target.

        Returns:
            The samples on the run's device, and their row numbers in ``data``.

        Raises:
            ConfigError: If the run has no such samples, or a column is missing.
            DataError: If the samples have another form than the run's.
        """
        if isinstance(data, EncodedSamples):
            return data
        built = self.builder.built
        if isinstance(data, str) and data in SPLITS:
            samples = measured_samples(built.task, data)
            if not len(samples):
                raise ConfigError(
                    "the run has no test samples, so the server cannot evaluate. Pass a file "
                    "or samples; run.rows has the metrics that clients measured, if any"
                )
            return EncodedSamples(samples, np.arange(len(samples)), len(samples))
        if isinstance(data, str | Path):
            data = user_path("data", data)
            if not data.is_file():
                raise DataError(
                    f"data={str(data)!r:.300}: no such file. Pass the path of a file, "
                    f"{' or '.join(SPLITS)}"
                )
        reader = built.task.reader
        named = {"label": target, "column": target} if target is not None else {}
        if named := {key: name for key, name in named.items() if hasattr(reader, key)}:
            reader = replace(reader, **named)
        read: EncodedSamples = reader(data, built.task.reading, target=measured)
        # token ids that the server has not seen
        wanted = built.task.test.inputs or read.samples.inputs
        own = next(iter(wanted.values())).dtype
        dtype = own if own.is_floating_point else None
        samples = read.samples.clone().to(built.device, dtype)
        if samples.inputs.keys() != wanted.keys():
            raise DataError(
                f"data: the inputs are {[*samples.inputs]}, expected {[*wanted]} as in the "
                "run's own samples"
            )
        for name, value in samples.inputs.items():
            if value.is_floating_point() and not wanted[name].is_floating_point():
                raise DataError(
                    f"data: {name} has the type {value.dtype}, expected integers as in the "
                    "run's own samples"
                )
        check_fit(built.task.model, samples.inputs)
        if measured:
            top = 0 if samples.target.is_floating_point() else int(samples.target.max())
            refuse_outputs(built.task.model, samples, top + 1, built.task.reads)
        return replace(read, samples=samples)

    def _whole(self, round_: int | None) -> Tree:
        """Return the weights on the run's device; refuse a model with personal parts."""
        config = self.settings
        if config.method.client_state or config.head == "personal":
            kept = "its head (head=personal)"
            if config.method.client_state:
                kept = f"a factor of every adapter ({type(config.method).__name__})"
            raise ConfigError(
                f"each client keeps {kept} private, so the server has no complete model to "
                "evaluate or to predict with. The run's rows have the metrics that clients "
                "measured (personal_...)"
            )
        return {n: t.to(self.builder.built.device) for n, t in self.weights(round_).items()}

    def plot(self, path: str | Path | None = None) -> Figure:
        """Draw the curves of the run; return a figure that a notebook shows.

        Args:
            path: A PNG to write as well; None: none.
        """
        from fedraclora.plots.axes import write_png
        from fedraclora.plots.run import figure_of

        figure = figure_of(self.rows, self.settings.title)
        if path is not None:
            write_png(figure, user_path("path", path))
        return figure

    def export(
        self,
        folder: str | Path,
        format: str = "peft",  # noqa: A002
        rank: int | None = None,
        round: int | None = None,  # noqa: A002
        *,
        check: bool = True,
    ) -> dict[str, object]:
        """Write the trained model in a format of other libraries, with a model card.

        Args:
            folder: The target folder; created if missing.
            format: ``peft`` (an adapter of W_T - W_0), ``hf`` (a merged Hugging Face folder),
                ``state_dict`` (one safetensors file) or ``gguf`` (models of Llama form).
            rank: With ``peft``, the largest rank of a layer; None: the rank of its change.
            round: The round of the weights, from the stored merges of a run with a folder; None:
                the end.
            check: Read the files back with the library that they are for.

        Returns:
            The export's entries in ``export.json``: with ``peft``, for each layer its ``rank``, the
            ``rank_of_change``, and the ``relative_error``.

        Raises:
            ConfigError: If the format does not fit the model, or the folder is not empty.
            ModelError: If the format does not support a layer.
            CheckpointError: If a file of the run is missing or damaged.
        """
        from fedraclora.export import export
        from fedraclora.strategies.trained import trained_model

        task, facts = self.builder.task, self._facts(round)
        weights = partial(self.weights, round)
        trained = trained_model(self.settings, self.folder, task, weights, facts, round)
        place = user_path("folder", folder)
        record = export(trained, place, format, rank, check=check)
        return {**record, "folder": str(place)}

    def _facts(self, round_: int | None) -> dict[str, object]:
        """Collect the facts of a model card, as they were after a round."""
        last = self.rows[-1]["round"] if round_ is None else round_
        row: Mapping[str, object] = next((r for r in self.rows if r["round"] == last), {})
        return {
            **{key: section(self.config, key) for key in ("method", "data", "model")},
            **{key: self.builder.task.info[key] for key in ("loss", "loss_from")},
            "compression": self.config.get("compression", {}),
            "rounds": last,
            "clients": self.builder.built.clients,
            "cohort": self.builder.built.cohort,
            "metrics": row.get("metrics"),
            "uplink_bytes": row.get("uplink_total"),
            "downlink_bytes": row.get("downlink_total"),
            "seed": self.config.get("seed"),
            "samples": self.builder.task.reading,
        }

    def save(self, folder: str | Path) -> Path:
        """Write the result to a folder: weights, history, summary, config.

        Args:
            folder: The target folder; created if missing. It is no run folder: to resume a run
                later, run it with ``folder=...``.

        Returns:
            The folder, with ``model.safetensors`` (`weights`), ``history.csv``, ``summary.json``
            and ``config.yaml``.

        Raises:
            ConfigError: If the folder is not empty, or cannot be created.
        """
        place = user_path("folder", folder)
        try:
            refuse_linked(place)
            refuse_full(place)
            make_folder(place, private=True)
        except OSError as error:
            raise ConfigError(f"cannot make {place} ({error}). Name another folder") from error
        save_tensors(place / "model.safetensors", self.weights(), {}, sync=False)
        write_text(place / "history.csv", self.history.to_csv())
        write_text(place / "summary.json", json.dumps(self.summary, indent=2) + "\n")
        write_text(place / "config.yaml", yaml.safe_dump(self.config, sort_keys=False))
        return place
